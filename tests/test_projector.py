"""Projectors, splicing images into sequences, the run directory, transformers' LLaVA format in both ways."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_close, first_wrong, grades, layer_by_layer, llama_config, refusal, shaken
from PIL import Image
from torch import nn

import data
from data import IMAGE_MARKER
from lab import toy_world
from plumbing import clip, llama, llava
from plumbing.llava import PROJECTOR, their_name, why_not_exported
from plumbing.tokenizer import load_tokenizer
from projector import VLM, build_projector
from vit import ViT


@pytest.fixture
def vlm(clip_folder, llama_folder):
    return VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu").eval()


def row(before, images, after, length=60):
    """Ids: so many of text, 16 placeholders for each image, so many of text, padding up to `length`."""
    ids = [1] * before + [IMAGE_MARKER] * 16 * images + [5] * after
    return ids + [0] * (length - len(ids))


# ---- projectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, names", [
    ("linear", ["weight", "bias"]), ("mlp1x_gelu", ["0.weight", "0.bias"]),
    ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"])])
def test_linear_layers_have_llavas_names_and_exact_gelus_between_them(kind, names):
    """From width 8 to width 12, and then 12 to 12; a token for each of the 16 patches."""
    projector = build_projector(kind, 16, 8, 12)
    assert list(projector.state_dict()) == names
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(12, 8), (12,)] + [(12, 12), (12,)] * (len(names) // 2 - 1)
    between = [part for part in projector.children() if not isinstance(part, nn.Linear)]
    assert len(between) == len(names) // 2 - 1
    assert all(isinstance(part, nn.GELU) and part.approximate == "none" for part in between)
    assert projector(torch.randn(2, 16, 8)).shape == (2, 16, 12) and projector.num_tokens == 16


@pytest.mark.parametrize("kind", ["pixel_shuffle", "resampler"])
def test_others_make_a_token_of_four_patches(kind):
    projector = build_projector(kind, 16, 8, 12)
    assert projector(torch.randn(2, 16, 8)).shape == (2, 4, 12) and projector.num_tokens == 4


@pytest.mark.parametrize("kind, patches, message", [
    ("mlpx_gelu", 16, "'mlpx_gelu' is none of linear"), ("pixel_shuffle", 9, "3 in a row cannot be halved")])
def test_what_cannot_be_built_is_refused(kind, patches, message):
    with pytest.raises(ValueError, match=message):
        build_projector(kind, patches, 8, 12)


def test_pixel_shuffle_joins_neighbours():
    x, projector = torch.randn(1, 16, 8), build_projector("pixel_shuffle", 16, 8, 12)
    grid = x.view(4, 4, 8)
    corner = torch.cat([grid[2, 0], grid[2, 1], grid[3, 0], grid[3, 1]])  # the lower left square
    assert torch.allclose(projector(x)[0, 2], projector.mlp(corner), atol=1e-6)


def test_resampler_is_attention_over_a_set():
    x, projector = torch.randn(2, 16, 8), build_projector("resampler", 16, 8, 12)
    assert torch.allclose(projector(x), projector(x[:, torch.randperm(16)]), atol=1e-6)
    reference = nn.MultiheadAttention(12, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight[:12] = torch.eye(12)
        reference.in_proj_weight[12:24] = torch.eye(12)
        reference.in_proj_weight[24:] = torch.eye(12)
        reference.out_proj.weight.copy_(projector.out.weight)
        reference.out_proj.bias.copy_(projector.out.bias)
    normed = projector.norm(x)
    queries = projector.queries.expand(2, -1, -1)
    expected, _ = reference(queries, projector.key(normed), projector.value(normed))
    assert torch.allclose(projector(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "resampler"])
def test_fewer_tokens_than_patches(clip_folder, llama_folder, tmp_path, kind):
    """The model says how many placeholders an image takes, and a run directory brings the projector back."""
    vlm = VLM.from_towers(clip_folder, llama_folder, kind).eval()
    assert vlm.num_image_tokens == 4 and vlm.vit.num_patches == 16
    ids, pixels = torch.tensor([[1] + [IMAGE_MARKER] * 4 + [5, 6]]), torch.randn(1, 3, 32, 32)
    logits = vlm(ids, pixels)
    vlm.save(tmp_path / "run", {}, with_llm=False)
    assert torch.equal(VLM.from_pretrained(tmp_path / "run")(ids, pixels), logits)


# ---- the model ---------------------------------------------------------------------------------------------


@grades("splice")
def test_splice_equals_a_plain_loop(vlm):
    ids = torch.tensor([row(2, 1, 3), row(5, 0, 9), row(1, 1, 1), row(1, 2, 0)])
    patches = torch.randn(4, 16, 32)
    expected, image = vlm.llm.embed(ids.clamp(min=0)).clone(), 0
    for b in range(4):
        for s in range(60):
            if ids[b, s] == IMAGE_MARKER:
                expected[b, s] = patches[image // 16, image % 16]
                image += 1
    spliced = vlm.splice(ids, patches)
    assert spliced.shape == expected.shape, f"{tuple(spliced.shape)} is not (B, S, C) of the whole batch"
    assert torch.equal(spliced, expected), (
        "patches are not where their placeholders are, in reading order: row by row, image by image, patch "
        "by patch; or another token has lost its embedding")
    rounded = vlm.splice(ids, patches.bfloat16())
    assert torch.equal(rounded, vlm.splice(ids, patches.bfloat16().float())), (
        "patches of another dtype are to become embeddings of the LLM's")


@grades("splice")
def test_splice_with_known_places_equals_splice(vlm):
    """Of two images, and of a batch of text."""
    two, text = torch.tensor([row(2, 1, 3), row(5, 0, 9), row(1, 1, 1)]), torch.tensor([row(5, 0, 9)])
    for ids, patches in ((two, torch.randn(2, 16, 32)), (text, torch.randn(1, 16, 32))):
        image_at = (ids == IMAGE_MARKER).flatten().nonzero()[:, 0]
        assert torch.equal(vlm.splice(ids, patches, image_at), vlm.splice(ids, patches)), (
            "with `image_at` given it is another answer than with the places found")


@grades("splice")
def test_splice_refuses_wrong_counts(vlm):
    """A row with a part of an image, other images than placeholders, and these with known places."""
    ids = torch.tensor([row(2, 1, 3), row(2, 1, 3)[:17] + [0] * 43])
    said = refusal(vlm.splice, ids, torch.randn(2, 16, 32))
    assert "16, 15" in said, "a row with a part of an image is not refused"
    ids = torch.tensor([row(2, 1, 3), row(2, 1, 3)])
    for image_at in (None, (ids == IMAGE_MARKER).flatten().nonzero()[:, 0]):
        said = refusal(vlm.splice, ids, torch.randn(3, 16, 32), image_at)
        assert "32 placeholders; 3 images of 16 tokens" in said, "images without placeholders are not refused"
    said = refusal(vlm.splice, torch.tensor([row(2, 0, 3)]), torch.randn(2, 16, 32))
    assert "0 placeholders; 2 images of 16 tokens" in said, "two images without places are not refused"


@grades("splice")
def test_text_only_batch_gives_the_projector_a_zero_gradient(vlm):
    """Not None: a rank whose batch has no image must still take part in the sums."""
    vlm.llm.requires_grad_()
    embeds = vlm.splice(torch.tensor([row(4, 0, 4)]), vlm.encode(torch.zeros(1, 3, 32, 32)))
    embeds.square().sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in vlm.projector.parameters()), (
        "a batch of text leaves the projector no gradient of zero: its patches must be in the graph though "
        "none of them is used, or the other ranks would wait for this one")
    learned = vlm.llm.model.embed_tokens.weight.grad
    assert learned is not None and learned.any(), "the words' embeddings get no gradient: the LLM learns, too"


def test_encode_gives_the_frozen_vit_no_gradient(vlm):
    vlm.encode(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in vlm.vit.parameters())
    assert all(p.grad is not None for p in vlm.projector.parameters())


def test_batched_generation_equals_each_prompt_alone(vlm):
    """Two with an image each, and one with none: alone, it comes with no pixels at all."""
    pixels = torch.randn(2, 3, 32, 32)
    prompts = [row(2, 1, 3, length=21), row(1, 1, 9, length=26), row(4, 0, 3, length=7)]
    images = [pixels[:1], pixels[1:], pixels[:0]]
    alone = [vlm.generate(torch.tensor([p]), x, max_new_tokens=8) for p, x in zip(prompts, images)]
    ids = torch.tensor([[0] * (26 - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (26 - len(p)) + [True] * len(p) for p in prompts])
    batch = vlm.generate(ids, pixels, max_new_tokens=8, mask=mask)
    for together, single in zip(batch, alone):
        assert [t for t in together.tolist() if t >= 0] == [t for t in single[0].tolist() if t >= 0]


@pytest.mark.parametrize("with_llm", [False, True])
def test_run_directory_round_trip(vlm, tmp_path, with_llm):
    if with_llm:
        with torch.no_grad():
            vlm.llm.model.norm.weight.mul_(1.5)
    (folder := tmp_path / "tokenizer").mkdir()  # as transformers writes it, with its template in a file
    for file in Path(vlm.sources["llm"]).iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text("a template")
    vlm.sources["llm"], tmp_path = str(folder), tmp_path / "run"
    vlm.save(tmp_path, {"stage": "align", "template": "chat"}, with_llm)
    again = VLM.from_pretrained(tmp_path)
    ids, pixels = torch.tensor([row(2, 1, 3)]), torch.randn(1, 3, 32, 32)
    assert torch.equal(again(ids, pixels), vlm(ids, pixels))
    assert again.template == "chat"
    assert (tmp_path / "llm" / "tokenizer.json").exists() == with_llm
    assert (load_tokenizer(again.sources["llm"]).chat_template) == "a template"
    assert not with_llm or again.sources["llm"] == str(tmp_path / "llm")


def test_bad_run_directories(vlm, tmp_path, clip_folder, llama_folder):
    with pytest.raises(ValueError, match="model_type is 'llama'; known here: llava"):
        VLM.from_pretrained(llama_folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: vit is None; a run directory has a name there"):
        VLM.from_pretrained(tmp_path)
    vlm.save(tmp_path, {"stage": "instruct"}, with_llm=False)
    with pytest.raises(FileNotFoundError, match="this run tuned the LLM and has lost it"):
        VLM.from_pretrained(tmp_path)
    vlm.save(tmp_path, {}, with_llm=False)
    VLM.from_towers(clip_folder, llama_folder, "linear").save(tmp_path / "other", {}, with_llm=False)
    shutil.copy(tmp_path / "other/projector.safetensors", tmp_path)
    with pytest.raises(ValueError, match="'(bias|weight)' has no place in Sequential"):
        VLM.from_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="projector.safetensors"):
        VLM.from_pretrained(tmp_path)


# ---- transformers' LLaVA format ----------------------------------------------------------------------------


SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
TOWERS = {  # transformers' configs; SigLIP's with its pooling head, which nobody reads
    "clip": transformers.CLIPVisionConfig(**SIZES, intermediate_size=64),
    "siglip": transformers.SiglipVisionConfig(**SIZES, intermediate_size=64),
    "dinov2": transformers.Dinov2Config(**SIZES, mlp_ratio=2)}


def their_llava(folder, vision="clip", **text):
    """A tiny random LlavaForConditionalGeneration, saved to `folder`; the image is token 89."""
    config = transformers.LlavaConfig(
        vision_config=TOWERS[vision],
        text_config=llama_config(vocab_size=90, **text), image_token_index=89, image_seq_length=16,
        vision_feature_select_strategy="full" if vision == "siglip" else "default")
    model = shaken(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def our_name(name):
    """Within the VLM, of a tensor in transformers' format, older or newer."""
    if PROJECTOR.match(name):
        return "projector." + PROJECTOR.sub("", name).replace("linear_1.", "0.").replace("linear_2.", "2.")
    part, of_tower = ("vit.", clip.our_name) if "vision_tower." in name else ("llm.", llama.our_name)
    return part + of_tower(name) if of_tower(name) else ""


