"""What people really feed it: bad inputs of each kind, made by the hundred, and a table of how they end;
then a test for every fault that was found with a public bug report."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import data
import eval as evaluation
import kills
import layouts
import train
from benchmarks import scienceqa as scienceqa_bench
from conftest import ROOT, checkpoints_kept, llama_config, shaken
from eval import BENCHES
from llm import LLM, load_llm_config
from plumbing.llava import MESSAGES
from plumbing.pictures import find_image
from plumbing.tokenizer import load_tokenizer
from plumbing.weights import read_shard, read_weights
from projector import VLM
from running import checkpoint
from running.check import check
from running.options import configure, parse_args
from running.records import load_records
from test_check import pictured, write_records
from test_data import CHAT_TURNS, TEXT, TOWER, chat_tokenizer, encode, llama2, record
from test_ids import CHATML, QWEN3, chatml
from test_train import HERE, called, how_it_ends, log_of, script, start, trained
from test_train import world  # noqa: F401 (a fixture)
from vit import ViT, ViTConfig, load_vit_config

CPU = torch.device("cpu")


# ---- bad inputs by the hundred -----------------------------------------------------------------------------


@contextmanager
def limited(seconds):
    """TimeoutError after so many seconds."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(function, *args):
    """("fine", what it returns), ("line", the line with which a command ends), ("traceback", ..) or
    ("hang", ..)."""
    try:
        with limited(30), redirect_stdout(io.StringIO()):
            return "fine", function(*args)
    except TimeoutError as error:
        return "hang", str(error)
    except SystemExit as end:
        text = str(end.code)
        return ("line", text) if "\n" not in text.strip() else ("traceback", text)
    except (OSError, ValueError) as error:  # what the commands turn into a line
        text = str(error)
        return ("line", text) if text.strip() and "\n" not in text.strip() else ("traceback", repr(error))
    except BaseException as error:
        return "traceback", repr(error)


ENCODINGS = [  # (ending, options, mode)
    ("png", {}, "RGB"), ("png", {}, "RGBA"), ("png", {}, "I;16"), ("png", {}, "P"), ("jpg", {}, "RGB"),
    ("jpg", {"progressive": True}, "L"), ("gif", {}, "P"), ("bmp", {}, "RGB"),
    ("webp", {"lossless": True}, "RGBA"), ("webp", {}, "RGB"), ("avif", {}, "RGB"), ("tif", {}, "CMYK"),
    ("tif", {"compression": "tiff_lzw"}, "RGB"), ("jp2", {}, "RGB"), ("ico", {}, "RGBA"), ("tga", {}, "RGB"),
    ("ppm", {}, "RGB"), ("pcx", {}, "RGB"), ("dds", {}, "RGBA"), ("qoi", {}, "RGB"),
]


