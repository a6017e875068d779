"""What a step costs in floating-point operations, by arithmetic: neither a GPU nor weights are needed.

The shapes of the presets' towers are here, too, so that a plan needs no folder of theirs.
"""

import torch
from torch import nn

from llm import LLM, LLMConfig, load_llm_config
from losses import CONTRASTIVE
from plumbing.files import named
from projector import VLM
from vit import ViT, ViTConfig, load_vit_config

SHAPES = {  # tiny's are read from its folders, as those of all other towers
    "google/siglip-base-patch16-224": ViTConfig(
        image_size=224, patch_size=16, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
        model_type="siglip_vision_model"),
    "google/siglip2-so400m-patch16-256": ViTConfig(
        image_size=256, patch_size=16, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh", model_type="siglip_vision_model"),
    "openai/clip-vit-large-patch14-336": ViTConfig(),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLMConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100000.0,
        max_position_embeddings=8192, tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B": LLMConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-6,
        max_position_embeddings=40960, tie_word_embeddings=True, model_type="qwen3"),
    "lmsys/vicuna-7b-v1.5": LLMConfig(),
    "lmsys/vicuna-13b-v1.5": LLMConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40),
}
TEXT_TOKENS = {"align": 20, "instruct": 250}  # of a typical sample of LLaVA's two data sets, beside its image
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16, by name
USED = 0.4  # of the peak, in a plan


def shapes_of(config, by_name: bool = True) -> tuple:
    """(ViTConfig, LLMConfig) of the towers: from the table by their names, or from their folders."""
    known = SHAPES if by_name else {}
    vit = known.get(config.vit) or load_vit_config(config.vit)
    llm = known.get(config.llm) or load_llm_config(config.llm)
    return vit, llm


def outline(config, by_name: bool = True) -> VLM:
    """The model of this run without weights, on the meta device; what will learn asks for a gradient.
    `by_name`: see `shapes_of`."""
    vit_config, llm_config = shapes_of(config, by_name)
    with named("the model"), torch.device("meta"):
        vit = ViT(vit_config, config.feature_layer)
        vlm = VLM(vit, LLM(llm_config), config.projector)
    vlm.vit.requires_grad_(False)
    vlm.llm.requires_grad_(config.stage == "instruct")
    return vlm


def row_length(config, vlm) -> int:
    """Tokens of a typical sample: BOS, image, text."""
    return 1 + vlm.num_image_tokens + TEXT_TOKENS[config.stage]


def count_weights(module, only_learning: bool = False) -> int:
    """Parameters of a module, or those of them that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_learning)


# ------------------------------------------------------------------------------------------------------------
# A step

def flops_per_step(config, vlm) -> dict:
    """Floating-point operations that one step needs, over all ranks; checkpointing's second forward not
    counted.

    A weight costs 2 operations per token forward, 2 for the gradient of its input, 2 more for its own if it
    learns; the head and the last MLP see only the supervised tokens. With --features the ViT does not run.
    "patch" is pooling and the products of all images with all captions; "prompt" the same products, and a
    pass of the LLM over the captions alone.
    """
    c = vlm.llm.config
    S = row_length(config, vlm)
    B = config.batch
    T = TEXT_TOKENS[config.stage]
    blocks = count_weights(vlm.llm.model.layers)
    last = count_weights(vlm.llm.model.layers[-1].mlp)
    weight = 6 if config.stage == "instruct" else 4
    products = 12 * B * B * c.hidden_size
    flops = {
        "vision": 0 if config.features else vision_flops(vlm.vit, B),
        "projector": projector_flops(vlm, B),
        "language": B * weight * (S * (blocks - last) + T * (last + c.vocab_size * c.hidden_size)),
        "attention": attention_flops(config, vlm),
    }
    contrastive = {
        "patch": products + 3 * B * (vlm.num_image_tokens + T) * c.hidden_size,
        "prompt": products + 2 * B * (T * (blocks - last) + last),
    }
    for name in CONTRASTIVE[config.contrastive]:
        flops[name] = contrastive[name]
    return flops


def tokens_seen(vit) -> int:
    """Patches of an image, and a class token."""
    return vit.num_patches + vit.config.family.class_token


def vision_flops(vit, B: int) -> int:
    """Of B images, forward alone, without attention."""
    blocks = count_weights(vit.encoder["layers"][: vit.blocks_run])
    patches = vit.num_patches * count_weights(vit.embeddings.patch_embedding)
    return 2 * B * (tokens_seen(vit) * blocks + patches)


def attention_flops(config, vlm) -> int:
    """Causal attention costs 2 S^2 C a layer forward and twice that backward, the ViT's 4 L^2 D."""
    c = vlm.llm.config
    flops = 3 * 2 * row_length(config, vlm) ** 2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    if not config.features:
        flops += 4 * tokens_seen(vlm.vit) ** 2 * vlm.vit.config.hidden_size * vlm.vit.blocks_run
    return config.batch * flops


def projector_flops(vlm, B: int) -> int:
    """Of B images, forward and backward; no gradient is asked of the ViT's features."""
    total = 0
    layers = [module for module in vlm.projector.modules() if isinstance(module, nn.Linear)]
    for number, layer in enumerate(layers):
        tokens = vlm.num_image_tokens
        if vlm.projector_kind == "resampler" and number < 2:  # its keys and values
            tokens = vlm.vit.num_patches
        weight = 4 if number == 0 else 6
        total += weight * tokens * layer.weight.numel()
    return B * total


# ------------------------------------------------------------------------------------------------------------
# A stage

def flops_of_stage(config, vlm, steps: int) -> float:
    """Operations of all steps. What checkpointing runs again counts, and contrast first has no LLM."""
    flops = flops_per_step(config, vlm)
    forward = 1 / 3 if config.stage == "instruct" else 1 / 2  # the part of forward and backward
    again = {"none": 0, "every-other": forward / 2, "every": forward}[config.checkpointing]
    flops["language"] *= 1 + again
    first = config.contrastive_first
    return (steps - first) * sum(flops.values()) + first * (flops["vision"] + flops["projector"])


def hours(flops: float, gpus: int = 1) -> float:
    """On so many H100s, at a usual part of their peak."""
    return flops / (USED * PEAK_FLOPS["H100"]) / 3600 / gpus
