"""Whole models on disk: run directories, transformers' LLaVA format, LLaVA's own checkpoints.

                           config.json                           the folder's weights      the vision tower
    run directory          names both towers                     projector, tuned LLM      elsewhere
    transformers' format   wraps those of both towers            all                       here
    LLaVA's own            the LLM's, with `mm_` fields          LLM and projector         elsewhere

`read` reads all three, VLM.save writes the first, `export` the second. Reading gives a dict: "vit" and "llm"
(sizes of a tower that is here, or the name of a folder), "projector" (its kind), "feature_layer", "sources",
"our_name" (a function), and what only one of the forms knows: "template", "image_token_id", "drops".
"""

import json
from pathlib import Path

import torch.nn.functional as F

from plumbing import clip, llama
from plumbing.files import TOKENIZER_FILES, named, read_json, resolve, write_json
from plumbing.weights import read_config, write_weights

IMAGE = "<image>"  # in transformers' format the placeholder is a token of the tokenizer


# ------------------------------------------------------------------------------------------------------------
# Names of tensors

PREFIXES = (  # theirs, ours. The first that fits is replaced, so the form that we write comes first.
    ("vision_tower.vision_model.", "vit."), ("vision_tower.", "vit."),
    ("language_model.model.", "llm.model."), ("language_model.lm_head.", "llm.lm_head."),
    ("language_model.", "llm.model."), ("lm_head.", "llm.lm_head."),
    ("multi_modal_projector.linear_1.", "projector.0."), ("multi_modal_projector.linear_2.", "projector.2."),
)


def our_name(name: str, is_tied: bool = False) -> str:
    """Our name of a tensor in transformers' format, older or newer; "" if we do not load it."""
    name = name.removeprefix("model.")  # the newer form has this prefix
    name = llama.our_name(name, is_tied)
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


def our_name_in_original(name: str, is_tied: bool) -> str:
    """Our name of a tensor in LLaVA's own checkpoint; "" if we do not load it."""
    if name.startswith("model.mm_projector."):
        return name.removeprefix("model.mm_")
    return llama.our_name(f"llm.{name}", is_tied)


def our_projector_name(name: str) -> str:
    """Our name of a tensor in mm_projector.bin or projector.safetensors, within the projector."""
    return name.rpartition("mm_projector.")[2]


def find_projector(path) -> Path:
    """The projector's file: `path` itself, LLaVA's mm_projector.bin in it, or our projector.safetensors."""
    path = Path(path)
    if path.is_file():
        return path
    if (path / "mm_projector.bin").exists():
        return path / "mm_projector.bin"
    return path / "projector.safetensors"


# ------------------------------------------------------------------------------------------------------------
# Reading

def read(folder: Path) -> dict:
    """What lies in a folder: see above."""
    config = read_json(folder / "config.json")
    if not str(config.get("model_type")).startswith("llava"):
        return read_run(folder, config)
    if "text_config" in config:
        return read_llava(folder)
    return read_original(folder, config)


def read_run(folder: Path, config: dict) -> dict:
    """A run directory. It has the LLM in llm/ once that was tuned."""
    for name, kind in (("vit", str), ("llm", str), ("projector", str), ("feature_layer", int)):
        if not isinstance(config.get(name), kind):
            wanted = "a number" if kind is int else "a name"
            raise ValueError(f"{folder}/config.json: {name} is {config.get(name)!r}; "
                             f"a run directory has {wanted} there")
    found = {key: config.get(key) for key in ("vit", "llm", "projector", "feature_layer", "template")}
    if (folder / "llm").is_dir():
        found["llm"] = str(folder / "llm")
    elif config.get("stage") == "instruct":
        raise FileNotFoundError(f"{folder}/llm: no such folder; this run tuned the LLM and has lost it")
    return found | {"sources": {"vit": found["vit"], "llm": found["llm"]}}


def read_llava(folder: Path) -> dict:
    """transformers' format. ValueError if it asks for what we do not compute."""
    config = read_config(folder, ("llava",))
    if config["projector_hidden_act"] != "gelu" or not isinstance(config["vision_feature_layer"], int):
        raise ValueError(f"{folder}: only a GELU projector over a single feature layer is supported")
    return {"vit": clip.sizes_of(config["vision_config"], folder),
            "llm": llama.sizes_of(config["text_config"], folder),
            "projector": "mlp2x_gelu", "feature_layer": config["vision_feature_layer"],
            "image_token_id": config.get("image_token_index") or config["image_token_id"],
            "drops": config["vision_feature_select_strategy"],
            "sources": {"vit": str(folder), "llm": str(folder)}, "our_name": our_name}


def check_class_token(found: dict, has_class_token: bool, folder: Path):
    """ValueError if a folder in transformers' format drops other tokens than the class token."""
    if "drops" in found and (found["drops"] == "default") != has_class_token:
        raise ValueError(f"{folder}: {found['drops']!r} does not drop just the class token")


