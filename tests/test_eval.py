"""The benchmarks' layouts, their rules as tables, the denominators and errors; asking: batches, ranks, a
killed evaluation that goes on; likelihoods; where an answer ends; the command."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from layouts import write_all
from PIL import Image

import data
import eval as evaluation
from benchmarks import gqa, mmbench, mme, mmmu, pope, scienceqa, seed, textvqa, vqa
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER
from benchmarks.score import accuracy, score_floors
from lab import toy_world
from projector import VLM

BENCHES = evaluation.BENCHES
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with every benchmark."""
    return write_all(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def copy(root, tmp_path):
    """`copy(name)`: a benchmark's folder that may be spoilt."""
    return lambda name: shutil.copytree(root / BENCHES[name].folder, tmp_path / BENCHES[name].folder)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The directory of a run that has learned nothing; its LLM answers in the toy world's words."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    towers = ROOT / "lab/towers/tiny-vit", ROOT / "lab/towers/tiny-llm"
    VLM.from_towers(*towers, "mlp2x_gelu").save(folder, {"template": "v1"}, False)
    return folder


def load(name, folder, split=None, limit=None):
    return evaluation.load_questions(name, folder, split, limit)


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
def test_parse_choice(text, choice):
    assert scienceqa.parse(text, {"num_choices": 3}) == choice


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
    ("It is B I think", "B"), ("A dog and a cat B", None),  # two letters, none of them in another form
    ("A red shape stands there", "A"),  # the article does not count, the choice's text does
    ("A", "A"), ("it is A", "A"), ("A small shape there", None), ("A or B", None), ("A. or B", "B"),
    ("the blue one", "B"), ("red or blue", None), ("E", None), ("D", None), ("", None), ("b", None),
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


def test_standard_errors_are_binomial_and_by_picture_where_questions_share_one():
    right = [True] * 30 + [False] * 70
    alone = [{"id": i, "image": f"{i}"} for i in range(100)]
    assert accuracy(right, alone)["accuracy_se"] == round(100 * math.sqrt(0.3 * 0.7 / 100), 2)
    twice = [{"id": i, "image": f"{i // 2}"} for i in range(100)]  # both alike: 50 facts
    assert accuracy(right, twice)["accuracy_se"] == round(100 * math.sqrt(0.3 * 0.7 / 50), 2)
    text = [{"id": i, "image": None} for i in range(100)]  # no picture is no common picture
    assert accuracy(right, text) == accuracy(right, alone)


@pytest.mark.parametrize("score, key", [(pope.score, "f1"), (mme.score, "perception")])
def test_errors_of_f1_and_of_sums_agree_with_drawing_the_pictures_again(score, key):
    """The bootstrap, by pictures; the formulas hold for many."""
    torch.manual_seed(0)
    pictures = []
    for number in range(400):
        name, pair = ("color", "count")[number % 2], []
        easy = torch.rand(()) < 0.5  # so both answers to a picture are somewhat alike
        for answer in ("yes", "no"):
            is_right = torch.rand(()) < (0.9 if easy else 0.5)
            said = answer if is_right else {"yes": "no", "no": "yes"}[answer]
            question = {"id": f"{number}{answer}", "image": f"{number}", "answer": answer, "category": name}
            pair.append((question, said))
        pictures.append(pair)

    def scored(rows):
        questions, choices = zip(*[entry for pair in rows for entry in pair])
        return score(list(questions), list(choices))

    values = []
    for _ in range(200):
        values.append(scored([pictures[i] for i in torch.randint(400, (400,)).tolist()])[key])
    drawn = torch.tensor(values).std().item()
    assert scored(pictures)[f"{key}_se"] == pytest.approx(drawn, rel=0.2)


def test_floors_are_chance_the_commonest_letter_and_the_blind_model(root):
    questions = load("mmbench", root / "MMBench")
    blind = [question["answer"] for question in questions]
    floors = score_floors(BENCHES["mmbench"], questions, blind)
    letter, = [name for name in floors if name.startswith("always")]
    assert floors["without_picture"] == {"accuracy": 100, "accuracy_single": 100}
    # 16 rotations of four options, 4 of two; four questions need four hits each, two need two
    assert floors["chance"]["accuracy_single"] == pytest.approx(100 * (16 / 4 + 4 / 2) / 20, abs=4)
    assert floors["chance"]["accuracy"] == pytest.approx(100 * (4 / 4**4 + 2 / 2**2) / 6, abs=4)
    assert floors[letter]["accuracy"] == 0 and 20 < floors[letter]["accuracy_single"] <= 40
    rows = load("gqa", root / "GQA")
    assert set(score_floors(BENCHES["gqa"], rows, ["?"] * len(rows))) == {"without_picture"}


# ---- layouts -----------------------------------------------------------------------------------------------

LETTERED = "\nA. {}\nB. {}\nC. {}\nD. {}"


@pytest.mark.parametrize("name, count, ending", [
    ("scienceqa", 6, LETTER_ANSWER), ("pope", 6, SHORT_ANSWER), ("mme", 12, SHORT_ANSWER),
    ("seed", 6, LETTER_ANSWER), ("mmbench", 20, LETTER_ANSWER),
    ("mmbench-cn", 20, "\n请直接回答选项字母。"), ("gqa", 6, SHORT_ANSWER),
    ("textvqa", 6, SHORT_ANSWER), ("vqav2", 3, SHORT_ANSWER),
    ("mmmu", 12, ""), ("mmvet", 6, "?")])
def test_every_layout_is_read(root, name, count, ending):
    questions = load(name, root / BENCHES[name].folder)
    assert len(questions) == count and len({question["id"] for question in questions}) == count
    for question in questions:
        assert question["prompt"].endswith(ending)
        assert question["prompt"].startswith("<image>\n") == (question["image"] is not None)
        assert question["image"] is None or data.load_image(question["image"]).size == (48, 48)


def test_prompts_are_llavas_to_the_letter(root):
    first_row = json.loads((root / "SEED-Bench/SEED-Bench.json").read_text())["questions"][0]
    choices = LETTERED.format(*(first_row[f"choice_{x}"] for x in "abcd"))
    question = load("seed", root / "SEED-Bench")[0]
    assert question["prompt"] == f"<image>\n{first_row['question']}{choices}{LETTER_ANSWER}"
    assert question["category"] == "Dimension 1" and question["answer"] == first_row["answer"]
    with open(root / "MMBench/mmbench_dev_20230712.tsv", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    first, second = load("mmbench", root / "MMBench")[::4][:2]  # with a hint, and with "nan" for one
    told = LETTERED.format(*(rows[0][x] for x in "ABCD"))
    assert first["prompt"] == f"<image>\n{rows[0]['hint']}\n{rows[0]['question']}{told}{LETTER_ANSWER}"
    assert second["prompt"].startswith(f"<image>\n{rows[4]['question']}\nA. ")
    art, maths = load("mmmu", root / "MMMU")[0], load("mmmu", root / "MMMU")[6]
    told = "\n".join(f"({x}) {choice}" for x, choice in zip("ABCD", art["choices"]))
    assert art["prompt"] == f"<image>\n<image 1> What color is the shape?\n{told}\n{LETTER_ANSWER}"
    assert maths["prompt"] == f"<image>\nWhat color is the shape?{SHORT_ANSWER}"
    assert (art["category"], maths["category"], maths["pictures"]) == ("Art_Theory", "Math", 2)
    assert maths["answer"][1] == "1.5" and art["answer"] in "ABCD"


def test_textvqas_prompt_tells_the_ocr_tokens_where_there_are_any(root):
    first, *_, last = load("textvqa", root / "TextVQA")
    color = first["answer"][0]
    assert first["prompt"] == (f"<image>\nWhat color is the shape?\nReference OCR token: {color}, cross"
                               f"{SHORT_ANSWER}")
    assert "OCR" not in last["prompt"] and len(last["answer"]) == 10


def test_mmbench_rotates_options_and_answers_with_one_picture(root):
    for name in ("mmbench", "mmbench-cn"):
        questions = load(name, root / BENCHES[name].folder)
        first = [question for question in questions if question["group"] == 0]
        assert [question["id"] for question in first] == ["0", "1000000", "2000000", "3000000"]
        assert len({question["answer"] for question in first}) == 4
        assert len({question["image"] for question in first}) == 1  # of the Chinese table by reference
        right = {question["choices"]["ABCD".index(question["answer"])] for question in first}
        assert len(right) == 1
        assert len(questions[8]["options"]) == 2 and "\nC. " not in questions[8]["prompt"]


def test_mmbench_needs_one_table(root, copy):
    folder = copy("mmbench")
    shutil.copy(root / "MMBench-CN/mmbench_dev_cn_20231003.tsv", folder)  # both languages may lie together
    assert load("mmbench", folder)[0]["prompt"].endswith("directly.")
    assert load("mmbench-cn", folder)[0]["prompt"].endswith("。")
    shutil.copy(folder / "mmbench_dev_20230712.tsv", folder / "mmbench_dev_20231003.tsv")
    with pytest.raises(ValueError, match="--split has to name one table; 'dev' fits .*0712.*1003"):
        load("mmbench", folder)
    assert len(load("mmbench", folder, "dev_20231003")) == 20


def test_a_split_without_answers_is_asked_and_not_scored(model, copy):
    folder = copy("mmbench")
    text = (folder / "mmbench_dev_20230712.tsv").read_text()
    (folder / "mmbench_test_20230712.tsv").write_text(text.replace("\tanswer\t", "\tx\t"))
    questions = load("mmbench", folder, "test")
    assert {question["answer"] for question in questions} == {None}
    assert evaluation.answer_bench(*model, "v1", "mmbench", folder, "test")[0] == {"questions": 20}


def test_pope_and_mme_folders(toy):
    questions = load("pope", toy / "POPE")
    assert len(questions) == 20
    assert [q["answer"] for q in questions[:4]] == ["yes", "no", "yes", "no"]
    assert questions[0]["prompt"].startswith("<image>\nIs there a ") and questions[0]["category"] == "random"
    assert load("pope", toy / "POPE", "random") == questions
    pairs = load("mme", toy / toy_world.MME)
    assert len(pairs) == 40 and {q["category"] for q in pairs} == set(toy_world.VALUES)
    for first, second in zip(pairs[::2], pairs[1::2]):
        assert (first["answer"], second["answer"]) == ("yes", "no")
        assert first["image"] == second["image"] and first["image"].suffix == ".png"
    assert len(load("mme", toy / toy_world.MME, "color")) == 10
    assert len(load("mme", toy / toy_world.MME, limit=3)) == 6  # a picture's two questions stay together


def test_pope_in_llavas_folder_and_its_aokvqa_and_gqa(root, tmp_path):
    """coco/ and val2014/ side by side; JSON lists, called seem_random."""
    text = (root / "POPE/toy_pope_random.json").read_text()
    for name in ("coco", "gqa"):
        (tmp_path / name).mkdir()
    (tmp_path / "coco/coco_pope_random.json").write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "gqa/gqa_pope_seem_random.json").write_text(json.dumps(rows))
    shutil.copytree(root / "POPE/images", tmp_path / "val2014")
    expected = load("pope", root / "POPE")
    for folder, split in ((tmp_path, None), (tmp_path / "coco", None), (tmp_path / "gqa", "random")):
        questions = load("pope", folder, split)
        assert [q["answer"] for q in questions] == [q["answer"] for q in expected]
        assert questions[0]["image"].parent.name == "val2014"


def test_mme_has_another_layout_two_spaces_and_pictures_with_other_endings(tmp_path):
    (tmp_path / "scene/images").mkdir(parents=True)
    (tmp_path / "scene/questions_answers_YN").mkdir()
    (tmp_path / "scene/images/7.jpg").touch()
    (tmp_path / "scene/questions_answers_YN/7.txt").write_text(
        "Is it a hall?  Please answer yes or no.\tYes\nIs it a bar? Please answer yes or no.\tNo\n")
    first, _ = load("mme", tmp_path)
    assert first["prompt"] == f"<image>\nIs it a hall?{SHORT_ANSWER}" and first["image"].name == "7.jpg"


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHES)
def test_a_folder_without_a_benchmarks_files_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}.*no "):
        load(name, tmp_path)


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
        load(name, folder)


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
        load(name, folder)


