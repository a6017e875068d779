"""Training, from the command line to the last checkpoint, in the order in which things happen.

    python train.py                                        # no GPU: the tiny preset, both stages, scored, in minutes
    torchrun --nproc_per_node=8 train.py --stage align     # with GPUs: LLaVA-1.5's stage 1, with the patch loss
    torchrun --nproc_per_node=8 train.py --stage instruct  # stage 2: projector and LLM on instructions
    python train.py --stage compare --quick                # the losses against each other on the toy world

Two stages on LLaVA's recipe (arXiv 2310.03744). Align: image-caption pairs, only the projector learns, with the
captioning loss and a contrastive loss beside it. Instruct: conversations, the projector and the LLM learn, with the
next-token loss alone. The ViT is frozen throughout.

What people usually take from a framework is written out here, and the models know nothing of it:
data parallelism (`DataParallelAdamW`), mixed precision (the same class), gradient checkpointing (`checkpointed`).

Read next: eval.py, which asks the trained model.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import eval as evaluation
import losses
from llm import LLM, LLMConfig
from losses import rank, world_size
from projector import VLM
from vit import ViT, ViTConfig, read_json, resolve

# ----------------------------------------------------------------------------------------------------------------
# 1. What to do: one dataclass, the presets, and a command line made from them


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    stage: str = option("all", "what to run", ("align", "instruct", "all", "compare"))
    preset: str = option("", "set of defaults; empty: 7b where CUDA is present, else tiny",
                         ("", "tiny", "small", "7b", "13b"))
    out: str = option("", "run directory; with --stage all, the folder of both; empty: runs/PRESET[/STAGE]")
    init: str = option("", "instruct: the align run to start from; empty: runs/PRESET/align")
    seed: int = option(0, "of the projector's initial weights, the order of the data and its subset")

    vit: str = option("", "vision tower: a folder or a Hub id")
    llm: str = option("", "language tower: a folder or a Hub id")
    projector: str = option("mlp2x_gelu", "the bridge: linear, mlpNx_gelu, pixel_shuffle or resampler")
    feature_layer: int = option(-2, "the ViT's hidden state to project")

    annotations: str = option("", "LLaVA JSON of this stage")
    images: str = option("", "folder below which its images lie")
    scienceqa: str = option("", "ScienceQA folder that eval.py scores by default")
    captions: str = option("", "LLaVA JSON of captions on which eval.py measures retrieval and gap by default")
    caption_images: str = option("", "folder below which their images lie")
    pope: str = option("", "POPE folder, likewise")
    mme: str = option("", "MME folder, likewise")
    data_fraction: float = option(1.0, "use this part of the records; smaller parts are nested in larger ones")
    template: str = option("v1", "how a record becomes text; chat: the LLM's own", data.TEMPLATES)
    fit: str = option("pad", "how an image becomes square", ("crop", "pad"))
    max_length: int = option(2048, "tokens in a row, image included, or the LLM's positions; the rest is cut off")
    workers: int = option(0, "loader processes on each rank")

    cache: bool = option(False, "keep every sample in memory once it was read: for small data")

    contrastive: str = option("none", "contrastive loss beside the generative one; align only", tuple(losses.TERMS))
    contrastive_weight: float = option(1.0, "total = generative + weight * contrastive")
    pool: str = option("mean", "patch loss: an image's vector from its patches", ("mean", "max"))
    reduce: str = option("mean", "patch loss: a caption's similarity from those of its tokens", ("mean", "max"))
    prompt: str = option("", "words after image and caption; empty: those of describe for the prompt loss, else none",
                         ("", *data.PROMPTS))
    prompt_image: str = option("", "prompt loss: words after the image, instead of the pair's")
    prompt_text: str = option("", "prompt loss: words after the caption, instead of the pair's")

    epochs: float = option(1.0, "passes over the records")
    steps: int = option(0, "number of steps; 0: as many as the epochs need")
    batch: int = option(64, "samples in a step, over all ranks and micro-batches")
    micro_batch: int = option(64, "most samples of a rank in one pass of the LLM")
    lr: float = option(1e-3, "peak learning rate: linear warm-up, then cosine to zero")
    warmup_ratio: float = option(0.03, "part of the steps that warm up")
    weight_decay: float = option(0.0, "AdamW's, for matrices only")
    clip: float = option(0.0, "largest global gradient norm; 0: no clipping, as in LLaVA's own runs")
    checkpointing: str = option("none", "gradient checkpointing of the LLM's blocks", ("none", "every", "every-other"))
    shard: bool = option(False, "ZeRO: each rank keeps 1/W of gradients, masters and moments")
    group_by_length: bool = option(False, "batches of one modality and similar lengths (LLaVA's stage 2)")
    quick: bool = option(False, "compare: few seeds, short runs, no tuning, in minutes")
    dry_run: bool = option(False, "3 steps at full shape: random weights, random data, nothing read or written")
    save_every: int = option(0, "steps between checkpoints that --resume continues from; 0: none")
    resume: bool = option(False, "continue this run from its last checkpoint")


# The tiny numbers come from the validation split of the toy world; 7b and 13b are LLaVA-1.5's recipe, with
# the patch loss in its first stage.
LLAVA = {
    "common": dict(vit="openai/clip-vit-large-patch14-336", llm="lmsys/vicuna-7b-v1.5",
                   scienceqa="data/ScienceQA", pope="data/POPE", mme="data/MME_Benchmark_release_version",
                   workers=4, checkpointing="every", save_every=500),
    "align": dict(annotations="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", images="data/LLaVA-Pretrain/images",
                  template="plain", fit="crop", contrastive="patch", batch=256, micro_batch=32, lr=1e-3),
    "instruct": dict(annotations="data/LLaVA-Instruct/llava_v1_5_mix665k.json", images="data/LLaVA-Instruct",
                     batch=128, micro_batch=16, lr=2e-5, shard=True, group_by_length=True),
}
PRESETS = {
    "tiny": {
        "common": dict(vit="assets/tiny-vit", llm="assets/tiny-llm", images="data/toy/images",
                       scienceqa="data/toy/scienceqa", pope="data/toy/pope", mme="data/toy/mme",
                       captions="data/toy/captions.json", caption_images="data/toy/images",
                       clip=1.0, save_every=100, cache=True),
        "align": dict(annotations="data/toy/align.json", template="plain", fit="crop", contrastive="patch",
                      epochs=12.0, batch=64, micro_batch=64, lr=2e-3),
        "instruct": dict(annotations="data/toy/instruct.json", epochs=4.0, batch=32, micro_batch=32, lr=4e-4),
    },
    "small": {  # for one consumer GPU; its rates are our guess, not tuned
        "common": LLAVA["common"] | dict(vit="google/siglip-base-patch16-224",
                                         llm="HuggingFaceTB/SmolLM2-135M-Instruct", checkpointing="none"),
        "align": LLAVA["align"],
        "instruct": LLAVA["instruct"] | dict(template="chat", lr=1e-4, shard=False),
    },
    "7b": LLAVA,
    "13b": LLAVA | {"common": LLAVA["common"] | dict(llm="lmsys/vicuna-13b-v1.5")},
}
CLIP_L, TINY_VIT = ViTConfig(), ViTConfig(data.TOY_IMAGE_SIZE, 8, 96, 384, 4, 2)
TINY_LLM = LLMConfig(data.TOY_VOCABULARY, 128, 256, 3, 2, 2, 64, max_position_embeddings=1024)
SIGLIP_B = ViTConfig(224, 16, 768, 3072, 12, 12, 1e-6, "gelu_pytorch_tanh", "siglip_vision_model")
SMOLLM2 = LLMConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=100000.0, max_position_embeddings=8192,
                    tie_word_embeddings=True)
SHAPES = {"tiny": (TINY_VIT, TINY_LLM), "small": (SIGLIP_B, SMOLLM2), "7b": (CLIP_L, LLMConfig()),
          "13b": (CLIP_L, LLMConfig(32000, 5120, 13824, 40, 40, 40))}


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse_args(argv=None) -> dict:
    """The options given on the command line, and only those. Unknown flags and wrong types end the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in fields(Config):
        is_bool = f.type is bool  # `--resume` alone means True; `--resume False` is False, not the truth of a string
        parser.add_argument(f"--{f.name}", type=boolean if is_bool else f.type, choices=f.metadata["choices"],
                            default=argparse.SUPPRESS, **(dict(nargs="?", const=True) if is_bool else {}),
                            metavar=None if f.metadata["choices"] else f.name.upper(),
                            help=f"{f.metadata['help']} (default: {f.default!r}, unless the preset says otherwise)")
    return vars(parser.parse_args(argv))


