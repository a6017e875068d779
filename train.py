"""Training: data parallelism, mixed precision and gradient checkpointing by hand; a step; two stages.

    python train.py                                        # no GPU: the tiny preset, both stages, scored
    torchrun --nproc_per_node=8 train.py --stage align     # with GPUs: patch loss, then LLaVA's stage 1
    torchrun --nproc_per_node=8 train.py --stage instruct  # stage 2: projector and LLM on instructions

Two stages on LLaVA's recipe (arXiv 2310.03744). Align: image-caption pairs; only the projector learns (and a
temperature), from the captioning loss and a contrastive loss. Instruct: conversations; the projector and the
LLM learn, from the next-token loss alone. The ViT is frozen throughout. Align may put *contrast first*: its
first steps then have the patch loss alone, and the LLM does not run. With --contrastive patch that loss has
weight 0 after them, unless a weight or a ratio is given.

A step is one update from a batch over all ranks. Each rank takes its part of the batch in micro-batches: as
many samples as fit through the LLM at once.

Options, the plan, checkpoints and the order of the records have files of their own in running/.

Read next: eval.py, which asks the trained model.
"""

import gc
import math
import os
import sys
import time
import weakref
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

import data
import losses
from plumbing.files import ROOT
from plumbing.ranks import (agree, all_gather, caught_signals, choose_dtype, command, on_every_rank,
                            peak_memory, rank, reduce_scatter, run_alone, say, start_ranks, sum_over_ranks,
                            total_memory, world_size)
from projector import VLM
from running import checkpoint, costs, directory, features, held_out, loading, options, order, plan
from running.options import Config
from running.watch import Watch, bars, draw_curves, figures, log, naming, origin, shown

# ------------------------------------------------------------------------------------------------------------
# 1. Data parallelism, mixed precision and AdamW
#
# Begin with the docstring of DataParallelAdamW: four lines say what it does, and then what buckets are for.

class Bucket:
    """Some parameters laid end to end in one flat tensor: it is sent, sharded and updated as a whole.

    weight        (n,) in the model's dtype; every parameter is a view into it. n is a multiple of W.
    gradient      (n,) fp32: this rank's gradient while backward fills it. None before, and once it is sent.
    total         the gradient of the step, summed over all ranks: (n,), or with `shard` this rank's (n / W,)
    master, m, v  fp32 weights and AdamW's two moments, as long as `total`. The master of fp32 weights is
                  `weight` itself, or this rank's slice of it.
    """

    def __init__(self, parameters, shard: bool):
        self.parameters = parameters
        self.shard = shard
        self.is_matrix = parameters[0].ndim > 1
        self.size = sum(p.numel() for p in parameters)
        padding = -self.size % world_size()
        self.weight = parameters[0].detach().new_zeros(self.size + padding)  # (n,)
        self.place = {}  # parameter -> its slice of the flat tensors
        start = 0
        for p in parameters:
            place = slice(start, start + p.numel())
            self.weight[place] = p.detach().flatten()
            p.data = self.weight[place].view_as(p)
            self.place[p] = place
            start = place.stop
        if world_size() > 1:
            dist.broadcast(self.weight, src=0)  # equal seeds are a habit, not a guarantee
        self.master = losses.at_least_fp32(self.own(self.weight))
        self.gradient = None
        self.total = None
        self.is_sent = False  # whether a message of this step has left
        self.waiting = set()  # parameters whose gradient has yet to come
        self.forget()

    def forget(self):
        """Set AdamW's state back to that of step 0."""
        self.m = torch.zeros_like(self.master)
        self.v = torch.zeros_like(self.master)
        self.steps = torch.zeros((), dtype=torch.float32, device=self.master.device)

    def own(self, flat):
        """The part of a flat tensor (n,) that this rank updates: all of it, or the rank-th of W slices."""
        return flat.chunk(world_size())[rank()] if self.shard else flat

    def open(self):
        """Make a gradient of zeros, if there is none."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weight, dtype=self.master.dtype)
            self.waiting = set(self.parameters)

    def add(self, p):
        """Add p.grad to the flat gradient, in fp32, and forget it."""
        self.open()
        self.gradient[self.place[p]].view_as(p).add_(p.grad)
        p.grad = None
        self.waiting.discard(p)

    def close(self):
        """Hand out the flat gradient. A parameter that nobody used has a gradient of zero."""
        self.open()
        gradient = self.gradient
        self.gradient = None
        self.is_sent = True
        return gradient

    def update(self, lr: float, betas, weight_decay: float):
        """AdamW on the master, in place. Vectors (norms, biases, the contrastive scale) do not decay."""
        adamw(
            [self.master], [self.total], [self.m], [self.v], [], [self.steps],
            lr=lr, beta1=betas[0], beta2=betas[1], eps=1e-8,
            weight_decay=weight_decay if self.is_matrix else 0.0,
            amsgrad=False, maximize=False, fused=True,
        )

    def write(self):
        """Round the master into the weights. Returns what to wait for, or None."""
        own = self.own(self.weight)
        own.copy_(self.master)
        if self.shard:
            return all_gather(self.weight, own.clone(), async_op=True)

    def state_dict(self) -> dict:
        state = {"master": self.master, "m": self.m, "v": self.v, "steps": self.steps}
        return {name: x.to("cpu", copy=True) for name, x in state.items()}  # not what a slice is a view of

    def load_state_dict(self, *states):
        """Take this rank's part out of the parts that all ranks saved, however many they were."""
        length = len(self.master)
        start = length * rank() if self.shard else 0
        stop = min(start + length, self.size)
        for name in ("master", "m", "v"):
            ours = cut_out([state[name] for state in states], start, stop)
            getattr(self, name).copy_(F.pad(ours, (0, length - len(ours))))
        self.steps.copy_(states[0]["steps"])