@pytest.mark.parametrize("name, file", [
    ("scienceqa", "problems.json"), ("pope", "toy_pope_random.json"), ("mme", "color/00000.txt"),
    ("mmbench", "mmbench_dev_20230712.tsv"), ("mmmu", "Math/validation.jsonl")])
def test_windows_line_ends_change_nothing_and_nor_does_a_byte_order_mark(root, copy, name, file):
    folder = copy(name)
    expected = load(name, folder)
    content = (folder / file).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (folder / file).write_bytes((b"" if name == "scienceqa" else b"\xef\xbb\xbf") + content)
    assert load(name, folder) == expected


def test_parquet_beside_what_is_read_is_not_left_out(copy):
    """One subject of MMMU was not converted."""
    folder = copy("mmmu")
    (folder / "Music").mkdir()
    (folder / "Music/validation-00000-of-00001.parquet").touch()
    with pytest.raises(FileNotFoundError, match="Music: no .*; .*Music/valid.* is not read here"):
        load("mmmu", folder)


def test_mmes_pictures_each_have_a_text(copy):
    folder = copy("mme")
    (folder / "color/00000.txt").unlink()
    with pytest.raises(FileNotFoundError, match="color/00000.txt"):
        load("mme", folder)


def test_mme_files_are_pairs(tmp_path):
    (tmp_path / "color").mkdir()
    (tmp_path / "color/a.txt").write_text("Is it red?\tYes\n")
    with pytest.raises(ValueError, match="not two lines"):
        load("mme", tmp_path)


