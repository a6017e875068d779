"""A run in the middle: the model that eval.py has of a checkpoint is that which training had then."""

import json
import shutil

import pytest
import torch

import eval as evaluation
import train
from projector import VLM
from running import checkpoint, options

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
    monkeypatch.setattr(evaluation, "choose_dtype", lambda *_: torch.float32)
    vlm, _, config = evaluation.load_run(tmp_path / "run", CPU)
    found = dict(vlm.named_parameters())
    assert list(found) == list(trained)
    learned = ("projector.", "llm.") if stage == "instruct" else "projector."
    for name, p in trained.items():
        mine = found[name] if name.startswith(learned) else found[name].to(p.dtype)
        assert torch.equal(mine, p.to(mine.dtype)), name
    assert not vlm.training and not any(p.requires_grad for p in found.values())
    assert config["step"] == 2 and config["template"] == "v1" and vlm.projector_kind == config["projector"]
    said = capsys.readouterr().out
    assert said == (f"{tmp_path / 'run'} is not finished: this is the model of its checkpoint-0000002; with "
                    f"train.py, {checkpoint.GO_ON}\n")
    last = str(tmp_path / "run/checkpoint-0000002")
    argv = ["--bench", "scienceqa", "--data", str(toy / "ScienceQA"), "--limit", "2", "--out", str(tmp_path)]
    evaluation.main([*argv, "--ckpt", last])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2
    with pytest.raises(ValueError, match="checkpoint-0000002: copy it first; its run removes it"):
        options.configure("instruct", {"preset": "tiny", "init": last})
    copied = str(shutil.copytree(last, tmp_path / "copy"))
    shutil.rmtree(tmp_path / "run")
    begun = options.configure("instruct", {"preset": "tiny", "init": copied})
    assert begun.projector == vlm.projector_kind
    assert begun.llm == (f"{copied}/llm" if stage == "instruct" else vlm.sources["llm"])


def test_where_the_model_of_a_run_is(align_run, tmp_path):
    """A finished run is read from its own files, whatever checkpoints lie there."""
    run = shutil.copytree(align_run, tmp_path / "run")
    (run / "log.jsonl").touch()
    (run / "checkpoint-0000002").mkdir()
    assert checkpoint.latest(run) == run and checkpoint.latest(tmp_path) == tmp_path
    (run / "config.json").unlink()
    (run / "checkpoint-0000010").mkdir()
    (run / "checkpoint-0000012.partial").mkdir()
    last = run / "checkpoint-0000010"
    assert checkpoint.latest(run) == last and checkpoint.latest(last) == last
    with pytest.raises(ValueError, match=f"^{run}: not finished; name a copy .*{checkpoint.GO_ON}$"):
        options.configure("instruct", {"preset": "tiny", "init": str(run)})
    with pytest.raises(FileNotFoundError, match="checkpoint-0000010/config.json"):
        evaluation.load_run(run, CPU)
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="^eval.py: .*run: not finished, and without a checkpoint so"):
        evaluation.main(["--bench", "pope", "--ckpt", str(run)])
