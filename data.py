"""From files to batches: images, LLaVA conversations, ScienceQA, and a toy world that is written in those formats.

    python data.py toy data/toy                               # write the toy world
    python data.py check annotations.json images/             # list bad records, write a cleaned copy

The path of one training sample, top to bottom in this file:

    record  {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}
    pieces  [("USER: <image>\\n... ASSISTANT:", CONTEXT), (" Red", ANSWER), ("</s>", END)]    a template
    ids     1 3148 ... -200 ... 4367 2                                                         tokenise
    labels  -100 -100 ... -100 ... 4367 2          loss on ANSWER and END, nothing else
    batch   the marker -200 becomes N placeholders, rows are padded                            collate

Labels are never recovered by searching in tokens: each piece carries its role from the template to the batch.

Read next: train.py, where the batches go.
"""

import argparse
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from vit import BICUBIC, CLIP_MEAN, CLIP_STD, TOKENIZER, read_json, resolve

IMAGE = "<image>"  # the marker in conversations
IMAGE_MARKER = -200  # the same, among ids: one for an image until collate knows how many tokens it takes
IGNORE = -100  # the label of a token without loss
CONTEXT, ANSWER, END = "context", "answer", "end"  # what a piece of text is: given; to be said; to stop with

# ----------------------------------------------------------------------------------------------------------------
# Images


def load_image(path) -> Image.Image:
    """The picture as RGB. A missing or damaged file is an error that names it."""
    path = Path(path)
    if not path.exists():  # OCR-VQA's .gif files are often kept as .jpg, and the other way round
        path = next(path.parent.glob(f"{path.stem}.*"), path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files cut short or not images
        raise ValueError(f"{path}: not a readable image: {error}") from None


def preprocess(image: Image.Image, size: int, fit: str, mean=CLIP_MEAN, std=CLIP_STD,
               resample: int = BICUBIC) -> torch.Tensor:
    """RGB picture -> normalised pixels (3, size, size), as CLIP's image processor makes them.

    `fit`: "crop" scales the short side to `size` and cuts out the centre (LLaVA's stage 1); "pad" first makes the
    picture square with borders of the mean colour, so that nothing is lost (LLaVA-1.5's stage 2 and evaluation).
    """
    if fit == "pad":
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    elif fit != "crop":
        raise ValueError(f"fit {fit!r} is neither 'crop' nor 'pad'")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.float32) / 255  # (size, size, 3)
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, size, size)


# ----------------------------------------------------------------------------------------------------------------
# Records: LLaVA's JSON


