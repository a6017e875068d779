"""Multiple choice without letters: which choice's words does a model find likeliest as the answer?

    python -m lab.likelihood RUN ... --data data/emoji/ScienceQA

A small LLM hardly knows what "answer with the option's letter" asks of it: SmolLM2-135M says A to everything.
So each choice is read as the answer to the open question, which names no choices, and the one whose tokens
have the highest mean log-probability is taken.

Each run prints one JSON object with the percentages: of all questions, and of each of problems.json's
categories.
"""

import json
from pathlib import Path

import torch

import data
import eval as evaluation
from benchmarks import scienceqa
from benchmarks.questions import LETTERS, SHORT_ANSWER
from benchmarks.score import percent
from lab import errors_in_one_line, parser_of
from plumbing.files import read_json


def load_problems(folder, split: str) -> list:
    """The questions of `scienceqa.load`, but open, with "options" in words; also their "category"."""
    folder = Path(folder)
    problems = read_json(folder / "problems.json")
    questions = []
    for question in scienceqa.load(folder, split):
        problem = problems[question["id"]]
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        mark = f"{data.IMAGE}\n" if question["image"] else ""
        question["prompt"] = mark + context + problem["question"] + SHORT_ANSWER
        question["options"] = problem["choices"]
        question["category"] = problem.get("category", "")
        questions.append(question)
    return questions


@torch.no_grad()
def mean_log_likelihoods(vlm, tokenizer, template: str, question: dict, texts) -> list:
    """For each text as the answer, the mean log-probability of its tokens, in nats, without the end token."""
    form = data.form_of(template, tokenizer)
    has_image = question["image"] is not None
    pixels = None
    if has_image:
        picture = data.load_image(question["image"])
        pixels = data.preprocess(picture, vlm.vit.config, "pad")
    samples = []
    for text in texts:
        turns = [("human", question["prompt"]), ("gpt", text)]
        ids, roles = data.encode(turns, form, tokenizer, has_image)
        end = roles.index(data.END)
        sample = {"ids": ids[:end], "roles": roles[:end]}
        samples.append(sample | {"pixels": pixels, "name": text})

    batch = data.collate(
        samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
        vlm.vit.config.image_size, vlm.llm.config.max_position_embeddings,
    )
    batch = data.to_device(batch, vlm.llm.head_weight.device)
    logits = vlm(batch["ids"], batch["pixels"])  # (B, S, V), a row for each text
    means = []
    for row, labels in zip(logits, batch["labels"]):
        next_ids = labels[1:]  # (S - 1,): each position predicts the next token
        is_answer = next_ids != data.IGNORE
        log_p = row[:-1][is_answer].float().log_softmax(-1)  # (tokens, V)
        of_answer = log_p.gather(1, next_ids[is_answer][:, None])  # (tokens, 1)
        means.append(of_answer.mean().item())
    return means


def choose(vlm, tokenizer, questions, template: str) -> list:
    """The letter of each question's likeliest option, the first of equals."""
    choices = []
    for question in questions:
        means = mean_log_likelihoods(vlm, tokenizer, template, question, question["options"])
        choices.append(LETTERS[means.index(max(means))])
    return choices


def score_run(run, folder, split: str) -> dict:
    """The percentages of a run directory. Also writes them to its likelihood.json, with the choices made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm, tokenizer, config = evaluation.load_run(run, device)
    questions = load_problems(folder, split)
    choices = choose(vlm, tokenizer, questions, config["template"])
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
