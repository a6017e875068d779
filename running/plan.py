"""What a run will take, told before anything is loaded: parameters, memory, disk, passes, operations, hours.

    python -m running.plan --preset 7b --gpus 8 --memory 80

plans for GPUs that are not here, with every option of train.py and neither weights nor data: the towers of
the presets are known by their shapes, and a list of theirs that is missing by its count. The largest
micro-batch is one of typical samples; a run's own plan knows its records, and so its longest rows.
"""

import argparse
import itertools
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from plumbing.llava import why_not_exported
from plumbing.ranks import command, on_every_rank, rank, say
from running import costs, options
from running.checkpoint import GO_ON
from running.costs import count_weights
from running.memory import GIB, memory_parts
from running.order import count_steps, deal, largest_micro_batch, split_batch, subset
from running.records import parse_records

RECORDS = {  # of the presets' lists
    "blip_laion_cc_sbu_558k.json": (558128, "LLaVA's"),
    "llava_v1_5_mix665k.json": (665298, "LLaVA's"),
    "llava_next.json": (779000, "LLaVA-NeXT's"),  # to the thousand
    "align.json": (4000, "the toy world's"),
    "instruct.json": (2000, "the toy world's"),
}


# ------------------------------------------------------------------------------------------------------------
# Whether it fits

