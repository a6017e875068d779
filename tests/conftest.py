"""Shared by all tests: repeatable arithmetic, the project on the path, a small toy world, tiny random models
of transformers' own on disk, parity with these, and processes for the tests of several ranks."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from multiprocessing.connection import wait
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster so, here and in every process that a test starts
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import torch.distributed as dist
import transformers

from lab import toy_world
from plumbing.ranks import leave_ranks
from plumbing.tokenizer import load_tokenizer
from projector import VLM
from running import directory

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs real weights and further packages; run with -m real")
    config.addinivalue_line("markers", "kills: twenty runs that are killed and resumed; run with -m kills")
    config.addinivalue_line("markers", "compiler: compiles for a minute, with g++; run with -m compiler")
    config.addinivalue_line("markers", "exercise: grades an extension to be written; run with -m exercise")
    config.addinivalue_line("markers", "mutants: wrong answers to the exercises; run with -m mutants")


def pytest_collection_modifyitems(config, items):
    names = "real", "kills", "compiler", "exercise", "mutants"
    opt_in = [name for name in names if name not in config.option.markexpr]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, opt_in))]
    if HELPS:  # files from behind, the tests of a file in their order
        items.sort(key=lambda item: item.path, reverse=True)


# ---- a helper ----------------------------------------------------------------------------------------------
#
# A second process runs the same command and begins with the last file. A file is his who first makes a folder
# of its name in CLAIMS.

HELPS = os.environ.pop("CLAIMS_OF_TESTS", "")  # popped: a test that starts pytest is none of it
FEW_FILES = 10  # need no helper
ALONE = "collectonly", "usepdb", "xmlpath", "lf", "failedfirst"  # options for one process
MINE = {}  # file: whether this process runs it


def pytest_collection_finish(session):
    config, files = session.config, {item.path for item in session.items}
    config.claims, session.helper = Path(HELPS) if HELPS else None, None
    alone = any(getattr(config.option, name, False) for name in ALONE)  # a plugin left out has no options
    if HELPS or alone or len(files) <= FEW_FILES or os.cpu_count() == 1:
        return
    config.claims = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "-o",
               f"cache_dir={config.claims}/cache"]
    env = os.environ | {"CLAIMS_OF_TESTS": str(config.claims)}
    nothing, both = subprocess.DEVNULL, subprocess.STDOUT
    with open(config.claims / "said", "w") as said:
        session.helper = subprocess.Popen(command, env=env, stdin=nothing, stdout=said, stderr=both)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """True: nothing is left to do, because the file is the other one's."""
    claims = item.config.claims
    if claims and item.path not in MINE:
        try:
            (claims / item.path.name).mkdir()
            MINE[item.path] = True
        except FileExistsError:
            MINE[item.path] = False
    return None if MINE.get(item.path, True) else True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    helper, claims = getattr(session, "helper", None), getattr(session.config, "claims", None)
    if helper is None:
        return
    if session.shouldfail or session.shouldstop:
        helper.terminate()
    session.exitstatus = session.exitstatus or abs(helper.wait())
    print(f"\n\nThe helper's part:\n{(claims / 'said').read_text()}\nOur own:")
    failed = claims / "cache/v/cache/lastfailed"
    if failed.exists():  # for --lf
        session.config.pluginmanager.get_plugin("lfplugin").lastfailed.update(json.loads(failed.read_text()))
    shutil.rmtree(claims)


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@contextmanager
def checkpoints_kept():
    """Runs in here end as if they were killed behind config.json. Without that file they are unfinished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "remove_checkpoints", lambda config: None)
        yield


# ---- exercises ---------------------------------------------------------------------------------------------


def grades(what: str):
    """For a test that grades an exercise: whatever `what` raises is said in one sentence, and where."""
    def decorate(test):
        @wraps(test)
        def graded(*args, **named):
            __tracebackhide__ = True
            try:
                test(*args, **named)
            except AssertionError:
                raise
            except Exception as error:
                said = f"{what} raised {type(error).__name__}: {error}"
                raise AssertionError(said).with_traceback(error.__traceback__) from None
        return graded
    return decorate


def refusal(function, *args) -> str:
    """What the ValueError of a call says; of a call that ends well, nothing."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "toy"
    toy_world.write_world(folder, align=40, instruct=40, text=10, test=40)
    return folder


@pytest.fixture(scope="session")
def tokenizer(llama_folder):
    """The toy world's."""
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP vision tower of transformers: 16 patches of an image of 32, width 32, 3 blocks."""
    torch.manual_seed(1)
    config = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                           num_attention_heads=4, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("clip")
    shaken(transformers.CLIPVisionModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A random Llama of transformers, with the toy world's tokenizer: width 32, 2 blocks, 4 heads on 2."""
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama_folder(tmp_path_factory):
    """The same with a head that is the embedding table itself."""
    return random_llama(tmp_path_factory.mktemp("tied-llama"), tie_word_embeddings=True)


@pytest.fixture
def linear_vlm(clip_folder, llama_folder):
    return VLM.from_towers(clip_folder, llama_folder, "linear")


