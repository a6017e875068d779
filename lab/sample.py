"""Draws one toy picture and what the align stage makes of it: its tokens, its labels, what carries loss.

    python -m lab.sample       # writes lab/sample.png
"""

import random

from PIL.Image import Resampling

import data
from lab import toy_world
from plumbing.files import ROOT
from plumbing.tokenizer import load_tokenizer
from running.chart import GREY, ZOOM, box, line, save, sheet, write
from vit import load_vit_config

SAID = """vit.py: pixels (B, 3, {0}, {0}) become features (B, P, D) of P = {1} patches, each {2} x {2} pixels.
projector.py: these become N image tokens of the LLM's width C, in reading order.
data.py: <s> begins the text (BOS), a newline ends the caption.
Coloured: the {3} tokens that carry loss, each predicted from all to its left.
Generative loss: the mean of -log p of these, over the whole step.
Patch loss: the mean of the N image tokens against the T tokens' input embeddings."""
SCENE = {"color": "yellow", "shape": "cross", "size": "large", "place": "northeast"}
LEFT, TOP, HEIGHT, PATCH, CELL = 104, 232, 34, 15, 24  # pixels: the sequence, an image token, a large patch


def example() -> tuple:
    """(picture, ViT's config, tokenizer, row): the ids and labels of one record, as training has them."""
    rng = random.Random(0)
    record = {"id": "toy", "image": "toy.png", "conversations": toy_world.caption_turns(SCENE, rng)}
    tower = load_vit_config(ROOT / "lab/towers/tiny-vit")
    tokenizer = load_tokenizer(ROOT / "lab/towers/tiny-llm")
    samples = data.Conversations([record], "", tokenizer, "plain", tower, "crop")
    row = data.expand(samples.read(0, with_pixels=False), tower.num_patches, 2048)
    return toy_world.picture(SCENE, rng), tower, tokenizer, row


def draw(file):
    """Write the PNG."""
    picture, tower, tokenizer, row = example()
    ids, labels = row["ids"], row["labels"]
    image, pen = sheet(1080, 380)
    size = tower.patch_size
    side = tower.image_size // size  # in patches
    right_edge = LEFT + side * CELL  # of the picture
    begin = ids.index(data.IMAGE_MARKER)
    edges = [LEFT]  # of the tokens
    for number, (token, label) in enumerate(zip(ids, labels)):
        x = edges[-1]
        if token == data.IMAGE_MARKER:
            down, right = divmod(number - begin, side)
            patch = picture.crop((right * size, down * size, (right + 1) * size, (down + 1) * size))
            paste(image, patch, x, TOP + 10, PATCH - 1)
            paste(image, patch, LEFT + right * CELL, 20 + down * CELL, CELL - 1)
            edges.append(x + PATCH)
            continue
        text = tokenizer.decode([token]).replace("\n", "\\n")
        edges.append(x + 18 + 7 * len(text))
        middle = (x + edges[-1]) / 2
        box(pen, x, TOP, edges[-1], TOP + HEIGHT, "#e8e8e8" if label == data.IGNORE else "#f6c6a4")
        write(pen, middle, TOP + HEIGHT / 2, text, 13)
        write(pen, middle, TOP + HEIGHT + 14, str(label), 12, color=GREY)
    words = begin + tower.num_patches
    T = len(row["caption_ids"])
    foot = 22 + side * CELL
    line(pen, [(LEFT, foot), (edges[begin], TOP + 6)], GREY)
    line(pen, [(right_edge, foot), (edges[words], TOP + 6)], GREY)
    write(pen, (edges[begin] + edges[words]) / 2, TOP + HEIGHT + 14, f"{data.IGNORE} each", 12, color=GREY)
    write(pen, LEFT - 8, TOP + HEIGHT / 2, "ids (B, S)", 13, "rm")
    write(pen, LEFT - 8, TOP + HEIGHT + 14, "labels (B, S)", 13, "rm")
    bracket(pen, edges[begin], edges[words], 300, f"N = {tower.num_patches} image tokens (B, N, C)")
    bracket(pen, edges[words], edges[words + T], 300, f"T = {T} tokens of the caption: caption_ids (B, T)")
    bracket(pen, LEFT, edges[-1], 336, f"S = {len(ids)}; the rows of a batch are padded to its longest")
    learned = len(ids) - labels.count(data.IGNORE)
    said = SAID.format(tower.image_size, tower.num_patches, size, learned)
    for number, text in enumerate(said.splitlines()):
        write(pen, right_edge + 30, 32 + 24 * number, text, 14, "lm")
    save(image, file)


def paste(image, patch, x: int, y: int, width: int):
    image.paste(patch.resize((width * ZOOM, width * ZOOM), Resampling.NEAREST), (x * ZOOM, y * ZOOM))


def bracket(pen, left: float, right: float, y: float, text: str):
    line(pen, [(left + 2, y - 5), (left + 2, y), (right - 2, y), (right - 2, y - 5)], GREY)
    write(pen, (left + right) / 2, y + 13, text, 13)


if __name__ == "__main__":
    draw(ROOT / "lab/sample.png")
