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

import json
import math
import re
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


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
        return vit_config_from_dict(config.get("vision_config", config), folder)  # a whole CLIP wraps two


def vit_config_from_dict(config: dict, folder: Path) -> ViTConfig:
    """From the content of a config.json whose defaults are filled in; `folder` is where it lies."""
    if config.get("use_swiglu_ffn"):
        raise ValueError(f"{folder}: DINOv2 giant's gated MLP is not supported")
    if config["model_type"] == "dinov2":
        config["intermediate_size"] = config["hidden_size"] * config["mlp_ratio"]
    file = folder / "preprocessor_config.json"
    preprocessor = read_json(file) if file.exists() else {}
    config |= {key: preprocessor.get(key) for key in ("image_mean", "image_std", "resample")}
    return config_from_dict(ViTConfig, config, folder)


def vit_config_to_dict(config: ViTConfig) -> dict:
    return asdict(config) | {"vision_use_head": False}  # SigLIP's pooling head, which we do not keep


def write_preprocessor_config(config: ViTConfig, folder, fit: str = "crop"):
    """preprocessor_config.json, of which transformers makes CLIP's or LLaVA's processor: what data.preprocess
    does with "crop" or "pad", for every family. (SigLIP's own squeezes pictures to squares.)"""
    size = config.image_size
    kind = {"crop": {"image_processor_type": "CLIPImageProcessor"},
            "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True}}[fit]
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(
        kind | {"do_resize": True, "size": {"shortest_edge": size},
         "resample": config.resample, "do_center_crop": True, "crop_size": {"height": size, "width": size},
         "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
         "image_mean": config.image_mean, "image_std": config.image_std}, indent=2) + "\n")


# What a folder holds beside the tower: a text half, SigLIP's pooling head, DINOv2's training mask.
NOT_OURS = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)"
                      r"|(vision_model\.)?head\.|embeddings\.mask_token|.*position_ids$")
DINOV2_ROWS = ("embeddings.cls_token", "embeddings.position_embeddings")  # these have a batch axis of one
DINOV2_NAMES = (  # a part of their name, ours; no name of CLIP or SigLIP holds one of these parts
    ("cls_token", "class_embedding"), ("position_embeddings", "position_embedding.weight"),
    ("patch_embeddings.projection", "patch_embedding"), ("encoder.layer.", "encoder.layers."),
    ("attention.attention.", "self_attn."), ("attention.output.dense", "self_attn.out_proj"),
    (".query", ".q_proj"), (".key", ".k_proj"), (".value", ".v_proj"),
    (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"))


def our_vit_name(name: str) -> str:
    """Our name of a tensor in a folder of any family; "" for what is not the tower's."""
    if NOT_OURS.match(name):
        return ""
    name = name.removeprefix("vision_model.")
    for theirs, ours in DINOV2_NAMES:
        name = name.replace(theirs, ours)
    return f"post_{name}" if name.startswith("layernorm.") else name  # DINOv2's last norm


# ------------------------------------------------------------------------------------------------------------
# On disk, the one reader for all files. Nothing is unpickled but plain tensors.

MODEL_FILES = ("*.json", "*.jinja", "*.safetensors")  # also those of a run directory, where some lie deeper
TOKENIZER_FILES = ("*token*", "*.jinja", "vocab*", "merges*")  # whatever its kind


def resolve(folder_or_id, patterns) -> Path:
    """A local folder (as given, or below this project), else a folder with the files of a Hub id that fit one
    of the patterns (HF_HUB_OFFLINE=1 works). FileNotFoundError if there is neither."""
    for folder in (Path(folder_or_id), Path(__file__).parent / folder_or_id):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download  # imported late: only those who download need it
    try:  # consolidated*: the same weights in Mistral's own form
        return Path(snapshot_download(str(folder_or_id), allow_patterns=list(patterns),
                                      ignore_patterns=["consolidated*"]))
    except Exception as error:  # whatever the network says, the reader needs the name that was not found
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__}: {str(error).strip().splitlines()[0]})") from error


def resolve_model(folder_or_id) -> Path:
    """Like `resolve`, for a folder with weights; .bin files are fetched only where there are no
    safetensors."""
    folder = resolve(folder_or_id, MODEL_FILES)
    has_weights = any(folder.glob("*.safetensors"))
    return folder if has_weights else resolve(folder_or_id, ("*.json", "pytorch_model*.bin"))


