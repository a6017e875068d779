"""tests/gpu.py without a GPU: all rows on the tiny preset, rows that fail, the count of waits; and the limit
of tests/bench_transformers.py."""

import gc
import json
import re
import warnings
import weakref
from functools import partial

import bench_step
import gpu
import pytest
import torch
import torch.nn.functional as F
from bench_transformers import Limit
from torch.utils.flop_counter import FlopCounterMode

from running import costs


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function: {row: what was found} of a run of tests/gpu.py on the CPU, with changes to the module."""
    monkeypatch.setattr(costs, "SHAPES", dict(costs.SHAPES))
    monkeypatch.setattr(gpu, "IS_GPU", False)
    monkeypatch.setattr(gpu, "BATCH", {"tiny": 2})
    monkeypatch.setattr(gpu.ranks, "start_ranks", lambda: torch.device("cpu"))

    def run(**changes):
        for name, value in changes.items():
            monkeypatch.setattr(gpu, name, value)
        gpu.main()
        rows = re.findall(r"^\| (.+) \| (.+) \|$", capsys.readouterr().out, re.M)
        return {name: json.loads(f"{{{found}}}") for name, found in rows if name != "---"}

    return run


def test_every_row_is_measured_and_leaves_no_model_behind(printed, monkeypatch):
    models, build = [], bench_step.random_model

    def random_model(*given):
        vlm = build(*given)
        models.append(weakref.ref(vlm))
        return vlm

    monkeypatch.setattr(bench_step, "random_model", random_model)
    rows = printed(PAIRS=1)
    gc.collect()
    assert len(models) == 11 and not any(model() for model in models)
    assert len(rows) == len(gpu.ROWS) and "failed" not in str(rows)
    exact, plain, align, instruct, *pairs = rows.values()
    for row in (exact, plain):
        assert all(0.999 < float(cosine) < 1 for cosine in row["cosines"])
    for row in (align, instruct):
        assert row["waits"] == {} and row["tokens_per_s"] > 0
    for row in pairs:
        assert min(row["ours / theirs"]) > 0 and len(row["rows/s"]) == 2


def test_what_fails_says_so_and_what_is_too_large_is_tried_with_fewer_layers(printed):
    kept = []

    def row(preset, part, device, error, largest):
        assert not any(earlier() for earlier in kept)  # what refers to itself, too, is gone before the next
        vlm = torch.nn.Module()
        vlm.forward = partial(print, vlm)
        kept.append(weakref.ref(vlm))
        if part > largest:
            return {"found": part}
        raise error("why")

    given = (torch.OutOfMemoryError, 1), (ValueError, 2), (MemoryError, 1), (torch.OutOfMemoryError, 4)
    rows = printed(ROWS=[(f"{error.__name__} {largest}", row, error, largest) for error, largest in given])
    assert rows == {
        "tiny OutOfMemoryError 1, LLM / 2": {"found": 2}, "tiny ValueError 2, LLM / 4": {"found": 4},
        "tiny MemoryError 1, LLM / 1": {"failed": "MemoryError('why')"},
        "tiny OutOfMemoryError 4, LLM / 4": {"failed": "OutOfMemoryError('why')"}}
    late, = printed(BUDGET=59.9, ROWS=gpu.ROWS[:1]).values()
    assert late == {"skipped": "60 s left"}


def test_waits_for_a_gpu_are_counted_by_their_place(printed, monkeypatch):
    """With the calls of a GPU that are made: PyTorch warns in this mode."""
    modes, take = [], bench_step.train.train_step

    def step(*args):
        for _ in range(2 * (modes[-1] == "warn")):
            warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
        return take(*args)

    monkeypatch.setattr(bench_step.train, "train_step", step)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    row, = printed(IS_GPU=True, ROWS=[("instruct", gpu.step_row, "instruct", False)]).values()
    place, = row["waits"]
    assert place.startswith("test_gpu.py:") and row["waits"][place] == 2 * row["steps"] == 6
    assert row["of the plan"] == pytest.approx(row["peak_memory_gib"] / row["predicted_gib"], abs=1e-3)


def test_the_limit_repeats_every_product_forward_and_backward_and_nothing_else():
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 3, 8, requires_grad=True)

    def step():
        q = layer(x)[:, None]  # (B, 1, S, 4)
        (F.scaled_dot_product_attention(q, q, q).tanh() @ q.mT).sum().backward()

    with FlopCounterMode(display=False) as first:
        step()
    limit = Limit(step)
    with FlopCounterMode(display=False) as again:
        limit()
    assert again.get_total_flops() == first.get_total_flops() > 0
    names = [function.__name__.split(".")[0] for function, *_ in limit.calls]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert names == ["addmm", attention, "bmm", "bmm", "bmm", f"{attention}_backward", "mm", "mm"]
