"""Peak memory and time of one training step, paired: gradient checkpointing, the contrastive losses, what it
costs to measure the losses' gradients at the cut, and how both grow with batch and length.

    python tests/bench_memory.py

Each setting runs in a process of its own, because a process's peak never falls; several rounds, one setting
after the other in each, so that a busy machine slows all of them. Prints medians of the ratios. Not a test:
machines vary.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench_step
import losses
import train
from llm import LLMConfig
from plumbing.ranks import start_ranks
from running import costs
from running.options import configure

MEDIUM = LLMConfig(vocab_size=2000, hidden_size=256, intermediate_size=704, num_hidden_layers=12,
                   num_attention_heads=8, num_key_value_heads=4, head_dim=32)  # activations outweigh weights


def model_of(stage: str, checkpointing: str, contrastive: str, size: str, batch: int = 0, text: int = 0,
             **options) -> tuple:
    """(config, model, optimizer, terms, a batch) of random weights and data, on one thread. `text`: tokens of
    each row beside its image."""
    start_ranks()
    torch.set_num_threads(1)
    is_medium, device = size == "medium", torch.device("cpu")
    batch, text = batch or (16 if is_medium else 64), text or (200 if is_medium else 8)
    config = configure(stage, {"preset": "tiny", "checkpointing": checkpointing, "batch": batch,
                                     "contrastive": contrastive} | options)
    vit_config, llm_config = costs.shapes_of(config)
    shapes = vit_config, MEDIUM if is_medium else llm_config
    vlm = bench_step.random_model(config, shapes, device, torch.float32)
    optimizer, terms = train.build_optimizer(config, vlm, device)
    return config, vlm, optimizer, terms, bench_step.random_batch(config, vlm, text=text)


def milliseconds(config, vlm, optimizer, terms, batch) -> float:
    """Of one step."""
    start = time.perf_counter()
    train.train_step(vlm, terms, optimizer, [batch], config, 1e-3, step=1)
    return 1000 * (time.perf_counter() - start)


def one(*setting, steps: int = 30) -> dict:
    """Median milliseconds of the steps after the first; MiB of peak memory, in all and beyond the model's."""
    parts, before = model_of(*setting), peak()
    times = [milliseconds(*parts) for _ in range((steps if setting[3] == "tiny" else 2) + 1)]
    return {"ms": statistics.median(times[1:]), "extra": peak() - before, "peak": peak()}


def cost_of_measuring(size: str, pairs: int) -> list:
    """Step times with the gradients measured and balanced over those without, in pairs of two neighbours."""
    with_share = model_of("align", "none", "patch", size, contrastive_balance=0.3)
    products, ratios = losses.products, []
    for number in range(pairs + 1):
        times = {}
        for way in ("with", "without") if number % 2 else ("without", "with"):
            losses.products = products if way == "with" else lambda _: {}
            times[way] = milliseconds(*with_share)
        ratios.append(times["with"] / times["without"])
    losses.products = products
    return ratios[1:]


def peak() -> float:
    """Of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rounds(settings: dict, count: int) -> dict:
    """{name: [result of each round]}, the settings one after another in every round."""
    results = {name: [] for name in settings}
    for _ in range(count):
        for name, setting in settings.items():
            out = subprocess.run([sys.executable, __file__, json.dumps(setting)], stdout=subprocess.PIPE,
                                 text=True, check=True)
            results[name].append(json.loads(out.stdout))
    return results


def show(title, settings, base, keys, count):
    results = rounds(settings, count)
    print(title)
    for name in settings:
        ratios = {key: [r[key] / b[key] for r, b in zip(results[name], results[base])] for key in keys}
        print(f"  {name:<12}" + ", ".join(
            f"{key} x {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for key, values in ratios.items()), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(*json.loads(sys.argv[1]))))
    else:
        ways = ("none", "every-other", "every")
        settings = {which: ("instruct", which, "none", "medium") for which in ways}
        show("gradient checkpointing, LLM of 12 blocks of width 256, instruct: step time, memory of the step",
             settings, "none", ("ms", "extra"), 3)
        settings = {which: ("align", "none", which, "tiny") for which in losses.CONTRASTIVE}
        show("contrastive loss, tiny preset, align: step time, peak memory of the process", settings, "none",
             ("ms", "peak"), 3)
        for what, sizes in (("batch", [(8, 200), (16, 200), (32, 200)]),
                            ("length", [(16, 82), (16, 200), (16, 436)])):  # 36 of an image: 118, 236, 472
            settings = {str(size[what == "length"]): ("instruct", "none", "none", "medium", *size)
                        for size in sizes}
            show(f"growth with the {what}, LLM of 12 blocks, instruct: {what} doubled twice", settings,
                 str(sizes[0][what == "length"]), ("ms", "extra"), 3)
        print("gradients at the cut measured and balanced, align, patch loss: step time")
        for size, pairs in (("tiny", 60), ("medium", 12)):
            low, middle, high = statistics.quantiles(cost_of_measuring(size, pairs), n=4)
            print(f"  {size:<12}x {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {pairs} pairs)")
