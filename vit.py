"""The vision tower: an image in, one feature vector per patch out.

    vit = ViT.from_pretrained("openai/clip-vit-large-patch14-336")   # a folder, or a Hub id
    patches = vit(pixels)                                            # (B, 3, 336, 336) -> (B, 576, 1024)

This is CLIP's ViT (Radford et al. 2021, arXiv 2103.00020, section 2.4). Four things set it apart from a plain
ViT, and each one breaks pretrained weights if forgotten: a class token, a LayerNorm *before* the first block,
the quick-GELU x * sigmoid(1.702 x), and a patch convolution without bias.

LLaVA reads the output of the last block but one (`feature_layer=-2`), before any final LayerNorm, and drops the
class token: the last block is trained to fill the class token alone, the one before still describes the patches.

Module names are those of the Hugging Face checkpoints, so that loading needs no table of names. The strict
weight reader at the end of this file serves llm.py and projector.py too.

Letters, here and in every other file: B batch, N image tokens, T text tokens, S sequence, D ViT width,
C LLM width, H heads, V vocabulary, W ranks.

Read next: llm.py (the language tower), then projector.py (the bridge between the two).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


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

    def __post_init__(self):
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"the vision tower's activation is {self.hidden_act!r}; CLIP's is 'quick_gelu'")
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError(f"image {self.image_size} / patch {self.patch_size} and width {self.hidden_size} / "
                             f"heads {self.num_attention_heads} must both divide evenly")

    @classmethod
    def from_pretrained(cls, folder_or_id):
        config = read_config(resolve(folder_or_id, wanted=["*.json"]), families=("clip", "clip_vision_model"))
        return cls(**known_fields(cls, config.get("vision_config", config)))  # a full CLIP wraps its two towers


class Embeddings(nn.Module):
    """Pixels (B, 3, H, W) -> class token and patches with positions added, (B, 1 + N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + self.num_patches, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        if patches.shape[1] != self.num_patches:
            raise ValueError(f"an image of {height} x {width} gives {patches.shape[1]} patches; "
                             f"the position table holds {self.num_patches}")
        class_token = self.class_embedding.expand(B, 1, -1)  # (B, 1, D)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight  # (B, 1 + N, D)


class Attention(nn.Module):
    """Every token looks at every token: no mask. (B, L, D) -> (B, L, D), with L = 1 + N."""

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

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick-GELU


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


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
        self.num_tokens = (config.image_size // config.patch_size) ** 2  # N: nobody else computes it
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # (sic): CLIP's own spelling
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # CLIP's pooled output only

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (B, 1 + N, D)
        blocks = self.encoder["layers"]
        for block in blocks[: self.feature_layer % (len(blocks) + 1)]:  # -2 of 24 blocks: the first 23
            x = block(x)
        return x[:, 1:]  # (B, N, D)

    @classmethod
    def from_pretrained(cls, folder_or_id, feature_layer: int = -2, dtype=torch.float32, device="cpu"):
        """A CLIP folder, or a vision tower alone, as Hugging Face writes them. Strict: see `load_strictly`."""
        folder = resolve(folder_or_id)
        with torch.device("meta"):
            vit = cls(ViTConfig.from_pretrained(folder), feature_layer)
        not_ours = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # CLIP's other half
        tensors = ((name.removeprefix("vision_model."), tensor) for name, tensor in read_weights(folder)
                   if not name.startswith(not_ours) and not name.endswith("position_ids"))
        return load_strictly(vit, tensors, folder, dtype, device)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers opens as a CLIPVisionModel."""
        write_weights(self, folder, asdict(self.config) | {"model_type": "clip_vision_model",
                                                           "architectures": ["CLIPVisionModel"]})


# ----------------------------------------------------------------------------------------------------------------
# Weights on disk. One reader for both towers and the projector; nothing is unpickled but plain tensors.


def resolve(folder_or_id, wanted=("*.json", "*.safetensors", "*.bin", "*.model")) -> Path:
    """A local folder (as given, or below this project), else a Hub id's snapshot. HF_HUB_OFFLINE=1 is honoured."""
    for folder in (Path(folder_or_id), Path(__file__).parent / folder_or_id):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(folder_or_id), allow_patterns=list(wanted)))
    except Exception as error:  # whatever the network says, the reader needs the name that was not found
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__})") from error


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
    family = read_json(folder / "config.json").get("model_type")
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}; known here: {', '.join(families)}")
    try:
        return AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # transformers raises several kinds for a field of the wrong type
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


def known_fields(config_class, values: dict) -> dict:
    """Those of `values` that the dataclass has a field for; a config.json holds many more."""
    return {key: values[key] for key in config_class.__dataclass_fields__ if values.get(key) is not None}


def read_weights(folder: Path):
    """Yield (name, tensor) of every weight in a Hugging Face folder, one shard in memory at a time.

    Reads `model.safetensors`, its sharded form, or `pytorch_model.bin` and its sharded form (`weights_only=True`).
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            shards = sorted(set(read_json(index)["weight_map"].values()))
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


def write_weights(module: nn.Module, folder, config: dict | None = None, file: str = "model.safetensors"):
    """Write the parameters of `module` into `folder` as safetensors, and `config`, if given, as config.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in module.named_parameters()}
    save_file(weights, folder / file, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
