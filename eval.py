"""Questions to a trained model: benchmarks by their own rules, single pictures, and how well its spaces
align.

    python eval.py --bench scienceqa                              # the last run, on its preset's ScienceQA
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA
    python eval.py --ask picture.png "What color is the shape?"
    python eval.py --bench retrieval                              # pictures against captions; also: gap
    python eval.py --bench heatmap --image picture.png --text "a red circle" --ckpt runs/a/align runs/b/align

The prompt is built here from the raw files, the answer is generated greedily, and an answer that is missing
or that the official rule cannot read counts as wrong and stays in the denominator. Published ScienceQA
numbers of one and the same checkpoint differ by ten points, mostly because of prompts, parsing and
denominators.

The last line printed is one JSON object with the scores (one line for each run, where several are named).
Every prediction goes to BENCH.json in the run directory, and the first few with their pictures to BENCH.png.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    vlm, config = VLM.from_pretrained(folder, choose_dtype(device), device), read_json(folder / "config.json")
    tokenizer = data.load_tokenizer(vlm.sources["llm"])
    data.check_vocabulary(tokenizer, vlm.llm.config.vocab_size)
    if config.get("template", "plain") == "plain":
        has_own = tokenizer.chat_template and config.get("model_type") != "llava"
        config["template"] = "chat" if has_own else "v1"
    return vlm, tokenizer, config


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, **how) -> list:
    """Answers, as stripped text, to [{"id", "prompt", "image" path or None}]: greedy, or sampled with
    `temperature` and `top_p`. Prompts of one batch are padded on the left, images padded to squares."""
    answers, c, to_pieces = [], vlm.vit.config, data.TEMPLATES[template]
    room = vlm.llm.config.max_position_embeddings - max_new_tokens
    for start in tqdm(range(0, len(questions), batch), desc="ask", unit=" batches"):
        samples = []
        for question in questions[start : start + batch]:
            image, pieces = question["image"], to_pieces([("human", question["prompt"])], tokenizer)
            ids, roles = data.tokenise(pieces, tokenizer, image is not None)
            pixels = data.preprocess(data.load_image(image), c, "pad") if image else None
            samples.append({"ids": ids, "roles": roles, "pixels": pixels, "name": f"question {question['id']!r}"})
        m = data.to_device(data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                                        c.image_size, room, side="left"), vlm.llm.head_weight.device)
        # a run learns to end with its tokenizer's end token, whatever its LLM's config says
        how["end_tokens"] = [tokenizer.eos_token_id]
        for row in vlm.generate(m["ids"], m["pixels"], max_new_tokens, m["mask"], **how):
            answers.append(tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip())
    return answers


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: load (files -> questions), parse (answer -> choice), score (choices -> numbers)

def percent(rows) -> float:
    """How many of a list of booleans are true."""
    return round(100 * sum(rows) / max(1, len(rows)), 2)


def parse_choice(text: str, question: dict):
    """The letter that LLaVA's rule reads from an answer, or None where it cannot or the letter is no choice.

    In this order: the answer is a bare letter; it starts with a letter, a dot and a space; `The answer is X.`
    occurs exactly once (the last dot is any character: so it stands in LLaVA's own pattern). """
    if text in set(data.LETTERS):
        letter = text
    elif len(text) >= 3 and text[0] in data.LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in data.LETTERS[: question["num_choices"]] else None


def score_scienceqa(questions, choices) -> dict:
    """Accuracy in percent, over all questions and over those with an image (IMG). No choice (None) is
    wrong."""
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
        for number, line in enumerate(file.read_text(errors="replace").splitlines()):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                questions.append({"id": f"{category}-{entry['question_id']}", "category": category,
                                  "prompt": f"{data.IMAGE}\n{entry['text']}{data.SHORT_ANSWER}",
                                  "image": images / entry["image"],
                                  "answer": {"yes": "yes", "no": "no"}[entry["label"]]})
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
    """Per category and on average, in percent: F1 of "yes" (the headline), accuracy, how often yes was
    said."""
    pairs, scores, mean = {}, {}, {}
    for question, choice in zip(questions, choices):
        pairs.setdefault(question["category"], []).append((question["answer"] == "yes", choice == "yes"))
    for category, rows in sorted(pairs.items()):
        said = [said for _, said in rows]
        both, either = sum(a and b for a, b in rows), sum(a + b for a, b in rows)
        scores[category] = {"f1": round(200 * both / max(1, either), 2),
                            "accuracy": percent([a == b for a, b in rows]), "yes": percent(said)}
    for key in ("f1", "accuracy", "yes"):
        mean[key] = round(sum(score[key] for score in scores.values()) / len(scores), 2)
    return mean | {"questions": len(questions), "categories": scores}


def load_mme(folder, split: str = "") -> list:
    """[{"id", "prompt", "image", "category", "answer"}] of MME's folder, two consecutive questions for each
    image.

    A category (or `split` alone) is a folder of pictures and text files `question<TAB>Yes|No`, side by side
    or in images/ and questions_answers_YN/. LLaVA asks for a short answer instead of the questions' own "yes
    or no". """
    folder, questions, name = Path(folder), [], split or "*"
    for file in [*sorted(folder.glob(f"{name}/*.txt")), *sorted(folder.glob(f"{name}/questions_answers_YN/*.txt"))]:
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
    """MME's rule: exactly yes or no, else the first of "yes", "no" within the first four letters, else
    None."""
    text = text.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


PERCEPTION = {"existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
              "OCR"}


def score_mme(questions, choices) -> dict:
    """Per category 100 x (accuracy + accuracy+), the latter the part of pictures with both questions right;
    their sums over MME's ten categories of perception and over all others (of the toy world's four, "color"
    is one of the ten); both accuracies over everything in percent."""
    right = [choice == question["answer"] for question, choice in zip(questions, choices)]
    both, by_category, scores = [], {}, {}
    for question, first, second in zip(questions[::2], right[::2], right[1::2]):
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
    """Score a run directory; write BENCH.json and BENCH.png (the first questions with a picture) into it."""
    vlm, tokenizer, config = load_run(ckpt, device)
    if not folder and not config.get("benchmarks"):
        raise ValueError(f"{ckpt}: its config.json names no folder of benchmarks; give {name}'s with --data")
    folder = folder or Path(config["benchmarks"]) / BENCHES[name].folder
    split = BENCHES[name].split if split is None else split
    scores, questions, answers, choices = answer_bench(vlm, tokenizer, config["template"], name, folder, split)
    result = {"ckpt": str(ckpt), "bench": name, "split": split, **scores}
    predictions = [{"id": q["id"], "prompt": q["prompt"], "text": text, "answer": q["answer"], "choice": choice}
                   for q, text, choice in zip(questions, answers, choices)]
    out = {"scores": result, "predictions": predictions}
    (Path(ckpt) / f"{name}.json").write_text(json.dumps(out, indent=1))
    contact_sheet(questions, answers, choices, Path(ckpt) / f"{name}.png")
    print(f"{name} of {ckpt}: {len(questions)} questions, {scores.get('unparsed', 0)} answers that the rule cannot "
          "read; these count as wrong")
    return result


def contact_sheet(questions, answers, choices, file, columns: int = 4, rows: int = 2):
    """A PNG of the first questions with a picture: picture, prompt, answer in green where it is right."""
    shown = [row for row in zip(questions, answers, choices) if row[0]["image"]][: columns * rows]
    if not shown:
        return
    side, height, line = 250, 110, 15  # pixels: a cell's side, the height of a picture and of a line of text
    sheet = Image.new("RGB", (columns * side, math.ceil(len(shown) / columns) * side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (question, answer, choice) in enumerate(shown):
        x, y = i % columns * side + 8, i // columns * side + 8
        image = data.load_image(question["image"])
        sheet.paste(image.resize((max(1, height * image.width // image.height), height)), (x, y))
        asked = question["prompt"].removeprefix(f"{data.IMAGE}\n")
        asked = asked.removesuffix(data.LETTER_ANSWER).removesuffix(data.SHORT_ANSWER).split("\n")[:6]
        colors = ["black"] * len(asked) + ["green" if choice == question["answer"] else "red"]
        for number, text in enumerate([*asked, answer.replace("\n", " ")]):
            draw.text((x, y + height + 6 + number * line), text[:38], colors[number], font)
    sheet.save(file)


# ------------------------------------------------------------------------------------------------------------
# Alignment seen directly: pictures against captions, without any answer

@torch.no_grad()
def caption_pairs(vlm, tokenizer, file, images, limit: int = 1000, batch: int = 64):
    """Yield (projected patches (B, N, C), caption embeddings (B, T, C), mask (B, T), keys (B,)) of the first
    `limit` records of a LLaVA JSON of captions, batch by batch."""
    records, c = data.load_records(file)[:limit], vlm.vit.config
    samples = data.Conversations(records, images, tokenizer, "plain", c, "crop")
    for start in tqdm(range(0, len(records), batch), desc="captions", unit=" batches"):
        rows = [samples[i] for i in range(start, min(start + batch, len(records)))]
        m = data.to_device(data.collate(rows, vlm.num_image_tokens, vlm.image_token_id, samples.pad_id,
                                        c.image_size), vlm.llm.head_weight.device)
        yield vlm.encode(m["pixels"]), vlm.llm.embed(m["caption_ids"]), m["caption_mask"], m["caption_keys"]


def first_of_each(keys) -> tuple:
    """(the row where each distinct key stands first, for each row the number of its key)."""
    _, number = keys.unique(return_inverse=True)
    return torch.stack([(number == k).nonzero()[0, 0] for k in range(int(number.max()) + 1)]), number


def score_retrieval(image, text, keys) -> dict:
    """R@1 and R@5 both ways, in percent. The gallery of captions has each distinct one once; of the pictures
    found for a caption, any that it describes is right."""
    distinct, owner = first_of_each(keys)  # (captions,) rows; (n,) which of these captions describes each picture
    similarity, captions = image @ text[distinct].T, torch.arange(len(distinct), device=keys.device)
    to_text = similarity.topk(min(5, len(distinct)), dim=1).indices == owner[:, None]  # (n, 5)
    to_image = owner[similarity.T.topk(min(5, len(image)), dim=1).indices] == captions[:, None]  # (captions, 5)
    scores = {}
    for way, found in (("image_to_text", to_text), ("text_to_image", to_image)):
        scores |= {f"{way}_r{k}": percent(found[:, :k].any(1).tolist()) for k in (1, 5)}
    return scores


def uniformity(x) -> torch.Tensor:
    """How evenly unit vectors (n, C) lie on the sphere: log of the mean of exp(-2 d^2) over all pairs."""
    return torch.log(torch.exp(-2 * torch.pdist(x).square()).mean())


def score_gap(image, text, keys) -> dict:
    """Where pictures and captions lie, as unit vectors: distance of the two centroids; mean cosine of pairs
    and of others; alignment (mean squared distance of pairs) and uniformity of Wang & Isola 2020, arXiv
    2005.10242."""
    text = losses.unit(text)
    cosine, is_pair = image @ text.T, keys[:, None] == keys[None]
    scores = {"centroid_distance": (image.mean(0) - text.mean(0)).norm(),
              "positive_cosine": cosine.diagonal().mean(), "negative_cosine": cosine[~is_pair].mean(),
              "alignment": (image - text).square().sum(1).mean(), "uniformity_image": uniformity(image),
              "uniformity_text": uniformity(text[first_of_each(keys)[0]])}
    return {name: round(value.item(), 4) for name, value in scores.items()}


TOKEN_PAIRS = 100  # how many pictures `score_tokens` looks at: it meets every patch with every word


def score_tokens(vlm, pairs) -> dict:
    """Single patches against single words, for the first pairs: mean distance and cosine of a projected patch
    to its nearest word embedding (of the whole vocabulary), and TACS (SEA, arXiv 2408.11813): the mean of a
    picture's 10 largest cosines, each a patch's largest over the caption's tokens."""
    words = losses.at_least_fp32(vlm.llm.model.embed_tokens.weight)  # (V, C)
    distances, nearest, tacs, seen = [], [], [], 0
    for patches, embeds, mask in pairs:
        patches = losses.at_least_fp32(patches[: TOKEN_PAIRS - seen])  # (B, N, C)
        embeds, mask = embeds[: len(patches)], mask[: len(patches)]
        for row in patches:  # one picture at a time: all against 150,000 words would be tens of GB
            distances.append(torch.cdist(row, words).amin(1))
            nearest.append((losses.unit(row) @ losses.unit(words).T).amax(1))
        cosine = losses.unit(patches) @ losses.unit(embeds).transpose(1, 2)  # (B, N, T)
        best = cosine.masked_fill(~mask[:, None], -1).amax(2)  # (B, N)
        tacs.append(best.topk(min(10, best.shape[1]), dim=1).values.mean(1))
        seen += len(patches)
        if seen == TOKEN_PAIRS:
            break
    means = {"nearest_word_distance": distances, "nearest_word_cosine": nearest, "tacs": tacs}
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in means.items()}


def run_pairs(name, ckpt, file, images, device) -> dict:
    """`retrieval` or `gap` of a run directory on a LLaVA JSON of captions."""
    vlm, tokenizer, config = load_run(ckpt, device)
    benchmarks = Path(config.get("benchmarks") or "")
    file, images = file or benchmarks / "captions.json", images or benchmarks / "images"
    image, text, keys, for_tokens = [], [], [], []
    for patches, embeds, mask, batch_keys in caption_pairs(vlm, tokenizer, file, images):
        image.append(losses.pool_patches(patches))
        text.append(losses.pool_caption(embeds, mask))
        for_tokens += [(patches, embeds, mask)] if sum(map(len, keys)) < TOKEN_PAIRS else []
        keys.append(batch_keys)
    image, text, keys = torch.cat(image), torch.cat(text), torch.cat(keys)
    captions = len(keys.unique())
    if captions < 2:
        raise ValueError(f"{file}: needs at least two different captions")
    scores = (score_retrieval(image, text, keys) if name == "retrieval"
              else score_gap(image, text, keys) | score_tokens(vlm, for_tokens))
    result = {"ckpt": str(ckpt), "bench": name, "pairs": len(keys), "distinct_captions": captions, **scores}
    (Path(ckpt) / f"{name}.json").write_text(json.dumps(result, indent=1))
    return result


# ------------------------------------------------------------------------------------------------------------
# The heat map: where on a picture its words are

@torch.no_grad()
def word_maps(vlm, tokenizer, image, text) -> dict:
    """{token as text: cosines of the projected patches with its input embedding (side, side)} for each
    token."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"--text {text!r} has no token")
    if vlm.projector_kind == "resampler":
        raise ValueError("the tokens of a resampler carry no position on the picture")
    device, side = vlm.llm.head_weight.device, math.isqrt(vlm.num_image_tokens)
    patches = vlm.encode(data.preprocess(image, vlm.vit.config, "crop")[None].to(device))[0]  # (N, C)
    words = vlm.llm.embed(torch.tensor(ids, device=device))  # (T, C)
    cosine = losses.unit(patches) @ losses.unit(words).T  # (N, T)
    return {tokenizer.decode([i]).strip(): cosine[:, t].view(side, side).cpu() for t, i in enumerate(ids)}


def tint(picture, strength):
    """The picture in grey, red where `strength` (side, side), from -1 to 1, is positive, blue where
    negative."""
    def as_image(values):
        return Image.fromarray(values.to(torch.uint8).numpy()).resize(picture.size, Image.Resampling.NEAREST)

    red, blue, white = (Image.new("RGB", picture.size, name) for name in ("red", "blue", "white"))
    color = Image.composite(red, blue, as_image(255 * (strength > 0)))
    grey = Image.blend(picture.convert("L").convert("RGB"), white, 0.5)
    return Image.composite(color, grey, as_image((255 * strength.abs()).round()))


def heat_map(runs, path, text, file, device) -> dict:
    """A PNG with a row for each run and a column for each token. One scale of colours holds for the whole
    sheet: that of the largest cosine."""
    maps, picture = [], data.load_image(path)
    for run in runs:
        vlm, tokenizer, _ = load_run(run, device)
        maps.append(word_maps(vlm, tokenizer, picture, text))
    largest = max(cosine.abs().max().item() for words in maps for cosine in words.values())
    cell, gap, head, margin = 132, 6, 24, 150  # pixels
    picture = ImageOps.fit(picture, (cell, cell), Image.Resampling.NEAREST)  # the centre, as the model saw it
    width, height = margin + (cell + gap) * (1 + len(maps[0])), head + (cell + gap) * len(runs)
    sheet, results = Image.new("RGB", (width, height), "white"), []
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (run, words) in enumerate(zip(runs, maps)):
        y = head + row * (cell + gap)
        draw.multiline_text((6, y + cell // 2), "\n".join(Path(run).parts[-2:]), "black", font, "lm")
        sheet.paste(picture, (margin, y))
        for column, (word, cosine) in enumerate(words.items(), start=1):
            x = margin + column * (cell + gap)
            sheet.paste(tint(picture, cosine / largest), (x, y))
            draw.text((x + cell // 2, head // 2), word, "black", font, "mm")
        results.append({"ckpt": str(run)} | {word: round(c.max().item(), 4) for word, c in words.items()})
    sheet.save(file)
    return {"bench": "heatmap", "image": str(path), "text": text, "file": str(file),
            "largest_cosine": round(largest, 4), "runs": results}


# ------------------------------------------------------------------------------------------------------------
# The command line

def last_run() -> Path:
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one, or name one with --ckpt DIR")
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
    group.add_argument("--bench", choices=[*BENCHES, "retrieval", "gap", "heatmap"])
    group.add_argument("--data", help="the benchmark's folder; retrieval, gap: a LLaVA JSON of captions (default: "
                                      "in the `benchmarks` folder of the run's config)")
    group.add_argument("--split", help="the benchmark's split (default: test) or category (default: all)")
    group.add_argument("--images", help="retrieval, gap: the folder of the pictures (default: likewise)")
    group.add_argument("--image", help="heatmap: the picture")
    group.add_argument("--text", help="heatmap: the words")
    group.add_argument("--out", help="heatmap: the PNG to write (default: heatmap.png in the first run)")
    group = parser.add_argument_group("one question")
    group.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    group.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of the answer")
    group.add_argument("--temperature", type=float, default=0.0, help="of the answer; 0: greedy")
    group.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest that hold this much")
    args = parser.parse_args(argv)
    if (args.bench is None) == (args.ask is None):
        parser.error("name one of --bench and --ask")
    if args.bench == "heatmap" and not (args.image and args.text):
        parser.error("heatmap needs --image FILE and --text WORDS")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature must not be below 0, --top_p in (0, 1], --max_new_tokens at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        runs = [resolve_model(run) for run in args.ckpt] if args.ckpt else [last_run()]
        if args.bench == "heatmap":
            print(json.dumps(heat_map(runs, args.image, args.text, args.out or runs[0] / "heatmap.png", device)))
            return
        for ckpt in runs:
            if args.ask:
                result = ask_one(ckpt, args, device)
            elif args.bench in BENCHES:
                result = run_bench(args.bench, ckpt, args.data, args.split, device)
            else:
                result = run_pairs(args.bench, ckpt, args.data, args.images, device)
            print(json.dumps(result))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
