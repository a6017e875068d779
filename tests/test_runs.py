"""What happens to a run: two writers, ranks that disagree, stale caches, old results, steps that go wrong."""

import errno
import fcntl
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, checkpoints_kept
from PIL import Image

import data
import losses
import train
from lab import toy_world
from llm import LLM
from plumbing import ranks as processes
from plumbing.files import whole
from plumbing.ranks import caught_signals, choose_dtype, slowness
from projector import VLM
from running import checkpoint, features, held_out, order, watch
from running.options import Config, configure, parse_args
from running.watch import Watch, figures, naming


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder, llama_folder):
    """(a folder with a small toy world, options of a short align run of random towers)."""
    folder = tmp_path_factory.mktemp("runs")
    toy_world.write_world(folder / "data/toy", align=24, instruct=24, text=4, test=8)
    return folder, ["--stage", "align", "--preset", "tiny", "--vit", clip_folder, "--llm", llama_folder,
                    "--batch", "8", "--micro_batch", "4", "--epochs", "2", "--save_every", "2"]


def run(world, *args):
    """What train.py prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(world[0])
        train.main([str(arg) for arg in (*world[1], *args)])
    return out.getvalue()


def refusal(world, *args) -> str:
    with pytest.raises(SystemExit) as end:
        run(world, *args)
    assert "\n" not in str(end.value.code)
    return str(end.value.code)


def log(folder) -> list:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read(file):
    return json.loads(file.read_text())


# ---- one folder --------------------------------------------------------------------------------------------


def test_nothing_finished_is_ever_deleted(world):
    for seed in range(4):
        run(world, "--out", "kept", "--seed", seed, "--steps", "2")
    seeds = {}
    for folder in sorted(world[0].glob("kept*")):
        seeds[folder.name] = json.loads((folder / "config.json").read_text())["seed"]
    assert seeds == {"kept.old": 0, "kept.old2": 1, "kept.old3": 2, "kept": 3}


def test_a_file_system_without_locks_has_none(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    checkpoint.lock(tmp_path / "lock", "shared").close()


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world[0])
        with checkpoint.locked(Config(out="shared")):
            command = [sys.executable, ROOT / "train.py", *map(str, world[1]), "--out", "shared"]
            other = subprocess.run(command, capture_output=True, text=True, cwd=world[0])
            assert other.returncode == 1
            assert other.stderr.splitlines()[-1] == "train.py: shared: another run is writing there"
        assert not Path("shared.lock").exists() and not Path("shared").exists()
        Path("shared.lock").write_text("of a run that was killed")
        with checkpoint.locked(Config(out="shared")):
            pass


def test_a_loader_process_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    held = checkpoint.lock(tmp_path / "lock", "x")
    context = multiprocessing.get_context("fork")
    is_there = context.Event()
    loader = context.Process(target=lambda: is_there.set() or time.sleep(60))
    loader.start()
    is_there.wait()
    held.close()
    checkpoint.lock(tmp_path / "lock", "x").close()
    loader.kill()
    loader.join()


def test_a_start_that_fails_leaves_what_was_there(world):
    run(world, "--out", "first", "--steps", "2")
    before = {file: file.read_bytes() for file in (world[0] / "first").rglob("*") if file.is_file()}
    assert "no such file" in refusal(world, "--out", "first", "--annotations", "missing.json")
    after = {file: file.read_bytes() for file in (world[0] / "first").rglob("*") if file.is_file()}
    assert after == before and not (world[0] / "first.lock").exists()


def test_a_folder_that_is_no_run_is_refused_and_kept(world):
    """A run removes the llm/ that an old one left: it must not be somebody's LLM."""
    mine = world[0] / "mine"
    (mine / "llm").mkdir(parents=True)
    (mine / "llm/config.json").write_text("{}")
    (world[0] / "file").write_text("")
    for out, says in (("mine", "holds llm and no run: name another folder"),
                      ("file", "is a file; name a folder"),
                      (".", "cannot be renamed, nor locked beside: name a folder in it")):
        assert refusal(world, "--out", out, "--steps", "2") == f"train.py: --out {out} {says}"
    (world[0] / "mine").rename(world[0] / "both")
    (world[0] / "both/llm").rename(world[0] / "both/unaligned")
    (world[0] / "pair").mkdir()
    (world[0] / "both").rename(world[0] / "pair/instruct")
    both = world[0], without(world[1], "--stage")
    assert "--out pair/instruct holds unaligned and no run" in refusal(both, "--out", "pair")
    assert (world[0] / "pair/instruct/unaligned/config.json").read_text() == "{}"
    assert not (world[0] / "pair/align").exists()
    (world[0] / "noted").mkdir()
    (world[0] / "noted/train.log").write_text("of tee")
    run(world, "--out", "noted", "--steps", "2")


