"""Where pictures and words lie in the LLM's space: retrieval, the gap between the two, what a prompt makes of
them, and the heat map of a word on a picture.

    python -m lab.spaces retrieval                                      # of the last run
    python -m lab.spaces gap --ckpt runs/tiny/align --data data/toy/captions.json --images data/toy/images
    python -m lab.spaces prompts                                        # which one tells captions apart?
    python -m lab.spaces heatmap picture.png "a red circle" --ckpt runs/a/align runs/b/align --out map.png

All work on any run, tiny or 7B, and need no answer of the LLM. The last line printed is one JSON object.
Alignment raises R@k, positive_cosine and tacs, and lowers centroid_distance. On the toy world do not expect a
thing to light up: its background does (lab/toy.md).
"""

import json
import math
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import data
import eval as evaluation
import losses
from benchmarks.score import percent
from lab import parser_of
from plumbing.files import named, resolve_model, whole
from plumbing.ranks import command
from running.chart import GREY, ZOOM, save, sheet, write
from running.records import read_records


def micro_batches(vlm, tokenizer, records, images, prompts=("", None), batch: int = 64):
    """Yield what data.collate makes of LLaVA records, on the model's device; `prompts`: see
    data.Conversations."""
    c = vlm.vit.config
    samples = data.Conversations(records, images, tokenizer, "plain", c, "crop", prompts)
    for start in tqdm(range(0, len(samples), batch), desc="captions", unit=" batches"):
        end = min(start + batch, len(samples))
        rows = [samples[i] for i in range(start, end)]
        m = data.collate(rows, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                         c.image_size)
        yield data.to_device(m, vlm.llm.head_weight.device)


@torch.no_grad()
def caption_vectors(vlm, tokenizer, records: list, images) -> tuple:
    """(image vectors (n, C), text vectors (n, C), keys (n,), tokens) of records of captions.

    `tokens`: for each of the first hundred pairs, its projected patches (N, C) and the embeddings of its
    caption (T, C). ValueError if all captions are equal.
    """
    image, text, keys, tokens = [], [], [], []
    for m in micro_batches(vlm, tokenizer, records, images):
        patches = vlm.encode(m["pixels"])  # (B, N, C)
        embeds = vlm.llm.embed(m["caption_ids"])  # (B, T, C)
        mask = m["caption_mask"]  # (B, T)
        image.append(losses.pool_patches(patches))
        text.append(losses.pool_caption(embeds, mask))
        keys.append(m["keys"][:, 0])
        if len(tokens) < 100:  # those of all would take gigabytes
            words = [e[is_word] for e, is_word in zip(embeds, mask)]
            tokens += zip(patches, words)
    keys = torch.cat(keys)
    if (keys == keys[0]).all():
        raise ValueError("at least two different captions are needed")
    return torch.cat(image), torch.cat(text), keys, tokens[:100]


def score_retrieval(image, text, keys) -> dict:
    """R@1 and R@5 both ways, in percent. The gallery has each distinct caption once. For a caption, any
    picture that it describes is right."""
    distinct, owner = keys.unique(return_inverse=True)  # owner (n,): the caption of each picture
    captions = torch.arange(len(distinct), device=keys.device)
    first = (owner == captions[:, None]).int().argmax(1)  # (captions,) a row of each
    similarity = image @ text[first].T  # (n, captions)
    nearest = similarity.topk(min(5, len(distinct)), dim=1).indices  # (n, 5)
    scores = recalls("image_to_text", nearest == owner[:, None])
    nearest = similarity.T.topk(min(5, len(image)), dim=1).indices  # (captions, 5)
    scores |= recalls("text_to_image", owner[nearest] == captions[:, None])
    return scores


def recalls(way: str, is_right) -> dict:
    """R@1 and R@5 of is_right (n, 5): whether each of the five most similar ones is right."""
    r1 = is_right[:, 0].tolist()
    r5 = is_right.any(1).tolist()
    return {f"{way}_r1": percent(r1), f"{way}_r5": percent(r5)}


def score_gap(image, text, tokens) -> dict:
    """The distance of the centroids of pictures and captions, the mean cosine of pairs, mean norms of
    projected patches and of word embeddings, and the mean TACS of `tokens`."""
    text = losses.unit(text)
    patches, words = zip(*tokens)
    tacs_of = [tacs(*pair) for pair in tokens]
    scores = {
        "centroid_distance": (image.mean(0) - text.mean(0)).norm(),
        "positive_cosine": (image * text).sum(1).mean(),
        "projected_norm": mean_norm(patches),
        "word_norm": mean_norm(words),
        "tacs": torch.stack(tacs_of).mean(),
    }
    return {name: round(value.item(), 4) for name, value in scores.items()}


