"""The benchmarks: their rules as tables, their scores and errors, the layouts of their files, bad files."""

import csv
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from layouts import write_all

import data
from benchmarks import (BENCHES, check, gqa, load_questions, mmbench, mme, mmmu, pope, scienceqa, seed,
                        textvqa, vqa)
from benchmarks.predictions import read_answers
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER, without_picture
from benchmarks.score import score_accuracy, score_floors, scores_and_errors, standard_errors
from lab import toy_world


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with every benchmark."""
    return write_all(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def copy(root, tmp_path):
    """`copy(name)`: a benchmark's folder that may be spoilt."""
    return lambda name: shutil.copytree(root / BENCHES[name].folder, tmp_path / BENCHES[name].folder)


def edit_json(file, change):
    """The file with its content changed by `change(content)`."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---- rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("B. New Hampshire", "B"), ("The answer is B.", "B"), ("red. The answer is B.", "B"),
    ("The answer is B !", "B"),  # the official pattern's last dot is any character
    ("B.", None), ("(B)", None), ("b", None), ("B) x", None), ("Answer: B", None), ("The answer is B", None),
    ("The answer is A. The answer is B.", None), ("", None), ("D", None), ("The answer is E.", None),
    ("E. x", None), ("A. The answer is B.", "A"),
])
def test_scienceqa_reads_a_letter(text, choice):
    assert scienceqa.parse(text, {"options": ["A", "B", "C"]}) == choice


@pytest.mark.parametrize("text, by_pope, by_mme", [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("no, it is", "no", "no"), ("There is not", "no", None),
    ("Yes. No", "yes", "yes"), ("nothing", "yes", "no"), ("", "yes", None), ("perhaps yes", "yes", None),
])
def test_yes_or_no(text, by_pope, by_mme):
    assert pope.parse(text) == by_pope and mme.parse(text) == by_mme


@pytest.mark.parametrize("text, choice", [("B", "B"), ("B.", None), ("b", None), ("D", None), ("", None)])
def test_seed_wants_the_letter_and_nothing_else(text, choice):
    assert seed.parse(text, {"options": ["A", "B", "C"]}) == choice


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("(B).", "B"), ("B: blue", "B"), ("Answer :B", "B"),
    ("**B**", "B"), ("[B]", "B"), ("B;", "B"), ("The answer is **B**.", "B"), ("It is B I think", "B"),
    ("A dog and a cat B", None), ("A or B, blue", "B"),  # two letters: the choice's text decides
    ("A", "A"), ("it is A", "A"), ("A small shape there", "A"), ("B.C", None), ("AB", None),
    ("the blue one", "B"), ("red or blue", None), ("E", None), ("D", None), ("", None), ("b", None),
    ("Z. It is red", None), ("Z, so B", "B"), ("Cannot determine the answer keyed A", None),  # it refuses
    ("Sorry, I can't help with images of people yet. It is red", None),
])
def test_mmbench_looks_for_a_letter_then_for_a_choice(text, choice):
    question = {"options": ["A", "B", "C"], "choices": ["Red", "blue", "green"]}
    assert mmbench.parse(text, question) == choice


@pytest.mark.parametrize("text, said", [("Red.", "red"), ("NO..", "no"), ("red car", "red car"), ("", "")])
def test_gqa_wants_the_very_answer(text, said):
    assert gqa.parse(text) == said


@pytest.mark.parametrize("text, said", [
    ("The Dog.", "dog"), ("two dogs", "2 dogs"), ("none", "0"), ("an apple a day", "apple day"),
    ("3.5", "3.5"), ("u.s.", "us"), ("1,000", "1000"), ("what?", "what"), ("it's", "it 's"),
    ("dont", "don't"), ("couldn'tve", "couldn't've"), ("yall'd've", "y'all'd've"), ("let's", "let 's"),
    ("somebody'd", "somebodyd"), ("x/y", "x y"), ("x/y z/ w", "xy z w"),  # one beside a space: all go
    ("red-blue", "red blue"), ("red - blue - green-gold", "red blue greengold"), ("(x)", "x"),
    ("one\ntwo\tthree", "1 2 3"), ("", ""),
])
def test_vqa_normalises(text, said):
    assert vqa.normalise(text) == said


@pytest.mark.parametrize("same, percent", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_vqa_accuracy_leaves_each_of_ten_answers_out(same, percent):
    question = {"id": 1, "image": "x", "answer": ["2"] * same + ["red"] * (10 - same)}
    choice = vqa.normalise("Two.")
    by_hand = []
    for left_out in range(10):
        others = question["answer"][:left_out] + question["answer"][left_out + 1 :]
        by_hand.append(min(1, others.count("2") / 3))
    score = textvqa.score([question], [choice])["accuracy"]
    assert score == pytest.approx(10 * sum(by_hand)) == pytest.approx(percent)


@pytest.mark.parametrize("text, choice", [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("It is B", "B"), ("(A) or (B)", "B"), ("(B) or (A)", "A"),
    ("(A), not B or C", "A"),  # brackets come first
    ("A or B", "B"), ("the colour that I see is Blue car", "B"), ("blue car", None),  # of two words only
    ("first red then the blue car then red", "A"),  # the last one told
    ("B) x", None), ("b", None), ("", None), ("F", None),
])
def test_mmmu_takes_the_last_letter_or_choice(text, choice):
    question = {"options": ["A", "B", "C"], "choices": ["red", "blue car", "green"]}
    assert mmmu.parse(text, question) == choice


@pytest.mark.parametrize("text, answers, is_right", [
    ("2,000", ["2000"], True), ("the answer is 3.14159", ["3.14"], True), ("x = 5", ["5"], True),
    ("-4", ["4"], False), ("1e3", ["1000"], True), ("Therefore Red.", ["red"], True),
    ("red", ["Red car"], False), ("it is a red car", ["red"], True), ("b", ["b"], True),
    ("ab", ["b"], False),  # a letter needs a space
    ("5 is 6\nso 7", ["6", "8"], True), ("5 is 6\nso 7", ["5"], False), ("", ["red"], False),
])
def test_mmmu_open_answers(text, answers, is_right):
    question = {"id": 1, "image": "x", "answer": answers, "category": "Math", "pictures": 1}
    score = mmmu.score([question], [mmmu.parse(text, question)])
    assert score["accuracy"] == 100 * is_right and score["unparsed"] == 0


def digits(text, at) -> int:
    """How many stand there."""
    return len(text) - at - len(text[at:].lstrip("0123456789"))


def is_word(letter) -> bool:
    return letter.isalnum() or letter == "_"


def with_commas(text, start):
    """The end of a number such as -1,234 that starts there, or None."""
    at = start + (text[start] == "-")
    count = digits(text, at)
    if not 1 <= count <= 3 or at == start and is_word(text[start - 1 : start]):
        return None
    end, at = None, at + count
    while text[at : at + 1] == "," and digits(text, at + 1) >= 3:
        at += 4
        if not is_word(text[at : at + 1]):
            end = at
    return end


def scientific(text, start):
    """The same for 1.5e-3."""
    at = start + (text[start] == "-")
    if not digits(text, at):
        return None
    at += digits(text, at)
    if text[at : at + 1] == "." and digits(text, at + 1):
        at += 1 + digits(text, at + 1)
    return exponent(text, at)


def exponent(text, at):
    if text[at : at + 1] not in ("e", "E"):
        return None
    at += 1 + (text[at + 1 : at + 2] in ("+", "-"))
    return at + digits(text, at) if digits(text, at) else None


def simple(text, start):
    """The same for 1.5, .5 and 15, of which no part is one of the others."""
    at = start + (text[start] == "-")
    point = at + digits(text, at)
    ends = []
    if text[point : point + 1] == "." and digits(text, point + 1):
        ends.append(point + 1 + digits(text, point + 1))
    if point > at and not is_word(text[point : point + 1]):
        ends.append(point)
    for end in ends:
        if exponent(text, end) is None and text[end : end + 1] not in (",", *"0123456789"):
            return end


def slow_candidates(text) -> set:
    """MMMU's rule for open answers, letter by letter."""
    text = text.strip().strip(".").lower()
    results = []
    lines = text.split("\n")
    for line in lines:
        words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
        words += ["="] * (line is lines[-1])
        ends = [line[line.rindex(word) + len(word) :].strip() for word in words if word in line]
        while len(ends) > 1:  # two by two: the second wins if it is shorter, or if the first is empty
            first, second, *others = ends
            ends = [second if not first or len(second) < len(first) else first, *others]
        results += [end for end in ends if end and end not in [*":,.!?;'"]]
    texts = results or [text]
    for result in [*texts]:
        for kind in (with_commas, scientific, simple):
            at = 0
            while at < len(result):
                end = kind(result, at)
                texts += [result[at:end]] if end else []
                at = end or at + 1
    return {candidate for found in texts for candidate in mmmu.normalised(found)}