def fault(record) -> str | None:
    """What is wrong with a record, in a few words, or None. Reads no image file."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        return "has no conversation turns"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "has a turn without text"
        if turn.get("from") not in ("human", "gpt"):
            return f"has a turn from {turn.get('from')!r}; the roles are 'human' and 'gpt'"
    if turns[0]["from"] == "gpt":
        turns = turns[1:]  # LLaVA drops an opening answer
    roles = [turn["from"] for turn in turns]
    if "gpt" not in roles:
        return "has no answer to a question"
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        return "has turns that do not alternate between human and gpt"
    if not all(turn["value"].strip() for turn in turns):
        return "has an empty turn"
    if "image" in record and not isinstance(record["image"], str):
        return "has an image that is not a file name"
    if "image" in record:
        marked = [turn["from"] for turn in turns if IMAGE in turn["value"]]
        if marked != ["human"]:
            return f"has an image, and {len(marked)} turns with {IMAGE} (one question must have it)"
    return None


def load_records(file) -> list:
    """The records of a LLaVA JSON file; the first bad one is an error naming file, position and id."""
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: not a JSON list of records")
    for number, record in enumerate(records):
        if problem := fault(record):
            name = record.get("id") if isinstance(record, dict) else None
            raise ValueError(f"{file}: record {number} (id {name!r}) {problem}; "
                             f"`python data.py check {file} IMAGES` writes a list without such records")
    return records


def clean_turns(record) -> list:
    """[(role, text)] with an opening answer dropped and the image marker moved to the front of its turn.

    So says LLaVA's own code: whether the data has the marker before or after the question, the model sees it before.
    """
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    if "image" not in record:
        return turns  # a literal <image> in a text-only record stays text
    return [(role, f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text)
            for role, text in turns]


# ----------------------------------------------------------------------------------------------------------------
# Templates: turns -> pieces

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


# Of the prompted contrastive loss: (after the image, after the caption). All are our choice. The tiny LLM knows the
# words of "describe" alone.
PROMPTS = {
    "none": ("", ""),
    "one-word": ("Summarize the image in one word:", "Summarize the sentence in one word:"),
    "compress": ("Compress this image in one word:", "Compress this sentence in one word:"),
    "describe": ("Describe the picture.", "Describe the picture."),
}


def plain(turns, eos, prompt: str = "") -> list:
    """Stage 1: the image, its caption, a newline. The instruction is thrown away and no end token is trained.

    `prompt` comes between the two; the prompted contrastive loss reads the LLM's state at its end.
    """
    if len(turns) != 2 or IMAGE not in turns[0][1]:
        raise ValueError(f"the plain template takes one question with {IMAGE} and one answer, not {len(turns)} turns")
    context, caption = (f"{IMAGE}\n{prompt}", f" {turns[1][1]}") if prompt else (IMAGE, turns[1][1])
    return [(context, CONTEXT), (caption, ANSWER), ("\n", END)]


def v1(turns, eos) -> list:
    """Vicuna's form, LLaVA-1.5's stage 2 and evaluation: `{SYSTEM} USER: {q} ASSISTANT: {a}</s>USER: ...`."""
    pieces, before = [], f"{SYSTEM} "
    for role, text in turns:
        if role == "human":
            pieces.append((f"{before}USER: {text} ASSISTANT:", CONTEXT))
        else:
            pieces += [(f" {text}", ANSWER), (eos, END)]
        before = ""
    return pieces


def chat(turns, tokenizer) -> list:
    """The LLM's own chat template, which comes with its tokenizer, without thinking where it knows such a mode.

    Rendered again after every turn: a turn's text is what it added. Only the last answer may be told in another way
    once the next question has come (Qwen3 drops its empty thoughts), so it is looked for there again. An answer ends
    with the tokenizer's end token; what follows is context.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    is_double = bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # if BOS is in the text, too

    def render(**options):
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)

    def beyond(before, now):
        if not now.startswith(before):
            raise ValueError("the tokenizer's chat template rewrites earlier turns: no boundary for labels")
        return now[len(before) :]

    def around(answer, text):
        said, found, after = text.partition(eos)
        if not found or not said.rstrip().endswith(answer):
            raise ValueError("the tokenizer's chat template does not end an answer with its end token")
        return said.rstrip().removesuffix(answer), after

    messages, pieces, told, opening, answer = [], [], "", "", None  # told: the chat up to the last question
    for role, text in turns:
        if role == "human":
            messages.append({"role": "user", "content": text})
            now = render()
            new = beyond(told, now) if answer is None else around(answer, beyond(told, now))[1]
            if text.strip() not in new:
                raise ValueError("the tokenizer's chat template drops the question")
            told, opening = now, beyond(now, render(add_generation_prompt=True))
            new = new.removeprefix(bos) if is_double and len(messages) == 1 else new
            pieces.append((new + opening, CONTEXT))
        else:
            answer = text.strip()
            messages.append({"role": "assistant", "content": answer})
            lead = beyond(opening, around(answer, beyond(told, render()))[0])
            if lead.strip():  # such as thoughts that were not opened: given, not learned
                pieces.append((lead, CONTEXT))
                lead = ""
            pieces += [(lead + answer, ANSWER), (eos, END)]
    return pieces


TEMPLATES = ("plain", "v1", "chat")


def make_template(name: str, tokenizer, prompt: str = ""):
    """A function from turns to pieces."""
    return {"plain": partial(plain, eos=tokenizer.eos_token, prompt=prompt),
            "v1": partial(v1, eos=tokenizer.eos_token), "chat": partial(chat, tokenizer=tokenizer)}[name]


def tokenise(pieces, tokenizer, has_image: bool):
    """Pieces -> (ids, roles), two lists of one length, with one IMAGE_MARKER for each image marker in a CONTEXT.

    A tokenizer may treat a word differently inside a sentence and at its start, so a piece cannot be tokenised on
    its own. Each chunk (the text between two image markers or end tokens) is tokenised again as it grows by a piece:
    what is new at its end belongs to that piece. If an earlier token changes, the boundary was inside a token. Between
    an answer and its end that is harmless: both carry loss (Llama 3 and Qwen have one token for ".\\n"). Elsewhere it
    is an error rather than a wrong label.
    """
    ids = list(tokenizer("").input_ids)  # BOS where the tokenizer has one
    roles = [CONTEXT] * len(ids)
    chunk, known = "", []  # the text since the last marker or end token, and its ids
    for text, role in pieces:
        parts = text.split(IMAGE) if has_image and role == CONTEXT else [text]
        for i, part in enumerate(parts):
            if i > 0:
                ids.append(IMAGE_MARKER)
                roles.append(CONTEXT)
                chunk, known = "", []
            chunk += part
            now = tokenizer(chunk, add_special_tokens=False).input_ids
            changed = len(known) - len(os.path.commonprefix([known, now]))
            inside = roles[len(roles) - changed :]  # the roles of what changed
            if changed and CONTEXT in (role, *inside):
                raise ValueError(f"the tokenizer joins {part[:20]!r} to the text before it: no boundary for labels")
            start = len(ids) - changed
            ids[start:] = now[len(known) - changed :]
            roles[start:] = (inside + [role] * len(now))[: len(ids) - start]
            known = now
        if role == END:  # nothing joins across an end token: go on from it alone, or long chats cost their square
            chunk, known = text, tokenizer(text, add_special_tokens=False).input_ids
    return ids, roles


