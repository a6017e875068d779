"""What happens to a run: two writers, ranks that disagree, stale caches, old results, steps that go wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import train
from lab import toy_world
from plumbing.ranks import caught_signals
from projector import VLM
from running import checkpoint, features, order
from running.options import Config
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


# ---- one folder --------------------------------------------------------------------------------------------


def test_nothing_finished_is_ever_deleted(world):
    for seed in range(4):
        run(world, "--out", "kept", "--seed", seed, "--steps", "2")
    seeds = {}
    for folder in sorted(world[0].glob("kept*")):
        seeds[folder.name] = json.loads((folder / "config.json").read_text())["seed"]
    assert seeds == {"kept.old": 0, "kept.old2": 1, "kept.old3": 2, "kept": 3}


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


def test_a_start_that_fails_leaves_what_was_there(world):
    run(world, "--out", "first", "--steps", "2")
    before = {file: file.read_bytes() for file in (world[0] / "first").rglob("*") if file.is_file()}
    assert "no such file" in refusal(world, "--out", "first", "--annotations", "missing.json")
    after = {file: file.read_bytes() for file in (world[0] / "first").rglob("*") if file.is_file()}
    assert after == before and not (world[0] / "first.lock").exists()


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
    run(world, "--out", out)
    (world[0] / out / "config.json").unlink()
    shutil.rmtree(world[0] / out / "checkpoint-0000006", ignore_errors=True)
    assert [folder.name for folder in checkpoint.checkpoints(world[0] / out)][-1] == "checkpoint-0000004"


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
    seconds_before = sum(line["ms"] for line in log(world[0] / "longer")[:4]) / 1000
    said = run(world, "--out", "longer", "--resume", "--epochs", "3")
    assert "saved with epochs 2.0, now 3.0: the schedule is another" in said
    assert [line["step"] for line in log(world[0] / "longer")] == list(range(9))
    results = json.loads((world[0] / "longer/results.json").read_text())
    assert results["seconds"] > seconds_before
    said = refusal(world, "--out", "longer", "--resume", "--epochs", "4")
    assert "finished (--init goes on from it): saved with epochs 3.0, resumed with 4.0" in said


def test_what_another_rank_left_of_a_checkpoint_goes(world):
    stale = world[0] / "stale/checkpoint-0000002.partial"
    unfinished(world, "stale")
    stale.mkdir()
    (stale / "rank-7.pt").write_text("of eight ranks")
    shutil.rmtree(world[0] / "stale/checkpoint-0000004")
    shutil.rmtree(world[0] / "stale/checkpoint-0000002")
    run(world, "--out", "stale", "--resume")
    assert not list((world[0] / "stale").rglob("rank-7.pt"))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_caught_once(name):
    number = getattr(signal, name)
    heard = []
    before = signal.signal(number, lambda *_: heard.append(name))
    try:
        with caught_signals(True) as caught:
            signal.raise_signal(number)
            assert caught and not heard
            signal.raise_signal(number)
            assert heard == [name]
    finally:
        signal.signal(number, before)


# ---- steps that go wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, says", [
    (["--warmup_ratio", "100"], "--warmup_ratio is 100.0; it is a part of the steps, at most 1"),
    (["--steps", "1"], "1 steps, all at learning rate 0"),
    (["--lr", "0"], "6 steps, all at learning rate 0"),
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
    monkeypatch.setattr(order.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="shared memory .* is full: --workers 0"):
        order.next_batch(timed_out_loader(["batch"]))
    monkeypatch.setattr(order.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert order.next_batch(timed_out_loader(["batch"])) == "batch"
    loader = timed_out_loader(["batch"])
    loader._pin_memory_thread = SimpleNamespace(is_alive=lambda: False)
    with pytest.raises(ValueError, match="the loader hands nothing over"):
        order.next_batch(loader)


def test_features_that_are_no_features_are_named(world, tmp_path):
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a file of features"):
        features.read(tmp_path / "other.pt")
