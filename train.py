"""Training, from the command line to the last checkpoint, in the order in which things happen.

    python train.py                                        # no GPU: the tiny preset, both stages, scored
    torchrun --nproc_per_node=8 train.py --stage align     # with GPUs: patch loss, then LLaVA's stage 1
    torchrun --nproc_per_node=8 train.py --stage instruct  # stage 2: projector and LLM on instructions

Two stages on LLaVA's recipe (arXiv 2310.03744). Align: image-caption pairs, only the projector learns, with
the captioning loss and a contrastive loss before or beside it. Instruct: conversations, the projector and the
LLM learn, with the next-token loss alone. The ViT is frozen throughout. A step is one update from a batch
over all ranks; each rank takes its share of it in micro-batches, as many samples as fit through the LLM at
once.

What people usually take from a framework is written out here, and the models know nothing of it: data
parallelism and mixed precision (`DataParallelAdamW`); gradient checkpointing is llm.py's `checkpointed`.

Read next: eval.py, which asks the trained model.
"""

import argparse
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import losses
from llm import (FAMILIES, LLM, checkpoint_blocks, compile_blocks, load_llm_config, random_state,
                 set_random_state)
from projector import VLM, find_projector
from vit import ViT, load_vit_config
from plumbing.files import named, read_json, read_text, whole
from plumbing.ranks import (all_gather, barrier, choose_dtype, command, reduce_scatter, peak_memory, rank, say, start_ranks,
                            sum_over_ranks, total_memory, world_size)

ROOT = Path(__file__).parent

# ------------------------------------------------------------------------------------------------------------
# 1. What to do: one dataclass, the presets, and a command line made from them

def option(default, help, choices=None, heading=None):
    return field(default=default, metadata={"help": help, "choices": choices, "heading": heading})


@dataclass
class Config:
    stage: str = option("all", "what to run", ("align", "instruct", "all"), heading="the run")
    preset: str = option("", "defaults (empty: 7b with CUDA, else tiny)",
                         ("", "tiny", "small", "speedrun", "7b", "13b"))
    out: str = option("", "run directory; with --stage all, the folder of both; empty: runs/PRESET[/STAGE]")
    init: str = option("", "align run or mm_projector.bin to start from; instruct needs one")
    seed: int = option(0, "of the projector's initial weights, the order of the data and its subset")
    dry_run: bool = option(False, "3 steps at full shape: random weights and data, nothing read or written")
    save_every: int = option(0, "steps between checkpoints that --resume continues from; 0: none")
    resume: bool = option(False, "continue this run from its last checkpoint")
    vit: str = option("", "vision tower: a folder or a Hub id", heading="the model")
    llm: str = option("", "language tower: a folder or a Hub id")
    projector: str = option("mlp2x_gelu", "the bridge: linear, mlpKx_gelu, pixel_shuffle or resampler")
    feature_layer: int = option(-2, "the ViT's hidden state to project")
    dtype: str = option("", "of weights and activations; empty: bfloat16 or float16 with CUDA, else float32",
                        ("", "float32", "bfloat16", "float16"))
    annotations: str = option("", "LLaVA JSON of this stage", heading="the data")
    images: str = option("", "folder below which its images lie")
    benchmarks: str = option("", "folder below which eval.py looks for ScienceQA, POPE, MME and captions")
    data_fraction: float = option(1.0, "part of the records to use; smaller parts are nested in larger ones")
    template: str = option("v1", "how a record becomes text; chat: the LLM's own", tuple(data.TEMPLATES))
    fit: str = option("pad", "how an image becomes square", ("crop", "pad"))
    max_length: int = option(2048, "most tokens in a row, image included; the rest is cut off")
    workers: int = option(0, "loader processes on each rank")
    cache: bool = option(False, "keep every sample in memory once it was read: for small data")
    features: str = option("", "file that keeps the ViT's features of all images, made once; for small data")
    contrastive: str = option("none", "align: the loss beside the captioning loss", (*losses.CONTRASTIVE,),
                              heading="the losses")
    contrastive_weight: float = option(1.0, "total = generative + weight * contrastive; with "
                                            "--contrastive_first and patch, 0 if it is not given")
    contrastive_balance: float = option(0.0, "instead: the weight that makes the contrastive gradient this "
                                        "share of the captioning loss's, behind the projector; 0: off")
    contrastive_first: int = option(0, "steps of the patch loss alone, without the LLM, before all others")
    prompt: str = option("", f"before the caption, and the prompt loss's: {', '.join(data.PROMPTS)}, or "
                         "'after the image | after the caption' (empty: describe with that loss, else none)")
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
    group_by_length: bool = option(False, "LLaVA's own order: batches of one modality and similar lengths; "
                                          "else random ones, spread over ranks and micro-batches by length")


# tiny: rates chosen on the toy world's validation split. 7b, 13b: LLaVA-1.5's, after 1,000 steps of
# the patch loss. On real towers that helped most (lab/README.md); the papers' plain sum: --contrastive patch.
LLAVA = {
    "common": dict(vit="openai/clip-vit-large-patch14-336", llm="lmsys/vicuna-7b-v1.5", benchmarks="data",
                   workers=4, checkpointing="every", save_every=500),
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
    "13b": LLAVA | {"common": LLAVA["common"] | dict(llm="lmsys/vicuna-13b-v1.5"),
                    "align": LLAVA["align"] | dict(checkpointing="every")},
}


def boolean(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))  # ValueError for any other word


