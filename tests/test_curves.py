"""Curves of runs: what is drawn is what the log says, gaps are gaps, and a folder without a log is told."""

import json
import math
import sys

import pytest
from PIL import Image

from running import chart, curves


def run_of(folder, lines, config=None, tail=""):
    """A run directory with these lines of log, numbered."""
    folder.mkdir(parents=True)
    texts = [json.dumps({"step": step} | line) + "\n" for step, line in enumerate(lines)]
    (folder / "log.jsonl").write_text("".join(texts) + tail)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_blue(image, x, y):
    """Whether a blue line goes through the place, within a pixel."""
    pixels = [image.getpixel((round(x), round(y) + up)) for up in (-1, 0, 1)]
    return any(blue - red > 60 for red, _, blue in pixels)


# ---- charts ------------------------------------------------------------------------------------------------


def test_a_value_stands_at_its_pixel():
    panel = chart.Panel(100, 50, 300, 150, (0, 10), (0.1, 10))
    assert panel.at(5, 10) == (200, 50) and panel.at(0, 0.1) == (100, 150)
    assert panel._replace(is_log=True).at(10, 1) == pytest.approx((300, 100))


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.71, 2.9, [0.5, 1, 1.5, 2, 2.5, 3]),
    (-0.1, 0.3, [-0.1, 0, 0.1, 0.2, 0.3]),
    (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    (3, 3, [0, 1, 2, 3]), (-0.5, -0.5, [-0.5, -0.4, -0.3, -0.2, -0.1, 0]), (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (78.7, 93.1, [75, 80, 85, 90, 95])])
def test_ticks_are_round_and_hold_all_values(low, high, expected):
    assert chart.ticks(low, high) == expected


@pytest.mark.parametrize("low, high, expected", [
    (0.046, 2.45, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]), (1, 10, [1, 2, 5, 10]),
    (0.003, 400, [0.001, 0.01, 0.1, 1, 10, 100, 1000]), (1.5, 15, [1, 2, 5, 10, 20])])
def test_ticks_of_decades(low, high, expected):
    assert chart.log_ticks(low, high) == pytest.approx(expected, rel=1e-9)


def test_dashes_go_on_around_a_corner():
    parts = chart.dashed([(0, 0), (10, 0), (10, 10)], [8, 4])
    assert parts == [[(0, 0), (8, 0)], [(10, 2), (10, 10)]]
    assert len({chart.style(number) for number in range(20)}) == 20


# ---- logs --------------------------------------------------------------------------------------------------


def test_null_nan_and_missing_are_gaps_and_a_half_line_is_left_out(tmp_path):
    lines = [{"lr": 1}, {"lr": None}, {"lr": float("nan")}, {}, {"lr": 2}, {"lr": 3}]
    log = curves.read_log(run_of(tmp_path / "run", lines, tail='{"step": 6, "l'))
    assert curves.points_of(log, "lr") == [(0, 1, 1, 1), None, None, None, (4, 2, 2, 2), (5, 3, 3, 3)]


def test_a_long_run_is_thinned_to_medians_and_keeps_its_spikes(tmp_path):
    lines = [{"lr": 1}, {"lr": 90}, {"lr": 3}, {}, {"lr": None}, {}, {"lr": 5}]
    log = curves.read_log(run_of(tmp_path / "run", lines))
    assert curves.points_of(log, "lr", 3) == [(1, 3, 1, 90), None, (6, 5, 5, 5)]


@pytest.mark.parametrize("text, problem", [
    (None, "no such file"), ("", "no step yet"), ('{"step": 0', "no step yet"),
    ("[]\n{}\n", "line 1 is damaged"),
    ('{"step": 0}\n{"st\n{"step": 2}\n', "line 2 is damaged: Unterminated")])
