"""Compares the losses: the papers' claims in miniature. Every recipe x part of the instruction data x seed.

    python -m lab.compare --jobs 2                        # the toy world: days on 2 cores
    python -m lab.compare --size claims --jobs 2          # 10 seeds, one number of align steps: hours
    python -m lab.compare --size quick                    # 2 seeds, short runs, no tuning: minutes
    python -m lab.compare --size emoji --world data/emoji # real towers, real pictures: lab/emoji_world.py
    python -m lab.compare --recipes none first --seeds 3  # a part; a later call adds to it
    python -m lab.compare --clip 0.5                      # any option of train.py that is not set here

A *recipe* is a way to align: a loss, and how it is weighed. It trains with train.py's stages, scores with
lab/score.py, and leaves in OUT

    cells.jsonl     the scores of every run, one line each; a run whose line is there is not done again
    results.md      the tables; beside it results.json and two charts (lab/report.py)
    runs.log        what the runs printed
    finished.json   which recipes and seeds are in the tables

Interrupted, the same command goes on; with more `--recipes` or `--seeds` it adds theirs. `--jobs` processes
of one thread each share the work; the results do not depend on their number.

What keeps it fair: the world and the towers were fixed by criteria that look at no alignment
(lab/pretrain.py). Every recipe gets the same records, equal captioning steps and the same small grid of
learning rates (times its own strengths), tuned with a seed of its own on the validation split. Test questions
choose nothing. Contrast first has steps of its own, and so sees its pictures more often: "none, longer"
captions for as much longer as they take.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from lab import score, toy_world
from lab.report import report
from plumbing.files import read_json, resolve_model


WEIGHTS = tuple({"contrastive_weight": weight} for weight in (1.0, 0.3, 3.0, 0.1, 10.0))
# name: the options of the align stage that make the recipe, and those among which its strength is tuned, the
# first of them where nothing is tuned. `first` and `longer` stand for parts of the captioning steps, which
# the size of the comparison knows.
RECIPES = {
    "none": ({"contrastive": "none"}, ({},)),  # a preset may have another
    "none, longer": ({"contrastive": "none", "longer": True}, ({},)),
    "patch": ({"contrastive": "patch"}, WEIGHTS),
    "prompt": ({"contrastive": "prompt"}, WEIGHTS),
    "both": ({"contrastive": "both"}, WEIGHTS),
    "share 0.1": ({"contrastive": "patch", "contrastive_balance": 0.1}, ({},)),
    "share 0.3": ({"contrastive": "patch", "contrastive_balance": 0.3}, ({},)),
    "share 1": ({"contrastive": "patch", "contrastive_balance": 1.0}, ({},)),
    "first": ({"contrastive": "patch", "contrastive_weight": 0.0, "first": True}, ({},)),
    "first, share 0.1": ({"contrastive": "patch", "contrastive_balance": 0.1, "first": True}, ({},)),
}
PAPERS = ("none", "patch", "prompt", "both")  # what the papers have; the others are ours

SIZES = {  # a first step of the toy world takes 0.45 of the time of a captioning step
    "full": dict(recipes=tuple(RECIPES), seeds=10, budgets=(30, 60, 120, 240), short=60, long=240, epochs=4.0,
                 fractions=(0.01, 0.05, 0.1, 0.25, 0.5, 1.0), lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
                 instruct_lr=(2e-4, 4e-4, 8e-4, 1.6e-3), ablations=5, first=1.0, longer=1.45, tune=True,
                 by_words=False, align={}, instruct={}),
    "claims": dict(recipes=("none", "none, longer", "patch", "prompt", "both", "share 0.3", "first"),
                   seeds=10, budgets=(120,), short=120, long=120, epochs=2.0, fractions=(0.1, 1.0),
                   lr=(4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), instruct_lr=(2e-4,), ablations=0, first=1.0,
                   longer=1.45, tune=True, by_words=False, align={}, instruct={}),
    "quick": dict(recipes=PAPERS, seeds=2, budgets=(30, 60), short=30, long=60, epochs=1.0,
                  fractions=(0.1, 1.0), lr=(2e-3,), instruct_lr=(4e-4,), ablations=0, first=1.0, longer=1.45,
                  tune=False, by_words=False, align={}, instruct={}),
}
REAL = dict(vit="towers/dinov2-small", llm="towers/smollm2", projector="pixel_shuffle", dtype="bfloat16")
SIZES["emoji"] = SIZES["quick"] | dict(  # 1,000 first steps take as long as some 11 captioning steps
    recipes=tuple(RECIPES), seeds=3, budgets=(70,), short=70, long=70, lr=(1e-3,), instruct_lr=(1e-4,),
    first=1000 / 70, longer=1.3, by_words=True, align=REAL | dict(batch=32, micro_batch=32),
    instruct=REAL | dict(template="chat", micro_batch=16))
FEW_FRACTIONS = (0.1, 1.0)  # parts of the instruction data after the long alignment, and in tuning
TUNING_SEED = 1000  # no seed of the comparison itself
UNPROMPTED = ("none", "patch", "both")
ABLATIONS = {  # name: (options of the align stage, the recipes they are tried with)
    "as above (MLP, CLIP-like encoder; prompt describe with its loss)": ({}, PAPERS),
    "projector linear": (dict(projector="linear"), UNPROMPTED),
    "projector pixel_shuffle (9 tokens an image)": (dict(projector="pixel_shuffle"), UNPROMPTED),
    "projector resampler (9 tokens an image)": (dict(projector="resampler"), UNPROMPTED),
    "encoder that never saw text": (dict(vit="lab/towers/tiny-vit-no-text"), UNPROMPTED),
    "larger LLM (1.1 M weights, not 0.5)": (dict(llm="lab/towers/tiny-llm-wide"), PAPERS),
    "prompt none": (dict(prompt="none"), ("prompt",)),
    "prompt describe in the captioning pass alone": (dict(prompt="describe"), ("none", "patch")),
}
OTHER_STAGE = {"align": ("template",), "instruct": ("prompt",)}  # options that are the other stage's alone
SET_HERE = {"stage", "preset", "annotations", "images", "benchmarks", "init", "seed", "data_fraction",
            "contrastive", "contrastive_weight", "contrastive_balance", "contrastive_first", "epochs",
            "steps", "lr", "features", "save_every", "resume", "dry_run"}


class Setting(NamedTuple):
    """What every run of one comparison has in common. `size` is one of SIZES, `given` options of train.py,
    `world` a folder with align.json, instruct.json, images/ and what lab/score.py reads."""
    size: dict
    out: Path
    world: Path
    given: dict


def compare(setting: Setting, jobs: int = 1) -> str:
    """Train and score what `out` does not hold yet; returns the text of results.md. ValueError if `out` holds
    another comparison."""
    size, out = setting.size, setting.out
    protocol = {key: value for key, value in size.items() if key not in ("recipes", "seeds")}
    open_cells(out, [protocol, setting.given, fingerprint(setting)])

    # 0. What earlier calls have finished is reported, too: their cells are there.
    asked, finished = {(recipe, seed) for recipe in size["recipes"] for seed in range(size["seeds"])}, set()
    if (out / "finished.json").exists():
        finished = {(recipe, seed) for recipe, seed in read_json(out / "finished.json")}
    asked = sorted(asked | finished, key=lambda pair: (pair[1], [*RECIPES].index(pair[0])))
    size = size | {"recipes": tuple(dict.fromkeys(recipe for recipe, _ in asked))}

    # 1. Tune each recipe at the short and at the long number of align steps, on the validation split.
    pairs = [(recipe, steps) for recipe in size["recipes"] for steps in sorted({size["short"], size["long"]})]
    tuned = dict(zip(pairs, spread(jobs, "tune", partial(tune, setting), pairs)))

    # 2. Measure after every number of align steps; after the short and the long one, also instruct.
    cells = sum(spread(jobs, "measure", partial(measure, setting, tuned), asked), [])
    (out / "finished.json").write_text(json.dumps(asked))

    # 3. Ablate: other projectors, towers and prompts in the long alignment, with what was tuned for it.
    tries = []
    for name, (_, compared) in ABLATIONS.items():
        known = [recipe for recipe in compared if recipe in size["recipes"]]
        tries += [(name, recipe, seed) for recipe in known for seed in range(size["ablations"])]
    ablations, values = {}, spread(jobs, "ablate", partial(ablate, setting, tuned), tries)
    for (name, recipe, _), value in zip(tries, values):
        ablations.setdefault((name, recipe), []).append(value)
    return report(out, setting.world.name, size, tuned, cells, ablations)


def spread(jobs: int, title: str, function, items: list) -> list:
    """[function(*item)] of all items, in order, in `jobs` processes of one thread each."""
    if jobs == 1:  # in this one, which has as many threads: a run is the same
        return [function(*item) for item in tqdm(items, desc=title, unit=" items")]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, locked
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.submit(function, *item) for item in items]
        return [future.result() for future in tqdm(waiting, desc=title, unit=" items")]


# ------------------------------------------------------------------------------------------------------------
# What is run: each of these three is a piece of work for one process


def tune(setting: Setting, recipe: str, steps: int) -> dict:
    """The {"lr", "strength", "instruct_lr"} that validate best for this recipe and these steps."""
    size = setting.size

    def align_score(pair):
        options = align_options(recipe, steps, TUNING_SEED, *pair)
        return cell(setting, "align", "val", **options)[main_score(size)]

    def instruct_score(rate):
        align, total = align_options(recipe, steps, TUNING_SEED, lr, strength), 0.0
        for part in FEW_FRACTIONS:
            instruct = instruct_options(setting.out, align, part, size["epochs"], rate)
            total += cell(setting, "instruct", "val", **instruct)[main_score(size)]
        return total

    strengths = RECIPES[recipe][1] if size["tune"] else RECIPES[recipe][1][:1]
    lr, _ = best_of([(lr, strengths[0]) for lr in size["lr"]], align_score)
    lr, strength = best_of([(lr, strength) for strength in strengths], align_score)
    return {"lr": lr, "strength": strength, "instruct_lr": best_of(size["instruct_lr"], instruct_score)}


def best_of(choices, score_of):
    """The choice with the highest score, the first of equals; nothing is run where there is no choice."""
    return choices[0] if len(choices) == 1 else max(choices, key=score_of)


def main_score(size: dict) -> str:
    """The score that tunes and that the first tables show: questions with a picture, answered rightly."""
    return "likely" if size["by_words"] else "accuracy_img"


def measure(setting: Setting, tuned: dict, recipe: str, seed: int) -> list:
    """The cells of one recipe and seed."""
    size, cells = setting.size, []
    for steps in size["budgets"]:
        best = tuned[recipe, size["short"] if steps <= size["short"] else size["long"]]
        align = align_options(recipe, steps, seed, best["lr"], best["strength"])
        entry = {"loss": recipe, "steps": steps, "seed": seed}
        cells.append(entry | {"fraction": 0, **cell(setting, "align", **align)})
        for part in fractions_after(steps, size):
            instruct = instruct_options(setting.out, align, part, size["epochs"], best["instruct_lr"])
            cells.append(entry | {"fraction": part, **cell(setting, "instruct", **instruct)})
    return cells


def ablate(setting: Setting, tuned: dict, name: str, recipe: str, seed: int) -> float:
    """The main score of one ablation."""
    best, options = tuned[recipe, setting.size["long"]], ABLATIONS[name][0]
    align = align_options(recipe, setting.size["long"], seed, best["lr"], best["strength"])
    found = cell(setting, "align", ablation=name if options else "", **align, **options)
    return found[main_score(setting.size)]


def align_options(recipe: str, steps: int, seed: int, lr: float, strength: dict) -> dict:
    return {"recipe": recipe, "steps": steps, "seed": seed, "lr": lr, **RECIPES[recipe][0], **strength}


def instruct_options(out: Path, align: dict, fraction: float, epochs: float, lr: float) -> dict:
    """Options of an instruct run that starts from the align run with the options `align`."""
    init = out / "runs" / run_name("align", **align)
    return {"init": str(init), "seed": align["seed"], "data_fraction": fraction, "epochs": epochs, "lr": lr}


def fractions_after(steps: int, size: dict) -> tuple:
    """The parts of the instruction data that are tried after so many align steps."""
    if steps == size["short"]:
        return size["fractions"]
    return FEW_FRACTIONS if steps == size["long"] else ()


def run_name(stage: str, ablation: str = "", **options) -> str:
    """The name of a run's folder, and of its line in cells.jsonl: what tells it from the others."""
    if stage == "instruct":
        return f"{Path(options['init']).name}-instruct{options['data_fraction']}-lr{options['lr']}"
    name = "{recipe}-{steps}-seed{seed}-lr{lr}".format(**options).replace(",", "").replace(" ", "-")
    name += f"-weight{options['contrastive_weight']}" if "contrastive_weight" in options else ""
    return f"{name}-{ablation.replace(' ', '-')}" if ablation else name


