"""Answers on disk: a JSON line for each as it comes, so that a killed evaluation goes on; at the end all in
BENCH.json, because a score that surprises is understood by reading them.
"""

import json
from pathlib import Path
from urllib.parse import quote

from benchmarks import BENCHES
from benchmarks.entries import read_entries
from data import key_of
from plumbing.files import named, old_name, read_json, read_text, whole
from plumbing.ranks import rank, say


def name_result(folder, name: str, args) -> Path:
    """FOLDER/BENCH, and the options that make it another question: so no result is written over another's."""
    split = None if args.split == BENCHES[name].split else args.split
    options = {"split": split, "limit": args.limit, "template": args.template}
    words = [f"{key}={quote(str(value), safe='')}" for key, value in options.items() if value is not None]
    return Path(folder) / ".".join([name, *words])


def key_of_answer(question: dict) -> int:
    """Of all that the answer is made of: model, texts, and the picture's path, size and time of change."""
    picture = question["image"]
    if isinstance(picture, Path):
        facts = picture.stat()
        picture = str(picture.absolute()), facts.st_size, facts.st_mtime_ns
    texts = question.get("texts")
    return key_of((question.get("model"), question["id"], question["prompt"], texts, key_of(picture)))


def append_answers(file, questions, answers):
    """Add the lines of a batch, in one write."""
    lines = ""
    for question, answer in zip(questions, answers):
        line = {"id": question["id"], "made_of": key_of_answer(question), "answer": answer}
        lines += json.dumps(line) + "\n"
    with named(file, "not written; --out names another folder"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as opened:
            opened.write(lines)


def read_answers(file, questions) -> dict:
    """{index of a question: answer} of what FILE.0.jsonl, FILE.1.jsonl .. hold.

    A line that a kill has cut short is dropped. So is an answer that was made of something else.
    """
    answers = {}
    index = {key_of_answer(question): i for i, question in enumerate(questions)}
    for part in sorted(Path(file).parent.glob(f"{Path(file).name}.*.jsonl")):
        text = read_text(part)
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            part.write_text(complete)
        others = 0
        for row in read_entries(part, answer=str) if complete else []:
            i = index.get(row.get("made_of"))
            if i is None:
                others += 1
            else:
                answers[i] = row["answer"]
        if others:
            say(f"{part}: {others} answers are of another model, template, question or picture: asked anew")
    return answers


def write_predictions(file, scores: dict, questions, answers, choices):
    """Write FILE.json on rank 0: the scores, and each question with its answer ("text") and what the rule
    reads from it ("choice"). An older file with other answers becomes FILE.json.old."""
    if rank() > 0:
        return
    predictions = []
    for question, text, choice in zip(questions, answers, choices):
        prediction = question | {"text": text, "choice": choice}
        for key in ("row", "open"):  # a server's, and a part of the prompt
            prediction.pop(key, None)
        image = question["image"]
        prediction["image"] = "in the table" if isinstance(image, bytes) else image and str(image)
        predictions.append(prediction)
    file = Path(f"{file}.json")
    before = read_json(file) if file.exists() else None
    if isinstance(before, dict) and before.get("predictions") == json.loads(json.dumps(predictions)):
        older = before["scores"]  # an earlier command may have asked for floors, or by another --score
        floors = older.get("floors", {}) | scores.get("floors", {})
        scores = older | scores
        if floors:
            scores["floors"] = floors
    elif before:
        old = old_name(file)
        file.rename(old)
        say(f"{file} had other answers: it is now {old}")
    with whole(file) as building:
        building.write_text(json.dumps({"scores": scores, "predictions": predictions}, indent=1))
