"""Which answer does a model find the likeliest? For multiple choice, no parser is needed to know that.

An answer's likelihood is the mean log-probability of its tokens, as in most tasks of GPT-3 (Brown et al.
2020, arXiv 2005.14165, 2.4), which SEED-Bench's authors follow. lm-evaluation-harness' acc_norm divides by
characters instead, and is another number.
"""

import data


def answers_of(tokenizer, form, question: dict) -> list:
    """The ids of each option as an answer. It is said as it stands in "texts", if there are any, else as
    itself."""
    asked = ("human", question["prompt"])
    has_image = question["image"] is not None
    options = question["options"]
    texts = question.get("texts") or [option.capitalize() for option in options]  # Yes, not yes
    answers = []
    for option, text in zip(options, texts):
        ids, roles = data.encode([asked, ("gpt", text)], form, tokenizer, has_image)
        said = [token for token, role in zip(ids, roles) if role == data.ANSWER]
        if not said:
            raise ValueError(f"question {question['id']!r}: option {option} has no text")
        answers.append(said)
    return answers
