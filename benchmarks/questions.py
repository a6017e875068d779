"""A question, as every benchmark's `load` makes it and eval.py asks it.

    id         unique in its benchmark
    prompt     what is asked, with data.IMAGE at its start if there is a picture
    image      a Path, the bytes of a picture file in base64, or None
    answer     what is right; None if only a server or a judge knows it
    category   scores are also told for each category
    file       where the question stands

    options    the allowed answers of a multiple-choice question: letters, or yes and no
    choices    the texts of the options, with `open`
    open       what is asked, without the options
    group      questions of one group count only together

The last four are there for some benchmarks only.
"""

from string import ascii_uppercase

from data import IMAGE

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"  # the most options that a question of ScienceQA or MMBench has
YES_OR_NO = ["yes", "no"]  # the options of POPE and MME


def to_question(file, name, text: str, image, answer=None, category=None, ending=SHORT_ANSWER,
                **more) -> dict:
    """A question about a picture, in LLaVA's form. `ending` tells what the answer should look like."""
    prompt = f"{IMAGE}\n{text}{ending}"
    question = {"id": name, "prompt": prompt, "image": image, "answer": answer}
    question |= {"category": category, "file": str(file)}
    return question | more


def without_picture(question: dict) -> dict:
    """The same question, for a model that has to guess what the picture shows."""
    return question | {"image": None, "prompt": question["prompt"].removeprefix(f"{IMAGE}\n")}


def closed(questions, by: str) -> list:
    """The questions that have options. By "words": those whose options have texts, asked without these, so
    that each text can be read as the answer."""
    if by != "words":
        return [question for question in questions if question.get("options")]
    asked = []
    for question in questions:
        if question.get("choices"):
            mark = f"{IMAGE}\n" if question["image"] else ""
            prompt = f"{mark}{question['open']}{SHORT_ANSWER}"
            texts = [choice.strip() for choice in question["choices"]]  # as answers are learned
            asked.append(question | {"prompt": prompt, "texts": texts})
    return asked


def lettered(text: str, choices) -> str:
    """The question, and a line `A. choice` for each choice."""
    lines = [text]
    for letter, choice in zip(ascii_uppercase, choices):
        lines.append(f"{letter}. {choice}")
    return "\n".join(lines)


def has_answers(questions) -> bool:
    """Whether anything can be scored here, and not only by a server or a judge."""
    return any(question["answer"] is not None for question in questions)


def grade(questions, choices) -> list:
    """For each question whether the choice is right. No choice (None) is wrong."""
    return [choice == question["answer"] for question, choice in zip(questions, choices)]
