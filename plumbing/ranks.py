"""Processes: ranks that join, sum and leave together, their devices, and how a command ends."""

import ctypes
import gc
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------
# Start and leave

# The group of `barrier` and `on_every_rank`: others wait there while one rank writes 13 GB or answers
# questions. Everything else, joining included, takes minutes at most. None: torch's default group.
patient = None
# The signals that end a run: Ctrl-C, a machine that goes down, Slurm. Windows has no SIGUSR1.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def start_ranks() -> torch.device:
    """Join the process group if torchrun made one; return this rank's device."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Rows have many lengths. Memory segments that can grow waste less of a GPU than fixed ones.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        if local_ranks > torch.cuda.device_count():
            raise ValueError(f"{local_ranks} ranks on this machine, {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, and that takes longer
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        interface = os.environ.get("NCCL_SOCKET_IFNAME", "")
        if interface and interface in [name for _, name in socket.if_nameindex()]:  # and no prefix, no list
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # the CPUs' group, as the GPUs'
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        try:
            store = fresh(store, rank, world)
        except dist.DistStoreError as error:
            raise TimeoutError(f"not all of {world} ranks have started ({error})") from None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device_id,
                                timeout=timedelta(minutes=10))
        global patient
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    return device


def fresh(store, rank: int, world: int):
    """The store, below a name that only the ranks of this start have.

    torchrun's store outlives the ranks. Those that it starts again would find the addresses of the dead
    (pytorch/pytorch#135712). So each rank writes a new word; once all have read the same words, these are the
    name. DistStoreError or TimeoutError if a rank does not come.
    """
    store.set(f"word/{rank}", uuid.uuid4().hex[:8])
    for _ in range(6000):  # ten minutes
        words = [store.get(f"word/{other}").decode() for other in range(world)]
        name = "".join(words)
        store.set(f"{name}/{rank}", "")
        if store.check([f"{name}/{other}" for other in range(world)]):
            return dist.PrefixStore(name, store)
        time.sleep(0.1)
    raise TimeoutError(f"not all of {world} ranks have started")


def launch() -> str:
    """What all restarts of one torchrun share, and nothing else does: the folder of its logs."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("attempt_")[0]


def keep_freed_memory():
    """Make glibc keep freed memory for the next tensor, as PyTorch does on a GPU.

    Otherwise the system takes each large tensor back and clears its pages: a tenth of a step's time.
    """
    with suppress(OSError, AttributeError, TypeError):  # macOS, Windows and other libraries lack this
        c = ctypes.CDLL(None)
        c.mallopt(-4, 0)  # M_MMAP_MAX: no tensor is a mapping of its own
        c.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def choose_dtype(device, name: str = "") -> torch.dtype:
    """The dtype called `name`. Without a name: fp32 on a CPU, bf16 on a GPU that has it, or fp16."""
    if name:
        if device.type == "cpu":
            warn_of_slow(name)
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


@cache
def warn_of_slow(name: str):
    """One line, once, if this CPU is slow in the dtype."""
    times = slowness(getattr(torch, name))
    if times > 4 and rank() == 0:
        print(f"{name} is slow on this processor: a product takes {times:.0f} times as long as in float32",
              file=sys.stderr)


def slowness(dtype) -> float:
    """The seconds of a product on the CPU, divided by those in fp32: some 70 of bfloat16 without AVX-512."""
    seconds = {torch.float32: [], dtype: []}
    for _ in range(3):
        for kind, found in seconds.items():
            x = torch.ones(256, 256, dtype=kind)
            began = time.perf_counter()
            x @ x
            found.append(time.perf_counter() - began)
    return min(seconds[dtype]) / min(seconds[torch.float32])


def halved(function, rows: list) -> list:
    """function(rows), a list, in halves if the GPU's memory does not suffice."""
    try:
        return function(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()  # not in `except`: the error holds the tensors
    print(f"rank {rank()}: {len(rows)} do not fit into the GPU's memory: now in halves", file=sys.stderr)
    half = len(rows) // 2
    return halved(function, rows[:half]) + halved(function, rows[half:])


def leave_ranks():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        global patient
        patient = None
        gc.collect()  # free what still holds one end of a message: otherwise a process may abort at exit
        dist.destroy_process_group()


def run_alone(command_line: list) -> int:
    """The exit status of a program that is none of the ranks."""
    leave_ranks()  # the others leave, too, and would wait for this one
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}  # or it awaits others
    return subprocess.run(command_line, env=alone).returncode


@contextmanager
def command(program: str, interrupted: str = ""):
    """The frame of a command: a known error ends it with one line, Ctrl-C with the line `interrupted`.

    One of several ranks prints its line and exits at once: a clean exit would wait for ranks that are waiting
    for this one. Rank 0 comes first, so that an error which all ranks share is printed once.
    """
    if "RANK" not in os.environ:  # a rank that waits for another hears of no signal, and torchrun must end it
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clear away what is half done
    with suppress(AttributeError):  # a console or pipe may lack letters of a caption: `\u4e00` is no error
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdin.reconfigure(errors="strict")  # other bytes than letters end a question in a line
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        reason, is_known = reason_of(error)
        if isinstance(error, KeyboardInterrupt) and interrupted:
            reason, is_known = interrupted, True
        if dist.is_initialized():
            if rank() > 0:
                time.sleep(3)
            text = f"{program}: rank {rank()}: {reason}" if is_known else traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            os._exit(1)
        if is_known:
            sys.exit(f"{program}: {reason}")
        raise
    finally:
        leave_ranks()


def reason_of(error) -> tuple:
    """(one line, whether the user's input or another process is the cause)."""
    from_input = (OSError, ValueError, MemoryError, torch.OutOfMemoryError)
    of_others = ("gloo", "NCCL", "DataLoader")  # in a RuntimeError: another rank or a loader process is gone
    is_known = isinstance(error, from_input) or any(word in str(error) for word in of_others)
    lines = (str(error).strip() or repr(error)).splitlines()
    return lines[-1], is_known  # a loader process sends a traceback; its last line is the error


@contextmanager
def caught_signals(is_wanted: bool):
    """A list that takes the first of the signals that end a run: the current step can then finish.

    A second one within five seconds counts as the same one, because torchrun passes on what its ranks may
    have had already. A later one acts as it always does.
    """
    caught = []
    before = {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number, _):
        if not caught:
            caught.append(time.monotonic())
        elif time.monotonic() > caught[0] + 5:
            restore()
            signal.raise_signal(number)

    for number in STOPPING if is_wanted else ():
        before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


# ------------------------------------------------------------------------------------------------------------
# Between start and end

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier(group=patient)


def say(*words):
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))


