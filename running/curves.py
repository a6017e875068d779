"""Draws the curves of runs, finished or not, into one picture: `python -m running.curves RUN [RUN ..]`.

A panel for each loss in RUN/log.jsonl, its balance, the rate and the norm; a line for each run.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from plumbing.files import named, read_json, read_text
from running import chart

OF_A_LOSS = {  # ending of a contrastive loss's key in the log: its unit
    "": "contrastive loss, nats",
    "_relative": "contrastive loss over ln(batch)",
    "_retrieval": "part that finds its caption",
    "_ratio": "gradient over captioning's",
    "_weight": "factor of the loss",
    "_cosine": "with captioning's gradient",
    "_scale": "one over temperature",
}
UNSAID = ("stage", "preset", "out", "steps", "contrastive_first",  # these the legend says anyway
          "resume", "save_every", "val", "val_every", "benchmarks", "cache", "features", "micro_batch")
LINEAR = ("_retrieval", "_cosine", "lr")  # endings of keys whose zero matters; others may have a log axis
POINTS = 200  # of a line, at most: more would be a blot
COLUMNS, WIDTH, HEIGHT = 3, 390, 248  # panels in a row; pixels of one with all that stands around it
LINE = 1.5  # pixels


def read_log(run) -> list:
    """The lines of RUN/log.jsonl as dicts. The last may be half written: it is left out."""
    file = Path(run) / "log.jsonl"
    texts = read_text(file).splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            with named(file, f"line {number} is damaged"):
                entry = json.loads(text)
                lines.append(entry | {"step": int(entry["step"])})
        except ValueError:
            if number < len(texts):
                raise
    if not lines:
        raise ValueError(f"{file}: no step yet")
    return lines


def points_of(lines: list, key: str, window: int = 1) -> list:
    """[(step, median, least, largest)] of every `window` lines; None where none of them has a value."""
    found = []
    for start in range(0, len(lines), window):
        part = lines[start : start + window]
        values = [entry[key] for entry in part if entry.get(key) is not None]
        values = [value for value in values if math.isfinite(value)]
        point = None
        if values:
            point = part[len(part) // 2]["step"], statistics.median(values), min(values), max(values)
        found.append(point)
    return found


def first_captioning(lines: list) -> int:
    """The first step with the captioning loss: before it came contrast first. 0 if there is none."""
    return next((entry["step"] for entry in lines if "generative" in entry), 0)


def options_of(run, lines: list) -> dict:
    """A run's config.json, which is written last; before, the batch size, if the log tells it."""
    if (Path(run) / "config.json").exists():
        return read_json(Path(run) / "config.json")
    for entry in lines:
        if entry.get("patch_relative"):
            return {"batch": round(math.exp(entry["patch"] / entry["patch_relative"]))}
    return {}


def differing(options: list) -> list:
    """The options that are not the same in all runs that tell them, but for UNSAID."""
    last = {}
    for told in options:
        last |= told
    changed = [key for key in last if any(told.get(key, last[key]) != last[key] for told in options)]
    return [key for key in changed if key not in UNSAID]


def title_of(run, lines: list, differ=()) -> str:
    """What the legend says of a run: its name, stage, preset, steps, and the first four that `differ`."""
    name = "/".join(Path(run).resolve().parts[-2:])[-60:]
    options = options_of(run, lines)
    said = f"{options['stage']}, preset {options.get('preset')}" if "stage" in options else "unfinished"
    title = f"{name}: {said}, {lines[-1]['step'] + 1:,} steps"
    first = first_captioning(lines)
    if first:
        title += f", the first {first:,} contrast alone"
    told = [f"{key} {str(options[key])[-30:] or 'none'}" for key in differ if key in options]
    return ", ".join([title, *told[:4]])


def units_of(logs: list, has_batches: bool) -> dict:
    """{key of the log: its unit} of what is drawn, in order. Runs of several batch sizes (`has_batches`)
    start at several contrastive losses in nats: these are drawn over ln(batch)."""
    keys = {key for lines in logs for line in lines for key in line}
    names = sorted(key.removesuffix("_weight") for key in keys if key.endswith("_weight"))
    units = {"generative": "captioning loss, nats a token"}
    for ending, unit in OF_A_LOSS.items():
        if ending != ("" if has_batches else "_relative"):
            units |= {f"{name}{ending}": unit for name in names}
    return units | {"lr": "learning rate", "grad_norm": "norm before clipping"}


def is_worth_a_panel(key: str, curves: list) -> bool:
    """Whether there are values, and not only zeros where zero says nothing."""
    known = [point for points, held_out in curves for point in points + held_out if point]
    return any(largest or key.endswith(LINEAR) for *_, largest in known)


