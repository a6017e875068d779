"""Every benchmark in its official layout, small and invented: scenes of the toy world, asked about in its
words.

    python tests/layouts.py FOLDER && python eval.py --bench all --data FOLDER --ckpt RUN
"""

import base64
import csv
import io
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lab import toy_world
from lab.toy_world import VALUES, save_picture, write_json

SUBJECTS = ("natural science", "social science", "language science")
CAPTION = "a small red circle in the northwest"


def write_all(root, count: int = 6, seed: int = 0) -> Path:
    """`count` questions, or pictures, for each benchmark below `root`."""
    root, rng = Path(root), random.Random(seed)
    toy_world.write_scienceqa(root / "ScienceQA", toy_world.scenes(), count, rng)
    spread_over_subjects(root / "ScienceQA/problems.json")
    toy_world.write_pope_and_mme(root / "POPE", root / "MME_Benchmark_release_version",
                                 toy_world.scenes()["test"], count, rng)
    write_seed(root / "SEED-Bench", count, rng)
    write_mmbench(root / "MMBench/mmbench_dev_20230712.tsv", count, rng, refers=False)
    write_mmbench(root / "MMBench-CN/mmbench_dev_cn_20231003.tsv", count, rng, refers=True)
    write_gqa(root / "GQA", count, rng)
    write_textvqa(root / "TextVQA", count, rng)
    write_vqav2(root / "VQAv2", count, rng)
    write_mmmu(root / "MMMU", count, rng)
    write_mmvet(root / "mm-vet", count, rng)
    return root


def spread_over_subjects(file):
    problems = json.loads(file.read_text())
    for number, problem in enumerate(problems.values()):
        problem |= {"subject": SUBJECTS[number % 3], "grade": f"grade{1 + number % 12}"}
    write_json(file, problems)


def closed_question(rng, choices: int = 4) -> tuple:
    """(scene, question, choices, number of the right one) about a colour."""
    scene = rng.choice(toy_world.scenes()["test"])
    others = [value for value in VALUES["color"] if value != scene["color"]]
    options = rng.sample(others, choices - 1) + [scene["color"]]
    rng.shuffle(options)
    return scene, "What color is the shape?", options, options.index(scene["color"])


def write_seed(folder, count, rng):
    """The last question is of the video part."""
    questions = []
    for number in range(count + 1):
        scene, text, options, right = closed_question(rng)
        save_picture(scene, folder / f"SEED-Bench-image/{number}_1.png", rng)
        row = {"question_id": str(100 + number), "data_id": f"{number}_1.png", "question": text,
               "data_type": "image" if number < count else "video", "question_type_id": 1 + number % 9,
               "answer": "ABCD"[right]}
        questions.append(row | {f"choice_{x}": option for x, option in zip("abcd", options)})
    kinds = {f"Dimension {number}": number for number in range(1, 13)}
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": kinds})


def write_mmbench(file, count, rng, refers: bool):
    """Each question once for each rotation of its options, two or four; with and without a hint. Where
    `refers`, a rotation names the row that holds its picture."""
    rows = []
    for number in range(count):
        scene, text, options, right = closed_question(rng, 2 if number % 3 == 2 else 4)
        picture = io.BytesIO()
        toy_world.picture(scene, rng).save(picture, "png")
        encoded = base64.b64encode(picture.getvalue()).decode()
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {"index": number + turn * 10**6, "question": text, "hint": "nan" if number % 2 else CAPTION}
            row |= {x: option for x, option in zip("ABCD", turned + ["", ""])}
            row |= {"answer": "ABCD"[turned.index(options[right])], "category": f"kind {number % 2}",
                    "image": str(number) if refers and turn else encoded, "source": "invented"}
            rows.append(row | {"l2-category": "all", "comment": "", "split": "dev"})
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0], delimiter="\t")
        table.writeheader()
        table.writerows(rows)


def write_gqa(folder, count, rng):
    questions = {}
    for number in range(count):
        scene, text, _, _ = closed_question(rng)
        save_picture(scene, folder / f"images/n{number}.jpg", rng)
        questions[f"2{number:05d}"] = {"question": text, "answer": scene["color"], "imageId": f"n{number}",
                                       "types": {"structural": "query"}}
    write_json(folder / "testdev_balanced_questions.json", questions)


def write_textvqa(folder, count, rng):
    """Two questions a picture; the last picture has no OCR tokens."""
    rows, tokens = [], []
    for number in range(count):
        scene, text, options, _ = closed_question(rng)
        if number % 2 == 0:
            save_picture(scene, folder / f"train_images/{number}.jpg", rng)
            told = [] if number >= count - 2 else [scene["color"], "cross"]
            tokens.append({"image_id": str(number), "ocr_tokens": told, "ocr_info": []})
        rows.append({"question_id": 34600 + number, "image_id": str(number - number % 2), "question": text,
                     "answers": [scene["color"]] * 7 + options[:3]})
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def write_vqav2(folder, count, rng):
    """test-dev is the first half of test."""
    rows = []
    for number in range(count):
        scene, text, _, _ = closed_question(rng)
        save_picture(scene, folder / f"test2015/COCO_test2015_{number:012d}.jpg", rng)
        rows.append({"question_id": number * 1000, "image_id": number, "question": text})
    for split, part in (("test-dev2015", rows[: count // 2]), ("test2015", rows)):
        write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": part})


def write_mmmu(folder, count, rng):
    """Art: multiple choice, pictures in base64, a list of rows. Math: open, picture files, JSON lines; the
    first with two pictures."""
    art, maths = [], []
    for number in range(1, count + 1):
        scene, text, options, right = closed_question(rng)
        file = folder / f"Math/{number}.png"
        save_picture(scene, file, rng)
        encoded = base64.b64encode(file.read_bytes()).decode()
        art.append({"id": f"validation_Art_Theory_{number}", "question": f"<image 1> {text}",
                    "options": str(options), "answer": "ABCD"[right], "question_type": "multiple-choice",
                    "image_1": {"bytes": encoded, "path": "x.png"}, "image_2": None})
        maths.append({"id": f"validation_Math_{number}", "question": text, "options": "[]",
                      "answer": str([scene["color"], "1.5"]), "question_type": "open",
                      "image_1": file.name, "image_2": file.name if number == 1 else None})
    write_json(folder / "Art_Theory/validation-00000-of-00001.json", art)
    lines = [json.dumps(row) + "\n" for row in maths]
    (folder / "Math/validation.jsonl").write_text("".join(lines))


def write_mmvet(folder, count, rng):
    rows = {}
    for number in range(count):
        scene, text, _, _ = closed_question(rng)
        save_picture(scene, folder / f"images/v1_{number}.png", rng)
        rows[f"v1_{number}"] = {"imagename": f"v1_{number}.png", "question": text, "answer": scene["color"],
                                "capability": ["rec"]}
    write_json(folder / "mm-vet.json", rows)


if __name__ == "__main__":
    write_all(sys.argv[1])
