"""A run on disk: a run that was stopped goes on as if it had not been, on any number of ranks.

    OUT/checkpoint-STEP/rank-R.pt    step, options, masters and moments of rank R (without --shard: of rank 0)
    OUT/checkpoint-STEP/made_of.json fingerprints of records, tokenizer and towers
    OUT/log.jsonl                    a line a step
    OUT/lengths.npy                  the counted tokens of each record
    OUT/config.json                  written last: with it the run is finished
"""

import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data import key_of
from plumbing.files import named, read_json, read_text, whole
from plumbing.ranks import barrier, on_every_rank, rank, say, world_size

MAY_DIFFER = {"resume", "save_every", "workers", "cache", "out"}  # options that a resumed run may change


def fingerprint(module) -> int:
    """Of the bits of all weights, on any device. Sums of whole numbers do not depend on their order."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for name, p in module.named_parameters():
        bits = p.detach().view(integers[p.element_size()])
        sums.append((name, bits.sum(dtype=torch.int64).item()))
    return key_of(sums)


def fingerprints(config, vlm, tokenizer) -> dict:
    """What a run is made of beside its options. A run that goes on with another is another run."""
    if not config.resume and not config.save_every:
        return {}
    return {
        "records": key_of(Path(config.annotations).read_bytes()),
        "tokenizer": key_of((tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)),
        "vit": fingerprint(vlm.vit),
        "llm": fingerprint(vlm.llm),
    }


def checkpoints(out) -> list:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("checkpoint-???????"))


def save(config, step: int, optimizer, terms, made_of: dict):
    """Write OUT/checkpoint-STEP, complete or not at all. Keep the last two."""
    final = Path(config.out) / f"checkpoint-{step:07d}"
    partial = final.with_suffix(".partial")
    barrier()  # no rank writes into OUT before rank 0 has made it ready (open_run)
    partial.mkdir(parents=True, exist_ok=True)  # of a run that was stopped while saving: written over
    state = {"step": step, "ranks": world_size(), "config": asdict(config)}
    state["squares"] = {name: term.squares for name, term in terms.items()}
    if config.shard or rank() == 0:
        state["optimizer"] = optimizer.state_dict()
    with whole(partial / f"rank-{rank()}.pt") as building, open(building, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    barrier()
    if rank() == 0:
        (partial / "made_of.json").write_text(json.dumps(made_of))
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


def refuse_changes(saved: dict, now: dict, where):
    """ValueError that names the first option that differs from those a run was saved with."""
    for name in sorted(now.keys() - MAY_DIFFER):
        if saved.get(name) != now[name]:
            raise ValueError(f"{where}: saved with {name} {saved.get(name)!r}, resumed with {now[name]!r}")


def is_finished(config) -> bool:
    """Whether the run to be resumed is finished. ValueError if there is none, or one of other options."""
    if not (Path(config.out) / "log.jsonl").exists():
        raise ValueError(f"{config.out}: no run to resume; without --resume one begins there")
    finished = Path(config.out) / "config.json"
    if not finished.exists():
        return False
    with named(finished):
        refuse_changes(read_json(finished), asdict(config), finished)
    return True


def load(config, optimizer, terms, made_of: dict) -> int:
    """Restore optimizer and terms from the last checkpoint. Returns the step to go on with, 0 if there is
    none.

    ValueError if options, records, tokenizer or towers are others now, or if a file is damaged.
    """
    found = checkpoints(config.out)
    if not found:
        say(f"{config.out}: no checkpoint to resume from; starting at step 0")
        return 0
    last = found[-1]
    with named(last, "damaged; without it, the one before is taken"):
        first = read_state(last, 0)
        refuse_changes(first["config"], asdict(config), last)
        refuse_other(last, made_of)
        on_every_rank(lambda: check_sums(last, first["ranks"]))
        if "buckets" not in first["optimizer"]:
            raise ValueError("saved by an older version of this program, which alone can go on with it")
        states = [first]
        if config.shard:  # each rank reads only its slices: the files are mapped
            states += [read_state(last, number) for number in range(1, first["ranks"])]
        optimizer.load_state_dict(*(state["optimizer"] for state in states))
        for name, term in terms.items():
            term.squares = first["squares"][name]
    say(f"resumed from {last}: step {first['step']}")
    return first["step"]


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
    if changed:
        raise ValueError(f"{folder}: saved with another {' and '.join(changed)}; to go on with what is now "
                         f"there, which makes it another run, remove {file}")


def open_run(config, start: int, lengths: list):
    """Make OUT ready for its first line of log.

    Rename an old run to OUT.old. On resume, drop the log lines after the checkpoint.
    """
    out = Path(config.out)
    is_finished = (out / "config.json").exists()
    if start == 0 and (is_finished or checkpoints(out)):
        what = "a finished" if is_finished else "an unfinished"
        say(f"{out} holds {what} run: it is now {out}.old")
        shutil.rmtree(f"{out}.old", ignore_errors=True)
        out.rename(f"{out}.old")
    out.mkdir(parents=True, exist_ok=True)
    stale = list(out.glob("checkpoint-*.partial"))
    lines = []
    if start == 0:
        stale += [out / "llm", out / "unaligned"]
    else:
        lines = read_text(out / "log.jsonl").splitlines(True)[:start]  # line k is step k
    (out / "log.jsonl").write_text("".join(lines))
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    np.save(out / "lengths.npy", np.array(lengths))


def save_run(config, vlm, results: dict):
    """Write the finished run. config.json comes last: only with it is this a run, never half of one.

    If the disk is full, the run goes elsewhere: OSError, which says where.
    """
    out = Path(config.out)
    with_llm = config.stage == "instruct"
    shutil.rmtree(out / "llm", ignore_errors=True)  # of a run that was stopped right here
    try:
        with whole(out / "results.json") as building:
            building.write_text(json.dumps(results, indent=2) + "\n")
        vlm.save(out, asdict(config), with_llm)
    except (OSError, ValueError) as error:
        elsewhere = tempfile.mkdtemp()
        vlm.save(elsewhere, asdict(config), with_llm)
        raise OSError(f"{error}; the finished run is in {elsewhere}") from None


def set_last_run(folder):
    """Make `folder` the run that eval.py looks at when none is named."""
    if rank() == 0:
        Path("runs").mkdir(exist_ok=True)
        Path("runs/last").write_text(str(folder))
