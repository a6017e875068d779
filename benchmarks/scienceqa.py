"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): multiple choice from school books, half of it with a picture.

Rule: LLaVA's, by which its published numbers were made (llava/eval/eval_science_qa.py). It reads a letter.
The parts NAT, SOC, .. are those of ScienceQA's own tools/evaluate_acc.py. The test split has 4,241 questions,
2,017 of them with a picture: `accuracy_img`, which papers call IMG.

    problems.json        {id: {"question", "choices", "answer": number, "hint", "image", "subject", "grade"}}
    pid_splits.json      {"train": [ids], "val": [ids], "test": [ids], ...}
    images/SPLIT/ID/     image.png
"""

import re

from benchmarks.questions import LETTER_ANSWER, LETTERS, grade, lettered
from benchmarks.score import by_category, percent, summary
from benchmarks.entries import read_entries
from data import IMAGE, find_image
from plumbing.files import read_json

TEXT = (str, type(None))  # what may be missing
KINDS = {"id": str, "question": str, "choices": list, "answer": int, "hint": TEXT, "image": TEXT}


def to_text(problem: dict) -> str:
    """What an entry of problems.json asks, without its choices."""
    hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    return f"{hint}{problem['question']}"


def to_prompt(problem: dict) -> str:
    """LLaVA-1.5's zero-shot prompt of an entry of problems.json."""
    text = lettered(to_text(problem), problem["choices"])
    prompt = text.replace("  ", " ") + LETTER_ANSWER
    return f"{IMAGE}\n{prompt}" if problem["image"] else prompt


def load(folder, split: str = "test") -> list:
    """The questions of a split, in its order. The score needs `subject`, `grade` and `hint`."""
    file = folder / "problems.json"
    problems = {problem["id"]: problem for problem in read_entries(file, **KINDS)}
    questions = []
    for pid in read_split(folder / "pid_splits.json", split):
        if pid not in problems:
            raise ValueError(f"{file}: problem {pid!r} is missing; is it of another split?")
        problem = problems[pid]
        check_choices(file, pid, problem)
        image = None
        if problem["image"]:
            # Splits such as minitest or trainval are made of others, which have the pictures.
            own_split = problem.get("split") or split
            image = find_image(folder / "images", f"{own_split}/{pid}/{problem['image']}")
        options = list(LETTERS[: len(problem["choices"])])
        question = {"id": pid, "prompt": to_prompt(problem), "image": image, "file": str(file)}
        question |= {"options": options, "answer": LETTERS[problem["answer"]]}
        question |= {"choices": [str(choice) for choice in problem["choices"]], "open": to_text(problem)}
        for key in ("subject", "grade", "hint"):
            question[key] = str(problem.get(key) or "")
        questions.append(question)
    return questions


def read_split(file, split: str) -> list:
    """The ids of a split, as texts."""
    splits = read_json(file)
    if not isinstance(splits, dict):
        raise ValueError(f"{file}: not a dict of splits")
    if not isinstance(splits.get(split), list):
        raise ValueError(f"{file}: no split {split!r}; it has {', '.join(splits)}")
    return [str(pid) for pid in splits[split]]


def check_choices(file, pid: str, problem: dict):
    choices = problem["choices"]
    if len(choices) > len(LETTERS):
        raise ValueError(f"{file}: problem {pid!r} has {len(choices)} choices, at most {len(LETTERS)}")
    if not 0 <= problem["answer"] < len(choices):
        raise ValueError(f"{file}: problem {pid!r} has no choice {problem['answer']}")
    for choice in choices:
        if not isinstance(choice, (str, int, float)):
            raise ValueError(f"{file}: problem {pid!r} has a choice that is not a text")


def parse(text: str, question: dict):
    """The letter that LLaVA's rule reads, or None if it reads none, or one that is no choice."""
    if text in set(LETTERS):
        letter = text
    elif re.match(rf"[{LETTERS}]\. ", text):
        letter = text[0]
    else:
        # The last dot is any character: LLaVA's own pattern has it so. Two answers are none.
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else None
    return letter if letter in question["options"] else None


def official_parts(question: dict) -> list:
    """The names of the parts that a question is in. TXT: it has a hint. NO: neither hint nor picture."""
    has_image = question["image"] is not None
    has_hint = bool(question.get("hint"))
    subject = question.get("subject", "")
    year = question.get("grade", "").removeprefix("grade")
    is_in = {
        "NAT": subject.startswith("natural"),
        "SOC": subject.startswith("social"),
        "LAN": subject.startswith("language"),
        "TXT": has_hint,
        "IMG": has_image,
        "NO": not has_hint and not has_image,
        "G1-6": year in list("123456"),
        "G7-12": year in ["7", "8", "9", "10", "11", "12"],
    }
    return [name for name in is_in if is_in[name]]


def score(questions, choices) -> dict:
    """Accuracy over all questions, over those with (`img`) and without a picture (`txt`: not the official
    TXT), and over the official parts."""
    right = grade(questions, choices)
    graded = list(zip(questions, right))
    with_image = [is_right for question, is_right in graded if question["image"]]
    without_image = [is_right for question, is_right in graded if not question["image"]]
    parts = [(name, is_right) for question, is_right in graded for name in official_parts(question)]
    names, right_of_parts = zip(*parts)
    return summary(questions, choices, right) | {
        "categories": by_category(names, right_of_parts),
        "accuracy_img": percent(with_image),
        "questions_img": len(with_image),
        "accuracy_txt": percent(without_image),
        "questions_txt": len(without_image),
    }
