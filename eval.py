"""Questions to a trained model: benchmarks by their official rules, or about one picture.

    python eval.py --bench scienceqa                              # the last run, on its preset's ScienceQA
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA --score likelihood --floors
    torchrun --nproc_per_node=8 eval.py --bench all --data data   # every benchmark that lies there
    python eval.py --ask picture.png "Which shape is it? Answer the question using a single word or phrase."
    python eval.py --chat picture.png                             # several turns: a question a line

A score is only as good as its prompt, its parser and its denominator: published ScienceQA numbers of one and
the same checkpoint differ by ten points. So the prompt is built here from the raw files, the answer is
greedy, the official rule reads it, and what is unreadable is wrong and stays in the denominator, which is
printed. BENCHES, the table, has a line for each benchmark: its folder, its split, load (files -> questions),
parse (answer -> choice), score (choices -> numbers).

Answers are appended to BENCH.partial.RANK.jsonl in the run directory as they come; after a kill, the same
command goes on from there. In the end all are in BENCH.json (of a Hub id: in its folder in the Hub's cache),
beside the scores, which are also printed: one JSON object a line, one line a run and benchmark.
"""

import argparse
import ast
import csv
import itertools
import json
import math
import os
import random
import re
import string
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
from data import find_image

from projector import VLM
from plumbing.files import named, read_json, resolve_model, whole
from plumbing.ranks import choose_dtype, command, on_every_rank, rank, say, start_ranks, world_size


# ------------------------------------------------------------------------------------------------------------
# Asking

def load_run(folder, device) -> tuple:
    """(model, tokenizer, config) of a run directory. config["template"] is that of questions: what the run
    was tuned with; after align alone the LLM's own where its tokenizer has one, else Vicuna's. (A LLaVA
    folder gets Vicuna's: its own template takes pictures in another form than our marker.)"""
    folder = resolve_model(folder)
    config = read_json(folder / "config.json")
    with named(folder / "config.json"):
        dtype = choose_dtype(device, config.get("dtype") or "")
    if config.get("template", "plain") not in [*data.TEMPLATES]:
        raise ValueError(f"{folder}/config.json: template is {config['template']!r}")
    vlm = VLM.from_pretrained(folder, dtype, device)
    tokenizer = data.load_tokenizer(vlm.sources["llm"])
    data.check_vocabulary(tokenizer, vlm.llm.config.vocab_size)  # a wrong one would answer nonsense, quietly
    if config.get("template", "plain") == "plain":
        has_own = tokenizer.chat_template and not str(config.get("model_type")).startswith("llava")
        config["template"] = "chat" if has_own else "v1"
    return vlm, tokenizer, config


def to_samples(vlm, tokenizer, question: dict, template: str, *answers) -> list:
    """As data.collate takes them: the question, open for an answer, with its picture; then, for each of
    `answers`, the question with that, without end token and picture. Where the question has turns "before"
    it, these stand there."""
    name, has_image, samples = f"question {question['id']!r}", question["image"] is not None, []
    name = f"{question['file']}: {name}" if "file" in question else name
    with named(name):
        for answer in (None, *answers):
            turns = [*question.get("before", ()), ("human", question["prompt"])]
            turns += [] if answer is None else [("gpt", answer)]
            pieces = data.TEMPLATES[template](turns, tokenizer)  # with an answer, the last is its end
            ids, roles = data.tokenise(pieces if answer is None else pieces[:-1], tokenizer, has_image)
            samples.append({"ids": ids, "roles": roles, "pixels": None, "name": name})
        if has_image:
            # "pad", whatever the run was trained with: a question may be about the picture's edge
            picture = data.load_image(question["image"])
            samples[0]["pixels"] = data.preprocess(picture, vlm.vit.config, "pad")
    return samples


def to_batch(vlm, tokenizer, samples, room: int, side: str = "left") -> dict:
    """One batch on the model's device, padded on that side. ValueError for a prompt longer than `room`."""
    m = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                     vlm.vit.config.image_size, room, side)
    return data.to_device(m, vlm.llm.head_weight.device)


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, file=None,
        **how) -> list:
    """Answers, as stripped text, to [{"id", "prompt", "image" path, base64 bytes or None}]: greedy, or
    sampled with `temperature` and `top_p`. `file`: see `in_batches`."""
    room = vlm.llm.config.max_position_embeddings - max_new_tokens  # the answer needs positions too
    # what a run learns to end with, whatever its LLM's config says
    with named(f"{tokenizer.name_or_path}: template {template}"):
        *_, (end, _) = data.TEMPLATES[template]([("human", "?"), ("gpt", "!")], tokenizer)
    how["end_tokens"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]

    def answer(rows):
        samples = [to_samples(vlm, tokenizer, row, template)[0] for row in rows]
        m = to_batch(vlm, tokenizer, samples, room)
        new = vlm.generate(m["ids"], m["pixels"], max_new_tokens, m["mask"], **how)  # (B, <= max_new_tokens)
        return [tokenizer.decode(ids[ids >= 0], skip_special_tokens=True).strip() for ids in new]

    return in_batches(questions, answer, batch, file)


