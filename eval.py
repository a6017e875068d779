"""Questions to a trained model: benchmarks by their own rules, retrieval, and one question about one picture.

    python eval.py --bench scienceqa                              # the last run, on its preset's ScienceQA
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA
    python eval.py --ask picture.png "What color is the shape?"
    python eval.py --bench retrieval                              # pictures against captions, no answers

The prompt is built here from the raw files, the answer is generated greedily, and an answer that is missing
or that the official rule cannot read counts as wrong and stays in the denominator. Published ScienceQA
numbers of one and the same checkpoint differ by ten points, mostly because of prompts, parsing and
denominators.

The last line printed is one JSON object with the scores (one line a run, where several are named). Every
prediction goes to BENCH.json in the run directory (of a Hub id: its folder in the Hub's cache).
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import losses
from projector import VLM, choose_dtype
from vit import read_json, resolve_model

# ------------------------------------------------------------------------------------------------------------
# Asking

def load_run(folder, device) -> tuple:
    """(model, tokenizer, config) of a run directory. config["template"] is that of questions: what the run
    was tuned with; after align alone the LLM's own where its tokenizer has one, else Vicuna's. (A LLaVA
    folder gets Vicuna's: its own template takes pictures in another form than our marker.)"""
    folder = resolve_model(folder)
    config = read_json(folder / "config.json")
    vlm = VLM.from_pretrained(folder, choose_dtype(device, config.get("dtype", "")), device)
    tokenizer = data.load_tokenizer(vlm.sources["llm"])
    data.check_vocabulary(tokenizer, vlm.llm.config.vocab_size)  # a wrong one would answer nonsense, quietly
    if config.get("template", "plain") == "plain":
        has_own = tokenizer.chat_template and config.get("model_type") != "llava"
        config["template"] = "chat" if has_own else "v1"
    return vlm, tokenizer, config


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, **how) -> list:
    """Answers, as stripped text, to [{"id", "prompt", "image" path or None}]: greedy, or sampled with
    `temperature` and `top_p`. Prompts of one batch are padded on the left, images padded to squares."""
    answers, c, to_pieces = [], vlm.vit.config, data.TEMPLATES[template]
    room = vlm.llm.config.max_position_embeddings - max_new_tokens  # the answer needs positions too
    # a run learns to end with its tokenizer's end token, whatever its LLM's config says
    how["end_tokens"] = [tokenizer.eos_token_id]
    for start in tqdm(range(0, len(questions), batch), desc="ask", unit=" batches"):
        samples = []
        for question in questions[start : start + batch]:
            image, pieces = question["image"], to_pieces([("human", question["prompt"])], tokenizer)
            ids, roles = data.tokenise(pieces, tokenizer, image is not None)
            # "pad", whatever the run was trained with: a question may be about the picture's edge
            pixels = data.preprocess(data.load_image(image), c, "pad") if image else None
            name = f"question {question['id']!r}"
            samples.append({"ids": ids, "roles": roles, "pixels": pixels, "name": name})
        m = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                         c.image_size, room, side="left")
        m = data.to_device(m, vlm.llm.head_weight.device)
        for row in vlm.generate(m["ids"], m["pixels"], max_new_tokens, m["mask"], **how):
            answers.append(tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip())
    return answers


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: load (files -> questions), parse (answer -> choice), score (choices -> numbers)

def percent(rows) -> float:
    """How many of a list of booleans are true."""
    return round(100 * sum(rows) / max(1, len(rows)), 2)  # max: a split may have no question with a picture


def parse_choice(text: str, question: dict):
    """The letter that LLaVA's rule reads from an answer, or None where it cannot or the letter is no choice.

    In this order: the answer is a bare letter; it starts with a letter, a dot and a space; `The answer is X.`
    occurs exactly once (the last dot is any character: so it stands in LLaVA's own pattern).
    """
    if text in set(data.LETTERS):
        letter = text
    elif len(text) >= 3 and text[0] in data.LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""  # two answers are none
    return letter if letter and letter in data.LETTERS[: question["num_choices"]] else None


def score_scienceqa(questions, choices) -> dict:
    """Accuracy in percent, over all questions and those with an image (IMG). No choice (None) is wrong."""
    right = {True: [], False: []}  # by whether the question has an image
    for question, choice in zip(questions, choices):
        right[question["image"] is not None].append(choice == question["answer"])
    return {"accuracy": percent(right[True] + right[False]), "accuracy_img": percent(right[True]),
            "accuracy_txt": percent(right[False]), "questions": len(questions),
            "questions_img": len(right[True]), "unparsed": choices.count(None)}


