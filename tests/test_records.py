"""Lists of records as people have them: running/records.py, and what data.find_problem says of a record."""

import json
import pickle

import pytest
from conftest import ROOT
from test_check import write_records
from test_data import CAPTION, TEXT, record

import data
from plumbing.tokenizer import load_tokenizer
from running.records import load_records, read_records

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
SAY = {"from": "gpt", "value": "A ring."}


def pictured(**fields):
    return {"id": "a", "image": "a.png", "conversations": [ASK, SAY]} | fields


@pytest.mark.parametrize("key", ["images", "image_path", "Image", "img", "video"])
def test_a_picture_under_another_key_is_named(key):
    record = pictured()
    record[key] = record.pop("image")
    assert data.find_problem(record) == f"has no 'image'; is it {key!r}?"


@pytest.mark.parametrize("fields, says", [
    ({"video": "a.mp4"}, "is it 'video'?"), ({"images": ["a.png"]}, "is it 'images'?"),
    ({"image_id": 5, "images": ["a.png"]}, "is it 'images'?"),
    ({"videos": []}, None), ({"image_id": 5}, None), ({}, None)])
def test_what_would_train_blind_is_told(fields, says):
    """A question without <image>, and a picture under a key that we do not read."""
    record = pictured(conversations=[{"from": "human", "value": "<video>\nWhat is it?"}, SAY]) | fields
    del record["image"]
    problem = data.find_problem(record)
    assert problem is None if says is None else problem.endswith(says)


@pytest.mark.parametrize("record, says", [
    ({"messages": [{"role": "user", "content": "x"}]}, "has messages; LLaVA's records have 'conversations'"),
    (pictured(conversations=[{"role": "user", "content": "x"}]), "each has 'from' ('human' or 'gpt')"),
    (pictured(conversations=[{"from": "user", "value": "x"}, SAY]), "the roles are 'human' and 'gpt'"),
    (pictured(conversations=[ASK, {"from": "assistant", "value": "x"}]), "has a turn from 'assistant'"),
    (pictured(image=["a.png", "b.png"]), "has 2 images; one is supported"),
    (pictured(image=None), None),  # a text that names the marker
])
def test_other_formats_get_a_hint(record, says):
    problem = data.find_problem(record)
    assert problem is None if says is None else says in problem


