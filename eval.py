"""Questions to a trained model: benchmarks by their official rules, or about one picture.

    python eval.py --bench scienceqa                              # the last run, on its preset's ScienceQA
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA --score likelihood --floors
    torchrun --nproc_per_node=8 eval.py --bench all --data data   # every benchmark that lies there
    python eval.py --ask picture.png "Which shape is it? Answer the question using a single word or phrase."
    python eval.py --chat picture.png                             # several turns: a question a line

A score is only as good as its prompt, its parser and its denominator: a user's LLaVA-1.5 had 66.8 % on
ScienceQA, and 44.8 with another prompt (LLaVA's issue 1294). So the prompt is built from the raw files, the
answer is greedy, and the official rule (see benchmarks/) reads it. What it cannot read is wrong (MMMU's rule
guesses), stays in the denominator, and the number of these is printed.

Answers are appended to BENCH.partial.RANK.jsonl in the run directory, or --out, as they come. After a kill,
the same command goes on from there. At the end all answers are in BENCH.json, beside the scores. Two lines
of each run and benchmark are printed: a sentence, and the scores as a JSON object.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from benchmarks import BENCHES, Bench, load_questions
from benchmarks.likelihood import answers_of
from benchmarks.predictions import append_answers, name_result, read_answers, write_predictions
from benchmarks.questions import closed, without_picture
from benchmarks.score import in_words, measures, score_floors, scores_and_errors
from llm import KVCache
from plumbing.files import named, read_json, read_text, resolve_model
from plumbing.ranks import choose_dtype, command, halved, on_every_rank, rank, say, start_ranks, world_size
from plumbing.tokenizer import check_vocabulary, load_tokenizer
from projector import VLM
from running.checkpoint import fingerprint
from running.directory import latest


# ------------------------------------------------------------------------------------------------------------
# Asking

def load_run(folder, device, template=None) -> tuple:
    """(model, tokenizer, config) of a run directory, or of a folder in a LLaVA format. A run that is not
    finished is read from its last checkpoint, whose "step" is in config.

    config["template"] is the form of the questions: `template`, or the one that the run was tuned with. A run
    that was only aligned takes the LLM's own chat template if its tokenizer has one, else Vicuna's.
    """
    folder = latest(resolve_model(folder))
    file = folder / "config.json"
    config = read_json(file)
    with named(file):
        dtype = choose_dtype(device, config.get("dtype") or "")
    vlm = VLM.from_pretrained(folder, dtype, device)
    tokenizer = load_tokenizer(vlm.sources["llm"])
    check_vocabulary(tokenizer, vlm.llm.config.vocab_size)  # another LLM's would make nonsense, quietly
    own = vlm.template
    if own in (None, "plain"):
        # The template of a LLaVA folder takes pictures in another form than our marker.
        is_llava = str(config.get("model_type")).startswith("llava")
        has_own = tokenizer.chat_template and not is_llava
        own = "chat" if has_own else "v1"
        if is_llava and not template:
            say(f"{folder}: names no template of ours; asked with {own}, LLaVA-1.5's (--template)")
    if template not in (None, own):
        say(f"{folder}: asked with template {template}; its own is {own}")
    config["template"] = template or own
    return vlm, tokenizer, config


def to_sample(vlm, tokenizer, form, question: dict) -> dict:
    """A question as data.collate takes it: open, so that the next token begins the answer.

    A question may have turns "before" it: [(role, text)], as in data.encode.
    """
    name = f"question {question['id']!r}"
    if "file" in question:
        name = f"{question['file']}: {name}"
    image = question["image"]
    turns = [*question.get("before", ()), ("human", question["prompt"])]
    pixels = None
    with named(name):
        ids, roles = data.encode(turns, form, tokenizer, image is not None)
        if image is not None:
            # "pad", even if the run was trained with "crop": a question may be about the picture's edge.
            pixels = data.preprocess(data.load_image(image), vlm.vit.config, "pad")
    return {"ids": ids, "roles": roles, "pixels": pixels, "name": name}


def to_batch(vlm, tokenizer, samples, room: int) -> dict:
    """One batch on the model's device, padded on the left: the last position is every prompt's end.
    ValueError for a prompt longer than `room`."""
    batch = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                         vlm.vit.config.image_size, room, side="left")
    return data.to_device(batch, vlm.llm.head_weight.device)


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, file=None,
        **how) -> list:
    """The answers, as stripped text, to questions {"id", "prompt", "image"}: see benchmarks/questions.py.

    They are greedy, or sampled with `temperature` and `top_p`. `file`: see `in_batches`.
    """
    form = data.form_of(template, tokenizer)
    # A run learns to end with the form's token, whatever end token the LLM's config names.
    end_tokens = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(form.end)]
    room = vlm.llm.config.max_position_embeddings - max_new_tokens  # the answer needs positions, too

    def answer(rows):
        samples = [to_sample(vlm, tokenizer, form, row) for row in rows]
        m = to_batch(vlm, tokenizer, samples, room)
        new = vlm.generate(m["ids"], m["pixels"], max_new_tokens, m["mask"], end_tokens=end_tokens, **how)
        # new (B, <= max_new_tokens) is negative behind an end token
        return [tokenizer.decode(ids[ids >= 0], skip_special_tokens=True).strip() for ids in new]

    return in_batches(questions, answer, batch, file)


@torch.no_grad()
def ask_likeliest(vlm, tokenizer, questions, template: str, batch: int = 16, file=None) -> list:
    """Of each question's "options" the one that is the likeliest answer: see benchmarks/likelihood.py."""
    form = data.form_of(template, tokenizer)

    def answer(rows):
        answers = []  # the tokens of each option
        owners = []  # and the number of its question
        for number, row in enumerate(rows):
            options = answers_of(tokenizer, form, row)
            answers += options
            owners += [number] * len(options)
        longest = max(map(len, answers))
        samples = [to_sample(vlm, tokenizer, form, row) for row in rows]
        m = to_batch(vlm, tokenizer, samples, vlm.llm.config.max_position_embeddings - longest + 1)
        states = foretell(vlm, tokenizer, m, owners, answers)  # (options, longest, C)
        likely = [[] for _ in rows]  # of each option, the mean log-probability of its tokens
        for number, ids, state in zip(owners, answers, states):
            log_p = vlm.llm.logits(state[: len(ids)]).float().log_softmax(-1)  # (tokens, V)
            likely[number].append(log_p[range(len(ids)), ids].mean().item())
        return [row["options"][means.index(max(means))] for row, means in zip(rows, likely)]

    return in_batches(questions, answer, batch, file)