def load_pope(folder, split: str = "") -> list:
    """[{"id", "prompt", "image", "category", "answer" "yes" or "no"}] of POPE's files `*pope_{category}.json`
    (JSON lines of question_id, image, text, label), all of them or `split` alone; images below images/ or
    val2014/."""
    folder, questions = Path(folder), []
    images = next((folder / name for name in ("images", "val2014") if (folder / name).is_dir()), folder)
    for file in sorted(folder.glob(f"*pope_{split or '*'}.json")):
        category = file.stem.rsplit("pope_", 1)[1]
        for number, line in enumerate(file.read_text(errors="replace").splitlines()):  # .json, but JSON lines
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                questions.append({"id": f"{category}-{entry['question_id']}", "category": category,
                                  "prompt": f"{data.IMAGE}\n{entry['text']}{data.SHORT_ANSWER}",
                                  "image": images / entry["image"],
                                  "answer": {"yes": "yes", "no": "no"}[entry["label"]]})  # no third
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number + 1} is not a POPE question: {error!r}") from None
    if not questions:
        raise FileNotFoundError(f"{folder}: no *pope_{split or 'CATEGORY'}.json")
    return questions


def parse_pope(text: str, question=None) -> str:
    """POPE's rule: of the first sentence, "no" if it has the word No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(questions, choices) -> dict:
    """Per category and on average, in percent: F1 of "yes" (the headline), accuracy, share of yes."""
    pairs, scores, mean = {}, {}, {}
    for question, choice in zip(questions, choices):
        pairs.setdefault(question["category"], []).append((question["answer"] == "yes", choice == "yes"))
    for category, rows in sorted(pairs.items()):
        said = [said for _, said in rows]
        both, each = sum(a and b for a, b in rows), sum(a + b for a, b in rows)
        scores[category] = {"f1": round(200 * both / max(1, each), 2),  # 2 TP / (2 TP + FP + FN)
                            "accuracy": percent([a == b for a, b in rows]), "yes": percent(said)}
    for key in ("f1", "accuracy", "yes"):  # every category counts alike, however many questions it has
        mean[key] = round(sum(score[key] for score in scores.values()) / len(scores), 2)
    return mean | {"questions": len(questions), "categories": scores}


def load_mme(folder, split: str = "") -> list:
    """[{"id", "prompt", "image", "category", "answer"}] of MME's folder, two consecutive questions for each
    image.

    A category (or `split` alone) is a folder of pictures and text files `question<TAB>Yes|No`, side by side
    or in images/ and questions_answers_YN/. LLaVA asks for a short answer instead of the questions' own "yes
    or no".
    """
    folder, questions, name = Path(folder), [], split or "*"
    for file in sorted(folder.glob(f"{name}/*.txt")) + sorted(folder.glob(f"{name}/questions_*_YN/*.txt")):
        category = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        images = category / "images" if (category / "images").is_dir() else category
        pictures = [f for f in sorted(images.glob(f"{file.stem}.*")) if f.suffix != ".txt"]
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
        if len(lines) != 2 or not all(re.fullmatch("[^\t]+\t(Yes|No)\\s*", line) for line in lines):
            raise ValueError(f"{file}: not two lines of question, tab, Yes or No")
        for number, line in enumerate(lines):
            text, answer = line.replace("Please answer yes or no.", "").split("\t")
            questions.append({"id": f"{category.name}/{file.stem}/{number}", "category": category.name,
                              "prompt": f"{data.IMAGE}\n{text.strip()}{data.SHORT_ANSWER}",
                              "image": [*pictures, images / file.stem][0], "answer": answer.strip().lower()})
    if not questions:
        raise FileNotFoundError(f"{folder}: no {split or 'CATEGORY'}/*.txt")
    return questions


def parse_mme(text: str, question=None):
    """MME's rule: exactly yes or no, else the first of these within the first four letters, else None."""
    text = text.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()