@pytest.mark.parametrize("text", [
    json.dumps([pictured(), pictured(id="b")]),
    "\n".join(json.dumps(pictured(id=name)) for name in "ab") + "\n",  # JSON lines
    "\ufeff" + json.dumps([pictured(), pictured(id="b")], indent=1),
])
def test_json_and_json_lines_are_read(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert [record["id"] for record in read_records(tmp_path / "a.json")] == ["a", "b"]
    loaded = load_records(tmp_path / "a.json")
    assert len(loaded) == 2 and loaded[1] == loaded[-1] == pictured(id="b")
    with pytest.raises(IndexError):
        loaded[2]


@pytest.mark.parametrize("write", [
    json.dumps, lambda records: json.dumps(records, indent=1),
    lambda records: f" {json.dumps(records, ensure_ascii=False)}\n",
    lambda records: json.dumps(records, separators=(",", ":")),
    lambda records: "\n".join(map(json.dumps, records)),
    lambda records: "\n\n".join(map(json.dumps, records)),
    lambda records: "\n".join(json.dumps(record, indent=1) for record in records)])
def test_records_are_what_json_reads(tmp_path, write):
    """However the file is written, as a list or in lines."""
    written = [TEXT, CAPTION | {"id": "é 😀 ]}, {["}, record("two\n words", "b"),
               record("q", "ü" * 50, "<image>", "a", image="x")]
    (tmp_path / "d.json").write_text(write(written), encoding="utf-8")
    loaded = load_records(tmp_path / "d.json")
    for records in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert list(records) == written and records[-1] == written[3] and len(records) == 4


@pytest.mark.parametrize("text, message", [
    ("[]", "holds no records"), ("{}", "not a JSON list of records"),
    ("[1 2]", "not JSON|no conversation"),
    ('[{"id": 1}', "not JSON|has no conversation"), ("", "not JSON"), ("[1,]", "not JSON|no conversation"),
    ("[", "not JSON"), ("[]]", "not JSON"),
    (json.dumps([TEXT])[:-1] + ",", "behind 1 records"), (json.dumps([TEXT])[:-1], "behind 1 records"),
    (json.dumps(TEXT) + " " + json.dumps(TEXT), "behind 1 records"), (" [ ] \n", "holds no records"),
    (json.dumps([TEXT]) + "]", "behind 1 records")])
def test_what_is_no_list_of_records_is_refused(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=f"d.json: .*({message})"):
        load_records(tmp_path / "d.json")


def test_what_stands_behind_the_list_is_refused(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([TEXT]) + " [1]")
    with pytest.raises(ValueError, match=r"d.json: not JSON \(.*\): behind 1 records: Expecting ',' or"):
        load_records(tmp_path / "d.json")


@pytest.mark.parametrize("image, tidy", [(["a.png"], {"image": "a.png"}), (None, {}), ("", {}), ([], {})])
def test_loaded_records_are_tidy(tmp_path, image, tidy):
    ask = ASK if tidy else {"from": "human", "value": "What is it?"}
    (tmp_path / "a.json").write_text(json.dumps([pictured(image=image, conversations=[ask, SAY])]))
    for records_of in (load_records, read_records):
        assert list(records_of(tmp_path / "a.json")) == [{"id": "a", "conversations": [ask, SAY]} | tidy]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_records_with_an_empty_turn_are_left_out_and_told(tmp_path, capsys, empty):
    """LLaVA's own mix665k has two. LLaVA trains on nothing of them."""
    written = [pictured(id=name) for name in "abc"]
    written[empty] = pictured(id="x", conversations=[ASK, {"from": "gpt", "value": " "}])
    (tmp_path / "d.json").write_text(json.dumps(written))
    kept = [record["id"] for record in load_records(tmp_path / "d.json")]
    assert kept == [*"abc"[:empty], *"abc"[empty + 1 :]]
    said = f"1 of 3 records are left out, for each has an empty turn; the first is {empty} of the file\n"
    assert capsys.readouterr().out.endswith(said)
    (tmp_path / "d.json").write_text(json.dumps([written[empty]]))
    with pytest.raises(ValueError, match="d.json: each of the 1 records has an empty turn"):
        load_records(tmp_path / "d.json")


def test_one_json_line_is_a_list_of_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(pictured()))
    assert read_records(tmp_path / "a.jsonl") == [pictured()]


def test_a_trailing_comma_is_named_by_record(tmp_path):
    (tmp_path / "a.json").write_text("[" + json.dumps(pictured()) + "," + json.dumps(pictured()) + ",]")
    with pytest.raises(ValueError, match=r"a.json: not JSON \(.*\): behind 2 records: "):
        read_records(tmp_path / "a.json")


def test_records_survive_any_text(tmp_path):
    record = pictured(conversations=[ASK, {"from": "gpt", "value": "\u989c \U0001f600 \ud800 \x00"}])
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert load_records(tmp_path / "a.json")[0] == record


def test_a_template_that_tells_the_date_tells_the_same_every_day(monkeypatch):
    tokenizer = load_tokenizer(ROOT / "lab/towers/tiny-llm")
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert data.chat(tokenizer).opening == "26 Jul 2024user: "


@pytest.mark.parametrize("image, message", [
    (["a.png", "b.png"], "has 2 images; one is supported"),
    *[(odd, "not a file name") for odd in (5, {"x": 1}, [5], True, [["a.png"]])]])
def test_other_images_are_refused(tmp_path, image, message):
    with pytest.raises(ValueError, match=message):
        load_records(write_records(tmp_path / "d.json", record("<image>\nq", "a", image=image)))
