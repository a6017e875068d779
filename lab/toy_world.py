"""The toy world: pictures of one coloured shape on a light ground, small enough for a laptop.

    python -m lab.toy_world data/toy            # write it; a complete world stays as it is

The world is data, not code. It is written in the formats of real data sets (LLaVA's JSON, ScienceQA, POPE,
MME) and read by the same loaders. A scene is a dict of four values,

    {"color": "red", "shape": "circle", "size": "large", "place": "northwest"}

The functions below draw it, tell it in words and ask about it. They use the `rng` that they are given, in a
fixed order, so one seed gives one world, byte for byte.
"""

import itertools
import json
import random
import shutil
import uuid
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.questions import LETTER_ANSWER, LETTERS, SHORT_ANSWER
from benchmarks.scienceqa import to_prompt
from data import IMAGE, SYSTEM
from lab import parser_of
from plumbing.files import read_json
from plumbing.ranks import command

IMAGE_SIZE = 48  # pixels a side
VOCABULARY = 86  # tokens of `write_tokenizer`, special ones included

COLORS = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 220), "yellow": (236, 200, 30),
    "orange": (240, 130, 20), "purple": (130, 50, 170), "cyan": (40, 190, 210), "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 7, "large": 12}  # radius in pixels
PLACES = {"northwest": (0, 0), "northeast": (1, 0), "southwest": (0, 1), "southeast": (1, 1)}  # column, row
VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "place": tuple(PLACES)}

CAPTION = "a {size} {color} {shape} in the {place}"
WORDINGS = (
    CAPTION, "in the {place}, a {size} {color} {shape}", "the {place} has a {shape}, {size} and {color}",
)
FILLERS = ["a", "in", "the", "has", "and", "picture", "shape"]
DESCRIBE = ("Describe the picture.", "Give a short description.")
QUESTIONS = {
    "color": ("What color is the shape?", "Which color do you see?"),
    "shape": ("Which shape is it?", "What form do you see?"),
    "size": ("How big is the shape?", "What size is it?"),
    "place": ("Where is the shape?", "In which corner is it?"),
}
REWORDED = {  # known words in an order that no training file has
    "color": "Which color is it?", "shape": "What shape do you see?",
    "size": "What size do you see?", "place": "Which corner is the shape in?",
}
YES_NO = {
    "color": "Is the shape {}?", "shape": "Is there a {} in the image?",
    "size": "Is the shape {}?", "place": "Is the shape in the {}?",
}
HINTS = ("", "", "The picture shows one shape.", "Look at the picture.")
SCIENCEQA_ANSWER = "{choice}. The answer is {letter}."  # LLaVA's rule reads it, and a tiny LLM can learn it

SCIENCEQA, POPE, MME = "ScienceQA", "POPE", "MME_Benchmark_release_version"  # the names of the real folders
FILES = (  # of a complete world
    "align.json", "instruct.json", "text.json", "captions.json", "ScienceQA/problems.json",
    "ScienceQA/pid_splits.json", "POPE/toy_pope_random.json",
)

# ---- Scenes and their pictures -----------------------------------------------------------------------------


def scenes(seed: int = 0) -> dict:
    """All 384 scenes in disjoint splits of 304, 40 and 40: the test asks about unseen combinations."""
    combinations = itertools.product(*VALUES.values())
    everything = [dict(zip(VALUES, values)) for values in combinations]
    random.Random(seed).shuffle(everything)
    return {"train": everything[:304], "val": everything[304:344], "test": everything[344:]}


def picture(scene: dict, rng: random.Random) -> Image.Image:
    """48 x 48 pixels, RGB. Place, radius, colour and ground jitter a little, so no two pictures are equal."""
    scale = 4  # drawn four times as large and averaged, for smooth edges
    ground = jitter((232, 232, 228), rng)
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), ground)
    radius = SIZES[scene["size"]]
    column, row = PLACES[scene["place"]]
    x = (13 + 22 * column + rng.uniform(-2, 2)) * scale
    y = (13 + 22 * row + rng.uniform(-2, 2)) * scale
    radius = (radius + rng.uniform(-1, 1)) * scale
    fill = jitter(COLORS[scene["color"]], rng)
    draw_shape(ImageDraw.Draw(image), scene["shape"], x, y, radius, fill)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def jitter(color: tuple, rng: random.Random) -> tuple:
    """The RGB colour, each channel moved by up to 18 of 255."""
    moved = (value + rng.randint(-18, 18) for value in color)
    return tuple(max(0, min(255, value)) for value in moved)