def load_tokenizer(folder_or_id):
    """The LLM's tokenizer, of transformers. Padding gets the unknown token's id, as LLaVA has it, or the end's."""
    from transformers import AutoTokenizer  # imported late: it takes seconds
    folder = resolve(folder_or_id, ("*.json", *TOKENIZER))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds, most of them about packages
        raise ValueError(f"{folder}: no tokenizer could be made ({type(error).__name__}). Without a tokenizer.json, as "
                         "in Vicuna's folders, put one there (for Vicuna 1.5 that of llava-hf/llava-1.5-7b-hf) or "
                         "`pip install sentencepiece protobuf`") from error
    tokenizer.model_max_length = 10**9  # lengths are the collator's business, and its warning alone is clear
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer, size: int):
    """Refuse a tokenizer of more tokens than the LLM has embeddings: it is another LLM's. (Tokens added to it later are
    not counted: LLaVA's tokenizer serves Vicuna, which has no row for its <image> and <pad>.)"""
    largest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id, tokenizer.eos_token_id)
    if largest >= size:
        raise ValueError(f"{tokenizer.name_or_path}: this tokenizer has ids up to {largest}, the LLM has {size} "
                         "embeddings")


# ----------------------------------------------------------------------------------------------------------------
# Samples and batches


class Conversations(torch.utils.data.Dataset):
    """LLaVA records as samples {"ids", "roles", "pixels" (3, size, size) or None, "summary_ids", "name"}.

    `prompts`: a pair of PROMPTS. The first stands between image and caption; the second ends `summary_ids`, the
    text-only sequence [caption][prompt] (stage 1 only). `keep`: remember every sample in memory once it was read.
    """

    def __init__(self, records, images, tokenizer, template: str, image_size: int, fit: str, prompts=("", ""),
                 keep: bool = False, looks=(CLIP_MEAN, CLIP_STD, BICUBIC)):
        self.records, self.images, self.tokenizer, self.prompts = records, Path(images), tokenizer, prompts
        self.template = make_template(template, tokenizer, prompts[0])
        self.image_size, self.fit, self.looks = image_size, fit, looks
        self.pad_id = tokenizer.pad_token_id
        self.kept = {} if keep else None

    def __len__(self):
        return len(self.records)

    def lengths(self) -> list:
        """Of each record, in words: what `grouped_order` sorts by."""
        return [signed_length(record) for record in self.records]

    def __getitem__(self, i):
        if self.kept is None:
            return self.read(i)
        if i not in self.kept:
            self.kept[i] = self.read(i)
        return self.kept[i]

    def read(self, i):
        record = self.records[i]
        name = f"record {record.get('id', i)!r}"
        try:
            turns = clean_turns(record)
            ids, roles = tokenise(self.template(turns), self.tokenizer, "image" in record)
            pixels = None
            if "image" in record:
                pixels = preprocess(load_image(self.images / record["image"]), self.image_size, self.fit, *self.looks)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        summary = "\n".join(filter(None, (turns[1][1], self.prompts[1]))) if len(turns) == 2 else ""
        return {"ids": ids, "roles": roles, "pixels": pixels, "name": name,
                "summary_ids": self.tokenizer(summary).input_ids}


class RandomSamples(torch.utils.data.Dataset):
    """Samples of random numbers, with an image and `text` tokens each: full shape without any file."""

    def __init__(self, n: int, text: int, vocabulary: int, image_size: int):
        self.n, self.text, self.vocabulary, self.image_size, self.pad_id = n, text, vocabulary, image_size, 0

    def __len__(self):
        return self.n

    def lengths(self) -> list:
        return [self.text] * self.n

    def __getitem__(self, i):
        rng = torch.Generator().manual_seed(i)
        ids = torch.randint(3, self.vocabulary, (self.text,), generator=rng).tolist()
        return {"ids": [1, IMAGE_MARKER, *ids], "roles": [CONTEXT] * 2 + [ANSWER] * self.text, "summary_ids": [1, *ids],
                "pixels": torch.randn(3, self.image_size, self.image_size, generator=rng), "name": f"random {i}"}


