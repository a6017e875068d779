"""LLaVA's own checkpoints: those like version 1.5's open, others are refused by name."""

import json
import shutil

import pytest
import torch
from scripts import how_it_ends, trained

import eval as evaluation
import train
from projector import VLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory, clip_folder, llama_folder):
    """(our model, the folder as LLaVA's own code would have saved it): the LLM's config.json with `mm_`
    fields, the projector among its weights, the tower named."""
    folder = tmp_path_factory.mktemp("original") / "llava-v1.5"
    vlm = VLM.from_towers(clip_folder, llama_folder)
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    projector = {f"model.mm_projector.{name}": p.detach() for name, p in vlm.projector.named_parameters()}
    weights = {name: p.detach() for name, p in vlm.llm.named_parameters()}
    torch.save(weights | projector, folder / "pytorch_model.bin")
    torch.save(projector, folder.parent / "mm_projector.bin")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad",
               "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
               "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
               "mm_vision_select_layer": -2, "mm_vision_tower": str(clip_folder), "use_mm_proj": True}
    (folder / "config.json").write_text(json.dumps(config))
    return vlm.eval(), folder


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_llavas_own_checkpoint_opens(original, tmp_path, kind):
    vlm, folder = original[0], shutil.copytree(original[1], tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    theirs, _, config = evaluation.load_run(folder, CPU)
    ids, pixels = torch.tensor([[1] + [-200] * 16 + [5, 6]]), torch.randn(1, 3, 32, 32)
    assert torch.equal(theirs(ids, pixels), vlm(ids, pixels)) and config["template"] == "v1"


@pytest.mark.parametrize("change, message", [
    ({"mm_use_im_start_end": True}, "only those like version 1.5's"),
    ({"mm_vision_tower": None}, "only those like"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "only those like version 1.5's"),
    ({"model_type": "llava_mpt"}, "model_type is 'mpt'"),
    ({"mm_projector_type": "abstractor"}, "projector 'abstractor'"),
    ({"mm_projector_type": "mlp3x_gelu"}, "4.weight"),
    ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer is no number")])
def test_what_llava_1_5_does_not_have_is_refused_by_name(original, tmp_path, change, message):
    folder = shutil.copytree(original[1], tmp_path / "llava-v1.5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        VLM.from_pretrained(folder)


def test_llavas_projector_starts_the_instruct_stage(original, world, tmp_path):
    options = ["--stage", "instruct", "--steps", "2", "--lr", "1e-300", "--out"]  # so small that no bit moves
    for number, init in enumerate((original[1].parent / "mm_projector.bin", original[1].parent)):
        printed = trained(world, *options, tmp_path / str(number), "--init", init)
        assert "loaded projector.0.weight, projector.0.bias, projector.2.weight" in printed
        ours = VLM.from_pretrained(tmp_path / str(number)).projector.state_dict()
        assert all(torch.equal(ours[name], p) for name, p in original[0].projector.state_dict().items())
    last = how_it_ends(train.main, world[0], *world[1], *options, tmp_path / "x", "--init", init,
                       "--projector", "linear")
    assert "mm_projector.bin" in last
