"""Everything that is measured of a run on a world, in one dict of numbers.

    score_run(folder, world, "test", device)
    {"accuracy_img": ..., "accuracy_txt": ...,        ScienceQA's layout, answered by letter: % right
     "likely": ..., "likely_name": ..., ...           or by the likeliest choice in words; by what is asked
     "reworded": ...,                                 the same, asked in words never trained on
     "pope": ..., "mme": ...,                         yes or no, if the world has these folders
     "caption": ...,                                  nats per token of held-out captions
     "r1": ..., "r5": ...,                            the right one of the held-out captions is found, in %
     "r5_name": ...,                                  the right one of their names alone
     "right": ..., "wrong": ...,                      cosine of a picture and its caption, and the others
     "pointing": ...}                                 the patch likest a thing's name is in its quarter, in %

A world is a folder with ScienceQA/, captions.json, images/ and, if it has them, ScienceQA-reworded/, the
folders of POPE and MME, concepts.json and collages.json. The dict lacks what the world lacks. Questions about
one thing (a group, a scene) are no independent ones, so "accuracy_img_each" and so on have what is right of
each thing, in %: lab/report.py makes intervals of it.
"""

from pathlib import Path

import torch

import data
import eval as evaluation
import losses
from benchmarks import BENCHES, load_questions, scienceqa
from benchmarks.questions import closed, grade
from benchmarks.score import percent
from lab import spaces, toy_world
from plumbing.files import read_json
from running.records import read_records

SEEN = {}  # {(vision tower, picture): features} of this process: the tower is frozen, one look is enough


@torch.no_grad()
def score_run(folder, world: Path, split: str, device, by_words: bool = False, brief: bool = False) -> dict:
    """The numbers above; of a split other than the test's only the accuracies, because tuning needs no
    others. `by_words`: by the likeliest choice, not by letter. `brief`: no other questions than those of
    ScienceQA's layout."""
    vlm, tokenizer, config = open_run(folder, device)
    template = config["template"]

    def letters(name: str, below: str, split=None) -> tuple:
        bench = BENCHES[name]
        questions = load_questions(name, world / below, split)
        _, choices = evaluation.ask_bench(vlm, tokenizer, template, bench, questions, None)
        return bench.score(questions, choices), questions, grade(questions, choices)

    def by_letter(below: str, key: str) -> dict:
        found, questions, right = letters("scienceqa", below, split)
        pictured = [(question, is_right) for question, is_right in zip(questions, right) if question["image"]]
        scores = {key: found["accuracy_img"]} | of_each_thing(world / below, *zip(*pictured), key)
        return scores if key == "reworded" else scores | {"accuracy_txt": found["accuracy_txt"]}

    def by_likelihood(below: str, key: str) -> dict:
        questions = load_problems(world / below, split)
        right = grade(questions, evaluation.ask_likeliest(vlm, tokenizer, questions, template))
        scores = {key: percent(right)}
        for kind in dict.fromkeys(question["category"] for question in questions):
            of_kind = [(question, is_right) for question, is_right in zip(questions, right)
                       if question["category"] == kind]
            asked, answered = zip(*of_kind)
            scores[f"{key}_{kind}"] = percent(answered)
            scores |= of_each_thing(world / below, asked, answered, f"{key}_{kind}")
        return scores

    main, ask = ("likely", by_likelihood) if by_words else ("accuracy_img", by_letter)
    line = ask("ScienceQA", main)
    if split != "test":
        return line
    line |= captions(vlm, tokenizer, world)
    if (world / "collages.json").exists():
        line["pointing"] = pointing(vlm, tokenizer, world)
    if brief:
        return line
    if (world / "ScienceQA-reworded").is_dir():
        line |= ask("ScienceQA-reworded", "reworded")
    if (world / toy_world.POPE).is_dir():
        line["pope"] = letters("pope", toy_world.POPE)[0]["accuracy"]
    if (world / toy_world.MME).is_dir():
        line["mme"] = letters("mme", toy_world.MME)[0]["accuracy_plus"]
    return line


def open_run(folder, device) -> tuple:
    """eval.load_run, with a vision tower that looks at each picture once in the life of this process."""
    vlm, tokenizer, config = evaluation.load_run(folder, device)
    look = vlm.vit.forward
    tower = vlm.sources["vit"], vlm.vit.feature_layer

    def remembered(pixels):
        keys = [(*tower, str(picture.dtype), hash(picture.cpu().numpy().tobytes())) for picture in pixels]
        new = [i for i, key in enumerate(keys) if key not in SEEN]
        if new:
            SEEN.update(zip([keys[i] for i in new], look(pixels[new])))
        return torch.stack([SEEN[key] for key in keys])

    vlm.vit.forward = remembered
    return vlm, tokenizer, config


def load_problems(folder: Path, split: str) -> list:
    """The questions of `scienceqa.load`, but open, with their choices in words; also their "category"."""
    problems = read_json(folder / "problems.json")
    questions = closed(scienceqa.load(folder, split), "words")
    for question in questions:
        question["category"] = problems[question["id"]].get("category", "")
    return questions