def read_original(folder: Path, config: dict) -> dict:
    """LLaVA's own form. ValueError for what version 1.5 does not have: tiles, marks around an image, a tuned
    vision tower."""
    from transformers import AutoConfig  # imported late: it takes seconds
    has_tiles = config.get("mm_patch_merge_type", "flat") != "flat"
    tower = config.get("mm_vision_tower")
    if has_tiles or config.get("mm_use_im_start_end") or not tower:
        raise ValueError(f"{folder}: of LLaVA's own checkpoints only those like version 1.5's are supported")
    family = config["model_type"].partition("_")[2] or "llama"  # llava_mistral
    fields = {name: value for name, value in config.items() if name != "model_type"}
    complete = AutoConfig.for_model(family, **fields).to_dict()  # with transformers' defaults
    return {"vit": tower, "llm": llama.sizes_of(complete, folder),
            "projector": config.get("mm_projector_type", "linear"),
            "feature_layer": config["mm_vision_select_layer"],
            "sources": {"vit": tower, "llm": str(folder)}, "our_name": our_name_in_original}


# ------------------------------------------------------------------------------------------------------------
# The chat template of an export, in Jinja, which servers render. They send messages whose content is a list
# of pictures and texts. An LLM's own template wants text, so MESSAGES comes before it: each picture becomes
# the placeholder, in front of the text.

MESSAGES = """{%- set flat = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- set said = namespace(image='', text='') -%}
{%- if m.content is string -%}{%- set said.text = m.content -%}{%- else -%}
{%- for part in m.content -%}
{%- if part.type == 'text' -%}{%- set said.text = said.text + part.text -%}
{%- else -%}{%- set said.image = said.image + '<image>GAP\n' -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- set text = said.image + said.text.strip() if said.image else said.text -%}
{%- set flat.messages = flat.messages + [{'role': m.role, 'content': text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}{%- set enable_thinking = false -%}"""
FORM = """{{- (messages[0].content if messages[0].role == 'system' else system) + gap -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- again + m.content + to_answer -}}
{%- elif m.role == 'assistant' -%}{{- lead + m.content + end -}}{%- endif -%}
{%- endfor -%}"""


def as_jinja(system: str, form) -> str:
    """A chat template made of a form's five strings. A system message replaces `system`."""
    opening, to_answer, lead, end, again = form[:5]
    gap = opening.removeprefix(system).removesuffix(again)
    strings = {"system": system, "gap": gap, "again": again, "to_answer": to_answer, "lead": lead, "end": end}
    given = [f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in strings.items()]
    return "".join(given) + FORM


def prepare_tokenizer(source: Path, template: str, system: str, v1):
    """Return the LLM's tokenizer with the placeholder and an export's chat template, and a list: the special
    token that this template puts after an answer, if there is one."""
    from transformers import AutoTokenizer  # imported late: it takes seconds
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.add_tokens(IMAGE, special_tokens=True)
    own = tokenizer.chat_template
    if template == "v1" or not own:
        own = as_jinja(system, v1(tokenizer))
    # SentencePiece puts a space of its own before the text after an image. Some of its tokenizers do not
    # after a special token, so there the template writes it.
    after_image = tokenizer(f"{IMAGE}\n", add_special_tokens=False).input_ids[1:]
    alone = tokenizer("\n", add_special_tokens=False).input_ids
    gap = "" if after_image == alone else " "
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    no_bos = "{%- set bos_token = '' -%}" if adds_bos else ""  # not twice
    tokenizer.chat_template = MESSAGES.replace("GAP", gap) + no_bos + own
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
    with named(source, "its chat template"):
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
    special = [i for i in ids if i in tokenizer.added_tokens_decoder]
    return tokenizer, special[-1:]


# ------------------------------------------------------------------------------------------------------------
# Writing

def export(folder, tensors, vision: dict, text: dict, settings: dict, system: str, v1):
    """Write a folder in transformers' format: weights, config.json, tokenizer, and settings around them.

    `tensors`: (our name, tensor). `vision`, `text`: the content of each tower's config.json. `settings`: the
    kind of "projector", "feature_layer", "image_tokens" of an image, "has_class_token", the "tokenizer"'s
    folder or id, the "template"'s name. `system` and `v1`: the strings of template v1.
    """
    if settings["projector"] != "mlp2x_gelu":
        raise ValueError(f"transformers' LLaVA has no projector {settings['projector']!r}, only mlp2x_gelu")
    if vision["model_type"] == "dinov2":
        raise ValueError("a DINOv2 tower is read, not written")
    folder = Path(folder)
    source = resolve(settings["tokenizer"], TOKENIZER_FILES)
    tokenizer, ends = prepare_tokenizer(source, settings["template"], system, v1)
    ends += text["eos_token_id"] if isinstance(text["eos_token_id"], list) else [text["eos_token_id"]]
    # The placeholder needs a row in the embedding table, which is never read. If none is spare, add one.
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    vocab_size = max(text["vocab_size"], image_token_id + 1)
    weights = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = F.pad(tensor, (0, 0, 0, vocab_size - text["vocab_size"]))  # (vocab_size, C)
        weights[their_name(name)] = tensor
    strategy = "default" if settings["has_class_token"] else "full"  # drop the class token, or nothing
    write_weights(weights, folder, {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision, "text_config": text | {"vocab_size": vocab_size},
        "image_token_index": image_token_id, "image_seq_length": settings["image_tokens"],
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": settings["feature_layer"], "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text["tie_word_embeddings"]})
    write_json(folder / "generation_config.json", {
        "bos_token_id": text["bos_token_id"], "eos_token_id": sorted(set(ends)),
        "pad_token_id": tokenizer.pad_token_id})
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": vision["patch_size"],
        "num_additional_image_tokens": int(settings["has_class_token"]),
        "vision_feature_select_strategy": strategy})
    tokenizer.save_pretrained(folder)
