"""Compares the losses: the papers' claims in miniature. Every recipe x part of the instruction data x seed.

    python -m lab.compare --size claims --jobs 2          # the toy world, 10 seeds: hours on 2 cores
    python -m lab.compare --quick --jobs 2                # 2 seeds, short runs, no tuning: 3 minutes
    python -m lab.compare --size full                     # every recipe, 240 align steps: days
    python -m lab.compare --size emoji --world data/emoji # real towers, real pictures: lab/emoji_world.py
    python -m lab.compare --recipes none first --seeds 3 --fractions 0.1   # a part; a later call adds to it
    python -m lab.compare --projector linear --out runs/linear   # any option of train.py not set here

A *recipe* is a way to align: a loss and its weight. It is trained by train.py's stages and scored by
lab/score.py. OUT gets

    cells.jsonl     the scores of every run, one line each; a run whose line is there is not done again
    results.md      the tables; beside it results.json and a chart (lab/report.py)
    runs.log        what the runs printed
    finished.json   which recipes, seeds and parts of the data are in the tables

If interrupted, the same command goes on; with more `--recipes` or `--seeds` it adds theirs. `--jobs`
processes of one thread each share the work; the results do not depend on their number.

What keeps it fair: criteria that look at no alignment fixed the world and the towers (lab/pretrain.py). Every
recipe gets the same records, equal captioning steps and the same small grid of learning rates; the validation
split and a seed of its own choose among them. Test questions choose nothing. Contrast first has steps of its
own, and so sees its pictures more often: "none, longer" captions for the time that they take.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from lab import parser_of, score, tables, toy_world
from lab.report import report
from plumbing.files import read_json, resolve_model, write_json
from plumbing.ranks import choose_dtype, command, start_ranks
from running import costs, features, options as run_options, order
from running.records import read_records
from vit import ViT

# Options of the align stage that make each recipe. `first` and `longer` stand for parts of the captioning
# steps, which the size of the comparison knows, `words` for a word table (lab/tables.py) in the first steps.
RECIPES = {
    "none": {"contrastive": "none"},
    "none, longer": {"contrastive": "none", "longer": True},
    "patch": {"contrastive": "patch"},
    "prompt": {"contrastive": "prompt"},
    "prompt, weight 0.1": {"contrastive": "prompt", "contrastive_weight": 0.1},
    "prompt, weight 10": {"contrastive": "prompt", "contrastive_weight": 10.0},
    "prompt, ratio 0.3": {"contrastive": "prompt", "contrastive_balance": 0.3},
    "both": {"contrastive": "both"},
    "ratio 0.3": {"contrastive": "patch", "contrastive_balance": 0.3},
    "ratio 1": {"contrastive": "patch", "contrastive_balance": 1.0},
    "first": {"contrastive": "patch", "contrastive_weight": 0.0, "first": True},
    "first, ratio 0.1": {"contrastive": "patch", "contrastive_balance": 0.1, "first": True},
    # The first steps are a run of their own, from which captioning starts: at the same records as "none"
    "first, own words": {"contrastive": "none", "words": "own"},
    "first, permuted words": {"contrastive": "none", "words": "permuted"},
    "first, random words": {"contrastive": "none", "words": "random"},
    "first, prompt ratio 0.3": {"contrastive": "prompt", "contrastive_balance": 0.3, "words": "own"},
}
PAPERS = ("none", "patch", "prompt", "both")  # the papers' recipes; the others are ours
WEIGHED = ("patch", "prompt", "both")  # recipes whose weight is tuned
WEIGHTS = (1.0, 0.3, 3.0, 0.1, 10.0)  # the first without tuning


class Size(NamedTuple):
    """What one comparison measures."""
    recipes: tuple
    seeds: int
    steps: int  # captioning steps of the align stage
    lr: tuple  # of the align stage, to choose from
    instruct_lr: tuple = (2e-4,)  # likewise
    fractions: tuple = (0.1, 1.0)  # parts of the instruction data
    epochs: float = 2.0  # of the instruct stage
    first: float = 1.0  # steps of contrast first, as a part of `steps`
    longer: float = 1.45  # steps of "none, longer", likewise; a first step takes 0.45 of a captioning step
    tune: bool = True
    by_words: bool = False  # answer by the likeliest choice, not by letter
    brief: bool = False  # no other questions are scored than those of ScienceQA's layout
    align: dict = {}  # further options of each stage
    instruct: dict = {}


REAL = dict(vit="towers/dinov2-small", llm="towers/smollm2", projector="pixel_shuffle", dtype="bfloat16")
SIZES = {
    "full": Size(tuple(RECIPES), seeds=10, steps=240, lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
                 instruct_lr=(2e-4, 4e-4, 8e-4, 1.6e-3), epochs=4.0,
                 fractions=(0.01, 0.05, 0.1, 0.25, 0.5, 1.0)),
    "claims": Size(("none", "none, longer", "patch", "prompt", "both", "ratio 0.3", "first"), seeds=10,
                   steps=120, lr=(4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)),
    "quick": Size(PAPERS, seeds=2, steps=60, lr=(2e-3,), instruct_lr=(4e-4,), epochs=1.0, tune=False,
                  brief=True),
    # 1,000 first steps take as long as some 10 captioning steps
    "emoji": Size(tuple(RECIPES), seeds=3, steps=70, lr=(1e-3,), instruct_lr=(1e-4,), epochs=1.0,
                  first=1000 / 70, longer=1.3, tune=False, by_words=True,
                  align=REAL | dict(batch=32, micro_batch=32),
                  instruct=REAL | dict(template="chat", micro_batch=16)),
}
# Is it the words? One and the same rate for all, the one that was tuned for both "none" and "first".
WORDS = ("first, permuted words", "first, own words", "none", "first, random words")
SIZES["words"] = SIZES["claims"]._replace(recipes=WORDS, seeds=5, lr=(8e-3,), fractions=(), tune=False,
                                          brief=True)
SIZES["emoji-words"] = SIZES["emoji"]._replace(recipes=WORDS, fractions=(), brief=True)
TUNING_SEED = 1000  # no seed of the comparison itself
OTHER_STAGE = {"align": ("template",), "instruct": ("prompt",)}  # options that only the other stage has
SET_HERE = set("""stage preset annotations images benchmarks init seed data_fraction contrastive epochs steps
    contrastive_weight contrastive_balance contrastive_first lr warmup_ratio features save_every resume
    dry_run""".split())


class Setting(NamedTuple):
    """What all runs of one comparison share."""
    size: Size
    out: Path
    world: Path  # with align.json, instruct.json, images/ and what lab/score.py reads
    given: dict  # options of train.py


def compare(setting: Setting, jobs: int = 1) -> str:
    """Train and score what `out` lacks; return the text of results.md. ValueError if `out` holds another
    comparison."""
    size, out = setting.size, setting.out
    open_cells(setting)
    asked = with_finished(setting)
    recipes = list(dict.fromkeys(recipe for recipe, *_ in asked))
    fractions = sorted({part for _, _, *parts in asked for part in parts})
    setting = setting._replace(size=size._replace(fractions=tuple(fractions)))
    keep_features(setting)

    # 1. Tune each recipe on the validation split.
    chosen = spread(jobs, "tune", partial(tune, setting), [(recipe,) for recipe in recipes])
    tuned = dict(zip(recipes, chosen))

    # 2. Measure each recipe and seed after the align stage and after the instruct stage.
    found = spread(jobs, "measure", partial(measure, setting, tuned), asked)
    cells = list(itertools.chain(*found))
    (out / "finished.json").write_text(json.dumps(asked))
    return report(out, setting.world.name, setting.size._asdict(), tuned, cells)


def with_finished(setting: Setting) -> list:
    """[(recipe, seed, *parts of the instruction data)] to report: what is asked for and what earlier calls
    have finished, by seed."""
    size, file = setting.size, setting.out / "finished.json"
    asked = {(recipe, seed): set(size.fractions) for recipe in size.recipes for seed in range(size.seeds)}
    for recipe, seed, *parts in read_json(file) if file.exists() else []:
        asked.setdefault((recipe, seed), set()).update(parts)
    order = list(RECIPES)
    pairs = sorted(asked, key=lambda pair: (pair[1], order.index(pair[0])))
    return [(*pair, *sorted(asked[pair])) for pair in pairs]


def spread(jobs: int, title: str, function, items: list) -> list:
    """[function(*item)] of all items, in order, in `jobs` processes of one thread each."""
    if jobs == 1:  # in this process, which has one thread, too
        return [function(*item) for item in tqdm(items, desc=title, unit=" items")]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, locked
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.submit(function, *item) for item in items]
        return [future.result() for future in tqdm(waiting, desc=title, unit=" items")]


# ---- Each of these two is a piece of work for one process --------------------------------------------------


def tune(setting: Setting, recipe: str) -> dict:
    """The {"lr", "weight", "instruct_lr"} with which this recipe validates best. The weight is None if the
    recipe has none to tune. A choice of one is not run."""
    size = setting.size
    key = "likely" if size.by_words else "accuracy_img"
    weights = WEIGHTS if recipe in WEIGHED else (None,)
    if not size.tune:
        weights = weights[:1]

    def align_score(pair):
        return cell(setting, "align", "val", align_options(setting, recipe, TUNING_SEED, *pair))[key]

    def instruct_score(rate):
        align = align_options(setting, recipe, TUNING_SEED, lr, weight)
        total = 0.0
        for part in (0.1, 1.0):
            total += cell(setting, "instruct", "val", instruct_options(setting, align, part, rate))[key]
        return total

    def best(choices, score_of):
        return choices[0] if len(choices) == 1 else max(choices, key=score_of)

    lr, _ = best([(lr, weights[0]) for lr in size.lr], align_score)
    _, weight = best([(lr, weight) for weight in weights], align_score)
    rates = size.instruct_lr if size.fractions else size.instruct_lr[:1]  # without parts there is no instruct
    return {"lr": lr, "weight": weight, "instruct_lr": best(rates, instruct_score)}


def measure(setting: Setting, tuned: dict, recipe: str, seed: int, *fractions) -> list:
    """The cells of one recipe and seed: after align, and after instruct with parts of its data."""
    best = tuned[recipe]
    align = align_options(setting, recipe, seed, best["lr"], best["weight"])
    entry = {"loss": recipe, "steps": setting.size.steps, "seed": seed}
    cells = [entry | {"fraction": 0} | cell(setting, "align", "test", align)]
    for part in fractions:
        options = instruct_options(setting, align, part, best["instruct_lr"])
        cells.append(entry | {"fraction": part} | cell(setting, "instruct", "test", options))
    return cells


def align_options(setting: Setting, recipe: str, seed: int, lr: float, weight: float | None) -> dict:
    options = {"recipe": recipe, "steps": setting.size.steps, "seed": seed, "lr": lr} | RECIPES[recipe]
    return options if weight is None else options | {"contrastive_weight": weight}


def instruct_options(setting: Setting, align: dict, fraction: float, lr: float) -> dict:
    """Options of an instruct run that starts from the align run with the options `align`."""
    init = str(setting.out / "runs" / run_name("align", align))
    epochs = setting.size.epochs
    return {"init": init, "seed": align["seed"], "data_fraction": fraction, "epochs": epochs, "lr": lr}


def run_name(stage: str, options: dict) -> str:
    """The name of a run's folder, unique in its comparison; also the name of its line in cells.jsonl."""
    if stage == "instruct":
        return f"{Path(options['init']).name}-instruct{options['data_fraction']}-lr{options['lr']}"
    name = "{recipe}-{steps}-seed{seed}-lr{lr}".format(**options).replace(",", "").replace(" ", "-")
    return f"{name}-weight{options['contrastive_weight']}" if "contrastive_weight" in options else name


