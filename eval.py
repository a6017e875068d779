"""Questions to a trained model: benchmarks by their official rules, or about one picture.

    python eval.py --bench scienceqa                              # the last run, on its preset's ScienceQA
    python eval.py --bench scienceqa --ckpt runs/7b/instruct --data data/ScienceQA --score likelihood --floors
    torchrun --nproc_per_node=8 eval.py --bench all --data data   # every benchmark that lies there
    python eval.py --ask picture.png "Which shape is it? Answer the question using a single word or phrase."
    python eval.py --chat picture.png                             # several turns: a question a line

A score is only as good as its prompt, its parser and its denominator: published ScienceQA numbers of one and
the same checkpoint differ by ten points. So the prompt is built here from the raw files, the answer is
greedy, the official rule reads it, and what is unreadable is wrong and stays in the denominator, which is
printed. benchmarks/ has a file for each benchmark.

Answers are appended to BENCH.partial.RANK.jsonl in the run directory as they come; after a kill, the same
command goes on from there. In the end all are in BENCH.json (of a Hub id: in its folder in the Hub's cache),
beside the scores, which are also printed: one JSON object a line, one line a run and benchmark.
"""

import argparse
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

import data
from benchmarks import BENCHES, Bench
from benchmarks.entries import ID
from benchmarks.score import score_floors
from projector import VLM
from plumbing.files import named, read_entries, read_json, read_text, resolve_model, whole
from plumbing.ranks import choose_dtype, command, on_every_rank, rank, say, start_ranks, world_size


# ------------------------------------------------------------------------------------------------------------
# Asking

def load_run(folder, device) -> tuple:
    """(model, tokenizer, config) of a run directory. config["template"] is that of questions: what the run
    was tuned with; after align alone the LLM's own where its tokenizer has one, else Vicuna's. (A LLaVA
    folder gets Vicuna's: its own template takes pictures in another form than our marker.)"""
    folder = resolve_model(folder)
    config = read_json(folder / "config.json")
    with named(folder / "config.json"):
        dtype = choose_dtype(device, config.get("dtype") or "")
    if config.get("template", "plain") not in [*data.TEMPLATES]:
        raise ValueError(f"{folder}/config.json: template is {config['template']!r}")
    vlm = VLM.from_pretrained(folder, dtype, device)
    tokenizer = data.load_tokenizer(vlm.sources["llm"])
    data.check_vocabulary(tokenizer, vlm.llm.config.vocab_size)  # a wrong one would answer nonsense, quietly
    if config.get("template", "plain") == "plain":
        has_own = tokenizer.chat_template and not str(config.get("model_type")).startswith("llava")
        config["template"] = "chat" if has_own else "v1"
    return vlm, tokenizer, config


def to_samples(vlm, tokenizer, question: dict, template: str, *answers) -> list:
    """As data.collate takes them: the question, open for an answer, with its picture; then, for each of
    `answers`, the question with that, without end token and picture. Where the question has turns "before"
    it, these stand there."""
    name, has_image, samples = f"question {question['id']!r}", question["image"] is not None, []
    name = f"{question['file']}: {name}" if "file" in question else name
    with named(name):
        for answer in (None, *answers):
            turns = [*question.get("before", ()), ("human", question["prompt"])]
            turns += [] if answer is None else [("gpt", answer)]
            pieces = data.TEMPLATES[template](turns, tokenizer)  # with an answer, the last is its end
            ids, roles = data.tokenise(pieces if answer is None else pieces[:-1], tokenizer, has_image)
            samples.append({"ids": ids, "roles": roles, "pixels": None, "name": name})
        if has_image:
            # "pad", whatever the run was trained with: a question may be about the picture's edge
            picture = data.load_image(question["image"])
            samples[0]["pixels"] = data.preprocess(picture, vlm.vit.config, "pad")
    return samples