@contextmanager
def named(what, problem: str = ""):
    """Whatever a decoder, a tokenizer or a serialiser raises within becomes a ValueError of one line: `what`,
    a file or a record, the problem, and the error. One that begins with `what` already stays as it is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panic of a library in Rust is no Exception
        is_plain, text = isinstance(error, (OSError, ValueError)), " ".join(str(error).split())
        if is_plain and text.startswith(str(what)):
            raise
        kind = "" if is_plain and text else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {problem and problem + ': '}{kind}{text[:400]}") from error


@contextmanager
def whole(path):
    """Yield a name beside `path` to write to: what is written there becomes `path` when all of it is, and is
    gone when it cannot be, as on a full disk."""
    building = Path(f"{path}.partial")
    try:
        with named(path, "not written"):
            yield building
            building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def read_text(path) -> str:
    """A file in UTF-8, with or without the mark that some editors put first; an error names it."""
    if not Path(path).is_file():
        if Path(path).exists():
            raise ValueError(f"{path}: not a file")  # a folder; or a pipe, which would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    with named(path, "not UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path):
    """The file's content; an error that names the file if it is missing or is not JSON."""
    text = read_text(path)
    with named(path, "not JSON"):
        return json.loads(text)


def read_config(folder: Path, families) -> dict:
    """config.json as a dict, with the defaults that its file leaves out filled in by transformers. ValueError
    for a `model_type` outside `families`: another family's weights often fit by shape and compute
    nonsense."""
    from transformers import AutoConfig  # imported late: it takes seconds, and only loading needs it
    config = read_json(folder / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}; known here: {', '.join(families)}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers raises several kinds for a field of the wrong type
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


def config_from_dict(config_class, values: dict, folder):
    """The dataclass, from those of `values` that are set and that it has a field for."""
    known = {name: values[name] for name in config_class.__dataclass_fields__ if values.get(name) is not None}
    with named(folder):
        config = config_class(**known)
    for name, value in known.items():
        kind = config_class.__dataclass_fields__[name].type
        kind = {tuple: list | tuple, float: int | float}.get(kind, kind)
        is_count = name.startswith("num_") or name.endswith("_size")
        is_right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_right or (is_count and not 0 < value < 2**31):
            raise ValueError(f"{folder}: {name} is {value!r:.60}")
    return config


def read_weights(folder: Path):
    """Yield (name, tensor) of every weight in a Hugging Face folder, one shard in memory at a time, of
    `model.safetensors` or `pytorch_model.bin` (with `weights_only=True`), whole or in shards."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists():
            places = read_json(index)
            if not isinstance(places, dict) or not isinstance(places.get("weight_map"), dict):
                raise ValueError(f"{index}: has no weight_map, which says where each tensor is")
            for shard in sorted(set(map(str, places["weight_map"].values()))):
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: names {shard!r}, which is no file beside it")
                yield from read_shard(folder / shard)
            return
        if whole.exists():
            yield from read_shard(whole)
            return
    raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def read_shard(path: Path):
    """Yield (name, tensor) of one .safetensors or .bin file; ValueError names a damaged one."""
    from safetensors import safe_open
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the weights is missing")
    try:
        if path.suffix == ".bin":
            is_mapped = zipfile.is_zipfile(path)  # before 2020 it was a pickle alone, which is read whole
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
            if not all(isinstance(name, str) for name in tensors):
                raise ValueError("it does not name its tensors")
            yield from tensors.items()
            return
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except Exception as error:  # both readers raise many kinds for a file cut short
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {error})") from None


def load_strictly(module: nn.Module, tensors, source, dtype=torch.float32, device="cpu", rename=str):
    """Set every parameter of `module` (built on the meta device) from (name, tensor) pairs, and return it.
    `rename` gives our name of a tensor, or "" for one that we compute or do not need.

    Strict both ways: a tensor without a parameter, a parameter without a tensor and a shape that differs are
    each a ValueError naming it and `source`. A head left random because its name was new costs a training
    run.
    """
    kind, wanted = type(module).__name__, {name: p.shape for name, p in module.named_parameters()}
    for theirs, tensor in tensors:
        name = rename(theirs)
        if not name:
            continue
        if name not in wanted:
            raise ValueError(f"{source}: {theirs!r} has no place in {kind}, or came twice")
        if tensor.shape != wanted[name]:
            shapes = f"{tuple(tensor.shape)}, {kind} needs {tuple(wanted[name])}"
            raise ValueError(f"{source}: {theirs} has shape {shapes}")
        if not tensor.is_floating_point():  # quantised: without its scales it is another weight
            raise ValueError(f"{source}: {theirs} holds {tensor.dtype}, not floating-point numbers")
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype)))
        del wanted[name]
    if wanted:
        raise ValueError(f"{source}: {len(wanted)} tensors missing, the first is {next(iter(wanted))!r}")
    return module


def write_weights(tensors: dict, folder, config: dict | None = None, file: str = "model.safetensors"):
    """Write {name: tensor} into `folder` as safetensors, and `config`, if given, as config.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(folder / file) as building:
        save_file(weights, building, {"format": "pt"})
    if config is not None:
        with whole(folder / "config.json") as building:
            building.write_text(json.dumps(config, indent=2) + "\n")