def collate(samples, num_image_tokens: int, image_token_id: int, pad_id: int, image_size: int,
            max_length: int = 2048, side: str = "right") -> dict:
    """Samples -> one batch. B samples, S the longest of them, I images in all, T the longest caption.

    ids (B, S)            each image marker grown to N placeholders, padded with `pad_id`
    mask (B, S)           False at padding
    labels (B, S)         the id where it carries loss, else -100
    pixels (I, 3, H, W)   in reading order; one black dummy where the batch has no image (see VLM.splice)
    caption_ids, caption_mask (B, T)   the answer's tokens alone, for the contrastive loss
    caption_keys (B,)     one number for each distinct caption
    summary_ids, summary_mask (B, T')  caption and text prompt, for the prompted contrastive loss, padded on the right

    Training pads on the right, where causal attention needs no mask; generation pads on the left (`side`), so that
    the last position is the prompt's last token in every row. Rows are cut at `max_length`, but never in an image;
    prompts, whose end matters most, are not cut at all.
    """
    rows = []
    for sample in samples:
        ids = torch.tensor(sample["ids"])
        times = torch.where(ids == IMAGE_MARKER, num_image_tokens, 1)
        answer = torch.tensor([role == ANSWER for role in sample["roles"]])
        labels = torch.where(torch.tensor([role != CONTEXT for role in sample["roles"]]), ids, IGNORE)
        ids = torch.where(ids == IMAGE_MARKER, image_token_id, ids)
        row = {"ids": ids, "labels": labels, "answer": answer}
        row = {key: value.repeat_interleave(times) for key, value in row.items()}
        if side == "left" and len(row["ids"]) > max_length:
            raise ValueError(f"{sample['name']}: {len(row['ids'])} tokens; there is room for {max_length}")
        row = {key: value[:max_length] for key, value in row.items()}
        if (row["ids"] == image_token_id).sum() != num_image_tokens * (sample["pixels"] is not None):
            raise ValueError(f"{sample['name']}: the image does not fit into {max_length} tokens")
        summary = torch.tensor(sample.get("summary_ids", []), dtype=torch.long)
        rows.append(row | {"caption": row["ids"][row["answer"]], "mask": torch.ones_like(row["answer"]),
                           "summary": summary, "summary_mask": torch.ones_like(summary, dtype=torch.bool)})

    def pad(key, value, side=side):
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value,
                                               padding_side=side)  # (B, longest)

    pixels = [sample["pixels"] for sample in samples if sample["pixels"] is not None]
    lengths = torch.tensor([len(row["caption"]) for row in rows])
    caption_ids = pad("caption", pad_id)  # (B, T)
    columns = torch.arange(caption_ids.shape[1])
    filled = columns >= len(columns) - lengths[:, None] if side == "left" else columns < lengths[:, None]
    return {"ids": pad("ids", pad_id), "mask": pad("mask", False), "labels": pad("labels", IGNORE),
            "pixels": torch.stack(pixels or [torch.zeros(3, image_size, image_size)]),
            "caption_ids": caption_ids, "caption_mask": filled,
            "summary_ids": pad("summary", pad_id, "right"), "summary_mask": pad("summary_mask", False, "right"),
            "caption_keys": torch.tensor([hash(tuple(row["caption"].tolist())) for row in rows])}


def subset(n: int, fraction: float, seed: int) -> list:
    """The sorted indices of a random `fraction` of n. Nested: with one seed, a smaller fraction is part of a larger."""
    if not 0 < fraction <= 1:
        raise ValueError(f"data_fraction is {fraction}; it must be above 0 and at most 1")
    return sorted(np.random.default_rng(seed).permutation(n)[: max(1, round(n * fraction))].tolist())


