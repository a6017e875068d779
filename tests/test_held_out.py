"""`--val`: the losses on held-out records are those of a step, on any number of ranks, and change nothing."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from conftest import checkpoints_kept
from scripts import lines_of, log_of, refused, trained

import losses
import train
from plumbing.files import read_json
from projector import VLM
from running import held_out, order
from running.options import configure, parse_args


def held_part(lines) -> list:
    """What is measured on held-out records, with its step."""
    found = []
    for line in lines:
        part = {key: value for key, value in line.items() if key.startswith("val_")}
        if part:
            found.append({"step": line["step"]} | part)
    return found


def test_held_out_losses_are_those_of_a_step(align):
    """Of the records of a step whose rate is 0. A rest is captioned, too: the loss is that of all records."""
    file = align[0] / "data/toy/align.json"
    how = ["--contrastive", "both", "--val", file, "--steps", "2"]
    said = trained(align, *how, "--out", "same", "--batch", "24")
    assert f"24 records of {file} are held out\nwarning: 24 of them are in data/toy/align.json, too" in said
    line = lines_of(align[0] / "same")[0]
    keys = ["generative", "patch", "patch_retrieval", "prompt", "prompt_retrieval"]
    assert [line[f"val_{key}"] for key in keys] == pytest.approx([line[key] for key in keys], rel=1e-5)
    trained(align, *how, "--out", "rest", "--batch", "10", "--micro_batch", "5")
    rest = lines_of(align[0] / "rest")[0]
    assert rest["val_generative"] == pytest.approx(line["generative"], rel=1e-5)
    assert math.log(9) < rest["val_patch"] < math.log(12) < line["val_patch"]  # of 10


def test_what_is_compared_is_the_contrastive_loss():
    """Also with captions and images that are equal, and more than one row that a caption fits."""
    image, text = torch.randn(2, 12, 4)
    keys = torch.tensor([[0, 1], [0, 2], [3, 1], *([n, n] for n in range(10, 19))])
    found = held_out.compare(image, text, keys, torch.tensor(5.0))
    assert found == pytest.approx([x.item() for x in losses.contrastive_loss(image, text, 5.0, keys)])
    assert 0 < found[1] < 1


def test_held_out_records_change_no_bit(align, tmp_path):
    """Nor does a kill change what is measured on them: in the first step, in every second and in the last."""
    records = read_json(align[0] / "data/toy/align.json")
    (tmp_path / "train.json").write_text(json.dumps(records[:16]))
    (tmp_path / "held.json").write_text(json.dumps(records[14:]))
    how = ["--annotations", tmp_path / "train.json", "--contrastive", "both", "--contrastive_first", "2",
           "--steps", "5"]
    val = ["--val", tmp_path / "held.json", "--val_every", "2"]
    trained(align, *how, "--out", "without")
    with checkpoints_kept():
        said = trained(align, *how, *val, "--out", "with")
    assert f"10 records of {tmp_path}/held.json are held out\nwarning: 2 of them are in" in said
    lines = log_of(align[0] / "with")
    measured = held_part(lines)
    assert [line["step"] for line in measured] == [0, 1, 3, 5, 6]
    assert measured[0].keys() == {"step", "val_generative", "val_patch", "val_patch_retrieval", "val_prompt",
                                  "val_prompt_retrieval"}
    (align[0] / "with/config.json").unlink()
    shutil.rmtree(align[0] / "with/checkpoint-0000006")
    trained(align, *how, *val, "--out", "with", "--resume")
    assert held_part(log_of(align[0] / "with")) == measured
    assert plain(log_of(align[0] / "with")) == plain(lines) == plain(log_of(align[0] / "without"))
    weights = [(align[0] / name / "projector.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert "is finished" in trained(align, *how, "--out", "with", "--resume")  # nor need it go on with --val


def plain(lines) -> list:
    """The lines without what is held out."""
    return [{key: value for key, value in line.items() if not key.startswith("val_")} for line in lines]


def stage_of(rank, ranks, folder, argv):
    """train.py's stage, in a process that is one of several ranks."""
    os.chdir(folder)
    given = parse_args([str(arg) for arg in argv])
    try:
        train.train_stage(configure(given["stage"], given), torch.device("cpu"))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("stage, count", [("align", 21), ("align", 5), ("instruct", 13)])
def test_two_ranks_measure_what_one_measures(align, ranks, tmp_path, stage, count):
    """Two batches and a rest; fewer records than a batch; conversations, which are only captioned."""
    records = read_json(align[0] / f"data/toy/{stage}.json")
    (tmp_path / "held.json").write_text(json.dumps(records[:count]))
    options = ["--stage", stage, *align[1][2:], "--steps", "2", "--val", tmp_path / "held.json",
               "--micro_tokens", "99", "--out"]
    if stage == "instruct":
        trained(align, "--steps", "2", "--out", tmp_path / "align")
        options = ["--init", tmp_path / "align", *options]
    trained((align[0], options), tmp_path / "one")
    ranks(2, stage_of, align[0], [*options, tmp_path / "two"])
    one, two = (held_part(lines_of(tmp_path / name)) for name in ("one", "two"))
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


def test_a_signal_ends_the_measurement_on_all_ranks_behind_the_batch(align, ranks):
    """Not behind all three; of a step in between, so the run is saved and ends."""
    options = [*align[1], "--val", "data/toy/align.json"]
    assert ranks(2, measure_signalled, align[0], options) == 2 * [({}, 1)]
    step = train.train_step

    def signalled(*args):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        said = refused(align, "--val", "data/toy/align.json", "--val_every", "2", "--out", "soon")
    assert "saved at step 2" in said
    assert [line["step"] for line in held_part(lines_of(align[0] / "soon"))] == [0]


def test_held_out_records_that_cannot_be_are_refused(align, ranks, tmp_path):
    records = read_json(align[0] / "data/toy/align.json")
    (tmp_path / "one.json").write_text(json.dumps(records[:1]))
    options = [*align[1], "--val", tmp_path / "one.json", "--out", tmp_path / "out"]
    assert ranks(2, stage_of, align[0], options) == 2 * [f"--val {tmp_path}/one.json: 1 records, fewer than "
                                                        "ranks"]
    assert refused(align, "--val", "none.json", "--out", "x") == "train.py: none.json: no such file"
    both = refused((align[0], ["--preset", "tiny"]), "--val", "x.json")
    assert both == "train.py: --val is of one stage: first --stage align, then --stage instruct"