def draw(runs: list, file):
    """Write the PNG `file` with the curves of run directories. OSError or ValueError if one has no log."""
    logs = [read_log(run) for run in runs]
    longest = max(len(lines) for lines in logs)
    window = max(1, int(chart.round_up(longest / POINTS)))
    differ = differing([options_of(run, lines) for run, lines in zip(runs, logs)])
    panels = {}  # key: its unit, [(points, those of held-out data) of each run]
    for key, unit in units_of(logs, "batch" in differ).items():
        curves = [(points_of(lines, key, window), points_of(lines, f"val_{key}")) for lines in logs]
        if is_worth_a_panel(key, curves):
            panels[key] = unit, curves
    head = 40 + 22 * len(runs)
    foot = head + HEIGHT * math.ceil(len(panels) / COLUMNS)
    image, pen = chart.sheet(COLUMNS * WIDTH, foot + 34)
    for number, (run, lines) in enumerate(zip(runs, logs)):
        y = 24 + 22 * number
        color, dashes = chart.style(number)
        chart.line(pen, [(64, y), (114, y)], color, LINE, dashes)
        chart.write(pen, 124, y, title_of(run, lines, differ), 14, "lm")
    starts = [first_captioning(lines) for lines in logs]
    last = max(5, *(lines[-1]["step"] for lines in logs))
    for number, (key, (unit, curves)) in enumerate(panels.items()):
        row, column = divmod(number, COLUMNS)
        draw_panel(pen, column * WIDTH, head + row * HEIGHT, key, unit, curves, starts, last)
    said = "Lines: every step."
    if window > 1:
        said = f"Lines: medians of {window} steps. Grey: from the least to the largest of them."
    if any(any(held_out) for _, curves in panels.values() for _, held_out in curves):
        said += " Rings: held-out data."
    chart.write(pen, 64, foot + 10, said, 13, "lm", chart.GREY)
    chart.save(image, file)


def draw_panel(pen, left: int, top: int, key: str, unit: str, curves: list, starts: list, last: int):
    """One quantity of all runs, on steps 0 to `last`; `starts`: where captioning begins in each."""
    known = []
    for points, held_out in curves:
        for point in filter(None, points + held_out):
            known += point[1:]
    low = min(known)
    high = max(known)
    is_log = 0 < 10 * low <= high and not key.endswith(LINEAR)
    rules = chart.log_ticks(low, high) if is_log else chart.ticks(low, high)
    panel = chart.Panel(left + 64, top + 40, left + WIDTH - 36, top + HEIGHT - 56, (0, last),
                        (rules[0], rules[-1]), is_log)
    steps = {step: f"{step:,g}" for step in chart.ticks(0, last) if step <= last}
    chart.frame(pen, panel, steps, rules, 12)
    chart.write(pen, panel.right, panel.bottom + 21, "steps", 12, "ra", chart.GREY)
    chart.write(pen, panel.left, top + 10, key, 14, "ls")
    chart.write(pen, panel.right, top + 10, f"{unit}, log" if is_log else unit, 12, "rs", chart.GREY)
    for number, start in enumerate(starts):
        if start:
            draw_start(pen, panel, start, chart.style(number)[0])
    for points, _ in curves:
        for step, _, least, largest in filter(None, points):
            chart.line(pen, [panel.at(step, least), panel.at(step, largest)], chart.PALE, 2)
    for number, (points, held_out) in enumerate(curves):
        color, dashes = chart.style(number)
        for is_known, part in itertools.groupby(points, key=bool):
            if is_known:
                places = [panel.at(step, median) for step, median, _, _ in part]
                chart.line(pen, places, color, LINE, dashes)
        rings = [panel.at(step, value) for step, value, _, _ in filter(None, held_out)]
        chart.line(pen, rings, color)
        for place in rings[:: 1 + len(rings) // 30]:
            chart.dot(pen, place, 3, color, "white")


def draw_start(pen, panel, start: int, color: str):
    """An upright where captioning begins, with its word on the side where there is more room."""
    x, _ = panel.at(start, panel.y[0])
    chart.line(pen, [(x, panel.top - 14), (x, panel.bottom)], color, 1, (3, 3))
    if start < panel.x[1] / 2:
        chart.write(pen, x + 4, panel.top - 7, "captioning begins", 11, "ls", chart.GREY)
    else:
        chart.write(pen, x - 4, panel.top - 7, "captioning begins", 11, "rs", chart.GREY)


def main():
    parser = argparse.ArgumentParser(prog="python -m running.curves", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", help="the PNG (default: curves.png, of one run in its folder, else here)")
    args = parser.parse_args()
    folder = Path(args.runs[0]) if len(args.runs) == 1 else Path()
    file = args.out or folder / "curves.png"
    try:
        draw(args.runs, file)
    except (OSError, ValueError) as error:  # no `command`: it would import torch, for seconds
        sys.exit(f"running.curves: {error}")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
