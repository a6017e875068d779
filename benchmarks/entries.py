"""Find a benchmark's files and read their entries: JSON, JSON lines, or tables."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

from plumbing.files import named, read_text

ID = (int, str)  # the types that an id may have

# Excel (MMBench) and Parquet (MMMU) need packages that we do not have. These lines of pandas convert them.
CONVERT = {
    ".tsv": (".xlsx", 'pandas.read_excel("IN", keep_default_na=False).to_csv("OUT.tsv", sep="\\t", '
             'index=False)'),
    ".json*": (".parquet", 'json.dump(pandas.read_parquet("IN").to_dict("records"), open("OUT.json", "w"), '
               'default=lambda x: base64.b64encode(x).decode() if isinstance(x, bytes) else x.tolist())'),
}


def find_files(folder, pattern: str) -> list:
    """The sorted files of a folder that fit the pattern, without macOS's `._x`.

    FileNotFoundError if there are none, or if a folder has only Parquet or Excel files in their place. It
    says how to convert these.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))
    unread_suffix, how = CONVERT.get(Path(pattern).suffix, (None, None))
    unread = unread_files(folder, pattern, files, unread_suffix) if how else []
    if unread:
        where = unread[0].parent if files else folder
        raise FileNotFoundError(f"{where}: no {pattern}; {unread[0]} is not read here, but {how} converts it")
    if not files:
        raise FileNotFoundError(f"{folder}: no {pattern}")
    return files


def unread_files(folder: Path, pattern: str, files: list, suffix: str) -> list:
    """The sorted files with this suffix in folders that have none of `files`."""
    done = {file.parent for file in files}
    same_name = str(Path(pattern).with_suffix(suffix))
    unread = folder.glob(same_name if files else f"**/*{suffix}")
    return sorted(file for file in unread if file.parent not in done)


def first_folder(*folders) -> Path:
    """The first that is there, or the last."""
    return next(filter(Path.is_dir, folders), folders[-1])


def find_entries(folder, pattern: str, **kinds):
    """Yield (file, entry) for every entry of every file that fits. `kinds`: see `read_entries`."""
    for file in find_files(folder, pattern):
        for entry in read_entries(file, **kinds):
            yield file, entry


def read_entries(file: Path, **kinds) -> list:
    """The entries of a file: dicts, each with all keys of `kinds`, whose values have these types.

    The file is a JSON list (maybe below "questions" or "data"), a JSON dict of dicts (whose names become
    "id"), JSON lines, or a table (.tsv).
    """
    text = read_text(file)
    with named(file):
        if file.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # a picture is one field
            lines = io.StringIO(text, newline="")
            entries = list(csv.DictReader(lines, delimiter="\t", strict=True))  # a quote has an end
        else:
            entries = parse_entries(text)
            if file.suffix == ".jsonl" and isinstance(entries, dict):  # it is of one line
                entries = [entries]
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
