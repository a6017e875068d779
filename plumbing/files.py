"""Files and folders: read whole, written whole, and every error names the file.
"""

import csv
import io
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def named(what, problem: str = ""):
    """Whatever a decoder, a tokenizer or a serialiser raises within becomes a ValueError of one line: `what`,
    a file or a record, the problem, and the error. One that begins with `what` already stays as it is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panic of a library in Rust is no Exception
        is_plain, text = isinstance(error, (OSError, ValueError)), " ".join(str(error).split())
        if is_plain and text.startswith(str(what)):
            raise
        kind = "" if is_plain and text else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {problem and problem + ': '}{kind}{text[:400]}") from error


@contextmanager
def whole(path):
    """Yield a name beside `path` to write to: what is written there becomes `path` when all of it is, and is
    gone when it cannot be, as on a full disk."""
    building = Path(f"{path}.partial")
    try:
        with named(path, "not written"):
            yield building
            building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def read_text(path) -> str:
    """A file in UTF-8, with or without the mark that some editors put first; an error names it."""
    if not Path(path).is_file():
        if Path(path).exists():
            raise ValueError(f"{path}: not a file")  # a folder; or a pipe, which would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    with named(path, "not UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path):
    """The file's content; an error that names the file if it is missing or is not JSON."""
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


MODEL_FILES = ("*.json", "*.jinja", "*.safetensors")  # also those of a run directory, where some lie deeper
TOKENIZER_FILES = ("*token*", "*.jinja", "vocab*", "merges*")  # whatever its kind


def resolve(folder_or_id, patterns) -> Path:
    """A local folder (as given, or below this project), else a folder with the files of a Hub id that fit one
    of the patterns (HF_HUB_OFFLINE=1 works). FileNotFoundError if there is neither."""
    for folder in (Path(folder_or_id), ROOT / folder_or_id):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download  # imported late: only those who download need it
    try:  # consolidated*: the same weights in Mistral's own form
        return Path(snapshot_download(str(folder_or_id), allow_patterns=list(patterns),
                                      ignore_patterns=["consolidated*"]))
    except Exception as error:  # whatever the network says, the reader needs the name that was not found
        raise FileNotFoundError(f"{folder_or_id}: no such folder, and the Hub does not give it "
                                f"({type(error).__name__}: {str(error).strip().splitlines()[0]})") from error


def resolve_model(folder_or_id) -> Path:
    """Like `resolve`, for a folder with weights; .bin files are fetched only where there are no
    safetensors."""
    folder = resolve(folder_or_id, MODEL_FILES)
    has_weights = any(folder.glob("*.safetensors"))
    return folder if has_weights else resolve(folder_or_id, ("*.json", "pytorch_model*.bin"))
