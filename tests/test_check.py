"""The check of a list, `python -m running.check`: what it calls good, training takes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from scripts import children, how_it_ends, is_running
from test_data import TEXT, TOWER, llama2, record
from test_formats import change

import data
import train
from plumbing.tokenizer import load_tokenizer
from running import check as check_program
from running.records import load_records


@pytest.fixture
def check(monkeypatch, capsys):
    """`check(*args)`: (exit status, what it prints) of the command."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["check.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            check_program.main()
        return end.value.code, capsys.readouterr().out

    return run


def write_records(file, *records):
    file.write_text(json.dumps(records))
    return file


def pictured(image, question="<image>\nWhat color is it?", answer="red"):
    return record(question, answer, image=image)


def test_bad_records_are_listed_and_the_good_ones_written(toy, tmp_path, check):
    records = json.loads((toy / "align.json").read_text())[:4]
    records[1]["image"] = "gone.png"
    records[2]["conversations"] = []
    status, printed = check(write_records(tmp_path / "d.json", *records), toy / "images")
    assert status == 1 and "2 of 4 records are good" in printed
    assert f"record 1 (id {records[1]['id']!r}): " in printed and "gone.png: no such image" in printed
    assert "record 2" in printed and "has no conversation turns" in printed
    assert list(load_records(tmp_path / "d.clean.json")) == [records[0], records[3]]
    status, printed = check(tmp_path / "d.clean.json", toy / "images")
    assert status == 0 and "2 of 2 records are good" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "d.clean.json"}


def test_a_wrong_folder_is_told_in_a_few_lines(tmp_path, check):
    file = write_records(tmp_path / "d.json", *[pictured(f"{n}.png") for n in range(24)], {})
    status, printed = check(file, tmp_path / "none", "--workers", "0")
    lines = printed.splitlines()
    assert status == 1 and lines[19] == f"record 19 (id 'r'): {tmp_path}/none/19.png: no such image"
    assert lines[20:] == ["and 5 more; of all 25, 24 say: no such image", "0 of 25 records are good",
                          "no list is written: it would be empty"]
    assert not (tmp_path / "d.clean.json").exists()


def test_what_is_no_list_ends_in_a_line(tmp_path, check):
    for content, message in ((None, "d.json: no such file"), ("[", "d.json: not JSON"), ("{}", "not a JSON")):
        if content:
            (tmp_path / "d.json").write_text(content)
        end, _ = check(tmp_path / "d.json", tmp_path)
        assert end.startswith("running.check: ") and message in end and "\n" not in end


def test_lengths_below_one_are_refused(tmp_path, check):
    file = write_records(tmp_path / "d.json", TEXT)
    for flags in (("--image_tokens", 0), ("--image_tokens", -5), ("--max_length", 0), ("--max_length", -1)):
        end, _ = check(file, tmp_path, *flags)
        assert end == "running.check: --image_tokens and --max_length must be at least 1"


def test_whatever_a_decoder_raises_is_listed_and_the_check_goes_on(tmp_path, toy, monkeypatch, check):
    """A bomb, a picture of which Pillow says something that is no OSError, an unknown mode, text that a
    tokenizer refuses; in training, too, each is a line."""
    good = sorted((toy / "images").iterdir())[0]
    shutil.copy(good, tmp_path / "good.png")
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    errors = {"runtime.png": RuntimeError("decoder"), "index.png": IndexError(), "struct.png": EOFError()}
    for name in errors:
        shutil.copy(good, tmp_path / name)
    real = Image.open

    def opened(file):
        if Path(file).name in errors:
            raise errors[Path(file).name]
        return real(file)

    monkeypatch.setattr(Image, "open", opened)
    names = ["good.png", "bomb.png", *errors]
    file = write_records(tmp_path / "d.json", *map(pictured, names), record("q", "\ud800 a"))
    status, printed = check(file, tmp_path, "--llm", ROOT / "lab/towers/tiny-llm")
    assert status == 1 and "1 of 6 records are good" in printed
    assert len(load_records(tmp_path / "d.clean.json")) == 1
    for part in ("14000 x 14000 pixels; raise plumbing/pictures.py's MAX_PIXELS",
                 "runtime.png: not a readable image: RuntimeError: dec", "IndexError", "EOFError",
                 "record 5 (id 'r'): TypeError"):
        assert part in printed
    samples = data.Conversations(load_records(file), tmp_path, llama2(False), "v1", TOWER, "pad")
    for number in range(1, 6):
        with pytest.raises(ValueError, match="^record 'r': [^\n]*$"):
            samples[number]