def damaged(content: bytes, rng) -> bytes:
    """Cut, or some bytes changed (often those of the header), or a part said twice."""
    way, content = rng.randrange(4), bytearray(content)
    if way == 0:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice((1, 4, 30))) if way < 3 else ():
        content[rng.randrange(len(content) if way == 1 else min(60, len(content)))] = rng.randrange(256)
    if way == 3:
        at = rng.randrange(len(content))
        content[at:at] = content[at // 2 : at]
    return bytes(content)


def bad_images(folder, rng):
    """A damaged picture is either a whole RGB picture all the same, or a line; never in between."""
    for number, (ending, options, mode) in enumerate(ENCODINGS * 6):
        file = folder / f"{number}.{ending}"
        noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
        picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture
        picture.save(file, **options)
        file.write_bytes(damaged(file.read_bytes(), rng))
        fit = rng.choice(("crop", "pad"))
        how, value = outcome(lambda: data.preprocess(data.load_image(file), TOWER, fit))
        yield how, value, how != "fine" or value.shape == (3, 32, 32)


ODD = [None, True, 0, -1, 1e400, 10**30, "", "x", "\ud800", "a\0b", [], [[]], {}, {"x": []}, [None],
       "<image>", "<image>\n<image>", "</s>", "é" * 3000, "../../x.png", "/etc/passwd", "a" * 300,
       "\U000f0000\U00100000"]


def bad_records(folder, rng, images, tokenizer_folder):
    """One odd value somewhere in a record. `check` ends, keeps what is good and nothing else: what it keeps,
    training reads, and what it lists, training refuses or leaves out."""
    good = sorted(images.iterdir())[0].name
    for number, odd in enumerate(ODD * 4):
        bad = json.loads(json.dumps(record("<image>\nWhat color is it?", "a small red circle", image=good)))
        turn = rng.choice(bad["conversations"])
        place = [(bad, "image"), (turn, "value"), (turn, "from"), (bad, "conversations"), (bad, "id")][
            number % 5
        ]
        place[0][place[1]] = odd
        file = folder / f"{number}.json"
        file.write_text(json.dumps([TEXT, bad]))
        how, value = outcome(check, file, images, None, tokenizer_folder, "v1", 16, 200)
        clean = file.with_suffix(".clean.json")
        kept = len(json.loads(clean.read_text())) if clean.exists() else 2
        trains, read = outcome(read_all, file, images, tokenizer_folder)
        agrees = len(read["ids"]) == kept if trains == "fine" else value > 0
        is_right = how == "fine" and kept == 2 - value and agrees
        yield how if trains in ("fine", "line") else trains, value, is_right


def read_all(file, images, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    samples = data.Conversations(load_records(file), images, tokenizer, "v1", TOWER, "pad")
    return data.collate([samples[i] for i in range(len(samples))], 16, -200, 0, 32, 200)


def bad_json(folder, rng):
    """Files that are no JSON, or no list of records, or too much."""
    texts = ["", "[", "[" * 10**5, '{"a":' * 10**5, "nul", "[1,", '["\\ud8', "[" + "9" * 5000 + "]", "NaN",
             "{}", "[]", "\ufeff", "[[]]", "[1]", "null", '"x"', "[{}]", "true", "[]]", "{'a': 1}"]
    contents = [text.encode() for text in texts]
    contents += [b"\xff\xfe[", b"\x80", b"\0" * 100, bytes(rng.randrange(256) for _ in range(100)),
                 b"\x1f\x8b\x08"]
    for number, content in enumerate(contents):
        file = folder / f"{number}.json"
        file.write_bytes(content)
        for function in (load_records, lambda f: scienceqa_bench.load(scienceqa(f))):
            how, value = outcome(function, file)
            yield how, value, how == "line" and (str(file) in value or "problems.json" in value)


def scienceqa(file):
    folder = Path(f"{file}.scienceqa")
    folder.mkdir(exist_ok=True)
    (folder / "pid_splits.json").write_text('{"test": ["1"]}')
    shutil.copy(file, folder / "problems.json")
    return folder


def bad_weights(folder, rng, vlm):
    """Files of weights cut or with a damaged header, of either kind; config.json goes with them."""
    vlm.save(folder / "run", {"stage": "align"}, with_llm=False)
    vlm.llm.save_pretrained(folder / "llm")
    torch.save(dict(vlm.llm.named_parameters()), folder / "weights.bin")
    files = {"llm": (folder / "llm/model.safetensors").read_bytes(),
             "bin": (folder / "weights.bin").read_bytes()}
    for number in range(30):
        kind = ("llm", "bin")[number % 2]
        target = folder / ("llm/model.safetensors" if kind == "llm" else "llm/pytorch_model.bin")
        for old in (folder / "llm").glob("*model*.*"):
            old.unlink()
        content = bytearray(files[kind])
        if number % 4 < 2:
            content = content[: rng.randrange(len(content))]
        else:  # the headers: of safetensors at the start, of a zip file at its end
            at = rng.randrange(8) if kind == "llm" else len(content) - 1 - rng.randrange(60)
            content[at] ^= 1 << rng.randrange(8)
        target.write_bytes(content)
        how, value = outcome(LLM.from_pretrained, folder / "llm")
        same = how == "fine" and all(map(torch.equal, value.parameters(), vlm.llm.parameters()))
        yield how, value, how == "line" or same


def bad_checkpoints(folder, rng, world):
    """The last checkpoint of a run cut, or with one bit flipped anywhere: a line, or the same weights."""
    options = [*world[1], "--stage", "align", "--save_every", "2", "--out", folder / "run"]
    with checkpoints_kept():
        called(train.main, world[0], *options)
    expected = (folder / "run/projector.safetensors").read_bytes()
    (folder / "run/config.json").unlink()
    shutil.copytree(folder / "run", folder / "kept")
    for number in range(12):
        shutil.rmtree(folder / "run")
        shutil.copytree(folder / "kept", folder / "run")
        last = max((folder / "run").glob("checkpoint-*"))
        file = last / ("rank-0.pt" if number % 4 else "made_of.json")
        content = bytearray(file.read_bytes())
        if number % 3 == 0:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        how, value = outcome(called, train.main, world[0], *options, "--resume")
        same = (folder / "run/projector.safetensors").read_bytes() == expected
        yield how, value, how == "line" or same


def bad_benchmarks(folder, rng):
    """One value of one file of a benchmark replaced, or the file damaged: questions to the end, or a line."""
    root = layouts.write_all(folder / "all")
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    for _ in range(60):
        file = rng.choice(files)
        name = next(name for name in BENCHES if BENCHES[name].folder == file.relative_to(root).parts[0])
        content = file.read_bytes()
        try:
            tree, places = json.loads(content), []
            list_places(tree, places)
            parent, key = rng.choice(places)
            parent[key] = rng.choice(ODD)
            file.write_text(json.dumps(tree))
        except ValueError:
            file.write_bytes(damaged(content, rng))
        how, value = outcome(evaluation.load_questions, name, root / BENCHES[name].folder)
        file.write_bytes(content)
        yield how, value, how == "line" or len(value) > 0


def list_places(tree, places):
    """All (parent, key) of a JSON value."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        places.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            list_places(tree[key], places)


def bad_configs(folder, rng, vlm, clip_folder, llama_folder):
    """Each field of each config with a value of another type."""
    sources = {"vit": (clip_folder, "config.json", lambda f: ViT(load_vit_config(f))),
               "llm": (llama_folder, "config.json", load_llm_config),
               "tokenizer": (llama_folder, "tokenizer_config.json", load_tokenizer),
               "tokens": (llama_folder, "tokenizer.json", load_tokenizer)}
    for kind, (source, name, load) in sources.items():
        shutil.copytree(source, folder / kind)
        config = json.loads((folder / kind / name).read_text())
        for field in list(config):
            for value in rng.sample([None, True, "x", [], {}, -1, 0, 1.5, 10**12, [1, 2], {"x": 1}], 3):
                (folder / kind / name).write_text(json.dumps(config | {field: value}))
                how, found = outcome(load, folder / kind)
                yield how, found, True
    vlm.save(folder / "run", {"stage": "align", "template": "v1", "dtype": ""}, with_llm=False)
    config = json.loads((folder / "run/config.json").read_text())
    for field in config:
        for value in (None, 7, "x", [], {}):
            (folder / "run/config.json").write_text(json.dumps(config | {field: value}))
            how, found = outcome(ask_a_run, folder / "run")
            yield how, found, True


def ask_a_run(folder):
    vlm, tokenizer, config = evaluation.load_run(folder, CPU)
    return evaluation.ask(vlm, tokenizer, [{"id": 1, "prompt": "Is it red?", "image": None}],
                          config["template"], 2)


BAD_FLAGS = ["--batch 0", "--batch -1", "--batch x", "--batch 1.5", "--batch 7 --micro_batch 2",
             "--micro_batch 0", "--lr nan", "--lr inf", "--lr -1", "--lr x", "--epochs 0", "--epochs nan",
             "--steps -1", "--steps x", "--seed -1", "--warmup_ratio -1", "--clip -1", "--clip nan",
             "--weight_decay -1", "--data_fraction 0", "--data_fraction 2", "--max_length 3",
             "--max_length 0", "--workers -1", "--save_every -1", "--feature_layer 99", "--feature_layer x",
             "--vit none", "--vit /dev/null", "--llm none", "--llm data", "--images none",
             "--images /dev/null", "--annotations none", "--annotations data", "--annotations /dev/null",
             "--features data", "--features /dev/null", "--projector none", "--projector mlp0x_gelu",
             "--projector pixel_shuffle --feature_layer -99", "--template none", "--fit none", "--dtype int8",
             "--contrastive x", "--contrastive_weight nan", "--contrastive_balance -1", "--prompt x",
             "--prompt |", "--checkpointing x", "--shard x", "--resume", "--resume x", "--preset x",
             "--stage x", "--out /dev/null/x", "--out data/toy/align.json", "--nothing", "extra",
             "--init x --stage instruct"]


def bad_flags(folder, world):
    """Each on a run that would take two steps; and nothing is left behind."""
    for number, flags in enumerate(BAD_FLAGS):
        out = [] if "--out" in flags else ["--out", folder / str(number)]
        argv = [*world[1], "--stage", "align", "--steps", "2", *out, *flags.split(" ")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", io.StringIO())
            how, value = outcome(called, train.main, world[0], *argv)
        yield how, f"{flags}: {value}", how == "line" and not (folder / str(number)).exists()


def test_bad_inputs_end_in_a_line_and_lose_nothing(tmp_path, world, clip_folder, llama_folder, capsys):
    rng, vlm = random.Random(int(os.environ.get("SEED", 0))), VLM.from_towers(clip_folder, llama_folder)
    images = world[0] / "data/toy/images"
    kinds = {"images": (bad_images,), "records": (bad_records, images, llama_folder), "JSON": (bad_json,),
             "weights": (bad_weights, vlm), "checkpoints": (bad_checkpoints, world),
             "benchmarks": (bad_benchmarks,), "configs": (bad_configs, vlm, clip_folder, llama_folder),
             "flags": (lambda folder, _, world: bad_flags(folder, world), world)}
    rows, faults = [], []
    for kind, (make, *args) in kinds.items():
        (tmp_path / kind).mkdir()
        counts = dict.fromkeys(("cases", "silent losses", "tracebacks", "hangs"), 0)
        for how, value, is_right in make(tmp_path / kind, rng, *args):
            counts["cases"] += 1
            counts["silent losses"] += how in ("fine", "line") and not is_right
            counts["tracebacks"] += how == "traceback"
            counts["hangs"] += how == "hang"
            if how not in ("fine", "line") or not is_right:
                faults.append(f"{kind} {counts['cases']}: {how}: {str(value)[:300]}")
        rows.append((kind, *counts.values()))
    rows.append(("all", *map(sum, list(zip(*rows))[1:])))
    head = ("kind", "cases", "silent losses", "tracebacks", "hangs")
    with capsys.disabled():
        for name, *numbers in [head, *rows]:
            print(f"\n{name:<12}" + "".join(f"{number!s:>15}" for number in numbers), end="")
    assert not faults, "\n".join(faults)
    assert rows[-1][1] >= 300


# ---- 1, 8, 17: files of pictures ---------------------------------------------------------------------------


def test_a_loader_process_names_the_record_too(tmp_path, world):
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    file = write_records(tmp_path / "d.json", *[pictured("bomb.png")] * 8)
    for workers in ("0", "1"):
        last = how_it_ends(train.main, world[0], *world[1], "--stage", "align", "--annotations", file,
                           "--images", tmp_path, "--workers", workers, "--out", tmp_path / "out")
        assert re.match(r"train.py: .*record 'r': .*bomb.png: not a readable image: 14000 x 14000", last)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
def test_pictures_stand_upright(tmp_path, orientation, ending):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # a red corner
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the inverse of what a viewer does
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{ending}", exif=exif)
    found = np.asarray(data.load_image(tmp_path / f"x.{ending}"), dtype=int)
    assert found.shape == (32, 64, 3) and np.abs(found - np.asarray(upright)).mean() < 4


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg",
                                         exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 20)
    assert data.load_image(tmp_path / "x.jpg").size == (8, 4)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    found = np.asarray(data.load_image(tmp_path / f"x.{ending}"))
    assert np.abs(found[..., 0].astype(int) - values / 257).max() <= 1


def test_transparent_ground_is_white(tmp_path):
    for mode, clear, ink in (("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("LA", (0, 0), (0, 255))):
        image = Image.new(mode, (4, 4), clear)
        image.putpixel((1, 1), ink)
        image.save(tmp_path / "x.png")
        found = data.load_image(tmp_path / "x.png")
        assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (0, 0, 0)
    for mode, color in (("L", 7), ("RGB", (1, 2, 3)), ("P", 0)):  # one color stands for "nothing"
        Image.new(mode, (4, 4), color).save(tmp_path / "x.png", transparency=color)
        assert data.load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(2, 10000), (10000, 2), (1, 65500), (400, 1), (1, 400)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_strips_take_no_gigabytes(size, fit, monkeypatch):
    """No picture on the way has more pixels than the limit, whatever its sides."""
    largest, resize, new = [], Image.Image.resize, Image.new

    def seen(make):
        def made(*args, **kwargs):
            image = make(*args, **kwargs)
            largest.append(image.width * image.height)
            return image

        return made

    strip = new("RGB", size, "red")
    monkeypatch.setattr(Image.Image, "resize", seen(resize))
    monkeypatch.setattr(Image, "new", seen(new))
    assert data.preprocess(strip, ViTConfig(), fit).shape == (3, 336, 336)
    assert max(largest) <= data.MAX_PIXELS


@pytest.mark.parametrize("name, message", [
    *[(name, "leads out of") for name in ("/etc/passwd", "../secret.png", "a/../../secret.png")],
    ("other/../secret.png", "no such image"), ("loop.png", "no such image")])
def test_a_name_leads_to_no_picture_outside_the_folder(tmp_path, name, message):
    """A link in the folder may: whoever has the pictures made it."""
    images = tmp_path / "images"
    for folder in (images / "a", tmp_path / "other/inner"):
        folder.mkdir(parents=True)
    for file in (tmp_path / "secret.png", tmp_path / "other/secret.png", images / "a/inside.png"):
        Image.new("RGB", (4, 4)).save(file)
    for link, target in (("out", ".."), ("other", "../other/inner"), ("loop.png", "loop.png"),
                         ("within.png", "a/inside.png")):
        (images / link).symlink_to(target)
    names = ["within.png", "a/../within.png", "out/secret.png", name]
    file = write_records(tmp_path / "d.json", *map(pictured, names))
    assert outcome(check, file, images) == ("fine", 1)
    samples = data.Conversations(load_records(file), images, llama2(False), "v1", TOWER, "pad")
    assert all(samples[i]["pixels"].shape == (3, 32, 32) for i in range(3))
    with pytest.raises(ValueError, match=f"record 'r': .*{message}"):
        samples[3]


def test_the_folder_of_pictures_may_be_beside_what_a_link_leads_to(tmp_path):
    """LINK/.. is where the link leads, for us as for the system."""
    (tmp_path / "disk/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/inner")
    Image.new("RGB", (4, 4)).save(tmp_path / "disk/a.png")
    for name in ("a.png", "./x/../a.png"):
        assert find_image(tmp_path / "link/..", name).is_file()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_pipes_and_folders_are_no_files(tmp_path, make):
    """A pipe would be waited for."""
    for name, read in (("x.png", data.load_image), ("x.json", load_records)):
        make(tmp_path / name)
        with limited(5), pytest.raises((OSError, ValueError), match=f"{name}: (no such image|not a file)"):
            read(tmp_path / name)


def test_no_code_of_a_folder_is_run(tmp_path, llama_folder, clip_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, classes in (("config.json", {"AutoConfig": "evil.C"}),
                          ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes, "tokenizer_class": "Evil"}))
    with limited(10):  # to ask, and wait for an answer, would be too long
        for load in (load_tokenizer, load_llm_config):
            outcome(load, folder)
        outcome(lambda: VLM.from_towers(clip_folder, folder).export(tmp_path / "out"))
    torch.save({"a": os.system}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of weights"):
        list(read_weights(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---- 5, 6, 7, 9, 12: records and their tokens --------------------------------------------------------------


TOKENIZERS = {
    "llama2": lambda: llama2(False),
    "legacy": lambda: llama2(True),
    **{name: partial(chat_tokenizer, name) for name in ("chatml", "llama3", "thinking", "mistral")},
}


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_typed_special_tokens_are_text(name, template):
    """In questions and answers, also as the whole text and in private characters: the special tokens of a
    row are as many as without them, at the same places; what is learned is what was typed."""
    tokenizer = TOKENIZERS[name]()
    if template == "chat" and tokenizer.chat_template is None:
        return
    eos, special = tokenizer.eos_token, set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for typed in (eos, f"red {eos} blue {eos}", f"{eos}<image>{eos}", tokenizer.all_special_tokens[-1],
                  "\U00100000"):
        rows = []
        for text in (typed, "red"):
            turns = [("human", f"<image>\n{text}"), ("gpt", text), ("human", text), ("gpt", text)]
            turns = turns[:2] if template == "plain" else turns
            ids, roles = encode(template, turns, tokenizer)
            rows.append([(i, role) for i, role in zip(ids, roles) if i in special or i == data.IMAGE_MARKER])
            said = tokenizer.decode([i for i, role in zip(ids, roles) if role == data.ANSWER])
            if text.isascii() and template == "plain":
                assert said.replace(" ", "").strip() == text.replace(" ", "")
        assert rows[0] == rows[1]


@pytest.mark.parametrize("is_special", [False, True])
def test_ids_without_a_row_are_text(is_special):
    """LLaVA's tokenizer for Vicuna has <image> and more behind the vocabulary, which a record may say."""
    tokenizer = chatml()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=is_special)
    tokenizer.rows = rows
    for text in ("What is <image>?", "<video>", "<image>"):
        ids, _ = encode("v1", [("human", text), ("gpt", text)], tokenizer, False)
        assert max(ids) < rows and tokenizer.decode(ids).count(text.replace("<", "< ")) == 2
        ids, _ = encode("v1", [("human", f"<image>\n{text}"), ("gpt", text)], tokenizer)
        assert max(ids) < rows and ids.count(data.IMAGE_MARKER) == 1


def with_chat(world, llm, *args):
    """How a run of the align stage ends that takes the chat template of the LLM in this folder."""
    options = ["--stage", "align", "--contrastive", "none", "--llm", llm, "--template", "chat", *args]
    return how_it_ends(train.main, world[0], *world[1], *options)


def test_a_template_whose_tokens_have_no_row_is_refused_before_loading(tmp_path, world, llama_folder):
    """A base model with somebody's chat template: its <|im_end|> lies behind the embedding table."""
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # no weight is looked for
    last = with_chat(world, folder, "--out", tmp_path / "out")
    assert "the LLM has no embedding for '<|im_" in last


@pytest.mark.parametrize("image, message", [
    (["a.png", "b.png"], "has 2 images; one is supported"),
    *[(odd, "not a file name") for odd in (5, {"x": 1}, [5], True, [["a.png"]])]])
def test_other_images_are_refused(tmp_path, image, message):
    with pytest.raises(ValueError, match=message):
        load_records(write_records(tmp_path / "d.json", record("<image>\nq", "a", image=image)))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, llama_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": None}))
    with pytest.raises(ValueError, match="names no end token"):
        load_tokenizer(folder)


# ---- 3: a resumed run knows what it is made of -------------------------------------------------------------


@pytest.fixture
def stopped(world, tmp_path):
    """(options of an align run of 6 steps, its folder as a kill would leave it after step 4,
    whole.safetensors)."""
    own = tmp_path / "align.json"
    shutil.copy(world[0] / "data/toy/align.json", own)
    options = [*world[1], "--stage", "align", "--annotations", own, "--save_every", "2", "--out",
               tmp_path / "cut"]
    with checkpoints_kept():
        called(train.main, world[0], *options)
    shutil.copy(tmp_path / "cut/projector.safetensors", tmp_path / "whole.safetensors")
    for name in ("config.json", "projector.safetensors"):
        (tmp_path / "cut" / name).unlink()
    return options, tmp_path / "cut", own


def change_caption(records):
    records[-1]["conversations"][1]["value"] = "a red circle"
    return records


@pytest.mark.parametrize("change", [
    lambda records: records[:-1], lambda records: records[:8], change_caption, lambda records: records[::-1],
    lambda records: records * 2])
def test_other_records_are_refused_on_resume(world, stopped, change):
    options, out, file = stopped
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    log = (out / "log.jsonl").read_text()
    last = how_it_ends(train.main, world[0], *options, "--resume")
    assert re.match("train.py: .*checkpoint-0000004: saved with another records( and pictures)?; .*, remove "
                    ".*made_of.json$", last)
    assert (out / "log.jsonl").read_text() == log
    (out / "checkpoint-0000004/made_of.json").unlink()  # on purpose; also where nothing is left to do
    called(train.main, world[0], *options, "--resume")
    assert (out / "config.json").exists()


@pytest.mark.parametrize("part", ["vit", "llm", "tokenizer"])
def test_other_towers_are_refused_on_resume(world, stopped, clip_folder, llama_folder, tmp_path, part):
    """One bit of one weight; a chat template."""
    options, _, _ = stopped
    folder = clip_folder if part == "vit" else llama_folder
    before = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        if part == "tokenizer":
            file = folder / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHATML}))
        else:
            content = bytearray((folder / "model.safetensors").read_bytes())
            content[-4] ^= 1
            (folder / "model.safetensors").write_bytes(content)
        assert f"saved with another {part};" in how_it_ends(train.main, world[0], *options, "--resume")
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_does(world, stopped):
    options, out, _ = stopped
    file = out / "checkpoint-0000004/rank-0.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    file.write_bytes(content)
    last = how_it_ends(train.main, world[0], *options, "--resume")
    assert "checkpoint-0000004: damaged; without it, the one before is taken" in last
    shutil.rmtree(file.parent)
    called(train.main, world[0], *options, "--resume")
    assert (out / "projector.safetensors").read_bytes() == (out.parent / "whole.safetensors").read_bytes()