def score_mme(questions, choices) -> dict:
    """Per category 100 x (accuracy + accuracy+), the latter the part of pictures with both questions right;
    their sums over MME's ten categories of perception and over all others (of the toy world's four, "color"
    is one of the ten); both accuracies over everything in percent."""
    right = [choice == question["answer"] for question, choice in zip(questions, choices)]
    both, by_category, scores = [], {}, {}
    for question, first, second in zip(questions[::2], right[::2], right[1::2]):  # a picture's two questions
        both.append(first and second)
        by_category.setdefault(question["category"], []).append((first, second))
    for category, pairs in sorted(by_category.items()):
        single = [answer for pair in pairs for answer in pair]
        scores[category] = round(percent(single) + percent([all(pair) for pair in pairs]), 2)
    perception = sum(score for category, score in scores.items() if category in PERCEPTION)
    return {"accuracy": percent(right), "accuracy_plus": percent(both), "perception": round(perception, 2),
            "others": round(sum(scores.values()) - perception, 2), "questions": len(questions),
            "unparsed": choices.count(None), "categories": scores}


class Bench(NamedTuple):
    folder: str  # its usual name, below the `benchmarks` folder of a run
    split: str  # where none is named
    load: object  # (folder, split) -> questions
    parse: object  # (answer, question) -> choice, or None
    score: object  # (questions, choices) -> {name: number}


BENCHES = {
    "scienceqa": Bench("ScienceQA", "test", data.load_scienceqa, parse_choice, score_scienceqa),
    "pope": Bench("POPE", "", load_pope, parse_pope, score_pope),
    "mme": Bench("MME_Benchmark_release_version", "", load_mme, parse_mme, score_mme),
}


def answer_bench(vlm, tokenizer, template, name, folder, split=None) -> tuple:
    """(scores, questions, answers, what the benchmark's rule reads from them) of one benchmark."""
    bench = BENCHES[name]
    questions = bench.load(folder, bench.split if split is None else split)
    answers = ask(vlm, tokenizer, questions, template)
    choices = [bench.parse(text, question) for text, question in zip(answers, questions)]
    return bench.score(questions, choices), questions, answers, choices


def run_bench(name, ckpt, folder, split, device) -> dict:
    """Score a run directory; write scores and every prediction to its BENCH.json."""
    vlm, tokenizer, config = load_run(ckpt, device)
    if not folder and not config.get("benchmarks"):
        raise ValueError(f"{ckpt}: its config.json names no folder of benchmarks; give {name}'s with --data")
    folder = folder or Path(config["benchmarks"]) / BENCHES[name].folder
    split = BENCHES[name].split if split is None else split
    template, predictions = config["template"], []
    scores, questions, answers, choices = answer_bench(vlm, tokenizer, template, name, folder, split)
    result = {"ckpt": str(ckpt), "bench": name, "split": split, **scores}
    # every answer is kept: a score that surprises is understood by reading them
    for question, text, choice in zip(questions, answers, choices):
        image = str(question["image"]) if question["image"] else None
        predictions.append(question | {"image": image, "text": text, "choice": choice})
    out = {"scores": result, "predictions": predictions}
    (Path(ckpt) / f"{name}.json").write_text(json.dumps(out, indent=1))
    print(f"{name} of {ckpt}: {len(questions)} questions, {scores.get('unparsed', 0)} answers that the rule "
          "cannot read; these count as wrong")
    return result


# ------------------------------------------------------------------------------------------------------------
# Retrieval: pictures against captions, without any answer

@torch.no_grad()
def caption_vectors(vlm, tokenizer, config, file, images, limit: int = 1000, batch: int = 64) -> tuple:
    """(image vectors (n, C), text vectors (n, C), keys (n,), batches) of the first `limit` records of a LLaVA
    JSON of captions, by default that of the run's benchmarks. `batches`: of a hundred pairs or a few more,
    the projected patches (B, N, C), caption embeddings (B, T, C) and mask (B, T) that the vectors are made
    of. ValueError if all captions are one."""
    benchmarks, c = Path(config.get("benchmarks") or ""), vlm.vit.config
    file, images = file or benchmarks / "captions.json", images or benchmarks / "images"
    samples = data.Conversations(data.load_records(file)[:limit], images, tokenizer, "plain", c, "crop")
    image, text, keys, batches = [], [], [], []
    for start in tqdm(range(0, len(samples), batch), desc="captions", unit=" batches"):
        rows = [samples[i] for i in range(start, min(start + batch, len(samples)))]
        m = data.to_device(data.collate(rows, vlm.num_image_tokens, vlm.image_token_id, samples.pad_id,
                                        c.image_size), vlm.llm.head_weight.device)
        patches, embeds, mask = vlm.encode(m["pixels"]), vlm.llm.embed(m["caption_ids"]), m["caption_mask"]
        image.append(losses.pool_patches(patches))
        text.append(losses.pool_caption(embeds, mask))
        keys.append(m["keys"][:, 0])
        batches += [(patches, embeds, mask)] if start < 100 else []  # of all, these would be gigabytes
    if len(torch.cat(keys).unique()) < 2:
        raise ValueError(f"{file}: needs at least two different captions")
    return torch.cat(image), torch.cat(text), torch.cat(keys), batches


