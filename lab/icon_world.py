"""The third world: icons, with which nothing was tuned. Towers, records, questions and splits are made as
those of the emoji world.

    pip install --no-deps resvg-py; npm install --no-save @phosphor-icons/core@2.1.1
    python -m lab.icon_world data/icons
    python -m lab.compare --size emoji-words --world data/icons --out runs/icon-words

Phosphor draws each icon in several styles, which stand for vendors. A concept is one icon. Its name says what
it shows ("airplane landing"), and its group is one of Figma's 17 ("maps & travel"). The four categories are
ours, and only choose wrong answers. Brands are left out: nobody can see the name of one that he does not
know. Icons whose names begin with one word share a split.
"""

import importlib.util
import io
import random
import re
from functools import partial
from pathlib import Path

from PIL import Image

from lab import parser_of
from lab.emoji_world import FILES, PIXELS, check_pip, write_files, write_towers
from lab.toy_world import is_complete, write_whole
from plumbing.files import read_json, read_text
from plumbing.ranks import command

PACKAGE, VERSION = "@phosphor-icons/core", "2.1.1"
STYLES = ("thin", "bold", "fill", "duotone")  # of six; the other two are like "bold" and "thin"
CATEGORIES = {
    "people": ("people", "health & wellness", "games", "education"),
    "places": ("maps & travel", "weather & nature", "commerce", "time"),
    "work": ("office & editing", "math & finance", "communication", "design"),
    "machines": ("system & devices", "technology & development", "security & warnings", "media", "arrows"),
}  # without "brands"
GROUP = re.compile(r'i\.(\w+) = "([^"]+)"')
ENTRY = re.compile(r'name: "([^"]+)",\s+pascal_name: .*?figma_category: a\.(\w+)', re.DOTALL)


def check_packages(packages: Path) -> None:
    """FileNotFoundError or ValueError for the first bad package, with the command that installs it."""
    check_pip()
    if importlib.util.find_spec("resvg_py") is None:
        raise FileNotFoundError("missing package: resvg_py: pip install --no-deps resvg-py")
    command = f"npm install --no-save {PACKAGE}@{VERSION}"
    try:
        version = read_json(Path(packages, PACKAGE, "package.json"))["version"]
    except (OSError, ValueError) as error:
        raise type(error)(f"{error}: {command}") from None
    if version != VERSION:
        raise ValueError(f"{packages}/{PACKAGE}: is version {version}, not {VERSION}: {command}")


def read_concepts(packages: Path) -> list:
    """Every icon but brands, in the catalogue's order, as lab/emoji_world.py describes concepts."""
    catalogue = read_text(Path(packages, PACKAGE, "dist", "index.mjs"))
    groups = dict(GROUP.findall(catalogue))  # of a key that comes twice the later, Figma's
    category_of = {group: category for category, those in CATEGORIES.items() for group in those}
    concepts = []
    for code, key in ENTRY.findall(catalogue):
        group = groups[key]
        if group in category_of:
            concepts.append({
                "name": code.replace("-", " "), "group": group, "category": category_of[group],
                "code": code, "variants": code.split("-")[0], "vendors": list(STYLES),
            })
    return concepts


def drawing_of(packages: Path, concept: dict, style: str) -> Image.Image:
    """The icon in a style, black on white."""
    import resvg_py  # not among this project's packages
    file = Path(packages, PACKAGE, "assets", style, f"{concept['code']}-{style}.svg")
    png = resvg_py.svg_to_bytes(svg_path=str(file), width=PIXELS, height=PIXELS, background="white")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def write_world(folder, packages="node_modules", seed: int = 0) -> None:
    """Write the whole world to `folder`, towers included."""
    def write(building):
        check_packages(packages)
        write_files(building, read_concepts(packages), partial(drawing_of, packages), random.Random(seed))
        write_towers(building / "towers")

    write_whole(folder, FILES, write)


def main():
    parser = parser_of("lab.icon_world", __doc__)
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--packages", type=Path, default="node_modules", help="the folder npm installed to")
    parser.add_argument("--seed", type=int, default=0, help="of its splits, wordings and questions")
    args = parser.parse_args()
    with command("lab.icon_world"):
        if is_complete(args.folder, FILES):
            print(f"{args.folder} holds a complete world already, which stays as it is")
        write_world(args.folder, args.packages, args.seed)


if __name__ == "__main__":
    main()
