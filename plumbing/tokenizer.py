"""The LLM's tokenizer: load it, check that it is the LLM's, and what is special in it."""

import math
import re
from functools import lru_cache

from plumbing import llama
from plumbing.files import TOKENIZER_FILES, named, read_json, resolve


def open_tokenizer(folder, **how):
    """transformers' tokenizer of a folder, which splits texts as its tokenizer.json says.

    AutoTokenizer 5 drops the file's normalizer and pre-tokenizer for classes with an `__init__` of their own.
    SmolLM2's digits are then not split, DeepSeek's spaces are lost (transformers issues 45812, 45920, 48206).
    Only Llama 2's it makes better than the file: without SentencePiece's space behind a special token.
    """
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast  # late: it takes seconds
    kind = AutoTokenizer
    if (folder / "tokenizer.json").exists():
        has_space = "Prepend" in str(read_json(folder / "tokenizer.json").get("normalizer"))
        file = folder / "tokenizer_config.json"
        told = read_json(file) if file.exists() else {}
        is_llama = str(told.get("tokenizer_class")).startswith("Llama") and told.get("legacy") is False
        kind = LlamaTokenizer if has_space and is_llama else PreTrainedTokenizerFast
    return kind.from_pretrained(folder, trust_remote_code=False, **how)  # None would ask, and wait


def tokenizer_folder(folder_or_id):
    """Where the tokenizer of an LLM is, or of a run that tuned one."""
    return llama.home(resolve(folder_or_id, ("*.json", *TOKENIZER_FILES)))


def load_tokenizer(folder_or_id):
    """The LLM's tokenizer, with a token for padding."""
    folder = tokenizer_folder(folder_or_id)
    problem = ("no tokenizer could be made. Without a tokenizer.json, as in Vicuna's folders, put one there "
               "(for Vicuna 1.5 that of llava-hf/llava-1.5-7b-hf) or `pip install sentencepiece protobuf`")
    with named(folder, problem):  # transformers raises many kinds, most of them about packages
        tokenizer = open_tokenizer(folder)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: labels need to know where tokens stand; a tokenizer.json says so")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no end token (eos_token in tokenizer_config.json): "
                         "answers could not end")
    tokenizer.model_max_length = 10**9  # no warning of the tokenizer's own: collate cuts or refuses long rows
    give_padding(tokenizer)
    return tokenizer


def give_padding(tokenizer):
    """Without a token for padding, it gets that of the unknown, as in LLaVA, or that of the end."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def check_vocabulary(tokenizer, size: int):
    """Refuse a tokenizer of more tokens than the LLM has embeddings, as it is another LLM's, and note in
    `tokenizer.rows` how many it has.

    Tokens that were added to it later do not count. LLaVA's tokenizer serves Vicuna, which has no row for its
    <image> and <pad>: `special_names` keeps these out of texts, and another token pads.
    """
    if (tokenizer.pad_token_id or 0) >= size:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    largest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    if largest >= size:
        raise ValueError(f"{tokenizer.name_or_path}: ids up to {largest}, the LLM has {size} embeddings")
    tokenizer.rows = size


def special_names(tokenizer) -> str:
    """A pattern of the names that must not come out of a text: special tokens, and tokens without a row of
    the LLM's."""
    return names_beyond(tokenizer, getattr(tokenizer, "rows", math.inf))


@lru_cache(8)
def names_beyond(tokenizer, rows) -> str:
    names = []
    for i, token in tokenizer.added_tokens_decoder.items():
        name = token.content
        is_special = token.special or name in tokenizer.all_special_tokens
        has_letters = re.search(r"\w", name)
        has_signs = re.search(r"[^\w\s]", name)  # without both it is an ordinary word or sign, and stays one
        if i >= rows or (is_special and has_letters and has_signs):
            names.append(name)
    names.sort(key=len, reverse=True)
    return "|".join(map(re.escape, names)) or "(?!)"


def bos_ids(tokenizer) -> list:
    """[BOS] if the tokenizer opens a text with it. (Some add an end token as well.)"""
    bos = tokenizer.bos_token_id
    return [bos] if tokenizer("").input_ids[:1] == [bos] else []
