"""A run directory: one writer, whose it is, what is moved aside, how a run ends in it, a full disk."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, checkpoints_kept
from scripts import called, how_it_ends, lines_of, log_of, refused, trained, unfinished, without

import train
from llm import LLM
from plumbing.files import read_json
from projector import VLM
from running import checkpoint, directory
from running.options import Config


def test_nothing_finished_is_ever_deleted(align):
    for seed in range(4):
        trained(align, "--out", "kept", "--seed", seed, "--steps", "2")
    seeds = {}
    for folder in sorted(align[0].glob("kept*")):
        seeds[folder.name] = json.loads((folder / "config.json").read_text())["seed"]
    assert seeds == {"kept.old": 0, "kept.old2": 1, "kept.old3": 2, "kept": 3}


def test_a_finished_run_is_moved_aside(world, tmp_path):
    trained(world, "--stage", "align", "--out", tmp_path / "a", "--steps", "2")
    before = (tmp_path / "a/projector.safetensors").read_bytes()
    printed = trained(world, "--stage", "align", "--out", tmp_path / "a", "--steps", "3")
    assert f"is now {tmp_path}/a.old" in printed
    assert (tmp_path / "a.old/projector.safetensors").read_bytes() == before  # nothing was lost
    assert (tmp_path / "a/projector.safetensors").read_bytes() != before


def test_a_run_that_could_be_resumed_is_moved_aside_too(world, tmp_path):
    """Who forgets --resume loses nothing."""
    options = ["--stage", "align", "--out", tmp_path / "a"]
    with checkpoints_kept():
        trained(world, *options, "--steps", "3", "--save_every", "1")
    (tmp_path / "a/config.json").unlink()  # as if it had been stopped
    printed = trained(world, *options, "--steps", "2")
    assert f"an unfinished run: it is now {tmp_path}/a.old" in printed
    assert (tmp_path / "a.old/checkpoint-0000002/rank-0.pt").exists() and len(log_of(tmp_path / "a.old")) == 3
    assert "finished, in" in printed and str(tmp_path / "a") in printed.splitlines()[-1]


def test_a_start_that_fails_leaves_what_was_there(align):
    trained(align, "--out", "first", "--steps", "2")
    before = {file: file.read_bytes() for file in (align[0] / "first").rglob("*") if file.is_file()}
    assert "no such file" in refused(align, "--out", "first", "--annotations", "missing.json")
    after = {file: file.read_bytes() for file in (align[0] / "first").rglob("*") if file.is_file()}
    assert after == before and not (align[0] / "first.lock").exists()


def test_a_folder_that_is_no_run_is_refused_and_kept(align):
    """A run removes the llm/ that an old one left: it must not be somebody's LLM."""
    mine = align[0] / "mine"
    (mine / "llm").mkdir(parents=True)
    (mine / "llm/config.json").write_text("{}")
    (align[0] / "file").write_text("")
    for out, says in (("mine", "holds llm and no run: name another folder"),
                      ("file", "is a file; name a folder"),
                      (".", "cannot be renamed, nor locked beside: name a folder in it")):
        assert refused(align, "--out", out, "--steps", "2") == f"train.py: --out {out} {says}"
    (align[0] / "mine").rename(align[0] / "both")
    (align[0] / "both/llm").rename(align[0] / "both/unaligned")
    (align[0] / "pair").mkdir()
    (align[0] / "both").rename(align[0] / "pair/instruct")
    both = align[0], without(align[1], "--stage")
    assert "--out pair/instruct holds unaligned and no run" in refused(both, "--out", "pair")
    assert (align[0] / "pair/instruct/unaligned/config.json").read_text() == "{}"
    assert not (align[0] / "pair/align").exists()
    (align[0] / "noted").mkdir()
    (align[0] / "noted/train.log").write_text("of tee")
    trained(align, "--out", "noted", "--steps", "2")


def test_a_link_stays_and_other_folders_are_nobodys(align, monkeypatch):
    """A second run goes where the link leads. What looks like a checkpoint, and is none, is kept. Without a
    place for runs/last a run is finished, too."""
    (align[0] / "elsewhere").mkdir()
    (align[0] / "link").symlink_to("elsewhere/run")
    monkeypatch.setattr(Path, "write_text", refuse_to_write("runs/last", Path.write_text))
    for _ in range(2):
        trained(align, "--out", "link", "--steps", "2")
    assert (align[0] / "link").is_symlink() and (align[0] / "elsewhere/run.old/config.json").exists()
    (align[0] / "link/checkpoint-initial").mkdir()
    assert checkpoint.checkpoints(align[0] / "link") == []


def refuse_to_write(name, write_text):
    def write(path, *args, **how):
        if str(path) == name:
            raise OSError(errno.EROFS, "Read-only file system")
        return write_text(path, *args, **how)

    return write


