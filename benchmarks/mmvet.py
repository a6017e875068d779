"""MM-Vet.
"""

import json
from pathlib import Path

from benchmarks.entries import find_entries
from benchmarks.questions import to_question
from data import find_image



def load(folder, split: str):
    """mm-vet.json: id -> imagename, question; pictures in images/. A language model judges."""
    for file, row in find_entries(folder, "mm-vet.json", id=str, imagename=str, question=str):
        image = find_image(folder / "images", row["imagename"])
        yield to_question(file, row["id"], row["question"], image, ending="")


def submit(questions, answers, file):
    """What MM-Vet's judge reads: {id: answer}."""
    texts = {question["id"]: text for question, text in zip(questions, answers)}
    Path(file).write_text(json.dumps(texts, indent=1))