def test_mmmu_reads_open_answers_as_a_slow_reading_of_its_rule():
    """Of random pieces. A line that ends with an announcing word, or "=", makes the rule forget an earlier
    one."""
    rng = random.Random(0)
    words = [*mmmu.ANNOUNCERS, *map(str.strip, mmmu.ANNOUNCERS), "=", "= ", "Red", "a"]
    signs = [*"\n\n\n..,:!?;' -"]
    numbers = "5 1,234 12,34 1.5 .5 -3 1e3 2.5E-4 1.25e3 x5 1,234,567 1234,567 3. 7_".split()
    pieces = words + signs + numbers
    answers = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(30000)]
    wrong = [answer for answer in answers if set(mmmu.read_candidates(answer)) != slow_candidates(answer)]
    assert wrong == []


def test_mmmu_looks_for_a_choice_with_its_spaces():
    question = {"options": ["A", "B"], "choices": ["red ", "blue"]}
    assert mmmu.parse("of the two I take blue, not red", question) == "A"


def test_mmmu_guesses_what_it_cannot_read_and_says_how_often():
    question = {"image": "x", "options": list("ABCD"), "answer": "A", "category": "Art", "pictures": 2}
    questions = [question | {"id": number} for number in range(400)]
    scores = mmmu.score(questions, [None] * 400)
    assert scores["unparsed"] == scores["questions_with_further_pictures"] == 400
    assert 15 < scores["accuracy"] < 35 and scores == mmmu.score(questions, [None] * 400)


# ---- scores ------------------------------------------------------------------------------------------------


def test_an_unreadable_answer_is_wrong_and_stays_in_the_denominator():
    questions = [{"id": i, "image": f"{i}" if i < 3 else None, "answer": "A"} for i in range(5)]
    scores = scienceqa.score(questions, ["A", None, None, "A", "B"])
    assert scores["accuracy"] == 40.0 and scores["accuracy_img"] == 33.33 and scores["accuracy_txt"] == 50.0
    assert (scores["questions"], scores["questions_img"], scores["questions_txt"]) == (5, 3, 2)
    assert scores["unparsed"] == 2


def test_a_question_without_a_category_is_in_none():
    questions = [{"id": i, "image": None, "answer": "A", "category": ["x", None][i]} for i in (0, 1)]
    scores = score_accuracy(questions, ["A", "A"])
    assert scores["categories"] == {"x": {"accuracy": 100, "questions": 1}} and scores["questions"] == 2


def test_the_official_split_of_scienceqa():
    rows = [("natural science", "grade2", "hint", "x.png"), ("social science", "grade6", "", "y.png"),
            ("language science", "grade7", "", None), ("language science", "grade12", "hint", None)]
    questions = [dict(zip(("subject", "grade", "hint", "image"), row), id=row, answer="A") for row in rows]
    scores = scienceqa.score(questions, ["A", "B", "A", "B"])["categories"]
    counts = {name: (row["accuracy"], row["questions"]) for name, row in scores.items()}
    assert counts == {"NAT": (100, 1), "SOC": (0, 1), "LAN": (50, 2), "TXT": (50, 2), "IMG": (50, 2),
                      "NO": (100, 1), "G1-6": (50, 2), "G7-12": (50, 2)}


def test_pope_scores_f1_of_yes_by_category():
    gold, said = ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]
    questions = [{"id": answer, "image": None, "answer": answer, "category": "random"} for answer in gold]
    questions += [{"id": 9, "image": None, "answer": "yes", "category": "popular"}]
    scores = pope.score(questions, said + ["yes"])
    assert scores["categories"]["random"] == {"f1": 50.0, "accuracy": 50.0, "yes": 50.0, "questions": 4}
    assert scores["f1"] == 75.0 and scores["categories"]["popular"]["f1"] == 100.0