def test_a_link_stays_and_other_folders_are_nobodys(world, monkeypatch):
    """A second run goes where the link leads. What looks like a checkpoint, and is none, is kept. Without a
    place for runs/last a run is finished, too."""
    (world[0] / "elsewhere").mkdir()
    (world[0] / "link").symlink_to("elsewhere/run")
    monkeypatch.setattr(Path, "write_text", refuse_to_write("runs/last", Path.write_text))
    for _ in range(2):
        run(world, "--out", "link", "--steps", "2")
    assert (world[0] / "link").is_symlink() and (world[0] / "elsewhere/run.old/config.json").exists()
    (world[0] / "link/checkpoint-initial").mkdir()
    assert checkpoint.checkpoints(world[0] / "link") == []


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
        assert not checkpoint.is_behind(instruct, align)
        folder.mkdir()
        (folder / file).touch()
    for age, is_behind in ((10, True), (-10, False)):
        os.utime(align / "config.json", times=(time.time() - age, time.time() - age))
        assert checkpoint.is_behind(instruct, align) == is_behind


@pytest.mark.parametrize("restarted", ["a/", "b/"])
def test_whatever_node_torchrun_starts_again_the_run_goes_on(world, monkeypatch, restarted):
    """After a failure another node may have rank 0."""
    unfinished(world, "node")
    (world[0] / "node/launch").write_text("a/\nb/")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{restarted}attempt_1/0/error.json")
    monkeypatch.chdir(world[0])
    assert configure("align", {"preset": "tiny", "out": "node"}).resume
    shutil.rmtree("node")


