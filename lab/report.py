"""What many runs say together: means with intervals, tables, a chart, the papers' claim in figures.

    report.report(out, world, size, tuned, cells)   # writes results.md, results.json, accuracy_by_data.png

Everything here works on plain lists of numbers. A *cell* is one run, trained and scored: {"loss", "steps",
"fraction", "seed"} and, of SCORES, what its world has.
"""

import itertools
import json
import math
from pathlib import Path

from running.chart import GREY, Panel, dot, frame, line, save, sheet, style, ticks, write

NAMES = {"none": "generative", "patch": "+ patch", "prompt": "+ prompt", "both": "+ both"}  # of some recipes
SCORES = {
    "accuracy_img": "ScienceQA-like, questions with a picture, % right",
    "likely": "ScienceQA-like, by the likeliest choice's words, % right",
    "likely_name": "the same, only the names of unseen concepts",
    "likely_group": "the same, only their groups, which training has",
    "accuracy_txt": "ScienceQA-like, questions without a picture, % right",
    "reworded": "the questions in words never trained on, % right",
    "reworded_name": "the same, only the names",
    "reworded_group": "the same, only the groups",
    "pope": "POPE-like, accuracy",
    "mme": "MME-like, both questions of a picture right, %",
    "caption": "captioning loss on held-out pictures, nats per token",
    "r1": "held-out pictures that find their caption first, %",
    "r5": "among the first five, %",
    "r5_name": "among the first five, captions being the name alone, %",
    "right": "cosine of a held-out picture with the words of its caption",
    "wrong": "cosine with the words of the other captions",
    "right_before": "cosine with the words of its caption, before the first captioning step",
    "wrong_before": "cosine with the words of the other captions, before it",
    "pointing": "pointing game on unseen concepts, % in the right quarter (chance 25)",
    "seconds": "seconds of the stage, on this machine",
}

# ---- Means over seeds --------------------------------------------------------------------------------------

