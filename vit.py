"""The vision tower: an image in, one feature vector per patch out.

    vit = ViT.from_pretrained("openai/clip-vit-large-patch14-336")   # a folder, or a Hub id
    patches = vit(pixels)                                            # (B, 3, 336, 336) -> (B, 576, 1024)

One plain ViT for three families, whose differences are a few lines of `ViTConfig`, each of which breaks pretrained
weights if forgotten:

                                             class token   patch bias   norm before block 1   layer scale   activation
    CLIP (Radford et al. 2021, 2103.00020)   yes           no           yes                   no            quick-GELU
    SigLIP, SigLIP 2 (2303.15343)            no            yes          no                    no            tanh-GELU
    DINOv2 (Oquab et al. 2023, 2304.07193)   yes           yes          no                    yes           GELU

LLaVA reads the output of the last block but one (`feature_layer=-2`), before any final LayerNorm, and drops the
class token: the last block is trained to fill the class token alone, the one before still describes the patches.

Module names are those of CLIP's and SigLIP's Hugging Face checkpoints, so that loading needs no table of names but
for DINOv2. The strict weight reader at the end of this file serves llm.py and projector.py too.

Letters, here and in every other file: B batch, N image tokens, T text tokens, S sequence, D ViT width,
C LLM width, H heads, V vocabulary, W ranks.

Read next: llm.py (the language tower), then projector.py (the bridge between the two).
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number of it, and so transformers'


@dataclass
class ViTConfig:
    """Sizes of the tower, under the names of Hugging Face's config.json. The defaults are CLIP ViT-L/14-336."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    model_type: str = "clip_vision_model"
    image_mean: tuple = CLIP_MEAN  # what the pixels are normalised with, and how a picture is resized:
    image_std: tuple = CLIP_STD  # these three come from preprocessor_config.json
    resample: int = BICUBIC

    def __post_init__(self):
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise ValueError(f"images of {self.image_size} in patches of {self.patch_size}: only squares are supported")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"the vision tower's activation is {self.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"width {self.hidden_size} does not divide into {self.num_attention_heads} heads")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # SigLIP's 384 / 14 leaves a border unseen

    @property
    def looks(self) -> tuple:
        """The last arguments of data.preprocess."""
        return self.image_mean, self.image_std, self.resample

    @property
    def class_token(self) -> bool:
        return self.model_type != "siglip_vision_model"

    @property
    def patch_bias(self) -> bool:
        return self.model_type != "clip_vision_model"

    @property
    def pre_norm(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def layer_scale(self) -> bool:
        return self.model_type == "dinov2"

    @classmethod
    def from_pretrained(cls, folder_or_id):
        folder = resolve(folder_or_id, wanted=["*.json"])
        config = read_config(folder, ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2"))
        return cls.from_dict(config.get("vision_config", config), folder)  # a full CLIP or SigLIP wraps two towers

    @classmethod
    def from_dict(cls, config: dict, folder):
        """From the content of a config.json whose defaults are filled in; `folder` is where it lies."""
        if config["model_type"] not in LOOKS:
            raise ValueError(f"{folder}: the vision tower is of type {config['model_type']!r}; "
                             f"known: {', '.join(LOOKS)}")
        if config.get("use_swiglu_ffn"):
            raise ValueError(f"{folder}: DINOv2 giant's gated MLP is not supported")
        if config["model_type"] == "dinov2":
            config["intermediate_size"] = config["hidden_size"] * config["mlp_ratio"]
        file = folder / "preprocessor_config.json"
        written = {key: value for key, value in (read_json(file) if file.exists() else {}).items()
                   if key in ("image_mean", "image_std", "resample")}
        return build(cls, config | LOOKS[config["model_type"]] | written, folder)

    def to_dict(self) -> dict:
        """What config.json says of it."""
        return asdict(self) | {"vision_use_head": False}  # SigLIP's pooling head, which we do not keep


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu,
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
LOOKS = {  # where there is no preprocessor_config.json: what the family was trained with
    "clip_vision_model": {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "siglip_vision_model": {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
    "dinov2": {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
}


class Embeddings(nn.Module):
    """Pixels (B, 3, H, W) -> patches with positions added, a class token before them where there is one, (B, L, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, self.num_patches = config.hidden_size, config.num_patches
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.position_embedding = nn.Embedding(config.class_token + self.num_patches, D)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        if x.shape[1] != self.num_patches:
            raise ValueError(f"an image of {height} x {width} gives {x.shape[1]} patches; "
                             f"the position table holds {self.num_patches}")
        if hasattr(self, "class_embedding"):
            x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)  # (B, 1 + N, D)
        return x + self.position_embedding.weight  # (B, L, D)


class Attention(nn.Module):
    """Every token looks at every token: no mask. (B, L, D) -> (B, L, D), with L = N or 1 + N."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = (proj(x).view(B, L, self.num_heads, D // self.num_heads).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # each (B, H, L, D / H)
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


class Block(nn.Module):
    """Pre-norm; DINOv2 scales each branch by a learned vector before it is added."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(D, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(D, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale1 = nn.Parameter(torch.ones(D)) if config.layer_scale else 1.0
        self.layer_scale2 = nn.Parameter(torch.ones(D)) if config.layer_scale else 1.0

    def forward(self, x):
        x = x + self.layer_scale1 * self.self_attn(self.layer_norm1(x))
        return x + self.layer_scale2 * self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    """`vit(pixels (B, 3, H, W)) -> patch features (B, N, D)`: no class token, no final LayerNorm.

    `feature_layer` counts like Hugging Face's `hidden_states`: 0 is the embedding, k the output of block k, and
    negative numbers count from the end. Blocks behind it are kept (the tower stays whole on disk) but never run.
    """

    def __init__(self, config: ViTConfig, feature_layer: int = -2):
        super().__init__()
        layers = config.num_hidden_layers
        if not -layers - 1 <= feature_layer <= layers:
            raise ValueError(f"feature_layer {feature_layer} does not exist in a tower of {layers} blocks")
        self.config, self.feature_layer = config, feature_layer
        self.num_tokens = config.num_patches  # N: nobody else computes it
        self.embeddings = Embeddings(config)
        if config.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # (sic): CLIP's own spelling
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # for the pooled output only

    @property
    def dtype(self):
        return self.embeddings.patch_embedding.weight.dtype

    def forward(self, pixels):
        x = self.embeddings(pixels)  # (B, L, D)
        if self.config.pre_norm:
            x = self.pre_layrnorm(x)
        blocks = self.encoder["layers"]
        for block in blocks[: self.feature_layer % (len(blocks) + 1)]:  # -2 of 24 blocks: the first 23
            x = block(x)
        return x[:, 1:] if self.config.class_token else x  # (B, N, D)

    @classmethod
    def from_pretrained(cls, folder_or_id, feature_layer: int = -2, dtype=torch.float32, device="cpu"):
        """A folder of CLIP, SigLIP or DINOv2, or of a vision tower alone, as Hugging Face writes them. Strict: see
        `load_strictly`."""
        folder = resolve(folder_or_id)
        config = ViTConfig.from_pretrained(folder)
        with torch.device("meta"):
            vit = cls(config, feature_layer)
        rename = dinov2_name if config.model_type == "dinov2" else lambda name: name.removeprefix("vision_model.")
        tensors = ((rename(name), tensor.squeeze() if name in ONE_ROW else tensor)
                   for name, tensor in read_weights(folder) if not NOT_OURS.match(name))
        return load_strictly(vit, tensors, folder, dtype, device)

    def save_pretrained(self, folder):
        """Write config.json, preprocessor_config.json and model.safetensors, which transformers opens as the same
        tower. (DINOv2, whose names we do not keep, is not written.)"""
        name = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}.get(
            self.config.model_type)
        if name is None:
            raise ValueError(f"a tower of type {self.config.model_type} is read, not written")
        write_weights(dict(self.named_parameters()), folder, self.config.to_dict() | {"architectures": [name]})
        write_looks(self.config, folder)


def write_looks(config: ViTConfig, folder):
    """preprocessor_config.json, from which transformers makes a processor that resizes and crops as data.preprocess
    does with "crop": CLIP's, for every family. (SigLIP's own squeezes pictures into squares.)"""
    size = config.image_size
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
         "resample": config.resample, "do_center_crop": True, "crop_size": {"height": size, "width": size},
         "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": config.image_mean,
         "image_std": config.image_std, "do_convert_rgb": True}, indent=2) + "\n")


# What a folder holds beside the tower: CLIP's and SigLIP's text half and pooling head, DINOv2's training mask.
NOT_OURS = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)|(vision_model\.)?head\."
                      r"|embeddings\.mask_token|.*position_ids$")
ONE_ROW = ("embeddings.cls_token", "embeddings.position_embeddings")  # DINOv2 keeps these with a batch axis of one


def dinov2_name(name: str) -> str:
    """Our name of a tensor in a DINOv2 folder."""
    for theirs, ours in (("cls_token", "class_embedding"), ("position_embeddings", "position_embedding.weight"),
                         ("patch_embeddings.projection", "patch_embedding"), ("encoder.layer.", "encoder.layers."),
                         ("attention.attention.", "self_attn."), ("attention.output.dense", "self_attn.out_proj"),
                         ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), (".lambda1", ""),
                         ("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        name = name.replace(theirs, ours)
    return f"post_{name}" if name.startswith("layernorm.") else name


# ----------------------------------------------------------------------------------------------------------------
# Weights on disk. One reader for both towers and the projector; nothing is unpickled but plain tensors.


WEIGHTS = ("*.json", "*.jinja", "*.safetensors")  # also of a run directory, where they lie deeper
TOKENIZER = ("*token*", "*.jinja", "vocab*", "merges*")  # the files of a tokenizer, whatever its kind


def resolve(folder_or_id, wanted=WEIGHTS) -> Path:
    """A local folder (as given, or below this project), else a Hub id's snapshot, of which the files `wanted` are
    fetched; .bin weights only where there are no others. HF_HUB_OFFLINE=1 is honoured."""
    for folder in (Path(folder_or_id), Path(__file__).parent / folder_or_id):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(str(folder_or_id), allow_patterns=list(wanted),
                                        ignore_patterns=["consolidated*"]))  # the same weights in Mistral's own form
        if wanted == WEIGHTS and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(folder_or_id), allow_patterns=["*.json", "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # whatever the network says, the reader needs the name that was not found
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__}: {str(error).strip().splitlines()[0]})") from error


def read_json(path: Path):
    """The file's content; an error that names the file if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_config(folder: Path, families) -> dict:
    """config.json with the defaults that its file leaves out filled in by transformers, as a dict.

    A `model_type` outside `families` is an error: weights of a neighbour often fit by shape and compute nonsense.
    """
    from transformers import AutoConfig  # imported late: it takes seconds, and only loading needs it
    config = read_json(folder / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}; known here: {', '.join(families)}")
    try:
        return AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # transformers raises several kinds for a field of the wrong type
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


def build(config_class, values: dict, folder):
    """The dataclass from those of `values` that it has a field for; a config.json holds many more."""
    try:
        return config_class(**{key: values[key] for key in config_class.__dataclass_fields__
                               if values.get(key) is not None})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_weights(folder: Path):
    """Yield (name, tensor) of every weight in a Hugging Face folder, one shard in memory at a time.

    Reads `model.safetensors`, its sharded form, or `pytorch_model.bin` and its sharded form (`weights_only=True`).
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            places = read_json(index)
            if not isinstance(places, dict) or not isinstance(places.get("weight_map"), dict):
                raise ValueError(f"{index}: has no weight_map, which says where each tensor is")
            shards = sorted(set(places["weight_map"].values()))
        elif (folder / f"{stem}.{suffix}").exists():
            shards = [f"{stem}.{suffix}"]
        else:
            continue
        for shard in shards:
            yield from read_shard(folder / shard)
        return
    raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def read_shard(path: Path):
    """Yield (name, tensor) of one .safetensors or .bin file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the weights is missing")
    if path.suffix == ".bin":
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a file cut short
            raise ValueError(f"{path}: not a file of weights ({type(error).__name__})") from None
        yield from tensors.items()
        return
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def load_strictly(module: nn.Module, tensors, source, dtype=torch.float32, device="cpu"):
    """Set every parameter of `module` (built on the meta device) from (name, tensor) pairs, and return it frozen
    and in eval mode.

    Strict both ways: a tensor without a parameter, a parameter without a tensor and a shape that differs are each
    a ValueError naming the tensor and `source`. A head left random because its name was new costs a training run.
    """
    wanted = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name, tensor in tensors:
        if name not in wanted:
            raise ValueError(f"{source}: tensor {name!r} has no place in {type(module).__name__} (or came twice)")
        if tensor.shape != wanted[name]:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, "
                             f"{type(module).__name__} needs {tuple(wanted[name])}")
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
        del wanted[name]
    if wanted:
        raise ValueError(f"{source}: {len(wanted)} tensors missing, the first is {next(iter(wanted))!r}")
    return module.eval()


def write_weights(tensors: dict, folder, config: dict | None = None, file: str = "model.safetensors"):
    """Write {name: tensor} into `folder` as safetensors, and `config`, if given, as config.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / file, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
