"""Whole models on disk: run directories, transformers' LLaVA format, LLaVA's own checkpoints.

                           config.json                           the folder's weights      the vision tower
    run directory          names both towers                     projector, tuned LLM      elsewhere
    transformers' format   wraps those of both towers            all                       here
    LLaVA's own            the LLM's, with `mm_` fields          LLM and projector         elsewhere

`describe` reads all three, VLM.save writes the first, `export` the second. It gives a dict: "vit" and "llm"
(names that ViT.from_pretrained and LLM.from_pretrained open: maybe the folder's own), "projector" (its kind),
"feature_layer", "template" (or None), and what only transformers' format knows: "image_token_id".
"""

import json
import re
from pathlib import Path

import torch

from plumbing import clip
from plumbing.chat_template import DATE, begun_thoughts
from plumbing.files import named, read_json, resolve_model, write_json
from plumbing.tokenizer import bos_ids, give_padding, open_tokenizer, tokenizer_folder
from plumbing.weights import (files_of, is_llavas_own, open_config, read_config, read_shard, read_weights,
                              refuse_others, write_weights)

IMAGE = "<image>"  # in transformers' format the placeholder is a token of the tokenizer


# ------------------------------------------------------------------------------------------------------------
# Names of tensors. clip.py and llama.py know those of the towers, alone and within a LLaVA.

OURS_AND_THEIRS = (  # in the older form, which every version of transformers reads
    ("vit.", "vision_tower.vision_model."), ("llm.", "language_model."),
    ("projector.0.", "multi_modal_projector.linear_1."), ("projector.2.", "multi_modal_projector.linear_2."))
PROJECTOR = re.compile(r".*(mm_projector|multi_modal_projector)\.")


def their_name(name: str) -> str:
    """The name of one of our tensors in transformers' format."""
    for ours, theirs in OURS_AND_THEIRS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def find_projector(path) -> Path:
    """Where a projector is: `path`, a file or a folder with a whole model, or a file in that folder, LLaVA's
    mm_projector.bin or our projector.safetensors."""
    path = Path(path) if Path(path).is_file() else resolve_model(path)
    if path.is_file() or files_of(path):
        return path
    if (path / "mm_projector.bin").exists():
        return path / "mm_projector.bin"
    return path / "projector.safetensors"


def read_projector(place: Path):
    """Yield (our name within the projector, tensor) of what `find_projector` has found."""
    for name, tensor in read_shard(place) if place.is_file() else read_weights(place, PROJECTOR.match):
        name = PROJECTOR.sub("", name)
        yield name.replace("linear_1.", "0.").replace("linear_2.", "2."), tensor


# ------------------------------------------------------------------------------------------------------------
# Reading

KNOWN = {  # fields of transformers' format that change what is computed: the values that we compute
    "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)}
KNOWN_OF_LLAVAS_OWN = {  # of LLaVA's own form. Another `mm_` field that is set is refused, too.
    "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat",), "image_aspect_ratio": ("pad",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,), "unfreeze_mm_vision_tower": (False,),
    "tune_mm_vision_resampler": (False,), "use_mm_proj": (True,), "s2": (False,)}
ANY_VALUE = {"mm_vision_tower", "mm_vision_select_layer", "mm_projector_type", "mm_hidden_size",
             "mm_projector_lr"}  # read by us, told by the tensors, or of no effect


def describe(name) -> dict:
    """What lies in a folder, or under a Hub id: see above."""
    folder = resolve_model(name)
    config = open_config(folder)
    family = config.get("model_type")
    if family is None:
        return read_run(folder, config)
    if is_llavas_own(family, config):
        return read_original(folder, config, str(name))
    return read_llava(folder, str(name))


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
    return found


def read_llava(folder: Path, name: str) -> dict:
    """transformers' format. ValueError if it asks for what we do not compute."""
    config = read_config(folder, ("llava",))
    has_class_token = config["vision_config"]["model_type"] != "siglip_vision_model"
    drops = "default" if has_class_token else "full"  # the first token, or none
    refuse_others(config, KNOWN | {"vision_feature_select_strategy": (drops,)}, folder)
    if not isinstance(config["vision_feature_layer"], int):
        raise ValueError(f"{folder}: vision_feature_layer is no single layer")
    return {"vit": name, "llm": name, "projector": "mlp2x_gelu",
            "feature_layer": config["vision_feature_layer"], "template": config.get("template"),
            "image_token_id": config.get("image_token_index") or config["image_token_id"]}