def test_resume_of_a_finished_run_and_of_none(world, stopped, tmp_path):
    options, out, _ = stopped
    called(train.main, world[0], *options, "--resume")
    weights, log = (out / "projector.safetensors").read_bytes(), (out / "log.jsonl").read_text()
    assert "is finished; nothing is left to do" in called(train.main, world[0], *options, "--resume")
    assert ((out / "projector.safetensors").read_bytes(), (out / "log.jsonl").read_text()) == (weights, log)
    assert not Path(f"{out}.old").exists()
    other = how_it_ends(train.main, world[0], *options, "--resume", "--lr", "0.5")
    assert re.search(r"config.json: finished .*: saved with lr 0.002, resumed with 0.5$", other)
    last = how_it_ends(train.main, world[0], *options[:-1], tmp_path / "none", "--resume")
    assert last.startswith(f"train.py: {tmp_path}/none: no run to resume; type the command that began it, ")
    assert not (tmp_path / "none").exists()


def test_both_stages_resume_where_the_first_is_finished(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, ""))
    with pytest.raises(SystemExit):
        trained(world, "--steps", "2", "--out", tmp_path)
    shutil.rmtree(tmp_path / "instruct")
    before = (tmp_path / "align/log.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        trained(world, "--steps", "2", "--out", tmp_path, "--resume")
    assert end.value.code == 0 and (tmp_path / "instruct/config.json").exists()
    assert (tmp_path / "align/log.jsonl").read_text() == before


def stage_of(rank, ranks, folder, argv):
    """Run the align stage on these ranks."""
    with checkpoints_kept(), pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        train.train_stage(configure("align", parse_args(argv)), CPU)


@pytest.mark.parametrize("shard", [True, False])
def test_a_run_goes_on_on_another_number_of_ranks(world, ranks, tmp_path, shard):
    """Saved by one process, resumed by two: to rounding, the log of an undisturbed run. If all ranks have the
    same masters and moments, one writes them."""
    options = ["--stage", "align", "--epochs", "4", "--save_every", "3", "--shard", shard, "--out"]
    with checkpoints_kept():
        called(train.main, world[0], *world[1], *options, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/config.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoint-0000009")
    argv = [str(arg) for arg in (*world[1], *options, tmp_path / "cut", "--resume")]
    ranks(2, stage_of, world[0], argv)
    for ours, theirs in zip(log_of(tmp_path / "cut"), log_of(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    files = sorted((tmp_path / "cut/checkpoint-0000009").glob("rank-*.pt"))
    assert ["optimizer" in torch.load(file, weights_only=True) for file in files] == [True, shard]


# ---- 4: a full disk ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(KiB)`: a folder that holds no more."""
    made = []

    def mount(size):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder],
                          capture_output=True).returncode:
            pytest.skip("may not mount")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=True)


def test_the_plan_compares_the_run_with_the_free_space(world, small_disk):
    disk = small_disk(12)
    last = how_it_ends(train.main, world[0], *world[1], "--stage", "align", "--save_every", "2", "--out",
                       disk / "a")
    assert re.search(r"disk-12/a: the run and its checkpoints take .* GiB, and its disk has", last)
    assert not (disk / "a").exists()


@pytest.mark.parametrize("save_every", ["0", "2"])
def test_a_disk_that_fills_up_costs_no_finished_work(world, small_disk, monkeypatch, tmp_path, save_every):
    """The plan found room, and then somebody else wrote. Without checkpoints the run is kept elsewhere; with
    them, half of one is removed, and the last complete one goes on."""
    disk, name = small_disk(240), "save_run" if save_every == "0" else "save"
    filler, save, calls = disk / "filler", getattr(checkpoint, name), []
    (tmp_path / "elsewhere").mkdir()

    def saved(*args):
        calls.append(args)
        if len(calls) == (1 if save_every == "0" else 2):
            filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))
        return save(*args)

    monkeypatch.setattr(checkpoint, name, saved)
    monkeypatch.setattr(checkpoint, "tempfile", SimpleNamespace(mkdtemp=lambda: str(tmp_path / "elsewhere")))
    options = [*world[1], "--stage", "align", "--save_every", save_every, "--out", disk / "a"]
    last = how_it_ends(train.main, world[0], *options)
    assert "\n" not in last and "disk-240/a/" in last
    assert not [f for f in disk.rglob("*") if f.is_file() and "partial" in str(f)]
    if save_every == "0":
        assert last.endswith(f"the finished run is in {tmp_path}/elsewhere")
        assert VLM.from_pretrained(tmp_path / "elsewhere") and not (disk / "a/config.json").exists()
    else:
        filler.unlink()
        assert "checkpoint-0000004.partial/rank-0.pt: not written" in last
        assert "checkpoint-0000002: step 2" in called(train.main, world[0], *options, "--resume")
        assert (disk / "a/config.json").exists()