def test_typed_special_tokens_are_counted(tmp_path, toy, llama_folder, check):
    file = write_records(tmp_path / "d.json", TEXT, record("What is </s>?", "an end"),
                         record("q", "red </s> blue"), record("What is <image>?", "a marker"))
    for more in ([], ["--llm", llama_folder]):
        status, printed = check(file, toy / "images", *more)
        assert status == 0 and "3 have the name of a special token in their text" in printed


def test_words_that_the_llm_does_not_know_are_counted(tmp_path, toy, check):
    file = write_records(tmp_path / "d.json", record("What is it?", "a red circle"), record("q", "\u00fc"))
    status, printed = check(file, toy / "images", "--llm", ROOT / "lab/towers/tiny-llm")
    assert status == 0 and "1 have words that the LLM does not know" in printed
    llm = shutil.copytree(ROOT / "lab/towers/tiny-llm", tmp_path / "llm")
    change(llm, file="tokenizer_config.json", unk_token=load_tokenizer(llm).eos_token)  # as SmolLM2's is
    status, printed = check(file, toy / "images", "--llm", llm)
    assert status == 0 and "does not know" not in printed


def test_rows_are_cut_where_the_llm_ends(tmp_path, toy, check):
    file = write_records(tmp_path / "d.json", record("red " * 1500, "a"), record("red", "a"))
    status, printed = check(file, toy / "images", "--llm", ROOT / "lab/towers/tiny-llm")
    assert status == 1 and "has no word of an answer within 1024 tokens" in printed


def test_the_check_and_the_start_of_a_run_know_the_stage(tmp_path, world, llama_folder, monkeypatch, check):
    images = world[0] / "data/toy/images"
    good = pictured(sorted(images.iterdir())[0].name)
    many = good | {"conversations": good["conversations"] + record("more?", "no")["conversations"]}
    long = record("red " * 300, "a", "<image> b", "c", image=good["image"])
    unsaid = record("<image>\n" + "red " * 300, "a", image=good["image"])
    file = write_records(tmp_path / "d.json", *[good] * 8, TEXT, many, long, unsaid)
    _, printed = check(file, images)
    assert "12 of 12" in printed
    _, printed = check(file, images, "--stage", "align")
    assert "9 of 12" in printed and printed.count("not an image with one caption") == 3
    for stage, count in (("align", "8 of 12"), ("instruct", "10 of 12")):
        options = ["--stage", stage, "--llm", llama_folder, "--image_tokens", "16", "--max_length", "256"]
        _, printed = check(file, images, *options)
        assert ("the image does not fit into 256 tokens" in printed) == (stage == "instruct")
        assert "record 11 (id 'r'): has no word of an answer within 256 tokens" in printed or stage == "align"
    monkeypatch.setattr(train, "load_model", None)  # no weight is read before these are told
    options = [*world[1], "--stage", "align", "--annotations", file, "--max_length", "256", "--out",
               tmp_path / "out", "--batch", "1", "--micro_batch", "1"]
    last = how_it_ends(train.main, world[0], *options)
    assert "d.json: record 8 (id 'r') is not an image with one caption" in last
    last = how_it_ends(train.main, world[0], *options, "--contrastive", "none", "--template", "v1")
    assert "record 'r': the image does not fit into 256 tokens" in last


def test_an_llm_without_a_chat_template_is_no_fault_of_the_records(toy, llama_folder, check):
    status, printed = check(toy / "align.json", toy / "images", "--llm", llama_folder, "--template", "chat")
    assert "has no chat template" in status and "records are good" not in printed


