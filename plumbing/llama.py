"""Llama, Mistral, Qwen2 and Qwen3 on disk: config.json and the names of the tensors.

Reading gives a dict of sizes. llm.py makes its LLMConfig of that. Writing takes the LLMConfig.
"""

from dataclasses import asdict
from pathlib import Path

from plumbing.files import named, read_json
from plumbing.weights import read_config


def read_sizes(folder: Path, families) -> dict:
    """Sizes of the LLM in a folder. ValueError if its model_type is not one of `families`."""
    with named(folder):
        return sizes_of(read_config(folder, families), folder)


def sizes_of(config: dict, folder: Path) -> dict:
    """Sizes from an LLM's config.json. ValueError if it asks for something that llm.py does not compute."""
    has_bias = config.get("attention_bias") and config["model_type"] != "qwen2"  # Qwen2 always has it
    if has_bias or config.get("mlp_bias"):
        raise ValueError(f"{folder}: attention_bias or mlp_bias is set; such biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: the LLM's activation is {config['hidden_act']!r}; SwiGLU has silu")
    rope = config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{folder}: RoPE of type {rope_type!r} is not supported")
    sizes = dict(config)
    sizes["rope_theta"] = rope.get("rope_theta", 10000.0)
    sizes["rope_parameters"] = rope if rope_type == "llama3" else None
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
    if config.rope_parameters is None:
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return asdict(config) | changes


def our_name(name: str, is_tied: bool) -> str:
    """The name itself, or "" for a tensor that we do not load.

    Old files store RoPE's frequencies, which we compute. A tied head is the embedding table, loaded already.
    """
    if name.endswith("inv_freq") or (is_tied and name.endswith("lm_head.weight")):
        return ""
    return name
