"""Our data parallelism against torch's DistributedDataParallel, on two CPU processes: step times, and when we
send.

    torchrun --nproc_per_node=2 tests/bench_ddp.py

Prints the median of the ratios ours / torch over pairs of steps that follow each other, and a trace of one
backward: when each bucket left, and when backward ended. Not a test: machines vary.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from train import DataParallelAdamW
from plumbing.ranks import start_ranks


def build():
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())))


class Traced(DataParallelAdamW):
    """Notes when each bucket's all-reduce starts."""

    times = ()

    def send(self, bucket):
        self.times = (*self.times, time.perf_counter())
        super().send(bucket)


def main(pairs=60):
    start_ranks()
    torch.set_num_threads(1)
    ours, theirs = build(), nn.parallel.DistributedDataParallel(build())
    our_optimizer = Traced(ours.parameters(), bucket_size=2**21)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, fused=True)
    x = torch.randn(256, 1024)

    def our_step():
        our_optimizer.last_backward()
        (ours(x).square().mean() / dist.get_world_size()).backward()
        our_optimizer.step(1e-4)

    def their_step():
        their_optimizer.zero_grad()
        theirs(x).square().mean().backward()
        their_optimizer.param_groups[0]["lr"] = 1e-4
        their_optimizer.step()

    def seconds(step):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - start

    for _ in range(5):
        our_step(), their_step()
    ratios = [seconds(our_step) / seconds(their_step) for _ in range(pairs)]

    our_optimizer.times = ()
    our_optimizer.last_backward()
    loss = ours(x).square().mean()
    start = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    our_optimizer.step(1e-4)
    if dist.get_rank() == 0:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"step time, ours / torch DDP + fused AdamW: median {middle:.2f}, quartiles {low:.2f} to "
              f"{high:.2f}")
        sent = ", ".join(f"{1000 * (t - start):.1f}" for t in our_optimizer.times)
        print(f"all-reduces started {sent} ms after backward began; backward ended at "
              f"{1000 * (end - start):.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