def epoch_order(n: int, seed: int, epoch: int) -> list:
    """A permutation of n, new in each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def signed_length(record) -> int:
    """Words of all turns; negative for a text-only record. What the grouping below sorts by."""
    words = sum(len(turn["value"].split()) for turn in record["conversations"])
    return words if "image" in record else -words


def even_chunks(indices: list, lengths: list, chunks: int) -> list:
    """`indices` (longest first) dealt into `chunks` of one size and about one total length.

    Each goes to the chunk with the smallest total so far, until that chunk is full; where they do not divide evenly,
    they are dealt like cards.
    """
    if len(indices) % chunks:
        return [indices[i::chunks] for i in range(chunks)]
    dealt, totals = [[] for _ in range(chunks)], [0] * chunks
    for index in indices:
        smallest = totals.index(min(totals))
        dealt[smallest].append(index)
        totals[smallest] = totals[smallest] + lengths[index] if len(dealt[smallest]) < len(indices) / chunks else np.inf
    return dealt


def grouped_order(lengths: list, batch: int, chunks: int, seed: int, epoch: int) -> list:
    """LLaVA's group_by_modality_length: an order in which each batch is of one modality and of similar lengths.

    `lengths` are signed (see above), `chunks` the micro-batches of a step over all ranks. Per modality: shuffle, cut
    into batches, sort each, deal it into even chunks. Then shuffle the batches; what is left over comes last.
    """
    rng = np.random.default_rng([seed, epoch])
    whole, rest = [], []
    for is_text in (False, True):
        members = [i for i, length in enumerate(lengths) if (length < 0) == is_text]
        members = [members[i] for i in rng.permutation(len(members))]
        cut = len(members) // batch * batch
        whole += [members[start : start + batch] for start in range(0, cut, batch)]
        rest += members[cut:]
    size = [abs(length) for length in lengths]
    dealt = [even_chunks(sorted(group, key=lambda i: -size[i]), size, chunks) for group in whole]
    return [i for group in rng.permutation(len(dealt)) for chunk in dealt[group] for i in chunk] + sorted(rest)


# ----------------------------------------------------------------------------------------------------------------
# ScienceQA: problems.json, pid_splits.json, images/{split}/{pid}/image.png

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


def scienceqa_prompt(problem: dict) -> str:
    """LLaVA-1.5's zero-shot prompt of one entry of problems.json: context only if there is one, bare letters."""
    lines = [f"Context: {problem['hint']}"] if problem["hint"] else []
    lines += [problem["question"]] + [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"])]
    prompt = "\n".join(lines).replace("  ", " ") + LETTER
    return f"{IMAGE}\n{prompt}" if problem["image"] else prompt


def load_scienceqa(folder, split: str = "test") -> list:
    """[{"id", "prompt", "image" path or None, "num_choices", "answer" letter}] in the order of pid_splits.json."""
    folder = Path(folder)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    questions = []
    for pid in splits[split]:
        problem = problems.get(pid)
        if problem is None or not {"question", "choices", "answer", "hint", "image"} <= problem.keys():
            raise ValueError(f"{folder / 'problems.json'}: problem {pid!r} is missing or incomplete")
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise ValueError(f"{folder / 'problems.json'}: problem {pid!r} has answer {problem['answer']} of "
                             f"{len(problem['choices'])} choices")
        image = folder / "images" / split / pid / problem["image"] if problem["image"] else None
        questions.append({"id": pid, "prompt": scienceqa_prompt(problem), "image": image,
                          "num_choices": len(problem["choices"]), "answer": LETTERS[problem["answer"]]})
    return questions


# ----------------------------------------------------------------------------------------------------------------
# Yes-or-no benchmarks: POPE and MME


def load_pope(folder, split: str = "") -> list:
    """[{"id", "prompt", "image", "category", "answer" "yes" or "no"}] of POPE's files `*pope_{category}.json` (JSON
    lines of question_id, image, text, label), all of them or `split` alone; images below images/ or val2014/."""
    folder, questions = Path(folder), []
    images = next((folder / name for name in ("images", "val2014") if (folder / name).is_dir()), folder)
    for file in sorted(folder.glob(f"*pope_{split or '*'}.json")):
        category = file.stem.rsplit("pope_", 1)[1]
        for number, line in enumerate(file.read_text(errors="replace").splitlines()):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                questions.append({"id": f"{category}-{entry['question_id']}", "category": category,
                                  "prompt": f"{IMAGE}\n{entry['text']}{SHORT}", "image": images / entry["image"],
                                  "answer": {"yes": "yes", "no": "no"}[entry["label"]]})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number + 1} is not a POPE question: {error!r}") from None
    if not questions:
        raise FileNotFoundError(f"{folder}: no *pope_{split or 'CATEGORY'}.json")
    return questions


def load_mme(folder, split: str = "") -> list:
    """[{"id", "prompt", "image", "category", "answer"}] of MME's folder, two consecutive questions for each image.

    A category (or `split` alone) is a folder of pictures and text files `question<TAB>Yes|No`, side by side or in
    images/ and questions_answers_YN/. LLaVA replaces the questions' own request for yes or no by its short-answer one.
    """
    folder, questions = Path(folder), []
    for file in sorted(folder.glob(f"{split or '*'}/*.txt")) + sorted(
            folder.glob(f"{split or '*'}/questions_answers_YN/*.txt")):
        below = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        images = below / "images" if (below / "images").is_dir() else below
        image = next((f for f in sorted(images.glob(f"{file.stem}.*")) if f.suffix != ".txt"), images / file.stem)
        lines = [line.split("\t") for line in file.read_text(errors="replace").splitlines()
                 if line.strip()]
        if len(lines) != 2 or any(len(line) != 2 or line[1].strip() not in ("Yes", "No") for line in lines):
            raise ValueError(f"{file}: not two lines of question, tab, Yes or No")
        for number, (text, answer) in enumerate(lines):
            text = text.replace("Please answer yes or no.", "").strip()
            questions.append({"id": f"{below.name}/{file.stem}/{number}", "category": below.name,
                              "prompt": f"{IMAGE}\n{text}{SHORT}", "image": image,
                              "answer": answer.strip().lower()})
    if not questions:
        raise FileNotFoundError(f"{folder}: no {split or 'CATEGORY'}/*.txt")
    return questions


