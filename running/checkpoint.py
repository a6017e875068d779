"""A run on disk: a run that was stopped goes on as if it had not been, on any number of ranks.

    OUT/checkpoint-STEP/             the model so far, a run directory like OUT itself
    OUT/checkpoint-STEP/rank-R.pt    step, options, masters and moments of rank R (without --shard: of rank 0)
    OUT/checkpoint-STEP/made_of.json fingerprints of records, tokenizer and towers
    OUT/log.jsonl                    a line a step
    OUT/lengths.npy                  the counted tokens of each record, behind a key of what was counted
    OUT/launch                       of which torchrun it is, on each node: what it starts again goes on
    OUT/config.json                  written last: with it the run is finished, and its checkpoints go
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import uuid
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch

from data import find_image, key_of
from plumbing.files import named, old_name, read_json, read_text, whole, write_json
from plumbing.ranks import barrier, launch, on_every_rank, rank, say, world_size

GO_ON = "the same command and --resume go on with it"

# Options that a resumed run may change: they do not touch its weights.
MAY_DIFFER = {"resume", "save_every", "val", "val_every", "workers", "cache", "out"}


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
# One run in one folder, and ranks that agree

OF_A_RUN = ("llm", "unaligned", "projector.safetensors", "config.json", "results.json")
# Options that may differ from machine to machine
PATHS = {"out", "init", "vit", "llm", "annotations", "images", "val", "benchmarks", "features"}


@contextmanager
def locked(config):
    """Hold OUT.lock. ValueError if another run holds it, or if a rank does not see rank 0's folder.

    The system releases the lock when the process ends, however it ends.
    """
    path = Path(f"{Path(config.out)}.lock")
    held = []

    def take():
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.append(lock(path, config.out))
            held[0].write(token)
            held[0].flush()
            os.fsync(held[0].fileno())  # other nodes must see it
        return token

    def see():
        is_seen = path.is_file() and read_text(path) == tokens[0]
        if config.save_every and not is_seen:
            raise ValueError(f"{config.out}: rank {rank()} does not see rank 0's folder; with --save_every, "
                             "all ranks need the same one")

    refuse_foreign(config.out)
    token = uuid.uuid4().hex
    try:
        tokens = on_every_rank(take)
        on_every_rank(see)
        yield
    finally:
        for file in held:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()
            file.close()


def refuse_foreign(*outs):
    """ValueError if a folder holds what a run would remove or overwrite, and no run: it is somebody's. Rank 0
    looks."""
    def look():
        for out in map(Path, outs if rank() == 0 else ()):
            if out.is_file():
                raise ValueError(f"--out {out} is a file; name a folder")
            if out.is_mount() or out.resolve() == Path.cwd():
                raise ValueError(f"--out {out} cannot be renamed, nor locked beside: name a folder in it")
            theirs = [name for name in OF_A_RUN if (out / name).exists()]
            if theirs and not (out / "log.jsonl").exists():
                raise ValueError(f"--out {out} holds {' and '.join(theirs)} and no run: name another folder")

    on_every_rank(look)


def lock(path: Path, out: str):
    """The open file, locked for this process."""
    file = open(path, "a")
    with contextlib.suppress(ImportError, OSError):  # Windows, and some network file systems, have no lock
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another run is writing there") from None
    file.truncate(0)
    if hasattr(os, "register_at_fork"):  # a loader process, which outlives a killed rank, does not hold it
        os.register_at_fork(after_in_child=file.close)
    return file


def agree(facts: dict):
    """ValueError on all ranks, with the first fact that a rank has otherwise than rank 0."""
    everyones = on_every_rank(lambda: facts)
    for number, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise ValueError(f"rank {number} has {name} {theirs[name]!r}, rank 0 has {value!r}")


def agree_on_options(config):
    """ValueError if a rank was started with other options: on several nodes the command is typed several
    times."""
    config.resume = any(on_every_rank(lambda: config.resume))  # rank 0 may be on a node that is new
    own = PATHS | {"workers", "cache"}
    facts = {name: value for name, value in asdict(config).items() if name not in own}
    for name in ("val", "features"):  # the path may be another, but all ranks meet for what it is for
        facts[f"--{name}"] = bool(getattr(config, name))
    agree(facts)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def checkpoints(out) -> list:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("checkpoint-" + 7 * "[0-9]"))


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


def refuse_changes(saved: dict, now: dict, where):
    """ValueError that names the first option that differs from those a run was saved with."""
    for name in sorted(now.keys() - MAY_DIFFER):
        if saved.get(name) != now[name]:
            raise ValueError(f"{where}: saved with {name} {saved.get(name)!r}, resumed with {now[name]!r}")


def is_unfinished(run) -> bool:
    return (Path(run) / "log.jsonl").exists() and not (Path(run) / "config.json").exists()


def is_behind(run, before) -> bool:
    """Whether a run was written to after the run `before` it was finished. If not, it belongs to an older
    one."""
    log = Path(run) / "log.jsonl"
    end = Path(before) / "config.json"
    return log.exists() and end.exists() and log.stat().st_mtime >= end.stat().st_mtime


def is_checkpoint(folder) -> bool:
    """Whether the folder is a checkpoint in its run, and not a copy elsewhere."""
    folder = Path(folder).resolve()
    return folder in checkpoints(folder.parent) and (folder.parent / "log.jsonl").exists()


def latest(run: Path) -> Path:
    """Where the model of a run is: the folder itself or, of a run that is not finished, its last checkpoint.
    Rank 0 looks, because the run may be going on. ValueError if there is no checkpoint yet."""
    def look():
        if rank() > 0 or not is_unfinished(run):
            return run
        found = checkpoints(run)
        if not found:
            raise ValueError(f"{run}: not finished, and without a checkpoint so far; train.py writes one "
                             "every --save_every steps")
        say(f"{run} is not finished: this is the model of its {found[-1].name}; with train.py, {GO_ON}")
        return found[-1]

    return on_every_rank(look)[0]


def is_finished(config) -> bool:
    """Whether the run to be resumed is finished: rank 0 looks. ValueError if there is none, or of other
    options."""
    def look():
        if rank() > 0:
            return None
        if not (Path(config.out) / "log.jsonl").exists():
            raise ValueError(f"{config.out}: no run to resume; type the command that began it, with all its "
                             "options, and --resume; without --resume a run begins there")
        finished = Path(config.out) / "config.json"
        if finished.exists():
            with named(finished):
                saved = read_json(finished)
                refuse_changes(saved, asdict(config), f"{finished}: finished (--init goes on from it)")
            remove_checkpoints(config)  # it was killed before it had done so
        return finished.exists()

    return on_every_rank(look)[0]


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
    """What the ranks saved, checked: of all ranks with --shard, else of rank 0."""
    with named(last, "damaged; without it, the one before is taken"):
        first = read_state(last, 0)
        refuse_changes(allow_more_steps(first["config"], asdict(config), last), asdict(config), last)
        refuse_other(last, made_of)
        check_sums(last, first["ranks"])
        states = [first]
        if config.shard:
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


def open_run(config, start: int, counted: list):
    """Make OUT ready for its first line of log.

    Rename an old run. On resume, drop the log lines after the checkpoint. All ranks call it; rank 0 writes.
    """
    launches = on_every_rank(launch)  # of all nodes: any of them may be rank 0's after a restart
    if rank() > 0:
        return
    out = Path(config.out).resolve()  # a link stays, and leads to the new run
    has_end = (out / "config.json").exists()
    if start == 0 and (has_end or checkpoints(out)):
        what = "a finished" if has_end else "an unfinished"
        old = old_name(out)
        say(f"{out} holds {what} run: it is now {old}")
        out.rename(old)
    out.mkdir(parents=True, exist_ok=True)
    stale = list(out.glob("checkpoint-*.partial"))
    lines = []
    if start == 0:
        stale += [out / "llm", out / "unaligned"]
    else:
        lines = read_text(out / "log.jsonl").splitlines(True)[:start]  # line k is step k
    with whole(out / "log.jsonl") as building:
        building.write_text("".join(lines))
    (out / "launch").write_text("\n".join(launches))
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    with whole(out / "lengths.npy") as building, open(building, "wb") as file:
        np.save(file, np.array(counted))


def seconds_before(config, start: int) -> float:
    """The time of the run before step `start`, from the log: a run may have several parts."""
    if start == 0:
        return 0.0
    log = Path(config.out) / "log.jsonl"
    with named(log):
        return json.loads(read_text(log).splitlines()[start - 1])["seconds"]


def first_start(config) -> str:
    """When the first part of the run began, from the log."""
    line = json.loads(read_text(Path(config.out) / "log.jsonl").partition("\n")[0])
    start = datetime.fromisoformat(line["time"]) - timedelta(seconds=line["seconds"])
    return start.isoformat(timespec="seconds")


def save_run(config, vlm, results: dict):
    """Write the finished run. config.json comes last: only with it is this a run, never half of one. Then its
    checkpoints are of no use.

    If the disk is full, the run goes elsewhere: OSError, which says where.
    """
    out = Path(config.out)
    with_llm = config.stage == "instruct"
    shutil.rmtree(out / "llm", ignore_errors=True)  # of a run that was stopped right here
    try:
        write_json(out / "results.json", results)
        vlm.save(out, asdict(config), with_llm)
    except (OSError, ValueError) as error:
        elsewhere = tempfile.mkdtemp()
        vlm.save(elsewhere, asdict(config), with_llm)
        raise OSError(f"{error}; the finished run is in {elsewhere}") from None
    remove_checkpoints(config)


def remove_checkpoints(config):
    """Remove the checkpoints of a finished run, once that is on the disk."""
    found = checkpoints(config.out)
    if found and hasattr(os, "sync"):  # not on Windows
        os.sync()
    for folder in found:
        shutil.rmtree(folder)
    if found:
        say(f"{config.out} is finished; its checkpoints are removed")


def set_last_run(folder):
    """Make `folder` the run that eval.py looks at when none is named."""
    if rank() == 0:
        with contextlib.suppress(OSError, ValueError):  # where nothing can be written, eval.py needs --ckpt
            Path("runs").mkdir(exist_ok=True)
            Path("runs/last").write_text(str(folder))
