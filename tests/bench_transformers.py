"""Ours against transformers' LLaVA, with the same random weights on the same machine: training steps,
generation, loading, preprocessing. What both compute is compared first, then they take turns.

    python tests/bench_transformers.py [--size 100m] [--pairs 7] [--device cpu] [--tasks align,instruct,...]

Prints a Markdown table of the ratios ours / theirs (median, smallest and largest of the pairs), and the same
as one line of JSON. "mixed" are rows of lengths like those of mix665k: theirs in micro-batches as they come,
ours spread by length, with the same gradient. Not a test: machines vary.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import data
import train
from llm import LLMConfig
from plumbing.ranks import start_ranks
from projector import VLM
from running import costs, order
from running.options import Config, configure
from vit import ViTConfig

PRESETS = "small", "speedrun", "7b", "13b"
SIZES = {preset: costs.shapes_of(configure("align", {"preset": preset})) for preset in PRESETS} | {
    "100m": (ViTConfig(224, 16, 384, 1536, 6, 6), LLMConfig(32000, 640, 1728, 12, 10, 10, 64)),
    "tiny": (ViTConfig(32, 8, 64, 128, 4, 4), LLMConfig(512, 128, 352, 4, 4, 4, 32))}
TOKENIZER = str(Path(__file__).parent.parent / "lab/towers/tiny-llm")  # its words mean nothing here


def both(size: str, dtype, device) -> tuple:
    """(a folder in transformers' format, our model, theirs), of random weights."""
    from transformers import LlavaForConditionalGeneration
    config = configure("align", {"preset": "tiny", "seed": 0})
    ours = bench_step.random_model(config, SIZES[size], torch.device("cpu"), dtype)
    ours.sources = {"vit": TOKENIZER, "llm": TOKENIZER}
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    ours.export(folder)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    return folder, VLM.from_pretrained(folder, dtype, device), theirs


def samples_of(vlm, lengths, stage: str) -> list:
    """A sample with an image for each number of tokens of text: all of it is said."""
    rng, size = torch.Generator().manual_seed(0), vlm.vit.config.image_size
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(200, vlm.llm.config.vocab_size, (length,), generator=rng).tolist()
        samples.append({"ids": [1, data.IMAGE_MARKER, *ids],
                        "roles": [data.CONTEXT] * 2 + [data.ANSWER] * length,
                        "pixels": torch.randn(3, size, size, generator=rng), "name": f"{stage} {number}"})
    return samples


def collate(vlm, samples) -> dict:
    return data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, 0, vlm.vit.config.image_size)


def our_step(vlm, samples, lengths, stage: str, micro: int, budget: int, device):
    """A function that takes a step and returns its loss."""
    config = Config(stage=stage, batch=len(samples), micro_batch=micro, micro_tokens=budget)
    train.choose_learning(config, vlm)
    optimizer, terms = train.build_optimizer(config, vlm, device)
    rows = [length + 1 + vlm.num_image_tokens for length in lengths]
    parts, = order.spread(list(range(len(samples))), rows, micro, budget, 1)
    batches = [collate(vlm, [samples[i] for i in part]) for part in parts]
    return lambda: train.train_step(vlm, terms, optimizer, batches, config, 1e-4)["generative"]


