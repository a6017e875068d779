"""From choices to numbers: accuracy, standard errors, and the floors below which a score means nothing.

A benchmark's `score(questions, choices)` returns a dict. Its floats are percentages (MME's are points), among
them "accuracy"; its ints are counts, and "categories" is a dict of such dicts.
"""

import random
import statistics
from collections import Counter

from benchmarks.questions import grade, has_answers

DRAWS = 400  # of the pictures: so a standard error is right within some 4 %
SHEETS = 100  # of random choices
SUMS = ("perception", "others")  # MME's, over categories: a draw that lacks one has no sum


def percent(rows) -> float:
    """The mean of a list of booleans, or of parts of 1, in percent. None if the list is empty."""
    return round(100 * sum(rows) / len(rows), 2) if rows else None


def grouped(keys, values) -> dict:
    """{key as text: [its values]}, sorted by key, without the values whose key is None."""
    groups = {}
    for key, value in zip(keys, values):
        if key is not None:
            groups.setdefault(str(key), []).append(value)
    return dict(sorted(groups.items()))


def by_category(categories, right) -> dict:
    """{category: {"accuracy", "questions"}}."""
    scores = {}
    for name, values in grouped(categories, right).items():
        scores[name] = {"accuracy": percent(values), "questions": len(values)}
    return scores


def summary(questions, choices, right) -> dict:
    """Accuracy over all questions and by category. `right`: for each question, whether its choice is."""
    categories = [question.get("category") for question in questions]
    return {
        "accuracy": percent(right),
        "questions": len(questions),
        "unparsed": choices.count(None),  # they are wrong, and stay in the denominator
        "categories": by_category(categories, right),
    }


def score_accuracy(questions, choices) -> dict:
    """The score of a benchmark whose choices are right if they equal the answer."""
    return summary(questions, choices, grade(questions, choices))


def measures(scores: dict) -> dict:
    """What of the scores is a percentage."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def standard_errors(score, questions, choices) -> dict:
    """{NAME_se: the standard error, in points} of each percentage NAME that `score` returns.

    Draw the pictures again, with replacement, score, repeat: the spread of the scores is the standard error
    (the bootstrap, Efron 1979). Questions about one picture are not independent, so they are drawn together;
    and so is a group, with its first picture.
    There is none of a single picture, nor of a part of so few that a draw had none of them.
    """
    pictures = {}
    picture_of = {}  # a group's first
    for question, choice in zip(questions, choices):
        picture = question["image"] or question["id"]
        picture = picture_of.setdefault(question.get("group", question["id"]), picture)
        pictures.setdefault(picture, []).append((question, choice))
    pictures = list(pictures.values())
    if len(pictures) == 1:
        return {}

    rng = random.Random(0)
    categories = score(questions, choices).get("categories", {}).keys()
    values = {}
    for _ in range(DRAWS):
        drawn_questions = []
        drawn_choices = []
        for number, picture in enumerate(rng.choices(pictures, k=len(pictures))):
            for question, choice in picture:
                if "group" in question:  # a picture that is drawn twice has two groups
                    question = question | {"group": (number, question["group"])}
                drawn_questions.append(question)
                drawn_choices.append(choice)
        scores = score(drawn_questions, drawn_choices)
        is_whole = scores.get("categories", {}).keys() == categories
        for name, value in measures(scores).items():
            if is_whole or name not in SUMS:
                values.setdefault(name, []).append(value)
    complete = {name: drawn for name, drawn in values.items() if len(drawn) == DRAWS}
    return {f"{name}_se": round(statistics.stdev(drawn), 2) for name, drawn in complete.items()}


def scores_and_errors(score, questions, choices) -> dict:
    """What `score` returns, with standard errors; only the number of questions if we have no answers."""
    if not has_answers(questions):
        return {"questions": len(questions)}
    scores = score(questions, choices)
    return measures(scores) | standard_errors(score, questions, choices) | scores


def in_words(result: dict, wanted=()) -> str:
    """What a person wants to read of scores and errors. Of what is `wanted` and missing, it says why."""
    words = [f"{result['bench']} of {result['ckpt']}: {counted(result['questions'], 'question')}"]
    for name in measures(result):
        if not name.endswith("_se"):
            words.append(f"{name} {with_error(result, name)}")
    for by in ("likelihood", "words"):
        if by in result:
            words.append(f"by {by} {with_error(result[by], 'accuracy')}")
    if "unparsed" in result:
        words.append(f"{counted(result['unparsed'], 'answer')} that the rule cannot read")
    for name, floor in result.get("floors", {}).items():
        name = name.replace("_picture", " the picture").replace("_", " ")
        words.append(f"{name} {floor['accuracy']}")
    why = "no question has choices of this kind" if "accuracy" in result else "a server or a judge scores it"
    words += [f"no {name} ({why})" for name in wanted if name not in result]
    return ", ".join(words)


def with_error(scores: dict, name: str) -> str:
    error = scores.get(f"{name}_se")
    return str(scores[name]) if error is None else f"{scores[name]} (standard error {error})"


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def score_floors(score, questions, blind) -> dict:
    """The percentages that need no eyes: those of `blind`, the choices of the model without pictures, of
    random choices, and of always the commonest answer."""
    floors = {"without_picture": measures(score(questions, blind))}
    answers = Counter(question["answer"] for question in questions if question.get("options"))
    if not answers:
        return floors

    def choose(from_options):  # no choice for a question without options
        return [from_options(q["options"]) if q.get("options") else None for q in questions]

    rng = random.Random(0)
    total = Counter()
    for _ in range(SHEETS):
        total.update(measures(score(questions, choose(rng.choice))))
    floors["chance"] = {name: round(value / SHEETS, 2) for name, value in total.items()}
    commonest = answers.most_common(1)[0][0]
    floors[f"always {commonest}"] = measures(score(questions, choose(lambda options: commonest)))
    return floors
