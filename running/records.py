"""The records of a LLaVA JSON file: read, checked, and kept as text."""

import json
import re

import numpy as np

from data import find_problem, tidy
from plumbing.files import named, read_text
from plumbing.ranks import say


WHITE = r"[ \t\n\r]*"
EMPTY = re.compile(rf"{WHITE}\[{WHITE}\]{WHITE}\Z")
BEHIND = {  # what stands behind a record: in a list, and where each has a line
    True: re.compile(rf"{WHITE}(?:,(?!{WHITE}\Z)|\]{WHITE}\Z){WHITE}"),
    False: re.compile(rf"[ \t\r]*(?:\n|\Z){WHITE}"),
}


def parse_records(file):
    """Yield (record, its JSON) as they are in a file: a JSON list, or JSON lines. ValueError names the file,
    and how many records stand before what is wrong. All at once, they would take four times their text."""
    text = read_text(file)
    if EMPTY.match(text):
        raise ValueError(f"{file}: holds no records")
    opening = re.match(rf"{WHITE}\[?{WHITE}", text).group()
    is_list = "[" in opening
    number, at = 0, len(opening)
    decode, match = json.JSONDecoder().raw_decode, BEHIND[is_list].match
    with named(file, "not JSON (a list, or a record a line)"):
        while number == 0 or at < len(text):
            start = at
            try:
                record, at = decode(text, start)
                number, own = number + 1, text[start:at]
                behind = match(text, at)
                if behind is None:
                    raise json.JSONDecodeError("Expecting ',' or ']'" if is_list else "Extra data", text, at)
            except json.JSONDecodeError as error:
                raise ValueError(f"behind {number} records: {error}") from None
            at = behind.end()
            is_all = number == 1 and at == len(text)
            if is_all and not is_list and not (isinstance(record, dict) and "conversations" in record):
                raise ValueError(f"{file}: not a JSON list of records")
            yield record, own


LEFT_OUT = "has an empty turn"  # as two of LLaVA's mix665k; LLaVA trains on nothing of these


def good_records(file, stage=None):
    """Yield (record, its JSON) of a LLaVA JSON file, tidy, without those with an empty turn: a line tells
    their number. ValueError names the first that is bad otherwise, or not for this stage."""
    empty = []
    for number, (record, own) in enumerate(parse_records(file)):
        problem = find_problem(record, stage)
        if problem == LEFT_OUT:
            empty.append(number)
            continue
        if problem:
            name = record.get("id") if isinstance(record, dict) else None
            raise ValueError(f"{file}: record {number} (id {name!r}) {problem}; `python -m running.check` "
                             "finds all")
        neat = tidy(record)
        yield neat, own if neat == record else json.dumps(neat)
    if len(empty) == number + 1:
        raise ValueError(f"{file}: each of the {len(empty)} records {LEFT_OUT}")
    if empty:
        say(f"{file}: {len(empty)} of {number + 1} records are left out, for each {LEFT_OUT}; the first is "
            f"{empty[0]} of the file")


def read_records(file, stage=None) -> list:
    """The records of a LLaVA JSON file, tidy. Errors as above."""
    return [record for record, _ in good_records(file, stage)]


class Records:
    """The records of a LLaVA JSON file, by number, tidy.

    Parsed records take four times their text. So each stays JSON, in one array of bytes that loader processes
    share, and is parsed when it is asked for.

    text (bytes,)     the JSON of all records, end to end
    starts (n + 1,)   where each begins
    """

    def __init__(self, texts):
        """`texts`: the JSON of each record."""
        packed = bytearray()
        starts = [0]
        for text in texts:
            packed += text.encode()
            starts.append(len(packed))
        self.text = np.frombuffer(packed, np.uint8)
        self.starts = np.array(starts)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        number = range(len(self))[i]  # also from the end; IndexError behind it
        start, stop = self.starts[number : number + 2]
        return json.loads(bytes(self.text[start:stop]))


def load_records(file, stage=None) -> Records:
    """The records of a file. Errors as above."""
    return Records(own for _, own in good_records(file, stage))