@pytest.mark.parametrize("name, file, words", [
    ("mmmu", "Art/validation-00000-of-00001.parquet", "pandas.read_parquet"),
    ("mmbench", "mmbench.xlsx", "pandas.read_excel")])
def test_parquet_and_excel_are_told_how_to_become_readable(tmp_path, name, file, words):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=f"no .*{file} is not read here, but .*{words}.* converts it"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", ["gqa", "mmbench"])
def test_a_broken_picture_is_named_and_the_answers_before_it_are_kept(model, copy, tmp_path, name):
    questions = load(name, copy(name))
    if name == "gqa":
        questions[-1]["image"].write_bytes(b"no picture")
    else:
        questions[-1]["image"] = b"bm8gcGljdHVyZQ=="
    questions[-1]["prompt"] = questions[-1]["prompt"][:30]  # the shortest is asked last
    message = f"{questions[-1]['file']}: question '{questions[-1]['id']}': .*not a readable image"
    with pytest.raises(ValueError, match=message):
        evaluation.ask(*model, questions, "v1", 4, batch=2, file=tmp_path / "answers")
    assert len((tmp_path / "answers.0.jsonl").read_text().splitlines()) == len(questions) - 2


# ---- asking ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(run):
    return evaluation.load_run(run, CPU)[:2]


