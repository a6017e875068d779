"""From files to batches: images and LLaVA conversations.

    python data.py check annotations.json images/             # list bad records, write a cleaned copy

The path of one training sample, top to bottom in this file:

    record  {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}
    pieces  [("USER: <image>\\n... ASSISTANT:", CONTEXT), (" Red", ANSWER), ("</s>", END)]    a template
    ids     1 3148 ... -200 ... 4367 2                                                         tokenise
    labels  -100 -100 ... -100 ... 4367 2          loss on ANSWER and END, nothing else
    batch   the marker -200 becomes N placeholders, rows are padded                            collate

Labels are never recovered by searching in tokens: each piece carries its role from the template to the batch.

Read next: train.py, where the batches go.
"""

import argparse
import base64
import contextlib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from plumbing.files import TOKENIZER_FILES, named, read_json, resolve, whole


IMAGE = "<image>"  # the marker in conversations
IMAGE_MARKER = -200  # the same, among ids: one for an image until collate knows how many tokens it takes
IGNORE = -100  # the label of a token without loss
CONTEXT, ANSWER, END = "context", "answer", "end"  # roles of text: given; to be said; to stop with

# ------------------------------------------------------------------------------------------------------------
# Images

MAX_PIXELS = 178_956_970  # of a picture; Pillow's own limit. A larger one may be a bomb, and takes gigabytes


def existing(path: Path) -> Path:
    """The path, or, where no file is there, one of the same stem: OCR-VQA's .gif files are often kept as
    .jpg, and the other way round."""
    if path.is_file() or not path.stem:
        return path
    others = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return next((other for other in others if other.is_file()), path)


def find_image(folder, name: str) -> Path:
    """Where the picture that a record names lies. ValueError for a name that leads out of the folder, by
    itself or by a link: whoever wrote the record could have any file of this machine read."""
    path = existing(Path(folder, name))
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name!r} leads out of the folder of images, {folder}")
    return path


