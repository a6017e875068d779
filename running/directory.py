"""A run directory: whose it is, what it was left as, and how a run begins and ends in it.

    OUT.lock            held by the run that writes
    OUT/log.jsonl       a line a step
    OUT/launch          of which torchrun it is, on each node: what it starts again goes on
    OUT/checkpoint-..   see checkpoint.py
    OUT/config.json     written last: with it the run is finished, and its checkpoints go
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from plumbing.files import named, old_name, read_json, read_text, whole, write_json
from plumbing.ranks import agree, launch, on_every_rank, rank, say
from running.checkpoint import GO_ON, checkpoints, refuse_changes

OF_A_RUN = ("llm", "unaligned", "projector.safetensors", "config.json", "results.json")
# Options that may differ from machine to machine
OF_A_MACHINE = {"out", "init", "vit", "llm", "annotations", "images", "val", "benchmarks", "features",
                "workers", "cache"}


# ------------------------------------------------------------------------------------------------------------
# One run in one folder, of which all ranks know

def refuse_foreign(*outs):
    """ValueError if a folder holds what a run would remove or overwrite, and no run: it is somebody's. Rank 0
    looks."""
    def look():
        for out in map(Path, outs if rank() == 0 else ()):
            if out.is_file():
                raise ValueError(f"--out {out} is a file; name a folder")
            if os.path.ismount(out.resolve()) or out.resolve() == Path.cwd():
                raise ValueError(f"--out {out} cannot be renamed, nor locked beside: name a folder in it")
            theirs = [name for name in OF_A_RUN if (out / name).exists()]
            if theirs and not (out / "log.jsonl").exists():
                raise ValueError(f"--out {out} holds {' and '.join(theirs)} and no run: name another folder")

    on_every_rank(look)


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


def agree_on_options(config):
    """ValueError if a rank was started with other options: on several nodes the command is typed several
    times."""
    config.resume = any(on_every_rank(lambda: config.resume))  # rank 0 may be on a node that is new
    facts = {name: value for name, value in asdict(config).items() if name not in OF_A_MACHINE}
    for name in ("val", "features"):  # the path may be another, but all ranks meet for what it is for
        facts[f"--{name}"] = bool(getattr(config, name))
    agree(facts)


# ------------------------------------------------------------------------------------------------------------
# What a folder holds

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


# ------------------------------------------------------------------------------------------------------------
# From its first line of log to the finished run

def open_run(config, start: int):
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


def seconds_before(config, start: int) -> float:
    """The time of the run before step `start`, from the log: a run may have several parts."""
    if start == 0:
        return 0.0
    log = Path(config.out) / "log.jsonl"
    with named(log):
        return json.loads(read_text(log).splitlines()[start - 1])["seconds"]


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