# The 97.5 % quantile of Student's t with 3, 4, ... degrees of freedom.
STUDENT = (3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def interval(values) -> tuple:
    """(mean, half the width of its 95 % interval by Student's t, or None for one to three values)."""
    n = len(values)
    mean = sum(values) / n
    if n <= 3:  # the numbers themselves say more
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = STUDENT[n - 4] if n - 4 < len(STUDENT) else 1.96 + 2.6 / (n - 1)  # right to 0.01
    return mean, quantile * math.sqrt(variance / n)


def as_text(values) -> str:
    """The mean and its interval; one to three values themselves; "-" for none."""
    if not values:
        return "-"
    mean, half = interval(values)
    digits = 1 if abs(mean) >= 10 else 2
    if half is None:
        return " / ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def over_things(each: list) -> str:
    """How far the mean would move with other questions: half its 95 % interval over the things asked about.
    `each`: a list for each seed with what is right of each thing, in percent."""
    means = [sum(values) / len(values) for values in zip(*each)]  # of each thing
    if len(means) <= 3:
        return ""
    _, half = interval(means)
    return f" (± {half:.1f})"


def p_value(differences) -> float:
    """How likely paired differences are by chance: over all choices of their signs, the part whose mean is at
    least as far from 0. Exact, without a distribution (Fisher 1935). n pairs reach 2 / 2^n at best."""
    found = abs(sum(differences)) - 1e-9
    as_far = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total = sum(sign * value for sign, value in zip(signs, differences))
        as_far += abs(total) >= found
    return as_far / 2 ** len(differences)


def table(corner: str, columns, rows: dict) -> str:
    """A Markdown table of {row name: texts, one for each column}."""
    lines = [f"| {corner} | {' | '.join(columns)} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, texts in rows.items():
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


# ---- The chart ---------------------------------------------------------------------------------------------


def chart(file, title: str, parts, series: dict) -> None:
    """A PNG with a line for each entry {name: [percentages of several seeds for each part of the data]}.

    The parts stand at even distances; the bars are 95 % intervals.
    """
    image, draw = sheet(900, 540)
    ends = []  # of all bars
    for values in filter(None, itertools.chain(*series.values())):
        mean, half = interval(values)
        ends += [mean - (half or 0), mean + (half or 0)]
    rules = ticks(min(ends), max(ends))
    panel = Panel(80, 80, 680, 460, (-0.5, len(parts) - 0.5), (rules[0], rules[-1]))
    write(draw, panel.left, 24, title, 18, "lm")
    write(draw, panel.left, 56, "% right; bars: 95 % intervals", 14, "lm", GREY)
    write(draw, (panel.left + panel.right) / 2, 512, "part of the instruction data")
    frame(draw, panel, dict(enumerate(parts)), rules)
    for number, (name, cells) in enumerate(series.items()):
        shift = 4 * (number - (len(series) - 1) / 2)  # bars side by side
        color, dashes = style(number)
        measured = [(part, values) for part, values in enumerate(cells) if values]  # others are skipped
        draw_series(draw, panel, measured, (color, dashes), shift)
        y = panel.top + 20 + 26 * number
        line(draw, [(panel.right + 16, y), (panel.right + 56, y)], color, 3, dashes)
        write(draw, panel.right + 64, y, name, 14, "lm")
    save(image, file)


def draw_series(draw, panel: Panel, series: list, look: tuple, shift: float = 0) -> None:
    """A line through the means of [(x, values of several seeds)], a dot on each, the interval as a bar.
    `shift`: pixels to the right."""
    color, dashes = look
    points = []
    for at, values in series:
        mean, half = interval(values)
        x, y = panel.at(at, mean)
        x += shift
        points.append((x, y))
        if half is not None:
            _, top = panel.at(at, mean + half)
            _, bottom = panel.at(at, mean - half)
            line(draw, [(x, bottom), (x, top)], color, 2)
    line(draw, points, color, 3, dashes)
    for point in points:
        dot(draw, point, 5, color, color)


# ---- The report of a comparison ----------------------------------------------------------------------------


def report(out, world: str, size: dict, tuned: dict, cells: list) -> str:
    """Write results.json, results.md and a chart to the folder `out`; return the text of results.md.

    `size` is one of SIZES of lab/compare.py, `tuned` {recipe: what was chosen}. The last line of the text has
    the `claims` as JSON.
    """
    out = Path(out)
    parts = (0, *size["fractions"])
    columns = [f"{part:.0%}" for part in parts]
    measured = [score for score in SCORES if any(score in cell for cell in cells)]
    main = measured[0]
    recipes = list(dict.fromkeys(cell["loss"] for cell in cells))

    def rows(of, recipes=recipes):
        """{name: [of(recipe, part) for each part]}"""
        found = {}
        for recipe in recipes:
            found[NAMES.get(recipe, recipe)] = [of(recipe, part) for part in parts]
        return found

    sections = [introduction(world, size, cells), in_force(tuned, size)]
    for score in measured:
        means = rows(lambda recipe, part: as_text(values(cells, recipe, part, score))
                     + over_things(values(cells, recipe, part, f"{score}_each")))
        sections.append(f"## {SCORES[score]}: by part of the instruction data")
        sections.append(table("recipe", columns, means))
    ratio = {}
    if "none" in recipes:  # otherwise there is nothing to compare with
        ratio = claims(cells, recipes, main)
        others = [recipe for recipe in recipes if recipe != "none"]
        for score in measured:
            gains = rows(lambda recipe, part: gain(cells, recipe, part, score), others)
            heading = f"## Gain over the generative loss, {SCORES[score]}: "
            sections.append(heading + "paired by seed, p by exchange of signs")
            sections.append(table("recipe", columns, gains))
    sections.append(f"ratio {json.dumps(ratio)}")
    text = "\n\n".join(sections)
    (out / "results.md").write_text(text + "\n")
    kept = {"protocol": size, "tuned": tuned, "cells": cells, "ratio": ratio}
    (out / "results.json").write_text(json.dumps(kept))
    title = f"{SCORES[main]}: {size['steps']} align steps, then instruct"
    series = rows(lambda recipe, part: values(cells, recipe, part, main))
    chart(out / "accuracy_by_data.png", title, columns, series)
    return text


def introduction(world: str, size: dict, cells: list) -> str:
    seeds = len({cell["seed"] for cell in cells})
    text = f"""# The recipes compared on the {world} world

{size["steps"]} align steps. Mean of {seeds} seeds on the test split (fewer if a recipe had fewer) and the
95 % interval of the mean by Student's t; of one to three seeds the values. In brackets: the same over the
things asked about (groups of concepts, scenes), as if other ones had been drawn. The world and the towers
were fixed beforehand by criteria that look at no alignment (the LLM's accuracy on text alone, a linear probe
of the ViT). Every recipe had the same records and equal captioning steps."""
    if size["tune"]:
        text += f"""
Every recipe was tuned on the validation split with a seed of its own: first {len(size["lr"])} align rates,
then its weights, then {len(size["instruct_lr"])} instruct rate(s). Nothing was chosen on test questions."""
    return text


def in_force(tuned: dict, size: dict) -> str:
    """A heading and a table: the rates and the weight of each recipe."""
    rows = {}
    for recipe, best in tuned.items():
        weight = "as named" if best["weight"] is None else str(best["weight"])
        rows[NAMES.get(recipe, recipe)] = [str(best["lr"]), str(best["instruct_lr"]), weight]
    how = "tuned" if size["tune"] else "not tuned"
    columns = ["align rate", "instruct rate", "weight"]
    return f"## Rates and weights ({how})\n\n" + table("recipe", columns, rows)


def values(cells, recipe: str, part: float, score: str) -> list:
    """One value for each seed."""
    found = []
    for cell in cells:
        if cell["loss"] == recipe and cell["fraction"] == part and score in cell:
            found.append(cell[score])
    return found


def pairs(cells, recipe: str, part: float, base_part: float, score: str):
    """(value, value of the generative loss) for each seed. With one seed, both runs have the same initial
    projector and the same order of the data."""
    return zip(values(cells, recipe, part, score), values(cells, "none", base_part, score))


def gain(cells, recipe: str, part: float, score: str) -> str:
    """Points over the generative loss, and the p-value of the differences."""
    both = pairs(cells, recipe, part, part, score)
    differences = [ours - theirs for ours, theirs in both]
    if not differences:
        return "-"
    each = []  # of each thing, for each seed
    for ours, theirs in pairs(cells, recipe, part, part, f"{score}_each"):
        each.append([a - b for a, b in zip(ours, theirs)])
    chance = f" (p {p_value(differences):.2g})" if len(differences) > 3 else ""
    return f"{as_text(differences)}{over_things(each)}{chance}"


def claims(cells, recipes, score: str) -> dict:
    """CG-VLM's claim in figures: what each recipe reaches with none and with a tenth of the instruction data,
    as a part of what the generative loss reaches with all of it, paired by seed."""
    result = {}
    for recipe in recipes:
        found = {}
        for part in (0, 0.1):
            both = pairs(cells, recipe, part, 1.0, score)
            ratios = [ours / max(theirs, 0.01) for ours, theirs in both]
            found[f"{part:.0%} over generative 100%"] = as_text(ratios)
        result[NAMES.get(recipe, recipe)] = found
    return result
