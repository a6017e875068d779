"""Where on a toy picture its words are: on the patches of the shape, or beside them.

    python -m lab.words runs/tiny/align runs/other/align

Prints one line of JSON for each run. A patch's lead is its cosine with the right word (color, shape, size,
place) minus its mean cosine with the wrong words of that kind. It is averaged over the patches that the shape
touches, over the others, and over 120 pictures.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import losses
from lab import parser_of, toy_world
from plumbing.ranks import command


def shape_patches(picture, scene: dict, patch_size: int):
    """(P,) True for a patch of which the shape covers more than a tenth."""
    pixels = torch.from_numpy(np.array(picture)).float()  # (48, 48, 3)
    row = -1 if scene["place"].startswith("north") else 0
    column = 0 if scene["place"].endswith("east") else -1
    ground = pixels[row, column]  # (3,) the corner farthest from the shape has the ground's colour
    differs = ((pixels - ground).abs().sum(-1) > 60).float()  # (48, 48)
    return F.avg_pool2d(differs[None, None], patch_size).flatten() > 0.1  # (P,)


def word_leads(vlm, tokenizer, picture, scene: dict):
    """(4, N) how far the right word leads the others, in cosine, for each kind of attribute and patch."""
    pixels = data.preprocess(picture, vlm.vit.config, "crop")
    patches = losses.unit(vlm.encode(pixels[None])[0])  # (N, C)
    leads = []
    for kind, values in toy_world.VALUES.items():
        ids = tokenizer(list(values), add_special_tokens=False).input_ids  # a word is one token
        cosine = patches @ losses.unit(vlm.llm.embed(torch.tensor(ids)[:, 0])).T  # (N, words)
        right = cosine[:, values.index(scene[kind])]  # (N,)
        wrong = (cosine.sum(1) - right) / (len(values) - 1)  # (N,)
        leads.append(right - wrong)
    return torch.stack(leads)


@torch.no_grad()
def lead_of_right_words(run) -> dict:
    """{"on the shape", "beside it"}: the mean lead of the right word over the wrong ones of its kind.

    ValueError for a projector with fewer tokens than patches: its tokens have no place on the picture.
    """
    vlm, tokenizer, _ = evaluation.load_run(Path(run), torch.device("cpu"))
    if vlm.num_image_tokens != vlm.vit.config.num_patches:
        raise ValueError(f"{run}: its image tokens are not its patches, so nothing can be said about places")
    rng = random.Random(0)
    on, beside = [], []
    for scene in 3 * toy_world.scenes()["test"]:
        picture = toy_world.picture(scene, rng)
        is_shape = shape_patches(picture, scene, vlm.vit.config.patch_size)
        leads = word_leads(vlm, tokenizer, picture, scene)  # (4, N)
        on.append(leads[:, is_shape].mean())
        beside.append(leads[:, ~is_shape].mean())
    means = {"on the shape": torch.stack(on).mean(), "beside it": torch.stack(beside).mean()}
    return {where: round(mean.item(), 3) for where, mean in means.items()}


def main():
    parser = parser_of("lab.words", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of an align or instruct run")
    with command("lab.words"):
        for run in parser.parse_args().runs:
            print(json.dumps({"run": run} | lead_of_right_words(run)), flush=True)


if __name__ == "__main__":
    main()