def read_original(folder: Path, config: dict, name: str) -> dict:
    """LLaVA's own form. ValueError for what version 1.5 does not have: tiles, marks around an image, a tuned
    vision tower."""
    known = dict(KNOWN_OF_LLAVAS_OWN)
    for field in config:
        if field.startswith("mm_") and field not in ANY_VALUE:
            known.setdefault(field, (None, False))
    with named(folder, "of LLaVA's own checkpoints only those like version 1.5's are supported"):
        refuse_others(config, known, "config.json")
        if not isinstance(config.get("mm_vision_tower"), str):
            raise ValueError("config.json: mm_vision_tower names no vision tower")
        if not isinstance(config.get("mm_vision_select_layer"), int):
            raise ValueError("config.json: mm_vision_select_layer is no number")
    return {"vit": config["mm_vision_tower"], "llm": name,
            "projector": config.get("mm_projector_type", "linear"),
            "feature_layer": config["mm_vision_select_layer"], "template": "v1"}


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
{%- set messages = flat.messages -%}{%- set enable_thinking = enable_thinking | default(false) -%}"""
CUT = ("{{%- set rendered %}}{own}{{% endset -%}}"
       "{{{{- rendered.removeprefix({bos}).removesuffix({begun}) -}}}}")
FOR_DATE = re.compile(r"strftime_now\((['\"])(.*?)\1\)")
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


def prepare_tokenizer(source: Path, template: str, system: str, v1) -> tuple:
    """(the LLM's tokenizer with the placeholder and an export's chat template, that template's name, a list:
    the special token that it puts after an answer, if there is one)."""
    # In a batch of prompts, padding comes before them: an answer behind padding would be nonsense.
    with named(source, "its tokenizer"):
        tokenizer = open_tokenizer(source, padding_side="left")
    tokenizer.add_tokens(IMAGE, special_tokens=True)
    give_padding(tokenizer)
    own = tokenizer.chat_template and tokenizer.get_chat_template()  # of several, the default
    own = own and FOR_DATE.sub(lambda match: repr(DATE.strftime(match[2])), own)
    if template not in (None, "plain", "v1", "chat"):
        raise ValueError(f"a model tuned with template {template!r}: transformers would ask in another form")
    template = "v1" if template == "v1" or not own else "chat"
    if template == "v1":
        own = as_jinja(system, v1(tokenizer))
    # SentencePiece puts a space of its own before the text after an image. Some of its tokenizers do not
    # after a special token, so there the template writes it.
    after_image = tokenizer(f"{IMAGE}\n", add_special_tokens=False).input_ids[1:]
    alone = tokenizer("\n", add_special_tokens=False).input_ids
    gap = "" if after_image == alone else " "
    if template == "chat":  # as data.chat has it: without the BOS that the tokenizer writes
        bos = tokenizer.bos_token if bos_ids(tokenizer) else ""
        with named(source, "its chat template"):
            begun = begun_thoughts(tokenizer)
        own = CUT.format(own=own.removesuffix("\n"), bos=json.dumps(bos), begun=json.dumps(begun))
    tokenizer.chat_template = MESSAGES.replace("GAP", gap) + own
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
    with named(source, "its chat template"):
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
    special = [i for i in ids if i in tokenizer.added_tokens_decoder]
    return tokenizer, template, special[-1:]


# ------------------------------------------------------------------------------------------------------------
# Writing

def why_not_exported(projector: str) -> str:
    """Why a model with this projector has no place in transformers' format, or "". Every tower has one."""
    if projector != "mlp2x_gelu":
        return f"transformers' LLaVA has no projector {projector!r}, only mlp2x_gelu"
    return ""


def export(folder, tensors, vision: dict, text: dict, settings: dict, system: str, v1):
    """Write a folder in transformers' format: weights, config.json, tokenizer, and settings around them.

    `tensors`: (our name, tensor). `vision`, `text`: the content of each tower's config.json. `settings`: the
    kind of "projector", "feature_layer", "image_tokens" of an image, "has_class_token", the "tokenizer"'s
    folder or id, the "template"'s name. `system` and `v1`: the strings of template v1.
    """
    problem = why_not_exported(settings["projector"])
    if problem:
        raise ValueError(problem)
    folder = Path(folder)
    source = tokenizer_folder(settings["tokenizer"])
    tokenizer, template, ends = prepare_tokenizer(source, settings["template"], system, v1)
    ends += text["eos_token_id"] if isinstance(text["eos_token_id"], list) else [text["eos_token_id"]]
    # The placeholder needs a row in the embedding table, which is never read. If none is spare, add one. The
    # head's is the mean of all: the mean logit is never the largest, as that of zeros, 0, might be.
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    vocab_size = max(text["vocab_size"], image_token_id + 1, tokenizer.pad_token_id + 1)
    weights = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)  # (1, C)
            more = mean.expand(vocab_size - text["vocab_size"], -1)
            tensor = torch.cat([tensor, more])  # (vocab_size, C)
        if name.startswith("vit.") and vision["model_type"] == "dinov2":
            name, tensor = clip.name_in_dinov2(name.replace("vit.", "vision_tower."), tensor)
        weights[their_name(name)] = tensor
    strategy = "default" if settings["has_class_token"] else "full"  # drop the class token, or nothing
    write_weights(weights, folder, {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision, "text_config": text | {"vocab_size": vocab_size},
        "image_token_index": image_token_id, "image_seq_length": settings["image_tokens"],
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": settings["feature_layer"], "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text["tie_word_embeddings"], "template": template})
    write_json(folder / "generation_config.json", {
        "bos_token_id": text["bos_token_id"], "eos_token_id": sorted(set(ends)),
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": min(512, text["max_position_embeddings"] // 2)})  # transformers would stop at 20
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": vision["patch_size"],
        "num_additional_image_tokens": int(settings["has_class_token"]),
        "vision_feature_select_strategy": strategy})
    tokenizer.save_pretrained(folder)
    write_older_names(folder / "tokenizer_config.json")


def write_older_names(file: Path):
    """Rewrite a tokenizer_config.json of transformers 5 so that 4 opens it, too."""
    written = read_json(file)
    if written["tokenizer_class"] == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        written.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 has one more
    if isinstance(written.get("extra_special_tokens"), list):  # 4 wants names with them
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    write_json(file, written)