def configure(stage: str, given: dict) -> Config:
    """Defaults, then the preset, then the preset's stage, then the command line."""
    preset = given.get("preset") or ("7b" if torch.cuda.is_available() else "tiny")
    values = PRESETS[preset]["common"] | PRESETS[preset].get(stage, {})
    config = Config(**(values | given | {"stage": stage, "preset": preset}))
    if config.contrastive != "none" and stage != "align":
        raise ValueError("--contrastive belongs to the align stage")
    is_prompted = "prompt" in losses.TERMS[config.contrastive]
    config.prompt = config.prompt or ("describe" if is_prompted else "none")
    if (is_prompted or config.prompt != "none") and config.template != "plain":
        raise ValueError("a prompt, and its loss, need --template plain: an image, the prompt, a caption")
    if (config.prompt_image or config.prompt_text) and not is_prompted:
        raise ValueError("--prompt_image and --prompt_text belong to --contrastive prompt or both")
    if config.batch < 1 or config.micro_batch < 1 or config.epochs <= 0 or min(config.steps, config.save_every) < 0:
        raise ValueError("--batch, --micro_batch and --epochs must be above zero, --steps and --save_every not below")
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    config.resume = config.resume or is_restart
    config.out = config.out or f"runs/{preset}/{stage}"
    config.init = config.init or (f"runs/{preset}/align" if stage == "instruct" else "")
    return config


# ----------------------------------------------------------------------------------------------------------------
# 2. Where to do it: ranks, device, precision. One process is rank 0 of 1, a CPU is the slowest GPU.


def start_ranks() -> torch.device:
    """Join the process group if torchrun made one; return this rank's device."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_ranks > torch.cuda.device_count():
            raise ValueError(f"{local_ranks} ranks on this machine, {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // local_ranks))
    if "RANK" in os.environ and not dist.is_initialized():
        is_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if is_cuda else "gloo", device_id=device if is_cuda else None,
                                timeout=timedelta(hours=1))  # one rank may be reading or writing 13 GB alone
    return device


def leave_ranks():
    """Leave the process group, if there is one. What still holds a message's end, in a cycle of references, goes
    first: two processes of eight aborted at exit ("terminate called without an active exception") where it did not."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def choose_dtype(device):
    """(dtype of weights and activations, why). Norms, softmax, losses and the optimizer's masters are fp32 anyway."""
    if device.type != "cuda":
        return torch.float32, "no GPU"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "this GPU computes it fast, and it has fp32's range"
    return torch.float16, "a GPU without bfloat16; the loss is scaled up so that small gradients survive"


def say(*words):
    if rank() == 0:
        tqdm.write(" ".join(str(word) for word in words))


