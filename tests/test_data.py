"""From files to batches: pictures against CLIPImageProcessor, labels against LLaVA's own vectors, the toy world."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

import data
from lab import toy_world
from data import ANSWER, CONTEXT, END
from vit import ViTConfig

TOWER = ViTConfig(image_size=32, patch_size=8)  # CLIP's normalisation


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "toy"
    toy_world.write_world(folder, align=40, instruct=40, text=10, test=40)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_world.write_tokenizer(folder)
    return data.load_tokenizer(folder)


def record(*turns, **fields):
    return {"id": "r", "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn}
                                         for i, turn in enumerate(turns)], **fields}


# ---- images --------------------------------------------------------------------------------------------------------


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
    assert torch.equal(data.preprocess(image, TOWER, "pad"), data.preprocess(Image.fromarray(square), TOWER, "crop"))


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


# ---- templates and labels: LLaVA's own functions on the Llama-2 vocabulary -----------------------------------------

HEAD = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892,
        13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901]
CAPTION = record("Render a concise summary of the photo.\n<image>", "the roof of the old town hall", image="x")
COLOR = record("<image>\nWhat color is the bus?\nAnswer the question using a single word or phrase.", "Red", image="x")
CHAT = record("<image>\nWhat is the man doing?", "He is riding a horse.", "Is he wearing a hat?", "Yes, he is.",
              "What color is it?", "Black.", image="x")
TEXT = record("Name two primary colors.", "Red and blue.", "One more?", "Yellow.")

ASSISTANT = [319, 1799, 9047, 13566, 29901]
VECTORS = [  # template, record, legacy, ids, positions with loss
    ("plain", CAPTION, False, [1, -200, 278, 17526, 310, 278, 2030, 4726, 12713, 13], range(2, 10)),
    ("plain", COLOR, False, [1, -200, 4367, 13], range(2, 4)),
    ("v1", CAPTION, False, HEAD + [29871, -200, 29871, 13, 10716, 263, 3022, 895, 15837, 310, 278, 15373, 29889]
     + ASSISTANT + [278, 17526, 310, 278, 2030, 4726, 12713, 2], range(52, 60)),
    ("v1", COLOR, False, HEAD + [29871, -200, 29871, 13, 5618, 2927, 338, 278, 3593, 29973, 13, 22550, 278, 1139, 773,
                                 263, 2323, 1734, 470, 16549, 29889] + ASSISTANT + [4367, 2], range(60, 62)),
    ("v1", CHAT, False, HEAD + [29871, -200, 29871, 13, 5618, 338, 278, 767, 2599, 29973] + ASSISTANT
     + [940, 338, 364, 4821, 263, 10435, 29889, 2, 11889, 29901, 1317, 540, 591, 4362, 263, 3056, 29973] + ASSISTANT
     + [3869, 29892, 540, 338, 29889, 2, 11889, 29901, 1724, 2927, 338, 372, 29973] + ASSISTANT + [6054, 29889, 2],
     [*range(49, 57), *range(71, 77), *range(89, 92)]),
    ("v1", TEXT, False, HEAD + [4408, 1023, 7601, 11955, 29889] + ASSISTANT
     + [4367, 322, 7254, 29889, 2, 11889, 29901, 3118, 901, 29973] + ASSISTANT + [612, 4743, 29889, 2],
     [*range(44, 49), *range(59, 63)]),
    ("v1", CHAT, True, 94, [*range(49, 57), *range(72, 78), *range(91, 94)]),
    ("v1", TEXT, True, 64, [*range(44, 49), *range(60, 64)]),
]


def llama2(legacy):
    """Llama 2's tokenizer, cut down to the tokens and merges that these vectors touch; its ids are the real ones."""
    spec = json.loads((Path(__file__).parent / "llama2_subset.json").read_text())
    if not legacy:
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    from tokenizers import Tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template, sample, legacy, ids, loss", VECTORS)
def test_llava_vectors(template, sample, legacy, ids, loss):
    tokenizer = llama2(legacy)
    pieces = data.TEMPLATES[template](data.clean_turns(sample), tokenizer)
    ours, roles = data.tokenise(pieces, tokenizer, "image" in sample)
    assert len(ours) == ids if isinstance(ids, int) else ours == ids
    assert [i for i, role in enumerate(roles) if role != CONTEXT] == list(loss)


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
    ({"id": "r", "conversations": [{"from": who, "value": "x"} for who in ("human", "human", "gpt")]}, "alternate"),
    (record("q", "a", image="x"), "0 turns with <image>"),
    (record("<image> q", "a", "<image> r", "b", image="x"), "2 turns with <image>"),
    (record("q", "<image>", image="x"), "1 turns with <image>"),
    ("text", "no conversation turns"),
])
def test_bad_records_are_named(tmp_path, bad, message):
    (tmp_path / "d.json").write_text(json.dumps([TEXT, bad]))
    with pytest.raises(ValueError, match=f"d.json: record 1 .*{message}"):
        data.load_records(tmp_path / "d.json")