def train_options(setting: Setting, stage: str, options: dict) -> dict:
    """Options of train.py from those of a recipe."""
    size = setting.size
    given = (size.align if stage == "align" else size.instruct) | setting.given | options
    for name in ("recipe", "words", *OTHER_STAGE[stage]):
        given.pop(name, None)
    if given.pop("first", False):
        given["contrastive_first"] = round(size.first * given["steps"])
    if given.pop("longer", False):
        given["steps"] = round(size.longer * given["steps"])
    for tower in ("vit", "llm"):
        if given.get(tower, "").startswith("towers/"):  # the world brings its own
            given[tower] = str(setting.world / given[tower])
    return given


# ---- One run, and what OUT remembers of it -----------------------------------------------------------------


def cell(setting: Setting, stage: str, split: str, options: dict) -> dict:
    """The scores of one training run on the split. It is trained and scored unless an earlier call did it."""
    out = setting.out
    run = run_name(stage, options)
    name = f"{run} {split}"
    done = read_cells(out)
    if name not in done:
        done[name] = {"name": name} | train_and_score(setting, run, stage, split, options)
        with open(out / "cells.jsonl", "a") as file:
            file.write(json.dumps(done[name]) + "\n")  # one write: lines of several processes do not mix
        if stage == "instruct":  # nothing starts from it, and its LLM is large
            shutil.rmtree(out / "runs" / run)
    return done[name]