def test_mme_adds_accuracy_and_pairs():
    questions = [{"id": f"{c}{i}", "image": f"{c}{i // 2}", "answer": a, "category": c}
                 for c in ("color", "code") for i, a in enumerate(("yes", "no", "yes", "no"))]
    scores = mme.score(questions, ["yes", "no", "yes", None, "no", "no", "no", "yes"])
    categories = {name: row["score"] for name, row in scores["categories"].items()}
    assert categories == {"color": 125.0, "code": 25.0}  # 3 of 4 and 1 of 2 pairs; 1 of 4 and none
    assert (scores["perception"], scores["others"]) == (125, 25)
    assert (scores["accuracy"], scores["accuracy_plus"], scores["pictures"]) == (50, 25, 4)


def test_mmbench_counts_a_question_only_if_it_is_right_in_every_rotation():
    questions = [{"id": i, "image": "x", "answer": "A", "category": "c", "group": i % 3} for i in range(6)]
    scores = mmbench.score(questions, ["A", "A", None, "A", "B", "A"])
    assert scores["accuracy"] == 33.33 and scores["accuracy_single"] == 66.67
    assert (scores["questions"], scores["rotations"], scores["unparsed"]) == (3, 6, 1)


def test_mmbench_reads_no_choice_that_is_blank():
    question = {"options": ["A", "B", "C"], "choices": ["red", "", "blue"]}
    assert [mmbench.parse(text, question) for text in ("I cannot tell", "the red one")] == [None, "A"]


def with_pictures(right, each: int = 1) -> tuple:
    """(questions, choices), `each` of them about one picture."""
    questions = [{"id": i, "image": f"{i // each}", "answer": "A"} for i in range(len(right))]
    return questions, ["A" if is_right else "B" for is_right in right]


def test_the_error_of_a_mean_is_binomial():
    """Two questions that are about one picture, and right together, are one fact."""
    right = [True] * 30 + [False] * 70
    questions, choices = with_pictures(right)
    alone = standard_errors(score_accuracy, questions, choices)
    assert alone["accuracy_se"] == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 100), rel=0.1)
    twice = standard_errors(score_accuracy, *with_pictures(right, each=2))
    assert twice["accuracy_se"] == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 50), rel=0.1)
    texts = [question | {"image": None} for question in questions]
    assert standard_errors(score_accuracy, texts, choices) == alone  # and the same every time


def test_a_single_picture_has_no_error_nor_has_a_part_that_a_draw_may_lack(toy):
    assert standard_errors(score_accuracy, *with_pictures([True, False], each=2)) == {}
    questions = load_questions("scienceqa", toy / "ScienceQA", "test")
    with_image = [question for question in questions if question["image"]]
    without = [question for question in questions if not question["image"]]
    for some in (1, 20):
        asked = with_image[:some] + without
        scores = scores_and_errors(scienceqa.score, asked, ["A"] * len(asked))
        assert "accuracy_se" in scores and ("accuracy_img_se" in scores) == (some == 20)
    assert scienceqa.score(without, ["A"] * len(without))["accuracy_img"] is None


@pytest.mark.parametrize("each", [2, 1])
def test_the_error_of_what_counts_together(each):
    """A picture that is drawn twice counts twice, though all its rotations are of one group. A group of two
    pictures is drawn as one."""
    questions, choices = with_pictures([True] * 60 + [False, True] * 70, each)
    for number, question in enumerate(questions):
        question |= {"group": number // 2}
    assert mmbench.score(questions, choices)["accuracy"] == 30
    error = standard_errors(mmbench.score, questions, choices)["accuracy_se"]
    assert error == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 100), rel=0.1)


@pytest.fixture(scope="module")
def yes_and_no():
    """(questions, choices): 400 pictures, two questions each, whose answers are somewhat alike."""
    torch.manual_seed(0)
    questions, choices = [], []
    for number in range(400):
        easy = torch.rand(()) < 0.5
        for answer, other in (("yes", "no"), ("no", "yes")):
            is_right = torch.rand(()) < (0.9 if easy else 0.5)
            category = ("color", "count")[number % 2]
            questions.append({"id": f"{number}{answer}", "image": f"{number}", "answer": answer,
                              "category": category})
            choices.append(answer if is_right else other)
    return questions, choices


def exact_error(influences) -> float:
    """From how much each question moves a score, in parts of 1; two questions to a picture (Liang and Zeger
    1986)."""
    return 100 * math.sqrt(sum((one + other) ** 2 for one, other in zip(influences[::2], influences[1::2])))


def test_the_error_of_f1_is_that_of_its_linear_part(yes_and_no):
    questions, choices = yes_and_no
    scores, influences = pope.score(questions, choices), []
    for question, choice in zip(questions, choices):
        category = [i for i, other in enumerate(questions) if other["category"] == question["category"]]
        each = sum((questions[i]["answer"] == "yes") + (choices[i] == "yes") for i in category)
        f1 = scores["categories"][question["category"]]["f1"] / 100
        gold, said = question["answer"] == "yes", choice == "yes"
        influences.append((2 * (gold and said) - f1 * (gold + said)) / each / 2)  # of two categories
    errors = standard_errors(pope.score, questions, choices)
    assert errors["f1_se"] == pytest.approx(exact_error(influences), rel=0.1)
    accuracy = scores["accuracy"] / 100
    right = [(q["answer"] == c) - accuracy for q, c in zip(questions, choices)]
    assert errors["accuracy_se"] == pytest.approx(exact_error(right) / 800, rel=0.1)


def test_the_error_of_mmes_points_is_that_of_a_sum_of_means(yes_and_no):
    questions, choices = yes_and_no
    variance = 0
    for first in (0, 2):  # the first picture of each category; two questions a picture, every other one
        points = []
        for i in range(first, 800, 4):
            right = [questions[k]["answer"] == choices[k] for k in (i, i + 1)]
            points.append(50 * sum(right) + 100 * all(right))
        variance += torch.tensor(points).float().var().item() / len(points)
    errors = standard_errors(mme.score, questions, choices)
    assert errors["perception_se"] == pytest.approx(math.sqrt(variance), rel=0.1)
    assert errors["others_se"] == 0
    few = [0, 1, 2, 3]  # a picture of each category: many a draw has but one, and half the points
    assert standard_errors(mme.score, [questions[i] for i in few], [choices[i] for i in few]).keys() == {
        "accuracy_se", "accuracy_plus_se"}


