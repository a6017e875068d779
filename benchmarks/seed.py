"""SEED-Bench.
"""

from benchmarks.entries import ID, find_files
from benchmarks.questions import LETTER_ANSWER, lettered, to_question
from data import find_image
from plumbing.files import read_entries, read_json



def load(folder, split: str):
    """SEED-Bench.json's image part, in nine dimensions; pictures in SEED-Bench-image/."""
    file = find_files(folder, "SEED-Bench.json")[0]
    kinds = {"question_id": ID, "data_id": str, "data_type": str, "question": str, "answer": str}
    choices = ("choice_a", "choice_b", "choice_c", "choice_d")
    rows = read_entries(file, **kinds, **dict.fromkeys(choices, (str, int, float)))
    names = {number: name for name, number in read_json(file).get("question_type", {}).items()}
    for row in rows:
        if row["data_type"] == split:
            kind, text = row.get("question_type_id"), lettered(row["question"], [row[key] for key in choices])
            image = find_image(folder / "SEED-Bench-image", row["data_id"])
            yield to_question(file, row["question_id"], text, image, row["answer"], names.get(kind, kind),
                              LETTER_ANSWER, options=list("ABCD"))


def parse(text: str, question):
    """SEED-Bench's rule: the answer is the letter and nothing else."""
    return text if text in question["options"] else None
