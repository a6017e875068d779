"""The vision tower against transformers' own, family by family, and the strictness of the weight reader."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
import transformers
from conftest import assert_close, layer_by_layer, shaken
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, SiglipVisionConfig,
                          SiglipVisionModel)

import data
import vit
from plumbing import clip
from plumbing import files as hub
from plumbing.files import resolve_model
from plumbing.tokenizer import tokenizer_folder
from vit import ViT, ViTConfig, load_vit_config


@pytest.mark.parametrize("layer", [-1, -4, 0, 2])  # -2 for each family below
def test_patch_features_equal_clip(clip_folder, layer):
    theirs = transformers.CLIPVisionModel.from_pretrained(clip_folder)
    ours, pixels = ViT.from_pretrained(clip_folder, feature_layer=layer), torch.randn(2, 3, 32, 32)
    with layer_by_layer(ours, theirs, clip.our_name):
        expected = theirs(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        found = ours(pixels)
        assert found.shape == (2, 16, 32)
        assert_close(found, expected)


def test_the_normalisation_is_that_of_training():
    names = {"clip_vision_model": "OPENAI_CLIP", "siglip_vision_model": "IMAGENET_STANDARD",
             "dinov2": "IMAGENET_DEFAULT"}
    assert names.keys() == vit.FAMILIES.keys()
    for kind, name in names.items():
        mean, std = (getattr(transformers.image_utils, f"{name}_{of}") for of in ("MEAN", "STD"))
        assert (vit.FAMILIES[kind].mean, vit.FAMILIES[kind].std) == (tuple(mean), tuple(std))


SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
FAMILIES = {  # name: (transformers' class, its config, whether a class token stands before the patches)
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SMALL, intermediate_size=64), True),
    "clip with gelu": (CLIPVisionModel, CLIPVisionConfig(**SMALL, intermediate_size=64, hidden_act="gelu"),
                       True),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SMALL, intermediate_size=64), False),
    "siglip, 36 / 8": (SiglipVisionModel,
                       SiglipVisionConfig(**SMALL | {"image_size": 36}, intermediate_size=64), False),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, mlp_ratio=2), True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_gradients_equal_transformers(tmp_path, family):
    """Prints the parity table. The last block but one, all gradients up to there, and bfloat16."""
    kind, config, class_token = FAMILIES[family]
    theirs = shaken(kind(config))
    theirs.save_pretrained(tmp_path)
    ours = ViT.from_pretrained(tmp_path).requires_grad_()
    pixels, direction = torch.randn(2, 3, config.image_size, config.image_size), torch.randn(2, 16, 32)

    def features(model, pixels):
        return model(pixels, output_hidden_states=True).hidden_states[-2][:, int(class_token) :]

    with layer_by_layer(ours, theirs, clip.our_name):
        expected, found = features(theirs, pixels), ours(pixels)
        assert found.shape == (2, 16, 32) and ours.num_patches == 16
        assert_close(found, expected)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    gradients, compared = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, 0
    for name, gradient in gradients.items():
        mine = ours.get_parameter(clip.our_name(name)).grad
        if not name.endswith(("k_proj.bias", "key.bias")):  # softmax does not see it: both are rounding noise
            assert_close(mine, gradient.view(mine.shape))
        compared += 1
    assert compared == sum(parameter.grad is not None for parameter in ours.parameters()) > 2 * 16
    half = ViT.from_pretrained(tmp_path, dtype=torch.bfloat16)(pixels.bfloat16()).float()
    their_half = features(kind.from_pretrained(tmp_path, dtype=torch.bfloat16), pixels.bfloat16()).float()
    print(f"{family:<16} features, max abs difference: fp32 {(found - expected).abs().max():.1e}, "
          f"bf16 {(half - their_half).abs().max():.1e}; largest {expected.abs().max():.1f}")
    assert (half - found).abs().max() < 2 * (their_half - expected).abs().max()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_what_we_save_opens_in_transformers(tmp_path, family):
    kind, config, class_token = FAMILIES[family]
    shaken(kind(config)).save_pretrained(tmp_path / "theirs")
    ours = ViT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    pixels = torch.randn(1, 3, 32, 32)
    theirs = kind.from_pretrained(tmp_path / "ours")
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, int(class_token) :]
    assert_close(ours(pixels), expected)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    mine = data.preprocess(picture, ours.config, "crop")
    expected = processor(picture, return_tensors="pt").pixel_values[0]
    two_grey_levels = 2 / 255 / min(ours.config.image_std)  # resizing rounds to whole ones
    assert (mine - expected).abs().max() <= two_grey_levels


def normalisation(config):
    return config.image_mean, config.image_std, config.resample


def test_normalisation_comes_with_the_tower(tmp_path):
    FAMILIES["siglip"][1].save_pretrained(tmp_path)
    assert normalisation(load_vit_config(tmp_path)) == ((0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
    config = {"image_mean": [0.1, 0.2, 0.3], "resample": 2, "size": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    expected = (0.1, 0.2, 0.3), (0.5,) * 3, Image.Resampling.BILINEAR
    assert normalisation(load_vit_config(tmp_path)) == expected


def test_whole_clip_folder_loads(tmp_path):
    """A full CLIP holds a text tower too, and prefixes its keys."""
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  image_size=16, patch_size=8)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=50)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    expected = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(ViT.from_pretrained(tmp_path)(pixels), expected)


def damaged(folder, to, change):
    to.mkdir()
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("pre_layrnorm.bias"), "missing.*pre_layrnorm.bias"),
    (lambda w: w.update(extra=torch.zeros(1)), "'extra' has no place"),
    (lambda w: w.update({"pre_layrnorm.bias": torch.zeros(31)}),
     r"pre_layrnorm.bias has shape \(31,\).*\(32,\)"),
])
def test_loading_is_strict(clip_folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ViT.from_pretrained(damaged(clip_folder, tmp_path / "damaged", change))


def test_bad_folders(tmp_path, llama_folder):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        ViT.from_pretrained(tmp_path / "no-such-folder")
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        ViT.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match="feature_layer 9"):
        ViT(ViTConfig(32, 8, 32, 64, 3, 4), feature_layer=9)


@pytest.mark.parametrize("file, text, message", [
    ("config.json", "[1]", "model_type is None"),
    ("config.json", '{"model_type": "clip_vision_model", "image_size": [48, 48]}',
     "folder: images of .48, 48"),
    ("config.json", '{"model_type": "clip_vision_model", "hidden_act": "relu"}',
     "folder: .* hidden_act is 'relu'"),
    ("model.safetensors.index.json", "{}", "index.json: has no weight_map")])
def test_bad_files_are_named(clip_folder, tmp_path, file, text, message):
    shutil.copytree(clip_folder, tmp_path / "folder")
    if "index" in file:  # a whole file comes first, as in transformers
        (tmp_path / "folder/model.safetensors").unlink()
    (tmp_path / "folder" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        ViT.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("files", [["model.safetensors"], ["pytorch_model-1.bin"]])
def test_only_what_is_needed_comes_from_the_hub(tmp_path, monkeypatch, files):
    """Configs and tokenizers without weights; weights once, whatever forms of them there are."""
    asked = []

    def fits(file, allowed, ignored):
        return any(fnmatch(file, p) for p in allowed) and not any(fnmatch(file, p) for p in ignored)

    def download(name, allow_patterns, ignore_patterns=()):
        asked.append((allow_patterns, ignore_patterns))
        for file in [file for file in files if fits(file, *asked[-1])]:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub.download.cache_clear()
    for _ in range(2):  # the Hub is asked once
        assert tokenizer_folder("some/name") == tmp_path
    weights = ("model-00001-of-2.safetensors", "model.safetensors", "consolidated.safetensors",
               "pytorch_model.bin")
    assert not any(fits(file, *asked[0]) for file in weights)
    resolve_model("some/name")
    assert [fits(file, *asked[1]) for file in weights] == [True, True, False, False]
    of_a_run = "projector.safetensors", "llm/model.safetensors", "llm/config.json"
    assert all(fits(file, *asked[1]) for file in of_a_run)
    assert len(asked) == (2 if "safetensors" in files[0] else 3) and (tmp_path / files[0]).exists()
    assert all(fits("config.json", *question) for question in asked)


def test_wrong_image_size(clip_folder):
    for height, width in ((40, 40), (16, 64), (32, 33)):  # of 25 patches; of 16, as 32 x 32, elsewhere
        with pytest.raises(ValueError, match=f"{height} x {width} pixels; the position table is of 32 x 32"):
            ViT.from_pretrained(clip_folder)(torch.zeros(1, 3, height, width))


def test_sharded_bin_folder(clip_folder, tmp_path):
    """pytorch_model-00001-of-00002.bin and its index: the only form in which Vicuna v1.5 is published."""
    weights = load_file(clip_folder / "model.safetensors")
    names = sorted(weights)
    shards = {"a.bin": names[:10], "b.bin": names[10:]}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(ViT.from_pretrained(tmp_path)(pixels), ViT.from_pretrained(clip_folder)(pixels))
    (tmp_path / "b.bin").unlink()
    with pytest.raises(FileNotFoundError, match="b.bin: this shard"):
        ViT.from_pretrained(tmp_path)
