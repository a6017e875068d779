"""A run in the middle: the model that it has so far, from its last checkpoint."""

from pathlib import Path

import numpy as np
import torch

from plumbing.files import named
from plumbing.ranks import choose_dtype, on_every_rank, rank, say
from projector import VLM
from running.checkpoint import GO_ON, check_sums, checkpoints, read_state
from running.options import Config
from running.order import count_steps


@torch.no_grad()
def open_run(run: Path, device) -> tuple | None:
    """(model, config with "step") of a run that is not finished: the towers that it started from, and what it
    has learned. `run` may also be one checkpoint. None for any other folder."""
    folder = last_checkpoint(run)
    if folder is None:
        return None
    with named(folder, "cannot be read"):
        first = read_state(folder, 0)
        check_sums(folder, first["ranks"])
        config = Config(**first["config"])
        counted = np.load(folder.parent / "lengths.npy")  # a key, then a number for each record
    steps = count_steps(config, len(counted) - 1)
    what = "projector and LLM are those" if config.stage == "instruct" else "projector is that"
    say(f"{run} is not finished: its {what} of step {first['step']} of {steps}; with train.py, {GO_ON}")
    dtype = choose_dtype(device, config.dtype)
    vlm = VLM.from_towers(config.vit, config.llm, config.projector, config.feature_layer, dtype, device)
    parameters = dict(vlm.named_parameters())
    with named(folder, "cannot be read"):
        for name, weight in read_learned(folder, first):
            parameters[name].copy_(weight)
    vlm.template = config.template
    return vlm.requires_grad_(False).eval(), first["config"] | {"step": first["step"]}


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run that is not finished, or `run` itself if it is a checkpoint, else None.
    Rank 0 looks, because the run may be going on. ValueError if there is none yet."""
    def look():
        if rank() > 0:
            return None
        if (run / "rank-0.pt").exists():
            return run
        if (run / "config.json").exists() or not (run / "log.jsonl").exists():
            return None
        found = checkpoints(run)
        if not found:
            raise ValueError(f"{run}: not finished, and without a checkpoint so far; train.py writes one "
                             "every --save_every steps")
        return found[-1]

    return on_every_rank(look)[0]


def read_learned(folder: Path, first: dict):
    """Yield (name, tensor) of all that a run learns: the masters, rounded as the run rounds them. `first` is
    the state of rank 0."""
    states = [first]
    if first["config"]["shard"]:
        states += [read_state(folder, number) for number in range(1, first["ranks"])]
    for number, members in enumerate(first["learns"]):
        master = torch.cat([state["optimizer"]["buckets"][number]["master"] for state in states])
        start = 0
        for name, shape, dtype in members:
            stop = start + shape.numel()
            if name:
                yield name, master[start:stop].view(shape).to(dtype)
            start = stop