@torch.no_grad()
def likelihoods(vlm, tokenizer, questions, template: str, batch: int = 16, file=None) -> list:
    """For each question the log-probabilities, in nats, of its "options" (a list of texts) as the answer:
    summed over the tokens of each, the end token not among them. No parser is needed, and nothing is
    unreadable. Options of several tokens are not made comparable here: a longer one has more to lose.

    A question and its picture go through the model once, each option only from where it differs.
    """
    most = vlm.llm.config.max_position_embeddings

    def answer(rows):
        samples, ends = [], []  # of each question: what all its options share; what each has behind that
        for row in rows:
            sample, *texts = to_samples(vlm, tokenizer, row, template, *row["options"])
            # less one: the last common token predicts an option's first, so it goes with the options
            shared = len(os.path.commonprefix([text["ids"] for text in (sample, *texts)])) - 1
            samples.append(sample | {key: sample[key][:shared] for key in ("ids", "roles")})
            ends.append([text | {key: text[key][shared:] for key in ("ids", "roles")} for text in texts])
        most_options, B = max(map(len, ends)), len(rows)
        turns = []  # first options of all questions, second options ..; who has fewer repeats the last
        for number in range(most_options):
            turns += [options[min(number, len(options) - 1)] for options in ends]
        said = to_batch(vlm, tokenizer, turns, most, "right")  # ids (options x B, T)
        m = to_batch(vlm, tokenizer, samples, most - said["ids"].shape[1])
        embeds = vlm.splice(m["ids"], vlm.encode(m["pixels"]))  # (B, S, C)
        hidden = torch.cat(vlm.llm.hidden_behind(embeds, m["mask"], said["ids"].split(B)))  # (.. x B, T, C)
        next_ids = said["labels"][:, 1:]  # what each position says next, where that is the option's
        row_of, place = (next_ids != data.IGNORE).nonzero(as_tuple=True)  # (tokens,) each
        log_p = vlm.llm.logits(hidden[row_of, place]).float().log_softmax(-1)  # (tokens, V)
        log_p = log_p.gather(1, next_ids[row_of, place][:, None])[:, 0]  # (tokens,)
        sums = log_p.new_zeros(len(turns)).index_add(0, row_of, log_p).view(most_options, B)
        return [row[: len(options)] for row, options in zip(sums.T.tolist(), ends)]

    return in_batches(questions, answer, batch, file)


MOST_TOKENS = 2**15  # in a batch of questions, about: long prompts go in smaller batches


def in_batches(questions, answer, batch: int, file=None) -> list:
    """`answer(some questions) -> [what JSON can hold]` for all questions, in their order.

    Batches hold at most `batch` questions, of similar length, and MOST_TOKENS. They are the same on any
    number of ranks, which take turns: so are the answers, to the last bit. With `file`, each rank appends to
    FILE.RANK.jsonl as they come, and what such files hold already is not asked again. The ranks' first error
    is raised on all of them.
    """
    def length(i):  # a picture is longer than most texts; in characters, which is near enough
        return questions[i]["image"] is None, -len(questions[i]["prompt"])

    order = sorted(range(len(questions)), key=length)  # longest first: what needs too much memory fails soon
    tokens = [600 * (row["image"] is not None) + len(row["prompt"]) // 4 for row in questions]
    batches = data.cut_by_tokens(order, tokens, batch, MOST_TOKENS)
    # rank 0 reads alone: the files of the others are about to grow
    answers = on_every_rank(lambda: read_answers(file, questions) if file and rank() == 0 else {})[0]
    left = [indices for indices in batches if not set(indices) <= answers.keys()]

    def answer_mine():
        mine, new = left[rank() :: world_size()], {}
        is_quiet = rank() > 0 or len(questions) == 1
        with tqdm(desc="ask", total=sum(map(len, mine)), unit=" questions", disable=is_quiet) as bar:
            for indices in mine:
                rows = [questions[i] for i in indices]
                found = answer(rows)
                new |= dict(zip(indices, found))
                if file:
                    append_answers(f"{file}.{rank()}.jsonl", rows, found)
                bar.update(len(rows))
        return new

    for new in on_every_rank(answer_mine):
        answers |= new
    return [answers[i] for i in range(len(questions))]


def append_answers(file, questions, answers):
    """One JSON line a question; all lines of a batch in one write."""
    lines = []
    for question, answer in zip(questions, answers):
        lines.append(json.dumps({"id": question["id"], "prompt": question["prompt"], "answer": answer}))
    with open(file, "a") as f:
        f.write("\n".join(lines) + "\n")


def read_answers(file, questions) -> dict:
    """{index: answer} of what FILE.0.jsonl, FILE.1.jsonl .. hold. A line that a kill has cut short is
    dropped; one that belongs to none of the questions is a ValueError."""
    answers, index = {}, {question["id"]: i for i, question in enumerate(questions)}
    for part in sorted(Path(file).parent.glob(f"{Path(file).name}.*.jsonl")):
        text = data.read_text(part)
        lines = text[: text.rfind("\n") + 1]
        if lines != text:
            part.write_text(lines)
        for row in data.read_entries(part, id=data.ID, prompt=str, answer=(str, list)) if lines else []:
            i = index.get(row["id"])
            if i is None or questions[i]["prompt"] != row["prompt"]:
                raise ValueError(f"{part}: question {row['id']!r} is not asked now, or reads otherwise; "
                                 "go on with the options it was begun with, or remove the file")
            answers[i] = row["answer"]
    return answers


def about(image, text: str) -> dict:
    """The question about a picture as it is typed, for `ask`."""
    turn = {"from": "human", "value": f"{data.IMAGE}\n{text}"}  # which may have a marker already
    (_, prompt), = data.clean_turns({"image": image, "conversations": [turn]})
    return {"id": image, "prompt": prompt, "image": image}


def chat(vlm, tokenizer, template: str, image, **how):
    """Answer a question a line of stdin, until an empty one, the end or Ctrl-C. What was said before goes
    with each, so the prompt grows; where the LLM has no room for it any more, that is a ValueError."""
    before, mark = [], "> " if sys.stdin.isatty() else ""  # a pipe gets the answers alone
    try:
        while text := input(mark).strip():
            question = {"prompt": text, "image": image} if before else about(image, text)
            question |= {"id": f"{image}, turn {len(before) // 2 + 1}", "before": before}
            answer, = ask(vlm, tokenizer, [question], template, **how)
            print(answer, flush=True)
            before = [*before, ("human", question["prompt"]), ("gpt", answer)]
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if mark else "")  # the shell's prompt gets a line of its own


# ------------------------------------------------------------------------------------------------------------
# What the benchmarks share

def to_question(file, name, text: str, image, answer=None, category=None, ending=data.SHORT_ANSWER,
                **more) -> dict:
    """A question about a picture (a Path, or a file's bytes in base64) in LLaVA's form. Closed ones have
    "options", what may be chosen; those that only count together have one "group". An answer of None is known
    to a server or judge alone."""
    return {"id": name, "prompt": f"{data.IMAGE}\n{text}{ending}", "image": image, "answer": answer,
            "category": category, "file": str(file), **more}