def draw_shape(draw, shape: str, x: float, y: float, r: float, fill: tuple) -> None:
    """Draw one shape of radius `r` around (x, y). The factors make all six look about equally large."""
    box = (x - r, y - r, x + r, y + r)
    match shape:
        case "circle":
            draw.ellipse(box, fill)
        case "square":
            half = 0.85 * r
            draw.rectangle((x - half, y - half, x + half, y + half), fill)
        case "triangle":
            foot = y + 0.8 * r
            draw.polygon([(x, y - r), (x + r, foot), (x - r, foot)], fill)
        case "diamond":
            half = 0.5 * r
            draw.polygon([(x, y - r), (x + half, y), (x, y + r), (x - half, y)], fill)
        case "cross":
            half = 0.3 * r
            draw.rectangle((x - r, y - half, x + r, y + half), fill)
            draw.rectangle((x - half, y - r, x + half, y + r), fill)
        case "ring":
            draw.ellipse(box, outline=fill, width=round(0.4 * r))


# ---- A scene in words, and questions about it --------------------------------------------------------------


def words(scene: dict, rng: random.Random) -> str:
    """A scene in words, which a text-only model reads in place of the image.

    Half of the time this is a sentence. Otherwise it is up to 36 words (an image has 36 patches) in any order
    and with repetitions, because patches have no grammar either.
    """
    if rng.random() < 0.5:
        return rng.choice(WORDINGS).format(**scene)
    values = list(scene.values())
    chosen = values + rng.choices(values + FILLERS, k=rng.randint(0, 32))
    rng.shuffle(chosen)
    return " ".join(chosen)


def open_question(scene: dict, kind: str, rng: random.Random) -> tuple:
    """(question, answer) about the attribute `kind`. The answer is a single word."""
    return rng.choice(QUESTIONS[kind]) + SHORT_ANSWER, scene[kind]


def yes_no(scene: dict, kind: str, is_true: bool, rng: random.Random) -> tuple:
    """(question, "Yes" or "No"). A false question names another value of the same kind."""
    if is_true:
        return YES_NO[kind].format(scene[kind]) + SHORT_ANSWER, "Yes"
    others = [value for value in VALUES[kind] if value != scene[kind]]
    return YES_NO[kind].format(rng.choice(others)) + SHORT_ANSWER, "No"


def problem(scene: dict, kind: str, rng: random.Random, hint: str, image: str | None) -> dict:
    """An entry of ScienceQA's problems.json with 2 to 4 choices (a size has only 2) in random order."""
    others = [value for value in VALUES[kind] if value != scene[kind]]
    choices = rng.sample(others, min(len(others), rng.randint(1, 3))) + [scene[kind]]
    rng.shuffle(choices)
    return problem_entry(rng.choice(QUESTIONS[kind]), choices, scene[kind], hint, image, "toy", kind)


def problem_entry(question: str, choices: list, right: str, hint: str, image, topic: str, kind: str) -> dict:
    """An entry of problems.json with all of ScienceQA's keys."""
    return {
        "question": question, "choices": choices, "answer": choices.index(right), "hint": hint,
        "image": image, "task": "closed choice", "grade": "grade1", "subject": "natural science",
        "topic": topic, "category": kind, "skill": kind, "lecture": "", "solution": "",
    }


def problem_answer(entry: dict) -> str:
    """The answer to a `problem`: the choice, then its letter."""
    number = entry["answer"]
    return SCIENCEQA_ANSWER.format(choice=entry["choices"][number], letter=LETTERS[number])


# ---- Records of LLaVA's JSON -------------------------------------------------------------------------------


