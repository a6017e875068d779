"""Which option is the likeliest: by letters, and by whole texts."""

import pytest
import torch
from test_benchmarks import root  # noqa: F401 (a fixture)

import data
import eval as evaluation
from benchmarks import BENCHES, load_questions
from benchmarks.likelihood import answers_of
from benchmarks.predictions import key_of_answer
from benchmarks.questions import SHORT_ANSWER, closed, without_picture
from lab.score import load_problems
from projector import VLM


@pytest.fixture(scope="module")
def vlm(clip_folder, llama_folder):
    torch.manual_seed(0)
    return VLM.from_towers(clip_folder, llama_folder)


def test_an_option_is_said_as_itself_or_in_its_words(tokenizer):
    question = {"id": 1, "prompt": "What is it?", "image": None, "options": ["yes", "no"]}
    form = data.form_of("v1", tokenizer)
    texts = ["red circle", "red"]
    for asked, said in ((question, ["Yes", "No"]), (question | {"texts": texts}, texts)):
        assert [tokenizer.decode(ids) for ids in answers_of(tokenizer, form, asked)] == said


def test_a_choice_without_a_text_is_named(tokenizer):
    form = data.form_of("v1", tokenizer)._replace(lead="")
    question = {"id": "q7", "prompt": "What?", "image": None, "options": ["A", "B"], "texts": ["red", ""]}
    with pytest.raises(ValueError, match="^question 'q7': option B has no text$"):
        answers_of(tokenizer, form, question)


def test_the_likeliest_words_are_those_of_a_plain_loop(vlm, tokenizer, toy):
    """Of questions with a picture and without one, with texts of one to three tokens: one text at a time,
    unpadded, position by position. An option is as likely as the mean of its tokens."""
    questions = load_problems(toy / "ScienceQA", "test")[:12]
    assert {bool(question["image"]) for question in questions} == {True, False}
    for question in questions:
        question["texts"] = [" ".join(n % 3 * ["red"] + [text]) for n, text in enumerate(question["choices"])]
    choices = evaluation.ask_likeliest(vlm, tokenizer, questions, "v1", batch=5)
    assert len(set(choices)) > 2
    for question, choice in zip(questions, choices):
        expected = [plainly(vlm, tokenizer, question, text) for text in question["texts"]]
        assert choice == question["options"][expected.index(max(expected))]


@torch.no_grad()
def plainly(vlm, tokenizer, question, option):
    prompt = f"{data.SYSTEM} USER: {question['prompt']} ASSISTANT:"
    pixels = torch.zeros(1, 3, 32, 32)
    if question["image"]:
        before, after = prompt.split(data.IMAGE)
        ids = tokenizer(before).input_ids + [vlm.image_token_id] * vlm.num_image_tokens
        ids += tokenizer(after, add_special_tokens=False).input_ids
        pixels = data.preprocess(data.load_image(question["image"]), vlm.vit.config, "pad")[None]
    else:
        ids = tokenizer(prompt).input_ids
    said = tokenizer(option, add_special_tokens=False).input_ids
    log_p = vlm(torch.tensor([ids + said]), pixels)[0].log_softmax(-1)  # (S, V)
    return sum(log_p[len(ids) - 1 + i, token].item() for i, token in enumerate(said)) / len(said)


@pytest.mark.parametrize("name", ["scienceqa", "seed", "mmbench", "mmbench-cn", "mmmu", "pope", "gqa"])
def test_a_question_by_words_names_no_choice(root, name):
    """It is asked openly, with its picture or without; yes and no are no words that it could name."""
    questions = load_questions(name, root / BENCHES[name].folder)
    asked = closed(questions, "words")
    assert bool(asked) == (name not in ("pope", "gqa"))
    by_name = {question["id"]: question for question in questions}
    for question in asked:
        lettered = by_name[question["id"]]
        assert len(question["texts"]) == len(question["options"])
        assert all(text in lettered["prompt"] for text in question["texts"])
        assert question["prompt"].endswith(SHORT_ANSWER) and "A. " not in question["prompt"]
        start = question["prompt"].removesuffix(SHORT_ANSWER)
        assert lettered["prompt"].startswith(start) and bool(question["image"]) == (data.IMAGE in start)
        assert key_of_answer(question) != key_of_answer(question | {"texts": ["other"]})  # asked anew
        blind, = closed([without_picture(lettered)], "words")
        assert blind["prompt"] == question["prompt"].removeprefix(f"{data.IMAGE}\n")


def test_spaces_around_a_choice_are_none_of_its_words():
    question = {"image": None, "open": "What is it?", "choices": [" red", "blue "]}
    assert closed([question], "words")[0]["texts"] == ["red", "blue"]