def train_options(setting: Setting, stage: str, options: dict) -> dict:
    """Options of train.py from those of a recipe."""
    given = {key: value for key, value in (setting.given | options).items() if key not in OTHER_STAGE[stage]}
    given = setting.size[stage] | given
    given.pop("recipe", None)
    if given.pop("first", False):
        given["contrastive_first"] = round(setting.size["first"] * given["steps"])
    if given.pop("longer", False):
        given["steps"] = round(setting.size["longer"] * given["steps"])
    for tower in ("vit", "llm"):
        if given.get(tower, "").startswith("towers/"):  # the world brings its own
            given[tower] = str(setting.world / given[tower])
    return given


# ------------------------------------------------------------------------------------------------------------
# One run, and what OUT remembers of it


def cell(setting: Setting, stage: str, split: str = "test", ablation: str = "", **options) -> dict:
    """The scores of one training run on the split; trained and scored if no earlier call has done it."""
    out, run = setting.out, run_name(stage, ablation, **options)
    name = f"{run} {split}"
    done = read_cells(out)
    if name not in done:
        done[name] = {"name": name, **train_and_score(setting, run, stage, split, options)}
        with open(out / "cells.jsonl", "a") as file:
            file.write(json.dumps(done[name]) + "\n")  # one write: lines of several processes do not mix
        if stage == "instruct":  # nothing starts from it, and its LLM is large
            shutil.rmtree(out / "runs" / run)
    return done[name]