def lettered(text: str, choices) -> str:
    """The question and a line `A. choice` for each choice."""
    return "\n".join([text, *(f"{x}. {choice}" for x, choice in zip(string.ascii_uppercase, choices))])


def percent(rows) -> float:
    """The mean of a list of booleans, or of parts of 1, in percent."""
    return round(100 * sum(rows) / max(1, len(rows)), 2)  # max: a split may have no question with a picture


def standard_error(influences, questions) -> float:
    """Of a score in percent, from how much each question moves it (its influence, in parts of 1).

    Questions about one picture are not independent, so their influences are added before they are squared
    (Liang and Zeger 1986). Of a mean they are (right - mean) / n, and where each question has its own picture
    this is the binomial sqrt(p (1 - p) / n).
    """
    of_picture = Counter()
    for value, question in zip(influences, questions):
        of_picture[question["image"] or question["id"]] += value
    return round(100 * math.sqrt(sum(value**2 for value in of_picture.values())), 2)


def accuracy(right, questions, name: str = "accuracy") -> dict:
    """{name: the mean of `right` in percent, name_se: its standard error in points}."""
    n, total = max(1, len(right)), sum(right)
    return {name: percent(right),
            f"{name}_se": standard_error([(value - total / n) / n for value in right], questions)}


def grouped(keys, values) -> dict:
    """{key: [its values]}, sorted by key."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(str(key), []).append(value)
    return dict(sorted(groups.items()))


def grade(questions, choices) -> list:
    """Which choices are right. No choice (None) is wrong."""
    return [choice == question["answer"] for question, choice in zip(questions, choices)]


def score_accuracy(questions, choices, right=None, parts=None) -> dict:
    """Micro average, and by category, or by `parts`: for each question the names of those that it is in.
    `right`: where a choice may be right without being the answer."""
    right, categories = grade(questions, choices) if right is None else right, {}
    for value, question, names in zip(right, questions, parts or itertools.repeat(None)):
        for name in names or [str(question.get("category"))]:
            categories.setdefault(name, []).append(value)
    for name, values in categories.items():
        categories[name] = {"accuracy": percent(values), "questions": len(values)}
    return accuracy(right, questions) | {"questions": len(questions), "unparsed": choices.count(None),
                                         "categories": dict(sorted(categories.items()))}


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: load (files -> questions), parse (answer -> choice), score (choices -> numbers)

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


def official_split(question: dict) -> list:
    """The parts of ScienceQA's evaluate_acc that a question is in; TXT: with a hint, NO: without either."""
    has_image, has_hint = question["image"] is not None, bool(question.get("hint"))
    subject, year = question.get("subject", ""), question.get("grade", "").removeprefix("grade")
    parts = {"NAT": subject.startswith("natural"), "SOC": subject.startswith("social"),
             "LAN": subject.startswith("language"), "TXT": has_hint, "IMG": has_image,
             "NO": not has_hint and not has_image, "G1-6": year in list("123456"),
             "G7-12": year in "7 8 9 10 11 12".split()}
    return [name for name, is_in in parts.items() if is_in]


def score_scienceqa(questions, choices) -> dict:
    """Accuracy in percent: of all questions, of those with an image (`img`), of those without (`txt`: not the
    official TXT), and of the official split's parts."""
    right, scores = grade(questions, choices), {}
    for name, has_image in (("img", True), ("txt", False)):
        rows = [i for i, question in enumerate(questions) if (question["image"] is not None) == has_image]
        scores |= accuracy([right[i] for i in rows], [questions[i] for i in rows], f"accuracy_{name}")
        scores[f"questions_{name}"] = len(rows)
    return score_accuracy(questions, choices, right, [official_split(q) for q in questions]) | scores


def load_pope(folder, split: str):
    """POPE's files `*pope_{category}.json` (JSON lines, or the lists of its aokvqa and gqa), all of them or
    `split` alone, in the folder or, as LLaVA has them, in coco/. Question and label are one row; LLaVA's
    scorer pairs them by position, and a new revision breaks the pairs."""
    pattern, kinds = f"*pope_*{split}.json", {"question_id": data.ID, "image": str, "text": str, "label": str}
    places = [folder / "images", folder / "val2014", folder.parent / "images", folder.parent / "val2014"]
    images = next((place for place in places if place.is_dir()), folder)
    is_llavas = not any(folder.glob(pattern)) and (folder / "coco").is_dir()
    for file, row in data.find_entries(folder / "coco" if is_llavas else folder, pattern, **kinds):
        category = file.stem.rsplit("pope_", 1)[1]
        yield to_question(file, f"{category}-{row['question_id']}", row["text"],
                          find_image(images, row["image"]), row["label"], category, options=["yes", "no"])


