"""The records of a LLaVA JSON file: read, checked, and kept once for all processes of a machine."""

import contextlib
import json
import os
import tempfile

import numpy as np

from data import find_problem, tidy
from plumbing.files import named, read_text
from plumbing.ranks import barrier, on_every_rank, rank


def parse_records(file) -> list:
    """The records of a file as they are: a JSON list, or JSON lines. ValueError names file and record."""
    text = read_text(file)
    with named(file, "not JSON (a list, or a record a line)"):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # behind the first of several lines
                number = text.count('"conversations"', 0, error.pos)
                raise ValueError(f"behind {number} records: {error}") from None
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(records, dict) and "conversations" in records:
        records = [records]  # a single line
    if not isinstance(records, list):
        raise ValueError(f"{file}: not a JSON list of records")
    if not records:
        raise ValueError(f"{file}: holds no records")
    return records


def read_records(file, stage=None) -> list:
    """The records of a LLaVA JSON file, tidy. ValueError names the first that is bad, or not for this
    stage."""
    records = parse_records(file)
    for number, record in enumerate(records):
        problem = find_problem(record, stage)
        if problem:
            name = record.get("id") if isinstance(record, dict) else None
            raise ValueError(f"{file}: record {number} (id {name!r}) {problem}; `python -m running.check` "
                             "finds all")
    return [tidy(record) for record in records]


class Records:
    """The records of a LLaVA JSON file, by number, tidy.

    Parsed records take four times their text. So each stays JSON, in one array of bytes that all processes of
    a machine share, and is parsed when it is asked for.

    text (bytes,)     the JSON of all records, end to end
    starts (n + 1,)   where each begins
    """

    def __init__(self, text, starts):
        self.text = text
        self.starts = starts

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        number = range(len(self))[i]  # also from the end; IndexError behind it
        start, stop = self.starts[number : number + 2]
        return json.loads(bytes(self.text[start:stop]))


def load_records(file, stage=None) -> Records:
    """The records of a file, on every rank. One rank of a machine parses it, the others map what that one
    wrote."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def pack():
        if local_rank > 0:
            return None
        lengths = [0]
        with tempfile.NamedTemporaryFile(delete=False) as packed:
            for record in read_records(file, stage):
                lengths.append(packed.write(json.dumps(record).encode()))
        return packed.name, np.cumsum(lengths)

    packed, starts = on_every_rank(pack)[rank() - local_rank]
    text = np.memmap(packed, dtype=np.uint8, mode="r")
    barrier()  # all have mapped it: it needs no name any more
    if local_rank == 0:
        with contextlib.suppress(OSError):  # Windows
            os.remove(packed)
    return Records(text, starts)
