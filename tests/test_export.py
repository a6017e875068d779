"""`python -m running.export` of a run. What is in such a folder: test_formats.py, test_projector.py."""

import shutil

import pytest
import torch
import transformers
from test_formats import change as set_in
from test_train import how_it_ends

from projector import VLM
from running import export


@pytest.fixture
def run(clip_folder, llama_folder, tmp_path):
    VLM.from_towers(clip_folder, llama_folder, dtype=torch.bfloat16).save(tmp_path / "run", {}, with_llm=True)
    return tmp_path / "run"


def test_a_run_is_exported_in_its_own_dtype(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "out")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"wrote {tmp_path}/out: transformers' LLaVA format, 0.")
    assert second == f"next: transformers serve {tmp_path}/out"
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("change, message", [
    (lambda run, out: (run / "config.json").rename(run / "log.jsonl"),
     "run: not finished, and without a checkpoint so far"),
    (lambda run, out: set_in(run, template="my-own"),
     "tuned with template 'my-own': transformers would ask in another form"),
    (lambda run, out: (out / "x").mkdir(parents=True), "out: not empty; nothing is written over"),
    (lambda run, out: shutil.rmtree(run) or run.mkdir(), "run/config.json: no such file"),
    (lambda run, out: shutil.rmtree(run), "run: no such folder, and the Hub does not give it")])
def test_what_cannot_be_exported_ends_in_a_line(run, tmp_path, change, message):
    change(run, tmp_path / "out")
    last = how_it_ends(export.main, tmp_path, str(run), str(tmp_path / "out"))
    assert last.startswith("running.export: ") and message in last
    assert not (tmp_path / "out/config.json").exists()
