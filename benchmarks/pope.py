"""POPE (Li et al. 2023, arXiv 2305.10355): is a thing in the picture? It asks for things that are not.

Rule: POPE's, as in LLaVA's eval_pope.py. An answer is "no" if its first sentence says so, else "yes". The
headline is the F1 of "yes", a mean over three categories (random, popular, adversarial) of 3,000 questions
each; random has 2,910 at the revision that LLaVA pins.

    *pope_CATEGORY.json    JSON lines (aokvqa and gqa: lists) of question_id, image, text, label
    images/ or val2014/    the pictures, here or beside the folder

The files may also lie in coco/, as LLaVA has them, or in output/coco/, as in POPE's repository.
"""

from benchmarks.entries import ID, find_entries, first_folder
from benchmarks.questions import YES_OR_NO, to_question
from benchmarks.score import grouped, percent
from data import find_image

KINDS = {"question_id": ID, "image": str, "text": str, "label": str}


def load(folder, split: str):
    """The questions of all categories, or of the category `split`.

    Question and label are one row of one file. (LLaVA's scorer pairs two files by position, which a new
    revision of either breaks.)
    """
    pattern = f"*pope_*{split}.json"
    places = []
    for place in (folder, folder.parent):
        places.append(place / "val2014")
        places.append(place / "images")
    images = first_folder(*places, folder)
    if not any(folder.glob(pattern)):
        folder = first_folder(folder / "coco", folder / "output/coco", folder)
    for file, row in find_entries(folder, pattern, **KINDS):
        category = file.stem.rsplit("pope_", 1)[1]
        name = f"{category}-{row['question_id']}"
        image = find_image(images, row["image"])
        yield to_question(file, name, row["text"], image, row["label"], category, options=YES_OR_NO)


def parse(text: str, question=None) -> str:
    """"no" if the first sentence has the word No, no or not, else "yes"."""
    first_sentence = text.split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    is_no = "No" in words or "no" in words or "not" in words
    return "no" if is_no else "yes"


def score(questions, choices) -> dict:
    """F1 of "yes" (the headline), accuracy and the share of yes, in percent: for each category, and their
    means, in which every category counts alike."""
    names, rows = [], []
    for question, choice in zip(questions, choices):
        names.append(question["category"])
        rows.append((question["answer"] == "yes", choice == "yes"))
    categories = {}
    for name, group in grouped(names, rows).items():
        categories[name] = score_category(group)
    means = {}
    for key in ("f1", "accuracy", "yes"):
        values = [category[key] for category in categories.values()]
        means[key] = round(sum(values) / len(values), 2)
    return means | {"questions": len(questions), "categories": categories}


def score_category(rows) -> dict:
    """Of [(the answer is yes, the choice is yes)]."""
    both = sum(gold and said for gold, said in rows)  # true positives
    each = sum(gold + said for gold, said in rows)  # 2 TP + FP + FN
    f1 = 2 * both / max(1, each)
    return {
        "f1": round(100 * f1, 2),
        "accuracy": percent([gold == said for gold, said in rows]),
        "yes": percent([said for gold, said in rows]),
        "questions": len(rows),
    }
