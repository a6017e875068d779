"""MMMU.
"""

import ast
import itertools
import random
import re
import string

from benchmarks.entries import find_entries
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER, to_question
from benchmarks.score import score_accuracy
from data import find_image



def load(folder, split: str):
    """MMMU's {split}*.json(l), a file for each subject or one for all: id, question, options (a list, or its
    text), answer, question_type, image_1 to image_7, each a path beside the file or {"bytes": base64}.
    Asked as in LLaVA's own run: about the first picture, `<image 2>` staying text."""
    kinds = {"id": str, "question": str, "options": (str, list), "answer": (str, list), "question_type": str,
             "image_1": (str, dict, type(None))}
    for file, row in find_entries(folder, f"**/{split}*.json*", **kinds):
        pictures = [row[f"image_{i}"] for i in range(1, 8) if row.get(f"image_{i}")]
        image = pictures[0] if pictures else None
        if isinstance(image, dict):
            image = image["bytes"].encode() if image.get("bytes") else image.get("path")
        image = find_image(file.parent, image) if isinstance(image, str) else image
        asked, ending, answer, more = row["question"], SHORT_ANSWER, as_list(row["answer"]), {}
        if row["question_type"] != "open":  # multiple-choice
            choices, answer, ending = as_list(row["options"]), row["answer"], LETTER_ANSWER
            more = {"choices": choices, "options": list(string.ascii_uppercase[: len(choices)])}
            asked += "\n" + "".join(f"({x}) {text}\n" for x, text in zip(more["options"], choices))
        subject = row["id"].partition("_")[2].rpartition("_")[0]  # of validation_Art_Theory_3
        yield to_question(file, row["id"], asked, image, answer, subject, ending,
                          pictures=len(pictures), **more)


def as_list(value) -> list:
    """MMMU's lists are written as Python texts; a text that is none is a list of itself, a broken one is
    empty."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if re.fullmatch(r"\[.*\]", value, re.DOTALL) else [value]
        except (SyntaxError, ValueError):
            return []
    return [str(item) for item in value]


def parse(text: str, question):
    """MMMU's rule. Multiple choice: of the letters in brackets, else of those that stand alone, else (in an
    answer of more than five words) of the choices told, the last; else None. Open: a list of candidates."""
    if not question.get("options"):
        return open_candidates(text)
    for sign in ",.!?;:'":
        text = text.strip(sign)
    forms, letters = [], question["options"]
    for form in ("({})", " {} "):
        forms.append((f" {text} ", [form.format(letter) for letter in letters]))
    if len(text.split()) > 5:
        forms.append((text.lower(), [choice.lower() for choice in question["choices"]]))
    for said, wanted in forms:
        places = [said.rfind(form) for form in wanted]
        if max(places) >= 0:
            return letters[places.index(max(places))]
    return None


def open_candidates(text: str) -> list:
    """What MMMU's rule takes from an open answer: of each line the shortest end behind a word that announces
    a result (if there is none, the whole answer), and the numbers therein, as `normalised` has them."""
    text = text.strip().strip(".").lower()
    found, lines = [], text.split("\n")
    words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for number, line in enumerate(lines):
        last = ["="] if number == len(lines) - 1 else []
        ends = [line.split(word)[-1].strip() for word in words + last if word in line]
        shortest = min(filter(None, ends), key=len, default="")
        found += [shortest] if shortest and shortest not in list(":,.!?;'") else []
    found = found or [text]
    for end in list(found):
        for number in (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                       r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"):
            found += re.findall(number, end)
    return [value for end in found for value in normalised(end)]


def normalised(text: str) -> list:
    """A number rounded to two places, or the lower-case text; of one letter only with a space beside it."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score(questions, choices) -> dict:
    """Mean over all questions. As in the official scorer, an unreadable choice is a guess (seed 42); an open
    answer is right where an expected number is among its candidates, or an expected text within one."""
    right, rng = [], random.Random(42)
    for question, choice in zip(questions, choices):
        if question.get("options"):
            choice = rng.choice(question["options"]) if choice is None else choice
            right.append(choice == question["answer"])
        else:
            wanted = [value for answer in question["answer"] for value in normalised(answer)]
            pairs = itertools.product(wanted, choice or ())
            right.append(any(a == b or (type(a) is type(b) is str and a in b) for a, b in pairs))
    further = sum(question["pictures"] > 1 for question in questions)
    return score_accuracy(questions, choices, right) | {"questions_with_further_pictures": further}
