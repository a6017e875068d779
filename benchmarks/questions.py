"""Questions: how a benchmark asks.
"""

import string

from data import IMAGE


SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"  # of the choices


def to_question(file, name, text: str, image, answer=None, category=None, ending=SHORT_ANSWER,
                **more) -> dict:
    """A question about a picture (a Path, or a file's bytes in base64) in LLaVA's form. Closed ones have
    "options", what may be chosen; those that only count together have one "group". An answer of None is known
    to a server or judge alone."""
    return {"id": name, "prompt": f"{IMAGE}\n{text}{ending}", "image": image, "answer": answer,
            "category": category, "file": str(file), **more}


def lettered(text: str, choices) -> str:
    """The question and a line `A. choice` for each choice."""
    return "\n".join([text, *(f"{x}. {choice}" for x, choice in zip(string.ascii_uppercase, choices))])


def grade(questions, choices) -> list:
    """Which choices are right. No choice (None) is wrong."""
    return [choice == question["answer"] for question, choice in zip(questions, choices)]
