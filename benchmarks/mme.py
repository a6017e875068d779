"""MME: yes and no about each picture.
"""

import re

from benchmarks.entries import find_files
from benchmarks.questions import grade, to_question
from benchmarks.score import accuracy, grouped, score_accuracy, standard_error
from plumbing.files import read_text



def load(folder, split: str):
    """Two questions for each picture. A category (or `split` alone) is a folder of pictures and text files
    `question<TAB>Yes|No`, side by side or in images/ and questions_answers_YN/. LLaVA asks for a short answer
    instead of the questions' own "yes or no"."""
    find_files(folder, f"{split or '*'}/**/*.txt")  # there must be some
    for category in sorted(path for path in folder.glob(split or "*") if path.is_dir()):
        texts, images = category / "questions_answers_YN", category / "images"
        texts, images = texts if texts.is_dir() else category, images if images.is_dir() else category
        endings = (".jpg", ".jpeg", ".png")
        pictures = {file.stem: file for file in images.glob("*.*") if file.suffix in endings}
        for name in sorted({file.stem for file in texts.glob("*.txt")} | pictures.keys()):
            file, pair = texts / f"{name}.txt", f"{category.name}/{name}"
            lines = [line for line in read_text(file).split("\n") if line.strip()]
            if len(lines) != 2 or not all(re.fullmatch("[^\t]+\t(Yes|No)\\s*", line) for line in lines):
                raise ValueError(f"{file}: not two lines of question, tab, Yes or No")
            for number, line in enumerate(lines):
                text, answer = line.replace("Please answer yes or no.", "").split("\t")
                yield to_question(file, f"{pair}/{number}", text.strip(),
                                  pictures.get(name, images / f"{name}.png"), answer.strip().lower(),
                                  category.name, options=["yes", "no"], group=pair)


def parse(text: str, question=None):
    """MME's rule: exactly yes or no, else the first of these within the first four letters, else None."""
    text = text.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


def score(questions, choices) -> dict:
    """Per category 100 x (accuracy + accuracy+), the latter the part of pictures with both questions right;
    their sums over MME's ten categories of perception and over all others (of the toy world's four, "color"
    is one of the ten); both accuracies over everything in percent."""
    perception = "existence count position color posters celebrity scene landmark artwork OCR".split()
    right, asked = grade(questions, choices), questions[::2]  # one question of each picture
    pairs, scores, categories = list(zip(right[::2], right[1::2])), {}, {}
    points = [(first + second) / 2 + (first and second) for first, second in pairs]  # 0 to 2
    groups = grouped([question["category"] for question in asked], zip(asked, points))
    for part in ("perception", "others"):
        total, influences, of = 0, [], []
        for name, rows in groups.items():
            if (name in perception) == (part == "perception"):
                mean = sum(value for _, value in rows) / len(rows)
                total += mean
                influences += [(value - mean) / len(rows) for _, value in rows]
                of += [question for question, _ in rows]
                categories[name] = {"score": round(100 * mean, 2), "questions": 2 * len(rows)}
        scores |= {part: round(100 * total, 2), f"{part}_se": standard_error(influences, of)}
    scores |= accuracy([all(pair) for pair in pairs], asked, "accuracy_plus")
    return score_accuracy(questions, choices, right) | scores | {"pictures": len(pairs),
                                                                 "categories": categories}
