"""Which option is the likeliest: by the token that tells letters apart, and by whole texts."""

import json

import pytest
import torch

import data
from benchmarks.likelihood import split_options
from benchmarks.questions import SHORT_ANSWER
from lab import likelihood
from projector import VLM


@pytest.fixture(scope="module")
def vlm(clip_folder, llama_folder):
    torch.manual_seed(0)
    return VLM.from_towers(clip_folder, llama_folder)


def test_letters_differ_in_one_token(tokenizer):
    """What stands before it is the open question; a single option has nothing to differ from."""
    question = {"prompt": "What color is the shape?", "image": None, "options": ["A", "B", "C"]}
    form = data.form_of("v1", tokenizer)
    ids, tokens = split_options(tokenizer, form, question)
    assert ids == data.encode([("human", question["prompt"])], form, tokenizer, False)[0]
    assert [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(tokens)] == ["A", "B", "C"]
    alone, (token,) = split_options(tokenizer, form, question | {"options": ["B"]})
    assert [*alone, token] == data.encode(
        [("human", question["prompt"]), ("gpt", "B")], form, tokenizer, False)[0]


def test_options_that_begin_alike_differ_further_on(tokenizer):
    question = {"prompt": "Which?", "image": None, "options": ["red circle", "red square"]}
    ids, tokens = split_options(tokenizer, data.form_of("v1", tokenizer), question)
    prompt, _ = data.encode([("human", "Which?")], data.form_of("v1", tokenizer), tokenizer, False)
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)  # also what both begin with
    assert [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(tokens)] == ["circle", "square"]


def test_the_mean_of_each_text_is_that_of_it_alone(vlm, tokenizer, toy):
    """Of questions with a picture and without one: one text at a time, unpadded, position by position."""
    questions = likelihood.load_problems(toy / "ScienceQA", "test")[:12]
    assert {bool(question["image"]) for question in questions} == {True, False}
    for question, choice in zip(questions, likelihood.choose(vlm, tokenizer, questions, "v1")):
        row = likelihood.mean_log_likelihoods(vlm, tokenizer, "v1", question, question["options"])
        expected = [plainly(vlm, tokenizer, question, option) for option in question["options"]]
        assert row == pytest.approx(expected, abs=1e-4)
        assert choice == "ABCDE"[row.index(max(row))]


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


def test_the_question_names_no_choice(toy):
    question = likelihood.load_problems(toy / "ScienceQA", "test")[0]
    assert question["prompt"].startswith(f"{data.IMAGE}\n") and "A." not in question["prompt"]
    assert question["prompt"].endswith(SHORT_ANSWER)
    assert question["num_choices"] == len(question["options"])


def test_a_run_is_scored_and_a_missing_folder_is_one_line(vlm, toy, tmp_path, capsys):
    vlm.save(tmp_path / "run", {"template": "v1"}, with_llm=False)
    likelihood.main([str(tmp_path / "run"), "--data", str(toy / "ScienceQA"), "--split", "val"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["questions"] == 40 and {"all", "color", "shape", "size", "place"} <= line.keys()
    assert len(json.loads((tmp_path / "run/likelihood.json").read_text())["predictions"]) == 40
    with pytest.raises(SystemExit, match="lab.likelihood: .*no such file"):
        likelihood.main([str(tmp_path / "run"), "--data", str(tmp_path / "none")])
