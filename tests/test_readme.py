"""What the README says of the files is true, and the house is as it was designed: who may import what, how
long a function may be, and a line."""

import ast
import re
import shlex

import bench_step
import pytest
import torch
import tour
from conftest import ROOT

import eval as evaluation
import train

README, LAB_README = (ROOT / "README.md").read_text(), (ROOT / "lab/README.md").read_text()
FILES = ("vit.py", "llm.py", "projector.py", "losses.py", "data.py", "train.py", "eval.py")
LAB = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lab/*.py"))
TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*.py"))


@pytest.mark.parametrize("name", FILES)
def test_line_counts(name):
    """Within a tenth: a count that drifts further is a promise that nobody keeps."""
    promised = int(re.search(rf"\| \[{name}\].*\| (\d+) \|", README)[1])
    lines = len((ROOT / name).read_text().splitlines())
    assert abs(lines - promised) <= 0.1 * promised, f"{name} has {lines} lines, the README says {promised}"


def test_every_test_that_the_readme_names_exists():
    written = "".join((ROOT / name).read_text() for name in TESTS)
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in written, name


def test_the_tour_stops_where_the_walk_through_does_and_is_as_long_as_promised():
    promised = int(re.search(r"`python tests/tour.py 1`[^:]*: (\d+) lines", README)[1])
    assert promised == pytest.approx(tour.length(), rel=0.05) and tour.length() < 1000
    for number, (title, _) in tour.STOPS.items():
        assert f"**{number}. {title}**" in README
        for file, name, first, lines in tour.passages(number):
            assert f"{first:5}  {lines[0]}" in tour.text_of(number), (file, name)


def commands(text: str) -> list:
    """[the words of a command] of those in backticks and those that are a line; comments are left out."""
    text = text.replace("\\\n", " ").replace("$ALL", "--stage align").replace('python -c "\n', "")
    found = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    found += re.findall(r"^ *((?:python|torchrun) .+)$", text, re.M)
    return [shlex.split(command, comments=True) for command in found]


COMMANDS = [words for words in commands(README) + commands(LAB_README) if words[1] != "-c"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_that_the_readmes_name_can_be_called(words):
    """The program is there and knows the options; train.py and eval.py take the whole line."""
    if words[-1] in ("--max-restarts", "--help"):
        return  # torchrun's own, and what ends by itself
    _, *options = [word for word in words if not word.startswith("--nproc_per_node")]
    program, options = (options[1], options[2:]) if options[0] == "-m" else (options[0], options[1:])
    if program == "pytest":
        return
    file = ROOT / (program if program.endswith(".py") else f"{program.replace('.', '/')}.py")
    flags = {option for option in options if option.startswith("--")}
    options = options[: options.index("|")] if "|" in options else options
    if program == "train.py":
        given = train.parse_args(options)
        for stage in [given["stage"]] if "stage" in given else ["align", "instruct"]:
            train.configure(stage, given)
    elif program == "eval.py":
        evaluation.parse_args(options)
    else:
        source, passed_on = file.read_text(), set()
        if program == "lab.compare":  # it takes train.py's options, too
            passed_on = {f"--{name}" for name in train.Config.__dataclass_fields__}
        assert all(f'"{flag}"' in source for flag in flags - passed_on)


def test_the_plan_in_the_readme_is_what_a_run_prints(capsys, monkeypatch):
    monkeypatch.setattr(train, "total_memory", lambda device: 23.5 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = train.configure("align", {"preset": "tiny"})
    plan = train.outline(config, train.load_vit_config(config.vit), train.load_llm_config(config.llm))
    train.print_plan(config, plan, torch.device("cpu"), torch.float32, 750, (64, 45))
    printed = [line for line in capsys.readouterr().out.split("\n") if line]
    assert len(printed) == 7
    for line in printed:
        assert f"    {line}\n" in README or line.startswith("float32;")


@pytest.mark.parametrize("preset", bench_step.SHAPES)
def test_the_hours_are_those_of_the_arithmetic(preset):
    assert bench_step.cost(preset) in README


# ---- who may import what -----------------------------------------------------------------------------------

EVERYTHING = None
READER = {"resolve", "resolve_model", "read_json", "read_config", "config_from_dict", "read_weights",
          "read_shard", "load_strictly", "write_weights", "TOKENIZER_FILES", "named", "whole",
          "read_text"}  # in vit.py, for all files
MAY = {  # which names of ours; data flows one way, image -> vit -> projector -> llm -> loss, train is on top
    "vit.py": {},
    "losses.py": {},
    "llm.py": {"vit": READER},
    "data.py": {"vit": {"TOKENIZER_FILES", "named", "read_json", "read_text", "resolve", "whole"}},
    "projector.py": {"vit": EVERYTHING, "llm": EVERYTHING},
    "eval.py": {"data": EVERYTHING, "losses": EVERYTHING, "projector": EVERYTHING, "vit": EVERYTHING},
    "train.py": {"data": EVERYTHING, "losses": EVERYTHING, "projector": EVERYTHING, "vit": EVERYTHING,
                 "llm": EVERYTHING},
}
OURS = {name.removesuffix(".py") for name in FILES} | {"lab", "tests"}


def imports(source):
    """[(module, names)] of a file; names is EVERYTHING for `import module` and for `from module import *`. A
    module may also be the text in importlib.import_module("module") and the like."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], EVERYTHING) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found.append(((node.module or "").split(".")[0], EVERYTHING if "*" in names else names))
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "run_module", "run_path"):
                text = str(getattr(node.args[0], "value", ""))
                found.append((re.split(r"[./]", text)[0], EVERYTHING))
    return found


def forbidden(name, source):
    """What the file imports of ours and may not."""
    may, found = MAY[name], []
    for module, names in imports(source):
        if module not in OURS:
            continue
        if module not in may:
            found.append(module)
        elif may[module] is not EVERYTHING and (names is EVERYTHING or not names <= may[module]):
            found.append(f"{module}: {'*' if names is EVERYTHING else sorted(names - may[module])}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_what_stands_below_it(name):
    assert forbidden(name, (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name, line", [
    ("llm.py", "import vit"), ("llm.py", "from vit import *"), ("llm.py", "from vit import ViT, resolve"),
    ("data.py", "def late():\n    from vit import read_weights"), ("losses.py", "import data"),
    ("train.py", "import eval as evaluation"), ("eval.py", "from train import Config"),
    ("eval.py", "from lab.toy_world import scenes"), ("train.py", "importlib.import_module('lab.compare')"),
    ("train.py", "runpy.run_path('lab/compare.py')"), ("train.py", "from tests import bench_step")])
def test_what_a_file_may_not_import_is_seen(name, line):
    assert len(forbidden(name, line)) == 1


def test_no_other_code_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(FILES) == set(MAY)


# ---- how long ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, *LAB])
def test_no_function_is_longer_than_a_page(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("name", [*FILES, *LAB, *TESTS])
def test_no_line_is_wider_than_110_columns(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 110] == []
