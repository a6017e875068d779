"""What many runs say together: means with intervals, tables, charts, the papers' claims in figures.

    report.report(out, world, size, tuned, cells, ablations)   # writes results.md, results.json, two charts

Everything here works on plain lists of numbers; nothing of the project is imported. A *cell* is one run,
trained and scored: {"loss", "steps", "fraction", "seed"} and, of SCORES, what its world has.
"""

import itertools
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

NAMES = {"none": "generative", "patch": "+ patch", "prompt": "+ prompt", "both": "+ both"}  # of some recipes
SCORES = {"accuracy_img": "ScienceQA-like, questions with a picture, % right",
          "likely": "ScienceQA-like, by the likeliest choice's words, % right",
          "accuracy_txt": "ScienceQA-like, questions without a picture, % right",
          "reworded": "the questions in words never trained on, % right",
          "pope": "POPE-like, accuracy", "mme": "MME-like, both questions of a picture right, %",
          "caption": "captioning loss on held-out pictures, nats per token",
          "r1": "held-out pictures that find their caption first, %", "r5": "among the first five, %",
          "pointing": "pointing game, % in the right quarter (chance 25)",
          "seconds": "seconds of the stage, on this machine"}
FEW_PARTS = (0, 0.1, 1.0)  # parts of the instruction data that every table and claim has

# ------------------------------------------------------------------------------------------------------------
# Means over seeds

# The 97.5 % quantile of Student's t with 2, 3, ... degrees of freedom; the last one stands for more, too.
STUDENT = (4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def interval(values) -> tuple:
    """(mean, half the width of its 95 % interval by Student's t, None for one or two values)."""
    n, mean = len(values), sum(values) / len(values)
    if n <= 2:  # of two, the interval is 9 times as wide as they are apart: it says nothing
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, STUDENT[min(n - 3, len(STUDENT) - 1)] * math.sqrt(variance / n)


def as_text(values) -> str:
    """The mean and its interval; one or two values themselves; "-" where nothing was measured."""
    if not values:
        return "-"
    mean, half = interval(values)
    digits = 1 if abs(mean) >= 10 else 2
    if half is None:
        return " / ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def p_value(differences) -> float:
    """Of paired differences whose mean might be 0: the part of all choices of their signs whose mean is at
    least as far from 0. Exact, without a distribution (Fisher 1935); n pairs reach 2 / 2^n at best."""
    far, total = abs(sum(differences)) - 1e-9, 0
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    for choice in signs:
        total += abs(sum(sign * value for sign, value in zip(choice, differences))) >= far
    return total / len(signs)


def table(corner: str, columns, rows: dict) -> str:
    """Markdown: {row name: values of several seeds for each column, or None} as mean and 95 % interval."""
    lines = [[corner, *map(str, columns)]]
    lines += [[name, *map(as_text, cells)] for name, cells in rows.items()]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


# ------------------------------------------------------------------------------------------------------------
# A chart, drawn with Pillow: one more package for two pictures would be too much

LINE_COLORS = ("#808080", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b")
WIDTH, HEIGHT = 900, 540  # pixels of the whole picture
LEFT, RIGHT, TOP, BOTTOM = 80, WIDTH - 220, 60, HEIGHT - 80  # of the plot; the legend stands to its right
ZOOM = 2  # drawn twice as large and scaled down: Pillow's lines have no smooth edges


def chart(file, title: str, x_label: str, y_label: str, ticks, series: dict) -> None:
    """A PNG with a line for each entry {name: [percentages of several seeds, or None, at each tick]}.

    The ticks stand at even distances; the bars are 95 % intervals.
    """
    image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), "white")
    draw = ImageDraw.Draw(image)
    known = [value for cells in series.values() for cell in cells if cell for value in cell]
    low, high = 10 * math.floor(min(known) / 10), 10 * math.ceil(max(known) / 10)

    def at(tick, value):
        """Where a percentage stands at the tick of this number, in pixels of the picture."""
        x = LEFT + (RIGHT - LEFT) * (tick + 0.5) / len(ticks)
        return x, BOTTOM - (BOTTOM - TOP) * (min(max(value, low), high) - low) / max(1, high - low)

    write(draw, LEFT, 28, title, 18, "lm")
    write(draw, (LEFT + RIGHT) / 2, HEIGHT - 28, x_label, 15)
    write(draw, LEFT - 50, TOP - 14, y_label, 15, "lm")
    for value in range(low, high + 1, 10):
        y = at(0, value)[1]
        line(draw, [(LEFT, y), (RIGHT, y)], "#dddddd", 1)
        write(draw, LEFT - 10, y, str(value), 14, "rm")
    for number, tick in enumerate(ticks):
        write(draw, at(number, low)[0], BOTTOM + 18, str(tick))
    for number, (name, cells) in enumerate(series.items()):
        color = LINE_COLORS[number % len(LINE_COLORS)]
        draw_series(draw, at, cells, color, shift=4 * (number - (len(series) - 1) / 2))  # bars side by side
        y = TOP + 20 + 26 * number
        line(draw, [(RIGHT + 16, y), (RIGHT + 46, y)], color, 4)
        write(draw, RIGHT + 54, y, name, 14, "lm")
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(file)


