"""The laboratory: the toy world is the one it was, the towers are as good as lab/toy.md says, a comparison
resumes and reports."""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageChops

import data
import eval as evaluation
import losses
import train
from benchmarks import scienceqa
from benchmarks.questions import SHORT_ANSWER
from lab import (answers, compare, exposure, house, pretrain, report, sample, score, spaces,
                 tables, toy_world, words)
from llm import LLM
from projector import VLM
from plumbing.tokenizer import load_tokenizer
from running.records import read_records
from vit import ViT

TOWERS = ROOT / "lab/towers"
SIZES = dict(align=40, instruct=40, text=10, test=8)  # of this file's toy world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "toy"
    toy_world.write_world(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_world.write_tokenizer(folder)
    return load_tokenizer(folder)


# ---- the toy world -----------------------------------------------------------------------------------------


def digests(folder):
    """{relative name: sha256} of all files below the folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_world_is_the_one_it_was(tmp_path):
    """Every byte of world and tokenizer: the figures of lab/toy.md were measured on them."""
    sizes = dict(align=8, instruct=12, text=4, test=8)
    folder, digest = tmp_path / "toy", hashlib.sha256()
    toy_world.write_world(folder, **sizes)
    toy_world.write_tokenizer(tmp_path)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digest.update((tmp_path / name).read_bytes())
    assert digest.hexdigest() == "6fa09ff29dc8544cd4a270ab4abc95c38b8f147cfcc7c36848089375e8ee1eac"
    toy_world.write_world(tmp_path / "other", seed=1, **sizes)
    assert digests(tmp_path / "other") != digests(folder)


def test_reworded_questions_are_new_and_in_known_words(world, tokenizer):
    assert len(tokenizer) == toy_world.VOCABULARY
    seen = (world / "instruct.json").read_text() + (world / "text.json").read_text()
    problems, reworded = (json.loads((world / name / "problems.json").read_text())
                          for name in ("ScienceQA", "ScienceQA-reworded"))
    for pid, problem in reworded.items():
        assert problem["question"] not in seen and problem["question"] != problems[pid]["question"]
        assert tokenizer.unk_token_id not in tokenizer(problem["question"]).input_ids
        assert problem | {"question": ""} == problems[pid] | {"question": ""}
    assert len(scienceqa.load(world / "ScienceQA-reworded")) == 8


def test_a_complete_world_stays_and_anything_else_is_in_the_way(world, tmp_path, monkeypatch, capsys):
    before = digests(world)
    monkeypatch.setattr(sys, "argv", ["toy_world", str(world), "--seed", "1"])
    toy_world.main()
    assert "stays as it is" in capsys.readouterr().out and digests(world) == before
    (tmp_path / "text.json").touch()
    monkeypatch.setattr(sys, "argv", ["toy_world", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^lab.toy_world: {tmp_path}: is no complete world; .*$"):
        toy_world.main()
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.json"]


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_world, "write_scienceqa", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy_world.write_world(tmp_path / "toy", **SIZES)
    assert not list(tmp_path.iterdir())


def test_of_two_writers_the_slower_one_gives_way(world, tmp_path, monkeypatch):
    write_files = toy_world.write_files

    def overtaken(building, *args):
        write_files(building, *args)
        shutil.copytree(world, tmp_path / "toy")  # what another process has just finished

    monkeypatch.setattr(toy_world, "write_files", overtaken)
    toy_world.write_world(tmp_path / "toy", **SIZES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy"]
    assert digests(tmp_path / "toy") == digests(world)


def test_splits_are_disjoint():
    splits = [{tuple(scene.values()) for scene in scenes} for scenes in toy_world.scenes().values()]
    assert [len(split) for split in splits] == [304, 40, 40] and len(set.union(*splits)) == 384


def test_instructions_hold_no_multiple_choice(world):
    text = (world / "instruct.json").read_text()
    assert "A. " not in text and "The answer is" not in text and SHORT_ANSWER.strip() in text
    records = read_records(world / "instruct.json")
    assert sum("image" not in record for record in records) == len(records) // 10


def test_files_hold_valid_records(world):
    for name in ("align", "instruct", "text", "captions"):
        for record in read_records(world / f"{name}.json"):  # which refuses others
            assert "image" not in record or (world / "images" / record["image"]).is_file()


def test_an_answer_is_the_choice_and_its_letter():
    problem = toy_world.problem(toy_world.scenes()["val"][0], "color", random.Random(0), "", None)
    choice, letter = problem["choices"][problem["answer"]], "ABCDE"[problem["answer"]]
    assert toy_world.problem_answer(problem) == f"{choice}. The answer is {letter}."


def test_a_problem_without_image_tells_the_answer_in_its_hint(world):
    problems = json.loads((world / "ScienceQA/problems.json").read_text())
    told = [problem for problem in problems.values() if problem["image"] is None]
    assert len(told) == len(problems) // 4
    for problem in told:
        assert problem["choices"][problem["answer"]] in problem["hint"].replace(",", "").split()


# ---- the tiny towers ---------------------------------------------------------------------------------------


def test_a_few_steps_of_each_tower(tmp_path):
    pretrain.pretrain_llm(tmp_path / "tiny-llm-wide", 0, most=2, steps=(2, 2, 2), batch=4)
    assert LLM.from_pretrained(tmp_path / "tiny-llm-wide").config.hidden_size == 192
    toy_world.write_tokenizer(tmp_path / "tiny-llm")
    for sees_text in (True, False):
        pretrain.pretrain_vit(tmp_path / "tiny-vit", 0, sees_text, steps=2, batch=4)
        assert ViT.from_pretrained(tmp_path / "tiny-vit")(torch.zeros(1, 3, 48, 48)).isfinite().all()


@pytest.fixture(scope="module")
def kept_vlm():
    return VLM.from_towers(TOWERS / "tiny-vit", TOWERS / "tiny-llm", "linear").eval()


@pytest.mark.parametrize("form", ["choice", "yes_no"])
def test_the_kept_llm_answers_about_scenes_told_in_words(kept_vlm, form):
    """About unseen scenes; 99.75 and 100 % of 400 questions, here of 100."""
    accuracy = pretrain.text_accuracy(kept_vlm, load_tokenizer(TOWERS / "tiny-llm"), form, count=100)
    print(form, accuracy)
    assert accuracy >= 97


@pytest.mark.parametrize("name, least", [("tiny-vit", 97), ("tiny-vit-no-text", 92)])
def test_the_kept_encoders_know_what_a_picture_shows(name, least):
    """Linear probes on unseen scenes; 98.4 and 94.3 % in lab/toy.md, with as many pictures."""
    assert pretrain.linear_probe(ViT.from_pretrained(TOWERS / name), random.Random(1)) > least


@pytest.mark.parametrize("place, patch", [("northwest", 7), ("southeast", 28)])
def test_the_patches_of_a_shape_lie_where_it_is(place, patch):
    """Of the 6 x 6 patches in reading order, those around the shape's centre and none at the far edge."""
    scene = {"color": "red", "shape": "square", "size": "large", "place": place}
    found = words.shape_patches(toy_world.picture(scene, random.Random(0)), scene, patch_size=8)
    rows = found.view(6, 6).any(1).tolist()
    assert found[patch] and rows[0 if place == "southeast" else 5] is False and 9 <= found.sum() <= 16


# ---- comparing the losses ----------------------------------------------------------------------------------


def comparison(out, world, folders, recipes, **changes):
    """A comparison in miniature, as lab.compare calls it."""
    size = compare.SIZES["quick"]._replace(recipes=recipes, seeds=1, steps=2, epochs=2.5, lr=(1e-3,),
                                           brief=False)
    given = {"vit": str(folders[0]), "llm": str(folders[1]), "batch": 8, "micro_batch": 8,
             "prompt": "describe", "template": "v1"}  # only one stage has each of the last two
    return compare.Setting(size._replace(**changes), Path(out), world, given)


@pytest.fixture
def trained(monkeypatch):
    """The folders of the runs that are trained, as they come."""
    folders, train_stage = [], train.train_stage

    def counted(config, device):
        folders.append(Path(config.out).name)
        train_stage(config, device)

    monkeypatch.setattr(train, "train_stage", counted)
    return folders


def test_a_comparison_resumes_and_reports(world, clip_folder, llama_folder, tmp_path, monkeypatch, trained):
    """Every cell is there, and a second call trains the one cell that was lost."""
    monkeypatch.chdir(tmp_path)
    towers = clip_folder, llama_folder
    recipes = ("none", "patch", "both", "ratio 0.3", "first, ratio 0.1", "first, permuted words")
    setting = comparison("c", world, towers, recipes, lr=(1e-3, 2e-3))
    text = compare.compare(setting)
    results = json.loads(Path("c/results.json").read_text())
    assert len(results["cells"]) == 6 * (1 + 2)
    assert {"accuracy_img", "pope", "mme", "reworded", "caption", "r5"} <= results["cells"][0].keys()
    assert {"0% over generative 100%", "10% over generative 100%"} == results["ratio"]["+ patch"].keys()
    contrast = [name for name in trained if name == "run"]  # on other words, for each rate and seed
    assert len(contrast) == 3  # two rates are tried for each recipe, and the better one measured
    assert len(trained) == len(set(trained)) + 2 == 3 + 6 * 2 + len(results["cells"])
    assert Path("c/accuracy_by_data.png").exists() and "| + both |" in text and "## Gain over" in text
    assert not list(Path("c/runs").glob("*instruct*")) and not Path("runs/last").exists()
    for run, loss in (("none", "none"), ("both", "both"), ("ratio-0.3", "patch")):
        config = json.loads(next(Path("c/runs").glob(f"{run}-2-seed0-*/config.json")).read_text())
        assert config["contrastive"] == loss
    log = next(Path("c/runs").glob("first-ratio-0.1-2-seed0-*/log.jsonl")).read_text().splitlines()
    assert len(log) == 2 + 2 and "generative" not in log[1] and "patch_ratio" in log[2]
    start = next(Path("c/runs").glob("contrast-permuted-2-seed0-*"))
    assert json.loads((start / "config.json").read_text())["llm"] == str(llama_folder)
    permuted = [cell for cell in results["cells"] if cell["loss"] == "first, permuted words"]
    assert "wrong_before" in permuted[0] and report.SCORES["wrong_before"] in text

    cells = Path("c/cells.jsonl").read_text().splitlines(True)
    lost = next(line for line in cells if "instruct1.0" in line and " test" in line)
    Path("c/cells.jsonl").write_text("".join(line for line in cells if line != lost))
    trained.clear()
    again = compare.compare(setting)
    assert len(trained) == 1 and without_seconds(again) == without_seconds(text)

    Path("c/cells.jsonl").write_text("".join(cells) + cells[0][:20])
    with pytest.raises(ValueError, match="c/cells.jsonl: a damaged line"):
        compare.compare(setting)
    with pytest.raises(ValueError, match="other options, towers or data"):
        compare.compare(setting._replace(given=setting.given | {"clip": 2.0}))


def without_seconds(text):
    return text[: text.index("## seconds")] + text[text.index("\nratio {") :]


def test_a_weight_is_tuned_and_a_ratio_is_not(world, tmp_path, monkeypatch):
    """Each rate is tried with the first weight, then the other weights with the best rate; a part of one is
    not run. What validates best is taken."""
    tried = []

    def scored(setting, stage, split, options):
        tried.append(options)
        return {"accuracy_img": options["lr"] + options.get("contrastive_weight", 0)}

    monkeypatch.setattr(compare, "cell", scored)
    setting = comparison(tmp_path, world, ("", ""), (), tune=True, lr=(1e-3, 2e-3), instruct_lr=(1e-4, 2e-4))
    best = compare.tune(setting, "patch")
    assert best == {"lr": 2e-3, "weight": 10.0, "instruct_lr": 2e-4} and len(tried) == 2 + 5 + 2 * 2
    tried.clear()
    best = compare.tune(setting._replace(size=setting.size._replace(instruct_lr=(1e-4,))), "ratio 0.3")
    assert best == {"lr": 2e-3, "weight": None, "instruct_lr": 1e-4} and len(tried) == 2


def test_parts_and_any_number_of_jobs_measure_the_same(world, clip_folder, llama_folder, tmp_path, trained):
    """Also a part without the generative loss, with which there is nothing to compare. A part adds its
    recipes and seeds to what is there."""
    towers = clip_folder, llama_folder
    text = compare.compare(comparison(tmp_path / "a", world, towers, ("patch",)))
    assert "| + patch |" in text and "Gain" not in text and text.endswith("ratio {}")
    text = compare.compare(comparison(tmp_path / "a", world, towers, ("none",)))
    assert "| + patch |" in text and "| generative |" in text and "Gain over the generative loss" in text
    whole = comparison(tmp_path / "b", world, towers, ("none", "patch"))
    assert without_seconds(compare.compare(whole, jobs=2)) == without_seconds(text)
    trained.clear()
    more = comparison(tmp_path / "a", world, towers, ("none",), seeds=2)
    more = more._replace(size=more.size._replace(fractions=()))
    text = compare.compare(more)
    assert len(trained) == 1 and "seed1" in trained[0]  # align alone, and no column is lost
    assert "| recipe | 0% | 10% | 100% |" in text
    trained.clear()
    compare.compare(comparison(tmp_path / "a", world, towers, ("none",), seeds=2))
    assert len(trained) == 2 and all("seed1" in name for name in trained)


def test_a_comparison_has_one_thread_for_each_process(monkeypatch, tmp_path, capsys):
    """torch takes all cores where nobody says otherwise: several jobs would fight for them."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["lab.compare", "--world", str(tmp_path)])
    said = lambda *_: (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])  # noqa: E731
    monkeypatch.setattr(compare, "compare", said)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    compare.main()
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == "(1, '1')\n"


@pytest.mark.parametrize("argv, fractions", [
    ([], (0.1, 1.0)), (["--fractions"], ()), (["--fractions", "0.1", "0.5"], (0.1, 0.5))])
def test_parts_of_the_instruction_data_are_the_sizes_or_those_asked_for(argv, fractions, monkeypatch,
                                                                        tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["lab.compare", "--size", "claims", "--world", str(tmp_path), *argv])
    monkeypatch.setattr(compare, "compare", lambda setting, jobs: setting.size.fractions)
    threads = torch.get_num_threads()
    compare.main()
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == f"{fractions}\n"


def test_unknown_options_end_a_comparison(capsys):
    for argv in (["--learning_rate", "1"], ["--qui"], ["--clip", "hard"], ["--seed_count", "3"]):
        with pytest.raises(SystemExit) as end:
            compare.parse_args(argv)
        assert end.value.code == 2 and argv[0] in capsys.readouterr().err
    ours, given = compare.parse_args(["--clip", "2", "--out", "c", "--quick", "--projector", "linear"])
    assert (ours.out, ours.size, given) == (Path("c"), "quick", {"clip": 2.0, "projector": "linear"})


@pytest.mark.parametrize("argv, ranks, message", [
    (["--lr", "1"], "1", "the comparison sets --lr itself"),
    (["--seeds", "0"], "1", "--seeds is 0; at least one is needed"),
    ([], "2", "the runs come one after another in --jobs processes, not on several ranks"),
    (["--fractions", "0.1", "10"], "1", "--fractions: parts are above 0 and at most 1"),
    (["--jobs", "0"], "1", "--jobs is 0; at least one process has to do the work")])
def test_a_comparison_that_cannot_run_is_refused(argv, ranks, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lab.compare", *argv])
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == f"lab.compare: {message}" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", [
    (["--steps", "60", "0"], "--steps must be at least 1"),
    (["--seeds", "0"], "--seeds is 0; at least one is needed"),
    (["--size", "emoji-words"],
     "data/emoji: no such world; `python -m lab.emoji_world data/emoji` makes it")])
def test_curves_that_cannot_be_drawn_are_refused(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        exposure.main(argv)
    assert end.value.code == f"lab.exposure: {message}" and not list(tmp_path.iterdir())


def test_the_command_refuses_in_one_line(tmp_path):
    """As people run it: as a module, from any folder that Python finds the project from."""
    run = subprocess.run([sys.executable, "-m", "lab.compare", "--size", "emoji"], cwd=tmp_path, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
    message = "lab.compare: data/emoji: no such world; `python -m lab.emoji_world data/emoji` makes it\n"
    assert run.returncode == 1 and run.stdout == "" and run.stderr == message
    assert not list(tmp_path.iterdir())


def test_held_out_captions_one_at_a_time(world, clip_folder, llama_folder):
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), load_tokenizer(llama_folder)
    found = score.captions(vlm, tokenizer, world)
    samples = data.Conversations(read_records(world / "captions.json"), world / "images", tokenizer,
                                 "plain", vlm.vit.config, "crop")
    nats = tokens = 0
    for i in range(len(samples)):
        m = data.collate([samples[i]], 16, vlm.image_token_id, 0, 32)
        logits = vlm(m["ids"], m["pixels"])[0, :-1]
        said = m["labels"][0, 1:] != data.IGNORE
        nats += F.cross_entropy(logits[said], m["labels"][0, 1:][said], reduction="sum").item()
        tokens += int(said.sum())
    assert found["caption"] == pytest.approx(nats / tokens, abs=1e-3)
    assert 0 <= found["r1"] <= found["r5"] <= 100


def test_a_run_is_scored_with_one_look_at_a_picture(world, clip_folder, llama_folder, tmp_path, monkeypatch):
    """And what is right of each scene stands beside what is right of all."""
    VLM.from_towers(clip_folder, llama_folder, "linear").save(tmp_path, {"stage": "align"}, False)
    looked, look = [], ViT.forward
    monkeypatch.setattr(score, "SEEN", {})
    monkeypatch.setattr(ViT, "forward", lambda vit, x: (looked.append(len(x)), look(vit, x))[1])
    device = torch.device("cpu")
    found = score.score_run(tmp_path, world, "test", device)
    pictures = sum(looked)
    assert found == score.score_run(tmp_path, world, "test", device) and sum(looked) == pictures
    assert score.score_run(tmp_path, world, "test", device, brief=True).items() <= found.items()
    assert found["right"] == score.cosines(tmp_path, world, device)["right"]
    problems = json.loads((world / "ScienceQA/problems.json").read_text())
    asked = [problem for problem in problems.values() if problem["split"] == "test" and problem["image"]]
    each = found["accuracy_img_each"]
    assert len(each) == len({problem["scene"] for problem in asked})
    assert sum(each) / len(each) == pytest.approx(found["accuracy_img"], abs=0.01)


def test_things_of_unlike_many_questions_have_the_mean_of_all_and_its_error(tmp_path):
    """Twelve questions about three groups: by the formula of clusters."""
    groups = list("aaaaaaabbbcc")
    right = [True, True, True, True, True, False, True, False, False, True, False, False]
    concepts = [{"name": str(number), "group": group} for number, group in enumerate(groups)]
    problems = {concept["name"]: {"concept": concept["name"]} for concept in concepts}
    (tmp_path / "ScienceQA").mkdir()
    (tmp_path / "ScienceQA/problems.json").write_text(json.dumps(problems))
    (tmp_path / "concepts.json").write_text(json.dumps({"unseen": concepts}))
    questions = [{"id": pid} for pid in problems]
    each = score.of_each_thing(tmp_path / "ScienceQA", questions, right, "x")["x_each"]
    mean = 100 * sum(right) / 12
    assert sum(each) / 3 == pytest.approx(mean, abs=0.01)
    of_group = {group: [100 * r for g, r in zip(groups, right) if g == group] for group in "abc"}
    squares = [(sum(found) - len(found) * mean) ** 2 for found in of_group.values()]
    error = math.sqrt(3 / 2 * sum(squares)) / 12
    assert torch.tensor(each).std().item() / math.sqrt(3) == pytest.approx(error, rel=1e-3)


def test_cosines_of_pairs_leave_equal_captions_out():
    image, text = torch.eye(3), torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.9, 0.1, 0.0]])
    found = score.cosines_of_pairs(image, text, torch.tensor([4, 5, 4]))
    assert found["right"] == pytest.approx((0.9 + 0.7 + 0) / 3, abs=1e-4)
    assert found["wrong"] == pytest.approx((0.3 + 0.1 + 0.1 + 0) / 4, abs=1e-4)


def test_a_caption_without_its_group():
    said = {"from": "gpt", "value": "family: man, woman, girl, family"}
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, said]}
    assert score.named_alone(record)["conversations"][1]["value"] == "family: man, woman, girl"


def test_the_pointing_game_finds_the_patch_that_is_the_word(clip_folder, llama_folder, tmp_path, monkeypatch):
    """Patches of which one is made the word itself: it is found in each quarter, and nowhere else."""
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), load_tokenizer(llama_folder)
    word = vlm.llm.embed(torch.tensor(tokenizer("red", add_special_tokens=False).input_ids))[0]
    places, records, pictures = {0: 5, 1: 2, 2: 12, 3: 15}, [], {}  # quarter: a patch of 4 x 4 in it
    (tmp_path / "images").mkdir()
    for quarter, patch in places.items():
        Image.new("RGB", (32, 32), (quarter, 0, 0)).save(tmp_path / f"images/{quarter}.png")
        records.append({"image": f"{quarter}.png", "places": {"red": quarter}, "concepts": "unseen"})
        pictures[quarter] = 0.1 * torch.randn(1, 16, 32)
        pictures[quarter][0, patch] = word
    records[0]["places"] = {"red": 3}  # one that is not where it is said to be
    records.append({"image": "none.png", "concepts": "seen"})  # not played
    (tmp_path / "collages.json").write_text(json.dumps(records))
    shown = iter(pictures.values())
    monkeypatch.setattr(VLM, "encode", lambda self, pixels: next(shown))
    assert score.pointing(vlm, tokenizer, tmp_path) == 75.0


# ---- means over seeds --------------------------------------------------------------------------------------


def test_interval_is_students():
    mean, half = report.interval([80.0, 82.0, 84.0, 86.0, 88.0])
    assert mean == 84 and half == pytest.approx(2.776 * math.sqrt(10 / 5), rel=2e-3)  # variance 10, n = 5
    assert report.interval([3.0]) == (3.0, None) and report.interval([1.0, 2.0, 3.0]) == (2.0, None)
    _, half = report.interval([0.0, 2.0] * 20)
    assert half == pytest.approx(2.0227 * math.sqrt(40 / 39 / 40), rel=2e-3)  # Student's t of 39


def test_p_value_counts_the_signs():
    assert report.p_value([1.0, 2.0, 3.0]) == 2 / 8  # only +++ and --- are as far from 0
    assert report.p_value([1.0, -1.0]) == 1 and report.p_value([5.0] * 10) == 2 / 1024


def test_table_and_chart(tmp_path):
    assert report.as_text([50.0, 52.0]) == "50.0 / 52.0" and report.as_text([7.0] * 4) == "7.00 ± 0.00"
    assert report.as_text([7.0, 8.0, 9.0]) == "7.00 / 8.00 / 9.00"
    text = report.table("loss", ["0%", "100%"], {"generative": ["1", "-"]})
    assert text.splitlines() == ["| loss | 0% | 100% |", "|---|---|---|", "| generative | 1 | - |"]
    series = {"generative": [[50.0, 52.0], [60.0]], "+ patch": [[], [70.0, 70.0, 70.0]]}
    report.chart(tmp_path / "c.png", "title", ["0%", "100%"], series)
    image = Image.open(tmp_path / "c.png").convert("RGB")
    colors = {color for _, color in image.getcolors(10**6)}
    assert image.size == (900, 540) and {(0, 114, 178), (213, 94, 0)} <= colors
    red, _, blue = image.getpixel((378, 355))  # between 51 and 60 % on an axis from 50 to 70
    assert red < 60 and blue > 140


def test_gains_and_claims_are_paired_by_seed():
    cells = []
    for loss, values in (("none", {0.1: (40, 60), 1.0: (50, 80)}), ("patch", {0.1: (50, 60), 1.0: (55, 81)})):
        for part, scores in values.items():
            cells += [{"loss": loss, "fraction": part, "accuracy_img": score} for score in scores]
    assert report.gain(cells, "patch", 0.1, "accuracy_img") == "10.00 / 0.00"
    found = report.claims(cells, ["none", "patch"], "accuracy_img")
    assert found["generative"]["10% over generative 100%"] == "0.80 / 0.75"
    assert found["+ patch"] == {"0% over generative 100%": "-", "10% over generative 100%": "1.00 / 0.75"}


def test_other_questions_would_move_the_mean():
    """By as much as the things asked about differ, averaged over the seeds first; paired in a gain."""
    ours, theirs = [[50.0, 70, 90, 30], [70.0, 90, 70, 50]], [[40.0, 60, 80, 20], [60.0, 80, 60, 40]]
    mean_of_things = [60.0, 80, 80, 40]
    assert report.over_things(ours) == f" (± {report.interval(mean_of_things)[1]:.1f})"
    cells = []
    for loss, each in (("none", theirs), ("patch", ours)):
        cells += [{"loss": loss, "fraction": 0, "pope": sum(row) / 4, "pope_each": row} for row in each]
    assert report.gain(cells, "patch", 0, "pope") == "10.0 / 10.0 (± 0.0)"
    assert report.over_things([]) == "" and "p " not in report.gain(cells, "patch", 0, "pope")
    of_four = report.gain(2 * cells, "patch", 0, "pope")
    assert of_four == "10.0 ± 0.0 (± 0.0) (p 0.12)"  # 2 of 2^4 choices of signs


# ---- is it the words, is it exposure? ----------------------------------------------------------------------


@pytest.mark.parametrize("table", tables.TABLES)
def test_another_word_table(table, llama_folder, world, tmp_path):
    """Of the captions' tokens alone. Permuted: the same vectors, none in its place. Random: as long."""
    records = read_records(world / "align.json", "align")
    tables.write_other(llama_folder, records, table, 0, tmp_path / "llm")
    tokens = tables.caption_tokens(records, load_tokenizer(tmp_path / "llm"))
    old, new = (LLM.from_pretrained(folder).model.embed_tokens.weight
                for folder in (llama_folder, tmp_path / "llm"))
    others = torch.ones(len(old), dtype=torch.bool).index_fill(0, tokens, False)
    assert torch.equal(old[others], new[others]) and 10 < len(tokens) < len(old)
    was, is_now = old[tokens], new[tokens]
    if table == "own":
        assert torch.equal(was, is_now)
        return
    assert not (was == is_now).all(1).any()
    torch.testing.assert_close(was.norm(dim=1).sort().values, is_now.norm(dim=1).sort().values)
    is_permuted = sorted(map(tuple, was.tolist())) == sorted(map(tuple, is_now.tolist()))
    assert is_permuted == (table == "permuted")


def test_steps_that_captioning_alone_would_need():
    curve = {30: 60.0, 60: 70.0, 120: 68.0, 240: 80.0}
    assert exposure.steps_needed(curve, 65.0) == pytest.approx(30 * 2**0.5)
    assert exposure.steps_needed(curve, 59.0) == 0 and exposure.steps_needed(curve, 81.0) == math.inf
    assert exposure.steps_needed(curve, 74.0) == pytest.approx(120 * 2**0.5)


def test_the_lead_by_captioning_steps(tmp_path):
    cells = []
    for recipe, values in (("none", {30: 60, 60: 80}), ("first, own words", {30: 70, 60: 90})):
        for steps, right in values.items():
            cells += 2 * [{"loss": recipe, "steps": steps, "accuracy_img": right, "caption": 1 / steps}]
    curves = exposure.SIZES["words"]
    rows = exposure.as_table(cells, curves.scores).splitlines()
    assert rows[2].startswith("| 30 | 60.0 / 60.0 | 70.0 / 70.0 | 10.0 / 10.0 | 42 |")
    assert "| more than 60 |" in rows[3]
    exposure.chart(tmp_path / "e.png", cells, curves)
    image = Image.open(tmp_path / "e.png").convert("RGB")
    colors = {color for _, color in image.getcolors(10**6)}
    assert image.size == (900, 700) and {(0, 114, 178), (213, 94, 0)} <= colors


# ---- where pictures and words lie; the sheet of answers
# ------------------------------------------------------------------------------------------------------------


def test_gap_against_plain_formulas():
    image, text = losses.unit(torch.randn(6, 4)), torch.randn(6, 4)
    tokens = [(torch.randn(16, 4), torch.randn(3, 4)), (torch.randn(16, 4), torch.randn(1, 4))]
    scores, t = spaces.score_gap(image, text, tokens), losses.unit(text)
    pairs = [float(image[i] @ t[i]) for i in range(6)]
    largest = []
    for patches, caption in tokens:
        cosines = F.cosine_similarity(patches[:, None], caption[None], dim=-1)  # (N, T)
        largest.append(sum(sorted(cosines.amax(1).tolist())[-10:]) / 10)
    word_norms = torch.cat([caption.norm(dim=-1) for _, caption in tokens])
    patch_norms = torch.cat([patches.norm(dim=-1) for patches, _ in tokens])
    expected = {"centroid_distance": (image.mean(0) - t.mean(0)).norm().item(),
                "positive_cosine": sum(pairs) / 6, "projected_norm": patch_norms.mean().item(),
                "word_norm": word_norms.mean().item(), "tacs": sum(largest) / 2}
    assert scores == pytest.approx(expected, abs=1e-4)


def test_retrieval_counts_equal_captions_once_and_any_of_their_pictures():
    keys = torch.tensor([5, 6, 5, 7])
    text = torch.eye(3)[[0, 1, 0, 2]]
    # the pictures 2 and 3 resemble caption 6 most
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0.8, 0.6]])
    scores = spaces.score_retrieval(image, text, keys)
    assert scores["image_to_text_r1"] == 50.0 and scores["text_to_image_r1"] == 100.0
    assert scores["image_to_text_r5"] == scores["text_to_image_r5"] == 100.0


