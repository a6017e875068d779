"""From files to batches: pictures against CLIPImageProcessor, labels against what LLaVA's own code makes."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import test_ids
import torch
from conftest import grades, refusal
from PIL import Image
from test_ids import EMPTY, MISTRAL, THINKING, chatml, llama3
from tokenizers import processors
from transformers import CLIPImageProcessor

import data
from data import ANSWER, CONTEXT, END, IMAGE_MARKER
from lab import toy_world
from plumbing.tokenizer import check_vocabulary
from running.records import load_records
from vit import ViTConfig

TOWER = ViTConfig(image_size=32, patch_size=8)  # CLIP's normalisation


def record(*turns, **fields):
    return {"id": "r", "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn}
                                         for i, turn in enumerate(turns)], **fields}


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
    """Llama 2's tokenizer. `legacy`: SentencePiece's own space also behind every special token."""
    return test_ids.llama2("legacy" if legacy else "first")


def encode(template, turns, tokenizer, has_image=True):
    """(ids, roles) under the template of this name."""
    return data.encode(turns, data.form_of(template, tokenizer), tokenizer, has_image)


def text_of(ids, tokenizer):
    """As written in the vocabulary: SentencePiece's space shows, wherever it stands."""
    names = [data.IMAGE if i == IMAGE_MARKER else tokenizer.convert_ids_to_tokens(i) for i in ids]
    return "".join(names).replace("▁", " ").replace("<0x0A>", "\n")


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@pytest.mark.parametrize("name", VECTORS)
@grades("token_roles")
def test_llava_vectors(name, legacy):
    template, sample, parts = VECTORS[name]
    tokenizer = llama2(legacy)
    if legacy:  # a space opens the text behind </s>, too
        parts = [HEAD[-1] if part == NEXT_QUESTION else part for part in parts]
    for text, ids, _ in parts:
        assert text_of(ids, tokenizer) == text  # the text beside the ids above is true
    turns = data.clean_turns(sample)
    turns = data.image_and_caption(turns) if template == "plain" else turns
    ids, roles = encode(template, turns, tokenizer, "image" in sample)
    assert ids == [i for _, part, _ in parts for i in part], (
        "other ids than LLaVA's: a piece was tokenised on its own, or the image stands elsewhere")
    said = text_of([i for i, role in zip(ids, roles) if role != CONTEXT], tokenizer)
    expected = []
    for _, part, has_loss in parts:
        is_end = has_loss and part in ([2], [13])
        role = ANSWER if has_loss else CONTEXT
        expected += [END if is_end else role] * len(part)
    assert roles == expected, (
        f"the labels are off, by one perhaps: what carries loss reads {said!r}. A role is that of the token "
        "itself, an answer's or its end's; the loss alone looks one token ahead")


@pytest.mark.parametrize("answer, first", [("5", 29871), ("\nA b", 29871)])
@grades("token_roles")
def test_a_lone_space_before_the_answer_carries_loss(answer, first):
    tokenizer = llama2(False)
    ids, roles = encode("v1", [("human", "<image>\nHow many dogs?"), ("gpt", answer)], tokenizer)
    assert ids[roles.index(ANSWER)] == first, (
        "the space that opens an answer is a token here, and carries loss as the answer does")


def test_plain_takes_two_turns_with_an_image():
    for sample in (CHAT, TEXT):
        with pytest.raises(ValueError, match="plain template"):
            data.image_and_caption(data.clean_turns(sample))


def test_supervised_ids_decode_to_the_answers(toy, tokenizer):
    for sample in load_records(toy / "instruct.json"):
        ids, roles = encode("v1", data.clean_turns(sample), tokenizer, "image" in sample)
        assert tokenizer.unk_token_id not in ids
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != CONTEXT])
        assert said == " ".join(turn["value"] + " </s>" for turn in sample["conversations"][1::2])


def test_marked_text_shows_what_carries_loss(tokenizer):
    turns = [("human", f"{data.IMAGE}\nIs the shape red?"), ("gpt", "Yes"), ("human", "Is it large?"),
             ("gpt", "No")]
    ids, roles = encode("v1", turns, tokenizer)
    shown = data.marked_text({"ids": ids, "roles": roles}, tokenizer)
    assert shown.count(data.IMAGE) == 1
    assert re.findall(r"\[\[ (.*?)\]\]", shown) == ["Yes </s>", "No </s>"]


@grades("token_roles")
def test_a_boundary_inside_a_token_is_an_error(tokenizer):
    found = [refusal(data.tokenise, [("re", CONTEXT), ("d", ANSWER)], tokenizer, False)]
    one_token = chat_tokenizer("chatml")  # for ".\n"
    for before, behind in ((CONTEXT, ANSWER), (ANSWER, CONTEXT), (END, CONTEXT)):
        found.append(refusal(data.tokenise, [("circle.", before), ("\n", behind)], one_token, False))
    assert all("joins" in said for said in found), (
        "a token over what carries loss and what does not is no error: nobody can say whether it does")


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
        load_records(tmp_path / "d.json")