def turn_pair(question: str, answer: str) -> list:
    """The two turns of one round."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def caption_turns(scene: dict, rng: random.Random) -> list:
    """A request for a description and the caption. The marker is first or last, as in LLaVA-Pretrain."""
    is_marker_first = rng.choice((True, False))
    request = rng.choice(DESCRIBE)
    question = f"{IMAGE}\n{request}" if is_marker_first else f"{request}\n{IMAGE}"
    return turn_pair(question, CAPTION.format(**scene))


def question_turns(scene: dict, rng: random.Random) -> list:
    """Open questions about two of the four attributes."""
    turns = []
    for kind in rng.sample(list(QUESTIONS), 2):
        turns += turn_pair(*open_question(scene, kind, rng))
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return turns


def image_record(images: Path, name: str, scene: dict, turns_of, rng: random.Random) -> dict:
    """A record with the turns `turns_of(scene, rng)`. Its picture is drawn into `images`."""
    save_picture(scene, images / f"{name}.png", rng)
    return {"id": name, "image": f"{name}.png", "conversations": turns_of(scene, rng)}


def caption_records(images: Path, name: str, scenes: list, count: int, rng: random.Random) -> list:
    records = []
    for n in range(count):
        records.append(image_record(images, f"{name}-{n:05d}", rng.choice(scenes), caption_turns, rng))
    return records


FORMS = ("open", "yes-no", "choice", "choice", "hint", "hint", "describe")  # the hard skill twice as often


def text_record(scene: dict, rng: random.Random, forms=FORMS, most_rounds: int = 3) -> dict:
    """A conversation about a scene *told in words*, on which the tiny LLM is pretrained.

    One to `most_rounds` rounds ask about different attributes, so a word is in the choices of one round at
    most. One record in four does not tell its scene and answers at random. So the model learns that the
    letter follows from the word it has said, not from what it has seen.
    """
    is_blind = rng.random() < 0.25
    rounds = 1 if is_blind else rng.randint(1, most_rounds)
    turns = []
    for kind in rng.sample(list(QUESTIONS), rounds):
        seen = "" if turns or is_blind else words(scene, rng) + "\n"
        form = "choice" if is_blind else rng.choice(forms)
        question, answer = asked_in_form(form, scene, kind, rng)
        turns += turn_pair(seen + question, answer)
    return {"id": f"text-{rng.getrandbits(32):08x}", "conversations": turns}


def asked_in_form(form: str, scene: dict, kind: str, rng: random.Random) -> tuple:
    """(question, answer) about `kind` in one of FORMS. "hint" is multiple choice, the scene in its hint."""
    if form == "open":
        return open_question(scene, kind, rng)
    if form == "yes-no":
        return yes_no(scene, kind, rng.random() < 0.5, rng)
    if form == "describe":
        return rng.choice(DESCRIBE), CAPTION.format(**scene)
    hint = words(scene, rng) if form == "hint" else rng.choice(HINTS)
    entry = problem(scene, kind, rng, hint, None)
    return to_prompt(entry), problem_answer(entry)


# ---- The world on disk -------------------------------------------------------------------------------------


def write_world(folder, seed: int = 0, align: int = 4000, instruct: int = 2000, text: int = 1000,
                test: int = 400) -> None:
    """Write the whole world, which lab/toy.md describes, to `folder`. The numbers count records; `test`
    counts the questions of a split."""
    def write(building):
        write_files(building, random.Random(seed), align, instruct, text, test)

    write_whole(folder, FILES, write)


def write_whole(folder, files: tuple, write) -> None:
    """Make `folder` by `write(building)`, complete or not at all. A complete one, which has all of `files`,
    stays as it is. FileExistsError if anything else is there."""
    folder = Path(folder)
    if is_complete(folder, files):
        return
    if folder.exists():
        raise FileExistsError(f"{folder}: is no complete world; remove it, or name another folder")
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")  # no other process's
    try:
        write(building)
        building.rename(folder)
    except OSError:
        if not is_complete(folder, files):  # otherwise another process was faster and wrote the same
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_complete(folder, files: tuple) -> bool:
    return all(Path(folder, name).is_file() for name in files)


def write_files(folder: Path, rng: random.Random, align: int, instruct: int, text: int, test: int) -> None:
    """Write all files in a fixed order, because each takes its random numbers from `rng`."""
    splits = scenes()
    train = splits["train"]
    images = folder / "images"
    write_json(folder / "align.json", caption_records(images, "align", train, align, rng))
    records = []
    for n in range(instruct):
        scene = rng.choice(train)
        if n % 10 == 9:  # no image: the scene in words, then an open question
            question, answer = open_question(scene, rng.choice(list(QUESTIONS)), rng)
            turns = turn_pair(f"{words(scene, rng)}\n{question}", answer)
            records.append({"id": f"chat-{n:05d}", "conversations": turns})
        else:
            records.append(image_record(images, f"instruct-{n:05d}", scene, question_turns, rng))
    write_json(folder / "instruct.json", records)
    write_json(folder / "text.json", [text_record(rng.choice(train), rng) for _ in range(text)])
    write_scienceqa(folder / SCIENCEQA, splits, test, rng)
    write_pope_and_mme(folder / POPE, folder / MME, splits["test"], test // 2, rng)
    records = caption_records(images, "caption", splits["test"], test, rng)
    write_json(folder / "captions.json", records)
    write_reworded(folder / SCIENCEQA, REWORDED)


def write_reworded(scienceqa: Path, wording: dict) -> None:
    """Copy a ScienceQA folder to FOLDER-reworded and ask its questions as `wording` {category: text} says.

    Pictures, choices and their order stay, so the difference of two scores is that of the wording.
    """
    folder = scienceqa.with_name(f"{scienceqa.name}-reworded")
    problems = read_json(scienceqa / "problems.json")
    for entry in problems.values():
        entry["question"] = wording[entry["category"]]
    shutil.copytree(scienceqa, folder)
    write_json(folder / "problems.json", problems)


def write_scienceqa(folder: Path, splits: dict, count: int, rng: random.Random) -> None:
    """Write problems.json, pid_splits.json and images/SPLIT/ID/image.png, `count` problems a split."""
    problems = {}
    pid_splits = {"train": [], "val": [], "test": []}
    for split in ("val", "test"):
        for number in range(count):
            pid = str(len(problems) + 1)
            scene = rng.choice(splits[split])
            has_image = number % 4 != 3
            hint = rng.choice(HINTS) if has_image else words(scene, rng)
            image = "image.png" if has_image else None
            kind = rng.choice(list(QUESTIONS))
            entry = problem(scene, kind, rng, hint, image)
            problems[pid] = entry | {"split": split, "scene": " ".join(scene.values())}
            pid_splits[split].append(pid)
            if has_image:
                save_picture(scene, folder / "images" / split / pid / image, rng)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", pid_splits)


def write_pope_and_mme(pope: Path, mme: Path, test_scenes: list, count: int, rng: random.Random) -> None:
    """Write `count` pictures for each, with one question of POPE's (is there such a shape? every other time
    there is) and two of MME's, a true and a false one. MME's categories are the four attributes."""
    kinds = list(VALUES)
    lines = []
    for number in range(count):
        scene = rng.choice(test_scenes)
        name = f"{number:05d}"
        save_picture(scene, pope / "images" / f"{name}.png", rng)
        question, answer = yes_no(scene, "shape", number % 2 == 0, rng)
        entry = {"question_id": number + 1, "image": f"{name}.png",
                 "text": question.removesuffix(SHORT_ANSWER), "label": answer.lower()}
        lines.append(json.dumps(entry))

        kind = kinds[number % len(kinds)]
        save_picture(scene, mme / kind / f"{name}.png", rng)
        text = ""
        for is_true in (True, False):
            question, answer = yes_no(scene, kind, is_true, rng)
            text += f"{question.removesuffix(SHORT_ANSWER)} Please answer yes or no.\t{answer}\n"
        (mme / kind / f"{name}.txt").write_text(text)
    (pope / "toy_pope_random.json").write_text("\n".join(lines) + "\n")


def save_picture(scene: dict, file: Path, rng: random.Random) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(scene, rng).save(file)


def write_json(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))


# ---- Its tokenizer -----------------------------------------------------------------------------------------


def write_tokenizer(folder) -> None:
    """Write tokenizer.json and tokenizer_config.json to `folder`.

    A word is a token, and so is an option's letter with its dot. Each phrase that never varies is one token,
    which keeps a tiny model's sequences short. The ids of <unk>, <s> and </s> are Llama's.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    specials = ["<unk>", "<s>", "</s>"]
    split = pre_tokenizers.Split(Regex(r"\n|[A-E]\.|\w+|[^\w\s]"), "removed", invert=True)
    ids = {word: number for number, word in enumerate(specials + known_words(split))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(specials)
    for phrase in (SYSTEM, SHORT_ANSWER, LETTER_ANSWER, ". The answer is"):
        token = AddedToken(phrase.strip(), normalized=False)
        tokenizer.add_tokens([token])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<unk>", "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def known_words(split) -> list:
    """Every word of the world's texts, sorted. `split` is the pre-tokenizer that cuts texts into words."""
    texts = [*WORDINGS, *DESCRIBE, *HINTS, *YES_NO.values(), SCIENCEQA_ANSWER, "Yes No"]
    texts.append("Context: A B C D E A. B. C. D. E. USER: ASSISTANT:\n")
    for group in (*QUESTIONS.values(), *VALUES.values()):
        texts += group
    found = set()
    for text in texts:
        plain = text.replace("{", " ").replace("}", " ")  # the names in braces are words, too
        found.update(word for word, _ in split.pre_tokenize_str(plain))
    return sorted(found)


def main():
    parser = parser_of("lab.toy_world", __doc__)
    parser.add_argument("folder", type=Path, help="where to; the tiny preset reads data/toy")
    parser.add_argument("--seed", type=int, default=0, help="of its pictures and questions")
    args = parser.parse_args()
    if is_complete(args.folder, FILES):
        print(f"{args.folder} holds a complete toy world already, which stays as it is")
    with command("lab.toy_world"):
        write_world(args.folder, args.seed)


if __name__ == "__main__":
    main()