def random_llama(folder, **changes):
    toy_world.write_tokenizer(folder)
    config = llama_config(vocab_size=toy_world.VOCABULARY, **changes)
    torch.manual_seed(1)  # else the tests that ran before would choose its weights
    shaken(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def llama_config(**changes):
    sizes = dict(vocab_size=75, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
                 rope_theta=10000.0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaConfig(**(sizes | changes))


def shaken(model):
    """The model with every parameter moved: a norm left at 1, a bias left at 0 would hide that nobody loads
    it."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder, llama_folder):
    """(a folder to run in, with a small toy world where the tiny preset looks for it; options: random towers,
    small batches)."""
    folder = tmp_path_factory.mktemp("run")
    toy_world.write_world(folder / "data/toy", align=24, instruct=24, text=4, test=8)
    return folder, ["--preset", "tiny", "--vit", clip_folder, "--llm", llama_folder, "--batch", "8",
                    "--micro_batch", "4", "--epochs", "2"]


@pytest.fixture(scope="module")
def align(world):
    """(the folder of `world`, options of a short align run)."""
    folder, options = world
    return folder, ["--stage", "align", *options, "--save_every", "2"]


# ---- parity with transformers ------------------------------------------------------------------------------


def relative_difference(ours, theirs) -> float:
    """The largest, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def assert_close(ours, theirs, tolerance=1e-5):
    difference = relative_difference(ours, theirs)
    assert difference < tolerance, f"relative difference {difference:.1e}"


@contextmanager
def layer_by_layer(ours, theirs, rename=str):
    """In here both models are run on one input and compared. An assertion that fails brings a table of what
    each module has computed, in our order. `rename` gives our name of a parameter of theirs."""
    found, hooks = ({}, {}), []  # ours, theirs: our name of a module -> its last output

    def keep(outputs, name, module, args, output):
        output = getattr(output, "logits", output)  # of their whole model
        if isinstance(output, torch.Tensor):
            outputs[name] = output.detach()

    for model, outputs, our_name in zip((ours, theirs), found, (str, rename)):
        for name, module in model.named_modules():
            if name:
                name = our_name(f"{name}.weight").removesuffix(".weight") or f"theirs: {name}"
            if not name or [*module.parameters(recurse=False)]:  # only parameters have names that are known
                hooks.append(module.register_forward_hook(partial(keep, outputs, name)))
    try:
        yield
    except AssertionError as error:
        error.args = (f"{error}\n{parity_table(*found)}",)
        raise
    finally:
        for hook in hooks:
            hook.remove()


def parity_table(ours: dict, theirs: dict, tolerance=1e-5) -> str:
    """A line for each module of both. The first wrong one is marked: it, or what is computed between the line
    above and it (RoPE, a sum), is the cause; those behind it have a wrong input."""
    lines, mark = [f"{'module':<46} {'ours':<18} {'theirs':<18} relative difference"], "  <- first wrong"
    for name in ours:
        if name in theirs:
            mine, other = ours[name], theirs[name]
            difference = relative_difference(mine, other) if mine.shape == other.shape else math.inf
            shapes = f"{str((*mine.shape,)):<18} {str((*other.shape,)):<18}"
            is_wrong = not difference < tolerance  # nan, too
            lines.append(f"{name or 'the whole':<46} {shapes} {difference:.1e}{mark * is_wrong}")
            mark = "" if is_wrong else mark
    return "\n".join(lines)


def first_wrong(error) -> str:
    """The module that the table in an error's message marks."""
    row, = [row for row in str(error.value).splitlines() if "<- first wrong" in row]
    return row.split()[0]


# ---- several ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`ranks(world, function, *args)`: what `function(rank, world, *args)` returns on each of `world` ranks.

    A process is started once, by the first test that needs it: to start one, and to import PyTorch in it,
    takes seconds. Each test gets a process group of its own. `function` must be one that another process can
    import.
    """
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool.run
    pool.stop()


class Ranks:
    def __init__(self, folder):
        self.folder, self.groups, self.workers = folder, 0, []

    def run(self, world, function, *args, seconds=120):
        self.start(world)
        self.groups += 1  # each group meets at a file of its own
        task = pickle.dumps((function, world, args, f"file://{self.folder}/{self.groups}"))
        connections = [connection for _, connection in self.workers[:world]]
        for connection in connections:
            connection.send_bytes(task)
        try:
            return self.collect(connections, time.monotonic() + seconds)
        except BaseException:
            self.stop()  # the other ranks may wait for one that is gone; the next test gets new processes
            raise

    def collect(self, connections, deadline):
        """What the ranks send, in their order; the first error that one of them sends."""
        results = {}
        while len(results) < len(connections):
            awaited = [connection for connection in connections if connection not in results]
            ready = wait(awaited, max(0, deadline - time.monotonic()))
            if not ready:
                late = [connections.index(connection) for connection in awaited]
                raise TimeoutError(f"no answer of ranks {late}: what they wait for, another does not send")
            for connection in ready:
                try:
                    is_error, results[connection] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    is_error, results[connection] = True, "it has died"
                if is_error:
                    raise RuntimeError(f"rank {connections.index(connection)} failed: {results[connection]}")
        return [results[connection] for connection in connections]

    def start(self, world):
        context = torch.multiprocessing.get_context("spawn")
        for rank in range(len(self.workers), world):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(rank, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append((worker, ours))

    def stop(self):
        for worker, connection in self.workers:
            worker.kill()
            worker.join()
            connection.close()
        self.workers = []


def serve(rank, connection):
    """The life of a process of the pool: one task after another, until it is killed."""
    torch.set_num_threads(1)
    while True:
        task = connection.recv_bytes()
        try:
            function, world, args, place = pickle.loads(task)
            dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world,
                                    timeout=timedelta(seconds=100))
            result = function(rank, world, *args)
            dist.barrier()  # nobody leaves while another still listens: gloo may abort then
            leave_ranks()
            answer = pickle.dumps((False, result))
        except BaseException as error:
            answer = pickle.dumps((True, f"{error!r}\n{traceback.format_exc()}"))
        connection.send_bytes(answer)
