"""From files to batches: pictures against CLIPImageProcessor, labels against what LLaVA's own code makes, the
order of the records."""

import itertools
import json
import math
import pickle
import random
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench_order
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

import data
from data import ANSWER, CONTEXT, END, IMAGE_MARKER
from lab import toy_world
from train import Config
from vit import ViTConfig

TOWER = ViTConfig(image_size=32, patch_size=8)  # CLIP's normalisation


def record(*turns, **fields):
    return {"id": "r", "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn}
                                         for i, turn in enumerate(turns)], **fields}


# ---- the loader --------------------------------------------------------------------------------------------


class SlowSamples(torch.utils.data.Dataset):
    """Eight samples without an image, each of which takes so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.pad_id = seconds, 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return {"ids": [1, 2, 3], "roles": [CONTEXT, ANSWER, END], "pixels": None, "name": str(i)}


@pytest.mark.parametrize("of_loader, of_step, is_told", [(0.01, 0.0, True), (0.0, 0.04, False)])
def test_a_loader_slower_than_the_step_is_told(capsys, of_loader, of_step, is_told):
    vlm = SimpleNamespace(num_image_tokens=4, image_token_id=-200, vit=SimpleNamespace(config=TOWER),
                          llm=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64)))
    steps, cpu = [[[0]]] * 25, torch.device("cpu")
    for _ in data.make_loader(Config(batch=1), SlowSamples(of_loader), vlm, steps, cpu):
        time.sleep(of_step)
    said = re.search(r"the loader is slower than the step: (\d+\.\d) samples/s, the step alone (\d+\.\d)",
                     capsys.readouterr().out)
    assert bool(said) == is_told and (not said or float(said[1]) < 100)


# ---- images ------------------------------------------------------------------------------------------------


def picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height)).convert("RGB")


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 33), (200, 31), (31, 200)])
def test_crop_equals_clip_image_processor(size):
    theirs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = theirs(picture(*size), return_tensors="pt")["pixel_values"][0]
    ours = data.preprocess(picture(*size), TOWER, "crop")
    assert ours.shape == (3, 32, 32)
    one_grey_level = 1 / 255 / min(TOWER.image_std)
    assert (ours - expected).abs().max() <= one_grey_level * 1.01


@pytest.mark.parametrize("size", [(60, 40), (41, 60)])
def test_pad_keeps_the_whole_picture_on_the_mean_colour(size):
    width, height = size
    side, image = max(size), picture(*size)
    square = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)  # int(255 * mean), as in LLaVA
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    expected = data.preprocess(Image.fromarray(square), TOWER, "crop")
    assert torch.equal(data.preprocess(image, TOWER, "pad"), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture(20, 10).convert("RGB").convert("L" if mode == "LA" else mode).convert(mode).save(file)
    assert data.load_image(file).mode == "RGB"


def test_bad_images(tmp_path):
    picture(50, 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(FileNotFoundError, match="none.png: no such image"):
        data.load_image(tmp_path / "none.png")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            data.load_image(tmp_path / name)


def test_other_extension_of_the_same_stem(tmp_path):
    picture(8, 8).save(tmp_path / "a.gif")
    assert data.load_image(tmp_path / "a.jpg").size == (8, 8)


# ---- templates and labels: what LLaVA's own functions make, on the Llama-2 vocabulary ----------------------

CAPTION = record("Render a concise summary of the photo.\n<image>", "the roof of the old town hall",
                 image="x")
COLOR = record("<image>\nWhat color is the bus?\nAnswer the question using a single word or phrase.", "Red",
               image="x")
CHAT = record("<image>\nWhat is the man doing?", "He is riding a horse.", "Is he wearing a hat?",
              "Yes, he is.", "What color is it?", "Black.", image="x")
TEXT = record("Name two primary colors.", "Red and blue.", "One more?", "Yellow.")

# What they become: (text, its ids, whether they carry loss). At the start and behind an image, a text opens
# with SentencePiece's own space.
BOS, END_TOKEN, PICTURE = ("<s>", [1], False), ("</s>", [2], True), ("<image>", [IMAGE_MARKER], False)
HEAD = [BOS, (" A chat between a curious user and an artificial intelligence assistant.", [
    319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889], False),
        (" The assistant gives helpful, detailed, and polite answers to the user's questions.", [
            450, 20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879,
            5155, 29889], False),
        (" USER:", [3148, 1001, 29901], False)]
NEXT_QUESTION = ("USER:", [11889, 29901], False)
TO_ANSWER = (" ASSISTANT:", [319, 1799, 9047, 13566, 29901], False)
VECTORS = {
    "plain, caption": ("plain", CAPTION, [
        BOS, PICTURE, (" the roof of the old town hall", [278, 17526, 310, 278, 2030, 4726, 12713], True),
        ("\n", [13], True)]),
    "plain, one word": ("plain", COLOR, [BOS, PICTURE, (" Red", [4367], True), ("\n", [13], True)]),
    "v1, caption": ("v1", CAPTION, [
        *HEAD, (" ", [29871], False), PICTURE,
        (" \nRender a concise summary of the photo.", [
            29871, 13, 10716, 263, 3022, 895, 15837, 310, 278, 15373, 29889], False), TO_ANSWER,
        (" the roof of the old town hall", [278, 17526, 310, 278, 2030, 4726, 12713], True), END_TOKEN]),
    "v1, one word": ("v1", COLOR, [
        *HEAD, (" ", [29871], False), PICTURE,
        (" \nWhat color is the bus?", [29871, 13, 5618, 2927, 338, 278, 3593, 29973], False),
        ("\nAnswer the question using a single word or phrase.", [
            13, 22550, 278, 1139, 773, 263, 2323, 1734, 470, 16549, 29889], False), TO_ANSWER,
        (" Red", [4367], True), END_TOKEN]),
    "v1, three rounds": ("v1", CHAT, [
        *HEAD, (" ", [29871], False), PICTURE,
        (" \nWhat is the man doing?", [29871, 13, 5618, 338, 278, 767, 2599, 29973], False), TO_ANSWER,
        (" He is riding a horse.", [940, 338, 364, 4821, 263, 10435, 29889], True), END_TOKEN,
        NEXT_QUESTION, (" Is he wearing a hat?", [1317, 540, 591, 4362, 263, 3056, 29973], False), TO_ANSWER,
        (" Yes, he is.", [3869, 29892, 540, 338, 29889], True), END_TOKEN,
        NEXT_QUESTION, (" What color is it?", [1724, 2927, 338, 372, 29973], False), TO_ANSWER,
        (" Black.", [6054, 29889], True), END_TOKEN]),
    "v1, text only": ("v1", TEXT, [
        *HEAD, (" Name two primary colors.", [4408, 1023, 7601, 11955, 29889], False), TO_ANSWER,
        (" Red and blue.", [4367, 322, 7254, 29889], True), END_TOKEN,
        NEXT_QUESTION, (" One more?", [3118, 901, 29973], False), TO_ANSWER,
        (" Yellow.", [612, 4743, 29889], True), END_TOKEN]),
}


def llama2(legacy):
    """Llama 2's tokenizer, cut down to bytes and to the tokens and merges that these vectors touch; its ids
    are the real ones. `legacy`: SentencePiece's own space also behind every special token."""
    spec = json.loads((Path(__file__).parent / "llama2_subset.json").read_text())
    spec["model"]["vocab"] |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    if not legacy:
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                                 "split": False}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")