def test_a_later_question_may_have_the_image(tokenizer):
    """As in LLaVA, whose marker goes to the front of its own turn. What a person types is text."""
    turns = data.clean_turns(record("Is it large?", "No", "What is it? <image>", "A ring.", image="x"))
    ids, roles = encode("v1", turns, tokenizer)
    assert ids.count(data.IMAGE_MARKER) == 1
    said = data.marked_text({"ids": ids, "roles": roles}, tokenizer)
    assert re.search(r"large \? .*\[\[ No </s>\]\] .*<image>\s+What is it .*\[\[ A ring", said)
    typed = [("human", f"{data.IMAGE}\nIs it red?"), ("gpt", "No"), ("human", f"{data.IMAGE} is a word"),
             ("gpt", "Yes")]
    text = "".join(said for said, _ in data.to_pieces(typed, data.v1(tokenizer), tokenizer, True))
    assert text.count(data.IMAGE) == 1 and "< image> is a word" in text


def test_good_oddities():
    opening = {"from": "gpt", "value": "hello"}
    assert data.find_problem({"conversations": [opening, *TEXT["conversations"]]}) is None
    assert "has 2 images; one is supported" in data.find_problem(CAPTION | {"image": ["a.jpg", "b.jpg"]})
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
    with pytest.raises(ValueError, match="record 's': 4 tokens; an answer leaves room for 3"):
        data.collate([sample([1, 5, 6, 7], [CONTEXT] * 4)], 3, -200, 0, 8, max_length=3, side="left")


def test_another_llms_tokenizer_is_refused(tokenizer):
    check_vocabulary(tokenizer, toy_world.VOCABULARY)
    with pytest.raises(ValueError, match="ids up to 81, the LLM has 80 embeddings"):
        check_vocabulary(tokenizer, 80)


def test_a_token_without_a_row_pads_nothing():
    """LLaVA's tokenizer pads with one that Vicuna does not have."""
    tokenizer = llama2(False)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_vocabulary(tokenizer, size)
    assert tokenizer.pad_token == tokenizer.unk_token


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


# ---- the LLM's own chat template ---------------------------------------------------------------------------

def chat_tokenizer(family):
    """Of one of FAMILIES, or "mistral"."""
    if family == "mistral":
        return test_ids.llama2("first", MISTRAL)
    family, is_trimmed = family.removesuffix(", trimmed"), family.endswith(", trimmed")
    if family == "llama3":
        return llama3(is_trimmed=is_trimmed)
    return chatml(THINKING, is_trimmed=is_trimmed) if family == "thinking" else chatml(is_trimmed=is_trimmed)


FAMILIES = ["chatml", "chatml, trimmed", "llama3", "llama3, trimmed", "thinking"]
CHAT_TURNS = [("human", "<image>\nWhat color is the shape?"), ("gpt", "It is red."),
              ("human", "Is it a circle?"), ("gpt", "A ring, I see.")]


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_chat_labels_are_the_answers_and_their_ends(family):
    """For each kind of tokenizer: the ids are those of the rendered chat, the supervised ones decode to the
    answers."""
    tokenizer = chat_tokenizer(family)
    ids, roles = encode("chat", CHAT_TURNS, tokenizer)
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
    found, roles = encode("chat", text, tokenizer, False)
    if family != "mistral":  # SentencePiece's spaces depend on where a text begins
        last = len(found) - 1
        assert roles[last] == data.END
        assert found == tokenizer(whole, add_special_tokens=False).input_ids[: last + 1]
    assert found.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("caption", ["A red circle", "A red circle.", "A red circle.\n", "It is!"])
@grades("token_roles")
def test_plain_labels_where_a_stop_and_a_newline_are_one_token(family, caption):
    tokenizer = chat_tokenizer(family)
    ids, roles = encode("plain", [("human", data.IMAGE), ("gpt", caption)], tokenizer)
    start = roles.index(data.ANSWER)
    assert ids[start - 1] == data.IMAGE_MARKER and set(roles[start:]) <= {data.ANSWER, data.END}, (
        "all behind the image carries loss, and nothing before it")
    assert ids[start:] == tokenizer(caption + "\n", add_special_tokens=False).input_ids
    assert (roles[-1] == data.END) == (caption != "A red circle."), "a token for both is the answer's"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_stands_at_the_first_position(family):
    tokenizer = chat_tokenizer(family)
    ids, roles = encode("plain", [("human", data.IMAGE), ("gpt", "A red circle.")], tokenizer)
    bos = tokenizer("").input_ids
    assert ids[: ids.index(data.IMAGE_MARKER)] == (bos or tokenizer("\n", add_special_tokens=False).input_ids)
    assert roles[0] == data.CONTEXT


