"""TextVQA.
"""

from benchmarks.entries import ID, find_entries
from benchmarks.questions import to_question
from benchmarks.score import accuracy
from benchmarks.vqa import normalise
from data import find_image

parse = normalise



def load(folder, split: str):
    """TextVQA_0.5.1_{split}.json, with ten answers each, and the OCR tokens, which the prompt tells, of
    TextVQA_Rosetta_OCR_v0.2_{split}.json; pictures in train_images/."""
    tokens, kinds = {}, {"question_id": ID, "image_id": str, "question": str, "answers": list}
    told = {"image_id": str, "ocr_tokens": list}
    for ocr, row in find_entries(folder, f"TextVQA_Rosetta_OCR_*_{split}.json", **told):
        tokens[row["image_id"]] = row["ocr_tokens"]
    for file, row in find_entries(folder, f"TextVQA_0.5.1_{split}.json", **kinds):
        name, image, text = row["question_id"], row["image_id"], row["question"]
        if image not in tokens:
            raise ValueError(f"{ocr}: nothing for question {name!r}; is it of another split?")
        if tokens[image]:
            text += f"\nReference OCR token: {', '.join(tokens[image])}"
        answers = [normalise(answer) for answer in row["answers"]]
        yield to_question(file, name, text, find_image(folder / "train_images", f"{image}.jpg"), answers)


def score(questions, choices) -> dict:
    """VQA accuracy: the mean of min(1, matches / 3) over the ten subsets that leave out one answer of ten."""
    right = []
    for question, choice in zip(questions, choices):
        n, same = len(question["answer"]), question["answer"].count(choice)
        # `same` of the subsets have one match less
        right.append((same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n)
    return accuracy(right, questions) | {"questions": len(questions)}
