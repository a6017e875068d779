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
import train
from plumbing.ranks import barrier, leave_ranks, rank, say, start_ranks, world_size
from running import order
from running.options import Config
from running.records import load_records

WORLD, BATCH, STEPS, IMAGE = 8, 128, 200, 576
WAYS = {  # options
    "LLaVA's order, 16": dict(micro_batch=16),
    "LLaVA's order, 4": dict(micro_batch=4),
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


def llavas_order(config, words: list, steps: int, world: int) -> list:
    """[step][rank][number in the step] as LLaVA deals with --group_by_modality_length: a rank's share of a
    step is consecutive in `grouped`. words: text lengths of all records, negative for those without an
    image."""
    size, parts = order.split_batch(config, world)
    indices = []
    for epoch in range(1 + steps * config.batch // len(words)):
        indices += grouped(words, config.batch, world * parts, np.random.default_rng([config.seed, epoch]))
    cut = [indices[start : start + size] for start in range(0, steps * config.batch, size)]
    shares = [cut[start : start + parts] for start in range(0, len(cut), parts)]
    return [shares[start : start + world] for start in range(0, len(shares), world)]


def grouped(words: list, batch: int, chunks: int, rng) -> list:
    """An order in which each batch is of one modality and of similar lengths.

    Of each modality: shuffle, cut into batches. Then shuffle the batches, and deal each, longest first, into
    even chunks. What is left over comes last. """
    batches, rest = [], []
    for is_text in (False, True):
        members = [i for i, length in enumerate(words) if (length < 0) == is_text]
        members = [members[i] for i in rng.permutation(len(members))]
        whole = len(members) // batch * batch
        batches += [members[start : start + batch] for start in range(0, whole, batch)]
        rest += members[whole:]
    indices = []
    for number in rng.permutation(len(batches)):
        longest_first = sorted(batches[number], key=lambda i: -abs(words[i]))
        indices += even_chunks(longest_first, words, chunks)
    return indices + sorted(rest)


def even_chunks(longest_first: list, words: list, chunks: int) -> list:
    """Each index goes to the chunk with the smallest total so far that has room; then chunk after chunk."""
    room = len(longest_first) // chunks
    dealt = [[] for _ in range(chunks)]
    totals = [0] * chunks
    for index in longest_first:
        open_chunks = [chunk for chunk in range(chunks) if len(dealt[chunk]) < room]
        smallest = min(open_chunks, key=lambda chunk: totals[chunk])
        dealt[smallest].append(index)
        totals[smallest] += abs(words[index])
    return [index for chunk in dealt for index in chunk]


def costs(name: str, text, has_image) -> dict:
    rows = (text + IMAGE * has_image).clip(1, 2048).astype(int).tolist()
    words = np.where(has_image, text, -text).astype(int).tolist()
    config = Config(batch=BATCH, **WAYS[name])
    if name.startswith("LLaVA"):
        dealt = llavas_order(config, words, STEPS, WORLD)
    else:
        dealt = order.deal(config, rows, STEPS, WORLD)
    real = padded = time = 0
    for ranks in dealt:
        taken = [sum(len(part) * max(rows[i] for i in part) for part in parts) for parts in ranks]
        real += sum(rows[i] for parts in ranks for part in parts for i in part)
        padded, time = padded + sum(taken), time + WORLD * max(taken)
    return {"padding": 1 - real / padded, "padding or waiting": 1 - real / time,
            "largest": np.prod(order.largest_micro_batch(dealt, rows)),
            "passes": sum(len(ranks[0]) for ranks in dealt) / STEPS}


def show(name: str, text, has_image):
    print(f"\n{name}: {len(text)} rows, {STEPS} steps of {BATCH} on {WORLD} ranks\n"
          "| order, most rows | passes | padding | padding or waiting | rows/s | largest |\n"
          "|---|---|---|---|---|---|")
    base = None
    for way in WAYS:
        found = costs(way, text, has_image)
        base = base or 1 - found["padding or waiting"]
        lost = found["padding or waiting"]
        print(f"| {way} | {found['passes']:.1f} | {found['padding']:.1%} | {lost:.1%} | "
              f"{(1 - lost) / base:.2f} | {found['largest']} |")


def measure(steps: int = 4, batch: int = 16):
    """Steps of one model in LLaVA's order and spread, in turn, each order with batches of its own."""
    device = start_ranks()
    world = world_size()
    ways = {"LLaVA's order": Config(stage="instruct", batch=batch, micro_batch=4),
            "spread": Config(stage="instruct", batch=batch, micro_batch=8, micro_tokens=2048)}
    vlm = bench_step.random_model(ways["spread"], bench_transformers.SIZES["100m"], device, torch.float32)
    optimizer, terms = train.build_optimizer(ways["spread"], vlm, device)
    text = log_normal(1000)[0].clip(5, 1400).astype(int).tolist()
    rows = [length + 1 + vlm.num_image_tokens for length in text]
    dealt = {"LLaVA's order": llavas_order(ways["LLaVA's order"], text, steps + 1, world),
             "spread": order.deal(ways["spread"], rows, steps + 1, world)}
    rates = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, config in ways.items():
            parts = [[text[i] for i in part] for part in dealt[name][step][rank()]]
            samples = [bench_transformers.samples_of(vlm, part, "instruct") for part in parts]
            batches = [bench_transformers.collate(vlm, part) for part in samples]
            barrier()
            start = time.perf_counter()
            tokens = train.train_step(vlm, terms, optimizer, batches, config, 1e-5)["tokens"]
            barrier()
            rates[name].append(tokens / (time.perf_counter() - start))
    base, ours = rates["LLaVA's order"][1:], rates["spread"][1:]  # the first warms up
    say(f"{world} ranks, steps of {batch}; supervised tokens a second, LLaVA's order: "
        f"{statistics.median(base):.0f}, spread: {statistics.median(ours):.0f}; ratio of the steps' sums "
        f"{statistics.harmonic_mean(ours) / statistics.harmonic_mean(base):.2f}")
    leave_ranks()


def text_and_image(record) -> tuple:
    """(tokens of the text, estimated from its characters; whether there is an image)."""
    turns = record["conversations"]
    return sum(len(turn["value"]) for turn in turns) / 4.4 + 10 * len(turns), "image" in record


def main():
    if "RANK" in os.environ:
        return measure()
    show("log-normal text + 576", *log_normal(30000))
    for file in sys.argv[1:]:
        sizes = np.array([text_and_image(record) for record in load_records(file)])
        show(Path(file).name, sizes[:, 0], sizes[:, 1] > 0)


if __name__ == "__main__":
    main()
