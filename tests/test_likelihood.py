"""Multiple choice by the likelihood of the choices' words."""

import json

import pytest
import torch

import data
from benchmarks.questions import SHORT_ANSWER
from lab import likelihood
from projector import VLM


@pytest.fixture(scope="module")
def vlm(clip_folder, llama_folder):
    torch.manual_seed(0)
    return VLM.from_towers(clip_folder, llama_folder)


def test_scores_are_the_mean_of_each_option_alone(vlm, tokenizer, toy):
    """Of questions with a picture and without one: one option at a time, unpadded, position by position."""
    questions = likelihood.load_problems(toy / "ScienceQA", "test")[:12]
    assert {bool(question["image"]) for question in questions} == {True, False}
    means = likelihood.mean_likelihoods(vlm, tokenizer, questions, "v1")
    for question, row, choice in zip(questions, means, likelihood.choose(vlm, tokenizer, questions, "v1")):
        expected = [plainly(vlm, tokenizer, question, option) for option in question["options"]]
        assert row == pytest.approx(expected, abs=1e-4)
        assert choice == "ABCDE"[row.index(max(row))]


@torch.no_grad()
def plainly(vlm, tokenizer, question, option):
    turns, c = [("human", question["prompt"]), ("gpt", option)], vlm.vit.config
    ids, roles = data.tokenise(data.v1(turns, tokenizer)[:-1], tokenizer, bool(question["image"]))
    pixels = data.preprocess(data.load_image(question["image"]), c, "pad") if question["image"] else None
    sample = {"ids": ids, "roles": roles, "pixels": pixels, "name": "one"}
    m = data.collate([sample], vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id, c.image_size)
    likely = vlm(m["ids"], m["pixels"])[0].log_softmax(-1)  # (S, V)
    said = [likely[t - 1, token] for t, token in enumerate(m["labels"][0].tolist()) if token != data.IGNORE]
    return torch.stack(said).mean().item()


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
