"""Kills at random instants: do they cost anything?

    python tests/kills.py [KILLS]

Runs of a small model, one process and two, that save a checkpoint after every step (sharded on two), are
killed with SIGKILL at a random instant, while they save among others, and resumed. Prints how many of
them end with the log and the weights of the undisturbed run, bit for bit. About 15 s a kill.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(out, world: int, *args) -> list:
    launch = []
    if world > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--rdzv_backend=c10d",
                  "--rdzv_endpoint=localhost:0"]
    options = ["--preset", "tiny", "--stage", "align", "--steps", "24", "--batch", "8", "--micro_batch", "4",
               "--save_every", "1", "--shard", str(world > 1), "--workers", "1", "--cache", "False",
               "--out", out]
    return [sys.executable, *launch, ROOT / "train.py", *options, *args]


def run(out, world: int, *args) -> str:
    parts = command(out, world, *args)
    return subprocess.run(parts, capture_output=True, text=True, check=True, timeout=300).stdout


def ranks_of(process) -> list:
    """The ids of the processes that it started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_within(out, world: int, seconds: float) -> bool:
    """Start a run and kill all its processes so many seconds after its first step; False if it was faster."""
    process = subprocess.Popen(command(out, world), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint-0000001").exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    pids = ranks_of(process) if process.poll() is None else []
    for pid in (process.pid, *pids) if world > 1 else (process.pid,):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    deadline = time.time() + 10  # those of a killed torchrun are no children of ours
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.time() < deadline:
        time.sleep(0.01)
    return not (out / "config.json").exists()


def kept(out) -> tuple:
    """The log, without what differs from one time to the next, and the bytes of the weights."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    differ = ("ms", "wait_ms", "memory_mib", "time", "seconds")
    log = [{key: value for key, value in line.items() if key not in differ} for line in lines]
    return log, {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


def main(kills: int = 20) -> dict:
    """{"kills", "equal", "while saving"}: how many runs ended as the undisturbed one, how many left half a
    checkpoint."""
    rng, result = random.Random(0), {"kills": 0, "equal": 0, "while saving": 0}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            whole = Path(folder) / f"whole-{world}"
            run(whole, world)
            times = [json.loads(line)["ms"] for line in (whole / "log.jsonl").read_text().splitlines()[1:]]
            number = 0
            while number < kills // 2:
                cut = Path(folder) / f"cut-{world}-{result['kills']}-{rng.random()}"
                if not kill_within(cut, world, rng.uniform(0, 1.5 * sum(times) / 1000)):
                    continue
                number, result["kills"] = number + 1, result["kills"] + 1
                result["while saving"] += any(cut.glob("*.partial"))
                run(cut, world, "--resume")
                result["equal"] += kept(cut) == kept(whole)
                print(f"ranks {world}, kill {number}: {result}", flush=True)
    return result


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
