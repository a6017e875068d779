"""VQAv2.
"""

import json
from pathlib import Path

from benchmarks.entries import ID, find_entries
from benchmarks.questions import to_question
from benchmarks.vqa import normalise
from plumbing.files import read_entries

parse = normalise



def load(folder, split: str):
    """v2_OpenEnded_mscoco_{split}_questions.json; pictures in test2015/. The answers are the server's."""
    pattern, images = f"v2_OpenEnded_mscoco_{split}_questions.json", split.replace("-dev", "")
    for file, row in find_entries(folder, pattern, question_id=ID, image_id=int, question=str):
        image = folder / images / f"COCO_{images}_{row['image_id']:012d}.jpg"
        yield to_question(file, row["question_id"], row["question"], image)


def submit(questions, answers, file):
    """The server's JSON: normalised answers, and "" for the rest of the test split if its file is there."""
    texts = {question["id"]: normalise(text) for question, text in zip(questions, answers)}
    test = Path(questions[0]["file"]).with_name("v2_OpenEnded_mscoco_test2015_questions.json")
    rest = read_entries(test, question_id=ID) if test.exists() else []
    texts = {row["question_id"]: "" for row in rest} | texts
    rows = [{"question_id": number, "answer": text} for number, text in texts.items()]
    Path(file).write_text(json.dumps(rows))
