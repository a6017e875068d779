"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): open questions, 218, that need several skills at once.

Rule: a language model judges the answers (the authors' evaluator asks GPT-4). We write the file that it
reads.

    mm-vet.json     {id: {"imagename", "question", "answer", "capability"}}
    images/         the pictures
"""

import json
from pathlib import Path

from benchmarks.entries import find_entries
from benchmarks.questions import to_question
from data import find_image


def load(folder, split: str):
    for file, row in find_entries(folder, "mm-vet.json", id=str, imagename=str, question=str):
        image = find_image(folder / "images", row["imagename"])
        yield to_question(file, row["id"], row["question"], image, ending="")


def parse(text: str, question=None) -> str:
    """The answer as it is."""
    return text


def submit(questions, answers, file):
    """Write {id: answer}."""
    texts = {question["id"]: text for question, text in zip(questions, answers)}
    Path(file).write_text(json.dumps(texts, indent=1))
