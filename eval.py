"""Questions to a trained model: benchmarks scored by their own rules, single pictures, and how well its spaces align.

    python eval.py --bench scienceqa                              # the last run, on the ScienceQA folder of its preset
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA
    python eval.py --ask picture.png "What color is the shape?"
    python eval.py --bench retrieval                              # no questions: pictures against captions; also: gap
    python eval.py --bench heatmap --image picture.png --text "a red circle" --ckpt runs/a/align runs/b/align

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
import losses
from projector import VLM
from vit import read_json, resolve

# ----------------------------------------------------------------------------------------------------------------
# Asking


def load_run(folder, device):
    """The model of a run directory, its tokenizer, and the run's config, whose "template" is that of questions: the one
    the run was tuned with; before that the LLM's own where its tokenizer has one; else, and for LLaVA, Vicuna's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vlm = VLM.from_pretrained(folder, dtype, device)
    tokenizer, config = data.load_tokenizer(vlm.sources["llm"]), read_json(resolve(folder) / "config.json")
    data.check_vocabulary(tokenizer, vlm.llm.config.vocab_size)
    if config.get("template", "plain") == "plain":
        is_llava = config.get("model_type") == "llava"  # its chat template takes pictures of its own, not our marker
        config["template"] = "chat" if tokenizer.chat_template and not is_llava else "v1"
    ends = vlm.llm.config.eos_token_id  # and what a run learns to end with is its tokenizer's
    vlm.llm.config.eos_token_id = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return vlm, tokenizer, config


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, **sampling) -> list:
    """Answers, as stripped text, to [{"id", "prompt", "image" path or None}]: greedy, or sampled with `temperature` and
    `top_p`. Prompts of one batch are padded on the left, images padded to squares."""
    to_pieces = data.make_template(template, tokenizer)
    device, c = vlm.llm.head_weight.device, vlm.vit.config
    answers = []
    for start in tqdm(range(0, len(questions), batch), desc="ask", unit=" batches"):
        samples = []
        for question in questions[start : start + batch]:
            pieces = to_pieces([("human", question["prompt"])])
            ids, roles = data.tokenise(pieces, tokenizer, question["image"] is not None)
            pixels = data.preprocess(data.load_image(question["image"]), c.image_size, "pad",
                                     *c.looks) if question["image"] else None
            samples.append({"ids": ids, "roles": roles, "pixels": pixels, "name": f"question {question['id']!r}"})
        m = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id, c.image_size,
                         vlm.llm.config.max_position_embeddings - max_new_tokens, side="left")
        new = vlm.generate(m["ids"].to(device), m["pixels"].to(device), max_new_tokens, m["mask"].to(device),
                           **sampling)
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


def percent(rows) -> float:
    """How many of a list of booleans are true."""
    return round(100 * sum(rows) / max(1, len(rows)), 2)


def score_scienceqa(questions, choices) -> dict:
    """Accuracy in percent, over all questions and over those with an image (IMG). No choice (None) is wrong."""
    right = [choice == question["answer"] for question, choice in zip(questions, choices)]
    shown = [question["image"] is not None for question in questions]
    return {"accuracy": percent(right), "accuracy_img": percent([r for r, s in zip(right, shown) if s]),
            "accuracy_txt": percent([r for r, s in zip(right, shown) if not s]),
            "questions": len(questions), "questions_img": sum(shown), "unparsed": choices.count(None)}


# ----------------------------------------------------------------------------------------------------------------
# POPE and MME: yes or no


def parse_pope(text: str) -> str:
    """POPE's rule: of the first sentence, "no" if it has the word No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(questions, choices) -> dict:
    """Per category and on average, in percent: F1 of "yes" (the headline), accuracy, and how often yes was said."""
    scores = {}
    for category in sorted({question["category"] for question in questions}):
        rows = [(q["answer"] == "yes", c == "yes") for q, c in zip(questions, choices) if q["category"] == category]
        both = sum(gold and said for gold, said in rows)
        said, gold = sum(said for _, said in rows), sum(gold for gold, _ in rows)
        scores[category] = {"f1": round(200 * both / max(1, said + gold), 2),
                            "accuracy": percent([a == b for a, b in rows]), "yes": percent([b for _, b in rows])}
    mean = {key: round(sum(s[key] for s in scores.values()) / len(scores), 2) for key in ("f1", "accuracy", "yes")}
    return mean | {"questions": len(questions), "categories": scores}


def parse_mme(text: str):
    """MME's rule: exactly yes or no, else the first of "yes", "no" within the first four letters, else None."""
    text = text.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


