"""Is it only exposure? With contrast first the projector sees each picture more often. So captioning alone
gets more and more steps, and contrast first as many behind its own: where is the lead gone?

    python -m lab.exposure --seeds 5 --jobs 2                       # the toy world
    python -m lab.exposure --size emoji-words --seeds 1 --jobs 2    # real towers, real pictures

Writes exposure.md and exposure.png to OUT, which is that of `python -m lab.compare` of this size: some runs
are the same.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lab import compare, parser_of
from lab.report import as_text, draw_series, interval, p_value, table
from plumbing.ranks import command
from running.chart import GREY, Panel, frame, line, save, sheet, style, ticks, write

RECIPES = {"none": "captioning alone", "first, own words": "contrast first, then captioning"}
LOSS = {"caption": "captioning loss, held out, nats"}


class Curves(NamedTuple):
    """What is drawn of one size of lab.compare."""
    world: str
    steps: tuple  # of captioning
    costs: float  # time of the first steps, in captioning steps
    scores: dict  # {key of a cell: what it is}


SIZES = {
    "words": Curves("toy-1200", (30, 60, 120, 240, 480, 960), 0.45 * 120,
                    {"accuracy_img": "% right of questions with a picture"} | LOSS),
    "emoji-words": Curves("emoji", (35, 70, 140, 280), 8,
                          {"likely_name": "% right, names", "likely_group": "% right, groups"} | LOSS),
}


def measure(setting, recipe: str, seed: int, steps: int) -> dict:
    """The cell of one run with so many captioning steps, at the rate of all."""
    size = setting.size
    rates = {"lr": size.lr[0], "weight": None, "instruct_lr": size.instruct_lr[0]}
    size = size._replace(steps=steps, first=size.first * size.steps / steps)
    cell, *_ = compare.measure(setting._replace(size=size), {recipe: rates}, recipe, seed)
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


def as_table(cells: list, scores: dict) -> str:
    """A row for each number of captioning steps; of each score what captioning alone has, what contrast first
    has, and of a percentage the lead and how long captioning alone needs for as much."""
    columns, rows = [], {}
    for score, said in scores.items():
        alone, first = (means(cells, recipe, score) for recipe in RECIPES)
        curve = {steps: interval(values)[0] for steps, values in alone.items()}
        columns += [f"{said}: alone", "contrast first"]
        columns += ["lead", "steps that captioning alone needs for it"] * (score not in LOSS)
        for steps, values in first.items():
            row = rows.setdefault(str(steps), [])
            row += [as_text(alone[steps]), as_text(values)]
            if score not in LOSS:
                row += [lead(values, alone[steps]), needed(curve, interval(values)[0])]
    return table("captioning steps", columns, rows)


def lead(values: list, others: list) -> str:
    gains = [a - b for a, b in zip(values, others)]
    _, half = interval(gains)
    return as_text(gains) if half is None else f"{as_text(gains)} (p {p_value(gains):.2g})"


def needed(curve: dict, value: float) -> str:
    steps = steps_needed(curve, value)
    return f"{steps:.0f}" if steps < math.inf else f"more than {max(curve)}"


def chart(file, cells: list, curves: Curves) -> None:
    """A row for each score; two columns, against captioning steps and against time."""
    image, draw = sheet(900, 60 + 320 * len(curves.scores))
    least, most = math.log2(0.85 * min(curves.steps)), math.log2(1.2 * (max(curves.steps) + curves.costs))
    for row, (score, said) in enumerate(curves.scores.items()):
        found = [means(cells, recipe, score) for recipe in RECIPES]
        ends = [mean + side * (half or 0) for curve in found for mean, half in map(interval, curve.values())
                for side in (-1, 1)]
        rules = ticks(min(ends), max(ends))
        for column, axis in enumerate(("captioning steps", "time, in captioning steps")):
            top, left = 60 + 320 * row, 70 + 430 * column
            panel = Panel(left, top, left + 370, top + 230, (least, most), (rules[0], rules[-1]))
            write(draw, left, top - 18, said, 14, "lm")
            write(draw, (panel.left + panel.right) / 2, panel.bottom + 34, axis, 13, "mm", GREY)
            frame(draw, panel, {math.log2(steps): str(steps) for steps in curves.steps}, rules, 12)
            for number, curve in enumerate(found):
                more = curves.costs * number * column
                series = [(math.log2(steps + more), values) for steps, values in curve.items()]
                draw_series(draw, panel, series, style(number))
    for number, name in enumerate(RECIPES.values()):
        color, dashes = style(number)
        line(draw, [(70 + 300 * number, 18), (110 + 300 * number, 18)], color, 3, dashes)
        write(draw, 118 + 300 * number, 18, name, 14, "lm")
    save(image, file)


def main(argv=None):
    parser = parser_of("lab.exposure", __doc__)
    parser.add_argument("--size", choices=SIZES, default="words", help="of lab.compare (default words)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default 5)")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of captioning steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default runs/SIZE)")
    args = parser.parse_args(argv)
    curves = SIZES[args.size]
    curves = curves._replace(steps=tuple(sorted(set(args.steps or curves.steps))))
    args.out, args.world, args.fractions = args.out or Path("runs", args.size), Path("data", curves.world), ()
    with command("lab.exposure"):
        if min(curves.steps) < 1:
            raise ValueError("--steps must be at least 1")
        setting = compare.prepare(args, {})
        compare.open_cells(setting)
        compare.keep_features(setting)
        asked = [(recipe, seed, steps) for steps in curves.steps for seed in range(args.seeds)
                 for recipe in RECIPES]
        cells = compare.spread(args.jobs, "measure", partial(measure, setting), asked)
        text = as_table(cells, curves.scores)
        (args.out / "exposure.md").write_text(text + "\n")
        chart(args.out / "exposure.png", cells, curves)
        print(text)


if __name__ == "__main__":
    main()
