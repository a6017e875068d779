"""Our data parallelism against torch's, on two CPU processes: time of a step, memory, and when we send.

    torchrun --nproc_per_node=2 tests/bench_ddp.py

Torch's: DistributedDataParallel with fused AdamW; sharded, the same with ZeroRedundancyOptimizer, and FSDP2.
Prints medians and quartiles of the ratios ours / theirs over rounds in which all take a step; the peak memory
of a rank beyond what it had before it made the model, each in a process of its own; and a trace of one
backward: when each bucket left, and when backward ended. Not a test: machines vary.
"""

import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).parent.parent))

from train import DataParallelAdamW
from plumbing.ranks import leave_ranks, peak_memory, start_ranks

CPU = torch.device("cpu")


def build():
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())))


class Traced(DataParallelAdamW):
    """Notes when each bucket's all-reduce starts."""

    times = ()

    def send(self, bucket):
        self.times = (*self.times, time.perf_counter())
        super().send(bucket)


def our_step(shard: bool):
    model = build()
    optimizer = Traced(model.parameters(), shard=shard, bucket_size=2**21)

    def step(x):
        """Returns when backward began and ended, and when each bucket left."""
        optimizer.times = ()
        optimizer.last_backward()
        loss = model(x).square().mean() / dist.get_world_size()
        began = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        optimizer.step(1e-4)
        return began, ended, optimizer.times

    return step


def torch_step(model, make_optimizer):
    optimizer = make_optimizer(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp_step():
    model = build()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return torch_step(fully_shard(model, mesh=mesh), AdamW)


WAYS = {
    "ours": partial(our_step, False),
    "DDP": lambda: torch_step(DistributedDataParallel(build()), AdamW),
    "ours, sharded": partial(our_step, True),
    "ZeRO": lambda: torch_step(DistributedDataParallel(build()),
                               partial(ZeroRedundancyOptimizer, optimizer_class=AdamW)),
    "FSDP2": fsdp_step,
}
PAIRS = ("ours", "DDP"), ("ours, sharded", "ZeRO"), ("ours, sharded", "FSDP2")


def seconds(step, x) -> float:
    dist.barrier()
    start = time.perf_counter()
    step(x)
    dist.barrier()
    return time.perf_counter() - start


def memory(way: str) -> int:
    """MiB that this rank needs for three steps, from a process that does nothing else."""
    out = subprocess.run([sys.executable, __file__, way], stdout=subprocess.PIPE, text=True, check=True)
    return int(out.stdout)


def main(rounds=60):
    start_ranks()
    torch.set_num_threads(1)
    x = torch.randn(256, 1024)
    if sys.argv[1:]:
        before = peak_memory(CPU)
        step = WAYS[sys.argv[1]]()
        for _ in range(3):
            step(x)
        print(peak_memory(CPU) - before)
        return leave_ranks()
    peaks = {way: memory(way) for way in WAYS}
    steps = {way: make() for way, make in WAYS.items()}
    times = [{way: seconds(step, x) for way, step in steps.items()} for _ in range(5 + rounds)]
    began, ended, sent = steps["ours"](x)
    if dist.get_rank() == 0:
        print("| | step time | peak memory, MiB |\n|---|---|---|")
        for ours, theirs in PAIRS:
            ratios = [row[ours] / row[theirs] for row in times[5:]]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"| {ours} / {theirs} | {middle:.2f} (quartiles {low:.2f} to {high:.2f}) | "
                  f"{peaks[ours]} / {peaks[theirs]} |")
        left = ", ".join(f"{1000 * (moment - began):.1f}" for moment in sent)
        print(f"\nall-reduces started {left} ms after backward began; "
              f"it ended at {1000 * (ended - began):.1f} ms")
    leave_ranks()


if __name__ == "__main__":
    main()