def test_floors_are_chance_the_commonest_letter_and_the_blind_model(root):
    questions = load_questions("mmbench", root / "MMBench")
    blind = [question["answer"] for question in questions]
    floors = score_floors(mmbench.score, questions, blind)
    letter, = [name for name in floors if name.startswith("always")]
    assert floors["without_picture"] == {"accuracy": 100, "accuracy_single": 100}
    # 16 rotations of four options, 4 of two; four questions need four hits each, two need two
    assert floors["chance"]["accuracy_single"] == pytest.approx(100 * (16 / 4 + 4 / 2) / 20, abs=4)
    assert floors["chance"]["accuracy"] == pytest.approx(100 * (4 / 4**4 + 2 / 2**2) / 6, abs=4)
    assert floors[letter]["accuracy"] == 0 and 20 < floors[letter]["accuracy_single"] <= 40
    rows = load_questions("gqa", root / "GQA")
    assert set(score_floors(score_accuracy, rows, ["?"] * len(rows))) == {"without_picture"}


def test_the_blind_model_gets_the_same_question_without_the_picture(root):
    question = load_questions("gqa", root / "GQA")[0]
    blind = without_picture(question)
    assert blind["image"] is None and f"<image>\n{blind['prompt']}" == question["prompt"]


# ---- layouts -----------------------------------------------------------------------------------------------


LETTERED = "\nA. {}\nB. {}\nC. {}\nD. {}"


@pytest.mark.parametrize("name, count, ending", [
    ("scienceqa", 6, LETTER_ANSWER), ("pope", 6, SHORT_ANSWER), ("mme", 12, SHORT_ANSWER),
    ("seed", 6, LETTER_ANSWER), ("mmbench", 20, LETTER_ANSWER),
    ("mmbench-cn", 20, "\n请直接回答选项字母。"), ("gqa", 6, SHORT_ANSWER),
    ("textvqa", 6, SHORT_ANSWER), ("vqav2", 3, SHORT_ANSWER),
    ("mmmu", 12, ""), ("mmvet", 6, "?")])
def test_every_layout_is_read(root, name, count, ending):
    questions = load_questions(name, root / BENCHES[name].folder)
    assert len(questions) == count and len({question["id"] for question in questions}) == count
    for question in questions:
        assert question["prompt"].endswith(ending)
        assert question["prompt"].startswith("<image>\n") == (question["image"] is not None)
        assert question["image"] is None or data.load_image(question["image"]).size == (48, 48)