def our_compared_name(name):
    """Without the embedding table: where the patches come to stand, each side looks up a row of its own."""
    return "" if "embed_tokens" in name else our_name(name)


@pytest.mark.parametrize("vision", TOWERS)
def test_a_llava_folder_loads_with_equal_logits(tmp_path, vision):
    """Text only, one image, and a batch of both lengths."""
    theirs = their_llava(tmp_path, vision)
    ours = VLM.from_pretrained(tmp_path)
    assert ours.image_token_id == 89 and ours.num_image_tokens == 16
    image = [89] * 16
    batches = ([[1, 4, 5]], 0), ([[1, *image, 4, 5]], 1), ([[1, *image, 4, 5], [1, 7, *image, 8]], 2)
    for rows, images in batches:
        ids, pixels = torch.tensor(rows), torch.randn(max(1, images), 3, 32, 32)
        with layer_by_layer(ours, theirs, our_compared_name):
            expected = theirs(input_ids=ids, pixel_values=pixels if images else None).logits
            assert_close(ours(ids, pixels), expected)


@pytest.mark.parametrize("broken", ["vit.encoder.layers.0.mlp.fc2", "projector.2", "llm.model.norm"])
def test_where_parity_fails_a_table_names_the_first_wrong_layer(tmp_path, broken):
    """Across vision tower, projector and LLM, whose names differ."""
    theirs = their_llava(tmp_path)
    ours, ids = VLM.from_pretrained(tmp_path), torch.tensor([[1] + [89] * 16])
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours.get_submodule(broken).weight *= 1.5
    with pytest.raises(AssertionError) as error, layer_by_layer(ours, theirs, our_compared_name):
        assert_close(ours(ids, pixels), theirs(input_ids=ids, pixel_values=pixels).logits)
    assert first_wrong(error) == broken
    assert all(f"\n{name} " in str(error.value) for name in ("projector.0", "llm.model.norm", "the whole"))


