"""Which answer does a model find the likeliest? For multiple choice, no parser is needed to know that.

An answer's likelihood is the mean log-probability of its tokens, as in most tasks of GPT-3 (Brown et al.
2020, arXiv 2005.14165, 2.4), which SEED-Bench's authors follow. lm-evaluation-harness' acc_norm divides by
characters instead, and is another number.
"""

import data


def to_read(tokenizer, form, question: dict) -> dict:
    """{ids that the model reads: [(option, the last ids of these and one more, which are its answer)]}.

    The last token of an answer is never read. So letters, or yes and no, need one pass for all. An option is
    said as it stands in "texts", if there are any, else as itself.
    """
    asked = ("human", question["prompt"])
    has_image = question["image"] is not None
    options = question["options"]
    texts = question.get("texts") or [option.capitalize() for option in options]  # Yes, not yes
    found = {}
    for option, text in zip(options, texts):
        answered = [asked, ("gpt", text)]
        ids, roles = data.encode(answered, form, tokenizer, has_image)
        end = roles.index(data.END)
        start = end - roles.count(data.ANSWER)
        if start == end:
            raise ValueError(f"question {question['id']!r}: option {option} has no text")
        read = tuple(ids[: end - 1])
        said = ids[start:end]
        found.setdefault(read, []).append((option, said))
    return found