def test_prompts_are_llavas_to_the_letter(root):
    first_row = json.loads((root / "SEED-Bench/SEED-Bench.json").read_text())["questions"][0]
    choices = LETTERED.format(*(first_row[f"choice_{x}"] for x in "abcd"))
    question = load_questions("seed", root / "SEED-Bench")[0]
    assert question["prompt"] == f"<image>\n{first_row['question']}{choices}{LETTER_ANSWER}"
    assert question["category"] == "Dimension 1" and question["answer"] == first_row["answer"]
    with open(root / "MMBench/mmbench_dev_20230712.tsv", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    first, second = load_questions("mmbench", root / "MMBench")[::4][:2]  # with a hint, and with "nan"
    told = LETTERED.format(*(rows[0][x] for x in "ABCD"))
    assert first["prompt"] == f"<image>\n{rows[0]['hint']}\n{rows[0]['question']}{told}{LETTER_ANSWER}"
    assert second["prompt"].startswith(f"<image>\n{rows[4]['question']}\nA. ")
    art, maths = load_questions("mmmu", root / "MMMU")[0], load_questions("mmmu", root / "MMMU")[6]
    told = "\n".join(f"({x}) {choice}" for x, choice in zip("ABCD", art["choices"]))
    assert art["prompt"] == f"<image>\n<image 1> What color is the shape?\n{told}\n{LETTER_ANSWER}"
    assert maths["prompt"] == f"<image>\nWhat color is the shape?{SHORT_ANSWER}"
    assert (art["category"], maths["category"], maths["pictures"]) == ("Art_Theory", "Math", 2)
    assert maths["answer"][1] == "1.5" and art["answer"] in "ABCD"


def test_textvqas_prompt_tells_the_ocr_tokens_also_where_there_are_none(root):
    """As LLaVA's own llava_textvqa_val_v051_ocr.jsonl has it, of the picture 97b1112b17015396 and others."""
    first, *_, last = load_questions("textvqa", root / "TextVQA")
    color = first["answer"][0]
    assert first["prompt"] == (f"<image>\nWhat color is the shape?\nReference OCR token: {color}, cross"
                               f"{SHORT_ANSWER}")
    assert last["prompt"].endswith(f"?\nReference OCR token: {SHORT_ANSWER}") and len(last["answer"]) == 10


def test_mmbench_rotates_options_and_answers_with_one_picture(root):
    for name in ("mmbench", "mmbench-cn"):
        questions = load_questions(name, root / BENCHES[name].folder)
        first = [question for question in questions if question["group"] == 0]
        assert [question["id"] for question in first] == ["0", "1000000", "2000000", "3000000"]
        assert len({question["answer"] for question in first}) == 4
        assert len({question["image"] for question in first}) == 1  # of the Chinese table by reference
        right = {question["choices"]["ABCD".index(question["answer"])] for question in first}
        assert len(right) == 1
        assert len(questions[8]["options"]) == 2 and "\nC. " not in questions[8]["prompt"]


def mmbench_choices(folder, *rows) -> list:
    """The choices of each row, as MMBench's rotations of one question."""
    lines = ["index\tquestion\tA\tB\tC\tD\timage\thint\tcategory"]
    for number, row in enumerate(rows):
        lines.append("\t".join([f"{number}000000", "?", *row, "eA==", "None", "NA"]))
    (folder / "mmbench_dev.tsv").write_text("\n".join(lines))
    questions = load_questions("mmbench", folder)
    assert {question["category"] for question in questions} == {None}
    assert all(question["prompt"].startswith("<image>\n?\nA. ") for question in questions)  # no hint
    assert [len(question["options"]) for question in questions] == [len(q["choices"]) for q in questions]
    return [question["choices"] for question in questions]


@pytest.mark.parametrize("row, choices", [
    ("None red Na blue", "None red Na blue"), ("red NA na NONE", "red NA na NONE"), ("red nan nan blue",) * 2,
    ("red blue nan NaN", "red blue"), ("red Nan NULL <NA>", "red Nan"), ("red blue Na None", "red blue Na"),
    ("red blue  ", "red blue"), ("red  blue ", "red  blue"), ("red   ", "red")])
def test_mmbench_only_lacks_the_choices_at_the_end_that_pandas_lacks(tmp_path, row, choices):
    assert mmbench_choices(tmp_path, row.split(" ")) == [choices.split(" ")]


@pytest.mark.parametrize("text", mmbench.MISSING[1:])
def test_mmbench_has_a_choice_that_is_missing_nowhere_but_at_the_end(tmp_path, text, capsys):
    """Two choices: one reads "None". What is at the end of one rotation comes first in the other."""
    rows = [["red", text, "", ""], [text, "red", "", ""]]
    for rotations in (rows, rows[::-1]):
        assert mmbench_choices(tmp_path, *rotations) == [row[:2] for row in rotations]
    assert "without all" not in capsys.readouterr().out
    mmbench_choices(tmp_path, rows[1])
    assert "mmbench_dev.tsv: questions without all their rotations: 1;" in capsys.readouterr().out


@pytest.mark.parametrize("hint, is_told", [("none", False), ("Nan", False), ("None of it is red.", True)])
def test_mmbench_has_no_hint_that_llava_takes_for_none(tmp_path, hint, is_told):
    (tmp_path / "mmbench_dev.tsv").write_text(
        f"index\tquestion\tA\tB\tC\tD\timage\thint\n1\t?\tred\tblue\t\t\teA==\t{hint}")
    question, = load_questions("mmbench", tmp_path)
    assert question["prompt"].startswith(f"<image>\n{hint}\n?" if is_told else "<image>\n?")


def test_a_table_with_a_quote_that_does_not_end_is_refused(tmp_path):
    """It would swallow the rows behind it."""
    (tmp_path / "mmbench_dev.tsv").write_text(
        'index\tquestion\tA\tB\tC\tD\timage\tcomment\n' + 3 * '1\t?\tred\tblue\t\t\teA==\t"open\n')
    with pytest.raises(ValueError, match="mmbench_dev.tsv: Error: "):
        load_questions("mmbench", tmp_path)


def test_gqas_accuracy_is_that_of_the_balanced_questions(copy):
    folder = copy("gqa")
    content = json.loads((folder / "testdev_balanced_questions.json").read_text())
    for number, question in enumerate(content.values()):
        question["isBalanced"] = number > 1
    (folder / "testdev_all_questions.json").write_text(json.dumps(content))
    assert len(load_questions("gqa", folder, "testdev_all")) == len(content) - 2


def test_mmmus_test_split_has_no_answers_and_its_other_names_are_open(copy):
    folder = copy("mmmu")
    for file in folder.rglob("validation*"):
        text = re.sub('"answer": ("[^"]*"|\\[.*?\\])', '"answer": "?"', file.read_text())
        text = text.replace('"question_type": "open"', '"question_type": "short-answer"')
        file.with_name(file.name.replace("validation", "test")).write_text(text)
    told, asked = load_questions("mmmu", folder), load_questions("mmmu", folder, "test")
    assert [question["answer"] for question in asked] == [None] * len(told)
    assert [question["prompt"] for question in asked] == [question["prompt"] for question in told]


def test_a_file_of_json_lines_may_have_one_line(copy):
    folder = copy("mmmu")
    shutil.rmtree(folder / "Art_Theory")
    row = json.loads((folder / "Math/validation.jsonl").read_text().splitlines()[0])
    row["image_1"] = {"bytes": "eA==", "path": None}
    (folder / "Math/validation.jsonl").write_text(json.dumps(row))
    question, = load_questions("mmmu", folder)
    assert question["id"] == row["id"]


def test_mme_says_which_categories_its_sums_lack(copy, capsys):
    """In the folder that the zip makes, too, and with what macOS leaves."""
    folder = copy("mme")
    for name in mme.PERCEPTION + mme.COGNITION[1:]:
        (folder / name).mkdir(exist_ok=True)
    inner = folder.parent / "other/MME_Benchmark"
    shutil.copytree(folder, inner)
    (inner.parent / "eval_tool").mkdir()
    text = next((inner / "color").rglob("*.txt"))
    (text.with_name(f"._{text.name}")).write_bytes(b"\xff\xfe")
    text.write_text(text.read_text().replace("Yes", "yes"))
    found = load_questions("mme", inner.parent)
    said = "MME_Benchmark: the sums lack 1 of MME's 14 categories: commonsense_reasoning"
    assert said in capsys.readouterr().out
    assert [question["id"] for question in found] == [q["id"] for q in load_questions("mme", folder)]


def test_mmbench_needs_one_table(root, copy):
    folder = copy("mmbench")
    shutil.copy(root / "MMBench-CN/mmbench_dev_cn_20231003.tsv", folder)  # both languages may lie together
    assert load_questions("mmbench", folder)[0]["prompt"].endswith("directly.")
    assert load_questions("mmbench-cn", folder)[0]["prompt"].endswith("。")
    shutil.copy(folder / "mmbench_dev_20230712.tsv", folder / "mmbench_dev_20231003.tsv")
    with pytest.raises(ValueError, match="--split has to name one table; 'dev' fits .*0712.*1003"):
        load_questions("mmbench", folder)
    assert len(load_questions("mmbench", folder, "dev_20231003")) == 20
    shutil.move(folder / "mmbench_dev_20230712.tsv", folder / "MMBench_DEV_EN.tsv")
    shutil.copy(folder / "MMBench_DEV_EN.tsv", folder / "MMBench_DEV_EN_V11.tsv")
    assert load_questions("mmbench", folder, "DEV_EN")[0]["file"] == str(folder / "MMBench_DEV_EN.tsv")
    assert len(load_questions("mmbench", folder, "en_v11")) == 20


def test_questions_of_ones_own_in_gqas_layout_are_as_the_readme_has_them(tmp_path):
    readme = (ROOT / "benchmarks/README.md").read_text()
    example, = re.findall(r"`(\{\"1\": [^`]*), \.\.\}`", readme)
    (tmp_path / "own_questions.json").write_text(f"{example}}}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    question, = load_questions("gqa", tmp_path, "own")
    assert question["prompt"] == f"{data.IMAGE}\nWhich shape is it?{SHORT_ANSWER}"
    assert gqa.parse("Circle.") == question["answer"] and question["image"] == tmp_path / "images/a.png"


def test_pope_and_mme_folders(toy):
    questions = load_questions("pope", toy / "POPE")
    assert len(questions) == 20
    assert [q["answer"] for q in questions[:4]] == ["yes", "no", "yes", "no"]
    assert questions[0]["prompt"].startswith("<image>\nIs there a ") and questions[0]["category"] == "random"
    assert load_questions("pope", toy / "POPE", "random") == questions
    pairs = load_questions("mme", toy / toy_world.MME)
    assert len(pairs) == 40 and {q["category"] for q in pairs} == set(toy_world.VALUES)
    for first, second in zip(pairs[::2], pairs[1::2]):
        assert (first["answer"], second["answer"]) == ("yes", "no")
        assert first["image"] == second["image"] and first["image"].suffix == ".png"
    assert len(load_questions("mme", toy / toy_world.MME, "color")) == 10
    # a picture's two questions stay together
    assert len(load_questions("mme", toy / toy_world.MME, limit=3)) == 6


def test_pope_in_llavas_folder_and_its_aokvqa_and_gqa(root, tmp_path):
    """coco/ and val2014/ side by side; JSON lists, called seem_random."""
    text = (root / "POPE/toy_pope_random.json").read_text()
    for name in ("coco", "gqa"):
        (tmp_path / name).mkdir()
    (tmp_path / "coco/coco_pope_random.json").write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "gqa/gqa_pope_seem_random.json").write_text(json.dumps(rows))
    shutil.copytree(root / "POPE/images", tmp_path / "val2014")
    expected = load_questions("pope", root / "POPE")
    for folder, split in ((tmp_path, None), (tmp_path / "coco", None), (tmp_path / "gqa", "random")):
        questions = load_questions("pope", folder, split)
        assert [q["answer"] for q in questions] == [q["answer"] for q in expected]
        assert questions[0]["image"].parent.name == "val2014"


def test_pope_as_its_repository_has_it_finds_the_folder_with_its_pictures(root, tmp_path):
    """Whatever images/ lies beside it."""
    (tmp_path / "POPE/output/coco").mkdir(parents=True)
    shutil.copy(root / "POPE/toy_pope_random.json", tmp_path / "POPE/output/coco/coco_pope_random.json")
    shutil.copytree(root / "POPE/images", tmp_path / "val2014")
    (tmp_path / "images").mkdir()
    assert {question["image"].parent for question in load_questions("pope", tmp_path / "POPE")} == {
        tmp_path / "val2014"}


def test_mme_has_another_layout_two_spaces_and_pictures_with_other_endings(tmp_path):
    (tmp_path / "scene/images").mkdir(parents=True)
    (tmp_path / "scene/questions_answers_YN").mkdir()
    (tmp_path / "scene/images/7.jpg").touch()
    (tmp_path / "scene/questions_answers_YN/7.txt").write_text(
        "Is it a hall?  Please answer yes or no.\tYes\nIs it a bar? Please answer yes or no.\tNo\n")
    first, _ = load_questions("mme", tmp_path)
    assert first["prompt"] == f"<image>\nIs it a hall?{SHORT_ANSWER}" and first["image"].name == "7.jpg"


@pytest.mark.parametrize("suffix", [".JPG", ".Png", ".webp"])
@pytest.mark.parametrize("name", [name for name in BENCHES if "mmbench" not in name])
def test_a_picture_is_found_whatever_its_suffix(root, copy, name, suffix):
    """Cameras and Windows write upper case. MMBench has its pictures in its table."""
    expected = [(row["id"], row["image"]) for row in load_questions(name, root / BENCHES[name].folder)]
    folder = copy(name)
    for file in [*folder.rglob("*.png"), *folder.rglob("*.jpg")]:
        file.rename(file.with_suffix(suffix))
    for (identity, image), question in zip(expected, load_questions(name, folder), strict=True):
        assert question["id"] == identity
        if isinstance(image, Path):
            assert question["image"].name == image.with_suffix(suffix).name


def test_scienceqas_prompt():
    problem = {"question": "Which is  soft?", "choices": ["rock", "wool"], "answer": 1, "hint": "",
               "image": None}
    text = ("Which is soft?\nA. rock\nB. wool\n"
            "Answer with the option's letter from the given choices directly.")
    assert scienceqa.to_prompt(problem) == text
    assert scienceqa.to_prompt(problem | {"hint": "Touch it.", "image": "image.png"}) == (
        f"<image>\nContext: Touch it.\n{text}")


def test_scienceqas_folder(toy):
    questions = load_questions("scienceqa", toy / "ScienceQA", "test")
    assert len(questions) == 40 and sum(q["image"] is not None for q in questions) == 30
    assert {len(q["options"]) for q in questions} == {2, 3, 4}
    with pytest.raises(ValueError, match="pid_splits.json: no split 'tset'; it has "):
        load_questions("scienceqa", toy / "ScienceQA", "tset")


def test_scienceqas_other_splits_find_their_pictures(tmp_path, toy):
    folder = shutil.copytree(toy / "ScienceQA", tmp_path / "ScienceQA")
    splits = json.loads((folder / "pid_splits.json").read_text())
    first = splits["test"][0]

    def add_splits(problems):
        for name in ("train", "val", "test"):
            for pid in splits[name]:
                problems[pid]["split"] = name
        problems[first]["image"] = ""  # text alone

    more = {"minitest": splits["test"][:5], "trainval": splits["train"] + splits["val"]}
    edit_json(folder / "problems.json", add_splits)
    edit_json(folder / "pid_splits.json", lambda content: content.update(more))
    questions = load_questions("scienceqa", folder, "minitest")
    assert len(questions) == 5
    assert questions[0]["image"] is None and "<image>" not in questions[0]["prompt"]
    assert len(load_questions("scienceqa", folder, "trainval")) == len(more["trainval"])


# ---- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHES)
def test_a_folder_without_a_benchmarks_files_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}.*no "):
        load_questions(name, tmp_path)