def foretell(vlm, tokenizer, m, owners: list, answers: list):
    """The states (answers, longest, C) that foretell the tokens of each answer to its owner, a row of `m`.

    Picture and question are read once. What the layers made of them waits in the cache, a copy for each
    answer. The last token of an answer foretells nothing and is not read: letters need no cache.
    """
    embeds = vlm.splice(m["ids"], vlm.encode(m["pixels"]))  # (B, S, C)
    B, S, C = embeds.shape
    more = max(map(len, answers)) - 1
    cache = KVCache(vlm.llm.config, B, S, embeds.dtype, embeds.device) if more else None
    ends = S * torch.arange(1, B + 1, device=embeds.device) - 1  # (B,)
    states = vlm.llm.hidden(embeds, m["mask"], cache, ends)[owners][:, None]  # (answers, 1, C)
    if cache is None:
        return states
    cache.k = F.pad(cache.k[:, owners], (0, 0, 0, more))
    cache.v = F.pad(cache.v[:, owners], (0, 0, 0, more))
    mask = F.pad(m["mask"][owners], (0, more), value=True)  # (answers, S + more)
    read = data.pad([ids[:-1] for ids in answers], tokenizer.pad_token_id).to(embeds.device)
    words = vlm.llm.hidden(vlm.llm.embed(read), mask, cache)  # (answers, more, C)
    return torch.cat([states, words], dim=1)  # (answers, longest, C)


# ------------------------------------------------------------------------------------------------------------
# In batches, on several ranks, after a kill

MOST_CHARACTERS = 2**17  # in a batch of questions, padding included
PICTURE = 2400  # characters that take as much room as a picture: 576 tokens, of some four characters