# Concatenate the tensors of all ranks on each of them; sum and give each rank its slice. PyTorch 2.13 has new
# names for both.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_over_ranks(values, device):
    """Sum n numbers or scalar tensors over all ranks, each for itself: (n,) in fp64 on `device`."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.stack([zero + value for value in values])  # a number is copied to a GPU without a wait
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def on_every_rank(function) -> list:
    """What `function()` returns on each rank.

    If it fails on one rank, all raise that error, so that no rank waits for one that is gone.
    """
    value = problem = None
    try:
        value = function()
    except (OSError, ValueError) as error:
        problem = str(error) or repr(error)
    results = [(value, problem)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(results, (value, problem), group=patient)
    for _, problem in results:
        if problem:
            raise ValueError(problem)
    return [value for value, _ in results]


def agree(facts: dict):
    """ValueError on all ranks, with the first fact that a rank has otherwise than rank 0."""
    everyones = on_every_rank(lambda: facts)
    for number, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise ValueError(f"rank {number} has {name} {theirs[name]!r}, rank 0 has {value!r}")


# ------------------------------------------------------------------------------------------------------------
# Memory

CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")  # Linux: the bytes that a container may have


def total_memory(device) -> float:
    """The bytes that each rank may have: what is free of its GPU, of all ranks' the least; or its share of
    this machine's, where the system tells. All ranks call it."""
    if device.type == "cuda":  # 2 GiB go to NCCL and what is between the tensors
        free, _ = torch.cuda.mem_get_info(device)  # a desktop may have its part
        ours = free + torch.cuda.memory_reserved(device) - 2 * 2**30
        return min(on_every_rank(lambda: ours))
    found = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # a container may have less; elsewhere no such file, or "max"
        found.append(int(CONTAINER_MEMORY.read_text()))
    return min(found) / int(os.getenv("LOCAL_WORLD_SIZE", 1))


def peak_memory(device) -> int | None:
    """The most memory in use so far, in MiB: of the GPU, or of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    with suppress(ImportError):  # Windows has no such module; macOS counts bytes, Linux KiB
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
