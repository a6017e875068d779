"""POPE: is it in the picture?
"""

from benchmarks.entries import ID, find_entries
from benchmarks.questions import to_question
from benchmarks.score import grouped, percent, standard_error
from data import find_image



def load(folder, split: str):
    """POPE's files `*pope_{category}.json` (JSON lines, or the lists of its aokvqa and gqa), all of them or
    `split` alone, in the folder or, as LLaVA has them, in coco/. Question and label are one row; LLaVA's
    scorer pairs them by position, and a new revision breaks the pairs."""
    pattern, kinds = f"*pope_*{split}.json", {"question_id": ID, "image": str, "text": str, "label": str}
    places = [folder / "images", folder / "val2014", folder.parent / "images", folder.parent / "val2014"]
    images = next((place for place in places if place.is_dir()), folder)
    is_llavas = not any(folder.glob(pattern)) and (folder / "coco").is_dir()
    for file, row in find_entries(folder / "coco" if is_llavas else folder, pattern, **kinds):
        category = file.stem.rsplit("pope_", 1)[1]
        yield to_question(file, f"{category}-{row['question_id']}", row["text"],
                          find_image(images, row["image"]), row["label"], category, options=["yes", "no"])


def parse(text: str, question=None) -> str:
    """POPE's rule: of the first sentence, "no" if it has the word No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(questions, choices) -> dict:
    """Per category and on average, in percent: F1 of "yes" (the headline), accuracy, share of yes."""
    scores, mean, asked, influence = {}, {}, [], {"f1": [], "accuracy": []}
    rows = [(question, question["answer"] == "yes", choice == "yes")
            for question, choice in zip(questions, choices)]
    groups = grouped([question["category"] for question in questions], rows)
    for category, rows in groups.items():
        each = max(1, sum(gold + said for _, gold, said in rows))
        f1 = 2 * sum(gold and said for _, gold, said in rows) / each  # 2 TP / (2 TP + FP + FN)
        right = sum(gold == said for _, gold, said in rows) / len(rows)
        scores[category] = {"f1": round(100 * f1, 2), "accuracy": round(100 * right, 2),
                            "yes": percent([said for _, _, said in rows]), "questions": len(rows)}
        for question, gold, said in rows:
            asked.append(question)
            influence["f1"].append((2 * (gold and said) - f1 * (gold + said)) / each / len(groups))
            influence["accuracy"].append(((gold == said) - right) / len(rows) / len(groups))
    for key in ("f1", "accuracy", "yes"):  # every category counts alike, however many questions it has
        mean[key] = round(sum(score[key] for score in scores.values()) / len(scores), 2)
    errors = {f"{key}_se": standard_error(values, asked) for key, values in influence.items()}
    return mean | errors | {"questions": len(questions), "categories": scores}