# ----------------------------------------------------------------------------------------------------------------
# The toy world: one coloured shape on a light ground. Small enough for a laptop, written in the formats above.

COLORS = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 220), "yellow": (236, 200, 30),
          "orange": (240, 130, 20), "purple": (130, 50, 170), "cyan": (40, 190, 210), "black": (30, 30, 30)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 7, "large": 12}  # radius in pixels
PLACES = {"northwest": (0, 0), "northeast": (1, 0), "southwest": (0, 1), "southeast": (1, 1)}
TOY_IMAGE_SIZE, TOY_VOCABULARY = 48, 86  # pixels a side; tokens of write_toy_tokenizer
CAPTION = "a {size} {color} {shape} in the {place}"
WORDINGS = (CAPTION, "in the {place}, a {size} {color} {shape}", "the {place} has a {shape}, {size} and {color}")
FILLERS = ["a", "in", "the", "has", "and", "picture", "shape"]
QUESTIONS = {"color": ("What color is the shape?", "Which color do you see?"),
             "shape": ("Which shape is it?", "What form do you see?"),
             "size": ("How big is the shape?", "What size is it?"),
             "place": ("Where is the shape?", "In which corner is it?")}
YES_NO = {"color": "Is the shape {}?", "shape": "Is there a {} in the image?", "size": "Is the shape {}?",
          "place": "Is the shape in the {}?"}
VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "place": tuple(PLACES)}
DESCRIBE = ("Describe the picture.", "Give a short description.")
HINTS = ("", "", "The picture shows one shape.", "Look at the picture.")
SCIENCEQA_ANSWER = "{choice}. The answer is {letter}."  # an answer LLaVA's rule reads, and a tiny LM can learn


def toy_scenes(seed: int = 0) -> dict:
    """All 384 scenes in three disjoint splits, 304 / 40 / 40: a model is tested on combinations it never saw."""
    scenes = [{"color": c, "shape": s, "size": z, "place": p} for c in COLORS for s in SHAPES for z in SIZES
              for p in PLACES]
    random.Random(seed).shuffle(scenes)
    return {"train": scenes[:304], "val": scenes[304:344], "test": scenes[344:]}


def toy_picture(scene: dict, rng: random.Random) -> Image.Image:
    """48 x 48, drawn four times as large; place, radius, colour and ground all jitter a little."""
    scale = 4
    jitter = lambda color: tuple(max(0, min(255, value + rng.randint(-18, 18))) for value in color)
    image = Image.new("RGB", (TOY_IMAGE_SIZE * scale,) * 2, jitter((232, 232, 228)))
    x, y = ((13 + 22 * corner + rng.uniform(-2, 2)) * scale for corner in PLACES[scene["place"]])
    r = (SIZES[scene["size"]] + rng.uniform(-1, 1)) * scale
    draw, fill = ImageDraw.Draw(image), jitter(COLORS[scene["color"]])
    box = (x - r, y - r, x + r, y + r)
    match scene["shape"]:
        case "circle":
            draw.ellipse(box, fill)
        case "square":
            draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
        case "diamond":
            draw.polygon([(x, y - r), (x + 0.5 * r, y), (x, y + r), (x - 0.5 * r, y)], fill)
        case "cross":
            draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
            draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
        case "ring":
            draw.ellipse(box, outline=fill, width=round(0.4 * r))
    return image.resize((TOY_IMAGE_SIZE,) * 2, Image.Resampling.BOX)


def toy_open_question(scene: dict, kind: str, rng: random.Random):
    """(question, answer) with a single word for an answer."""
    return rng.choice(QUESTIONS[kind]) + SHORT, scene[kind]


def toy_yes_no(scene: dict, kind: str, is_true: bool, rng: random.Random):
    """(question, "Yes" or "No"); a false one asks for another value of the same kind."""
    value = scene[kind] if is_true else rng.choice([other for other in VALUES[kind] if other != scene[kind]])
    return YES_NO[kind].format(value) + SHORT, "Yes" if is_true else "No"


