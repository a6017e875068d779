"""The vision tower against transformers' CLIPVisionModel, and the strictness of the weight reader."""

import pytest
import torch
import transformers
from conftest import assert_close
from safetensors.torch import load_file, save_file

from vit import ViT, ViTConfig


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2])
def test_patch_features_equal_clip(clip_folder, layer):
    theirs = transformers.CLIPVisionModel.from_pretrained(clip_folder)
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    ours = ViT.from_pretrained(clip_folder, feature_layer=layer)(pixels)
    assert ours.shape == (2, 16, 32)
    assert_close(ours, expected)


def test_gradients_equal_clip(clip_folder):
    theirs = transformers.CLIPVisionModel.from_pretrained(clip_folder)
    ours = ViT.from_pretrained(clip_folder).requires_grad_()
    pixels, direction = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 32)
    (theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:] * direction).sum().backward()
    (ours(pixels) * direction).sum().backward()
    expected = {name.removeprefix("vision_model."): p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name])
            compared += 1
    assert compared == 5 + 2 * 16  # embeddings and pre-norm, and the first two of three blocks


def test_whole_clip_folder_loads(tmp_path):
    """A full CLIP holds a text tower too, and prefixes its keys."""
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                  patch_size=8)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    expected = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(ViT.from_pretrained(tmp_path)(pixels), expected)


def test_save_opens_in_transformers(tmp_path):
    ours = ViT(ViTConfig(32, 8, 32, 64, 3, 4)).eval()
    ours.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    theirs = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert_close(ours(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])


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
    (lambda w: w.update({"pre_layrnorm.bias": torch.zeros(31)}), r"pre_layrnorm.bias has shape \(31,\).*\(32,\)"),
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


def test_wrong_image_size(clip_folder):
    with pytest.raises(ValueError, match="40 x 40 gives 25 patches; the position table holds 16"):
        ViT.from_pretrained(clip_folder)(torch.zeros(1, 3, 40, 40))


def test_sharded_bin_folder(clip_folder, tmp_path):
    """pytorch_model-00001-of-00002.bin and its index: the only form in which Vicuna v1.5 is published."""
    import json
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
