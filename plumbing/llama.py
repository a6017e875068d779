"""Llama, Mistral, Qwen2 and Qwen3 on disk: config.json and the names of the tensors.

Reading gives a dict of sizes. llm.py makes its LLMConfig of that. Writing takes the LLMConfig.
"""

import re
from dataclasses import asdict
from pathlib import Path

from plumbing.files import named, read_json
from plumbing.weights import read_config, refuse_others

KNOWN = {  # fields that change what is computed: the values that llm.py computes
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "is_causal": (True,)}
KNOWN_ROPE = {"rope_type": ("default", "llama3"), "partial_rotary_factor": (1.0,)}


def home(folder: Path) -> Path:
    """Where the LLM of a folder is: a run directory keeps its tuned one in llm/."""
    return folder / "llm" if (folder / "llm").is_dir() else folder


def read_sizes(folder: Path, families) -> dict:
    """Sizes of the LLM in a folder, alone or as a part of LLaVA. ValueError if it is not of `families`."""
    with named(folder):
        config = read_config(folder, (*families, "llava"))
        text = config.get("text_config", config)
        for name in ("tie_word_embeddings", "eos_token_id"):  # what a whole LLaVA says comes first
            if config.get(name) is not None:
                text[name] = config[name]
        return sizes_of(text, folder)


def sizes_of(config: dict, folder: Path) -> dict:
    """Sizes from an LLM's config.json. ValueError if it asks for something that llm.py does not compute."""
    rope = config.get("rope_parameters") or {}
    refuse_others(config, KNOWN, folder)
    refuse_others(rope, KNOWN_ROPE, f"{folder}: RoPE")
    sizes = dict(config)
    sizes["rope_theta"] = rope.get("rope_theta", 10000.0)
    sizes["rope_parameters"] = rope if rope.get("rope_type") == "llama3" else None
    if not config.get("head_dim"):
        sizes["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        # Mistral 0.1 attends to this many positions at most. Up to there it is plain attention.
        sizes["max_position_embeddings"] = min(config["max_position_embeddings"], window)
    sizes["eos_token_id"] = read_end_tokens(config, folder)
    return sizes


def read_end_tokens(config: dict, folder: Path):
    """The ids that end an answer. Chat models list more of them in generation_config.json."""
    ends = None
    file = folder / "generation_config.json"
    if file.exists():
        ends = read_json(file).get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id")
    if ends is None:
        raise ValueError(f"{folder}: neither config.json nor generation_config.json has an eos_token_id")
    return ends


def config_json(config, architecture: str) -> dict:
    """The content of config.json for an LLMConfig; `architecture` is transformers' class."""
    changes = {"architectures": [architecture], "hidden_act": "silu", "sliding_window": None}
    changes["rope_parameters"] = config.rope_parameters
    changes["rope_scaling"] = config.rope_parameters  # the name in transformers 4
    if config.rope_parameters is None:
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return asdict(config) | changes


# Old files store RoPE's frequencies, which we compute. LLaVA's folders hold more than the LLM.
NOT_OURS = re.compile(r".*inv_freq$|(model\.)?(vision_tower|multi_modal_projector|mm_projector)\.")


def our_name(name: str, is_tied: bool = False) -> str:
    """Our name of a tensor, or "" if it is not part of the LLM. A tied head is the embedding table itself."""
    if NOT_OURS.match(name):
        return ""
    name = name.removeprefix("language_model.")  # in LLaVA's older folders
    name = name.replace("model.language_model.", "model.")  # and in newer ones
    if is_tied and name == "lm_head.weight":
        return "model.embed_tokens.weight"
    return name
