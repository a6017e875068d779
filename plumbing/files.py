"""Files and folders: found, read whole, written whole. Every error names the file.
"""

import itertools
import json
import os
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent  # this project
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors")  # a run directory has some of them in folders below
TOKENIZER_FILES = ("*token*", "*.jinja", "vocab*", "merges*")  # of SentencePiece, BPE, chat templates


@contextmanager
def named(what, problem: str = ""):
    """Turn any error in this block into a one-line ValueError `{what}: {problem}: {error}`.

    An OSError or ValueError that starts with `what` already passes unchanged.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panic of a library in Rust is no Exception
        is_plain = isinstance(error, (OSError, ValueError))
        text = " ".join(str(error).split())
        if is_plain and text.startswith(str(what)):
            raise
        if not is_plain or not text:
            text = f"{type(error).__name__}: {text}"
        if problem:
            text = f"{problem}: {text}"
        raise ValueError(f"{what}: {text[:400]}") from error


@contextmanager
def whole(path):
    """Write to a temporary file and rename it, so that `path` is either complete, also on the disk, or as it
    was before.

    Its mode is that of any new file, by the umask. safetensors' writer would keep others from reading it.
    """
    building = Path(f"{path}.partial")
    try:
        with named(path, "not written"):
            building.touch()
            mode = building.stat().st_mode
            yield building
            building.chmod(mode)
            with open(building, "r+b") as file:
                os.fsync(file.fileno())  # only now a network's disk tells that it is full
            building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def write_json(path, content):
    with whole(path) as building:
        building.write_text(json.dumps(content, indent=2) + "\n")


def copy_files(source: Path, patterns, target: Path):
    """Copy the content of the files in folder `source` that fit a pattern into folder `target`."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def read_text(path) -> str:
    """The file's text, without a byte order mark."""
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path}: not a file")  # a folder, or a pipe, which would make us wait
        raise FileNotFoundError(f"{path}: no such file")
    with named(path, "not UTF-8"):
        return path.read_text(encoding="utf-8-sig")


def old_name(path) -> Path:
    """PATH.old, or the first of PATH.old2, PATH.old3 .. that is free: what is finished is never deleted."""
    names = (Path(f"{path}.old{number}") for number in itertools.chain([""], itertools.count(2)))
    return next(name for name in names if not name.exists())


def read_json(path):
    text = read_text(path)
    with named(path, "not JSON"):
        return json.loads(text)


def resolve(folder_or_id, patterns) -> Path:
    """A local folder, as given or below this project. If there is none, download the files of this Hub id
    that fit a pattern, and return their folder. With HF_HUB_OFFLINE=1 they come from the Hub's cache."""
    for folder in (Path(folder_or_id), ROOT / folder_or_id):
        if folder.is_dir():
            return folder
    try:
        return download(str(folder_or_id), tuple(patterns))
    except Exception as error:  # of many kinds; the reader needs the name that was not found
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__}: {reason})") from error


@cache
def download(hub_id: str, patterns: tuple) -> Path:
    """The folder of a Hub id's files. The Hub is asked once: no network is needed to save a checkpoint."""
    from huggingface_hub import snapshot_download  # imported late: only a download needs it
    mistrals_own_form = ["consolidated*"]  # the same weights once more
    return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=mistrals_own_form))


def resolve_model(folder_or_id) -> Path:
    """Like `resolve`, for a folder with weights. Downloads .bin files only if there are no safetensors."""
    folder = resolve(folder_or_id, MODEL_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return resolve(folder_or_id, ("*.json", "pytorch_model*.bin", "mm_projector.bin"))
