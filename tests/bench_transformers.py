"""Ours against transformers' LLaVA, with the same random weights on the same machine: training steps,
generation, loading, preprocessing. What both compute is compared first, then they take turns.

    python tests/bench_transformers.py [--size 100m] [--pairs 7] [--device cpu] [--tasks align,instruct,...]

Prints a Markdown table of ratios (median, smallest and largest of the pairs), and the same as one line of
JSON: ours / theirs, and ours / limit, the matrix products and attention of ours with nothing in between.
"mixed" are rows of lengths like those of mix665k: theirs in micro-batches as they come, ours spread by
length, with the same gradient. Not a test: machines vary.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import data
import train
from llm import LLMConfig
from plumbing import clip, llama, llava
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
PRODUCTS = re.compile("(add|b|badd)?mm|convolution|_scaled_dot_product")  # PyTorch's names, of backward, too


def theirs_of(vlm):
    """transformers' LLaVA with the weights of ours, from memory: a file of 7B would take minutes."""
    vlm.image_token_id = 2  # transformers wants a row of the table for it
    family, head = vlm.vit.config.family, vlm.llm.head_weight
    config = transformers.LlavaConfig(
        vision_config=clip.config_json(vlm.vit.config), text_config=llama.config_json(vlm.llm.config, ""),
        vision_feature_select_strategy="default" if family.class_token else "full",
        image_token_index=vlm.image_token_id)
    weights = {llava.their_name(name): p.detach() for name, p in vlm.named_parameters()}
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=head.dtype).to(head.device)


def samples_of(vlm, lengths, stage: str) -> list:
    """A sample with an image for each number of tokens of text: all of it is said."""
    rng, size = torch.Generator().manual_seed(0), vlm.vit.config.image_size
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vlm.llm.config.vocab_size, (length,), generator=rng).tolist()
        samples.append({"ids": [1, data.IMAGE_MARKER, *ids],
                        "roles": [data.CONTEXT] * 2 + [data.ANSWER] * length,
                        "pixels": torch.randn(3, size, size, generator=rng), "name": f"{stage} {number}"})
    return samples


def collate(vlm, samples) -> dict:
    return data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, 0, vlm.vit.config.image_size)


def our_step(vlm, samples, lengths, stage: str, micro: int, budget: int):
    """A function that takes a step and returns its loss."""
    config = Config(stage=stage, batch=len(samples), micro_batch=micro, micro_tokens=budget)
    train.choose_learning(config, vlm)
    optimizer, terms = train.build_optimizer(config, vlm, vlm.llm.head_weight.device)
    rows = [length + 1 + vlm.num_image_tokens for length in lengths]
    parts, = order.spread(list(range(len(samples))), rows, micro, budget, 1)
    batches = [collate(vlm, [samples[i] for i in part]) for part in parts]
    return lambda: train.train_step(vlm, terms, optimizer, batches, config, 1e-4)["generative"]


