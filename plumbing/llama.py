"""Llama, Mistral, Qwen2 and Qwen3 on disk: config.json and the names of the tensors.
"""

from dataclasses import asdict
from pathlib import Path

from plumbing.files import read_json
from plumbing.weights import config_from_dict


def llm_config_from_dict(config_class, config: dict, folder: Path):
    """From the content of a config.json whose defaults are filled in; `folder` is where it lies."""
    if config.get("mlp_bias") or (config.get("attention_bias") and config["model_type"] != "qwen2"):
        raise ValueError(f"{folder}: attention_bias or mlp_bias is set; such biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: the LLM's activation is {config['hidden_act']!r}; SwiGLU has silu")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise ValueError(f"{folder}: RoPE of type {rope['rope_type']!r} is not supported")
    values = config | {"rope_theta": rope.get("rope_theta", 10000.0),
                       "rope_parameters": rope if rope.get("rope_type") == "llama3" else None}
    values["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        # Mistral 0.1's window: within it, attention is plain
        values["max_position_embeddings"] = min(config["max_position_embeddings"], config["sliding_window"])
    if (folder / "generation_config.json").exists():  # chat models list more ends there than in config.json
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        values["eos_token_id"] = values.get("eos_token_id") if ends is None else ends
    if values.get("eos_token_id") is None:
        raise ValueError(f"{folder}: neither config.json nor generation_config.json has an eos_token_id")
    return config_from_dict(config_class, values, folder)


def llm_config_to_dict(config, architecture: str) -> dict:
    """The content of its config.json."""
    rope = config.rope_parameters or {"rope_type": "default", "rope_theta": config.rope_theta}
    return asdict(config) | {"architectures": [architecture], "hidden_act": "silu",
                             "rope_parameters": rope, "sliding_window": None}


def our_llm_name(name: str, is_tied: bool) -> str:
    """The name itself; "" for what we compute (old files store RoPE's) or hold already (the embedding
    table)."""
    return "" if name.endswith("inv_freq") or (is_tied and name.endswith("lm_head.weight")) else name
