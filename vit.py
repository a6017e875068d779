"""The vision tower: an image in, one feature vector per patch out.

    vit = ViT.from_pretrained("openai/clip-vit-large-patch14-336")   # a folder, or a Hub id
    patches = vit(pixels)                                            # (B, 3, 336, 336) -> (B, 576, 1024)

One plain ViT for three families: CLIP (Radford et al. 2021, arXiv 2103.00020), SigLIP and SigLIP 2
(2303.15343), and DINOv2 (Oquab et al. 2023, 2304.07193). What tells them apart is the table FAMILIES; with
one of its columns wrong, pretrained weights are refused or, with mean or std, compute nonsense.

LLaVA reads the output of the last block but one (`feature_layer=-2`), before any final LayerNorm, and drops
the class token: the last block is trained to fill the class token alone, the one before still describes the
patches.

Module names are those of CLIP's and SigLIP's Hugging Face checkpoints, so only DINOv2 needs a table of names.
The end of this file, "On disk", is the one reader of folders, JSON and weights for every other file too.

Letters, here and in every other file: B batch, P patches, N image tokens (what a projector makes of the
patches: often as many), T text tokens, S sequence, D ViT width, C LLM width, H heads, V vocabulary, W ranks,
I images of a batch. Only in (B, 3, H, W), pictures, are H and W height and width.

Read next: llm.py (the language tower), then projector.py (the bridge between the two).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from plumbing.clip import (DINOV2_ROWS, our_vit_name, vit_config_from_dict, vit_config_to_dict,
                           write_preprocessor_config)
from plumbing.files import named, resolve, resolve_model
from plumbing.weights import load_strictly, read_config, read_weights, write_weights


class Family(NamedTuple):
    class_token: bool  # one more token before the patches, which stands for the whole picture
    patch_bias: bool  # the patch embedding has a bias
    pre_norm: bool  # a LayerNorm before the first block
    layer_scale: bool  # a learned vector multiplies each branch of a block before it is added
    mean: tuple  # what pixels from 0 to 1 were normalised with in training: (red, green, blue)
    std: tuple
    architecture: str | None  # the class of transformers that opens what `save_pretrained` writes


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FAMILIES = {  # by config.json's model_type; the columns are the fields above
    "clip_vision_model": Family(True, False, True, False, CLIP_MEAN, CLIP_STD, "CLIPVisionModel"),
    "siglip_vision_model": Family(False, True, False, False, (0.5,) * 3, (0.5,) * 3, "SiglipVisionModel"),
    "dinov2": Family(True, True, False, True, IMAGENET_MEAN, IMAGENET_STD, None),  # read, not written
}
ACTIVATIONS = {  # by config.json's hidden_act: CLIP has the first, DINOv2 the second, SigLIP the third
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
BICUBIC = 3  # Pillow's number for bicubic resampling, which transformers uses too


@dataclass
class ViTConfig:
    """Sizes of the tower, named as in Hugging Face's config.json. The defaults are CLIP ViT-L/14-336."""

    image_size: int = 336  # pixels a side
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    model_type: str = "clip_vision_model"
    image_mean: tuple = ()  # these three, for data.preprocess, come from preprocessor_config.json; without it
    image_std: tuple = ()  # the first two are the family's
    resample: int = BICUBIC

    def __post_init__(self):
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise ValueError(f"images of {self.image_size}, patches of {self.patch_size}: only squares do")
        for name, known in (("model_type", FAMILIES), ("hidden_act", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"the ViT's {name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"width {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        self.image_mean = tuple(self.image_mean or self.family.mean)
        self.image_std = tuple(self.image_std or self.family.std)
        if any(len(x) != 3 for x in (self.image_mean, self.image_std)) or not all(
                isinstance(x, (int, float)) and math.isfinite(x) for x in self.image_mean + self.image_std
                ) or 0 in self.image_std:
            raise ValueError(f"image_mean is {self.image_mean}, image_std {self.image_std}")
        if self.resample not in range(6):
            raise ValueError(f"resample is {self.resample!r}; Pillow's filters are 0 to 5")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # P; SigLIP's 384 / 14 leaves a border unseen


class Embeddings(nn.Module):
    """Pixels (B, 3, H, W) -> patches with positions added, (B, L, D). L is P, or 1 + P with a class token."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, self.num_patches = config.hidden_size, config.num_patches
        self.has_class_token = config.family.class_token
        if self.has_class_token:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        # One matrix maps each patch to D numbers: a convolution whose stride is its own width.
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size,
                                         bias=config.family.patch_bias)
        self.position_embedding = nn.Embedding(self.has_class_token + self.num_patches, D)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        if x.shape[1] != self.num_patches:
            raise ValueError(f"an image of {height} x {width} gives {x.shape[1]} patches; "
                             f"the position table holds {self.num_patches}")
        if self.has_class_token:
            x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)  # (B, 1 + P, D)
        return x + self.position_embedding.weight  # (B, L, D)


class Attention(nn.Module):
    """Every token looks at every token: no mask. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, self.num_heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        B, L, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D / H)
        k = self.k_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D / H)
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D / H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, D / H)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))  # (B, L, D)


class MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """x times a learned vector (D,): DINOv2's."""

    def __init__(self, D: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.lambda1


class Block(nn.Module):
    """Pre-norm: attention, then the MLP, each added to what came in. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, has_scale = config.hidden_size, config.family.layer_scale
        self.layer_norm1 = nn.LayerNorm(D, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_scale1 = LayerScale(D) if has_scale else nn.Identity()
        self.layer_norm2 = nn.LayerNorm(D, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(D) if has_scale else nn.Identity()

    def forward(self, x):
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x)))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class ViT(nn.Module):
    """`vit(pixels (B, 3, H, W)) -> patch features (B, P, D)`: no class token, no final LayerNorm.

    `feature_layer` counts like Hugging Face's `hidden_states`: 0 is the embedding, k the output of block k,
    negative numbers count from the end. Blocks behind it are kept (the tower stays whole on disk), never run.
    """

    def __init__(self, config: ViTConfig, feature_layer: int = -2):
        super().__init__()
        layers = config.num_hidden_layers
        if not -layers - 1 <= feature_layer <= layers:
            raise ValueError(f"feature_layer {feature_layer} does not exist in a tower of {layers} blocks")
        self.config, self.feature_layer, self.num_patches = config, feature_layer, config.num_patches
        self.blocks_run = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer  # -2 of 24: 23
        self.embeddings = Embeddings(config)
        if config.family.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # kept, never run

    def forward(self, pixels):
        pixels = pixels.to(self.post_layernorm.weight.dtype)  # (B, 3, H, W)
        x = self.embeddings(pixels)  # (B, L, D)
        if self.config.family.pre_norm:
            x = self.pre_layrnorm(x)
        for block in self.encoder["layers"][: self.blocks_run]:
            x = block(x)
        return x[:, 1:] if self.config.family.class_token else x  # (B, P, D)

    @classmethod
    def from_pretrained(cls, folder_or_id, feature_layer: int = -2, dtype=torch.float32, device="cpu"):
        """The frozen tower of a folder of CLIP, SigLIP or DINOv2. Strict: see `load_strictly`."""
        folder = resolve_model(folder_or_id)
        with torch.device("meta"):  # shapes only; the weights come from the files
            vit = cls(load_vit_config(folder), feature_layer)
        tensors = ((name, tensor.squeeze() if name in DINOV2_ROWS else tensor)
                   for name, tensor in read_weights(folder))
        load_strictly(vit, tensors, folder, dtype, device, our_vit_name)
        return vit.requires_grad_(False).eval()

    def save_pretrained(self, folder):
        """Write config.json, preprocessor_config.json and model.safetensors, which transformers opens as the
        same tower. ValueError for DINOv2, whose names we do not keep."""
        architecture = self.config.family.architecture
        if architecture is None:
            raise ValueError(f"a tower of type {self.config.model_type} is read, not written")
        config = vit_config_to_dict(self.config) | {"architectures": [architecture]}
        write_weights(dict(self.named_parameters()), folder, config)
        write_preprocessor_config(self.config, folder)


# ------------------------------------------------------------------------------------------------------------
# On disk, the vision tower's own part: config.json, preprocessor_config.json, and the names of the tensors

def load_vit_config(folder_or_id) -> ViTConfig:
    """The sizes of the tower in a folder or on the Hub, without its weights."""
    folder = resolve(folder_or_id, ["*.json"])
    with named(folder):
        config = read_config(folder, ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2"))
        return vit_config_from_dict(ViTConfig, config.get("vision_config", config), folder)  # a whole CLIP wraps two
