"""Compares the losses: the papers' claims in miniature. Every loss x part of the instruction data x seed.

    python -m lab.compare              # some hours on 2 cores; interrupted, the same command goes on
    python -m lab.compare --quick      # 2 seeds, short runs, no tuning: minutes
    python -m lab.compare --clip 0.5   # any option of train.py that the comparison does not set itself

It trains with train.py's stages, scores with eval.py's benchmarks, and leaves in OUT

    cells.jsonl     the scores of every run, one line each; a run whose line is there is not done again
    results.md      the tables; beside it results.json and two charts (lab/report.py)
    runs.log        what the runs printed

What keeps it fair: the world and the towers were fixed by criteria that look at no alignment
(lab/pretrain.py). Every loss gets equal data, equal steps and the same small grid of learning rates (times
weights, where there is a contrastive loss), tuned with a seed of its own on the validation split. Test
questions choose nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tqdm import tqdm

import eval as evaluation
import losses
import train
from lab import toy_world
from lab.report import report
from vit import read_json, resolve_model

FULL = dict(seeds=5, budgets=(30, 60, 120, 240), short=60, long=240, epochs=4.0,
            fractions=(0.01, 0.05, 0.1, 0.25, 0.5, 1.0), lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
            weight=(0.3, 1.0), instruct_lr=(2e-4, 4e-4, 8e-4, 1.6e-3), ablations=5)
QUICK = dict(seeds=2, budgets=(30, 60), short=30, long=60, epochs=1.0, fractions=(0.1, 1.0), lr=(2e-3,),
             weight=(1.0,), instruct_lr=(4e-4,), ablations=0)
FEW_FRACTIONS = (0.1, 1.0)  # parts of the instruction data after the long alignment, and in tuning
TUNING_SEED = 1000  # no seed of the comparison itself
ALL, UNPROMPTED = ("none", "patch", "prompt", "both"), ("none", "patch", "both")
ABLATIONS = {  # name: (options of the align stage, the losses they are tried with)
    "as above (MLP, CLIP-like encoder; prompt describe with its loss)": ({}, ALL),
    "projector linear": (dict(projector="linear"), UNPROMPTED),
    "projector pixel_shuffle (9 tokens an image)": (dict(projector="pixel_shuffle"), UNPROMPTED),
    "projector resampler (9 tokens an image)": (dict(projector="resampler"), UNPROMPTED),
    "encoder that never saw text": (dict(vit="lab/towers/tiny-vit-no-text"), UNPROMPTED),
    "larger LLM (1.1 M weights, not 0.5)": (dict(llm="lab/towers/tiny-llm-wide"), ALL),
    "prompt none": (dict(prompt="none"), ("prompt",)),
    "prompt describe in the captioning pass alone": (dict(prompt="describe"), ("none", "patch")),
}
OTHER_STAGE = {"align": ("template",), "instruct": ("prompt",)}  # options that are the other stage's alone
SET_HERE = {"stage", "preset", "annotations", "images", "benchmarks", "init", "seed", "data_fraction",
            "contrastive", "contrastive_weight", "epochs", "steps", "lr", "save_every", "resume", "dry_run"}


def compare(size: dict, out: Path, world: Path, given: dict, device) -> str:
    """Train and score what `out` does not hold yet; returns the text of results.md.

    `size` is FULL or QUICK, `given` options of train.py for every run. `world` is a folder with align.json,
    instruct.json, images/ and the folders of the benchmarks. ValueError if `out` holds another comparison.
    """
    done = open_cells(out, [size, given, fingerprint(world, given)])
    bar = tqdm(desc="compare", total=planned_runs(size), unit=" runs")

    def cell(stage: str, split: str = "test", ablation: str = "", **options) -> dict:
        """The scores of one training run on the split; trained and scored if no earlier call has done it."""
        run = run_name(stage, ablation, **options)
        name = f"{run} {split}"
        if name not in done:
            scores = train_and_score(out, run, stage, world, split, given | options, device)
            done[name] = {"name": name, **scores}
            with open(out / "cells.jsonl", "a") as file:
                file.write(json.dumps(done[name]) + "\n")
            if stage == "instruct":  # nothing starts from it, and its LLM is large
                shutil.rmtree(out / "runs" / run)
        bar.update()
        bar.set_postfix_str(f"{run} {done[name]['accuracy_img']}")
        return done[name]

    # 1. Tune each loss at the short and at the long number of align steps, on the validation split.
    tuned, cells, ablations = {}, [], {}
    for loss in losses.CONTRASTIVE:
        for steps in (size["short"], size["long"]):
            tuned[f"{loss} {steps}"] = tune(cell, size, out, loss, steps)

    # 2. Measure after every number of align steps; after the short and the long one, also instruct.
    for seed in range(size["seeds"]):
        for loss in losses.CONTRASTIVE:
            for steps in size["budgets"]:
                best = tuned[f"{loss} {size['short'] if steps <= size['short'] else size['long']}"]
                align = align_options(loss, steps, seed, best["lr"], best["contrastive_weight"])
                entry = {"loss": loss, "steps": steps, "seed": seed}
                cells.append(entry | {"fraction": 0, **cell("align", **align)})
                for part in fractions_after(steps, size):
                    instruct = instruct_options(out, align, part, size["epochs"], best["instruct_lr"])
                    cells.append(entry | {"fraction": part, **cell("instruct", **instruct)})
        text = report(out, world.name, size, tuned, cells, ablations)  # of the seeds so far

    # 3. Ablate: other projectors, towers and prompts in the long alignment, with what was tuned for it.
    for name, (options, compared) in ABLATIONS.items() if size["ablations"] else ():
        for loss in compared:
            best, ablations[name, loss] = tuned[f"{loss} {size['long']}"], []
            for seed in range(size["ablations"]):
                align = align_options(loss, size["long"], seed, best["lr"], best["contrastive_weight"])
                scores = cell("align", ablation=name if options else "", **align, **options)
                ablations[name, loss].append(scores["accuracy_img"])
        text = report(out, world.name, size, tuned, cells, ablations)
    bar.close()
    return text


# ------------------------------------------------------------------------------------------------------------
# What is run


def tune(cell, size: dict, out: Path, loss: str, steps: int) -> dict:
    """The {"lr", "contrastive_weight", "instruct_lr"} that validate best for this loss and these steps."""
    def align(lr, weight):
        return align_options(loss, steps, TUNING_SEED, lr, weight)

    def align_score(pair):
        return cell("align", "val", **align(*pair))["accuracy_img"]

    def instruct_score(rate):
        total = 0.0
        for part in FEW_FRACTIONS:
            instruct = instruct_options(out, align(lr, weight), part, size["epochs"], rate)
            total += cell("instruct", "val", **instruct)["accuracy_img"]
        return total

    weights = size["weight"] if loss != "none" else (1.0,)
    lr, weight = best_of([(lr, weight) for lr in size["lr"] for weight in weights], align_score)
    instruct_lr = best_of(size["instruct_lr"], instruct_score)
    return {"lr": lr, "contrastive_weight": weight, "instruct_lr": instruct_lr}


def best_of(choices, score):
    """The choice with the highest score, the first of equals; nothing is run where there is no choice."""
    return choices[0] if len(choices) == 1 else max(choices, key=score)


def align_options(loss: str, steps: int, seed: int, lr: float, weight: float) -> dict:
    return {"contrastive": loss, "steps": steps, "seed": seed, "lr": lr, "contrastive_weight": weight}


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
    name = "{contrastive}-{steps}-seed{seed}-lr{lr}-weight{contrastive_weight}".format(**options)
    return f"{name}-{ablation.replace(' ', '-')}" if ablation else name


def planned_runs(size: dict) -> int:
    """How often `compare` asks for a cell, for the progress bar."""
    grid, rates = len(size["lr"]) * len(size["weight"]), len(size["instruct_lr"])
    tries = 0
    for choices in (len(size["lr"]), grid, grid, grid):  # one loss has no weight to choose
        tries += choices if choices > 1 else 0
    tries += 4 * len(FEW_FRACTIONS) * rates if rates > 1 else 0
    ablated = sum(len(compared) for _, compared in ABLATIONS.values())
    measured = len(size["budgets"]) + len(size["fractions"]) + len(FEW_FRACTIONS)
    return 2 * tries + 4 * size["seeds"] * measured + size["ablations"] * ablated


# ------------------------------------------------------------------------------------------------------------
# One run, and what OUT remembers of it


def train_and_score(out: Path, run: str, stage: str, world: Path, split: str, options: dict, device) -> dict:
    """Train the run, unless its folder is there, and score it. What it prints goes to runs.log."""
    folder = out / "runs" / run
    where = {"annotations": str(world / f"{stage}.json"), "images": str(world / "images"),
             "benchmarks": str(world), "out": str(folder), "save_every": 0, "preset": "tiny"}
    options = without_other_stage(stage, options) | where
    with open(out / "runs.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if not (folder / "config.json").exists():
            train.train_stage(train.configure(stage, options), device)
        return score_run(folder, world, split, device)


def without_other_stage(stage: str, options: dict) -> dict:
    """Align is always told in the plain template, and only there do words stand before the caption."""
    return {key: value for key, value in options.items() if key not in OTHER_STAGE[stage]}


def score_run(folder: Path, world: Path, split: str, device) -> dict:
    """Percentages on the world's ScienceQA and, for the test split, on its yes-or-no questions."""
    vlm, tokenizer, config = evaluation.load_run(folder, device)

    def scores(name, split=None):
        below = world / evaluation.BENCHES[name].folder
        return evaluation.answer_bench(vlm, tokenizer, config["template"], name, below, split)[0]

    scienceqa = scores("scienceqa", split)
    line = {"accuracy_img": scienceqa["accuracy_img"], "accuracy_txt": scienceqa["accuracy_txt"]}
    if split == "test":  # tuning needs no others
        line["pope"] = scores("pope")["accuracy"]
        line["mme"] = scores("mme")["accuracy_plus"]
    return line