def first_of_each(keys) -> tuple:
    """(the row where each distinct key stands first, for each row the number of its key)."""
    _, number = keys.unique(return_inverse=True)
    return torch.stack([(number == k).nonzero()[0, 0] for k in range(int(number.max()) + 1)]), number


def score_retrieval(image, text, keys) -> dict:
    """R@1 and R@5 both ways, in percent. The gallery of captions has each distinct one once; of the pictures
    found for a caption, any that it describes is right."""
    distinct, owner = first_of_each(keys)  # (captions,) rows; (n,) which of these describes each picture
    similarity, captions = image @ text[distinct].T, torch.arange(len(distinct), device=keys.device)
    to_text = similarity.topk(min(5, len(distinct)), dim=1).indices == owner[:, None]  # (n, 5)
    to_image = owner[similarity.T.topk(min(5, len(image)), dim=1).indices] == captions[:, None]  # (.., 5)
    scores = {}
    for way, found in (("image_to_text", to_text), ("text_to_image", to_image)):
        scores |= {f"{way}_r{k}": percent(found[:, :k].any(1).tolist()) for k in (1, 5)}
    return scores


def run_retrieval(ckpt, file, images, device) -> dict:
    """Retrieval of a run directory on a LLaVA JSON of captions; also written to its retrieval.json."""
    vlm, tokenizer, config = load_run(ckpt, device)
    image, text, keys, _ = caption_vectors(vlm, tokenizer, config, file, images)
    result = {"ckpt": str(ckpt), "bench": "retrieval", "pairs": len(keys),
              "distinct_captions": len(keys.unique()), **score_retrieval(image, text, keys)}
    (Path(ckpt) / "retrieval.json").write_text(json.dumps(result, indent=1))
    return result


# ------------------------------------------------------------------------------------------------------------
# The command line

def last_run() -> Path:
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one; or name one with --ckpt")
    return Path(pointer.read_text().strip())


def ask_one(ckpt, args, device) -> dict:
    """--ask: one question about one picture."""
    vlm, tokenizer, config = load_run(ckpt, device)
    image, text = args.ask
    question = {"id": image, "prompt": f"{data.IMAGE}\n{text}", "image": image}
    answer, = ask(vlm, tokenizer, [question], config["template"], args.max_new_tokens,
                  temperature=args.temperature, top_p=args.top_p)
    return {"ckpt": str(ckpt), "image": image, "question": text, "answer": answer}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", help="run directories (default: the last run)")
    group = parser.add_argument_group("benchmarks and measures")
    group.add_argument("--bench", choices=[*BENCHES, "retrieval"])
    group.add_argument("--data", help="the benchmark's folder; retrieval: a LLaVA JSON of captions (default: "
                                      "in the `benchmarks` folder of the run's config)")
    group.add_argument("--split", help="the benchmark's split (default: test) or category (default: all)")
    group.add_argument("--images", help="retrieval: the folder of the pictures (default: likewise)")
    group = parser.add_argument_group("one question")
    group.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    group.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of the answer")
    group.add_argument("--temperature", type=float, default=0.0, help="of the answer; 0: greedy")
    group.add_argument("--top_p", type=float, default=1.0, help="the likeliest that hold this much")
    args = parser.parse_args(argv)
    if (args.bench is None) == (args.ask is None):
        parser.error("name one of --bench and --ask")
    if (args.split and args.bench not in BENCHES) or (args.images and args.bench != "retrieval"):
        parser.error("--split is for benchmarks, --images for retrieval")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature must not be below 0, --top_p in (0, 1], --max_new_tokens at least 1")
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {("--bench", "gap"), ("--bench", "heatmap")} & set(zip(argv, argv[1:])):
        sys.exit("eval.py: gap and heatmap have moved; `python -m lab.spaces --help` shows how to call them")
    args, device = parse_args(argv), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for ckpt in [resolve_model(run) for run in args.ckpt] if args.ckpt else [last_run()]:
            if args.ask:
                result = ask_one(ckpt, args, device)
            elif args.bench == "retrieval":
                result = run_retrieval(ckpt, args.data, args.images, device)
            else:
                result = run_bench(args.bench, ckpt, args.data, args.split, device)
            print(json.dumps(result))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
