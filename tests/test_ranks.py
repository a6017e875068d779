"""Processes: ranks that agree and end together, signals, dtypes and memory, consoles, other systems."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from scripts import HERE, called, how_it_ends, log_of, script, start, trained

import train
from plumbing import ranks as processes
from plumbing.files import whole
from plumbing.ranks import agree, caught_signals, choose_dtype, slowness

CPU = torch.device("cpu")


def other_contents(rank, world):
    try:
        agree({"records": 7, "vit": rank})
    except ValueError as error:
        return str(error)


def test_ranks_of_other_contents_end_with_the_content(ranks):
    assert ranks(2, other_contents) == 2 * ["rank 1 has vit 1, rank 0 has 0"]


def test_an_error_of_one_rank_comes_first_and_ends_all(world, tmp_path):
    """A broken picture, which one of two ranks meets: its line comes before all others', soon."""
    records = json.loads((world[0] / "data/toy/align.json").read_text())
    bad = records[5]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = shutil.copytree(world[0] / "data/toy/images", tmp_path / "images")
    shutil.move(tmp_path / "bad.png", images / bad["image"])
    began = time.monotonic()
    run = script(world, "--stage", "align", "--steps", "6", "--images", images, "--out", tmp_path / "out",
                 launch=["--nproc_per_node=2", *HERE], check=False)
    said = [line for line in run.stderr.splitlines() if "train.py: " in line or "Traceback" in line]
    assert run.returncode and time.monotonic() - began < 60
    assert re.search(f"train.py: rank [01]: record '{bad['id']}': .*not a readable image", said[0])


@pytest.mark.parametrize("told, is_name", [
    ("{}", True), ("{}x", False), ("^{}", False), ("={}", False), ("{0},{0}", False)])
def test_gloo_takes_nccls_network_if_it_is_one_by_its_whole_name(monkeypatch, told, is_name):
    """NCCL's may be a prefix, what is left out, or a list of these."""
    told = told.format(socket.if_nameindex()[0][1])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", told)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # which monkeypatch removes afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter(()))
    with pytest.raises(StopIteration):
        processes.start_ranks()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == (told if is_name else None)


