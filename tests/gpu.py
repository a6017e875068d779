"""The day a GPU is lent: in nine minutes what no CPU can tell, a row of a table as soon as it is known.

    python tests/gpu.py

Random weights at full shape. What does not fit, by the plan or in fact, is tried with half the LLM's layers.
What fails, or comes too late, is said in its row. A CPU runs the same code on the tiny preset.
"""

import gc
import json
import sys
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import bench_transformers
import data
import losses
from plumbing import ranks
from running import costs, options

IS_GPU, BF16 = torch.cuda.is_available(), torch.bfloat16
BATCH = {"small": 128, "7b": 32} if IS_GPU else {"tiny": 4}  # samples in a step
BUDGET, LAST, PAIRS = 530, 60, 5  # seconds; with fewer than LAST of them left, no row begins


def config_of(preset, part, stage, **given):
    """The preset's options, with one `part`-th of the LLM's layers."""
    config = options.configure(stage, {"preset": preset, "batch": BATCH[preset]} | given)
    _, llm = costs.shapes_of(config)
    config.llm = f"1/{part} of the layers of {config.llm}"
    costs.SHAPES[config.llm] = replace(llm, num_hidden_layers=llm.num_hidden_layers // part)
    return config


def gradient_row(preset, part, device, dtype) -> dict:
    """Captioning in bf16 with flash attention, against `dtype` with plain, on the same weights: time,
    relative difference and cosine, of states before the captions and of the projector's gradients."""
    config, found, ms = config_of(preset, part, "align"), [], []
    for kind, attention in ((BF16, SDPBackend.FLASH_ATTENTION), (dtype, SDPBackend.MATH)):
        vlm = bench_step.random_model(config, costs.shapes_of(config), device, BF16).to(kind)
        vlm.llm.model.embed_tokens.weight.data.mul_(0.02)  # else the loss of a tied head is a hundred
        m = data.to_device(bench_step.random_batch(config, vlm), device)

        def captioning():
            loss, states = losses.caption_pass(vlm, m, vlm.encode(m["pixels"]))
            return states, *torch.autograd.grad(loss, [*vlm.projector.parameters()])

        with sdpa_kernel(attention):
            found.append([x.detach().double() for x in captioning()])
            ms.append(round(1000 * bench_transformers.seconds(captioning), 1))
    return {"ms": ms, "apart": [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(*found)],
            "cosines": [f"{(a * b).sum() / a.norm() / b.norm():.6f}" for a, b in zip(*found)]}


def step_row(preset, part, device, stage, is_compiled) -> dict:
    """What a dry run tells, and how often its steps wait for the GPU, and where."""
    config = config_of(preset, part, stage, compile=is_compiled)
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        found = bench_step.dry_run(config, device)
    found["of the plan"] = round(found["peak_memory_gib"] / found["predicted_gib"], 3)
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchr" in str(w.message)]
    return found | {"steps": 3 + config.contrastive_first, "waits": Counter(waits)}


def pair_row(preset, part, device, task, batch) -> dict:
    """A task of tests/bench_transformers.py."""
    config = config_of(preset, part, task if task in costs.TEXT_TOKENS else "align", checkpointing="none")
    vlm = bench_step.random_model(config, costs.shapes_of(config), device, BF16)
    turns = bench_transformers.TASKS[task](task, batch, vlm)[:2]
    ours, theirs = bench_transformers.in_turns(turns, PAIRS)
    return {"ours / theirs": sorted(round(a / b, 3) for a, b in zip(ours, theirs)),
            "rows/s": [round(batch / sorted(column)[PAIRS // 2], 1) for column in (ours, theirs)]}


ROWS = [
    ("bf16 and flash against fp32 and plain", gradient_row, torch.float32),
    ("flash against plain", gradient_row, BF16), *[(s, step_row, s, False) for s in costs.TEXT_TOKENS],
    *[(f"tokens, batch {batch}", pair_row, "decode-batch", batch) for batch in (1, 8, 64)],
    ("align, pairs", pair_row, "align", 16), ("instruct, pairs", pair_row, "instruct", 8),
    *[(f"{stage}, compiled", step_row, stage, True) for stage in costs.TEXT_TOKENS if IS_GPU]]


def main():
    device, began = ranks.start_ranks(), time.monotonic()
    name = torch.cuda.get_device_name(device) if IS_GPU else "no GPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n\n| | |\n|---|---|")
    for (what, row, *given), preset in [(row, preset) for row in ROWS for preset in BATCH]:
        for part in (1, 2, 4):
            left = BUDGET + began - time.monotonic()
            found = {"skipped": f"{left:.0f} s left"}
            try:
                gc.collect()  # a checkpointed block refers to itself
                if IS_GPU:
                    torch.cuda.set_sync_debug_mode("warn")
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                if left > LAST:
                    found = row(preset, part, device, *given)
                break
            except Exception as error:
                found = {"failed": repr(error)[:300]}
                if not isinstance(error, (ValueError, torch.OutOfMemoryError)):
                    break
        print(f"| {preset} {what}, LLM / {part} | {json.dumps(found)[1:-1]} |", flush=True)


if __name__ == "__main__":
    main()
