"""Checkpoints: a run that was stopped goes on as if it had not been, on any number of ranks.

    OUT/checkpoint-STEP/             the model so far, a run directory like OUT itself
    OUT/checkpoint-STEP/rank-R.pt    step, options, masters and moments of rank R (without --shard: of rank 0)
    OUT/checkpoint-STEP/made_of.json fingerprints of records, tokenizer and towers
"""

import math
import os
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from data import find_image, key_of
from plumbing.files import named, read_json, whole, write_json
from plumbing.ranks import barrier, on_every_rank, rank, say, world_size

GO_ON = "the same command and --resume go on with it"

# Options that a resumed run may change: they do not touch its weights, or only by how sums are rounded.
MAY_DIFFER = {"resume", "save_every", "val", "val_every", "workers", "cache", "out",
              "micro_batch", "micro_tokens", "checkpointing", "compile", "shard"}


def checkpoints(out) -> list:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("checkpoint-" + 7 * "[0-9]"))


def refuse_changes(saved: dict, now: dict, where):
    """ValueError that names the first option that differs from those a run was saved with."""
    for name in sorted(now.keys() - MAY_DIFFER):
        if saved.get(name) != now[name]:
            raise ValueError(f"{where}: saved with {name} {saved.get(name)!r}, resumed with {now[name]!r}")


# ------------------------------------------------------------------------------------------------------------
# What a run is made of

def fingerprint(module) -> int:
    """Of the settings (a mean, a rope's base), and of the bits of all weights, on any device. Sums of whole
    numbers do not depend on their order."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [repr(part.config) for part in module.modules() if hasattr(part, "config")]
    for name, p in module.named_parameters():
        bits = p.detach().view(integers[p.element_size()])
        sums.append((name, bits.sum(dtype=torch.int64).item()))
    return key_of(sums)


def fingerprints(vlm, samples) -> dict:
    """What a run is made of beside its options. A run that goes on with another is another run."""
    tokenizer = samples.tokenizer
    return {
        "records": key_of(samples.records.text),
        "tokenizer": key_of((tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)),
        "vit": fingerprint(vlm.vit),
        "llm": fingerprint(vlm.llm),
        "pictures": picture_sizes(samples),
    }


def picture_sizes(samples) -> int:
    """Of the names and sizes of at most 1000 pictures, evenly spaced. A picture that is missing has no
    size."""
    found = []
    for number in range(0, len(samples), math.ceil(len(samples) / 1000)):
        name = samples.records[number].get("image")
        file = find_image(samples.images, name) if name else None
        found.append((name, file.stat().st_size if file and file.is_file() else None))
    return key_of(found)


# ------------------------------------------------------------------------------------------------------------
# Save

def save(config, step: int, vlm, optimizer, terms, made_of: dict):
    """Write OUT/checkpoint-STEP, complete or not at all. Keep the last two.

    It is a run directory, and beside that what the ranks go on from. eval.py opens it, and --init a copy.
    """
    final = Path(config.out) / f"checkpoint-{step:07d}"
    partial = final.with_suffix(".partial")
    if rank() == 0:
        partial.mkdir(parents=True)  # open_run has removed what a run that was stopped here left
    barrier()
    state = {"step": step, "ranks": world_size(), "config": asdict(config)}
    state["squares"] = {name: term.squares for name, term in terms.items()}
    if config.shard or rank() == 0:
        state["optimizer"] = optimizer.state_dict()
    with whole(partial / f"rank-{rank()}.pt") as building, open(building, "wb") as file:
        torch.save(state, file)
    barrier()
    if rank() == 0:
        vlm.save(partial, asdict(config) | {"step": step}, config.stage == "instruct")
        write_json(partial / "made_of.json", made_of)
        with open(Path(config.out) / "log.jsonl", "a") as log:
            os.fsync(log.fileno())  # its lines up to this step are part of the run
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(final.parent)
        for old in checkpoints(config.out)[:-2]:
            shutil.rmtree(old)
    barrier()


def sync_folder(folder):
    """The names in a folder reach the disk, too."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


# ------------------------------------------------------------------------------------------------------------
# Load

def load(config, optimizer, terms, made_of: dict) -> int:
    """Restore optimizer and terms from the last checkpoint. Returns the step to go on with, 0 if there is
    none.

    ValueError if options, records, tokenizer or towers are others now, or if a file is damaged.
    """
    steps = [int(folder.name.removeprefix("checkpoint-")) for folder in checkpoints(config.out)]
    last_step = on_every_rank(lambda: max(steps, default=0))[0]  # rank 0 decides
    if not last_step:
        say(f"{config.out}: no checkpoint to resume from; starting at step 0")
        return 0
    last = Path(config.out) / f"checkpoint-{last_step:07d}"
    states = []
    on_every_rank(lambda: states.extend(read_states(last, config, made_of)))
    optimizer.load_state_dict(*(state["optimizer"] for state in states))
    for name, term in terms.items():
        term.squares = states[0]["squares"][name]
    say(f"resumed from {last}: step {last_step}")
    return last_step


def read_states(last: Path, config, made_of: dict) -> list:
    """What the ranks saved, checked: of all ranks if it was with --shard, else of rank 0."""
    with named(last, "damaged; without it, the one before is taken"):
        first = read_state(last, 0)
        refuse_changes(allow_more_steps(first["config"], asdict(config), last), asdict(config), last)
        refuse_other(last, made_of)
        check_sums(last, first["ranks"])
        states = [first]
        if first["config"]["shard"]:
            states += [read_state(last, number) for number in range(1, first["ranks"])]
        return states


def allow_more_steps(saved: dict, now: dict, where) -> dict:
    """The saved options, with more steps or epochs if the run has more now."""
    saved = dict(saved)
    for name in ("steps", "epochs"):
        if now[name] > (saved.get(name) or math.inf):  # 0 steps: as many as the epochs need
            say(f"{where}: saved with {name} {saved[name]}, now {now[name]}: the schedule is another")
            saved[name] = now[name]
    return saved


def read_state(folder: Path, number: int) -> dict:
    """What rank `number` saved. Tensors stay on disk until they are used."""
    return torch.load(folder / f"rank-{number}.pt", map_location="cpu", weights_only=True, mmap=True)


def check_sums(folder: Path, files: int):
    """Compare the check sums in every W-th file, which torch does not do. The ranks share the files."""
    for number in range(rank(), files, world_size()):
        with zipfile.ZipFile(folder / f"rank-{number}.pt") as file:
            if file.testzip():
                raise ValueError("some of its bits are not those that were written")


def refuse_other(folder: Path, made_of: dict):
    """ValueError if the run was made of something else than what is there now."""
    file = folder / "made_of.json"
    saved = read_json(file) if file.exists() else made_of
    changed = [name for name in made_of if saved.get(name) != made_of[name]]
    if changed == ["pictures"]:
        say(f"warning: {folder}: some pictures have another size now, or other names")
    elif changed:
        raise ValueError(f"{folder}: saved with another {' and '.join(changed)}; to go on with what is now "
                         f"there, which makes it another run, remove {file}")