def parse_pope(text: str, question=None) -> str:
    """POPE's rule: of the first sentence, "no" if it has the word No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(questions, choices) -> dict:
    """Per category and on average, in percent: F1 of "yes" (the headline), accuracy, share of yes."""
    scores, mean, asked, influence = {}, {}, [], {"f1": [], "accuracy": []}
    rows = [(question, question["answer"] == "yes", choice == "yes")
            for question, choice in zip(questions, choices)]
    groups = grouped([question["category"] for question in questions], rows)
    for category, rows in groups.items():
        each = max(1, sum(gold + said for _, gold, said in rows))
        f1 = 2 * sum(gold and said for _, gold, said in rows) / each  # 2 TP / (2 TP + FP + FN)
        right = sum(gold == said for _, gold, said in rows) / len(rows)
        scores[category] = {"f1": round(100 * f1, 2), "accuracy": round(100 * right, 2),
                            "yes": percent([said for _, _, said in rows]), "questions": len(rows)}
        for question, gold, said in rows:
            asked.append(question)
            influence["f1"].append((2 * (gold and said) - f1 * (gold + said)) / each / len(groups))
            influence["accuracy"].append(((gold == said) - right) / len(rows) / len(groups))
    for key in ("f1", "accuracy", "yes"):  # every category counts alike, however many questions it has
        mean[key] = round(sum(score[key] for score in scores.values()) / len(scores), 2)
    errors = {f"{key}_se": standard_error(values, asked) for key, values in influence.items()}
    return mean | errors | {"questions": len(questions), "categories": scores}


def load_mme(folder, split: str):
    """Two questions for each picture. A category (or `split` alone) is a folder of pictures and text files
    `question<TAB>Yes|No`, side by side or in images/ and questions_answers_YN/. LLaVA asks for a short answer
    instead of the questions' own "yes or no"."""
    data.find_files(folder, f"{split or '*'}/**/*.txt")  # there must be some
    for category in sorted(path for path in folder.glob(split or "*") if path.is_dir()):
        texts, images = category / "questions_answers_YN", category / "images"
        texts, images = texts if texts.is_dir() else category, images if images.is_dir() else category
        endings = (".jpg", ".jpeg", ".png")
        pictures = {file.stem: file for file in images.glob("*.*") if file.suffix in endings}
        for name in sorted({file.stem for file in texts.glob("*.txt")} | pictures.keys()):
            file, pair = texts / f"{name}.txt", f"{category.name}/{name}"
            lines = [line for line in data.read_text(file).split("\n") if line.strip()]
            if len(lines) != 2 or not all(re.fullmatch("[^\t]+\t(Yes|No)\\s*", line) for line in lines):
                raise ValueError(f"{file}: not two lines of question, tab, Yes or No")
            for number, line in enumerate(lines):
                text, answer = line.replace("Please answer yes or no.", "").split("\t")
                yield to_question(file, f"{pair}/{number}", text.strip(),
                                  pictures.get(name, images / f"{name}.png"), answer.strip().lower(),
                                  category.name, options=["yes", "no"], group=pair)


def parse_mme(text: str, question=None):
    """MME's rule: exactly yes or no, else the first of these within the first four letters, else None."""
    text = text.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


def score_mme(questions, choices) -> dict:
    """Per category 100 x (accuracy + accuracy+), the latter the part of pictures with both questions right;
    their sums over MME's ten categories of perception and over all others (of the toy world's four, "color"
    is one of the ten); both accuracies over everything in percent."""
    perception = "existence count position color posters celebrity scene landmark artwork OCR".split()
    right, asked = grade(questions, choices), questions[::2]  # one question of each picture
    pairs, scores, categories = list(zip(right[::2], right[1::2])), {}, {}
    points = [(first + second) / 2 + (first and second) for first, second in pairs]  # 0 to 2
    groups = grouped([question["category"] for question in asked], zip(asked, points))
    for part in ("perception", "others"):
        total, influences, of = 0, [], []
        for name, rows in groups.items():
            if (name in perception) == (part == "perception"):
                mean = sum(value for _, value in rows) / len(rows)
                total += mean
                influences += [(value - mean) / len(rows) for _, value in rows]
                of += [question for question, _ in rows]
                categories[name] = {"score": round(100 * mean, 2), "questions": 2 * len(rows)}
        scores |= {part: round(100 * total, 2), f"{part}_se": standard_error(influences, of)}
    scores |= accuracy([all(pair) for pair in pairs], asked, "accuracy_plus")
    return score_accuracy(questions, choices, right) | scores | {"pictures": len(pairs),
                                                                 "categories": categories}


def load_seed(folder, split: str):
    """SEED-Bench.json's image part, in nine dimensions; pictures in SEED-Bench-image/."""
    file = data.find_files(folder, "SEED-Bench.json")[0]
    kinds = {"question_id": data.ID, "data_id": str, "data_type": str, "question": str, "answer": str}
    choices = ("choice_a", "choice_b", "choice_c", "choice_d")
    rows = data.read_entries(file, **kinds, **dict.fromkeys(choices, (str, int, float)))
    names = {number: name for name, number in read_json(file).get("question_type", {}).items()}
    for row in rows:
        if row["data_type"] == split:
            kind, text = row.get("question_type_id"), lettered(row["question"], [row[key] for key in choices])
            image = find_image(folder / "SEED-Bench-image", row["data_id"])
            yield to_question(file, row["question_id"], text, image, row["answer"], names.get(kind, kind),
                              data.LETTER_ANSWER, options=list("ABCD"))


def parse_seed(text: str, question):
    """SEED-Bench's rule: the answer is the letter and nothing else."""
    return text if text in question["options"] else None


def load_mmbench(folder, split: str, chinese: bool = False):
    """A table mmbench_dev_*.tsv (Chinese: with cn in its name) of index, question, hint, A to D, answer,
    category, image; `split` is a part of its name. Row index + k x 10^6 asks question `index` again, its
    options rotated. An image is base64, or the index of the row that has it. A test split has no answers."""
    files = [file for file in data.find_files(folder, "*.tsv") if split in file.stem.lower()]
    files = [file for file in files if ("cn" in file.stem.lower()) == chinese]
    if len(files) != 1:
        raise ValueError(f"{folder}: --split has to name one table; {split!r} fits {[f.name for f in files]}")
    not_given = {"", "nan", "none", "null", "na", "n/a"}  # by pandas, which LLaVA reads with
    rows = data.read_entries(files[0], **dict.fromkeys(("index", "question", *"ABCD", "image"), str))
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        if not row["index"].isdecimal():
            raise ValueError(f"{files[0]}: the index {row['index']!r} is not a number")
        texts = [row.get(key) or "" for key in ("hint", "answer", *"ABCD")]
        hint, answer, *choices = ["" if text.lower() in not_given else text for text in texts]
        choices = choices[: [*choices, ""].index("")]  # up to the first that is not given
        text = lettered(f"{hint}\n{row['question']}" if hint else row["question"], choices)
        kept = [key for key in ("index", "question", *"ABCD", "answer", "split") if key in row]
        yield to_question(
            files[0], row["index"], text, images.get(row["image"], row["image"]).encode(), answer or None,
            row.get("category"), "\n请直接回答选项字母。" if chinese else data.LETTER_ANSWER,
            options=list("ABCD"[: len(choices)]), choices=choices, group=int(row["index"]) % 10**6,
            row={key: row[key] for key in kept})