def barrier():
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values, device) -> list:
    """Element-wise sum of a list of numbers over all ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


# ----------------------------------------------------------------------------------------------------------------
# 3. Data parallelism and AdamW, by hand


class Bucket:
    """Some parameters of one dtype, laid end to end in flat buffers that are padded to a multiple of W.

    weight    (n,) in the model's dtype; each parameter becomes a view into it
    gradient  (n,) fp32, where gradients add up; None until backward brings the first
    total     (n,) or, sharded, (n / W,): the gradient of the whole step that this rank updates with
    """

    def __init__(self, parameters, decay: bool):
        self.parameters, self.decay = parameters, decay
        size = sum(parameter.numel() for parameter in parameters)
        size += -size % world_size()
        self.weight = parameters[0].new_zeros(size)  # (n,)
        self.gradient = self.total = self.work = None
        self.parts, self.waiting, start = {}, set(), 0
        for parameter in parameters:
            self.parts[parameter] = part = slice(start, start + parameter.numel())
            self.weight[part] = parameter.detach().flatten()
            parameter.data = self.weight[part].view_as(parameter)
            start = part.stop
        if world_size() > 1:
            dist.broadcast(self.weight, src=0)  # equal seeds are a habit, not a guarantee

    def add(self, parameter, gradient):
        if self.gradient is None:
            self.gradient = torch.zeros_like(losses.precise(self.weight))  # (n,)
            self.waiting = set(self.parameters)
        self.gradient[self.parts[parameter]].view_as(parameter).add_(gradient)
        self.waiting.discard(parameter)


class DataParallelAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) whose gradients are summed over all ranks.

    In time order, for one step:

    1. `backward` fills the buckets: a hook on each parameter adds its gradient to the bucket's fp32 buffer.
    2. During the last backward (`last_backward()` was called) a bucket whose parameters are all in is sent off at
       once, while backward goes on with earlier layers. Sums, not means: see losses.py, "Reduction".
    3. `step` sends what is left (parameters that got no gradient count as zero), waits, clips by the global norm,
       and updates fp32 masters; the model's weights are their rounded copies. In bfloat16 alone, updates of
       2e-5 on weights of 0.02 would mostly round to nothing.

    With `shard` (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054) the sum is a reduce-scatter: each rank receives,
    and keeps gradients, masters and moments for, only its 1/W of every bucket, and an all-gather returns the new
    weights. Then a bucket leaves in *every* backward as soon as it is full, and its buffer is freed, so that no more
    than two or three whole buckets of gradients exist at a time: less memory, paid with a message per micro-batch.

    float16 has so little range that small gradients vanish. So losses are multiplied by `loss_scale` before
    backward and gradients divided by it here; a step that overflows is skipped and halves the scale, 2000 good ones
    double it. For the other dtypes the scale stays 1, and a gradient that is not finite is an error.
    """

    def __init__(self, parameters, weight_decay=0.0, clip=0.0, betas=(0.9, 0.999), eps=1e-8, shard=False,
                 bucket_size=2**22):
        self.weight_decay, self.clip, self.betas, self.eps, self.steps = weight_decay, clip, betas, eps, 0
        self.shard = shard and world_size() > 1
        groups = {}
        for parameter in reversed(list(parameters)):  # backward meets the last layers first
            groups.setdefault((parameter.dtype, parameter.ndim > 1), []).append(parameter)
        self.buckets = []
        for (_, is_matrix), group in groups.items():
            members, size = [], 0
            for parameter in group:
                if members and size + parameter.numel() > bucket_size:
                    self.buckets.append(Bucket(members, is_matrix))
                    members, size = [], 0
                members.append(parameter)
                size += parameter.numel()
            self.buckets.append(Bucket(members, is_matrix))
        for bucket in self.buckets:
            bucket.master = losses.precise(self.own(bucket.weight))  # (n,) or, sharded, (n / W,); fp32: no copy
            bucket.m, bucket.v = torch.zeros_like(bucket.master), torch.zeros_like(bucket.master)
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self.collect, bucket))
        self.is_last, self.in_flight = False, []
        self.is_half = any(bucket.weight.dtype == torch.float16 for bucket in self.buckets)
        self.loss_scale, self.good_steps = (2.0**16 if self.is_half else 1.0), 0

    def own(self, flat):
        """The part of a flat buffer that this rank updates: all of it, or the rank-th of W slices."""
        return flat.chunk(world_size())[rank()] if self.shard else flat

    def collect(self, bucket, parameter):
        """Hook: `parameter.grad` is complete for this backward. Move it to the bucket; send a bucket that is full."""
        bucket.add(parameter, parameter.grad)
        parameter.grad = None
        if not bucket.waiting and (self.is_last or self.shard):
            self.send(bucket)

    def last_backward(self):
        """From here on, each parameter's next gradient is its last of this step. (One whose last has come already,
        as the contrastive scale's, keeps its bucket waiting until `step`.)"""
        self.is_last = True
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)

    def send(self, bucket):
        """Start to sum `bucket.gradient` over the ranks. Sharded, the buffer goes with it, and the oldest of three
        messages is waited for: memory stays bounded, and two are on their way while backward goes on."""
        if self.shard:
            share = torch.empty_like(bucket.master)
            work = dist.reduce_scatter_tensor(share, bucket.gradient, async_op=True)
            self.in_flight.append((bucket, work, share, bucket.gradient))
            bucket.gradient = None
            if len(self.in_flight) > 2:
                self.receive()
        elif world_size() > 1 and bucket.work is None:
            bucket.work = dist.all_reduce(bucket.gradient, async_op=True)

    def receive(self):
        """Wait for the oldest message and add what it brings to the bucket's total."""
        bucket, work, share, _ = self.in_flight.pop(0)
        work.wait()
        bucket.total = share if bucket.total is None else bucket.total.add_(share)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Finish the sums, clip, update, forget the gradients; return the global gradient norm before clipping."""
        for bucket in self.buckets:
            if bucket.gradient is None and bucket.total is None and not any(bucket is b for b, *_ in self.in_flight):
                bucket.gradient = torch.zeros_like(losses.precise(bucket.weight))  # nobody used its parameters
            if bucket.gradient is not None:
                self.send(bucket)
        while self.in_flight:
            self.receive()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.total = bucket.total if self.shard else bucket.gradient
        norms = [torch.linalg.vector_norm(bucket.total, dtype=torch.float64).item() for bucket in self.buckets]
        squares = sum(norm**2 for norm in norms)
        if self.shard:
            squares = sum_over_ranks([squares], self.buckets[0].weight.device)[0]
        norm = math.sqrt(squares) / self.loss_scale
        if not math.isfinite(norm) and not self.is_half:
            raise ValueError("the gradient is not finite; no weight was changed")
        if math.isfinite(norm):
            self.update(lr, min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)
            self.good_steps += self.is_half
        for bucket in self.buckets:
            bucket.gradient = bucket.total = bucket.work = None
        self.is_last = False
        if not math.isfinite(norm):
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0
            if self.loss_scale < 1:
                raise ValueError("the gradient stays without end or number, however small the loss is scaled")
        elif self.good_steps == 2000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        return norm

    def update(self, lr: float, shrink: float):
        """AdamW on the masters of this rank, its gradients times `shrink`; then the weights everywhere.

        The corrections for the moments' start at zero, 1 - beta^t, are moved from the vectors into the scalars.
        """
        self.steps += 1
        beta1, beta2 = self.betas
        correction = math.sqrt(1 - beta2**self.steps)
        for bucket in self.buckets:
            gradient = bucket.total if shrink == self.loss_scale else bucket.total.mul_(shrink / self.loss_scale)
            if bucket.decay and self.weight_decay:
                bucket.master.mul_(1 - lr * self.weight_decay)
            bucket.m.lerp_(gradient, 1 - beta1)
            bucket.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = bucket.v.sqrt().add_(self.eps * correction)
            bucket.master.addcdiv_(bucket.m, denominator, value=-lr * correction / (1 - beta1**self.steps))
            self.publish(bucket)

    def state_dict(self) -> dict:
        """This rank's masters and moments, and the counters. The weights follow from the masters."""
        return {"steps": self.steps, "loss_scale": self.loss_scale, "good_steps": self.good_steps,
                # clone: a slice would be written to disk with the whole buffer it is cut from
                "buckets": [{"master": b.master.clone(), "m": b.m, "v": b.v} for b in self.buckets]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.steps, self.loss_scale, self.good_steps = state["steps"], state["loss_scale"], state["good_steps"]
        for bucket, saved in zip(self.buckets, state["buckets"], strict=True):
            for name in ("master", "m", "v"):
                getattr(bucket, name).copy_(saved[name])
            self.publish(bucket)

    def publish(self, bucket):
        """Masters -> the model's weights, on every rank."""
        self.own(bucket.weight).copy_(bucket.master)
        if self.shard:
            dist.all_gather_into_tensor(bucket.weight, self.own(bucket.weight).clone())


def learning_rate(step: int, steps: int, config) -> float:
    """Linear from 0 over ceil(warmup_ratio * steps), then half a cosine to 0. Step 0 has rate 0, as in LLaVA's runs."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------------------
# 4. Gradient checkpointing, by hand


def checkpointed(function):
    """`function`, keeping only its arguments for backward: the rest is computed again when backward first asks.

    While it runs, each tensor that autograd wants to save is replaced by a number. When backward unpacks the first
    number, the function runs a second time, with the random state and autocast of the first, and the tensors are
    collected under the same numbers. (The older way, an autograd.Function that calls backward inside its own
    backward, fires the hooks of a shared module twice, and fails where no argument needs a gradient.)
    """

    def run(*args):
        if not torch.is_grad_enabled():
            return function(*args)
        device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
        state = random_state(device)
        autocast = dict(device_type=device.type, dtype=torch.get_autocast_dtype(device.type),
                        enabled=torch.is_autocast_enabled(device.type))
        numbers, saved = 0, {}

        def pack(tensor):
            nonlocal numbers
            numbers += 1
            return numbers - 1

        def unpack(number):
            if number not in saved:
                collect_again()
            return saved.pop(number)

        def collect_again():
            def collect(tensor):
                saved[len(saved)] = tensor.detach()

            again = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, torch.Tensor) else arg
                     for arg in args]
            now = random_state(device)
            set_random_state(state, device)
            saved.clear()
            with torch.enable_grad(), torch.autocast(**autocast), \
                    torch.autograd.graph.saved_tensors_hooks(collect, lambda _: None):
                function(*again)
            set_random_state(now, device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(*args)

    return run


def random_state(device) -> list:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def checkpoint_blocks(blocks, which: str):
    """"every" block, "every-other" (half the recomputation for half the saving), or "none"."""
    for i, block in enumerate(blocks):
        if which == "every" or (which == "every-other" and i % 2 == 0):
            block.forward = checkpointed(block.forward)


# ----------------------------------------------------------------------------------------------------------------
# 5. The model of a stage: what is loaded, what learns


def outline(config) -> VLM:
    """The model of this run without weights (on the meta device): for the plan, before anything is loaded."""
    if config.dry_run:
        shapes = SHAPES[config.preset]
    else:
        shapes = ViTConfig.from_pretrained(config.vit), LLMConfig.from_pretrained(config.llm)
    with torch.device("meta"):
        return choose_learning(config, VLM(ViT(shapes[0], config.feature_layer), LLM(shapes[1]), config.projector))


def choose_learning(config, vlm) -> VLM:
    """The stages, in one line: align trains the projector; instruct trains it and the LLM; nobody trains the ViT."""
    for part, learns in ((vlm.vit, False), (vlm.projector, True), (vlm.llm, config.stage == "instruct")):
        part.requires_grad_(learns)
    return vlm


def build_model(config, device, dtype) -> VLM:
    """The model with its weights on `device`: the towers, and a projector that is fresh (align) or `init`'s."""
    torch.manual_seed(config.seed)
    if config.dry_run:
        plan = outline(config)
        torch.set_default_dtype(dtype)
        with device:
            vlm = VLM(ViT(plan.vit.config, config.feature_layer), LLM(plan.llm.config), config.projector)
        torch.set_default_dtype(torch.float32)
    else:
        vlm = VLM.from_towers(config.vit, config.llm, config.projector, config.feature_layer, dtype, device)
    if config.stage == "instruct" and not config.dry_run:
        before = read_json(Path(config.init) / "config.json")
        for name in ("preset", "vit", "llm", "projector", "feature_layer"):
            if before.get(name) != getattr(config, name):
                raise ValueError(f"{config.init}: made with {name} {before.get(name)!r}, "
                                 f"this run has {getattr(config, name)!r}")
        loaded = vlm.load_projector(config.init, dtype, device)
        say(f"from {config.init}: loaded {', '.join(loaded)}; missing none, unexpected none")
    checkpoint_blocks(vlm.llm.model.layers, config.checkpointing)
    return choose_learning(config, vlm)


TEXT_TOKENS = {"align": 20, "instruct": 250}  # of a typical sample of LLaVA's two data sets, beside its image
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16, by part of the name


def row_length(config, vlm) -> int:
    """Tokens of a typical sample: BOS, image, text."""
    return 1 + vlm.num_image_tokens + TEXT_TOKENS[config.stage]


def flops_per_step(config, vlm) -> float:
    """Floating-point operations that one step needs, over all ranks; checkpointing's second forward not counted.

    A weight costs 2 operations per token forward, 2 for the gradient of its input, 2 more for its own if it learns;
    causal attention costs 2 S^2 C a layer forward and twice that backward.
    """
    c, S = vlm.llm.config, row_length(config, vlm)
    weights = sum(p.numel() for p in vlm.llm.model.layers.parameters())
    per_token = (6 if config.stage == "instruct" else 4) * weights
    attention = 3 * 2 * S * S * c.hidden_size * c.num_hidden_layers
    vision = 2 * sum(p.numel() for p in vlm.vit.parameters()) * vlm.num_image_tokens
    return config.batch * (S * per_token + attention + vision)


def contrastive_flops(config, vlm) -> float:
    """What the contrastive losses add to that. "patch": pooling, and products of all images with all captions, each
    once forward and twice backward; "prompt": the same products, and a pass of the LLM over the captions alone."""
    c, B = vlm.llm.config, config.batch
    terms = losses.TERMS[config.contrastive]
    text = 2 * sum(p.numel() for p in vlm.llm.model.layers.parameters()) * B * TEXT_TOKENS[config.stage]
    pooling = 3 * B * (vlm.num_image_tokens + TEXT_TOKENS[config.stage]) * c.hidden_size
    return len(terms) * 12 * B * B * c.hidden_size + ("patch" in terms) * pooling + ("prompt" in terms) * text


def memory_sum(config, vlm, dtype) -> dict:
    """Bytes that a rank needs, by purpose. Activations are an estimate; the rest is counted."""
    c, e = vlm.llm.config, dtype.itemsize
    weights = sum(p.numel() for p in vlm.parameters())
    learning = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    size, parts = split_batch(config)
    tokens = size * row_length(config, vlm)
    block = tokens * (16 * c.hidden_size + 4 * c.intermediate_size) * e  # what one block keeps for backward
    kept = tokens * c.hidden_size * e  # its input alone
    whole = {"none": 1.0, "every-other": 0.5, "every": 0.0}[config.checkpointing]
    held = parts if "prompt" in losses.TERMS[config.contrastive] else 1  # micro-batches that wait for their backward
    activations = held * c.num_hidden_layers * (whole * block + (1 - whole) * kept) + block
    activations += held * size * TEXT_TOKENS[config.stage] * c.vocab_size * 12  # logits: model dtype, fp32, gradient
    activations += 4 * size * parts * vlm.num_image_tokens * c.hidden_size * e  # patches, the cut, their gradients
    ranks = world_size() if config.shard else 1
    largest = max(2**22, *(p.numel() for p in vlm.parameters() if p.requires_grad))  # elements of a bucket
    return {"weights": weights * e, "gradients": learning * 4 / ranks + (3 * 4 * largest if ranks > 1 else 0),
            "masters and moments": learning * (8 if e == 4 else 12) / ranks,
            "activations": activations}


def print_plan(config, vlm, device, dtype, why, steps):
    """Everything a reader wants to know before the first step. Refuses what cannot fit into memory."""
    say(f"\nstage {config.stage}, preset {config.preset}: {steps} steps of {config.batch} on {world_size()} rank(s), "
        f"micro-batches of {split_batch(config)[0]}; negatives per image "
        f"{config.batch - 1 if config.contrastive != 'none' else 'none: no contrastive loss'}")
    say(f"{'module':<12}{'parameters':>16}{'learning':>16}  {'dtype':<10}source")
    source, short = "random weights" if config.dry_run else None, str(dtype).removeprefix("torch.")
    for name, part, origin in (("vit", vlm.vit, source or config.vit), ("projector", vlm.projector, config.projector),
                               ("llm", vlm.llm, source or config.llm)):
        total = sum(p.numel() for p in part.parameters())
        learning = sum(p.numel() for p in part.parameters() if p.requires_grad)
        say(f"{name:<12}{total:>16,}{learning:>16,}  {short:<10}{origin}")
    say(f"{short}: {why}; norms, softmax, losses and optimizer in float32")
    flops, memory = flops_per_step(config, vlm), memory_sum(config, vlm, dtype)
    if config.contrastive != "none":
        say(f"the contrastive loss ({config.contrastive}) adds {contrastive_flops(config, vlm) / flops:.2g} "
            "of the operations of the rest")
    hours = flops * steps / (8 * 0.4 * PEAK_FLOPS["H100"]) / 3600
    say(f"{steps * config.batch * row_length(config, vlm):,} tokens, "
        f"{flops * steps / 1e18:.3g} EFLOP; on 8 H100 at 40 % of their peak {hours:.2g} h")
    has = device_memory(device)
    say("memory of a rank, GiB: " + ", ".join(f"{name} {size / 2**30:.3g}" for name, size in memory.items())
        + f"; sum {sum(memory.values()) / 2**30:.3g} of {has / 2**30:.3g}")
    if sum(memory.values()) > has:
        raise ValueError(f"{config.preset} {config.stage} needs about {sum(memory.values()) / 2**30:.0f} GiB a rank, "
                         f"this device has {has / 2**30:.0f}: more ranks with --shard True, a smaller --micro_batch, "
                         "--checkpointing every, or a smaller preset")


def device_memory(device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def print_sample(sample, tokenizer):
    """One sample as the model sees it, what carries loss between [[ and ]]: the first thing to look at."""
    text, inside = "", False
    for token, role in zip(sample["ids"], sample["roles"]):
        if (role != data.CONTEXT) != inside:
            text += "]] " if inside else " [["
            inside = not inside
        text += data.IMAGE if token == data.IMAGE_MARKER else f" {tokenizer.decode([token])}"
    say("first sample:", repr(text + ("]]" if inside else "")))


# ----------------------------------------------------------------------------------------------------------------
# 6. The data of a stage: which records make which step


def split_batch(config) -> tuple:
    """(samples in a micro-batch, micro-batches in a step) of each rank."""
    share = config.batch // world_size()
    size = max(1, min(config.micro_batch, share))
    if config.batch % world_size() or share % size:
        raise ValueError(f"a batch of {config.batch} does not divide into {world_size()} ranks and "
                         f"micro-batches of {config.micro_batch}")
    return size, share // size


def micro_batches_of_rank(config, lengths: list, steps: int) -> list:
    """The indices of every micro-batch of this rank, in time order; `lengths` are those of all records.

    Step k takes the same `batch` records on any number of ranks; a last batch that runs short starts the next pass.
    """
    size, accumulation = split_batch(config)
    kept = data.subset(len(lengths), config.data_fraction, config.seed)
    order, epoch = [], 0
    while len(order) < steps * config.batch:
        if config.group_by_length:
            passes = data.grouped_order([lengths[i] for i in kept], config.batch, world_size() * accumulation,
                                        config.seed, epoch)
        else:
            passes = data.epoch_order(len(kept), config.seed, epoch)
        order += [kept[i] for i in passes]
        epoch += 1
    starts = [step * config.batch + (rank() * accumulation + part) * size
              for step in range(steps) for part in range(accumulation)]
    return [order[start : start + size] for start in starts]


def count_steps(config, n: int) -> int:
    kept = len(data.subset(n, config.data_fraction, config.seed))
    return 3 if config.dry_run else config.steps or max(1, math.ceil(kept * config.epochs / config.batch))


def make_samples(config, vlm):
    """The records of this stage, checked; or, in a dry run, random ones of the same shape."""
    size = vlm.vit.config.image_size
    if config.dry_run:
        return data.RandomSamples(3 * config.batch, TEXT_TOKENS[config.stage], vlm.llm.config.vocab_size, size)
    pair = data.PROMPTS[config.prompt]
    prompts = config.prompt_image or pair[0], config.prompt_text or pair[1]
    samples = open_samples(config.annotations, config.images, config.llm, config.template, size, config.fit, prompts,
                           config.cache, vlm.vit.config.looks)
    data.check_vocabulary(samples.tokenizer, vlm.llm.config.vocab_size)
    if samples.tokenizer.unk_token_id in samples.tokenizer(" ".join(prompts), add_special_tokens=False).input_ids:
        say(f"the LLM does not know every word of the prompts {prompts}")
    return samples


@lru_cache(3)  # a comparison opens the same files for many runs
def open_samples(annotations, images, llm, *how):
    return data.Conversations(data.load_records(annotations), images, data.load_tokenizer(llm), *how)


def find_data(config):
    """The toy world is made, by one rank, where it is missing; anything else is asked for."""
    if config.dry_run:
        return
    if config.stage == "instruct" and not Path(config.init).is_dir():
        raise FileNotFoundError(f"{config.init}: no align run to start from; "
                                f"`python train.py --stage align --preset {config.preset}` makes one")
    if rank() == 0 and config.annotations.startswith("data/toy/") and not Path("data/toy").exists():
        say("writing the toy world to data/toy")
        data.write_toy_world("data/toy")
    barrier()
    if not Path(config.annotations).exists():
        known = {"align": "LLaVA-Pretrain", "instruct": "LLaVA-Instruct-150K (mix665k)"}[config.stage]
        raise FileNotFoundError(
            f"{config.annotations}: no such file. Stage {config.stage} of preset {config.preset} reads a LLaVA JSON, "
            f"such as that of the Hub's liuhaotian/{known}, from --annotations, and its pictures from --images "
            f"(now {config.images}). Without it: --dry_run True for 3 steps at full shape on random data, or "
            "--preset tiny for the toy world")


def make_loader(config, samples, vlm, start, steps, device):
    """A DataLoader over this rank's micro-batches, from step `start` on."""
    to_batch = partial(data.collate, num_image_tokens=vlm.num_image_tokens, image_token_id=vlm.image_token_id,
                       pad_id=samples.pad_id, image_size=vlm.vit.config.image_size,
                       max_length=min(config.max_length, vlm.llm.config.max_position_embeddings))
    mine = micro_batches_of_rank(config, samples.lengths(), steps)[start * split_batch(config)[1] :]
    return torch.utils.data.DataLoader(
        samples, batch_sampler=mine, collate_fn=to_batch, num_workers=config.workers,
        pin_memory=device.type == "cuda", persistent_workers=config.workers > 0,
        generator=torch.Generator().manual_seed(config.seed))  # its own: it must not draw from the run's random state


# ----------------------------------------------------------------------------------------------------------------
# 7. One step


def train_step(vlm, scales, optimizer, micro_batches, config, lr) -> dict:
    """One update from the micro-batches of this rank; returns what the log shows.

    The gradient is that of one process with the whole batch in one piece: every loss is divided by a count over the
    *whole step*, and a contrastive loss sees the images of all micro-batches at once. The latter costs the projected
    patches of a rank's batch, (B, N, C), held in memory for the length of the step; and, for the prompted loss,
    whose image vectors come out of the LLM, what the LLM keeps for the backward of all micro-batches.
    """
    # 1. Count, over all ranks and micro-batches, what the losses are divided by.
    device = vlm.llm.head_weight.device
    tokens, = sum_over_ranks([sum(losses.count_supervised(m["labels"]) for m in micro_batches)], device)
    if tokens == 0:
        raise ValueError("no token of this step carries loss")
    micro_batches = [{key: value.to(device, non_blocking=True) for key, value in m.items()} for m in micro_batches]
    if len(scales) and not all((m["ids"] == vlm.image_token_id).any(1).all() for m in micro_batches):
        raise ValueError("the contrastive loss pairs each caption with one image; a record here has none")

    # 2. Image -> ViT -> projector, for all micro-batches. The graph is cut behind the projector: each loss leaves
    #    its gradient at the cut, and the projector's own backward runs once for all.
    patches = [vlm.encode(m["pixels"]) for m in micro_batches]  # each (I, N, C)
    cut = [p.detach().requires_grad_() for p in patches]

    # 3. Patches -> LLM -> generative loss, one micro-batch after another: each waits for its turn in 5, unless the
    #    prompted loss needs the hidden states of all of them first.
    passes = (caption_pass(vlm, m, p) for m, p in zip(micro_batches, cut))
    if "prompt" in scales:
        passes = list(passes)

    # 4. The contrastive losses, over all images and captions of the step. Their graph is cut at the image vectors.
    pairs = {}
    if "patch" in scales:  # needs no LLM, only its embedding table
        pairs["patch"] = (
            torch.cat([losses.pool_patches(p, config.pool) for p in cut]),
            cat_captions([losses.caption_vectors(vlm.llm.embed(m["caption_ids"]), m["caption_mask"], config.reduce)
                          for m in micro_batches]))
    if "prompt" in scales:
        summary_cut = [summary.detach().requires_grad_() for _, summary in passes]  # each (B, C)
        pairs["prompt"] = (
            torch.cat([losses.unit(summary) for summary in summary_cut]),
            torch.cat([losses.unit(losses.summaries(vlm.llm.hidden(vlm.llm.embed(m["summary_ids"])),
                                                    m["summary_mask"].sum(1) - 1)) for m in micro_batches]))
    keys = torch.cat([m["caption_keys"] for m in micro_batches])  # (B,)
    contrastive = {name: losses.contrastive_loss(image, text, scales[name](), keys)
                   for name, (image, text) in pairs.items()}
    if contrastive:
        total = sum(loss for loss, _ in contrastive.values())
        (optimizer.loss_scale * config.contrastive_weight * total).backward()

    # 5. Backward, one micro-batch after another: LLM, cut, projector.
    generative = 0.0
    for i, (loss, summary) in enumerate(passes):
        if i == len(micro_batches) - 1:
            optimizer.last_backward()
        ends = [(optimizer.loss_scale * loss / tokens, None)]
        ends += [(summary, summary_cut[i].grad)] if "prompt" in scales else []
        torch.autograd.backward(*zip(*ends))
        patches[i].backward(cut[i].grad)  # what all losses left at the cut goes back through the projector
        generative += loss.item() / tokens

    # 6. Sum over ranks, clip, update.
    norm = optimizer.step(lr)
    for scale in scales.values():
        scale.clamp_()
    line = {"generative": generative}
    for name, (loss, accuracy) in contrastive.items():
        line |= {name: loss.item(), f"{name}_retrieval": accuracy.item()}
    line = dict(zip(line, sum_over_ranks(list(line.values()), device)))
    line = {"loss": line["generative"] + config.contrastive_weight * sum(line[name] for name in contrastive)} | line
    return line | {f"{name}_scale": scale().item() for name, scale in scales.items()} | {
        "lr": lr, "grad_norm": norm if math.isfinite(norm) else None,  # None: a float16 step that was skipped
        "tokens": int(tokens)}


def caption_pass(vlm, m, patches):
    """Through the LLM with one micro-batch: its summed generative loss, and the hidden states (B, C) just before each
    caption begins. Attention is causal: they know the image and the prompt, and nothing of the caption."""
    hidden = vlm.llm.hidden(vlm.splice(m["ids"], patches))  # (B, S, C)
    return (losses.generative_loss(hidden, m["labels"], vlm.llm.head_weight),
            losses.summaries(hidden, losses.last_before_labels(m["labels"])))


def cat_captions(vectors):
    """Caption vectors of all micro-batches in one tensor: (B, C), or (B, T, C) with T the longest."""
    if vectors[0].ndim == 2:
        return torch.cat(vectors)
    longest = max(v.shape[1] for v in vectors)
    return torch.cat([losses.lengthen(v, longest) for v in vectors])


# ----------------------------------------------------------------------------------------------------------------
# 8. Checkpoints: a run that was stopped goes on as if it had not been


def save_checkpoint(config, step: int, optimizer, device):
    """Write OUT/checkpoint-STEP, complete or not at all, and keep the last two. Every rank writes its own file."""
    final = Path(config.out) / f"checkpoint-{step:07d}"
    partial = final.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    with open(partial / f"rank-{rank()}.pt", "wb") as file:
        torch.save({"step": step, "ranks": world_size(), "config": asdict(config),
                    "optimizer": optimizer.state_dict(), "random": random_state(device)}, file)
        file.flush()
        os.fsync(file.fileno())
    barrier()
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        folder = os.open(final.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        os.fsync(folder)
        os.close(folder)
        for old in sorted(final.parent.glob("checkpoint-???????"))[:-2]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(config, optimizer, device) -> int:
    """Restore this rank from the run's last checkpoint; return the step to go on with, 0 if there is none."""
    found = sorted(Path(config.out).glob("checkpoint-???????"))
    if not found:
        say(f"{config.out}: no checkpoint to resume from; starting at step 0")
        return 0
    first = torch.load(found[-1] / "rank-0.pt", map_location="cpu", mmap=True, weights_only=True)
    if first["ranks"] != world_size():
        raise ValueError(f"{found[-1]}: saved by {first['ranks']} ranks, resumed by {world_size()}; "
                         "the number of ranks must stay the same")
    for name, value in asdict(config).items():
        if name not in ("resume", "save_every", "workers", "cache", "out") and first["config"].get(name) != value:
            raise ValueError(f"{found[-1]}: saved with --{name} {first['config'].get(name)!r}, "
                             f"resumed with {value!r}")
    state = torch.load(found[-1] / f"rank-{rank()}.pt", map_location="cpu", mmap=True, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    set_random_state(state["random"], device)
    say(f"resumed from {found[-1]}: step {state['step']}")
    return state["step"]


OUTPUTS = ("config.json", "llm", "projector.safetensors", "results.json", "retrieval.json", "gap.json", "heatmap.png",
           *(f"{bench}.{kind}" for bench in evaluation.BENCHES for kind in ("json", "png")))


def write_log(config, line: dict, start: int):
    """Append one step to OUT/log.jsonl. The first line of a fresh run moves a finished one in OUT aside and clears what
    an unfinished one left; that of a resumed run drops the steps that come again."""
    if rank() > 0:
        return
    out, file = Path(config.out), Path(config.out) / "log.jsonl"
    if line["step"] == start:
        if start == 0 and (out / "config.json").exists():
            say(f"{out} holds a finished run: it is now {out}.old")
            shutil.rmtree(f"{out}.old", ignore_errors=True)
            out.rename(f"{out}.old")
        out.mkdir(parents=True, exist_ok=True)
        kept = file.read_text().splitlines(True)[:start] if start else []  # line k is step k
        file.write_text("".join(kept))
        for old in [*out.glob("checkpoint-*"), *map(out.joinpath, OUTPUTS)] if start == 0 else ():
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    with open(file, "a") as log:
        log.write(json.dumps(line) + "\n")


def save_run(config, vlm, results: dict):
    """The finished run directory. Written beside it first, so that a run that fails leaves no half of one."""
    out, partial = Path(config.out), Path(f"{config.out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    vlm.save(partial, asdict(config), with_llm=config.stage == "instruct")
    (partial / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    # config.json comes last: only with it is this a run directory. A run stopped right here may have left its llm/.
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == "config.json"):
        if entry.is_dir():
            shutil.rmtree(out / entry.name, ignore_errors=True)
        os.replace(entry, out / entry.name)
    partial.rmdir()


def remember(folder):
    """Make `folder` the run that eval.py looks at when none is named."""
    Path("runs").mkdir(exist_ok=True)
    Path("runs/last").write_text(str(folder))


# ----------------------------------------------------------------------------------------------------------------
# 9. A stage: everything above, in order


def train_stage(config: Config, device):
    """Run align or instruct, from the files on disk to the run directory `config.out`."""
    dtype, why = choose_dtype(device)
    find_data(config)
    plan = outline(config)
    samples = make_samples(config, plan)
    steps = count_steps(config, len(samples))
    print_plan(config, plan, device, dtype, why, steps)
    vlm = build_model(config, device, dtype)
    scales = nn.ModuleDict({name: losses.ContrastiveScale() for name in losses.TERMS[config.contrastive]}).to(device)
    learning = [p for p in [*vlm.parameters(), *scales.parameters()] if p.requires_grad]
    optimizer = DataParallelAdamW(learning, config.weight_decay, config.clip, shard=config.shard)
    start = load_checkpoint(config, optimizer, device) if config.resume else 0
    loader = iter(make_loader(config, samples, vlm, start, steps, device))
    if not config.dry_run:
        print_sample(samples[0], samples.tokenizer)

    began, log = time.time(), []
    for step in (bar := tqdm(range(start, steps), desc=config.stage, initial=start, total=steps, disable=rank() > 0)):
        step_began = time.time()
        lr = learning_rate(step, steps, config)
        micro_batches = [next(loader) for _ in range(split_batch(config)[1])]
        line = {"step": step, **train_step(vlm, scales, optimizer, micro_batches, config, lr)}
        line |= {"ms": round(1000 * (time.time() - step_began), 1), "memory_mib": peak_memory(device)}
        log.append(line)
        bar.set_postfix({key: f"{line[key]:.3f}" for key in ("generative", *scales)})
        if step == 0:
            say(f"first step: {line['tokens']} tokens carry loss, {line['tokens'] / config.batch:.1f} a sample; "
                f"loss {line['generative']:.2f}, that of a uniform guess is {math.log(vlm.llm.config.vocab_size):.2f}")
        if not config.dry_run:
            write_log(config, line, start)
            if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < steps:
                save_checkpoint(config, step + 1, optimizer, device)

    if config.dry_run:
        print_dry_run(config, vlm, device, dtype, log)
    elif rank() == 0:
        save_run(config, vlm, {"stage": config.stage, "steps": steps, "seconds": round(time.time() - began, 1),
                               "last_step": line})
    barrier()


def print_dry_run(config, vlm, device, dtype, log):
    """What the three steps took: the fastest of those after the first."""
    seconds = min(line["ms"] for line in log[1:]) / 1000
    tokens = config.batch * row_length(config, vlm)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    mfu = flops_per_step(config, vlm) / seconds / world_size() / peak if peak else None
    say(json.dumps({"dry_run": f"{config.preset} {config.stage}", "device": name, "ranks": world_size(),
                    "ms_per_step_fastest_of_2": round(1000 * seconds, 1), "tokens_per_s": round(tokens / seconds),
                    "mfu": mfu and round(mfu, 3), "peak_memory_gib": round(peak_memory(device) / 1024, 2),
                    "predicted_gib": round(sum(memory_sum(config, vlm, dtype).values()) / 2**30, 2)}))


def peak_memory(device) -> int:
    """The most memory in use so far, in MiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


# ----------------------------------------------------------------------------------------------------------------
# 10. Comparing the losses on the toy world: the papers' claims in miniature

FULL = dict(seeds=5, budgets=(30, 60, 120, 240), short=60, long=240, epochs=4.0,
            fractions=(0.01, 0.05, 0.1, 0.25, 0.5, 1.0), lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), weight=(0.3, 1.0),
            instruct_lr=(2e-4, 4e-4, 8e-4, 1.6e-3), ablations=5)
QUICK = dict(seeds=2, budgets=(30, 60), short=30, long=60, epochs=1.0, fractions=(0.1, 1.0), lr=(2e-3,), weight=(1.0,),
             instruct_lr=(4e-4,), ablations=0)
TUNING_SEED = 1000  # no seed of the comparison itself
ABLATIONS = {  # options of the align stage; the losses they are tried with
    "as above (MLP, CLIP-like encoder; prompt describe with its loss)": ({}, ("none", "patch", "prompt", "both")),
    "projector linear": (dict(projector="linear"), ("none", "patch", "both")),
    "projector pixel_shuffle (9 tokens an image)": (dict(projector="pixel_shuffle"), ("none", "patch", "both")),
    "projector resampler (9 tokens an image)": (dict(projector="resampler"), ("none", "patch", "both")),
    "encoder that never saw text": (dict(vit="assets/tiny-vit-no-text"), ("none", "patch", "both")),
    "larger LLM (1.1 M weights, not 0.5)": (dict(llm="assets/tiny-llm-wide"), ("none", "patch", "prompt", "both")),
    "prompt none": (dict(prompt="none"), ("prompt",)),
    "prompt describe in the captioning pass alone": (dict(prompt="describe"), ("none", "patch")),
}


def compare(given: dict, device):
    """Every loss x part of the instruction data x seed, resumable; results.json, results.md and two charts in OUT.

    What keeps it fair: the world and the towers were fixed by criteria that look at no alignment (text-only accuracy,
    linear probe). Each loss gets equal data, steps and the same small grid of learning rates (times, where there is
    a contrastive loss, weights), tuned with a seed of its own on the validation split. Test questions choose nothing.
    """
    size = QUICK if given.get("quick") else FULL
    out = Path(given.get("out") or "runs/compare")
    fixed = {"contrastive", "contrastive_weight", "data_fraction", "dry_run", "epochs", "init", "lr", "save_every",
             "seed", "steps"} | ({"preset"} if given.get("preset", "tiny") != "tiny" else set())
    if fixed & given.keys():
        raise ValueError(f"--stage compare sets --{', --'.join(sorted(fixed & given.keys()))} itself")
    given = {key: value for key, value in given.items() if key not in ("stage", "quick", "out", "resume", "preset")}
    find_data(configure("align", given | {"preset": "tiny"}))
    file, protocol = out / "cells.jsonl", json.loads(json.dumps([size, given, fingerprint(given)]))
    out.mkdir(parents=True, exist_ok=True)
    if (out / "protocol.json").exists() and read_json(out / "protocol.json") != protocol:
        raise ValueError(f"{out}: holds a comparison with other options, towers or data; name another --out, or "
                         "remove it")
    (out / "protocol.json").write_text(json.dumps(protocol))
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        done = {cell["name"]: cell for cell in map(json.loads, lines)}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: a damaged line ({error}); remove it, and its run is done again") from None
    few, many = len(size["lr"]), len(size["lr"]) * len(size["weight"])
    tries = 2 * (few + 3 * many) * (many > 1) + 16 * len(size["instruct_lr"]) * (len(size["instruct_lr"]) > 1)
    planned = tries + 4 * size["seeds"] * (len(size["budgets"]) + len(size["fractions"]) + 2)
    planned += size["ablations"] * sum(len(compared) for _, compared in ABLATIONS.values())
    bar = tqdm(desc="compare", total=planned, unit=" runs")

    def run(stage, name, split, **options):
        """The scores of one training run on the split; trained only if no earlier call of `compare` did it."""
        folder = out / "runs" / name
        if f"{name} {split}" not in done:
            options = given | options | {"preset": "tiny", "out": str(folder), "save_every": 0}
            with open(out / "runs.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
                if not (folder / "config.json").exists():
                    train_stage(configure(stage, options), device)
                scores = score_run(folder, split, device)
            done[f"{name} {split}"] = {"name": f"{name} {split}", **scores}
            with open(file, "a") as cells:
                cells.write(json.dumps(done[f"{name} {split}"]) + "\n")
            if stage == "instruct":  # nothing starts from it, and its LLM is large
                shutil.rmtree(folder)
        bar.update()
        bar.set_postfix_str(f"{name} {done[f'{name} {split}']['accuracy_img']}")
        return done[f"{name} {split}"]

    def align(loss, steps, seed, lr, weight, split, extra="", **options):
        name = f"{loss}-{steps}-seed{seed}-lr{lr}-weight{weight}{extra}"
        return name, run("align", name, split, contrastive=loss, steps=steps, seed=seed, lr=lr,
                         contrastive_weight=weight, **options)

    def instruct(start, fraction, seed, lr, split, **options):
        return run("instruct", f"{start}-instruct{fraction}-lr{lr}", split, init=str(out / "runs" / start), seed=seed,
                   data_fraction=fraction, epochs=size["epochs"], lr=lr, **options)

    # 1. Tune each loss at the short and at the long budget, on the validation split.
    tuned, tuning = {}, {}
    for loss in losses.TERMS:
        for steps in (size["short"], size["long"]):
            grid = [(lr, w) for lr in size["lr"] for w in (size["weight"] if loss != "none" else (1.0,))]
            lr, weight = grid[0] if len(grid) == 1 else max(grid, key=lambda pair: align(
                loss, steps, TUNING_SEED, *pair, "val")[1]["accuracy_img"])
            rates = size["instruct_lr"]
            rate = rates[0] if len(rates) == 1 else max(rates, key=lambda rate: sum(
                instruct(f"{loss}-{steps}-seed{TUNING_SEED}-lr{lr}-weight{weight}", part, TUNING_SEED, rate,
                         "val")["accuracy_img"] for part in (0.1, 1.0)))
            tuned[loss, steps] = lr, weight, rate
            tuning[f"{loss} {steps}"] = {"lr": lr, "contrastive_weight": weight, "instruct_lr": rate}

    # 2. All budgets without instruction data; the short and the long one with parts of it.
    cells, ablations = [], {}
    for seed in range(size["seeds"]):
        for loss in losses.TERMS:
            for steps in size["budgets"]:
                lr, weight, rate = tuned[loss, size["short" if steps <= size["short"] else "long"]]
                start, scores = align(loss, steps, seed, lr, weight, "test")
                cells.append({"loss": loss, "steps": steps, "fraction": 0, "seed": seed, **scores})
                parts = size["fractions"] if steps == size["short"] else (0.1, 1.0) if steps == size["long"] else ()
                cells += [{"loss": loss, "steps": steps, "fraction": part, "seed": seed,
                           **instruct(start, part, seed, rate, "test")} for part in parts]
        text = evaluation.report(out, size, tuning, cells, ablations)  # a comparison cut short has fewer seeds

    # 3. The second paper's ablations, after aligning for the long budget with that budget's tuned numbers.
    for name, (options, compared) in ABLATIONS.items() if size["ablations"] else ():
        for loss in compared:
            lr, weight, _ = tuned[loss, size["long"]]
            extra = f"-{name.replace(' ', '-')}" if options else ""
            runs = [align(loss, size["long"], seed, lr, weight, "test", extra, **options)[1]
                    for seed in range(size["ablations"])]
            ablations[name, loss] = [scores["accuracy_img"] for scores in runs]
        text = evaluation.report(out, size, tuning, cells, ablations)
    bar.close()
    say(text)


def fingerprint(given: dict) -> str:
    """A hash of the towers and the data of a comparison: cells of two worlds must not meet in one table."""
    align, instruct = (configure(stage, given | {"preset": "tiny"}) for stage in ("align", "instruct"))
    others = [options[name] for options, _ in ABLATIONS.values() for name in ("vit", "llm") if name in options]
    files = [resolve(tower) / "model.safetensors" for tower in (align.vit, align.llm, *others)]
    files += [align.annotations, instruct.annotations, Path(align.scienceqa) / "problems.json"]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def score_run(folder, split, device) -> dict:
    """Accuracy in percent on the toy world's ScienceQA and, for its test split, on its yes-or-no questions."""
    vlm, tokenizer, config = evaluation.load_run(folder, device)
    template = config["template"]
    scores = evaluation.answer_bench(vlm, tokenizer, template, "scienceqa", config["scienceqa"], split)[0]
    line = {key: scores[key] for key in ("accuracy_img", "accuracy_txt")}
    if split == "test":
        line["pope"] = evaluation.answer_bench(vlm, tokenizer, template, "pope", config["pope"])[0]["accuracy"]
        line["mme"] = evaluation.answer_bench(vlm, tokenizer, template, "mme", config["mme"])[0]["accuracy_plus"]
    return line


# ----------------------------------------------------------------------------------------------------------------
# 11. The command line


def run_all(given: dict, device):
    """Align, instruct, and the benchmark before, between and after: what each stage adds."""
    root = Path(given.get("out") or f"runs/{configure('align', given).preset}")
    only_instruct = ("data_fraction", "init")
    only_align = ("contrastive", "contrastive_weight", "pool", "reduce", "prompt", "prompt_image", "prompt_text")
    align = configure("align", {key: value for key, value in given.items() if key not in only_instruct}
                      | {"out": str(root / "align")})
    instruct = configure("instruct", {key: value for key, value in given.items() if key not in only_align}
                         | {"out": str(root / "instruct"), "init": align.out})
    train_stage(align, device)
    train_stage(instruct, device)
    if rank() > 0 or align.dry_run:
        return
    remember(instruct.out)
    save_unaligned(align, root / "unaligned")
    scores = {name: evaluation.run_bench("scienceqa", root / name, None, None, device)
              for name in ("unaligned", "align", "instruct")}
    say(f"\nScienceQA, test split, percent right{'':<8}all   with image")
    for name, score in scores.items():
        say(f"  {name:<34}{score['accuracy']:>10.1f}{score['accuracy_img']:>13.1f}")
    say(json.dumps({"out": str(root), "contrastive": align.contrastive, "data_fraction": instruct.data_fraction,
                    **{f"{name}_img": score["accuracy_img"] for name, score in scores.items()},
                    "peak_memory_mib": peak_memory(device)}))


def save_unaligned(config, folder):
    """The run that `config` started from: both towers and the projector's initial weights."""
    build_model(config, torch.device("cpu"), torch.float32).save(folder, asdict(config), with_llm=False)


def main():
    given = parse_args()
    stage = given.get("stage", "all")
    try:
        device = start_ranks()
        if stage == "compare" and world_size() > 1:
            raise ValueError("--stage compare trains many tiny models, one after another, in one process")
        elif stage == "compare":
            compare(given, device)
        elif stage == "all":
            run_all(given, device)
        else:
            config = configure(stage, given)
            train_stage(config, device)
            if rank() == 0 and not config.dry_run:
                remember(config.out)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and rank() > 0:
            sys.exit(1)  # every rank misses the same file; rank 0 says so
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")  # a loader process wraps its error in a traceback
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; --resume goes on from the last checkpoint, if --save_every has made one")
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
