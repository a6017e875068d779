"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): open questions about photographs of COCO.

Rule: VQA accuracy, computed by the server (eval.ai), because only it has the answers of test-dev and test.
We write its file. That must have every question of the test split, so the others get "".

    v2_OpenEnded_mscoco_SPLIT_questions.json     {"questions": [question_id, image_id, question]}
    test2015/                                    COCO_test2015_IMAGE_ID.jpg
"""

import json
from pathlib import Path

from benchmarks.entries import ID, find_entries, read_entries
from benchmarks.questions import to_question
from benchmarks.vqa import normalise
from data import find_image

KINDS = {"question_id": ID, "image_id": int, "question": str}
parse = normalise


def load(folder, split: str):
    images = split.replace("-dev", "")
    for file, row in find_entries(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", **KINDS):
        image = find_image(folder / images, f"COCO_{images}_{row['image_id']:012d}.jpg")
        yield to_question(file, row["question_id"], row["question"], image)


def submit(questions, answers, file):
    """Write the server's list of normalised answers; with "" for the rest of test, if its file is there."""
    texts = {}
    test = Path(questions[0]["file"]).with_name("v2_OpenEnded_mscoco_test2015_questions.json")
    if test.exists():
        for row in read_entries(test, question_id=ID):
            texts[row["question_id"]] = ""
    for question, text in zip(questions, answers):
        texts[question["id"]] = normalise(text)
    rows = [{"question_id": name, "answer": text} for name, text in texts.items()]
    Path(file).write_text(json.dumps(rows))
