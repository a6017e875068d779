"""transformers' LLaVA format and LLaVA's own: names of tensors, and what an export consists of.
"""

import json
from pathlib import Path

import torch.nn.functional as F
from plumbing.clip import vit_config_to_dict, write_preprocessor_config
from plumbing.files import TOKENIZER_FILES, named, resolve
from plumbing.llama import llm_config_to_dict, our_llm_name
from plumbing.weights import write_weights


PREFIXES = (  # theirs, ours; the first that fits is replaced, so the form that we write comes first
    ("vision_tower.vision_model.", "vit."), ("vision_tower.", "vit."),
    ("language_model.model.", "llm.model."), ("language_model.lm_head.", "llm.lm_head."),
    ("language_model.", "llm.model."), ("lm_head.", "llm.lm_head."),
    ("multi_modal_projector.linear_1.", "projector.0."), ("multi_modal_projector.linear_2.", "projector.2."))


def our_name(name: str, is_tied: bool = False) -> str:
    """Of a tensor in transformers' LLaVA format, in the older or the newer form, the name in VLM; "" for what
    we compute, hold already or do not need."""
    name = our_llm_name(name.removeprefix("model."), is_tied)  # the newer form has that prefix
    if name.endswith("position_ids") or ".head." in name:
        return ""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def their_name(name: str) -> str:
    """The other way round, in the older form, which every version of transformers reads."""
    for theirs, ours in PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


# Jinja. Messages, as servers send them, hold lists of pictures and texts; an LLM's own template wants text.
MESSAGES = """{%- set flat = namespace(messages=[]) -%}{%- for m in messages -%}
{%- set said = namespace(image='', text='') -%}
{%- if m.content is string -%}{%- set said.text = m.content -%}{%- else -%}{%- for part in m.content -%}
{%- if part.type == 'text' -%}{%- set said.text = said.text + part.text -%}
{%- else -%}{%- set said.image = said.image + '<image>GAP\n' -%}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- set text = said.image + said.text.strip() if said.image else said.text -%}
{%- set flat.messages = flat.messages + [{'role': m.role, 'content': text}] -%}{%- endfor -%}
{%- set messages = flat.messages -%}{%- set enable_thinking = false -%}"""
VICUNA = """{{- (messages[0].content if messages[0].role == 'system' else 'A chat between a curious user and \
an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the \
user\\'s questions.') + ' ' -}}
{%- for m in messages -%}{%- if m.role == 'user' -%}{{- 'USER: ' + m.content + ' ASSISTANT:' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"""


def export_llava(vlm, folder: Path, architecture: str):
    """Write `vlm` in that format. There, the placeholder is a token of its own, `<image>`, with a row in the
    embedding table that is never read; where the table has no spare row for it, it grows by one."""
    from transformers import AutoTokenizer  # imported late: it takes seconds
    llm, vit = vlm.llm.config, vlm.vit.config
    if vlm.projector_kind != "mlp2x_gelu":
        raise ValueError(f"transformers' LLaVA has no projector {vlm.projector_kind!r}, only mlp2x_gelu")
    if vit.family.architecture is None:
        raise ValueError("a DINOv2 tower is read, not written")
    source = resolve(vlm.sources["llm"], TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.add_tokens("<image>", special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    own = None if vlm.template == "v1" else tokenizer.chat_template
    # SentencePiece opens the text behind an image with a space of its own; some of its tokenizers do not
    # where a special token stands there
    behind = tokenizer("<image>\n", add_special_tokens=False).input_ids[1:]
    gap = "" if behind == tokenizer("\n", add_special_tokens=False).input_ids else " "
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # then the template must not
    no_bos = "{%- set bos_token = '' -%}" if adds_bos else ""
    tokenizer.chat_template = MESSAGES.replace("GAP", gap) + no_bos + (own or VICUNA)
    said = [{"role": role, "content": "?"} for role in ("user", "assistant")]
    with named(source, "its chat template"):
        said = tokenizer(tokenizer.apply_chat_template(said, tokenize=False)).input_ids
    end = [i for i in said if i in tokenizer.added_tokens_decoder][-1:]  # of an answer
    ends = llm.eos_token_id if isinstance(llm.eos_token_id, list) else [llm.eos_token_id]
    vocab_size, tensors = max(llm.vocab_size, image_token_id + 1), {}
    for name, parameter in vlm.named_parameters():
        tensor = parameter.detach()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = F.pad(tensor, (0, 0, 0, vocab_size - llm.vocab_size))  # (vocab_size, C)
        tensors[their_name(name)] = tensor
    strategy = "default" if vit.family.class_token else "full"
    write_weights(tensors, folder, {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vit_config_to_dict(vit),
        "text_config": llm_config_to_dict(llm, architecture) | {"vocab_size": vocab_size},
        "image_token_index": image_token_id, "image_seq_length": vlm.num_image_tokens,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": vlm.vit.feature_layer, "tie_word_embeddings": llm.tie_word_embeddings,
        "vision_feature_select_strategy": strategy})
    generation = {"bos_token_id": llm.bos_token_id, "eos_token_id": sorted({*ends, *end}),
                  "pad_token_id": tokenizer.pad_token_id}
    processor = {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": vit.patch_size,
                 "num_additional_image_tokens": int(vit.family.class_token),
                 "vision_feature_select_strategy": strategy}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    tokenizer.save_pretrained(folder)
    write_preprocessor_config(vit, folder, "pad")  # as instruct trains, and eval.py asks


def find_projector(folder) -> Path:
    """The file with the projector's weights; our own run directories have another than LLaVA's."""
    theirs = Path(folder) / "mm_projector.bin"
    return Path(folder) if Path(folder).is_file() else theirs if theirs.exists() else (
        Path(folder) / "projector.safetensors")
