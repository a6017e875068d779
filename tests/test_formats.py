"""What a folder says is what we compute: its flags, its fields and its files, each against transformers; the
parts of every kind of folder; what an export says of itself."""

import base64
import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import test_ids
import torch
import transformers
from conftest import ROOT, assert_close, shaken
from PIL import Image
from safetensors.torch import load_file, save_file
from test_llm import LLAMA3, their_llm
from test_projector import their_llava
from test_vit import FAMILIES as TOWERS
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import eval as evaluation
from llm import LLM, load_llm_config
from plumbing import llava
from projector import VLM
from plumbing.tokenizer import load_tokenizer, open_tokenizer
from vit import ViT, load_vit_config

TEXT = torch.arange(3, 43)[None]
SCALING = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}  # the older form
WITH_IMAGE = torch.tensor([[1] + [89] * 16 + [5, 6, 7]])
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def change(folder, part=None, file="config.json", **fields):
    """Write fields into config.json, or into one of its parts. None drops a field."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    target = content[part] if part else content
    for name, value in fields.items():
        target.pop(name, None)
        if value is not None:
            target[name] = value
    (folder / file).write_text(json.dumps(content))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ---- flags and contents ------------------------------------------------------------------------------------


def theirs_of_llm(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()(TEXT).logits


def theirs_of_llava(folder, ids=TEXT):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model(input_ids=ids, pixel_values=PIXELS if 89 in ids else None).logits


def ours_of_llava(folder, ids=TEXT):
    return VLM.from_pretrained(folder)(ids, PIXELS)


HEADS = {
    "other": lambda w, head, table: None,
    "equal": lambda w, head, table: w.update({head: w[table].clone()}),
    "none": lambda w, head, table: w.pop(head),
    "alone": lambda w, head, table: w.pop(table)}


@pytest.mark.parametrize("head, flag", [
    ("other", True), ("equal", True), ("none", True), ("alone", True), ("other", None), ("alone", None),
    ("none", None)])
def test_a_head_is_what_transformers_makes_of_flag_and_file(tmp_path, head, flag):
    """What it fills with random numbers is refused, and a head of its own where the flag says it is tied."""
    their_llm("llama 2, vicuna").save_pretrained(tmp_path)
    change(tmp_path, tie_word_embeddings=flag)
    change_weights(tmp_path, lambda w: HEADS[head](w, "lm_head.weight", "model.embed_tokens.weight"))
    problem = {("other", True): "must be false", ("alone", None): "missing.*embed_tokens",
               ("none", None): "missing.*lm_head"}.get((head, flag))
    if problem:
        with pytest.raises(ValueError, match=problem):
            LLM.from_pretrained(tmp_path)
    else:
        assert_close(LLM.from_pretrained(tmp_path)(TEXT), theirs_of_llm(tmp_path))


@pytest.mark.parametrize("whole, text", [(True, None), (True, False), (None, True), (False, True)])
def test_a_llava_is_tied_if_either_of_its_configs_says_so(tmp_path, whole, text):
    their_llava(tmp_path)
    change(tmp_path, tie_word_embeddings=whole)
    change(tmp_path, "text_config", tie_word_embeddings=text)
    with pytest.raises(ValueError, match="must be false"):
        VLM.from_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.pop("language_model.lm_head.weight"))
    assert_close(ours_of_llava(tmp_path), theirs_of_llava(tmp_path))


@pytest.mark.parametrize("first, second", [
    ("model.safetensors", "model.safetensors.index.json"),
    ("model.safetensors.index.json", "pytorch_model.bin"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json")])
def test_of_several_forms_of_weights_the_one_that_transformers_takes(tmp_path, first, second):
    their_llm("llama 2, vicuna").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number, file in enumerate((first, second)):
        tensors = {name: (1 + number) * tensor for name, tensor in weights.items()}
        shard = f"shard-{number}.{file.split('.')[1]}" if "index" in file else file
        if "safetensors" in file:
            save_file(tensors, tmp_path / shard, {"format": "pt"})
        else:
            torch.save(tensors, tmp_path / shard)
        if "index" in file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
            (tmp_path / file).write_text(json.dumps(index))
    assert_close(LLM.from_pretrained(tmp_path)(TEXT), theirs_of_llm(tmp_path))


@pytest.mark.parametrize("whole, text, generation", [
    (7, 8, None), (7, None, None), (None, 8, None), (7, 8, 9)])
def test_a_llavas_answers_end_where_transformers_ends_them(tmp_path, whole, text, generation):
    their_llava(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change(tmp_path, eos_token_id=whole)
    change(tmp_path, "text_config", eos_token_id=text)
    if generation:
        change(tmp_path, file="generation_config.json", eos_token_id=generation)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert load_llm_config(tmp_path).eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize("older", [None, 0.1])
@pytest.mark.parametrize("newer", [None, 0.3])
def test_pictures_are_prepared_as_the_file_says_that_transformers_asks_first(tmp_path, older, newer):
    their_llava(tmp_path)
    kind = {"image_processor_type": "CLIPImageProcessor"}
    change(tmp_path, file="preprocessor_config.json", **kind, image_mean=older and [older] * 3)
    change(tmp_path, file="processor_config.json", processor_class="LlavaProcessor",
           image_processor=newer and kind | {"image_mean": [newer] * 3})
    theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    assert load_vit_config(tmp_path).image_mean == tuple(theirs.image_mean)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fields", [
    {"rope_theta": 300.0}, {"rope_scaling": SCALING, "rope_theta": 300.0},
    {"rope_scaling": {"type": "default"}}, {"rope_theta": 300.0, "rope_parameters": LLAMA3},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}])
def test_older_and_newer_names_of_rope_together(tmp_path, fields, own):
    """LLaVA's own form holds an LLM's config.json, mostly with the older names."""
    their_llm("llama 2, vicuna").save_pretrained(tmp_path)
    change(tmp_path, **{"rope_parameters": None} | fields)
    expected = theirs_of_llm(tmp_path)
    if own:
        change(tmp_path, model_type="llava_llama")
    assert_close(LLM.from_pretrained(tmp_path)(TEXT), expected)


# ---- fields that change the computation --------------------------------------------------------------------


def llm_at(name):
    def load(folder):
        return getattr(transformers, name).from_pretrained(folder).eval()(TEXT).logits

    return load, lambda folder: LLM.from_pretrained(folder)(TEXT)


def their_tower(family):
    kind, config, _ = TOWERS[family]
    return shaken(kind(config))


def tower_at(family):
    kind, _, class_token = TOWERS[family]

    def load(folder):
        theirs = kind.from_pretrained(folder).eval()
        return theirs(PIXELS, output_hidden_states=True).hidden_states[-2][:, int(class_token) :]

    return load, lambda folder: ViT.from_pretrained(folder)(PIXELS)


SWEPT = {  # name: (what writes it, (theirs, ours), the parts of config.json)
    "llama": (lambda f: their_llm("llama 2, vicuna").save_pretrained(f), llm_at("LlamaForCausalLM"), [None]),
    "mistral": (lambda f: their_llm("mistral").save_pretrained(f), llm_at("MistralForCausalLM"), [None]),
    "qwen3": (lambda f: their_llm("qwen3").save_pretrained(f), llm_at("Qwen3ForCausalLM"), [None]),
    "qwen2": (lambda f: their_llm("qwen2").save_pretrained(f), llm_at("Qwen2ForCausalLM"), [None]),
    "clip": (lambda f: their_tower("clip").save_pretrained(f), tower_at("clip"), [None]),
    "siglip": (lambda f: their_tower("siglip").save_pretrained(f), tower_at("siglip"), [None]),
    "dinov2": (lambda f: their_tower("dinov2").save_pretrained(f), tower_at("dinov2"), [None]),
    "llava": (their_llava, (lambda f: theirs_of_llava(f, WITH_IMAGE), lambda f: ours_of_llava(f, WITH_IMAGE)),
              [None, "text_config"])}
OF_NO_EFFECT = {"model_type", "architectures", "transformers_version", "dtype", "id2label", "label2id",
                "return_dict", "output_attentions", "output_hidden_states",
                "image_token_index", "image_token_id"}  # with these, other ids would have to be asked


def another(value):
    """Another value of a field of config.json; None if we know no other."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return 2 * value or 1
    return {type(None): 1, str: "relu"}.get(type(value))