@pytest.mark.parametrize("answer", ["\nA red circle.", "k", "think", " A\n\nred \n"])
def test_chat_answers_lose_the_space_around_them(answer):
    for family in FAMILIES:
        tokenizer = chat_tokenizer(family)
        ids, roles = encode("chat", [("human", "What?"), ("gpt", answer)], tokenizer, False)
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
        assert said == answer.strip() + tokenizer.eos_token


@pytest.mark.parametrize("added, bos", [("<s> $A </s>", [1]), ("$A </s>", []), ("<s> $A", [1])])
def test_only_bos_opens_a_row_whatever_the_tokenizer_adds(added, bos):
    tokenizer = llama2(False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<s>", 1), ("</s>", 2)])
    ids, roles = encode("v1", [("human", "What?"), ("gpt", "Red.")], tokenizer, False)
    assert ids[: len(bos) + 1] == [*bos, HEAD[1][1][0]] and ids.count(2) == 1 and roles[-1] == END


def test_a_question_ends_with_what_training_put_before_the_answer():
    tokenizer = chat_tokenizer("thinking")
    asked, _ = encode("chat", CHAT_TURNS[:1], tokenizer)
    ids, roles = encode("chat", CHAT_TURNS, tokenizer)
    assert ids[: roles.index(ANSWER)] == asked
    assert tokenizer.decode(asked[asked.index(IMAGE_MARKER) + 1 :]).endswith(f"assistant\n{EMPTY}")


BORDERS = [  # pieces; "end" is the tokenizer's own end token
    [("What is 😀", CONTEXT), (" 😀 é", ANSWER), ("end", END)],
    [("😀", CONTEXT), ("😀", ANSWER), ("\n", END)],
    [("é:", CONTEXT), ("  red ", ANSWER), ("end", END), ("B:", CONTEXT), (" 5😀", ANSWER), ("end", END)],
    [("", CONTEXT), ("a red circle", ANSWER), ("\n", END)],
]


@pytest.mark.parametrize("pieces", BORDERS)
@pytest.mark.parametrize("name", ["llama2", "llama2, legacy", *FAMILIES])
@grades("token_roles")
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
    assert found == [piece for piece in pieces if piece[0]], (
        "a piece has lost a token at its border, or has one of another: a character may take several tokens")


@grades("token_roles")
def test_roles_follow_where_a_token_covers_no_character():
    """As some tokenizers tell of a space that they add: at a start, behind a special token, at an end."""
    tokens = SimpleNamespace(tokens=["▁", "5", "</s>", "▁", "6", "▁"],
                             offsets=[(0, 0), (0, 1), (1, 5), (5, 5), (5, 6), (6, 6)])
    roles = data.token_roles(tokens, "5</s>6", [ANSWER, END, END, END, END, CONTEXT])
    assert roles == [ANSWER, ANSWER, END, CONTEXT, CONTEXT, CONTEXT], (
        "a token that covers no character goes with the next one, or at the end with the last")


@pytest.mark.parametrize("pieces", BORDERS)
@grades("token_roles")
def test_trimmed_places_of_tokens_change_no_label(pieces):
    trimmed, plain = chat_tokenizer("chatml, trimmed"), chat_tokenizer("chatml")
    places = [t("What is red", return_offsets_mapping=True).offset_mapping for t in (trimmed, plain)]
    assert places == [[(0, 4), (5, 7), (8, 11)], [(0, 4), (4, 7), (7, 11)]]  # or nothing is tested here
    assert data.tokenise(pieces, trimmed, False) == data.tokenise(pieces, plain, False), (
        "a space that a tokenizer leaves out of a token's place belongs to the token all the same")


CONTENT = "{% for m in messages %}{{ m.content }}"


@pytest.mark.parametrize("template, message", [
    (f"{{{{ messages | length }}}}{CONTENT}{{{{ eos_token }}}}{{% endfor %}}", "rewrites earlier turns"),
    (f"{CONTENT.replace('m.content', 'm.content[0].text')}{{% endfor %}}", "drops a question"),
    (f"{CONTENT}\n{{% endfor %}}", "does not end an answer"),
    (None, "no chat template")])
def test_chat_templates_that_fit_no_labels_are_refused(template, message):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        data.chat(tokenizer)


@pytest.mark.parametrize("size", [(2, 10000), (10000, 2), (1, 65500), (400, 1), (1, 400)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_strips_take_no_gigabytes(size, fit, monkeypatch):
    """No picture on the way has more pixels than the limit, whatever its sides."""
    largest, resize, new = [], Image.Image.resize, Image.new

    def seen(make):
        def made(*args, **kwargs):
            image = make(*args, **kwargs)
            largest.append(image.width * image.height)
            return image

        return made

    strip = new("RGB", size, "red")
    monkeypatch.setattr(Image.Image, "resize", seen(resize))
    monkeypatch.setattr(Image, "new", seen(new))
    assert data.preprocess(strip, ViTConfig(), fit).shape == (3, 336, 336)
    assert max(largest) <= data.MAX_PIXELS