def open_cells(out: Path, protocol: list) -> dict:
    """{name: scores} of the runs that `out` holds. ValueError for another protocol's, or a damaged line."""
    protocol, noted, file = json.dumps(protocol), out / "protocol.json", out / "cells.jsonl"
    if noted.exists() and read_json(noted) != json.loads(protocol):
        raise ValueError(f"{out}: holds a comparison with other options, towers or data; name another --out, "
                         "or remove it")
    out.mkdir(parents=True, exist_ok=True)
    noted.write_text(protocol)
    done = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            scores = json.loads(line)
            done[scores["name"]] = scores
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: a damaged line ({error}); without it, its run is done again") from None
    return done


def fingerprint(world: Path, given: dict) -> str:
    """A hash of the towers and the data of a comparison: cells of two worlds must not meet in one table."""
    config = train.configure("align", without_other_stage("align", given) | {"preset": "tiny"})
    towers = [config.vit, config.llm]
    for options, _ in ABLATIONS.values():
        towers += [options[name] for name in ("vit", "llm") if name in options]
    files = []
    for tower in towers:
        folder = resolve_model(tower)
        files += sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files += [world / "align.json", world / "instruct.json", world / "ScienceQA/problems.json"]
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
    parser.add_argument("--quick", action="store_true", help="few seeds, short runs, no tuning: in minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the comparison")
    parser.add_argument("--world", type=Path, default=Path("data/toy"),
                        help="folder of the data; the toy world is written there if there is none")
    ours, rest = parser.parse_known_args(argv)
    return ours, train.parse_args(rest, "python -m lab.compare")


def main():
    ours, given = parse_args()
    try:
        if clash := sorted(SET_HERE & given.keys()):
            raise ValueError(f"the comparison sets --{', --'.join(clash)} itself")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("the runs come one after another, in one process, not on several ranks")
        device = train.start_ranks()
        if not ours.world.exists():
            print(f"writing the toy world to {ours.world}")
            toy_world.write_world(ours.world)
        print(compare(QUICK if ours.quick else FULL, ours.out, ours.world, given, device))
    except (OSError, ValueError) as error:
        sys.exit(f"lab.compare: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("lab.compare: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
