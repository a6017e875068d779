"""From files to batches: pictures, LLaVA's records, templates, token ids, labels.

The path of one training sample, top to bottom in this file:

    record  {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}
    pieces  [("USER: <image>\\n... ASSISTANT:", CONTEXT), (" Red", ANSWER), ("</s>", END)]    a template
    ids     1 3148 ... -200 ... 4367 2                                                         tokenise
    labels  -100 -100 ... -100 ... 4367 2          loss on ANSWER and END, nothing else
    batch   the marker -200 becomes N placeholders, rows are padded                            collate

Labels are never found by a search among tokens: each piece carries its role from the template to the batch.

Read next: projector.py, which puts the image into the batch.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from plumbing.chat_template import (ASKED, ASKED_AGAIN, QUESTION, REPLIED, THOUGHTS_END, begun_thoughts,
                                    cut_chat, thoughts_of)
from plumbing.files import named
from plumbing.pictures import MAX_PIXELS, find_image, load_image
from plumbing.tokenizer import bos_ids, special_names

IMAGE = "<image>"  # the marker in conversations
# The same among ids: one for an image, until collate knows how many tokens it takes. It is LLaVA's number,
# and no row of the embedding table, so no vocabulary has to grow.
IMAGE_MARKER = -200
IGNORE = -100  # the label of a token without loss
CONTEXT, ANSWER, END = "context", "answer", "end"  # roles of text: given; to be said; to stop with

# ------------------------------------------------------------------------------------------------------------
# Pictures

def preprocess(image: Image.Image, tower, fit: str) -> torch.Tensor:
    """RGB picture -> normalised pixels (3, size, size), as CLIP's image processor makes them.

    `tower` is a vit.ViTConfig: it knows image_size, image_mean, image_std and resample. `fit` "crop" scales
    the short side to that size and cuts out the centre (LLaVA's stage 1). "pad" first makes the picture
    square with borders of the mean colour, so that nothing is lost (LLaVA-1.5's stage 2 and evaluation).
    """
    size = tower.image_size
    if fit == "pad":
        image = pad_to_square(image, tower.image_mean)
    elif fit != "crop":
        raise ValueError(f"fit {fit!r} is neither 'crop' nor 'pad'")
    short = min(image.size)
    # A whole strip would fill the memory once it is scaled. Nothing far from its centre is seen anyway.
    image = cut_centre(image, min(image.width, 64 * short), min(image.height, 64 * short))
    # int, not round, as in CLIP's own processor: a pixel more would shift every patch.
    width = int(size * image.width / short)
    height = int(size * image.height / short)
    image = image.resize((width, height), tower.resample)
    image = cut_centre(image, size, size)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy() / 255  # (3, size, size)
    mean, std = np.float32([tower.image_mean, tower.image_std])[..., None, None]  # each (3, 1, 1)
    return torch.from_numpy((pixels - mean) / std)  # (3, size, size)


def pad_to_square(image: Image.Image, mean) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side = max(image.size)
    if side**2 > MAX_PIXELS:  # the square of a strip would take gigabytes
        image = image.reduce(math.ceil(side / math.isqrt(MAX_PIXELS)))
        side = max(image.size)
    colour = tuple(int(255 * m) for m in mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def cut_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# ------------------------------------------------------------------------------------------------------------
# Records: LLaVA's JSON

LIKE_IMAGE = re.compile("image|img|picture|photo|video", re.IGNORECASE)  # keys, of other formats of records
SURELY_IMAGE = re.compile("^(images|videos?)$")


def find_problem(record, stage=None) -> str | None:
    """A few words on what is wrong with a record (with `stage`: also for that stage), or None. Reads no
    picture."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        other = "messages" if isinstance(record, dict) and "messages" in record else "no conversation turns"
        return f"has {other}; LLaVA's records have 'conversations', a list of {{'from': .., 'value': ..}}"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "has a turn without text: each has 'from' ('human' or 'gpt') and 'value'"
        if turn.get("from") not in ("human", "gpt"):
            return f"has a turn from {turn.get('from')!r}; the roles are 'human' and 'gpt'"
    if turns[0]["from"] == "gpt":  # LLaVA drops an opening answer
        turns = turns[1:]
    roles = [turn["from"] for turn in turns]
    if "gpt" not in roles:
        return "has no answer to a question"
    if "gpt" in roles[::2] or "human" in roles[1::2]:
        return "has turns that do not alternate between human and gpt"
    if not all(turn["value"].strip() for turn in turns):
        return "has an empty turn"
    image = tidy(record).get("image")
    marked = [turn["from"] for turn in turns if IMAGE in turn["value"]]
    if isinstance(image, list) and len(image) > 1:
        return f"has {len(image)} images; one is supported"
    if not isinstance(image, (str, type(None))):
        return "has an image that is not a file name"
    pattern = LIKE_IMAGE if marked else SURELY_IMAGE
    others = [key for key in tidy(record) if pattern.search(key) and record[key]]
    if others and not image:
        return f"has no 'image'; is it {others[0]!r}?"
    if image and marked != ["human"]:
        return f"has an image, and {len(marked)} turns with {IMAGE} (one question must have it)"
    if stage == "align" and not (image and len(turns) == 2):
        return "is not an image with one caption, which is what the align stage takes"
    return None


def tidy(record: dict) -> dict:
    """The record with a list of one image as that image, and without an image that is null or empty."""
    record = dict(record)
    image = record.pop("image", None)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image not in (None, "", []):
        record["image"] = image
    return record


def clean_turns(record) -> list:
    """[(role, text)] of a tidy record. Drops an opening answer, and moves the image marker to the front of
    its turn.

    LLaVA's own code does both: wherever the data has the marker, the model sees the image before the
    question. In a text-only record a literal <image> stays text.
    """
    cleaned = []
    for turn in record["conversations"]:
        text = turn["value"]
        if "image" in record and IMAGE in text:
            text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
        cleaned.append((turn["from"], text))
    return cleaned[1:] if cleaned[0][0] == "gpt" else cleaned


# ------------------------------------------------------------------------------------------------------------
# Templates: turns -> pieces of text with their roles

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


class Form(NamedTuple):
    """How a conversation becomes text: strings around questions and answers, and what happens to these."""

    opening: str  # before the first question
    to_answer: str  # between a question and its answer
    lead: str  # opens an answer, and is learned: a space belongs to the word behind it
    end: str  # ends an answer, and is learned
    again: str  # before each further question
    question: Callable = str  # what a question becomes: itself, or `str.strip`
    answer: Callable = str
    to_thoughts: str | None = None  # in place of `to_answer`, before an answer that brings its thoughts


def plain(tokenizer, prompt: str = "") -> Form:
    """Stage 1: the image, its caption, a newline. The caption ends with no end token.

    `prompt` comes between image and caption. The prompted contrastive loss reads the LLM's state at its end.

    Behind a tokenizer without BOS a newline comes first, which is ours. LLMs park attention that they do not
    need on the first position (Xiao et al. 2023, arXiv 2309.17453). With an untrained patch there, all heads
    look at noise, and rounding errors fill the gradient.
    """
    opening = "" if bos_ids(tokenizer) else "\n"
    if prompt:
        return Form(opening, f"\n{prompt}", " ", "\n", "")
    return Form(opening, "", "", "\n", "")


def v1(tokenizer) -> Form:
    """Vicuna's form, LLaVA-1.5's stage 2 and evaluation: `{SYSTEM} USER: {q} ASSISTANT: {a}</s>USER: ...`."""
    return Form(f"{SYSTEM} USER: ", " ASSISTANT:", " ", tokenizer.eos_token, "USER: ")


def chat(tokenizer) -> Form:
    """The LLM's own form, read off the chat template of its tokenizer: render tiny chats, see what is around
    our words.

    A model that can think (<think>..</think>) does not, unless an answer brings its thoughts. White space
    before the end token is left out. ValueError for a template that drops a question, changes what came
    before, or ends an answer with no special token."""
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template")
    prompt = cut_chat(tokenizer, ASKED, add_generation_prompt=True)
    short = cut_chat(tokenizer, ASKED, REPLIED)
    long = cut_chat(tokenizer, ASKED, REPLIED, ASKED_AGAIN)
    if (len(prompt), len(short), len(long)) != (2, 3, 4):
        raise ValueError("the tokenizer's chat template drops a question or an answer")
    opening, to_answer = prompt
    before = short[1]  # what stands before the answer
    behind = long[2]  # and behind it
    is_same_start = opening == short[0] == long[0]
    if not is_same_start or not (before.startswith(to_answer) or to_answer.startswith(before)):
        raise ValueError("the tokenizer's chat template rewrites earlier turns: no boundary for labels")
    to_answer = to_answer.removesuffix(begun_thoughts(tokenizer))
    lead = before[len(to_answer) :]  # "", too, if `to_answer` has empty thoughts that an answer lacks
    end = re.match(rf"\s*({special_names(tokenizer)})", behind)
    if end is None:
        raise ValueError("the tokenizer's chat template does not end an answer with a special token")
    spaced = cut_chat(tokenizer, ("user", f" {QUESTION} "), add_generation_prompt=True)
    trim_question = str.strip if spaced == prompt else str
    _, to_thoughts = cut_chat(tokenizer, ASKED, add_generation_prompt=True, enable_thinking=True)
    write_answer = thoughts_of(tokenizer, to_thoughts)
    again = behind[end.end() :]
    return Form(opening, to_answer, lead, end[1], again, trim_question, write_answer, to_thoughts)


TEMPLATES = {"plain": plain, "v1": v1, "chat": chat}

# Words of the prompted contrastive loss: (after the image, after the caption). All are ours. The tiny LLM
# knows only those of "describe".
PROMPTS = {
    "none": ("", ""),
    "one-word": ("Summarize the image in one word:", "Summarize the sentence in one word:"),
    "compress": ("Compress this image in one word:", "Compress this sentence in one word:"),
    "describe": ("Describe the picture.", "Describe the picture."),
}


def image_and_caption(turns) -> list:
    """The turns of the plain template, which throws the question away."""
    if len(turns) != 2 or IMAGE not in turns[0][1]:
        raise ValueError(f"the plain template takes one {IMAGE} and one answer, not {len(turns)} turns")
    return [("human", IMAGE), turns[1]]


def form_of(name: str, tokenizer, prompt: str = "") -> Form:
    """The form of a template for this tokenizer; `prompt` is for "plain". An error names the tokenizer."""
    with named(f"{tokenizer.name_or_path}: template {name}"):
        if name == "plain":
            return plain(tokenizer, prompt)
        return TEMPLATES[name](tokenizer)


def to_pieces(turns, form: Form, tokenizer, has_image: bool) -> list:
    """[(text, role)] of turns [(role, text)]: what is given, what is to be said, what ends it."""
    pieces = []
    before = form.opening
    answers = [answer for _, answer in turns[1::2]] + [None]  # None: the question is open
    for (_, question), answer in zip(turns[::2], answers):
        has_marker = has_image and not any(IMAGE in said for said, _ in pieces)  # the first that has one
        question = form.question(as_text(question, tokenizer, has_marker))
        has_thoughts = form.to_thoughts is not None and THOUGHTS_END in (answer or "")
        to_answer = form.to_thoughts if has_thoughts else form.to_answer
        pieces.append((before + question + to_answer, CONTEXT))
        if answer is not None:
            lead = "" if has_thoughts else form.lead  # thoughts bring their own
            pieces.append((lead + form.answer(as_text(answer, tokenizer, False)), ANSWER))
            pieces.append((form.end, END))
        before = form.again
    return pieces


def as_text(text: str, tokenizer, has_marker: bool) -> str:
    """The text, with a space in each name of a special token: `</s>` becomes `< /s>`.

    Only templates may write special tokens. Otherwise data could end its own turn. An image marker at the
    front stays.
    """
    marker = IMAGE if has_marker and text.startswith(IMAGE) else ""
    names = f"{special_names(tokenizer)}|{IMAGE}"
    return marker + re.sub(names, lambda match: f"{match[0][0]} {match[0][1:]}", text.removeprefix(marker))


# ------------------------------------------------------------------------------------------------------------
# Pieces -> ids

def tokenise(pieces, tokenizer, has_image: bool) -> tuple:
    """(ids, roles) of pieces [(text, role)], two lists, with one IMAGE_MARKER for the image.

    A tokenizer may treat a word differently inside a sentence and at its start. So all pieces up to the image
    are one text, all behind it another, and the tokenizer tells whose characters each token covers.
    """
    text = "".join(text for text, _ in pieces)
    role_of = []  # of each character
    for part, role in pieces:
        role_of += [role] * len(part)
    ids = bos_ids(tokenizer)
    roles = [CONTEXT] * len(ids)
    start = 0
    for number, part in enumerate(split_at_image(text, has_image)):
        if number == 1:
            ids.append(IMAGE_MARKER)
            roles.append(CONTEXT)
        tokens = tokenizer.backend_tokenizer.encode(part, add_special_tokens=False)
        ids += tokens.ids
        roles += token_roles(tokens, part, role_of[start : start + len(part)])
        start += len(part) + len(IMAGE)
    largest = max(ids, default=0)
    # plumbing/tokenizer.py notes the rows of the LLM's embedding table. A tokenizer may know more tokens.
    if largest >= getattr(tokenizer, "rows", math.inf):
        name = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"the LLM has no embedding for {name!r}: it has {tokenizer.rows}")
    return ids, roles


def split_at_image(text: str, has_image: bool) -> list:
    """The text before the image and the text behind it. Without an image, a marker is mere text."""
    return text.split(IMAGE, 1) if has_image else [text]


def token_roles(tokens, text: str, role_of: list) -> list:
    """The role of each token of the text, whose characters have the roles `role_of`."""
    roles = []
    end = 0
    for name, (start, stop) in zip(tokens.tokens, tokens.offsets):
        if name.startswith("Ġ"):  # its place may leave out the space that Ġ stands for
            start = min(start, end)
        end = max(end, stop)
        covered = set(role_of[start:stop])
        if not covered:  # the space that SentencePiece adds at a start: it goes with the next character
            covered = {role_of[min(start, len(text) - 1)]}
        # A token over an answer and its end is harmless: both carry loss (Llama 3 and Qwen have one token for
        # ".\n").
        if CONTEXT in covered and len(covered) > 1:
            raise ValueError(f"the tokenizer joins {text[start:stop]!r}: no boundary for labels")
        roles.append(ANSWER if ANSWER in covered else covered.pop())
    return roles


def encode(turns, form: Form, tokenizer, has_image: bool) -> tuple:
    """(ids, roles) of turns [("human", text), ("gpt", text), ..]. An open question ends where its answer
    begins."""
    return tokenise(to_pieces(turns, form, tokenizer, has_image), tokenizer, has_image)


# ------------------------------------------------------------------------------------------------------------
# Samples and batches

class Conversations(torch.utils.data.Dataset):
    """LLaVA records as samples {"ids", "roles", "pixels" (3, size, size) or None, "image" name or None,
    "name"}.

    `tower`: the vit.ViTConfig that the pixels are for. `prompts`, for the plain template: the words after the
    image, and those after the caption. With the latter a sample also has "text_ids", the text-only
    [caption][prompt] of the prompted contrastive loss. `cache`: keep samples in memory, in each process that
    reads.
    """

    def __init__(self, records, images, tokenizer, template: str, tower, fit: str, prompts=("", None),
                 cache: bool = False):
        self.records = records
        self.images = Path(images)
        self.tokenizer = tokenizer
        self.form = form_of(template, tokenizer, prompts[0])
        self.is_plain = template == "plain"
        self.tower = tower
        self.fit = fit
        self.text_prompt = prompts[1]
        self.cache = cache
        self.seen = {}
        self.features = None  # or {image name: features (P, D)}, which take the place of pixels

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        sample = self.seen.get(i) or self.read(i)
        if self.cache:
            self.seen[i] = sample
        return sample

    def turns(self, record) -> list:
        turns = clean_turns(record)
        return image_and_caption(turns) if self.is_plain else turns

    def read(self, i, with_pixels: bool = True) -> dict:
        """The sample. Without pixels, True stands for those of a record that has an image."""
        record = self.records[i]
        image = record.get("image")
        name = f"record {record.get('id', i)!r}"
        sample = {"name": name, "image": image, "pixels": None}
        with named(name):
            turns = self.turns(record)
            sample["ids"], sample["roles"] = encode(turns, self.form, self.tokenizer, image is not None)
            if image is not None:
                sample["pixels"] = self.pixels(image) if with_pixels else True
            if self.text_prompt is not None:
                caption = as_text(turns[1][1], self.tokenizer, False)
                text = f"{caption}\n{self.text_prompt}".strip()
                sample["text_ids"], _ = tokenise([(text, CONTEXT)], self.tokenizer, False)
        return sample

    def pixels(self, image: str):
        """Pixels (3, size, size) of a picture, or its features (P, D)."""
        if self.features is not None:
            return self.features[image]
        picture = load_image(find_image(self.images, image))
        return preprocess(picture, self.tower, self.fit)

    def count_tokens(self, numbers, num_image_tokens: int) -> list:
        """The tokens of the rows of some records, before they are cut. The tokenizer takes all texts at
        once."""
        texts = []
        owners = []
        totals = [len(bos_ids(self.tokenizer))] * len(numbers)
        for place, number in enumerate(numbers):
            record = self.records[number]
            has_image = "image" in record
            with named(f"record {record.get('id', number)!r}"):
                pieces = to_pieces(self.turns(record), self.form, self.tokenizer, has_image)
                text = "".join(text for text, _ in pieces)
                text.encode()  # half a character, as in "\ud800", is an error that names the record
            parts = split_at_image(text, has_image)
            texts += parts
            owners += [place] * len(parts)
            totals[place] += num_image_tokens * has_image
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for place, tokens in zip(owners, encoded):
            totals[place] += len(tokens.ids)
        return totals


def expand(sample, num_image_tokens: int, max_length: int, image_token_id: int = IMAGE_MARKER,
           side: str = "right") -> dict:
    """One row of a batch before padding: lists "ids" and "labels" (S,), "caption_ids" (T,)."""
    ids = []
    labels = []
    is_answer = []
    for token, role in zip(sample["ids"], sample["roles"]):
        times = num_image_tokens if token == IMAGE_MARKER else 1
        ids += [image_token_id if token == IMAGE_MARKER else token] * times
        labels += [IGNORE if role == CONTEXT else token] * times
        is_answer += [role == ANSWER] * times
    if side == "left" and len(ids) > max_length:  # a prompt, which must not lose its end
        raise ValueError(f"{sample['name']}: {len(ids)} tokens; an answer leaves room for {max_length}")
    ids = ids[:max_length]
    has_image = sample["pixels"] is not None
    if ids.count(image_token_id) != num_image_tokens * has_image:
        raise ValueError(f"{sample['name']}: the image does not fit into {max_length} tokens")
    caption_ids = [token for token, said in zip(ids, is_answer) if said]
    return {"ids": ids, "labels": labels[:max_length], "caption_ids": caption_ids}


def pad(rows: list, value: int, side: str = "right"):
    """Lists of numbers as one tensor (B, longest)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)  # (B, longest)


def pad_mask(rows: list, side: str = "right"):
    """(B, longest) False at padding."""
    return pad([[1] * len(row) for row in rows], 0, side).bool()


def collate(samples, num_image_tokens: int, image_token_id: int, pad_id: int, image_size: int,
            max_length: int = 2048, side: str = "right") -> dict:
    """Samples -> one batch. B samples, S the longest of them, I images in all, T the longest caption.

    ids (B, S)            each image marker grown to N placeholders, padded with `pad_id`
    mask (B, S)           False at padding
    labels (B, S)         the id where it carries loss, else -100
    pixels (I, 3, H, W)   in reading order; one dummy of zeros if the batch has no image (see VLM.splice); or
                          features (I, P, D), if the samples have these
    caption_ids, caption_mask (B, T)   the answer's tokens alone, for the contrastive loss
    keys (B, 2)           a number for each distinct caption, and one for each distinct image
    image_at (I N,)       the places of the placeholders in the flattened ids
    loss_at (n,)          the places whose next token carries loss
    state_at (B,)         the last place of each row before its first label: its state has seen no caption
    names                 of the samples, for errors
    text_ids, text_mask (B, T'), text_at (B,)   caption and text prompt, and the place of its last token

    Training pads on the right, where causal attention needs no mask. Generation pads on the left (`side`), so
    that the last position is the prompt's last token in every row. Rows are cut at `max_length`, but never in
    an image. Prompts are not cut at all, because their end matters most. ValueError if one, or an image, does
    not fit.
    """
    rows = [expand(sample, num_image_tokens, max_length, image_token_id, side) for sample in samples]
    captions = [row["caption_ids"] for row in rows]
    batch = {
        "ids": pad([row["ids"] for row in rows], pad_id, side),  # (B, S)
        "mask": pad_mask([row["ids"] for row in rows], side),  # (B, S)
        "labels": pad([row["labels"] for row in rows], IGNORE, side),  # (B, S)
        "caption_ids": pad(captions, pad_id),  # (B, T)
        "caption_mask": pad_mask(captions),  # (B, T)
    }
    pixels = [sample["pixels"] for sample in samples if sample["pixels"] is not None]
    batch["pixels"] = torch.stack(pixels or [torch.zeros(3, image_size, image_size)])
    images = [sample.get("image") or sample["name"] for sample in samples]
    batch["names"] = [sample["name"] for sample in samples]
    batch["keys"] = torch.tensor([list(map(key_of, captions)), list(map(key_of, images))]).T  # (B, 2)
    # Found here, on the CPU, so that nobody waits for a GPU to tell.
    B, S = batch["ids"].shape
    first_of_row = S * torch.arange(B)  # (B,)
    has_loss = batch["labels"] != IGNORE  # (B, S)
    batch["image_at"] = (batch["ids"] == image_token_id).flatten().nonzero()[:, 0]
    batch["loss_at"] = F.pad(has_loss[:, 1:], (0, 1)).flatten().nonzero()[:, 0]
    before_loss = has_loss.int().argmax(1) - 1  # (B,)
    batch["state_at"] = first_of_row + before_loss.clamp(min=0)
    if "text_ids" in samples[0]:
        texts = [sample["text_ids"] for sample in samples]
        # A row that is too long loses what follows its first token: the prompt stands at its end, and stays.
        texts = [ids[:1] + ids[1:][1 - max_length :] for ids in texts]
        batch["text_ids"] = pad(texts, pad_id)  # (B, T')
        batch["text_mask"] = pad_mask(texts)  # (B, T')
        longest = batch["text_ids"].shape[1]
        batch["text_at"] = longest * torch.arange(B) + batch["text_mask"].sum(1) - 1
    return batch


def key_of(value) -> int:
    """A number for the value, the same in every process. (Python's own hash of a text is not.)"""
    if not isinstance(value, (bytes, np.ndarray)):
        value = repr(value).encode()
    return int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "big")


def to_device(batch: dict, device) -> dict:
    """The batch with its tensors on the device."""
    moved = {key: x.to(device, non_blocking=True) for key, x in batch.items() if torch.is_tensor(x)}
    return batch | moved


def marked_text(sample, tokenizer) -> str:
    """One sample as the model sees it, with what carries loss between [[ and ]]: the first thing to look
    at."""
    text = ""
    is_inside = False
    for token, role in zip(sample["ids"], sample["roles"]):
        if (role != CONTEXT) != is_inside:
            text += "]] " if is_inside else " [["
            is_inside = not is_inside
        text += IMAGE if token == IMAGE_MARKER else f" {tokenizer.decode([token])}"
    return text + ("]]" if is_inside else "")