def text_of(ids, tokenizer):
    """As written in the vocabulary: SentencePiece's space shows, wherever it stands."""
    names = [data.IMAGE if i == IMAGE_MARKER else tokenizer.convert_ids_to_tokens(i) for i in ids]
    return "".join(names).replace("▁", " ").replace("<0x0A>", "\n")


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@pytest.mark.parametrize("name", VECTORS)
def test_llava_vectors(name, legacy):
    template, sample, parts = VECTORS[name]
    tokenizer = llama2(legacy)
    if legacy:  # a space opens the text behind </s>, too
        parts = [HEAD[-1] if part == NEXT_QUESTION else part for part in parts]
    for text, ids, _ in parts:
        assert text_of(ids, tokenizer) == text  # the text beside the ids above is true
    pieces = data.TEMPLATES[template](data.clean_turns(sample), tokenizer)
    ids, roles = data.tokenise(pieces, tokenizer, "image" in sample)
    assert ids == [i for _, part, _ in parts for i in part], (
        "other ids than LLaVA's: a piece was tokenised on its own, or the image stands elsewhere")
    said = text_of([i for i, role in zip(ids, roles) if role != CONTEXT], tokenizer)
    expected = [has_loss for _, part, has_loss in parts for _ in part]
    assert [role != CONTEXT for role in roles] == expected, (
        f"the labels are off, by one perhaps: what carries loss reads {said!r}. A role is that of the token "
        "itself; the loss alone looks one token ahead")