PERCEPTION = {"existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"}


def score_mme(questions, choices) -> dict:
    """Per category 100 x (accuracy + accuracy+), the latter the part of pictures with both questions right; their
    sums over MME's ten categories of perception and over all others (of the toy world's four, "color" is one of the
    ten); both accuracies over everything in percent."""
    right = [choice == question["answer"] for question, choice in zip(questions, choices)]
    pairs = list(zip(right[::2], right[1::2]))
    kind = [question["category"] for question in questions[::2]]
    scores = {category: round(percent([x for k, pair in zip(kind, pairs) if k == category for x in pair])
                              + percent([all(pair) for k, pair in zip(kind, pairs) if k == category]), 2)
              for category in sorted(set(kind))}
    return {"accuracy": percent(right), "accuracy_plus": percent([all(pair) for pair in pairs]),
            "perception": round(sum(v for k, v in scores.items() if k in PERCEPTION), 2),
            "others": round(sum(v for k, v in scores.items() if k not in PERCEPTION), 2),
            "questions": len(questions), "unparsed": choices.count(None), "categories": scores}


def contact_sheet(questions, answers, choices, file, columns: int = 4, rows: int = 2):
    """A PNG of the first questions with a picture: picture, prompt, answer in green where it is right."""
    shown = [row for row in zip(questions, answers, choices) if row[0]["image"]][: columns * rows]
    if not shown:
        return
    cell, picture, line = (250, 250), 110, 15
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(shown) / columns) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (question, text, choice) in enumerate(shown):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        image = data.load_image(question["image"])
        sheet.paste(image.resize((round(picture * image.width / image.height), picture)), (x, y))
        y += picture + 6
        asked = question["prompt"].removeprefix(f"{data.IMAGE}\n").removesuffix(data.LETTER).removesuffix(data.SHORT)
        for part in [part[:38] for part in asked.split("\n")][:6]:
            draw.text((x, y), part, "black", font)
            y += line
        draw.text((x, y), text.replace("\n", " ")[:38], "green" if choice == question["answer"] else "red", font)
    sheet.save(file)


# name: (load(folder, split), split where none is named, parse(answer, question), score(questions, parsed answers))
BENCHES = {
    "scienceqa": (data.load_scienceqa, "test", lambda text, q: parse_choice(text, q["num_choices"]), score_scienceqa),
    "pope": (data.load_pope, "", lambda text, q: parse_pope(text), score_pope),
    "mme": (data.load_mme, "", lambda text, q: parse_mme(text), score_mme),
}


def answer_bench(vlm, tokenizer, template, name, folder, split=None) -> tuple:
    """(scores, questions, answers, what the benchmark's rule reads from them) of one benchmark."""
    load, usual_split, parse, score = BENCHES[name]
    questions = load(folder, usual_split if split is None else split)
    answers = ask(vlm, tokenizer, questions, template)
    choices = [parse(text, question) for text, question in zip(answers, questions)]
    return score(questions, choices), questions, answers, choices


# ----------------------------------------------------------------------------------------------------------------
# Alignment seen directly: pictures against captions, without any answer


@torch.no_grad()
def caption_pairs(vlm, tokenizer, file, images, limit: int = 1000, batch: int = 64):
    """Batches of (projected patches (B, N, C), caption embeddings (B, T, C), mask (B, T), keys (B,)) of the first
    `limit` records of a LLaVA JSON of captions."""
    records = data.load_records(file)[:limit]
    c, device = vlm.vit.config, vlm.llm.head_weight.device
    samples = data.Conversations(records, images, tokenizer, "plain", c.image_size, "crop", looks=c.looks)
    for start in tqdm(range(0, len(records), batch), desc="captions", unit=" batches"):
        m = data.collate([samples[i] for i in range(start, min(start + batch, len(records)))], vlm.num_image_tokens,
                         vlm.image_token_id, samples.pad_id, c.image_size, vlm.llm.config.max_position_embeddings)
        m = {key: value.to(device) for key, value in m.items()}
        yield vlm.encode(m["pixels"]), vlm.llm.embed(m["caption_ids"]), m["caption_mask"], m["caption_keys"]


