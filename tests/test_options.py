"""Options: the command line, the presets, what a run starts from, and what cannot be."""

import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from scripts import how_it_ends, refused, script, trained, without

import train
from lab import toy_world
from projector import VLM
from running import options
from running.options import Config


def test_options_become_config():
    argv = ["--stage", "align", "--preset", "tiny", "--lr", "0.5", "--resume", "--shard", "False"]
    config = options.configure("align", options.parse_args(argv))
    assert (config.lr, config.resume, config.shard, config.template) == (0.5, True, False, "plain")
    assert options.configure("instruct", {"preset": "tiny"}).init == "runs/tiny/align"


def test_a_form_that_is_typed_for_both_stages_is_of_instruct():
    given = {"template": "chat", "fit": "pad", "preset": "tiny"}
    align, instruct = (options.configure(s, options.of_stage(s, given)) for s in ("align", "instruct"))
    assert (align.template, align.fit, instruct.template, instruct.fit) == ("plain", "crop", "chat", "pad")


def test_epochs_that_are_typed_come_before_a_presets_steps():
    assert options.configure("align", {"preset": "speedrun"}).steps == 2180
    assert options.configure("align", {"preset": "speedrun", "epochs": 5.0}).steps == 0
    assert options.configure("align", {"preset": "speedrun", "epochs": 5.0, "steps": 7}).steps == 7


def test_a_weight_of_no_loss_is_refused():
    with pytest.raises(ValueError, match="--contrastive_weight: there is no contrastive loss"):
        options.configure("align", {"preset": "tiny", "contrastive": "none", "contrastive_weight": 7.0})


@pytest.mark.parametrize("argv", [["--learning_rate", "1"], ["--lr", "fast"], ["--stage", "finetune"],
                                  ["--lr"], ["--resume", "perhaps"], ["--contr", "patch"]])
def test_bad_options_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_shows_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line is cut in two
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert not end.value.code
    shown = dict(re.findall(r"^  --(\w+) \S+\s+.*\[(.*)\]$", capsys.readouterr().out, re.M))
    assert shown == {name: str(value) or "empty" for name, value in asdict(Config()).items()}


def test_presets_name_existing_fields():
    for name, preset in options.PRESETS.items():
        for stage in ("align", "instruct"):
            config = options.configure(stage, {"preset": name})
            for field in config.__dataclass_fields__.values():
                assert isinstance(getattr(config, field.name), field.type), field.name


@pytest.mark.parametrize("given, first, weight, balance", [
    ({}, 1000, 0.0, 0.0),  # contrast first, captioning alone after it
    ({"contrastive": "patch"}, 0, 1.0, 0.0), ({"contrastive": "prompt"}, 0, 1.0, 0.0),  # the papers'
    ({"contrastive": "none"}, 0, 1.0, 0.0), ({"contrastive_first": 0}, 0, 1.0, 0.0),
    ({"contrastive_balance": 0.1}, 1000, 0.0, 0.1),  # and a ratio held after it
    ({"contrastive_weight": 2.0}, 1000, 2.0, 0.0),
    ({"contrastive": "both", "contrastive_first": 9}, 9, 1.0, 0.0)])
def test_full_scale_puts_contrast_first_and_a_named_loss_is_a_plain_sum(given, first, weight, balance):
    for preset in ("small", "7b", "13b"):
        config = options.configure("align", {"preset": preset} | given)
        found = config.contrastive_first, config.contrastive_weight, config.contrastive_balance
        assert found == (first, weight, balance)


@pytest.mark.parametrize("given, prompt", [
    ({}, "none"), ({"contrastive": "prompt"}, "describe"),
    ({"contrastive": "both", "prompt": "none"}, "none"), ({"prompt": "one-word"}, "one-word"),
    ({"contrastive": "prompt", "preset": "small"}, "compress"),
    ({"prompt": "So: | In short:"}, "So: | In short:")])
def test_the_prompt_comes_with_its_loss_or_when_asked_for(given, prompt):
    assert options.configure("align", {"preset": "tiny"} | given).prompt == prompt
    assert options.configure("instruct", {"preset": "tiny"}).prompt == "none"


# ---- what a run starts from --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(align):
    """(the folder of `world` with options of a short instruct run, a finished one whose LLM has a mark of 7.0
    in its norm)."""
    folder, options = align
    options = ["--stage", "instruct", *options[2:], "--steps", "2"]
    trained(align, "--out", "runs/tiny/align", "--steps", "2")
    trained((folder, options), "--out", "tuned")
    vlm = VLM.from_pretrained(folder / "tuned")
    with torch.no_grad():
        vlm.llm.model.norm.weight.fill_(7.0)
    vlm.llm.save_pretrained(folder / "tuned/llm")
    vlm = VLM.from_pretrained(folder / "tuned")
    vlm.export(folder / "exported")
    return (folder, options), vlm


