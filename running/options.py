"""Options of a run: one dataclass, presets, and a command line that is made of its fields.

    given = parse_args()                    # {option: value}, only what was typed
    config = configure("align", given)      # defaults, then the preset, then its stage, then what was typed
"""

import argparse
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from data import PROMPTS, TEMPLATES
from losses import CONTRASTIVE
from plumbing.files import ROOT, named, read_text
from plumbing.llava import describe, find_projector
from plumbing.ranks import barrier, launch, rank, say
from running.checkpoint import GO_ON
from running.directory import is_checkpoint, is_unfinished

def option(default, help, choices=None, heading=None):
    return field(default=default, metadata={"help": help, "choices": choices, "heading": heading})


@dataclass
class Config:
    stage: str = option("all", "what to run", ("align", "instruct", "all"), heading="the run")
    preset: str = option("", "defaults (empty: 7b with CUDA, else tiny)",
                         ("", "tiny", "small", "speedrun", "7b", "13b"))
    out: str = option("", "run directory; with --stage all, the folder of both; empty: runs/PRESET[/STAGE]")
    init: str = option("", "what to start from: a run, an export or a LLaVA folder, whose towers and "
                           "projector are taken; or a projector's file. instruct needs one")
    seed: int = option(0, "of the projector's initial weights, the order of the data and its subset")
    dry_run: bool = option(False, "the plan, then 3 steps of random weights and data; nothing is written")
    save_every: int = option(0, "steps between checkpoints that --resume continues from; 0: none; gone with "
                              "the last step")
    resume: bool = option(False, "continue this run from its last checkpoint")
    vit: str = option("", "vision tower: a folder or a Hub id", heading="the model")
    llm: str = option("", "language tower: a folder or a Hub id")
    projector: str = option("mlp2x_gelu", "the bridge: linear, mlpKx_gelu, pixel_shuffle or resampler")
    feature_layer: int = option(-2, "the ViT's hidden state to project")
    dtype: str = option("", "of weights and activations; empty: bfloat16 or float16 with CUDA, else float32",
                        ("", "float32", "bfloat16", "float16"))
    annotations: str = option("", "LLaVA JSON of this stage", heading="the data")
    images: str = option("", "folder below which its images lie")
    val: str = option("", "records as in --annotations that are held out: their losses are logged as val_..")
    val_every: int = option(100, "steps from one measurement of these to the next; 0: only at both ends")
    benchmarks: str = option("", "folder below which eval.py looks for benchmarks, and lab/ for captions")
    data_fraction: float = option(1.0, "part of the records to use; smaller parts are nested in larger ones; "
                                  "with both stages: of instruct's")
    template: str = option("v1", "how a record becomes text; chat: the LLM's own; with both stages: of "
                          "instruct, like --fit", tuple(TEMPLATES))
    fit: str = option("pad", "how an image becomes square", ("crop", "pad"))
    max_length: int = option(2048, "most tokens in a row, image included; the rest is cut off")
    workers: int = option(0, "loader processes on each rank")
    cache: bool = option(False, "keep every sample in memory once it was read: for small data")
    features: str = option("", "file that keeps the ViT's features of all images, made once; for small data")
    contrastive: str = option("none", "align: the loss beside the captioning loss", tuple(CONTRASTIVE),
                              heading="the losses")
    contrastive_weight: float = option(1.0, "total = generative + weight * contrastive; with "
                                            "--contrastive_first and patch, 0 if it is not given")
    contrastive_balance: float = option(0.0, "instead: the weight that holds the contrastive gradient at "
                                        "this ratio to the captioning loss's, behind the projector; 0: off")
    contrastive_first: int = option(0, "steps of the patch loss alone, without the LLM, before all others")
    prompt: str = option("", f"before the caption, and the prompt loss's: {', '.join(PROMPTS)}, or "
                         "'after the image | after the caption' (empty: none, but with that loss compress, "
                         "of tiny describe)")
    epochs: float = option(1.0, "passes over the records", heading="the steps")
    steps: int = option(0, "steps with the captioning loss; 0: as many as the epochs need")
    batch: int = option(64, "samples in a step, over all ranks and micro-batches")
    micro_batch: int = option(64, "most samples of a rank in one pass of the LLM")
    micro_tokens: int = option(0, "most tokens of a rank in one pass, padding included; 0: any number")
    lr: float = option(1e-3, "peak learning rate: linear warm-up, then cosine to zero")
    warmup_ratio: float = option(0.03, "part of the steps that warm up")
    weight_decay: float = option(0.0, "AdamW's, for matrices only")
    clip: float = option(0.0, "largest global gradient norm; 0: no clipping, as in LLaVA's own runs")
    checkpointing: str = option("none", "of the LLM's blocks", ("none", "every", "every-other"))
    compile: bool = option(False, "torch.compile of the LLM's blocks: faster on a GPU; needs a C++ compiler")
    shard: bool = option(False, "ZeRO: each rank keeps 1/W of gradients, master weights and moments")