@pytest.mark.parametrize("older, newer, ours", [
    ("language_model.model.norm.weight", "model.language_model.norm.weight", "llm.model.norm.weight"),
    ("language_model.lm_head.weight", "lm_head.weight", "llm.lm_head.weight"),
    ("vision_tower.vision_model.x", "model.vision_tower.x", "vit.x"),
    ("multi_modal_projector.linear_2.bias", "model.multi_modal_projector.linear_2.bias", "projector.2.bias")])
def test_newer_and_older_names_of_the_llava_format(older, newer, ours):
    assert our_name(older) == our_name(newer) == ours and their_name(ours) == older


def llm_of_family(family, folder):
    """A random LLM on disk, with the toy world's tokenizer."""
    sizes = dict(vocab_size=toy_world.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=2)
    toy_world.write_tokenizer(folder)
    if family == "qwen2":
        shaken(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))).save_pretrained(folder)
    else:
        config = llama_config(**sizes, tie_word_embeddings=family == "tied")
        shaken(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("clip", "llama", -2), ("clip", "tied", -2), ("clip", "qwen2", -2),
                                        ("siglip", "llama", -2), ("dinov2", "llama", -1)],
                ids=lambda param: f"{param[0]}-{param[1]}")
def exported(request, clip_folder, tmp_path_factory):
    """(our model, transformers' model of the folder that it was exported to, that folder)."""
    torch.manual_seed(1)
    vision, family, layer = request.param
    folder = tmp_path_factory.mktemp("exported")
    llm = llm_of_family(family, folder / "llm")
    vit = clip_folder
    if vision != "clip":
        vit = folder / "vit"
        shaken(transformers.AutoModel.from_config(TOWERS[vision])).save_pretrained(vit)
    vlm = VLM.from_towers(vit, llm, "mlp2x_gelu", layer).eval()
    vlm.export(folder / "out")
    theirs, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "out", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    return vlm, theirs.eval(), folder / "out"