def test_a_folder_without_a_log_is_told_in_one_line(tmp_path, monkeypatch, text, problem):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    monkeypatch.setattr(sys, "argv", ["running.curves", str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"^running.curves: {tmp_path}/log.jsonl: .*{problem}[^\n]*$"):
        curves.main()
    assert not list(tmp_path.glob("*.png*"))


# ---- the picture -------------------------------------------------------------------------------------------


def test_one_run_goes_to_its_own_folder_and_lies_where_it_should(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run", [{"lr": step / 10} for step in range(11)])
    monkeypatch.setattr(sys, "argv", ["running.curves", str(run)])
    curves.main()
    assert capsys.readouterr().out == f"wrote {run}/curves.png\n"
    image = Image.open(run / "curves.png")
    assert image.size == (3 * 390, 62 + 248 + 34)
    for share in (0.25, 0.5, 0.75):  # of the way from (64, 254) to (354, 102)
        x, y = 64 + 290 * share, 254 - 152 * share
        assert is_blue(image, x, y) and not is_blue(image, x, y - 9) and not is_blue(image, x, y + 9)


def test_several_runs_of_all_kinds(tmp_path, monkeypatch):
    """Contrast first, held-out values, an unfinished run, a long one, one with nothing else to show."""
    first = [{"patch": 4.0, "patch_weight": 0.0, "lr": 0.1}] * 3
    later = [first[0] | {"generative": 2.0 / 10**step, "val_patch": 3.5} for step in range(4)]
    config = {"stage": "align", "preset": "tiny"}
    runs = [run_of(tmp_path / "a", first + later, config), run_of(tmp_path / "b", [{"prompt_ratio": None}]),
            run_of(tmp_path / "c", [{"generative": 1.0, "prompt": 3.0, "prompt_weight": 0.0}] * 900)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["running.curves", *map(str, runs)])
    curves.main()
    image = Image.open("curves.png")
    assert image.size == (3 * 390, 106 + 2 * 248 + 34)  # four panels
    assert is_blue(image, 64 + 290 * 3 / 899, 146)  # an upright where captioning begins
    title = curves.title_of(runs[0], curves.read_log(runs[0]))
    assert title.endswith("/a: align, preset tiny, 7 steps, the first 3 contrast alone")
    assert curves.title_of("c", curves.read_log("c")).endswith("/c: unfinished, 900 steps")


def contrast_run(folder, batch, is_finished=True, **options):
    """A run whose loss is that of knowing nothing, ln(batch)."""
    line = {"patch": math.log(batch), "patch_relative": 1.0, "patch_weight": 0.0, "patch_retrieval": 0.0}
    config = {"stage": "align", "preset": "tiny", "batch": batch, "out": str(folder)} | options
    return run_of(folder, [line, line | {"patch": 0.1}], config if is_finished else None)


def test_a_loss_of_ones_own_has_its_panels():
    line = {"step": 0, "generative": 1.0, "sigmoid": 2.0, "sigmoid_weight": 1.0}
    keys = list(curves.units_of([[line]], False))
    assert keys[:3] == ["generative", "sigmoid", "sigmoid_retrieval"] and "sigmoid_scale" in keys


@pytest.mark.parametrize("batches, key", [([16], "patch"), ([16, 16], "patch"), ([16, 8], "patch_relative")])
@pytest.mark.parametrize("is_finished", [True, False])
def test_runs_of_several_batch_sizes_share_no_axis_in_nats(tmp_path, monkeypatch, batches, key, is_finished):
    """A weight that is 0 throughout has no panel, a retrieval of 0 has. A log axis says so."""
    runs = [contrast_run(tmp_path / f"{n}", batch, is_finished) for n, batch in enumerate(batches)]
    texts = []
    monkeypatch.setattr(chart, "write", lambda pen, x, y, text, *more: texts.append(text))
    curves.draw(runs, tmp_path / "curves.png")
    assert [text for text in texts if text.startswith("patch")] == [key, "patch_retrieval"]
    assert ("contrastive loss, nats, log" in texts) == (key == "patch")


def test_the_legend_says_what_differs(tmp_path):
    """By config.json's order, without paths of the run; of an unfinished run what its log tells."""
    options = [{"projector": "pixel_shuffle", "init": ""}, {"projector": "linear", "init": "runs/x"}]
    runs = [contrast_run(tmp_path / f"{n}", 16 - 8 * n, **more) for n, more in enumerate(options)]
    runs.append(contrast_run(tmp_path / "2", 4, is_finished=False))
    logs = [curves.read_log(run) for run in runs]
    known = [curves.options_of(run, log) for run, log in zip(runs, logs)]
    differ = curves.differing(known)
    ends = [curves.title_of(run, log, differ).split(" steps, ")[1] for run, log in zip(runs, logs)]
    assert ends == ["batch 16, projector pixel_shuffle, init none", "batch 8, projector linear, init runs/x",
                    "batch 4"]
    assert curves.differing(known[:1] * 2) == []