def load_image(source) -> Image.Image:
    """The picture as RGB, as a viewer shows it, of a path, or of `bytes`: a picture file in base64. A missing
    or damaged file is an error that names it.

    LLaVA's own code calls `convert("RGB")` and no more. We differ from it where a camera was held sideways
    (EXIF), where a grey has more than 8 bits (it would turn white), and where the ground is transparent (a
    black drawing would turn black on black; here the ground is white).
    """
    name = "in base64" if isinstance(source, bytes) else existing(Path(source))
    if name != "in base64" and not name.is_file():
        raise FileNotFoundError(f"{name}: no such image")
    with named(name, "not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's do not name the file
        Image.MAX_IMAGE_PIXELS = None  # ours is checked here, and says what to do
        with Image.open(io.BytesIO(base64.b64decode(source)) if isinstance(source, bytes) else name) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; raise data.py's MAX_PIXELS, "
                                 f"{MAX_PIXELS}, for files that you trust")
            image.load()
            picture = to_rgb(image)
            picture.info = {}  # of the EXIF data only this, where they are not damaged
            with contextlib.suppress(Exception):
                picture.getexif()[0x0112] = image.getexif().get(0x0112, 1)
            return ImageOps.exif_transpose(picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits scaled to 8, what is transparent over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        tops = (1, 255, 65535) if image.mode == "F" else (65535,)
        top = next((top for top in tops if values.max() <= top), values.max())
        values[values == image.info.get("transparency")] = top  # one grey may be named transparent
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, tower, fit: str) -> torch.Tensor:
    """RGB picture -> normalised pixels (3, size, size), as CLIP's image processor makes them.

    `tower` is a vit.ViTConfig; it knows image_size, image_mean, image_std and resample. `fit`: "crop" scales
    the short side to that size and cuts out the centre (LLaVA's stage 1); "pad" first makes the picture
    square with borders of the mean colour, so that nothing is lost (LLaVA-1.5's stage 2 and evaluation).
    """
    size = tower.image_size
    if fit == "pad":
        side = max(image.size)
        if side**2 > MAX_PIXELS:  # a strip, whose square would take gigabytes
            image = image.reduce(math.ceil(side / math.isqrt(MAX_PIXELS)))
            side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in tower.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif fit != "crop":
        raise ValueError(f"fit {fit!r} is neither 'crop' nor 'pad'")
    short = min(image.size)
    left, top = (max(0, length - 64 * short) // 2 for length in image.size)  # whole, a strip would fill the
    image = image.crop((left, top, image.width - left, image.height - top))  # memory once it is scaled
    # int, not round: so CLIP's own processor has it, and a pixel more would shift every patch
    image = image.resize((int(size * image.width / short), int(size * image.height / short)), tower.resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(tower.image_mean)) / np.float32(tower.image_std)  # (size, size, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, size, size)


# ------------------------------------------------------------------------------------------------------------
# Records: LLaVA's JSON

def find_problem(record, stage=None) -> str | None:
    """What is wrong with a record, in a few words, or None; also what is wrong with it in that stage. Reads
    no image file."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        return "has no conversation turns"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "has a turn without text"
        if turn.get("from") not in ("human", "gpt"):
            return f"has a turn from {turn.get('from')!r}; the roles are 'human' and 'gpt'"
    turns = turns[1:] if turns[0]["from"] == "gpt" else turns  # LLaVA drops an opening answer
    roles = [turn["from"] for turn in turns]
    if "gpt" not in roles:
        return "has no answer to a question"
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        return "has turns that do not alternate between human and gpt"
    if not all(turn["value"].strip() for turn in turns):
        return "has an empty turn"
    marked, image = [turn["from"] for turn in turns if IMAGE in turn["value"]], tidy(record).get("image")
    if not isinstance(image, (str, type(None))):
        return "has an image that is not a file name"
    if image and marked != ["human"]:
        return f"has an image, and {len(marked)} turns with {IMAGE} (one question must have it)"
    if stage == "align" and not (image and len(turns) == 2):
        return "is not an image with one caption, which is what the align stage takes"
    return None


class Records:
    """The records of a LLaVA JSON file, by number or slice, "image" a name or left out. They stay on disk,
    and are parsed when they are asked for: in memory is where each stands, however many processes read them.

    places (n + 1,)   where in the file, in bytes, each record begins
    sizes (n, 4)      of each: its characters of text, its turns, whether it has an image, and the bytes of
                      the turns before that
    """

    def __init__(self, file, places, sizes):
        self.file, self.places, self.sizes = file, np.array(places), np.array(sizes, dtype=np.int32)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        number = range(len(self))[i]  # also from the end; IndexError behind it
        if isinstance(i, slice):
            return [self[j] for j in number]
        first, stop = self.places[number : number + 2]
        with open(self.file, "rb") as file:
            file.seek(first)
            return tidy(json.JSONDecoder().raw_decode(file.read(stop - first).decode())[0])


def load_records(file, stage=None) -> Records:
    """The records of a LLaVA JSON file; the first that is bad, or not for this stage, is an error naming
    file, position and id."""
    places, sizes = [], []
    for record, start, stop in scan_list(file):
        if problem := find_problem(record, stage):
            name = record.get("id") if isinstance(record, dict) else None
            raise ValueError(f"{file}: record {len(sizes)} (id {name!r}) {problem}; `data.py check` lists "
                             "all")
        texts, has_image = [turn["value"] for turn in record["conversations"]], "image" in tidy(record)
        before = itertools.takewhile(lambda text: IMAGE not in text, texts) if has_image else ()
        bytes_before = sum(32 + len(text.encode(errors="replace")) for text in before)  # 32: roles, ends
        sizes.append((sum(map(len, texts)), len(texts), has_image, bytes_before))
        places.append(start)
    return Records(file, [*places, stop], sizes)


def scan_list(file, part: int = 2**24):
    """Yield (entry, its first byte, the byte behind it) of each entry of a JSON list on disk, of which some
    `part` characters at a time are in memory. ValueError for what is not such a list, or an empty one."""
    decode, mark = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*([\[,\]])[ \t\n\r]*")
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            text, before = opened.read(part), "["
            at, place = (1, 3) if text.startswith("\ufeff") else (0, 0)  # place: of text[at], in bytes
            while True:
                found = mark.match(text, at)
                if found and found[1] == "]" != before:
                    break
                try:
                    if not found or found[1] != before:
                        raise ValueError
                    entry, end = decode(text, found.end())
                except ValueError:  # wrong, or cut off: with more of the file it may be right
                    more = opened.read(part)
                    if not more:
                        raise
                    text, at = text[at:] + more, 0
                    continue
                start = place + len(text[at : found.end()].encode())
                place, at, before = start + len(text[found.end() : end].encode()), end, ","
                yield entry, start, place
            if text[found.end() :] or opened.read().strip():
                raise ValueError
    except (OSError, ValueError, RecursionError):
        read_json(file)  # says what is wrong
        raise ValueError(f"{file}: not a JSON list of records") from None


def tidy(record: dict) -> dict:
    """The record with a list of one image as that one, and without an image that is null or empty."""
    image, rest = record.get("image"), {key: value for key, value in record.items() if key != "image"}
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    return rest if image in (None, "", []) else rest | {"image": image}


def clean_turns(record) -> list:
    """[(role, text)] with an opening answer dropped and the image marker moved to the front of its turn.

    So says LLaVA's own code: whether the data has the marker before or after the question, the model sees it
    before. In a text-only record a literal <image> stays text.
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


def plain(turns, tokenizer, prompt: str = "") -> list:
    """Stage 1: the image, its caption, a newline. The instruction is thrown away and no end token is trained.

    `prompt` comes between the two; the prompted contrastive loss reads the LLM's state at its end.

    Behind a tokenizer without BOS a newline comes first, which is ours: every head of an LLM attends to the
    first position when it has nothing to say (Xiao et al. 2023, arXiv 2309.17453), and a fresh projector's
    patch there makes the gradient a matter of rounding. With SmolLM2-135M and 32 captions, that of bf16 had a
    cosine of 0.29 with that of fp32; behind a newline, 0.98.
    """
    if len(turns) != 2 or IMAGE not in turns[0][1]:
        raise ValueError(f"the plain template takes one {IMAGE} and one answer, not {len(turns)} turns")
    turns, first = typed(turns, tokenizer), "" if tokenizer("").input_ids else "\n"
    context, caption = (f"{IMAGE}\n{prompt}", f" {turns[1][1]}") if prompt else (IMAGE, turns[1][1])
    return [(first + context, CONTEXT), (caption, ANSWER), ("\n", END)]


def v1(turns, tokenizer) -> list:
    """Vicuna's form, LLaVA-1.5's stage 2 and evaluation: `{SYSTEM} USER: {q} ASSISTANT: {a}</s>USER: ...`."""
    pieces, before = [], f"{SYSTEM} "
    for role, text in typed(turns, tokenizer):
        if role == "human":
            pieces.append((f"{before}USER: {text} ASSISTANT:", CONTEXT))
        else:
            pieces += [(f" {text}", ANSWER), (tokenizer.eos_token, END)]
        before = ""
    return pieces


def chat(turns, tokenizer) -> list:
    """The LLM's own chat template, which comes with its tokenizer, without thinking where it knows such a
    mode, unless an answer brings its thoughts.

    The conversation is rendered again after every turn, and a turn's text is what it added. The last answer
    is the exception: once the next question has come, it may be written differently (Qwen3 then drops its
    thoughts), so its end is looked for again. An answer ends with the special token that the template puts
    behind it (of a base model that is not the tokenizer's end token); what follows is context.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template")
    render, bos = partial(tokenizer.apply_chat_template, tokenize=False), tokenizer.bos_token
    messages, pieces, asked, opening = [], [], "", ""  # asked: the chat up to the last question
    turns = typed(turns, tokenizer)
    for (role, text), (_, answer) in zip(turns, [*turns[1:], ("gpt", "")]):
        if role == "human":
            messages.append({"role": "user", "content": text})
            now = render(messages, enable_thinking=False)
            question = added(asked, now)
            if len(messages) > 1:
                question = split_answer(question, messages[-2]["content"], opening, tokenizer)[2]
            elif bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
                question = question.removeprefix(bos)  # `tokenise` writes it
            if text.strip() not in question:
                raise ValueError("the tokenizer's chat template drops the question")
            opened = render(messages, add_generation_prompt=True, enable_thinking=THOUGHTS_END in answer)
            asked, opening = now, added(now, opened)
            pieces.append((question + opening, CONTEXT))
        else:
            thoughts, mark, last = text.strip().rpartition(THOUGHTS_END)
            messages.append({"role": "assistant", "content": text.strip()})
            now = added(asked, render(messages, enable_thinking=False))
            before, end, _ = split_answer(now, text, opening, tokenizer)
            # an opening may have empty thoughts that the answer, once given, does not
            lead, last = "" if opening.startswith(before) else added(opening, before), last.strip()
            if thoughts.removeprefix("<think>").strip() not in lead:
                raise ValueError("the tokenizer's chat template drops the thoughts of an answer")
            if lead.strip() and not mark:  # such as thoughts that the opening lacks: given, not learned
                pieces.append((lead, CONTEXT))
                lead = ""
            pieces += [(lead + last, ANSWER), (end, END)]
    return pieces


THOUGHTS_END = "</think>"  # in an answer: what stands before it are thoughts


def added(before: str, now: str) -> str:
    """What `now` has behind `before`."""
    if not now.startswith(before):
        raise ValueError("the tokenizer's chat template rewrites earlier turns: no boundary for labels")
    return now[len(before) :]


def split_answer(text: str, answer: str, opening: str, tokenizer) -> tuple:
    """(what stands before `answer`, without its thoughts, in text; its end token; what stands behind that):
    of the special tokens in text the first that is not the opening's is its end."""
    pattern, answer = specials_of(tokenizer)[1], answer.rpartition(THOUGHTS_END)[2].strip()
    ends = list(pattern.finditer(text))[len(pattern.findall(opening)) :]
    said = text[: ends[0].start()].rstrip() if ends else ""
    if not ends or not said.endswith(answer):
        raise ValueError("the tokenizer's chat template does not end an answer with a special token")
    return said.removesuffix(answer), ends[0][0], text[ends[0].end() :]


TEMPLATES = {"plain": plain, "v1": v1, "chat": chat}


class Form(NamedTuple):  # for the time of the move: a template, and the special token that ends its answers
    template: object
    end: str


def form_of(name: str, tokenizer) -> Form:
    """The form of a template for this tokenizer."""
    *_, (end, _) = TEMPLATES[name]([("human", "?"), ("gpt", "!")], tokenizer)
    return Form(TEMPLATES[name], end)


def encode(turns, form: Form, tokenizer, has_image: bool) -> tuple:
    """(ids, roles) of a conversation; an open question ends where its answer begins."""
    return tokenise(form.template(turns, tokenizer), tokenizer, has_image)

# Of the prompted contrastive loss: (after the image, after the caption). All are our choice. The tiny LLM
# knows the words of "describe" alone.
PROMPTS = {
    "none": ("", ""),
    "one-word": ("Summarize the image in one word:", "Summarize the sentence in one word:"),
    "compress": ("Compress this image in one word:", "Compress this sentence in one word:"),
    "describe": ("Describe the picture.", "Describe the picture."),
}

# ------------------------------------------------------------------------------------------------------------
# Pieces -> ids

def load_tokenizer(folder_or_id):
    """The LLM's tokenizer. Padding gets the unknown token's id, as LLaVA has it, or the end's."""
    from transformers import AutoTokenizer  # imported late: it takes seconds
    folder = resolve(folder_or_id, ("*.json", *TOKENIZER_FILES))
    with named(folder, "no tokenizer could be made. Without a tokenizer.json, as in Vicuna's folders, put "
               "one there (for Vicuna 1.5 that of llava-hf/llava-1.5-7b-hf) or `pip install sentencepiece "
               "protobuf`"):  # transformers raises many kinds, most of them about packages
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask, and wait
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: labels need to know where tokens stand; a tokenizer.json says so")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no end token (eos_token in tokenizer_config.json): "
                         "answers could not end")
    tokenizer.model_max_length = 10**9  # no warning of the tokenizer's own: collate cuts or refuses long rows
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer, size: int):
    """Refuse a tokenizer of more tokens than the LLM has embeddings: it is another LLM's. (Tokens added to it
    later do not count: LLaVA's tokenizer serves Vicuna, which has no row for its <image> and <pad>. From here
    on, `special_names` keeps them out of text.)"""
    largest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    if largest >= size:
        raise ValueError(f"{tokenizer.name_or_path}: ids up to {largest}, the LLM has {size} embeddings")
    tokenizer.rows = size


