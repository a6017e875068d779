"""train.py and eval.py as people call them: in this process, or in processes of their own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoints_kept

import eval as evaluation
import train
from running import checkpoint, options


def called(main, folder, *args):
    """What the script whose `main` is given prints in `folder` with these arguments."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        main([str(arg) for arg in args])
    return out.getvalue()


def trained(world, *args):
    """What train.py prints, in the folder and with the options of `world`."""
    return called(train.main, world[0], *world[1], *args)


def asked(world, *args):
    """The JSON lines that eval.py prints."""
    lines = called(evaluation.main, world[0], *args).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def how_it_ends(main, folder, *args):
    """The one line with which the script refuses."""
    with pytest.raises(SystemExit) as end:
        called(main, folder, *args)
    return str(end.value.code)


def refused(world, *args) -> str:
    """The one line with which train.py refuses."""
    said = how_it_ends(train.main, world[0], *world[1], *args)
    assert "\n" not in said
    return said


def lines_of(folder) -> list:
    """The lines of the run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log_of(folder) -> list:
    """The same, without what differs from one time to the next."""
    differ = ("ms", "wait_ms", "memory_mib", "time", "seconds")
    return [{key: value for key, value in line.items() if key not in differ} for line in lines_of(folder)]


def unfinished(align, out):
    """A run that has gone four of six steps."""
    with checkpoints_kept():
        trained(align, "--out", out)
    (align[0] / out / "config.json").unlink()
    shutil.rmtree(align[0] / out / "checkpoint-0000006", ignore_errors=True)
    assert [folder.name for folder in checkpoint.checkpoints(align[0] / out)][-1] == "checkpoint-0000004"


def without(options, *names) -> list:
    """The options without some of them."""
    kept = list(options)
    for name in names:
        place = kept.index(name)
        del kept[place : place + 2]
    return kept


HERE = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # a rendezvous of one agent, on any free port


def command(world, *args, launch=()):
    """How `python train.py` is started, or, with `launch`, torchrun; with the options and in the folder of
    `world`."""
    launch = ["-m", "torch.distributed.run", *launch] if launch else []
    parts = [sys.executable, *launch, ROOT / "train.py", *world[1], *args]
    return {"args": [str(part) for part in parts], "cwd": world[0]}


def script(world, *args, launch=(), check=True):
    """Run to the end; an exit status other than 0 fails the test, unless that is what it is about."""
    run = subprocess.run(**command(world, *args, launch=launch), capture_output=True, text=True, timeout=240)
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def start(world, *args, launch=(), stderr=subprocess.DEVNULL):
    """Run in the background, in a process group of its own."""
    return subprocess.Popen(**command(world, *args, launch=launch), start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=stderr)


def wait_for_checkpoint(folder):
    """Until there are at least two, so that the next one removes the oldest while we kill."""
    deadline = time.time() + 120
    while len(list(folder.glob("checkpoint-???????"))) < 2:
        assert not (folder / "config.json").exists(), f"{folder} was finished too soon to be killed"
        assert time.time() < deadline, f"no checkpoints in {folder}"
        time.sleep(0.005)


def children(process):
    """The ids of the processes that it started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill(process):
    """kill -9, of the process and of those that it started: torchrun's ranks would go on without it."""
    ranks = children(process)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_running(pid) for pid in ranks):
        time.sleep(0.01)


def is_running(pid):
    """Neither gone nor waiting for its end to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stage_of_rank(rank, world, folder, argv):
    """train.py, in a process that is one of several ranks already."""
    os.chdir(folder)
    given = options.parse_args([str(arg) for arg in argv])
    train.train_stage(options.configure(given["stage"], given), torch.device("cpu"))