def mean_norm(parts):
    """The mean norm of the vectors in `parts`, each (.., C)."""
    vectors = losses.at_least_fp32(torch.cat(parts))
    return vectors.norm(dim=-1).mean()


def tacs(patches, words):
    """The mean of the 10 largest cosines, one for each patch (N, C) with its nearest word (T, C) of the
    caption (SEA, arXiv 2408.11813)."""
    cosine = losses.unit(patches) @ losses.unit(words).T  # (N, T)
    best = cosine.amax(1)  # (N,)
    return best.topk(min(10, len(best))).values.mean()


@torch.no_grad()
def score_prompt(vlm, tokenizer, records: list, images, prompts: tuple) -> dict:
    """How the prompted loss sees captions, and pictures, behind two prompts (after the image, the caption).

    `others`: the mean cosine of a caption's state with those of other captions. `least_loss`: the loss at a
    scale if each picture's state were its caption's: where all captions look alike there is little to win.
    `loss`, `r1`: the run's own. All records are one batch.
    """
    image, text, keys = [], [], []
    for m in micro_batches(vlm, tokenizer, records, images, prompts):
        _, state = losses.caption_pass(vlm, m, vlm.encode(m["pixels"]))
        pair = losses.vectors("prompt", vlm, [m], [], [state])
        for kept, new in zip((image, text, keys), (*pair, m["keys"])):
            kept.append(new)
    image, text, keys = torch.cat(image), torch.cat(text), torch.cat(keys)
    is_other = (keys[:, None] != keys[None]).all(-1)  # (n, n)
    scores = {"others": (text @ text.T)[is_other].mean()}
    for scale in (1 / 0.07, 100):
        scores[f"least_loss_at_{scale:.0f}"], _ = losses.contrastive_loss(text, text, scale, keys)
        scores[f"loss_at_{scale:.0f}"], right = losses.contrastive_loss(image, text, scale, keys)
    scores["r1"] = 100 * right
    return {name: round(value.item(), 3) for name, value in scores.items()}


def measure(what: str, ckpt, file, images, device) -> dict:
    """"retrieval", "gap" or "prompts" of a run directory on a LLaVA JSON of captions. Also writes
    RUN/WHAT.json."""
    vlm, tokenizer, config = evaluation.load_run(ckpt, device)
    benchmarks = Path(config.get("benchmarks") or "")
    file = file or benchmarks / "captions.json"
    records = read_records(file, "align")[:1000]
    images = images or benchmarks / "images"
    with named(file):
        image, text, keys, tokens = caption_vectors(vlm, tokenizer, records, images)
    result = {"ckpt": str(ckpt), "measure": what, "pairs": len(keys)}
    if what == "prompts":
        for name, prompts in data.PROMPTS.items():
            words = tokenizer(" ".join(prompts), add_special_tokens=False).input_ids
            if tokenizer.unk_token_id not in words:  # the tiny LLM does not know every word
                result[name] = score_prompt(vlm, tokenizer, records, images, prompts)
    elif what == "retrieval":
        result["distinct_captions"] = len(keys.unique())
        result |= score_retrieval(image, text, keys)
    else:
        result |= score_gap(image, text, tokens)
    with whole(Path(ckpt) / f"{what}.json") as building:
        building.write_text(json.dumps(result, indent=1))
    return result


# ---- Heat maps ---------------------------------------------------------------------------------------------


@torch.no_grad()
def word_maps(vlm, tokenizer, image, text) -> dict:
    """{token: cosines (side, side) of the projected patches with its input embedding}"""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the text {text!r} has no token")
    if vlm.projector_kind == "resampler":
        raise ValueError("the tokens of a resampler carry no position on the picture")
    device = vlm.llm.head_weight.device
    pixels = data.preprocess(image, vlm.vit.config, "crop").to(device)
    patches = vlm.encode(pixels[None])[0]  # (N, C)
    words = vlm.llm.embed(torch.tensor(ids, device=device))  # (T, C)
    cosine = losses.unit(words) @ losses.unit(patches).T  # (T, N)
    side = math.isqrt(vlm.num_image_tokens)
    maps = cosine.view(len(ids), side, side).cpu()
    names = [tokenizer.decode([i]).strip() for i in ids]
    return dict(zip(names, maps))


