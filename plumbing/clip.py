"""CLIP, SigLIP and DINOv2 on disk: config.json, preprocessor_config.json, and the names of the tensors.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

from plumbing.files import read_json
from plumbing.weights import config_from_dict


def vit_config_from_dict(config_class, config: dict, folder: Path):
    """From the content of a config.json whose defaults are filled in; `folder` is where it lies."""
    if config.get("use_swiglu_ffn"):
        raise ValueError(f"{folder}: DINOv2 giant's gated MLP is not supported")
    if config["model_type"] == "dinov2":
        config["intermediate_size"] = config["hidden_size"] * config["mlp_ratio"]
    file = folder / "preprocessor_config.json"
    preprocessor = read_json(file) if file.exists() else {}
    config |= {key: preprocessor.get(key) for key in ("image_mean", "image_std", "resample")}
    return config_from_dict(config_class, config, folder)


def vit_config_to_dict(config) -> dict:
    return asdict(config) | {"vision_use_head": False}  # SigLIP's pooling head, which we do not keep


def write_preprocessor_config(config, folder, fit: str = "crop"):
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
