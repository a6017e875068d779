"""Files and folders: found, read whole, written whole. Every error names the file.
"""

import csv
import io
import itertools
import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
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


def read_entries(file: Path, **kinds) -> list:
    """The entries of a file: dicts, each with all keys of `kinds`, whose values have these types.

    The file is a JSON list (maybe below "questions" or "data"), a JSON dict of dicts (whose names become
    "id"), JSON lines, or a table (.tsv).
    """
    text = read_text(file)
    with named(file):
        if file.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # a picture is one field
            entries = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
        else:
            entries = parse_entries(text)
    if isinstance(entries, dict):
        entries = entries.get("questions") or entries.get("data") or entries_by_name(entries)
    if not isinstance(entries, list):
        raise ValueError(f"{file}: not a list of entries")
    for number, entry in enumerate(entries, start=1):
        for key, kind in kinds.items():
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"{file}: entry {number} has no {key!r}")
            value = entry[key]
            if not isinstance(value, kind) or isinstance(value, bool):  # for Python, a bool is an int
                raise ValueError(f"{file}: entry {number} has {value!r:.60} as its {key!r}")
    return entries


def parse_entries(text: str):
    """JSON, or the list of JSON lines. Their file may be called .json, too."""
    def parse(text):
        return json.loads(text, object_pairs_hook=without_repeats)

    try:
        return parse(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # behind the first line
            raise
    return [parse(line) for line in text.split("\n") if line.strip()]


def entries_by_name(named_entries: dict) -> list:
    """The dicts of a dict, with their names as "id"; a dict that has none is an entry itself."""
    entries = []
    for name, entry in named_entries.items():
        entries.append({"id": name, **entry} if isinstance(entry, dict) else entry)
    has_dicts = any(isinstance(entry, dict) for entry in entries)
    return entries if has_dicts else [named_entries]


def without_repeats(pairs) -> dict:
    """A JSON object. ValueError if a name is there twice: Python would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name!r} is there twice")
    return found


def resolve(folder_or_id, patterns) -> Path:
    """A local folder, as given or below this project. If there is none, download the files of this Hub id
    that fit a pattern, and return their folder. With HF_HUB_OFFLINE=1 they come from the Hub's cache."""
    for folder in (Path(folder_or_id), ROOT / folder_or_id):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download  # imported late: only a download needs it
    try:
        mistrals_own_form = ["consolidated*"]  # the same weights once more
        return Path(snapshot_download(
            str(folder_or_id), allow_patterns=list(patterns), ignore_patterns=mistrals_own_form))
    except Exception as error:  # of many kinds; the reader needs the name that was not found
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__}: {reason})") from error


def resolve_model(folder_or_id) -> Path:
    """Like `resolve`, for a folder with weights. Downloads .bin files only if there are no safetensors."""
    folder = resolve(folder_or_id, MODEL_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return resolve(folder_or_id, ("*.json", "pytorch_model*.bin", "mm_projector.bin"))