def make_batches(questions, batch: int) -> list:
    """Lists of indices of questions of similar length, at most `batch` of them. The longest come first, so
    that a lack of memory shows soon."""
    def length(i):
        has_image = questions[i]["image"] is not None
        return 1 + len(questions[i]["prompt"]) + PICTURE * has_image

    order = sorted(range(len(questions)), key=length, reverse=True)
    batches = []
    while order:
        count = min(batch, max(1, MOST_CHARACTERS // length(order[0])))
        batches.append(order[:count])
        order = order[count:]
    return batches


def in_batches(questions, answer, batch: int, file=None) -> list:
    """The answers to all questions, in their order, by `answer(some questions) -> [text]`.

    The batches are the same on any number of ranks, which take turns: so are the answers, to the last bit.
    With `file`, each rank appends its answers to FILE.RANK.jsonl, and answers that such files hold already
    are not asked for again. An error of one rank is raised on all.
    """
    def read_once():  # by rank 0; the files of the others may be growing already
        return read_answers(file, questions) if file and rank() == 0 else {}

    answers = on_every_rank(read_once)[0]
    batches = make_batches(questions, batch)
    left = [indices for indices in batches if not set(indices) <= answers.keys()]
    mine = left[rank() :: world_size()]
    for found in on_every_rank(lambda: answer_batches(questions, mine, answer, file)):
        answers |= found
    return [answers[i] for i in range(len(questions))]


def answer_batches(questions, batches, answer, file) -> dict:
    """{index: answer} of this rank's batches; each is also appended to the file of this rank."""
    answers = {}
    is_quiet = rank() > 0 or len(questions) == 1
    with tqdm(desc="ask", total=sum(map(len, batches)), unit=" questions", disable=is_quiet) as bar:
        for indices in batches:
            rows = [questions[i] for i in indices]
            texts = halved(answer, rows)
            answers |= dict(zip(indices, texts))
            if file:
                append_answers(f"{file}.{rank()}.jsonl", rows, texts)
            bar.update(len(rows))
    return answers


# ------------------------------------------------------------------------------------------------------------
# About one picture

def about(image, text: str) -> dict:
    """The question about a picture as a person types it. The text may have a marker of the picture."""
    turn = {"from": "human", "value": f"{data.IMAGE}\n{text}"}
    turns = data.clean_turns({"image": image, "conversations": [turn]})
    _, prompt = turns[0]
    return {"id": image, "prompt": prompt, "image": image}


def chat(vlm, tokenizer, template: str, image, **how):
    """Answer a question a line of stdin, until an empty one, the end or Ctrl-C.

    The model sees the whole conversation each time. ValueError when that has become too long for the LLM.
    """
    before = []
    mark = "> " if sys.stdin.isatty() else ""  # a pipe gets only the answers
    try:
        while True:
            text = input(mark).strip()
            if not text:
                break
            question = about(image, text)
            if before:
                question["prompt"] = text  # the first turn has the picture
            question |= {"id": f"{image}, turn {len(before) // 2 + 1}", "before": before}
            answer, = ask(vlm, tokenizer, [question], template, **how)
            print(answer, flush=True)
            said = answer.rpartition(data.THOUGHTS_END)[2].strip()  # as Qwen3's and DeepSeek's templates do
            before = [*before, ("human", question["prompt"]), ("gpt", said)]
    except (EOFError, KeyboardInterrupt):
        if mark:
            print()  # the shell's prompt gets a line of its own


def ask_about_picture(ckpt, args, device):
    """--ask or --chat."""
    image = args.chat or args.ask[0]
    data.load_image(image)  # tells about a bad one before a large model is loaded
    if args.chat and world_size() > 1:
        raise ValueError("--chat has one stdin: run it without torchrun")
    vlm, tokenizer, config = load_run(ckpt, device, args.template)
    how = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    if args.chat:
        chat(vlm, tokenizer, config["template"], image, **how)
    else:
        answer, = ask(vlm, tokenizer, [about(*args.ask)], config["template"], **how)
        say(json.dumps({"ckpt": str(ckpt), "image": image, "question": args.ask[1], "answer": answer}))


# ------------------------------------------------------------------------------------------------------------
# Running a benchmark

def ask_bench(vlm, tokenizer, template: str, bench: Bench, questions, file) -> tuple:
    """(answers, the choices that the benchmark's rule reads from them)."""
    tokens = min(bench.tokens, vlm.llm.config.max_position_embeddings // 2)  # half for the question
    batch = min(64, 4096 // tokens)  # the key-value cache has room for `tokens` more in each row
    answers = ask(vlm, tokenizer, questions, template, tokens, batch, file)
    choices = [bench.parse(text, question) for text, question in zip(answers, questions)]
    return answers, choices


def answer_bench(vlm, tokenizer, template, name, folder, split=None, limit=None, file=None) -> tuple:
    """(scores, questions, answers, choices) of one benchmark."""
    bench = BENCHES[name]
    questions = []
    on_every_rank(lambda: questions.extend(load_questions(name, folder, split, limit)))
    form = data.form_of(template, tokenizer)
    parts = fingerprint(vlm), tokenizer.backend_tokenizer.to_str(), form[:5]
    model = data.key_of(parts)  # answers are kept for this one alone
    questions = [question | {"model": model} for question in questions]
    answers, choices = ask_bench(vlm, tokenizer, template, bench, questions, file)
    return scores_and_errors(bench.score, questions, choices), questions, answers, choices


def choose_likeliest(vlm, tokenizer, template: str, by: str, questions, choices, file) -> list:
    """The choices, but the likeliest option of each question that has options: by letter, or by words."""
    asked = closed(questions, by)
    batch = 4 if by == "words" else 16  # in words, each choice has a copy of what the layers made
    options = ask_likeliest(vlm, tokenizer, asked, template, batch, file)
    likeliest = {question["id"]: option for question, option in zip(asked, options)}
    return [likeliest.get(question["id"], choice) for question, choice in zip(questions, choices)]


def run_bench(name: str, ckpt, run: tuple, folder, args) -> dict:
    """Score a run. Its BENCH.json gets the scores and every answer; beside it lies what a server wants."""
    vlm, tokenizer, config = run
    template = config["template"]
    bench = BENCHES[name]
    file = name_result(args.out or ckpt, name, args)
    kept = f"{file}.partial"
    scores, questions, answers, choices = answer_bench(
        vlm, tokenizer, template, name, folder, args.split, args.limit, kept)
    split = bench.split if args.split is None else args.split
    result = {"ckpt": str(ckpt), "bench": name, "split": split, "template": template}
    result |= {"step": config.get("step")} | scores

    write = partial(write_predictions, file, result, questions, answers, choices)
    on_every_rank(write)  # before anything that may fail
    is_scored = "accuracy" in result  # otherwise a server or a judge does it
    by = args.score if is_scored and closed(questions, args.score) else None
    if by:
        likeliest = choose_likeliest(vlm, tokenizer, template, by, questions, choices, f"{kept}-{by}")
        result[by] = measures(scores_and_errors(bench.score, questions, likeliest))
    if args.floors and is_scored:
        unseen = [without_picture(question) for question in questions]
        _, blind = ask_bench(vlm, tokenizer, template, bench, unseen, f"{kept}-blind")
        result["floors"] = score_floors(bench.score, questions, blind)
        if by:
            blind = choose_likeliest(vlm, tokenizer, template, by, unseen, blind, f"{kept}-blind-{by}")
            result["floors"][f"without_picture_by_{by}"] = measures(bench.score(questions, blind))
    on_every_rank(write)
    floors = ["floors"] if args.floors else []
    say(in_words(result, [args.score or "accuracy", *floors]))
    if bench.submit and rank() == 0:
        ending = "tsv" if name.startswith("mmbench") else "json"
        table = args.submit or f"{file}-submit.{ending}"
        bench.submit(questions, answers, table)
        say(f"wrote {table}")
    return result


def find_folders(ckpt, config: dict, args) -> dict:
    """{benchmark: its folder} for --bench and --data. Of `all` only those that are there."""
    is_all = args.bench == "all"
    if args.data and not is_all:
        return {args.bench: Path(args.data)}
    root = args.data or config.get("benchmarks")
    if not root:
        raise ValueError(f"{ckpt}: its config.json names no folder of benchmarks; name one with --data")
    folders = {}
    for name in BENCHES if is_all else [args.bench]:
        folder = Path(root) / BENCHES[name].folder
        if folder.is_dir() or not is_all:
            folders[name] = folder
        else:
            say(f"{name} is not run: no folder {folder}")
    if not folders:
        names = [bench.folder for bench in BENCHES.values()]
        raise ValueError(f"{root}: no benchmark is there, neither {' nor '.join(names)}")
    return folders


def run_benches(ckpt, args, device):
    """Print the scores of --bench. If one of `all` fails, the others still run; the last line tells."""
    run = load_run(ckpt, device, args.template)
    folders = find_folders(ckpt, run[2], args)
    failed = []
    for name, folder in folders.items():
        try:
            say(json.dumps(run_bench(name, ckpt, run, folder, args)))
        except (OSError, ValueError) as error:
            if args.bench != "all":
                raise
            failed.append(name)
            say(f"{name} failed: {error}")
    for name in folders.keys() - set(failed):  # not sooner: a killed `all` asks nothing again
        file = name_result(args.out or ckpt, name, args)
        for part in file.parent.glob(f"{file.name}.partial*.jsonl"):
            part.unlink(missing_ok=True)  # another rank may have been faster
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------------------------------------------------
# The command line

def last_run() -> Path:
    """The run that train.py has finished last."""
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one; or name one with --ckpt")
    folder = read_text(pointer).strip()
    if not folder:
        raise ValueError(f"{pointer}: names no run; name one with --ckpt")
    return Path(folder)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", help="run directories, or Hub ids [the last run]")
    parser.add_argument("--template", choices=sorted({*data.TEMPLATES} - {"plain"}),
                        help="of the questions [the run's own]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bench", choices=[*BENCHES, "all"])
    what.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    what.add_argument("--chat", metavar="IMAGE", help="a question a line of stdin, until an empty one")
    add = parser.add_argument_group("benchmarks").add_argument
    add("--data", help="the benchmark's folder; with all: the folder of these [the run's `benchmarks`]")
    splits = ", ".join(f"{name} {bench.split}" for name, bench in BENCHES.items() if bench.split)
    add("--split", help=f"a split, a category, or a part of a file's name [{splits}]")
    add("--limit", type=int, help="only the first so many questions [all]")
    add("--score", choices=["likelihood", "words"], help="also by the likeliest letter, or choice in words")
    add("--floors", action="store_true", help="also chance, the commonest answer, the model without picture")
    add("--out", type=Path, help="folder for what is written [the run directory]")
    add("--submit", type=Path, help="file for a server or judge [BENCH-submit in --out]")
    add = parser.add_argument_group("one picture").add_argument
    add("--max_new_tokens", type=int, default=64, help="the most tokens of the answer [%(default)s]")
    add("--temperature", type=float, default=0.0, help="of the answer; 0: greedy [%(default)s]")
    add("--top_p", type=float, default=1.0, help="of the likeliest tokens; 1: all [%(default)s]")
    args = parser.parse_args(argv)

    if args.max_new_tokens < 1 or args.limit is not None and args.limit < 1:
        parser.error("--max_new_tokens and --limit must be at least 1")
    if args.temperature != 0 and not 0.001 <= args.temperature < math.inf:
        parser.error("--temperature must be 0, or from 0.001 up")
    if not 0.001 <= args.top_p <= 1:
        parser.error("--top_p must be in [0.001, 1]")
    if not args.bench and (args.data or args.limit or args.score or args.floors or args.out):
        parser.error("--data, --limit, --score, --floors and --out are for benchmarks")
    if args.bench and (args.max_new_tokens, args.temperature, args.top_p) != (64, 0.0, 1.0):
        parser.error("--max_new_tokens, --temperature and --top_p are for one picture")
    if args.split and args.bench not in BENCHES:
        parser.error("--split is for one benchmark")
    if (args.out or args.submit) and len(args.ckpt or ["the last"]) > 1:
        parser.error("--out and --submit are for one run")
    if args.submit:
        writers = [name for name, bench in BENCHES.items() if bench.submit]
        if args.bench not in writers:
            parser.error(f"--submit is for {', '.join(writers)}")
        if args.submit.suffix == ".xlsx":
            parser.error("--submit: pandas makes Excel of our .tsv (benchmarks/README.md)")
        if not args.submit.parent.is_dir():
            parser.error(f"--submit: no folder {args.submit.parent}")
    return args


def main(argv=None):
    args = parse_args(argv)
    with command("eval.py"):
        device = start_ranks()
        runs = [resolve_model(run) for run in args.ckpt] if args.ckpt else [last_run()]
        for ckpt in runs:
            if args.bench:
                run_benches(ckpt, args, device)
            else:
                ask_about_picture(ckpt, args, device)


if __name__ == "__main__":
    main()
