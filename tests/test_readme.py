"""What the READMEs say is true, and the seven files keep their size."""

import ast
import math
import re
import shlex

import bench_step
import pytest
import torch
from conftest import ROOT
from exercise import EXERCISES

import eval as evaluation
from running import costs, options, order, plan, watch
from running.options import Config

FILES = ("vit.py", "llm.py", "projector.py", "losses.py", "data.py", "train.py", "eval.py")
FOLDERS = ("plumbing", "running", "benchmarks", "lab", "tests")
PAGES = {}
for folder in (".", *FOLDERS):
    PAGES |= {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob(f"{folder}/*.md"))}
README, RUNNING = PAGES["README.md"], PAGES["running/README.md"]
CODE = [*FILES]
for folder in FOLDERS:
    CODE += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/*.py"))


# ---- how long ---------------------------------------------------------------------------------------------


def test_the_seven_files_are_an_hour_of_reading():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in FILES}
    assert sum(lines.values()) <= 2900 and max(lines.values()) <= 780, lines


def test_the_readme_has_180_lines_and_all_are_120_columns_wide():
    assert len(README.splitlines()) <= 180 and len(RUNNING.splitlines()) <= 135
    for text in PAGES.values():
        assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", [name for name in CODE if not name.startswith("tests")])
def test_no_function_is_longer_than_a_page(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("name", CODE)
def test_no_line_is_wider_than_110_columns(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 110] == []


def test_no_other_code_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(FILES)


# ---- what is named exists ---------------------------------------------------------------------------------


def test_every_test_that_a_readme_names_exists():
    written = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for text in PAGES.values():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in written, name


def test_ten_stops_name_a_test_each():
    named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", README)
    assert len(named) == len(re.findall(r"^\d+\. \*\*", README, re.M)) == 10
    assert [name for name in EXERCISES if f"`{name}`" not in README] == []
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_that_a_page_links_exists(page):
    for target in re.findall(r"\]\(([^):]+)\)", PAGES[page]):
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("stop", re.findall(r"\(`([\w/]+\.py): ([^`]+)`\)", README), ids=" ".join)
def test_every_stop_of_the_walk_through_is_there(stop):
    file, names = stop
    source = (ROOT / file).read_text()
    for name in names.split(", "):
        assert f" {name.rpartition('.')[2]}(" in source, name


def commands(text: str) -> list:
    """[the words of a command] of those in backticks and those that are a line; comments are left out."""
    text = text.replace("\\\n", " ").replace("$ALL", "--stage align").replace('python -c "\n', "")
    found = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    found += re.findall(r"^ *((?:python|torchrun) .+)$", text, re.M)
    return [shlex.split(command, comments=True) for command in found]


COMMANDS = [words for text in PAGES.values() for words in commands(text) if words[1] != "-c"]
OF_TORCHRUN = ("--nproc_per_node", "--nnodes", "--rdzv", "--max-restarts")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_that_a_readme_names_can_be_called(words, tmp_path, monkeypatch):
    """The program is there and knows the options; train.py and eval.py take the whole line."""
    monkeypatch.chdir(tmp_path)  # the runs that lie here are not those of the commands
    words = [word for word in words[1:] if not word.startswith(OF_TORCHRUN)]
    if not words or "--help" in words or "NAME" in words:
        return
    if words[0] == "-m":
        words = words[1:]
    program, *given = words
    if "|" in given:
        given = given[: given.index("|")]
    if program == "pytest":
        return
    file = program if program.endswith(".py") else f"{program.replace('.', '/')}.py"
    if program == "train.py":
        given = options.parse_args(given)
        for stage in [given["stage"]] if "stage" in given else ["align", "instruct"]:
            options.configure(stage, {name: value for name, value in given.items() if name != "init"})
    elif program == "eval.py":
        evaluation.parse_args(given)
    else:
        source = (ROOT / file).read_text()
        passed_on = set()
        if program in ("lab.compare", "running.plan"):  # they take train.py's options, too
            passed_on = {f"--{name}" for name in Config.__dataclass_fields__}
        flags = {option for option in given if option.startswith("--")}
        assert all(f'"{flag}"' in source for flag in flags - passed_on)


def test_the_commands_that_are_run_as_they_stand_are_four():
    """.ci/run takes every line that begins like this."""
    assert re.findall(r"^(?:pip install|torchrun|python).*", README, re.M) == [
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements.txt && python -m pytest -q",
        "torchrun --nproc_per_node=8 train.py --stage align",
        "python eval.py --bench scienceqa"]


# ---- what is quoted is so ---------------------------------------------------------------------------------


def test_the_plan_in_the_readme_is_what_a_run_prints(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = options.configure("align", {"preset": "tiny"})
    plan.print_plan(config, costs.outline(config, by_name=False), torch.float32, 750, (64, 45), 1, 23.5)
    printed = [line for line in capsys.readouterr().out.split("\n") if line]
    assert f"    {printed[0]}\n" in README
    vocabulary = costs.outline(config, by_name=False).llm.config.vocab_size
    assert f"(uniform {math.log(vocabulary):.2f})" in RUNNING


@pytest.mark.parametrize("preset", ["small", "speedrun", "7b", "13b"])
def test_the_hours_are_those_of_the_arithmetic(preset):
    hours = bench_step.cost(preset).split("|")[-2].strip()
    assert f"`{preset}` {hours}" in README.replace("\n", " ")


@pytest.mark.parametrize("preset, world", [("small", 1), ("speedrun", 1), ("7b", 8), ("13b", 8)])
def test_the_memory_of_a_preset_is_that_of_its_plan(preset, world):
    sums = []
    for stage in ("align", "instruct"):
        config = options.configure(stage, {"preset": preset})
        vlm = costs.outline(config)
        largest = order.largest_micro_batch(*plan.typical_step(config, vlm, world))
        sums.append(sum(plan.memory_parts(config, vlm, torch.bfloat16, *largest, world).values()))
    assert f"`{preset}` {sums[0]:.1f} and {sums[1]:.1f}" in RUNNING.replace("\n", " ")


def test_the_results_are_those_of_the_laboratory():
    names = {"generative": "generative",
             "+ patch (CG-VLM)": "+ patch",
             "+ prompt (our Ak et al.)": "+ prompt",
             "patch at a held ratio of 0.3 (ours)": "ratio 0.3 of the gradients held",
             "patch first, then generative (ours)": "first: patch, then generative"}
    row = r"^\| ([^|]+) ((?:\| \d\d\.\d ± \d\.\d ){3}\| \d\.\d\d ± \d\.\d\d)"
    rows = re.findall(row, README, re.M)
    assert [name for name, _ in rows] == [*names]
    for name, figures in rows:
        assert f"\n| {names[name]} {figures}" in PAGES["lab/toy.md"], name


def test_the_table_of_the_log_has_every_key():
    sums = dict.fromkeys(["generative", "patch", "patch_retrieval", "generative_square", "patch_square",
                          "patch_product"], 1.0)
    line = watch.figures(sums, {"patch": 1.0}, 1.0, 64)
    by_train_step = ["patch_scale", "lr", "grad_norm", "tokens", "ms", "wait_ms", "memory_mib"]
    by_train_step += ["time", "seconds"]
    by_held_out = ["val_generative", "val_patch", "val_patch_retrieval"]
    table = RUNNING.split("## The log")[1].split("## ")[0]
    keys = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|.*\|", table, re.M))))
    assert keys == {*line, *by_train_step, *by_held_out, "prompt"}


def test_every_message_of_the_table_is_in_the_code():
    files = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if path.parent.name != "tests"]
    sources = "".join(path.read_text() for path in [*files, ROOT / "tests/bench_step.py"])
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # a text may be written in two parts
    table = RUNNING.split("## Messages and cures")[1].split("## ")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.M):
        for message in re.findall(r"`([^`]+)`", cell):
            for part in re.split(r" ?\.\. ?|records|'x'|rank 0's|rank 1", message):
                assert part in sources, message