def to_batch(vlm, tokenizer, samples, room: int, side: str = "left") -> dict:
    """One batch on the model's device, padded on that side. ValueError for a prompt longer than `room`."""
    m = data.collate(samples, vlm.num_image_tokens, vlm.image_token_id, tokenizer.pad_token_id,
                     vlm.vit.config.image_size, room, side)
    return data.to_device(m, vlm.llm.head_weight.device)


@torch.no_grad()
def ask(vlm, tokenizer, questions, template: str, max_new_tokens: int = 32, batch: int = 64, file=None,
        **how) -> list:
    """Answers, as stripped text, to [{"id", "prompt", "image" path, base64 bytes or None}]: greedy, or
    sampled with `temperature` and `top_p`. `file`: see `in_batches`."""
    room = vlm.llm.config.max_position_embeddings - max_new_tokens  # the answer needs positions too
    # what a run learns to end with, whatever its LLM's config says
    with named(f"{tokenizer.name_or_path}: template {template}"):
        *_, (end, _) = data.TEMPLATES[template]([("human", "?"), ("gpt", "!")], tokenizer)
    how["end_tokens"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]

    def answer(rows):
        samples = [to_samples(vlm, tokenizer, row, template)[0] for row in rows]
        m = to_batch(vlm, tokenizer, samples, room)
        new = vlm.generate(m["ids"], m["pixels"], max_new_tokens, m["mask"], **how)  # (B, <= max_new_tokens)
        return [tokenizer.decode(ids[ids >= 0], skip_special_tokens=True).strip() for ids in new]

    return in_batches(questions, answer, batch, file)


@torch.no_grad()
def likelihoods(vlm, tokenizer, questions, template: str, batch: int = 16, file=None) -> list:
    """For each question the log-probabilities, in nats, of its "options" (a list of texts) as the answer:
    summed over the tokens of each, the end token not among them. No parser is needed, and nothing is
    unreadable. Options of several tokens are not made comparable here: a longer one has more to lose.

    A question and its picture go through the model once, each option only from where it differs.
    """
    most = vlm.llm.config.max_position_embeddings

    def answer(rows):
        samples, ends = [], []  # of each question: what all its options share; what each has behind that
        for row in rows:
            sample, *texts = to_samples(vlm, tokenizer, row, template, *row["options"])
            # less one: the last common token predicts an option's first, so it goes with the options
            shared = len(os.path.commonprefix([text["ids"] for text in (sample, *texts)])) - 1
            samples.append(sample | {key: sample[key][:shared] for key in ("ids", "roles")})
            ends.append([text | {key: text[key][shared:] for key in ("ids", "roles")} for text in texts])
        most_options, B = max(map(len, ends)), len(rows)
        turns = []  # first options of all questions, second options ..; who has fewer repeats the last
        for number in range(most_options):
            turns += [options[min(number, len(options) - 1)] for options in ends]
        said = to_batch(vlm, tokenizer, turns, most, "right")  # ids (options x B, T)
        m = to_batch(vlm, tokenizer, samples, most - said["ids"].shape[1])
        embeds = vlm.splice(m["ids"], vlm.encode(m["pixels"]))  # (B, S, C)
        hidden = torch.cat(vlm.llm.hidden_behind(embeds, m["mask"], said["ids"].split(B)))  # (.. x B, T, C)
        next_ids = said["labels"][:, 1:]  # what each position says next, where that is the option's
        row_of, place = (next_ids != data.IGNORE).nonzero(as_tuple=True)  # (tokens,) each
        log_p = vlm.llm.logits(hidden[row_of, place]).float().log_softmax(-1)  # (tokens, V)
        log_p = log_p.gather(1, next_ids[row_of, place][:, None])[:, 0]  # (tokens,)
        sums = log_p.new_zeros(len(turns)).index_add(0, row_of, log_p).view(most_options, B)
        return [row[: len(options)] for row, options in zip(sums.T.tolist(), ends)]

    return in_batches(questions, answer, batch, file)


MOST_TOKENS = 2**15  # in a batch of questions, about: long prompts go in smaller batches


