"""The world of icons, on an invented package: a catalogue of 17 groups, and squares for drawings."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from lab import emoji_world, icon_world
from running.records import read_records

GROUPS = [group for those in icon_world.CATEGORIES.values() for group in those] + ["brands"]


@pytest.fixture
def packages(tmp_path):
    """12 icons a group, two of a family, in a catalogue as the package has it."""
    folder = tmp_path / "node_modules" / icon_world.PACKAGE
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": icon_world.VERSION}))
    both = "".join(f'i.G{n} = "an older {group}", ' for n, group in enumerate(GROUPS))
    both += "".join(f'i.G{n} = "{group}", ' for n, group in enumerate(GROUPS))
    entries = "".join(
        f'  {{\n    name: "thing{n}x{i // 2}-{i % 2}",\n    pascal_name: "Thing",\n    categories: [e.G0],\n'
        f'    figma_category: a.G{n},\n    tags: ["figma"]\n  }},\n' for n in range(18) for i in range(12))
    (folder / "dist/index.mjs").write_text(f"var t = {both};\nconst n = [\n{entries}];\n")
    return tmp_path / "node_modules"


def test_concepts_are_the_catalogues_without_brands(packages):
    concepts = icon_world.read_concepts(packages)
    assert len(concepts) == 17 * 12 and {concept["group"] for concept in concepts} == set(GROUPS[:-1])
    assert concepts[1] == {
        "name": "thing0x0 1", "group": "people", "category": "people", "code": "thing0x0-1",
        "variants": "thing0x0", "vendors": ["thin", "bold", "fill", "duotone"]}


def test_a_world_is_made_as_that_of_emoji(packages, tmp_path):
    def drawing(concept, style):
        return Image.new("RGB", (64, 64), "white")

    concepts = icon_world.read_concepts(packages)
    sizes = dict(val=60, unseen=80, collages=0)  # the words of these names are too few for collages
    emoji_world.write_files(tmp_path / "w", concepts, drawing, random.Random(0), **sizes)
    splits = json.loads((tmp_path / "w/concepts.json").read_text())
    families = [{concept["variants"] for concept in split} for split in splits.values()]
    assert len(set.union(*families)) == sum(map(len, families)) == 17 * 6
    assert len(read_records(tmp_path / "w/align.json", "align")) == 4 * (17 * 12 - 140)


def test_a_drawing_is_black_on_white(packages, monkeypatch):
    """The package that draws is asked for the file, the size and the ground."""
    def svg_to_bytes(**how):
        asked.append(how)
        return b"P6 1 1 255 abc"  # a picture of one pixel

    asked = []
    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    picture = icon_world.drawing_of(packages, {"code": "ring-simple"}, "bold")
    file = packages / icon_world.PACKAGE / "assets/bold/ring-simple-bold.svg"
    assert picture.mode == "RGB" and asked == [
        {"svg_path": str(file), "width": 64, "height": 64, "background": "white"}]


@pytest.mark.parametrize("found, version, message", [
    (False, "2.1.1", "missing package: resvg_py: pip install --no-deps resvg-py"),
    (True, "2.0.0", "is version 2.0.0, not 2.1.1: npm install --no-save @phosphor-icons/core@2.1.1"),
    (True, None, "no such file: npm install --no-save @phosphor-icons/core@2.1.1")])
def test_a_missing_package_is_named_with_its_command(packages, monkeypatch, found, version, message):
    monkeypatch.setattr(icon_world, "check_pip", lambda: None)
    monkeypatch.setattr(icon_world.importlib.util, "find_spec", lambda name: found or None)
    file = packages / icon_world.PACKAGE / "package.json"
    file.unlink() if version is None else file.write_text(json.dumps({"version": version}))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        icon_world.check_packages(packages)


def test_a_complete_world_stays(tmp_path, monkeypatch, capsys):
    for name in emoji_world.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["icon_world", str(tmp_path), "--packages", "nowhere"])
    icon_world.main()
    assert "stays as it is" in capsys.readouterr().out
