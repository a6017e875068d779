"""What padding and waiting cost: the batches of a run as they are dealt to ranks and micro-batches.

    python tests/bench_order.py [RECORDS.json ...]    # also the lengths of such files, 4.4 characters a token
    torchrun --nproc_per_node=2 tests/bench_order.py  # instruct steps of a 100M model, really taken

The first looks at the lengths of the rows alone: a rank's time is taken to be its positions, padding
included; a step ends with its slowest rank. Printed: the part of all positions that is padding, the part of
the ranks' time that is padding or waiting, rows a second against LLaVA's order, and the positions of the
largest micro-batch. The second prints tokens a second, and their ratio step by step. Not a test: machines
vary.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import bench_transformers
import data
import train
from train import Config
from running.records import load_records
import plumbing.ranks as plumbing_ranks

WORLD, BATCH, STEPS, IMAGE = 8, 128, 200, 576
WAYS = {  # options
    "LLaVA's order, 16": dict(group_by_length=True, micro_batch=16),
    "LLaVA's order, 4": dict(group_by_length=True, micro_batch=4),
    "spread, 16": dict(micro_batch=16), "spread, 4": dict(micro_batch=4),
    "spread, 16, equal shares, 4096 tokens": dict(micro_batch=16, micro_tokens=4096, contrastive="patch"),
    **{f"spread, 16, {tokens} tokens": dict(micro_batch=16, micro_tokens=tokens)
       for tokens in (4096, 8192, 12288, 16384)},
}


def log_normal(n: int):
    """Like mix665k: text log-normal with a median of 150 tokens, an image in 15 of 16 rows."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(np.log(150), 0.9, n)
    return text, rng.random(n) < 15 / 16


def costs(way: dict, text, has_image) -> dict:
    rows = (text + IMAGE * has_image).clip(1, 2048).astype(int).tolist()
    words = np.where(has_image, text, -text).astype(int).tolist()
    config = Config(batch=BATCH, **way)
    dealt = data.micro_batches(config, words if config.group_by_length else rows, STEPS, WORLD)
    real = padded = time = 0
    for ranks in dealt:
        taken = [sum(len(part) * max(rows[i] for i in part) for part in parts) for parts in ranks]
        real += sum(rows[i] for parts in ranks for part in parts for i in part)
        padded, time = padded + sum(taken), time + WORLD * max(taken)
    return {"padding": 1 - real / padded, "padding or waiting": 1 - real / time,
            "largest": np.prod(data.largest_micro_batch(dealt, rows)),
            "passes": sum(len(ranks[0]) for ranks in dealt) / STEPS}


def show(name: str, text, has_image):
    print(f"\n{name}: {len(text)} rows, {STEPS} steps of {BATCH} on {WORLD} ranks\n"
          "| order, most rows | passes | padding | padding or waiting | rows/s | largest |\n"
          "|---|---|---|---|---|---|")
    base = None
    for way, options in WAYS.items():
        found = costs(options, text, has_image)
        base = base or 1 - found["padding or waiting"]
        lost = found["padding or waiting"]
        print(f"| {way} | {found['passes']:.1f} | {found['padding']:.1%} | {lost:.1%} | "
              f"{(1 - lost) / base:.2f} | {found['largest']} |")


def measure(steps: int = 4, batch: int = 16):
    """Steps of one model in LLaVA's order and spread, in turn, each order with batches of its own."""
    device, world, rank = plumbing_ranks.start_ranks(), plumbing_ranks.world_size(), plumbing_ranks.rank()
    ways = {"LLaVA's order": Config(stage="instruct", batch=batch, micro_batch=4, group_by_length=True),
            "spread": Config(stage="instruct", batch=batch, micro_batch=8, micro_tokens=2048)}
    vlm = bench_step.random_model(ways["spread"], bench_transformers.SIZES["100m"], device, torch.float32)
    optimizer, terms = train.build_optimizer(ways["spread"], vlm, device)
    text = log_normal(1000)[0].clip(5, 1400).astype(int).tolist()
    rows = [length + 1 + vlm.num_image_tokens for length in text]
    dealt = {name: data.micro_batches(config, text if config.group_by_length else rows, steps + 1, world)
             for name, config in ways.items()}
    rates = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, config in ways.items():
            parts = [[text[i] for i in part] for part in dealt[name][step][rank]]
            samples = [bench_transformers.samples_of(vlm, part, "instruct") for part in parts]
            batches = [bench_transformers.collate(vlm, part) for part in samples]
            plumbing_ranks.barrier()
            start = time.perf_counter()
            tokens = train.train_step(vlm, terms, optimizer, batches, config, 1e-5)["tokens"]
            plumbing_ranks.barrier()
            rates[name].append(tokens / (time.perf_counter() - start))
    base, ours = rates["LLaVA's order"][1:], rates["spread"][1:]  # the first warms up
    plumbing_ranks.say(f"{world} ranks, steps of {batch}; supervised tokens a second, LLaVA's order: "
               f"{statistics.median(base):.0f}, spread: {statistics.median(ours):.0f}; ratio of the steps' "
               f"sums {statistics.harmonic_mean(ours) / statistics.harmonic_mean(base):.2f}")
    plumbing_ranks.leave_ranks()


def main():
    if "RANK" in os.environ:
        return measure()
    show("log-normal text + 576", *log_normal(30000))
    for file in sys.argv[1:]:
        sizes = load_records(file).sizes
        show(Path(file).name, sizes[:, 0] / 4.4 + 10 * sizes[:, 1], sizes[:, 2] > 0)


if __name__ == "__main__":
    main()
