"""Who loads the records of a step: a DataLoader, and its processes.

Letters: config is an options.Config, vlm a projector.VLM, samples a data.Conversations.
"""

import itertools
import os
import shutil
import signal
import sys
from functools import partial

import torch

import data
from plumbing.ranks import STOPPING
from running.order import longest_row


def make_loader(config, samples, vlm, mine: list, device):
    """Yield, step by step, the collated micro-batches of this rank. `mine`: their indices."""
    to_batch = partial(data.collate, num_image_tokens=vlm.num_image_tokens, image_token_id=vlm.image_token_id,
                       pad_id=samples.tokenizer.pad_token_id, image_size=vlm.vit.config.image_size,
                       max_length=longest_row(config, vlm))
    workers = min(config.workers, cores_of_a_rank())  # more would take turns, and the ranks' own threads wait
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=list(itertools.chain(*mine)),
        collate_fn=to_batch,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        **processes(workers),
        timeout=20 if workers and os.path.isdir("/dev/shm") else 0,  # then `next_batch` looks, and waits on
        generator=torch.Generator().manual_seed(config.seed),  # its own: not the run's random state
    )
    batches = iter(loader)
    for parts in mine:
        yield [next_batch(batches) for _ in parts]


def next_batch(batches):
    """The loader's next batch. What a loader process cannot hand over is not waited for.

    A full shared memory and a thread that has died look like a slow disk: nothing comes.
    """
    for _ in range(24):  # 8 minutes: the other ranks wait for 10
        try:
            return next(batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
        if shutil.disk_usage("/dev/shm").free < 2**25:
            raise ValueError("shared memory (/dev/shm) is full: --workers 0, or docker run --shm-size=8g")
        thread = getattr(batches, "_pin_memory_thread", None)
        if thread is not None and not thread.is_alive():
            break
    raise ValueError("the loader hands nothing over: --workers 0, or a larger `ulimit -n`")


def cores_of_a_rank() -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def processes(workers: int) -> dict:
    """How a DataLoader starts so many. Forked ones share the records; Python 3.14 alone would copy them."""
    context = "fork" if workers and sys.platform == "linux" else None
    return {"num_workers": workers, "worker_init_fn": outlive_signals, "multiprocessing_context": context}


def outlive_signals(_):
    """A run that is to stop goes on for a step, so its loader processes do not die of the signal, which would
    be an error. They leave the group that torchrun signals. SIGTERM, by which the main process ends them,
    ends them quietly. Their tokenizers have no threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