def test_what_a_prompt_makes_of_captions_equals_a_plain_loop(clip_folder, llama_folder, world):
    """One caption after another through the LLM; the least loss is that of pictures which equal captions."""
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), load_tokenizer(llama_folder)
    records = json.loads((world / "captions.json").read_text())
    states = []
    for record in records:
        ids = tokenizer(record["conversations"][1]["value"] + "\nDescribe the picture.").input_ids
        states.append(vlm.llm.hidden(vlm.llm.embed(torch.tensor([ids])))[0, -1])
    text = losses.unit(torch.stack(states))
    said = [record["conversations"][1]["value"] for record in records]
    others = [[j for j in range(len(said)) if said[j] != said[i]] for i in range(len(said))]
    cosines = [(text[i] @ text[j]).item() for i in range(len(said)) for j in others[i]]
    prompts = data.PROMPTS["describe"]
    found = spaces.score_prompt(vlm, tokenizer, records, world / "images", prompts)
    assert found["others"] == pytest.approx(sum(cosines) / len(cosines), abs=2e-3)
    for name, scale in (("least_loss_at_14", 1 / 0.07), ("least_loss_at_100", 100)):
        least = [math.log(1 + sum(math.exp(((text[i] @ text[j]).item() - 1) * scale) for j in others[i]))
                 for i in range(len(said))]
        assert found[name] == pytest.approx(sum(least) / len(least), abs=2e-3)
    right = 0
    for i, m in enumerate(spaces.micro_batches(vlm, tokenizer, records, world / "images", prompts, batch=1)):
        _, state = losses.caption_pass(vlm, m, vlm.encode(m["pixels"]))
        right += all(state[0] @ text[i] >= state[0] @ text[j] for j in others[i])
    assert found["r1"] == pytest.approx(100 * right / len(said), abs=1e-3)


