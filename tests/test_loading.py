"""The loader: the micro-batches of each step, its processes, what it cannot hand over."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import how_it_ends, log_of, trained
from test_check import pictured, write_records
from test_data import TOWER, llama2, record
from test_order import CPU, vlm_of

import data
import train
from running import loading, order, watch
from running.options import Config


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_yields_the_micro_batches_of_each_step(workers):
    """In their order, of their rows, cut at the longest row that the run and the LLM allow."""
    tokenizer = llama2(False)
    tokenizer.pad_token = tokenizer.unk_token
    records = [record("What?", "red " * n) for n in (1, 2, 300)]
    samples = data.Conversations(records, "", tokenizer, "v1", TOWER, "pad")
    mine = [[[2, 0], [1]], [[0, 1, 2]], [[1], [2]]]
    config = Config(workers=workers, max_length=150)
    steps = [*loading.make_loader(config, samples, vlm_of(most=120), mine, CPU)]
    assert [[len(m["ids"]) for m in parts] for parts in steps] == [[2, 1], [3], [1, 1]]
    lengths = order.token_counts(config, samples, vlm_of(most=120))
    for parts, numbers in zip(steps, mine):
        for m, part in zip(parts, numbers):
            assert m["mask"].sum(1).tolist() == [lengths[i] for i in part] and m["ids"].shape[1] <= 120


@pytest.mark.parametrize("of_loader, of_step, is_told", [(0.02, 0.005, True), (0.0, 0.02, False)])
def test_a_loader_slower_than_the_step_is_told(tmp_path, monkeypatch, capsys, of_loader, of_step, is_told):
    """By the waiting that the log has in `wait_ms`. The clock is ours."""
    now = [0.0]

    def slow():
        while True:
            now[0] += of_loader
            yield [{"names": []}]

    def step(*_):
        now[0] += of_step
        return {"tokens": 1, "generative": 1.0}

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    monkeypatch.setattr(train, "train_step", step)
    vlm, optimizer = vlm_of(), SimpleNamespace(forget=lambda: None)
    vlm.llm.head_weight = torch.zeros(1)
    config = Config(batch=1, out=str(tmp_path), stage="instruct")
    train.run_steps(config, vlm, {}, optimizer, slow(), None, time.time(), 0, watch.WARM + 2, {}, [])
    pattern = r"the loader is slower than the step: (\d+\.\d) samples/s, the step alone (\d+\.\d)"
    said = re.search(pattern, capsys.readouterr().out)
    assert bool(said) == is_told and (not said or float(said[1]) < 100 < float(said[2]))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == watch.WARM + 2
    assert {line["wait_ms"] for line in lines} == {1000 * of_loader}
    assert {line["ms"] for line in lines} == {1000 * (of_loader + of_step)}


def test_the_moments_of_contrast_first_are_forgotten(tmp_path, monkeypatch):
    seen = []

    def step(*given):
        seen.append(given[-1])
        return {"tokens": 1, "generative": 1.0}

    monkeypatch.setattr(train, "train_step", step)
    vlm, optimizer = vlm_of(), SimpleNamespace(forget=lambda: seen.append("forget"))
    vlm.llm.head_weight = torch.zeros(1)
    config = Config(batch=1, out=str(tmp_path), contrastive="patch", contrastive_first=2)
    loader = iter([[{"names": []}]] * 4)
    train.run_steps(config, vlm, {}, optimizer, loader, None, time.time(), 0, 4, {}, [])
    assert seen == [0, 1, "forget", 2, 3]


def test_no_more_loader_processes_than_a_rank_has_cores(monkeypatch):
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: range(12))
    for local_ranks, cores in ((1, 12), (4, 3), (99, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        assert loading.cores_of_a_rank() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be forked, or not safely")
def test_loader_processes_share_the_records():
    """Python 3.14 starts others by default, and sends each of them all records."""
    loader = torch.utils.data.DataLoader(range(4), **loading.processes(1))
    assert loader.multiprocessing_context.get_start_method() == "fork" and len([*loader]) == 4


@pytest.mark.parametrize("name, ends", [("SIGINT", None), ("SIGUSR1", None), ("SIGTERM", 0)])
def test_a_loader_process_does_not_die_of_the_signal_that_stops_its_run(name, ends):
    """Its death would be an error before the step is done."""
    context = multiprocessing.get_context("fork")
    is_there = context.Event()
    loader = context.Process(target=lambda: loading.outlive_signals(0) or is_there.set() or time.sleep(60))
    loader.start()
    is_there.wait()
    os.kill(loader.pid, getattr(signal, name))
    loader.join(0.3 if ends is None else 10)
    assert loader.exitcode == ends
    loader.kill()
    loader.join()


def timed_out_loader(batches):
    """A loader whose first call times out."""
    yielded = iter(batches)
    calls = []

    class Loader:
        def __next__(self):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("DataLoader timed out after 20 seconds")
            return next(yielded)

    return Loader()


def test_a_full_shared_memory_ends_the_run_and_a_slow_disk_does_not(monkeypatch):
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="shared memory .* is full: --workers 0"):
        loading.next_batch(timed_out_loader(["batch"]))
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert loading.next_batch(timed_out_loader(["batch"])) == "batch"
    loader = timed_out_loader(["batch"])
    loader._pin_memory_thread = SimpleNamespace(is_alive=lambda: False)
    with pytest.raises(ValueError, match="the loader hands nothing over"):
        loading.next_batch(loader)


def test_loader_workers_change_nothing(world, tmp_path):
    """Samples read by two loader processes, or kept in memory: the run is that of samples read in place."""
    ways = {"none": ["--cache", "False"], "workers": ["--workers", "2", "--cache", "False"],
            "cache": ["--cache", "True"]}
    for name, more in ways.items():
        trained(world, "--stage", "align", "--contrastive", "both", "--prompt", "describe", "--out",
                tmp_path / name, *more)
        assert log_of(tmp_path / name) == log_of(tmp_path / "none")


def test_a_loader_process_names_the_record_too(tmp_path, world):
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    file = write_records(tmp_path / "d.json", *[pictured("bomb.png")] * 8)
    for workers in ("0", "1"):
        last = how_it_ends(train.main, world[0], *world[1], "--stage", "align", "--annotations", file,
                           "--images", tmp_path, "--workers", workers, "--out", tmp_path / "out")
        assert re.match(r"train.py: .*record 'r': .*bomb.png: not a readable image: 14000 x 14000", last)