def test_instruct_goes_on_only_if_it_came_behind_this_align(tmp_path):
    """An older experiment may lie there: its instruct run is none of this one."""
    align, instruct = tmp_path / "align", tmp_path / "instruct"
    for folder, file in ((align, "config.json"), (instruct, "log.jsonl")):
        assert not directory.is_behind(instruct, align)
        folder.mkdir()
        (folder / file).touch()
    for age, is_behind in ((10, True), (-10, False)):
        os.utime(align / "config.json", times=(time.time() - age, time.time() - age))
        assert directory.is_behind(instruct, align) == is_behind


# ---- one writer, and ranks that agree ----------------------------------------------------------------------


def test_a_file_system_without_locks_has_none(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    directory.lock(tmp_path / "lock", "shared").close()


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(align):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(align[0])
        with directory.locked(Config(out="shared")):
            command = [sys.executable, ROOT / "train.py", *map(str, align[1]), "--out", "shared"]
            other = subprocess.run(command, capture_output=True, text=True, cwd=align[0])
            assert other.returncode == 1
            assert other.stderr.splitlines()[-1] == "train.py: shared: another run is writing there"
        assert not Path("shared.lock").exists() and not Path("shared").exists()
        Path("shared.lock").write_text("of a run that was killed")
        with directory.locked(Config(out="shared")):
            pass


def test_a_loader_process_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    held = directory.lock(tmp_path / "lock", "x")
    context = multiprocessing.get_context("fork")
    is_there = context.Event()
    loader = context.Process(target=lambda: is_there.set() or time.sleep(60))
    loader.start()
    is_there.wait()
    held.close()
    directory.lock(tmp_path / "lock", "x").close()
    loader.kill()
    loader.join()


def apart(rank, world, folder):
    """Each rank in a folder of its own, as without a shared disk."""
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    try:
        with directory.locked(Config(out="run", save_every=1)):
            return "went on"
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(folder)


def test_ranks_without_a_shared_folder_are_refused(ranks, tmp_path):
    found = ranks(2, apart, tmp_path)
    assert found[0] == found[1] and "run: rank 1 does not see rank 0's folder; with --save_every" in found[0]
    assert not (tmp_path / "0/run.lock").exists()


def disagree(rank, world, options):
    """The error of each rank, of which each has its own options."""
    try:
        directory.agree_on_options(Config(**options[rank]))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("other, says", [
    ({"lr": 0.5}, "rank 1 has lr 0.5, rank 0 has 0.001"),
    ({"save_every": 5}, "rank 1 has save_every 5, rank 0 has 0"),  # it decides when ranks meet
    ({"seed": 3}, "rank 1 has seed 3, rank 0 has 0"),
    ({"contrastive_weight": 2.0}, "rank 1 has contrastive_weight 2.0, rank 0 has 1.0"),
    ({"val": "x"}, "rank 1 has --val True, rank 0 has False"),  # so do these two
    ({"features": "x"}, "rank 1 has --features True, rank 0 has False"),
    ({"images": "elsewhere", "workers": 7, "cache": True, "resume": True}, None),
])
def test_ranks_of_other_options_end_with_the_option(ranks, other, says):
    assert ranks(2, disagree, [{}, other]) == [says, says]


# ---- how a run ends in it ----------------------------------------------------------------------------------


def test_a_finished_run_says_what_it_was_and_keeps_no_checkpoint(align):
    with checkpoints_kept():  # it is killed before it removes them
        said = trained(align, "--out", "was")
    assert f"\na checkpoint every 2 steps: if the run is stopped, {checkpoint.GO_ON}\n" in said
    out = align[0] / "was"
    assert len(checkpoint.checkpoints(out)) == 2
    for said in ("was is finished; its checkpoints are removed\n", "was: this run is finished; nothing"):
        assert said in trained(align, "--out", "was", "--resume")
    assert not checkpoint.checkpoints(out)
    results = read_json(out / "results.json")
    known = {"stage": "align", "steps": 6, "ranks": 1, "device": "cpu", "dtype": "float32",
             "torch": torch.__version__, "last_step": lines_of(out)[-1]}
    assert known.items() <= results.items()
    assert {"commit", "is_clean", "python", "transformers", "seconds", "memory_mib"} <= results.keys()
    times = [line["time"] for line in lines_of(out)]
    assert times == sorted(times) and datetime.fromisoformat(times[0]).tzinfo


def test_the_seconds_are_those_of_all_parts(align):
    """Of three parts, each of which pretends to have taken long; what a part did in vain does not count."""
    unfinished(align, "parts")
    out = align[0] / "parts"
    for part in (1, 2):
        lines = lines_of(out)
        lines[3]["seconds"] += 1000
        lines[5]["seconds"] += 9999  # behind the checkpoint
        (out / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        with checkpoints_kept():
            trained(align, "--out", "parts", "--resume")
        results = read_json(out / "results.json")
        assert 1000 * part < lines_of(out)[4]["seconds"] <= results["seconds"] < 1000 * part + 500
        (out / "config.json").unlink()
        shutil.rmtree(out / "checkpoint-0000006", ignore_errors=True)


def test_a_signal_while_the_finished_run_is_saved_waits_for_it(align, monkeypatch):
    save_run = directory.save_run
    monkeypatch.setattr(directory, "save_run", lambda *args: signal.raise_signal(signal.SIGTERM)
                        or save_run(*args))
    assert "finished, in" in trained(align, "--out", "at-end", "--steps", "2")
    assert (align[0] / "at-end/config.json").exists()


def test_a_run_stopped_while_it_was_saved_can_be_saved_again(linear_vlm, tmp_path):
    """Its llm/ is already in place, its config.json is not."""
    (tmp_path / "out/llm").mkdir(parents=True)
    (tmp_path / "out/llm/old").touch()
    directory.save_run(Config(stage="instruct", out=str(tmp_path / "out")), linear_vlm, {})
    VLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/llm/old").exists() and not (tmp_path / "out.partial").exists()


def test_a_run_that_fails_while_it_is_saved_is_no_run(linear_vlm, tmp_path, monkeypatch):
    """Whatever fails: config.json, by which a run is known, is written last."""
    def fail(*_):
        assert not (tmp_path / "config.json").exists()
        raise OSError("no space left")

    monkeypatch.setattr(LLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        directory.save_run(Config(stage="instruct", out=str(tmp_path)), linear_vlm, {})
    assert not (tmp_path / "config.json").exists()


# ---- a full disk -------------------------------------------------------------------------------------------


def test_a_run_that_does_not_reach_the_disk_keeps_its_checkpoints(align, monkeypatch, tmp_path):
    """What was written is in memory, and only fsync tells that the disk takes no more."""
    out = align[0] / "cached"
    fsync = os.fsync
    failed = []

    def full(number):
        if (out / "results.json").exists() and not failed:  # the next file is the projector
            failed.append(number)
            raise OSError("no space left")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(directory, "tempfile", SimpleNamespace(mkdtemp=lambda: str(tmp_path)))
    said = refused(align, "--out", "cached")
    assert said == ("train.py: cached/projector.safetensors: not written: no space left; the finished run is "
                    f"in {tmp_path}")
    assert VLM.from_pretrained(tmp_path) and len(checkpoint.checkpoints(out)) == 2
    assert not (out / "projector.safetensors").exists() and not (out / "config.json").exists()
    trained(align, "--out", "cached", "--resume")
    assert (out / "config.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(KiB)`: a folder that holds no more."""
    made = []

    def mount(size):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder],
                          capture_output=True).returncode:
            pytest.skip("may not mount")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=True)


def test_the_plan_compares_the_run_with_the_free_space(world, small_disk):
    disk = small_disk(12)
    last = how_it_ends(train.main, world[0], *world[1], "--stage", "align", "--save_every", "2", "--out",
                       disk / "a")
    assert re.search(r"disk-12/a: the run and its checkpoints take .* GiB, and its disk has", last)
    assert not (disk / "a").exists()


@pytest.mark.parametrize("save_every", ["0", "2"])
def test_a_disk_that_fills_up_costs_no_finished_work(world, small_disk, monkeypatch, tmp_path, save_every):
    """The plan found room, and then somebody else wrote. Without checkpoints the run is kept elsewhere; with
    them, half of one is removed, and the last complete one goes on."""
    disk = small_disk(240)
    module, name = (directory, "save_run") if save_every == "0" else (checkpoint, "save")
    filler, save, calls = disk / "filler", getattr(module, name), []
    (tmp_path / "elsewhere").mkdir()

    def saved(*args):
        calls.append(args)
        if len(calls) == (1 if save_every == "0" else 2):
            filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))
        return save(*args)

    monkeypatch.setattr(module, name, saved)
    monkeypatch.setattr(directory, "tempfile", SimpleNamespace(mkdtemp=lambda: str(tmp_path / "elsewhere")))
    options = [*world[1], "--stage", "align", "--save_every", save_every, "--out", disk / "a"]
    last = how_it_ends(train.main, world[0], *options)
    assert "\n" not in last and "disk-240/a/" in last
    assert not [f for f in disk.rglob("*") if f.is_file() and "partial" in str(f)]
    if save_every == "0":
        assert last.endswith(f"the finished run is in {tmp_path}/elsewhere")
        assert VLM.from_pretrained(tmp_path / "elsewhere") and not (disk / "a/config.json").exists()
    else:
        filler.unlink()
        assert "checkpoint-0000004.partial/rank-0.pt: not written" in last
        assert "checkpoint-0000002: step 2" in called(train.main, world[0], *options, "--resume")
        assert (disk / "a/config.json").exists()
