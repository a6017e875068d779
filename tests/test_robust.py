"""What people really feed it: bad inputs of each kind, made by the hundred, and a table of how they end;
then a test for every fault that was found with a public bug report."""

import io
import json
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from conftest import checkpoints_kept
from PIL import Image
from safetensors.torch import save_file
from scripts import called, trained
from test_check import pictured, write_records
from test_data import TEXT, TOWER, llama2, record

import data
import eval as evaluation
import train
from benchmarks import scienceqa as scienceqa_bench
from eval import BENCHES
from llm import LLM, load_llm_config
from plumbing.tokenizer import load_tokenizer
from plumbing.weights import read_shard, read_weights
from projector import VLM
from running.check import check
from running.records import load_records
from vit import ViT, load_vit_config

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


# ---- what a second reader tried ----------------------------------------------------------------------------


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