def of_each_thing(folder: Path, questions, right, key: str) -> dict:
    """{key + "_each": what is right of each thing, in percent, in the things' order}. One with more questions
    than others lies further from the mean. So the things' mean is that of all questions, and their spread
    tells its error (a ratio estimator, linearised: Cochran 1977, Sampling Techniques, chapter 6)."""
    problems = read_json(folder / "problems.json")
    file = folder.parent / "concepts.json"
    splits = read_json(file) if file.exists() else {}
    group_of = {concept["name"]: concept["group"] for concepts in splits.values() for concept in concepts}
    mean = sum(right) / len(right)
    gains = {}
    for question, is_right in zip(questions, right):
        problem = problems[question["id"]]
        thing = group_of.get(problem.get("concept")) or problem.get("scene") or question["id"]
        gains[thing] = gains.get(thing, 0.0) + is_right - mean
    typical = len(right) / len(gains)  # questions about a thing
    return {f"{key}_each": [round(100 * (mean + gains[thing] / typical), 2) for thing in sorted(gains)]}


def captions(vlm, tokenizer, world: Path) -> dict:
    """{"caption", "r1", "r5", "r5_name", "right", "wrong"} on captions.json: the captioning loss in nats per
    token, and how well a picture and its caption find each other."""
    records, images = read_records(world / "captions.json", "align"), world / "images"
    loss = tokens = 0
    for m in spaces.micro_batches(vlm, tokenizer, records, images):
        loss += losses.caption_pass(vlm, m, vlm.encode(m["pixels"]))[0].item()
        tokens += len(m["loss_at"])
    image, text, keys, _ = spaces.caption_vectors(vlm, tokenizer, records, images)
    found = spaces.score_retrieval(image, text, keys)
    scores = {"caption": round(loss / tokens, 4), "r1": found["image_to_text_r1"],
              "r5": found["image_to_text_r5"]} | cosines_of_pairs(image, text, keys)
    if (world / "concepts.json").exists():  # captions are "name, group"
        names = [named_alone(record) for record in records]
        found = spaces.score_retrieval(*spaces.caption_vectors(vlm, tokenizer, names, images)[:3])
        scores["r5_name"] = found["image_to_text_r5"]
    return scores


@torch.no_grad()
def cosines(folder, world: Path, device) -> dict:
    """{"right", "wrong"} of a run, and no more."""
    vlm, tokenizer, _ = open_run(folder, device)
    records = read_records(world / "captions.json", "align")
    return cosines_of_pairs(*spaces.caption_vectors(vlm, tokenizer, records, world / "images")[:3])


def cosines_of_pairs(image, text, keys) -> dict:
    """The mean cosine of pictures with the words of their own caption, and with those of all others."""
    similarity = image @ text.T  # (n, n): cosines, averaged over the tokens of a caption
    is_own = keys[:, None] == keys  # (n, n)
    return {"right": round(similarity.diag().mean().item(), 4),
            "wrong": round(similarity[~is_own].mean().item(), 4)}


def named_alone(record: dict) -> dict:
    """The record of a caption "name, group" with the name as its caption."""
    asked, said = record["conversations"]
    name, _, _ = said["value"].rpartition(", ")
    return record | {"conversations": [asked, said | {"value": name}]}


# ---- The pointing game (Zhang et al. 2018, IJCV, "Top-down neural attention by excitation backprop") -------


def pointing(vlm, tokenizer, world: Path) -> float:
    """Percent of the things on collages of unseen concepts, 2 x 2, whose name's likest patch lies in their
    quarter; chance is 25. The likeness of a patch and a name is that of the patch loss: the mean cosine of
    the name's tokens."""
    device = vlm.llm.head_weight.device
    right = []
    for record in read_json(world / "collages.json"):
        if record["concepts"] != "unseen":
            continue
        image = data.load_image(world / "images" / record["image"])
        pixels = data.preprocess(image, vlm.vit.config, "crop")[None].to(device)
        patches = vlm.encode(pixels)[0]  # (N, C)
        for name, quarter in record["places"].items():
            where = word_map(vlm, tokenizer, patches, name)  # (side, side)
            right.append(quarter_of_peak(where) == quarter)
    return percent(right)


def word_map(vlm, tokenizer, patches, name: str):
    """(side, side) the mean cosine of each projected patch (N, C) with the tokens of the name."""
    ids = torch.tensor(tokenizer(f" {name}", add_special_tokens=False).input_ids, device=patches.device)
    text = losses.unit(vlm.llm.embed(ids)).mean(0)  # (C,)
    side = round(len(patches) ** 0.5)
    return (losses.unit(patches) @ text).view(side, side)


def quarter_of_peak(where) -> int:
    """The quarter of the largest value of a (side, side) map: 0 1 in the upper row, 2 3 in the lower."""
    side = len(where)
    row, column = divmod(int(where.argmax()), side)
    return 2 * (row >= side / 2) + (column >= side / 2)
