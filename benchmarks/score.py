"""From right and wrong to numbers, how sure they are, and what they are measured against.
"""

import itertools
import math
import random
from collections import Counter

from benchmarks.questions import grade



def percent(rows) -> float:
    """The mean of a list of booleans, or of parts of 1, in percent."""
    return round(100 * sum(rows) / max(1, len(rows)), 2)  # max: a split may have no question with a picture


def standard_error(influences, questions) -> float:
    """Of a score in percent, from how much each question moves it (its influence, in parts of 1).

    Questions about one picture are not independent, so their influences are added before they are squared
    (Liang and Zeger 1986). Of a mean they are (right - mean) / n, and where each question has its own picture
    this is the binomial sqrt(p (1 - p) / n).
    """
    of_picture = Counter()
    for value, question in zip(influences, questions):
        of_picture[question["image"] or question["id"]] += value
    return round(100 * math.sqrt(sum(value**2 for value in of_picture.values())), 2)


def accuracy(right, questions, name: str = "accuracy") -> dict:
    """{name: the mean of `right` in percent, name_se: its standard error in points}."""
    n, total = max(1, len(right)), sum(right)
    return {name: percent(right),
            f"{name}_se": standard_error([(value - total / n) / n for value in right], questions)}


def grouped(keys, values) -> dict:
    """{key: [its values]}, sorted by key."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(str(key), []).append(value)
    return dict(sorted(groups.items()))


def score_accuracy(questions, choices, right=None, parts=None) -> dict:
    """Micro average, and by category, or by `parts`: for each question the names of those that it is in.
    `right`: where a choice may be right without being the answer."""
    right, categories = grade(questions, choices) if right is None else right, {}
    for value, question, names in zip(right, questions, parts or itertools.repeat(None)):
        for name in names or [str(question.get("category"))]:
            categories.setdefault(name, []).append(value)
    for name, values in categories.items():
        categories[name] = {"accuracy": percent(values), "questions": len(values)}
    return accuracy(right, questions) | {"questions": len(questions), "unparsed": choices.count(None),
                                         "categories": dict(sorted(categories.items()))}


def score_floors(bench, questions, blind) -> dict:
    """The percentages of a model that sees no picture (`blind`, its choices), and of no model at all: chance
    (the mean of 100 random sheets) and the commonest of the right answers, wherever it is an option."""
    def sheet(choose):
        return [choose(question) if question.get("options") else None for question in questions]

    sheets, floors, rng = {"without_picture": [blind]}, {}, random.Random(0)
    if common := Counter(question["answer"] for question in questions if question.get("options")):
        letter = common.most_common(1)[0][0]
        sheets["chance"] = [sheet(lambda question: rng.choice(question["options"])) for _ in range(100)]
        sheets[f"always {letter}"] = [sheet(lambda question: letter)]
    for name, answers in sheets.items():
        total = Counter()
        for choices in answers:
            scores = bench.score(questions, choices)  # its floats are percentages and their errors
            total.update({key: x for key, x in scores.items() if isinstance(x, float) and key[-3:] != "_se"})
        floors[name] = {key: round(value / len(answers), 2) for key, value in total.items()}
    return floors