def test_a_missing_folder_of_pictures_is_told_before_a_model_is_loaded(world, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    said = refusal(world, "--out", "blind", "--images", "nowhere")
    assert said == "train.py: nowhere: no such folder; --images names that of the pictures"


# ---- what a run starts from --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(world):
    """(the world with options of a short instruct run, a finished one whose LLM has a mark of 7.0 in its
    norm)."""
    folder, options = world
    options = ["--stage", "instruct", *options[2:], "--steps", "2"]
    run(world, "--out", "runs/tiny/align", "--steps", "2")
    run((folder, options), "--out", "tuned")
    vlm = VLM.from_pretrained(folder / "tuned")
    with torch.no_grad():
        vlm.llm.model.norm.weight.fill_(7.0)
    vlm.llm.save_pretrained(folder / "tuned/llm")
    vlm = VLM.from_pretrained(folder / "tuned")
    vlm.export(folder / "exported")
    return (folder, options), vlm


def without(options, *names) -> list:
    """The options without some of them."""
    kept = list(options)
    for name in names:
        place = kept.index(name)
        del kept[place : place + 2]
    return kept


@pytest.mark.parametrize("init", ["tuned", "exported"])
def test_a_run_takes_all_that_it_starts_from(tuned, init):
    (folder, options), vlm = tuned
    options = without(options, "--vit", "--llm")
    run((folder, options), "--init", folder / init, "--out", f"on-{init}", "--lr", "1e-9")
    found = VLM.from_pretrained(folder / f"on-{init}")
    assert torch.allclose(found.llm.model.norm.weight, torch.tensor(7.0), atol=1e-4)
    theirs = dict(vlm.named_parameters())
    for name, parameter in found.named_parameters():
        rows = min(len(parameter), len(theirs[name]))  # an export has a row more for the placeholder
        assert torch.allclose(parameter[:rows], theirs[name][:rows], atol=1e-4), name


def test_a_run_that_serves_as_the_llm_brings_its_tokenizer(tuned, world):
    """--llm RUN: what starts from it can be asked and exported, too."""
    (folder, options), _ = tuned
    run((folder, without(world[1], "--llm")), "--llm", "tuned", "--out", "over", "--steps", "2")
    run((folder, without(options, "--vit", "--llm")), "--init", "over", "--out", "above")
    assert (folder / "above/llm/tokenizer.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        VLM.from_pretrained("over").export("over-exported")
    assert (folder / "over-exported/tokenizer.json").exists()


def test_a_tower_that_is_typed_and_another_is_refused(tuned, clip_folder):
    (folder, options), _ = tuned
    options = without(options, "--llm")
    said = refusal((folder, options), "--init", "tuned", "--llm", clip_folder, "--out", "other")
    assert f"--llm {clip_folder}: tuned has 'tuned/llm', which is taken" in said
    same = refusal((folder, options), "--init", "tuned", "--out", "tuned/")
    assert same == "train.py: --out tuned/ is what the run starts from; name another"
    assert "runs/nothing/here" in refusal((folder, options), "--init", "runs/nothing/here", "--out", "other")


# ---- ranks -------------------------------------------------------------------------------------------------


def disagree(rank, world, options):
    """The error of each rank, of which each has its own options."""
    try:
        checkpoint.agree_on_options(Config(**options[rank]))
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


def other_contents(rank, world):
    try:
        checkpoint.agree({"records": 7, "vit": rank})
    except ValueError as error:
        return str(error)


def test_ranks_of_other_contents_end_with_the_content(ranks):
    assert ranks(2, other_contents) == 2 * ["rank 1 has vit 1, rank 0 has 0"]


def apart(rank, world, folder):
    """Each rank in a folder of its own, as without a shared disk."""
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    try:
        with checkpoint.locked(Config(out="run", save_every=1)):
            return "went on"
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(folder)


def test_ranks_without_a_shared_folder_are_refused(ranks, tmp_path):
    found = ranks(2, apart, tmp_path)
    assert found[0] == found[1] and "run: rank 1 does not see rank 0's folder; with --save_every" in found[0]
    assert not (tmp_path / "0/run.lock").exists()


@pytest.mark.parametrize("records, looked", [(3, 3), (1000, 1000), (1999, 1000), (2001, 667)])
def test_a_fingerprint_looks_at_a_thousand_pictures_at_most(monkeypatch, records, looked):
    class Samples(list):
        records = property(lambda self: self)
        images = None

    monkeypatch.setattr(checkpoint, "key_of", len)
    assert checkpoint.picture_sizes(Samples([{}] * records)) == looked


# ---- caches ------------------------------------------------------------------------------------------------


def test_features_of_other_pictures_are_made_anew(world, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world[0] / "data/toy/images", images)
    how = ["--images", images, "--features", tmp_path / "features.pt", "--steps", "2"]
    run(world, *how, "--out", "a")
    assert "made anew" not in run(world, *how, "--out", "b")
    for file in images.glob("*.png"):
        Image.new("RGB", (64, 64), "white").save(file)
    assert "made with other pictures; it is made anew" in run(world, *how, "--out", "c")
    first, again, white = (log(world[0] / name)[0]["patch"] for name in "abc")
    assert first == again != white
    assert "made with other fit; it is made anew" in run(world, *how, "--fit", "pad", "--out", "d")


def test_features_of_more_pictures_serve_fewer(world, tmp_path):
    how = ["--features", tmp_path / "features.pt", "--steps", "2"]
    run(world, *how, "--out", "all")
    records = json.loads((world[0] / "data/toy/align.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(records[:10]))
    assert "made anew" not in run(world, *how, "--annotations", tmp_path / "few.json", "--out", "few")


def unfinished(world, out):
    """A run that has gone four of six steps."""
    with checkpoints_kept():
        run(world, "--out", out)
    (world[0] / out / "config.json").unlink()
    shutil.rmtree(world[0] / out / "checkpoint-0000006", ignore_errors=True)
    assert [folder.name for folder in checkpoint.checkpoints(world[0] / out)][-1] == "checkpoint-0000004"


def test_a_vit_of_another_mean_is_another_vit(world, clip_folder, tmp_path):
    """Its weights are the same. Features are made anew, and a run does not go on with it."""
    shutil.copytree(clip_folder, tmp_path / "vit")
    how = ["--vit", tmp_path / "vit", "--features", tmp_path / "features.pt"]
    with checkpoints_kept():
        run(world, *how, "--out", "mean")
    (world[0] / "mean/config.json").unlink()
    shutil.rmtree(world[0] / "mean/checkpoint-0000006", ignore_errors=True)
    other = '{"image_mean": [0, 0, 0], "image_std": [9, 9, 9]}'
    (tmp_path / "vit/preprocessor_config.json").write_text(other)
    assert "made with other weights; it is made anew" in run(world, *how, "--steps", "2", "--out", "anew")
    assert "saved with another vit" in refusal(world, *how, "--out", "mean", "--resume")


def test_an_llm_of_another_rope_is_another_llm(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    before = checkpoint.fingerprint(llm)
    llm.config.rope_theta *= 2
    assert checkpoint.fingerprint(llm) != before == checkpoint.fingerprint(LLM.from_pretrained(llama_folder))


def test_a_resumed_run_counts_no_tokens_again(world, monkeypatch):
    unfinished(world, "changed")
    monkeypatch.setattr(data.Conversations, "count_tokens", None)
    assert "warning" not in run(world, "--out", "changed", "--resume")


def test_a_resumed_run_warns_of_pictures_of_another_size(world, tmp_path):
    unfinished(world, "sizes")
    images = world[0] / "data/toy/images"
    shutil.copytree(images, tmp_path / "kept")
    try:
        for file in images.glob("*.png"):
            Image.new("RGB", (99, 99), "white").save(file)
        assert "warning: sizes/checkpoint-0000004: some pictures have another size" in run(
            world, "--out", "sizes", "--resume")
    finally:
        shutil.rmtree(images)
        shutil.copytree(tmp_path / "kept", images)


# ---- resume ------------------------------------------------------------------------------------------------


def test_an_unfinished_run_may_get_more_steps_and_a_finished_one_says_how_to_go_on(world):
    unfinished(world, "longer")
    said = run(world, "--out", "longer", "--resume", "--epochs", "3")
    assert "saved with epochs 2.0, now 3.0: the schedule is another" in said
    assert [line["step"] for line in log(world[0] / "longer")] == list(range(9))
    said = refusal(world, "--out", "longer", "--resume", "--epochs", "4")
    assert "finished (--init goes on from it): saved with epochs 3.0, resumed with 4.0" in said


def test_a_run_of_epochs_is_not_cut_short_by_steps(world):
    unfinished(world, "shorter")
    said = refusal(world, "--out", "shorter", "--resume", "--steps", "3")
    assert "saved with steps 0, resumed with 3" in said
    assert len(checkpoint.checkpoints(world[0] / "shorter")) == 2


def test_a_signal_while_the_finished_run_is_saved_waits_for_it(world, monkeypatch):
    save_run = checkpoint.save_run
    monkeypatch.setattr(checkpoint, "save_run", lambda *args: signal.raise_signal(signal.SIGTERM)
                        or save_run(*args))
    assert "finished, in" in run(world, "--out", "at-end", "--steps", "2")
    assert (world[0] / "at-end/config.json").exists()


def test_behind_a_signal_in_the_last_step_no_other_stage_begins(world, monkeypatch):
    """The stage is done."""
    rate = train.learning_rate

    def last_rate(step, steps, config):
        if step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return rate(step, steps, config)

    monkeypatch.setattr(train, "learning_rate", last_rate)
    assert "finished, in" in run(world, "--out", "alone", "--steps", "4")
    assert (world[0] / "runs/last").read_text() == "alone"
    assert "interrupted" in refusal((world[0], without(world[1], "--stage")), "--out", "last", "--steps", "4")
    assert (world[0] / "last/align/config.json").exists() and not (world[0] / "last/instruct").exists()


def test_what_another_rank_left_of_a_checkpoint_goes(world):
    stale = world[0] / "stale/checkpoint-0000002.partial"
    unfinished(world, "stale")
    stale.mkdir()
    (stale / "rank-7.pt").write_text("of eight ranks")
    shutil.rmtree(world[0] / "stale/checkpoint-0000004")
    shutil.rmtree(world[0] / "stale/checkpoint-0000002")
    run(world, "--out", "stale", "--resume")
    assert not list((world[0] / "stale").rglob("rank-7.pt"))


def test_the_log_is_on_the_disk_before_its_checkpoint_is(world, monkeypatch):
    """A machine that goes down would otherwise leave a checkpoint of more steps than the log has."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    unfinished(world, "synced")
    names = [Path(name).name for name in synced]
    assert "log.jsonl" in names and names.index("log.jsonl") < names.index("synced")


def test_the_seconds_are_those_of_all_parts(world):
    """Of three parts, each of which pretends to have taken long; what a part did in vain does not count."""
    unfinished(world, "parts")
    out = world[0] / "parts"
    start = read(out / "results.json")["start"]
    for part in (1, 2):
        lines = log(out)
        lines[3]["seconds"] += 1000
        lines[5]["seconds"] += 9999  # behind the checkpoint
        (out / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        with checkpoints_kept():
            run(world, "--out", "parts", "--resume")
        results = read(out / "results.json")
        assert 1000 * part < log(out)[4]["seconds"] <= results["seconds"] < 1000 * part + 500
        assert results["start"] == start
        (out / "config.json").unlink()
        shutil.rmtree(out / "checkpoint-0000006", ignore_errors=True)


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


# ---- what a run was ----------------------------------------------------------------------------------------


def test_a_finished_run_says_what_it_was_and_keeps_no_checkpoint(world):
    with checkpoints_kept():  # it is killed before it removes them
        said = run(world, "--out", "was")
    assert f"\na checkpoint every 2 steps: if the run is stopped, {checkpoint.GO_ON}\n" in said
    out = world[0] / "was"
    assert len(checkpoint.checkpoints(out)) == 2
    for said in ("was is finished; its checkpoints are removed\n", "was: this run is finished; nothing"):
        assert said in run(world, "--out", "was", "--resume")
    assert not checkpoint.checkpoints(out)
    results = read(out / "results.json")
    known = {"stage": "align", "steps": 6, "ranks": 1, "device": "cpu", "dtype": "float32",
             "torch": torch.__version__, "last_step": log(out)[-1]}
    assert known.items() <= results.items()
    assert {"commit", "is_clean", "python", "transformers", "seconds", "memory_mib"} <= results.keys()
    times = [results["start"], *(line["time"] for line in log(out))]
    assert times == sorted(times) and datetime.fromisoformat(times[0]).tzinfo


def test_a_run_that_does_not_reach_the_disk_keeps_its_checkpoints(world, monkeypatch, tmp_path):
    """What was written is in memory, and only fsync tells that the disk takes no more."""
    out = world[0] / "cached"
    fsync = os.fsync
    failed = []

    def full(number):
        if (out / "results.json").exists() and not failed:  # the next file is the projector
            failed.append(number)
            raise OSError("no space left")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(checkpoint, "tempfile", SimpleNamespace(mkdtemp=lambda: str(tmp_path)))
    said = refusal(world, "--out", "cached")
    assert said == ("train.py: cached/projector.safetensors: not written: no space left; the finished run is "
                    f"in {tmp_path}")
    assert VLM.from_pretrained(tmp_path) and len(checkpoint.checkpoints(out)) == 2
    assert not (out / "projector.safetensors").exists() and not (out / "config.json").exists()
    run(world, "--out", "cached", "--resume")
    assert (out / "config.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_at_a_line_of_the_log_names_the_log(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="log.jsonl: .*No space left"):
        watch.log(tmp_path, {"step": 0})


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_this_projects_own(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        said = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return said.stdout.strip()

    assert watch.find_commit(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "one")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    (tmp_path / "data").mkdir()  # what git does not know does not count
    assert watch.find_commit(tmp_path) == (git("rev-parse", "HEAD"), True)
    (tmp_path / "a.py").write_text("2")
    assert watch.find_commit(tmp_path) == (git("rev-parse", "HEAD"), False)
    assert watch.find_commit(tmp_path / "data") == (None, None)  # that is of the folder above


@pytest.mark.parametrize("start, bars", [
    (0, [("contrast first", 3, 0, 0), ("contrast first", 3, 0, 1), ("contrast first", 3, 0, 2),
         ("align", 2, 0, 3), ("align", 2, 0, 4)]),
    (2, [("contrast first", 3, 2, 2), ("align", 2, 0, 3), ("align", 2, 0, 4)]),
    (4, [("align", 2, 1, 4)]),
    (5, [])])
def test_contrast_first_has_a_bar_of_its_own(start, bars):
    config = Config(stage="align", contrastive_first=3)
    found = [(bar.desc, bar.total, bar.initial, step) for step, bar in watch.bars(config, start, 5)]
    assert found == bars


def test_curves_are_drawn_when_a_run_stops_and_cost_no_run(world, monkeypatch):
    drawn = []

    def draw(runs, file):
        drawn.append((runs, file, (world[0] / "drawn/config.json").exists()))
        raise KeyError("no font")

    step = train.train_step

    def signalled(*args):
        if args[-1] == 3 and not drawn:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(watch.curves, "draw", draw)
    monkeypatch.setattr(train, "train_step", signalled)
    assert "stopped, and saved at step 4" in refusal(world, "--out", "drawn")
    assert "no curves: KeyError: 'no font'\n" in run(world, "--out", "drawn", "--resume")
    file = Path("drawn/curves.png")
    assert drawn == [(["drawn"], file, False), (["drawn"], file, True)]


# ---- held-out records --------------------------------------------------------------------------------------


def held_part(lines) -> list:
    """What is measured on held-out records, with its step."""
    found = []
    for line in lines:
        part = {key: value for key, value in line.items() if key.startswith("val_")}
        if part:
            found.append({"step": line["step"]} | part)
    return found


def test_held_out_losses_are_those_of_a_step(world):
    """Of the records of a step whose rate is 0. A rest is captioned, too: the loss is that of all records."""
    file = world[0] / "data/toy/align.json"
    how = ["--contrastive", "both", "--val", file, "--steps", "2"]
    said = run(world, *how, "--out", "same", "--batch", "24")
    assert f"24 records of {file} are held out\nwarning: 24 of them are in data/toy/align.json, too" in said
    line = log(world[0] / "same")[0]
    keys = ["generative", "patch", "patch_retrieval", "prompt", "prompt_retrieval"]
    assert [line[f"val_{key}"] for key in keys] == pytest.approx([line[key] for key in keys], rel=1e-5)
    run(world, *how, "--out", "rest", "--batch", "10", "--micro_batch", "5")
    rest = log(world[0] / "rest")[0]
    assert rest["val_generative"] == pytest.approx(line["generative"], rel=1e-5)
    assert math.log(9) < rest["val_patch"] < math.log(12) < line["val_patch"]  # of 10


def test_what_is_compared_is_the_contrastive_loss():
    """Also with captions and images that are equal, and more than one row that a caption fits."""
    image, text = torch.randn(2, 12, 4)
    keys = torch.tensor([[0, 1], [0, 2], [3, 1], *([n, n] for n in range(10, 19))])
    found = held_out.compare(image, text, keys, torch.tensor(5.0))
    assert found == pytest.approx([x.item() for x in losses.contrastive_loss(image, text, 5.0, keys)])
    assert 0 < found[1] < 1


def test_held_out_records_change_no_bit(world, tmp_path):
    """Nor does a kill change what is measured on them: in the first step, in every second and in the last."""
    records = read(world[0] / "data/toy/align.json")
    (tmp_path / "train.json").write_text(json.dumps(records[:16]))
    (tmp_path / "held.json").write_text(json.dumps(records[14:]))
    how = ["--annotations", tmp_path / "train.json", "--contrastive", "both", "--contrastive_first", "2",
           "--steps", "5"]
    val = ["--val", tmp_path / "held.json", "--val_every", "2"]
    run(world, *how, "--out", "without")
    with checkpoints_kept():
        said = run(world, *how, *val, "--out", "with")
    assert f"10 records of {tmp_path}/held.json are held out\nwarning: 2 of them are in" in said
    lines = log(world[0] / "with")
    measured = held_part(lines)
    assert [line["step"] for line in measured] == [0, 1, 3, 5, 6]
    assert measured[0].keys() == {"step", "val_generative", "val_patch", "val_patch_retrieval", "val_prompt",
                                  "val_prompt_retrieval"}
    (world[0] / "with/config.json").unlink()
    shutil.rmtree(world[0] / "with/checkpoint-0000006")
    run(world, *how, *val, "--out", "with", "--resume")
    assert held_part(log(world[0] / "with")) == measured
    assert plain(log(world[0] / "with")) == plain(lines) == plain(log(world[0] / "without"))
    weights = [(world[0] / name / "projector.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert "is finished" in run(world, *how, "--out", "with", "--resume")  # nor need it go on with --val


def plain(lines) -> list:
    """The lines without what a clock says, and without what is held out."""
    differ = {"ms", "wait_ms", "memory_mib", "time", "seconds"}
    return [{key: value for key, value in line.items() if key not in differ and not key.startswith("val_")}
            for line in lines]


def stage_of(rank, ranks, folder, argv):
    """train.py's stage, in a process that is one of several ranks."""
    os.chdir(folder)
    given = parse_args([str(arg) for arg in argv])
    try:
        train.train_stage(configure(given["stage"], given), torch.device("cpu"))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("stage, count", [("align", 21), ("align", 5), ("instruct", 13)])
def test_two_ranks_measure_what_one_measures(world, ranks, tmp_path, stage, count):
    """Two batches and a rest; fewer records than a batch; conversations, which are only captioned."""
    records = read(world[0] / f"data/toy/{stage}.json")
    (tmp_path / "held.json").write_text(json.dumps(records[:count]))
    options = ["--stage", stage, *world[1][2:], "--steps", "2", "--val", tmp_path / "held.json",
               "--micro_tokens", "99", "--out"]
    if stage == "instruct":
        run(world, "--steps", "2", "--out", tmp_path / "align")
        options = ["--init", tmp_path / "align", *options]
    run((world[0], options), tmp_path / "one")
    ranks(2, stage_of, world[0], [*options, tmp_path / "two"])
    one, two = (held_part(log(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 2 and ("val_patch" in one[0]) == (stage == "align")
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def measure_signalled(number, ranks, folder, argv) -> tuple:
    """(what is measured, captioned micro-batches) of this rank. The last gets a signal in its first batch."""
    os.chdir(folder)
    config = configure("align", parse_args([str(arg) for arg in argv]))
    vlm = VLM.from_towers(config.vit, config.llm, config.projector, config.feature_layer)
    samples = order.load_samples(config, vlm)
    signals = []
    captioned = []
    real = losses.caption_pass

    def caption(*args):
        captioned.append(args)
        if number == ranks - 1:
            signals.append(signal.SIGTERM)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "caption_pass", caption)
        held = held_out.load(config, samples, vlm)
        return held_out.measure(config, vlm, {}, held, 0, 2, signals), len(captioned)


def test_a_signal_ends_the_measurement_on_all_ranks_behind_the_batch(world, ranks):
    """Not behind all three; of a step in between, so the run is saved and ends."""
    options = [*world[1], "--val", "data/toy/align.json"]
    assert ranks(2, measure_signalled, world[0], options) == 2 * [({}, 1)]
    step = train.train_step

    def signalled(*args):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        said = refusal(world, "--val", "data/toy/align.json", "--val_every", "2", "--out", "soon")
    assert "saved at step 2" in said and [line["step"] for line in held_part(log(world[0] / "soon"))] == [0]


def test_held_out_records_that_cannot_be_are_refused(world, ranks, tmp_path):
    records = read(world[0] / "data/toy/align.json")
    (tmp_path / "one.json").write_text(json.dumps(records[:1]))
    options = [*world[1], "--val", tmp_path / "one.json", "--out", tmp_path / "out"]
    assert ranks(2, stage_of, world[0], options) == 2 * [f"--val {tmp_path}/one.json: 1 records, fewer than "
                                                        "ranks"]
    assert refusal(world, "--val", "none.json", "--out", "x") == "train.py: none.json: no such file"
    both = refusal((world[0], ["--preset", "tiny"]), "--val", "x.json")
    assert both == "train.py: --val is of one stage: first --stage align, then --stage instruct"


# ---- steps that go wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, says", [
    (["--warmup_ratio", "100"], "--warmup_ratio is 100.0; it is a part of the steps, at most 1"),
    (["--steps", "1"], "1 steps, all at learning rate 0"),
    (["--lr", "0"], "--batch, --micro_batch, --epochs and --lr must be above 0"),
])
def test_a_schedule_that_never_trains_is_refused(world, options, says):
    assert says in refusal(world, "--out", "never", *options)


def test_a_loss_that_is_not_finite_is_named_with_step_and_records():
    batch = {"names": ["record 'a'", "record 'b'"]}
    with pytest.raises(ValueError, match="^step 7: the patch loss is not finite; no weight was changed "
                                         r"\(its records: record 'a', record 'b' \.\.\)$"):
        with naming(7, [batch]):
            figures({"generative": 1.0, "patch": float("nan")}, {"patch": 1.0}, 1.0, 8)
    assert figures({"generative": float("inf")}, {}, 2.0**16, 8)["generative"] is None  # float16 goes on


def test_a_float16_run_whose_first_forward_overflows_says_so(capsys):
    watch = Watch(Config(), {}, 10)
    line = {"step": 0, "generative": None, "tokens": 5, "lr": 0.0, "ms": 1.0, "wait_ms": 0.0}
    watch.look(0, line, 100)
    assert "TypeError" not in capsys.readouterr().out


def test_a_contrastive_loss_that_is_zero_by_construction_is_told(capsys):
    watch = Watch(Config(), {"patch": None}, 10)
    line = {"step": 0, "generative": 2.0, "patch": 0.0, "tokens": 5, "ms": 1.0, "wait_ms": 0.0}
    watch.look(0, line, 100)
    assert "the patch loss is 0 by construction" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_contrastive_loss_that_learns_nothing_is_told_if_it_is_meant_to_learn(capsys, weight):
    """Behind contrast first its weight is 0."""
    watch = Watch(Config(), {"patch": None}, 100)
    for step in range(70):
        line = {"step": step, "generative": 2.0, "patch": 4.0, "patch_relative": 0.99, "patch_weight": weight}
        watch.look(step, line | {"tokens": 5, "ms": 1.0, "wait_ms": 0.0}, 100)
    assert ("the patch loss has stayed above 0.98" in capsys.readouterr().out) == (weight > 0)


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


def test_slowness_is_a_ratio():
    assert slowness(torch.float32) == 1
    assert slowness(torch.float64) > 1.2


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


def test_a_sigterm_clears_away_what_is_half_done(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="^train.py: interrupted$"):
        with processes.command("train.py", "interrupted"), whole(tmp_path / "file"):
            signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_features_of_no_picture_are_refused():
    samples = SimpleNamespace(records=[{"conversations": []}], images=Path())
    with pytest.raises(ValueError, match="--features f.pt: no record of d.json has an image"):
        features.load(Config(features="f.pt", annotations="d.json"), samples, torch.nn.Linear(1, 1), None)


def test_features_that_are_no_features_are_named(world, tmp_path):
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a file of features"):
        features.read(tmp_path / "other.pt")