def what_fits(config, vlm, dtype, largest: tuple, world: int, has: float) -> str:
    """The first change that brings a rank below `has` GiB, and its sum; empty if none does.

    In this order: --shard, a smaller --micro_batch, --checkpointing every, more GPUs, each with those before.
    """
    rows, tokens = largest
    size, _ = split_batch(config, world)
    gpus = [world * 2**k for k in range(8)]
    ways = [config.checkpointing, "every"]
    sizes = [size // 2**k for k in range(size.bit_length())]
    shards = [config.shard, True]
    for W, way, size, shard in itertools.product(gpus, ways, sizes, shards):
        part = config.batch // W
        if config.batch % W or part % min(size, part):
            continue
        changed = replace(config, checkpointing=way, micro_batch=size, shard=shard)
        needs = sum(memory_parts(changed, vlm, dtype, min(rows, size, part), tokens, W).values())
        if needs <= has:
            words = [f"{W} GPUs"] if W > world else []
            return f"{', '.join(words + differences(config, changed))}: {needs:.3g} GiB"
    return ""


def differences(config, changed) -> list:
    """What to type so that a run has the options of `changed`."""
    words = []
    for name, value in asdict(changed).items():
        if value != getattr(config, name):
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return words


# ------------------------------------------------------------------------------------------------------------
# What is printed

def contrastive_words(config) -> str:
    """The contrastive loss, and its weight if it is no plain sum."""
    words = [config.contrastive]
    if config.contrastive_first:
        words.append(f"alone in the first {config.contrastive_first} steps")
    if config.contrastive_balance:
        words.append(f"at {config.contrastive_balance} of the captioning gradient")
    elif config.contrastive_weight != 1:
        words.append(f"at weight {config.contrastive_weight:g}")
    return ", ".join(words)


def print_plan(config, vlm, dtype, steps: int, largest: tuple, world: int, has: float):
    """What a reader wants to know before the first step. ValueError if it does not fit into a rank's memory.

    `largest`: rows of the largest micro-batch, and their tokens. `has`: the GiB that each of `world` ranks
    may have.
    """
    why = "a GPU" if torch.cuda.is_available() else "no GPU"
    micro_batch, _ = split_batch(config, world)
    say(f"\nstage {config.stage}, preset {config.preset} ({why} here): {steps} steps of {config.batch} on "
        f"{world} rank(s) in micro-batches of {micro_batch}")
    say(f"contrastive loss: {contrastive_words(config)}")
    if config.preset == "small":
        say("the learning rates of this preset are a guess: nobody has tuned them")
    say(f"{'module':<12}{'parameters':>16}{'learning':>16}  source")
    for name in ("vit", "projector", "llm"):
        part = getattr(vlm, name)
        learning = count_weights(part, only_learning=True)
        say(f"{name:<12}{count_weights(part):>16,}{learning:>16,}  {getattr(config, name)}")
    say(f"{str(dtype).removeprefix('torch.')}; norms, softmax, losses and optimizer in float32")
    why_not = why_not_exported(vlm.projector_kind)
    if why_not:
        say(f"cannot be exported: {why_not}")
    memory = memory_parts(config, vlm, dtype, *largest, world)
    needs = sum(memory.values())
    rows, tokens = largest
    say(f"memory of a rank with {rows} rows of {tokens} tokens, of {has:.3g} GiB:")
    say(f"    {in_parts(memory)}")
    if needs > has:
        way = what_fits(config, vlm, dtype, largest, world, has) or "nothing but a smaller preset"
        raise ValueError(f"{config.preset} {config.stage} needs about {needs:.3g} GiB a rank, not {has:.3g}; "
                         f"what fits: {way}")


def in_parts(sizes: dict) -> str:
    """The sum of some GiB, and what it is made of."""
    parts = ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
    return f"{sum(sizes.values()):.3g} ({parts})"


def print_passes(config, records: int, steps: int):
    """How often each record comes by. Contrast first has as many steps for few records as for many."""
    used = len(subset(records, config.data_fraction, config.seed))
    first = config.contrastive_first * config.batch / used
    after = steps * config.batch / used - first
    words = f"{used:,} records: {in_digits(after)} passes"
    if first:
        words += f" behind {in_digits(first)} of contrast first"
    if first > 10:
        words += ", many for so few records (--contrastive_first)"
    say(words)


def in_digits(number: float) -> str:
    """A number to three figures: 1,060 and not 1.06e+03."""
    return f"{float(f'{number:.3g}'):,g}"


def print_costs(config, vlm, steps: int, gpus: int):
    """Operations of a step and of the stage, and the hours of so many H100s."""
    step = costs.flops_per_step(config, vlm)
    total = sum(step.values())
    tokens = config.batch * costs.row_length(config, vlm)
    say(f"a step: {tokens:,} tokens, {total / 1e15:.3g} PFLOP")
    say("    " + ", ".join(f"{name} {part / total:.2g}" for name, part in step.items()))
    stage = costs.flops_of_stage(config, vlm, steps)
    say(f"the stage: {stage / 1e18:.3g} EFLOP, {costs.hours(stage, gpus):.3g} h on {gpus} H100(s) at "
        f"{100 * costs.USED:.0f} % of their peak")


def disk_parts(config, vlm, dtype, steps: int) -> dict:
    """GiB on disk, by purpose: what learned, and up to three checkpoints, each of that and 12 bytes a number.

    Two checkpoints are kept while a third is being written. Those of a resumed run are there already.
    """
    copies = 0
    if config.save_every and not config.resume:
        copies = min(3, (steps - 1) // config.save_every)
    weights = count_weights(vlm, only_learning=True) * dtype.itemsize / GIB
    states = count_weights(vlm, only_learning=True) * 12 / GIB
    return {"the run": weights, f"{copies} checkpoints": copies * (weights + states)}


def check_disk(config, vlm, dtype, steps: int):
    """ValueError if the disk cannot hold the run. Says how its checkpoints are used."""
    out = Path(config.out).absolute()
    existing = next(path for path in (out, *out.parents) if path.exists())
    has = shutil.disk_usage(existing).free / GIB
    sizes = disk_parts(config, vlm, dtype, steps)
    needs = sum(sizes.values())
    say(f"on disk, GiB: {in_parts(sizes)} of {has:.3g} that are free")
    if needs > has:
        raise ValueError(f"{config.out}: the run and its checkpoints take {needs:.3g} GiB, and its disk has "
                         f"{has:.3g}: another --out, or a larger --save_every (0: no checkpoints)")
    if config.save_every:
        say(f"a checkpoint every {config.save_every} steps: if the run is stopped, {GO_ON}")


# ------------------------------------------------------------------------------------------------------------
# A plan without hardware, weights and data

def configs_of(given: dict) -> list:
    """The configuration of each stage that is asked for. FileNotFoundError for a list that is typed and
    missing."""
    stage = given.get("stage", "all")
    given = given | {"resume": False}
    typed = given.get("annotations")
    if stage != "all":
        if typed and not Path(typed).exists():
            raise FileNotFoundError(f"{typed}: no such file; without --annotations, the preset's is counted")
        return [options.configure(stage, given)]
    return options.of_both(given)


def count_records(config) -> tuple:
    """(the records of a stage's list, nothing). Without that file: (those of the preset's list, whose)."""
    file = Path(config.annotations)

    def count():
        return sum(1 for _ in parse_records(file)) if rank() == 0 and file.exists() else None

    counted = on_every_rank(count)[0]
    if counted is not None:
        return counted, ""
    return RECORDS[file.name]


def typical_step(config, vlm, world: int, text: int = 0) -> tuple:
    """(dealt, lengths) as from `order.deal`: one step of samples with an image and `text` tokens (0: as many
    as a typical sample of the stage has)."""
    length = 1 + vlm.num_image_tokens + (text or costs.TEXT_TOKENS[config.stage])
    lengths = [length] * config.batch
    return deal(config, lengths, 1, world), lengths


def plan_stage(config, world: int, has: float) -> bool:
    """Print the plan of one stage. Returns whether it fits."""
    vlm = costs.outline(config)
    dtype = getattr(torch, config.dtype or "bfloat16")
    records, whose = count_records(config)
    steps = count_steps(config, records)
    largest = largest_micro_batch(*typical_step(config, vlm, world))
    fits = True
    try:
        print_plan(config, vlm, dtype, steps, largest, world, has)
    except ValueError as error:
        fits = False
        say(str(error).replace("; ", "\n    "))
    print_passes(config, records, steps)
    if whose:
        say(f"    the count is {whose}: there is no {config.annotations}")
    say(f"on disk, GiB: {in_parts(disk_parts(config, vlm, dtype, steps))}")
    print_costs(config, vlm, steps, world)
    return fits


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m running.plan", description="What a run would take, on GPUs that need not be here.",
        epilog="Takes every option of train.py, too; `python train.py --help` lists them.",
        allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1, help="ranks, one for each GPU [1]")
    parser.add_argument("--memory", type=float, default=80, help="of a GPU, GiB; 2 of them go to CUDA [80]")
    own, others = parser.parse_known_args(argv)
    given = options.parse_args(others, parser.prog)
    with command("running.plan"):
        if own.gpus < 1:
            raise ValueError(f"--gpus is {own.gpus}; it must be at least 1")
        fits = [plan_stage(config, own.gpus, own.memory - 2) for config in configs_of(given)]
        if not all(fits):
            sys.exit(1)


if __name__ == "__main__":
    main()
