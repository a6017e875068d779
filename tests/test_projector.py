"""Splicing images into sequences, and the run directory."""

import pytest
import torch
from torch import nn

from projector import IMAGE_TOKEN_ID, VLM, build_projector


@pytest.fixture
def vlm(clip_folder, llama_folder):
    return VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu").eval()


def row(before, images, after, length=60):
    """ids with one image of 16 placeholders for each image, right-padded."""
    ids = [1] * before + [IMAGE_TOKEN_ID] * 16 * images + [5] * after
    return ids + [0] * (length - len(ids))


def test_projectors():
    assert [tuple(p.shape) for p in build_projector("linear", 8, 12).parameters()] == [(12, 8), (12,)]
    mlp = build_projector("mlp2x_gelu", 8, 12)
    assert list(mlp.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]  # LLaVA's names
    assert isinstance(mlp[1], nn.GELU) and mlp[1].approximate == "none"
    with pytest.raises(ValueError, match="resampler"):
        build_projector("resampler", 8, 12)


def test_splice_equals_a_plain_loop(vlm):
    ids = torch.tensor([row(2, 1, 3), row(5, 0, 9), row(1, 1, 1), row(1, 2, 0)])
    patches = torch.randn(4, 16, 32)
    expected, image = vlm.llm.embed(ids.clamp(min=0)).clone(), 0
    for b in range(4):
        for s in range(60):
            if ids[b, s] == IMAGE_TOKEN_ID:
                expected[b, s] = patches[image // 16, image % 16]
                image += 1
    assert torch.equal(vlm.splice(ids, patches), expected)


def test_splice_refuses_wrong_counts(vlm):
    with pytest.raises(ValueError, match="row 1"):
        vlm.splice(torch.tensor([row(2, 1, 3), row(2, 1, 3)[:17] + [0] * 43]), torch.randn(2, 16, 32))
    with pytest.raises(ValueError, match="3 images"):
        vlm.splice(torch.tensor([row(2, 1, 3), row(2, 1, 3)]), torch.randn(3, 16, 32))


def test_text_only_batch_gives_the_projector_a_zero_gradient(vlm):
    """Not None: a rank whose batch has no image must still take part in the sums."""
    vlm.llm.requires_grad_()
    embeds = vlm.splice(torch.tensor([row(4, 0, 4)]), vlm.encode(torch.zeros(1, 3, 32, 32)))
    embeds.square().sum().backward()
    assert all((p.grad == 0).all() for p in vlm.projector.parameters())


def test_encode_gives_the_frozen_vit_no_gradient(vlm):
    vlm.encode(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in vlm.vit.parameters())
    assert all(p.grad is not None for p in vlm.projector.parameters())


def test_batched_generation_equals_each_prompt_alone(vlm):
    pixels = torch.randn(2, 3, 32, 32)
    prompts = [row(2, 1, 3, length=21), row(1, 1, 9, length=26), row(4, 0, 3, length=7)]
    alone = [vlm.generate(torch.tensor([p]), pixels[i : i + 1], max_new_tokens=8) for i, p in enumerate(prompts)]
    ids = torch.tensor([[0] * (26 - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (26 - len(p)) + [True] * len(p) for p in prompts])
    batch = vlm.generate(ids, pixels, max_new_tokens=8, mask=mask)
    for together, single in zip(batch, alone):
        assert [t for t in together.tolist() if t >= 0] == [t for t in single[0].tolist() if t >= 0]


@pytest.mark.parametrize("with_llm", [False, True])
def test_run_directory_round_trip(vlm, tmp_path, with_llm):
    if with_llm:
        with torch.no_grad():
            vlm.llm.model.norm.weight.mul_(1.5)
    vlm.save(tmp_path, {"stage": "align"}, with_llm)
    again = VLM.from_pretrained(tmp_path)
    ids, pixels = torch.tensor([row(2, 1, 3)]), torch.randn(1, 3, 32, 32)
    assert torch.equal(again(ids, pixels), vlm(ids, pixels))
    assert (tmp_path / "llm" / "tokenizer.json").exists() == with_llm


def test_bad_run_directories(vlm, tmp_path, clip_folder, llama_folder):
    with pytest.raises(ValueError, match="config.json: vit is None; a run directory has a name there"):
        VLM.from_pretrained(llama_folder)
    vlm.save(tmp_path, {}, with_llm=False)
    VLM.from_towers(clip_folder, llama_folder, "linear").save(tmp_path / "other", {}, with_llm=False)
    (tmp_path / "projector.safetensors").write_bytes((tmp_path / "other" / "projector.safetensors").read_bytes())
    with pytest.raises(ValueError, match="'bias' has no place in Sequential|'weight' has no place in Sequential"):
        VLM.from_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="projector.safetensors"):
        VLM.from_pretrained(tmp_path)
