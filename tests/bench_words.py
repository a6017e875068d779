"""Where on a toy picture its words are: on the patches of the shape, or beside them. Not a test: it asks trained runs.

    python tests/bench_words.py runs/tiny/align runs/other/align

For every run: cosine of a projected patch with the right word (color, shape, size, place) minus its mean cosine with
the wrong words of that kind, averaged over the patches that the shape touches, over the others, and over 120 pictures.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import eval as evaluation
import losses

PATCH = 8


def shape_patches(picture, scene):
    """(N,) True where the shape covers more than a tenth of a patch: what differs from the corner farthest from it."""
    pixels = torch.from_numpy(np.array(picture)).float()  # (48, 48, 3)
    far = pixels[-1 if scene["place"].startswith("north") else 0, 0 if scene["place"].endswith("east") else -1]
    differs = ((pixels - far).abs().sum(-1) > 60).float()  # (48, 48)
    return F.avg_pool2d(differs[None, None], PATCH).flatten() > 0.1  # (N,)


@torch.no_grad()
def lead_of_right_words(run) -> dict:
    """{"on the shape", "beside it"}: mean lead of the right word over the wrong ones of its kind."""
    vlm, tokenizer, _ = evaluation.load_run(Path(run), torch.device("cpu"))
    rng, leads = random.Random(0), {"on the shape": [], "beside it": []}
    for scene in 3 * data.toy_scenes()["test"]:
        picture = data.toy_picture(scene, rng)
        on_shape = shape_patches(picture, scene)
        c = vlm.vit.config
        pixels = data.preprocess(picture, c.image_size, "crop", *c.looks)
        patches = losses.unit(vlm.encode(pixels[None])[0])  # (N, C)
        for kind, values in data.VALUES.items():
            ids = torch.tensor([tokenizer(value, add_special_tokens=False).input_ids for value in values])  # (words, 1)
            cosine = patches @ losses.unit(vlm.llm.embed(ids[:, 0])).T  # (N, words)
            right = cosine[:, values.index(scene[kind])]  # (N,)
            lead = right - (cosine.sum(1) - right) / (len(values) - 1)  # (N,)
            leads["on the shape"].append(lead[on_shape].mean())
            leads["beside it"].append(lead[~on_shape].mean())
    return {where: round(torch.stack(values).mean().item(), 3) for where, values in leads.items()}


if __name__ == "__main__":
    for run in sys.argv[1:]:
        print(json.dumps({"run": run, **lead_of_right_words(run)}), flush=True)
