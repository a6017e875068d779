"""Asking: batches, ranks, a killed evaluation that goes on; likelihoods; where an answer ends; several turns
about one picture; the command."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_benchmarks import copy, root  # noqa: F401 (fixtures)

import data
import eval as evaluation
from benchmarks import BENCHES, load_questions, vqa
from projector import VLM

CPU = torch.device("cpu")
TURN = "{{ '<s>' if loop.first else '' }}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' }}\n"
OWN_TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{{{ 'assistant:' if add_generation_prompt }}}}"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The directory of a run that has learned nothing; its LLM answers in the toy world's words."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    towers = ROOT / "lab/towers/tiny-vit", ROOT / "lab/towers/tiny-llm"
    VLM.from_towers(*towers, "mlp2x_gelu").save(folder, {"template": "v1"}, False)
    return folder


# ---- asking ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(run):
    return evaluation.load_run(run, CPU)[:2]


def ask_everything(rank, world, run, root, batch, file=None):
    """{benchmark: answers, and the likeliest options}."""
    vlm, tokenizer, config = evaluation.load_run(run, CPU)
    found = {}
    for name in BENCHES:
        questions = load_questions(name, root / BENCHES[name].folder)
        own = file and f"{file}-{name}"
        found[name] = evaluation.ask(vlm, tokenizer, questions, config["template"], 6, batch, own)
        closed = [question for question in questions if question.get("options")]
        found[f"likeliest of {name}"] = evaluation.ask_likeliest(vlm, tokenizer, closed, "v1", batch)
    return found


def test_batched_is_one_at_a_time_and_two_ranks_are_one(run, root, ranks, tmp_path):
    alone = ask_everything(0, 1, run, root, 1)
    assert len({answer for name in BENCHES for answer in alone[name]}) > 20
    batched = ask_everything(0, 1, run, root, 4)
    for found in [batched, *ranks(2, ask_everything, run, root, 4, tmp_path / "kept")]:
        assert found == alone
    for name in BENCHES:
        shares = [tmp_path / f"kept-{name}.{rank}.jsonl" for rank in (0, 1)]
        counts = [len(share.read_text().splitlines()) for share in shares if share.exists()]
        # a batch more on one rank, and nothing twice
        assert sum(counts) == len(alone[name]) and max(counts) <= len(alone[name]) / 2 + 4


def test_the_likeliest_letter_is_that_of_a_plain_loop(model, root):
    """Each option alone, without padding: its letter's logit behind the prompt. With pictures and without."""
    vlm, tokenizer = model
    questions = load_questions("scienceqa", root / "ScienceQA") + load_questions("mmbench", root / "MMBench")
    questions += load_questions("pope", root / "POPE")
    questions[1]["options"] = ["A"]
    found = evaluation.ask_likeliest(vlm, tokenizer, questions, "v1", batch=3)
    assert len(set(found)) > 2 and found[1] == "A"
    for question, choice in zip(questions, found):
        if question["image"] is None:
            ids = tokenizer(f"{data.SYSTEM} USER: {question['prompt']} ASSISTANT:").input_ids
            pixels = torch.zeros(1, 3, 48, 48)
        else:
            before, after = f"{data.SYSTEM} USER: {question['prompt']} ASSISTANT:".split("<image>")
            ids = tokenizer(before).input_ids + [vlm.image_token_id] * vlm.num_image_tokens
            ids += tokenizer(after, add_special_tokens=False).input_ids
            picture = data.load_image(question["image"])
            pixels = data.preprocess(picture, vlm.vit.config, "pad")[None]
        options = [option.capitalize() for option in question["options"]]
        said = [tokenizer(option, add_special_tokens=False).input_ids for option in options]
        with torch.no_grad():
            logits = vlm(torch.tensor([ids]), pixels)[0, -1]
        likely = [logits[token].item() for token, in said]
        assert choice == question["options"][likely.index(max(likely))]