def parse_mmbench(text: str, question):
    """MMBench's rules without its language model: the one letter that is a word, alone or with such signs (a
    lone A among more than three words may be an article), else the one choice whose text occurs."""
    words, said = text.split(), text.lower()
    for form in "{} {}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{}).".split():
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(found) == 1 and not (form == "{}" and found == ["A"] and len(words) > 3):
            return found[0] if found[0] in question["options"] else None
    found = [x for x, choice in zip(question["options"], question["choices"]) if choice.lower() in said]
    return found[0] if len(found) == 1 else None


def score_mmbench(questions, choices) -> dict:
    """Circular: a question is right if it is in all its rotations; `accuracy_single`: each by itself."""
    right = grade(questions, choices)
    groups = grouped([question["group"] for question in questions], zip(questions, right)).values()
    circular = [all(value for _, value in rows) for rows in groups]
    return score_accuracy([rows[0][0] for rows in groups], choices, circular) | {
        "accuracy_single": percent(right), "rotations": len(questions)}


def submit_mmbench(questions, answers, file):
    """The server's table, as LLaVA makes it. It wants Excel: pandas.read_table(FILE).to_excel(...)."""
    names = list(questions[0]["row"])
    names.insert(6, "prediction")
    with open(file, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, names, delimiter="\t")
        table.writeheader()
        table.writerows(question["row"] | {"prediction": text} for question, text in zip(questions, answers))


def load_gqa(folder, split: str):
    """{split}_questions.json of GQA: question id -> question, answer, imageId; pictures in images/."""
    kinds = {"id": str, "question": str, "answer": str, "imageId": str}
    for file, row in data.find_entries(folder, f"**/{split}_questions.json", **kinds):
        image = find_image(folder / "images", f"{row['imageId']}.jpg")
        yield to_question(file, row["id"], row["question"], image, row["answer"],
                          (row.get("types") or {}).get("structural"))


def parse_gqa(text: str, question=None) -> str:
    """Lower case, without dots at the end; then GQA wants the very answer."""
    return text.rstrip(".").lower()


def load_textvqa(folder, split: str):
    """TextVQA_0.5.1_{split}.json, with ten answers each, and the OCR tokens, which the prompt tells, of
    TextVQA_Rosetta_OCR_v0.2_{split}.json; pictures in train_images/."""
    tokens, kinds = {}, {"question_id": data.ID, "image_id": str, "question": str, "answers": list}
    told = {"image_id": str, "ocr_tokens": list}
    for ocr, row in data.find_entries(folder, f"TextVQA_Rosetta_OCR_*_{split}.json", **told):
        tokens[row["image_id"]] = row["ocr_tokens"]
    for file, row in data.find_entries(folder, f"TextVQA_0.5.1_{split}.json", **kinds):
        name, image, text = row["question_id"], row["image_id"], row["question"]
        if image not in tokens:
            raise ValueError(f"{ocr}: nothing for question {name!r}; is it of another split?")
        if tokens[image]:
            text += f"\nReference OCR token: {', '.join(tokens[image])}"
        answers = [parse_vqa(answer) for answer in row["answers"]]
        yield to_question(file, name, text, find_image(folder / "train_images", f"{image}.jpg"), answers)


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've""".split()
MISSPELT = {word[: at.start()] + word[at.end() :]: word
            for word in CONTRACTIONS for at in re.finditer("'", word)}
MISSPELT["somebody'd"] = "somebodyd"  # so the official list has it; all others lack one apostrophe


def parse_vqa(text: str, question=None) -> str:
    """An answer as the VQA server and TextVQA's scorer normalise it: lower case, without commas, question
    marks, articles and dots that end no number; a sign is deleted in the whole text where it stands beside a
    space somewhere, else it becomes one; number words are digits; contractions have their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    original = text = re.sub("[\n\t]", " ", text)
    for sign in ";/[]\"{}()=+\\_-><@`!":
        text = text.replace(sign, "" if f"{sign} " in original or f" {sign}" in original else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ("a", "an", "the"))


def score_textvqa(questions, choices) -> dict:
    """VQA accuracy: the mean of min(1, matches / 3) over the ten subsets that leave out one answer of ten."""
    right = []
    for question, choice in zip(questions, choices):
        n, same = len(question["answer"]), question["answer"].count(choice)
        # `same` of the subsets have one match less
        right.append((same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n)
    return accuracy(right, questions) | {"questions": len(questions)}


def load_vqav2(folder, split: str):
    """v2_OpenEnded_mscoco_{split}_questions.json; pictures in test2015/. The answers are the server's."""
    pattern, images = f"v2_OpenEnded_mscoco_{split}_questions.json", split.replace("-dev", "")
    for file, row in data.find_entries(folder, pattern, question_id=data.ID, image_id=int, question=str):
        image = folder / images / f"COCO_{images}_{row['image_id']:012d}.jpg"
        yield to_question(file, row["question_id"], row["question"], image)


def submit_vqav2(questions, answers, file):
    """The server's JSON: normalised answers, and "" for the rest of the test split if its file is there."""
    texts = {question["id"]: parse_vqa(text) for question, text in zip(questions, answers)}
    test = Path(questions[0]["file"]).with_name("v2_OpenEnded_mscoco_test2015_questions.json")
    rest = data.read_entries(test, question_id=data.ID) if test.exists() else []
    texts = {row["question_id"]: "" for row in rest} | texts
    rows = [{"question_id": number, "answer": text} for number, text in texts.items()]
    Path(file).write_text(json.dumps(rows))