# tiny: rates chosen on the toy world's validation split. 7b, 13b: LLaVA-1.5's, after 1,000 steps of
# the patch loss. On real towers that helped most (lab/README.md); the plain sum: --contrastive patch.
LLAVA = {
    "common": dict(vit="openai/clip-vit-large-patch14-336", llm="lmsys/vicuna-7b-v1.5", benchmarks="data",
                   workers=4, checkpointing="every-other", save_every=500),
    "align": dict(annotations="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                  images="data/LLaVA-Pretrain/images", template="plain", fit="crop", contrastive="patch",
                  contrastive_first=1000, batch=256, micro_batch=16, checkpointing="none", lr=1e-3),
    "instruct": dict(annotations="data/LLaVA-Instruct/llava_v1_5_mix665k.json", images="data/LLaVA-Instruct",
                     batch=128, micro_batch=16, micro_tokens=8192, lr=2e-5, shard=True),
}
PRESETS = {
    "tiny": {
        "common": dict(vit="lab/towers/tiny-vit", llm="lab/towers/tiny-llm", images="data/toy/images",
                       benchmarks="data/toy", clip=1.0, save_every=100, cache=True),
        "align": dict(annotations="data/toy/align.json", template="plain", fit="crop", contrastive="patch",
                      epochs=12.0, batch=64, micro_batch=64, lr=2e-3),
        "instruct": dict(annotations="data/toy/instruct.json", epochs=4.0, batch=32, micro_batch=32, lr=4e-4),
    },
    "small": {  # for one consumer GPU
        "common": LLAVA["common"] | dict(vit="google/siglip-base-patch16-224",
                                         llm="HuggingFaceTB/SmolLM2-135M-Instruct", checkpointing="none"),
        "align": LLAVA["align"],
        "instruct": LLAVA["instruct"] | dict(template="chat", lr=1e-4, shard=False),
    },
    "speedrun": {  # the NanoVLM speedrun's recipe, whose naflex tower takes as many patches of one picture
        "common": LLAVA["common"] | dict(vit="google/siglip2-so400m-patch16-256", llm="Qwen/Qwen3-0.6B",
                                         checkpointing="none"),
        "align": LLAVA["align"] | dict(contrastive="none", contrastive_first=0, steps=2180),
        "instruct": LLAVA["instruct"] | dict(annotations="data/LLaVA-NeXT/llava_next.json", template="chat",
                                             images="data/LLaVA-NeXT", batch=64, steps=11540, shard=False),
    },
    "7b": LLAVA,
    "13b": LLAVA | {"common": LLAVA["common"] | dict(llm="lmsys/vicuna-13b-v1.5", checkpointing="every"),
                    "align": LLAVA["align"] | dict(checkpointing="every")},
}


def boolean(text: str) -> bool:
    """The value of "true" or "false". ValueError for any other word."""
    return bool(("false", "true").index(text.lower()))