def in_batches(questions, answer, batch: int, file=None) -> list:
    """`answer(some questions) -> [what JSON can hold]` for all questions, in their order.

    Batches hold at most `batch` questions, of similar length, and MOST_TOKENS. They are the same on any
    number of ranks, which take turns: so are the answers, to the last bit. With `file`, each rank appends to
    FILE.RANK.jsonl as they come, and what such files hold already is not asked again. The ranks' first error
    is raised on all of them.
    """
    def length(i):  # a picture is longer than most texts; in characters, which is near enough
        return questions[i]["image"] is None, -len(questions[i]["prompt"])

    order = sorted(range(len(questions)), key=length)  # longest first: what needs too much memory fails soon
    tokens = [600 * (row["image"] is not None) + len(row["prompt"]) // 4 for row in questions]
    batches = data.cut_by_tokens(order, tokens, batch, MOST_TOKENS)
    # rank 0 reads alone: the files of the others are about to grow
    answers = on_every_rank(lambda: read_answers(file, questions) if file and rank() == 0 else {})[0]
    left = [indices for indices in batches if not set(indices) <= answers.keys()]

    def answer_mine():
        mine, new = left[rank() :: world_size()], {}
        is_quiet = rank() > 0 or len(questions) == 1
        with tqdm(desc="ask", total=sum(map(len, mine)), unit=" questions", disable=is_quiet) as bar:
            for indices in mine:
                rows = [questions[i] for i in indices]
                found = answer(rows)
                new |= dict(zip(indices, found))
                if file:
                    append_answers(f"{file}.{rank()}.jsonl", rows, found)
                bar.update(len(rows))
        return new

    for new in on_every_rank(answer_mine):
        answers |= new
    return [answers[i] for i in range(len(questions))]


def append_answers(file, questions, answers):
    """One JSON line a question; all lines of a batch in one write."""
    lines = []
    for question, answer in zip(questions, answers):
        lines.append(json.dumps({"id": question["id"], "prompt": question["prompt"], "answer": answer}))
    with open(file, "a") as f:
        f.write("\n".join(lines) + "\n")


def read_answers(file, questions) -> dict:
    """{index: answer} of what FILE.0.jsonl, FILE.1.jsonl .. hold. A line that a kill has cut short is
    dropped; one that belongs to none of the questions is a ValueError."""
    answers, index = {}, {question["id"]: i for i, question in enumerate(questions)}
    for part in sorted(Path(file).parent.glob(f"{Path(file).name}.*.jsonl")):
        text = read_text(part)
        lines = text[: text.rfind("\n") + 1]
        if lines != text:
            part.write_text(lines)
        for row in read_entries(part, id=ID, prompt=str, answer=(str, list)) if lines else []:
            i = index.get(row["id"])
            if i is None or questions[i]["prompt"] != row["prompt"]:
                raise ValueError(f"{part}: question {row['id']!r} is not asked now, or reads otherwise; "
                                 "go on with the options it was begun with, or remove the file")
            answers[i] = row["answer"]
    return answers


def about(image, text: str) -> dict:
    """The question about a picture as it is typed, for `ask`."""
    turn = {"from": "human", "value": f"{data.IMAGE}\n{text}"}  # which may have a marker already
    (_, prompt), = data.clean_turns({"image": image, "conversations": [turn]})
    return {"id": image, "prompt": prompt, "image": image}


def chat(vlm, tokenizer, template: str, image, **how):
    """Answer a question a line of stdin, until an empty one, the end or Ctrl-C. What was said before goes
    with each, so the prompt grows; where the LLM has no room for it any more, that is a ValueError."""
    before, mark = [], "> " if sys.stdin.isatty() else ""  # a pipe gets the answers alone
    try:
        while text := input(mark).strip():
            question = {"prompt": text, "image": image} if before else about(image, text)
            question |= {"id": f"{image}, turn {len(before) // 2 + 1}", "before": before}
            answer, = ask(vlm, tokenizer, [question], template, **how)
            print(answer, flush=True)
            before = [*before, ("human", question["prompt"]), ("gpt", answer)]
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if mark else "")  # the shell's prompt gets a line of its own