WITH_IMAGE = torch.tensor([[1] + [IMAGE_MARKER] * 16 + [5, 6, 7]])


def in_their_ids(ids, theirs):
    """Their placeholder is a token of the vocabulary."""
    return ids.masked_fill(ids == IMAGE_MARKER, theirs.config.image_token_index)


def test_the_exported_placeholder_is_a_token_of_its_own_behind_the_vocabulary(exported):
    _, theirs, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    assert placeholder == theirs.config.image_token_index == toy_world.VOCABULARY
    assert theirs.config.text_config.vocab_size == toy_world.VOCABULARY + 1


def test_what_we_export_has_equal_logits_in_transformers(exported):
    """With an image, and without; their vocabulary is larger by the placeholder."""
    vlm, theirs, _ = exported
    pixels, text = torch.randn(1, 3, 32, 32), torch.tensor([[1, 5, 6, 7]])
    with layer_by_layer(vlm, theirs, our_compared_name):
        expected = theirs(input_ids=in_their_ids(WITH_IMAGE, theirs), pixel_values=pixels).logits
        assert_close(vlm(WITH_IMAGE, pixels), expected[..., : toy_world.VOCABULARY])
    assert_close(vlm(text, pixels), theirs(input_ids=text).logits[..., : toy_world.VOCABULARY])


