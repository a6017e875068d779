"""What an LLM's chat template writes around our words: render tiny chats, cut them at words that no template
has."""

import datetime
import re
from functools import partial
from typing import Callable

from plumbing.tokenizer import bos_ids

DATE = datetime.date(2024, 7, 26)  # for templates that tell the date: training and asking must read alike
THOUGHTS_END = "</think>"  # what stands before it in an answer are thoughts
QUESTION, REPLY, AGAIN, THOUGHT = "kwqxquestion", "kwqxanswer", "kwqxagain", "kwqxthought"
ASKED, REPLIED, ASKED_AGAIN = ("user", QUESTION), ("assistant", REPLY), ("user", AGAIN)


def cut_chat(tokenizer, *messages, **how) -> list:
    """The texts between our words in a chat of (role, text) that the tokenizer's template renders.

    "<|user|>kwqxquestion<|end|><|assistant|>kwqxanswer<|end|>" gives ["<|user|>", "<|end|><|assistant|>",
    "<|end|>"]. """
    chat = [{"role": role, "content": text} for role, text in messages]
    how = {"enable_thinking": False, "strftime_now": DATE.strftime} | how
    text = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    if bos_ids(tokenizer):  # `tokenise` writes BOS
        text = text.removeprefix(tokenizer.bos_token)
    return re.split(f"{QUESTION}|{REPLY}|{AGAIN}|{THOUGHT}", text)


def begun_thoughts(tokenizer) -> str:
    """The "<think>\\n" that a template writes before an answer to come and, as DeepSeek-R1's, not before one
    that is there; or ""."""
    prompt = cut_chat(tokenizer, ASKED, add_generation_prompt=True)
    answered = cut_chat(tokenizer, ASKED, REPLIED)
    more = prompt[-1].removeprefix(answered[len(prompt) - 1])  # than what stands before the answer
    is_begun = more.lstrip().startswith("<think>") and THOUGHTS_END not in more
    return more if is_begun else ""


def thoughts_of(tokenizer, before: str) -> Callable:
    """How the chat template writes an answer with thoughts, behind `before`: in its own way, as it is, or not
    at all."""
    _, *loose = cut_chat(tokenizer, ASKED, ("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{REPLY}"))
    _, *tight = cut_chat(tokenizer, ASKED, ("assistant", f"<think>{THOUGHT}</think>{REPLY}"))
    if len(loose) != 3 or not loose[0].startswith(before):
        return partial(with_thoughts, None, None)
    opens, closes, _ = loose
    opens = opens.removeprefix(before)
    if loose != tight:  # as it is
        return partial(with_thoughts, opens.removesuffix("<think>\n"), None)
    return partial(with_thoughts, opens, closes)


def with_thoughts(opens: str | None, closes: str | None, answer: str) -> str:
    """The answer as its chat template writes it, with `opens` before its thoughts and `closes` behind them.

    Without `closes` the template keeps thoughts as they come; without `opens` it drops them.
    """
    answer = answer.strip()
    thoughts, mark, said = answer.rpartition(THOUGHTS_END)
    if not mark:
        return answer
    if opens is None:
        raise ValueError("the tokenizer's chat template drops or rewrites the thoughts of an answer")
    if closes is None:
        return opens + answer
    return opens + thoughts.removeprefix("<think>").strip() + closes + said.strip()
