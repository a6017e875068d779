"""The vision tower: an image in, one feature vector per patch out.

    vit = ViT.from_pretrained("openai/clip-vit-large-patch14-336")   # a folder, or a Hub id
    patches = vit(pixels)                                            # (B, 3, 336, 336) -> (B, 576, 1024)

A ViT cuts the image into square patches and maps each to a vector. Then come blocks of attention, by which
patches exchange information, and of an MLP, which works on each patch alone. One class serves CLIP (Radford
et al. 2021, arXiv 2103.00020), SigLIP (2303.15343), SigLIP 2 (2502.14786) and DINOv2 (2304.07193). The table
FAMILIES lists their differences. A wrong column makes loading fail. A wrong mean or std does not, and gives
garbage features.

LLaVA reads the output of the last block but one (`feature_layer=-2`), without final LayerNorm and class
token. CLIP's training reads that token alone, so its last block need not describe the patches any more.

Letters, here and in every other file: B batch, P patches, L patches and class token, N image tokens (what a
projector makes of the patches: often as many), T text tokens, S sequence, D ViT width, C LLM width, H heads,
V vocabulary, W ranks, I images of a batch. In (B, 3, H, W) H and W are height and width.

Module names are those of CLIP's and SigLIP's Hugging Face checkpoints, which plumbing/clip.py reads.
Read next: llm.py (the language tower).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import clip
from plumbing.files import resolve, resolve_model
from plumbing.weights import config_from_dict, load_strictly, write_weights


class Family(NamedTuple):
    class_token: bool  # one more token before the patches: it stands for the whole picture
    patch_bias: bool  # the patch embedding has a bias
    pre_norm: bool  # a LayerNorm before the first block
    layer_scale: bool  # a learned vector multiplies the output of attention and of the MLP
    mean: tuple  # training normalised pixels from 0 to 1 by this mean: (red, green, blue)
    std: tuple  # and by this standard deviation
    architecture: str | None  # the class of transformers that opens what `save_pretrained` writes


FAMILIES = {  # by config.json's model_type
    "clip_vision_model": Family(
        class_token=True, patch_bias=False, pre_norm=True, layer_scale=False,
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
        architecture="CLIPVisionModel"),
    "siglip_vision_model": Family(
        class_token=False, patch_bias=True, pre_norm=False, layer_scale=False,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), architecture="SiglipVisionModel"),
    "dinov2": Family(
        class_token=True, patch_bias=True, pre_norm=False, layer_scale=True,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        architecture=None),  # only whole models are written with it
}
ACTIVATIONS = {  # by config.json's hidden_act: CLIP has the first, DINOv2 the second, SigLIP the third
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


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
    image_mean: tuple = ()  # for data.preprocess, like the next two; empty: the family's
    image_std: tuple = ()
    resample: int = 3  # Pillow's number of a filter; 3 is bicubic

    def __post_init__(self):
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise ValueError(f"images of {self.image_size}, patches of {self.patch_size}: only squares do")
        if self.model_type not in FAMILIES:
            raise ValueError(f"the ViT's model_type is {self.model_type!r}; known: {', '.join(FAMILIES)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"the ViT's hidden_act is {self.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"width {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        self.image_mean = tuple(self.image_mean or self.family.mean)
        self.image_std = tuple(self.image_std or self.family.std)

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
        D = config.hidden_size
        self.image_size = config.image_size
        self.has_class_token = config.family.class_token
        if self.has_class_token:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        # One matrix maps each patch to D numbers: a convolution whose stride is its own width.
        self.patch_embedding = nn.Conv2d(
            3, D, kernel_size=config.patch_size, stride=config.patch_size, bias=config.family.patch_bias)
        self.position_embedding = nn.Embedding(self.has_class_token + config.num_patches, D)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(f"an image of {height} x {width} pixels; the position table is of "
                             f"{self.image_size} x {self.image_size}")
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        if self.has_class_token:
            x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)  # (B, 1 + P, D)
        return x + self.position_embedding.weight  # (B, L, D)


class Attention(nn.Module):
    """Every token looks at every token: no mask. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D / H)

    def forward(self, x):
        q = self.split_heads(self.q_proj(x))  # (B, H, L, D / H)
        k = self.split_heads(self.k_proj(x))  # (B, H, L, D / H)
        v = self.split_heads(self.v_proj(x))  # (B, H, L, D / H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, D / H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)


class MLP(nn.Module):
    """Two linear layers, on each token alone. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiply x (B, L, D) by a learned vector (D,). Only DINOv2 does."""

    def __init__(self, D: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.lambda1


class Block(nn.Module):
    """Attention, then the MLP. Each reads normalised input and adds to x. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        has_scale = config.family.layer_scale
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
    """`vit(pixels (B, 3, H, W)) -> patch features (B, P, D)`, without class token and final LayerNorm.

    `feature_layer` counts like Hugging Face's `hidden_states`: 0 is the embedding, k the output of block k.
    Negative numbers count from the end. Later blocks never run, but stay, so that the tower is saved whole.
    """

    def __init__(self, config: ViTConfig, feature_layer: int = -2):
        super().__init__()
        layers = config.num_hidden_layers
        if not -layers - 1 <= feature_layer <= layers:
            raise ValueError(f"feature_layer {feature_layer} does not exist in a tower of {layers} blocks")
        self.config, self.feature_layer = config, feature_layer
        self.num_patches = config.num_patches
        self.blocks_run = feature_layer % (layers + 1)  # -2 of 24 blocks: 23
        self.embeddings = Embeddings(config)
        has_norm, D, eps = config.family.pre_norm, config.hidden_size, config.layer_norm_eps
        self.pre_layrnorm = nn.LayerNorm(D, eps) if has_norm else nn.Identity()  # CLIP's own spelling
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(D, eps)  # never runs

    def forward(self, pixels):
        pixels = pixels.to(self.embeddings.patch_embedding.weight.dtype)  # (B, 3, H, W)
        x = self.pre_layrnorm(self.embeddings(pixels))  # (B, L, D)
        for block in self.encoder["layers"][: self.blocks_run]:
            x = block(x)
        if self.config.family.class_token:
            x = x[:, 1:]
        return x  # (B, P, D)

    @classmethod
    def from_pretrained(cls, folder_or_id, feature_layer: int = -2, dtype=torch.float32, device="cpu"):
        """The frozen tower of a folder of CLIP, SigLIP or DINOv2, or of LLaVA in transformers' format.
        ValueError if tensors do not fit."""
        folder = resolve_model(folder_or_id)
        with torch.device("meta"):  # only shapes: the weights come from the files
            vit = cls(load_vit_config(folder), feature_layer)
        load_strictly(vit, clip.read_tensors(folder), folder, dtype, device, clip.our_name)
        return vit.requires_grad_(False).eval()

    def save_pretrained(self, folder):
        """Write config.json, preprocessor_config.json and model.safetensors, as transformers reads them."""
        architecture = self.config.family.architecture
        if architecture is None:
            raise ValueError(f"a tower of type {self.config.model_type} is not written alone")
        config = clip.config_json(self.config) | {"architectures": [architecture]}
        write_weights(dict(self.named_parameters()), folder, config)
        clip.write_preprocessor_config(self.config, folder)


def load_vit_config(folder_or_id) -> ViTConfig:
    """The sizes of the tower in a folder or on the Hub, without its weights."""
    folder = resolve(folder_or_id, ["*.json"])
    return config_from_dict(ViTConfig, clip.read_sizes(folder), folder)