# ---- 11, 13: in and out ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory, clip_folder, llama_folder):
    """(our model, the folder as LLaVA's own code would have saved it): the LLM's config.json with `mm_`
    fields, the projector among its weights, the tower named."""
    folder = tmp_path_factory.mktemp("original") / "llava-v1.5"
    vlm = VLM.from_towers(clip_folder, llama_folder)
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    projector = {f"model.mm_projector.{name}": p.detach() for name, p in vlm.projector.named_parameters()}
    weights = {name: p.detach() for name, p in vlm.llm.named_parameters()}
    torch.save(weights | projector, folder / "pytorch_model.bin")
    torch.save(projector, folder.parent / "mm_projector.bin")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad",
               "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
               "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
               "mm_vision_select_layer": -2, "mm_vision_tower": str(clip_folder), "use_mm_proj": True}
    (folder / "config.json").write_text(json.dumps(config))
    return vlm.eval(), folder


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_llavas_own_checkpoint_opens(original, tmp_path, kind):
    vlm, folder = original[0], shutil.copytree(original[1], tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    theirs, _, config = evaluation.load_run(folder, CPU)
    ids, pixels = torch.tensor([[1] + [-200] * 16 + [5, 6]]), torch.randn(1, 3, 32, 32)
    assert torch.equal(theirs(ids, pixels), vlm(ids, pixels)) and config["template"] == "v1"


@pytest.mark.parametrize("change, message", [
    ({"mm_use_im_start_end": True}, "only those like version 1.5's"),
    ({"mm_vision_tower": None}, "only those like"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "only those like version 1.5's"),
    ({"model_type": "llava_mpt"}, "model_type is 'mpt'"),
    ({"mm_projector_type": "abstractor"}, "projector 'abstractor'"),
    ({"mm_projector_type": "mlp3x_gelu"}, "4.weight"),
    ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer is no number")])
def test_what_llava_1_5_does_not_have_is_refused_by_name(original, tmp_path, change, message):
    folder = shutil.copytree(original[1], tmp_path / "llava-v1.5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        VLM.from_pretrained(folder)


def test_llavas_projector_starts_the_instruct_stage(original, world, tmp_path):
    options = ["--stage", "instruct", "--steps", "2", "--lr", "1e-300", "--out"]  # so small that no bit moves
    for number, init in enumerate((original[1].parent / "mm_projector.bin", original[1].parent)):
        printed = trained(world, *options, tmp_path / str(number), "--init", init)
        assert "loaded projector.0.weight, projector.0.bias, projector.2.weight" in printed
        ours = VLM.from_pretrained(tmp_path / str(number)).projector.state_dict()
        assert all(torch.equal(ours[name], p) for name, p in original[0].projector.state_dict().items())
    last = how_it_ends(train.main, world[0], *world[1], *options, tmp_path / "x", "--init", init,
                       "--projector", "linear")
    assert "mm_projector.bin" in last


@pytest.mark.parametrize("name, template", [
    ("toy", "v1"), ("llama2", "v1"), ("legacy", "v1"), ("chatml", "v1"), ("chatml", "chat"),
    ("llama3", "chat"), ("thinking", "chat"), ("mistral", "chat")])
def test_an_exported_folder_has_our_prompts(name, template, clip_folder, llama_folder, tmp_path):
    """Messages as an OpenAI-style server gets them, through transformers' processor: our ids, to the last;
    through its pipeline: our answer."""
    folder = llama_folder if name == "toy" else tmp_path / "llm"
    if name != "toy":
        tokenizer = TOKENIZERS[name]()
        tokenizer.save_pretrained(folder)
        size = max(tokenizer.get_vocab().values()) + 1
        config = llama_config(vocab_size=size, eos_token_id=tokenizer.eos_token_id,
                              max_position_embeddings=1024)
        shaken(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer, vlm = load_tokenizer(folder), VLM.from_towers(clip_folder, folder).eval()
    vlm.template = template
    vlm.export(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    question = "What color is it?"
    messages = [
        {"role": "user",
         "content": [{"type": "image", "url": str(tmp_path / "x.png")}, {"type": "text", "text": question}]}
    ]
    theirs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                           return_dict=True)
    turns = [("human", f"<image>\n{question}")]
    ids, _ = encode(template, turns, tokenizer)
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    at = ids.index(data.IMAGE_MARKER)
    assert theirs["input_ids"][0] == ids[:at] + [place] * 16 + ids[at + 1 :]
    if template == "v1":  # a system message stands in the place of Vicuna's own
        told = [{"role": "system", "content": "Be brief."}, *messages]
        prompt = processor.apply_chat_template(told, add_generation_prompt=True)
        assert prompt.startswith("Be brief. USER: <image>")
    pipeline = transformers.pipeline("image-text-to-text", model=str(tmp_path / "out"))
    said = pipeline(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    asked = {"id": 1, "prompt": turns[0][1], "image": tmp_path / "x.png"}
    assert evaluation.ask(vlm, tokenizer, [asked], template, 6) == [said.strip()]


# ---- 14: other chat templates ------------------------------------------------------------------------------


def test_a_turn_may_end_with_another_token_than_the_tokenizers(monkeypatch, clip_folder, tmp_path):
    """As of Qwen's base models. What is learned ends with it, and so does an answer."""
    tokenizer = chatml(eos="<|endoftext|>")
    ids, roles = encode("chat", CHAT_TURNS, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(i) for i, role in zip(ids, roles) if role == data.END] == [
        "<|im_end|>"
    ] * 2
    tokenizer.save_pretrained(tmp_path)
    config = llama_config(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None)
    shaken(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    vlm, ends = VLM.from_towers(clip_folder, tmp_path), []
    generate = vlm.llm.generate
    monkeypatch.setattr(vlm.llm, "generate",
                        lambda *args, **how: ends.append(how["end_tokens"]) or generate(*args, **how))
    evaluation.ask(vlm, load_tokenizer(tmp_path), [{"id": 1, "prompt": "?", "image": None}], "chat", 2)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends[0]


@pytest.mark.parametrize("template", [QWEN3, f"{MESSAGES}{QWEN3}"], ids=["own", "exported"])
def test_answers_may_have_thoughts(template):
    """Under a template like Qwen3's, which drops those of earlier turns: each answer is learned with its
    own."""
    tokenizer = chatml(template)
    turns = [("human", "What?"), ("gpt", "<think>\nred or blue</think> red"), ("human", "Sure?"),
             ("gpt", "yes"), ("human", "And?"), ("gpt", "<think>it is </think>\n\na circle")]
    ids, roles = encode("chat", turns, tokenizer, False)
    said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
    assert said == ("<think>\nred or blue\n</think>\n\nred<|im_end|>yes<|im_end|>"
                    "<think>\nit is\n</think>\n\na circle<|im_end|>")
    whole = tokenizer.decode(ids)
    assert whole.count("<|im_start|>") == 6 and "assistant\n<think>\n\n</think>\n\nyes" in whole


def test_thoughts_behind_a_template_without_a_generation_prompt_have_one_lead():
    template = ("{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% else %}"
                " ASSISTANT: {{ m.content }}<|im_end|>{% endif %}{% endfor %}")
    tokenizer = chatml(template)
    for answer in ("<think>t</think> red", "red"):
        ids, roles = encode("chat", [("human", "What?"), ("gpt", answer)], tokenizer, False)
        said = tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT])
        assert said == f" ASSISTANT: {answer}<|im_end|>"


def test_a_template_may_open_the_thoughts():
    """Qwen3-Thinking's ends the question with <think>. An answer without thoughts would begin with half of
    the token of two newlines."""
    opens = QWEN3.replace("and '</think>' in m.content %}{% if last", "%}{% if last").replace(
        "split('<think>')[-1].strip() }}", "split('<think>')[-1].strip() if '</think>' in m.content }}")
    start, end = opens.rsplit("{% if enable_thinking", 1)
    tokenizer = chatml(f"{start}<think>\n{{% endif %}}")
    question, learned = "<|im_start|>user\nWhat?<|im_end|>\n", "red or blue\n</think>\n\nred<|im_end|>"
    turns = [("human", "What?"), ("gpt", "<think>red or blue</think>red")]
    ids, roles = encode("chat", turns, tokenizer, False)
    assert tokenizer.decode([i for i, role in zip(ids, roles) if role != data.CONTEXT]) == learned
    assert tokenizer.decode(ids) == f"{question}<|im_start|>assistant\n<think>\n{learned}"
    with pytest.raises(ValueError, match="no boundary for labels"):
        encode("chat", [turns[0], ("gpt", "red")], tokenizer, False)


@pytest.mark.parametrize("template, reason", [
    (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "drops or rewrites the thoughts"),
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end an answer")])
def test_templates_that_fit_no_answer_are_refused_before_loading(world, tmp_path, llama_folder, template,
                                                                 reason):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["chat_template"] = template.replace("<|im_end|>", "</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    thoughtful = pictured("align-00000.png", answer="<think>x</think> red")
    file = write_records(tmp_path / "d.json", *[thoughtful] * 8)
    assert reason in with_chat(world, folder, "--annotations", file, "--out", tmp_path / "out")


# ---- 15, 16: systems, ranks, signals -----------------------------------------------------------------------


def test_no_module_or_call_that_windows_lacks_is_needed(world, tmp_path):
    code = ("import os, sys; sys.modules['resource'] = None\n"
            "del os.sysconf, os.sysconf_names, os.O_DIRECTORY, os.sync\n"
            "import vit, llm, projector, losses, data, eval, train; train.main(sys.argv[1:])")
    options = ["--stage", "align", "--steps", "3", "--out"]
    argv = [*world[1], *options, tmp_path / "a", "--save_every", "1"]
    subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=world[0], check=True, timeout=120,
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    trained(world, *options, tmp_path / "b")
    lines = (tmp_path / "b/log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["memory_mib"] > 100 for line in lines)
    assert log_of(tmp_path / "a")[2] == log_of(tmp_path / "b")[2]


def test_macos_counts_bytes(monkeypatch):
    on_linux = train.peak_memory(CPU)
    monkeypatch.setattr(train.sys, "platform", "darwin")
    assert train.peak_memory(CPU) == on_linux >> 10


def test_an_error_of_one_rank_comes_first_and_ends_all(world, tmp_path):
    """A broken picture, which one of two ranks meets: its line comes before all others', soon."""
    records = json.loads((world[0] / "data/toy/align.json").read_text())
    bad = records[5]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = shutil.copytree(world[0] / "data/toy/images", tmp_path / "images")
    shutil.move(tmp_path / "bad.png", images / bad["image"])
    began = time.monotonic()
    run = script(world, "--stage", "align", "--steps", "6", "--images", images, "--out", tmp_path / "out",
                 launch=["--nproc_per_node=2", *HERE], check=False)
    said = [line for line in run.stderr.splitlines() if "train.py: " in line or "Traceback" in line]
    assert run.returncode and time.monotonic() - began < 60
    assert re.search(f"train.py: rank [01]: record '{bad['id']}': .*not a readable image", said[0])


SAVED = r"train.py: stopped, and saved at step (\d+): the same command and --resume go on with it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(world, tmp_path, monkeypatch, number):
    """And the run goes on to the same bits."""
    options = [*world[1], "--stage", "align", "--save_every", "1000", "--out"]
    step, before = train.train_step, signal.getsignal(number)

    def signalled(*args):
        if args[-1] == 3:
            os.kill(os.getpid(), number)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        last = how_it_ends(train.main, world[0], *options, tmp_path / "a")
    assert re.fullmatch(SAVED, last)[1] == "4" and signal.getsignal(number) is before
    assert [f.name for f in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert len(log_of(tmp_path / "a")) == 4
    assert "step 4" in called(train.main, world[0], *options, tmp_path / "a", "--resume")
    called(train.main, world[0], *options, tmp_path / "b")
    weights = [(tmp_path / name / "projector.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_signal_to_torchrun_saves_what_all_ranks_have(world, tmp_path):
    """With loader processes, which torchrun ends, too."""
    options = ["--stage", "align", "--epochs", "50", "--save_every", "1000", "--workers", "1"]
    launch = ["--nproc_per_node=2", *HERE]
    process = start(world, *options, "--out", tmp_path, launch=launch, stderr=subprocess.PIPE)
    log = tmp_path / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    step = int(re.search(SAVED, process.communicate(timeout=60)[1].decode())[1])
    assert process.returncode != 0 and len(log_of(tmp_path)) == step
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step:07d}"]


# ---- what a second reader tried ----------------------------------------------------------------------------


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    grey = Image.fromarray(np.array([[0, 32768]], dtype=np.uint16))
    grey.save(tmp_path / "a.png", transparency=0)
    picture = data.load_image(tmp_path / "a.png")
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (127, 127, 127)]


def refused(function, *args, name):
    how, text = outcome(function, *args)
    assert how == "line" and str(name) in text, (how, text)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, llama_folder, dtype):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    tensors = dict(LLM.from_pretrained(folder).named_parameters())
    save_file({name: t.detach().to(dtype) for name, t in tensors.items()}, folder / "model.safetensors")
    refused(LLM.from_pretrained, folder, name=folder)


def test_files_of_weights_with_odd_names(tmp_path, llama_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")  # a single file would come first
    for shard in (5, "../model.safetensors", "/etc/passwd", "", None):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        how, text = outcome(LLM.from_pretrained, folder)
        assert how == "line" and str(folder) in text and not text.startswith("/etc")
    torch.save({3: torch.zeros(2)}, tmp_path / "mm_projector.bin")
    refused(list, read_shard(tmp_path / "mm_projector.bin"), name="mm_projector.bin")


@pytest.mark.parametrize("change", [
    {"image_std": [0, 1, 1]}, {"image_std": [1, 1, "a"]}, {"image_mean": [float("nan")] * 3},
    {"image_mean": [1]}, {"resample": 99}])
def test_odd_numbers_for_pictures_are_refused(tmp_path, clip_folder, change):
    folder = shutil.copytree(clip_folder, tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(change))
    refused(load_vit_config, folder, name=folder)


@pytest.mark.parametrize("flags, name", [
    (["--seed", str(10**30)], "--seed"), (["--contrastive", "prompt", "--prompt", "\ud800 | q"], "--prompt")])
def test_a_flag_is_named(world, tmp_path, flags, name):
    refused(trained, world, "--stage", "align", "--out", tmp_path / "out", *flags, name=name)


def test_a_resumed_runs_own_files_are_named(world, tmp_path):
    options = ["--stage", "align", "--save_every", "2", "--out", tmp_path / "out"]
    with checkpoints_kept():
        trained(world, *options)
    (tmp_path / "out/config.json").write_text("[]")
    refused(trained, world, *options, "--resume", name="config.json")
    (tmp_path / "out/config.json").unlink()
    (tmp_path / "out/log.jsonl").write_bytes(b"\xff\n" * 9)
    refused(trained, world, *options, "--resume", name="log.jsonl")


@pytest.mark.parametrize("template", ["{{ bad", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"])
def test_a_chat_template_that_fails_names_its_folder(tmp_path, clip_folder, llama_folder, template):
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    (folder / "chat_template.jinja").write_text(template)
    vlm, tokenizer = VLM.from_towers(clip_folder, folder), load_tokenizer(folder)
    assert tokenizer.chat_template == template
    refused(evaluation.ask, vlm, tokenizer, [{"id": 1, "prompt": "?", "image": None}], "chat", name=folder)
    refused(vlm.export, tmp_path / "out", name=folder)


@pytest.mark.kills
def test_kills_at_random_instants_cost_nothing():
    """Minutes: run with -m kills."""
    result = kills.main(20)
    assert result["kills"] == result["equal"] == 20 and result["while saving"] > 0
