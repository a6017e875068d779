"""A training step at full shape: time, FLOPs, the part of the GPU's peak that is used (MFU), memory against
the plan.

    torchrun --nproc_per_node=8 train.py --preset 7b --stage align --dry_run     # train.py starts this script
    python tests/bench_step.py --preset small --stage align --batch 4 --micro_batch 4
    python tests/bench_step.py --costs    # the README's table of hours: arithmetic, nothing is run

Three steps with random weights and random data; nothing is written. Takes every option of train.py. The last
line printed is one JSON object. Not a test: machines vary.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import losses
import train
from llm import LLM, LLMConfig, load_llm_config
from plumbing.ranks import choose_dtype, leave_ranks, peak_memory, rank, say, start_ranks, world_size
from projector import VLM
from running import options, order, plan
from vit import ViT, ViTConfig, load_vit_config

SHAPES = {  # the towers of the presets whose folders are not at hand; tiny's are read from their config.json
    "small": (ViTConfig(image_size=224, patch_size=16, hidden_size=768, intermediate_size=3072,
                        num_hidden_layers=12, num_attention_heads=12, layer_norm_eps=1e-6,
                        hidden_act="gelu_pytorch_tanh", model_type="siglip_vision_model"),
              LLMConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100000.0,
                        max_position_embeddings=8192, tie_word_embeddings=True)),
    "speedrun": (ViTConfig(image_size=256, patch_size=16, hidden_size=1152, intermediate_size=4304,
                           num_hidden_layers=27, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
                           model_type="siglip_vision_model"),
                 LLMConfig(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-6,
                           max_position_embeddings=40960, tie_word_embeddings=True, model_type="qwen3")),
    "7b": (ViTConfig(), LLMConfig()),
    "13b": (ViTConfig(), LLMConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                   num_attention_heads=40, num_key_value_heads=40)),
}
META = torch.device("meta")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16, by name


def shapes_of(config) -> tuple:
    """(ViTConfig, LLMConfig): of a preset's own towers from the table, of others from their folders."""
    own = options.PRESETS[config.preset]["common"]
    if config.preset in SHAPES and (config.vit, config.llm) == (own["vit"], own["llm"]):
        return SHAPES[config.preset]
    return load_vit_config(config.vit), load_llm_config(config.llm)


def random_model(config, shapes, device, dtype) -> VLM:
    """A model of these shapes with random weights, ready to train: for dry runs, benchmarks and tests."""
    torch.manual_seed(config.seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            vlm = VLM(ViT(shapes[0], config.feature_layer), LLM(shapes[1]), config.projector)
    finally:
        torch.set_default_dtype(default)
    train.choose_learning(config, vlm)
    if config.compile:
        train.compile_blocks(vlm.llm.model.layers)
    train.checkpoint_blocks(vlm.llm.model.layers, config.checkpointing)
    return vlm


def random_batch(config, vlm, number: int = 0, text: int = 0) -> dict:
    """A micro-batch of this rank, through data.collate: pictures of noise with `text` random tokens each (0:
    as many as a typical sample of the stage has)."""
    c, samples, text = vlm.llm.config, [], text or plan.TEXT_TOKENS[config.stage]
    size, rng = vlm.vit.config.image_size, torch.Generator().manual_seed(1000 * number + rank())
    for i in range(order.split_batch(config, world_size())[0]):
        ids = torch.randint(3, c.vocab_size, (text,), generator=rng).tolist()
        roles = [data.CONTEXT] * 2 + [data.ANSWER] * text
        samples.append({"ids": [1, data.IMAGE_MARKER, *ids], "roles": roles, "text_ids": [1, *ids],
                        "pixels": torch.randn(3, size, size, generator=rng), "name": f"random {i}"})
    return data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, 0, size,
                        min(config.max_length, c.max_position_embeddings))


def flops_per_step(config, vlm) -> dict:
    """Floating-point operations that one step needs, over all ranks; checkpointing's second forward not
    counted.

    A weight costs 2 operations per token forward, 2 for the gradient of its input, 2 more for its own if it
    learns; the head sees only the supervised tokens. For attention see `attention_flops`. "patch" is pooling
    and the products of all images with all captions; "prompt" the same products, and a pass of the LLM over
    the captions alone.
    """
    c, S, B, T = vlm.llm.config, plan.row_length(config, vlm), config.batch, plan.TEXT_TOKENS[config.stage]
    weights, vit = plan.count_weights(vlm.llm.model.layers), vlm.vit
    weight, tokens = (6 if config.stage == "instruct" else 4), vit.num_patches + vit.config.family.class_token
    run = vit.encoder["layers"][: vit.blocks_run]
    patches = vit.num_patches * plan.count_weights(vit.embeddings.patch_embedding)
    products = 12 * B * B * c.hidden_size
    flops = {"vision": 2 * B * (tokens * plan.count_weights(run) + patches),
             "projector": projector_flops(vlm, B),
             "language": B * weight * (S * weights + T * c.vocab_size * c.hidden_size),
             "attention": attention_flops(config, vlm)}
    contrastive = {"patch": products + 3 * B * (vlm.num_image_tokens + T) * c.hidden_size,
                   "prompt": products + 2 * B * T * weights}
    return flops | {name: contrastive[name] for name in losses.CONTRASTIVE[config.contrastive]}


