"""Which answer does a model find the likeliest? For multiple choice, no parser is needed to know that."""

import os

import torch

import data


def split_options(tokenizer, form, question: dict) -> tuple:
    """(the ids that the question has in common with whichever option, the next id of each option).

    Letters, or yes and no, differ in one token. So one pass over the common ids shows which is the likeliest.
    """
    answered = []
    for option in question["options"]:
        turns = [("human", question["prompt"]), ("gpt", option.capitalize())]  # Yes, not yes
        ids, _ = data.encode(turns, form, tokenizer, question["image"] is not None)
        answered.append(ids)
    shared = len(os.path.commonprefix(answered))
    shared = min(shared, len(answered[0]) - 1)  # a single option has all in common with itself
    return answered[0][:shared], [ids[shared] for ids in answered]


@torch.no_grad()
def mean_log_likelihoods(vlm, tokenizer, template: str, question: dict, texts) -> list:
    """For each text as the answer, the mean log-probability of its tokens, in nats, without the end token."""
    form = data.form_of(template, tokenizer)
    has_image = question["image"] is not None
    pixels = None
    if has_image:
        picture = data.load_image(question["image"])
        pixels = data.preprocess(picture, vlm.vit.config, "pad")
    samples = []
    for text in texts:
        turns = [("human", question["prompt"]), ("gpt", text)]
        ids, roles = data.encode(turns, form, tokenizer, has_image)
        end = roles.index(data.END)
        sample = {"ids": ids[:end], "roles": roles[:end]}
        samples.append(sample | {"pixels": pixels, "name": text})

    batch = data.collate(
        samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
        vlm.vit.config.image_size, vlm.llm.config.max_position_embeddings,
    )
    batch = data.to_device(batch, vlm.llm.head_weight.device)
    logits = vlm(batch["ids"], batch["pixels"])  # (B, S, V), a row for each text
    means = []
    for row, labels in zip(logits, batch["labels"]):
        next_ids = labels[1:]  # (S - 1,): each position predicts the next token
        is_answer = next_ids != data.IGNORE
        log_p = row[:-1][is_answer].float().log_softmax(-1)  # (tokens, V)
        of_answer = log_p.gather(1, next_ids[is_answer][:, None])  # (tokens, 1)
        means.append(of_answer.mean().item())
    return means