@torch.no_grad()
@pytest.mark.parametrize("kind", SWEPT)
def test_every_field_means_what_it_means_in_transformers_or_is_refused(tmp_path, kind):
    """Each field of config.json, one after the other, has another value."""
    write, (theirs, ours), parts = SWEPT[kind]
    write(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    complete = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    opened = 0
    for part in parts:
        fields = complete[part] if part else complete
        for name in sorted({*fields, "attention_bias", "use_sliding_window", "rope_theta"} - OF_NO_EFFECT):
            value = another(fields.get(name))
            if value is None:
                continue
            (tmp_path / "config.json").write_text(saved)
            change(tmp_path, part, **{name: value})
            try:
                found = ours(tmp_path)
            except ValueError:
                continue
            opened += 1
            assert_close(found, theirs(tmp_path))
    assert opened > 5


@pytest.mark.parametrize("field, value", [
    ("do_normalize", False), ("do_rescale", False), ("rescale_factor", 1 / 127.5)])
def test_other_ways_to_prepare_pictures_are_refused_by_name(clip_folder, tmp_path, field, value):
    shutil.copytree(clip_folder, tmp_path / "vit")
    change(tmp_path / "vit", file="preprocessor_config.json", **{field: value})
    with pytest.raises(ValueError, match=f"vit/preprocessor_config.json: {field} is {value}"):
        load_vit_config(tmp_path / "vit")


@pytest.fixture
def original(clip_folder, llama_folder, tmp_path):
    """(our model, its folder in LLaVA's own form)."""
    vlm, folder = VLM.from_towers(clip_folder, llama_folder).eval(), tmp_path / "original"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    tensors = {name: p.detach() for name, p in vlm.llm.named_parameters()}
    for name, p in vlm.projector.named_parameters():
        tensors[f"model.mm_projector.{name}"] = p.detach()
    torch.save(tensors, folder / "pytorch_model.bin")
    change(folder, model_type="llava", image_aspect_ratio="pad", mm_hidden_size=32,
           mm_projector_type="mlp2x_gelu", mm_use_im_patch_token=False, mm_use_im_start_end=False,
           mm_vision_select_feature="patch", mm_vision_select_layer=-2, mm_vision_tower=str(clip_folder),
           tune_mm_mlp_adapter=True, freeze_mm_mlp_adapter=False, use_mm_proj=True, mm_projector_lr=2e-5)
    return vlm, folder


@pytest.mark.parametrize("field, value", [
    ("mm_vision_select_feature", "cls_patch"), ("mm_use_im_start_end", True), ("mm_use_im_patch_token", True),
    ("mm_patch_merge_type", "spatial"), ("image_aspect_ratio", "anyres"), ("image_aspect_ratio", "square"),
    ("unfreeze_mm_vision_tower", True), ("tune_mm_vision_resampler", True), ("s2", True),
    ("mm_resampler_type", "perceiver"), ("mm_what_comes_next", "1"), ("mm_vision_tower", 1)])
def test_of_llavas_own_fields_what_is_not_known_is_refused_by_name(original, field, value):
    vlm, folder = original
    assert torch.equal(VLM.from_pretrained(folder).projector[0].weight, vlm.projector[0].weight)
    change(folder, **{field: value})
    with pytest.raises(ValueError, match=f"original: of LLaVA's own.*config.json: {field} "):
        VLM.from_pretrained(folder)


@pytest.mark.parametrize("opens", [VLM.from_pretrained, LLM.from_pretrained, ViT.from_pretrained])
@pytest.mark.parametrize("kind", ["llava_next", "vipllava", "llava_onevision", "video_llava"])
def test_other_llavas_are_named(tmp_path, kind, opens):
    their_llava(tmp_path)
    change(tmp_path, model_type=kind)
    with pytest.raises(ValueError, match=f"model_type is '{kind}'; known"):
        opens(tmp_path)


def test_another_llm_in_llavas_own_form_is_named(original):
    change(original[1], model_type="llava_qwen")
    with pytest.raises(ValueError, match="model_type is 'qwen'; known"):
        VLM.from_pretrained(original[1])


@pytest.mark.parametrize("opens", [VLM.from_pretrained, LLM.from_pretrained, ViT.from_pretrained])
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_to_be_merged_first(tmp_path, opens, config):
    their_llava(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    if not config:
        (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="a LoRA adapter; merge it first"):
        opens(tmp_path)


# ---- the parts of a folder ---------------------------------------------------------------------------------


def same(ours, theirs):
    expected = dict(theirs.named_parameters())
    return expected.keys() == dict(ours.named_parameters()).keys() and all(
        torch.equal(p, expected[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("kind", ["run", "tuned run", "export", "original", "transformers"])
def test_each_part_of_each_folder_opens_under_the_name_that_describe_gives(original, tmp_path, kind):
    vlm, folder = original
    vlm.template = "v1"
    if "run" in kind:
        folder = tmp_path / "run"
        with torch.no_grad():
            vlm.llm.model.norm.weight.mul_(1.5 if kind == "tuned run" else 1)
        vlm.save(folder, {"template": "v1"}, with_llm=kind == "tuned run")
    elif kind == "export":
        folder = tmp_path / "export"
        vlm.export(folder)
        vlm = VLM.from_pretrained(folder)  # its embeddings have one more row
    elif kind == "transformers":
        their_llava(tmp_path / "theirs")
        folder, vlm = tmp_path / "theirs", VLM.from_pretrained(tmp_path / "theirs")
    found = llava.describe(folder)
    assert same(ViT.from_pretrained(found["vit"], found["feature_layer"]), vlm.vit)
    assert same(LLM.from_pretrained(found["llm"]), vlm.llm)
    fresh = VLM.from_towers(found["vit"], found["llm"], found["projector"], found["feature_layer"])
    assert not same(fresh.projector, vlm.projector)
    assert len(fresh.load_projector(folder)) == 4 and same(fresh.projector, vlm.projector)
    template = None if kind == "transformers" else "v1"
    assert found["template"] == VLM.from_pretrained(folder).template == template
    if kind != "run":  # such a folder is a name of its LLM, too
        assert same(LLM.from_pretrained(folder), vlm.llm)


def test_a_whole_models_projector_comes_before_an_mm_projector_beside_it(original):
    """LLaVA leaves there what its first stage made."""
    vlm, folder = original
    older = {f"model.mm_projector.{name}": p * 2 for name, p in vlm.projector.state_dict().items()}
    torch.save(older, folder / "mm_projector.bin")
    again = VLM.from_pretrained(folder)
    assert same(again.projector, vlm.projector)
    again.load_projector(folder / "mm_projector.bin")
    assert torch.equal(again.projector[0].weight, 2 * vlm.projector[0].weight)
    again.load_projector(folder)
    assert same(again.projector, vlm.projector)


def test_what_llavas_own_code_trained_opens(original):
    """It saves the frozen tower, too (a tuned one is refused by its `unfreeze_mm_vision_tower`)."""
    vlm, folder = original
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(32)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_close(VLM.from_pretrained(folder).llm.head_weight, vlm.llm.head_weight)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_says(original, tmp_path, umask, mode):
    """Also if the LLM's own files are for their owner alone."""
    vlm, folder = original
    for file in folder.iterdir():
        file.chmod(0o600)
    vlm.sources["llm"] = str(folder)
    before = os.umask(umask)
    try:
        vlm.save(tmp_path / "written/run", {}, with_llm=True)
        vlm.export(tmp_path / "written/export")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "written").rglob("*") if file.is_file()]
    assert len(files) > 10 and {file.stat().st_mode & 0o777 for file in files} == {mode}


# ---- what an export says of itself -------------------------------------------------------------------------

QUESTIONS = ("What color is it?", "Is it a red circle in the northwest, or a blue square?", "Where?",
             "What shape is it, and is it large?")


@pytest.fixture
def served(clip_folder, llama_folder, tmp_path):
    """(the folder of an export, pictures)."""
    VLM.from_towers(clip_folder, llama_folder).export(tmp_path / "out")
    pictures = []
    for number, color in enumerate(("red", "green", "blue", "white")):
        pictures.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (40, 40), color).save(pictures[-1])
    return tmp_path / "out", pictures


def test_a_batch_in_transformers_answers_as_each_question_alone(served):
    folder, pictures = served
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    images = [Image.open(picture) for picture in pictures]

    def answers(prompts, images):
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)

    alone = [answers([prompt], [image])[0] for prompt, image in zip(prompts, images)]
    assert answers(prompts, images) == alone and len({len(prompt) for prompt in prompts}) == 4


def test_a_batch_in_a_pipeline_answers_as_each_question_alone(served):
    folder, pictures = served
    pipeline = transformers.pipeline("image-text-to-text", model=str(folder))
    chats = []
    for picture, question in zip(pictures, QUESTIONS):
        content = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    how = {"max_new_tokens": 8, "return_full_text": False}
    together = [answer[0]["generated_text"] for answer in pipeline(text=chats, batch_size=4, **how)]
    assert together == [pipeline(text=chat, **how)[0]["generated_text"] for chat in chats]


def test_the_readmes_lines_of_python_answer(served, tmp_path, monkeypatch, capsys):
    folder, pictures = served
    folder.rename(tmp_path / "served")
    Path(pictures[0]).rename(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "plumbing/README.md").read_text()
    _, code = text.split("harmless:\n\n")
    exec(textwrap.dedent(code.split("\n\nAny server")[0]), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("form", ["path", "image", "data URL", "base64"])
def test_a_chat_with_the_tiny_towers_in_a_pipeline_is_as_eval_has_it(served, tmp_path, form):
    """The picture comes in each form that transformers takes. It is no square, and there are three turns."""
    vlm = VLM.from_towers(ROOT / "lab/towers/tiny-vit", ROOT / "lab/towers/tiny-llm")
    vlm.export(tmp_path / "tiny")
    picture = str(tmp_path / "wide.png")
    Image.effect_noise((96, 48), 80).convert("RGB").save(picture)
    coded = base64.b64encode(Path(picture).read_bytes()).decode()
    part = {"path": {"url": picture}, "image": {"image": Image.open(picture)}, "base64": {"base64": coded},
            "data URL": {"url": f"data:image/png;base64,{coded}"}}[form]
    pipeline = transformers.pipeline("image-text-to-text", model=str(tmp_path / "tiny"))
    tokenizer, messages, before = load_tokenizer(vlm.sources["llm"]), [], []
    for text in QUESTIONS[:3]:
        content = [{"type": "text", "text": text}]
        prompt = text
        if not before:
            content.insert(0, {"type": "image", **part})
            prompt = f"<image>\n{text}"
        messages.append({"role": "user", "content": content})
        said = pipeline(text=messages, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
        question = {"id": text, "prompt": prompt, "image": picture, "before": before}
        answer, = evaluation.ask(vlm, tokenizer, [question], "v1", 12)
        assert said.strip() == answer != ""
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        before = [*before, ("human", prompt), ("gpt", answer)]


def test_an_answer_of_an_export_is_not_cut_at_twenty_tokens(clip_folder, llama_folder, tmp_path):
    vlm = VLM.from_towers(clip_folder, llama_folder)
    vlm.llm.config.eos_token_id = 0
    vlm.export(tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = None  # never ends
    assert model.generate(TEXT).shape[1] - TEXT.shape[1] == 256 // 2  # half is for the question


def test_an_export_pads_and_names_its_tokenizer_as_every_transformers_does(
        clip_folder, llama_folder, tmp_path):
    """Also of a tokenizer without padding, with special tokens of its own, and of several templates, of which
    the default is taken."""
    llm = Path(shutil.copytree(llama_folder, tmp_path / "llm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["red"]})
    tokenizer.save_pretrained(llm)
    file = llm / "tokenizer_config.json"
    written = json.loads(file.read_text()) | {"pad_token": None}
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}"}]
    file.write_text(json.dumps(written | {"chat_template": several}))
    vlm = VLM.from_towers(clip_folder, llm)
    assert load_tokenizer(llm).chat_template.keys() == {"default", "tool_use"}
    vlm.export(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor.tokenizer(["What?", "What is it?"], padding=True)
    assert batch.attention_mask[0][0] == 0 and CHATML in processor.tokenizer.chat_template
    found = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in found
    assert found["model_input_names"] == ["input_ids", "attention_mask"]  # else 4 has one that no LLaVA takes
    assert "red" in found["additional_special_tokens"] and "red" in processor.tokenizer.all_special_tokens


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_splits_as_its_file_says(llama_folder, tmp_path, kind):
    """SmolLM2's layout, DeepSeek's and Qwen's, also exported. AutoTokenizer 5 makes such classes anew: two
    newlines are no longer one token, or spaces are lost."""
    folder = as_tokenizer(test_ids.llama3(), llama_folder, tmp_path, tokenizer_class=kind)
    text = "Steps:\n\n1. What is it?\n\n2. red square  12.<|eot_id|>What"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    assert load_tokenizer(folder)(text).input_ids == expected.ids
    exported, *_ = llava.prepare_tokenizer(folder, "chat", "", data.v1)
    assert exported(text).input_ids == expected.ids and exported.eos_token == "<|eot_id|>"


def test_smollm2s_digits_are_tokens_of_their_own(llama_folder, tmp_path):
    vocabulary = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [("1", "2")]))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    folder = as_tokenizer(made, llama_folder, tmp_path, tokenizer_class="GPT2Tokenizer")
    assert load_tokenizer(folder).tokenize("12") == ["1", "2"]


@pytest.mark.parametrize("model_type", ["llama", "llava"])
@pytest.mark.parametrize("kind, legacy, behind", [
    ("LlamaTokenizer", False, "USER"), ("LlamaTokenizer", True, "▁US ER"),
    ("LlamaTokenizer", None, "▁US ER"), ("PreTrainedTokenizerFast", False, "▁US ER")])
def test_whether_a_space_stands_behind_an_end_is_told_by_legacy(
        llama_folder, tmp_path, model_type, kind, legacy, behind):
    """Llama 2's tokenizer.json always puts it there. What kind of model stands beside it says nothing."""
    llama2 = test_ids.llama2("legacy")
    folder = as_tokenizer(llama2, llama_folder, tmp_path, tokenizer_class=kind, legacy=legacy)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = open_tokenizer(folder)
    ids = tokenizer("</s>USER").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "</s>", *behind.split()]


def as_tokenizer(made, llama_folder, tmp_path, **told) -> Path:
    """A copy of the LLM's folder with another tokenizer, whose tokenizer_config.json says this, too."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "llm"))
    made.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    return folder


CHATML = ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|> {% endif %}")


@pytest.mark.parametrize("own, tuned, said", [
    (None, None, "v1"), (None, "v1", "v1"), (CHATML, "v1", "v1"), (CHATML, "chat", "chat"),
    (CHATML, "plain", "chat"), (None, "plain", "v1")])
def test_an_export_says_its_template_and_asks_as_before(
        clip_folder, llama_folder, tmp_path, own, tuned, said):
    """The ids of a question are those of before, also of an export of the export."""
    llm = Path(shutil.copytree(llama_folder, tmp_path / "llm"))
    if own:
        (llm / "chat_template.jinja").write_text(own)
    vlm = VLM.from_towers(clip_folder, llm)
    vlm.template = tuned
    turns = [("human", "<image>\nWhat color is it?")]
    expected = None
    for number in range(2):
        vlm.export(tmp_path / str(number))
        before = load_tokenizer(vlm.sources["llm"])
        vlm = VLM.from_pretrained(tmp_path / str(number))
        assert vlm.template == said
        for tokenizer in (before, load_tokenizer(vlm.sources["llm"])):
            ids, _ = data.encode(turns, data.form_of(said, tokenizer), tokenizer, True)
            expected = expected or ids
            assert ids == expected