@pytest.mark.parametrize("name, file", [
    ("seed", "SEED-Bench-image/2_1.png"), ("gqa", "images/n2.jpg"), ("textvqa", "train_images/2.jpg"),
    ("vqav2", "test2015/COCO_test2015_000000000002.jpg"), ("mmmu", "Math/2.png"),
    ("mmvet", "images/v1_2.png"), ("pope", "images/00002.png"), ("mme", "size/00002.png"),
    ("scienceqa", "images/test/9/image.png")])
def test_a_picture_that_is_not_there_is_never_left_out(copy, name, file):
    folder = copy(name)
    (folder / file).unlink()
    message = rf"(json|txt|jsonl): question .* picture that is not there: .*{file}"
    with pytest.raises(ValueError, match=message):
        load_questions(name, folder)


def broken(name, file, change):
    """A case of the test below: the change of a JSON file's content."""
    return name, lambda folder: edit_json(folder / file, change)


def replaced(name, file, find, replace):
    """The same for any file, as bytes."""
    def change(folder):
        content = (folder / file).read_bytes()
        assert find in content
        (folder / file).write_bytes(content.replace(find, replace))
    return name, change


def cut_mmbench(find, replace):
    return replaced("mmbench", "mmbench_dev_20230712.tsv", find.encode(), replace.encode())


