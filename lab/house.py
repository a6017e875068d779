"""Draws the map of the house: its files and rooms, and who imports whom, as the code has it.

    python -m lab.house        # writes lab/house.png
"""

import ast
from pathlib import Path

from plumbing.files import ROOT
from running.chart import GREY, box, line, save, sheet, write

PLACES = {  # name: (what it holds, x from 0 to 1, floor)
    "tests": ("a test file for each file, exercises", 0.5, 6),
    "lab": ("the toy world, the experiments", 0.5, 5),
    "train": ("one step, both stages", 0.3, 4),
    "eval": ("questions to a model", 0.6, 4),
    "running": ("options, plan, order, checkpoints", 0.63, 3),
    "benchmarks": ("a file for each", 0.88, 3),
    "projector": ("the bridge; the VLM", 0.24, 2),
    "vit": ("the vision tower", 0.12, 1),
    "llm": ("the language tower", 0.37, 1),
    "losses": ("generative, contrastive", 0.63, 1),
    "data": ("a record becomes a batch", 0.88, 1),
    "plumbing": ("disks, others' formats, processes", 0.5, 0),
}
CALLS = ("import_module", "__import__", "run_module", "run_path")  # these take a module's or file's name
WIDTH, FLOOR, HEAD = 980, 92, 60  # pixels


def room_of(name: str) -> str:
    """The first part of a name: "plumbing" of "plumbing.files" and of "plumbing/files.py"."""
    return Path(name).parts[0].split(".")[0] if name else ""


def imported_rooms(source: str, room: str) -> set:
    """The first parts of all names that a file in `room` imports, also inside functions and by CALLS."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(room if node.level else room_of(node.module))
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in CALLS:
                found.add(room_of(str(getattr(node.args[0], "value", ""))))
    return found


def imports() -> dict:
    """{room: the other rooms that its files import}; a file at the top is a room."""
    found = {}
    for room in PLACES:
        found[room] = set()
        for file in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py")]:
            found[room] |= imported_rooms(file.read_text(), room) & PLACES.keys() - {room}
    return found


def below(room: str, found: dict) -> set:
    """All rooms that a room imports, itself or through others."""
    return found[room].union(*(below(other, found) for other in found[room]))


def draw(file):
    """Write the PNG. A line that others imply is left out."""
    found = imports()
    image, pen = sheet(WIDTH, HEAD + 7 * FLOOR)
    write(pen, 24, 26, "The house: a file imports only what stands below it", 18, "lm")
    said = "Line: the upper imports the lower. A line that others imply is left out. Shaded: the seven files."
    write(pen, 24, 50, said, 13, "lm", GREY)
    middles = {room: (x * WIDTH, HEAD + (6.5 - floor) * FLOOR) for room, (_, x, floor) in PLACES.items()}
    for room, others in found.items():
        implied = set().union(*(below(other, found) for other in others))
        x, y = middles[room]
        for other in others - implied:
            end, floor = middles[other]
            line(pen, [(x, y + 25), (end, floor - 25)], GREY)
    for room, (what, _, _) in PLACES.items():
        x, y = middles[room]
        is_file = (ROOT / f"{room}.py").exists()
        box(pen, x - 108, y - 25, x + 108, y + 25, "#d6e6f2" if is_file else "white", GREY)
        write(pen, x, y - 9, f"{room}.py" if is_file else f"{room}/", 15)
        write(pen, x, y + 11, what, 12, color=GREY)
    save(image, file)


if __name__ == "__main__":
    draw(ROOT / "lab/house.png")