def toy_problem(scene: dict, kind: str, rng: random.Random, hint: str, image) -> dict:
    """One entry of problems.json: 2 to 4 choices (a size has only 2), in random order."""
    others = [value for value in VALUES[kind] if value != scene[kind]]
    choices = rng.sample(others, min(len(others), rng.randint(1, 3))) + [scene[kind]]
    rng.shuffle(choices)
    return {"question": rng.choice(QUESTIONS[kind]), "choices": choices, "answer": choices.index(scene[kind]),
            "hint": hint, "image": image, "task": "closed choice", "grade": "grade1", "subject": "natural science",
            "topic": "toy", "category": kind, "skill": kind, "lecture": "", "solution": ""}


def toy_problem_answer(problem: dict) -> str:
    return SCIENCEQA_ANSWER.format(choice=problem["choices"][problem["answer"]], letter=LETTERS[problem["answer"]])


def toy_words(scene: dict, rng: random.Random) -> str:
    """A scene in words: what a text-only model gets where the image would stand. Half of the time a sentence; else a
    heap of up to 36 words, as many as an image has patches, in any order and with repetitions."""
    if rng.random() < 0.5:
        return rng.choice(WORDINGS).format(**scene)
    values = list(scene.values())
    heap = values + rng.choices(values + FILLERS, k=rng.randint(0, 32))
    rng.shuffle(heap)
    return " ".join(heap)


FORMS = ("open", "yes-no", "choice", "choice", "hint", "hint", "describe")  # the hard skill twice as often


def toy_text_record(scene: dict, rng: random.Random, forms=FORMS, most_rounds: int = 3) -> dict:
    """A conversation about a scene *told in words*: what the tiny LM is pretrained on.

    One to `most_rounds` rounds on different attributes, so that a word is in the choices of one round at most. One
    record in four tells no scene and answers at random: so the model learns that the letter follows from the word
    it has said, not from what it has seen.
    """
    is_blind, turns = rng.random() < 0.25, []
    for number, kind in enumerate(rng.sample(list(QUESTIONS), 1 if is_blind else rng.randint(1, most_rounds))):
        seen = "" if number or is_blind else toy_words(scene, rng) + "\n"
        form = "choice" if is_blind else rng.choice(forms)
        if form == "open":
            question, answer = toy_open_question(scene, kind, rng)
        elif form == "yes-no":
            question, answer = toy_yes_no(scene, kind, rng.random() < 0.5, rng)
        elif form == "describe":
            question, answer = rng.choice(DESCRIBE), CAPTION.format(**scene)
        else:
            hint = toy_words(scene, rng) if form == "hint" else rng.choice(HINTS)
            problem = toy_problem(scene, kind, rng, hint, None)
            question, answer = scienceqa_prompt(problem), toy_problem_answer(problem)
        turns += [{"from": "human", "value": seen + question}, {"from": "gpt", "value": answer}]
    return {"id": f"text-{rng.getrandbits(32):08x}", "conversations": turns}