def cut_out(parts: list, start: int, stop: int):
    """Numbers `start` to `stop` of flat tensors laid end to end. Reads only the parts that overlap these."""
    found = []
    begin = 0  # of a part
    for part in parts:
        found.append(part[max(start - begin, 0) : max(stop - begin, 0)])
        begin += len(part)
    return torch.cat(found)


def fill_buckets(parameters, bucket_size: int, shard: bool) -> list:
    """Buckets of about `bucket_size` numbers, each of one dtype, and either of matrices or of vectors."""
    groups = {}  # (dtype, whether of matrices) -> the members of each of its buckets
    for p in reversed(list(parameters)):  # backward meets the last layers first
        members = groups.setdefault((p.dtype, p.ndim > 1), [[]])
        size = sum(q.numel() for q in members[-1])
        if size and size + p.numel() > bucket_size:
            members.append([])
        members[-1].append(p)
    return [Bucket(part, shard) for members in groups.values() for part in members]


class DataParallelAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) whose gradients are summed over all ranks.

    Without buckets, overlap, mixed precision and sharding, this is what it does:

        for p in parameters:
            dist.all_reduce(p.grad)  # a sum, not a mean: the losses are shares, see losses.py
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        torch.optim.AdamW(parameters).step()

    In one step: 1. `backward` fills the buckets. A hook on each parameter adds its gradient to the bucket's
    fp32 buffer. 2. During the last backward (`last_backward()` was called) a full bucket is sent at once,
    while backward goes on with earlier layers. 3. `step` sends what is left, waits, clips by the global norm,
    and updates the fp32 masters. The weights are rounded copies of these: in bfloat16 alone, an update of
    2e-5 to a weight of 0.02 is lost, because the next number is 1.2e-4 away.

    With `shard` (ZeRO's stage 2, Rajbhandari et al. 2020, arXiv 1910.02054) the sum is a reduce-scatter. Each
    rank keeps gradients, masters and moments of only its 1/W of every bucket, and an all-gather returns the
    new weights, which all have. A bucket is then sent in *every* backward as soon as it is full, and its
    buffer is freed, so two or three whole buckets exist at a time: less memory, paid with a message for each
    micro-batch.

    Small gradients vanish in float16. So losses are multiplied by `loss_scale` before backward, and gradients
    are divided by it here. A step that overflows is skipped and halves it; 2000 good steps double it. With
    other dtypes it is 1, and a gradient that is not finite is an error.
    """

    def __init__(self, parameters, weight_decay=0.0, clip=0.0, betas=(0.9, 0.999), shard=False,
                 bucket_size=2**22):
        self.weight_decay = weight_decay
        self.clip = clip
        self.betas = betas
        self.shard = shard and world_size() > 1
        self.buckets = fill_buckets(parameters, bucket_size, self.shard)
        self.messages = []  # (bucket, total, work, gradient): on their way, oldest first
        self.is_last = False
        self.is_half = any(bucket.weight.dtype == torch.float16 for bucket in self.buckets)
        self.loss_scale = 2.0**16 if self.is_half else 1.0
        self.good_steps = 0
        # A parameter keeps its hook alive, so the hook must not keep the optimizer and its buckets alive.
        collect = partial(DataParallelAdamW.collect, weakref.proxy(self))
        self.bucket_of = {}
        for bucket in self.buckets:
            for p in bucket.parameters:
                self.bucket_of[p] = bucket
                p.register_post_accumulate_grad_hook(collect)

    # Phase 1, during backward: collect gradients, and send what is complete.

    def collect(self, p):
        """Hook: p.grad is complete for this backward."""
        bucket = self.bucket_of[p]
        bucket.add(p)
        if not bucket.waiting and (self.is_last or self.shard):
            self.send(bucket)

    def last_backward(self, is_last: bool = True):
        """The next gradient of each parameter is its last of this step. With False: maybe not."""
        self.is_last = is_last
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)

    def send(self, bucket):
        """Start to sum the bucket's gradient over the ranks."""
        gradient = bucket.close()
        total = gradient
        work = None
        if self.shard:
            total = torch.empty_like(bucket.master)
            work = reduce_scatter(total, gradient, async_op=True)
        elif world_size() > 1:
            work = dist.all_reduce(gradient, async_op=True)
        self.messages.append((bucket, total, work, gradient))  # the gradient must live until it has arrived
        if self.shard and len(self.messages) > 2:
            self.receive()  # two on their way are enough, and memory stays bounded

    def receive(self):
        """Wait for the oldest message and add it to the gradient of the step."""
        bucket, total, work, _ = self.messages.pop(0)
        if work is not None:
            work.wait()
        if bucket.total is not None:
            total += bucket.total
        bucket.total = total

    # Phase 2, after backward: finish the sums, clip, update.

    @torch.no_grad()
    def step(self, lr: float) -> float | None:
        """One update at learning rate `lr`. Returns the global gradient norm before clipping.

        If that is not finite, no weight is changed: ValueError, or in float16 None (see above).
        """
        for bucket in self.buckets:  # left over: not complete yet, or used by nobody (every rank sends all)
            if bucket.gradient is not None or not bucket.is_sent:
                self.send(bucket)
        while self.messages:
            self.receive()
        norm = self.gradient_norm()
        is_finite = math.isfinite(norm)
        if is_finite:
            self.update(lr, norm)
        elif not self.is_half or self.loss_scale <= 1:
            raise ValueError("the gradient is not finite; no weight was changed")
        if self.is_half:
            self.adjust_loss_scale(is_finite)
        for bucket in self.buckets:
            bucket.total = None
            bucket.is_sent = False
        self.is_last = False
        return norm if is_finite else None

    def gradient_norm(self) -> float:
        """The norm of the whole gradient, without the loss scale. Waits for the GPU once."""
        norms = [torch.linalg.vector_norm(bucket.total) for bucket in self.buckets]
        square = torch.stack(norms).double().square().sum()
        if self.shard:
            dist.all_reduce(square)  # each rank knows only its slices
        return square.sqrt().item() / self.loss_scale

    def update(self, lr: float, norm: float):
        """Clip, AdamW on this rank's masters, then the weights everywhere."""
        factor = 1.0 / self.loss_scale
        if self.clip:
            factor *= min(1.0, self.clip / (norm + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_([bucket.total for bucket in self.buckets], factor)
        for bucket in self.buckets:
            bucket.update(lr, self.betas, self.weight_decay)
        self.write_weights()

    def write_weights(self):
        """Round all masters into the weights, on all ranks."""
        works = [bucket.write() for bucket in self.buckets]
        for work in works:
            if work is not None:
                work.wait()

    def adjust_loss_scale(self, is_finite: bool):
        """Halve the loss scale after a step that overflowed, double it after 2000 good ones in a row."""
        self.good_steps += 1
        if not is_finite:
            self.loss_scale *= 0.5
            self.good_steps = 0
        elif self.good_steps % 2000 == 0:
            self.loss_scale *= 2

    def forget(self):
        """Forget the moments: what comes next has gradients of another size."""
        for bucket in self.buckets:
            bucket.forget()

    def state_dict(self) -> dict:
        """This rank's masters and moments, and the counters. The weights follow from the masters."""
        return {
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
            "buckets": [bucket.state_dict() for bucket in self.buckets],
        }

    @torch.no_grad()
    def load_state_dict(self, *states):
        """Go on from what all ranks saved (without `shard`: from what one rank saved), on any number of
        ranks."""
        self.loss_scale = states[0]["loss_scale"]
        self.good_steps = states[0]["good_steps"]
        for number, bucket in enumerate(self.buckets):
            bucket.load_state_dict(*(state["buckets"][number] for state in states))
        self.write_weights()


# ------------------------------------------------------------------------------------------------------------
# 2. Gradient checkpointing

class Recomputed(torch.autograd.Function):
    """Run a function without recording it. In backward, run it again and go back through the second run.

    Time for memory (Chen et al. 2016, arXiv 1604.06174): only the input is kept. These models have no
    dropout, so the second run equals the first bit for bit. function(x, *rest): only x and parameters get
    gradients.
    """

    @staticmethod
    def forward(ctx, function, x, *rest):
        ctx.function = function
        ctx.rest = rest
        ctx.save_for_backward(x)
        return function(x, *rest)  # autograd records nothing in here

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x, *ctx.rest)
        torch.autograd.backward(y, gradient)  # adds to the gradients of parameters on its way to x
        no_gradients = [None for _ in ctx.rest]
        return None, x.grad, *no_gradients


def recomputed(forward, learns: bool, x, *rest):
    """forward(x, *rest), recomputed in backward. `learns`: whether there are parameters in it that train.

    Autograd sees x and not these parameters. If x needs no gradient, backward never comes here.
    """
    if learns and torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError("checkpointing: a block's input needs a gradient, or its parameters get none")
    return Recomputed.apply(forward, x, *rest)


def checkpoint_blocks(blocks, which: str):
    """Recompute "every" block, "every-other" (half the extra time, half the saving), or "none"."""
    chosen = {"none": [], "every": blocks, "every-other": blocks[::2]}[which]
    for block in chosen:
        learns = any(p.requires_grad for p in block.parameters())
        block.forward = partial(recomputed, block.forward, learns)


def compile_blocks(blocks):
    """Compile the blocks: one graph for all but the last, one for it. Call it before `checkpoint_blocks`.
    With `fullgraph` too many graphs are an error: in eager mode a rank would send in another order."""
    compiled = torch.compile(type(blocks[0]).forward, dynamic=True, fullgraph=True)

    def forward(*inputs):  # the limit is that of a thread, and backward has its own
        torch._dynamo.config.recompile_limit = 64  # a pass without gradients, or of one row, is another graph
        return compiled(*inputs)

    for block in blocks:
        block.forward = partial(forward, block)


# ------------------------------------------------------------------------------------------------------------
# 3. The model of a stage, and its learning rate

def choose_learning(config, vlm) -> VLM:
    """Align trains the projector. Instruct trains it and the LLM. Nobody trains the ViT."""
    vlm.vit.requires_grad_(False)
    vlm.projector.requires_grad_(True)
    vlm.llm.requires_grad_(config.stage == "instruct")
    return vlm


def load_model(config, device, dtype) -> VLM:
    """The model on `device`: pretrained towers, and a projector, fresh or from `config.init`."""
    gc.collect()  # a checkpointed block refers to itself: free the model of an earlier stage first
    torch.manual_seed(config.seed)
    vlm = VLM.from_towers(config.vit, config.llm, config.projector, config.feature_layer, dtype, device)
    if config.init:
        loaded = vlm.load_projector(config.init, dtype, device)
        say(f"from {config.init}: loaded {', '.join(loaded)}")
    choose_learning(config, vlm)
    if config.compile:
        compile_blocks(vlm.llm.model.layers)
    checkpoint_blocks(vlm.llm.model.layers, config.checkpointing)
    return vlm


def build_optimizer(config, vlm, device) -> tuple:
    """(optimizer, terms): AdamW over all that learns; temperature and weight of each contrastive loss."""
    terms = nn.ModuleDict()
    for name in losses.CONTRASTIVE[config.contrastive]:
        terms[name] = losses.ContrastiveTerm(config.contrastive_weight, config.contrastive_balance)
    terms.to(device)
    # Backward meets the LLM's last layers first, and the projector last.
    learning = [*terms.parameters(), *vlm.projector.parameters(), *vlm.llm.parameters()]
    learning = [p for p in learning if p.requires_grad]
    optimizer = DataParallelAdamW(learning, config.weight_decay, config.clip, shard=config.shard)
    return optimizer, terms


def learning_rate(step: int, steps: int, config) -> float:
    """Linear from 0 over ceil(warmup_ratio * steps), then half a cosine to 0. As in LLaVA, step 0 has rate 0.

    Contrast first is a run of its own: its steps have a warm-up and a cosine to themselves.
    """
    alone = config.contrastive_first
    if step < alone:
        steps = alone
    else:
        step -= alone
        steps -= alone
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------------------------
# 4. One step
#
# lab/first_step.py is the same step without what is difficult here: ranks, micro-batches, precision, balance.

def train_step(vlm, terms, optimizer, micro_batches, config, lr, step=0) -> dict:
    """One update from the micro-batches of this rank. Returns the line of the log.

    The gradient is that of one process with the whole batch in one piece: every loss is divided by a count
    over all ranks and micro-batches, and a contrastive loss sees all their images. The graph is cut behind
    the projector. Each loss leaves its gradient there, and the projector's backward takes their sum (gradient
    caching, Gao et al. 2021, arXiv 2101.06983). Read it first without "prompt": then `states` is empty.
    """
    device = vlm.llm.head_weight.device
    with_llm = step >= config.contrastive_first  # the first steps: the patch loss alone, without the LLM
    shares = {"tokens": sum(len(m["loss_at"]) for m in micro_batches)}  # this rank's parts of the step's sums
    tokens = sum_over_ranks([shares["tokens"]], device)[0].clamp(min=1)
    micro_batches = [data.to_device(m, device) for m in micro_batches]
    keys = torch.cat([m["keys"] for m in micro_batches])  # (B, 2)

    # 1. Pictures -> ViT -> projector, up to the cut. Autograd does not connect `leaves` with `patches`.
    patches = [vlm.encode(m["pixels"]) for m in micro_batches]  # each (I, N, C)
    leaves = [p.detach().requires_grad_() for p in patches]

    # 2. Captioning, forward. `passes` is lazy: a micro-batch waits for its turn in 4. The prompted loss needs
    #    what the LLM makes of *all* images, so with it all passes come first, and live at once.
    passes = []
    states = []
    if with_llm:
        passes = (losses.caption_pass(vlm, m, leaf) for m, leaf in zip(micro_batches, leaves))
    if with_llm and "prompt" in terms:
        passes = list(passes)
        states = [state for _, state in passes]  # each (B, C)

    # 3. The contrastive losses, over all images and captions, and back: to the cut, or to `states`.
    at_cut, of_term = {}, {}  # loss -> gradients: at the cut, (I, N, C) of each micro-batch; of its term
    for name in terms if with_llm else ["patch"]:
        image, text = losses.vectors(name, vlm, micro_batches, leaves, states)  # each (B, C)
        loss, shares[f"{name}_retrieval"] = losses.contrastive_loss(image, text, terms[name].scale(), keys)
        shares[name] = loss.detach()
        inputs = states if name == "prompt" else leaves
        gradients = torch.autograd.grad(optimizer.loss_scale * loss, [*inputs, *terms[name].parameters()])
        at_cut[name], of_term[name] = gradients[: len(inputs)], gradients[len(inputs) :]
    at_states = at_cut.pop("prompt", [])  # (B, C) each: this loss is not at the cut yet

    # 4. Captioning, backward to the cut. The prompted loss joins at `state`, with its weight, and leaf.grad
    #    is the sum of both. To hold a ratio, each must be known: then it has a backward of its own.
    is_mixed = bool(states) and not config.contrastive_balance
    for number, (loss, state) in enumerate(passes):
        shares["generative"] = shares.get("generative", 0.0) + loss.detach() / tokens
        if number == len(micro_batches) - 1:
            optimizer.last_backward()  # the LLM's parameters get one more gradient
        ends = [optimizer.loss_scale * loss / tokens]
        gradients = [None]  # a scalar's is 1
        if is_mixed:
            ends.append(state)
            gradients.append(terms["prompt"].weight() * at_states[number])
        elif states:
            swept = torch.autograd.grad(state, leaves[number], at_states[number], retain_graph=True)
            at_cut.setdefault("prompt", []).extend(swept)
        torch.autograd.backward(ends, gradients)
    if with_llm:
        at_cut["generative + prompt" if is_mixed else "generative"] = [leaf.grad for leaf in leaves]

    # 5. The cut: measure the gradients over all ranks, weight them, add them up, go on through the projector,
    #    one micro-batch at a time: autograd would add up in bfloat16, the buckets do in fp32. 6 sends these.
    shares |= losses.products(at_cut)
    sums = dict(zip(shares, sum_over_ranks(list(shares.values()), device).tolist()))
    losses.measure(sums, terms, optimizer.loss_scale)
    weights = {name: terms[name].weight() if with_llm else 1.0 for name in of_term}  # alone: 1
    optimizer.last_backward(False)
    for projected, gradient in zip(patches, losses.weighted_sum(at_cut, weights)):
        projected.backward(gradient)
    for name, gradients in of_term.items():
        torch.autograd.backward([*terms[name].parameters()], [weights[name] * g for g in gradients])
    line = figures(sums, weights, optimizer.loss_scale, config.batch)

    # 6. Sum over ranks, clip, update.
    norm = optimizer.step(lr)
    return line | losses.clamp_scales(terms) | {"lr": lr, "grad_norm": norm, "tokens": int(sums["tokens"])}


# ------------------------------------------------------------------------------------------------------------
# 5. A stage: everything above, in order

def train_stage(config: Config, device):
    """Run align or instruct, from the files on disk to the run directory `config.out`. Returns whether a
    signal came in its last step: then `run_all` begins no other stage."""
    directory.agree_on_options(config)
    if config.resume and directory.is_finished(config):
        say(f"{config.out}: this run is finished; nothing is left to do")
        return False
    options.ensure_init(config)
    options.ensure_data(config)
    began = time.time()
    dtype = choose_dtype(device, config.dtype)
    results = {"stage": config.stage} | origin(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # What there is to do
    outlined = costs.outline(config, by_name=False)  # of the towers in their folders
    samples = order.load_samples(config, outlined)
    agree({"records": len(samples)})
    held = held_out.load(config, samples, outlined)
    lengths = order.token_counts(config, samples, outlined)
    steps = order.count_steps(config, len(samples))
    if not any(learning_rate(step, steps, config) for step in range(steps)):
        raise ValueError(f"{steps} steps, all at learning rate 0: more --steps, or a smaller --warmup_ratio")
    dealt = order.deal(config, lengths, steps, world_size())
    largest = order.largest_micro_batch(dealt, lengths)
    has = total_memory(device) / plan.GIB
    plan.print_plan(config, outlined, dtype, steps, largest, world_size(), has)
    plan.print_passes(config, len(samples), steps)
    plan.check_disk(config, outlined, dtype, steps)

    # What it is done with
    vlm = load_model(config, device, dtype)
    if config.features:
        samples.features = features.load(config, samples, vlm.vit, device)
    made_of = checkpoint.fingerprints(vlm, samples)
    agree(made_of)
    optimizer, terms = build_optimizer(config, vlm, device)
    start = 0
    if config.resume:
        start = checkpoint.load(config, optimizer, terms, made_of)
        began -= directory.seconds_before(config, start)  # as if it had not been stopped
    mine = [ranks[rank()] for ranks in dealt[start:]]
    loader = loading.make_loader(config, samples, vlm, mine, device)
    say("first sample:", repr(data.marked_text(samples[0], samples.tokenizer)))

    with caught_signals(config.save_every > 0) as signals:
        line = run_steps(config, vlm, terms, optimizer, loader, held, began, start, steps, made_of, signals)
        if rank() == 0:
            results |= {"steps": steps, "last_step": line}
            results |= {"seconds": round(time.time() - began, 1), "memory_mib": peak_memory(device)}
            directory.save_run(config, vlm, results)
            say(f"finished, in {results['seconds']:.0f} s: {config.out}")
        draw_curves(config.out)
    return sum_over_ranks([len(signals)], device).any()


def run_steps(config, vlm, terms, optimizer, loader, held, began, start, steps, made_of, signals) -> dict:
    """Steps `start` to `steps`: learning rate, data, step, log, checkpoint. Returns the last line of the
    log."""
    device = vlm.llm.head_weight.device
    watch = Watch(config, terms, steps)
    line = {}  # for a run of fewer steps than its checkpoint
    latest = {}  # what is not measured in every step stays on the bar
    for step, bar in bars(config, start, steps):
        step_began = time.perf_counter()
        micro_batches = next(loader)
        waited = time.perf_counter() - step_began
        if step == config.contrastive_first:
            optimizer.forget()  # the moments of contrast first are of far smaller gradients
        lr = learning_rate(step, steps, config)
        with naming(step, micro_batches):
            line = {"step": step} | train_step(vlm, terms, optimizer, micro_batches, config, lr, step)
        took = time.perf_counter() - step_began
        line |= {"ms": round(1000 * took, 1), "wait_ms": round(1000 * waited, 1)}
        line |= held_out.measure(config, vlm, terms, held, step, steps, signals)
        line["memory_mib"] = peak_memory(device)
        line["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
        line["seconds"] = round(time.time() - began, 1)  # of all parts of the run
        latest |= line
        bar.set_postfix(shown(latest, terms))
        watch.look(step - start, line, vlm.llm.config.vocab_size)
        if step == start:  # only now: a run that fails before leaves what was there
            directory.open_run(config, start)
        if rank() == 0:
            if step == 0 and lr == 0 and config.stage == "align":  # at rate 0 the projector is what it was
                vlm.save(Path(config.out) / "unaligned", asdict(config), with_llm=False)
            log(config.out, line)
        if config.save_every and step + 1 < steps:
            is_stopped = sum_over_ranks([len(signals)], device).any()  # on any rank
            if is_stopped or (step + 1) % config.save_every == 0:
                checkpoint.save(config, step + 1, vlm, optimizer, terms, made_of)
            if is_stopped:
                draw_curves(config.out)
                said = f"train.py: stopped, and saved at step {step + 1}: {checkpoint.GO_ON}"
                sys.exit(1 if rank() else said)
    return line


# ------------------------------------------------------------------------------------------------------------
# 6. Both stages, and the command

def run_all(given: dict, device):
    """Align, instruct, and eval.py's ScienceQA before, between and after: what each stage adds."""
    align, instruct = options.of_both(given)
    root = Path(given.get("out") or f"runs/{align.preset}")
    directory.refuse_foreign(root / "align", root / "instruct")
    is_done = on_every_rank(lambda: (root / "instruct/config.json").exists())[0]
    if not (is_done and given.get("resume")):  # what instruct lacks is told now, and not after days of align
        options.ensure_data(align)
        options.ensure_data(instruct)
    for stage in ("align", "instruct"):
        chosen = options.of_stage(stage, given) | {"out": str(root / stage)}
        if stage == "instruct":
            chosen["init"] = str(root / "align")
            if not directory.is_behind(root / stage, root / "align"):
                chosen.pop("resume", None)  # the run was stopped before this stage
        config = options.configure(stage, chosen)
        with directory.locked(config):
            is_stopped = train_stage(config, device)
        if is_stopped and stage == "align":
            raise KeyboardInterrupt
    directory.set_last_run(root / "instruct")
    questions = Path(align.benchmarks) / "ScienceQA"
    if rank() > 0:
        return
    if not questions.is_dir():
        say(f"{questions}: not there (see --benchmarks), so the runs are not scored")
        return
    runs = [root / name for name in ("align/unaligned", "align", "instruct")]
    command_line = [sys.executable, ROOT / "eval.py", "--bench", "scienceqa", "--ckpt"]
    command_line += [run for run in runs if run.is_dir()]
    gc.collect()
    torch.cuda.empty_cache()  # eval.py needs the memory
    sys.exit(run_alone(command_line))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    given = options.parse_args(argv)
    if given.get("dry_run"):  # a benchmark, and so a script beside the others
        os.execv(sys.executable, [sys.executable, str(ROOT / "tests/bench_step.py"), *map(str, argv)])
    with command("train.py", f"interrupted; if there is a checkpoint, {checkpoint.GO_ON}"):
        device = start_ranks()
        stage = given.get("stage", "all")
        if stage == "all":
            run_all(given, device)
        else:
            config = options.configure(stage, given)
            with directory.locked(config):
                train_stage(config, device)
            directory.set_last_run(config.out)


if __name__ == "__main__":
    main()