# A special token is one only where a template writes it. Who types its name means the text: else data could
# end a turn, forge one, or name an embedding that is not there. From the template to the tokenizer, private
# characters of Unicode stand for both kinds of names: these and the ones behind.
TYPED, WRITTEN = 0xF0000, 0x100000

@lru_cache(8)
def special_names(tokenizer, rows=math.inf) -> tuple:
    """(the names of special tokens, a pattern of them, a tokenizer that knows these tokens by their private
    characters alone, {its id: the real id}). Special are also <image> and what has no row of the LLM's."""
    spec, renamed = json.loads(tokenizer.backend_tokenizer.to_str()), {}
    for token in spec["added_tokens"]:
        name = token["content"]
        is_mark = re.search(r"\w", name) and re.search(r"[^\w\s]", name)  # an ordinary word or sign stays one
        is_special = is_mark and (token["special"] or name in tokenizer.all_special_tokens)
        if is_special or name == IMAGE or token["id"] >= rows:
            token["content"] = renamed[name] = chr(WRITTEN + len(renamed))
    model, vocabulary = spec["model"], spec["model"]["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(name, name): i for name, i in vocabulary.items()}
        model["unk_token"] = renamed.get(model.get("unk_token"), model.get("unk_token"))
    else:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
    spec["truncation"] = spec["padding"] = None
    private = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    real = {private.token_to_id(token["content"]): token["id"] for token in spec["added_tokens"]}
    pattern = "|".join(map(re.escape, sorted(renamed, key=len, reverse=True))) or "(?!)"
    return list(renamed), re.compile(pattern), private, real


def specials_of(tokenizer) -> tuple:
    return special_names(tokenizer, getattr(tokenizer, "rows", math.inf))


def disguised(text: str, tokenizer, first: int) -> str:
    """The text with private characters, from `first` on, for the names in it; our own marker stays."""
    names, pattern, _, _ = specials_of(tokenizer)
    return pattern.sub(lambda found: IMAGE if found[0] == IMAGE else chr(first + names.index(found[0])), text)


def typed(turns, tokenizer) -> list:
    """The turns, for a template, with the names in them as text. Private characters of their own are lost."""
    return [(role, disguised(re.sub("[\U000F0000-\U0010FFFF]", "\ufffd", text), tokenizer, TYPED))
            for role, text in turns]


def tokenise(pieces, tokenizer, has_image: bool) -> tuple:
    """Pieces -> (ids, roles), two lists of one length, with one IMAGE_MARKER where the image stands.

    A tokenizer may treat a word differently inside a sentence and at its start, so a piece cannot be
    tokenised on its own. All pieces between two images are one text, and the tokenizer tells where in it each
    token stands.
    """
    chunks = [[]]  # lists of pieces, cut where an image stands; without images, the marker is mere text
    for text, role in pieces:
        is_here = has_image and role == CONTEXT and len(chunks) == 1  # behind the first, it is text again
        first, *rest = text.split(IMAGE, 1) if is_here else [text]
        chunks[-1].append((first, role))
        chunks += [[(part, role)] for part in rest]
    ids = list(tokenizer("").input_ids)  # BOS where the tokenizer has one
    roles = [CONTEXT] * len(ids)
    for number, chunk in enumerate(chunks):
        chunk_ids, chunk_roles = tokenise_text(chunk, tokenizer)
        ids += [IMAGE_MARKER] * (number > 0) + chunk_ids
        roles += [CONTEXT] * (number > 0) + chunk_roles
    return ids, roles


def tokenise_text(pieces, tokenizer) -> tuple:
    """(ids, roles) of pieces in a row."""
    names, _, private, real = specials_of(tokenizer)
    text, role_of = "", []  # role_of: of each character
    for part, role in pieces:
        part = disguised(part, tokenizer, WRITTEN)  # what still bears its name is the template's
        part = re.sub("[\U000F0000-\U000FFFFF]", lambda found: names[ord(found[0]) - TYPED], part)
        text, role_of = text + part, role_of + [role] * len(part)
    tokens = private.encode(text, add_special_tokens=False)
    ids, roles = [real.get(i, i) for i in tokens.ids], token_roles(tokens, text, role_of)
    if max(ids, default=0) >= getattr(tokenizer, "rows", math.inf):
        name = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(f"the LLM has no embedding for {name!r}: it has {tokenizer.rows}")
    return ids, roles


def token_roles(tokens, text: str, role_of: list) -> list:
    """The role of each token of the text, whose characters have the roles `role_of`. A token over two pieces
    is harmless between an answer and its end, which both carry loss (Llama 3 and Qwen have one token for
    ".\\n"). Elsewhere it is an error."""
    roles, end = [], 0
    for name, (start, stop) in zip(tokens.tokens, tokens.offsets):
        start = min(start, end) if name.startswith("Ġ") else start  # a leading space that some do not count
        end = max(end, stop)
        # the space that SentencePiece adds at a start covers no character: it goes with the next
        covered = set(role_of[start:stop]) or {role_of[min(start, len(text) - 1)]}
        if CONTEXT in covered and len(covered) > 1:
            raise ValueError(f"the tokenizer joins {text[start:stop]!r}: no boundary for labels")
        roles.append(ANSWER if ANSWER in covered else covered.pop())
    return roles


# ------------------------------------------------------------------------------------------------------------
# Samples and batches

class Conversations(torch.utils.data.Dataset):
    """LLaVA records as samples {"ids", "roles", "pixels" (3, size, size) or None, "name"}.

    `tower`: the vit.ViTConfig that the pixels are for. `prompts`, for the plain template: the words after the
    image, and those after the caption, with which a sample also has "text_ids", the text-only
    [caption][prompt] of the prompted contrastive loss; None: not used. `cache`: keep samples in memory, in
    each process that reads.
    """

    def __init__(self, records, images, tokenizer, template: str, tower, fit: str, prompts=("", None),
                 cache: bool = False):
        self.records, self.images, self.tokenizer = records, Path(images), tokenizer
        self.tower, self.fit, self.text_prompt = tower, fit, prompts[1]
        self.pad_id = tokenizer and tokenizer.pad_token_id
        self.template = partial(plain, prompt=prompts[0]) if template == "plain" else TEMPLATES[template]
        self.cache, self.seen, self.features = cache, {}, None  # or what `feature_file` returns

    def __len__(self):
        return len(self.records)

    def lengths(self, num_image_tokens: int, max_length: int, samples: int = 256) -> list:
        """The tokens of each record's row, by its characters and turns: what one costs is fitted to some
        records, evenly spaced. Batches are dealt by these, so nothing but time depends on them."""
        sizes, step = self.records.sizes, max(1, len(self) // samples)
        tokens = [len(self.read(i, with_pixels=False)["ids"]) for i in range(0, len(self), step)]
        known = np.c_[sizes[::step, :2], np.ones(len(tokens))]  # (samples, 3)
        per_size = np.linalg.lstsq(known, np.array(tokens) - sizes[::step, 2], rcond=None)[0]  # (3,)
        tokens = np.c_[sizes[:, :2], np.ones(len(self))] @ per_size + sizes[:, 2] * num_image_tokens
        return tokens.round().clip(1, max_length).astype(int).tolist()

    def words(self) -> list:
        """Of each record: the words of all turns, negative for a text-only one, as in LLaVA's code."""
        words = []
        for record in self.records:
            count = sum(len(turn["value"].split()) for turn in record["conversations"])
            words.append(count if "image" in record else -count)
        return words

    def __getitem__(self, i):
        sample = self.seen.get(i) or self.read(i)
        if self.cache:
            self.seen[i] = sample
        return sample

    def read(self, i, with_pixels: bool = True) -> dict:
        """The sample; without pixels, True stands for those of a record that has an image."""
        record, name = self.records[i], f"record {self.records[i].get('id', i)!r}"
        sample = {"name": name, "pixels": ("image" in record) or None, "image": record.get("image")}
        with named(name):
            turns = clean_turns(record)
            pieces = self.template(turns, self.tokenizer)
            sample["ids"], sample["roles"] = tokenise(pieces, self.tokenizer, "image" in record)
            if sample["pixels"] and with_pixels and self.features is not None:
                sample["pixels"] = self.features[record["image"]]  # (P, D)
            elif sample["pixels"] and with_pixels:
                picture = load_image(find_image(self.images, record["image"]))
                sample["pixels"] = preprocess(picture, self.tower, self.fit)
            if self.text_prompt is not None:
                (_, caption), = typed(turns[1:], self.tokenizer)
                text = f"{caption}\n{self.text_prompt}".strip()
                sample["text_ids"], _ = tokenise([(text, CONTEXT)], self.tokenizer, False)
        return sample


# ------------------------------------------------------------------------------------------------------------
# Features of the frozen ViT, kept: what a small set of images shows the projector never changes

@torch.no_grad()
def feature_file(config, samples, vit, device) -> dict:
    """{image name: patch features (P, D)} of all images of `samples`, read from the file config.features.

    If there is no such file it is written first, P x D numbers an image; it is mapped into memory, not read,
    and processes share it. ValueError if the file was made with another ViT, layer or fit, or lacks an image.
    """
    file, names = Path(config.features), sorted({r["image"] for r in samples.records if "image" in r})
    made_by = {key: getattr(config, key) for key in ("vit", "feature_layer", "fit")}
    made_by["weights"] = fingerprint(vit)  # and so the dtype
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        features = []
        for start in tqdm(range(0, len(names), 32), desc=f"features -> {file}", unit=" batches"):
            images = [load_image(find_image(samples.images, name)) for name in names[start : start + 32]]
            pixels = torch.stack([preprocess(image, samples.tower, samples.fit) for image in images])
            features.append(vit(pixels.to(device)).cpu())  # (32, P, D)
        with whole(file) as building:
            torch.save({"made_by": made_by, "names": names, "features": torch.cat(features)}, building)
    with named(file, "not a file of features"):
        kept = torch.load(file, mmap=True, weights_only=True)
        for key in made_by:
            if kept["made_by"].get(key) != made_by[key]:
                raise ValueError(f"{file}: features made with {key} {kept['made_by'].get(key)!r}, not "
                                 f"{made_by[key]!r}; name another --features, or remove it")
        if missing := set(names) - set(kept["names"]):
            raise ValueError(f"{file}: lacks {len(missing)} images of these records, such as {min(missing)}")
        return dict(zip(kept["names"], kept["features"], strict=True))


def collate(samples, num_image_tokens: int, image_token_id: int, pad_id: int, image_size: int,
            max_length: int = 2048, side: str = "right") -> dict:
    """Samples -> one batch. B samples, S the longest of them, I images in all, T the longest caption.

    ids (B, S)            each image marker grown to N placeholders, padded with `pad_id`
    mask (B, S)           False at padding
    labels (B, S)         the id where it carries loss, else -100
    pixels (I, 3, H, W)   in reading order; one black dummy where the batch has no image (see VLM.splice); of
                          samples with features in their place, (I, P, D)
    caption_ids, caption_mask (B, T)   the answer's tokens alone, for the contrastive loss
    keys (B, 2)           a number for each distinct caption, and one for each distinct image
    text_ids, text_mask (B, T')        caption and text prompt, where samples have them, padded on the right

    Training pads on the right, where causal attention needs no mask; generation pads on the left (`side`), so
    that the last position is the prompt's last token in every row. Rows are cut at `max_length`, but never in
    an image; prompts, whose end matters most, are not cut at all: ValueError, as where an image does not fit.
    """
    rows, sides = [], {"ids": side, "mask": side, "labels": side, "caption_ids": side, "caption_mask": side}
    for sample in samples:
        rows.append(expand(sample, num_image_tokens, image_token_id, max_length, side))
    fill, batch = {"ids": pad_id, "caption_ids": pad_id, "text_ids": pad_id, "labels": IGNORE}, {}
    for key in rows[0]:  # masks are filled with False
        batch[key] = torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True,
                                                     padding_value=fill.get(key, False),
                                                     padding_side=sides.get(key, "right"))  # (B, longest)
    pixels = [sample["pixels"] for sample in samples if sample["pixels"] is not None]
    batch["pixels"] = torch.stack(pixels or [torch.zeros(3, image_size, image_size)])
    images = [key_of(sample.get("image") or sample["name"]) for sample in samples]
    captions = [key_of(row["caption_ids"].tolist()) for row in rows]
    batch["keys"] = torch.tensor([captions, images]).T  # (B, 2)
    return batch


def key_of(value) -> int:
    """A number for the value, the same in every process (Python's own hash of text is not): ranks agree."""
    value = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "big")


