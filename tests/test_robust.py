"""What people really feed it: bad inputs of each kind, made by the hundred, and a table of how they end; then a
test for every fault that was found with a public bug report."""

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import data
import eval as evaluation
import train
from conftest import ROOT
from lab import toy_world
from llm import load_llm_config
from projector import VLM
from test_data import CAPTION, CHAT_TURNS, TEXT, TOWER, byte_level, chat_tokenizer, llama2, record
from test_data import CHATML, THINKING
from test_train import asked, called, how_it_ends, log_of, script, start, trained, wait_for_checkpoint
from test_train import HERE, kill, world  # noqa: F401 (a fixture)
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
    ("ppm", {}, "RGB"), ("pcx", {}, "RGB"), ("dds", {}, "RGBA"), ("qoi", {}, "RGB")]


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
        how, value = outcome(lambda: data.preprocess(data.load_image(file), TOWER, rng.choice(("crop", "pad"))))
        yield how, value, how != "fine" or value.shape == (3, 32, 32)


ODD = [None, True, 0, -1, 1e400, 10**30, "", "x", "\ud800", "a\0b", [], [[]], {}, {"x": []}, [None], "<image>",
       "<image>\n<image>", "</s>", "é" * 3000, "../../x.png", "/etc/passwd", "a" * 300, "\U000f0000\U00100000"]


def bad_records(folder, rng, images, tokenizer_folder):
    """One odd value somewhere in a record. `check` ends, keeps what is good and nothing else: what it keeps,
    training reads, and what it lists, training refuses."""
    good = sorted(images.iterdir())[0].name
    for number, odd in enumerate(ODD * 4):
        bad = json.loads(json.dumps(record("<image>\nWhat color is it?", "a small red circle", image=good)))
        turn = rng.choice(bad["conversations"])
        place = [(bad, "image"), (turn, "value"), (turn, "from"), (bad, "conversations"), (bad, "id")][number % 5]
        place[0][place[1]] = odd
        file = folder / f"{number}.json"
        file.write_text(json.dumps([TEXT, bad]))
        how, value = outcome(data.check, file, images, None, tokenizer_folder, "v1", 16, 200)
        clean = file.with_suffix(".clean.json")
        kept = len(json.loads(clean.read_text())) if clean.exists() else 2
        trains = outcome(read_all, file, images, tokenizer_folder)[0]
        is_right = how == "fine" and kept == 2 - value and (value == 0) == (trains == "fine")
        yield how if trains in ("fine", "line") else trains, value, is_right


def read_all(file, images, tokenizer_folder):
    tokenizer = data.load_tokenizer(tokenizer_folder)
    samples = data.Conversations(data.load_records(file), images, tokenizer, "v1", TOWER, "pad")
    return data.collate([samples[i] for i in range(len(samples))], 16, -200, 0, 32, 200)


def bad_json(folder, rng):
    """Files that are no JSON, or no list of records, or too much."""
    texts = ["", "[", "[" * 10**5, '{"a":' * 10**5, "nul", "[1,", '["\\ud8', "[" + "9" * 5000 + "]", "NaN", "{}", "[]",
             "\ufeff", "[[]]", "[1]", "null", '"x"', "[{}]", "true", "[]]", "{'a': 1}"]
    contents = [text.encode() for text in texts]
    contents += [b"\xff\xfe[", b"\x80", b"\0" * 100, bytes(rng.randrange(256) for _ in range(100)), b"\x1f\x8b\x08"]
    for number, content in enumerate(contents):
        file = folder / f"{number}.json"
        file.write_bytes(content)
        for function in (data.load_records, lambda f: data.load_scienceqa(scienceqa(f))):
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
    files = {"llm": (folder / "llm/model.safetensors").read_bytes(), "bin": (folder / "weights.bin").read_bytes()}
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
        from llm import LLM
        how, value = outcome(LLM.from_pretrained, folder / "llm")
        same = how == "fine" and all(torch.equal(a, b) for a, b in zip(value.parameters(), vlm.llm.parameters()))
        yield how, value, how == "line" or same


def bad_configs(folder, rng, vlm, clip_folder, llama_folder):
    """Each field of each config with a value of another type."""
    sources = {"vit": (clip_folder, "config.json", lambda f: ViT(load_vit_config(f))),
               "llm": (llama_folder, "config.json", load_llm_config),
               "tokenizer": (llama_folder, "tokenizer_config.json", data.load_tokenizer),
               "tokens": (llama_folder, "tokenizer.json", data.load_tokenizer)}
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
    return evaluation.ask(vlm, tokenizer, [{"id": 1, "prompt": "Is it red?", "image": None}], config["template"], 2)


BAD_FLAGS = [
    "--batch 0", "--batch -1", "--batch x", "--batch 1.5", "--batch 7 --micro_batch 2", "--micro_batch 0", "--lr nan", "--lr inf",
    "--lr -1", "--lr x", "--epochs 0", "--epochs nan", "--steps -1", "--steps x", "--seed -1", "--warmup_ratio -1",
    "--clip -1", "--clip nan", "--weight_decay -1", "--data_fraction 0", "--data_fraction 2", "--max_length 3",
    "--max_length 0", "--workers -1", "--save_every -1", "--feature_layer 99", "--feature_layer x", "--vit none",
    "--vit /dev/null", "--llm none", "--llm data", "--images none", "--images /dev/null", "--annotations none",
    "--annotations data", "--annotations /dev/null", "--features data", "--features /dev/null", "--projector none", "--projector mlp0x_gelu",
    "--projector pixel_shuffle --feature_layer -99", "--template none", "--fit none", "--dtype int8", "--contrastive x",
    "--contrastive_weight nan", "--contrastive_balance -1", "--prompt x", "--prompt |", "--checkpointing x", "--shard x",
    "--resume", "--resume x", "--preset x", "--stage x", "--out /dev/null/x", "--out data/toy/align.json", "--nothing", "extra", "--init x --stage instruct"]


def bad_flags(folder, world):
    """Each on a run that would take one step; and nothing is left behind."""
    for number, flags in enumerate(BAD_FLAGS):
        out = [] if "--out" in flags else ["--out", folder / str(number)]
        argv = [*world[1], "--stage", "align", "--steps", "1", *out, *flags.split(" ")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", io.StringIO())
            how, value = outcome(called, train.main, world[0], *argv)
        yield how, f"{flags}: {value}", how == "line" and not (folder / str(number)).exists()


def test_bad_inputs_end_in_a_line_and_lose_nothing(tmp_path, world, clip_folder, llama_folder, capsys):
    rng, vlm = random.Random(int(os.environ.get("SEED", 0))), VLM.from_towers(clip_folder, llama_folder)
    images = world[0] / "data/toy/images"
    kinds = {"images": (bad_images,), "records": (bad_records, images, llama_folder), "JSON": (bad_json,),
             "weights": (bad_weights, vlm), "configs": (bad_configs, vlm, clip_folder, llama_folder),
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
    with capsys.disabled():
        print("\n" + "\n".join(f"{name!s:<10}" + "".join(f"{number!s:>15}" for number in numbers) for name, *numbers in
                               [("kind", "cases", "silent losses", "tracebacks", "hangs"), *rows]))
    assert not faults, "\n".join(faults)
    assert rows[-1][1] >= 300
