"""Several nodes, and ranks that torchrun starts again: its store and an older run are no traps."""

import os
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch.distributed as dist
from scripts import children, kill, log_of, stage_of_rank, start, wait_for_checkpoint

from plumbing.ranks import fresh
from running import directory
from running.options import configure


@pytest.fixture
def nodes():
    """`nodes(worlds, *args)` starts train.py by a torchrun for each node, in its folder and with its options.
    What is still running at the end is killed."""
    agents = []

    def start_all(worlds, *args, restarts=0):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launch = [f"--nnodes={len(worlds)}", "--nproc_per_node=1", "--rdzv_backend=c10d",
                  f"--rdzv_endpoint=localhost:{port}", f"--max-restarts={restarts}"]
        agents.extend(start(node, *args, launch=launch, stderr=subprocess.PIPE) for node in worlds)
        return agents

    yield start_all
    for agent in agents:
        if agent.poll() is None:
            kill(agent)


def said_by(agents) -> list:
    """What each prints to stderr, once all have ended."""
    deadline = time.monotonic() + 120
    return [agent.communicate(timeout=deadline - time.monotonic())[1].decode() for agent in agents]


def test_two_nodes_do_what_one_does_and_go_on_after_a_kill(world, ranks, nodes, tmp_path):
    """A worker is killed, both nodes start theirs again: the log and the weights are those of two ranks on
    one node, bit for bit."""
    options = ["--stage", "align", "--epochs", "8", "--save_every", "1", "--out"]
    agents = nodes([world, world], *options, tmp_path / "cut", restarts=1)
    wait_for_checkpoint(tmp_path / "cut")
    worker, = children(agents[1])
    os.kill(worker, signal.SIGKILL)
    before = (tmp_path / "cut/log.jsonl").read_text()
    ranks(2, stage_of_rank, world[0], [*world[1], *options, tmp_path / "whole"])
    said = said_by(agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    first_steps = "".join(before.splitlines(True)[:2])
    assert (tmp_path / "cut/log.jsonl").read_text().startswith(first_steps), "it began anew"
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    ours, theirs = ((tmp_path / name / "projector.safetensors").read_bytes() for name in ("cut", "whole"))
    assert ours == theirs and not (tmp_path / "cut.old").exists()


def test_nodes_without_a_shared_folder_end_in_a_line(world, nodes, tmp_path):
    worlds = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        data = ["--annotations", world[0] / "data/toy/align.json", "--images", world[0] / "data/toy/images"]
        worlds.append((tmp_path / name, [*world[1], *data]))
    agents = nodes(worlds, "--stage", "align", "--save_every", "1", "--out", "run")
    said = "".join(said_by(agents))
    line = "run: rank 1 does not see rank 0's folder; with --save_every, all ranks need the same one\n"
    assert f"train.py: rank 0: {line}" in said and 'train.py", line' not in said  # no traceback of ours
    assert all(agent.returncode for agent in agents) and not list(tmp_path.glob("*/run"))


def test_ranks_that_are_started_again_find_nothing_of_the_dead():
    """And none waits for one that is gone: a rank that died before all had met left its word."""
    store = dist.HashStore()
    for attempt in ("first", "second"):
        found = {}

        def meet(rank, found=found):
            found[rank] = fresh(store, rank, 3)

        store.set("word/2", "of a dead one")
        threads = [threading.Thread(target=meet, args=[rank], daemon=True) for rank in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)  # so that the others read that word
        for thread in threads:
            thread.join(10)
        assert not found[1].check(["address"]) and not found[2].check(["address"])
        found[0].set("address", attempt)
        assert [found[rank].get("address").decode() for rank in range(3)] == 3 * [attempt]


def test_a_restart_goes_on_with_nothing_but_what_this_torchrun_began(tmp_path, monkeypatch):
    """A start that fails is no reason to go on with the older run that lies there."""
    given = {"preset": "tiny", "out": str(tmp_path / "run")}
    for logs, resumes in (("a/attempt_0", False), ("a/attempt_1", True), ("b/attempt_1", False), ("", False)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", logs and f"/tmp/{logs}/0/error.json")
        config = configure("align", given)
        assert config.resume == resumes
        if logs == "a/attempt_0":
            directory.open_run(config, 0)