def draw_series(draw, at, cells, color: str, shift: float) -> None:
    """A line through the means, a dot on each, and the interval as a bar."""
    points = []
    for tick, values in enumerate(cells):
        if not values:  # not measured: the line goes on to the next
            continue
        mean, half = interval(values)
        x, y = at(tick, mean)
        x += shift
        points.append((x, y))
        if half is not None:
            line(draw, [(x, at(tick, mean - half)[1]), (x, at(tick, mean + half)[1])], color, 2)
    line(draw, points, color, 3)
    for x, y in points:
        draw.ellipse(((x - 5) * ZOOM, (y - 5) * ZOOM, (x + 5) * ZOOM, (y + 5) * ZOOM), color)


def line(draw, points, color: str, width: int) -> None:
    draw.line([(x * ZOOM, y * ZOOM) for x, y in points], color, width * ZOOM)


def write(draw, x: float, y: float, text: str, size: int = 14, anchor: str = "mm") -> None:
    draw.text((x * ZOOM, y * ZOOM), text, "black", ImageFont.load_default(size * ZOOM), anchor)


# ------------------------------------------------------------------------------------------------------------
# The report of a comparison


def report(out, world: str, size: dict, tuned: dict, cells: list, ablations: dict) -> str:
    """Write results.json, results.md and two charts to the folder `out`, and return the text of results.md.

    `size` is one of SIZES of lab/compare.py, `tuned` {(recipe, steps): what was chosen}, `ablations` {(name,
    recipe): main scores of several seeds}. The last line of the text is the `claims` as JSON.
    """
    short, long, budgets = size["short"], size["long"], size["budgets"]
    first = next(score for score in SCORES if score in cells[0])
    title, parts = SCORES[first], (0, *size["fractions"])
    after_short = rows(cells, [(short, part) for part in parts], first)
    by_steps = rows(cells, [(steps, 0) for steps in budgets], first)
    has_base = "none" in recipes(cells)  # else there is nothing to compare with
    ratio = claims(cells, size, first) if has_base else {}
    compared = [score for score in SCORES if has_base and score != "seconds" and score in cells[0]]
    text = "\n\n".join([
        introduction(world, size, seeds=1 + max(cell["seed"] for cell in cells)), in_force(tuned, size),
        *score_tables(cells, sorted({short, long}), parts, short),
        "## Without instruction data, by align steps", table("recipe", budgets, by_steps),
        *itertools.chain(*(gains(cells, size, score) for score in compared)),
        *ablation_table(ablations, size), f"ratio {json.dumps(ratio)}"])
    Path(out, "results.md").write_text(text + "\n")
    listed = [{"name": name, "loss": loss, first: values} for (name, loss), values in ablations.items()]
    chosen = [{"loss": loss, "steps": steps, **best} for (loss, steps), best in tuned.items()]
    Path(out, "results.json").write_text(json.dumps(
        {"protocol": size, "tuned": chosen, "cells": cells, "ratio": ratio, "ablations": listed}))
    chart(Path(out, "accuracy_by_data.png"), f"{title}: {short} align steps, then instruct",
          "part of the instruction data", "% right", percents(parts), after_short)
    chart(Path(out, "accuracy_by_steps.png"), f"{title}: no instruction data", "align steps", "% right",
          budgets, by_steps)
    return text


def introduction(world: str, size: dict, seeds: int) -> str:
    at = " and at ".join(str(steps) for steps in sorted({size["short"], size["long"]}))
    tuning = f"""Every recipe was tuned at {at} align steps on the validation split
with a seed of its own: first {len(size["lr"])} align rates, then its strengths, then
{len(size["instruct_lr"])} instruct rate(s); other numbers of steps use what was found at {size["short"]}
(fewer) or {size["long"]} (more). Nothing was chosen on test questions.""" if size["tune"] else ""
    return f"""# The recipes compared on the {world} world

Mean of {seeds} seeds on the test split (of a recipe that had fewer, of these), and the 95 % interval of the
mean by Student's t; of one or two seeds their values. The world and the towers were fixed beforehand by
criteria that look at no alignment (the LLM's accuracy on text alone, a linear probe of the ViT).
Every recipe had the same records and equal captioning steps. {tuning}"""


def in_force(tuned: dict, size: dict) -> str:
    """A heading and a table: rates and weights of each recipe, after so many align steps."""
    lines = ["| recipe | align steps | align rate | instruct rate | weight |", "|---|---|---|---|---|"]
    for (recipe, steps), best in tuned.items():
        weight = best["strength"].get("contrastive_weight", "as named")
        lines.append(f"| {NAMES.get(recipe, recipe)} | {steps} | {best['lr']:g} | {best['instruct_lr']:g} | "
                     f"{'-' if recipe.startswith('none') else weight} |")
    how = "tuned" if size["tune"] else "not tuned"
    return f"## Rates and weights ({how})\n\n" + "\n".join(lines)