# ------------------------------------------------------------------------------------------------------------
# Running a benchmark

def load_questions(name: str, folder, split=None, limit=None) -> list:
    """A benchmark's questions, checked; of `limit` the first so many, with what counts together with them."""
    split = BENCHES[name].split if split is None else split
    with named(folder, f"not in the layout of {name}"):
        questions = list(BENCHES[name].load(Path(folder), split))
    if not questions:
        raise ValueError(f"{folder}: no questions of {name} in split {split!r}")
    seen, is_scored = set(), any(question["answer"] is not None for question in questions)
    for question in questions:
        image, options, answer = question["image"], question.get("options"), question["answer"]
        problems = {
            "is there twice": question["id"] in seen,
            "has no picture": not image and question["prompt"].startswith(data.IMAGE),
            f"asks about a picture that is not there: {image}":
                isinstance(image, Path) and not image.is_file(),
            "has no options": options == [],
            "has no answer": is_scored and answer in (None, "", [], [""]),  # where others have one
            f"has the answer {answer!r}, which is none of {', '.join(options or ())}":
                options and answer is not None and answer not in options}
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(f"{question['file']}: question {question['id']!r} {problem}")
        seen.add(question["id"])
    groups = [question.get("group", question["id"]) for question in questions]
    kept = set(list(dict.fromkeys(groups))[:limit])
    return [question for question, group in zip(questions, groups) if group in kept]