def test_good_oddities():
    assert data.find_problem({"conversations": [{"from": "gpt", "value": "hello"}] + TEXT["conversations"]}) is None
    assert "not a file name" in data.find_problem(CAPTION | {"image": ["a.jpg", "b.jpg"]})
    assert data.find_problem(record("q", "a", "r") | {"model": ""}) is None  # ends on a question: earlier answers count


def test_missing_image_names_record_and_file(tmp_path, tokenizer):
    samples = data.Conversations([CAPTION | {"image": "gone.png"}], tmp_path, tokenizer, "plain", TOWER, "crop")
    with pytest.raises(ValueError, match="record 'r': .*gone.png: no such image"):
        samples[0]


# ---- batches -------------------------------------------------------------------------------------------------------


def sample(ids, roles, image=False):
    return {"ids": ids, "roles": roles, "pixels": torch.ones(3, 8, 8) if image else None, "name": "record 's'"}


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
    batch = data.collate([sample([1, -200, 7], [CONTEXT] * 3, image=True), sample([1], [CONTEXT])], 2, 99, 0, 8,
                         side="left")
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
    rows = [sample([1, 5, 6], [CONTEXT, ANSWER, ANSWER]), sample([1, 1, 5, 6, 2], [CONTEXT] * 2 + [ANSWER] * 2 + [END]),
            sample([1, 6, 5], [CONTEXT, ANSWER, ANSWER])]
    keys = data.collate(rows, 3, -200, 0, 8)["caption_keys"]
    assert keys[0] == keys[1] != keys[2]


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


# ---- ScienceQA -----------------------------------------------------------------------------------------------------


def test_scienceqa_prompt():
    problem = {"question": "Which is  soft?", "choices": ["rock", "wool"], "answer": 1, "hint": "", "image": None}
    text = ("Which is soft?\nA. rock\nB. wool\nAnswer with the option's letter from the given choices directly.")
    assert data.scienceqa_prompt(problem) == text
    assert data.scienceqa_prompt(problem | {"hint": "Touch it.", "image": "image.png"}) == (
        f"<image>\nContext: Touch it.\n{text}")


def test_scienceqa_folder(toy):
    questions = data.load_scienceqa(toy / "ScienceQA", "test")
    assert len(questions) == 40 and sum(q["image"] is not None for q in questions) == 30
    assert all(q["image"].exists() for q in questions if q["image"])
    assert {q["num_choices"] for q in questions} == {2, 3, 4}
    with pytest.raises(ValueError, match="no split 'tset'"):
        data.load_scienceqa(toy / "ScienceQA", "tset")


# ---- the LLM's own chat template ------------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}{% if loop.first %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}<|im_start|>"
          "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
          "{{ m.content | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
THINKING = (CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
                           "{% endif %}{{ m.content }}")  # as Qwen3: earlier answers lose their thoughts
            .replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
                     "<think>\n\n</think>\n\n{% endif %}{% endif %}"))
# How Llama 3 and Qwen cut text before their BPE sees it: a stop takes the newlines behind it along.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")


