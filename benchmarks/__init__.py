"""Benchmarks by their official rules. BENCHES is their table; each has a file of its own.

`load` makes questions from the official files, `parse` reads a choice from an answer by the official rule,
and `score` makes numbers from choices. `submit` writes the file that a server or a judge wants. questions.py
says what a question is, README.md how all are run.
"""

from pathlib import Path
from typing import Callable, NamedTuple

from benchmarks import gqa, mmbench, mme, mmmu, mmvet, pope, scienceqa, seed, textvqa, vqav2
from benchmarks.questions import has_answers
from benchmarks.score import score_accuracy
from data import IMAGE
from plumbing.files import named


class Bench(NamedTuple):
    folder: str  # its usual name
    split: str  # if none is named
    load: Callable  # (folder, split) -> questions
    parse: Callable  # (answer, question) -> choice, or None if the rule cannot read it
    score: Callable | None  # (questions, choices) -> {name: number}; None: a server or a judge does it
    submit: Callable | None = None  # (questions, answers, file) -> None
    tokens: int = 32  # the most tokens of an answer


BENCHES = {
    "scienceqa": Bench("ScienceQA", "test", scienceqa.load, scienceqa.parse, scienceqa.score),
    "pope": Bench("POPE", "", pope.load, pope.parse, pope.score),
    "mme": Bench("MME_Benchmark_release_version", "", mme.load, mme.parse, mme.score),
    "seed": Bench("SEED-Bench", "image", seed.load, seed.parse, score_accuracy),
    "mmbench": Bench("MMBench", "dev", mmbench.load, mmbench.parse, mmbench.score, mmbench.submit),
    "mmbench-cn": Bench("MMBench-CN", "dev", mmbench.load_chinese, mmbench.parse, mmbench.score,
                        mmbench.submit),
    "gqa": Bench("GQA", "testdev_balanced", gqa.load, gqa.parse, score_accuracy),
    "textvqa": Bench("TextVQA", "val", textvqa.load, textvqa.parse, textvqa.score),
    "vqav2": Bench("VQAv2", "test-dev2015", vqav2.load, vqav2.parse, None, vqav2.submit),
    "mmmu": Bench("MMMU", "validation", mmmu.load, mmmu.parse, mmmu.score, tokens=128),
    "mmvet": Bench("mm-vet", "", mmvet.load, mmvet.parse, None, mmvet.submit, tokens=1024),
}


def load_questions(name: str, folder, split=None, limit=None) -> list:
    """The questions of a benchmark, checked; with `limit` the first so many, or so many groups."""
    bench = BENCHES[name]
    if split is None:
        split = bench.split
    with named(folder, f"not in the layout of {name}"):
        questions = list(bench.load(Path(folder), split))
    if not questions:
        raise ValueError(f"{folder}: no questions of {name} in split {split!r}")
    check(questions)
    groups = [question.get("group", question["id"]) for question in questions]
    first = set(list(dict.fromkeys(groups))[:limit])
    return [question for question, group in zip(questions, groups) if group in first]


def check(questions):
    """ValueError for the first question that cannot be asked or scored."""
    is_scored = has_answers(questions)
    seen = set()
    for question in questions:
        image = question["image"]
        options = question.get("options")
        choices = question.get("choices")
        answer = question["answer"]
        if question["id"] in seen:
            refuse(question, "is there twice")
        if not image and question["prompt"].startswith(IMAGE):
            refuse(question, "has no picture")
        if isinstance(image, Path) and not image.is_file():
            refuse(question, f"asks about a picture that is not there: {image}")
        if options == []:
            refuse(question, "has no options")
        if choices and len(choices) != len(options or ()):
            refuse(question, f"has {len(choices)} choices for {len(options or ())} options")
        if choices and "open" not in question:
            refuse(question, "has choices, and no `open`: the question without them")
        if is_scored and answer in (None, "", [], [""]):
            refuse(question, "has no answer")
        if options and answer is not None and answer not in options:
            refuse(question, f"has the answer {answer!r}, which is none of {', '.join(options)}")
        seen.add(question["id"])


def refuse(question: dict, problem: str):
    raise ValueError(f"{question['file']}: question {question['id']!r} {problem}")
