"""The benchmarks' folders, their rules as tables, the denominators; asking, and where an answer ends;
retrieval."""

import json

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
from lab import toy_world
from projector import VLM

# ---- ScienceQA, POPE, MME ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("B. New Hampshire", "B"), ("The answer is B.", "B"), ("red. The answer is B.", "B"),
    ("The answer is B !", "B"),  # the official pattern's last dot is any character
    ("B.", None), ("(B)", None), ("b", None), ("B) x", None), ("Answer: B", None), ("The answer is B", None),
    ("The answer is A. The answer is B.", None), ("", None), ("D", None), ("The answer is E.", None),
    ("E. x", None), ("A. The answer is B.", "A"),
])
def test_parse_choice(text, choice):
    assert evaluation.parse_choice(text, {"num_choices": 3}) == choice


def test_an_unreadable_answer_is_wrong_and_stays_in_the_denominator():
    questions = [{"image": "x" if i < 3 else None, "answer": "A"} for i in range(5)]
    scores = evaluation.score_scienceqa(questions, ["A", None, None, "A", "B"])
    assert scores == {"accuracy": 40.0, "accuracy_img": 33.33, "accuracy_txt": 50.0, "questions": 5,
                      "questions_img": 3, "unparsed": 2}


@pytest.mark.parametrize("text, pope, mme", [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("no, it is", "no", "no"), ("There is not", "no", None),
    ("Yes. No", "yes", "yes"), ("nothing", "yes", "no"), ("", "yes", None), ("perhaps yes", "yes", None),
])
def test_yes_or_no(text, pope, mme):
    assert evaluation.parse_pope(text) == pope and evaluation.parse_mme(text) == mme


def test_pope_and_mme_folders(toy):
    questions = evaluation.load_pope(toy / "POPE")
    assert len(questions) == 20 and all(q["image"].exists() for q in questions)
    assert [q["answer"] for q in questions[:4]] == ["yes", "no", "yes", "no"]
    prompt = questions[0]["prompt"]
    assert prompt.startswith("<image>\nIs there a ") and prompt.endswith(data.SHORT_ANSWER)
    assert evaluation.load_pope(toy / "POPE", "random") == questions
    pairs = evaluation.load_mme(toy / toy_world.MME)
    assert len(pairs) == 40 and {q["category"] for q in pairs} == set(toy_world.VALUES)
    for first, second in zip(pairs[::2], pairs[1::2]):
        assert (first["answer"], second["answer"]) == ("yes", "no")
        assert first["image"] == second["image"] and first["image"].suffix == ".png"
        assert first["image"].exists()
    assert len(evaluation.load_mme(toy / toy_world.MME, "color")) == 10


def test_mme_has_another_layout_two_spaces_and_pictures_with_other_endings(tmp_path):
    (tmp_path / "scene/images").mkdir(parents=True)
    (tmp_path / "scene/questions_answers_YN").mkdir()
    (tmp_path / "scene/images/7.jpg").touch()
    (tmp_path / "scene/questions_answers_YN/7.txt").write_text(
        "Is it a hall?  Please answer yes or no.\tYes\nIs it a bar? Please answer yes or no.\tNo\n")
    first, _ = evaluation.load_mme(tmp_path)
    assert first["prompt"] == f"<image>\nIs it a hall?{data.SHORT_ANSWER}" and first["image"].name == "7.jpg"


@pytest.mark.parametrize("name, text, message", [
    ("x_pope_random.json", '{"question_id": 1, "image": "a.png", "text": "?"}\n',
     "line 1 is not a POPE question"),
    ("color/a.txt", "Is it red?\tYes\n", "not two lines")])
def test_bad_yes_no_files(tmp_path, name, text, message):
    (tmp_path / "color").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        (evaluation.load_pope if "pope" in name else evaluation.load_mme)(tmp_path)


