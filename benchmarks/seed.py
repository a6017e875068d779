"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): multiple choice in nine dimensions; its image part.

Rule: the answer is the letter and nothing else, as LLaVA scores it. There are 14,233 questions about
pictures. (The authors' own scorer ranks the choices by likelihood, as `--score words` does.)

    SEED-Bench.json       {"questions": [...], "question_type": {name of a dimension: number}}
    SEED-Bench-image/     the pictures, DATA_ID without an ending
"""

from benchmarks.entries import ID, find_files, read_entries
from benchmarks.questions import LETTER_ANSWER, lettered, to_question
from data import find_image
from plumbing.files import read_json

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
KINDS = {"question_id": ID, "data_id": str, "data_type": str, "question": str, "answer": str}
KINDS |= {name: (str, int, float) for name in CHOICES}


def load(folder, split: str):
    """The questions whose `data_type` is the split."""
    file = find_files(folder, "SEED-Bench.json")[0]
    rows = read_entries(file, **KINDS)
    dimensions = read_json(file).get("question_type", {})
    names = {number: name for name, number in dimensions.items()}
    for row in rows:
        if row["data_type"] == split:
            choices = [str(row[name]) for name in CHOICES]
            text = lettered(row["question"], choices)
            image = find_image(folder / "SEED-Bench-image", row["data_id"])
            dimension = row.get("question_type_id")
            category = names.get(dimension, dimension)
            yield to_question(file, row["question_id"], text, image, row["answer"], category, LETTER_ANSWER,
                              options=list("ABCD"), choices=choices, open=row["question"])


def parse(text: str, question: dict):
    """The answer if it is one of the letters, else None."""
    return text if text in question["options"] else None
