"""Multiple choice without letters: which choice's words does a model find likeliest as the answer?

    python -m lab.likelihood RUN ... --data data/emoji/ScienceQA
    python -m lab.likelihood RUN ... --data data/emoji/ScienceQA --template plain    # after align alone

A small LLM hardly knows what "answer with the option's letter" asks of it: SmolLM2-135M says A to
everything. So each choice is read as the answer to the open question, which names no choices, and the one
whose tokens, the end included, have the highest mean log-probability is taken. With the template `plain`
there is no question: each choice is read as a caption of the picture.

The last line printed, one a run, is a JSON object with the percentages: of all questions, and of each of
problems.json's categories.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as evaluation
from vit import read_json


def load_problems(folder, split: str) -> list:
    """The questions of `data.load_scienceqa` with two keys more: "choices" in words, and "category"."""
    folder, questions = Path(folder), []
    problems = read_json(folder / "problems.json")
    for question in data.load_scienceqa(folder, split):
        problem = problems[question["id"]]
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        mark = f"{data.IMAGE}\n" if question["image"] else ""
        prompt = mark + context + problem["question"] + data.SHORT_ANSWER
        questions.append(question | {"prompt": prompt, "choices": problem["choices"],
                                     "category": problem.get("category", "")})
    return questions


def answered(question: dict, choice: str, pixels, tokenizer, template: str) -> dict:
    """A sample for `data.collate` in which the choice is the answer."""
    pieces = data.TEMPLATES[template]([("human", question["prompt"]), ("gpt", choice)], tokenizer)
    ids, roles = data.tokenise(pieces, tokenizer, pixels is not None)
    return {"ids": ids, "roles": roles, "pixels": pixels, "name": f"question {question['id']!r}"}


@torch.no_grad()
def choice_scores(vlm, tokenizer, question: dict, template: str) -> torch.Tensor:
    """(choices,) the mean log-probability of each choice's tokens. The picture is encoded once for all."""
    c, device = vlm.vit.config, vlm.llm.head_weight.device
    pixels = data.preprocess(data.load_image(question["image"]), c, "pad") if question["image"] else None
    samples = [answered(question, choice, pixels, tokenizer, template) for choice in question["choices"]]
    batch = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                         c.image_size)
    m = data.to_device(batch, device)
    patches = vlm.encode(m["pixels"][:1]).expand(len(m["pixels"]), -1, -1)  # (choices, N, C)
    hidden = vlm.llm.hidden(vlm.splice(m["ids"], patches))  # (choices, S, C); padded on the right: no mask
    labels = m["labels"][:, 1:]  # (choices, S - 1): position t says what stands at t + 1
    is_said = labels != data.IGNORE
    logits = hidden[:, :-1][is_said] @ vlm.llm.head_weight.T  # (tokens of all choices, V)
    said = logits.float().log_softmax(-1).gather(1, labels[is_said][:, None])[:, 0]
    scores = torch.zeros(labels.shape, device=device).masked_scatter(is_said, said)  # (choices, S - 1)
    return scores.sum(1) / is_said.sum(1)


def score_run(run, folder, split: str, template: str | None) -> dict:
    """The percentages of a run directory; also written to its likelihood.json, with the choices made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm, tokenizer, config = evaluation.load_run(run, device)
    template, right, predictions = template or config["template"], {"all": []}, []
    for question in tqdm(load_problems(folder, split), desc="choices", unit=" questions"):
        scores = choice_scores(vlm, tokenizer, question, template)
        choice = data.LETTERS[int(scores.argmax())]
        for key in ("all", question["category"]):
            right.setdefault(key, []).append(choice == question["answer"])
        predictions.append({"id": question["id"], "choice": choice, "answer": question["answer"],
                            "scores": scores.tolist()})
    result = {"ckpt": str(run), "measure": "likelihood", "data": str(folder), "split": split,
              "template": template, "questions": len(predictions)}
    result |= {key: evaluation.percent(rows) for key, rows in right.items()}
    (Path(run) / "likelihood.json").write_text(json.dumps({"scores": result, "predictions": predictions}))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser("python -m lab.likelihood", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--data", required=True, help="a folder in ScienceQA's layout")
    parser.add_argument("--split", default="test", help="of pid_splits.json")
    parser.add_argument("--template", choices=data.TEMPLATES, help="default: the run's")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            print(json.dumps(score_run(run, args.data, args.split, args.template)))
    except (OSError, ValueError) as error:
        sys.exit(f"lab.likelihood: {error}")


if __name__ == "__main__":
    main()
