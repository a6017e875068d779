"""A plan without the hardware: what it counts, what it says, and what would make a run fit.

test_meta.py holds its memory against a step's, test_readme.py its hours against the README's.
"""

import json
import re
import sys

import bench_step
import pytest
import torch

import vit
from running import costs, memory, options, order, plan


def planned(capsys, *argv) -> tuple:
    """(what `python -m running.plan` prints, how it ends)."""
    end = None
    try:
        plan.main([str(arg) for arg in argv])
    except SystemExit as error:
        end = error.code
    return capsys.readouterr().out, end


@pytest.mark.parametrize("preset", options.PRESETS)
def test_every_preset_has_a_plan_of_narrow_lines_from_anywhere(preset, capsys, tmp_path, monkeypatch):
    """Neither data nor a tower's folder is there."""
    monkeypatch.chdir(tmp_path)
    out, end = planned(capsys, "--preset", preset, "--gpus", "16")
    assert [line for line in out.splitlines() if len(line) > 100] == []
    for said in ("GiB", "on disk", "PFLOP", "EFLOP", " h on 16 H100(s)", "the count is "):
        assert out.count(said) >= 2, said
    assert end is None and not list(tmp_path.iterdir())


def test_the_given_list_is_counted(capsys, tmp_path):
    """Also a record a line; and its steps make the hours."""
    records = [{"id": str(i), "conversations": []} for i in range(70)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, records)))
    given = "--preset", "small", "--stage", "align", "--contrastive", "patch", "--batch", "16"
    for name in ("a.json", "b.json"):
        out, _ = planned(capsys, *given, "--annotations", tmp_path / name)
        assert "5 steps of 16" in out and "70 records: 1.14 passes" in out and "count:" not in out
        step, stage = re.findall(r"([\d.e-]+) [PE]FLOP", out)
        assert float(stage) == pytest.approx(5 * float(step) / 1000, rel=0.01)


FIT = [  # GPUs, GiB, options, what fits
    (8, 80, {"stage": "instruct", "shard": False}, "--shard"),
    (4, 47, {"stage": "align"}, "--micro_batch 8"),
    (8, 15, {"stage": "align", "micro_batch": 1, "batch": 64}, "--checkpointing every"),
    (4, 32, {"stage": "instruct", "checkpointing": "every"}, "8 GPUs"),
    (4, 28.3, {"stage": "instruct", "checkpointing": "every", "shard": False, "micro_tokens": 0},
     "8 GPUs, --micro_batch 2, --shard")]


@pytest.mark.parametrize("gpus, has, given, words", FIT)
def test_the_first_change_that_fits_is_named_with_the_sum_of_its_plan(gpus, has, given, words, capsys):
    def sum_of(given, gpus):
        config = options.configure(given["stage"], {"preset": "7b"} | given)
        vlm = costs.outline(config)
        largest = plan.largest_micro_batch(*plan.typical_step(config, vlm, gpus))
        found = plan.what_fits(config, vlm, torch.bfloat16, largest, gpus, has)
        return sum(memory.memory_parts(config, vlm, torch.bfloat16, *largest, gpus).values()), found

    needs, found = sum_of(given, gpus)
    assert needs > has and found.startswith(f"{words}: ")
    for option in re.findall(r"--(\w+) ?(\w*)", words):
        name, value = option
        given = given | {name: int(value) if value.isdigit() else value or True}
    more = re.match(r"(\d+) GPUs", words)
    now, _ = sum_of(given, int(more[1]) if more else gpus)
    assert now < has and f"{now:.3g} GiB" in found


def test_what_cannot_fit_and_what_cannot_be_exported_is_said(capsys):
    given = "--preset", "13b", "--stage", "instruct", "--memory", "8", "--projector", "pixel_shuffle"
    out, end = planned(capsys, *given)
    assert "cannot be exported: transformers' LLaVA has no projector 'pixel_shuffle'" in out
    assert "what fits: nothing but a smaller preset" in out and end == 1


@pytest.mark.parametrize("argv, words", [
    (["--gpus", "0"], "--gpus is 0"), (["--gpus", "3"], "does not divide into 3 ranks"),
    (["--annotations", "x.json"], "is of one stage: first"), (["--val", "x.json"], "is of one stage: first"),
    (["--stage", "align", "--annotations", "x.json"], "x.json: no such file; without --annotations")])
