"""Where pictures and words lie in the LLM's space: which captions pictures find, the gap between the two, and
the heat map of a word on a picture.

    python -m lab.spaces retrieval                                      # of the last run
    python -m lab.spaces gap --ckpt runs/tiny/align --data data/toy/captions.json --images data/toy/images
    python -m lab.spaces heatmap picture.png "a red circle" --ckpt runs/a/align runs/b/align --out map.png

All work on any run, tiny or 7B, and need no answer of the LLM. The last line printed is one JSON object. What
alignment does to its numbers: R@k, positive_cosine, nearest_word_cosine and tacs rise, centroid_distance,
alignment and nearest_word_distance fall; the two uniformities say how evenly each kind fills the sphere
(lower: more evenly). On the toy world do not expect a thing to light up: its background does (lab/README.md).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import eval as evaluation
import losses
from benchmarks.score import percent
from plumbing.files import resolve_model, whole


@torch.no_grad()
def caption_vectors(vlm, tokenizer, config, file, images, limit: int = 1000, batch: int = 64) -> tuple:
    """(image vectors (n, C), text vectors (n, C), keys (n,), batches) of the first `limit` records of a LLaVA
    JSON of captions, by default that of the run's benchmarks. `batches`: of a hundred pairs or a few more,
    the projected patches (B, N, C), caption embeddings (B, T, C) and mask (B, T) that the vectors are made
    of. ValueError if all captions are one."""
    benchmarks, c = Path(config.get("benchmarks") or ""), vlm.vit.config
    file, images = file or benchmarks / "captions.json", images or benchmarks / "images"
    records = data.load_records(file, "align")[:limit]
    samples = data.Conversations(records, images, tokenizer, "plain", c, "crop")
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
    """Retrieval of a run directory on a LLaVA JSON of captions."""
    vlm, tokenizer, config = evaluation.load_run(ckpt, device)
    image, text, keys, _ = caption_vectors(vlm, tokenizer, config, file, images)
    return {"ckpt": str(ckpt), "measure": "retrieval", "pairs": len(keys),
            "distinct_captions": len(keys.unique()), **score_retrieval(image, text, keys)}


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


def run_gap(ckpt, file, images, device) -> dict:
    """The gap of a run directory on a LLaVA JSON of captions."""
    vlm, tokenizer, config = evaluation.load_run(ckpt, device)
    image, text, keys, batches = caption_vectors(vlm, tokenizer, config, file, images)
    scores = score_gap(image, text, keys) | score_tokens(vlm, batches)
    result = {"ckpt": str(ckpt), "measure": "gap", "pairs": len(keys), **scores}
    return result


@torch.no_grad()
def word_maps(vlm, tokenizer, image, text) -> dict:
    """For each token, as text: cosines of the projected patches with its input embedding (side, side)."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the text {text!r} has no token")
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
        vlm, tokenizer, _ = evaluation.load_run(run, device)
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
    return {"measure": "heatmap", "image": str(path), "text": text, "file": str(file),
            "largest_cosine": round(largest, 4), "runs": results}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m lab.spaces", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    retrieval = commands.add_parser("retrieval", help="R@1 and R@5 of pictures against captions, both ways")
    gap = commands.add_parser("gap", help="distances, cosines, alignment, uniformity, nearest words, TACS")
    for command in (retrieval, gap):
        command.add_argument("--data", help="LLaVA JSON of captions (default: that of the run's benchmarks)")
        command.add_argument("--images", help="the folder of its pictures (default: likewise)")
    heatmap = commands.add_parser("heatmap", help="a row for each run, a column for each token")
    heatmap.add_argument("image")
    heatmap.add_argument("text")
    heatmap.add_argument("--out", help="the PNG to write (default: heatmap.png in the first run)")
    for command in (retrieval, gap, heatmap):
        command.add_argument("--ckpt", nargs="+", help="run directories (default: the last run)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        runs = [resolve_model(run) for run in args.ckpt] if args.ckpt else [evaluation.last_run()]
        if args.command == "heatmap":
            file = args.out or runs[0] / "heatmap.png"
            print(json.dumps(heat_map(runs, args.image, args.text, file, device)))
            return
        measure = {"retrieval": run_retrieval, "gap": run_gap}[args.command]
        for ckpt in runs:
            result = measure(ckpt, args.data, args.images, device)
            with whole(Path(ckpt) / f"{args.command}.json") as building:
                building.write_text(json.dumps(result, indent=1))
            print(json.dumps(result))
    except (OSError, ValueError) as error:
        sys.exit(f"lab.spaces: {error}")


if __name__ == "__main__":
    main()