def score_tables(cells, budgets, parts, short: int) -> list:
    """A heading and a table for each score: its values after the align steps and parts of instruction."""
    text = []
    for score, title in SCORES.items():
        entries = []
        for steps in budgets:
            entries += [(steps, part) for part in (parts if steps == short else FEW_PARTS)]
        found = rows(cells, entries, score)
        if any(any(values) for values in found.values()):
            columns = [f"{steps} / {part:.0%}" for steps, part in entries]
            text += [f"## {title}: align steps / part of the instruction data",
                     table("recipe", columns, found)]
    return text


def gains(cells, size: dict, score: str) -> list:
    """A heading and a table: points over the generative loss, paired by seed, and how likely by chance."""
    entries = []
    for steps in sorted({size["short"], size["long"]}):
        entries += [(steps, part) for part in FEW_PARTS]
    lines = ["| recipe | " + " | ".join(f"{steps} / {part:.0%}" for steps, part in entries) + " |",
             "|---" * (1 + len(entries)) + "|"]
    for loss in recipes(cells):
        if loss != "none":
            found = [gain(cells, loss, steps, part, score) for steps, part in entries]
            lines.append(f"| {NAMES.get(loss, loss)} | {' | '.join(found)} |")
    heading = f"## Gain over the generative loss, {SCORES[score]}: paired by seed, p by exchange of signs"
    return [heading, "\n".join(lines)]


def ablation_table(ablations: dict, size: dict) -> list:
    """A heading and a table, or nothing where nothing was ablated."""
    if not ablations:
        return []
    lines, losses = {}, list(dict.fromkeys(loss for _, loss in ablations))
    for name, _ in ablations:
        lines[name] = [ablations.get((name, loss)) for loss in losses]
    heading = f"## Ablations: {size['long']} align steps, no instruction data, {size['ablations']} seeds, "
    return [heading + "not tuned anew", table("", [NAMES.get(loss, loss) for loss in losses], lines)]


def recipes(cells) -> list:
    return list(dict.fromkeys(cell["loss"] for cell in cells))


def rows(cells, entries, score: str) -> dict:
    """The rows of a table, {name of the recipe: values for each (steps, fraction) of `entries`}."""
    result = {}
    for loss in recipes(cells):
        result[NAMES.get(loss, loss)] = [scores_of(cells, loss, *entry, score) for entry in entries]
    return result


def scores_of(cells, loss: str, steps: int, fraction: float, score: str) -> list:
    """The values of one entry of a table, one for each seed."""
    wanted, found = (loss, steps, fraction), []
    for cell in cells:
        if (cell["loss"], cell["steps"], cell["fraction"]) == wanted and score in cell:
            found.append(cell[score])
    return found


def percents(parts) -> list:
    return [f"{part:.0%}" for part in parts]


# ------------------------------------------------------------------------------------------------------------
# The papers' claims in figures


def claims(cells, size: dict, score: str) -> dict:
    """What the papers claim, for each recipe: {"generative": {what: figure, ...}, "+ patch": ...}.

    What a tenth of the data, and none of it, reach of the generative loss with all of it (mean over mean, and
    paired by seed); and how many times the align steps that one needs to draw level without instruction data.
    """
    short, long, budgets = size["short"], size["long"], size["budgets"]

    def mean(*entry):
        return interval(scores_of(cells, *entry, score))[0]

    result, generative = {}, [mean("none", steps, 0) for steps in budgets]
    for loss in recipes(cells):
        figures = result[NAMES.get(loss, loss)] = {}
        for steps in (short, long):
            for part in (0, 0.1):
                name, whole = f"{part:.0%} over generative 100%, {steps} steps", ("none", steps, 1.0)
                figures[name] = round(mean(loss, steps, part) / max(mean(*whole), 0.01), 3)
                pairs = zip(scores_of(cells, loss, steps, part, score), scores_of(cells, *whole, score))
                figures[f"{name}, paired"] = as_text([a / max(b, 0.01) for a, b in pairs])
        if loss != "none":
            figures["step factor"] = step_factor(budgets, generative, short, mean(loss, short, 0))
    return result


def gain(cells, loss: str, steps: int, part: float, score: str) -> str:
    """Points over the generative loss, paired: with one seed, both have the same initial projector and the
    same order of the data; and the p-value of the differences."""
    pairs = zip(scores_of(cells, loss, steps, part, score), scores_of(cells, "none", steps, part, score))
    differences = [ours - theirs for ours, theirs in pairs]
    return f"{as_text(differences)} (p {p_value(differences):.2g})" if differences else "-"


def step_factor(budgets, generative, steps: int, accuracy: float) -> str:
    """How many times `steps` the generative loss needs to reach `accuracy` for the first time.

    `generative` is its accuracy after each of the `budgets` (steps, ascending); between two of them
    it is taken to grow with the logarithm of the steps.
    """
    if accuracy <= generative[0]:
        return f"at most {budgets[0] / steps:.1f}"
    for i in range(1, len(budgets)):
        before, after = generative[i - 1], generative[i]
        if before < accuracy <= after:
            part = (accuracy - before) / (after - before)
            return f"{budgets[i - 1] * (budgets[i] / budgets[i - 1]) ** part / steps:.1f}"
    return f"above {budgets[-1] / steps:.1f}"
