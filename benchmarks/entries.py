"""Find a benchmark's files and read their entries: JSON, JSON lines, or tables."""

from pathlib import Path

from plumbing.files import read_entries

ID = (int, str)  # the types that an id may have

# Excel (MMBench) and Parquet (MMMU) need packages that we do not have. These lines of pandas convert them.
CONVERT = {
    ".tsv": (".xlsx", 'pandas.read_excel("IN", keep_default_na=False).to_csv("OUT.tsv", sep="\\t", '
             'index=False)'),
    ".json*": (".parquet", 'json.dump(pandas.read_parquet("IN").to_dict("records"), open("OUT.json", "w"), '
               'default=lambda x: base64.b64encode(x).decode() if isinstance(x, bytes) else x.tolist())'),
}


def find_files(folder, pattern: str) -> list:
    """The sorted files of a folder that fit the pattern.

    FileNotFoundError if there are none, or if a folder has only Parquet or Excel files in their place. It
    says how to convert these.
    """
    folder = Path(folder)
    files = sorted(folder.glob(pattern))
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
