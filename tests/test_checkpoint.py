"""A run in the middle: what a checkpoint holds, what it is made of, and what goes on from it."""

import io
import json
import os
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import kills
import pytest
import torch
from conftest import checkpoints_kept
from PIL import Image
from scripts import called, how_it_ends, lines_of, log_of, refused, trained, unfinished
from test_ids import CHATML

import eval as evaluation
import train
from llm import LLM
from projector import VLM
from running import checkpoint, directory, options
from running.options import configure, parse_args

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
    assert directory.latest(run) == run and directory.latest(tmp_path) == tmp_path
    (run / "config.json").unlink()
    (run / "checkpoint-0000010").mkdir()
    (run / "checkpoint-0000012.partial").mkdir()
    last = run / "checkpoint-0000010"
    assert directory.latest(run) == last and directory.latest(last) == last
    with pytest.raises(ValueError, match=f"^{run}: not finished; name a copy .*{checkpoint.GO_ON}$"):
        options.configure("instruct", {"preset": "tiny", "init": str(run)})
    with pytest.raises(FileNotFoundError, match="checkpoint-0000010/config.json"):
        evaluation.load_run(run, CPU)
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="^eval.py: .*run: not finished, and without a checkpoint so"):
        evaluation.main(["--bench", "pope", "--ckpt", str(run)])


# ---- what a run is made of ---------------------------------------------------------------------------------


@pytest.fixture
def stopped(world, tmp_path):
    """(options of an align run of 6 steps, its folder as a kill would leave it after step 4,
    whole.safetensors)."""
    own = tmp_path / "align.json"
    shutil.copy(world[0] / "data/toy/align.json", own)
    options = [*world[1], "--stage", "align", "--annotations", own, "--save_every", "2", "--out",
               tmp_path / "cut"]
    with checkpoints_kept():
        called(train.main, world[0], *options)
    shutil.copy(tmp_path / "cut/projector.safetensors", tmp_path / "whole.safetensors")
    for name in ("config.json", "projector.safetensors"):
        (tmp_path / "cut" / name).unlink()
    return options, tmp_path / "cut", own


def change_caption(records):
    records[-1]["conversations"][1]["value"] = "a red circle"
    return records


@pytest.mark.parametrize("change", [
    lambda records: records[:-1], lambda records: records[:8], change_caption, lambda records: records[::-1],
    lambda records: records * 2])
def test_other_records_are_refused_on_resume(world, stopped, change):
    options, out, file = stopped
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    log = (out / "log.jsonl").read_text()
    last = how_it_ends(train.main, world[0], *options, "--resume")
    assert re.match("train.py: .*checkpoint-0000004: saved with another records( and pictures)?; .*, remove "
                    ".*made_of.json$", last)
    assert (out / "log.jsonl").read_text() == log
    (out / "checkpoint-0000004/made_of.json").unlink()  # on purpose; also where nothing is left to do
    called(train.main, world[0], *options, "--resume")
    assert (out / "config.json").exists()


@pytest.mark.parametrize("part", ["vit", "llm", "tokenizer"])
def test_other_towers_are_refused_on_resume(world, stopped, clip_folder, llama_folder, tmp_path, part):
    """One bit of one weight; a chat template."""
    options, _, _ = stopped
    folder = clip_folder if part == "vit" else llama_folder
    before = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        if part == "tokenizer":
            file = folder / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHATML}))
        else:
            content = bytearray((folder / "model.safetensors").read_bytes())
            content[-4] ^= 1
            (folder / "model.safetensors").write_bytes(content)
        assert f"saved with another {part};" in how_it_ends(train.main, world[0], *options, "--resume")
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def test_a_vit_of_another_mean_is_another_vit(align, clip_folder, tmp_path):
    """Its weights are the same. Features are made anew, and a run does not go on with it."""
    shutil.copytree(clip_folder, tmp_path / "vit")
    how = ["--vit", tmp_path / "vit", "--features", tmp_path / "features.pt"]
    with checkpoints_kept():
        trained(align, *how, "--out", "mean")
    (align[0] / "mean/config.json").unlink()
    shutil.rmtree(align[0] / "mean/checkpoint-0000006", ignore_errors=True)
    other = '{"image_mean": [0, 0, 0], "image_std": [9, 9, 9]}'
    (tmp_path / "vit/preprocessor_config.json").write_text(other)
    assert "made with other weights; it is made anew" in trained(align, *how, "--steps", "2", "--out", "anew")
    assert "saved with another vit" in refused(align, *how, "--out", "mean", "--resume")