def ask_bench(vlm, tokenizer, template, bench: Bench, questions, file) -> tuple:
    """(answers, what the benchmark's rule reads from them)."""
    tokens = min(bench.tokens, vlm.llm.config.max_position_embeddings // 2)  # a question needs positions, too
    batch = min(64, 4096 // tokens)  # the key-value cache is as long as the longest answer
    answers = ask(vlm, tokenizer, questions, template, tokens, batch, file)
    return answers, [bench.parse(text, question) for text, question in zip(answers, questions)]


def answer_bench(vlm, tokenizer, template, name, folder, split=None, limit=None, file=None) -> tuple:
    """(scores, questions, answers, what the benchmark's rule reads from them) of one benchmark."""
    bench, questions = BENCHES[name], load_questions(name, folder, split, limit)
    answers, choices = ask_bench(vlm, tokenizer, template, bench, questions, file)
    is_scored = any(question["answer"] is not None for question in questions)  # here, not by a server
    scores = bench.score(questions, choices) if is_scored else {"questions": len(questions)}
    return scores, questions, answers, choices


def likeliest(vlm, tokenizer, template, questions, choices, file) -> list:
    """`choices`, but where a question has options, the one whose letter (or Yes, No) is the likeliest."""
    closed = [question for question in questions if question.get("options")]
    asked = [q | {"options": list(map(str.capitalize, q["options"]))} for q in closed]
    chosen = {}
    for question, row in zip(closed, likelihoods(vlm, tokenizer, asked, template, file=file)):
        chosen[question["id"]] = question["options"][row.index(max(row))]
    return [chosen.get(question["id"], choice) for question, choice in zip(questions, choices)]


def without_picture(questions) -> list:
    return [q | {"image": None, "prompt": q["prompt"].removeprefix(f"{data.IMAGE}\n")} for q in questions]


def run_bench(name, ckpt, run: tuple, folder, args) -> dict:
    """Score a run; its BENCH.json gets the scores and every prediction, beside it what a server wants."""
    (vlm, tokenizer, config), bench, partial_file = run, BENCHES[name], Path(ckpt) / f"{name}.partial"
    template, split = config["template"], bench.split if args.split is None else args.split
    scores, questions, answers, choices = answer_bench(vlm, tokenizer, template, name, folder, split,
                                                       args.limit, partial_file)
    file, result = Path(ckpt) / f"{name}.json", {"ckpt": str(ckpt), "bench": name, "split": split}
    if rank() == 0:  # before anything that may fail; once more with what stands beside the score
        write_predictions(file, result | scores, questions, answers, choices)
    is_scored = "accuracy" in scores
    if args.score and is_scored and any(question.get("options") for question in questions):
        found = likeliest(vlm, tokenizer, template, questions, choices, f"{partial_file}-likelihood")
        found = bench.score(questions, found)
        scores["likelihood"] = {key: value for key, value in found.items() if isinstance(value, float)}
    if args.floors and is_scored:
        _, blind = ask_bench(vlm, tokenizer, template, bench, without_picture(questions),
                             f"{partial_file}-blind")
        scores["floors"] = score_floors(bench, questions, blind)
    result |= scores
    if rank() == 0:
        write_predictions(file, result, questions, answers, choices)
        told = [f"{key} {scores[key]} (standard error {scores[f'{key}_se']})"
                for key in scores if f"{key}_se" in scores]
        if likely := scores.get("likelihood"):
            told.append(f"by likelihood {likely['accuracy']} (standard error {likely['accuracy_se']})")
        if "unparsed" in scores:
            told.append(f"{scores['unparsed']} answers that the rule cannot read")
        print(f"{name} of {ckpt}: {scores['questions']} questions", *told, sep=", ")
        if bench.submit:
            file = args.submit or Path(ckpt) / f"{name}-submit{'.tsv' if 'mmbench' in name else '.json'}"
            bench.submit(questions, answers, file)
            print(f"wrote {file}")
    return result


def write_predictions(file: Path, result: dict, questions, answers, choices):
    """Complete or not at all. Every answer is kept: a score that surprises is understood by reading them."""
    predictions = []
    for question, text, choice in zip(questions, answers, choices):
        image = "in the table" if isinstance(question["image"], bytes) else question["image"]
        kept = {key: value for key, value in question.items() if key != "row"}
        predictions.append(kept | {"image": image and str(image), "text": text, "choice": choice})
    with whole(file) as building:
        building.write_text(json.dumps({"scores": result, "predictions": predictions}, indent=1))


# ------------------------------------------------------------------------------------------------------------
# The command line

def last_run() -> Path:
    pointer = Path("runs/last")
    if not pointer.exists():
        raise FileNotFoundError("no run to score yet: `python train.py` makes one; or name one with --ckpt")
    if not (folder := read_text(pointer).strip()):
        raise ValueError(f"{pointer}: names no run; name one with --ckpt")
    return Path(folder)


def run_benches(ckpt, args, device):
    """Yield the results of --bench: of one, or of all whose folders are there. One that fails does not stop
    the others; a ValueError names it in the end."""
    run = load_run(ckpt, device)
    root, is_all, failed = args.data or run[2].get("benchmarks"), args.bench == "all", []
    if not root:
        raise ValueError(f"{ckpt}: its config.json names no folder of benchmarks; name one with --data")
    folders = {name: Path(root) / BENCHES[name].folder for name in (BENCHES if is_all else [args.bench])}
    if args.data and not is_all:
        folders[args.bench] = Path(args.data)
    there = [name for name in folders if folders[name].is_dir() or not is_all]
    if absent := [f"{name} ({folders[name]})" for name in folders if name not in there]:
        say(f"not there, so not run: {', '.join(absent)}")
    for name in there:
        try:
            yield run_bench(name, ckpt, run, folders[name], args)
        except (OSError, ValueError) as error:
            if not is_all:
                raise
            failed.append(name)
            say(f"{name} failed: {error}")
    for name in set(there) - set(failed):  # no sooner: a killed `all` goes on without asking these again
        for file in Path(ckpt).glob(f"{name}.partial*.jsonl"):
            file.unlink(missing_ok=True)  # another rank may have been faster
    if failed or not there:
        raise ValueError(f"failed: {', '.join(failed)}" if there else f"{root}: no benchmark is there")


def of_last_run() -> tuple:
    """(the last run, its folder of benchmarks), for --help alone."""
    with suppress(OSError, ValueError, AttributeError):  # none, or a damaged one: told when it is used
        return (run := last_run()), read_json(run / "config.json").get("benchmarks")
    return "none", "none"


def parse_args(argv=None):
    what, examples, *more = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description="\n\n".join([what, *more]), epilog=f"examples:\n{examples}",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    run, benchmarks = (str(value).replace("%", "%%") for value in of_last_run())
    parser.add_argument("--ckpt", nargs="+", help=f"run directories [the last: {run}]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bench", choices=[*BENCHES, "all"])
    what.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="one question about one picture")
    what.add_argument("--chat", metavar="IMAGE", help="several turns about one picture: a question a line of "
                                                      "stdin, until an empty one")
    add = parser.add_argument_group("benchmarks").add_argument
    add("--data", help="the benchmark's folder; all: the folder of these [the `benchmarks` of the run's "
                       f"config; of the last: {benchmarks}]")
    splits = ", ".join(f"{name} {bench.split}" for name, bench in BENCHES.items() if bench.split)
    add("--split", help=f"the benchmark's split, category or part of its file's name [{splits}]")
    add("--limit", type=int, help="only the first so many questions [all]")
    add("--score", choices=["likelihood"], help="also by the likeliest option")
    add("--floors", action="store_true", help="also chance, the commonest answer, the model without picture")
    add("--submit", type=Path, help="file for a server or judge [BENCH-submit in the run directory]")
    add = parser.add_argument_group("one picture").add_argument
    add("--max_new_tokens", type=int, default=64, help="most tokens of the answer [%(default)s]")
    add("--temperature", type=float, default=0.0, help="of the answer; 0: greedy [%(default)s]")
    add("--top_p", type=float, default=1.0, help="the likeliest that hold this much [%(default)s]")
    args = parser.parse_args(argv)
    writers = [name for name, bench in BENCHES.items() if bench.submit]
    if args.split and args.bench not in BENCHES:
        parser.error("--split is for one benchmark")
    if (args.limit is not None or args.score or args.floors) and not args.bench:
        parser.error("--limit, --score and --floors are for benchmarks")
    if args.submit and (args.bench not in writers or len(args.ckpt or ".") > 1):
        parser.error(f"--submit is for one run of {', '.join(writers)}")
    if args.submit and not args.submit.parent.is_dir():
        parser.error(f"--submit: no folder {args.submit.parent}")
    if args.limit is not None and args.limit < 1 or args.max_new_tokens < 1:
        parser.error("--limit and --max_new_tokens must be at least 1")
    if args.temperature != 0 and not 0.001 <= args.temperature < math.inf or not 0.001 <= args.top_p <= 1:
        parser.error("--temperature must be 0 or from 0.001 up, --top_p in [0.001, 1]")
    return args


def ask_about_picture(ckpt, args, device) -> list:
    """The result of --ask; --chat has printed its own."""
    image, text = args.ask or (args.chat, None)
    data.load_image(image)  # a bad one is told before a large model is loaded
    if args.chat and world_size() > 1:
        raise ValueError("--chat has one stdin: run it without torchrun")
    vlm, tokenizer, config = load_run(ckpt, device)
    how = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    if args.chat:
        chat(vlm, tokenizer, config["template"], image, **how)
        return []
    answer, = ask(vlm, tokenizer, [about(image, text)], config["template"], **how)
    return [{"ckpt": str(ckpt), "image": image, "question": text, "answer": answer}]


def main(argv=None):
    args = parse_args(argv)
    with command("eval.py"):
        device = start_ranks()
        for ckpt in [resolve_model(run) for run in args.ckpt] if args.ckpt else [last_run()]:
            if args.ask or args.chat:
                results = ask_about_picture(ckpt, args, device)
            else:
                results = run_benches(ckpt, args, device)
            for result in results:
                say(json.dumps(result))


if __name__ == "__main__":
    main()