def load_mmmu(folder, split: str):
    """MMMU's {split}*.json(l), a file for each subject or one for all: id, question, options (a list, or its
    text), answer, question_type, image_1 to image_7, each a path beside the file or {"bytes": base64}.
    Asked as in LLaVA's own run: about the first picture, `<image 2>` staying text."""
    kinds = {"id": str, "question": str, "options": (str, list), "answer": (str, list), "question_type": str,
             "image_1": (str, dict, type(None))}
    for file, row in data.find_entries(folder, f"**/{split}*.json*", **kinds):
        pictures = [row[f"image_{i}"] for i in range(1, 8) if row.get(f"image_{i}")]
        image = pictures[0] if pictures else None
        if isinstance(image, dict):
            image = image["bytes"].encode() if image.get("bytes") else image.get("path")
        image = find_image(file.parent, image) if isinstance(image, str) else image
        asked, ending, answer, more = row["question"], data.SHORT_ANSWER, as_list(row["answer"]), {}
        if row["question_type"] != "open":  # multiple-choice
            choices, answer, ending = as_list(row["options"]), row["answer"], data.LETTER_ANSWER
            more = {"choices": choices, "options": list(string.ascii_uppercase[: len(choices)])}
            asked += "\n" + "".join(f"({x}) {text}\n" for x, text in zip(more["options"], choices))
        subject = row["id"].partition("_")[2].rpartition("_")[0]  # of validation_Art_Theory_3
        yield to_question(file, row["id"], asked, image, answer, subject, ending,
                          pictures=len(pictures), **more)


def as_list(value) -> list:
    """MMMU's lists are written as Python texts; a text that is none is a list of itself, a broken one is
    empty."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if re.fullmatch(r"\[.*\]", value, re.DOTALL) else [value]
        except (SyntaxError, ValueError):
            return []
    return [str(item) for item in value]


def parse_mmmu(text: str, question):
    """MMMU's rule. Multiple choice: of the letters in brackets, else of those that stand alone, else (in an
    answer of more than five words) of the choices told, the last; else None. Open: a list of candidates."""
    if not question.get("options"):
        return open_candidates(text)
    for sign in ",.!?;:'":
        text = text.strip(sign)
    forms, letters = [], question["options"]
    for form in ("({})", " {} "):
        forms.append((f" {text} ", [form.format(letter) for letter in letters]))
    if len(text.split()) > 5:
        forms.append((text.lower(), [choice.lower() for choice in question["choices"]]))
    for said, wanted in forms:
        places = [said.rfind(form) for form in wanted]
        if max(places) >= 0:
            return letters[places.index(max(places))]
    return None


def open_candidates(text: str) -> list:
    """What MMMU's rule takes from an open answer: of each line the shortest end behind a word that announces
    a result (if there is none, the whole answer), and the numbers therein, as `normalised` has them."""
    text = text.strip().strip(".").lower()
    found, lines = [], text.split("\n")
    words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for number, line in enumerate(lines):
        last = ["="] if number == len(lines) - 1 else []
        ends = [line.split(word)[-1].strip() for word in words + last if word in line]
        shortest = min(filter(None, ends), key=len, default="")
        found += [shortest] if shortest and shortest not in list(":,.!?;'") else []
    found = found or [text]
    for end in list(found):
        for number in (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                       r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"):
            found += re.findall(number, end)
    return [value for end in found for value in normalised(end)]


def normalised(text: str) -> list:
    """A number rounded to two places, or the lower-case text; of one letter only with a space beside it."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score_mmmu(questions, choices) -> dict:
    """Mean over all questions. As in the official scorer, an unreadable choice is a guess (seed 42); an open
    answer is right where an expected number is among its candidates, or an expected text within one."""
    right, rng = [], random.Random(42)
    for question, choice in zip(questions, choices):
        if question.get("options"):
            choice = rng.choice(question["options"]) if choice is None else choice
            right.append(choice == question["answer"])
        else:
            wanted = [value for answer in question["answer"] for value in normalised(answer)]
            pairs = itertools.product(wanted, choice or ())
            right.append(any(a == b or (type(a) is type(b) is str and a in b) for a, b in pairs))
    further = sum(question["pictures"] > 1 for question in questions)
    return score_accuracy(questions, choices, right) | {"questions_with_further_pictures": further}


def load_mmvet(folder, split: str):
    """mm-vet.json: id -> imagename, question; pictures in images/. A language model judges."""
    for file, row in data.find_entries(folder, "mm-vet.json", id=str, imagename=str, question=str):
        image = find_image(folder / "images", row["imagename"])
        yield to_question(file, row["id"], row["question"], image, ending="")


def submit_mmvet(questions, answers, file):
    """What MM-Vet's judge reads: {id: answer}."""
    texts = {question["id"]: text for question, text in zip(questions, answers)}
    Path(file).write_text(json.dumps(texts, indent=1))


class Bench(NamedTuple):
    folder: str  # its usual name, below the `benchmarks` folder of a run
    split: str  # where none is named
    load: object  # (folder, split) -> questions
    parse: object  # (answer, question) -> choice, or None
    score: object  # (questions, choices) -> {name: number}; None: a server or a judge does
    submit: object = None  # (questions, answers, file): writes what that wants
    tokens: int = 32  # most tokens of an answer


BENCHES = {
    "scienceqa": Bench("ScienceQA", "test", data.load_scienceqa, parse_choice, score_scienceqa),
    "pope": Bench("POPE", "", load_pope, parse_pope, score_pope),
    "mme": Bench("MME_Benchmark_release_version", "", load_mme, parse_mme, score_mme),
    "seed": Bench("SEED-Bench", "image", load_seed, parse_seed, score_accuracy),
    "mmbench": Bench("MMBench", "dev", load_mmbench, parse_mmbench, score_mmbench, submit_mmbench),
    "mmbench-cn": Bench("MMBench-CN", "dev", partial(load_mmbench, chinese=True), parse_mmbench,
                        score_mmbench, submit_mmbench),
    "gqa": Bench("GQA", "testdev_balanced", load_gqa, parse_gqa, score_accuracy),
    "textvqa": Bench("TextVQA", "val", load_textvqa, parse_vqa, score_textvqa),
    "vqav2": Bench("VQAv2", "test-dev2015", load_vqav2, parse_vqa, None, submit_vqav2),
    "mmmu": Bench("MMMU", "validation", load_mmmu, parse_mmmu, score_mmmu, tokens=128),
    "mmvet": Bench("mm-vet", "", load_mmvet, lambda text, question: text, None, submit_mmvet, tokens=1024),
}


# ------------------------------------------------------------------------------------------------------------
# Running a benchmark

