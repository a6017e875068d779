"""Twenty steps of small random models, in fp64, against the log lines that are kept in tests/golden/.

A change that should not move a number must not move these, however a step is cut up: one file for each loss,
and every way of cutting (micro-batches, ranks, shards, checkpointing) has to give it. One run is in float16,
with steps that overflow; it is compared loosely. Weights and data come from a seed, so new towers or another
toy world move nothing. After a change that moves them on purpose, and says why, remove the files that it
moves and make them anew:

    python tests/test_golden.py                 # writes those that are not there
"""

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import losses
import train
from llm import LLM, LLMConfig
from projector import VLM
from running import order
from running.options import Config
from vit import ViT, ViTConfig

GOLDEN = Path(__file__).parent / "golden"
STEPS, BATCH, RECORDS, VOCABULARY = 20, 8, 40, 60
OPTIONS = {  # of each golden file
    "align-none": dict(stage="align", contrastive="none"),
    "align-patch": dict(stage="align", contrastive="patch"),
    "align-prompt": dict(stage="align", contrastive="prompt"),
    "align-both": dict(stage="align", contrastive="both"),
    "instruct": dict(stage="instruct", clip=0.5, weight_decay=0.1),
    "align-patch-first": dict(stage="align", contrastive="patch", contrastive_first=5),
    "align-both-first": dict(stage="align", contrastive="both", contrastive_first=5),
    "align-patch-share": dict(stage="align", contrastive="patch", contrastive_balance=0.3),
    "align-both-share": dict(stage="align", contrastive="both", contrastive_balance=0.3),
    "align-patch-float16": dict(stage="align", contrastive="patch", dtype="float16"),
}
HALF = "align-patch-float16"
HALF_SCALE = 2.0**24  # of the loss at its start: too large for the first steps
# Steps that are kept and compared, where not all: with the prompted loss, what a ratio is measured by is not
# measured at each step, and how often may change.
FEWER_STEPS = {"align-both-share": 1}
WAYS = [  # file, ranks, samples in a micro-batch, checkpointing, sharded
    ("align-none", 1, 8, "none", False), ("align-patch", 1, 8, "none", False),
    ("align-prompt", 1, 8, "none", False), ("align-both", 1, 8, "none", False),
    ("align-both", 1, 2, "every", False), ("align-patch", 1, 4, "none", False),
    ("align-patch", 2, 4, "none", False), ("align-both", 2, 2, "every-other", False),
    ("instruct", 1, 8, "none", False), ("instruct", 1, 2, "every", False),
    ("instruct", 1, 4, "every-other", False), ("instruct", 2, 4, "none", False),
    ("instruct", 2, 2, "every", True), ("instruct", 2, 4, "none", True),
    ("align-patch-first", 1, 8, "none", False), ("align-patch-first", 1, 2, "none", False),
    ("align-patch-first", 2, 2, "none", False),
    ("align-both-first", 1, 8, "none", False), ("align-both-first", 1, 2, "none", False),
    ("align-both-first", 2, 2, "none", False),
    ("align-patch-share", 1, 8, "none", False), ("align-patch-share", 1, 2, "none", False),
    ("align-patch-share", 2, 2, "none", False),
    ("align-both-share", 1, 8, "none", False), ("align-both-share", 1, 2, "none", False),
    ("align-both-share", 2, 2, "none", False),
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


def forget_moments(optimizer):
    """What train_stage does at the first step behind contrast first."""
    optimizer.forget()


def run(name, world, micro, checkpointing, shard, rank=0) -> list:
    """The log lines of this rank; in float16 with the loss scale that each step leaves behind."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        config = Config(**OPTIONS[name], contrastive_weight=0.7, lr=3e-3, warmup_ratio=0.1)
        vit, llm = ViT(ViTConfig(32, 8, 32, 64, 3, 4)), LLM(LLMConfig(VOCABULARY, 32, 48, 2, 4, 2, 8))
        vlm = VLM(vit, llm, "mlp2x_gelu")
        if name == HALF:
            vlm.half()
        train.choose_learning(config, vlm)
        train.checkpoint_blocks(vlm.llm.model.layers, checkpointing)
        scales = torch.nn.ModuleDict()
        for term in losses.CONTRASTIVE[config.contrastive]:
            scales[term] = losses.ContrastiveTerm(0.7, config.contrastive_balance)
        if name == HALF:
            scales.float()
        learning = [p for p in [*vlm.parameters(), *scales.parameters()] if p.requires_grad]
        optimizer = train.DataParallelAdamW(learning, config.weight_decay, config.clip, shard=shard,
                                            bucket_size=2000)
        if name == HALF:
            optimizer.loss_scale = HALF_SCALE
        lines, share = [], BATCH // world
        for step in range(FEWER_STEPS.get(name, STEPS)):
            mine = [sample((step * BATCH + rank * share + i) % RECORDS, config.stage) for i in range(share)]
            micro_batches = [data.collate(mine[i : i + micro], 16, data.IMAGE_MARKER, 0, 32)
                             for i in range(0, share, micro)]
            lr = train.learning_rate(step, STEPS, config)
            if step == config.contrastive_first:
                forget_moments(optimizer)
            line = train.train_step(vlm, scales, optimizer, micro_batches, config, lr, step)
            lines.append(line | {"loss_scale": optimizer.loss_scale} if name == HALF else line)
    finally:
        torch.set_default_dtype(torch.float32)
    return lines


def run_rank(rank, world, *way):
    return run(*way, rank=rank)


def compared(name, line) -> dict:
    """Those of a log line's keys that are kept and compared. The prompted loss and captioning go through the
    LLM in one sweep, unmeasured, unless a ratio is to be held."""
    left_out = set()
    contrastive = OPTIONS[name].get("contrastive")
    if contrastive in ("prompt", "both") and "contrastive_balance" not in OPTIONS[name]:
        left_out |= {"prompt_grad", "prompt_ratio", "prompt_cosine"}
        left_out |= {"generative_grad", "patch_ratio", "patch_cosine"}
    return {key: value for key, value in line.items() if key not in left_out}


def golden_lines(name) -> list:
    return [compared(name, line) for line in json.loads((GOLDEN / f"{name}.json").read_text())]


@pytest.mark.parametrize("name, world, micro, checkpointing, shard", WAYS)
def test_the_log_is_the_golden_one(ranks, name, world, micro, checkpointing, shard):
    golden = golden_lines(name)
    way = name, world, micro, checkpointing, shard
    found = [run(*way)] if world == 1 else ranks(world, run_rank, *way)
    for lines in found:
        for ours, theirs in zip(lines, golden, strict=True):
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_float16_skips_the_golden_steps():
    """Steps that overflow have no gradient norm and halve the loss scale. The losses may be rounded
    otherwise."""
    found, golden = run(HALF, 1, 8, "none", False), golden_lines(HALF)
    is_skipped = [line["grad_norm"] is None for line in golden]
    assert 0 < sum(is_skipped) < STEPS
    assert [line["grad_norm"] is None for line in found] == is_skipped
    assert [line["loss_scale"] for line in found] == [line["loss_scale"] for line in golden]
    for key in ("loss", "generative", "patch"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in golden], rel=1e-3)


def orders() -> dict:
    """Which records make which step, in two passes over a part of the data: sorted, for how a step is cut up
    changes nothing."""
    lengths = [7 * i % 23 + 1 for i in range(50)]
    config = Config(batch=8, micro_batch=2, epochs=2.0, data_fraction=0.7, seed=3)
    dealt = order.deal(config, lengths, order.count_steps(config, len(lengths)), 1)
    return {"plain": [sorted(chain(*parts)) for (parts,) in dealt]}


def test_the_records_of_each_step_are_the_golden_ones():
    assert orders() == json.loads((GOLDEN / "order.json").read_text())


def keep(name, make):
    """Write what `make()` returns to the golden file of that name, unless it is there."""
    file = GOLDEN / f"{name}.json"
    if not file.exists():
        file.write_text(json.dumps(make(), indent=None if name == "order" else 0) + "\n")
        print(f"wrote {file}")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in OPTIONS:
        keep(name, lambda name=name: [compared(name, line) for line in run(name, 1, 8, "none", False)])
    keep("order", orders)