def build_parser(prog, values: dict):
    """The command line, made of Config's fields; behind the help of each, its text in `values`."""
    what, examples, stages, *_ = __doc__.split("\n\n")
    brackets = "In [brackets]: the value in force, with the preset, stage and options beside --help."
    parser = argparse.ArgumentParser(prog=prog, usage="%(prog)s [--OPTION VALUE ...]", add_help=False,
                                     description="\n\n".join([what, stages, brackets]), allow_abbrev=False,
                                     epilog=f"examples:\n{examples}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="this text")
    for f in fields(Config):
        if heading := f.metadata["heading"]:
            group = parser.add_argument_group(heading)
        # `--resume` alone means True; `--resume False` is False, not the truth of a string
        how = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        choices, help = f.metadata["choices"], f"{f.metadata['help']} [{values.get(f.name)}]"
        group.add_argument(f"--{f.name}", choices=choices, default=argparse.SUPPRESS,
                           help=help.replace("%", "%%"), metavar=None if choices else f.name.upper(), **how)
    return parser


def parse_args(argv=None, prog=None) -> dict:
    """The options given on the command line, and only those. Unknown flags and wrong types are errors."""
    parser = build_parser(prog, {})
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        with command(parser.prog):
            build_parser(prog, in_force(given)).print_help()
            sys.exit()
    return given


def in_force(given: dict) -> dict:
    """{option: its value, as text}; of both stages, where both are to run and differ."""
    stage, found = given.get("stage", "all"), {}
    stages = ("align", "instruct") if stage == "all" else (stage,)
    configs = [configure(s, of_stage(s, given) if stage == "all" else given) for s in stages]
    for f in fields(Config):
        values = [str(getattr(config, f.name)) or "empty" for config in configs]
        differ = len({*values}) > 1
        found[f.name] = ", ".join(map(" ".join, zip(stages, values))) if differ else values[0]
    return found | {"stage": stage}


def of_stage(stage: str, given: dict) -> dict:
    """The options without those that are the other stage's alone, for a run of both."""
    of_align = "contrastive", "contrastive_weight", "contrastive_balance", "contrastive_first", "prompt"
    others = {"align": ("data_fraction", "init"), "instruct": of_align}
    return {key: value for key, value in given.items() if key not in others[stage]}


def configure(stage: str, given: dict) -> Config:
    """Defaults, then the preset, then its stage, then the command line. ValueError for what cannot be."""
    preset = given.get("preset") or ("7b" if torch.cuda.is_available() else "tiny")
    values = PRESETS[preset]["common"] | PRESETS[preset].get(stage, {})
    if "contrastive" in given:  # a loss that is named is the papers' plain sum
        values.pop("contrastive_first", None)
    values |= given | {"stage": stage, "preset": preset}
    if values.get("contrastive") == "patch" and values.get("contrastive_first"):
        values.setdefault("contrastive_weight", 0.0)  # what follows is captioning alone
    config = Config(**values)
    if config.contrastive != "none" and stage != "align":
        raise ValueError("--contrastive belongs to the align stage")
    has_prompt_loss = "prompt" in losses.CONTRASTIVE[config.contrastive]
    config.prompt = config.prompt or ("describe" if has_prompt_loss else "none")
    if (has_prompt_loss or config.prompt != "none") and config.template != "plain":
        raise ValueError("a prompt, and its loss, need --template plain: an image, the prompt, a caption")
    if config.prompt not in data.PROMPTS and config.prompt.count(" | ") != 1:
        raise ValueError(f"--prompt {config.prompt!r}: not {', '.join(data.PROMPTS)}, nor 'text | text'")
    for name, value in asdict(config).items():
        is_number = type(value) in (int, float) and name != "feature_layer"
        if is_number and not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be a number from 0 up")
    if config.seed >= 2**63:
        raise ValueError(f"--seed is {config.seed}; it must be below 2**63")
    if min(config.batch, config.micro_batch, config.epochs) == 0:
        raise ValueError("--batch, --micro_batch and --epochs must be above 0")
    if config.contrastive_balance and config.contrastive == "none":
        raise ValueError("--contrastive_balance: nothing to balance with --contrastive none")
    if config.contrastive_first and "patch" not in losses.CONTRASTIVE[config.contrastive]:
        raise ValueError("--contrastive_first needs the patch loss: --contrastive patch or both")
    config.out = config.out or f"runs/{preset}/{stage}"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun --max-restarts
    config.resume |= restarts > 0 and (Path(config.out) / "log.jsonl").exists()
    config.init = config.init or (f"runs/{preset}/align" if stage == "instruct" else "")
    return config


# ------------------------------------------------------------------------------------------------------------
# 2. Data parallelism and AdamW, by hand

class Bucket:
    """Some parameters of one dtype, laid end to end in flat buffers that are padded to a multiple of W.

    weight       (n,) in the model's dtype; each parameter becomes a view into it
    gradient     (n,) fp32, where this rank's gradients add up; None before backward, and once it is sent
    master       (n,) or, sharded, (n / W,): the fp32 weights that this rank updates. Of a model in fp32 they
                 are `weight` itself, or this rank's slice of it
    master.grad  the gradient of the whole step, summed over the ranks
    """

    def __init__(self, parameters, shard: bool):
        self.parameters, self.shard = parameters, shard
        size = sum(parameter.numel() for parameter in parameters)
        self.weight = parameters[0].detach().new_zeros(size + -size % world_size())  # (n,)
        self.place, start = {}, 0  # of each parameter, its slice
        for parameter in parameters:
            self.place[parameter] = place = slice(start, start + parameter.numel())
            self.weight[place] = parameter.detach().flatten()
            parameter.data = self.weight[place].view_as(parameter)
            start = place.stop
        if world_size() > 1:
            dist.broadcast(self.weight, src=0)  # equal seeds are a habit, not a guarantee
        self.master = losses.at_least_fp32(self.own(self.weight))
        self.gradient, self.waiting, self.is_sent = None, set(), False

    def own(self, flat):
        """The part of a flat buffer that this rank updates: all of it, or the rank-th of W slices."""
        return flat.chunk(world_size())[rank()] if self.shard else flat

    def open(self):
        self.gradient = self.weight.new_empty(len(self.weight), dtype=self.master.dtype)
        self.gradient[-world_size() :].zero_()  # the padding; what stands before it is written over
        self.waiting = set(self.parameters)  # those whose gradient has yet to come
        self.empty = set(self.parameters)  # those that have none at all

    def add(self, parameter):
        """Move the parameter's gradient here, whatever its dtype: the first is copied, others are added."""
        if self.gradient is None:
            self.open()
        place = self.gradient[self.place[parameter]].view_as(parameter)
        (place.copy_ if parameter in self.empty else place.add_)(parameter.grad)
        parameter.grad = None
        self.waiting.discard(parameter), self.empty.discard(parameter)

    def close(self):
        """The whole gradient: no gradient counts as zero."""
        for parameter in self.empty:
            self.gradient[self.place[parameter]].zero_()
        gradient, self.gradient, self.is_sent = self.gradient, None, True
        return gradient


def fill_buckets(parameters, bucket_size: int, shard: bool):
    """Yield buckets of about `bucket_size` elements, each of one dtype, and of matrices or of vectors."""
    groups = {}
    for parameter in reversed(list(parameters)):  # backward meets the last layers first
        groups.setdefault((parameter.dtype, parameter.ndim > 1), []).append(parameter)
    for group in groups.values():
        members = []
        for parameter in group:
            if members and sum(p.numel() for p in members) + parameter.numel() > bucket_size:
                yield Bucket(members, shard)
                members = []
            members.append(parameter)
        yield Bucket(members, shard)


class DataParallelAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) whose gradients are summed over all ranks. In one
    step:

    1. `backward` fills the buckets: a hook on each parameter adds its gradient to the bucket's fp32 buffer.
    2. During the last backward (`last_backward()` was called) a bucket whose parameters are all in is sent at
       once, while backward goes on with earlier layers. Sums, not means: see losses.py, "Reduction".
    3. `step` sends what is left (no gradient counts as zero), waits, clips by the global norm, updates fp32
       masters, of which the weights are rounded copies: in bfloat16 alone, updates of 2e-5 on weights of 0.02
       would mostly round to nothing.

    With `shard` (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054) the sum is a reduce-scatter: each rank
    keeps gradients, masters and moments of only its 1/W of every bucket, and an all-gather returns the new
    weights. Then a bucket leaves in *every* backward as soon as it is full, and its buffer is freed, so that
    two or three whole buckets exist at a time: less memory, paid with a message per micro-batch.

    float16 has so little range that small gradients vanish. So losses are multiplied by `loss_scale` before
    backward and gradients divided by it here; a step that overflows is skipped and halves the scale, 2000
    good ones double it. Elsewhere the scale is 1, and a gradient that is not finite is an error.
    """

    def __init__(self, parameters, weight_decay=0.0, clip=0.0, betas=(0.9, 0.999), shard=False,
                 bucket_size=2**22):
        self.clip, self.shard = clip, shard and world_size() > 1
        self.buckets = list(fill_buckets(parameters, bucket_size, self.shard))
        matrices = [bucket.master for bucket in self.buckets if bucket.parameters[0].ndim > 1]
        vectors = [bucket.master for bucket in self.buckets if bucket.parameters[0].ndim <= 1]  # do not decay
        self.adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                        {"params": vectors, "weight_decay": 0.0}], betas=betas, fused=True)
        # A parameter keeps its hook alive, so the hook must not keep the optimizer and all its buffers alive.
        self.bucket_of, hook = {}, partial(DataParallelAdamW.collect, weakref.proxy(self))
        for bucket in self.buckets:
            self.bucket_of |= dict.fromkeys(bucket.parameters, bucket)
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(hook)
        self.is_last, self.messages = False, []
        self.is_half = any(bucket.weight.dtype == torch.float16 for bucket in self.buckets)
        self.loss_scale, self.good_steps = (2.0**16 if self.is_half else 1.0), 0

    # Phase 1, during backward: collect, and send what is complete.
    def collect(self, parameter):
        """Hook: `parameter.grad` is complete for this backward."""
        bucket = self.bucket_of[parameter]
        bucket.add(parameter)
        if not bucket.waiting and (self.is_last or self.shard):
            self.send(bucket)

    def last_backward(self):
        """From here on, each parameter's next gradient is its last of this step. (One whose last has come
        already, as the contrastive scale's, keeps its bucket waiting until `step`.)"""
        self.is_last = True
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)

    def send(self, bucket):
        """Start to sum the bucket's gradient over the ranks. Sharded, the oldest of three messages is waited
        for: memory stays bounded, and two are on their way while backward goes on."""
        gradient = bucket.close()
        total, work = gradient, None
        if self.shard:
            total = torch.empty_like(bucket.master)
            work = reduce_scatter(total, gradient, async_op=True)
        elif world_size() > 1:
            work = dist.all_reduce(gradient, async_op=True)
        self.messages.append((bucket, total, work, gradient))  # the gradient must live until it has arrived
        if self.shard and len(self.messages) > 2:
            self.receive()

    def receive(self):
        """Wait for the oldest message and add what it brings to the gradient of the step."""
        bucket, total, work, _ = self.messages.pop(0)
        if work is not None:
            work.wait()
        bucket.master.grad = total if bucket.master.grad is None else bucket.master.grad.add_(total)

    # Phase 2, after backward: finish the sums, clip, update.

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update at learning rate `lr`; returns the global gradient norm before clipping, and forgets the
        gradients. ValueError, with no weight changed, if it is not finite (float16: see above)."""
        for bucket in self.buckets:
            if bucket.gradient is None and not bucket.is_sent:
                bucket.open()  # nobody used its parameters, but every rank must send it
            if bucket.gradient is not None:
                self.send(bucket)
        while self.messages:
            self.receive()
        norm = self.gradient_norm()
        is_finite = math.isfinite(norm)
        if not is_finite and (not self.is_half or self.loss_scale <= 1):
            raise ValueError("the gradient is not finite; no weight was changed")
        if is_finite:
            self.update(lr, norm)
        if self.is_half:
            self.good_steps = self.good_steps + 1 if is_finite else 0
            self.loss_scale *= 0.5 if not is_finite else 2 if self.good_steps % 2000 == 0 else 1
        for bucket in self.buckets:
            bucket.master.grad, bucket.is_sent = None, False
        self.is_last = False
        return norm

    def gradient_norm(self) -> float:
        """Of all parameters together, undone of the loss scale; one wait for the GPU."""
        norms = [torch.linalg.vector_norm(bucket.master.grad) for bucket in self.buckets]
        squares = torch.stack(norms).double().square().sum()
        if self.shard:
            dist.all_reduce(squares)  # each rank knows its slices only
        return squares.sqrt().item() / self.loss_scale

    def update(self, lr: float, norm: float):
        """Clip, AdamW on this rank's masters, then the weights everywhere."""
        factor = (min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0) / self.loss_scale
        if factor != 1.0:
            torch._foreach_mul_([bucket.master.grad for bucket in self.buckets], factor)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.write_weights()

    def write_weights(self):
        """The model's weights, on every rank, are the rounded masters."""
        messages = []
        for bucket in self.buckets:
            own = bucket.own(bucket.weight).copy_(bucket.master)
            if self.shard:
                own = own.clone()  # it must live until all have it
                messages.append((own, all_gather(bucket.weight, own, async_op=True)))
        for _, work in messages:
            work.wait()

    def state_dict(self) -> dict:
        """This rank's masters and moments, and the counters. The weights follow from the masters."""
        masters = [bucket.master.clone() for bucket in self.buckets]  # a slice would be saved with its buffer
        return {"loss_scale": self.loss_scale, "good_steps": self.good_steps, "masters": masters,
                "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        self.adamw.load_state_dict(state["adamw"])
        for bucket, master in zip(self.buckets, state["masters"], strict=True):
            bucket.master.copy_(master)
        self.write_weights()


def learning_rate(step: int, steps: int, config) -> float:
    """Linear from 0 over ceil(warmup_ratio * steps), then half a cosine to 0. Step 0 has rate 0, as
    LLaVA's. Contrast first is a run of its own: its steps have a warm-up and a cosine to themselves."""
    first = config.contrastive_first
    step, steps = (step, first) if step < first else (step - first, steps - first)
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------------------
# 3. The model of a stage: what is loaded, what learns, and what it will take

def choose_learning(config, vlm) -> VLM:
    """The stages in one place: align trains the projector, instruct it and the LLM, nobody the ViT."""
    for part, learns in ((vlm.vit, False), (vlm.projector, True), (vlm.llm, config.stage == "instruct")):
        part.requires_grad_(learns)
    return vlm


def outline(config, vit_config, llm_config) -> VLM:
    """The model of this run without weights (on the meta device): for the plan, before anything is loaded."""
    with named("the model"), torch.device("meta"):
        vlm = VLM(ViT(vit_config, config.feature_layer), LLM(llm_config), config.projector,
                  {"vit": config.vit, "llm": config.llm})
    return choose_learning(config, vlm)


def load_model(config, device, dtype) -> VLM:
    """The model with its weights on `device`: the towers and a projector, fresh or `init`'s."""
    gc.collect()  # a checkpointed block refers to itself: what an earlier stage left goes before more comes
    torch.manual_seed(config.seed)
    vlm = VLM.from_towers(config.vit, config.llm, config.projector, config.feature_layer, dtype, device)
    if config.init:
        is_theirs = find_projector(config.init).suffix == ".bin"  # LLaVA's: the shapes must do
        before = asdict(config) if is_theirs else read_json(Path(config.init) / "config.json")
        for name in ("preset", "vit", "llm", "projector", "feature_layer"):
            if before.get(name) != getattr(config, name):
                raise ValueError(f"{config.init}: made with {name} {before.get(name)!r}, "
                                 f"this run has {getattr(config, name)!r}")
        say(f"from {config.init}: loaded {', '.join(vlm.load_projector(config.init, dtype, device))}")
    if config.compile:
        compile_blocks(vlm.llm.model.layers)
    checkpoint_blocks(vlm.llm.model.layers, config.checkpointing)
    return choose_learning(config, vlm)


def build_optimizer(config, vlm, device) -> tuple:
    """(optimizer, terms): AdamW over all that learns, and temperature and weight of each contrastive loss."""
    terms = nn.ModuleDict()
    for name in losses.CONTRASTIVE[config.contrastive]:
        terms[name] = losses.ContrastiveTerm(config.contrastive_weight, config.contrastive_balance)
    learning = [p for p in [*vlm.parameters(), *terms.to(device).parameters()] if p.requires_grad]
    return DataParallelAdamW(learning, config.weight_decay, config.clip, shard=config.shard), terms


TEXT_TOKENS = {"align": 20, "instruct": 250}  # of a typical sample of LLaVA's two data sets, beside its image


def row_length(config, vlm) -> int:
    """Tokens of a typical sample: BOS, image, text."""
    return 1 + vlm.num_image_tokens + TEXT_TOKENS[config.stage]


def count_weights(module, only_learning: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_learning)


def memory_sum(config, vlm, dtype, rows: int, length: int) -> dict:
    """GiB that a rank needs at the worst moment of a step whose largest micro-batch has so many rows of so
    many tokens, by purpose. Not in it: what CUDA, NCCL and fragmentation take.

    Memory grows while the LLM goes forward and falls while it goes back; the gradients of what learns grow
    meanwhile. So the worst moment is where backward begins, or where it ends.
    """
    c, v, e, learns = vlm.llm.config, vlm.vit.config, dtype.itemsize, config.stage == "instruct"
    learning, share = count_weights(vlm, only_learning=True), config.batch // world_size()
    ranks, contrastive = world_size() if config.shard else 1, losses.CONTRASTIVE[config.contrastive]
    # What a block keeps of a token: two residuals; q and what attention makes of it, k and v (and q and k
    # before their norm, where they have one); the gated MLP's three factors; where it learns, what else went
    # into its matrices. Its backward makes three gradients of the MLP's width.
    C, I, blocks, numbers = c.hidden_size, c.intermediate_size, c.num_hidden_layers, rows * length * e
    heads = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    _, _, has_norm = FAMILIES[c.model_type]
    block = numbers * (2 * C + (2 + has_norm) * heads + 3 * I + learns * (2 * C + I))
    sweep = numbers * (3 * I + 2 * C)
    whole = {"none": blocks, "every-other": blocks // 2, "every": 0}[config.checkpointing]
    kept = whole * block + (blocks - whole) * numbers * C
    again = 0 if whole else block
    # The generative loss keeps fp32 logits, and makes two gradients of their size.
    logits = rows * max(1, length - 1 - vlm.num_image_tokens) * c.vocab_size * 4
    passes = math.ceil(share / rows)
    held = passes if "prompt" in contrastive else 1  # passes that await backward
    # Pixels and features; of width C, what is kept in the projector and a gradient of each loss.
    vectors = 2 * sum(isinstance(m, nn.Linear) for m in vlm.projector.modules()) + len(contrastive)
    images = share * (v.image_size**2 * 3 * 4 + v.hidden_size * vlm.vit.num_patches * e
                      + C * vlm.num_image_tokens * vectors * e)
    gradients, head = learning * 4 / ranks, learns * c.vocab_size * C * (4 + e)  # the head's, on its way
    begins = held * (kept + logits) + max(2 * logits, sweep + again - logits)
    begins += gradients if passes > 1 else head  # those of the earlier passes are there
    ends = gradients + learns * max(block + sweep, head * (ranks > 1))
    sums = {"weights": count_weights(vlm) * e,
            "masters and moments": learning * (8 if e == 4 else 12) / ranks,
            "activations and gradients": max(begins, ends) + images}
    return {name: size / 2**30 for name, size in sums.items()}


def in_words(config) -> str:
    """The contrastive loss, and how it is weighed where it is not the papers' plain sum."""
    words, share = config.contrastive, config.contrastive_balance
    if config.contrastive_first:
        words += f", alone in the first {config.contrastive_first} steps"
    if share or config.contrastive_weight != 1:
        words += ", then at " if config.contrastive_first else ", at "
        words += f"{share} of the captioning gradient" if share else f"weight {config.contrastive_weight:g}"
    return words


def passes_in_words(config, records: int, steps: int) -> str:
    """How often each record comes by. Contrast first has as many steps for few records as for many."""
    used = len(data.subset(records, config.data_fraction, config.seed))
    first = config.contrastive_first * config.batch / used
    after = steps * config.batch / used - first
    words = f"{used:,} records: {after:.3g} passes"
    if first:
        words += f" behind {first:.3g} of contrast first"
        words += ", many for so few: see --contrastive_first" if first > 10 else ""
    return words


def print_plan(config, vlm, device, dtype, steps, largest):
    """What a reader wants to know before the first step; `largest`: rows and their tokens of the largest
    micro-batch. ValueError where a rank's memory cannot hold it."""
    why = "a GPU" if torch.cuda.is_available() else "no GPU"
    say(f"\nstage {config.stage}, preset {config.preset} ({why} here): {steps} steps of {config.batch} on "
        f"{world_size()} rank(s) in micro-batches of {data.split_batch(config, world_size())[0]}; "
        f"contrastive loss: {in_words(config)}")
    if config.preset == "small":
        say("the learning rates of this preset are a guess: nobody has tuned them")
    say(f"{'module':<12}{'parameters':>16}{'learning':>16}  source")
    for name in ("vit", "projector", "llm"):
        part = getattr(vlm, name)
        say(f"{name:<12}{count_weights(part):>16,}{count_weights(part, True):>16,}  {getattr(config, name)}")
    say(f"{str(dtype).removeprefix('torch.')}; norms, softmax, losses and optimizer in float32")
    memory, has = memory_sum(config, vlm, dtype, *largest), total_memory(device) / 2**30
    parts, needs = ", ".join(f"{name} {size:.3g}" for name, size in memory.items()), sum(memory.values())
    say(f"memory of a rank, GiB, with {largest[0]} rows of {largest[1]} tokens: {parts}; sum {needs:.3g} of "
        f"{has:.3g}")
    if needs > has:
        raise ValueError(f"{config.preset} {config.stage} needs about {needs:.0f} GiB a rank, not {has:.0f}: "
                         "more ranks with --shard, a smaller --micro_batch or preset, --checkpointing every")


def check_disk(config, vlm, dtype, steps: int):
    """ValueError where the disk cannot hold the run: what learned, and up to three checkpoints of masters and
    moments, the two kept and one that is being written. (Those of a resumed run are there.)"""
    out, saved = Path(config.out).absolute(), (steps - 1) // config.save_every if config.save_every else 0
    copies = 0 if config.resume else min(3, saved)
    needs = count_weights(vlm, only_learning=True) * (dtype.itemsize + 12 * copies) / 2**30
    has = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free / 2**30
    say(f"on disk, GiB: {needs:.3g} of {has:.3g} that are free")
    if needs > has:
        raise ValueError(f"{config.out}: the run and its checkpoints take {needs:.3g} GiB, and its disk has "
                         f"{has:.3g}: another --out, or a larger --save_every (0: no checkpoints)")


# ------------------------------------------------------------------------------------------------------------
# 4. The data of a stage is there, or it is said how to get it

def ensure_data(config):
    """The toy world is made, by one rank, where it is missing; for other data, FileNotFoundError."""
    if config.init and not Path(config.init).exists():
        raise FileNotFoundError(f"{config.init}: no align run to start from; "
                                f"`python train.py --stage align --preset {config.preset}` makes one")
    if rank() == 0 and config.annotations.startswith("data/toy/") and not Path("data/toy").exists():
        say("writing the toy world to data/toy")
        subprocess.run([sys.executable, "-m", "lab.toy_world", "data/toy"],
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
    barrier()
    if not Path(config.annotations).exists():
        hub = {"align": "liuhaotian/LLaVA-Pretrain",
               "instruct": "liuhaotian/LLaVA-Instruct-150K (mix665k)"}[config.stage]
        hub = "lmms-lab/LLaVA-NeXT-Data, written out" if "LLaVA-NeXT" in config.annotations else hub
        raise FileNotFoundError(f"{config.annotations}: no such file. Name a LLaVA JSON, as of the Hub's "
                                f"{hub}, with --annotations and its pictures with --images (now "
                                f"{config.images}); or take --preset tiny, or --dry_run with any preset")


# ------------------------------------------------------------------------------------------------------------
# 5. One step

def train_step(vlm, terms, optimizer, micro_batches, config, lr, step=0) -> dict:
    """One update from the micro-batches of this rank; returns what the log shows.

    The gradient is that of one process with the whole batch in one piece: every loss is divided by a count
    over the *whole step*, and a contrastive loss sees the images of all micro-batches at once. That costs the
    projected patches of a rank's batch, held for the length of the step; and, for the prompted loss, whose
    image vectors come out of the LLM, what the LLM keeps for the backward of all micro-batches.
    """
    # 1. Count, over all ranks and micro-batches, what the generative loss is divided by.
    device, amplified = vlm.llm.head_weight.device, optimizer.loss_scale
    #    A GPU is not waited for, here and below but for three times: the losses, the norm, the scales.
    shares = {"tokens": sum(losses.count_supervised(m["labels"]) for m in micro_batches)}
    tokens = sum_over_ranks([shares["tokens"]], device)[0]
    if len(terms) and not all((m["ids"] == vlm.image_token_id).any(1).all() for m in micro_batches):
        raise ValueError("the contrastive loss pairs each caption with one image; a record here has none")
    micro_batches = [data.to_device(m | losses.find_places(vlm, m), device) for m in micro_batches]
    with_llm = step >= config.contrastive_first  # before: the patch loss alone, and no pass of the LLM

    # 2. Image -> ViT -> projector, for all micro-batches. The graph is cut behind the projector: `leaves` are
    #    detached copies where every loss leaves its gradient, so the projector's backward runs once for all.
    patches, leaves = [], []
    for m in micro_batches:
        patches.append(vlm.encode(m["pixels"]))  # (I, N, C)
        leaves.append(patches[-1].detach().requires_grad_())

    # 3. The prompted loss compares what the LLM makes of *all* images of the step: with it, and only then,
    #    all captioning passes come before the first backward, and their graph is cut at the image vectors.
    captioned, states = [], []
    for m, leaf in zip(micro_batches, leaves) if with_llm and "prompt" in terms else ():
        captioned.append(losses.caption_pass(vlm, m, leaf))
        states.append(captioned[-1][1].detach().requires_grad_())  # (B, C)

    # 4. The contrastive losses, over all images and captions of the step; backward as far as the cuts.
    cuts = {name: cut for name, cut in (("patch", leaves), ("prompt", states)) if name in terms and cut}
    contrastive, at_cut, of_scale = losses.contrast(vlm, micro_batches, terms, cuts, amplified)
    shares |= contrastive

    # 5. Patches -> LLM -> generative loss, and back to the cut, one micro-batch after another. What the
    #    prompted loss left at its own cut takes the same way back, in the same sweep; in one of its own where
    #    it is to be measured.
    is_measured = with_llm and (step - config.contrastive_first) % losses.measure_every(terms) == 0
    of_states, at_cut["prompt"] = at_cut.pop("prompt", []), []
    for i, m in enumerate(micro_batches) if with_llm else ():
        loss, state = captioned[i] if captioned else losses.caption_pass(vlm, m, leaves[i])
        if i == len(micro_batches) - 1:
            optimizer.last_backward()
        ends, given = [amplified * loss / tokens], [None]
        if captioned and is_measured:
            at_cut["prompt"] += torch.autograd.grad(state, leaves[i], of_states[i], retain_graph=True)
        elif captioned:
            ends, given = [*ends, state], [None, terms["prompt"].weight() * of_states[i]]
        torch.autograd.backward(ends, given)
        shares["generative"] = shares.get("generative", 0.0) + loss.detach() / tokens

    # 6. At the cut: measure, over all ranks, what each loss left there; weigh it, add it up, and go on
    # through the projector.
    at_cut["generative"] = [leaf.grad for leaf in leaves if is_measured]
    shares |= losses.norms(vlm, micro_batches, leaves) | losses.products(at_cut)
    sums = dict(zip(shares, sum_over_ranks(list(shares.values()), device).tolist()))
    if sums["tokens"] == 0:
        raise ValueError("no token of this step carries loss")
    line = losses.figures(sums, terms, amplified, config.batch)
    weights = {name: line[f"{name}_weight"] for name in terms}
    given = losses.weighted_sum([leaf.grad for leaf in leaves], at_cut, weights)
    given += [weights[name] * gradient for name, gradient in of_scale.items()]
    torch.autograd.backward([*patches, *(terms[name].log_scale for name in of_scale)], given)

    # 7. Sum over ranks, clip, update. A float16 step that was skipped has no norm.
    norm = optimizer.step(lr)
    for term in terms.values():
        term.clamp_()
    scales = torch.stack([term() for term in terms.values()]).tolist() if len(terms) else []
    line |= {f"{name}_scale": scale for name, scale in zip(terms, scales)}
    norm = norm if math.isfinite(norm) else None
    return line | {"lr": lr, "grad_norm": norm, "tokens": int(sums["tokens"])}


# ------------------------------------------------------------------------------------------------------------
# 6. On disk: a run that was stopped goes on as if it had not been

def save_checkpoint(config, step: int, optimizer, terms, made_of: dict):
    """Write OUT/checkpoint-STEP, complete or not at all; keep the last two. Each rank has its own file, rank
    0's alone holds what all ranks have."""
    final = Path(config.out) / f"checkpoint-{step:07d}"
    partial = final.with_suffix(".partial")
    barrier()  # no rank writes into OUT before rank 0 has made it ready (open_run)
    partial.mkdir(parents=True, exist_ok=True)  # of a run that was stopped while saving: written over
    state = {"step": step, "ranks": world_size(), "config": asdict(config), "random": random_state(),
             "squares": {name: term.squares for name, term in terms.items()}}
    if config.shard or rank() == 0:
        state["optimizer"] = optimizer.state_dict()
    with whole(partial / f"rank-{rank()}.pt") as building, open(building, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    barrier()
    if rank() == 0:
        (partial / "made_of.json").write_text(json.dumps(made_of))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if hasattr(os, "O_DIRECTORY"):  # not on Windows
            folder = os.open(final.parent, os.O_RDONLY)  # the rename itself must reach the disk too
            os.fsync(folder)
            os.close(folder)
        for old in sorted(final.parent.glob("checkpoint-???????"))[:-2]:
            shutil.rmtree(old)
    barrier()


def refuse_changes(saved: dict, now: dict, where):
    """ValueError naming the first option that differs from those a run was saved with."""
    for name in sorted(now.keys() - {"resume", "save_every", "workers", "cache", "out"}):
        if saved.get(name) != now[name]:
            raise ValueError(f"{where}: saved with {name} {saved.get(name)!r}, resumed with {now[name]!r}")


def is_finished(config) -> bool:
    """Of a run that is to be resumed. ValueError where there is none, or one of other options."""
    if not (Path(config.out) / "log.jsonl").exists():
        raise ValueError(f"{config.out}: no run to resume; without --resume one begins there")
    if is_so := (finished := Path(config.out) / "config.json").exists():
        with named(finished):
            refuse_changes(read_json(finished), asdict(config), finished)
    return is_so


def load_checkpoint(config, optimizer, terms, made_of: dict) -> int:
    """Restore this rank from the run's last checkpoint, of any number of ranks; return the step to go on
    with, 0 if there is none. ValueError where options, records, tokenizer or towers are others now."""
    last = max(Path(config.out).glob("checkpoint-???????"), default=None)
    if last is None:
        say(f"{config.out}: no checkpoint to resume from; starting at step 0")
        return 0
    read = partial(torch.load, map_location="cpu", weights_only=True)
    with named(last, "damaged; without it, the one before is taken"):
        first = read(last / "rank-0.pt", mmap=True)
        refuse_changes(first["config"], asdict(config), last)
        saved = read_json(file) if (file := last / "made_of.json").exists() else made_of
        if changed := [name for name in made_of if saved.get(name) != made_of[name]]:
            raise ValueError(f"{last}: saved with another {' and '.join(changed)}; to go on with what is now "
                             f"there, which makes it another run, remove {file}")
        is_same = first["ranks"] == world_size()
        numbers = [rank(), 0][: 1 if config.shard else 2] if is_same else range(first["ranks"])
        files = [last / f"rank-{i}.pt" for i in numbers]
        if any(zipfile.ZipFile(file).testzip() for file in {*files}):  # sums that torch does not look at
            raise ValueError("some of its bits are not those that were written")
        states = [read(file, mmap=not is_same) for file in files]
        state = states[0 if is_same else rank() % len(states)]
        optimizer.load_state_dict(states[-1]["optimizer"] if is_same else cut_anew(optimizer, states))
        set_random_state(state["random"])
        for name, term in terms.items():
            term.squares = state["squares"][name]
    say(f"resumed from {last}: step {state['step']}")
    return state["step"]


def cut_anew(optimizer, states: list) -> dict:
    """This rank's optimizer state out of the checkpoints `states` of another number of ranks: each bucket's
    parts (one, if it was not sharded) are laid end to end, padded for the ranks of now and cut for them."""
    old = [state["optimizer"] for state in states if "optimizer" in state]

    def cut(parts, bucket):
        flat, n = torch.cat(parts), sum(p.numel() for p in bucket.parameters)
        padded = flat.new_zeros(len(bucket.weight))  # (n,)
        padded[:n] = flat[:n]
        return bucket.own(padded).clone()

    masters = [cut(parts, bucket)
               for *parts, bucket in zip(*(state["masters"] for state in old), optimizer.buckets)]
    in_order, moments = sorted(optimizer.buckets, key=lambda bucket: bucket.parameters[0].ndim <= 1), {}
    for i, kept in old[0]["adamw"]["state"].items():  # AdamW has the matrices first
        parts = {key: [state["adamw"]["state"][i][key] for state in old] for key in kept if key != "step"}
        moments[i] = kept | {key: cut(parts[key], in_order[i]) for key in parts}
    return old[0] | {"masters": masters, "adamw": old[0]["adamw"] | {"state": moments}}


def open_run(config, start: int):
    """Make OUT ready for its first line of log: move a run aside that is finished or could be resumed, clear
    what any other left; of a resumed run drop the lines of the steps that come again."""
    out, log = Path(config.out), Path(config.out) / "log.jsonl"
    is_finished, saved = (out / "config.json").exists(), [*out.glob("checkpoint-???????")]
    if start == 0 and (is_finished or saved):
        say(f"{out} holds {'a finished' if is_finished else 'an unfinished'} run: it is now {out}.old")
        shutil.rmtree(f"{out}.old", ignore_errors=True)
        out.rename(f"{out}.old")
    out.mkdir(parents=True, exist_ok=True)
    lines = read_text(log).splitlines(True)[:start] if start else []  # line k is step k
    log.write_text("".join(lines))
    of_before = (*out.glob("checkpoint-*.partial"), out / "llm", out / "unaligned")
    for old in of_before if start == 0 else out.glob("checkpoint-*.partial"):
        shutil.rmtree(old, ignore_errors=True)


def save_run(config, vlm, results: dict):
    """The finished run directory. config.json comes last: only with it is this a run, never half of one.
    Where the disk is full, it goes elsewhere: OSError, which says where."""
    out = Path(config.out)
    shutil.rmtree(out / "llm", ignore_errors=True)  # of a run that was stopped right here
    try:
        with whole(out / "results.json") as building:
            building.write_text(json.dumps(results, indent=2) + "\n")
        vlm.save(out, asdict(config), with_llm=config.stage == "instruct")
    except (OSError, ValueError) as error:
        elsewhere = tempfile.mkdtemp()
        vlm.save(elsewhere, asdict(config), with_llm=config.stage == "instruct")
        raise OSError(f"{error}; the finished run is in {elsewhere}") from None


def set_last_run(folder):
    """Make `folder` the run that eval.py looks at when none is named."""
    if rank() == 0:
        Path("runs").mkdir(exist_ok=True)
        Path("runs/last").write_text(str(folder))


def catch_signals(is_wanted: bool) -> tuple:
    """(a list, let_go): the first SIGINT or SIGTERM is added to the list, in place of what it does, so that a
    step can end and be saved. From then on, or when `let_go` is called, they do what they did before."""
    before, caught = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, []

    def let_go(*found):
        caught.extend(found)
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before if is_wanted else ():
        signal.signal(number, let_go)
    return caught, let_go


# ------------------------------------------------------------------------------------------------------------
# 7. A stage: everything above, in order; and the command line

def train_stage(config: Config, device):
    """Run align or instruct, from the files on disk to the run directory `config.out`."""
    if config.resume and is_finished(config):
        return say(f"{config.out}: this run is finished; nothing is left to do")
    ensure_data(config)
    dtype, began = choose_dtype(device, config.dtype), time.time()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    plan = outline(config, load_vit_config(config.vit), load_llm_config(config.llm))
    samples = data.load_samples(config, plan)
    steps = data.count_steps(config, len(samples))
    dealt, lengths = data.deal(config, samples, plan, steps, world_size())
    print_plan(config, plan, device, dtype, steps, data.largest_micro_batch(dealt, lengths))
    say(passes_in_words(config, len(samples), steps))
    check_disk(config, plan, dtype, steps)
    vlm = load_model(config, device, dtype)
    for is_turn in (rank() == 0, True) if config.features else ():  # one rank makes the file, all read it
        if is_turn:
            samples.features = data.feature_file(config, samples, vlm.vit, device)
        barrier()
    made_of = data.fingerprints(config, vlm, samples.tokenizer) if config.resume or config.save_every else {}
    optimizer, terms = build_optimizer(config, vlm, device)
    start = load_checkpoint(config, optimizer, terms, made_of) if config.resume else 0
    loader = data.make_loader(config, samples, vlm, [ranks[rank()] for ranks in dealt[start:]], device)
    say("first sample:", repr(data.marked_text(samples[0], samples.tokenizer)))

    knows_nothing, line = 0, None  # steps on end; the last of the log
    signals, let_go = catch_signals(config.save_every > 0)
    bar = tqdm(range(start, steps), desc=config.stage, initial=start, total=steps, disable=rank() > 0)
    for step in bar:
        step_began, lr = time.time(), learning_rate(step, steps, config)
        micro_batches = next(loader)
        if step == config.contrastive_first:
            optimizer.adamw.state.clear()  # moments of far smaller gradients
        line = {"step": step, **train_step(vlm, terms, optimizer, micro_batches, config, lr, step)}
        line |= {"ms": round(1000 * (time.time() - step_began), 1), "memory_mib": peak_memory(device)}
        bar.set_postfix(shown(line, terms))
        stuck = [name for name in terms if (line.get(f"{name}_relative") or 0) > 0.98]
        knows_nothing = knows_nothing + 1 if stuck and step > config.warmup_ratio * steps else 0
        if knows_nothing == 50:
            say(f"warning: the {stuck[0]} loss has stayed above 0.98 ln(batch) for 50 steps: it learns "
                "nothing. See its _ratio in log.jsonl, --contrastive_balance and --contrastive_first")
        if step == config.contrastive_first:
            say(f"first step: {line['tokens']} tokens carry loss; it is {line['generative']:.2f}, "
                f"a uniform guess {math.log(vlm.llm.config.vocab_size):.2f}")
        if rank() == 0:
            if step == start:  # only now: a run that fails before leaves what was there
                open_run(config, start)
            if step == lr == 0 and config.stage == "align":  # at rate 0 the projector is still what it was
                vlm.save(Path(config.out) / "unaligned", asdict(config), with_llm=False)
            with open(Path(config.out) / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if config.save_every and step + 1 < steps:
            is_stopped = sum_over_ranks([len(signals)], device).any()  # any rank
            if is_stopped or (step + 1) % config.save_every == 0:
                save_checkpoint(config, step + 1, optimizer, terms, made_of)
            if is_stopped:
                said = f"train.py: stopped, and saved at step {step + 1}: the same command and --resume go on"
                sys.exit(1 if rank() else said)
    let_go()

    if rank() == 0:
        seconds = round(time.time() - began, 1)
        save_run(config, vlm, {"stage": config.stage, "steps": steps, "seconds": seconds, "last_step": line})
        say(f"finished, in {seconds:.0f} s: {config.out}")
    barrier()


def shown(line: dict, terms) -> dict:
    """What the progress bar has room for: the losses and, of each contrastive one, its share of the
    gradient."""
    keys = ["generative"]
    for name in terms:
        keys += [name, f"{name}_ratio"]
    return {key: f"{line[key]:.3g}" for key in keys if line.get(key) is not None}


def run_all(given: dict, device):
    """Align, instruct, and eval.py's ScienceQA before, between and after: what each stage adds."""
    first = configure("align", given)
    root, questions = Path(given.get("out") or f"runs/{first.preset}"), Path(first.benchmarks) / "ScienceQA"
    for stage in ("align", "instruct"):
        options = of_stage(stage, given)
        if stage == "instruct" and not (root / stage / "log.jsonl").exists():
            options.pop("resume", None)  # the run was stopped before this stage
        where = {"out": str(root / stage)} | ({"init": str(root / "align")} if stage == "instruct" else {})
        train_stage(configure(stage, options | where), device)
    set_last_run(root / "instruct")
    if rank() == 0 and not questions.is_dir():
        say(f"{questions}: not there (see --benchmarks), so the runs are not scored")
    elif rank() == 0:
        runs = [root / name for name in ("align/unaligned", "align", "instruct") if (root / name).is_dir()]
        # without RANK, or it would wait for other ranks
        alone = {name: value for name, value in os.environ.items() if name != "RANK"}
        sys.exit(subprocess.run([sys.executable, ROOT / "eval.py", "--bench", "scienceqa", "--ckpt",
                                 *runs], env=alone).returncode)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    given = parse_args(argv)
    if given.get("dry_run"):  # a benchmark, and so a script beside the others
        os.execv(sys.executable, [sys.executable, str(ROOT / "tests/bench_step.py"), *map(str, argv)])
    with command("train.py", "interrupted; --resume goes on from the last checkpoint, if there is one"):
        device, stage = start_ranks(), given.get("stage", "all")
        if stage == "all" and "annotations" in given:
            raise ValueError("--annotations is one stage's list: first --stage align, then --stage instruct")
        if stage == "all":
            run_all(given, device)
        else:
            config = configure(stage, given)
            train_stage(config, device)
            set_last_run(config.out)


if __name__ == "__main__":
    main()