def load_questions(name: str, folder, split=None, limit=None) -> list:
    """A benchmark's questions, checked; of `limit` the first so many, with what counts together with them."""
    split = BENCHES[name].split if split is None else split
    with named(folder, f"not in the layout of {name}"):
        questions = list(BENCHES[name].load(Path(folder), split))
    if not questions:
        raise ValueError(f"{folder}: no questions of {name} in split {split!r}")
    seen, is_scored = set(), any(question["answer"] is not None for question in questions)
    for question in questions:
        image, options, answer = question["image"], question.get("options"), question["answer"]
        problems = {
            "is there twice": question["id"] in seen,
            "has no picture": not image and question["prompt"].startswith(data.IMAGE),
            f"asks about a picture that is not there: {image}":
                isinstance(image, Path) and not image.is_file(),
            "has no options": options == [],
            "has no answer": is_scored and answer in (None, "", [], [""]),  # where others have one
            f"has the answer {answer!r}, which is none of {', '.join(options or ())}":
                options and answer is not None and answer not in options}
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(f"{question['file']}: question {question['id']!r} {problem}")
        seen.add(question["id"])
    groups = [question.get("group", question["id"]) for question in questions]
    kept = set(list(dict.fromkeys(groups))[:limit])
    return [question for question, group in zip(questions, groups) if group in kept]