def test_the_placeholder_is_no_answer(exported):
    """Its logit is the mean one. That of a row of zeros, 0, might be the largest."""
    _, theirs, _ = exported
    logits = theirs(input_ids=torch.tensor([[1, 5, 6, 7]])).logits
    mean = logits[..., : toy_world.VOCABULARY].mean(-1)
    assert torch.allclose(logits[..., toy_world.VOCABULARY], mean, atol=1e-5)


def test_what_we_export_gives_the_same_answer_in_transformers(exported):
    vlm, theirs, _ = exported
    pixels = torch.randn(1, 3, 32, 32)
    whole = theirs.generate(input_ids=in_their_ids(WITH_IMAGE, theirs), pixel_values=pixels, max_new_tokens=8,
                            do_sample=False)
    assert vlm.generate(WITH_IMAGE, pixels, 8)[0].tolist() == whole[0, WITH_IMAGE.shape[1] :].tolist()


def test_what_we_export_is_what_we_read_again(exported):
    vlm, theirs, folder = exported
    pixels, again = torch.randn(1, 3, 32, 32), VLM.from_pretrained(folder)
    assert_close(again(in_their_ids(WITH_IMAGE, theirs), pixels)[..., : toy_world.VOCABULARY],
                 vlm(WITH_IMAGE, pixels))


def test_the_exported_processor_makes_the_ids_that_our_data_path_makes(exported):
    vlm, theirs, folder = exported
    settings = json.loads((folder / "processor_config.json").read_text())
    processor = transformers.LlavaProcessor(
        transformers.LlavaImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder), patch_size=settings["patch_size"],
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        num_additional_image_tokens=settings["num_additional_image_tokens"])
    question = "<image>\nWhat color is the shape?"
    expected = processor(images=Image.new("RGB", (40, 40)), text=question, return_tensors="pt")
    ids, roles = data.tokenise([(question, data.CONTEXT)], load_tokenizer(vlm.sources["llm"]), True)
    sample = {"ids": ids, "roles": roles, "pixels": torch.zeros(3, 32, 32), "name": ""}
    ours = data.collate([sample], 16, theirs.config.image_token_index, 0, 32)
    assert expected.input_ids.tolist() == ours["ids"].tolist()
    assert expected.pixel_values.shape == (1, 3, 32, 32)
    wide = Image.linear_gradient("L").convert("RGB").resize((96, 48))  # a crop would lose its sides
    theirs = processor(images=wide, text=question, return_tensors="pt").pixel_values[0]
    assert torch.allclose(theirs, data.preprocess(wide, vlm.vit.config, "pad"), atol=1e-5)


def test_only_what_transformers_knows_is_exported(clip_folder, llama_folder, tmp_path):
    with pytest.raises(ValueError, match="no projector 'linear'"):
        VLM.from_towers(clip_folder, llama_folder, "linear").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert why_not_exported("mlp2x_gelu") == ""


def test_dinov2_with_registers_is_refused_in_a_line(tmp_path):
    transformers.Dinov2WithRegistersConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'dinov2_with_registers'; known here: clip, "):
        ViT.from_pretrained(tmp_path)


def test_llava_folders_of_other_kinds_are_refused(tmp_path):
    their_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in {"projector_hidden_act": "relu", "vision_feature_select_strategy": "full"}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        for reads in (VLM.from_pretrained, llava.describe):  # train.py --init asks only the second
            with pytest.raises(ValueError, match=f"{name} is '{value}'"):
                reads(tmp_path)
