"""ScienceQA: problems.json, pid_splits.json, images/{split}/{pid}/image.png
"""

import re
from pathlib import Path

from benchmarks.questions import LETTER_ANSWER, LETTERS, grade
from benchmarks.score import accuracy, score_accuracy
from data import IMAGE, find_image
from plumbing.files import read_entries, read_json



def to_prompt(problem: dict) -> str:
    """LLaVA-1.5's zero-shot prompt of an entry of problems.json: context if there is one, bare letters."""
    lines = [f"Context: {problem['hint']}"] if problem["hint"] else []
    lines.append(problem["question"])
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"])]
    prompt = "\n".join(lines).replace("  ", " ") + LETTER_ANSWER
    return f"{IMAGE}\n{prompt}" if problem["image"] else prompt


def load(folder, split: str = "test") -> list:
    """[{"id", "prompt", "image" path or None, "num_choices", "options", "answer" letter, "subject", "grade",
    "hint", "file"}], as pid_splits.json has them."""
    folder, questions = Path(folder), []
    file, splits = folder / "problems.json", read_json(folder / "pid_splits.json")
    if not isinstance(splits, dict):
        raise ValueError(f"{folder / 'pid_splits.json'}: not a dict of splits")
    if not isinstance(splits.get(split), list):
        raise ValueError(f"{folder / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    maybe = (str, type(None))
    kinds = {"question": str, "choices": list, "answer": int, "hint": maybe, "image": maybe}
    problems = {problem["id"]: problem for problem in read_entries(file, id=str, **kinds)}
    for pid in map(str, splits[split]):
        problem = problems.get(pid)
        if problem is None:
            raise ValueError(f"{file}: problem {pid!r} is missing; is it of another split?")
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise ValueError(f"{file}: problem {pid!r} has no choice {problem['answer']}")
        if not all(isinstance(choice, (str, int, float)) for choice in problem["choices"]):
            raise ValueError(f"{file}: problem {pid!r} has a choice that is not a text")
        own = problem.get("split") or split  # of minitest, trainval and others the pictures lie in these
        image = find_image(folder / "images", f"{own}/{pid}/{problem['image']}") if problem["image"] else None
        options = list(LETTERS[: len(problem["choices"])])
        question = {"id": pid, "prompt": to_prompt(problem), "image": image, "file": str(file),
                    "num_choices": len(options), "options": options, "answer": LETTERS[problem["answer"]]}
        split_by = {key: str(problem.get(key) or "") for key in ("subject", "grade", "hint")}
        questions.append(question | split_by)
    return questions


def parse(text: str, question: dict):
    """The letter that LLaVA's rule reads from an answer, or None where it cannot or the letter is no choice.

    In this order: the answer is a bare letter; it starts with a letter, a dot and a space; `The answer is X.`
    occurs exactly once (the last dot is any character: so it stands in LLaVA's own pattern).
    """
    if text in set(LETTERS):
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""  # two answers are none
    return letter if letter and letter in LETTERS[: question["num_choices"]] else None


def official_split(question: dict) -> list:
    """The parts of ScienceQA's evaluate_acc that a question is in; TXT: with a hint, NO: without either."""
    has_image, has_hint = question["image"] is not None, bool(question.get("hint"))
    subject, year = question.get("subject", ""), question.get("grade", "").removeprefix("grade")
    parts = {"NAT": subject.startswith("natural"), "SOC": subject.startswith("social"),
             "LAN": subject.startswith("language"), "TXT": has_hint, "IMG": has_image,
             "NO": not has_hint and not has_image, "G1-6": year in list("123456"),
             "G7-12": year in "7 8 9 10 11 12".split()}
    return [name for name, is_in in parts.items() if is_in]


def score(questions, choices) -> dict:
    """Accuracy in percent: of all questions, of those with an image (`img`), of those without (`txt`: not the
    official TXT), and of the official split's parts."""
    right, scores = grade(questions, choices), {}
    for name, has_image in (("img", True), ("txt", False)):
        rows = [i for i, question in enumerate(questions) if (question["image"] is not None) == has_image]
        scores |= accuracy([right[i] for i in rows], [questions[i] for i in rows], f"accuracy_{name}")
        scores[f"questions_{name}"] = len(rows)
    return score_accuracy(questions, choices, right, [official_split(q) for q in questions]) | scores
