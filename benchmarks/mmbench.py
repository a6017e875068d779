"""MMBench (Liu et al. 2023, arXiv 2307.06281), English and Chinese: every question with its options rotated.

Rule: that of the authors' VLMEvalKit of 2024 (later ones look at the last words of a long answer alone),
without the language model that it asks about answers which its rules cannot read. A question is right if it
is right in all its rotations ("circular"). mmbench_dev_20230712 has 1,176 questions in 4,377 rows, the
Chinese mmbench_dev_cn_20231003 1,164 in 4,329.

    mmbench_dev_*.tsv     index, question, hint, A to D, answer, category, image

The row index + k x 10^6 asks question `index` again, with its options rotated. Of the choices only some at
the end may be missing. An image is base64, or the index of the row that has it. A test split has no answers:
a server scores its file.
"""

import csv
from collections import Counter
from functools import partial

from benchmarks.entries import find_files, read_entries
from benchmarks.questions import LETTER_ANSWER, grade, lettered, to_question
from benchmarks.score import grouped, percent, summary
from plumbing.ranks import say

COLUMNS = ("index", "question", "A", "B", "C", "D", "image")
# What pandas reads as missing, as LLaVA's and the authors' readers do.
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
           "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
CHINESE_ANSWER = "\n请直接回答选项字母。"
ROTATION = 10**6


def load(folder, split: str, chinese: bool = False):
    """The rows of the one table with `split` in its name (and cn, if Chinese)."""
    file = find_table(folder, split, chinese)
    rows = read_entries(file, **dict.fromkeys(COLUMNS, str))
    images = {row["index"]: row["image"] for row in rows}
    counts = {}
    for row in rows:
        if not row["index"].isdecimal():
            raise ValueError(f"{file}: the index {row['index']!r} is not a number")
        group = row["group"] = int(row["index"]) % ROTATION
        counts[group] = max(counts.get(group, 0), count_choices(row))
    rotations = Counter(row["group"] for row in rows)
    short = sum(rotations[group] < count for group, count in counts.items())
    if short:
        say(f"{file}: questions without all their rotations: {short}; their circular score is too good")
    for row in rows:
        # A choice may be "None". In some rotation it is not the last.
        options = list("ABCD"[: counts[row["group"]]])
        choices = [row[letter] for letter in options]
        text = row["question"]
        hint = given(row, "hint")
        if hint and hint.lower() not in ("nan", "none"):  # as LLaVA
            text = f"{hint}\n{text}"
        image = images.get(row["image"], row["image"])
        answer = given(row, "answer")
        ending = CHINESE_ANSWER if chinese else LETTER_ANSWER
        asked = lettered(text, choices)
        yield to_question(file, row["index"], asked, image.encode(), answer, given(row, "category"), ending,
                          options=options, choices=choices, open=text, group=row["group"],
                          row=row_of_server(row))


load_chinese = partial(load, chinese=True)


def find_table(folder, split: str, chinese: bool):
    """The file. Tables of both languages may lie together, and `dev_en` beside `dev_en_v11`."""
    files = []
    split = split.lower()
    for file in find_files(folder, "*.tsv"):
        name = file.stem.lower()
        if split in name and ("cn" in name) == chinese:
            files.append(file)
    files = [file for file in files if file.stem.lower().endswith(split)] or files
    if len(files) != 1:
        names = [file.name for file in files]
        raise ValueError(f"{folder}: --split has to name one table; {split!r} fits {names}")
    return files[0]


def given(row: dict, column: str):
    """The text in a column, or None."""
    text = row.get(column)
    return None if text in MISSING else text


def count_choices(row: dict) -> int:
    """How many there are up to the last that is not missing."""
    count = 0
    for number, letter in enumerate("ABCD", start=1):
        if given(row, letter):
            count = number
    return count


def row_of_server(row: dict) -> dict:
    """What the server wants to have back of a row."""
    columns = ("index", "question", "A", "B", "C", "D", "answer", "split")
    return {column: row[column] for column in columns if column in row}


REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))  # no part of a word


def parse(text: str, question: dict):
    """The one letter that is a word of the answer; else the one choice whose text is told; else None. Who
    refuses, or says Z and no letter, has told none."""
    words = text.translate(SIGNS).split()
    told = [letter for letter in question["options"] if letter in words]
    if any(refusal in text for refusal in REFUSALS) or (not told and "Z" in words):
        return None
    if len(told) != 1:
        pairs = zip(question["options"], question["choices"])
        told = [letter for letter, choice in pairs if choice and choice.lower() in text.lower()]
    return told[0] if len(told) == 1 else None


def score(questions, choices) -> dict:
    """Accuracy of the questions that are right in every rotation; `accuracy_single`: of all rows."""
    right = grade(questions, choices)
    names = [question["group"] for question in questions]
    groups = grouped(names, zip(questions, right)).values()
    first_rows = [rows[0][0] for rows in groups]
    right_in_all = [all(is_right for _, is_right in rows) for rows in groups]
    scores = summary(first_rows, choices, right_in_all)
    return scores | {"accuracy_single": percent(right), "rotations": len(questions)}


def submit(questions, answers, file):
    """Write the server's table as LLaVA does. The server wants Excel: README.md says how to convert it."""
    columns = list(questions[0]["row"])
    columns.insert(6, "prediction")
    with open(file, "w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, columns, delimiter="\t")
        table.writeheader()
        for question, text in zip(questions, answers):
            table.writerow(question["row"] | {"prediction": text})