def test_word_maps_are_cosines_in_reading_order(clip_folder, llama_folder):
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), load_tokenizer(llama_folder)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    maps = spaces.word_maps(vlm, tokenizer, picture, "a red circle")
    assert list(maps) == ["a", "red", "circle"] and maps["a"].shape == (4, 4)
    patches = vlm.encode(data.preprocess(picture, vlm.vit.config, "crop")[None])[0]
    red = vlm.llm.embed(torch.tensor(tokenizer("red", add_special_tokens=False).input_ids))[0]
    assert maps["red"][1, 2] == pytest.approx(F.cosine_similarity(patches[6], red, dim=0).item(), abs=1e-6)


def test_spaces_and_answers_of_a_run(clip_folder, llama_folder, world, tmp_path, capsys):
    """As a user would: gap and heat map of a run directory, its answers, and the picture of them."""
    run = tmp_path / "run"
    VLM.from_towers(clip_folder, llama_folder, "linear").save(run, {"benchmarks": str(world)}, False)
    for measure, key in (("gap", "tacs"), ("retrieval", "image_to_text_r1"), ("prompts", "describe")):
        spaces.main([measure, "--ckpt", str(run)])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed["pairs"] == 8 and key in printed
        assert json.loads((run / f"{measure}.json").read_text()) == printed
    picture = str(next((world / "images").iterdir()))
    spaces.main(["heatmap", picture, "a red circle", "--ckpt", str(run), str(run), "--out",
                 str(tmp_path / "map.png")])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]) == 2
    assert Image.open(tmp_path / "map.png").size == (150 + 4 * 138, 26 + 2 * 158 + 80)
    with pytest.raises(SystemExit, match="lab.answers: .*scienceqa.json: no such file"):
        answers.main([str(run), "scienceqa"])
    evaluation.main(["--bench", "scienceqa", "--ckpt", str(run)])
    answers.main([str(run), "scienceqa"])
    assert Image.open(run / "scienceqa.png").size == (1000, 500)