def write_toy_world(folder, seed: int = 0, align: int = 4000, instruct: int = 2000, text: int = 1000, test: int = 400):
    """Write the whole world below `folder`; the same seed gives the same bytes. Appears complete or not at all.

    align.json      captions of train scenes                 instruct.json   open questions, one record in ten without
    captions.json   captions of test scenes, for retrieval                   image; no multiple choice among them
    text.json       conversations about scenes in words
    images/         the pictures of both                     scienceqa/      multiple choice about val and test scenes;
    pope/, mme/     yes or no about test scenes, MME's two                   a quarter without image, told in the hint
                    of one picture in each of four categories
    """
    folder = Path(folder)
    building = folder.with_name(folder.name + f".building-{seed}")
    (building / "images").mkdir(parents=True, exist_ok=True)
    scenes, rng = toy_scenes(), random.Random(seed)

    def picture(scene, name):
        path = building / name
        path.parent.mkdir(parents=True, exist_ok=True)
        toy_picture(scene, rng).save(path)

    def image_record(kind, number, turns_of, split="train"):
        scene, name = rng.choice(scenes[split]), f"{kind}-{number:05d}"
        picture(scene, f"images/{name}.png")
        return {"id": name, "image": f"{name}.png", "conversations": turns_of(scene)}

    def caption_turns(scene):
        marker = rng.choice((f"{IMAGE}\n{{}}", f"{{}}\n{IMAGE}"))
        return [{"from": "human", "value": marker.format(rng.choice(DESCRIBE))},
                {"from": "gpt", "value": CAPTION.format(**scene)}]

    def question_turns(scene):
        turns = []
        for kind in rng.sample(list(QUESTIONS), 2):
            question, answer = toy_open_question(scene, kind, rng)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        return turns

    def text_turns(number):
        scene = rng.choice(scenes["train"])
        question, answer = toy_open_question(scene, rng.choice(list(QUESTIONS)), rng)
        return {"id": f"chat-{number:05d}", "conversations": [
            {"from": "human", "value": f"{toy_words(scene, rng)}\n{question}"}, {"from": "gpt", "value": answer}]}

    files = {
        "align.json": [image_record("align", n, caption_turns) for n in range(align)],
        "instruct.json": [text_turns(n) if n % 10 == 9 else image_record("instruct", n, question_turns)
                          for n in range(instruct)],
        "text.json": [toy_text_record(rng.choice(scenes["train"]), rng) for _ in range(text)],
    }
    problems, splits = {}, {"train": [], "val": [], "test": []}
    for split in ("val", "test"):
        for number in range(test):
            pid, scene = str(len(problems) + 1), rng.choice(scenes[split])
            shown = number % 4 != 3
            hint = rng.choice(HINTS) if shown else toy_words(scene, rng)
            problems[pid] = toy_problem(scene, rng.choice(list(QUESTIONS)), rng, hint,
                                        "image.png" if shown else None) | {"split": split}
            splits[split].append(pid)
            if shown:
                picture(scene, f"scienceqa/images/{split}/{pid}/image.png")
    lines = []
    for number in range(test // 2):
        scene, name, is_true = rng.choice(scenes["test"]), f"{number:05d}", number % 2 == 0
        picture(scene, f"pope/images/{name}.png")
        question, answer = toy_yes_no(scene, "shape", is_true, rng)
        lines.append(json.dumps({"question_id": number + 1, "image": f"{name}.png",
                                 "text": question.removesuffix(SHORT), "label": answer.lower()}))
        kind = list(VALUES)[number % 4]
        picture(scene, f"mme/{kind}/{name}.png")
        pair = [toy_yes_no(scene, kind, answer, rng) for answer in (True, False)]
        (building / f"mme/{kind}/{name}.txt").write_text("".join(
            f"{question.removesuffix(SHORT)} Please answer yes or no.\t{answer}\n" for question, answer in pair))
    files["captions.json"] = [image_record("caption", n, caption_turns, "test") for n in range(test)]
    (building / "pope/toy_pope_random.json").write_text("\n".join(lines) + "\n")
    files |= {"scienceqa/problems.json": problems, "scienceqa/pid_splits.json": splits}
    for name, content in files.items():
        (building / name).write_text(json.dumps(content, indent=1))
    building.rename(folder)


def write_toy_tokenizer(folder):
    """tokenizer.json of the toy world: a word is a token, and so is an option's letter with its dot. Phrases that
    never vary are one token each: a tiny model's sequences stay short. The ids of <unk>, <s> and </s> are Llama's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    words = Regex(r"\n|[A-E]\.|\w+|[^\w\s]")
    texts = [*WORDINGS, *sum(QUESTIONS.values(), ()), *YES_NO.values(), "Yes No", *sum(VALUES.values(), ()), *DESCRIBE,
             *HINTS, SCIENCEQA_ANSWER, "Context: A B C D E A. B. C. D. E. USER: ASSISTANT:\n"]
    split = pre_tokenizers.Split(words, "removed", invert=True)
    seen = {word for text in texts for word, _ in split.pre_tokenize_str(text.replace("{", " ").replace("}", " "))}
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(seen)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    phrases = (SYSTEM, SHORT, LETTER, ". The answer is")
    tokenizer.add_tokens([AddedToken(text.strip(), normalized=False) for text in phrases])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
         "pad_token": "<unk>", "clean_up_tokenization_spaces": False}, indent=2))


# ----------------------------------------------------------------------------------------------------------------
# The command line: toy, check


def check(file, images) -> int:
    """Print every bad record and unreadable image, write FILE.clean.json without them; return how many there were."""
    from tqdm import tqdm
    records, good = read_json(file), []
    for number, record in enumerate(tqdm(records, desc="check", unit=" records")):
        problem = fault(record)
        if not problem and "image" in record:
            try:
                load_image(Path(images) / record["image"])
            except (OSError, ValueError) as error:
                problem = str(error)
        if problem:
            name = record.get("id") if isinstance(record, dict) else None
            print(f"record {number} (id {name!r}): {problem}")
        else:
            good.append(record)
    bad = len(records) - len(good)
    print(f"{len(good)} of {len(records)} records are good")
    if bad:
        clean = Path(file).with_suffix(".clean.json")
        clean.write_text(json.dumps(good))
        print(f"wrote {clean}")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy world")
    toy.add_argument("folder")
    toy.add_argument("--seed", type=int, default=0)
    checker = commands.add_parser("check", help="list bad records and images, write a cleaned list")
    checker.add_argument("file")
    checker.add_argument("images")
    args = parser.parse_args()
    try:
        if args.command == "toy":
            write_toy_world(args.folder, args.seed)
        elif check(args.file, args.images):
            sys.exit(1)
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
