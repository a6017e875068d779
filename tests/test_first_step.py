"""The naive step gives train.py's own numbers, and the three ideas are what they are said to be."""

import json
import re

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


def test_the_naive_step_gives_the_numbers_of_train(config, capsys):
    train.train_stage(config, torch.device("cpu"))
    log = [json.loads(line) for line in open(f"{config.out}/log.jsonl")]
    naive = list(first_step.steps(config))
    assert len(naive) == len(log) == 12
    for line, theirs in zip(naive, log):
        assert line == pytest.approx({key: theirs[key] for key in line}, rel=1e-4)
    assert naive[-1]["generative"] < 0.5 * naive[0]["generative"] and naive[0]["grad_norm"] > config.clip
    assert "first row: ' <s><image> [[" in capsys.readouterr().out.replace("' <s> ", "' <s>")


def ideas(capsys) -> list:
    """[{name: (loss, length, cosine)}] of the three ideas, as printed."""
    three_ideas.main([])
    found = []
    for block in capsys.readouterr().out.split("\n\n"):
        lines = re.findall(r"^(.+?) +([\d.]+) +([\d.]+) +([\d.]+)$", block, re.M)
        found.append({name: tuple(map(float, numbers)) for name, *numbers in lines})
    return found


def test_three_ideas_without_a_process_group(capsys):
    the_cut, shares, gathers = ideas(capsys)
    assert the_cut["one backward"] == the_cut["each loss to the cut, then once from there"]
    assert the_cut["contrast in each micro-batch alone"][2] < 0.9
    assert shares["one process"] == shares["each rank's sum over all ranks' tokens"]
    assert shares["each rank's mean, averaged"][2] < 0.9
    assert gathers["one process"] == gathers["two ranks: sum"]
    assert len({loss for loss, _, _ in gathers.values()}) == 1  # the loss does not tell
    _, length, cosine = gathers["two ranks: no gradient"]
    assert length < 0.7 and cosine < 0.95
    assert gathers["two ranks: own slice"][2] < 0.96
    assert gathers["two ranks: mean"][1] < 0.85
