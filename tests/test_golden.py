"""Twenty steps of small random models, in fp64, against the log lines that are kept in tests/golden/.

A change that should not move a number must not move these, however a step is cut up: one file for each loss,
and every way of cutting (micro-batches, ranks, shards, checkpointing) has to give it. Weights and data come
from a seed, so new towers or another toy world move nothing. After a change that moves them on purpose, and
says why:

    python tests/test_golden.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import losses
import train
from llm import LLM, LLMConfig
from projector import VLM
from vit import ViT, ViTConfig

GOLDEN = Path(__file__).parent / "golden"
STEPS, BATCH, RECORDS, VOCABULARY = 20, 8, 40, 60
OPTIONS = {  # of each golden file
    "align-none": dict(stage="align", contrastive="none"),
    "align-patch": dict(stage="align", contrastive="patch"),
    "align-prompt": dict(stage="align", contrastive="prompt"),
    "align-both": dict(stage="align", contrastive="both"),
    "instruct": dict(stage="instruct", clip=0.5, weight_decay=0.1),
}
WAYS = [  # file, ranks, samples in a micro-batch, checkpointing, sharded
    ("align-none", 1, 8, "none", False), ("align-patch", 1, 8, "none", False),
    ("align-prompt", 1, 8, "none", False), ("align-both", 1, 8, "none", False),
    ("align-both", 1, 2, "every", False), ("align-patch", 1, 4, "none", False),
    ("align-patch", 2, 4, "none", False), ("align-both", 2, 2, "every-other", False),
    ("instruct", 1, 8, "none", False), ("instruct", 1, 2, "every", False),
    ("instruct", 1, 4, "every-other", False), ("instruct", 2, 4, "none", False),
    ("instruct", 2, 2, "every", True), ("instruct", 2, 4, "none", True),
]


def sample(number: int, stage: str) -> dict:
    """One of RECORDS: captions of 3 to 7 tokens, some of them twice; or two turns, every fifth without an
    image."""
    rng = torch.Generator().manual_seed(number)
    has_image = stage == "align" or number % 5 != 4
    pixels = torch.randn(3, 32, 32, generator=rng, dtype=torch.float64) if has_image else None
    caption_rng = torch.Generator().manual_seed(100 + number // 2 if number % 8 < 2 else number)

    def words(fewest, most):
        length = int(torch.randint(fewest, most + 1, (), generator=caption_rng))
        return torch.randint(3, VOCABULARY, (length,), generator=caption_rng).tolist()

    prompt, caption = [5, 6, 7], words(3, 7)
    ids, roles = [1, data.IMAGE_MARKER, *prompt] if has_image else [1, *prompt], []
    roles += [data.CONTEXT] * len(ids)
    for turn in [caption] + ([words(1, 9)] if stage == "instruct" else []):
        question = words(2, 4) if stage == "instruct" else []
        ids += question + turn + [2]
        roles += [data.CONTEXT] * len(question) + [data.ANSWER] * len(turn) + [data.END]
    return {"ids": ids, "roles": roles, "pixels": pixels, "text_ids": [1, *caption, 8, 9],
            "name": str(number)}


def run(name, world, micro, checkpointing, shard, rank=0) -> list:
    """The log lines of this rank."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        config = train.Config(**OPTIONS[name], contrastive_weight=0.7, lr=3e-3, warmup_ratio=0.1)
        vit, llm = ViT(ViTConfig(32, 8, 32, 64, 3, 4)), LLM(LLMConfig(VOCABULARY, 32, 48, 2, 4, 2, 8))
        vlm = VLM(vit, llm, "mlp2x_gelu")
        train.choose_learning(config, vlm)
        train.checkpoint_blocks(vlm.llm.model.layers, checkpointing)
        terms = losses.CONTRASTIVE[config.contrastive]
        scales = torch.nn.ModuleDict({term: losses.ContrastiveTerm(0.7) for term in terms})
        learning = [p for p in [*vlm.parameters(), *scales.parameters()] if p.requires_grad]
        optimizer = train.DataParallelAdamW(learning, config.weight_decay, config.clip, shard=shard,
                                            bucket_size=2000)
        lines, share = [], BATCH // world
        for step in range(STEPS):
            mine = [sample((step * BATCH + rank * share + i) % RECORDS, config.stage) for i in range(share)]
            micro_batches = [data.collate(mine[i : i + micro], 16, data.IMAGE_MARKER, 0, 32)
                             for i in range(0, share, micro)]
            lr = train.learning_rate(step, STEPS, config)
            lines.append(train.train_step(vlm, scales, optimizer, micro_batches, config, lr))
    finally:
        torch.set_default_dtype(torch.float32)
    return lines


def run_rank(rank, world, *way):
    return run(*way, rank=rank)


@pytest.mark.parametrize("name, world, micro, checkpointing, shard", WAYS)
def test_the_log_is_the_golden_one(ranks, name, world, micro, checkpointing, shard):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    way = name, world, micro, checkpointing, shard
    found = [run(*way)] if world == 1 else ranks(world, run_rank, *way)
    for lines in found:
        for ours, theirs in zip(lines, golden, strict=True):
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def orders() -> dict:
    """Which records make which step: plain and grouped, two passes and a part of the data."""
    lengths = [(7 * i % 23 + 1) * (1 if i % 3 else -1) for i in range(50)]
    found = {}
    for grouped in (True, False):
        config = train.Config(batch=8, micro_batch=2, epochs=2.0, data_fraction=0.7, seed=3,
                              group_by_length=grouped)
        steps = data.count_steps(config, len(lengths))
        lengths = lengths if grouped else [abs(length) for length in lengths]
        dealt = data.micro_batches(config, lengths, steps, 1)
        found["grouped" if grouped else "plain"] = [part for (parts,) in dealt for part in parts]
    return found


def test_the_order_of_the_records_is_the_golden_one():
    assert orders() == json.loads((GOLDEN / "order.json").read_text())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in OPTIONS:
        (GOLDEN / f"{name}.json").write_text(json.dumps(run(name, 1, 8, "none", False), indent=0) + "\n")
    (GOLDEN / "order.json").write_text(json.dumps(orders()) + "\n")