def write_pope_lines(text):
    return "pope", lambda folder: (folder / "toy_pope_random.json").write_text(text)


ART = "Art_Theory/validation-00000-of-00001.json"


@pytest.mark.parametrize("case, message", [
    (broken("seed", "SEED-Bench.json", lambda x: x["questions"][1].update(answer="E")),
     "SEED-Bench.json: question '101' has the answer 'E', which is none of A, B, C, D"),
    (broken("seed", "SEED-Bench.json", lambda x: x["questions"][1].update(question_id="100")),
     "SEED-Bench.json: question '100' is there twice"),
    (broken("seed", "SEED-Bench.json", lambda x: x["questions"][1].pop("choice_b")),
     "SEED-Bench.json: entry 2 has no 'choice_b'"),
    (broken("mmmu", ART, lambda x: x[2].update(image_1=None)),
     "00001.json: question 'validation_Art_Theory_3' has no picture"),
    (broken("mmmu", ART, lambda x: x[2].update(options="['a']", answer="B")),
     "question 'validation_Art_Theory_3' has the answer 'B', which is none of A"),
    (broken("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", lambda x: x["data"].pop()),
     "TextVQA_Rosetta_OCR_v0.2_val.json: nothing for question 34604; is it of another split"),
    (broken("gqa", "testdev_balanced_questions.json", lambda x: x["200001"].pop("answer")),
     "testdev_balanced_questions.json: entry 2 has no 'answer'"),
    (broken("mmvet", "mm-vet.json", lambda x: x["v1_1"].pop("question")),
     "mm-vet.json: entry 2 has no 'question'"),
    (broken("vqav2", "v2_OpenEnded_mscoco_test-dev2015_questions.json", lambda x: x["questions"][1].clear()),
     "2015_questions.json: entry 2 has no 'question_id'"),
    (broken("scienceqa", "pid_splits.json", lambda x: x.update(test=["7", "8", "7"])),
     "problems.json: question '7' is there twice"),
    (broken("scienceqa", "problems.json", lambda x: x["8"].update(answer="B")),
     "problems.json: entry .* has 'B' as its 'answer'"),
    (broken("scienceqa", "problems.json", lambda x: x["8"].update(choices=list("abcdefg"), answer=3)),
     "problems.json: problem '8' has 7 choices, at most 5"),
    (broken("scienceqa", "problems.json", lambda x: x["8"].update(choices=list("abc"), answer=3)),
     "problems.json: problem '8' has no choice 3$"),
    (broken("scienceqa", "problems.json", lambda x: x["8"].update(image="none.png")),
     "problems.json: question '8' asks about a picture that is not there"),
    (broken("scienceqa", "pid_splits.json", lambda x: x.update(test=["7", "99"])),
     "problems.json: problem '99' is missing; is it of another split"),
    (broken("gqa", "testdev_balanced_questions.json", lambda x: x["200001"].update(types="query")),
     "GQA: not in the layout of gqa: AttributeError"),
    (broken("mmmu", ART, lambda x: x[1].update(options="['red', 'blue]")), "Art_Theory_2' has no options"),
    (broken("mmmu", ART, lambda x: x[1].update(options="[red, blue]")), "Art_Theory_2' has no options"),
    (broken("mmmu", ART, lambda x: x[1].update(question_type="open", answer="")), "Theory_2' has no answer"),
    (broken("mmmu", ART, lambda x: x[1].update(image_1=5)), "json: entry 2 has 5 as its 'image_1'"),
    (broken("seed", "SEED-Bench.json", lambda x: x["questions"][1].update(answer=None)),
     "SEED-Bench.json: entry 2 has None as its 'answer'"),
    (broken("seed", "SEED-Bench.json", lambda x: x["questions"][1].update(question_id=[1])),
     r"SEED-Bench.json: entry 2 has \[1\] as its 'question_id'"),
    (broken("textvqa", "TextVQA_0.5.1_val.json", lambda x: x["data"][1].update(answers="red")),
     "TextVQA_0.5.1_val.json: entry 2 has 'red' as its 'answers'"),
    (broken("textvqa", "TextVQA_0.5.1_val.json", lambda x: x["data"][1].update(answers=[])),
     "TextVQA_0.5.1_val.json: question 34601 has no answer"),
    (broken("gqa", "testdev_balanced_questions.json", lambda x: x.update({"200001": None})),
     "testdev_balanced_questions.json: entry 2 has no 'id'"),
    (broken("mmvet", "mm-vet.json", lambda x: x.update(v1_1="what?")), "mm-vet.json: entry 2 has no 'id'"),
    (replaced("gqa", "testdev_balanced_questions.json", b'"200001"', b'"200000"'),
     "testdev_balanced_questions.json: '200000' is there twice"),
    (replaced("scienceqa", "problems.json", b'"2": {', b'"1": {'), "problems.json: '1' is there twice"),
    (replaced("mmvet", "mm-vet.json", b"shape", b"sh\xe9pe"), "mm-vet.json: not UTF-8"),
    (replaced("mme", "color/00000.txt", b"Is ", b"\xc9s "), "color/00000.txt: not UTF-8"),
    (cut_mmbench("\n1000000\t", "\nx\t"), "mmbench_dev_20230712.tsv: the index 'x' is not a number"),
    (cut_mmbench("\tquestion\t", "\tquestions\t"), "mmbench_dev_20230712.tsv: entry 1 has no 'question'"),
    (cut_mmbench("\tA\tkind 0\t", "\t\tkind 0\t"), "mmbench_dev_20230712.tsv: question .* has no answer"),
    (cut_mmbench("\tall\t", "\n"), "mmbench_dev_20230712.tsv: entry 2 has None as its "),
    (write_pope_lines('{"question_id": 1, "image": "00000.png", "text": "?"}\n{}\n'),
     "toy_pope_random.json: entry 1 has no 'label'"),
    (write_pope_lines('{"question_id": 1, "image": "00000.png", "text": "?", "label": "maybe"}\n'),
     "question 'random-1' has the answer 'maybe', which is none of yes, no"),
    (write_pope_lines('{"question_id": 1,'), "toy_pope_random.json: "),
])
def test_bad_files_are_named_with_their_question(copy, case, message):
    name, spoil = case
    folder = copy(name)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_questions(name, folder)