def parse_args(argv=None, prog=None) -> dict:
    """The options that are typed, and only those. Unknown flags and wrong types are errors."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--OPTION VALUE ...]",
        description="Train a vision-language model: the align stage, the instruct stage, or both.",
        epilog="A preset changes many defaults. A run's plan and its config.json have the values in force; "
               "running/options.py lists the presets.",
        allow_abbrev=False,
    )
    group = parser
    for f in fields(Config):
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        choices = f.metadata["choices"]
        how = {"type": f.type}
        if f.type is bool:  # `--resume` alone means True; `--resume False` is False, not the truth of a text
            how = {"type": boolean, "nargs": "?", "const": True}
        default = "empty" if f.default == "" else f.default
        help = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        how["metavar"] = None if choices else f.name.upper()
        group.add_argument(f"--{f.name}", choices=choices, default=argparse.SUPPRESS, help=help, **how)
    return vars(parser.parse_args(argv))


OF_ALIGN = ("contrastive", "contrastive_weight", "contrastive_balance", "contrastive_first", "prompt")
OF_INSTRUCT = ("data_fraction", "template", "fit")


def of_stage(stage: str, given: dict) -> dict:
    """The options without those that belong to the other stage, for a run of both. ValueError for what the
    stages do not share: lists of records, and what a stage starts from."""
    for name in given.keys() & {"annotations", "val", "init"}:
        raise ValueError(f"--{name} is of one stage: first --stage align, then --stage instruct")
    others = OF_INSTRUCT if stage == "align" else OF_ALIGN
    return {key: value for key, value in given.items() if key not in others}


def of_both(given: dict) -> list:
    """The options of both stages, of which the second is to start from the first."""
    both = []
    for stage in ("align", "instruct"):
        both.append(configure(stage, of_stage(stage, given), init_is_to_come=True))
    return both


def configure(stage: str, given: dict, init_is_to_come: bool = False) -> Config:
    """The options of a stage. ValueError for what cannot be. `init_is_to_come`: what instruct starts from is
    yet to be trained, whatever there is now."""
    default_preset = "7b" if torch.cuda.is_available() else "tiny"
    preset = given.get("preset") or default_preset
    values = PRESETS[preset]["common"] | PRESETS[preset].get(stage, {})
    if "contrastive" in given:  # a loss that is named is a plain sum
        values.pop("contrastive_first", None)
    if "epochs" in given:  # not the preset's number of steps
        values.pop("steps", None)
    values |= given | {"stage": stage, "preset": preset}
    if values.get("contrastive") == "patch" and values.get("contrastive_first"):
        values.setdefault("contrastive_weight", 0.0)  # what follows is captioning alone
    config = Config(**values)
    if not config.prompt:  # the tiny LLM knows only "describe", behind which a real one's captions look alike
        with_loss = "describe" if preset == "tiny" else "compress"  # (lab/real.md, table 16)
        config.prompt = with_loss if "prompt" in CONTRASTIVE[config.contrastive] else "none"
    if not config.out:
        config.out = f"runs/{preset}/{stage}"
    if not config.init and stage == "instruct":
        config.init = align_run(config)
    launched = Path(config.out) / "launch"
    if launch() and launched.exists() and launch() in read_text(launched).split("\n"):
        config.resume = True  # torchrun --max-restarts
    refuse(config)
    if "contrastive_weight" in given and config.contrastive == "none":
        raise ValueError("--contrastive_weight: there is no contrastive loss, with --contrastive none")
    if config.init and not (init_is_to_come or awaits_align(config)):
        follow_init(config, given)
    return config


def align_run(config: Config) -> str:
    """Where instruct looks for a run to start from."""
    return f"runs/{config.preset}/align"


def awaits_align(config: Config) -> bool:
    """Whether instruct is to start from the preset's align run, and that is not there or not finished yet."""
    run = align_run(config)
    return config.init == run and (not Path(run).exists() or is_unfinished(run))