def ask_everything(rank, world, run, root, batch, file=None):
    """{benchmark: answers, and the likelihoods of options to three places}."""
    vlm, tokenizer, config = evaluation.load_run(run, CPU)
    found = {}
    for name in BENCHES:
        questions = load(name, root / BENCHES[name].folder)
        own = file and f"{file}-{name}"
        found[name] = evaluation.ask(vlm, tokenizer, questions, config["template"], 6, batch, own)
        closed = [question for question in questions if question.get("options")]
        rows = evaluation.likelihoods(vlm, tokenizer, closed, config["template"], batch)
        found[f"{name} likelihoods"] = [[round(value, 3) for value in row] for row in rows]
    return found


def test_batched_is_one_at_a_time_and_two_ranks_are_one(run, root, ranks, tmp_path):
    alone = ask_everything(0, 1, run, root, 1)
    batched = ask_everything(0, 1, run, root, 4)
    assert len({answer for name in BENCHES for answer in alone[name]}) > 20
    for name in BENCHES:
        assert alone[name] == batched[name], name
        for one, many in zip(alone[f"{name} likelihoods"], batched[f"{name} likelihoods"]):
            assert one == pytest.approx(many, abs=2e-3)
    for found in ranks(2, ask_everything, run, root, 4, tmp_path / "answers"):
        assert found == batched  # to the last bit: the batches are the same
    for name in BENCHES:
        shares = [tmp_path / f"answers-{name}.{rank}.jsonl" for rank in (0, 1)]
        counts = [len(share.read_text().splitlines()) for share in shares if share.exists()]
        # a batch more on one rank, and nothing twice
        assert sum(counts) == len(batched[name]) and max(counts) <= len(batched[name]) / 2 + 4


