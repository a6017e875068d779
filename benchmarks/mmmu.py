"""MMMU (Yue et al. 2023, arXiv 2311.16502): exams of 30 college subjects; multiple choice and open.

Rule: the authors' eval_utils.py. It always finds a choice: what it cannot read is a guess (seed 42). The
validation split has 900 questions. As in LLaVA's own run, the model sees the first picture of each;
`<image 2>` stays text. The score tells how many have further ones.

    **/SPLIT*.json, .jsonl     one file for each subject, or one for all: id, question, options (a list, or
                               its text in Python), answer, question_type, image_1 to image_7, each a path
                               beside the file or {"bytes": base64}
"""

import ast
import random
import re
from string import ascii_uppercase

from benchmarks.entries import find_entries
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER, to_question
from benchmarks.score import summary
from data import find_image

TEXTS = (str, list)
PICTURE = (str, dict, type(None))
KINDS = {"id": str, "question": str, "question_type": str, "options": TEXTS, "answer": TEXTS,
         "image_1": PICTURE}
GUESS_SEED = 42


def load(folder, split: str):
    """The questions. `pictures`: how many each has. The answer of an open one is a list of right ones."""
    for file, row in find_entries(folder, f"**/{split}*.json*", **KINDS):
        pictures = [row[f"image_{number}"] for number in range(1, 8) if row.get(f"image_{number}")]
        image = find_picture(file, pictures[0]) if pictures else None
        text = row["question"]
        subject = row["id"].partition("_")[2].rpartition("_")[0]  # of validation_Art_Theory_3
        answer = None if row["answer"] == "?" else row["answer"]  # the test split's
        if row["question_type"] != "multiple-choice":
            yield to_question(file, row["id"], text, image, answer and as_list(answer), subject, SHORT_ANSWER,
                              pictures=len(pictures))
        else:
            choices = as_list(row["options"])
            options = list(ascii_uppercase[: len(choices)])
            text += "\n"
            for letter, choice in zip(options, choices):
                text += f"({letter}) {choice}\n"
            yield to_question(file, row["id"], text, image, answer, subject, LETTER_ANSWER,
                              pictures=len(pictures), choices=choices, options=options, open=row["question"])


def find_picture(file, picture):
    """The path or the bytes of a picture in a row of `file`."""
    if isinstance(picture, dict):
        if picture.get("bytes"):
            return picture["bytes"].encode()
        picture = picture.get("path")
    return find_image(file.parent, picture) if isinstance(picture, str) else picture


def as_list(value) -> list:
    """The texts of a list, of a list written in Python, or of a single text. A broken list has none."""
    if isinstance(value, str):
        if not re.fullmatch(r"\[.*\]", value, re.DOTALL):
            return [value]
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return []
    return [str(item) for item in value]


def parse(text: str, question: dict):
    """The letter of a multiple-choice question, or None; of an open one, a list of candidates."""
    if question.get("options"):
        return read_letter(text, question["options"], question["choices"])
    return read_candidates(text)


def read_letter(text: str, letters: list, choices: list):
    """The last letter in brackets; else the last that is a word; else, in an answer of more than five words,
    the last choice told; else None."""
    for sign in ",.!?;:'":
        text = text.strip(sign)
    in_brackets = [f"({letter})" for letter in letters]
    as_words = [f" {letter} " for letter in letters]
    text = f" {text} "
    attempts = [(text, in_brackets), (text, as_words)]
    if len(text.split()) > 5:
        attempts.append((text.lower(), [choice.lower() for choice in choices]))
    for said, wanted in attempts:
        places = [said.rfind(form) for form in wanted]  # -1: not there
        if max(places) >= 0:
            return letters[places.index(max(places))]
    return None


ANNOUNCERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1.2
)


def read_candidates(text: str) -> list:
    """What an open answer may mean: the results that its lines announce (if none does, the whole answer), and
    the numbers in them, as `normalised` has them."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    results = []
    for line in lines[:-1]:
        results += read_result(line, ANNOUNCERS)
    results += read_result(lines[-1], (*ANNOUNCERS, "="))
    results = results or [text]
    numbers = []
    for result in results:
        for pattern in NUMBERS:
            numbers += re.findall(pattern, result)
    candidates = []
    for found in results + numbers:
        candidates += normalised(found)
    return candidates


def read_result(line: str, announcers) -> list:
    """The shortest text behind the last of an announcing word, in a list; an empty one if there is none.

    The official loop forgets what it has when a line ends with one of these words, and goes on with the next.
    """
    shortest = ""
    for word in announcers:
        end = line.split(word)[-1].strip()
        if word in line and (not shortest or len(end) < len(shortest)):
            shortest = end
    is_mark = shortest in list(":,.!?;'")
    return [shortest] if shortest and not is_mark else []


def normalised(text: str) -> list:
    """A number rounded to two places, or the text in lower case. A single letter needs a space beside it."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(question: dict, candidates) -> bool:
    """Of an open question: an expected number is among the candidates, or an expected text is within one."""
    texts = [candidate for candidate in candidates if isinstance(candidate, str)]
    wanted = [item for answer in question["answer"] for item in normalised(answer)]
    for item in wanted:
        if item in candidates or isinstance(item, str) and any(item in text for text in texts):
            return True
    return False


def score(questions, choices) -> dict:
    """The mean over all questions, and by subject."""
    rng = random.Random(GUESS_SEED)
    right = []
    for question, choice in zip(questions, choices):
        if not question.get("options"):
            right.append(is_right(question, choice or []))
            continue
        if choice is None:
            choice = rng.choice(question["options"])
        right.append(choice == question["answer"])
    further = sum(question["pictures"] > 1 for question in questions)
    return summary(questions, choices, right) | {"questions_with_further_pictures": further}