def run_alone(rank, world, meeting):
    """Whether the program is a rank or runs beside ranks that are left, by rank 0; the status."""
    seen = []

    def run(command_line, env):
        seen.append(("RANK" in env, torch.distributed.is_initialized()))
        return subprocess.CompletedProcess(command_line, 7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setattr(processes.subprocess, "run", run)
        status = processes.run_alone(["eval.py"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    return seen, status


def test_what_runs_alone_is_no_rank_and_keeps_none_waiting(ranks, tmp_path):
    assert ranks(2, run_alone, tmp_path / "again") == 2 * [([(False, False)], 7)]


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_caught_once(name):
    number = getattr(signal, name)
    heard = []
    before = signal.signal(number, lambda *_: heard.append(name))
    try:
        with caught_signals(True) as caught:
            for _ in range(2):  # torchrun sends on what its ranks have had
                signal.raise_signal(number)
                assert len(caught) == 1 and not heard
            caught[0] -= 6  # seconds
            signal.raise_signal(number)
            assert heard == [name]
    finally:
        signal.signal(number, before)


def test_a_sigterm_clears_away_what_is_half_done(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="^train.py: interrupted$"):
        with processes.command("train.py", "interrupted"), whole(tmp_path / "file"):
            signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


SAVED = r"train.py: stopped, and saved at step (\d+): the same command and --resume go on with it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(world, tmp_path, monkeypatch, number):
    """And the run goes on to the same bits."""
    options = [*world[1], "--stage", "align", "--save_every", "1000", "--out"]
    step = train.train_step

    def signalled(*args):
        if args[-1] == 3:
            os.kill(os.getpid(), number)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        last = how_it_ends(train.main, world[0], *options, tmp_path / "a")
    assert re.fullmatch(SAVED, last)[1] == "4"
    assert signal.getsignal(number) is signal.default_int_handler
    assert [f.name for f in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert len(log_of(tmp_path / "a")) == 4
    assert "step 4" in called(train.main, world[0], *options, tmp_path / "a", "--resume")
    called(train.main, world[0], *options, tmp_path / "b")
    weights = [(tmp_path / name / "projector.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_signal_to_torchrun_saves_what_all_ranks_have(world, tmp_path):
    """With loader processes, which torchrun ends, too."""
    options = ["--stage", "align", "--epochs", "50", "--save_every", "1000", "--workers", "1"]
    launch = ["--nproc_per_node=2", *HERE]
    process = start(world, *options, "--out", tmp_path, launch=launch, stderr=subprocess.PIPE)
    log = tmp_path / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    step = int(re.search(SAVED, process.communicate(timeout=60)[1].decode())[1])
    assert process.returncode != 0 and len(log_of(tmp_path)) == step
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step:07d}"]


# ---- a device, and what it has -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, times, is_told", [
    ("bfloat16", 70, True), ("bfloat16", 2, False), ("", 70, False)])
def test_a_dtype_that_this_processor_is_slow_in_is_told_once(monkeypatch, capsys, name, times, is_told):
    monkeypatch.setattr(processes, "slowness", lambda dtype: times)
    processes.warn_of_slow.cache_clear()
    for _ in range(2):
        assert choose_dtype(torch.device("cpu"), name) == (torch.bfloat16 if name else torch.float32)
    said = capsys.readouterr()
    told = f"{name} is slow on this processor: a product takes 70 times as long as in float32\n"
    assert (said.out, said.err) == ("", told if is_told else "")


def test_slowness_is_a_ratio(monkeypatch):
    clock = iter([0, 1, 0, 3] * 3)  # before and behind a product, in fp32 and in the dtype
    monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert slowness(torch.float64) == 3


def test_what_does_not_fit_is_halved_and_one_that_does_not_is_an_error():
    asked = []

    def answer(rows):
        asked.append(len(rows))
        if len(rows) > 2 or "large" in rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [row.upper() for row in rows]

    assert processes.halved(answer, list("abcdefg")) == list("ABCDEFG")
    assert asked == [7, 3, 1, 2, 4, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        processes.halved(answer, ["a", "large"])


@pytest.mark.parametrize("text, gib", [(f"{3 * 2**30}\n", 1.5), ("max\n", None), (None, None)])
def test_a_container_has_what_it_was_given(tmp_path, monkeypatch, text, gib):
    """Shared by two ranks. Without a bound, or elsewhere, the machine's memory is."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "CONTAINER_MEMORY", tmp_path / "memory.max")
    if text:
        (tmp_path / "memory.max").write_text(text)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    assert processes.total_memory(torch.device("cpu")) == (whole if gib is None else gib * 2**30)


# ---- consoles and systems ----------------------------------------------------------------------------------


def test_a_console_without_the_letters_of_a_caption_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with processes.command("train.py"):
        print("\u4e00 Stra\u00dfe", flush=True)
    assert sys.stdout.buffer.getvalue() == b"\\u4e00 Stra\xdfe" + os.linesep.encode()


def test_other_bytes_than_letters_end_a_chat_in_a_line(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit, match="^eval.py: 'utf-8' codec can't decode byte 0xe9"):
        with processes.command("eval.py"):
            input()


def test_no_module_or_call_that_windows_lacks_is_needed(world, tmp_path):
    code = ("import os, sys; sys.modules['resource'] = None\n"
            "del os.sysconf, os.sysconf_names, os.O_DIRECTORY, os.sync\n"
            "import vit, llm, projector, losses, data, eval, train; train.main(sys.argv[1:])")
    options = ["--stage", "align", "--steps", "3", "--out"]
    argv = [*world[1], *options, tmp_path / "a", "--save_every", "1"]
    subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=world[0], check=True, timeout=120,
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    trained(world, *options, tmp_path / "b")
    lines = (tmp_path / "b/log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["memory_mib"] > 100 for line in lines)
    assert log_of(tmp_path / "a")[2] == log_of(tmp_path / "b")[2]


def test_macos_counts_bytes(monkeypatch):
    on_linux = train.peak_memory(CPU)
    monkeypatch.setattr(train.sys, "platform", "darwin")
    assert train.peak_memory(CPU) == on_linux >> 10