def test_likelihoods_equal_a_plain_loop(model, root):
    """Each option alone, without padding; also texts of several tokens, and a question without a picture."""
    vlm, tokenizer = model
    questions = load("scienceqa", root / "ScienceQA")[:5]
    questions[0]["options"], questions[1]["options"] = ["red circle", "blue", "a small ring"], ["A"]
    assert {question["image"] is None for question in questions} == {True, False}
    found = evaluation.likelihoods(vlm, tokenizer, questions, "v1", batch=3)
    for question, row in zip(questions, found):
        assert len(row) == len(question["options"])
        for option, likelihood in zip(question["options"], row):
            prompt = f"{data.SYSTEM} USER: {question['prompt']} ASSISTANT:"
            before, *after = prompt.split("<image>")
            ids = tokenizer(before).input_ids
            if after:
                ids += [vlm.image_token_id] * vlm.num_image_tokens
                ids += tokenizer(after[0], add_special_tokens=False).input_ids
            said = tokenizer(option, add_special_tokens=False).input_ids
            pixels = torch.zeros(1, 3, 48, 48)
            if after:
                picture = data.load_image(question["image"])
                pixels = data.preprocess(picture, vlm.vit.config, "pad")[None]
            with torch.no_grad():
                log_p = vlm(torch.tensor([ids + said]), pixels)[0].log_softmax(-1)
            expected = sum(log_p[len(ids) - 1 + i, token].item() for i, token in enumerate(said))
            assert likelihood == pytest.approx(expected, abs=1e-4)