def train_and_score(setting: Setting, run: str, stage: str, split: str, options: dict) -> dict:
    """Train the run, unless its folder is there, and score it. What it prints goes to runs.log."""
    folder, world, device = setting.out / "runs" / run, setting.world, train.start_ranks()
    where = {"annotations": str(world / f"{stage}.json"), "images": str(world / "images"),
             "benchmarks": str(world), "out": str(folder), "save_every": 0, "preset": "tiny"}
    if setting.size["by_words"] and stage == "align":
        where["features"] = str(setting.out / "features.pt")  # a real ViT on a CPU takes longer than all else
    with open(setting.out / "runs.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if not (folder / "config.json").exists():
            train.train_stage(train.configure(stage, train_options(setting, stage, options) | where), device)
        scores = score.score_run(folder, world, split, device, setting.size["by_words"])
    return scores | {"seconds": read_json(folder / "results.json")["seconds"]}


def open_cells(out: Path, protocol: list):
    """Make `out` ready for cells of this protocol. ValueError for another protocol's."""
    protocol, noted = json.dumps(protocol), out / "protocol.json"
    if noted.exists() and read_json(noted) != json.loads(protocol):
        raise ValueError(f"{out}: holds a comparison with other options, towers or data; name another --out, "
                         "or remove it")
    out.mkdir(parents=True, exist_ok=True)
    noted.write_text(protocol)


def read_cells(out: Path) -> dict:
    """{name: scores} of the runs that `out` holds. ValueError for a damaged line."""
    file, done = out / "cells.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            scores = json.loads(line)
            done[scores["name"]] = scores
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: a damaged line ({error}); without it, its run is done again") from None
    return done


def fingerprint(setting: Setting) -> str:
    """A hash of the towers and the data of a comparison: cells of two worlds must not meet in one table."""
    options = train_options(setting, "align", {"steps": 1})
    config = train.configure("align", options | {"preset": "tiny"})
    towers, files = [config.vit, config.llm], []
    for options, _ in ABLATIONS.values() if setting.size["ablations"] else ():
        towers += [options[name] for name in ("vit", "llm") if name in options]
    for tower in towers:
        folder = resolve_model(tower)
        files += sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files += [setting.world / name for name in ("align.json", "instruct.json", "ScienceQA/problems.json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None) -> tuple:
    """(our options, those for train.py). Unknown ones and wrong types end the program."""
    parser = argparse.ArgumentParser(prog="python -m lab.compare", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="what is compared (default full)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="--size quick")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="RECIPE",
                        help=f"default: the size's; of {', '.join(map(repr, RECIPES))}")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS - 1 (default: the size's)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default runs/compare, or -emoji)")
    parser.add_argument("--world", type=Path, help="folder of the data; a toy world is written where it is "
                        "missing (default data/toy-1200, of 1,200 test questions with a picture)")
    ours, rest = parser.parse_known_args(argv)
    ours.out = ours.out or Path("runs/compare-emoji" if ours.size == "emoji" else "runs/compare")
    ours.world = ours.world or Path("data/emoji" if ours.size == "emoji" else "data/toy-1200")
    return ours, train.parse_args(rest, "python -m lab.compare")


def main():
    ours, given = parse_args()
    try:
        if clash := sorted(SET_HERE & given.keys()):
            raise ValueError(f"the comparison sets --{', --'.join(clash)} itself")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("the runs come one after another in --jobs processes, not on several ranks")
        if ours.seeds is not None and ours.seeds < 1:
            raise ValueError(f"--seeds is {ours.seeds}; at least one is needed")
        if ours.jobs < 1:
            raise ValueError(f"--jobs is {ours.jobs}; at least one process has to do the work")
        if not ours.world.exists() and ours.size == "emoji":
            raise FileNotFoundError(f"{ours.world}: no such world; `python -m lab.emoji_world {ours.world}` "
                                    "makes it")
        if not ours.world.exists():
            print(f"writing the toy world to {ours.world}")
            toy_world.write_world(ours.world, test=1600)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes to come: train.py looks at it
        torch.set_num_threads(1)
        part = {key: vars(ours)[key] for key in ("recipes", "seeds") if vars(ours)[key]}
        print(compare(Setting(SIZES[ours.size] | part, ours.out, ours.world, given), ours.jobs))
    except (OSError, ValueError) as error:
        sys.exit(f"lab.compare: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("lab.compare: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
