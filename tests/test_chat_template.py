"""An LLM's own chat template: what ends a turn, thoughts, and templates from which no answer is learned."""

import json
import shutil

import pytest
import transformers
from conftest import llama_config, shaken
from scripts import how_it_ends
from test_check import pictured, write_records
from test_data import CHAT_TURNS, encode
from test_ids import CHATML, QWEN3, chatml

import data
import eval as evaluation
import train
from plumbing.llava import MESSAGES
from plumbing.tokenizer import load_tokenizer
from projector import VLM


def test_a_turn_may_end_with_another_token_than_the_tokenizers(monkeypatch, clip_folder, tmp_path):
    """As of Qwen's base models. What is learned ends with it, and so does an answer."""
    tokenizer = chatml(eos="<|endoftext|>")
    ids, roles = encode("chat", CHAT_TURNS, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(i) for i, role in zip(ids, roles) if role == data.END] == [
        "<|im_end|>"
    ] * 2
    tokenizer.save_pretrained(tmp_path)
    config = llama_config(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None)
    shaken(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    vlm, ends = VLM.from_towers(clip_folder, tmp_path), []
    generate = vlm.llm.generate
    monkeypatch.setattr(vlm.llm, "generate",
                        lambda *args, **how: ends.append(how["end_tokens"]) or generate(*args, **how))
    evaluation.ask(vlm, load_tokenizer(tmp_path), [{"id": 1, "prompt": "?", "image": None}], "chat", 2)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends[0]


@pytest.mark.parametrize("template", [QWEN3, f"{MESSAGES}{QWEN3}"], ids=["own", "exported"])
def test_answers_may_have_thoughts(template):
    """Under a template like Qwen3's, which drops those of earlier turns: each answer is learned with its
    own."""
    tokenizer = chatml(template)
    turns = [("human", "What?"), ("gpt", "<think>\nred or blue</think> red"), ("human", "Sure?"),
             ("gpt", "yes"), ("human", "And?"), ("gpt", "<think>it is </think>\n\na circle")]
    ids, roles = encode("chat", turns, tokenizer, False)
    said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
    assert said == ("<think>\nred or blue\n</think>\n\nred<|im_end|>yes<|im_end|>"
                    "<think>\nit is\n</think>\n\na circle<|im_end|>")
    whole = tokenizer.decode(ids)
    assert whole.count("<|im_start|>") == 6 and "assistant\n<think>\n\n</think>\n\nyes" in whole


def test_thoughts_behind_a_template_without_a_generation_prompt_have_one_lead():
    template = ("{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% else %}"
                " ASSISTANT: {{ m.content }}<|im_end|>{% endif %}{% endfor %}")
    tokenizer = chatml(template)
    for answer in ("<think>t</think> red", "red"):
        ids, roles = encode("chat", [("human", "What?"), ("gpt", answer)], tokenizer, False)
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
        assert said == f" ASSISTANT: {answer}<|im_end|>"


def test_a_template_may_open_the_thoughts():
    """Qwen3-Thinking's ends the question with <think>. An answer without thoughts would begin with half of
    the token of two newlines."""
    opens = QWEN3.replace("and '</think>' in m.content %}{% if last", "%}{% if last").replace(
        "split('<think>')[-1].strip() }}", "split('<think>')[-1].strip() if '</think>' in m.content }}")
    start, end = opens.rsplit("{% if enable_thinking", 1)
    tokenizer = chatml(f"{start}<think>\n{{% endif %}}")
    question, learned = "<|im_start|>user\nWhat?<|im_end|>\n", "red or blue\n</think>\n\nred<|im_end|>"
    turns = [("human", "What?"), ("gpt", "<think>red or blue</think>red")]
    ids, roles = encode("chat", turns, tokenizer, False)
    assert tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT]) == learned
    assert tokenizer.decode(ids) == f"{question}<|im_start|>assistant\n<think>\n{learned}"
    with pytest.raises(ValueError, match="no boundary for labels"):
        encode("chat", [turns[0], ("gpt", "red")], tokenizer, False)


def test_a_template_may_drop_the_thoughts_that_it_opens():
    """As those of DeepSeek-R1's distilled models and of QwQ."""
    tokenizer = chatml(CHATML.replace("m.content", "m.content.split('</think>')[-1]").replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"))
    turns = [("human", "What?"), ("gpt", "red"), ("human", "Sure?")]
    chat = [{"role": "user", "content": "What?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<think>\n")
    ids, _ = encode("chat", turns, tokenizer, False)
    assert tokenizer.decode(ids).endswith(
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")


def with_chat(world, llm, *args):
    """How a run of the align stage ends that takes the chat template of the LLM in this folder."""
    options = ["--stage", "align", "--contrastive", "none", "--llm", llm, "--template", "chat", *args]
    return how_it_ends(train.main, world[0], *world[1], *options)


def test_a_template_whose_tokens_have_no_row_is_refused_before_loading(tmp_path, world, llama_folder):
    """A base model with somebody's chat template: its <|im_end|> lies behind the embedding table."""
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # no weight is looked for
    last = with_chat(world, folder, "--out", tmp_path / "out")
    assert "the LLM has no embedding for '<|im_" in last


@pytest.mark.parametrize("template, reason", [
    (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "drops or rewrites the thoughts"),
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end an answer")])
def test_templates_that_fit_no_answer_are_refused_before_loading(world, tmp_path, llama_folder, template,
                                                                 reason):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["chat_template"] = template.replace("<|im_end|>", "</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    thoughtful = pictured("align-00000.png", answer="<think>x</think> red")
    file = write_records(tmp_path / "d.json", *[thoughtful] * 8)
    assert reason in with_chat(world, folder, "--annotations", file, "--out", tmp_path / "out")
