"""Answers on disk: a JSON line for each as it comes, so that a killed evaluation goes on; at the end all in
BENCH.json, because a score that surprises is understood by reading them.
"""

import json
from pathlib import Path

from benchmarks.entries import ID
from plumbing.files import read_entries, read_text, whole


def append_answers(file, questions, answers):
    """Add the lines of a batch, in one write."""
    lines = ""
    for question, answer in zip(questions, answers):
        line = {"id": question["id"], "prompt": question["prompt"], "answer": answer}
        lines += json.dumps(line) + "\n"
    with open(file, "a") as opened:
        opened.write(lines)


def read_answers(file, questions) -> dict:
    """{index of a question: answer} of what FILE.0.jsonl, FILE.1.jsonl .. hold.

    A line that a kill has cut short is dropped. ValueError for an answer to none of the questions.
    """
    answers = {}
    index = {question["id"]: i for i, question in enumerate(questions)}
    for part in sorted(Path(file).parent.glob(f"{Path(file).name}.*.jsonl")):
        text = read_text(part)
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            part.write_text(complete)
        if not complete:
            continue
        for row in read_entries(part, id=ID, prompt=str, answer=str):
            i = index.get(row["id"])
            if i is None or questions[i]["prompt"] != row["prompt"]:
                raise ValueError(f"{part}: question {row['id']!r} is not asked now, or reads otherwise; "
                                 "go on with the options it was begun with, or remove the file")
            answers[i] = row["answer"]
    return answers


def write_predictions(file, scores: dict, questions, answers, choices):
    """The scores, and every question with its answer ("text") and what the rule reads from it ("choice")."""
    predictions = []
    for question, text, choice in zip(questions, answers, choices):
        prediction = question | {"text": text, "choice": choice}
        prediction.pop("row", None)
        if isinstance(question["image"], bytes):
            prediction["image"] = "in the table"
        elif question["image"]:
            prediction["image"] = str(question["image"])
        predictions.append(prediction)
    with whole(file) as building:
        building.write_text(json.dumps({"scores": scores, "predictions": predictions}, indent=1))
