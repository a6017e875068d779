"""MMBench, English and Chinese.
"""

import csv

from benchmarks.entries import find_files
from benchmarks.questions import LETTER_ANSWER, grade, lettered, to_question
from benchmarks.score import grouped, percent, score_accuracy
from plumbing.files import read_entries



def load(folder, split: str, chinese: bool = False):
    """A table mmbench_dev_*.tsv (Chinese: with cn in its name) of index, question, hint, A to D, answer,
    category, image; `split` is a part of its name. Row index + k x 10^6 asks question `index` again, its
    options rotated. An image is base64, or the index of the row that has it. A test split has no answers."""
    files = [file for file in find_files(folder, "*.tsv") if split in file.stem.lower()]
    files = [file for file in files if ("cn" in file.stem.lower()) == chinese]
    if len(files) != 1:
        raise ValueError(f"{folder}: --split has to name one table; {split!r} fits {[f.name for f in files]}")
    not_given = {"", "nan", "none", "null", "na", "n/a"}  # by pandas, which LLaVA reads with
    rows = read_entries(files[0], **dict.fromkeys(("index", "question", *"ABCD", "image"), str))
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        if not row["index"].isdecimal():
            raise ValueError(f"{files[0]}: the index {row['index']!r} is not a number")
        texts = [row.get(key) or "" for key in ("hint", "answer", *"ABCD")]
        hint, answer, *choices = ["" if text.lower() in not_given else text for text in texts]
        choices = choices[: [*choices, ""].index("")]  # up to the first that is not given
        text = lettered(f"{hint}\n{row['question']}" if hint else row["question"], choices)
        kept = [key for key in ("index", "question", *"ABCD", "answer", "split") if key in row]
        yield to_question(
            files[0], row["index"], text, images.get(row["image"], row["image"]).encode(), answer or None,
            row.get("category"), "\n请直接回答选项字母。" if chinese else LETTER_ANSWER,
            options=list("ABCD"[: len(choices)]), choices=choices, group=int(row["index"]) % 10**6,
            row={key: row[key] for key in kept})


def parse(text: str, question):
    """MMBench's rules without its language model: the one letter that is a word, alone or with such signs (a
    lone A among more than three words may be an article), else the one choice whose text occurs."""
    words, said = text.split(), text.lower()
    for form in "{} {}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{}).".split():
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(found) == 1 and not (form == "{}" and found == ["A"] and len(words) > 3):
            return found[0] if found[0] in question["options"] else None
    found = [x for x, choice in zip(question["options"], question["choices"]) if choice.lower() in said]
    return found[0] if len(found) == 1 else None


def score(questions, choices) -> dict:
    """Circular: a question is right if it is in all its rotations; `accuracy_single`: each by itself."""
    right = grade(questions, choices)
    groups = grouped([question["group"] for question in questions], zip(questions, right)).values()
    circular = [all(value for _, value in rows) for rows in groups]
    return score_accuracy([rows[0][0] for rows in groups], choices, circular) | {
        "accuracy_single": percent(right), "rotations": len(questions)}


def submit(questions, answers, file):
    """The server's table, as LLaVA makes it. It wants Excel: pandas.read_table(FILE).to_excel(...)."""
    names = list(questions[0]["row"])
    names.insert(6, "prediction")
    with open(file, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, names, delimiter="\t")
        table.writeheader()
        table.writerows(question["row"] | {"prediction": text} for question, text in zip(questions, answers))
