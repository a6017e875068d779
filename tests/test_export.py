"""`python -m running.export` of a run. What is in such a folder: test_formats.py, test_projector.py."""

import shutil

import pytest
import torch
import transformers
from conftest import llama_config, shaken
from PIL import Image
from scripts import how_it_ends
from test_data import encode
from test_formats import change as set_in
from test_ids import DROPS, chatml, llama3
from test_tokenizer import TOKENIZERS
from tokenizers import processors

import data
import eval as evaluation
from plumbing.llava import prepare_tokenizer
from plumbing.tokenizer import load_tokenizer
from projector import VLM
from running import export


@pytest.fixture
def run(clip_folder, llama_folder, tmp_path):
    VLM.from_towers(clip_folder, llama_folder, dtype=torch.bfloat16).save(tmp_path / "run", {}, with_llm=True)
    return tmp_path / "run"


def test_a_run_is_exported_in_its_own_dtype(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "out")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"wrote {tmp_path}/out: transformers' LLaVA format, 0.")
    assert second == f"next: transformers serve {tmp_path}/out"
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("change, message", [
    (lambda run, out: (run / "config.json").rename(run / "log.jsonl"),
     "run: not finished, and without a checkpoint so far"),
    (lambda run, out: set_in(run, template="my-own"),
     "tuned with template 'my-own': transformers would ask in another form"),
    (lambda run, out: (out / "x").mkdir(parents=True), "out: not empty; nothing is written over"),
    (lambda run, out: shutil.rmtree(run) or run.mkdir(), "run/config.json: no such file"),
    (lambda run, out: shutil.rmtree(run), "run: no such folder, and the Hub does not give it")])
def test_what_cannot_be_exported_ends_in_a_line(run, tmp_path, change, message):
    change(run, tmp_path / "out")
    last = how_it_ends(export.main, tmp_path, str(run), str(tmp_path / "out"))
    assert last.startswith("running.export: ") and message in last
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("name, template", [
    ("toy", "v1"), ("llama2", "v1"), ("legacy", "v1"), ("chatml", "v1"), ("chatml", "chat"),
    ("llama3", "chat"), ("thinking", "chat"), ("mistral", "chat")])
def test_an_exported_folder_has_our_prompts(name, template, clip_folder, llama_folder, tmp_path):
    """Messages as an OpenAI-style server gets them, through transformers' processor: our ids, to the last;
    through its pipeline: our answer."""
    folder = llama_folder if name == "toy" else tmp_path / "llm"
    if name != "toy":
        tokenizer = TOKENIZERS[name]()
        tokenizer.save_pretrained(folder)
        size = max(tokenizer.get_vocab().values()) + 1
        config = llama_config(vocab_size=size, eos_token_id=tokenizer.eos_token_id,
                              max_position_embeddings=1024)
        shaken(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer, vlm = load_tokenizer(folder), VLM.from_towers(clip_folder, folder).eval()
    vlm.template = template
    vlm.export(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    question = "What color is it?"
    messages = [
        {"role": "user",
         "content": [{"type": "image", "url": str(tmp_path / "x.png")}, {"type": "text", "text": question}]}
    ]
    theirs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                           return_dict=True)
    turns = [("human", f"<image>\n{question}")]
    ids, _ = encode(template, turns, tokenizer)
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    at = ids.index(data.IMAGE_MARKER)
    assert theirs["input_ids"][0] == ids[:at] + [place] * 16 + ids[at + 1 :]
    if template == "v1":  # a system message stands in the place of Vicuna's own
        told = [{"role": "system", "content": "Be brief."}, *messages]
        prompt = processor.apply_chat_template(told, add_generation_prompt=True)
        assert prompt.startswith("Be brief. USER: <image>")
    pipeline = transformers.pipeline("image-text-to-text", model=str(tmp_path / "out"))
    said = pipeline(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    asked = {"id": 1, "prompt": turns[0][1], "image": tmp_path / "x.png"}
    assert evaluation.ask(vlm, tokenizer, [asked], template, 6) == [said.strip()]


def test_an_exported_template_tells_the_date_of_training_and_bos_once(tmp_path):
    """As Llama 3.2's; and one that writes the name of BOS."""
    tokenizer = llama3()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
        "<|begin_of_text|>"
        "{% for m in messages %}{{ date }} {{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}")
    tokenizer.save_pretrained(tmp_path)
    exported, _, _ = prepare_tokenizer(tmp_path, "chat", data.SYSTEM, data.v1)
    text = exported.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False)
    ids = exported(text).input_ids
    assert exported.decode(ids) == "<|begin_of_text|>26 Jul 2024 user: red<|eot_id|>"


@pytest.mark.parametrize("eos, bos, opens", [
    ("<|im_end|>", None, "<think>\n"), ("<|im_end|>", None, ""), ("<|im_end|>", "<|im_end|>", "")])
def test_an_exported_template_renders_what_was_learned(tmp_path, eos, bos, opens):
    """Also if it only begins thoughts, as DeepSeek-R1's, and if one token begins texts and ends answers."""
    template = DROPS.replace("assistant\n{% endif", f"assistant\n{opens}{{% endif")
    tokenizer = chatml(template, eos=eos)
    if bos:
        tokenizer.bos_token = bos
        name = [(bos, tokenizer.convert_tokens_to_ids(bos))]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, name)
    tokenizer.save_pretrained(tmp_path)
    exported, _, _ = prepare_tokenizer(tmp_path, "chat", data.SYSTEM, data.v1)
    turns = [("human", "What?"), ("gpt", "red"), ("human", "Sure?")]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[role], "content": text} for role, text in turns]
    text = exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert exported(text).input_ids == encode("chat", turns, load_tokenizer(tmp_path), False)[0]


def test_an_export_has_a_row_for_every_token_that_is_read(tmp_path, clip_folder, llama_folder):
    """The LLM's tokenizer may have tokens without one, as LLaVA's has with Vicuna."""
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    vlm = VLM.from_towers(clip_folder, folder)
    vlm.export(tmp_path / "out")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer(["red", "a red circle"], padding=True, return_tensors="pt")
    assert theirs.generate(**asked, max_new_tokens=2).shape[0] == 2
