"""Files and folders: read whole, written whole, and every error names the file.
"""

import json
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