def projector_flops(vlm, B: int) -> int:
    """Of B images, forward and backward; no gradient is asked of the ViT's features."""
    P, N, total = vlm.vit.num_patches, vlm.num_image_tokens, 0
    for number, layer in enumerate(m for m in vlm.projector.modules() if isinstance(m, nn.Linear)):
        on_patches = vlm.projector_kind == "resampler" and number < 2  # its keys and values
        total += (4 if number == 0 else 6) * (P if on_patches else N) * layer.weight.numel()
    return B * total


def attention_flops(config, vlm) -> int:
    """Causal attention costs 2 S^2 C a layer forward and twice that backward, the ViT's 4 L^2 D."""
    c, v, S = vlm.llm.config, vlm.vit.config, plan.row_length(config, vlm)
    L, width = vlm.vit.num_patches + v.family.class_token, c.num_attention_heads * c.head_dim
    return config.batch * (3 * 2 * S * S * width * c.num_hidden_layers
                           + 4 * L * L * v.hidden_size * vlm.vit.blocks_run)


def dry_run(config, device):
    """Print the plan, take three steps, print what they took: the fastest of those after the first. Before
    them three of contrast first, where the run has such."""
    dtype, shapes = choose_dtype(device, config.dtype), shapes_of(config)
    outlined = random_model(config, shapes, META, dtype)
    flops = flops_per_step(config, outlined)
    total, tokens = sum(flops.values()), config.batch * plan.row_length(config, outlined)
    say(f"a step: {tokens:,} tokens, {total / 1e15:.3g} PFLOP, parts: "
              + ", ".join(f"{name} {part / total:.2g}" for name, part in flops.items()))
    planned = config.contrastive_first, config.steps or -(-RECORDS[config.stage] // config.batch)
    config.contrastive_first = min(3, config.contrastive_first)
    largest = order.split_batch(config, world_size())[0], plan.row_length(config, outlined)
    plan.print_plan(config, outlined, device, dtype, 3 + config.contrastive_first, largest)
    vlm = random_model(config, shapes, device, dtype)
    optimizer, terms = train.build_optimizer(config, vlm, device)
    seconds = []
    steps = range(3 + config.contrastive_first)
    for step in tqdm(steps, desc=f"dry run, {config.stage}", disable=rank() > 0):
        parts = order.split_batch(config, world_size())[1]
        micro_batches = [random_batch(config, vlm, part) for part in range(parts)]
        began = time.time()
        train.train_step(vlm, terms, optimizer, micro_batches, config, config.lr, step)
        seconds.append(time.time() - began)
    first, fastest = seconds[: config.contrastive_first], min(seconds[-2:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    hours = (planned[0] * min(first, default=0) + planned[1] * fastest) / 3600
    count = f"{planned[0]:,} + {planned[1]:,}" if planned[0] else f"{planned[1]:,}"
    say(f"at this speed the {count} steps of LLaVA's list take {hours:.3g} h")
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    mfu = round(total / fastest / world_size() / peak, 3) if peak else None
    say(json.dumps({
        "dry_run": f"{config.preset} {config.stage}", "device": name, "ranks": world_size(),
        "ms_per_step_fastest_of_2": round(1000 * fastest, 1), "tokens_per_s": round(tokens / fastest),
        "mfu": mfu, "ms_of_contrast_first": round(1000 * min(first), 1) if first else None,
        "peak_memory_gib": round(peak_memory(device) / 1024, 2),
        "predicted_gib": round(sum(plan.memory_sum(config, outlined, dtype, *largest).values()), 2)}))


RECORDS = {"align": 558128, "instruct": 665298}  # of LLaVA's two lists


def cost(preset: str) -> str:
    """A line of the README's table: GPU-hours at 40 % of the peak, what checkpointing runs again counted."""
    steps, hours = [], []
    for stage in ("align", "instruct"):
        config = options.configure(stage, {"preset": preset})
        vlm = random_model(config, shapes_of(config), META, torch.float32)
        flops, count = flops_per_step(config, vlm), config.steps or -(-RECORDS[stage] // config.batch)
        again = 0.5 if stage == "align" else 1 / 3  # a forward more, of 2 or 3
        flops["language"] *= 1 + again * (config.checkpointing == "every")
        first = config.contrastive_first * (flops["vision"] + flops["projector"])
        steps.append(f"{config.contrastive_first:,} + " * (config.contrastive_first > 0) + f"{count:,}")
        hours.append((count * sum(flops.values()) + first) / (0.4 * PEAK_FLOPS["H100"]) / 3600)
    return f"| `{preset}` | {steps[0]} | {steps[1]} | {hours[0]:.2f} + {hours[1]:.2f} |"


def main():
    if sys.argv[1:] == ["--costs"]:
        return print("\n".join(map(cost, SHAPES)))
    given = options.parse_args()
    given.pop("dry_run", None)
    stages = ["align", "instruct"] if given.get("stage", "all") == "all" else [given["stage"]]
    try:
        device = start_ranks()
        for stage in stages:
            dry_run(options.configure(stage, given | {"resume": False}), device)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