def test_what_the_good_records_are_is_told(tmp_path, toy, llama_folder, check):
    picture = sorted((toy / "images").iterdir())[0]
    for name in ("a.png", "b.png"):
        shutil.copy(picture, tmp_path / name)
    many = [pictured("a.png"), pictured("b.png"), record("q", "red"), record("one two three", "four")]
    many.append(many[2] | {"id": "other"})
    del many[0]["id"], many[3]["id"]
    file = write_records(tmp_path / "d.json", *many)
    status, printed = check(file, tmp_path)
    assert (status, printed.splitlines()) == (0, [
        "5 of 5 records are good",
        "2 have an image, 3 have none; of 2 images, 1 are copies of others (first: 'a.png' and 'b.png')",
        "words: 2 to 5, median 4", "1 have the id of another before them (first: record 1 and record 2)",
        "1 have the picture and the answers of another before them (first: record 0 and record 1)",
        "4 have the same answers: 'red'"])
    _, printed = check(file, tmp_path, "--llm", llama_folder, "--image_tokens", "16", "--max_length", "29")
    samples = data.Conversations(load_records(file), tmp_path, load_tokenizer(llama_folder), "v1", None, "")
    lengths = sorted(samples.count_tokens(range(5), 16))
    counted = f"{lengths[0]} to {lengths[4]}, median {lengths[2]}\n"
    assert f"\ntokens, with 16 of the image (--image_tokens): {counted}" in printed
    assert lengths[2:] == [lengths[2], 30, 30] and "\n2 are cut at 29 tokens\n" in printed
    _, printed = check(write_records(file, many[0], pictured("b.png", answer="blue")), tmp_path)
    assert "1 are copies" in printed and "of another before" not in printed


def test_two_processes_find_what_one_finds(tmp_path, toy, check):
    good = pictured(sorted((toy / "images").iterdir())[0].name)
    many = [good | {"id": n, "image": good["image"] if n % 7 else "gone.png"} for n in range(100)]
    file = write_records(tmp_path / "d.json", *many, 7, {}, record("q", "\ud800 a"))
    found = []
    for workers in (0, 2):
        _, printed = check(file, toy / "images", "--workers", workers)
        found.append((printed, (tmp_path / "d.clean.json").read_text()))
    assert found[0] == found[1]
    assert "86 of 103" in printed and printed.count("gone.png") == 15 and "record 100 (id None)" in printed


def test_ctrl_c_ends_it_in_a_line(tmp_path, toy):
    """The terminal sends it to all processes of the command."""
    good = pictured(sorted((toy / "images").iterdir())[0].name)
    file = write_records(tmp_path / "d.json", {}, *[good] * 20_000)
    command = [sys.executable, "-m", "running.check", file, toy / "images", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout.readline().startswith("record 0 ")
    workers = children(process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and not (tmp_path / "d.clean.json").exists()
    assert said.splitlines()[-1] == "running.check: interrupted; nothing was written"
    assert "Traceback" not in said and len(workers) == 2 and not any(map(is_running, workers))


@pytest.mark.parametrize("image, found", [
    (None, None), ("", None), ([], None), ([""], None), ([None], None), (["a.png"], "a.png"),
    ("a.png", "a.png")])
def test_an_image_may_be_null_empty_or_a_list_of_one(tmp_path, check, image, found):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = "<image>\nWhat?" if found else "What is <image>?"
    file = write_records(tmp_path / "d.json", record(text, "red", image=image))
    status, printed = check(file, tmp_path)
    assert status == 0 and "1 of 1 records are good" in printed
    (loaded,) = load_records(file)
    assert loaded.get("image") == found
    sample = data.Conversations([loaded], tmp_path, llama2(False), "v1", TOWER, "pad")[0]
    assert (sample["pixels"] is not None) == bool(found)


def test_a_byte_order_mark_is_no_part_of_the_records(tmp_path, toy, check):
    """`check` said good, and training refused the file."""
    file, records = tmp_path / "d.json", [TEXT, record("q", "é"), TEXT]
    for content in (json.dumps(records, ensure_ascii=False), "\n".join(map(json.dumps, records))):
        file.write_text(f"\ufeff{content}", encoding="utf-8")
        assert check(file, toy)[0] == 0 and list(load_records(file)) == records