def first_of_each(keys) -> tuple:
    """(the row where each distinct key stands first, for each row the number of its key)."""
    _, number = keys.unique(return_inverse=True)
    return torch.stack([(number == k).nonzero()[0, 0] for k in range(int(number.max()) + 1)]), number


def score_retrieval(image, text, keys) -> dict:
    """R@1 and R@5 both ways, in percent. The gallery of captions has each distinct one once; of the pictures found
    for a caption, any that it describes is right."""
    distinct, owner = first_of_each(keys)  # (captions,) rows; (n,) which of these captions describes each picture
    similarity = image @ text[distinct].T  # (n, captions)
    to_text = similarity.topk(min(5, len(distinct)), dim=1).indices == owner[:, None]  # (n, 5)
    to_image = owner[similarity.T.topk(min(5, len(image)), dim=1).indices] == torch.arange(
        len(distinct), device=owner.device)[:, None]  # (captions, 5)
    return {f"{way}_r{k}": percent(found[:, :k].any(1).tolist())
            for way, found in (("image_to_text", to_text), ("text_to_image", to_image)) for k in (1, 5)}


def score_gap(image, text, keys) -> dict:
    """Where pictures and captions lie, as unit vectors (means of patches and tokens, however the run pooled).

    Distance of the two centroids; mean cosine of pairs and of others; alignment (mean squared distance of pairs) and
    uniformity (log of the mean of exp(-2 d^2) over pairs of one kind) of Wang & Isola 2020, arXiv 2005.10242.
    """
    text = losses.unit(text)
    cosine, same = image @ text.T, keys[:, None] == keys[None]
    distinct = text[first_of_each(keys)[0]]
    spread = {name: torch.log(torch.exp(-2 * torch.pdist(x).square()).mean()) for name, x in
              (("image", image), ("text", distinct))}
    scores = {"centroid_distance": (image.mean(0) - text.mean(0)).norm(), "positive_cosine": cosine.diagonal().mean(),
              "negative_cosine": cosine[~same].mean(), "alignment": (image - text).square().sum(1).mean(),
              "uniformity_image": spread["image"], "uniformity_text": spread["text"]}
    return {name: round(value.item(), 4) for name, value in scores.items()}


def score_tokens(vlm, pairs, most: int = 100) -> dict:
    """Single patches against single words, for the first `most` pairs: mean distance and cosine of a projected patch
    to its nearest word embedding (of the whole vocabulary), and TACS (SEA, arXiv 2408.11813): the mean of a picture's
    10 largest cosines, each a patch's largest over the caption's tokens."""
    words = losses.precise(vlm.llm.model.embed_tokens.weight)  # (V, C)
    distances, nearest, tacs, seen = [], [], [], 0
    for patches, embeds, mask in pairs:
        patches, embeds, mask = patches[: most - seen], embeds[: most - seen], mask[: most - seen]
        flat = losses.precise(patches.flatten(0, 1))  # (BN, C)
        distances.append(torch.cdist(flat, words).amin(1))
        nearest.append((losses.unit(flat) @ losses.unit(words).T).amax(1))
        cosine = losses.unit(patches) @ losses.unit(embeds).transpose(1, 2)  # (B, N, T)
        best = cosine.masked_fill(~mask[:, None], -1).amax(2)  # (B, N)
        tacs.append(best.topk(min(10, best.shape[1]), dim=1).values.mean(1))
        seen += len(patches)
        if seen >= most:
            break
    means = {"nearest_word_distance": distances, "nearest_word_cosine": nearest, "tacs": tacs}
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in means.items()}


