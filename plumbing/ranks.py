"""Processes: ranks that join, sum and leave together, their devices, and how a command ends.
"""

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
import math
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def start_ranks() -> torch.device:
    """Join the process group if torchrun made one; return this rank's device. A CPU is the slowest GPU."""
    local_ranks, is_cuda = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_cuda else torch.device("cpu")
    if is_cuda and local_ranks > torch.cuda.device_count():
        raise ValueError(f"{local_ranks} ranks on this machine, {torch.cuda.device_count()} GPUs")
    # rows of every length come by: segments that grow waste less of a GPU than segments of fixed sizes
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if is_cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, os.cpu_count() // local_ranks))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if is_cuda else "gloo", device_id=device if is_cuda else None,
                                timeout=timedelta(hours=6))  # one rank may write 13 GB, or answer, alone
    return device


def keep_freed_memory():
    """Tell the C library, if it is glibc, to keep what is freed for the next tensor, as PyTorch does on a
    GPU. Else it gives each large tensor back to the system, whose pages come cleared and one by one: a tenth
    of a step's time."""
    with suppress(OSError, AttributeError, TypeError):  # macOS, Windows, other libraries
        c = ctypes.CDLL(None)
        c.mallopt(-4, 0)  # M_MMAP_MAX: no tensor is a mapping of its own
        c.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def total_memory(device) -> float:
    """The bytes that a rank may have: its GPU's, or its share of this machine's, where the system tells."""
    if device.type == "cuda":  # 2 GiB go to CUDA, NCCL and what is between the tensors
        return torch.cuda.get_device_properties(device).total_memory - 2 * 2**30
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.getenv("LOCAL_WORLD_SIZE", 1))


def peak_memory(device) -> int | None:
    """The most memory in use so far, in MiB: of the GPU, or of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    with suppress(ImportError):  # Windows has no such module; macOS counts bytes, Linux KiB
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def leave_ranks():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # what still holds a message's end: else, two of eight processes aborted at exit
        dist.destroy_process_group()


@contextmanager
def command(program: str, interrupted: str = ""):
    """The frame of a command, and what it says when it is interrupted. What is wrong with its input ends it
    in one line. One of several ranks says so first and then is gone at once: to leave politely is to wait for
    the others, who wait for it. Rank 0 has the first word: where all fail alike, the others are ended before
    their turn."""
    try:
        yield
    except SystemExit:
        leave_ranks()
        raise
    except BaseException as error:
        ours = (OSError, ValueError, MemoryError, torch.OutOfMemoryError)
        told = ("gloo", "NCCL", "DataLoader")  # in a RuntimeError: another rank, a loader's process, is gone
        is_known = isinstance(error, ours) or any(word in str(error) for word in told)
        reason = (str(error).strip() or repr(error)).splitlines()[-1]  # a loader process sends a traceback
        if isinstance(error, KeyboardInterrupt) and interrupted:
            is_known, reason = True, interrupted
        if not dist.is_initialized() and not is_known:
            raise
        if not dist.is_initialized():
            sys.exit(f"{program}: {reason}")
        time.sleep(3 * (rank() > 0))
        text = f"{program}: rank {rank()}: {reason}" if is_known else traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
    leave_ranks()


def say(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))  # not through the progress bar


def sum_over_ranks(values, device):
    """Element-wise sum (n,) of n numbers or scalar tensors over all ranks, in fp64, on the device."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def on_every_rank(function) -> list:
    """What `function()` returns on each rank. Where it fails on one, all get that one's ValueError: nobody
    waits for a rank that is gone."""
    value = error = None
    try:
        value = function()
    except (OSError, ValueError) as problem:
        error = str(problem) or repr(problem)
    results = [(value, error)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(results, (value, error))
    for _, error in results:
        if error:
            raise ValueError(error)
    return [value for value, _ in results]
# Each rank's tensor, end to end, on all of them; and back, summed. PyTorch 2.13 renamed both.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def choose_dtype(device, name: str = "") -> torch.dtype:
    """Of weights and activations: the one named; else fp32 on a CPU, bf16 where the GPU has it, or fp16."""
    if name:
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@contextmanager
def caught_signals(is_wanted: bool):
    """A list that takes the first SIGINT or SIGTERM, so that the current step can finish and be saved.

    The second acts as it always does.
    """
    caught = []
    before = {}

    def restore(*found):
        caught.extend(found)
        for number, handler in before.items():
            signal.signal(number, handler)

    if is_wanted:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, restore)
    try:
        yield caught
    finally:
        restore()