@pytest.mark.parametrize("answer, first", [("5", 29871), ("\nA b", 29871)])
def test_a_lone_space_before_the_answer_carries_loss(answer, first):
    tokenizer = llama2(False)
    pieces = data.v1([("human", "<image>\nHow many dogs?"), ("gpt", answer)], tokenizer)
    ids, roles = data.tokenise(pieces, tokenizer, True)
    assert ids[roles.index(ANSWER)] == first


def test_plain_takes_two_turns_with_an_image():
    for sample in (CHAT, TEXT):
        with pytest.raises(ValueError, match="plain template"):
            data.plain(data.clean_turns(sample), None)


def test_supervised_ids_decode_to_the_answers(toy, tokenizer):
    for sample in data.load_records(toy / "instruct.json"):
        ids, roles = data.tokenise(data.v1(data.clean_turns(sample), tokenizer), tokenizer, "image" in sample)
        assert tokenizer.unk_token_id not in ids
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != CONTEXT])
        assert said == " ".join(turn["value"] + " </s>" for turn in sample["conversations"][1::2])


def test_marked_text_shows_what_carries_loss(tokenizer):
    turns = [("human", f"{data.IMAGE}\nIs the shape red?"), ("gpt", "Yes"), ("human", "Is it large?"),
             ("gpt", "No")]
    ids, roles = data.tokenise(data.v1(turns, tokenizer), tokenizer, True)
    shown = data.marked_text({"ids": ids, "roles": roles}, tokenizer)
    assert shown.count(data.IMAGE) == 1
    assert re.findall(r"\[\[ (.*?)\]\]", shown) == ["Yes </s>", "No </s>"]


def test_a_boundary_inside_a_token_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="joins"):
        data.tokenise([("re", CONTEXT), ("d", ANSWER)], tokenizer, False)
    one_token = chat_tokenizer("chatml")  # for ".\n"
    for before, behind in ((CONTEXT, ANSWER), (ANSWER, CONTEXT)):
        with pytest.raises(ValueError, match="joins"):
            data.tokenise([("circle.", before), ("\n", behind)], one_token, False)


def test_image_marker_moves_to_the_front():
    assert data.clean_turns(CAPTION)[0][1] == "<image>\nRender a concise summary of the photo."
    assert data.clean_turns(record("a <image> b <image>", "c", image="x"))[0][1] == "<image>\na  b"
    assert data.clean_turns(record("<image>", "c", image="x"))[0][1] == "<image>"
    assert data.clean_turns(record("what is <image>?", "c"))[0][1] == "what is <image>?"


@pytest.mark.parametrize("bad, message", [
    ({"id": "r"}, "no conversation turns"),
    ({"id": "r", "conversations": []}, "no conversation turns"),
    ({"id": "r", "conversations": [{"from": "system", "value": "x"}]}, "'system'"),
    (record("q"), "no answer"),
    (record("q", ""), "empty turn"),
    ({"id": "r", "conversations": [{"from": "human"}]}, "without text"),
    ({"id": "r", "conversations": [{"from": who, "value": "x"} for who in ("human", "human", "gpt")]},
     "alternate"),
    (record("q", "a", image="x"), "0 turns with <image>"),
    (record("<image> q", "a", "<image> r", "b", image="x"), "2 turns with <image>"),
    (record("q", "<image>", image="x"), "1 turns with <image>"),
    ("text", "no conversation turns"),
])
def test_bad_records_are_named(tmp_path, bad, message):
    (tmp_path / "d.json").write_text(json.dumps([TEXT, bad]))
    with pytest.raises(ValueError, match=f"d.json: record 1 .*{message}"):
        data.load_records(tmp_path / "d.json")