def their_step(model, vlm, samples, stage: str, micro: int):
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
            m = data.to_device(m, model.device)
            out = model(input_ids=m["ids"], pixel_values=m["pixels"].to(model.dtype),
                        attention_mask=m["mask"].long(), labels=m["labels"])
            loss = out.loss * count / sum(counts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


class Limit(TorchDispatchMode):
    """Repeats the matrix products and attention of what `function` did once: who computes the same cannot be
    faster. The numbers are random and lie in memory as the first ones did, so that as much of it is read."""

    def __init__(self, function):
        super().__init__()
        self.calls = []
        self.sizes = {}  # of the places in memory: how many numbers
        self.memory = {}  # of the places: their numbers
        with self:
            function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if PRODUCTS.match(function.__name__):
            self.calls.append((function, *tree_map(self.note, (args, kwargs or {}))))
        return function(*args, **(kwargs or {}))

    def note(self, x):
        """For a tensor, a function that makes one like it."""
        if not isinstance(x, torch.Tensor):
            return x
        memory = x.untyped_storage()
        place = memory.data_ptr(), x.dtype, x.device
        self.sizes[place] = max(self.sizes.get(place, 0), memory.nbytes() // x.itemsize)
        shape = x.shape, x.stride(), x.storage_offset()
        return lambda: self.memory[place].as_strided(*shape)

    def fill(self):
        """Make the numbers: as much memory as the first run took."""
        for place, count in self.sizes.items():
            _, dtype, device = place
            self.memory[place] = torch.randn(count, device=device).to(dtype)
        self.calls = [(function, *tree_map(lambda x: x() if callable(x) else x, given))
                      for function, *given in self.calls]

    @torch.no_grad()
    def __call__(self):
        if not self.memory:
            self.fill()
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(turns, pairs: int) -> list:
    """The seconds of each turn in every round, a column for each: the first comes last every other time."""
    rows = []
    for number in range(pairs):
        taken = {turn: turn() for turn in turns[:: 1 if number % 2 else -1]}
        rows.append([taken[turn] for turn in turns])
    return list(zip(*rows))


# A task takes its name, a batch size and our model, and checks that theirs computes the same. It returns
# turns of ours, of theirs and, if there is one, of the limit: functions that return seconds.

def training(task: str, batch: int, vlm) -> list:
    stage, is_mixed = task.split("-")[0], task.endswith("mixed")
    rng, text = np.random.default_rng(0), 20 if stage == "align" else 250
    room = vlm.llm.config.max_position_embeddings - vlm.num_image_tokens - 1
    lengths = rng.lognormal(np.log(150), 0.9, batch).clip(5, min(1400, room)).astype(int).tolist()
    lengths = lengths if is_mixed else [min(text, room)] * batch
    model, samples = theirs_of(vlm), samples_of(vlm, lengths, stage)
    longest = max(lengths) + 1 + vlm.num_image_tokens
    ours = our_step(vlm, samples, lengths, stage, batch, 2 * longest if is_mixed else 0)
    theirs = their_step(model, vlm, samples, stage, max(1, batch // 4) if is_mixed else batch)
    a, b = ours(), theirs()
    apart = 1e-4 if model.dtype == torch.float32 else 2e-2
    assert abs(a - b) < apart * abs(b), (a, b)  # equal losses at first
    return [partial(seconds, function) for function in (ours, theirs, Limit(ours))]


def generation(task: str, batch: int, vlm) -> list:
    """Greedy, 32 tokens: of the prompt alone (prefill), or of those behind the first (decode)."""
    model, rows = theirs_of(vlm), batch if task.endswith("batch") else 1
    m = data.to_device(collate(vlm, samples_of(vlm, [30] * rows, task)), model.device)
    vlm.llm.config = replace(vlm.llm.config, eos_token_id=-5)  # nobody ends early
    inputs = {"input_ids": m["ids"], "pixel_values": m["pixels"].to(model.dtype),
              "attention_mask": m["mask"].long()}

    def ours(new):
        return vlm.generate(m["ids"], m["pixels"], new, m["mask"])

    def theirs(new):
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                              pad_token_id=0, eos_token_id=None)[:, -new:]

    assert torch.equal(ours(32), theirs(32)) or model.dtype != torch.float32
    first, further = Limit(partial(ours, 1)), Limit(partial(ours, 32))
    further.calls = further.calls[len(first.calls) :]
    if task.startswith("prefill"):
        return [partial(seconds, function) for function in (partial(ours, 1), partial(theirs, 1), first)]

    def of_a_token(generate) -> float:
        return (seconds(partial(generate, 32)) - seconds(partial(generate, 1))) / 31

    return [partial(of_a_token, ours), partial(of_a_token, theirs), lambda: seconds(further) / 31]


def loading(task: str, batch: int, vlm) -> list:
    vlm.sources, folder = {"vit": TOKENIZER, "llm": TOKENIZER}, tempfile.TemporaryDirectory()
    vlm.export(folder.name)
    head, open_theirs = vlm.llm.head_weight, transformers.LlavaForConditionalGeneration.from_pretrained
    return [partial(seconds, lambda: VLM.from_pretrained(folder.name, head.dtype, head.device)),
            partial(seconds, lambda: open_theirs(folder.name, dtype=head.dtype).to(head.device))]


def preprocessing(task: str, batch: int, vlm) -> list:
    tower, rng = vlm.vit.config, np.random.default_rng(0)
    size, picture = tower.image_size, Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    theirs = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=tower.image_mean, image_std=tower.image_std)
    a, b = data.preprocess(picture, tower, "crop"), theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert (a - b).abs().max() < 0.05
    return [partial(seconds, lambda: data.preprocess(picture, tower, "crop")),
            partial(seconds, lambda: theirs(picture, return_tensors="pt"))]


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
    unknown = set(args.tasks.split(",")) - TASKS.keys()
    if unknown:
        parser.error(f"--tasks: no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    device, report = torch.device(args.device), {}
    start_ranks()  # theirs, too, has our way with the C library's memory
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    name = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    print(f"{args.size}, batch {args.batch}, {dtype}, {name}\n\n"
          "| task | ours / transformers | ours / limit | ms: ours, theirs, limit |\n|---|---|---|---|")
    config = configure("align", {"preset": "tiny", "seed": 0})
    for task in args.tasks.split(","):
        vlm = bench_step.random_model(config, SIZES[args.size], device, dtype)
        ours, *others = in_turns(TASKS[task](task, args.batch, vlm), 1 + args.pairs)
        report[task], cells = {}, []
        for other, column in zip(("transformers", "limit"), others):
            found = sorted(a / b for a, b in zip(ours[1:], column[1:]))
            report[task][other] = [round(ratio, 3) for ratio in found]
            cells.append(f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})")
        ms = ", ".join(f"{1000 * statistics.median(column):.1f}" for column in (ours, *others))
        print(f"| {task} | {' | '.join([*cells, 'none'][:2])} | {ms} |", flush=True)
    print(json.dumps({"size": args.size, "batch": args.batch, "device": name, "results": report}))


if __name__ == "__main__":
    main()
