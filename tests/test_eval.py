"""The benchmarks' rules as tables, the denominators, and the diagnostics against plain loops."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
import losses
from projector import VLM


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("B. New Hampshire", "B"), ("The answer is B.", "B"), ("red. The answer is B.", "B"),
    ("The answer is B !", "B"),  # the official pattern's last dot is any character
    ("B.", None), ("(B)", None), ("b", None), ("B) x", None), ("Answer: B", None), ("The answer is B", None),
    ("The answer is A. The answer is B.", None), ("", None), ("D", None), ("The answer is E.", None), ("E. x", None),
    ("A. The answer is B.", "A"),
])
def test_parse_choice(text, choice):
    assert evaluation.parse_choice(text, num_choices=3) == choice


def test_an_unreadable_answer_is_wrong_and_stays_in_the_denominator():
    questions = [{"id": str(i), "image": "x" if i < 3 else None, "num_choices": 2, "answer": "A"} for i in range(5)]
    scores = evaluation.score_scienceqa(questions, ["A", None, None, "A", "B"])
    assert scores == {"accuracy": 40.0, "accuracy_img": 33.33, "accuracy_txt": 50.0, "questions": 5,
                      "questions_img": 3, "unparsed": 2}


@pytest.mark.parametrize("text, pope, mme", [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("no, it is", "no", "no"), ("There is not", "no", None),
    ("Yes. No", "yes", "yes"), ("nothing", "yes", "no"), ("", "yes", None), ("perhaps yes", "yes", None),
])
def test_yes_or_no(text, pope, mme):
    assert evaluation.parse_pope(text) == pope and evaluation.parse_mme(text) == mme


def test_pope_scores_f1_of_yes_by_category():
    gold, said = ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]
    questions = [{"answer": g, "category": "random"} for g in gold] + [{"answer": "yes", "category": "popular"}]
    scores = evaluation.score_pope(questions, said + ["yes"])
    assert scores["categories"]["random"] == {"f1": 50.0, "accuracy": 50.0, "yes": 50.0}
    assert scores["f1"] == 75.0 and scores["categories"]["popular"]["f1"] == 100.0


def test_mme_adds_accuracy_and_pairs():
    questions = [{"answer": a, "category": c} for c in ("color", "code") for a in ("yes", "no", "yes", "no")]
    scores = evaluation.score_mme(questions, ["yes", "no", "yes", None, "no", "no", "no", "yes"])
    assert scores["categories"] == {"color": 125.0, "code": 25.0}  # 3 of 4 and 1 of 2 pairs; 1 of 4 and none
    assert (scores["perception"], scores["others"], scores["accuracy"], scores["accuracy_plus"]) == (125, 25, 50, 25)


def test_a_llava_folder_is_asked_in_vicunas_form(clip_folder, llama_folder, tmp_path):
    """Not in its own chat template, which takes pictures where our marker would be lost. Its answers end where its
    tokenizer says, too."""
    VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu").export(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    vlm, tokenizer, config = evaluation.load_run(tmp_path, torch.device("cpu"))
    assert tokenizer.chat_template and config["template"] == "v1"
    assert vlm.llm.config.eos_token_id == [7, tokenizer.eos_token_id]
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    question = {"id": 1, "prompt": "<image>\nWhat color is the shape?", "image": tmp_path / "x.png"}
    assert len(evaluation.ask(vlm, tokenizer, [question], config["template"], 4)) == 1


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        evaluation.last_run()


# ---- pictures against captions -------------------------------------------------------------------------------------


def test_retrieval_counts_equal_captions_once_and_any_of_their_pictures():
    keys = torch.tensor([5, 6, 5, 7])
    text = torch.eye(3)[[0, 1, 0, 2]]
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0.8, 0.6]])  # rows 2 and 3 resemble caption 6 most
    scores = evaluation.score_retrieval(image, text, keys)
    assert scores["image_to_text_r1"] == 50.0 and scores["text_to_image_r1"] == 100.0
    assert scores["image_to_text_r5"] == scores["text_to_image_r5"] == 100.0


def test_gap_against_plain_formulas():
    image, text, keys = losses.unit(torch.randn(6, 4)), torch.randn(6, 4), torch.tensor([1, 2, 3, 4, 1, 5])
    scores, t = evaluation.score_gap(image, text, keys), losses.unit(text)
    others = [float(image[i] @ t[j]) for i in range(6) for j in range(6) if keys[i] != keys[j]]
    pairs = [(image[i] - image[j]).square().sum() for i in range(6) for j in range(i)]
    assert scores["negative_cosine"] == pytest.approx(sum(others) / len(others), abs=1e-4)
    assert scores["alignment"] == pytest.approx(2 - 2 * scores["positive_cosine"], abs=3e-4)  # |v-t|^2 of unit vectors
    assert scores["uniformity_image"] == pytest.approx(
        math.log(sum(torch.exp(-2 * d).item() for d in pairs) / len(pairs)), abs=1e-4)
    assert scores["centroid_distance"] == pytest.approx((image.mean(0) - t.mean(0)).norm().item(), abs=1e-4)


def test_patches_against_words(clip_folder, llama_folder):
    vlm = VLM.from_towers(clip_folder, llama_folder, "linear")
    patches, embeds = torch.randn(2, 16, 32), torch.randn(2, 3, 32)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = evaluation.score_tokens(vlm, [(patches, embeds, mask)])
    words = vlm.llm.model.embed_tokens.weight.detach()
    nearest = [min((patch - word).norm().item() for word in words) for row in patches for patch in row]
    assert scores["nearest_word_distance"] == pytest.approx(sum(nearest) / len(nearest), abs=1e-3)
    tacs = []
    for row, tokens in zip(patches, (embeds[0], embeds[1, :1])):
        best = sorted(max(F.cosine_similarity(patch, token, dim=0).item() for token in tokens) for patch in row)
        tacs.append(sum(best[-10:]) / 10)
    assert scores["tacs"] == pytest.approx(sum(tacs) / 2, abs=1e-4)


def test_word_maps_are_cosines_in_reading_order(clip_folder, llama_folder):
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), data.load_tokenizer(llama_folder)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    maps = evaluation.word_maps(vlm, tokenizer, picture, "a red circle")
    assert [word for word, _ in maps] == ["a", "red", "circle"] and maps[0][1].shape == (4, 4)
    patches = vlm.encode(data.preprocess(picture, 32, "crop")[None])[0]
    red = vlm.llm.embed(torch.tensor(tokenizer("red", add_special_tokens=False).input_ids))[0]
    assert maps[1][1][1, 2] == pytest.approx(F.cosine_similarity(patches[6], red, dim=0).item(), abs=1e-6)
