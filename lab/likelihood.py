"""Multiple choice without letters: which choice's words does a model find likeliest as the answer?

    python -m lab.likelihood RUN ... --data data/emoji/ScienceQA

A small LLM hardly knows what "answer with the option's letter" asks of it: SmolLM2-135M says A to everything.
So each choice is read as the answer to the open question, which names no choices, and the likeliest is taken:
the same as `eval.py --score words`.

Each run prints one JSON object with the percentages: of all questions, and of each of problems.json's
categories.
"""

import json
from pathlib import Path

import torch

import eval as evaluation
from benchmarks import scienceqa
from benchmarks.questions import closed
from benchmarks.score import percent
from lab import errors_in_one_line, parser_of
from plumbing.files import read_json


def load_problems(folder, split: str) -> list:
    """The questions of `scienceqa.load`, but open, with their choices in words; also their "category"."""
    folder = Path(folder)
    problems = read_json(folder / "problems.json")
    questions = closed(scienceqa.load(folder, split), "words")
    for question in questions:
        question["category"] = problems[question["id"]].get("category", "")
    return questions


def score_run(run, folder, split: str) -> dict:
    """The percentages of a run directory. Also writes them to its likelihood.json, with the choices made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm, tokenizer, config = evaluation.load_run(run, device)
    questions = load_problems(folder, split)
    choices = evaluation.ask_likeliest(vlm, tokenizer, questions, config["template"])
    right = {"all": []}
    predictions = []
    for question, choice in zip(questions, choices):
        is_right = choice == question["answer"]
        right["all"].append(is_right)
        right.setdefault(question["category"], []).append(is_right)
        predictions.append({"id": question["id"], "choice": choice, "answer": question["answer"]})
    result = {"ckpt": str(run), "measure": "likelihood", "data": str(folder), "split": split,
              "questions": len(questions)} | {key: percent(rows) for key, rows in right.items()}
    (Path(run) / "likelihood.json").write_text(json.dumps({"scores": result, "predictions": predictions}))
    return result


def main(argv=None):
    parser = parser_of("lab.likelihood", __doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--data", required=True, help="a folder in ScienceQA's layout")
    parser.add_argument("--split", default="test", help="of pid_splits.json")
    args = parser.parse_args(argv)
    with errors_in_one_line("lab.likelihood"):
        for run in args.runs:
            print(json.dumps(score_run(run, args.data, args.split)))


if __name__ == "__main__":
    main()
