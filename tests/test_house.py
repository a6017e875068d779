"""The house: a file imports only what stands below it, or its own folder. So no floor imports in a circle."""

import pytest
from conftest import ROOT

from lab.house import PLACES, imported_rooms, room_of

FLOORS = {room: floor for room, (_, _, floor) in PLACES.items()}


def our_files() -> list:
    """Every Python file of the project, as a path below ROOT."""
    found = [*ROOT.glob("*.py")]
    for room in FLOORS:
        found += (ROOT / room).rglob("*.py")
    return sorted(str(path.relative_to(ROOT)) for path in found)


def forbidden(name: str, source: str) -> list:
    """The rooms that a file may not import and does."""
    room = room_of(name)
    is_folder = not name.startswith(f"{room}.")
    bad = []
    for other in sorted(imported_rooms(source, room) & set(FLOORS)):
        is_own = other == room and is_folder
        if not is_own and FLOORS[other] >= FLOORS[room]:
            bad.append(other)
    return bad


@pytest.mark.parametrize("name", our_files())
def test_a_file_imports_what_stands_below_it(name):
    assert forbidden(name, (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name, line, bad", [
    ("plumbing/files.py", "import vit", "vit"),
    ("plumbing/llava.py", "def late():\n    from llm import LLM", "llm"),
    ("llm.py", "from vit import *", "vit"),
    ("data.py", "import plumbing.files, losses as l", "losses"),
    ("projector.py", "if True:\n    import running.plan", "running"),
    ("benchmarks/pope.py", "from running import options", "running"),
    ("benchmarks/score.py", "from eval import ask", "eval"),
    ("train.py", "import eval as evaluation", "eval"),
    ("eval.py", "from lab.toy_world import scenes", "lab"),
    ("eval.py", "import eval", "eval"),
    ("train.py", "importlib.import_module('lab.compare')", "lab"),
    ("train.py", "runpy.run_path('lab/compare.py')", "lab"),
    ("lab/score.py", "from tests import bench_step", "tests")])
def test_what_a_file_may_not_import_is_seen(name, line, bad):
    assert forbidden(name, line) == [bad]


@pytest.mark.parametrize("name, line", [
    ("plumbing/clip.py", "from plumbing.files import named"),
    ("benchmarks/pope.py", "from .score import accuracy"),
    ("projector.py", "from vit import ViT\nimport data"),
    ("train.py", "def late():\n    import running.plan, projector"),
    ("lab/compare.py", "from lab import report\nimport train")])
def test_what_a_file_may_import_is_no_error(name, line):
    assert forbidden(name, line) == []


def test_every_file_at_the_top_has_its_floor():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(FLOORS)
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= set(FLOORS)