def fingerprint(module) -> int:
    """Of the bits of all weights, whatever device they are on: sums of whole numbers do not depend on the
    order."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return key_of([(name, p.detach().view(bits[p.element_size()]).sum(dtype=torch.int64).item())
                   for name, p in module.named_parameters()])


def fingerprints(config, vlm, tokenizer) -> dict:
    """Of what a run is made of beside its options: a run that goes on with another is another run."""
    records = key_of(Path(config.annotations).read_bytes())
    spelling = key_of((tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template))
    towers = {"vit": fingerprint(vlm.vit), "llm": fingerprint(vlm.llm)}
    return {"records": records, "tokenizer": spelling, **towers}


def expand(sample, num_image_tokens: int, image_token_id: int, max_length: int, side: str) -> dict:
    """One row of a batch before padding: tensors (S,) and, of the caption, (T,)."""
    ids, roles = torch.tensor(sample["ids"]), sample["roles"]  # (one position for an image,)
    is_image, is_answer = ids == IMAGE_MARKER, torch.tensor([role == ANSWER for role in roles])
    labels = torch.where(torch.tensor([role != CONTEXT for role in roles]), ids, IGNORE)
    ids = torch.where(is_image, image_token_id, ids)
    times = torch.where(is_image, num_image_tokens, 1)  # an image's position is repeated N times
    ids, labels, is_answer = (x.repeat_interleave(times) for x in (ids, labels, is_answer))  # each (S,)
    if side == "left" and len(ids) > max_length:
        raise ValueError(f"{sample['name']}: {len(ids)} tokens; there is room for {max_length}")
    ids, labels, is_answer = ids[:max_length], labels[:max_length], is_answer[:max_length]
    if (ids == image_token_id).sum() != num_image_tokens * (sample["pixels"] is not None):
        raise ValueError(f"{sample['name']}: the image does not fit into {max_length} tokens")
    row = {"ids": ids, "labels": labels, "caption_ids": ids[is_answer]}
    if "text_ids" in sample:
        row["text_ids"] = torch.tensor(sample["text_ids"])
    for name in ("", "caption_", "text_"):
        if f"{name}ids" in row:
            row[f"{name}mask"] = torch.ones(len(row[f"{name}ids"]), dtype=torch.bool)
    return row


def to_device(batch: dict, device) -> dict:
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def marked_text(sample, tokenizer) -> str:
    """One sample as the model sees it, what carries loss between [[ and ]]: the first thing to look at."""
    text, is_inside = "", False
    for token, role in zip(sample["ids"], sample["roles"]):
        if (role != CONTEXT) != is_inside:
            text += "]] " if is_inside else " [["
            is_inside = not is_inside
        text += IMAGE if token == IMAGE_MARKER else f" {tokenizer.decode([token])}"
    return text + ("]]" if is_inside else "")


# ------------------------------------------------------------------------------------------------------------
# The order of the records

def subset(n: int, fraction: float, seed: int) -> list:
    """The sorted indices of a random `fraction` of n. With one seed, a smaller one is part of a larger."""
    if not 0 < fraction <= 1:
        raise ValueError(f"data_fraction is {fraction}; it must be above 0 and at most 1")
    return sorted(np.random.default_rng(seed).permutation(n)[: max(1, round(n * fraction))].tolist())


def epoch_order(n: int, seed: int, epoch: int) -> list:
    """A permutation of n, new in each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def split_batch(config, world: int) -> tuple:
    """(samples in a micro-batch, micro-batches in a step) of each of `world` ranks; `config` is a
    train.Config."""
    share = config.batch // world
    size = max(1, min(config.micro_batch, share))
    if config.batch % world or share % size:
        raise ValueError(f"a batch of {config.batch} does not divide into {world} ranks and micro-batches of "
                         f"{config.micro_batch}")
    return size, share // size


