"""CLIP, SigLIP and DINOv2 on disk: config.json, preprocessor_config.json, and the names of the tensors.

Reading gives a dict of sizes. vit.py makes its ViTConfig of that. Writing takes the ViTConfig.
"""

import math
import re
from dataclasses import asdict
from pathlib import Path

from plumbing.files import named, read_json, write_json
from plumbing.weights import read_config, read_weights, refuse_others

# model_type in config.json; the folders of three of these hold more than the tower
KINDS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "llava")
# Fields that change what is computed: the values that vit.py and data.preprocess compute.
KNOWN = {"use_swiglu_ffn": (False,), "qkv_bias": (True,), "num_channels": (3,)}
KNOWN_OF_PICTURES = {"do_rescale": (True,), "rescale_factor": (1 / 255,), "do_normalize": (True,)}


# ------------------------------------------------------------------------------------------------------------
# Sizes

def read_sizes(folder: Path) -> dict:
    """Sizes of the vision tower in a folder."""
    with named(folder):
        config = read_config(folder, KINDS)
        return sizes_of(config.get("vision_config", config), folder)


def sizes_of(config: dict, folder: Path) -> dict:
    """Sizes from a vision tower's config.json, completed by the preprocessor_config.json in `folder`."""
    refuse_others(config, KNOWN, folder)
    sizes = dict(config)
    if config["model_type"] == "dinov2":
        sizes["intermediate_size"] = config["hidden_size"] * config["mlp_ratio"]
    file, preprocessor = read_preprocessor(folder)
    refuse_others(preprocessor, KNOWN_OF_PICTURES, file)
    for key in ("image_mean", "image_std", "resample"):
        sizes[key] = preprocessor.get(key)
    mean, std, resample = sizes["image_mean"], sizes["image_std"], sizes["resample"]
    if not is_color(mean) or not is_color(std) or 0 in (std or ()):
        raise ValueError(f"{file}: image_mean is {mean}, image_std {std}")
    if resample is not None and resample not in range(6):
        raise ValueError(f"{file}: resample is {resample!r}; Pillow's filters are 0 to 5")
    return sizes


def read_preprocessor(folder: Path) -> tuple:
    """(file, how it says pictures are prepared). Newer folders have that in processor_config.json, which
    transformers asks first."""
    file = folder / "processor_config.json"
    content = read_json(file) if file.exists() else {}
    if "image_processor" in content:
        return file, content["image_processor"]
    file = folder / "preprocessor_config.json"
    return file, read_json(file) if file.exists() else {}


def is_color(values) -> bool:
    """Whether these are three finite numbers, or nothing."""
    if not values:
        return True
    return len(values) == 3 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


def config_json(config) -> dict:
    """The content of config.json for a ViTConfig."""
    content = asdict(config) | {"vision_use_head": False}  # False: without SigLIP's pooling head
    if config.model_type == "dinov2":
        mlp_ratio = config.intermediate_size // config.hidden_size
        content |= {"mlp_ratio": mlp_ratio, "use_mask_token": False}
    return content


def write_preprocessor_config(config, folder, fit: str = "crop"):
    """Write preprocessor_config.json, which makes transformers prepare pictures as data.preprocess does.

    "crop" gives CLIP's processor, "pad" LLaVA's, for every family: SigLIP's own would squeeze pictures.
    """
    size = config.image_size
    kind = {"image_processor_type": "CLIPImageProcessor"}
    if fit == "pad":
        kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    write_json(Path(folder) / "preprocessor_config.json", kind | {
        "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": config.resample,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": config.image_mean, "image_std": config.image_std})


# ------------------------------------------------------------------------------------------------------------
# Tensors

# A folder may hold more than the tower: a text tower, SigLIP's pooling head, DINOv2's training mask, LLaVA.
NOT_OURS = re.compile(
    r"text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)"
    r"|(model\.)?(language_model|multi_modal_projector)\.|lm_head\."
    r"|(vision_model\.)?head\.|embeddings\.mask_token|.*position_ids$")
DINOV2_NAMES = (  # part of their name, part of ours; no name of CLIP or SigLIP contains one of these parts
    ("cls_token", "class_embedding"), ("position_embeddings", "position_embedding.weight"),
    ("patch_embeddings.projection", "patch_embedding"), ("encoder.layer.", "encoder.layers."),
    ("attention.attention.", "self_attn."), ("attention.output.dense", "self_attn.out_proj"),
    (".query", ".q_proj"), (".key", ".k_proj"), (".value", ".v_proj"),
    (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"))
DINOV2_BATCHES_OF_ONE = ("embeddings.cls_token", "embeddings.position_embeddings")


def our_name(name: str) -> str:
    """Our name of a tensor of any family, or "" if the tensor is not part of the tower."""
    name = name.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
    if NOT_OURS.match(name):
        return ""
    name = name.removeprefix("vision_model.")
    for theirs, ours in DINOV2_NAMES:
        name = name.replace(theirs, ours)
    if name.startswith("layernorm."):  # DINOv2's last norm
        name = "post_" + name
    return name


def name_in_dinov2(name: str, tensor) -> tuple:
    """(DINOv2's name of one of our tensors, the tensor in DINOv2's shape): the way back."""
    for theirs, ours in reversed(DINOV2_NAMES):
        name = name.replace(ours, theirs)
    if name.endswith(DINOV2_BATCHES_OF_ONE):
        tensor = tensor.view(1, -1, tensor.shape[-1])
    return name.replace("post_layernorm.", "layernorm."), tensor


def read_tensors(folder: Path):
    """Yield (their name, tensor) of the tower's tensors in a folder, in the shape that we use."""
    for name, tensor in read_weights(folder, our_name):
        if name.endswith(DINOV2_BATCHES_OF_ONE):
            tensor = tensor.squeeze()
        yield name, tensor