@pytest.mark.parametrize("part", [1, 7, 10**6])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_records_stay_on_disk_and_are_what_json_reads(tmp_path, monkeypatch, style, part):
    """However the file is written, and however small the parts in which it is looked through."""
    written = [TEXT, CAPTION | {"id": "é 😀 ]}, {["}, record("two\n words", "b"),
               record("q", "ü" * 50, "<image>", "a", image="x")]
    (tmp_path / "d.json").write_text(f" {json.dumps(written, **style)}\n", encoding="utf-8")
    monkeypatch.setattr(data, "scan_list", partial(data.scan_list, part=part))
    records = pickle.loads(pickle.dumps(data.load_records(tmp_path / "d.json")))
    assert list(records) == written and records[-1] == written[3] and records[1:3] == written[1:3]
    assert records.sizes.tolist()[2:] == [[len("two\n wordsb"), 2, 0, 0], [59, 4, 1, 165]]
    assert records.sizes[1, 2:].tolist() == [1, 0] and len(records) == 4


@pytest.mark.parametrize("text, message", [
    ("[]", "not a JSON list of records"), ("{}", "not a JSON list of records"),
    ("[1 2]", "not JSON|no conversation"),
    ('[{"id": 1}', "not JSON|has no conversation"), ("", "not JSON"), ("[1,]", "not JSON|no conversation")])
def test_what_is_no_list_of_records_is_refused(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=f"d.json: .*({message})"):
        data.load_records(tmp_path / "d.json")


def test_what_stands_behind_the_list_is_refused(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([TEXT]) + " [1]")
    with pytest.raises(ValueError, match="d.json: not JSON: Extra data"):
        data.load_records(tmp_path / "d.json")


def test_lengths_come_near_the_tokens(toy, tokenizer):
    """Estimated from a few records, of rows with and without an image; never above the limit."""
    samples = data.Conversations(data.load_records(toy / "instruct.json"), toy / "images", tokenizer, "v1",
                                 TOWER, "pad")
    lengths, tokens = samples.lengths(16, 2048, samples=10), []
    for i in range(len(samples)):
        ids = samples[i]["ids"]
        tokens.append(len(ids) + 15 * ids.count(IMAGE_MARKER))
    assert np.abs(np.array(lengths) - tokens).mean() < 0.1 * np.mean(tokens)
    assert np.corrcoef(lengths, tokens)[0, 1] > 0.9
    assert max(samples.lengths(16, 30)) <= 30


def test_good_oddities():
    opening = {"from": "gpt", "value": "hello"}
    assert data.find_problem({"conversations": [opening, *TEXT["conversations"]]}) is None
    assert "not a file name" in data.find_problem(CAPTION | {"image": ["a.jpg", "b.jpg"]})
    assert data.find_problem(record("q", "a", "r") | {"model": ""}) is None  # the earlier answer counts


def test_missing_image_names_record_and_file(tmp_path, tokenizer):
    records = [CAPTION | {"image": "gone.png"}]
    samples = data.Conversations(records, tmp_path, tokenizer, "plain", TOWER, "crop")
    with pytest.raises(ValueError, match="record 'r': .*gone.png: no such image"):
        samples[0]


# ---- batches -----------------------------------------------------------------------------------------------


def sample(ids, roles, image=False):
    pixels = torch.ones(3, 8, 8) if image else None
    return {"ids": ids, "roles": roles, "pixels": pixels, "name": "record 's'"}


