"""Everything that is measured of a run on a world, in one dict of numbers.

    score_run(folder, world, "test", device)
    {"accuracy_img": ..., "accuracy_txt": ...,        ScienceQA's layout, answered by letter: % right
     "likely": ...,                                   or by the likeliest choice in words
     "reworded": ...,                                 the same, asked in words never trained on
     "pope": ..., "mme": ...,                         yes or no, if the world has these folders
     "caption": ...,                                  nats per token of held-out captions
     "r1": ..., "r5": ...,                            the right one of the held-out captions is found, in %
     "pointing": ...}                                 the patch likest a thing's name is in its quarter, in %

A world is a folder with ScienceQA/, captions.json, images/ and, if it has them, ScienceQA-reworded/, the
folders of POPE and MME, and collages.json. The dict lacks what the world lacks.
"""

from pathlib import Path

import torch

import data
import eval as evaluation
import losses
from benchmarks.questions import grade
from benchmarks.score import percent
from lab import likelihood, spaces, toy_world
from plumbing.files import read_json
from running.records import read_records


@torch.no_grad()
def score_run(folder, world: Path, split: str, device, by_words: bool = False) -> dict:
    """The numbers above; of a split other than the test's only the accuracies, because tuning needs no
    others. `by_words`: by the likeliest choice, not by letter."""
    vlm, tokenizer, config = evaluation.load_run(folder, device)
    template = config["template"]

    def letters(name: str, below: str, split=None) -> dict:
        scores, *_ = evaluation.answer_bench(vlm, tokenizer, template, name, world / below, split)
        return scores

    def words(below: str) -> float:
        questions = likelihood.load_problems(world / below, split)
        choices = evaluation.ask_likeliest(vlm, tokenizer, questions, template)
        return percent(grade(questions, choices))

    line = {}
    if by_words:
        line["likely"] = words("ScienceQA")
    else:
        found = letters("scienceqa", "ScienceQA", split)
        line["accuracy_img"] = found["accuracy_img"]
        line["accuracy_txt"] = found["accuracy_txt"]
    if split != "test":
        return line
    reworded = "ScienceQA-reworded"
    if by_words:
        line["reworded"] = words(reworded)
    else:
        line["reworded"] = letters("scienceqa", reworded, split)["accuracy_img"]
    if (world / toy_world.POPE).is_dir():
        line["pope"] = letters("pope", toy_world.POPE)["accuracy"]
    if (world / toy_world.MME).is_dir():
        line["mme"] = letters("mme", toy_world.MME)["accuracy_plus"]
    line |= captions(vlm, tokenizer, config, world)
    if (world / "collages.json").exists():
        line["pointing"] = pointing(vlm, tokenizer, world)
    return line


def captions(vlm, tokenizer, config: dict, world: Path) -> dict:
    """{"caption", "r1", "r5"} on captions.json: the captioning loss in nats per token, and retrieval of the
    caption of each picture, in percent."""
    file, images = world / "captions.json", world / "images"
    image, text, keys, _ = spaces.caption_vectors(vlm, tokenizer, config, file, images)
    found = spaces.score_retrieval(image, text, keys)
    loss = tokens = 0
    for m in spaces.micro_batches(vlm, tokenizer, read_records(file), images):
        loss += losses.caption_pass(vlm, m, vlm.encode(m["pixels"]))[0].item()
        tokens += len(m["loss_at"])
    r1, r5 = found["image_to_text_r1"], found["image_to_text_r5"]
    return {"caption": round(loss / tokens, 4), "r1": r1, "r5": r5}


# ---- The pointing game (Zhang et al. 2018, IJCV, "Top-down neural attention by excitation backprop") -------


def pointing(vlm, tokenizer, world: Path) -> float:
    """Percent of the things on collages of 2 x 2 whose name's likest patch lies in their quarter; chance is
    25. The likeness of a patch and a name is that of the patch loss: the mean cosine of its tokens."""
    device = vlm.llm.head_weight.device
    right = []
    for record in read_json(world / "collages.json"):
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