def train_and_score(setting: Setting, run: str, stage: str, split: str, options: dict) -> dict:
    """Train the run, unless its folder is there, and score it. Its output goes to runs.log."""
    out, world, device = setting.out, setting.world, start_ranks()
    before, seconds = {}, 0
    with open(out / "runs.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if stage == "align" and "words" in options:
            start = contrast_run(setting, options, device)
            options = options | {"init": str(start)}
            seconds = read_json(start / "results.json")["seconds"]
            before = {f"{name}_before": value for name, value in score.cosines(start, world, device).items()}
        folder = train_run(setting, run, stage, options, device)
        size = setting.size
        scores = score.score_run(folder, world, split, device, size.by_words, size.brief)
    return scores | before | {"seconds": seconds + read_json(folder / "results.json")["seconds"]}


def train_run(setting: Setting, run: str, stage: str, options: dict, device) -> Path:
    """Train the run, unless its folder is there. Returns the folder."""
    folder = setting.out / "runs" / run
    if not (folder / "config.json").exists():
        train.train_stage(configured(setting, stage, options | {"out": str(folder)}), device)
    return folder


def configured(setting: Setting, stage: str, options: dict):
    """train.py's options for a run of a recipe. All align runs share the features of the frozen ViT."""
    out, world = setting.out, setting.world
    given = train_options(setting, stage, options) | {
        "annotations": str(world / f"{stage}.json"), "images": str(world / "images"),
        "benchmarks": str(world), "save_every": 0, "preset": "tiny"}
    if stage == "align":
        given["features"] = str(out / "features.pt")
    return run_options.configure(stage, given)


def keep_features(setting: Setting):
    """Make the file of features, before several processes want it."""
    device = start_ranks()
    config = configured(setting, "align", {"steps": 1})
    dtype = choose_dtype(device, config.dtype)
    with open(setting.out / "runs.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        vit = ViT.from_pretrained(config.vit, config.feature_layer, dtype, device)
        features.load(config, order.load_samples(config, costs.outline(config, by_name=False)), vit, device)


def contrast_run(setting: Setting, options: dict, device) -> Path:
    """Train the first steps of a recipe with `words`: its LLM's table is another. Returns the run's folder,
    which names the true LLM again. The one captioning step behind them has rate 0 and changes nothing."""
    words, seed = options["words"], options["seed"]
    first = round(setting.size.first * setting.size.steps)
    run = f"contrast-{words}-{first}-seed{seed}-lr{options['lr']}"
    folder = setting.out / "runs" / run
    if folder.exists():
        return folder
    alone = {"contrastive": "patch", "contrastive_weight": 0.0, "contrastive_first": first, "steps": 1}
    given = {name: options[name] for name in ("seed", "lr")} | alone
    true = configured(setting, "align", given).llm
    with tempfile.TemporaryDirectory(dir=setting.out) as building:
        llm = Path(building, "llm")
        tables.write_other(true, read_records(setting.world / "align.json", "align"), words, seed, llm)
        made = train_run(setting, f"../{Path(building).name}/run", "align", given | {"llm": str(llm)}, device)
        config = read_json(made / "config.json")
        write_json(made / "config.json", config | {"llm": true})
        with contextlib.suppress(OSError):  # another process was faster and made the same
            made.rename(folder)
    return folder


def open_cells(setting: Setting):
    """Make `out` ready for the cells of this comparison. ValueError if it holds those of another."""
    size = setting.size._asdict()
    del size["recipes"], size["seeds"], size["fractions"]  # later calls may add some
    protocol = json.dumps([size, setting.given, fingerprint(setting)])
    file = setting.out / "protocol.json"
    if file.exists() and read_json(file) != json.loads(protocol):
        raise ValueError(f"{setting.out}: holds a comparison with other options, towers or data; name "
                         "another --out, or remove it")
    setting.out.mkdir(parents=True, exist_ok=True)
    file.write_text(protocol)


def read_cells(out: Path) -> dict:
    """{name: scores} of the runs that `out` holds. ValueError for a damaged line."""
    file = out / "cells.jsonl"
    file.touch()
    done = {}
    for line in file.read_text().splitlines():
        try:
            scores = json.loads(line)
            done[scores["name"]] = scores
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: a damaged line ({error}); without it, its run is done again") from None
    return done


def fingerprint(setting: Setting) -> str:
    """A hash of the towers and the data, because cells of two worlds must not meet in one table."""
    config = configured(setting, "align", {"steps": 1})
    files = [setting.world / name for name in ("align.json", "instruct.json", "ScienceQA/problems.json")]
    for tower in (config.vit, config.llm):
        folder = resolve_model(tower)
        files += sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ---- The command line --------------------------------------------------------------------------------------


def parse_args(argv=None) -> tuple:
    """(our options, those for train.py). Unknown ones and wrong types end the program."""
    parser = parser_of("lab.compare", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="what is compared (default full)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="--size quick")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="RECIPE",
                        help=f"default: the size's; of {', '.join(map(repr, RECIPES))}")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS - 1 (default: the size's)")
    parser.add_argument("--fractions", nargs="*", type=float, help="parts of the instruction data, or none: "
                        "the align stage alone (default: the size's)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default runs/SIZE)")
    parser.add_argument("--world", type=Path, help="folder of the data; a missing toy world is written "
                        "(default data/toy-1200, of 1,200 test questions with a picture; --quick: "
                        "data/toy, of 300; --size emoji: data/emoji)")
    ours, rest = parser.parse_known_args(argv)
    is_emoji = ours.size.startswith("emoji")
    ours.out = ours.out or Path("runs", ours.size)
    is_quick = ours.size == "quick"
    ours.world = ours.world or Path("data/emoji" if is_emoji else "data/toy" if is_quick else "data/toy-1200")
    return ours, run_options.parse_args(rest, "python -m lab.compare")


def check_args(ours, given: dict) -> None:
    """An error of one line for a comparison that cannot run."""
    clash = sorted(SET_HERE & given.keys())
    if clash:
        raise ValueError(f"the comparison sets --{', --'.join(clash)} itself")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("the runs come one after another in --jobs processes, not on several ranks")
    if ours.seeds is not None and ours.seeds < 1:
        raise ValueError(f"--seeds is {ours.seeds}; at least one is needed")
    if not all(0 < part <= 1 for part in ours.fractions or ()):
        raise ValueError("--fractions: parts are above 0 and at most 1")
    if ours.jobs < 1:
        raise ValueError(f"--jobs is {ours.jobs}; at least one process has to do the work")
    if ours.size.startswith("emoji") and not ours.world.exists():
        command = f"python -m lab.emoji_world {ours.world}"
        raise ValueError(f"{ours.world}: no such world; `{command}` makes it")


def prepare(ours, given: dict) -> Setting:
    """Write a missing toy world, and see to it that all processes have one thread."""
    check_args(ours, given)
    if not ours.world.exists():
        print(f"writing the toy world to {ours.world}")
        toy_world.write_world(ours.world, test=400 if ours.size == "quick" else 1600)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes to come: torch looks at it
    torch.set_num_threads(1)
    return Setting(SIZES[ours.size], ours.out, ours.world, given)


def main():
    ours, given = parse_args()
    size = SIZES[ours.size]
    given_fractions = size.fractions if ours.fractions is None else tuple(ours.fractions)
    size = size._replace(recipes=ours.recipes or size.recipes, seeds=ours.seeds or size.seeds,
                         fractions=given_fractions)
    with command("lab.compare", "interrupted; the same command goes on from here"):
        setting = prepare(ours, given)
        print(compare(setting._replace(size=size), ours.jobs))


if __name__ == "__main__":
    main()
