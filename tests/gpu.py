"""The day a GPU is lent: in nine minutes what no CPU can tell, a row of a table as soon as it is known.

    python tests/gpu.py

Random weights at full shape. What does not fit, by the plan or in fact, is tried with half the LLM's layers.
A row says so, as it says what failed, or would come too late. A CPU runs the same code on the tiny preset.
"""

import gc
import io
import itertools
import json
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import bench_transformers
import data
import losses
from plumbing import clip, llama, llava, ranks
from running import costs, options

IS_GPU, BF16 = torch.cuda.is_available(), torch.bfloat16
BATCH = {"small": 128, "7b": 32} if IS_GPU else {"tiny": 4}  # samples in a step
BUDGET, LAST = 530, 60  # seconds; with fewer than LAST of them left, no row begins
PAIRS = 5


def config_of(preset, part, stage, **given):
    """The preset's options, with one `part`-th of the LLM's layers."""
    config = options.configure(stage, {"preset": preset, "batch": BATCH[preset]} | given)
    config.llm = f"1/{part} of the layers"
    vit, llm = bench_transformers.SIZES[preset]
    llm = replace(llm, num_hidden_layers=llm.num_hidden_layers // part)
    costs.SHAPES |= {config.vit: vit, config.llm: llm}
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
            ms.append(round(1000 * bench_transformers.seconds(captioning, device), 1))
    return {"ms": ms, "apart": [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(*found)],
            "cosines": [f"{(a * b).sum() / a.norm() / b.norm():.6f}" for a, b in zip(*found)]}


def step_row(preset, part, device, stage, is_compiled) -> dict:
    """What a dry run tells, and how often its steps wait for the GPU, and where."""
    if is_compiled and not IS_GPU:
        return {"compiled": "no GPU, and a minute of a C++ compiler"}
    config = config_of(preset, part, stage, compile=is_compiled)
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("always")
        bench_step.dry_run(config, device)
    found = json.loads(printed.getvalue().splitlines()[-1])
    if not IS_GPU:
        return found | dict.fromkeys(("mfu", "of the plan", "waits"), "no GPU")
    found["of the plan"] = round(found["peak_memory_gib"] / found["predicted_gib"], 3)
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchr" in str(w.message)]
    return found | {"steps": 3 + config.contrastive_first, "waits": Counter(waits)}


def pair_row(preset, part, device, task, batch) -> dict:
    """A task of tests/bench_transformers.py with models from memory: a file of 7B would take minutes."""
    config = config_of(preset, part, task if task in costs.TEXT_TOKENS else "align", checkpointing="none")
    vlm = bench_step.random_model(config, costs.shapes_of(config), device, BF16)
    vlm.image_token_id = 2  # transformers wants a row of the table for it
    made_of = transformers.LlavaConfig(
        vision_config=clip.config_json(vlm.vit.config), text_config=llama.config_json(vlm.llm.config, ""),
        vision_feature_select_strategy="default" if vlm.vit.config.family.class_token else "full",
        image_token_index=vlm.image_token_id)
    weights = {llava.their_name(name): p.detach() for name, p in vlm.named_parameters()}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        None, config=made_of, state_dict=weights, dtype=BF16).to(device)
    how = Namespace(size=preset, pairs=PAIRS, batch=batch)
    with patch.object(bench_transformers, "both", return_value=(None, vlm, model)):
        found, *times = bench_transformers.TASKS[task](task, how, device, BF16)
    return {"ours / theirs": [round(ratio, 3) for ratio in sorted(found)[::2]],
            "ms": [round(1000 * took, 2) for took in times],
            "rows/s": [round(batch / took) for took in times]}


ROWS = [
    ("bf16 and flash against fp32 and plain", gradient_row, torch.float32),
    ("flash against plain", gradient_row, BF16), ("align", step_row, "align", False),
    ("instruct", step_row, "instruct", False),
    *[(f"tokens, batch {batch}", pair_row, "decode-batch", batch) for batch in (1, 8, 64)],
    ("align, pairs", pair_row, "align", 16), ("instruct, pairs", pair_row, "instruct", 8),
    ("align, compiled", step_row, "align", True), ("instruct, compiled", step_row, "instruct", True)]


def main():
    device, began = ranks.start_ranks(), time.monotonic()
    name = torch.cuda.get_device_name(device) if IS_GPU else "no GPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n\n| | |\n|---|---|")
    for (what, row, *given), preset in itertools.product(ROWS, BATCH):
        for part in (1, 2, 4):
            left, is_too_large = BUDGET + began - time.monotonic(), False
            try:
                gc.collect()  # a checkpointed block refers to itself
                if IS_GPU:
                    torch.cuda.set_sync_debug_mode("warn")
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                found = {"skipped": f"{left:.0f} s left"}
                if left > LAST:
                    found = row(preset, part, device, *given)
            except Exception as error:
                found = {"failed": repr(error)[:300]}
                is_too_large = isinstance(error, (ValueError, torch.OutOfMemoryError))
            if not is_too_large:
                break
        print(f"| {preset} {what}, LLM / {part} | {json.dumps(found)[1:-1]} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