@pytest.mark.parametrize("more, message", [
    ({"options": list("AB"), "choices": ["red", "blue", "green"], "open": "q"}, "3 choices for 2 options"),
    ({"choices": ["red", "blue"], "open": "q"}, "2 choices for 0 options"),
    ({"options": list("AB"), "choices": ["red", "blue"]}, "choices, and no `open`")])
def test_what_a_benchmark_of_ones_own_gets_wrong_is_refused(more, message):
    first = {"id": 1, "file": "f", "prompt": "q", "image": "a", "answer": "A"}
    check([first, first | {"id": 2}])
    with pytest.raises(ValueError, match=f"f: question 2 has {message}"):
        check([first, first | {"id": 2} | more])


@pytest.mark.parametrize("name, file", [
    ("scienceqa", "problems.json"), ("pope", "toy_pope_random.json"), ("mme", "color/00000.txt"),
    ("mmbench", "mmbench_dev_20230712.tsv"), ("mmmu", "Math/validation.jsonl")])
def test_windows_line_ends_change_nothing_and_nor_does_a_byte_order_mark(root, copy, name, file):
    folder = copy(name)
    expected = load_questions(name, folder)
    content = (folder / file).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (folder / file).write_bytes((b"" if name == "scienceqa" else b"\xef\xbb\xbf") + content)
    assert load_questions(name, folder) == expected


def test_parquet_beside_what_is_read_is_not_left_out(copy):
    """One subject of MMMU was not converted."""
    folder = copy("mmmu")
    (folder / "Music").mkdir()
    (folder / "Music/validation-00000-of-00001.parquet").touch()
    with pytest.raises(FileNotFoundError, match="Music: no .*; .*Music/valid.* is not read here"):
        load_questions("mmmu", folder)


@pytest.mark.parametrize("suffix", [".png", ".JPG"])
def test_mmes_pictures_each_have_a_text(copy, suffix):
    folder = copy("mme")
    (folder / "color/00000.txt").unlink()
    (folder / "color/00000.png").rename(folder / f"color/00000{suffix}")
    with pytest.raises(FileNotFoundError, match="color/00000.txt"):
        load_questions("mme", folder)


def test_mme_files_are_pairs(tmp_path):
    (tmp_path / "color").mkdir()
    (tmp_path / "color/a.txt").write_text("Is it red?\tYes\n")
    with pytest.raises(ValueError, match="not two lines"):
        load_questions("mme", tmp_path)


def test_no_other_benchmark_is_told_to_convert_parquet(tmp_path):
    """No JSON would become POPE's lists."""
    (tmp_path / "test.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"pope_\*random.json$"):
        load_questions("pope", tmp_path, "random")


@pytest.mark.parametrize("name, file, words", [
    ("mmmu", "Art/validation-00000-of-00001.parquet", "pandas.read_parquet"),
    ("mmbench", "mmbench.xlsx", "pandas.read_excel")])
def test_parquet_and_excel_are_told_how_to_become_readable(tmp_path, name, file, words):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=f"no .*{file} is not read here, but .*{words}.* converts it"):
        load_questions(name, tmp_path)


@pytest.mark.parametrize("change", [
    {"choices": "red"}, {"choices": None}, {"choices": [["a"], None]}, {"answer": "0"}, {"answer": None},
    {"answer": 1.0}, {"answer": True}, {"question": 5}, {"hint": 5}, {"image": 5}, {"image": ["x"]},
    {"split": ["x"]}])
def test_a_problem_with_a_value_of_another_type_is_one_line(toy, tmp_path, change):
    folder = shutil.copytree(toy / "ScienceQA", tmp_path / "ScienceQA")
    first = json.loads((folder / "pid_splits.json").read_text())["test"][0]
    edit_json(folder / "problems.json", lambda problems: problems[first].update(change))
    with pytest.raises(ValueError, match="^(?!.*\n).*ScienceQA(/problems.json)?: "):
        load_questions("scienceqa", folder)


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json"])
@pytest.mark.parametrize("content", [[], None, "test", 5, {"test": None}, {"test": "red"}, {"test": 1.0}])
def test_scienceqas_files_of_other_types_are_one_line(toy, tmp_path, name, content):
    folder = shutil.copytree(toy / "ScienceQA", tmp_path / "ScienceQA")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^(?!.*\n).*{name}: "):
        load_questions("scienceqa", folder)


def test_the_pictures_of_a_benchmark_lie_in_its_folder(copy):
    folder = copy("seed")
    edit_json(folder / "SEED-Bench.json", lambda content: content["questions"][0].update(
        data_id="../../../../../../../etc/passwd"))
    with pytest.raises(ValueError, match="etc/passwd' leads out of the folder"):
        load_questions("seed", folder)


@pytest.mark.parametrize("content", [b"\xff\n", b'{"id": "1", "prompt": "?", "answer": null}\n'])
def test_kept_answers_that_are_damaged_name_their_file(tmp_path, content):
    (tmp_path / "b.partial.0.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="b.partial.0.jsonl"):
        read_answers(tmp_path / "b.partial", [{"id": "1", "prompt": "?", "image": None}])