def byte_level(template, bos, eos, specials):
    """A byte-level BPE like Llama 3's and Qwen's, trained on a few words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["What color is the shape? It is a red circle.\n user assistant\n\n"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


def chat_tokenizer(family):
    if family == "mistral":
        tokenizer = llama2(False)
        tokenizer.chat_template = MISTRAL
        return tokenizer
    if family == "llama3":
        specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        return byte_level(LLAMA3, *specials[:2], specials)
    return byte_level(CHATML if family == "chatml" else THINKING, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"])


CHAT_TURNS = [("human", "<image>\nWhat color is the shape?"), ("gpt", "It is red."), ("human", "Is it a circle?"),
              ("gpt", "A ring, I see.")]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "thinking"])
def test_chat_labels_are_the_answers_and_their_ends(family):
    """For each kind of tokenizer: the ids are those of the rendered chat, the supervised ones decode to the answers."""
    tokenizer = chat_tokenizer(family)
    ids, roles = data.tokenise(data.chat(CHAT_TURNS, tokenizer), tokenizer, True)
    supervised = [i for i, role in zip(ids, roles) if role != data.CONTEXT]
    eos = tokenizer.eos_token
    assert tokenizer.decode(supervised).replace(" ", "") == f"It is red.{eos}A ring, I see.{eos}".replace(" ", "")
    assert roles.count(data.END) == 2 and ids.count(data.IMAGE_MARKER) == 1
    text = [("human", "What color is the shape?"), *CHAT_TURNS[1:]]  # without image: one string to compare with
    whole = tokenizer.apply_chat_template(
        [{"role": {"human": "user", "gpt": "assistant"}[role], "content": t} for role, t in text], tokenize=False)
    if family == "thinking":  # in one sequence, each answer is learned behind empty thoughts, as it will be asked for
        whole = whole.replace("assistant\nIt", "assistant\n<think>\n\n</think>\n\nIt")
    found, roles = data.tokenise(data.chat(text, tokenizer), tokenizer, False)
    if family != "mistral":  # SentencePiece's spaces depend on where a text begins
        last = len(found) - 1
        assert roles[last] == data.END
        assert found == tokenizer(whole, add_special_tokens=False).input_ids[: last + 1]
    assert found.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("family", ["chatml", "llama3", "thinking"])
@pytest.mark.parametrize("caption", ["A red circle", "A red circle.", "A red circle.\n", "It is!"])
def test_plain_labels_where_a_stop_and_a_newline_are_one_token(family, caption):
    tokenizer = chat_tokenizer(family)
    ids, roles = data.tokenise(data.plain([("human", data.IMAGE), ("gpt", caption)], None), tokenizer, True)
    start = roles.index(data.ANSWER)
    assert ids[start - 1] == data.IMAGE_MARKER and set(roles[start:]) <= {data.ANSWER, data.END}
    assert ids[start:] == tokenizer(caption + "\n", add_special_tokens=False).input_ids
    assert (roles[-1] == data.END) == (caption != "A red circle.")  # a token for both


@pytest.mark.parametrize("answer", ["\nA red circle.", "k", "think", " A\n\nred \n"])
def test_chat_answers_lose_the_space_around_them(answer):
    for family in ("chatml", "llama3", "thinking"):
        tokenizer = chat_tokenizer(family)
        ids, roles = data.tokenise(data.chat([("human", "What?"), ("gpt", answer)], tokenizer), tokenizer, False)
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
        assert said == answer.strip() + tokenizer.eos_token


def test_a_question_ends_with_what_training_put_before_the_answer():
    tokenizer = chat_tokenizer("thinking")
    asked, = data.chat(CHAT_TURNS[:1], tokenizer)
    assert asked == data.chat(CHAT_TURNS, tokenizer)[0] and asked[0].endswith("assistant\n<think>\n\n</think>\n\n")


def test_chat_templates_that_fit_no_labels_are_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% for x in m.content %}{{ x.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="drops the question"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="does not end an answer"):
        data.chat(CHAT_TURNS, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.chat(CHAT_TURNS, tokenizer)


# ---- check ---------------------------------------------------------------------------------------------------------


def test_check_lists_faults_and_writes_a_clean_list(toy, tmp_path):
    records = json.loads((toy / "align.json").read_text())[:4]
    records[1]["image"] = "gone.png"
    records[2]["conversations"] = []
    (tmp_path / "d.json").write_text(json.dumps(records))
    run = subprocess.run([sys.executable, ROOT / "data.py", "check", tmp_path / "d.json", toy / "images"],
                         capture_output=True, text=True)
    assert run.returncode == 1
    assert "record 1" in run.stdout and "gone.png" in run.stdout and "record 2" in run.stdout
    assert "2 of 4 records are good" in run.stdout
    assert len(data.load_records(tmp_path / "d.clean.json")) == 2
