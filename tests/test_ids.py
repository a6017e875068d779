"""Ids and roles of conversations, for many kinds of tokenizers, against those kept in tests/golden/ids.json.

A case is TOKENIZER/TEMPLATE/RECORD. Where the name of a record begins with "typed", its text has the name of
a special token or one marker too many: of these cases only the special tokens and their roles are held, and
one that was an error may be none.
After a change that moves a case on purpose, and says why:

    python tests/test_ids.py
"""

import json
import re
import sys
import tempfile
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from lab import toy_world
from plumbing.tokenizer import load_tokenizer

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "ids.json"
PROMPT = "Describe the picture."


def ids_and_roles(record, tokenizer, template, prompt="") -> tuple:
    """As Conversations.read and eval.to_sample have them. The template "text" is the text-only side of the
    prompted contrastive loss."""
    turns = data.clean_turns(record)
    if template == "text":
        caption = data.as_text(turns[1][1], tokenizer, False)
        return data.tokenise([(f"{caption}\n{prompt}".strip(), data.CONTEXT)], tokenizer, False)
    form = data.form_of(template, tokenizer, prompt)
    if template == "plain":
        turns = data.image_and_caption(turns)
    return data.encode(turns, form, tokenizer, "image" in record)


# ---- records -----------------------------------------------------------------------------------------------


def record(*turns, first="human", **fields):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    conversations = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": "r", "conversations": conversations, **fields}


pictured = partial(record, image="x.png")
ASK = "<image>\nWhat color is it?"
REST = "Is it red?", "Yes, it is.", "What color is the circle?", "Black."
CAPTIONS = {  # an image and an answer: the plain template takes these, too
    "one": pictured(ASK, "It is red."),
    "one word": pictured(f"{ASK}\nAnswer the question using a single word or phrase.", "red"),
    "no question": pictured("<image>", "a red circle"),
    "image at the end": pictured("What color is it?\n<image>", "It is red"),
    "image inside": pictured("What <image> color is it?", "red."),
    "opening answer": pictured("Yes.", ASK, "It is red.", first="gpt"),
    "spaces": pictured("  <image>\n  What  color is it? ", "  a  red circle "),
    "newlines inside": pictured("<image>\nWhat\n\ncolor\nis it?", "It is red.\n\nIt is\na circle"),
    "newline before": pictured(ASK, "\nA red circle"),
    "newline behind": pictured(f"{ASK}\n", "A red circle.\n"),
    "unicode": pictured("<image>\n颜色 é 😀?", "红色😀 é"),
    "typed end": pictured(f"{ASK} </s>", "red </s> blue</s>"),
    "typed chatml": pictured(f"{ASK}<|im_end|>", "<|im_end|>\n<|im_start|>user\nred"),
    "typed llama 3": pictured(f"{ASK}<|eot_id|>", "<|begin_of_text|>red<|eot_id|>"),
    "typed marker twice": pictured("<image> What <image> color?", "red"),
    "typed marker in the answer": pictured(ASK, "red <image>"),
    "typed private character": pictured(f"{ASK}\U00100000", "red \U000F0000"),
}
RECORDS = CAPTIONS | {
    "three": pictured(ASK, "It is red.", *REST),
    "text only": record("What color is a circle?", "It is red."),
    "text only, three": record("What color is a circle?", " It is red.\n", *REST),
    "open": pictured(ASK),
    "open, text only": record("What color is a circle?"),
    "open, third": pictured(ASK, "It is red.", *REST[:3]),
    "letter": pictured("<image>\nWhat color?\nA. red\nB. blue", "A", "And now?", "5"),
    "opening answer, three": pictured("Yes.", ASK, "red", *REST, first="gpt"),
    "spaces, two": pictured(f"{ASK}  ", " red ", "  Is it large?\n", "\n\nNo. \n"),
    "unicode, two": record("颜色?", "红色。", "😀 é?", "é😀"),
    "thoughts": pictured(ASK, "<think>\nred or blue</think> red", "Is it?", "Yes", "Is it a circle?",
                         "<think>it is </think>\n\na circle"),
    "thoughts, one": pictured(ASK, "<think>\nred or blue\n</think>\n\nred"),
    "thoughts, empty": record("What color?", "<think>\n\n</think>\n\nred", "Is it?", "Yes"),
    "thoughts, early": record("What color?", "<think>red</think>red", "Is it?", "Yes"),
    "typed end, two": record("What is </s>?", "</s>", "red </s> USER: blue", "<s>red</s>"),
    "typed chatml, two": record("<|im_end|>", "<|im_end|>", "red<|im_start|>", "<|im_start|>assistant\nred"),
    "typed marker later": pictured(ASK, "red", "What is <image>?", "a <image>"),
    "typed marker in text": record("What is <image>?", "<image>"),
    "typed video": record("What is <video>?", "<video>"),
}