def count_steps(config, n: int) -> int:
    """The number of steps of a run over n records, those of contrast first included."""
    kept = len(subset(n, config.data_fraction, config.seed))
    return config.contrastive_first + (config.steps or max(1, math.ceil(kept * config.epochs / config.batch)))


def micro_batches(config, lengths: list, steps: int, world: int) -> list:
    """The indices of every micro-batch: [step][rank][number in the step]. `lengths` are those of all records:
    tokens or, with `group_by_length`, LLaVA's words. Step k takes the same `batch` records on any number of
    ranks, and its gradient does not depend on how they are dealt; a batch that runs short at a pass's end
    starts the next."""
    size, parts = split_batch(config, world)
    kept, order, dealt = subset(len(lengths), config.data_fraction, config.seed), [], []
    kept_lengths, epoch = [lengths[i] for i in kept], 0
    while len(order) < steps * config.batch:
        if config.group_by_length:
            order += grouped_order(kept_lengths, config.batch, world * parts, config.seed, epoch)
        else:
            order += epoch_order(len(kept), config.seed, epoch)
        epoch += 1
    for first in range(0, steps * config.batch, config.batch):
        batch = [kept[i] for i in order[first : first + config.batch]]
        if config.group_by_length:  # LLaVA's own order: a rank's share of a step is consecutive
            cut = [batch[start : start + size] for start in range(0, config.batch, size)]
            dealt.append([cut[rank * parts : (rank + 1) * parts] for rank in range(world)])
        else:
            dealt.append(spread(batch, lengths, size, config.micro_tokens, world,
                                has_equal_shares=config.contrastive != "none"))
    return dealt