@pytest.mark.parametrize("load", [evaluation.load_pope, evaluation.load_mme])
def test_a_folder_without_questions_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}: no "):
        load(tmp_path)


def test_pope_scores_f1_of_yes_by_category():
    gold, said = ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]
    questions = [{"answer": answer, "category": "random"} for answer in gold]
    questions += [{"answer": "yes", "category": "popular"}]
    scores = evaluation.score_pope(questions, said + ["yes"])
    assert scores["categories"]["random"] == {"f1": 50.0, "accuracy": 50.0, "yes": 50.0}
    assert scores["f1"] == 75.0 and scores["categories"]["popular"]["f1"] == 100.0


def test_mme_adds_accuracy_and_pairs():
    questions = [{"answer": a, "category": c} for c in ("color", "code") for a in ("yes", "no", "yes", "no")]
    scores = evaluation.score_mme(questions, ["yes", "no", "yes", None, "no", "no", "no", "yes"])
    assert scores["categories"] == {"color": 125.0, "code": 25.0}  # 3 of 4 and 1 of 2 pairs; 1 of 4 and none
    assert (scores["perception"], scores["others"]) == (125, 25)
    assert (scores["accuracy"], scores["accuracy_plus"]) == (50, 25)


# ---- asking ------------------------------------------------------------------------------------------------


@pytest.fixture
def llava_folder(clip_folder, llama_folder, tmp_path):
    """In transformers' format: its own chat template takes pictures where our marker would be lost, and its
    LLM's config has another end token than its tokenizer."""
    VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu").export(tmp_path)
    template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    return tmp_path


@pytest.mark.parametrize("said, tokens", [("of the config", 1), ("of the tokenizer", 1), ("any other", 4)])
def test_a_llava_folder_is_asked_in_vicunas_form(llava_folder, monkeypatch, said, tokens):
    """Not in its own. Its answers end with either end token."""
    vlm, tokenizer, config = evaluation.load_run(llava_folder, torch.device("cpu"))
    assert tokenizer.chat_template and config["template"] == "v1" and vlm.llm.config.eos_token_id == 7
    token, drawn = {"of the config": 7, "of the tokenizer": tokenizer.eos_token_id, "any other": 9}[said], []

    def choose(logits, temperature, top_p):
        drawn.append(token)
        return torch.full((len(logits),), token)

    monkeypatch.setattr("llm.choose", choose)
    question = {"id": 1, "prompt": "<image>\nWhat color is the shape?", "image": llava_folder / "x.png"}
    answer, = evaluation.ask(vlm, tokenizer, [question], config["template"], 4)
    assert len(drawn) == tokens
    assert answer == tokenizer.decode([token] * tokens, skip_special_tokens=True).strip()


def test_no_run_yet(tmp_path, monkeypatch):
    """As a function, and as one line of the script."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        evaluation.last_run()
    with pytest.raises(SystemExit, match="^eval.py: no run to score yet.*$"):
        evaluation.main(["--bench", "scienceqa"])


@pytest.mark.parametrize("argv", [[], ["--bench", "pope", "--ask", "a.png", "What?"], ["--bench", "vqa"],
                                  ["--ask", "a.png", "What?", "--temperature", "-1"]])
def test_bad_options_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main(argv)
    assert end.value.code == 2 and ": error: " in capsys.readouterr().err


# ---- pictures against captions -----------------------------------------------------------------------------


def test_retrieval_counts_equal_captions_once_and_any_of_their_pictures():
    keys = torch.tensor([5, 6, 5, 7])
    text = torch.eye(3)[[0, 1, 0, 2]]
    # the pictures 2 and 3 resemble caption 6 most
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0.8, 0.6]])
    scores = evaluation.score_retrieval(image, text, keys)
    assert scores["image_to_text_r1"] == 50.0 and scores["text_to_image_r1"] == 100.0
    assert scores["image_to_text_r5"] == scores["text_to_image_r5"] == 100.0