def tint(picture, strength):
    """The picture in grey, tinted by `strength` (side, side) from -1 to 1: positive red, negative blue."""
    def as_image(values):
        values = values.to(torch.uint8).numpy()
        small = Image.fromarray(values)
        return small.resize(picture.size, Image.Resampling.NEAREST)

    red = Image.new("RGB", picture.size, "red")
    blue = Image.new("RGB", picture.size, "blue")
    white = Image.new("RGB", picture.size, "white")
    is_red = as_image(255 * (strength > 0))
    color = Image.composite(red, blue, is_red)
    grey = picture.convert("L").convert("RGB")
    grey = Image.blend(grey, white, 0.5)
    opacity = as_image((255 * strength.abs()).round())
    return Image.composite(color, grey, opacity)


CELL, ROW, HEAD, MARGIN = 132, 158, 26, 150  # pixels of a sheet of heat maps
SAID = ("Cosine of each projected patch with the input embedding of the word above.",
        "Red: similar. Blue: opposed. Pale: neither. Below each map: its least and its largest.")


def heat_map(runs, path, text, file, device) -> dict:
    """Write a PNG with a row for each run and a column for each token. The largest cosine sets the scale of
    colours for the whole sheet."""
    picture = data.load_image(path)
    maps = []
    for run in runs:
        vlm, tokenizer, _ = evaluation.load_run(run, device)
        maps.append(word_maps(vlm, tokenizer, picture, text))
    cosines = [cosine for words in maps for cosine in words.values()]
    largest = torch.stack(cosines).abs().max().item()
    # the centre, as the model saw it
    thumbnail = ImageOps.fit(picture, (CELL * ZOOM, CELL * ZOOM), Image.Resampling.NEAREST)
    foot = HEAD + ROW * len(runs)
    image, draw = sheet(MARGIN + max(4, 1 + len(maps[0])) * (CELL + 6), foot + 80)
    for row, (run, words) in enumerate(zip(runs, maps)):
        y = HEAD + row * ROW
        name = "\n".join(Path(run).parts[-2:])
        write(draw, 6, y + CELL / 2, name, 14, "lm")
        image.paste(thumbnail, (MARGIN * ZOOM, y * ZOOM))
        for column, (word, cosine) in enumerate(words.items(), start=1):
            x = MARGIN + column * (CELL + 6)
            image.paste(tint(thumbnail, cosine / largest), (x * ZOOM, y * ZOOM))
            write(draw, x + CELL / 2, HEAD / 2, word)
            least, most = (round(end.item(), 2) + 0.0 for end in (cosine.min(), cosine.max()))  # no -0.00
            write(draw, x + CELL / 2, y + CELL + 10, f"{least:.2f} to {most:.2f}", 11, color=GREY)
    strip = Image.new("RGB", (270 * ZOOM, 12 * ZOOM), "white")
    image.paste(tint(strip, torch.linspace(-1, 1, 27)[None]), (MARGIN * ZOOM, (foot + 6) * ZOOM))
    for part in (-1, -0.5, 0, 0.5, 1):
        write(draw, MARGIN + 135 * (1 + part), foot + 28, f"{part * largest:.2f}", 12)
    for number, sentence in enumerate(SAID):
        write(draw, MARGIN, foot + 48 + 16 * number, sentence, 12, "lm", GREY)
    save(image, file)
    return {"measure": "heatmap", "image": str(path), "text": text, "file": str(file),
            "largest_cosine": round(largest, 4), "runs": [str(run) for run in runs]}


def parse_args(argv=None):
    parser = parser_of("lab.spaces", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    retrieval = commands.add_parser("retrieval", help="R@1 and R@5 of pictures against captions, both ways")
    gap = commands.add_parser("gap", help="distance of the centroids, cosine of pairs, norms, TACS")
    prompts = commands.add_parser("prompts", help="the prompted loss behind each prompt")
    for measured in (retrieval, gap, prompts):
        measured.add_argument("--data", help="LLaVA JSON of captions (default: that of the run's benchmarks)")
        measured.add_argument("--images", help="the folder of its pictures (default: likewise)")
    heatmap = commands.add_parser("heatmap", help="a row for each run, a column for each token")
    heatmap.add_argument("image")
    heatmap.add_argument("text")
    heatmap.add_argument("--out", help="the PNG to write (default: heatmap.png in the first run)")
    for each in (retrieval, gap, prompts, heatmap):
        each.add_argument("--ckpt", nargs="+", help="run directories (default: the last run)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with command("lab.spaces"):
        if args.ckpt:
            runs = [resolve_model(run) for run in args.ckpt]
        else:
            runs = [evaluation.last_run()]
        if args.command == "heatmap":
            file = args.out or runs[0] / "heatmap.png"
            result = heat_map(runs, args.image, args.text, file, device)
            print(json.dumps(result))
            return
        for run in runs:
            result = measure(args.command, run, args.data, args.images, device)
            print(json.dumps(result))


if __name__ == "__main__":
    main()
