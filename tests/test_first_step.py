"""The naive step gives train.py's own numbers, and the three ideas are what they are said to be."""

import json
import re
from functools import partial

import pytest
import torch
from conftest import ROOT

import train
from lab import first_step, three_ideas
from running import options

README = (ROOT / "README.md").read_text()


@pytest.fixture
def config(toy, tmp_path):
    """A small align run: 12 steps of 16 of the toy world's 40 records, so that passes end within a batch."""
    given = dict(preset="tiny", steps=12, batch=16, micro_batch=16, annotations=str(toy / "align.json"),
                 images=str(toy / "images"), out=str(tmp_path / "run"), clip=1.0, lr=1e-2)
    given |= dict(vit=str(ROOT / "lab/towers/tiny-vit"), llm=str(ROOT / "lab/towers/tiny-llm"))
    return options.configure("align", given)


def test_the_naive_step_gives_the_numbers_of_train(config, capsys, monkeypatch):
    train.train_stage(config, torch.device("cpu"))
    log = [json.loads(line) for line in open(f"{config.out}/log.jsonl")]
    capsys.readouterr()
    monkeypatch.setattr(options, "configure", lambda stage, given: config)
    first_step.main([])
    printed = capsys.readouterr().out.splitlines()
    head = printed[:-12]
    for step, (row, line) in enumerate(zip(printed[-12:], log, strict=True)):
        theirs = [step, line["generative"], line["patch"], line["patch_retrieval"], line["grad_norm"]]
        assert [*map(float, row.split())] == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert log[0]["grad_norm"] > config.clip and log[-1]["generative"] < 0.5 * log[0]["generative"]
    # and what stands above them is what the README shows of the full toy world
    assert head[0].startswith("first row: ' <s><image> [[") and head[-1] in README
    shapes = [line for line in head if "(B, " in line]
    assert len(shapes) == 2 and all(line.replace("(16,", "(64,") in README for line in shapes)


def ideas(capsys) -> list:
    """[{name: [loss, length, cosine]}] of the three ideas, as printed."""
    three_ideas.main([])
    found = []
    for block in capsys.readouterr().out.split("\n\n"):
        lines = re.findall(r"^(.+?) +([\d.]+) +([\d.]+) +([\d.]+)$", block, re.M)
        found.append({name: [*map(float, numbers)] for name, *numbers in lines})
    return found


def test_three_ideas_without_a_process_group(capsys):
    nearly = partial(pytest.approx, abs=2e-4)  # the last digit printed
    the_cut, shares, gathers = ideas(capsys)
    assert the_cut["each loss to the cut, then once from there"] == nearly(the_cut["one backward"])
    assert the_cut["contrast in each micro-batch alone"][2] < 0.9
    assert shares["each rank's sum over all ranks' tokens"] == nearly(shares["one process"])
    assert shares["each rank's mean, averaged"][2] < 0.9
    assert gathers["two ranks: sum"] == nearly(gathers["one process"])
    losses = [loss for loss, _, _ in gathers.values()]
    assert len(losses) == 5 and losses == nearly(losses[:1] * 5)  # the loss does not tell
    _, length, cosine = gathers["two ranks: no gradient"]
    assert length < 0.7 and cosine < 0.95
    assert gathers["two ranks: own slice"][2] < 0.96
    assert gathers["two ranks: mean"][1] < 0.85