def ask_bench(vlm, tokenizer, template, bench: Bench, questions, file) -> tuple:
    """(answers, what the benchmark's rule reads from them)."""
    tokens = min(bench.tokens, vlm.llm.config.max_position_embeddings // 2)  # a question needs positions, too
    batch = min(64, 4096 // tokens)  # the key-value cache is as long as the longest answer
    answers = ask(vlm, tokenizer, questions, template, tokens, batch, file)
    return answers, [bench.parse(text, question) for text, question in zip(answers, questions)]


def answer_bench(vlm, tokenizer, template, name, folder, split=None, limit=None, file=None) -> tuple:
    """(scores, questions, answers, what the benchmark's rule reads from them) of one benchmark."""
    bench, questions = BENCHES[name], load_questions(name, folder, split, limit)
    answers, choices = ask_bench(vlm, tokenizer, template, bench, questions, file)
    is_scored = any(question["answer"] is not None for question in questions)  # here, not by a server
    scores = bench.score(questions, choices) if is_scored else {"questions": len(questions)}
    return scores, questions, answers, choices


def likeliest(vlm, tokenizer, template, questions, choices, file) -> list:
    """`choices`, but where a question has options, the one whose letter (or Yes, No) is the likeliest."""
    closed = [question for question in questions if question.get("options")]
    asked = [q | {"options": list(map(str.capitalize, q["options"]))} for q in closed]
    chosen = {}
    for question, row in zip(closed, likelihoods(vlm, tokenizer, asked, template, file=file)):
        chosen[question["id"]] = question["options"][row.index(max(row))]
    return [chosen.get(question["id"], choice) for question, choice in zip(questions, choices)]


def without_picture(questions) -> list:
    return [q | {"image": None, "prompt": q["prompt"].removeprefix(f"{data.IMAGE}\n")} for q in questions]


def score_floors(bench: Bench, questions, blind) -> dict:
    """The percentages of a model that sees no picture (`blind`, its choices), and of no model at all: chance
    (the mean of 100 random sheets) and the commonest of the right answers, wherever it is an option."""
    def sheet(choose):
        return [choose(question) if question.get("options") else None for question in questions]

    sheets, floors, rng = {"without_picture": [blind]}, {}, random.Random(0)
    if common := Counter(question["answer"] for question in questions if question.get("options")):
        letter = common.most_common(1)[0][0]
        sheets["chance"] = [sheet(lambda question: rng.choice(question["options"])) for _ in range(100)]
        sheets[f"always {letter}"] = [sheet(lambda question: letter)]
    for name, answers in sheets.items():
        total = Counter()
        for choices in answers:
            scores = bench.score(questions, choices)  # its floats are percentages and their errors
            total.update({key: x for key, x in scores.items() if isinstance(x, float) and key[-3:] != "_se"})
        floors[name] = {key: round(value / len(answers), 2) for key, value in total.items()}
    return floors


def run_bench(name, ckpt, run: tuple, folder, args) -> dict:
    """Score a run; its BENCH.json gets the scores and every prediction, beside it what a server wants."""
    (vlm, tokenizer, config), bench, partial_file = run, BENCHES[name], Path(ckpt) / f"{name}.partial"
    template, split = config["template"], bench.split if args.split is None else args.split
    scores, questions, answers, choices = answer_bench(vlm, tokenizer, template, name, folder, split,
                                                       args.limit, partial_file)
    file, result = Path(ckpt) / f"{name}.json", {"ckpt": str(ckpt), "bench": name, "split": split}
    if rank() == 0:  # before anything that may fail; once more with what stands beside the score
        write_predictions(file, result | scores, questions, answers, choices)
    is_scored = "accuracy" in scores
    if args.score and is_scored and any(question.get("options") for question in questions):
        found = likeliest(vlm, tokenizer, template, questions, choices, f"{partial_file}-likelihood")
        found = bench.score(questions, found)
        scores["likelihood"] = {key: value for key, value in found.items() if isinstance(value, float)}
    if args.floors and is_scored:
        _, blind = ask_bench(vlm, tokenizer, template, bench, without_picture(questions),
                             f"{partial_file}-blind")
        scores["floors"] = score_floors(bench, questions, blind)
    result |= scores
    if rank() == 0:
        write_predictions(file, result, questions, answers, choices)
        told = [f"{key} {scores[key]} (standard error {scores[f'{key}_se']})"
                for key in scores if f"{key}_se" in scores]
        if likely := scores.get("likelihood"):
            told.append(f"by likelihood {likely['accuracy']} (standard error {likely['accuracy_se']})")
        if "unparsed" in scores:
            told.append(f"{scores['unparsed']} answers that the rule cannot read")
        print(f"{name} of {ckpt}: {scores['questions']} questions", *told, sep=", ")
        if bench.submit:
            file = args.submit or Path(ckpt) / f"{name}-submit{'.tsv' if 'mmbench' in name else '.json'}"
            bench.submit(questions, answers, file)
            print(f"wrote {file}")
    return result


def write_predictions(file: Path, result: dict, questions, answers, choices):
    """Complete or not at all. Every answer is kept: a score that surprises is understood by reading them."""
    predictions = []
    for question, text, choice in zip(questions, answers, choices):
        image = "in the table" if isinstance(question["image"], bytes) else question["image"]
        kept = {key: value for key, value in question.items() if key != "row"}
        predictions.append(kept | {"image": image and str(image), "text": text, "choice": choice})
    with whole(file) as building:
        building.write_text(json.dumps({"scores": result, "predictions": predictions}, indent=1))


# ------------------------------------------------------------------------------------------------------------
# The command line

def last_run() -> Path:
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one; or name one with --ckpt")
    if not (folder := data.read_text(pointer).strip()):
        raise ValueError(f"{pointer}: names no run; name one with --ckpt")
    return Path(folder)


def run_benches(ckpt, args, device):
    """Yield the results of --bench: of one, or of all whose folders are there. One that fails does not stop
    the others; a ValueError names it in the end."""
    run = load_run(ckpt, device)
    root, is_all, failed = args.data or run[2].get("benchmarks"), args.bench == "all", []
    if not root:
        raise ValueError(f"{ckpt}: its config.json names no folder of benchmarks; name one with --data")
    folders = {name: Path(root) / BENCHES[name].folder for name in (BENCHES if is_all else [args.bench])}
    if args.data and not is_all:
        folders[args.bench] = Path(args.data)
    there = [name for name in folders if folders[name].is_dir() or not is_all]
    if absent := [f"{name} ({folders[name]})" for name in folders if name not in there]:
        say(f"not there, so not run: {', '.join(absent)}")
    for name in there:
        try:
            yield run_bench(name, ckpt, run, folders[name], args)
        except (OSError, ValueError) as error:
            if not is_all:
                raise
            failed.append(name)
            say(f"{name} failed: {error}")
    for name in set(there) - set(failed):  # no sooner: a killed `all` goes on without asking these again
        for file in Path(ckpt).glob(f"{name}.partial*.jsonl"):
            file.unlink(missing_ok=True)  # another rank may have been faster
    if failed or not there:
        raise ValueError(f"failed: {', '.join(failed)}" if there else f"{root}: no benchmark is there")


def of_last_run() -> tuple:
    """(the last run, its folder of benchmarks), for --help alone."""
    with suppress(OSError, ValueError, AttributeError):  # none, or a damaged one: told when it is used
        return (run := last_run()), read_json(run / "config.json").get("benchmarks")
    return "none", "none"


def parse_args(argv=None):
    what, examples, *more = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description="\n\n".join([what, *more]), epilog=f"examples:\n{examples}",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    run, benchmarks = (str(value).replace("%", "%%") for value in of_last_run())
    parser.add_argument("--ckpt", nargs="+", help=f"run directories [the last: {run}]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bench", choices=[*BENCHES, "all"])
    what.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    what.add_argument("--chat", metavar="IMAGE", help="several turns about one picture: a question a line of "
                                                      "stdin, until an empty one")
    add = parser.add_argument_group("benchmarks").add_argument
    add("--data", help="the benchmark's folder; all: the folder of these [the `benchmarks` of the run's "
                       f"config; of the last: {benchmarks}]")
    splits = ", ".join(f"{name} {bench.split}" for name, bench in BENCHES.items() if bench.split)
    add("--split", help=f"the benchmark's split, category or part of its file's name [{splits}]")
    add("--limit", type=int, help="only the first so many questions [all]")
    add("--score", choices=["likelihood"], help="also by the likeliest option")
    add("--floors", action="store_true", help="also chance, the commonest answer, the model without picture")
    add("--submit", type=Path, help="file for a server or judge [BENCH-submit in the run directory]")
    add = parser.add_argument_group("one picture").add_argument
    add("--max_new_tokens", type=int, default=64, help="most tokens of the answer [%(default)s]")
    add("--temperature", type=float, default=0.0, help="of the answer; 0: greedy [%(default)s]")
    add("--top_p", type=float, default=1.0, help="the likeliest that hold this much [%(default)s]")
    args = parser.parse_args(argv)
    writers = [name for name, bench in BENCHES.items() if bench.submit]
    if args.split and args.bench not in BENCHES:
        parser.error("--split is for one benchmark")
    if (args.limit is not None or args.score or args.floors) and not args.bench:
        parser.error("--limit, --score and --floors are for benchmarks")
    if args.submit and (args.bench not in writers or len(args.ckpt or ".") > 1):
        parser.error(f"--submit is for one run of {', '.join(writers)}")
    if args.submit and not args.submit.parent.is_dir():
        parser.error(f"--submit: no folder {args.submit.parent}")
    if args.limit is not None and args.limit < 1 or args.max_new_tokens < 1:
        parser.error("--limit and --max_new_tokens must be at least 1")
    if args.temperature != 0 and not 0.001 <= args.temperature < math.inf or not 0.001 <= args.top_p <= 1:
        parser.error("--temperature must be 0 or from 0.001 up, --top_p in [0.001, 1]")
    return args


def ask_about_picture(ckpt, args, device) -> list:
    """The result of --ask; --chat has printed its own."""
    image, text = args.ask or (args.chat, None)
    data.load_image(image)  # a bad one is told before a large model is loaded
    if args.chat and world_size() > 1:
        raise ValueError("--chat has one stdin: run it without torchrun")
    vlm, tokenizer, config = load_run(ckpt, device)
    how = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    if args.chat:
        chat(vlm, tokenizer, config["template"], image, **how)
        return []
    answer, = ask(vlm, tokenizer, [about(image, text)], config["template"], **how)
    return [{"ckpt": str(ckpt), "image": image, "question": text, "answer": answer}]


def main(argv=None):
    args = parse_args(argv)
    with command("eval.py"):
        device = start_ranks()
        for ckpt in [resolve_model(run) for run in args.ckpt] if args.ckpt else [last_run()]:
            if args.ask or args.chat:
                results = ask_about_picture(ckpt, args, device)
            else:
                results = run_benches(ckpt, args, device)
            for result in results:
                say(json.dumps(result))


if __name__ == "__main__":
    main()