@pytest.mark.parametrize("init", ["tuned", "exported"])
def test_a_run_takes_all_that_it_starts_from(tuned, init):
    (folder, options), vlm = tuned
    options = without(options, "--vit", "--llm")
    trained((folder, options), "--init", folder / init, "--out", f"on-{init}", "--lr", "1e-9")
    found = VLM.from_pretrained(folder / f"on-{init}")
    assert torch.allclose(found.llm.model.norm.weight, torch.tensor(7.0), atol=1e-4)
    theirs = dict(vlm.named_parameters())
    for name, parameter in found.named_parameters():
        rows = min(len(parameter), len(theirs[name]))  # an export has a row more for the placeholder
        assert torch.allclose(parameter[:rows], theirs[name][:rows], atol=1e-4), name


def test_a_run_that_serves_as_the_llm_brings_its_tokenizer(tuned, align):
    """--llm RUN: what starts from it can be asked and exported, too."""
    (folder, options), _ = tuned
    trained((folder, without(align[1], "--llm")), "--llm", "tuned", "--out", "over", "--steps", "2")
    trained((folder, without(options, "--vit", "--llm")), "--init", "over", "--out", "above")
    assert (folder / "above/llm/tokenizer.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        VLM.from_pretrained("over").export("over-exported")
    assert (folder / "over-exported/tokenizer.json").exists()


def test_a_tower_that_is_typed_and_another_is_refused(tuned, clip_folder):
    (folder, options), _ = tuned
    options = without(options, "--llm")
    said = refused((folder, options), "--init", "tuned", "--llm", clip_folder, "--out", "other")
    assert f"--llm {clip_folder}: tuned has 'tuned/llm', which is taken" in said
    same = refused((folder, options), "--init", "tuned", "--out", "tuned/")
    assert same == "train.py: --out tuned/ is what the run starts from; name another"
    assert "runs/nothing/here" in refused((folder, options), "--init", "runs/nothing/here", "--out", "other")


@pytest.mark.parametrize("name", ["projector.safetensors", "mm_projector.bin", "mm.bin"])
def test_a_run_may_start_from_the_file_of_a_projector(tuned, name, tmp_path):
    (folder, options), _ = tuned
    tensors = load_file(folder / "tuned/projector.safetensors")
    file = tmp_path / name
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    said = trained((folder, options), "--init", file, "--out", "on-a-file")
    assert f"from {file}: loaded projector.0.weight, projector.0.bias" in said


def test_the_file_of_a_projector_is_guarded_as_its_run_is(tuned):
    (folder, options), _ = tuned
    file = folder / "tuned/projector.safetensors"
    said = refused((folder, options), "--init", file, "--out", folder / "tuned")
    assert said.endswith("/tuned is what the run starts from; name another")
    shutil.copytree(folder / "tuned", folder / "half")
    (folder / "half/config.json").unlink()
    said = refused((folder, options), "--init", folder / "half/projector.safetensors", "--out", "other")
    assert "not finished; name a copy of a checkpoint" in said


def test_what_instruct_lacks_is_told_before_align_is_trained(world, tmp_path):
    both = *world[1], "--out", tmp_path / "both"
    said = how_it_ends(train.main, world[0], *both, "--data_fraction", "1.5")
    assert said == "train.py: --data_fraction is 1.5; it must be above 0 and at most 1"
    records = world[0] / "data/toy/instruct.json"
    records.rename(tmp_path / "kept")
    try:
        said = how_it_ends(train.main, world[0], *both)
        assert said.startswith("train.py: data/toy/instruct.json: no such file. Name a LLaVA JSON")
    finally:
        (tmp_path / "kept").rename(records)
    assert not (tmp_path / "both").exists()


def test_instruct_refuses_what_does_not_fit(world, tmp_path):
    instruct = [*world[1], "--stage", "instruct", "--init"]
    missing = how_it_ends(train.main, world[0], *instruct, tmp_path / "none")
    assert f"{tmp_path}/none: no such folder" in missing
    missing = how_it_ends(train.main, tmp_path, *world[1], "--stage", "instruct")
    assert "no align run to start from" in missing
    trained(world, "--stage", "align", "--steps", "2", "--projector", "linear", "--out", tmp_path / "linear")
    other = [*instruct, tmp_path / "linear", "--projector", "mlp2x_gelu"]
    other = how_it_ends(train.main, world[0], *other)
    assert f"--projector mlp2x_gelu: {tmp_path}/linear has 'linear', which is taken" in other


# ---- the data ----------------------------------------------------------------------------------------------


def test_the_toy_world_is_written_where_it_is_missing(world, tmp_path, monkeypatch):
    """By a command of its own, which finds the project from any folder, and our packages as we do."""
    started = []

    def run(command, cwd):
        started.append((command[1:], cwd))
        toy_world.write_world(command[-1], align=8, instruct=8, text=1, test=4)

    monkeypatch.setattr(options, "subprocess", SimpleNamespace(run=run))  # not that which asks git
    for _ in range(2):
        trained((tmp_path, world[1]), "--stage", "align", "--steps", "2")
    assert started == [(["-m", "lab.toy_world", tmp_path / "data/toy"], ROOT)]


def test_missing_data_names_data_set_and_ways_on(tmp_path):
    last = how_it_ends(train.main, tmp_path, "--preset", "7b", "--stage", "align")
    for part in ("blip_laion_cc_sbu_558k.json", "liuhaotian/LLaVA-Pretrain", "--dry_run", "--preset tiny"):
        assert part in last


def test_both_stages_do_not_share_a_list_and_need_no_questions(world, tmp_path):
    end = how_it_ends(train.main, world[0], *world[1], "--annotations", "x.json")
    assert end == "train.py: --annotations is of one stage: first --stage align, then --stage instruct"
    end = how_it_ends(train.main, world[0], *world[1], "--init", tmp_path)
    assert end == "train.py: --init is of one stage: first --stage align, then --stage instruct"
    printed = trained(world, "--out", tmp_path / "r", "--steps", "2", "--benchmarks", tmp_path)
    assert f"{tmp_path}/ScienceQA: not there (see --benchmarks), so the runs are not scored" in printed


# ---- what cannot be ----------------------------------------------------------------------------------------


BAD_INPUT = [
    (["--batch", "7", "--micro_batch", "2"], "batch of 7 does not divide"),
    (["--vit", "no/such-tower"], "no/such-tower"),
    (["--images", "/"], "/: 24 pictures are missing, such as align-00000.png"),
    (["--images", "/nowhere"], "/nowhere: no such folder; --images names that of the pictures"),
    (["--data_fraction", "0"], "--data_fraction is 0"),
    (["--steps", "-5"], "--steps is -5; it must be a number from 0 up"),
    (["--lr", "nan"], "--lr is nan"),
    (["--batch", "0"], "--batch, --micro_batch, --epochs and --lr must be above 0"),
    (["--lr", "0"], "--lr must be above 0"),
    (["--template", "v1", "--contrastive", "none", "--annotations", "data/toy/text.json"], "no record has"),
    (["--contrastive_balance", "-1"], "--contrastive_balance is -1.0; it must be a number from 0 up"),
    (["--contrastive", "none", "--contrastive_balance", "1"], "nothing to balance with --contrastive none"),
    (["--contrastive", "prompt", "--contrastive_first", "5"], "--contrastive_first needs the patch loss"),
    (["--contrastive", "prompt", "--template", "v1"], "need --template plain"),
    (["--contrastive", "prompt", "--prompt", "none", "--template", "v1"], "need --template plain"),
    (["--contrastive", "none", "--prompt", "describe", "--template", "v1"], "need --template plain"),
    (["--prompt", "So:"], "--prompt 'So:': not none, one-word, compress, describe, nor 'text | text'"),
    (["--prompt", "a | b | c"], "nor 'text | text'"),
    (["--template", "v1", "--annotations", "data/toy/instruct.json"], "is not an image with one caption"),
]


@pytest.mark.parametrize("args, message", BAD_INPUT, ids=lambda value: " ".join(value) if value else "")
def test_bad_input_ends_in_one_line(world, tmp_path, args, message):
    last = how_it_ends(train.main, world[0], *world[1], "--stage", "align", *args, "--out", tmp_path / "out")
    assert last.startswith("train.py: ") and re.search(message, last) and "\n" not in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--contrastive", "prompted"], ["--template", "v2"]])
def test_an_unknown_choice_ends_the_program(world, tmp_path, args, capsys):
    assert how_it_ends(train.main, world[0], *world[1], "--stage", "align", *args) == "2"
    assert f"invalid choice: '{args[1]}'" in capsys.readouterr().err.splitlines()[-1]


def test_bad_input_ends_the_process_in_one_line(world, tmp_path):
    """The rest of bad input is tested above, in this process."""
    run = script(world, "--stage", "align", "--annotations", "none.json", "--out", tmp_path, check=False)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "none.json: no such file" in run.stderr.strip().splitlines()[-1] and not list(tmp_path.iterdir())


def test_the_recipe_of_7b_is_that_of_llava():
    """arXiv 2310.03744, table 9."""
    for stage, batch, lr in (("align", 256, 1e-3), ("instruct", 128, 2e-5)):
        config = options.configure(stage, {"preset": "7b"})
        assert (config.batch, config.lr, config.warmup_ratio, config.weight_decay) == (batch, lr, 0.03, 0.0)
        assert (config.epochs, config.max_length, config.projector) == (1.0, 2048, "mlp2x_gelu")
        assert (config.template, config.fit) == (("plain", "crop") if stage == "align" else ("v1", "pad"))
