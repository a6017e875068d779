"""LLaVA's ScienceQA rule as a table, and the denominators."""

import pytest

import eval as evaluation


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("B. New Hampshire", "B"), ("The answer is B.", "B"), ("red. The answer is B.", "B"),
    ("The answer is B !", "B"),  # the official pattern's last dot is any character
    ("B.", None), ("(B)", None), ("b", None), ("B) x", None), ("Answer: B", None), ("The answer is B", None),
    ("The answer is A. The answer is B.", None), ("", None), ("D", None), ("The answer is E.", None), ("E. x", None),
    ("A. The answer is B.", "A"),
])
def test_parse_choice(text, choice):
    assert evaluation.parse_choice(text, num_choices=3) == choice


def test_a_missing_answer_is_wrong_and_stays_in_the_denominator():
    questions = [{"id": str(i), "image": "x" if i < 3 else None, "num_choices": 2, "answer": "A"} for i in range(5)]
    scores = evaluation.score_scienceqa(questions, {"0": "A", "1": "hm", "3": "A"})
    assert scores == {"accuracy": 40.0, "accuracy_img": 33.33, "accuracy_txt": 50.0, "questions": 5,
                      "questions_img": 3, "missing": 2, "unparsed": 1}


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        evaluation.last_run()