def test_bad_options_end_in_one_line(argv, words, capsys):
    _, end = planned(capsys, "--preset", "small", *argv)
    assert end.startswith("running.plan: ") and words in end and "\n" not in end


def test_an_align_run_that_goes_on_is_not_in_the_way(tmp_path, monkeypatch, capsys):
    """Instruct will start from it once it is finished."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/small/align"
    run.mkdir(parents=True)
    (run / "log.jsonl").touch()
    out, end = planned(capsys, "--preset", "small")
    assert end is None and out.count("EFLOP") >= 2


def test_a_finished_align_run_is_not_what_both_stages_start_from(tmp_path, monkeypatch, capsys):
    """Align will be trained anew, and may have another projector."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/tiny/align"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"vit": "a", "llm": "b", "projector": "mlp2x_gelu"}))
    (run / "projector.safetensors").touch()
    out, end = planned(capsys, "--preset", "tiny", "--projector", "linear")
    assert end is None and out.count("PFLOP") >= 2


def test_what_the_contrastive_losses_add_is_what_the_laboratory_says():
    """lab/toy.md, above table 10: parts of a 7b step's operations."""
    config = options.configure("align", {"preset": "7b", "contrastive": "both"})
    step = costs.flops_per_step(config, costs.outline(config))
    parts = [step[name] / sum(step.values()) for name in ("patch", "prompt")]
    assert parts == pytest.approx([1.2e-6, 0.016], rel=0.05)


def test_features_spare_the_vision_tower(capsys):
    given = "--preset", "small", "--stage", "align"
    with_vit, _ = planned(capsys, *given)
    without, _ = planned(capsys, *given, "--features", "f.pt")
    assert "vision 0.24" in with_vit and "vision 0," in without
    hours = [float(re.search(r"([\d.]+) h on", out)[1]) for out in (with_vit, without)]
    assert hours[1] < 0.8 * hours[0]


# ---- the dry run -------------------------------------------------------------------------------------------


def dry_run(capsys, monkeypatch, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--stage", "align", "--dry_run", *map(str, argv)])
    bench_step.main()
    return capsys.readouterr().out


def test_a_dry_run_counts_the_list_and_with_features_runs_no_vit(capsys, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "0"}] * 640))
    monkeypatch.setattr(vit.ViT, "forward", None)
    given = "--preset", "tiny", "--annotations", tmp_path / "a.json", "--features", "f"
    out = dry_run(capsys, monkeypatch, *given)
    assert "at this speed the 120 steps of 640 records take" in out and "vision 0," in out


def test_a_dry_run_that_a_cpu_cannot_do_is_not_begun(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="take a CPU too long.*running.plan --preset small"):
        dry_run(capsys, monkeypatch, "--preset", "small")
    assert "PFLOP" in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    ({"contrastive": "none"}, "none"), ({"contrastive": "both"}, "both"),
    ({}, "patch, alone in the first 1000 steps, at weight 0"),
    ({"contrastive_balance": 0.1},
     "patch, alone in the first 1000 steps, at 0.1 of the captioning gradient"),
    ({"contrastive": "patch", "contrastive_balance": 0.1}, "patch, at 0.1 of the captioning gradient"),
    ({"contrastive": "prompt", "contrastive_weight": 3.0}, "prompt, at weight 3")])
def test_the_plan_says_how_the_contrastive_loss_is_weighed(given, words):
    assert plan.contrastive_words(options.configure("align", {"preset": "7b"} | given)) == words


@pytest.mark.parametrize("records, words", [
    (2000, "2,000 records: 1.02 passes behind 128 of contrast first, many for so few records "),
    (241, "241 records: 1.06 passes behind 1,060 of contrast first, many for so few records (--contr"),
    (558128, "558,128 records: 1 passes behind 0.459 of contrast first")])
def test_the_plan_says_how_often_a_record_comes_by(records, words, capsys):
    config = options.configure("align", {"preset": "small"})
    plan.print_passes(config, records, order.count_steps(config, records))
    assert capsys.readouterr().out.startswith(words)


def test_what_cannot_fit_is_refused_before_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--preset", "13b", "--stage", "instruct", "--dry_run"])
    with pytest.raises(SystemExit, match="^train.py: .*needs about"):
        bench_step.main()
    assert "13,015,864,320" in capsys.readouterr().out  # parameters of the LLM: the plan came first