def test_likelihoods_encode_a_picture_and_read_a_prompt_once(model, root, monkeypatch):
    """However many options there are: these have four or two, of a token each."""
    vlm, tokenizer = model
    questions, pictures, positions = load("mmbench", root / "MMBench"), [], []
    encode, hidden = vlm.encode, vlm.llm.hidden
    monkeypatch.setattr(vlm, "encode", lambda pixels: pictures.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(vlm.llm, "hidden", lambda embeds, *more: (
        positions.append(embeds.shape[:2]) or hidden(embeds, *more)))
    evaluation.likelihoods(vlm, tokenizer, questions, "v1", batch=len(questions))
    assert pictures == [len(questions)]
    prompts, *options = positions
    assert prompts[0] == len(questions) and prompts[1] > vlm.num_image_tokens
    assert options == [(len(questions), 2)] * 4  # the last token that all share, and the letter


def scored(run, *argv):
    """The result of the command in `run`'s directory, and the content of BENCH.json."""
    evaluation.main(["--bench", *map(str, argv), "--ckpt", str(run)])
    return json.loads((run / f"{argv[0]}.json").read_text())


@pytest.fixture
def own_run(run, tmp_path):
    return shutil.copytree(run, tmp_path / "own")


def test_a_killed_evaluation_goes_on_and_equals_an_undisturbed_one(own_run, root, monkeypatch):
    """Killed while writing, in each of the three rounds of questions; the first kill leaves half a line. Two
    ranks' files go on in one process."""
    argv = ["mmbench", "--data", root / "MMBench", "--score", "likelihood", "--floors"]
    in_batches = evaluation.in_batches
    monkeypatch.setattr(evaluation, "in_batches", lambda questions, answer, batch, file: in_batches(
        questions, answer, 2, file))
    expected, asked = scored(own_run, *argv), []
    assert not list(own_run.glob("*.jsonl"))  # of a finished one nothing is left over
    append = evaluation.append_answers

    def append_and_die(file, questions, answers):
        asked.extend(question["id"] for question in questions)
        append(file, questions, answers)
        if len(asked) in (8, 26, 50):
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_answers", append_and_die)
    for rounds in range(3):
        with pytest.raises(KeyboardInterrupt):
            scored(own_run, *argv)
        part, *_ = own_run.glob("*.partial.0.jsonl")
        lines = part.read_text().splitlines(keepends=True)
        if rounds == 0:
            assert len(lines) == 8
            part.write_text("".join(lines[:4]) + lines[0][:25])
            part.with_name(part.name.replace(".0.", ".1.")).write_text("".join(lines[4:]) + lines[1][:9])
    asked.append("no more deaths")
    assert scored(own_run, *argv) == expected
    assert len(asked) == 20 + 20 + 20 + 1  # nothing was asked twice
    assert not list(own_run.glob("*.jsonl"))


def test_a_killed_all_goes_on_with_the_benchmark_it_was_at(own_run, root, tmp_path, monkeypatch):
    for name in ("GQA", "TextVQA"):
        shutil.copytree(root / name, tmp_path / "some" / name)
    argv, asked, append = ["all", "--data", tmp_path / "some"], [], evaluation.append_answers

    def append_and_die(file, questions, answers):
        asked.append(file)
        append(file, questions, answers)
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_answers", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(["--bench", *map(str, argv), "--ckpt", str(own_run)])
    assert len(asked) == 2 and (own_run / "gqa.json").exists()
    evaluation.main(["--bench", *map(str, argv), "--ckpt", str(own_run)])
    assert len(asked) == 2 and (own_run / "textvqa.json").exists() and not list(own_run.glob("*.jsonl"))


def test_a_broken_line_of_kept_answers_is_named(own_run, root):
    (own_run / "gqa.partial.0.jsonl").write_text('{"id": "200000"\n{}\n')
    with pytest.raises(SystemExit, match="gqa.partial.0.jsonl: "):
        scored(own_run, "gqa", "--data", root / "GQA")


def test_answers_to_other_questions_are_refused(own_run, root):
    """Of another split; and to a question that reads otherwise now."""
    line = {"id": "1", "prompt": "Which?", "answer": "A"}
    (own_run / "scienceqa.partial.0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit, match="partial.0.jsonl: question '1' is not asked now, or reads"):
        scored(own_run, "scienceqa", "--data", root / "ScienceQA")
    line["id"] = load("scienceqa", root / "ScienceQA")[0]["id"]
    (own_run / "scienceqa.partial.0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit, match="reads otherwise"):
        scored(own_run, "scienceqa", "--data", root / "ScienceQA")


def failing(rank, world, run, root):
    """What the second rank's broken picture looks like on each rank."""
    vlm, tokenizer, config = evaluation.load_run(run, CPU)
    questions = load("gqa", root / "GQA")
    questions[-1] |= {"image": b"broken"}
    try:
        evaluation.ask(vlm, tokenizer, questions, config["template"], 2, batch=1)
    except ValueError as error:
        return str(error)


def test_an_error_of_one_rank_is_heard_on_all(run, root, ranks):
    first, second = ranks(2, failing, run, root)
    assert first == second and "question '200005': in base64: not a readable image" in first


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
    vlm, tokenizer, config = evaluation.load_run(llava_folder, CPU)
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


# ---- several turns about one picture -----------------------------------------------------------------------

TURN = "{{ '<s>' if loop.first else '' }}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' }}\n"
OWN_TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{{{ 'assistant:' if add_generation_prompt }}}}"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_a_turn_is_asked_behind_those_before_it(run, picture, monkeypatch, capsys, template):
    """What the model is given: the template of the whole conversation so far, and the picture, each time."""
    vlm, tokenizer, _ = evaluation.load_run(run, CPU)
    tokenizer.chat_template = OWN_TEMPLATE
    asked, generate = [], vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda *args, **how: asked.append(args) or generate(*args, **how))
    questions = "What color is the shape?", "What shape is it?", "Where is the <image>?"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", "Is this asked?"])))
    evaluation.chat(vlm, tokenizer, template, picture, max_new_tokens=5)
    answers, turns = capsys.readouterr().out.splitlines(), []
    assert len(answers) == len(asked) == 3 and all(answers)
    for question, answer, (ids, pixels, *_) in zip(questions, answers, asked):
        turns.append(("human", question if turns else f"<image>\n{question}"))
        expected, _ = data.tokenise(data.TEMPLATES[template](turns, tokenizer), tokenizer, True)
        marker = expected.index(data.IMAGE_MARKER)
        expected[marker : marker + 1] = [vlm.image_token_id] * vlm.num_image_tokens
        assert ids.tolist() == [expected] and torch.equal(pixels, asked[0][1]) and len(pixels) == 1
        assert ids[0].tolist().count(tokenizer.eos_token_id) == len(turns) // 2  # the ends of the answers
        turns.append(("gpt", answer))


def test_a_pipe_gets_the_answers_alone(run, picture):
    """From a process whose stdin is none of a person's; its last line has no end. The first answer is that of
    --ask."""
    argv = [sys.executable, ROOT / "eval.py", "--chat", picture, "--ckpt", run, "--max_new_tokens", "4"]
    said = subprocess.run(argv, input="What color is it?\nAnd its size?", capture_output=True, text=True)
    vlm, tokenizer, _ = evaluation.load_run(run, CPU)
    first, = evaluation.ask(vlm, tokenizer, [evaluation.about(picture, "What color is it?")], "v1", 4)
    second = evaluation.about(picture, "x") | {"prompt": "And its size?", "before": [
        ("human", "<image>\nWhat color is it?"), ("gpt", first)]}
    second, = evaluation.ask(vlm, tokenizer, [second], "v1", 4)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{first}\n{second}\n", "")


class Person(io.StringIO):
    """At a terminal; Ctrl-C at the end of what is typed."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


def test_a_person_is_prompted_and_may_leave_by_ctrl_c(run, picture, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Person("Is it red?\n"))
    evaluation.main(["--chat", picture, "--ckpt", str(run), "--max_new_tokens", "2"])
    out = capsys.readouterr().out
    assert out.startswith("> ") and out.endswith("\n> \n") and out.count("> ") == 2


def test_what_ends_a_chat_is_told_in_one_line(run, picture, tmp_path, monkeypatch):
    """A bad picture, before a question is read; a conversation that has become too long; several ranks."""
    monkeypatch.setattr(sys, "stdin", stdin := io.StringIO(30 * "What is it?\n"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for file, reason in (("bad.png", "not a readable image"), ("none.png", "no such image")):
        with pytest.raises(SystemExit, match=rf"^eval.py: .*{file}: {reason}.*$"):
            evaluation.main(["--chat", str(tmp_path / file), "--ckpt", str(run)])
    assert stdin.tell() == 0
    with pytest.raises(SystemExit, match=r"^eval.py: question '.*x.png, turn \d+': \d+ tokens; .* for 174$"):
        evaluation.main(["--chat", picture, "--ckpt", str(run), "--max_new_tokens", "850"])
    assert 0 < stdin.tell() < 30 * 12  # after some turns
    monkeypatch.setattr(evaluation, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="^eval.py: --chat has one stdin: run it without torchrun$"):
        evaluation.main(["--chat", picture, "--ckpt", str(run)])


# ---- the command -------------------------------------------------------------------------------------------


def test_all_answers_scores_and_writes_every_benchmark(own_run, root, capsys):
    evaluation.main(["--bench", "all", "--data", str(root), "--ckpt", str(own_run), "--limit", "2"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [result["bench"] for result in results] == list(BENCHES)
    for result in results:
        saved = json.loads((own_run / f"{result['bench']}.json").read_text())
        assert saved["scores"] == result and saved["predictions"][0]["prompt"].startswith("<image>")
        assert result["questions"] == {"mme": 4}.get(result["bench"], 2)
        is_scored = result["bench"] not in ("vqav2", "mmvet")
        assert ("accuracy" in result) == ("accuracy_se" in result) == is_scored
    written = {file.stem.removesuffix("-submit") for file in own_run.glob("*-submit*")}
    assert written == {"mmbench", "mmbench-cn", "vqav2", "mmvet"}


def test_all_says_what_is_not_there_and_goes_on_after_a_failure(own_run, root, tmp_path, capsys):
    for name in ("GQA", "TextVQA"):
        shutil.copytree(root / name, tmp_path / "some" / name)
    (tmp_path / "some/GQA/images/n0.jpg").unlink()
    argv = ["--bench", "all", "--ckpt", str(own_run), "--data"]
    with pytest.raises(SystemExit, match="^eval.py: failed: gqa$"):
        evaluation.main([*argv, str(tmp_path / "some")])
    printed = capsys.readouterr().out
    assert "not there, so not run: scienceqa (" in printed and '"bench": "textvqa"' in printed
    assert "gqa failed: " in printed and "n0.jpg" in printed
    with pytest.raises(SystemExit, match="no benchmark is there"):
        evaluation.main([*argv, str(tmp_path)])


def test_what_servers_and_judges_want(own_run, root, tmp_path):
    found = {}
    for name in ("mmbench", "vqav2", "mmvet"):
        file = tmp_path / name
        scored(own_run, name, "--data", root / BENCHES[name].folder, "--submit", file)
        predictions = json.loads((own_run / f"{name}.json").read_text())["predictions"]
        found[name] = file.read_text(), {row["id"]: row["text"] for row in predictions}
    text, said = found["mmbench"]
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert {row["index"]: row["prediction"] for row in rows} == said
    rows = {row["question_id"]: row["answer"] for row in json.loads(found["vqav2"][0])}
    assert len(rows) == 6 and {rows[number] for number in (3000, 4000, 5000)} == {""}  # the rest of test2015
    assert {number: vqa.normalise(text) for number, text in found["vqav2"][1].items()} == {
        number: rows[number] for number in (0, 1000, 2000)}
    assert json.loads(found["mmvet"][0]) == found["mmvet"][1]


def test_likelihood_and_floors_stand_beside_the_score(own_run, root, capsys, monkeypatch):
    """A model whose answers are unreadable still finds a letter likeliest."""
    monkeypatch.setattr(evaluation, "likelihoods", lambda vlm, tokenizer, questions, template, file: [
        [float(option == q["answer"]) for option in q["options"]] for q in questions])
    argv = ["seed", "--data", root / "SEED-Bench", "--score", "likelihood", "--floors"]
    scores = scored(own_run, *argv)["scores"]
    assert scores["accuracy"] == 0 and scores["unparsed"] == 6 and scores["likelihood"]["accuracy"] == 100
    assert set(scores["floors"]) > {"chance", "without_picture"}
    said = ("accuracy 0.0 (standard error 0.0), by likelihood 100.0 (standard error 0.0), "
            "6 answers that the rule cannot read")
    assert said in capsys.readouterr().out


def test_the_blind_model_gets_the_same_question_without_the_picture(root):
    question, blind = load("gqa", root / "GQA")[0], evaluation.without_picture(load("gqa", root / "GQA"))[0]
    assert blind["image"] is None and f"<image>\n{blind['prompt']}" == question["prompt"]


def test_help_shows_the_values_in_force(run, tmp_path, monkeypatch, capsys):
    """Of the last run, if there is one; a damaged one spoils no help."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "runs/mine").mkdir(parents=True)
    found = []
    for config in (None, '{"benchmarks": "50%"}', "[]", "{"):
        if config:
            (tmp_path / "runs/last").write_text("runs/mine")
            (tmp_path / "runs/mine/config.json").write_text(config)
        with pytest.raises(SystemExit) as end:
            evaluation.main(["--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        found.append(re.findall(r"the last: (.*?)\]", text))
        assert "scienceqa test, seed image" in text and "[64]" in text
        assert text.index("--top_p TOP_P") < text.index("examples:") < text.index("python eval.py --chat")
    assert found == [["none", "none"], ["runs/mine", "50%"], ["none", "none"], ["none", "none"]]


def test_no_run_yet(tmp_path, monkeypatch):
    """As a function, and as one line of the script."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        evaluation.last_run()
    with pytest.raises(SystemExit, match="^eval.py: no run to score yet.*$"):
        evaluation.main(["--bench", "scienceqa"])


@pytest.mark.parametrize("argv", [
    [], ["--bench", "pope", "--ask", "a.png", "What?"], ["--bench", "vqa"],
    ["--chat", "a.png", "--ask", "a.png", "What?"], ["--chat", "a.png", "--max_new_tokens", "0"],
    ["--ask", "a.png", "What?", "--temperature", "-1"], ["--bench", "all", "--split", "test"],
    ["--bench", "pope", "--submit", "x"], ["--bench", "vqav2", "--submit", "no/such/folder/x"],
    ["--bench", "vqav2", "--submit", "x", "--ckpt", "a", "b"],
    ["--bench", "pope", "--limit", "0"], ["--ask", "a.png", "What?", "--floors"]])
def test_bad_options_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main(argv)
    assert end.value.code == 2 and ": error: " in capsys.readouterr().err
