"""`--features`: what the frozen ViT makes of each picture is kept, and made anew where it must be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import lines_of, log_of, trained

from running import features
from running.options import Config


def test_kept_features_change_nothing(world, tmp_path):
    """A run on the ViT's features from a file, made by it or there already, logs what one on pictures
    does."""
    options = ["--stage", "align", "--features", tmp_path / "f.pt", "--out"]
    trained(world, "--stage", "align", "--out", tmp_path / "pictures")
    for name in ("made", "read"):
        trained(world, *options, tmp_path / name)
        for ours, theirs in zip(log_of(tmp_path / name), log_of(tmp_path / "pictures"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    other = ["--feature_layer", "-1", *options, tmp_path / "other"]
    assert "f.pt: made with other feature_layer; it is made anew" in trained(world, *other)


def test_features_of_other_pictures_are_made_anew(align, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(align[0] / "data/toy/images", images)
    how = ["--images", images, "--features", tmp_path / "features.pt", "--steps", "2"]
    trained(align, *how, "--out", "a")
    assert "made anew" not in trained(align, *how, "--out", "b")
    for file in images.glob("*.png"):
        Image.new("RGB", (64, 64), "white").save(file)
    assert "made with other pictures; it is made anew" in trained(align, *how, "--out", "c")
    first, again, white = (lines_of(align[0] / name)[0]["patch"] for name in "abc")
    assert first == again != white
    assert "made with other fit; it is made anew" in trained(align, *how, "--fit", "pad", "--out", "d")


def test_features_of_more_pictures_serve_fewer(align, tmp_path):
    how = ["--features", tmp_path / "features.pt", "--steps", "2"]
    trained(align, *how, "--out", "all")
    records = json.loads((align[0] / "data/toy/align.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(records[:10]))
    assert "made anew" not in trained(align, *how, "--annotations", tmp_path / "few.json", "--out", "few")


def test_features_of_no_picture_are_refused():
    samples = SimpleNamespace(records=[{"conversations": []}], images=Path())
    with pytest.raises(ValueError, match="--features f.pt: no record of d.json has an image"):
        features.load(Config(features="f.pt", annotations="d.json"), samples, torch.nn.Linear(1, 1), None)


def test_features_that_are_no_features_are_named(align, tmp_path):
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a file of features"):
        features.read(tmp_path / "other.pt")
