"""Tokenizers: what is typed stays text, whatever special tokens there are."""

import json
import shutil
from functools import partial

import pytest
from test_data import chat_tokenizer, encode, llama2
from test_ids import chatml

import data
from plumbing.tokenizer import load_tokenizer


TOKENIZERS = {
    "llama2": lambda: llama2(False),
    "legacy": lambda: llama2(True),
    **{name: partial(chat_tokenizer, name) for name in ("chatml", "llama3", "thinking", "mistral")},
}


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_typed_special_tokens_are_text(name, template):
    """In questions and answers, also as the whole text and in private characters: the special tokens of a
    row are as many as without them, at the same places; what is learned is what was typed."""
    tokenizer = TOKENIZERS[name]()
    if template == "chat" and tokenizer.chat_template is None:
        return
    eos, special = tokenizer.eos_token, set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for typed in (eos, f"red {eos} blue {eos}", f"{eos}<image>{eos}", tokenizer.all_special_tokens[-1],
                  "\U00100000"):
        rows = []
        for text in (typed, "red"):
            turns = [("human", f"<image>\n{text}"), ("gpt", text), ("human", text), ("gpt", text)]
            turns = turns[:2] if template == "plain" else turns
            ids, roles = encode(template, turns, tokenizer)
            rows.append([(i, role) for i, role in zip(ids, roles) if i in special or i == data.IMAGE_MARKER])
            said = tokenizer.decode([i for i, role in zip(ids, roles) if role == data.ANSWER])
            if text.isascii() and template == "plain":
                assert said.replace(" ", "").strip() == text.replace(" ", "")
        assert rows[0] == rows[1]


@pytest.mark.parametrize("is_special", [False, True])
def test_ids_without_a_row_are_text(is_special):
    """LLaVA's tokenizer for Vicuna has <image> and more behind the vocabulary, which a record may say."""
    tokenizer = chatml()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=is_special)
    tokenizer.rows = rows
    for text in ("What is <image>?", "<video>", "<image>"):
        ids, _ = encode("v1", [("human", text), ("gpt", text)], tokenizer, False)
        assert max(ids) < rows and tokenizer.decode(ids).count(text.replace("<", "< ")) == 2
        ids, _ = encode("v1", [("human", f"<image>\n{text}"), ("gpt", text)], tokenizer)
        assert max(ids) < rows and ids.count(data.IMAGE_MARKER) == 1


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, llama_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": None}))
    with pytest.raises(ValueError, match="names no end token"):
        load_tokenizer(folder)
