"""Check a list of records before it is trained on: `python -m running.check annotations.json images/`.

It prints the first bad records and unreadable pictures, counts the others, writes annotations.clean.json
without all of them, and says what the good ones are: their pictures, how long they are, what is there twice.
With --llm it also makes every row as training would, finds those without a word of an answer, and counts
tokens in place of words.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import (IGNORE, IMAGE, TEMPLATES, Conversations, clean_turns, expand, find_image, find_problem,
                  key_of, load_image, tidy)
from llm import load_llm_config
from plumbing.files import named, whole
from plumbing.ranks import command
from plumbing.tokenizer import check_vocabulary, load_tokenizer, special_names
from running.loading import cores_of_a_rank, processes
from running.records import Records, parse_records

CHUNK = 32  # records that a process looks at before it tells what it found
NAMED = 20  # bad records that are named; a wrong folder makes all of them bad
LOOKS_SPECIAL = r"</?s>|<(unk|pad|bos|eos|image)>|<\|[^<>|]*\|>|\[/?INST\]"  # in most tokenizers


def check(file, images, stage=None, llm=None, template=None, image_tokens: int = 576,
          max_length: int = 2048, workers: int | None = None) -> int:
    """Print what is wrong with the records of a file and what the others are; write these. `workers`
    processes share the work (None: one a core). Returns how many records are bad."""
    if min(image_tokens, max_length) < 1:
        raise ValueError("--image_tokens and --max_length must be at least 1")
    records = Records(own for _, own in parse_records(file))  # as they are, good or bad
    samples = None
    if llm:
        tokenizer = load_tokenizer(llm)
        sizes = load_llm_config(llm)
        check_vocabulary(tokenizer, sizes.vocab_size)
        max_length = min(max_length, sizes.max_position_embeddings)
        template = template or ("plain" if stage == "align" else "v1")
        samples = Conversations([], images, tokenizer, template, None, "")
    workers = cores_of_a_rank() if workers is None else workers
    look_at_chunk = partial(look_at, images=images, stage=stage, samples=samples, image_tokens=image_tokens,
                            max_length=max_length)
    loader = torch.utils.data.DataLoader(records, batch_size=CHUNK, collate_fn=look_at_chunk,
                                         **processes(min(workers, len(records) // CHUNK)))
    everything = itertools.chain.from_iterable(loader)
    good = {}
    problems = Counter()
    for number, found in enumerate(tqdm(everything, desc="check", total=len(records), unit=" records")):
        if not found["problem"]:
            good[number] = found
            continue
        problems[re.sub(r"^.*?\.\w+: ", "", found["problem"])] += 1  # without the name of its picture
        if number - len(good) < NAMED:
            tqdm.write(f"record {number} (id {found['id']!r}): {found['problem']}")
    bad = len(records) - len(good)
    if bad > NAMED:
        (problem, times), = problems.most_common(1)
        print(f"and {bad - NAMED:,} more; of all {bad:,}, {times:,} say: {problem}")
    print(f"{len(good):,} of {len(records):,} records are good")
    if good:
        counted = f"tokens, with {image_tokens} of the image (--image_tokens)"
        print_summary(good, records, "words" if samples is None else counted, max_length)
    else:
        print("no list is written: it would be empty")
    if good and bad:
        clean = Path(file).with_suffix(".clean.json")
        with whole(clean) as building:
            building.write_text(json.dumps([records[number] for number in good]))
        print(f"wrote {clean}")
    return bad


def look_at(records: list, **how) -> list:
    """What is found in each of some records: the dict of `look`, its "id" and "problem" (or "")."""
    everything = []
    for record in records:
        is_dict = isinstance(record, dict)
        name = f"record {record.get('id', 0)!r}" if is_dict else "record"
        found = {"id": record.get("id") if is_dict else None, "problem": ""}
        try:
            with named(name):
                found |= look(record, **how)
        except ValueError as error:
            found["problem"] = str(error).removeprefix(f"{name}: ")
        everything.append(found)
    return everything


def look(record, images, stage, samples, image_tokens: int, max_length: int) -> dict:
    """What is found in a record. ValueError for a wrong form, a bad picture, a row without a label.
    `samples`: without records, to make the row of this one; or None.

    "image", "bytes"    the name of its picture and a number for the file's bytes, or None
    "answers"           a number for all that is answered
    "length"            of its text in words; with a tokenizer, of its row in tokens, before it is cut
    "has_special"       whether its text has the name of a special token
    "has_unknown"       whether the tokenizer does not know a word of it
    """
    problem = find_problem(record, stage)
    if problem:
        raise ValueError(problem)
    record = tidy(record)
    turns = clean_turns(record)
    texts = [text.removeprefix(IMAGE) for _, text in turns]
    special = special_names(samples.tokenizer) if samples is not None else LOOKS_SPECIAL
    found = {
        "image": record.get("image"),
        "bytes": None,
        "answers": key_of(answers_of(turns)),
        "length": sum(len(text.split()) for text in texts),
        "has_special": any(re.search(f"{special}|{IMAGE}", text) for text in texts),
        "has_unknown": False,
    }
    if found["image"]:
        file = find_image(images, found["image"])
        load_image(file)
        found["bytes"] = key_of(file.read_bytes())
    if samples is not None:
        samples.records = [record]
        sample = samples.read(0, with_pixels=False)
        row = expand(sample, image_tokens, max_length)
        if all(label == IGNORE for label in row["labels"]):
            raise ValueError(f"has no word of an answer within {max_length} tokens")
        tokenizer = samples.tokenizer
        unknown = tokenizer.unk_token_id
        is_end = unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id)  # as SmolLM2 has it
        found["has_unknown"] = unknown in sample["ids"] and not is_end
        found["length"] = len(sample["ids"]) + (image_tokens - 1) * ("image" in record)
    return found


def answers_of(turns: list) -> list:
    return [text for role, text in turns if role == "gpt"]


def count_repeated(keys: dict) -> tuple:
    """(how many have the key of one before them, the first of these in words). `keys`: {name: key}."""
    first = {}
    pairs = []
    for name, key in keys.items():
        if key in first:
            pairs.append(f" (first: {first[key]} and {name})")
        else:
            first[key] = name
    return len(pairs), pairs[0] if pairs else ""


def print_summary(good: dict, records: Records, unit: str, max_length: int):
    """Print what the good records, {number: what is found}, are, and what is there more than once."""
    pictured = {number: found for number, found in good.items() if found["image"]}
    bytes_of = {repr(found["image"]): found["bytes"] for found in pictured.values()}
    copies, pair = count_repeated(bytes_of)
    print(f"{len(pictured):,} have an image, {len(good) - len(pictured):,} have none; of {len(bytes_of):,} "
          f"images, {copies:,} are copies of others{pair}")
    lengths = sorted(found["length"] for found in good.values())
    print(f"{unit}: {lengths[0]:,} to {lengths[-1]:,}, median {statistics.median_low(lengths):,}")
    if unit != "words":
        print(f"{sum(length > max_length for length in lengths):,} are cut at {max_length:,} tokens")
    ids = {f"record {n}": repr(found["id"]) for n, found in good.items() if found["id"] is not None}
    contents = {f"record {n}": (found["bytes"], found["answers"]) for n, found in pictured.items()}
    for what, keys in (("id", ids), ("picture and the answers", contents)):
        count, pair = count_repeated(keys)
        if count:
            print(f"{count:,} have the {what} of another before them{pair}")
    (answers, times), = Counter(found["answers"] for found in good.values()).most_common(1)
    if times > max(1, len(good) / 100):
        number = next(number for number, found in good.items() if found["answers"] == answers)
        said = ", ".join(map(repr, answers_of(clean_turns(tidy(records[number])))))
        print(f"{times:,} have the same answers: {said:.80}")
    has_special = sum(found["has_special"] for found in good.values())
    if has_special:
        print(f"{has_special:,} have the name of a special token in their text; it is read as text")
    has_unknown = sum(found["has_unknown"] for found in good.values())
    if has_unknown:
        print(f"{has_unknown:,} have words that the LLM does not know: it reads and learns <unk>")


def main():
    parser = argparse.ArgumentParser(prog="python -m running.check", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file")
    add("images")
    add("--stage", choices=["align", "instruct"], help="also print what this stage of training does not take")
    add("--llm", help="also tokenise for this LLM (Hub id, or folder with its config.json), and print what "
                      "makes no row with loss")
    add("--template", choices=[*TEMPLATES], help="with --llm (default: align's is plain, instruct's v1)")
    add("--image_tokens", type=int, default=576, help="with --llm: of an image")
    add("--max_length", type=int, default=2048, help="with --llm: most tokens in a row")
    add("--workers", type=int, help="processes that share the work (default: one a core)")
    with command("running.check", "interrupted; nothing was written"):
        bad = check(**vars(parser.parse_args()))
        sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
