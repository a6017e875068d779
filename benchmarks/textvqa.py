"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions that need the text in the picture.

Rule: VQA accuracy. Ten people have answered; an answer is worth min(1, matches / 3), as a mean over the ten
ways to leave one of them out (TextVQA's scorer in facebookresearch/mmf). The validation split has 5,000
questions. LLaVA's prompt tells the text that an OCR system has found, and so does ours.

    TextVQA_0.5.1_SPLIT.json                {"data": [question_id, image_id, question, answers]}
    TextVQA_Rosetta_OCR_v0.2_SPLIT.json     {"data": [image_id, ocr_tokens]}
    train_images/                           IMAGE_ID.jpg
"""

from benchmarks.entries import ID, find_entries
from benchmarks.questions import to_question
from benchmarks.score import percent
from benchmarks.vqa import normalise
from data import find_image

KINDS = {"question_id": ID, "image_id": str, "question": str, "answers": list}
parse = normalise


def load(folder, split: str):
    """The questions; the answer of each is a list of ten normalised ones."""
    found_text = {}
    ocr_file = pattern = f"TextVQA_Rosetta_OCR_*_{split}.json"
    for ocr_file, row in find_entries(folder, pattern, image_id=str, ocr_tokens=list):
        found_text[row["image_id"]] = row["ocr_tokens"]
    for file, row in find_entries(folder, f"TextVQA_0.5.1_{split}.json", **KINDS):
        name = row["question_id"]
        image_id = row["image_id"]
        if image_id not in found_text:
            raise ValueError(f"{ocr_file}: nothing for question {name!r}; is it of another split?")
        words = ", ".join(found_text[image_id])  # LLaVA's line is there without a word, too
        text = f"{row['question']}\nReference OCR token: {words}"
        image = find_image(folder / "train_images", f"{image_id}.jpg")
        answers = [normalise(answer) for answer in row["answers"]]
        yield to_question(file, name, text, image, answers)


def vqa_accuracy(answers: list, choice: str) -> float:
    """The mean of min(1, matches / 3) over the subsets that leave out one of the n answers."""
    n = len(answers)
    same = answers.count(choice)
    without_a_match = min(1, (same - 1) / 3)  # in the `same` subsets that leave out an equal answer
    without_another = min(1, same / 3)
    return (same * without_a_match + (n - same) * without_another) / n


def score(questions, choices) -> dict:
    worth = []
    for question, choice in zip(questions, choices):
        worth.append(vqa_accuracy(question["answer"], choice))
    return {"accuracy": percent(worth), "questions": len(questions)}