def test_collate_by_hand():
    batch = data.collate([sample([1, -200, 7, 8, 13], [CONTEXT] * 2 + [ANSWER, ANSWER, END], image=True),
                          sample([1, 5, 6, 2], [CONTEXT] * 2 + [ANSWER, END])], 3, -200, 0, 8)
    assert batch["ids"].tolist() == [[1, -200, -200, -200, 7, 8, 13], [1, 5, 6, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [7, 8, 13], [-100, -100, 6, 2, -100, -100, -100]]
    assert batch["mask"].tolist() == [[True] * 7, [True] * 4 + [False] * 3]
    assert batch["caption_ids"].tolist() == [[7, 8], [6, 0]]
    assert batch["caption_mask"].tolist() == [[True, True], [True, False]]
    assert batch["pixels"].shape == (1, 3, 8, 8) and batch["pixels"].all()


def test_collate_left_and_other_placeholder():
    rows = [sample([1, -200, 7], [CONTEXT] * 3, image=True), sample([1], [CONTEXT])]
    batch = data.collate(rows, 2, 99, 0, 8, side="left")
    assert batch["ids"].tolist() == [[1, 99, 99, 7], [0, 0, 0, 1]]
    assert batch["mask"].tolist() == [[True] * 4, [False] * 3 + [True]]


def test_collate_without_images_has_one_black_dummy():
    pixels = data.collate([sample([1, 5], [CONTEXT, ANSWER])], 3, -200, 0, 8)["pixels"]
    assert pixels.shape == (1, 3, 8, 8) and not pixels.any()


def test_rows_are_cut_but_never_in_an_image():
    row = sample([1, -200, 7, 8], [CONTEXT] * 2 + [ANSWER] * 2, image=True)
    assert data.collate([row], 3, -200, 0, 8, max_length=5)["ids"].tolist() == [[1, -200, -200, -200, 7]]
    with pytest.raises(ValueError, match="record 's': the image does not fit into 3 tokens"):
        data.collate([row], 3, -200, 0, 8, max_length=3)


def test_prompts_are_not_cut(tokenizer):
    with pytest.raises(ValueError, match="record 's': 4 tokens; there is room for 3"):
        data.collate([sample([1, 5, 6, 7], [CONTEXT] * 4)], 3, -200, 0, 8, max_length=3, side="left")


def test_another_llms_tokenizer_is_refused(tokenizer):
    data.check_vocabulary(tokenizer, toy_world.VOCABULARY)
    with pytest.raises(ValueError, match="ids up to 81, the LLM has 80 embeddings"):
        data.check_vocabulary(tokenizer, 80)


def test_equal_captions_have_equal_keys():
    rows = [sample([1, 5, 6], [CONTEXT, ANSWER, ANSWER]),
            sample([1, 1, 5, 6, 2], [CONTEXT, CONTEXT, ANSWER, ANSWER, END]),
            sample([1, 6, 5], [CONTEXT, ANSWER, ANSWER])]
    keys = data.collate(rows, 3, -200, 0, 8)["keys"][:, 0]
    assert keys[0] == keys[1] != keys[2]


def test_one_image_has_one_key_and_samples_without_a_name_their_own():
    rows = [sample([1, word], [CONTEXT, ANSWER]) for word in (5, 6, 7, 8)]
    for row, image in zip(rows, ("a/1.png", "b/1.png", "a/1.png", None)):
        row["image"] = image
    keys = data.collate(rows, 3, -200, 0, 8)["keys"]
    assert keys[0, 1] == keys[2, 1] and len(keys[:, 1].unique()) == 3 and len(keys[:, 0].unique()) == 4


def test_subsets_are_nested():
    parts = [set(data.subset(1000, fraction, seed=3)) for fraction in (0.01, 0.1, 0.5, 1)]
    assert [len(part) for part in parts] == [10, 100, 500, 1000]
    assert all(small < large for small, large in zip(parts, parts[1:]))
    assert data.subset(1000, 0.1, seed=4) != data.subset(1000, 0.1, seed=3)
    with pytest.raises(ValueError, match="data_fraction is 0"):
        data.subset(10, 0, seed=0)


@pytest.mark.parametrize("lengths, chunks, expected", [
    ([9, 8, 7, 6, 5, 4, 3, 2], 2, [[0, 3, 4, 7], [1, 2, 5, 6]]),
    ([10, 9, 2, 2, 1, 1], 3, [[0, 5], [1, 4], [2, 3]]),
    ([5, 4, 3, 2, 1], 2, [[0, 2, 4], [1, 3]]),
])
def test_even_chunks_of_llava(lengths, chunks, expected):
    assert data.even_chunks(list(range(len(lengths))), lengths, chunks) == expected


def test_grouped_order_is_a_permutation_of_single_modality_batches():
    rng = random.Random(0)
    lengths = [rng.randint(1, 99) * (1 if i % 3 else -1) for i in range(100)]
    order = data.grouped_order(lengths, batch=8, chunks=4, seed=1, epoch=0)
    assert sorted(order) == list(range(100))
    batches = [order[start : start + 8] for start in range(0, 64 + 32, 8)]  # 66 with image, 34 without
    assert all(len({lengths[i] > 0 for i in batch}) == 1 for batch in batches)
    totals = [[sum(abs(lengths[i]) for i in batch[c : c + 2]) for c in range(0, 8, 2)] for batch in batches]
    assert sum(max(t) - min(t) for t in totals) / len(totals) < 40  # dealt evenly over the chunks
    assert order != data.grouped_order(lengths, 8, 4, seed=1, epoch=1)
    one = data.grouped_order(lengths, batch=8, chunks=1, seed=1, epoch=0)
    assert [set(one[s : s + 8]) for s in range(0, 96, 8)] == [set(batch) for batch in batches]


@pytest.mark.parametrize("budget, contrastive", [(0, "none"), (60, "none"), (60, "patch"), (1, "none")])
@pytest.mark.parametrize("is_grouped", [True, False])
def test_every_rank_count_takes_the_same_records(is_grouped, budget, contrastive):
    """Six steps of eight: two passes over 21 records, and a part of a third. In each step the ranks together
    take what one rank takes at once, in LLaVA's order one after another; all have as many micro-batches, and
    where vectors are exchanged as many samples."""
    config = Config(batch=8, micro_batch=2, epochs=2.0, seed=3, group_by_length=is_grouped,
                    micro_tokens=budget, contrastive=contrastive)
    lengths = [1 + 17 * i % 40 for i in range(21)]
    steps = data.count_steps(config, len(lengths))
    assert steps == math.ceil(42 / 8)
    at_once = config if is_grouped else replace(config, micro_batch=8, micro_tokens=0)
    whole = [list(itertools.chain(*parts)) for (parts,) in data.micro_batches(at_once, lengths, steps, 1)]
    order = list(itertools.chain(*whole))
    assert sorted(order[:21]) == list(range(21)) == sorted(order[21:42])
    for world in (1, 2, 4):
        for ranks, batch in zip(data.micro_batches(config, lengths, steps, world), whole, strict=True):
            taken = [i for parts in ranks for part in parts for i in part]
            assert len(ranks) == world and sorted(taken) == sorted(batch)
            assert taken == batch or not is_grouped
            assert len({len(parts) for parts in ranks}) == 1
            if contrastive != "none" or is_grouped:
                assert {sum(map(len, parts)) for parts in ranks} == {8 // world}
            for part in itertools.chain(*ranks) if budget and not is_grouped else ():
                assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget


def test_spreading_by_length_takes_the_padding_and_the_waiting_out():
    """On lengths like those of mix665k, 8 ranks: at least 1.7 times as many rows a second as in LLaVA's
    order."""
    text, has_image = bench_order.log_normal(3000)
    rates = {name: 1 - bench_order.costs(bench_order.WAYS[name], text, has_image)["padding or waiting"]
             for name in ("LLaVA's order, 16", "spread, 16, 8192 tokens", "spread, 4")}
    llava, budget, by_number = rates.values()
    assert budget > 1.7 * llava and by_number > 1.7 * llava


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch of 8 does not divide into 3 ranks"):
        data.split_batch(Config(batch=8, micro_batch=2), 3)


# ---- the LLM's own chat template ---------------------------------------------------------------------------

CHATML = ("{% for m in messages %}{% if loop.first %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{{ m.content | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
EMPTY = "<think>\n\n</think>\n\n"  # thoughts, as Qwen3 has them: earlier answers lose them
THINKING = (CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}"
                           f"{EMPTY}{{% endif %}}{{{{ m.content }}}}")
            .replace("assistant\n{% endif %}", "assistant\n"
                     "{% if enable_thinking is defined and not enable_thinking %}"
                     f"{EMPTY}{{% endif %}}{{% endif %}}"))
# How Llama 3 and Qwen cut text before their BPE sees it: a stop takes the newlines behind it along.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(template, bos, eos, specials, is_trimmed=False):
    """A byte-level BPE like Llama 3's and Qwen's, trained on a few words. `is_trimmed`: as in some, the place
    that it gives of a token is without the space in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = "What color is the shape? It is a red circle.\n user assistant\n\n"
    tokenizer.train_from_iterator([text] * 3, trainer)
    behind = [processors.ByteLevel(trim_offsets=True)] if is_trimmed else []
    if bos:
        behind.append(processors.TemplateProcessing(single=f"{bos} $A",
                                                    special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(behind)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                   chat_template=template)


def chat_tokenizer(family):
    """Of one of FAMILIES, or "mistral"."""
    if family == "mistral":
        tokenizer = llama2(False)
        tokenizer.chat_template = MISTRAL
        return tokenizer
    family, is_trimmed = family.removesuffix(", trimmed"), family.endswith(", trimmed")
    if family == "llama3":
        specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        return byte_level(LLAMA3, *specials[:2], specials, is_trimmed)
    template = CHATML if family == "chatml" else THINKING
    return byte_level(template, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"], is_trimmed)


FAMILIES = ["chatml", "chatml, trimmed", "llama3", "llama3, trimmed", "thinking"]
CHAT_TURNS = [("human", "<image>\nWhat color is the shape?"), ("gpt", "It is red."),
              ("human", "Is it a circle?"), ("gpt", "A ring, I see.")]


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_chat_labels_are_the_answers_and_their_ends(family):
    """For each kind of tokenizer: the ids are those of the rendered chat, the supervised ones decode to the
    answers."""
    tokenizer = chat_tokenizer(family)
    ids, roles = data.tokenise(data.chat(CHAT_TURNS, tokenizer), tokenizer, True)
    supervised = [i for i, role in zip(ids, roles) if role != data.CONTEXT]
    eos = tokenizer.eos_token
    said = tokenizer.decode(supervised).replace(" ", "")
    assert said == f"It is red.{eos}A ring, I see.{eos}".replace(" ", "")
    assert roles.count(data.END) == 2 and ids.count(data.IMAGE_MARKER) == 1
    text = [("human", "What color is the shape?"), *CHAT_TURNS[1:]]  # without image: one text to compare with
    messages = [{"role": {"human": "user", "gpt": "assistant"}[role], "content": said} for role, said in text]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if family == "thinking":  # each answer is learned behind empty thoughts, as it will be asked for
        whole = whole.replace("assistant\nIt", f"assistant\n{EMPTY}It")
    found, roles = data.tokenise(data.chat(text, tokenizer), tokenizer, False)
    if family != "mistral":  # SentencePiece's spaces depend on where a text begins
        last = len(found) - 1
        assert roles[last] == data.END
        assert found == tokenizer(whole, add_special_tokens=False).input_ids[: last + 1]
    assert found.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("caption", ["A red circle", "A red circle.", "A red circle.\n", "It is!"])
def test_plain_labels_where_a_stop_and_a_newline_are_one_token(family, caption):
    tokenizer = chat_tokenizer(family)
    pieces = data.plain([("human", data.IMAGE), ("gpt", caption)], tokenizer)
    ids, roles = data.tokenise(pieces, tokenizer, True)
    start = roles.index(data.ANSWER)
    assert ids[start - 1] == data.IMAGE_MARKER and set(roles[start:]) <= {data.ANSWER, data.END}
    assert ids[start:] == tokenizer(caption + "\n", add_special_tokens=False).input_ids
    assert (roles[-1] == data.END) == (caption != "A red circle.")  # a token for both


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_stands_at_the_first_position(family):
    tokenizer = chat_tokenizer(family)
    pieces = data.plain([("human", data.IMAGE), ("gpt", "A red circle.")], tokenizer)
    ids, roles = data.tokenise(pieces, tokenizer, True)
    bos = tokenizer("").input_ids
    assert ids[: ids.index(data.IMAGE_MARKER)] == (bos or tokenizer("\n", add_special_tokens=False).input_ids)
    assert roles[0] == data.CONTEXT


@pytest.mark.parametrize("answer", ["\nA red circle.", "k", "think", " A\n\nred \n"])
def test_chat_answers_lose_the_space_around_them(answer):
    for family in FAMILIES:
        tokenizer = chat_tokenizer(family)
        pieces = data.chat([("human", "What?"), ("gpt", answer)], tokenizer)
        ids, roles = data.tokenise(pieces, tokenizer, False)
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
        assert said == answer.strip() + tokenizer.eos_token


def test_a_question_ends_with_what_training_put_before_the_answer():
    tokenizer = chat_tokenizer("thinking")
    asked, = data.chat(CHAT_TURNS[:1], tokenizer)
    assert asked == data.chat(CHAT_TURNS, tokenizer)[0] and asked[0].endswith(f"assistant\n{EMPTY}")


BORDERS = [  # pieces; "end" is the tokenizer's own end token
    [("What is 😀", CONTEXT), (" 😀 é", ANSWER), ("end", END)],
    [("😀", CONTEXT), ("😀", ANSWER), ("\n", END)],
    [("é:", CONTEXT), ("  red ", ANSWER), ("end", END), ("B:", CONTEXT), (" 5😀", ANSWER), ("end", END)],
    [("", CONTEXT), ("a red circle", ANSWER), ("\n", END)],
]


@pytest.mark.parametrize("pieces", BORDERS)
@pytest.mark.parametrize("name", ["llama2", "llama2, legacy", *FAMILIES])
def test_roles_follow_the_text_where_characters_take_several_tokens(name, pieces):
    """An emoji is four bytes, and four tokens, on either side of a border; a space belongs to the word behind
    it."""
    tokenizer = llama2(name.endswith("legacy")) if "llama2" in name else chat_tokenizer(name)
    pieces = [(tokenizer.eos_token if text == "end" else text, role) for text, role in pieces]
    ids, roles = data.tokenise(pieces, tokenizer, False)
    start, found = 1 if tokenizer.bos_token else 0, []
    for role, same in itertools.groupby(roles[start:]):
        stop = start + len(list(same))
        found.append((tokenizer.decode(ids[start:stop]), role))
        start = stop
    if "llama2" in name:  # its decoder drops the space that a text opens with
        found, pieces = ([(text.strip(" "), role) for text, role in rows] for rows in (found, pieces))
    assert found == [piece for piece in pieces if piece[0]]


@pytest.mark.parametrize("pieces", BORDERS)
def test_trimmed_places_of_tokens_change_no_label(pieces):
    trimmed, plain = chat_tokenizer("chatml, trimmed"), chat_tokenizer("chatml")
    places = [t("It is red", return_offsets_mapping=True).offset_mapping for t in (trimmed, plain)]
    assert places == [[(0, 2), (3, 5), (6, 9)], [(0, 2), (2, 5), (5, 9)]]  # or nothing is tested here
    assert data.tokenise(pieces, trimmed, False) == data.tokenise(pieces, plain, False)


def test_chat_templates_that_fit_no_labels_are_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}"
                               "{% endfor %}")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = ("{% for m in messages %}{% for x in m.content %}{{ x.text }}{% endfor %}"
                               "{% endfor %}")
    with pytest.raises(ValueError, match="drops the question"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="does not end an answer"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.chat(CHAT_TURNS, tokenizer)


# ---- check -------------------------------------------------------------------------------------------------


def test_check_lists_faults_and_writes_a_clean_list(toy, tmp_path, monkeypatch, capsys):
    records = json.loads((toy / "align.json").read_text())[:4]
    records[1]["image"] = "gone.png"
    records[2]["conversations"] = []
    (tmp_path / "d.json").write_text(json.dumps(records))
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(tmp_path / "d.json"), str(toy / "images")])
    with pytest.raises(SystemExit) as end:
        data.main()
    printed = capsys.readouterr().out
    assert end.value.code == 1
    assert "record 1" in printed and "gone.png" in printed and "record 2" in printed
    assert "2 of 4 records are good" in printed
    assert len(data.load_records(tmp_path / "d.clean.json")) == 2
