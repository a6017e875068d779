"""The gap between pictures and words against plain loops, and the heat map of a word on a picture."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import losses
from lab import spaces
from projector import VLM


@pytest.fixture
def vlm(clip_folder, llama_folder):
    return VLM.from_towers(clip_folder, llama_folder, "linear")


def test_gap_against_plain_formulas():
    image, text, keys = losses.unit(torch.randn(6, 4)), torch.randn(6, 4), torch.tensor([1, 2, 3, 4, 1, 5])
    scores, t = spaces.score_gap(image, text, keys), losses.unit(text)
    others = [float(image[i] @ t[j]) for i in range(6) for j in range(6) if keys[i] != keys[j]]
    squares = [(image[i] - image[j]).square().sum() for i in range(6) for j in range(i)]
    uniformity = math.log(sum(torch.exp(-2 * d).item() for d in squares) / len(squares))
    assert scores["negative_cosine"] == pytest.approx(sum(others) / len(others), abs=1e-4)
    assert scores["alignment"] == pytest.approx(2 - 2 * scores["positive_cosine"], abs=3e-4)  # of unit vectors
    assert scores["uniformity_image"] == pytest.approx(uniformity, abs=1e-4)
    assert scores["centroid_distance"] == pytest.approx((image.mean(0) - t.mean(0)).norm().item(), abs=1e-4)


def test_patches_against_words(vlm):
    patches, embeds = torch.randn(2, 16, 32), torch.randn(2, 3, 32)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = spaces.score_tokens(vlm, [(patches, embeds, mask)])
    words = vlm.llm.model.embed_tokens.weight.detach()
    nearest = [min((patch - word).norm().item() for word in words) for row in patches for patch in row]
    assert scores["nearest_word_distance"] == pytest.approx(sum(nearest) / len(nearest), abs=1e-3)
    tacs = []
    for row, tokens in zip(patches, (embeds[0], embeds[1, :1])):
        best = sorted(max(F.cosine_similarity(patch, token, dim=0).item() for token in tokens) for patch in row)
        tacs.append(sum(best[-10:]) / 10)
    assert scores["tacs"] == pytest.approx(sum(tacs) / 2, abs=1e-4)


def test_word_maps_are_cosines_in_reading_order(vlm, tokenizer):
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    maps = spaces.word_maps(vlm, tokenizer, picture, "a red circle")
    assert list(maps) == ["a", "red", "circle"] and maps["a"].shape == (4, 4)
    patches = vlm.encode(data.preprocess(picture, vlm.vit.config, "crop")[None])[0]
    red = vlm.llm.embed(torch.tensor(tokenizer("red", add_special_tokens=False).input_ids))[0]
    sixth = F.cosine_similarity(patches[6], red, dim=0).item()
    assert maps["red"][1, 2] == pytest.approx(sixth, abs=1e-6)


@pytest.fixture
def runs(vlm, toy, tmp_path):
    """Two run directories whose config.json says where the toy world is."""
    for name in "ab":
        vlm.save(tmp_path / name, {"benchmarks": str(toy)}, with_llm=False)
    return [str(tmp_path / name) for name in "ab"]


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_gap_of_runs_on_their_own_captions(runs, tmp_path, capsys):
    spaces.main(["gap", "--ckpt", *runs])
    results = printed(capsys)
    assert [result["ckpt"] for result in results] == runs and "tacs" in results[0]
    assert results[0]["pairs"] == 40 and json.loads((tmp_path / "a/gap.json").read_text()) == results[0]


def test_the_heat_map_has_a_row_for_each_run(runs, toy, tmp_path, capsys):
    image = next((toy / "images").iterdir())
    spaces.main(["heatmap", str(image), "a red circle", "--ckpt", *runs, "--out", str(tmp_path / "map.png")])
    result, = printed(capsys)
    assert [row["ckpt"] for row in result["runs"]] == runs and "circle" in result["runs"][0]
    assert Image.open(tmp_path / "map.png").width > 3 * 132


def test_a_bad_call_ends_in_one_line(runs):
    with pytest.raises(SystemExit, match="^lab.spaces: .*none.png: no such image$"):
        spaces.main(["heatmap", "none.png", "a red circle", "--ckpt", *runs])