def test_a_likelihood_takes_one_pass_for_all_options(model, root, monkeypatch):
    vlm, tokenizer = model
    questions, passes = load_questions("mmbench", root / "MMBench"), []
    encode, hidden = vlm.encode, vlm.llm.hidden
    monkeypatch.setattr(vlm, "encode", lambda pixels: passes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(vlm.llm, "hidden", lambda embeds, *more: passes.append(len(embeds)) or hidden(
        embeds, *more))
    evaluation.ask_likeliest(vlm, tokenizer, questions, "v1", batch=len(questions))
    assert passes == [len(questions)] * 2


@pytest.mark.parametrize("name", ["gqa", "mmbench"])
def test_a_broken_picture_is_named_and_the_answers_before_it_are_kept(model, copy, tmp_path, name):
    questions = load_questions(name, copy(name))
    if name == "gqa":
        questions[-1]["image"].write_bytes(b"no picture")
    else:
        questions[-1]["image"] = b"bm8gcGljdHVyZQ=="
    questions[-1]["prompt"] = questions[-1]["prompt"][:30]  # the shortest is asked last
    message = f"{questions[-1]['file']}: question '{questions[-1]['id']}': .*not a readable image"
    with pytest.raises(ValueError, match=message):
        evaluation.ask(*model, questions, "v1", 4, batch=2, file=tmp_path / "answers")
    assert len((tmp_path / "answers.0.jsonl").read_text().splitlines()) == len(questions) - 2


def test_a_split_without_answers_is_asked_and_not_scored(model, copy):
    folder = copy("mmbench")
    text = (folder / "mmbench_dev_20230712.tsv").read_text()
    (folder / "mmbench_test_20230712.tsv").write_text(text.replace("\tanswer\t", "\tx\t"))
    questions = load_questions("mmbench", folder, "test")
    assert {question["answer"] for question in questions} == {None}
    assert evaluation.answer_bench(*model, "v1", "mmbench", folder, "test")[0] == {"questions": 20}


def scored(run, *argv):
    """The result of the command in `run`'s directory, and the content of BENCH.json."""
    evaluation.main(["--bench", *map(str, argv), "--ckpt", str(run)])
    return json.loads((run / f"{argv[0]}.json").read_text())


@pytest.fixture
def own_run(run, tmp_path):
    return shutil.copytree(run, tmp_path / "own")


def test_a_killed_evaluation_goes_on_and_equals_an_undisturbed_one(own_run, root, monkeypatch):
    """Killed while writing, in each of the four rounds of questions; the first kill leaves half a line. Two
    ranks' files go on in one process."""
    argv = ["mmbench", "--data", root / "MMBench", "--score", "likelihood", "--floors"]
    in_batches = evaluation.in_batches
    monkeypatch.setattr(evaluation, "in_batches", lambda questions, answer, batch, file: in_batches(
        questions, answer, 2, file))
    expected, asked = scored(own_run, *argv), []
    assert not list(own_run.glob("*.jsonl"))  # of a finished one nothing is left over
    append = evaluation.append_answers

    def append_and_die(file, questions, answers):
        asked.extend(question["id"] for question in questions)
        append(file, questions, answers)
        if len(asked) in (8, 26, 50, 70):
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_answers", append_and_die)
    for rounds in range(4):
        with pytest.raises(KeyboardInterrupt):
            scored(own_run, *argv)
        part, *_ = own_run.glob("*.partial.0.jsonl")
        lines = part.read_text().splitlines(keepends=True)
        if rounds == 0:
            assert len(lines) == 8
            part.write_text("".join(lines[:4]) + lines[0][:25])
            part.with_name(part.name.replace(".0.", ".1.")).write_text("".join(lines[4:]) + lines[1][:9])
    asked.append("no more deaths")
    assert scored(own_run, *argv) == expected
    assert len(asked) == 20 + 20 + 20 + 20 + 1  # nothing was asked twice
    assert not list(own_run.glob("*.jsonl"))


def test_a_killed_all_goes_on_with_the_benchmark_it_was_at(own_run, root, tmp_path, monkeypatch):
    for name in ("GQA", "TextVQA"):
        shutil.copytree(root / name, tmp_path / "some" / name)
    argv, asked, append = ["all", "--data", tmp_path / "some"], [], evaluation.append_answers

    def append_and_die(file, questions, answers):
        asked.append(file)
        append(file, questions, answers)
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_answers", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(["--bench", *map(str, argv), "--ckpt", str(own_run)])
    assert len(asked) == 2 and (own_run / "gqa.json").exists()
    evaluation.main(["--bench", *map(str, argv), "--ckpt", str(own_run)])
    assert len(asked) == 2 and (own_run / "textvqa.json").exists() and not list(own_run.glob("*.jsonl"))


def test_a_broken_line_of_kept_answers_is_named(own_run, root):
    (own_run / "gqa.partial.0.jsonl").write_text('{"id": "200000"\n{}\n')
    with pytest.raises(SystemExit, match="gqa.partial.0.jsonl: "):
        scored(own_run, "gqa", "--data", root / "GQA")


@pytest.fixture
def killed(own_run, copy, monkeypatch):
    """(run, options, list of the ids that are asked): an evaluation of GQA that was killed before its end."""
    argv, asked = ["gqa", "--data", str(copy("gqa"))], []
    append, in_batches = evaluation.append_answers, evaluation.in_batches
    monkeypatch.setattr(evaluation, "in_batches", lambda questions, answer, batch, file: in_batches(
        questions, answer, 2, file))

    def append_and_die(file, questions, answers):
        append(file, questions, answers)
        asked.extend(question["id"] for question in questions)
        if len(asked) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_answers", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        scored(own_run, *argv)
    return own_run, argv, asked


def change_weights(run, argv):
    weights = load_file(run / "projector.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, run / "projector.safetensors")


def change_template(run, argv):
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(config["llm"], run / "tower")
    (run / "tower/chat_template.jinja").write_text(OWN_TEMPLATE)
    (run / "config.json").write_text(json.dumps(config | {"template": "chat", "llm": str(run / "tower")}))


def change_pictures(run, argv):
    """Others under the same names."""
    for number, file in enumerate(sorted(Path(argv[2]).glob("images/*"))):
        Image.new("RGB", (48, 48), (9 * number, 0, 0)).save(file)


def touch_pictures(run, argv):
    """Of the same size, as a picture with another colour may be."""
    for file in Path(argv[2]).glob("images/*"):
        os.utime(file, ns=(1, 1))


def change_questions(run, argv):
    file = Path(argv[2]) / "testdev_balanced_questions.json"
    file.write_text(file.read_text().replace("What color", "Which color"))


def change_data(run, argv):
    """The same questions about the pictures of another folder."""
    argv[2] = str(shutil.copytree(argv[2], run / "data"))


@pytest.mark.parametrize("change", [change_weights, change_template, change_pictures, touch_pictures,
                                    change_questions, change_data])
def test_answers_that_were_made_of_something_else_are_made_anew(killed, capsys, change):
    run, argv, asked = killed
    change(run, argv)
    found = scored(run, *argv)
    assert len(asked) == 4 + 6 and set(asked[4:]) == set(asked)
    assert "gqa.partial.0.jsonl: 4 answers are of another model, template, " in capsys.readouterr().out
    assert found == scored(run, *argv)  # as of one that was not killed
    assert not list(run.glob("*.jsonl"))


def test_only_the_answers_about_a_changed_picture_are_made_anew(killed, capsys):
    run, argv, asked = killed
    changed = asked[0]
    question, = (row for row in load_questions("gqa", argv[2]) if row["id"] == changed)
    os.utime(question["image"], ns=(1, 1))
    scored(run, *argv)
    assert asked.count(changed) == 2 and len(asked) == 4 + 4  # its batch, and the two that were not asked
    assert "1 answers are of another model" in capsys.readouterr().out


def test_a_model_with_other_weights_is_scored_by_its_own_answers(own_run, root):
    """A projector set to zero: no answer of the one before is taken over, and the older result is kept."""
    argv = "pope", "--data", root / "POPE"
    before = scored(own_run, *argv)
    assert scored(own_run, *argv) == before and not list(own_run.glob("*.old*"))  # the same again: no copy
    change_weights(own_run, argv)
    after = scored(own_run, *argv)
    assert after["predictions"] != before["predictions"]
    assert json.loads((own_run / "pope.json.old").read_text()) == before
    change_template(own_run, argv)
    scored(own_run, *argv)
    assert json.loads((own_run / "pope.json.old2").read_text()) == after
    (own_run / "pope.json").write_text("[1]")  # somebody else's
    scored(own_run, *argv)
    assert json.loads((own_run / "pope.json.old3").read_text()) == [1]


def failing(rank, world, run, root):
    """What the second rank's broken picture looks like on each rank."""
    vlm, tokenizer, config = evaluation.load_run(run, CPU)
    questions = load_questions("gqa", root / "GQA")
    questions[-1] |= {"image": b"broken"}
    try:
        evaluation.ask(vlm, tokenizer, questions, config["template"], 2, batch=1)
    except ValueError as error:
        return str(error)


def test_an_error_of_one_rank_is_heard_on_all(run, root, ranks):
    first, second = ranks(2, failing, run, root)
    assert first == second and "question '200005': in base64: not a readable image" in first


def loading(rank, world, root):
    """What each rank says of a benchmark that only the first can load."""
    folder = root / "GQA" if rank == 0 else root / "nowhere"
    try:
        evaluation.answer_bench(None, None, "v1", "gqa", folder)
    except Exception as error:
        return str(error)


def test_a_benchmark_that_one_rank_cannot_load_ends_on_all(root, ranks):
    """Otherwise the others would wait in it, while that rank is in the next one of --bench all."""
    first, second = ranks(2, loading, root)
    assert first == second and "nowhere" in first


@pytest.fixture
def llava_folder(clip_folder, llama_folder, tmp_path):
    """In transformers' format: its own chat template takes pictures where our marker would be lost, and its
    LLM's config has another end token than its tokenizer."""
    VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu").export(tmp_path)
    template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    del config["template"]  # only ours name one
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    return tmp_path


@pytest.mark.parametrize("said, tokens", [("of the config", 1), ("of the tokenizer", 1), ("any other", 4)])
def test_a_llava_folder_is_asked_in_vicunas_form(llava_folder, monkeypatch, capsys, said, tokens):
    """Not in its own, and that is told. Its answers end with either end token."""
    vlm, tokenizer, config = evaluation.load_run(llava_folder, CPU)
    assert f"{llava_folder}: names no template of ours; asked with v1" in capsys.readouterr().out
    assert tokenizer.chat_template and config["template"] == "v1" and vlm.llm.config.eos_token_id == 7
    token, drawn = {"of the config": 7, "of the tokenizer": tokenizer.eos_token_id, "any other": 9}[said], []

    def choose(logits, temperature, top_p):
        drawn.append(token)
        return torch.full((len(logits),), token)

    monkeypatch.setattr("llm.choose", choose)
    question = {"id": 1, "prompt": "<image>\nWhat color is the shape?", "image": llava_folder / "x.png"}
    answer, = evaluation.ask(vlm, tokenizer, [question], config["template"], 4)
    assert len(drawn) == tokens
    assert answer == tokenizer.decode([token] * tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("tuned_with", ["v1", "chat"])
def test_an_export_is_asked_as_the_run_that_it_came_from(run, tmp_path, tuned_with):
    """In its own template: every id of a question is the same."""
    own = shutil.copytree(run, tmp_path / "own")
    change_template(own, None)
    (own / "config.json").write_text(json.dumps(json.loads((own / "config.json").read_text()) | {
        "template": tuned_with}))
    vlm, tokenizer, config = evaluation.load_run(own, CPU)
    vlm.export(tmp_path / "export")
    exported, its_tokenizer, its_config = evaluation.load_run(tmp_path / "export", CPU)
    assert its_config["template"] == config["template"] == tuned_with
    questions = [evaluation.about(None, "What color is it?"), {"id": 1, "prompt": "Red?", "image": None}]
    for question in questions:
        turns = [("human", question["prompt"]), ("gpt", "Red"), ("human", "And now?")]
        has_image = question["prompt"].startswith("<image>")
        first, second = (data.encode(turns, data.form_of(tuned_with, each), each, has_image)
                         for each in (tokenizer, its_tokenizer))
        assert first == second


def test_another_template_than_the_runs_own_is_printed(own_run, root, picture, capsys):
    change_template(own_run, None)
    argv = ["--bench", "gqa", "--data", str(root / "GQA"), "--ckpt", str(own_run)]
    scores = []
    for more in ([], ["--template", "v1"]):
        evaluation.main([*argv, *more])
        *lines, last = capsys.readouterr().out.splitlines()
        said = [line for line in lines if "asked with template" in line]
        assert said == [f"{own_run}: asked with template v1; its own is chat"] * bool(more)
        scores.append(json.loads(last))
    assert [score["template"] for score in scores] == ["chat", "v1"]
    names = "gqa.json", "gqa.template=v1.json"
    kept = [json.loads((own_run / name).read_text()) for name in names]
    assert [one["scores"] for one in kept] == scores and kept[0]["predictions"] != kept[1]["predictions"]
    evaluation.main(["--ask", picture, "Red?", "--ckpt", str(own_run), "--template", "v1"])
    assert "its own is chat" in capsys.readouterr().out


# ---- several turns about one picture -----------------------------------------------------------------------

@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_a_turn_is_asked_behind_those_before_it(run, picture, monkeypatch, capsys, template):
    """What the model is given: the template of the whole conversation so far, and the picture, each time."""
    vlm, tokenizer, _ = evaluation.load_run(run, CPU)
    tokenizer.chat_template = OWN_TEMPLATE
    asked, generate = [], vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda *args, **how: asked.append(args) or generate(*args, **how))
    questions = "What color is the shape?", "What shape is it?", "Where is the <image>?"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", "Is this asked?"])))
    evaluation.chat(vlm, tokenizer, template, picture, max_new_tokens=5)
    answers, turns = capsys.readouterr().out.splitlines(), []
    assert len(answers) == len(asked) == 3 and all(answers)
    for question, answer, (ids, pixels, *_) in zip(questions, answers, asked):
        turns.append(("human", question if turns else f"<image>\n{question}"))
        expected, _ = data.encode(turns, data.form_of(template, tokenizer), tokenizer, True)
        marker = expected.index(data.IMAGE_MARKER)
        expected[marker : marker + 1] = [vlm.image_token_id] * vlm.num_image_tokens
        assert ids.tolist() == [expected] and torch.equal(pixels, asked[0][1]) and len(pixels) == 1
        assert ids[0].tolist().count(tokenizer.eos_token_id) == len(turns) // 2  # the ends of the answers
        turns.append(("gpt", answer))


@pytest.mark.parametrize("text", ["What color?", "<image>\nWhat color?", "<image> <image> What color?",
                                  "What color?\n<image>"])
def test_a_question_may_bring_its_marker(run, picture, monkeypatch, capsys, text):
    asked = []
    generate = VLM.generate
    monkeypatch.setattr(VLM, "generate", lambda self, ids, *args, **how: (
        asked.append(ids) or generate(self, ids, *args, **how)))
    for typed in (text, "What color?"):
        evaluation.main(["--ask", picture, typed, "--ckpt", str(run), "--max_new_tokens", "2"])
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first)["question"] == text and torch.equal(*asked)
    assert json.loads(first)["answer"] == json.loads(second)["answer"]


def test_a_pipe_gets_the_answers_alone(run, picture):
    """From a process whose stdin is none of a person's; its last line has no end. The first answer is that of
    --ask."""
    argv = [sys.executable, ROOT / "eval.py", "--chat", picture, "--ckpt", run, "--max_new_tokens", "4"]
    said = subprocess.run(argv, input="What color is it?\nAnd its size?", capture_output=True, text=True)
    vlm, tokenizer, _ = evaluation.load_run(run, CPU)
    first, = evaluation.ask(vlm, tokenizer, [evaluation.about(picture, "What color is it?")], "v1", 4)
    second = evaluation.about(picture, "x") | {"prompt": "And its size?", "before": [
        ("human", "<image>\nWhat color is it?"), ("gpt", first)]}
    second, = evaluation.ask(vlm, tokenizer, [second], "v1", 4)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{first}\n{second}\n", "")


class Person(io.StringIO):
    """At a terminal; Ctrl-C at the end of what is typed."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


def test_a_person_is_prompted_and_may_leave_by_ctrl_c(run, picture, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Person("Is it red?\n"))
    evaluation.main(["--chat", picture, "--ckpt", str(run), "--max_new_tokens", "2"])
    out = capsys.readouterr().out
    assert out.startswith("> ") and out.endswith("\n> \n") and out.count("> ") == 2


def test_a_chat_goes_on_without_the_thoughts_of_earlier_answers(run, picture, monkeypatch):
    vlm, tokenizer, config = evaluation.load_run(run, CPU)
    asked = []

    def ask(vlm, tokenizer, questions, *_, **how):
        asked.extend(questions)
        return ["<think>\nis it?\n</think>\n\nred"]

    monkeypatch.setattr(evaluation, "ask", ask)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nSure?\n"))
    evaluation.chat(vlm, tokenizer, config["template"], picture)
    assert [answer for _, answer in asked[1]["before"]][1:] == ["red"]


def test_what_ends_a_chat_is_told_in_one_line(run, picture, tmp_path, monkeypatch):
    """A bad picture, before a question is read; a conversation that has become too long; several ranks."""
    monkeypatch.setattr(sys, "stdin", stdin := io.StringIO(30 * "What is it?\n"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for file, reason in (("bad.png", "not a readable image"), ("none.png", "no such image")):
        with pytest.raises(SystemExit, match=rf"^eval.py: .*{file}: {reason}.*$"):
            evaluation.main(["--chat", str(tmp_path / file), "--ckpt", str(run)])
    assert stdin.tell() == 0
    with pytest.raises(SystemExit, match=r"^eval.py: question '.*x.png, turn \d+': \d+ tokens; .* for 174$"):
        evaluation.main(["--chat", picture, "--ckpt", str(run), "--max_new_tokens", "850"])
    assert 0 < stdin.tell() < 30 * 12  # after some turns
    monkeypatch.setattr(evaluation, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="^eval.py: --chat has one stdin: run it without torchrun$"):
        evaluation.main(["--chat", picture, "--ckpt", str(run)])


# ---- the command -------------------------------------------------------------------------------------------


def test_all_answers_scores_and_writes_every_benchmark(own_run, root, capsys):
    evaluation.main(["--bench", "all", "--data", str(root), "--ckpt", str(own_run), "--limit", "2"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [result["bench"] for result in results] == list(BENCHES)
    for result in results:
        saved = json.loads((own_run / f"{result['bench']}.limit=2.json").read_text())
        assert saved["scores"] == result and saved["predictions"][0]["prompt"].startswith("<image>")
        assert result["questions"] == {"mme": 4}.get(result["bench"], 2)
        assert ("accuracy" in result) == (result["bench"] not in ("vqav2", "mmvet"))
        has_error = "accuracy" in result and result["bench"] != "textvqa"  # two questions about one picture
        assert ("accuracy_se" in result) == has_error
    written = {file.stem.removesuffix(".limit=2-submit") for file in own_run.glob("*-submit*")}
    assert written == {"mmbench", "mmbench-cn", "vqav2", "mmvet"}


def test_all_says_what_is_not_there_and_goes_on_after_a_failure(own_run, root, tmp_path, capsys):
    for name in ("GQA", "TextVQA"):
        shutil.copytree(root / name, tmp_path / "some" / name)
    (tmp_path / "some/GQA/images/n0.jpg").unlink()
    argv = ["--bench", "all", "--ckpt", str(own_run), "--data"]
    with pytest.raises(SystemExit, match="^eval.py: failed: gqa$"):
        evaluation.main([*argv, str(tmp_path / "some")])
    printed = capsys.readouterr().out
    assert "scienceqa is not run: no folder " in printed and '"bench": "textvqa"' in printed
    assert "gqa failed: " in printed and "n0.jpg" in printed
    with pytest.raises(SystemExit, match="no benchmark is there, neither ScienceQA nor .* nor mm-vet$"):
        evaluation.main([*argv, str(tmp_path)])


def test_what_servers_and_judges_want(own_run, root, tmp_path):
    found = {}
    for name in ("mmbench", "vqav2", "mmvet"):
        file = tmp_path / name
        scored(own_run, name, "--data", root / BENCHES[name].folder, "--submit", file)
        predictions = json.loads((own_run / f"{name}.json").read_text())["predictions"]
        found[name] = file.read_text(), {row["id"]: row["text"] for row in predictions}
    text, said = found["mmbench"]
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert {row["index"]: row["prediction"] for row in rows} == said
    rows = {row["question_id"]: row["answer"] for row in json.loads(found["vqav2"][0])}
    assert len(rows) == 6 and {rows[number] for number in (3000, 4000, 5000)} == {""}  # the rest of test2015
    assert {number: vqa.normalise(text) for number, text in found["vqav2"][1].items()} == {
        number: rows[number] for number in (0, 1000, 2000)}
    assert json.loads(found["mmvet"][0]) == found["mmvet"][1]


def test_a_smaller_question_is_written_beside_the_larger_one(own_run, root):
    """Each of a split, a limit and a template has its own files; the split that is meant anyway has not."""
    data = "--data", str(root / "MMBench")
    scored(own_run, "mmbench", *data, "--floors")
    whole = {file.name: file.read_bytes() for file in own_run.glob("mmbench*")}
    assert set(whole) == {"mmbench.json", "mmbench-submit.tsv"}
    change_template(own_run, None)
    for options, stem in [
        (["--limit", "2"], "mmbench.limit=2"), (["--split", "dev_2"], "mmbench.split=dev_2"),
        (["--split", "dev_2", "--limit", "1"], "mmbench.split=dev_2.limit=1"),
        (["--template", "v1", "--limit", "1"], "mmbench.limit=1.template=v1")]:
        evaluation.main(["--bench", "mmbench", *data, "--ckpt", str(own_run), *options])
        written = [file.name for file in own_run.glob("mmbench*") if file.name not in whole]
        assert sorted(written) == [f"{stem}-submit.tsv", f"{stem}.json"]
        for name in written:
            (own_run / name).unlink()
        assert all((own_run / name).read_bytes() == content for name, content in whole.items())
    shutil.copytree(root / "MME_Benchmark_release_version/color", own_run / "mme/a[b]")
    evaluation.main(["--bench", "mme", "--data", str(own_run / "mme"), "--split", "a[[]b]", "--ckpt",
                     str(own_run)])
    assert [file.name for file in own_run.glob("mme.*")] == ["mme.split=a%5B%5B%5Db%5D.json"]


def test_the_split_that_is_meant_anyway_changes_no_name_and_floors_stay(own_run, root):
    argv = "seed", "--data", root / "SEED-Bench"
    first = scored(own_run, *argv, "--floors")
    again = scored(own_run, *argv, "--split", "image")
    assert again == first and "floors" in again["scores"]
    assert [file.name for file in own_run.glob("seed*")] == ["seed.json"]


def test_results_may_lie_elsewhere(own_run, root, tmp_path, monkeypatch):
    """Of a run that cannot be written to; also what is kept of a killed evaluation."""
    argv = ["--bench", "all", "--data", str(root), "--ckpt", str(own_run), "--limit", "1"]
    before = sorted(own_run.rglob("*"))
    evaluation.main([*argv, "--out", str(tmp_path / "new/out")])
    assert sorted(own_run.rglob("*")) == before
    names = {file.name for file in (tmp_path / "new/out").iterdir()}
    assert {f"{name}.limit=1.json" for name in BENCHES} < names and len(names) == len(BENCHES) + 4
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="gqa.partial.0.jsonl: not written; --out names another folder: "):
        evaluation.main(["--bench", "gqa", "--data", str(root / "GQA"), "--ckpt", str(own_run), "--out",
                         str(tmp_path / "file")])


@pytest.mark.parametrize("by", ["likelihood", "words"])
def test_likelihood_and_floors_stand_beside_the_score(own_run, root, capsys, monkeypatch, by):
    """A model whose answers are unreadable still finds an option likeliest: the right one if it sees the
    picture, else D."""
    asked = []

    def choose(vlm, tokenizer, questions, *more):
        asked.append(questions)
        return [question["answer"] if question["image"] else "D" for question in questions]

    monkeypatch.setattr(evaluation, "ask_likeliest", choose)
    argv = ["seed", "--data", root / "SEED-Bench", "--score", by, "--floors"]
    scores = scored(own_run, *argv)["scores"]
    assert scores["accuracy"] == 0 and scores["unparsed"] == 6 and scores[by]["accuracy"] == 100
    assert set(scores["floors"]) > {"chance", "without_picture"}
    assert scores["floors"][f"without_picture_by_{by}"] == scores["floors"]["always D"]
    assert all(("texts" in question) == (by == "words") for question in asked[0] + asked[1])
    said = (f"accuracy 0.0 (standard error 0.0), by {by} 100.0 (standard error 0.0), "
            "6 answers that the rule cannot read, without the picture 0.0, chance ")
    out = capsys.readouterr().out
    blind = scores["floors"][f"without_picture_by_{by}"]["accuracy"]
    assert said in out and f", without the picture by {by} {blind}\n" in out
    other, = {"likelihood", "words"} - {by}
    both = scored(own_run, *argv[:4], other, "--floors")["scores"]  # the first floors stay
    assert scores["floors"].items() < both["floors"].items() and len(both["floors"]) == 5


def test_one_question_has_a_score_and_no_error(own_run, root, capsys):
    """Nor has a benchmark without options a likelihood."""
    for name in ("seed", "mmbench", "gqa"):
        argv = [name, "--data", root / BENCHES[name].folder, "--limit", "1", "--floors", "--score"]
        evaluation.main(["--bench", *map(str, argv), "words", "--ckpt", str(own_run)])
        line, *_, last = capsys.readouterr().out.splitlines()
        scores = json.loads(last)
        assert "accuracy" in scores and "_se" not in last and ("words" in scores) == (name != "gqa")
        assert line.startswith(f"{name} of {own_run}: 1 question, accuracy ") and "error" not in line
        assert line.endswith("no words (no question has choices of this kind)") == (name == "gqa")


@pytest.mark.parametrize("what", ["ask_likeliest", "score_floors", "submit"])
def test_a_score_is_written_before_what_may_fail(own_run, root, monkeypatch, what):
    """Likelihoods, floors and a server's table come after the answers are in BENCH.json."""
    def fail(*_, **__):
        raise ValueError("height and width must be > 0")

    if what == "submit":
        monkeypatch.setitem(BENCHES, "mmbench", BENCHES["mmbench"]._replace(submit=fail))
    else:
        monkeypatch.setattr(evaluation, what, fail)
    argv = ["mmbench", "--data", root / "MMBench", "--score", "likelihood", "--floors"]
    with pytest.raises(SystemExit, match="^eval.py: height and width must be > 0$"):
        scored(own_run, *argv)
    kept = json.loads((own_run / "mmbench.json").read_text())
    assert "accuracy" in kept["scores"] and len(kept["predictions"]) == kept["scores"]["rotations"]
    assert list(own_run.glob("mmbench.partial*.jsonl"))  # and the same command asks nothing again


def test_help_names_the_splits_and_shows_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "scienceqa test, seed image" in text and "[64]" in text
    assert "    python eval.py --chat picture.png" in text


def test_no_run_yet(tmp_path, monkeypatch):
    """As a function, and as one line of the script."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        evaluation.last_run()
    with pytest.raises(SystemExit, match="^eval.py: no run to score yet.*$"):
        evaluation.main(["--bench", "scienceqa"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_pointer_to_no_run_names_itself(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/last").write_bytes(content)
    with pytest.raises(ValueError, match="runs/last"):
        evaluation.last_run()


@pytest.mark.parametrize("argv", [
    [], ["--bench", "pope", "--ask", "a.png", "What?"], ["--bench", "vqa"],
    ["--chat", "a.png", "--ask", "a.png", "What?"], ["--chat", "a.png", "--max_new_tokens", "0"],
    *(["--ask", "a.png", "What?", "--temperature", value] for value in ("-1", "nan", "inf", "1e-300", "x")),
    *(["--ask", "a.png", "What?", "--top_p", value] for value in ("1e-300", "0", "nan")),
    ["--bench", "pope", "--limit", "1.5"], ["--bench", "all", "--split", "test"],
    ["--bench", "pope", "--submit", "x"], ["--bench", "vqav2", "--submit", "no/such/folder/x"],
    ["--bench", "mmbench", "--submit", "x.xlsx"],
    ["--bench", "vqav2", "--submit", "x", "--ckpt", "a", "b"], ["--ask", "a.png", "What?", "--out", "x"],
    ["--bench", "vqav2", "--out", "x", "--ckpt", "a", "b"], ["--bench", "pope", "--template", "plain"],
    ["--bench", "pope", "--max_new_tokens", "1"], ["--bench", "pope", "--temperature", "5"],
    ["--bench", "pope", "--top_p", "0.5"], ["--ask", "a.png", "What?", "--data", "x"],
    ["--bench", "pope", "--limit", "0"], ["--ask", "a.png", "What?", "--floors"]])
def test_bad_options_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main(argv)
    assert end.value.code == 2 and ": error: " in capsys.readouterr().err