def run_pairs(name, ckpt, file, images, device) -> dict:
    """`retrieval` or `gap` of a run directory on a LLaVA JSON of captions."""
    vlm, tokenizer, config = load_run(ckpt, device)
    file, images = file or config.get("captions"), images or config.get("caption_images")
    if not file or not images:
        raise ValueError(f"{ckpt}: its config.json names no captions; give --data FILE.json and --images FOLDER")
    pooled, first = [], []  # of all pictures one vector; of the first hundred all patches
    for patches, embeds, mask, keys in caption_pairs(vlm, tokenizer, file, images):
        pooled.append((losses.pool_patches(patches), losses.caption_vectors(embeds, mask), keys))
        if sum(len(batch[0]) for batch in first) < 100:
            first.append((patches, embeds, mask))
    image, text, keys = (torch.cat(column) for column in zip(*pooled))
    if len(keys.unique()) < 2:
        raise ValueError(f"{file}: needs at least two different captions")
    scores = (score_retrieval(image, text, keys) if name == "retrieval"
              else score_gap(image, text, keys) | score_tokens(vlm, first))
    result = {"ckpt": str(ckpt), "bench": name, "pairs": len(keys), "distinct_captions": len(keys.unique()), **scores}
    (Path(ckpt) / f"{name}.json").write_text(json.dumps(result, indent=1))
    return result


@torch.no_grad()
def word_maps(vlm, tokenizer, image, text) -> list:
    """[(token as text, cosines of the projected patches with its input embedding (side, side))] for each token."""
    device, c = vlm.llm.head_weight.device, vlm.vit.config
    pixels = data.preprocess(image, c.image_size, "crop", *c.looks)[None].to(device)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"--text {text!r} has no token")
    if vlm.projector_kind == "resampler":
        raise ValueError("the tokens of a resampler have no place on the picture")
    side = math.isqrt(vlm.num_image_tokens)
    cosine = losses.unit(vlm.encode(pixels)[0]) @ losses.unit(vlm.llm.embed(torch.tensor(ids, device=device))).T
    return [(tokenizer.decode([i]).strip(), cosine[:, t].view(side, side).cpu()) for t, i in enumerate(ids)]


