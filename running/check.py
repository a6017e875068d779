"""Check a list of records before it is trained on: `python -m running.check annotations.json images/`.

It prints bad records and unreadable pictures, and writes annotations.clean.json without them. With --llm it also
makes every row as training would, and prints those without a word of an answer.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

from data import (IGNORE, IMAGE, TEMPLATES, Conversations, clean_turns, expand, find_image, find_problem,
                  load_image, load_tokenizer, special_names, tidy)
from plumbing.files import named, read_json, whole

LOOKS_SPECIAL = r"</?s>|<(unk|pad|bos|eos|image)>|<\|[^<>|]*\|>|\[/?INST\]"  # in most tokenizers


def check(file, images, stage=None, llm=None, template=None, image_tokens: int = 576,
          max_length: int = 2048) -> int:
    """Print what is wrong with the records of a file, write those that are good. Returns how many are bad."""
    if min(image_tokens, max_length) < 1:
        raise ValueError("--image_tokens and --max_length must be at least 1")
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: not a JSON list of records")
    template = template or ("plain" if stage == "align" else "v1")
    tokenizer = load_tokenizer(llm) if llm else None
    pattern = f"{special_names(tokenizer) if llm else LOOKS_SPECIAL}|{IMAGE}"
    good = []
    has_special = 0
    for number, record in enumerate(tqdm(records, desc="check", unit=" records")):
        name = f"record {record.get('id', 0)!r}" if isinstance(record, dict) else "record"
        try:
            with named(name):
                look(record, images, stage, tokenizer, template, image_tokens, max_length)
        except ValueError as error:
            problem = str(error).removeprefix(f"{name}: ")
            line = f"record {number} (id {name[7:]}): {problem}"
            tqdm.write(line.encode(errors="backslashreplace").decode())
        else:
            good.append(record)
            texts = [text.removeprefix(IMAGE) for _, text in clean_turns(tidy(record))]
            has_special += any(re.search(pattern, text) for text in texts)
    bad = len(records) - len(good)
    print(f"{len(good)} of {len(records)} records are good")
    print(f"{has_special} of them have the name of a special token in their text; it is read as text")
    if bad:
        clean = Path(file).with_suffix(".clean.json")
        with whole(clean) as building:
            building.write_text(json.dumps(good))
        print(f"wrote {clean}")
    return bad


def look(record, images, stage, tokenizer, template: str, image_tokens: int, max_length: int):
    """ValueError for what is wrong with one record: its form, its picture, with a tokenizer its row."""
    problem = find_problem(record, stage)
    if problem:
        raise ValueError(problem)
    record = tidy(record)
    if "image" in record:
        load_image(find_image(images, record["image"]))
    if tokenizer is not None:
        samples = Conversations([record], images, tokenizer, template, None, "")
        row = expand(samples.read(0, with_pixels=False), image_tokens, max_length)
        if all(label == IGNORE for label in row["labels"]):
            raise ValueError(f"has no word of an answer within {max_length} tokens")


def main():
    parser = argparse.ArgumentParser(prog="python -m running.check", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file")
    add("images")
    add("--stage", choices=["align", "instruct"], help="also print what this stage of training does not take")
    add("--llm", help="also tokenise, as for this LLM (folder or Hub id), and print what makes no row with loss")
    add("--template", choices=[*TEMPLATES], help="with --llm (default: align's is plain, instruct's v1)")
    add("--image_tokens", type=int, default=576, help="with --llm: of an image")
    add("--max_length", type=int, default=2048, help="with --llm: most tokens in a row")
    try:
        bad = check(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        sys.exit(f"running.check: {error}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
