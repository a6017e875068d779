"""A run in the middle: the model that eval.py has of a checkpoint is that which training had then."""

import json
import shutil

import pytest
import torch

import eval as evaluation
import train
from projector import VLM
from running import checkpoint, options, unfinished

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def align_run(tmp_path_factory, clip_folder, tied_llama_folder):
    """A finished align run, for instruct to start from."""
    folder = tmp_path_factory.mktemp("aligned")
    VLM.from_towers(clip_folder, tied_llama_folder, "resampler").save(folder, {"template": "plain"}, False)
    return folder


def stop_in_the_middle(rank, world, given):
    """Train until step 2 is saved, and no further: {name: weight}, as the model has them then."""
    weights = {}
    save = checkpoint.save

    def save_and_stop(config, step, vlm, *more):
        save(config, step, vlm, *more)
        weights.update({name: p.detach().clone() for name, p in vlm.named_parameters()})
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_and_stop)
        train.train_stage(options.configure(given["stage"], given), CPU)
    return weights


@pytest.mark.parametrize("world, stage, more", [
    (1, "align", {"contrastive": "both", "projector": "pixel_shuffle"}),
    (1, "instruct", {}),
    (2, "instruct", {"shard": True, "dtype": "bfloat16"}),
    (2, "align", {"dtype": "bfloat16"}),
])
def test_eval_has_the_weights_that_training_had(ranks, align_run, clip_folder, llama_folder, toy, tmp_path,
                                                capsys, monkeypatch, world, stage, more):
    """Bit for bit; what was learned is rounded as the run rounds it, even where eval.py computes in fp32."""
    given = {"stage": stage, "preset": "tiny", "out": str(tmp_path / "run"), "batch": 8, "save_every": 2,
             "annotations": str(toy / f"{stage}.json"), "images": str(toy / "images"), "lr": 0.1} | more
    towers = {"vit": str(clip_folder), "llm": str(llama_folder)}
    given |= {"init": str(align_run)} if stage == "instruct" else towers
    trained = ranks(2, stop_in_the_middle, given)[0] if world == 2 else stop_in_the_middle(0, 1, given)
    capsys.readouterr()
    monkeypatch.setattr(unfinished, "choose_dtype", lambda *_: torch.float32)
    vlm, _, config = evaluation.load_run(tmp_path / "run", CPU)
    found = dict(vlm.named_parameters())
    assert list(found) == list(trained)
    learned = ("projector.", "llm.") if stage == "instruct" else "projector."
    for name, p in trained.items():
        mine = found[name] if name.startswith(learned) else found[name].to(p.dtype)
        assert torch.equal(mine, p.to(mine.dtype)), name
    assert not vlm.training and not any(p.requires_grad for p in found.values())
    assert config["step"] == 2 and config["template"] == "v1" and vlm.projector_kind == config["projector"]
    what = "projector is that" if stage == "align" else "projector and LLM are those"
    steps = 40 * {"align": 12, "instruct": 4}[stage] // 8
    said = capsys.readouterr().out
    assert said == (f"{tmp_path / 'run'} is not finished: its {what} of step 2 of {steps}; with train.py, "
                    f"{checkpoint.GO_ON}\n")
    argv = ["--bench", "scienceqa", "--data", str(toy / "ScienceQA"), "--limit", "2", "--out", str(tmp_path)]
    evaluation.main([*argv, "--ckpt", str(tmp_path / "run/checkpoint-0000002")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2


def test_what_is_no_unfinished_run_and_what_has_no_checkpoint(align_run, tmp_path):
    """A finished run is read from its own files, whatever checkpoints lie there."""
    finished = shutil.copytree(align_run, tmp_path / "finished")
    (finished / "log.jsonl").touch()
    (finished / "checkpoint-0000002").mkdir()
    assert unfinished.last_checkpoint(finished) is None and unfinished.last_checkpoint(tmp_path) is None
    (finished / "config.json").unlink()
    (finished / "checkpoint-0000010").mkdir()
    (finished / "checkpoint-0000012.partial").mkdir()
    last = unfinished.last_checkpoint(finished)
    assert last == finished / "checkpoint-0000010"
    torch.save({"step": 10, "ranks": 1, "config": {}}, last / "rank-0.pt")
    with pytest.raises(ValueError, match="^.*/checkpoint-0000010: saved by an older version of this program"):
        evaluation.load_run(finished, CPU)
    (last / "rank-0.pt").write_text("cut short")
    with pytest.raises(ValueError, match="^.*/checkpoint-0000010: cannot be read: "):
        evaluation.load_run(finished, CPU)
    with pytest.raises(ValueError, match=f"^{finished}: this run is not finished; .*{checkpoint.GO_ON}$"):
        options.configure("instruct", {"preset": "tiny", "init": str(finished)})
    assert unfinished.last_checkpoint(last) == last
    for folder in finished.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="^eval.py: .*finished: not finished, and without a checkpoint so"):
        evaluation.main(["--bench", "pope", "--ckpt", str(finished)])
