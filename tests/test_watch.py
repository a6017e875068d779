"""What a run says of itself: the line of the log, its bars, its commit, and what deserves a sentence."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from scripts import refused, trained

import train
from running import watch
from running.options import Config
from running.watch import Watch, figures, naming


def test_a_loss_that_is_not_finite_is_named_with_step_and_records():
    batch = {"names": ["record 'a'", "record 'b'"]}
    with pytest.raises(ValueError, match="^step 7: the patch loss is not finite; no weight was changed "
                                         r"\(its records: record 'a', record 'b' \.\.\)$"):
        with naming(7, [batch]):
            figures({"generative": 1.0, "patch": float("nan")}, {"patch": 1.0}, 1.0, 8)
    assert figures({"generative": float("inf")}, {}, 2.0**16, 8)["generative"] is None  # float16 goes on


def test_the_gradients_of_the_log_are_without_the_loss_scale():
    sums = {"generative": 1.0, "patch": 1.0}
    sums |= {"generative_square": 64.0, "patch_square": 16.0, "patch_product": 8.0}
    line = figures(sums, {"patch": 2.0}, 4.0, 8)
    assert [line[key] for key in ("generative_grad", "patch_grad", "patch_ratio", "patch_cosine")] == [
        2.0, 1.0, 1.0, 0.25]


def test_a_float16_run_whose_first_forward_overflows_goes_on_without_a_word(capsys):
    watch = Watch(Config(), {}, 10)
    line = {"step": 0, "generative": None, "tokens": 5, "lr": 0.0, "ms": 1.0, "wait_ms": 0.0}
    watch.look(0, line, 100)
    assert capsys.readouterr().out == ""


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


def test_curves_are_drawn_when_a_run_stops_and_cost_no_run(align, monkeypatch):
    drawn = []

    def draw(runs, file):
        drawn.append((runs, file, (align[0] / "drawn/config.json").exists()))
        raise KeyError("no font")

    step = train.train_step

    def signalled(*args):
        if args[-1] == 3 and not drawn:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(watch.curves, "draw", draw)
    monkeypatch.setattr(train, "train_step", signalled)
    assert "stopped, and saved at step 4" in refused(align, "--out", "drawn")
    assert "no curves: KeyError: 'no font'\n" in trained(align, "--out", "drawn", "--resume")
    file = Path("drawn/curves.png")
    assert drawn == [(["drawn"], file, False), (["drawn"], file, True)]
