"""Lists of entries: JSON, JSON lines, tables.
"""

from pathlib import Path

from plumbing.files import read_entries


ID = (int, str)  # the kinds of an id
CONVERT = {  # what no package of ours reads: the line of pandas that makes what we do
    ".xlsx": 'pandas.read_excel("IN").to_csv("OUT.tsv", sep="\\t", index=False)',
    ".parquet": 'json.dump(pandas.read_parquet("IN").to_dict("records"), open("OUT.json", "w"), default='
                'lambda x: base64.b64encode(x).decode() if isinstance(x, bytes) else x.tolist())'}


def find_files(folder, pattern: str) -> list:
    """Sorted. FileNotFoundError if there are none, or if Parquet or Excel lies in their place in a subfolder;
    it says how to convert these."""
    files, unread = sorted(Path(folder).glob(pattern)), []
    for suffix in CONVERT:
        unread += Path(folder).glob(str(Path(pattern).with_suffix(suffix)) if files else f"**/*{suffix}")
    done = {file.parent for file in files}
    unread = sorted(file for file in unread if file.parent not in done)
    if unread or not files:
        how = f"; {unread[0]} is not read here, but {CONVERT[unread[0].suffix]} converts it" if unread else ""
        raise FileNotFoundError(f"{unread[0].parent if files else folder}: no {pattern}{how}")
    return files


def find_entries(folder, pattern: str, **kinds):
    """Yield (file, entry) of all files in `folder` that fit; see `read_entries`."""
    for file in find_files(folder, pattern):
        for entry in read_entries(file, **kinds):
            yield file, entry