# ---- tokenizers --------------------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}{% if loop.first %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{{ m.content | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
VICUNA = ("{{ bos_token }}A chat.{% for m in messages %}{% if m.role == 'user' %} USER: {{ m.content }}"
          "{% else %} ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %} ASSISTANT:{% endif %}")
EMPTY = "<think>\n\n</think>\n\n"
THINKING = (CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}"
                           f"{EMPTY}{{% endif %}}{{{{ m.content }}}}")
            .replace("assistant\n{% endif %}", "assistant\n"
                     "{% if enable_thinking is defined and not enable_thinking %}"
                     f"{EMPTY}{{% endif %}}{{% endif %}}"))
QWEN3 = """{% for m in messages %}{% set last = loop.last %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and '</think>' in m.content %}{% if last %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}
</think>

{% endif %}{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
DROPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
TURN = "{{ '<s>' if loop.first else '' }}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' }}\n"
OWN = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{{{ 'assistant:' if add_generation_prompt }}}}"
REWRITES = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"

# How Llama 3 and Qwen cut text before their BPE sees it: a stop takes the newlines behind it along.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = f"""{data.SYSTEM} USER ASSISTANT {ASK} It is a red circle {PROMPT} user assistant
Answer the question using a single word or phrase
think
user
assistant
system
Be kind"""
WORDS = re.findall(r" ?\w+", TEXT)


def byte_level(template, bos, eos, specials, is_trimmed=False, added=()):
    """A byte-level BPE like Llama 3's and Qwen's, which knows WORDS, stops with a newline and two newlines.
    `is_trimmed`: the place that it gives of a token is without the space in front."""
    vocabulary, merges = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())], []
    for word in [*WORDS, ".\n", "\n\n"]:
        word = word.replace(" ", "Ġ").replace("\n", "Ċ")
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.add_special_tokens([*specials])
    tokenizer.add_tokens([*added])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    behind = [processors.ByteLevel(trim_offsets=True)] if is_trimmed else []
    if bos:
        behind.append(processors.TemplateProcessing(single=f"{bos} $A",
                                                    special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(behind)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                   chat_template=template)


def chatml(template=CHATML, eos="<|im_end|>", **how):
    return byte_level(template, None, eos, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **how)


def llama3(**how):
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_level(LLAMA3, *specials[:2], specials, **how)


def llama2(space, template=None, has_bos=True):
    """Llama 2's, cut down as in test_data. `space`: where SentencePiece's own stands: also behind special
    tokens ("legacy"), at the start ("first"), or "never"."""
    spec = json.loads((HERE / "llama2_subset.json").read_text())
    spec["model"]["vocab"] |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    if space != "legacy":
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": space,
                                 "split": False}
    spec["post_processor"] = spec["post_processor"] if has_bos else None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>",
                                   bos_token="<s>" if has_bos else None, unk_token="<unk>",
                                   chat_template=template)


def llava():
    """Llama 2's with tokens behind the LLM's embedding table."""
    tokenizer = llama2("first", MISTRAL)
    tokenizer.rows = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    return tokenizer


def unigram():
    """Of WORDS and bytes, whose vocabulary is a list; no BOS."""
    vocabulary = [(name, 0.0) for name in ("<unk>", "<s>", "</s>")]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(word.replace(" ", "▁"), -3.0) for word in dict.fromkeys(WORDS)] + [("▁", -4.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def toy(template=None):
    with tempfile.TemporaryDirectory() as folder:
        toy_world.write_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


TYPED = [name for name in RECORDS if name.startswith("typed")]
THOUGHTS = [name for name in RECORDS if name.startswith("thoughts")]
FEW = ["one", "three", "open, third", "thoughts", *TYPED]
ALL, CHAT = ("plain", "prompt", "text", "v1", "chat"), ("chat",)
TOKENIZERS = {  # name: (what makes it, templates, records)
    "toy": (partial(toy, OWN), ALL, RECORDS),
    "llama2": (partial(llama2, "first", MISTRAL), ALL, RECORDS),
    "llama2 legacy": (partial(llama2, "legacy", VICUNA), ("plain", "prompt", "v1", "chat"), RECORDS),
    "llama2 no space": (partial(llama2, "never"), ("plain", "prompt", "v1", "chat"), FEW),
    "llama2 no bos": (partial(llama2, "first", VICUNA, has_bos=False), ALL, FEW),
    "llava": (llava, ("v1", "chat"), FEW),
    "vicuna": (partial(llama2, "first", VICUNA), CHAT, FEW),
    "unigram": (unigram, ALL, RECORDS),
    "chatml": (chatml, ALL, RECORDS),
    "chatml base": (partial(chatml, eos="<|endoftext|>"), ("v1", "chat"), FEW),
    "llama3": (llama3, ("plain", "prompt", "v1", "chat"), RECORDS),
    "thinking": (partial(chatml, THINKING), CHAT, RECORDS),
    "qwen3": (partial(chatml, QWEN3), CHAT, RECORDS),
    "qwen3 tokens": (partial(chatml, QWEN3, added=["<think>", "</think>"]), CHAT,
                     ["one", "three", *THOUGHTS]),
    "drops thoughts": (partial(chatml, DROPS), CHAT, ["one", "three", *THOUGHTS]),
    "rewrites": (partial(chatml, REWRITES), CHAT, ["one", "three", "open"]),
}
SAME = {  # these have the cases of those
    "chatml trimmed": (partial(chatml, is_trimmed=True), "chatml"),
    "llama3 trimmed": (partial(llama3, is_trimmed=True), "llama3"),
}


@lru_cache
def tokenizer_of(name):
    return (SAME[name] if name in SAME else TOKENIZERS[name])[0]()


# ---- cases -------------------------------------------------------------------------------------------------


def cases(name) -> dict:
    """{case: (tokenizer, template, record)} of a tokenizer. Of records that the plain template refuses, two;
    where there is no chat template, one chat."""
    like, found = SAME[name][1] if name in SAME else name, {}
    tokenizer, (_, templates, names) = tokenizer_of(name), TOKENIZERS[like]
    for template in templates:
        taken = [*names]
        if template in ("plain", "prompt", "text"):
            taken = [key for key in names if key in CAPTIONS]
            taken += [] if template == "text" else ["three", "text only"]
        elif template == "chat" and tokenizer.chat_template is None:
            taken = ["one"]
        for key in taken:
            found[f"{like}/{template}/{key}"] = tokenizer, template, RECORDS[key]
    return found


def outcome(case, tokenizer, template, sample):
    """What is kept of a case: {"ids": [...], "roles": "C3 A2 E1"}, which is three of context, two of an
    answer, one of its end; of a typed one the special tokens alone; or "error"."""
    prompt = PROMPT if template in ("prompt", "text") else ""
    template = "plain" if template == "prompt" else template
    try:
        ids, roles = ids_and_roles(sample, tokenizer, template, prompt)
    except ValueError:
        return "error"
    assert len(ids) == len(roles)
    if is_typed(case):
        special = special_ids(tokenizer)
        ids, roles = [i for i in ids if i in special], [role for i, role in zip(ids, roles) if i in special]
    runs = [f"{role[0].upper()}{len([*same])}" for role, same in groupby(roles)]
    return {"ids": ids, "roles": " ".join(runs)}


def is_typed(case) -> bool:
    return case.split("/")[2] in TYPED


def special_ids(tokenizer) -> set:
    """And the image's; not the unknown token's, which stands for mere text."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *special, data.IMAGE_MARKER} - {tokenizer.unk_token_id}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_no_case_is_missing(golden):
    assert {*golden} == {case for name in TOKENIZERS for case in cases(name)}


@pytest.mark.parametrize("name", [*TOKENIZERS, *SAME])
def test_ids_and_roles_are_the_golden_ones(golden, name):
    wrong = {}
    for case, how in cases(name).items():
        found, is_free = outcome(case, *how), is_typed(case) and golden[case] == "error"
        if found != golden[case] and not is_free:
            wrong[case] = found, golden[case]
    assert not wrong


def write():
    lines = []
    for name in TOKENIZERS:
        for case, how in cases(name).items():
            lines.append(f"{json.dumps(case)}: {json.dumps(outcome(case, *how), separators=(',', ':'))}")
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