def test_an_llm_of_another_rope_is_another_llm(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    before = checkpoint.fingerprint(llm)
    llm.config.rope_theta *= 2
    assert checkpoint.fingerprint(llm) != before == checkpoint.fingerprint(LLM.from_pretrained(llama_folder))


@pytest.mark.parametrize("records, looked", [(3, 3), (1000, 1000), (1999, 1000), (2001, 667)])
def test_a_fingerprint_looks_at_a_thousand_pictures_at_most(monkeypatch, records, looked):
    class Samples(list):
        records = property(lambda self: self)
        images = None

    monkeypatch.setattr(checkpoint, "key_of", len)
    assert checkpoint.picture_sizes(Samples([{}] * records)) == looked


def test_a_resumed_run_warns_of_pictures_of_another_size(align, tmp_path):
    unfinished(align, "sizes")
    images = align[0] / "data/toy/images"
    shutil.copytree(images, tmp_path / "kept")
    try:
        for file in images.glob("*.png"):
            Image.new("RGB", (99, 99), "white").save(file)
        assert "warning: sizes/checkpoint-0000004: some pictures have another size" in trained(
            align, "--out", "sizes", "--resume")
    finally:
        shutil.rmtree(images)
        shutil.copytree(tmp_path / "kept", images)


# ---- what goes on, and what does not -----------------------------------------------------------------------


def test_a_run_is_not_resumed_with_other_options(world, tmp_path):
    options = ["--stage", "align", "--out", tmp_path / "a", "--save_every", "1"]
    with checkpoints_kept():
        trained(world, *options, "--steps", "3")
    (tmp_path / "a/config.json").unlink()  # as if it had been stopped
    end = how_it_ends(train.main, world[0], *world[1], *options, "--steps", "3", "--lr", "0.5", "--resume")
    assert "checkpoint-0000002: saved with lr 0.002, resumed with 0.5" in end


def test_an_unfinished_run_may_get_more_steps_and_a_finished_one_says_how_to_go_on(align):
    unfinished(align, "longer")
    said = trained(align, "--out", "longer", "--resume", "--epochs", "3")
    assert "saved with epochs 2.0, now 3.0: the schedule is another" in said
    assert [line["step"] for line in lines_of(align[0] / "longer")] == list(range(9))
    said = refused(align, "--out", "longer", "--resume", "--epochs", "4")
    assert "finished (--init goes on from it): saved with epochs 3.0, resumed with 4.0" in said


def test_a_run_of_epochs_is_not_cut_short_by_steps(align):
    unfinished(align, "shorter")
    said = refused(align, "--out", "shorter", "--resume", "--steps", "3")
    assert "saved with steps 0, resumed with 3" in said
    assert len(checkpoint.checkpoints(align[0] / "shorter")) == 2


def test_a_damaged_checkpoint_is_refused_and_the_one_before_does(world, stopped):
    options, out, _ = stopped
    file = out / "checkpoint-0000004/rank-0.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    file.write_bytes(content)
    last = how_it_ends(train.main, world[0], *options, "--resume")
    assert "checkpoint-0000004: damaged; without it, the one before is taken" in last
    shutil.rmtree(file.parent)
    called(train.main, world[0], *options, "--resume")
    assert (out / "projector.safetensors").read_bytes() == (out.parent / "whole.safetensors").read_bytes()


def test_resume_of_a_finished_run_and_of_none(world, stopped, tmp_path):
    options, out, _ = stopped
    called(train.main, world[0], *options, "--resume")
    weights, log = (out / "projector.safetensors").read_bytes(), (out / "log.jsonl").read_text()
    assert "is finished; nothing is left to do" in called(train.main, world[0], *options, "--resume")
    assert ((out / "projector.safetensors").read_bytes(), (out / "log.jsonl").read_text()) == (weights, log)
    assert not Path(f"{out}.old").exists()
    other = how_it_ends(train.main, world[0], *options, "--resume", "--lr", "0.5")
    assert re.search(r"config.json: finished .*: saved with lr 0.002, resumed with 0.5$", other)
    last = how_it_ends(train.main, world[0], *options[:-1], tmp_path / "none", "--resume")
    assert last.startswith(f"train.py: {tmp_path}/none: no run to resume; type the command that began it, ")
    assert not (tmp_path / "none").exists()


def stage_of(rank, ranks, folder, argv):
    """Run the align stage on these ranks."""
    with checkpoints_kept(), pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        train.train_stage(configure("align", parse_args(argv)), CPU)


@pytest.mark.parametrize("shard, again", [(True, True), (True, False), (False, True)])
def test_a_run_goes_on_on_another_number_of_ranks(world, ranks, tmp_path, shard, again):
    """Saved by one process, resumed by two, for which other parts may fit: to rounding, the log of an
    undisturbed run. If all ranks have the same masters and moments, one writes them."""
    options = ["--stage", "align", "--epochs", "4", "--save_every", "3", "--shard", shard, "--out"]
    with checkpoints_kept():
        called(train.main, world[0], *world[1], *options, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/config.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoint-0000009")
    parts = ["--micro_batch", "2", "--checkpointing", "every", "--shard", again]
    argv = [str(arg) for arg in (*world[1], *options, tmp_path / "cut", "--resume", *parts)]
    ranks(2, stage_of, world[0], argv)
    for ours, theirs in zip(log_of(tmp_path / "cut"), log_of(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    files = sorted((tmp_path / "cut/checkpoint-0000009").glob("rank-*.pt"))
    assert ["optimizer" in torch.load(file, weights_only=True) for file in files] == [True, again]


@pytest.mark.parametrize("restarted", ["a/", "b/"])
def test_whatever_node_torchrun_starts_again_the_run_goes_on(align, monkeypatch, restarted):
    """After a failure another node may have rank 0."""
    unfinished(align, "node")
    (align[0] / "node/launch").write_text("a/\nb/")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{restarted}attempt_1/0/error.json")
    monkeypatch.chdir(align[0])
    assert configure("align", {"preset": "tiny", "out": "node"}).resume
    shutil.rmtree("node")


def test_what_another_rank_left_of_a_checkpoint_goes(align):
    stale = align[0] / "stale/checkpoint-0000002.partial"
    unfinished(align, "stale")
    stale.mkdir()
    (stale / "rank-7.pt").write_text("of eight ranks")
    shutil.rmtree(align[0] / "stale/checkpoint-0000004")
    shutil.rmtree(align[0] / "stale/checkpoint-0000002")
    trained(align, "--out", "stale", "--resume")
    assert not list((align[0] / "stale").rglob("rank-7.pt"))


def test_the_log_is_on_the_disk_before_its_checkpoint_is(align, monkeypatch):
    """A machine that goes down would otherwise leave a checkpoint of more steps than the log has."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    unfinished(align, "synced")
    names = [Path(name).name for name in synced]
    assert "log.jsonl" in names and names.index("log.jsonl") < names.index("synced")


@pytest.mark.kills
def test_kills_at_random_instants_cost_nothing():
    """Minutes: run with -m kills."""
    result = kills.main(20)
    assert result["kills"] == result["equal"] == 20 and result["while saving"] > 0