def follow_init(config: Config, given: dict):
    """Take all that `config.init` has: its towers, tuned or not, and the kind of its projector.

    ValueError for one that is typed and differs. A preset's names do not count.
    """
    run = Path(config.init).parent if Path(config.init).is_file() else Path(config.init)
    if run.resolve() == Path(config.out).resolve():
        raise ValueError(f"--out {config.out} is what the run starts from; name another")
    if is_unfinished(run):
        raise ValueError(f"{config.init}: not finished; name a copy of a checkpoint, or finish it: {GO_ON}")
    if is_checkpoint(run):
        raise ValueError(f"{config.init}: copy it first; its run removes it, and this one needs it")
    with named(config.init, "cannot be started from"):
        if Path(config.init).is_file() or find_projector(config.init).name == "mm_projector.bin":
            return  # a projector alone: it fits these towers or is refused
        found = describe(config.init)
    for name in ("vit", "llm", "projector", "feature_layer"):
        value = found[name]
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]}: {config.init} has {value!r}, which is taken")
        setattr(config, name, value)


def refuse(config: Config):
    """ValueError for the first thing in the options that cannot be."""
    for name, value in asdict(config).items():
        is_number = type(value) in (int, float) and name != "feature_layer"
        if is_number and not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be a number from 0 up")
    if not 0 < config.data_fraction <= 1:
        raise ValueError(f"--data_fraction is {config.data_fraction}; it must be above 0 and at most 1")
    if config.warmup_ratio > 1:
        raise ValueError(f"--warmup_ratio is {config.warmup_ratio}; it is a part of the steps, at most 1")
    if config.seed >= 2**63:
        raise ValueError(f"--seed is {config.seed}; it must be below 2**63")
    if min(config.batch, config.micro_batch, config.epochs, config.lr) == 0:
        raise ValueError("--batch, --micro_batch, --epochs and --lr must be above 0")
    if config.contrastive != "none" and config.stage != "align":
        raise ValueError("--contrastive belongs to the align stage")
    has_prompt = config.prompt != "none" or "prompt" in CONTRASTIVE[config.contrastive]
    if has_prompt and config.template != "plain":
        raise ValueError("a prompt, and its loss, need --template plain: an image, the prompt, a caption")
    if config.prompt not in PROMPTS and config.prompt.count(" | ") != 1:
        raise ValueError(f"--prompt {config.prompt!r}: not {', '.join(PROMPTS)}, nor 'text | text'")
    if config.contrastive_balance and config.contrastive == "none":
        raise ValueError("--contrastive_balance: nothing to balance with --contrastive none")
    if config.contrastive_first and "patch" not in CONTRASTIVE[config.contrastive]:
        raise ValueError("--contrastive_first needs the patch loss: --contrastive patch or both")


def hub_id(config: Config) -> str:
    """Where the records of a stage are to be had."""
    if "LLaVA-NeXT" in config.annotations:
        return "lmms-lab/LLaVA-NeXT-Data, written out"
    if config.stage == "align":
        return "liuhaotian/LLaVA-Pretrain"
    return "liuhaotian/LLaVA-Instruct-150K (mix665k)"


def ensure_init(config):
    """FileNotFoundError if the run that instruct starts from is not there, or not finished."""
    if awaits_align(config):
        raise FileNotFoundError(f"{config.init}: no align run to start from, or an unfinished one; `python "
                                f"train.py --stage align --preset {config.preset}` makes one, and with "
                                "--resume goes on")


def ensure_data(config):
    """Write the toy world if it is wanted and missing. FileNotFoundError for other data, with where to get
    it."""
    if rank() == 0 and config.annotations.startswith("data/toy/") and not Path("data/toy").exists():
        say("writing the toy world to data/toy")
        subprocess.run([sys.executable, "-m", "lab.toy_world", Path("data/toy").absolute()], cwd=ROOT)
    barrier()
    if not Path(config.annotations).exists():
        raise FileNotFoundError(f"{config.annotations}: no such file. Name a LLaVA JSON, as of the Hub's "
                                f"{hub_id(config)}, with --annotations and its pictures with --images "
                                f"(now {config.images}); or take --preset tiny. No data: --dry_run, or "
                                f"`python -m running.plan --preset {config.preset}`")
