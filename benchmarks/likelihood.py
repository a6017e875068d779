"""Which answer does a model find the likeliest? For multiple choice, no parser is needed to know that."""

import os

import data


def split_options(tokenizer, form, question: dict) -> tuple:
    """(the ids that the question has in common with whichever option, the next id of each option).

    Letters, or yes and no, differ in one token. So one pass over the common ids shows which is the likeliest.
    """
    answered = []
    asked = ("human", question["prompt"])
    has_image = question["image"] is not None
    for option in question["options"]:
        said = ("gpt", option.capitalize())  # Yes, not yes
        ids, _ = data.encode([asked, said], form, tokenizer, has_image)
        answered.append(ids)
    shared = len(os.path.commonprefix(answered))
    shared = min(shared, len(answered[0]) - 1)  # a single option has all in common with itself
    return answered[0][:shared], [ids[shared] for ids in answered]
