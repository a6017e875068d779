"""Peak memory and time of one training step, paired: gradient checkpointing, and the contrastive losses on and off.

    python tests/bench_memory.py

Each setting runs in a process of its own, because a process's peak never falls; several rounds, one setting after the
other in each, so that a busy machine slows all of them. Prints medians of the ratios. Not a test: machines vary.
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
import data
import losses
import train
from llm import LLM, LLMConfig
from projector import VLM
from vit import ViT

MEDIUM = LLMConfig(2000, 256, 704, 12, 8, 4, 32)  # deep enough for its activations to outweigh its weights


def one(stage: str, checkpointing: str, contrastive: str, size: str, steps: int) -> dict:
    """Milliseconds of each step after the first, and MiB of peak memory beyond what building the model took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = train.configure(stage, {"preset": "tiny", "stage": stage, "checkpointing": checkpointing,
                                     "contrastive": contrastive, "batch": 16 if size == "medium" else 64})
    vlm = VLM(ViT(train.TINY_VIT), LLM(MEDIUM if size == "medium" else train.TINY_LLM), "mlp2x_gelu")
    train.choose_learning(config, vlm)
    train.checkpoint_blocks(vlm.llm.model.layers, checkpointing)
    scales = torch.nn.ModuleDict({name: losses.ContrastiveScale() for name in losses.TERMS[contrastive]})
    optimizer = train.DataParallelAdamW([p for p in [*vlm.parameters(), *scales.parameters()] if p.requires_grad])
    text = 200 if size == "medium" else 8  # tokens of a sample
    samples = data.RandomSamples(config.batch, text, vlm.llm.config.vocab_size, vlm.vit.config.image_size)
    batch = data.collate([samples[i] for i in range(config.batch)], vlm.num_image_tokens, vlm.image_token_id, 0,
                         vlm.vit.config.image_size)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        train.train_step(vlm, scales, optimizer, [dict(batch)], config, 1e-3)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"ms": 1000 * statistics.median(times[1:]), "extra": (peak - before) / 1024, "peak": peak / 1024}


def rounds(settings: dict, count: int) -> dict:
    """{name: [result of each round]}, the settings one after another in every round."""
    results = {name: [] for name in settings}
    for _ in range(count):
        for name, setting in settings.items():
            out = subprocess.run([sys.executable, __file__, json.dumps(setting)], capture_output=True, text=True)
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
        show("gradient checkpointing, LLM of 12 blocks of width 256, instruct: step time, memory of the step",
             {which: ("instruct", which, "none", "medium", 2) for which in ("none", "every-other", "every")}, "none",
             ("ms", "extra"), 3)
        show("contrastive loss, tiny preset, align: step time, peak memory of the process",
             {which: ("align", "none", which, "tiny", 30) for which in losses.TERMS}, "none", ("ms", "peak"), 3)