def heat_map(runs, path, text, file, device, cell: int = 132) -> dict:
    """A PNG with a row for each run and a column for each token: the picture, red where a patch resembles the token,
    blue where it opposes it, by the cosine itself: full colour at the largest absolute value of the whole sheet."""
    rows = []
    for run in runs:
        vlm, tokenizer, _ = load_run(run, device)
        image = data.load_image(path)
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        maps = word_maps(vlm, tokenizer, image, text)
        rows.append((str(run), image.crop((left, top, left + short, top + short)), maps))
    largest = max(value.abs().max().item() for *_, maps in rows for _, value in maps)
    gap, head, margin = 6, 24, 150
    sheet = Image.new("RGB", (margin + (cell + gap) * (1 + len(rows[0][2])), head + (cell + gap) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for r, (run, image, maps) in enumerate(rows):
        y = head + r * (cell + gap)
        draw.multiline_text((6, y + cell // 2), "\n".join(Path(run).parts[-2:]), "black", font, "lm")
        picture = image.resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (margin, y))
        for t, (word, value) in enumerate(maps):
            x = margin + (t + 1) * (cell + gap)
            strength = (value.abs() / largest * 255).round().to(torch.uint8).numpy()
            is_positive = Image.fromarray((value > 0).numpy().astype("uint8") * 255).resize((cell, cell), 0)
            red, blue, white = (Image.new("RGB", (cell, cell), name) for name in ("red", "blue", "white"))
            tint = Image.composite(red, blue, is_positive)
            grey = Image.blend(picture.convert("L").convert("RGB"), white, 0.5)
            sheet.paste(Image.composite(tint, grey, Image.fromarray(strength).resize((cell, cell), 0)), (x, y))
            if r == 0:
                draw.text((x + cell // 2, head // 2), word, "black", font, "mm")
    sheet.save(file)
    return {"file": str(file), "largest_cosine": round(largest, 4),
            "runs": [{"ckpt": run, **{word: round(value.max().item(), 4) for word, value in maps}}
                     for run, _, maps in rows]}


# ----------------------------------------------------------------------------------------------------------------
# Many runs at once: means over seeds, tables, charts

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantile of t with 1, 2, ... degrees
COLORS = ("#808080", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b")


def interval(values) -> tuple:
    """(mean, half the width of its 95 % interval by Student's t, None for a single value)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, STUDENT[min(n - 2, len(STUDENT) - 1)] * deviation / math.sqrt(n)


def table(corner: str, columns, rows: dict) -> str:
    """Markdown: {row name: values of several seeds for each column, or None} as mean and 95 % interval."""
    def cell(values):
        if not values:
            return "-"
        mean, half = interval(values)
        return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")

    lines = [f"| {corner} | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(cell, cells)) + " |" for name, cells in rows.items()])


def chart(file, title: str, x_label: str, y_label: str, ticks, series: dict):
    """A PNG: one line for each entry {name: [values of several seeds, or None, at each tick]}; the ticks stand at even
    distances, the bars are 95 % intervals."""
    width, height, left, right, top, bottom = 900, 540, 80, 220, 60, 80
    scale = 2  # drawn large and scaled down: Pillow's lines have no smooth edges
    image = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(image)
    fonts = {size: ImageFont.load_default(size * scale) for size in (14, 15, 18)}
    values = [v for line in series.values() for cell in line if cell for v in cell]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)

    def at(i, value):
        x = left + (width - left - right) * (i + 0.5) / len(ticks)
        y = height - bottom - (height - top - bottom) * (value - low) / max(1, high - low)
        return x * scale, y * scale

    def write(x, y, text, size=14, anchor="mm", fill="black"):
        draw.text((x * scale, y * scale), text, fill, fonts[size], anchor)

    write(left, 28, title, 18, "lm")
    for value in range(low, high + 1, 10):
        _, y = at(0, value)
        draw.line((left * scale, y, (width - right) * scale, y), "#dddddd", scale)
        write(left - 10, y / scale, str(value), 14, "rm")
    for i, tick in enumerate(ticks):
        write(at(i, low)[0] / scale, height - bottom + 18, str(tick))
    write((left + width - right) / 2, height - 28, x_label, 15)
    write(left - 50, top - 14, y_label, 15, "lm")
    for number, (name, line) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        known = [(i, *interval(cell)) for i, cell in enumerate(line) if cell]
        shift = (number - (len(series) - 1) / 2) * 4 * scale  # bars side by side
        points = [(at(i, mean)[0] + shift, at(i, mean)[1]) for i, mean, _ in known]
        draw.line(points, color, 3 * scale)
        for (x, y), (i, mean, half) in zip(points, known):
            if half is not None:
                draw.line((x, at(i, max(low, mean - half))[1], x, at(i, min(high, mean + half))[1]), color, 2 * scale)
            draw.ellipse((x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale), color)
        y = top + 20 + 26 * number
        draw.line(((width - right + 16) * scale, y * scale, (width - right + 46) * scale, y * scale), color, 4 * scale)
        write(width - right + 54, y, name, 14, "lm")
    image.resize((width, height), Image.Resampling.LANCZOS).save(file)


LOSSES = {"none": "generative", "patch": "+ patch", "prompt": "+ prompt", "both": "+ both"}
SCORES = {"accuracy_img": "ScienceQA-toy, questions with a picture", "accuracy_txt": "ScienceQA-toy, without a picture",
          "pope": "POPE-like, accuracy", "mme": "MME-like, both questions of a picture right"}


def report(out, size: dict, tuned: dict, cells: list, ablations: dict) -> str:
    """Write results.json, results.md and two charts of what `train.py --stage compare` measured; return the text,
    whose last line is `ratio`. `cells`: {"loss", "steps", "fraction", "seed", and a percentage for each of SCORES}."""
    seeds, short, long = 1 + max(cell["seed"] for cell in cells), size["short"], size["long"]
    budgets, parts = size["budgets"], (0, *size["fractions"])
    few = [part for part in parts if part in (0, 0.1, 1.0)]

    def values(loss, steps, fraction, score="accuracy_img"):
        return [cell[score] for cell in cells
                if (cell["loss"], cell["steps"], cell["fraction"]) == (loss, steps, fraction)]

    def by_part(steps, parts, score="accuracy_img"):
        return {name: [values(loss, steps, part, score) for part in parts] for loss, name in LOSSES.items()}

    by_steps = {name: [values(loss, steps, 0) for steps in budgets] for loss, name in LOSSES.items()}
    percents = [f"{part:.0%}" for part in parts]
    text = [f"""# The losses compared on the toy world

Percent right on the test split: mean of {seeds} seeds, and the 95 % interval of the mean by Student's t. The world
and the towers were fixed beforehand by criteria that look at no alignment (the LLM's text-only accuracy, a linear
probe of the ViT). Every loss had equal steps and data, and was tuned at {short} and at {long} align steps on the
validation split with a seed of its own: {len(size["lr"])} align rates (times {len(size["weight"])} weights, where
there is a contrastive loss), then {len(size["instruct_lr"])} instruct rates. Other numbers of steps use what was
found at {short} (fewer) or {long} (more). Nothing was chosen on test questions.""",
            f"## {SCORES['accuracy_img']}: {short} align steps, then a part of the instruction data",
            table("loss", percents, by_part(short, parts)),
            f"## The same after {long} align steps",
            table("loss", [f"{part:.0%}" for part in few], by_part(long, few)),
            "## Without instruction data, by align steps", table("loss", budgets, by_steps)]
    for score in list(SCORES)[1:]:
        columns = {steps: by_part(steps, few, score) for steps in (short, long)}
        text += [f"## {SCORES[score]}: align steps / part of the instruction data",
                 table("loss", [f"{steps} / {part:.0%}" for steps in columns for part in few],
                       {name: columns[short][name] + columns[long][name] for name in LOSSES.values()})]
    if ablations:
        names = dict.fromkeys(name for name, _ in ablations)
        text += [f"## Ablations: {long} align steps, no instruction data, {size['ablations']} seeds, not tuned anew",
                 table("", LOSSES.values(), {name: [ablations.get((name, loss)) for loss in LOSSES] for name in names})]
    ratio = headline(values, size)
    text = "\n\n".join([*text, f"ratio {json.dumps(ratio)}"])
    Path(out, "results.md").write_text(text + "\n")
    Path(out, "results.json").write_text(json.dumps(
        {"protocol": size, "tuned": tuned, "cells": cells, "ratio": ratio,
         "ablations": [{"name": name, "loss": loss, "accuracy_img": v} for (name, loss), v in ablations.items()]}))
    chart(Path(out, "accuracy_by_data.png"), f"ScienceQA-toy IMG: {short} align steps, then instruct",
          "part of the instruction data", "% right", percents, by_part(short, parts))
    chart(Path(out, "accuracy_by_steps.png"), "ScienceQA-toy IMG: no instruction data", "align steps", "% right",
          budgets, by_steps)
    return text


def headline(values, size) -> dict:
    """The papers' claims as figures, from values(loss, steps, fraction) -> percentages: what 10 % of the data reaches
    of the generative loss with all of it; the gain over it; and how many times the align steps it needs to draw level
    without instruction data."""
    short, long, budgets = size["short"], size["long"], size["budgets"]

    def mean(*cell):
        return interval(values(*cell))[0]

    result = {}
    for loss, name in LOSSES.items():
        result[name] = {f"10% over generative 100%, {s} steps": round(
            mean(loss, s, 0.1) / max(mean("none", s, 1.0), 0.01), 3) for s in (short, long)}
        if loss != "none":
            for s in (short, long):
                for part in (0, 0.1, 1.0):  # paired: a seed has one projector to start from, and one order of the data
                    gain, half = interval([a - b for a, b in zip(values(loss, s, part), values("none", s, part))])
                    result[name][f"gain at {part:.0%}, {s} steps"] = f"{gain:.1f}" + (f" ± {half:.1f}" if half else "")
            result[name]["step factor"] = step_factor(budgets, [mean("none", s, 0) for s in budgets], short,
                                                      mean(loss, short, 0))
    return result


def step_factor(budgets, generative, steps: int, accuracy: float) -> str:
    """How many times `steps` the generative loss needs to reach `accuracy` first: log-linear between its budgets."""
    if accuracy <= generative[0]:
        return f"at most {budgets[0] / steps:.1f}"
    for (s0, a0), (s1, a1) in zip(zip(budgets, generative), zip(budgets[1:], generative[1:])):
        if a0 < accuracy <= a1:
            return f"{s0 * (s1 / s0) ** ((accuracy - a0) / (a1 - a0)) / steps:.1f}"
    return f"above {budgets[-1] / steps:.1f}"


# ----------------------------------------------------------------------------------------------------------------
# The command line


def run_bench(name, ckpt, folder, split, device) -> dict:
    """Score a run directory; write BENCH.json and BENCH.png (the first questions with a picture) into it."""
    vlm, tokenizer, config = load_run(ckpt, device)
    folder = folder or config.get(name)
    if not folder:
        raise ValueError(f"{ckpt}: its config.json names no {name} folder; give one with --data")
    scores, questions, answers, choices = answer_bench(vlm, tokenizer, config["template"], name, folder, split)
    contact_sheet(questions, answers, choices, Path(ckpt) / f"{name}.png")
    result = {"ckpt": str(ckpt), "bench": name, "split": BENCHES[name][1] if split is None else split, **scores}
    predictions = [{"id": q["id"], "prompt": q["prompt"], "text": text, "answer": q["answer"], "choice": choice}
                   for q, text, choice in zip(questions, answers, choices)]
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
    parser.add_argument("--bench", choices=[*BENCHES, "retrieval", "gap", "heatmap"], help="the benchmark")
    parser.add_argument("--ckpt", nargs="+", help="run directory (default: the last run); heatmap takes several")
    parser.add_argument("--data", help="the benchmark's folder, or for retrieval and gap a LLaVA JSON of captions "
                                       "(default: the one in the run's config)")
    parser.add_argument("--images", help="retrieval, gap: the folder of the captions' pictures (default: likewise)")
    parser.add_argument("--image", help="heatmap: the picture")
    parser.add_argument("--text", help="heatmap: the words")
    parser.add_argument("--out", help="heatmap: the PNG to write (default: heatmap.png in the first run directory)")
    parser.add_argument("--split", help="its split (default: test) or category (default: all)")
    parser.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of the answer to --ask")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answer to --ask; 0: greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that hold this much")
    args = parser.parse_args()
    if (args.bench is None) == (args.ask is None):
        parser.error("name one of --bench and --ask")
    if args.bench == "heatmap" and not (args.image and args.text):
        parser.error("heatmap needs --image FILE and --text WORDS")
    if args.ckpt and len(args.ckpt) > 1 and args.bench != "heatmap":
        parser.error("only heatmap takes several runs")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature must not be below 0, --top_p in (0, 1], --max_new_tokens at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        runs = [resolve(run) for run in args.ckpt] if args.ckpt else [last_run()]
        ckpt = runs[0]
        if args.bench == "heatmap":
            result = heat_map(runs, args.image, args.text, Path(args.out or ckpt / "heatmap.png"), device)
            print(json.dumps({"bench": "heatmap", "image": args.image, "text": args.text, **result}))
        elif args.bench in ("retrieval", "gap"):
            print(json.dumps(run_pairs(args.bench, ckpt, args.data, args.images, device)))
        elif args.ask:
            vlm, tokenizer, config = load_run(ckpt, device)
            image, text = args.ask
            question = {"id": image, "prompt": f"{data.IMAGE}\n{text}", "image": image}
            answer, = ask(vlm, tokenizer, [question], config["template"], args.max_new_tokens,
                          temperature=args.temperature, top_p=args.top_p)
            print(json.dumps({"ckpt": str(ckpt), "image": image, "question": text, "answer": answer}))
        else:
            scores = run_bench(args.bench, ckpt, args.data, args.split, device)
            print(f"{args.bench} of {ckpt}: {scores['questions']} questions, {scores.get('unparsed', 0)} answers that "
                  "the benchmark's rule cannot read; these count as wrong")
            print(json.dumps(scores))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
