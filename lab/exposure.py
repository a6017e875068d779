"""Is it only exposure? With contrast first the projector sees each picture more often. So captioning alone
gets more and more steps, and contrast first as many behind its own: where is the lead gone?

    python -m lab.exposure --seeds 5 --jobs 2     # after, or before, `python -m lab.compare --size words`

Writes exposure.md and exposure.png to OUT, where the runs of that comparison are, some of which it shares.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import torch

from lab import compare, errors_in_one_line, parser_of, toy_world
from lab.report import as_text, interval, p_value, table
from running.chart import GREY, Panel, dot, frame, line, save, sheet, style, ticks, write

STEPS = (30, 60, 120, 240, 480, 960)  # of captioning
FIRST = 120  # steps of contrast before them
COSTS = 0.45 * FIRST  # the time that these take, in captioning steps
RECIPES = {"none": "captioning alone", "first, own words": f"{FIRST} first steps, then captioning"}
SCORES = {"accuracy_img": "% right of questions with a picture", "caption": "captioning loss, held out, nats"}
RATES = {"lr": 8e-3, "weight": None, "instruct_lr": 2e-4}  # tuned at 120 steps, for both


def measure(setting, recipe: str, seed: int, steps: int) -> dict:
    """The cell of one run with so many captioning steps."""
    size = setting.size._replace(steps=steps, first=FIRST / steps)
    cell, *_ = compare.measure(setting._replace(size=size), {recipe: RATES}, recipe, seed)
    return cell


def means(cells: list, recipe: str, score: str) -> dict:
    """{steps: [one value a seed]}"""
    found = {}
    for cell in cells:
        if cell["loss"] == recipe:
            found.setdefault(cell["steps"], []).append(cell[score])
    return dict(sorted(found.items()))


def steps_needed(curve: dict, value: float) -> float:
    """How many steps a curve {steps: value} needs to reach the value for the first time: straight between two
    points over the logarithm of steps; 0 if it begins above, infinity if it does not get there."""
    before = None
    for steps, reached in curve.items():
        if reached >= value:
            if before is None:
                return 0.0
            part = (value - curve[before]) / (reached - curve[before])
            return before * (steps / before) ** part
        before = steps
    return math.inf


def as_table(cells: list) -> str:
    """A row for each number of captioning steps."""
    alone, first = (means(cells, recipe, "accuracy_img") for recipe in RECIPES)
    curve = {steps: interval(values)[0] for steps, values in alone.items()}
    losses = [means(cells, recipe, "caption") for recipe in RECIPES]
    rows = {}
    for steps, values in first.items():
        gains = [a - b for a, b in zip(values, alone[steps])]
        needed = steps_needed(curve, interval(values)[0])
        said = f"{needed:.0f}" if needed < math.inf else f"more than {max(curve)}"
        lead = f"{as_text(gains)} (p {p_value(gains):.2g})"
        rows[str(steps)] = [as_text(alone[steps]), as_text(values), lead, said,
                            *(as_text(loss[steps]) for loss in losses)]
    columns = ["captioning alone, % right", "contrast first, % right", "lead",
               "steps that captioning alone needs for it", "captioning alone, loss", "contrast first, loss"]
    return table("captioning steps", columns, rows)


def chart(file, cells: list) -> None:
    """Two rows, questions and loss; two columns, against captioning steps and against time."""
    image, draw = sheet(900, 700)
    names = list(RECIPES.values())
    for row, (score, said) in enumerate(SCORES.items()):
        curves = [means(cells, recipe, score) for recipe in RECIPES]
        ends = [mean + side * (half or 0) for curve in curves for mean, half in map(interval, curve.values())
                for side in (-1, 1)]
        rules = ticks(min(ends), max(ends))
        for column, axis in enumerate(("captioning steps", "time, in captioning steps")):
            top, left = 60 + 320 * row, 70 + 430 * column
            panel = Panel(left, top, left + 370, top + 230, (math.log2(25), math.log2(1150)),
                          (rules[0], rules[-1]))
            write(draw, left, top - 18, f"{said}", 14, "lm")
            write(draw, (panel.left + panel.right) / 2, panel.bottom + 34, axis, 13, "mm", GREY)
            frame(draw, panel, {math.log2(steps): str(steps) for steps in STEPS}, rules, 12)
            for number, curve in enumerate(curves):
                draw_curve(draw, panel, curve, style(number), COSTS * number * column)
    for number, name in enumerate(names):
        color, dashes = style(number)
        line(draw, [(70 + 300 * number, 18), (110 + 300 * number, 18)], color, 3, dashes)
        write(draw, 118 + 300 * number, 18, name, 14, "lm")
    save(image, file)


def draw_curve(draw, panel: Panel, curve: dict, look: tuple, shift: float) -> None:
    """The means over seeds, and their intervals as bars; `shift`: steps to add on the x axis."""
    color, dashes = look
    points = []
    for steps, values in curve.items():
        mean, half = interval(values)
        x = math.log2(steps + shift)
        points.append(panel.at(x, mean))
        if half is not None:
            line(draw, [panel.at(x, mean - half), panel.at(x, mean + half)], color, 2)
    line(draw, points, color, 3, dashes)
    for point in points:
        dot(draw, point, 4, color, color)


def main(argv=None):
    parser = parser_of("lab.exposure", __doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default 5)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of captioning steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/words"), help="folder of the comparison")
    parser.add_argument("--world", type=Path, default=Path("data/toy-1200"), help="folder of the data")
    args = parser.parse_args(argv)
    with errors_in_one_line("lab.exposure"):
        if not args.world.exists():
            toy_world.write_world(args.world, test=1600)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        setting = compare.Setting(compare.SIZES["words"], args.out, args.world, {})
        compare.open_cells(setting)
        compare.keep_features(setting)
        seeds = range(args.seeds)
        asked = [(recipe, seed, steps) for seed in seeds for recipe in RECIPES for steps in args.steps]
        cells = compare.spread(args.jobs, "measure", partial(measure, setting), asked)
        text = as_table(cells)
        (args.out / "exposure.md").write_text(text + "\n")
        (args.out / "exposure.json").write_text(json.dumps(cells))
        chart(args.out / "exposure.png", cells)
        print(text)


if __name__ == "__main__":
    main()
