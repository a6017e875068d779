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
import torch.nn.functional as F

import data
import eval as evaluation
from benchmarks import scienceqa
from benchmarks.likelihood import to_read
from benchmarks.questions import closed
from benchmarks.score import percent
from lab import parser_of
from llm import KVCache
from plumbing.files import read_json
from plumbing.ranks import command


def load_problems(folder, split: str) -> list:
    """The questions of `scienceqa.load`, but open, with their choices in words; also their "category"."""
    folder = Path(folder)
    problems = read_json(folder / "problems.json")
    questions = closed(scienceqa.load(folder, split), "words")
    for question in questions:
        question["category"] = problems[question["id"]].get("category", "")
    return questions


@torch.no_grad()
def ask_likeliest(vlm, tokenizer, questions: list, template: str, batch: int = 16) -> list:
    """What eval.ask_likeliest answers, in a third of the time: picture and question are read once, not with
    each of the choices. What a layer has made of them waits in the key-value cache."""
    form = data.form_of(template, tokenizer)
    room = vlm.llm.config.max_position_embeddings

    def answer(rows):
        asked = [evaluation.to_sample(vlm, tokenizer, form, row) for row in rows]
        said = []  # (row, option, its tokens)
        for number, row in enumerate(rows):
            for _, options in to_read(tokenizer, form, row).items():
                said += [(number, option, ids) for option, ids in options]
        owner = torch.tensor([number for number, _, _ in said])  # of each choice
        longest = max(len(ids) for _, _, ids in said)

        m = evaluation.to_batch(vlm, tokenizer, asked, room - longest)
        embeds = vlm.splice(m["ids"], vlm.encode(m["pixels"]))  # (B, S, C)
        B, S, _ = embeds.shape
        cache = KVCache(vlm.llm.config, B, S, embeds.dtype, embeds.device)
        end = vlm.llm.hidden(embeds, m["mask"], cache)[owner, -1:]  # (choices, 1, C) before the first token
        states = end
        if longest > 1:
            read = data.pad([ids[:-1] for _, _, ids in said], tokenizer.pad_token_id).to(embeds.device)
            mask = F.pad(m["mask"][owner], (0, longest - 1), value=True)
            words = vlm.llm.hidden(vlm.llm.embed(read), mask, spread(cache, owner, longest - 1, vlm.llm))
            states = torch.cat([end, words], dim=1)  # (choices, longest, C)

        likely = [{} for _ in rows]  # {option: the mean log-probability of its tokens}
        for (number, option, ids), state in zip(said, states):
            log_p = vlm.llm.logits(state[: len(ids)]).float().log_softmax(-1)  # (tokens, V)
            likely[number][option] = log_p[range(len(ids)), ids].mean().item()
        return [max(means, key=means.get) for means in likely]

    return evaluation.in_batches(questions, answer, batch)


def spread(cache, owner, more: int, llm):
    """A cache with a copy of row owner[i] in row i, and room for `more` positions."""
    wide = KVCache(llm.config, len(owner), cache.length + more, cache.k.dtype, cache.k.device)
    wide.k[..., : cache.length, :] = cache.k[:, owner]
    wide.v[..., : cache.length, :] = cache.v[:, owner]
    wide.length = cache.length
    return wide


def score_run(run, folder, split: str) -> dict:
    """The percentages of a run directory. Also writes them to its likelihood.json, with the choices made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm, tokenizer, config = evaluation.load_run(run, device)
    questions = load_problems(folder, split)
    choices = ask_likeliest(vlm, tokenizer, questions, config["template"])
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
    with command("lab.likelihood"):
        for run in args.runs:
            print(json.dumps(score_run(run, args.data, args.split)))


if __name__ == "__main__":
    main()
