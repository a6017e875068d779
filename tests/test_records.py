"""Lists of records as people have them: running/records.py, and what data.find_problem says of a record."""

import json

import pytest
from conftest import ROOT
from test_check import write_records
from test_data import record

import data
from plumbing.tokenizer import load_tokenizer
from running import records
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


def read_on(rank, world, file):
    """[the records], and whether this rank has parsed the file."""
    import os
    parsed = []
    real = records.good_records
    os.environ["LOCAL_RANK"] = str(rank)
    records.good_records = lambda *args: parsed.append(1) or real(*args)
    try:
        loaded = records.load_records(file)
        return [loaded[i] for i in range(len(loaded))], bool(parsed)
    finally:
        records.good_records = real
        del os.environ["LOCAL_RANK"]


def test_one_rank_of_a_machine_parses(ranks, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([pictured(id=str(i)) for i in range(5)]))
    found = ranks(2, read_on, tmp_path / "a.json")
    assert [parsed for _, parsed in found] == [True, False]
    assert found[0][0] == found[1][0] == [pictured(id=str(i)) for i in range(5)]


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
