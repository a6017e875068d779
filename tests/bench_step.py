"""A training step at full shape: time, FLOPs, the part of the GPU's peak that is used (MFU), memory against
the plan.

    torchrun --nproc_per_node=8 train.py --preset 7b --stage align --dry_run     # train.py starts this script
    python tests/bench_step.py --preset small --stage align --batch 4 --micro_batch 4
    python tests/bench_step.py --costs    # the README's table of hours: arithmetic, nothing is run

Three steps with random weights and random data; nothing is written. Takes every option of train.py. Of
--annotations only the number of records matters, and with --features the ViT does not run. A CPU is not asked
for more than a minute. The last line printed is one JSON object. Not a test: machines vary.
"""

import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import train
from llm import LLM
from plumbing.ranks import (choose_dtype, command, peak_memory, rank, say, start_ranks, total_memory,
                            world_size)
from projector import VLM
from running import costs, options, order, plan
from vit import ViT

MOST_ON_A_CPU = 5e12  # operations of a dry run: about a minute


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


def random_batch(config, vlm, number: int = 0, text: int = 0, rows: int = 0) -> dict:
    """A micro-batch of this rank, through data.collate: pictures of noise, or with --features noise in place
    of features, with `text` random tokens each (0: as many as a typical sample of the stage has)."""
    c, v, samples = vlm.llm.config, vlm.vit.config, []
    text, rows = text or costs.TEXT_TOKENS[config.stage], rows or order.split_batch(config, world_size())[0]
    size, rng = v.image_size, torch.Generator().manual_seed(1000 * number + rank())
    shape = (v.num_patches, v.hidden_size) if config.features else (3, size, size)
    for i in range(rows):
        ids = torch.randint(3, c.vocab_size, (text,), generator=rng).tolist()
        roles = [data.CONTEXT] * 2 + [data.ANSWER] * text
        pixels = torch.randn(shape, generator=rng)
        if config.features:
            pixels = pixels.to(vlm.llm.head_weight.dtype)
        samples.append({"ids": [1, data.IMAGE_MARKER, *ids], "roles": roles, "text_ids": [1, *ids],
                        "pixels": pixels, "name": f"random {i}"})
    return data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, 0, size,
                        min(config.max_length, c.max_position_embeddings))


def random_step(config, vlm, text: int = 0) -> list:
    """The micro-batches of this rank, dealt as a run deals them."""
    dealt, _ = plan.typical_step(config, vlm, world_size(), text)
    mine = enumerate(dealt[0][rank()])
    return [random_batch(config, vlm, number, text, len(part)) for number, part in mine]


def dry_run(config, device) -> dict:
    """Print the plan, take three steps, print what they took: the fastest of those after the first. Before
    them three of contrast first, where the run has such."""
    dtype, outlined = choose_dtype(device, config.dtype), costs.outline(config)
    records, whose = plan.count_records(config)
    planned = config.contrastive_first, order.count_steps(config, records) - config.contrastive_first
    largest = order.largest_micro_batch(*plan.typical_step(config, outlined, world_size()))
    plan.print_plan(config, outlined, dtype, sum(planned), largest, world_size(),
                    total_memory(device) / plan.GIB)
    plan.print_costs(config, outlined, sum(planned), world_size())
    total = sum(costs.flops_per_step(config, outlined).values())
    tokens = config.batch * costs.row_length(config, outlined)
    if device.type == "cpu" and 3 * total > MOST_ON_A_CPU:
        raise ValueError(f"3 steps of {total / 1e15:.2g} PFLOP take a CPU too long: a smaller --batch, or "
                         f"the plan alone: `python -m running.plan --preset {config.preset}`")
    config.contrastive_first = min(3, config.contrastive_first)
    vlm = random_model(config, costs.shapes_of(config), device, dtype)
    optimizer, terms = train.build_optimizer(config, vlm, device)
    seconds = []
    steps = range(3 + config.contrastive_first)
    for step in tqdm(steps, desc=f"dry run, {config.stage}", disable=rank() > 0):
        micro_batches = random_step(config, vlm)
        began = time.time()
        train.train_step(vlm, terms, optimizer, micro_batches, config, config.lr, step)
        if device.type == "cuda":
            torch.cuda.synchronize()  # the last things of a step are AdamW's, and nobody has waited for them
        seconds.append(time.time() - began)
    first, fastest = seconds[: config.contrastive_first], min(seconds[-2:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    hours = (planned[0] * min(first, default=0) + planned[1] * fastest) / 3600
    count = f"{planned[0]:,} + {planned[1]:,}" if planned[0] else f"{planned[1]:,}"
    say(f"at this speed the {count} steps of {records:,} records take {hours:.3g} h"
        f"{f' (the count is {whose})' if whose else ''}")
    peak = next((peak for part, peak in costs.PEAK_FLOPS.items() if part in name), None)
    mfu = round(total / fastest / world_size() / peak, 3) if peak else None
    predicted = sum(plan.memory_parts(config, outlined, dtype, *largest, world_size()).values())
    found = {
        "dry_run": f"{config.preset} {config.stage}", "device": name, "ranks": world_size(),
        "ms_per_step_fastest_of_2": round(1000 * fastest, 1), "tokens_per_s": round(tokens / fastest),
        "mfu": mfu, "ms_of_contrast_first": round(1000 * min(first), 1) if first else None,
        "peak_memory_gib": round(peak_memory(device) / 1024, 2), "predicted_gib": round(predicted, 2)}
    say(json.dumps(found))
    return found


def cost(preset: str) -> str:
    """A line of the README's table: steps, and GPU-hours as of `costs.hours`, of the preset's lists."""
    steps, hours = [], []
    for stage in ("align", "instruct"):
        config = options.configure(stage, {"preset": preset})
        records, _ = plan.RECORDS[Path(config.annotations).name]
        count, first = order.count_steps(config, records), config.contrastive_first
        steps.append(f"{first:,} + {count - first:,}" if first else f"{count:,}")
        hours.append(costs.hours(costs.flops_of_stage(config, costs.outline(config), count)))
    return f"| `{preset}` | {steps[0]} | {steps[1]} | {hours[0]:.2f} + {hours[1]:.2f} |"


def main():
    if sys.argv[1:] == ["--costs"]:
        return print("\n".join(cost(preset) for preset in options.PRESETS if preset != "tiny"))
    given = options.parse_args()
    given.pop("dry_run", None)
    with command("train.py"):
        device = start_ranks()
        for config in plan.configs_of(given):
            dry_run(config, device)


if __name__ == "__main__":
    main()