# ---- pictures for learners ---------------------------------------------------------------------------------


def test_the_sample_shows_what_carries_loss(tmp_path):
    _, tower, tokenizer, row = sample.example()
    learned = [label for label in row["labels"] if label != data.IGNORE]
    assert tokenizer.decode(learned).strip() == "a large yellow cross in the northeast"
    assert row["ids"].count(data.IMAGE_MARKER) == tower.num_patches == 36
    sample.draw(tmp_path / "sample.png")
    assert same_picture(tmp_path / "sample.png", ROOT / "lab/sample.png")


def test_the_map_of_the_house_is_todays(tmp_path):
    found = house.imports()
    assert found["plumbing"] == set() and found["projector"] == {"vit", "llm", "data", "plumbing"}
    assert house.below("lab", found) == found.keys() - {"lab", "tests"}
    house.draw(tmp_path / "house.png")
    assert same_picture(tmp_path / "house.png", ROOT / "lab/house.png"), "python -m lab.house draws it anew"


def same_picture(a, b) -> bool:
    """Whether two pictures are the same but for how a font's edges are drawn."""
    a, b = Image.open(a).convert("L"), Image.open(b).convert("L")
    changed = ImageChops.difference(a, b).point(lambda value: value > 60)
    return a.size == b.size and sum(changed.histogram()[1:]) < 60