def their_step(model, vlm, samples, stage: str, micro: int, device):
    model.requires_grad_(False)
    parts = [model.model.multi_modal_projector] + ([model.model.language_model, model.lm_head]
                                                   if stage == "instruct" else [])
    for part in parts:
        part.requires_grad_(True)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.0, fused=True)
    batches = [collate(vlm, samples[i : i + micro]) for i in range(0, len(samples), micro)]
    counts = [int((m["labels"][:, 1:] != data.IGNORE).sum()) for m in batches]

    def step():
        total = 0.0
        for m, count in zip(batches, counts):
            m = data.to_device(m, device)
            out = model(input_ids=m["ids"], pixel_values=m["pixels"].to(model.dtype),
                        attention_mask=m["mask"].long(), labels=m["labels"])
            loss = out.loss * count / sum(counts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def seconds(function, device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(ours, theirs, pairs: int, device) -> tuple:
    """([ratio of each pair], median seconds of ours, of theirs); both ran once before."""
    times = []
    for number in range(pairs):
        turn = [ours, theirs] if number % 2 else [theirs, ours]
        taken = {f: seconds(f, device) for f in turn}
        times.append((taken[ours], taken[theirs]))
    return [a / b for a, b in times], *(statistics.median(column) for column in zip(*times))


def training(task: str, args, device, dtype) -> tuple:
    stage, is_mixed = task.split("-")[0], task.endswith("mixed")
    _, vlm, model = both(args.size, dtype, device)
    rng, text = np.random.default_rng(0), 20 if stage == "align" else 250
    room = vlm.llm.config.max_position_embeddings - vlm.num_image_tokens - 1
    lengths = rng.lognormal(np.log(150), 0.9, args.batch).clip(5, min(1400, room)).astype(int).tolist()
    lengths = lengths if is_mixed else [min(text, room)] * args.batch
    samples, micro = samples_of(vlm, lengths, stage), args.batch if not is_mixed else max(1, args.batch // 4)
    longest = max(lengths) + 1 + vlm.num_image_tokens
    ours = our_step(vlm, samples, lengths, stage, micro if not is_mixed else args.batch,
                    2 * longest if is_mixed else 0, device)
    theirs = their_step(model, vlm, samples, stage, micro, device)
    a, b = ours(), theirs()
    assert abs(a - b) < (1e-4 if dtype == torch.float32 else 2e-2) * abs(b), (a, b)  # equal losses at first
    return ratios(ours, theirs, args.pairs, device)


def generation(task: str, args, device, dtype) -> tuple:
    """Greedy, 32 tokens: of the prompt alone (prefill), or of those behind the first (decode)."""
    _, vlm, model = both(args.size, dtype, device)
    rows = args.batch if task.endswith("batch") else 1
    m = data.to_device(collate(vlm, samples_of(vlm, [30] * rows, task)), device)
    vlm.llm.config.eos_token_id = -5  # nobody ends early
    inputs = {"input_ids": m["ids"], "pixel_values": m["pixels"].to(dtype),
              "attention_mask": m["mask"].long()}

    def ours(new):
        return vlm.generate(m["ids"], m["pixels"], new, m["mask"])

    def theirs(new):
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                              pad_token_id=0, eos_token_id=None)[:, -new:]

    with torch.no_grad():
        assert torch.equal(ours(32), theirs(32)) or dtype != torch.float32
        if task.startswith("prefill"):
            return ratios(partial(ours, 1), partial(theirs, 1), args.pairs, device)
        times = [[seconds(partial(f, new), device) for f in (ours, theirs) for new in (1, 32)]
                 for _ in range(args.pairs)]
    decode = [(b - a, d - c) for a, b, c, d in times]
    return [a / b for a, b in decode], *(statistics.median(column) / 31 for column in zip(*decode))


def loading(task: str, args, device, dtype) -> tuple:
    from transformers import LlavaForConditionalGeneration
    folder, _, _ = both(args.size, dtype, device)
    return ratios(lambda: VLM.from_pretrained(folder, dtype, device),
                  lambda: LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device),
                  args.pairs, device)


def preprocessing(task: str, args, device, dtype) -> tuple:
    from transformers import CLIPImageProcessor
    tower, rng = SIZES[args.size][0], np.random.default_rng(0)
    size, picture = tower.image_size, Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    theirs = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                                image_mean=tower.image_mean, image_std=tower.image_std)
    a, b = data.preprocess(picture, tower, "crop"), theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert (a - b).abs().max() < 0.05
    return ratios(lambda: data.preprocess(picture, tower, "crop"),
                  lambda: theirs(picture, return_tensors="pt"), args.pairs, device)


TASKS = {"align": training, "instruct": training, "instruct-mixed": training,
         "prefill-one": generation, "decode-one": generation, "prefill-batch": generation,
         "decode-batch": generation, "loading": loading, "preprocessing": preprocessing}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, report = torch.device(args.device), {}
    start_ranks()  # theirs, too, has our way with the C library's memory
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    name = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    print(f"{args.size}, batch {args.batch}, {dtype}, {name}\n\n"
          "| task | ours / transformers | ours, ms | theirs, ms |\n|---|---|---|---|", flush=True)
    for task in args.tasks.split(","):
        found, ours, theirs = TASKS[task](task, args, device, dtype)
        middle = statistics.median(found)
        report[task] = {"median": round(middle, 3), "ratios": [round(x, 3) for x in sorted(found)]}
        print(f"| {task} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {1000 * ours:.1f} | "
              f"{1000 * theirs:.1f} |", flush=True)
    print(json.dumps({"size": args.size, "batch": args.batch, "device": name, "results": report}))


if __name__ == "__main__":
    main()
