"""Multiple choice without letters: which choice's words does a model find likeliest as the answer?

    python -m lab.likelihood RUN ... --data data/emoji/ScienceQA

A small LLM hardly knows what "answer with the option's letter" asks of it: SmolLM2-135M says A to
everything. So each choice is read as the answer to the open question, which names no choices, and the one
whose tokens have the highest mean log-probability is taken.

The last line printed, one a run, is a JSON object with the percentages: of all questions, and of each of
problems.json's categories.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import data
import eval as evaluation
from benchmarks import scienceqa
from benchmarks.likelihood import mean_log_likelihoods
from benchmarks.questions import LETTERS, SHORT_ANSWER, grade
from benchmarks.score import percent
from plumbing.files import read_json


def load_problems(folder, split: str) -> list:
    """The questions of `scienceqa.load`, open: "options" in words; and a key more, "category"."""
    folder, questions = Path(folder), []
    problems = read_json(folder / "problems.json")
    for question in scienceqa.load(folder, split):
        problem = problems[question["id"]]
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        mark = f"{data.IMAGE}\n" if question["image"] else ""
        prompt = mark + context + problem["question"] + SHORT_ANSWER
        questions.append(question | {"prompt": prompt, "options": problem["choices"],
                                     "category": problem.get("category", "")})
    return questions


def choose(vlm, tokenizer, questions, template: str) -> list:
    """The letter of each question's likeliest option, the first of equals."""
    letters = []
    for question in questions:
        means = mean_log_likelihoods(vlm, tokenizer, template, question, question["options"])
        letters.append(LETTERS[means.index(max(means))])
    return letters


def score_run(run, folder, split: str) -> dict:
    """The percentages of a run directory; also written to its likelihood.json, with the choices made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm, tokenizer, config = evaluation.load_run(run, device)
    questions, right = load_problems(folder, split), {"all": []}
    choices = choose(vlm, tokenizer, questions, config["template"])
    for question, is_right in zip(questions, grade(questions, choices)):
        for key in ("all", question["category"]):
            right.setdefault(key, []).append(is_right)
    result = {"ckpt": str(run), "measure": "likelihood", "data": str(folder), "split": split,
              "questions": len(questions)} | {key: percent(rows) for key, rows in right.items()}
    predictions = [{"id": question["id"], "choice": choice, "answer": question["answer"]}
                   for question, choice in zip(questions, choices)]
    (Path(run) / "likelihood.json").write_text(json.dumps({"scores": result, "predictions": predictions}))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser("python -m lab.likelihood", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--data", required=True, help="a folder in ScienceQA's layout")
    parser.add_argument("--split", default="test", help="of pid_splits.json")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            print(json.dumps(score_run(run, args.data, args.split)))
    except (OSError, ValueError) as error:
        sys.exit(f"lab.likelihood: {error}")


if __name__ == "__main__":
    main()