def spread(batch: list, lengths, size: int, budget: int, world: int, has_equal_shares: bool) -> list:
    """The samples of a step, dealt so that nobody pads much or waits long: [rank][micro-batch].

    Micro-batches hold samples of similar length: at most `size` of them and, with a `budget` above 0, about
    as many tokens, padding included (one sample at least). Every rank gets as many micro-batches, and about
    as many tokens, as any other; where it must have as many samples, too (the contrastive losses exchange
    one vector of each), micro-batches are of one size.
    """
    longest_first = sorted(batch, key=lambda i: -lengths[i])
    longest = lengths[longest_first[0]]
    if has_equal_shares and budget:
        fitting = max(1, budget // longest)
        size, budget = max(n for n in range(1, size + 1) if size % n == 0 and n <= fitting), 0
    cut = cut_by_tokens(longest_first, lengths, size, budget)
    if budget:  # the least budget that needs no further round of the ranks fills all of them evenly
        most, low = math.ceil(len(cut) / world) * world, longest
        while low < budget:
            middle = (low + budget) // 2
            fewer = cut_by_tokens(longest_first, lengths, size, middle)
            low, budget, cut = (low, middle, fewer) if len(fewer) <= most else (middle + 1, budget, cut)

    def cost(part):
        return len(part) * lengths[part[0]]

    while len(cut) % world:  # one more micro-batch: the dearest is halved
        part = max((part for part in cut if len(part) > 1), key=cost)
        cut.remove(part)
        cut += [part[: len(part) // 2], part[len(part) // 2 :]]
    cut.sort(key=cost, reverse=True)
    place = {i: number for number, i in enumerate(batch)}
    cut_of = even_chunks(range(len(cut)), list(map(cost, cut)), world)
    return [[sorted(cut[number], key=place.get) for number in numbers] for numbers in cut_of]


def cut_by_tokens(longest_first, lengths, size: int, budget: int) -> list:
    """In order, lists of at most `size` and, with a budget, of so many tokens (of one at least)."""
    cut = []
    for i in longest_first:
        if not cut or len(cut[-1]) == size or 0 < budget < lengths[cut[-1][0]] * (len(cut[-1]) + 1):
            cut.append([])
        cut[-1].append(i)
    return cut


def largest_micro_batch(dealt: list, lengths: list) -> tuple:
    """(samples, tokens of the longest) of the one with most tokens, padding included, among [step][rank]."""
    parts = (part for ranks in dealt for parts in ranks for part in parts)
    sizes = {(len(part), max(lengths[i] for i in part)) for part in parts}
    return max(sizes, key=math.prod)


def grouped_order(lengths: list, batch: int, chunks: int, seed: int, epoch: int) -> list:
    """LLaVA's group_by_modality_length: an order in which each batch is of one modality and of similar
    lengths.

    `lengths` are signed (see `Conversations.words`). Per modality: shuffle, cut into batches. Then shuffle
    the batches, and deal each, longest first, into even chunks; what is left over comes last.
    """
    rng, batches, rest, order = np.random.default_rng([seed, epoch]), [], [], []
    for is_text in (False, True):
        members = [i for i, length in enumerate(lengths) if (length < 0) == is_text]
        members = [members[i] for i in rng.permutation(len(members))]
        whole = len(members) // batch * batch
        batches += [members[start : start + batch] for start in range(0, whole, batch)]
        rest += members[whole:]
    sizes = [abs(length) for length in lengths]
    for number in rng.permutation(len(batches)):
        longest_first = sorted(batches[number], key=lambda i: -sizes[i])
        for chunk in even_chunks(longest_first, sizes, chunks):
            order += chunk
    return order + sorted(rest)


def even_chunks(indices: list, lengths: list, chunks: int) -> list:
    """`indices` (longest first) dealt into `chunks` of one size and about one total length: each to the chunk
    with the smallest total so far that has room; where they do not divide evenly, like cards."""
    if len(indices) % chunks:
        return [indices[i::chunks] for i in range(chunks)]
    dealt, totals = [[] for _ in range(chunks)], [0] * chunks
    for index in indices:
        with_room = [chunk for chunk in range(chunks) if len(dealt[chunk]) < len(indices) // chunks]
        smallest = min(with_room, key=lambda chunk: totals[chunk])
        dealt[smallest].append(index)
        totals[smallest] += lengths[index]
    return dealt


# ------------------------------------------------------------------------------------------------------------
# All of it together: the data of a run. `config` is a train.Config, `vlm` a projector.VLM

def load_samples(config, vlm) -> Conversations:
    """The records of this stage, checked. ValueError for a tokenizer, or words of a prompt, that the LLM does
    not know."""
    tokenizer = load_tokenizer(config.llm)
    check_vocabulary(tokenizer, vlm.llm.config.vocab_size)
    prompts = PROMPTS.get(config.prompt) or config.prompt.split(" | ")
    with named("--prompt"):
        words = tokenizer(" ".join(prompts), add_special_tokens=False).input_ids
    if tokenizer.unk_token_id in words:
        raise ValueError(f"--prompt: the LLM does not know every word of {' | '.join(prompts)!r}")
    if config.contrastive not in ("prompt", "both"):
        prompts = prompts[0], None
    stage = "align" if config.template == "plain" or config.contrastive != "none" else None
    samples = Conversations(load_records(config.annotations, stage), config.images, tokenizer,
                            config.template, vlm.vit.config, config.fit, prompts, config.cache)
    check_rows(samples, vlm.num_image_tokens,
               min(config.max_length, vlm.llm.config.max_position_embeddings))
    return samples


def check_rows(samples, num_image_tokens: int, max_length: int):
    """ValueError for the first record whose image does not fit into a row behind the turns before it; and
    where the template cannot be used at all. In seconds: only what has many bytes before its image, and the
    first record of each kind, is tokenised."""
    head, kinds = 0, set()  # tokens before the image of the first that has one; the kinds of records so far
    for i, (_, turns, has_image, before) in enumerate(samples.records.sizes.tolist()):
        kind = has_image, turns > 2
        if kind not in kinds or (has_image and head + before + num_image_tokens > max_length):
            kinds.add(kind)
            sample = samples.read(i, with_pixels=False)
            expand(sample, num_image_tokens, IMAGE_MARKER, max_length, "right")
            head = head or (sample["ids"].index(IMAGE_MARKER) if has_image else 0)


def leave_group(_):
    """In a loader's process: signals to a run's group are for the one that trains, which needs this one."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def deal(config, samples, vlm, steps: int, world: int) -> tuple:
    """(what `micro_batches` returns, the tokens of each record)."""
    lengths = samples.lengths(vlm.num_image_tokens, config.max_length)
    by = samples.words() if config.group_by_length else lengths
    return micro_batches(config, by, steps, world), lengths


def make_loader(config, samples, vlm, mine: list, device):
    """Yield, step by step, the collated micro-batches of a rank; `mine` are their indices."""
    to_batch = partial(collate, num_image_tokens=vlm.num_image_tokens, image_token_id=vlm.image_token_id,
                       pad_id=samples.pad_id, image_size=vlm.vit.config.image_size,
                       max_length=min(config.max_length, vlm.llm.config.max_position_embeddings))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(config.workers, max(1, cores))  # more would take turns, and the ranks' own threads wait
    loader = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=list(itertools.chain(*mine)), collate_fn=to_batch, num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=leave_group,
        generator=torch.Generator().manual_seed(config.seed)))  # its own: not the run's random state
    waited, began = 0.0, time.perf_counter()
    for number, parts in enumerate(mine):
        asked = time.perf_counter()
        batches = [next(loader) for _ in parts]
        if number == 0:  # it had to start
            asked = began = time.perf_counter()
        waited += time.perf_counter() - asked
        total = time.perf_counter() - began
        is_slow = waited > 0.1 * total and not config.cache  # with a cache, only the first pass waits
        if number == 20 and is_slow and os.environ.get("RANK", "0") == "0":
            tqdm.write(f"warning: the loader is slower than the step: {20 * config.batch / total:.1f} "
                       f"samples/s, the step alone {20 * config.batch / (total - waited):.1f}. More "
                       "--workers (up to a rank's cores), or --features")
        yield batches


# ------------------------------------------------------------------------------------------------------------
# The command line

LOOKS_SPECIAL = re.compile(r"</?s>|<(unk|pad|bos|eos|image)>|<\|[^<>|]*\|>|\[/?INST\]")  # in most tokenizers


def check(file, images, stage=None, llm=None, template=None, image_tokens: int = 576,
          max_length: int = 2048) -> int:
    """Print bad records and unreadable images, write FILE.clean.json without them; return their number. Bad
    is also what `stage` does not take and, with the tokenizer of `llm`, what makes no row with loss."""
    if min(image_tokens, max_length) < 1:
        raise ValueError("--image_tokens and --max_length must be at least 1")
    records, good, has_special = read_json(file), [], 0
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: not a JSON list of records")
    template, tokenizer = template or ("plain" if stage == "align" else "v1"), llm and load_tokenizer(llm)
    pattern = specials_of(tokenizer)[1] if llm else LOOKS_SPECIAL
    for number, record in enumerate(tqdm(records, desc="check", unit=" records")):
        name = f"record {record.get('id', 0)!r}" if isinstance(record, dict) else "record"  # of a sample
        try:
            with named(name):
                if problem := find_problem(record, stage):
                    raise ValueError(problem)
                samples = Conversations([tidy(record)], images, tokenizer, template, None, "")
                if image := samples.records[0].get("image"):
                    load_image(find_image(images, image))
                if llm:
                    row = expand(samples.read(0, False), image_tokens, IMAGE_MARKER, max_length, "right")
                    if (row["labels"] == IGNORE).all():
                        raise ValueError(f"has no word of an answer within {max_length} tokens")
        except ValueError as error:
            told = f"record {number} (id {name[7:]}): {str(error).removeprefix(name + ': ')}"
            tqdm.write(told.encode(errors="backslashreplace").decode())
        else:
            good.append(record)
            texts = [text.removeprefix(IMAGE if image else "") for _, text in clean_turns(samples.records[0])]
            has_special += any(IMAGE in text or pattern.search(text) for text in texts)
    bad = len(records) - len(good)
    print(f"{len(good)} of {len(records)} records are good")
    print(f"{has_special} of them have the name of a special token in their text; it is read as text")
    if bad:
        clean = Path(file).with_suffix(".clean.json")
        with whole(clean) as building:
            building.write_text(json.dumps(good))
        print(f"wrote {clean}")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="list bad records and images, write a cleaned list")
    checker.add_argument("file")
    checker.add_argument("images")
    add = checker.add_argument
    add("--stage", choices=["align", "instruct"], help="also list what this stage of training does not take")
    add("--llm", help="also tokenise, as for this LLM (folder or Hub id): list what makes no row with loss")
    add("--template", choices=[*TEMPLATES], help="with --llm (default: align's is plain, instruct's v1)")
    add("--image_tokens", type=int, default=576, help="with --llm: of an image")
    add("--max_length", type=int, default=2048, help="with --llm: most tokens in a row")
    try:
        bad = check(**{key: value for key, value in vars(parser.parse_args()).items() if key != "command"})
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
