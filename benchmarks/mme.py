"""MME (Fu et al. 2023, arXiv 2306.13394): two questions about each picture, one of them to be denied.

Rule: MME's eval_tool/calculation.py. A category scores 100 times the sum of its accuracy and its accuracy+,
the part of pictures with both questions right, so at most 200. The headline is the sum over the ten
categories of perception; there are 2,374 questions about 1,187 pictures.

    CATEGORY/                    pictures, and a text file of two lines `question<TAB>Yes|No` for each

In some categories they lie in images/ and questions_answers_YN/. The questions end with "Please answer yes or
no."; LLaVA asks for a short answer instead, and so do we.
"""

import re

from benchmarks.entries import find_files, first_folder
from benchmarks.questions import YES_OR_NO, grade, to_question
from benchmarks.score import grouped, percent, summary
from plumbing.files import read_text
from plumbing.pictures import SUFFIXES, find_image
from plumbing.ranks import say

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def load(folder, split: str):
    """The questions of all categories, or of the category `split`; those about one picture are a group."""
    folder = first_folder(folder / "MME_Benchmark", folder)  # beside it lies eval_tool/
    pattern = split or "*"
    find_files(folder, f"{pattern}/**/*.txt")  # an error if there are none
    missing = [name for name in PERCEPTION + COGNITION if not (folder / name).is_dir()]
    if missing and not split:
        say(f"{folder}: the sums lack {len(missing)} of MME's 14 categories: {', '.join(missing)}")
    for category in sorted(folder.glob(pattern)):
        if category.is_dir():
            yield from load_category(category)


def load_category(category):
    texts = first_folder(category / "questions_answers_YN", category)
    images = first_folder(category / "images", category)
    names = {file.stem for file in texts.glob("[!.]*.txt")}  # macOS leaves ._x.txt
    names |= {file.stem for file in images.glob("[!.]*") if file.suffix.lower() in SUFFIXES}
    for name in sorted(names):  # so a picture without a text is noticed, too
        image = find_image(images, f"{name}.png")
        yield from load_pair(texts / f"{name}.txt", image, category.name)


def load_pair(file, image, category: str):
    """The two questions about one picture."""
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    is_good = all(re.fullmatch("[^\t]+\t(Yes|No)\\s*", line, re.IGNORECASE) for line in lines)
    if len(lines) != 2 or not is_good:
        raise ValueError(f"{file}: not two lines of question, tab, Yes or No")
    pair = f"{category}/{file.stem}"
    for number, line in enumerate(lines):
        text, answer = line.replace("Please answer yes or no.", "").split("\t")
        yield to_question(file, f"{pair}/{number}", text.strip(), image, answer.strip().lower(), category,
                          options=YES_OR_NO, group=pair)


def parse(text: str, question=None):
    """Exactly yes or no, else the first of these within the first four letters, else None."""
    text = text.lower()
    if text in YES_OR_NO:
        return text
    for word in YES_OR_NO:
        if word in text[:4]:
            return word
    return None


def score(questions, choices) -> dict:
    """Points: the sums over the categories of perception, and over all others. (Of the toy world's four,
    "color" is one of perception.) In percent: accuracy and accuracy+ over everything."""
    right = grade(questions, choices)
    both, points = [], []  # of each picture
    for first, second in zip(right[::2], right[1::2]):
        both.append(first and second)
        points.append(50 * (first + second) + 100 * (first and second))
    names = [question["category"] for question in questions[::2]]
    sums = {"perception": 0.0, "others": 0.0}
    categories = {}
    for name, values in grouped(names, points).items():
        mean = sum(values) / len(values)
        sums["perception" if name in PERCEPTION else "others"] += mean
        categories[name] = {"score": round(mean, 2), "questions": 2 * len(values)}
    return summary(questions, choices, right) | {
        "perception": round(sums["perception"], 2),
        "others": round(sums["others"], 2),
        "accuracy_plus": percent(both),
        "pictures": len(both),
        "categories": categories,
    }
