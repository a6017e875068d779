"""Questions to a trained model: benchmarks scored by their own rules, and single pictures.

    python eval.py --bench scienceqa                              # the last run, on the ScienceQA folder of its preset
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA
    python eval.py --ask picture.png "What color is the shape?"

The prompt is built here from the raw files, the answer is generated greedily, and an answer that is missing or that
the official rule cannot read counts as wrong and stays in the denominator. Published ScienceQA numbers of one and the
same checkpoint differ by ten points, mostly because of prompts, parsing and denominators.

The last line printed is one JSON object with the scores. Every prediction goes to BENCH.json in the run directory,
and the first few with their pictures to BENCH.png.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from projector import VLM
from vit import read_json

# ----------------------------------------------------------------------------------------------------------------
# Asking


def load_run(folder, device):
    """The model of a run directory, its tokenizer, and the run's config."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vlm = VLM.from_pretrained(folder, dtype, device)
    return vlm, data.load_tokenizer(vlm.sources["llm"]), read_json(Path(folder) / "config.json")


@torch.no_grad()
def ask(vlm, tokenizer, questions, max_new_tokens: int = 32, batch: int = 64) -> list:
    """Greedy answers, as stripped text, to [{"id", "prompt", "image" path or None}]; prompts of one batch are padded
    on the left, images padded to squares, all in Vicuna's conversation form."""
    device, size = vlm.llm.head_weight.device, vlm.vit.config.image_size
    answers = []
    for start in tqdm(range(0, len(questions), batch), desc="ask", unit=" batches"):
        samples = []
        for question in questions[start : start + batch]:
            pieces = data.v1([("human", question["prompt"])], tokenizer.eos_token)
            ids, roles = data.tokenise(pieces, tokenizer, question["image"] is not None)
            pixels = data.preprocess(data.load_image(question["image"]), size, "pad") if question["image"] else None
            samples.append({"ids": ids, "roles": roles, "pixels": pixels, "name": f"question {question['id']!r}"})
        m = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id, size,
                         vlm.llm.config.max_position_embeddings - max_new_tokens, side="left")
        new = vlm.generate(m["ids"].to(device), m["pixels"].to(device), max_new_tokens, m["mask"].to(device))
        answers += [tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in new]
    return answers


# ----------------------------------------------------------------------------------------------------------------
# ScienceQA


def parse_choice(text: str, num_choices: int):
    """The letter that LLaVA's rule reads from an answer, or None where it cannot or the letter is no choice.

    In this order: the answer is a bare letter; it starts with a letter, a dot and a space; `The answer is X.` occurs
    exactly once (the last dot is any character: so it stands in LLaVA's own pattern).
    """
    if text in set(data.LETTERS):
        letter = text
    elif len(text) >= 3 and text[0] in data.LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else None
    return letter if letter is not None and letter in data.LETTERS[:num_choices] else None


def score_scienceqa(questions, answers: dict) -> dict:
    """Accuracy in percent, over all questions and over those with an image (IMG), from {id: text}. A question
    without an answer is wrong."""
    rows = [(question["image"] is not None, question["id"] in answers,
             parse_choice(answers.get(question["id"], ""), question["num_choices"]), question["answer"])
            for question in questions]

    def accuracy(rows):
        return round(100 * sum(choice == gold for *_, choice, gold in rows) / max(1, len(rows)), 2)

    return {"accuracy": accuracy(rows), "accuracy_img": accuracy([row for row in rows if row[0]]),
            "accuracy_txt": accuracy([row for row in rows if not row[0]]),
            "questions": len(rows), "questions_img": sum(row[0] for row in rows),
            "missing": sum(not row[1] for row in rows),
            "unparsed": sum(row[1] and row[2] is None for row in rows)}


def contact_sheet(questions, answers, file, columns: int = 4, rows: int = 2):
    """A PNG of the first questions with a picture: picture, prompt, answer in green where it is right."""
    shown = [(q, text) for q, text in zip(questions, answers) if q["image"]][: columns * rows]
    if not shown:
        return
    cell, picture, line = (250, 250), 110, 15
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(shown) / columns) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (question, text) in enumerate(shown):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        image = data.load_image(question["image"])
        sheet.paste(image.resize((round(picture * image.width / image.height), picture)), (x, y))
        y += picture + 6
        asked = question["prompt"].removeprefix(f"{data.IMAGE}\n").removesuffix(data.LETTER)
        for part in [part[:38] for part in asked.split("\n")][:6]:
            draw.text((x, y), part, "black", font)
            y += line
        right = parse_choice(text, question["num_choices"]) == question["answer"]
        draw.text((x, y), text.replace("\n", " ")[:38], "green" if right else "red", font)
    sheet.save(file)


def scienceqa(vlm, tokenizer, folder, split, out):
    """(scores, predictions) of the model on a ScienceQA folder; a picture of some answers goes to `out`."""
    questions = data.load_scienceqa(folder, split)
    answers = ask(vlm, tokenizer, questions)
    scores = score_scienceqa(questions, {q["id"]: text for q, text in zip(questions, answers)})
    predictions = [{"id": q["id"], "prompt": q["prompt"], "text": text, "answer": q["answer"],
                    "choice": parse_choice(text, q["num_choices"])} for q, text in zip(questions, answers)]
    contact_sheet(questions, answers, Path(out) / "scienceqa.png")
    return {"bench": "scienceqa", "split": split, **scores}, predictions


BENCHES = {"scienceqa": scienceqa}


# ----------------------------------------------------------------------------------------------------------------
# The command line


def run_bench(name, ckpt, folder, split, device) -> dict:
    """Score a run directory, write BENCH.json into it, and return the scores."""
    vlm, tokenizer, config = load_run(ckpt, device)
    folder = folder or config.get(name)
    if not folder:
        raise ValueError(f"{ckpt}: its config.json names no {name} folder; give one with --data")
    scores, predictions = BENCHES[name](vlm, tokenizer, folder, split, ckpt)
    result = {"ckpt": str(ckpt), **scores}
    (Path(ckpt) / f"{name}.json").write_text(json.dumps({"scores": result, "predictions": predictions}, indent=1))
    return result


def last_run() -> Path:
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one, or name one with --ckpt DIR")
    return Path(pointer.read_text().strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--bench", choices=BENCHES, help="the benchmark")
    parser.add_argument("--ckpt", help="run directory (default: the last run)")
    parser.add_argument("--data", help="the benchmark's folder (default: the one in the run's config)")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of the answer to --ask")
    args = parser.parse_args()
    if (args.bench is None) == (args.ask is None):
        parser.error("name one of --bench and --ask")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ckpt = Path(args.ckpt) if args.ckpt else last_run()
        if args.ask:
            vlm, tokenizer, _ = load_run(ckpt, device)
            image, text = args.ask
            question = {"id": image, "prompt": f"{data.IMAGE}\n{text}", "image": image}
            answer, = ask(vlm, tokenizer, [question], args.max_new_tokens)
            print(json.dumps({"ckpt": str(ckpt), "image": image, "question": text, "answer": answer}))
        else:
            scores = run_bench(args.bench, ckpt, args.data, args.split, device)
            print(f"{args.bench} {args.split} of {ckpt}: {scores['questions']} questions, "
                  f"{scores['questions_img']} with image; missing {scores['missing']}, unparsed {scores['unparsed']} "
                  "(both count as wrong)")
            print(json.dumps(scores))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
