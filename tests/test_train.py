"""The optimizer, data parallelism and checkpointing against PyTorch's own; the step against itself cut up in
other ways; the script as people run it."""

import copy
import functools
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import textwrap
import threading
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import grades, refusal
from safetensors.torch import load_file
from scripts import (HERE, asked, called, children, kill, log_of, refused, script, stage_of_rank, start,
                     trained, wait_for_checkpoint, without)
from torch import nn

import data
import losses
import train
from lab import toy_world
from llm import LLM
from plumbing.tokenizer import load_tokenizer
from projector import VLM
from running import checkpoint, options, order, plan, watch
from running.options import Config
from train import DataParallelAdamW

CPU = torch.device("cpu")

# ---- the learning rate -------------------------------------------------------------------------------------


def test_learning_rate_of_llava():
    """LCS-558K at batch 256: 2181 steps, 66 of warm-up."""
    rate = partial(train.learning_rate, steps=2181, config=Config(lr=1e-3))
    assert rate(0) == 0 and rate(33) == pytest.approx(5e-4) and rate(66) == pytest.approx(1e-3)
    assert rate(66 + 2115 // 2) == pytest.approx(5e-4, rel=1e-2) and 0 < rate(2180) < 1e-8


# ---- the optimizer -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What goes wrong in data parallelism: odd sizes, a module used twice, a parameter that nobody uses, in a
    bucket of its own, one that is frozen among others that learn."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(577, 3))
        self.twice = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5)
        self.unused = nn.Parameter(torch.randn(97))
        self.twice.bias.data.fill_(0.1)  # the same for all: only what learns comes from rank 0
        self.twice.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(self.twice(torch.tanh(self.twice(self.table[x]))))

    def save(self, *_):
        """No run directory."""

    def learning(self):
        return [p for p in self.parameters() if p.requires_grad]


def flat(tensors):
    """All numbers of the tensors in a row: a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Witness(DataParallelAdamW):
    """Notes of each message its micro-batch, its bucket, and how many parameters backward has yet to reach;
    sees that no total is missing."""

    micro = 0

    def send(self, bucket):
        awaited = sum(len(other.waiting) for other in self.buckets)
        self.sent = getattr(self, "sent", []) + [(self.micro, self.buckets.index(bucket), awaited)]
        super().send(bucket)

    def gradient_norm(self):
        missing = [number for number, bucket in enumerate(self.buckets) if bucket.total is None]
        assert not missing, (
            f"the norm is asked for, and buckets {missing} have no total: one that nobody used is sent, too, "
            "and all that was sent is to be received")
        return super().gradient_norm()


def odd_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 577, (8,), generator=generator), torch.randint(0, 5, (8,), generator=generator)


def odd_step(rank, world, model, optimizer, step, micro):
    """One step of this rank on its share of the batch; the gradient's norm."""
    share = 8 // world
    x, y = (part[rank * share : (rank + 1) * share] for part in odd_batch(step))
    pieces = list(zip(x.split(micro), y.split(micro)))
    for i, (x, y) in enumerate(pieces):
        if i == len(pieces) - 1:
            optimizer.last_backward()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / 8
        (optimizer.loss_scale * loss).backward()
    return optimizer.step(1e-2)


def odd_run(rank, world, shard, micro, steps=10):
    """Ten steps of this rank. Every rank starts from other weights on purpose.

    -> (whether the optimizer changed them, the weights before and after every step, gradient norms)
    """
    torch.manual_seed(rank)
    model = Odd().double()
    before = flat(model.parameters())
    optimizer = Witness(model.learning(), weight_decay=0.1, clip=0.4, shard=shard, bucket_size=100)
    weights, norms = [flat(model.parameters())], []
    for step in range(steps):
        norms.append(odd_step(rank, world, model, optimizer, step, micro))
        weights.append(flat(model.parameters()))
    return not torch.equal(before, weights[0]), weights, norms


def torch_run(steps=10):
    """The same with torch.optim.AdamW and clip_grad_norm_: (weights before and after each step, norms). Five
    of the ten steps are clipped."""
    torch.manual_seed(0)
    model, norms = Odd().double(), []
    matrices = [p for p in model.learning() if p.ndim > 1]
    vectors = [p for p in model.learning() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    weights = [flat(model.parameters())]
    for step in range(steps):
        x, y = odd_batch(step)
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y, reduction="sum").div(8).backward()
        model.unused.grad = torch.zeros_like(model.unused)
        norms.append(nn.utils.clip_grad_norm_(model.learning(), 0.4).item())
        optimizer.step()
        weights.append(flat(model.parameters()))
    return weights, norms


@pytest.mark.parametrize("world, shard, micro", [(1, False, 8), (1, True, 3), (2, False, 4), (2, True, 2),
                                                 (4, False, 1), (4, True, 2)])
@grades("the optimizer")
def test_equals_torch_adamw_on_any_number_of_ranks(ranks, world, shard, micro):
    """Weights after every step and all gradient norms, whatever the ranks, shards and micro-batches, in fp64.
    The ranks have the same weights, bit for bit, from the start: those of rank 0."""
    found = [odd_run(0, 1, shard, micro)] if world == 1 else ranks(world, odd_run, shard, micro, seconds=60)
    weights, norms = torch_run()
    assert [was_changed for was_changed, _, _ in found] == [False] + [True] * (world - 1)
    for _, our_weights, our_norms in found:
        assert our_norms == pytest.approx(norms, rel=1e-12), (
            "the gradient is not that of one process with the whole batch: a sum over the ranks is left out, "
            "or is a mean; or a step kept the gradient of the one before")
        assert torch.equal(torch.stack(our_weights), torch.stack(found[0][1])), "the ranks drift apart"
        assert torch.allclose(torch.stack(our_weights), torch.stack(weights), rtol=1e-10, atol=1e-12), (
            "other weights than those of torch's AdamW from the same gradients: clipped otherwise, or "
            "updated before all was summed")


def odd_checkpoint(rank, world, dtype, shard, out, source=""):
    """Save a checkpoint of four steps or, with `source`, of what was saved there; then take two steps more.
    Returns the weights before these, and after."""
    torch.manual_seed(7 if source else 0)
    model, term = Odd().to(dtype), losses.ContrastiveTerm()  # a bucket of one number: shorter than W
    learning = [*model.learning(), *term.parameters()]
    optimizer = DataParallelAdamW(learning, 0.1, 0.5, shard=shard, bucket_size=100)
    config = partial(Config, shard=shard)

    def step(number):
        term.log_scale.grad = torch.tensor(1.0)
        optimizer.collect(term.log_scale)
        odd_step(rank, world, model, optimizer, number, 8)

    if source:
        assert checkpoint.load(config(out=source), optimizer, {"patch": term}, {}) == 4
        assert term.squares == pytest.approx([0.3, 0.2])
    else:
        for number in range(4):
            step(number)
        term.measure(3.0, 2.0)
    checkpoint.save(config(out=out), 4, model, optimizer, {"patch": term}, {})
    weights = [flat(p.float() for p in learning)]
    if 8 % world == 0:
        step(4), step(5)
        weights.append(flat(p.float() for p in learning))
    return weights


def saved(out):
    """What each rank has saved: of its buckets masters, moments and counts of steps; the loss scale's."""
    files = sorted((out / "checkpoint-0000004").glob("*.pt"))
    states = [torch.load(file, weights_only=True).get("optimizer") for file in files]
    states = [state for state in states if state]  # unsharded, of the first rank alone
    numbers = [torch.tensor([state["loss_scale"], state["good_steps"]]) for state in states]
    buckets = [bucket for state in states for bucket in state["buckets"]]
    return numbers + [bucket[name] for bucket in buckets for name in sorted(bucket)]


@pytest.mark.parametrize("shard, dtype, ways", [
    (False, torch.float16, [(1, 1), (1, 2, 1)]), (False, torch.bfloat16, [(2, 2)]),
    (True, torch.float64, [(2, 2)]), (True, torch.bfloat16, [(2, 2), (2, 1, 2), (2, 3, 2)])])
def test_a_checkpoint_goes_on_with_any_number_of_ranks_and_back(ranks, tmp_path, shard, dtype, ways):
    """Weights, masters (of more bits), moments and counters, bit for bit, whole or in shards: (2, 3, 2) was
    saved on two ranks, loaded and saved on three, and again on two. Parts of other lengths and paddings."""
    def run(world, *args):
        args = dtype, shard and world > 1, *map(str, args)
        return [odd_checkpoint(0, 1, *args)] if world == 1 else ranks(world, odd_checkpoint, *args)

    first = run(ways[0][0], tmp_path / "first")
    for way in ways:
        source = tmp_path / "first"
        for place, world in enumerate(way[1:]):
            target = tmp_path / f"{way} {place}"
            found = run(world, target, source)
            assert all(torch.equal(weights[0], first[0][0]) for weights in found)
            source = target
        assert all(torch.equal(weights[1], first[0][1]) for weights in found), "it goes on otherwise"
        for ours, theirs in zip(saved(target), saved(tmp_path / "first"), strict=True):
            assert torch.equal(ours, theirs)


class Part:
    """A part of a flat tensor that counts what is read of it."""

    def __init__(self, numbers):
        self.numbers, self.read = numbers, 0

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, place):
        self.read += len(self.numbers[place])
        return self.numbers[place]


@pytest.mark.parametrize("start, stop, read", [
    (0, 4, [4, 0, 0]), (2, 6, [2, 2, 0]), (3, 12, [1, 4, 4]), (8, 9, [0, 0, 1]), (4, 4, [0, 0, 0]),
    (9, 8, [0, 0, 0])])
def test_of_a_checkpoint_only_the_own_slice_is_read(start, stop, read):
    parts = [Part(torch.arange(4) + 4 * number) for number in range(3)]
    assert torch.equal(train.cut_out(parts, start, stop), torch.arange(12)[start:stop])
    assert [part.read for part in parts] == read, "each rank reads the shards of all from disk"


class Letter:
    """A message between two ranks with equal gradients: the sum is there when it is waited for."""

    def __init__(self, total, gradient):
        self.total, self.gradient, self.has_arrived = total, weakref.ref(gradient), False

    def wait(self):
        assert self.gradient() is not None, "a gradient must live until it has arrived, in its message"
        if not self.has_arrived:
            self.total.copy_(2 * self.gradient()[: len(self.total)])
        self.has_arrived = True


@pytest.mark.parametrize("shard", [False, True])
@grades("send")
def test_what_is_sent_arrives_when_it_is_waited_for(monkeypatch, shard):
    """On rank 0 of two. The other one, and the way there, are made up."""
    letters = []

    def post(total, gradient=None, async_op=False, **_):
        letters.append(Letter(total, total if gradient is None else gradient))
        return letters[-1] if async_op else letters[-1].wait()

    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "reduce_scatter", post)
    monkeypatch.setattr(dist, "all_reduce", post)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)
    optimizer = DataParallelAdamW([nn.Parameter(torch.ones(4)) for _ in range(4)], shard=shard, bucket_size=4)
    for bucket in optimizer.buckets:
        bucket.open()
        bucket.gradient += 1
        optimizer.send(bucket)
        assert not letters[-1].has_arrived, "it waits for what it has sent, and backward waits with it"
        assert bucket.gradient is None and bucket.is_sent, "`close` empties a bucket that is sent"
    most = 2 if shard else 4
    assert len(letters) == 4 and len(optimizer.messages) == most, (
        f"of 4 buckets {len(letters)} messages were sent, and {len(optimizer.messages)} are on their way: "
        f"each is sent once, and {most} stay on their way")
    while optimizer.messages:
        optimizer.receive()
    assert all((bucket.total == 2).all() for bucket in optimizer.buckets), "`receive` waits for nothing"


@grades("send")
def test_buckets_leave_while_backward_goes_on():
    """The first is sent when the last layer is done and all others wait; on one rank as on many."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = Witness(model.parameters(), bucket_size=128)
    model(torch.randn(2, 8)).sum().backward()
    assert not hasattr(optimizer, "sent"), "a micro-batch that is not the last sends nothing"
    optimizer.last_backward()
    model(torch.randn(2, 8)).sum().backward()
    awaited = [awaited for _, _, awaited in optimizer.sent]
    assert awaited == [4, 2, 0], "a bucket is sent as soon as its last gradient is in, not at the end"


class Uneven(nn.Module):
    """Four layers, two to a bucket. Below them a matrix that not every rank uses, and one that nobody
    does."""

    def __init__(self):
        super().__init__()
        self.never = nn.Parameter(torch.randn(8, 4))
        self.sometimes = nn.Parameter(torch.randn(4, 4))
        self.layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))

    def forward(self, x, is_used):
        return self.layers(x @ self.sometimes if is_used else x).square().sum()


def uneven_steps(rank, world, shard):
    """(messages, norms, weights) of two steps of three micro-batches. Of two ranks only the first uses
    `sometimes`, in the last of its micro-batches. One process does what both would."""
    torch.manual_seed(0)
    model = Uneven().double()
    optimizer = Witness(model.parameters(), shard=shard, bucket_size=32)
    inputs = torch.randn(3, 2, 5, 4, dtype=torch.float64)  # micro-batch, rank
    norms = []
    for _ in range(2):
        for optimizer.micro in range(3):
            if optimizer.micro == 2:
                optimizer.last_backward()
            mine = [rank] if world == 2 else [0, 1]
            sum(model(inputs[optimizer.micro, r], optimizer.micro == 2 and r == 0) for r in mine).backward()
        optimizer.micro = "step"
        norms.append(optimizer.step(1e-2))
    return [(micro, number) for micro, number, _ in optimizer.sent], norms, flat(model.parameters())


@pytest.mark.parametrize("shard", [False, True])
@grades("the optimizer")
def test_a_bucket_is_sent_once_a_step_and_sharded_once_a_backward(ranks, shard):
    """When it is full, however many parameters it has; in `step`, where a rank has left one unused."""
    wrong = ("in one of two steps a bucket leaves too early, twice or never: `step` sends what backward has "
             "not sent, used or not, and then forgets what was sent, and that the last backward had come")
    one = uneven_steps(0, 1, False)
    assert one[0] == 2 * [(2, 0), (2, 1), (2, 2), ("step", 3)], wrong
    first, second = ranks(2, uneven_steps, shard, seconds=60)
    early = [(0, 0), (0, 1), (1, 0), (1, 1)] * shard
    assert first[0] == 2 * (early + [(2, 0), (2, 1), (2, 2), ("step", 3)]), wrong
    assert second[0] == 2 * (early + [(2, 0), (2, 1), ("step", 2), ("step", 3)]), wrong
    for _, norms, weights in (first, second):
        assert norms == pytest.approx(one[1], rel=1e-12) and torch.allclose(weights, one[2], rtol=1e-10), (
            "where one rank did not use a parameter, two ranks make other steps than one process")


def naive_and_ours(rank, world):
    """(weights before, and after one step of the docstring's code and of ours) of this rank."""
    code = re.search(r"this is what it does:\n\n(.*?)\n\n", DataParallelAdamW.__doc__, re.S)[1]
    after = []
    for is_naive in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
        before, parameters = flat(model.parameters()), list(model.parameters())
        optimizer = None if is_naive else DataParallelAdamW(parameters, 0.01, 0.5)  # torch's weight decay
        model(torch.randn(8, 6).double().chunk(world)[rank]).square().sum().backward()
        if is_naive:
            exec(textwrap.dedent(code), {"torch": torch, "dist": dist, "parameters": parameters, "clip": 0.5})
        else:
            optimizer.step(1e-3)  # torch's learning rate
        after.append(flat(parameters))
    return before, *after


def test_the_docstring_has_the_whole_optimizer_in_four_lines(ranks):
    for before, naive, ours in ranks(2, naive_and_ours):
        assert not torch.allclose(before, ours) and torch.allclose(naive, ours, rtol=1e-12, atol=1e-14)


def test_a_step_sends_the_llm_during_its_last_backward_and_each_bucket_once(linear_vlm, llama_folder):
    """The projector's gradients, from all micro-batches, come last."""
    config = Config(stage="instruct")
    vlm = train.choose_learning(config, linear_vlm)
    optimizer = Witness([*vlm.projector.parameters(), *vlm.llm.parameters()], bucket_size=2000)
    step = optimizer.step

    def step_after_backward(lr):
        optimizer.micro = "step"
        return step(lr)

    optimizer.step = step_after_backward
    samples = conversation_samples(load_tokenizer(llama_folder), "v1")
    batches = [collated(samples[:4]), collated(samples[4:])]
    train.train_step(vlm, nn.ModuleDict(), optimizer, batches, config, 1e-3)
    sent = [(when, number) for when, number, _ in optimizer.sent]
    numbers = range(len(optimizer.buckets))
    of_projector = {optimizer.buckets.index(optimizer.bucket_of[p]) for p in vlm.projector.parameters()}
    assert sorted(number for _, number in sent) == [*numbers]
    assert {number for when, number in sent if when == 0} == {*numbers} - of_projector


def test_an_optimizer_out_of_scope_is_freed():
    """Its hooks stay on the parameters and must not keep it, with all its buffers, in memory. No garbage
    collector is needed. A backward of these parameters afterwards is an error, and not a crash."""
    layer = nn.Linear(2, 2)
    optimizer = DataParallelAdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step(1e-2)
    parts = [weakref.ref(optimizer), *map(weakref.ref, optimizer.buckets)]
    gc.disable()
    try:
        del optimizer
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()
    with pytest.raises(ReferenceError):
        layer(torch.ones(1, 2)).sum().backward()


@grades("step")
def test_second_step_remembers_no_gradient():
    layer = nn.Linear(3, 3)
    optimizer = DataParallelAdamW(layer.parameters())
    optimizer.good_steps = 1999
    layer(torch.ones(1, 3)).sum().backward()
    assert optimizer.step(1e-2) > 0 and optimizer.loss_scale == 1, "the loss scale is for float16 alone"
    (0 * layer(torch.ones(1, 3)).sum()).backward()
    assert optimizer.step(1e-2) == 0, "the step has not forgotten the gradients of the one before"


def test_small_updates_survive_bfloat16():
    """Ten steps of 2e-5 in one direction move a weight of 0.02 by 2e-4; in bfloat16 alone all are rounded
    away."""
    weight = nn.Parameter(torch.full((1000,), 0.02).bfloat16())
    optimizer = DataParallelAdamW([weight])
    for _ in range(10):
        weight.float().sum().backward()
        optimizer.step(2e-5)
    master = optimizer.buckets[0].master
    assert torch.allclose(master, torch.tensor(0.02).bfloat16().float() - 2e-4, atol=1e-7)
    assert torch.equal(weight.data, master.bfloat16())
    alone = torch.full((1000,), 0.02).bfloat16()
    for _ in range(10):
        alone -= 2e-5
    assert (alone == torch.tensor(0.02).bfloat16()).all()  # not one of the ten came through


@grades("step")
def test_float16_skips_a_step_that_overflows():
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = DataParallelAdamW([weight])
    (weight.float().sum() * math.inf).backward()
    assert optimizer.step(1e-2) is None, "a step that is skipped has no norm"
    bucket, = optimizer.buckets
    is_unchanged = (weight == 1).all() and not bucket.m.any() and not bucket.steps
    assert optimizer.loss_scale == 2.0**15 and is_unchanged, (
        "a float16 step that overflows halves the loss scale, and changes no weight and no moment")
    (optimizer.loss_scale * (weight.float() * 1e-9).sum()).backward()  # 1e-9 alone is zero in float16
    assert optimizer.step(1e-2) == pytest.approx(2e-9, rel=1e-2), (
        "the norm is that of the gradient without the loss scale; of a step that was skipped nothing is left")
    assert (weight < 1).all(), "after a step that was skipped, the next one is none"
    optimizer.good_steps = 1999
    (optimizer.loss_scale * weight.float().sum() * 1e-9).backward()
    optimizer.step(1e-2)
    assert optimizer.loss_scale == 2.0**16, "2000 good steps in a row double the loss scale"
    optimizer.loss_scale = 1.0
    (weight.float().sum() * math.inf).backward()
    assert refusal(optimizer.step, 1e-2), (
        "a loss scale of 1 cannot be halved: what overflows then is an error, in float16, too")


@pytest.mark.parametrize("number", [math.nan, math.inf])
@grades("step")
def test_gradients_that_are_not_finite_change_nothing(number):
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    optimizer = DataParallelAdamW(layer.parameters())
    (layer(torch.ones(1, 2)).sum() * number).backward()
    assert refusal(optimizer.step, 1e-2), f"a gradient of {number} is an error, and is none"
    assert torch.equal(layer.weight, before), "the norm is looked at before the update"


# ---- gradient checkpointing --------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, factor):
        return x + self.down(torch.relu(self.up(x))) * factor


def chain(checkpointing, learns=True):
    """(input, output, parameters, list of hooks fired) of four layers, before any backward."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(4)).requires_grad_(learns)
    fired = []
    for parameter in layers.parameters() if learns else []:
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    train.checkpoint_blocks(layers, checkpointing)
    x = torch.randn(32, 16, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y, 0.5)
    return x, y, [*layers.parameters()], fired


@pytest.mark.parametrize("checkpointing", ["every", "every-other"])
@grades("Recomputed.backward")
def test_checkpointing_changes_no_bit(checkpointing):
    """The output, the gradients of input and weights; hooks fire once."""
    found = []
    for which in ("none", checkpointing):
        x, y, parameters, fired = chain(which)
        y.square().sum().backward()
        assert x.grad is not None, "the input of a checkpointed block gets no gradient"
        assert len(fired) == len(parameters), (
            "the weights of a checkpointed block get no gradient, or get it twice")
        found.append([y, x.grad, *(p.grad for p in parameters)])
    assert torch.equal(found[0][0], found[1][0]), "the output is not the function's own"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (
        "other gradients: those of the second run are not handed on, or go to the wrong ones")


@grades("Recomputed.backward")
def test_checkpointed_blocks_can_be_swept_more_than_once():
    """With frozen blocks, as a held ratio sweeps them: by `autograd.grad`, which keeps the graph, and then
    with the captioning loss."""
    found = []
    for which in ("none", "every"):
        x, y, parameters, _ = chain(which, learns=False)
        swept, = torch.autograd.grad(y[:5], x, torch.ones(5, 16), retain_graph=True)
        y.square().sum().backward()
        assert all(p.grad is None for p in parameters), "blocks that are frozen got a gradient"
        found.append((swept, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not torch.equal(*found[0]), (
        "a second backward through the same blocks finds other gradients than through plain ones")


@grades("Recomputed.backward")
def test_checkpointed_weights_are_never_silently_left_without_a_gradient():
    """If the input needs none, autograd would not call backward. Frozen blocks, and no_grad, may do so."""
    for learns in (True, False):
        block = Layer().requires_grad_(learns)
        expected = block(torch.ones(2, 16), 0.5)
        train.checkpoint_blocks([block], "every")
        if learns:
            with pytest.raises(ValueError, match="a block's input needs a gradient"):
                block(torch.ones(2, 16), 0.5)
        with torch.set_grad_enabled(not learns):
            assert torch.equal(block(torch.ones(2, 16), 0.5), expected)


@grades("Recomputed.backward")
def test_checkpointed_blocks_run_once_more_and_keep_nothing():
    """Two in a row: at the end neither is left in memory, though the output and its graph are."""
    layers, runs = [Layer(), Layer()], []

    def run(forward, *args):
        y = forward(*args)
        runs.append(weakref.ref(y))
        return y

    for layer in layers:
        layer.forward = partial(run, layer.forward)
    train.checkpoint_blocks(layers, "every")
    y = layers[1](layers[0](torch.randn(2, 16, requires_grad=True), 0.5), 0.5)
    assert len(runs) == 2
    y.sum().backward()
    assert len(runs) == 4, f"backward runs a block {(len(runs) - 2) / 2:g} times; once is enough"
    assert not any(output() is not None for output in runs[2:]), "the second run is kept after its backward"


def saved_bytes(llm, ids):
    """(bytes that autograd holds between forward and backward, gradients)."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = llm.hidden(llm.embed(ids))
    hidden.sum().backward()
    return sum(storages.values()), [p.grad.clone() for p in llm.parameters() if p.grad is not None]


@grades("Recomputed.backward")
def test_checkpointing_saves_memory_in_the_llm(llama_folder):
    ids, held, gradients = torch.randint(0, 75, (4, 64)), {}, {}
    for which in ("none", "every-other", "every"):
        llm = LLM.from_pretrained(llama_folder).requires_grad_()
        train.checkpoint_blocks(llm.model.layers, which)
        held[which], gradients[which] = saved_bytes(llm, ids)
    print("bytes held for backward:", held)
    assert held["every"] < 0.5 * held["none"] and held["every"] < held["every-other"] < held["none"], (
        f"checkpointed blocks keep {held['every'] / held['none']:.0%} of the bytes of plain ones: what "
        "autograd wants to save must be let go, and be computed again")
    for which in ("every-other", "every"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[which], strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[
    pytest.mark.compiler, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")])])
def test_compiled_blocks_equal_plain_ones(llama_folder, monkeypatch, backend):
    """Logits and gradients in fp64, of two lengths, checkpointed or not. The last block, whose MLP runs at
    some places only, is one graph, all others one; and as many for the pass that is not recorded."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = {}
    for is_compiled, which, graphs in ((False, "none", 0), (True, "none", 2), (True, "every", 4)):
        llm = LLM.from_pretrained(llama_folder, torch.float64).requires_grad_()
        if is_compiled:
            train.compile_blocks(llm.model.layers)
        train.checkpoint_blocks(llm.model.layers, which)
        results = []
        for S in (20, 33):
            embeds = llm.embed(torch.arange(4 * S).view(4, S) % 75)  # (B, S, C)
            logits = llm.logits(llm.hidden(embeds, at=torch.arange(0, 4 * S, 3)))  # (n, V)
            logits.square().sum().backward()
            gradients = [p.grad.flatten() for p in llm.parameters()]
            results.append(torch.cat([logits.detach().flatten(), *gradients]))
            llm.zero_grad()
        found[is_compiled, which] = torch.cat(results)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    plain = found.pop((False, "none"))
    for compiled in found.values():
        assert (compiled - plain).abs().max() < 1e-12 * plain.abs().max()


def test_every_thread_may_compile_as_many_graphs_and_none_goes_on_in_eager(monkeypatch):
    """Backward recomputes in a thread of its own, and torch's settings are a thread's."""
    limits = []
    how = {}

    def compiled(function, **options):
        how.update(options)
        return lambda *inputs: limits.append(torch._dynamo.config.recompile_limit)

    monkeypatch.setattr(torch, "compile", compiled)
    blocks = [nn.Linear(1, 1), nn.Linear(1, 1)]
    train.compile_blocks(blocks)
    thread = threading.Thread(target=blocks[1].forward, args=(None,))
    thread.start()
    thread.join()
    blocks[0].forward(None)
    assert limits == [64, 64] and how == {"dynamic": True, "fullgraph": True}


# ---- one step, cut up in other ways ------------------------------------------------------------------------


def conversation_samples(tokenizer, template, text_only=()):
    """Eight samples of different lengths from toy scenes; those numbered in `text_only` have no image."""
    rng, scenes, samples = random.Random(0), toy_world.scenes()["train"], []
    for number in range(8):
        scene = scenes[number // 2]  # pairs share a scene, so some captions come twice
        question, answer = toy_world.open_question(scene, "color", rng)
        answer = answer if template == "v1" else toy_world.CAPTION.format(**scene)
        has_image = number not in text_only
        turns = [("human", f"{data.IMAGE}\n{question}" if has_image else question), ("gpt", answer)]
        ids, roles = data.encode(turns, data.form_of(template, tokenizer), tokenizer, has_image)
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(number))
        text_ids = tokenizer(answer + "\n" + toy_world.DESCRIBE[number % 2]).input_ids  # of two lengths
        samples.append({"ids": ids, "roles": roles, "pixels": noise if has_image else None,
                        "text_ids": text_ids, "name": str(number)})
    return samples


def collated(samples):
    return data.collate(samples, 16, data.IMAGE_MARKER, 0, 32)


class Recorder(DataParallelAdamW):
    """Keeps the summed, unclipped gradients of every step; of this rank's slices where they are sharded."""

    def update(self, lr, norm):
        self.gradients = getattr(self, "gradients", []) + [[b.total.clone() for b in self.buckets]]
        super().update(lr, norm)


def three_steps(rank, world, folders, options, micro, shard=False, text_only=()):
    """(log lines of three steps on one batch, gradients of the first, weights before and after each) of this
    rank, in fp64. Every rank starts from another projector on purpose."""
    config = Config(**options, contrastive_weight=0.7)
    torch.manual_seed(rank)
    vlm = train.choose_learning(config, VLM.from_towers(*folders, "mlp2x_gelu", dtype=torch.float64))
    train.checkpoint_blocks(vlm.llm.model.layers, "every")
    terms = losses.CONTRASTIVE[config.contrastive]
    weight = config.contrastive_weight, config.contrastive_balance
    scales = nn.ModuleDict({name: losses.ContrastiveTerm(*weight) for name in terms})
    learning = [p for p in [*vlm.parameters(), *scales.double().parameters()] if p.requires_grad]
    optimizer = Recorder(learning, shard=shard)
    template, share = "plain" if config.stage == "align" else "v1", 8 // world
    samples = conversation_samples(load_tokenizer(folders[1]), template, text_only)
    if isinstance(micro, int):
        mine = samples[rank * share : (rank + 1) * share]
        batches = [collated(mine[i : i + micro]) for i in range(0, share, micro)]
    else:  # (most samples, most tokens): spread by length
        lengths = [len(sample["ids"]) for sample in samples]
        spread = order.spread_evenly if terms else order.spread
        dealt = spread(list(range(8)), lengths, *micro, world)
        batches = [collated([samples[i] for i in part]) for part in dealt[rank]]
    lines, weights = [], [flat(learning)]
    for step in range(3):
        lines.append(train.train_step(vlm, scales, optimizer, batches, config, 1e-3, step))
        weights.append(flat(learning))
    return lines, optimizer.gradients[0], weights


def assert_same_steps(one, others):
    """Log lines, gradients and weights of one process against those of the ranks, given in order."""
    for lines, _, weights in others:
        for ours, theirs in zip(lines, one[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        assert torch.equal(torch.stack(weights), torch.stack(others[0][2]))  # of all ranks: bit for bit
    for number, whole in enumerate(one[1]):
        parts = [gradients[number] for _, gradients, _ in others]
        found = torch.cat(parts) if len(parts[0]) < len(whole) else parts[0]  # slices, or the whole on each
        assert (found[: len(whole)] - whole).norm() <= 1e-10 * whole.norm()


INSTRUCT = {"stage": "instruct"}
ALIGN = {name: {"stage": "align", "contrastive": name} for name in losses.CONTRASTIVE}
ALIGN |= {"balanced": ALIGN["both"] | {"contrastive_balance": 0.3},
          "first": ALIGN["both"] | {"contrastive_first": 1}}
whole_batch = functools.lru_cache(lambda folders, name, text_only: three_steps(
    0, 1, folders, ALIGN.get(name, INSTRUCT), 8, text_only=text_only))


@pytest.mark.parametrize("name", ["instruct", *ALIGN])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_change_nothing(clip_folder, llama_folder, name, micro):
    text_only, folders = (2, 5) if name == "instruct" else (), (clip_folder, llama_folder)
    whole = whole_batch(folders, name, text_only)
    first = 1 if name == "first" else 0  # the first step with all losses
    assert whole[0][0]["grad_norm"] > 0 and whole[0][2]["loss"] < whole[0][first]["loss"]
    options = ALIGN.get(name, INSTRUCT)
    assert_same_steps(whole, [three_steps(0, 1, folders, options, micro, text_only=text_only)])


def test_gradients_of_micro_batches_are_added_up_in_fp32(clip_folder, llama_folder):
    """Of n equal ones each has 1/n of the gradient of one alone, exactly, if n is a power of two. The sum is
    again that of one. In bfloat16 it is not: 3/16 of a number has more digits than the number."""
    config = Config(stage="align")
    m = collated(conversation_samples(load_tokenizer(llama_folder), "plain")[:1])
    found = []
    for count in (1, 16):
        torch.manual_seed(0)
        vlm = VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu", dtype=torch.bfloat16)
        train.choose_learning(config, vlm)
        optimizer = Recorder(vlm.projector.parameters())
        train.train_step(vlm, nn.ModuleDict(), optimizer, [m] * count, config, 0.0)
        found.append(flat(optimizer.gradients[0]))
    assert found[0].norm() > 0 and torch.equal(*found)


@pytest.mark.parametrize("name, world, shard", [
    ("patch", 2, False), ("patch", 4, False), ("prompt", 2, False), ("prompt", 4, False), ("both", 2, False),
    ("both", 4, False), ("balanced", 2, False), ("balanced", 4, False), ("first", 2, False),
    ("instruct", 2, False), ("instruct", 2, True), ("instruct", 4, True)])
def test_ranks_change_nothing(clip_folder, llama_folder, ranks, name, world, shard):
    """Losses, scale, norm and gradients; with micro-batches of 2, equal captions on different ranks,
    checkpointing on, and in the instruct stage a last rank whose batch has no image at all."""
    text_only, folders = (4, 5, 6, 7) if name == "instruct" else (), (clip_folder, llama_folder)
    options = ALIGN.get(name, INSTRUCT)
    found = ranks(world, three_steps, folders, options, 2, shard, text_only)
    assert_same_steps(whole_batch(folders, name, text_only), found)


@pytest.mark.parametrize("name, world, shard, budget", [
    ("instruct", 1, False, 200), ("instruct", 2, True, 150), ("instruct", 4, False, 100),
    ("both", 2, False, 40), ("patch", 4, False, 1), ("instruct", 4, True, 1)])
def test_spreading_by_length_changes_nothing(clip_folder, llama_folder, ranks, name, world, shard, budget):
    """Ranks with other numbers of samples, in micro-batches of other sizes, by any budget of tokens."""
    text_only, folders = (4, 5, 6, 7) if name == "instruct" else (), (clip_folder, llama_folder)
    way = folders, ALIGN.get(name, INSTRUCT), (4, budget), shard, text_only
    found = [three_steps(0, 1, *way)] if world == 1 else ranks(world, three_steps, *way)
    assert_same_steps(whole_batch(folders, name, text_only), found)


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_change_nothing_with_tied_embeddings(clip_folder, tied_llama_folder, ranks, shard):
    """One weight, two gradients: it must be sent when both are in."""
    folders = clip_folder, tied_llama_folder
    found = ranks(2, three_steps, folders, INSTRUCT, 2, shard, (4, 5, 6, 7))
    assert_same_steps(whole_batch(folders, "instruct", (4, 5, 6, 7)), found)


def test_the_image_vector_knows_the_prompt_and_not_the_caption(linear_vlm, llama_folder):
    """Other captions of other lengths after the same picture and prompt: the same vector; another prompt:
    another."""
    tokenizer, pixels, vectors = load_tokenizer(llama_folder), torch.randn(3, 32, 32), {}
    long = "the picture has a large " * 3
    for prompt, caption in (("Describe the picture.", "a red ring"), ("Describe the picture.", long),
                            ("What size is it?", "a red ring"), ("", "a red ring"), ("", "blue")):
        turns = [("human", data.IMAGE), ("gpt", caption)]
        ids, roles = data.encode(turns, data.plain(tokenizer, prompt), tokenizer, True)
        batch = collated([{"ids": ids, "roles": roles, "pixels": pixels, "name": "x"}])
        _, vector = losses.caption_pass(linear_vlm, batch, linear_vlm.encode(batch["pixels"]))
        vectors.setdefault(prompt, []).append(vector)
    for same in vectors.values():
        assert all(torch.allclose(same[0], other, atol=1e-5) for other in same)
    describe, size, nothing = (same[0] for same in vectors.values())
    assert not torch.allclose(describe, size, atol=0.1) and not torch.allclose(describe, nothing, atol=0.1)


def first_steps(vlm, folder, steps=1, weights=None, **options):
    """(log lines, gradient of the projector in the last step) of steps on one batch of captions. `weights`:
    of each loss."""
    config = Config(stage="align", batch=8, **options)
    batch = collated(conversation_samples(load_tokenizer(folder), "plain"))
    vlm = train.choose_learning(config, copy.deepcopy(vlm))
    terms = nn.ModuleDict()
    for name in losses.CONTRASTIVE[config.contrastive]:
        weight = weights[name] if weights else config.contrastive_weight
        terms[name] = losses.ContrastiveTerm(weight, config.contrastive_balance)
    optimizer = Recorder([*vlm.projector.parameters(), *terms.parameters()])
    lines = [train.train_step(vlm, terms, optimizer, [batch], config, 1e-3, step) for step in range(steps)]
    return lines, torch.cat(optimizer.gradients[-1])


@pytest.mark.parametrize("contrastive, share", [("patch", 0.0), ("both", 0.3)])
def test_the_log_shows_the_gradients_at_the_cut(linear_vlm, llama_folder, contrastive, share):
    """Norms, ratio and cosine against gradients taken one loss at a time."""
    (line,), _ = first_steps(linear_vlm, llama_folder, contrastive=contrastive, contrastive_weight=0.7,
                             contrastive_balance=share)
    m = collated(conversation_samples(load_tokenizer(llama_folder), "plain"))
    cut = linear_vlm.encode(m["pixels"]).detach().requires_grad_()
    loss, state = losses.caption_pass(linear_vlm, m, cut)
    generative, = torch.autograd.grad(loss / line["tokens"], cut, retain_graph=True)
    assert line["generative_grad"] == pytest.approx(generative.norm().item(), rel=1e-4)
    for name in losses.CONTRASTIVE[contrastive]:
        vectors = losses.vectors(name, linear_vlm, [m], [cut], [state])
        loss, _ = losses.contrastive_loss(*vectors, losses.ContrastiveTerm().scale(), m["keys"])
        own, = torch.autograd.grad(loss, cut, retain_graph=True)
        assert line[f"{name}_grad"] == pytest.approx(own.norm().item(), rel=1e-4)
        weight = line[f"{name}_weight"]
        assert weight == (pytest.approx(share * (generative.norm() / own.norm()).item(), rel=1e-4)
                          if share else 0.7)
        assert line[f"{name}_ratio"] == pytest.approx((weight * own.norm() / generative.norm()).item(),
                                                      rel=1e-4)
        cosine = F.cosine_similarity(own.flatten(), generative.flatten(), dim=0).item()
        assert line[f"{name}_cosine"] == pytest.approx(cosine, abs=1e-4)
        assert line[f"{name}_relative"] == line[name] / math.log(8)


@grades("weight")
def test_the_ratio_is_met(linear_vlm, llama_folder):
    """Exactly at the first step, where there is nothing to average; roughly later."""
    lines, _ = first_steps(linear_vlm, llama_folder, 8, contrastive="both", contrastive_balance=0.3)
    for name in ("patch", "prompt"):
        assert lines[0][f"{name}_ratio"] == pytest.approx(0.3, rel=1e-6), (
            "the weighted gradient is not at the ratio to the captioning loss's: the weight is that ratio "
            "times the quotient of their norms, the roots of `squares`, and not the ratio alone")
        assert lines[0][f"{name}_weight"] != pytest.approx(1, rel=0.01), "a weight of 1 meets no ratio"
    found = [line["patch_ratio"] for line in lines if "patch_ratio" in line]
    assert all(0.2 < ratio < 0.45 for ratio in found), "the ratio is met at first and lost in later steps"


def test_the_ratio_is_met_whenever_captioning_begins(linear_vlm, llama_folder):
    """Behind contrast first both losses are measured in the first captioning step, whatever its number."""
    lines, _ = first_steps(linear_vlm, llama_folder, 5, contrastive="both", contrastive_balance=0.3,
                           contrastive_first=3)
    for name in ("patch", "prompt"):
        assert f"{name}_ratio" not in lines[2]
        assert lines[3][f"{name}_ratio"] == pytest.approx(0.3, rel=1e-6)


@grades("weight")
def test_without_a_ratio_or_a_measurement_the_fixed_weight_is_the_weight_and_a_ratio_is_met_else():
    plain, held = losses.ContrastiveTerm(0.7), losses.ContrastiveTerm(0.7, balance=0.3)
    assert plain.weight() == held.weight() == 0.7, (
        "before anything was measured there is no ratio of norms: `fixed_weight` is the weight")
    for term in (plain, held):
        term.measure(100.0, 4.0)
    assert plain.weight() == 0.7, "without a ratio, `fixed_weight` is the weight"
    assert held.weight() == held.weight() == pytest.approx(0.3 * 5), (
        "norms of 10 and 2 at a ratio of 0.3 are a weight of 1.5, however often it is asked for")


def test_the_weight_follows_the_gradients_within_some_ten_steps():
    """What was measured long ago does not speak for now."""
    term = losses.ContrastiveTerm(balance=0.3)
    for step in range(40):
        term.measure(1.0 if step < 20 else 16.0, 1.0)
        if step == 19:
            assert term.weight() == pytest.approx(0.3)
    assert 1.0 < term.weight() < 1.2  # 0.3 times a ratio of 4


def test_the_prompted_loss_goes_with_captioning_or_in_a_sweep_of_its_own(linear_vlm, llama_folder):
    """The same gradient, given equal weights. Together they cannot be told apart: nothing is measured."""
    (held,), own = first_steps(linear_vlm, llama_folder, contrastive="both", contrastive_balance=0.3)
    weights = {name: held[f"{name}_weight"] for name in ("patch", "prompt")}
    (line,), together = first_steps(linear_vlm, llama_folder, contrastive="both", weights=weights)
    assert torch.allclose(own, together, rtol=1e-4, atol=1e-6)
    unmeasured = {"generative_grad", "prompt_grad", "prompt_ratio", "prompt_cosine", "patch_ratio",
                  "patch_cosine"}
    assert unmeasured <= held.keys() and held.keys() - line.keys() == unmeasured


def test_contrast_first_never_runs_the_llm(linear_vlm, llama_folder, monkeypatch):
    monkeypatch.setattr(LLM, "hidden", None)
    lines, _ = first_steps(linear_vlm, llama_folder, 2, contrastive="both", contrastive_first=2,
                           contrastive_weight=0.0)
    assert lines[1]["patch"] < lines[0]["patch"] == lines[0]["loss"] and "generative" not in lines[0]
    assert "prompt_weight" not in lines[0]  # a loss that does not run has none


def test_the_clamp_of_the_scale_holds_in_the_optimizer():
    term = losses.ContrastiveTerm()
    optimizer = DataParallelAdamW(term.parameters())
    for _ in range(3):
        (-1e3 * term.log_scale).backward()
        optimizer.step(5.0)
        losses.clamp_scales({"patch": term})
    assert term.scale().item() == pytest.approx(100)
    optimizer.load_state_dict(optimizer.state_dict())
    assert term.scale().item() == pytest.approx(100)


def test_whatever_a_term_has_learns(linear_vlm, llama_folder, monkeypatch):
    """A loss of one's own may have more parameters than a temperature: SigLIP's has a bias."""
    class Shifted(losses.ContrastiveTerm):
        def __init__(self, *weight):
            super().__init__(*weight)
            self.shift = nn.Parameter(torch.zeros(()))
            terms.append(self)

        def scale(self):
            return (self.log_scale + self.shift).exp()

    terms = []
    monkeypatch.setattr(losses, "ContrastiveTerm", Shifted)
    first_steps(linear_vlm, llama_folder, contrastive="both")
    assert len(terms) == 2 and all(term.shift != 0 for term in terms)


@pytest.mark.parametrize("contrastive", ["none", "patch"])
def test_a_step_without_any_label_goes_on_and_says_so(linear_vlm, llama_folder, contrastive, capsys):
    """Captioning's loss and gradient are zero; the update runs, with what the contrastive loss says."""
    batch = collated(conversation_samples(load_tokenizer(llama_folder), "plain"))
    batch["labels"].fill_(data.IGNORE)
    batch["loss_at"] = batch["loss_at"][:0]
    config = options.configure("align", {"preset": "tiny", "contrastive": contrastive, "batch": 8})
    optimizer, terms = train.build_optimizer(config, train.choose_learning(config, linear_vlm), CPU)
    line = {"step": 3} | train.train_step(linear_vlm, terms, optimizer, [batch], config, 1e-3)
    assert line["tokens"] == line["generative"] == line["generative_grad"] == 0
    assert (line["grad_norm"] > 0) == (contrastive == "patch") and optimizer.buckets[0].steps == 1
    timed = line | {"ms": 1, "wait_ms": 0}
    watch.Watch(config, terms, 100).look(3, timed, 75)
    assert "step 3: no token carries loss" in capsys.readouterr().out


# ---- the script, called in this process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_stages(world):
    """(the folder of the two runs, what align printed, what instruct printed). The last run is instruct's."""
    printed = [trained(world, "--stage", stage) for stage in ("align", "instruct")]
    return world[0] / "runs/tiny", *printed


def test_align_leaves_a_run_directory_and_says_what_it_does(both_stages):
    runs, printed, _ = both_stages
    assert "vit" in printed and "projector" in printed and "tokens carry loss" in printed
    assert "first sample: '<s>" in printed.replace(" <s>", "<s>") and "[[" in printed  # what carries loss
    files = {file.name for file in (runs / "align").iterdir()}
    assert {"config.json", "projector.safetensors", "log.jsonl", "results.json"} <= files
    log = log_of(runs / "align")
    assert len(log) == 6
    assert {"generative", "patch", "patch_scale", "patch_retrieval", "grad_norm"} <= log[0].keys()


def test_instruct_goes_on_from_aligns_projector_and_keeps_the_llm(both_stages):
    runs, _, printed = both_stages
    assert "loaded projector.0.weight, projector.0.bias, projector.2.weight, projector.2.bias" in printed
    assert (runs / "instruct/llm/model.safetensors").exists()


def test_the_unaligned_run_is_what_align_started_from(both_stages, world):
    """Bit for bit the projector that load_model makes; and not the one that align ended with."""
    config = options.configure("align", options.parse_args([*map(str, world[1])]))
    fresh = train.load_model(config, CPU, torch.float32).projector.state_dict()
    started = load_file(both_stages[0] / "align/unaligned/projector.safetensors")
    ended = load_file(both_stages[0] / "align/projector.safetensors")
    assert fresh.keys() == started.keys() == ended.keys()
    assert all(torch.equal(fresh[name], started[name]) for name in fresh)
    assert not any(torch.equal(fresh[name], ended[name]) for name in fresh)


@pytest.mark.parametrize("bench, key", [("scienceqa", "accuracy_img"), ("pope", "f1"),
                                        ("mme", "accuracy_plus")])
def test_eval_scores_the_last_run_on_its_own_benchmarks(both_stages, world, bench, key):
    result, = asked(world, "--bench", bench)
    assert key in result and result["ckpt"] == "runs/tiny/instruct" and result["bench"] == bench
    saved = json.loads((both_stages[0] / f"instruct/{bench}.json").read_text())
    assert saved.get("scores", saved) == result
    if bench == "scienceqa":
        assert result["questions"] == len(saved["predictions"]) == 8 and result["questions_img"] == 6


def test_eval_scores_runs_that_are_named_one_line_each(both_stages, world):
    names = ["runs/tiny/align/unaligned", "runs/tiny/align"]
    results = asked(world, "--bench", "scienceqa", "--data", "data/toy/ScienceQA", "--split", "val", "--ckpt",
                    *names)
    assert [(result["ckpt"], result["split"]) for result in results] == [(name, "val") for name in names]


def test_eval_asks_one_question(both_stages, world):
    image = next((world[0] / "data/toy/images").iterdir())
    result, = asked(world, "--ask", image, "What color is the shape?")
    assert result["question"] == "What color is the shape?" and isinstance(result["answer"], str)


def test_nothing_is_left_after_a_stage(world, tmp_path, monkeypatch):
    """Neither weights nor moments nor buckets: the next stage needs the memory. Checkpointed blocks, which
    refer to themselves, wait for the garbage collector."""
    parts, build = [], train.build_optimizer

    def note(config, vlm, device):
        optimizer, terms = build(config, vlm, device)
        kept = vlm, *vlm.llm.model.layers, optimizer, *optimizer.buckets, terms
        parts.extend(map(weakref.ref, kept))
        return optimizer, terms

    monkeypatch.setattr(train, "build_optimizer", note)
    trained(world, "--stage", "align", "--steps", "2", "--checkpointing", "every", "--out", tmp_path)
    gc.collect()
    assert parts and all(part() is None for part in parts)


def test_align_goes_on_from_a_projector(world, tmp_path):
    """As of captions after captions: what it begins with is what the other ended with."""
    trained(world, "--stage", "align", "--steps", "3", "--out", tmp_path / "a")
    trained(world, "--stage", "align", "--steps", "3", "--out", tmp_path / "b", "--init", tmp_path / "a")
    ended, began, fresh = ((tmp_path / name / "projector.safetensors").read_bytes()
                           for name in ("a", "b/unaligned", "a/unaligned"))
    assert ended == began != fresh


def test_both_stages_resume_where_the_first_is_finished(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_alone", lambda command_line: 0)
    with pytest.raises(SystemExit):
        trained(world, "--steps", "2", "--out", tmp_path)
    shutil.rmtree(tmp_path / "instruct")
    before = (tmp_path / "align/log.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        trained(world, "--steps", "2", "--out", tmp_path, "--resume")
    assert end.value.code == 0 and (tmp_path / "instruct/config.json").exists()
    assert (tmp_path / "align/log.jsonl").read_text() == before


def test_behind_a_signal_in_the_last_step_no_other_stage_begins(align, monkeypatch):
    """The stage is done."""
    rate = train.learning_rate

    def last_rate(step, steps, config):
        if step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return rate(step, steps, config)

    monkeypatch.setattr(train, "learning_rate", last_rate)
    assert "finished, in" in trained(align, "--out", "alone", "--steps", "4")
    assert (align[0] / "runs/last").read_text() == "alone"
    assert "interrupted" in refused((align[0], without(align[1], "--stage")), "--out", "last", "--steps", "4")
    assert (align[0] / "last/align/config.json").exists() and not (align[0] / "last/instruct").exists()


@pytest.mark.parametrize("options, says", [
    (["--warmup_ratio", "100"], "--warmup_ratio is 100.0; it is a part of the steps, at most 1"),
    (["--steps", "1"], "1 steps, all at learning rate 0"),
    (["--lr", "0"], "--batch, --micro_batch, --epochs and --lr must be above 0"),
])
def test_a_schedule_that_never_trains_is_refused(align, options, says):
    assert says in refused(align, "--out", "never", *options)


# ---- the script as people start it: processes that are killed, several ranks, several nodes ----------------


@pytest.mark.parametrize("stage, world_size", [("align", 1), ("align", 2), ("instruct", 1), ("instruct", 2)])
def test_killed_and_resumed_equals_uninterrupted(world, both_stages, ranks, tmp_path, stage, world_size):
    """24 steps or more = some steps, kill -9, --resume: every logged number and every weight, bit for bit. On
    two ranks the instruct stage is sharded."""
    options = ["--stage", stage, "--epochs", "8", "--save_every", "1", "--checkpointing", "every", "--shard",
               str(stage == "instruct" and world_size == 2)]
    if stage == "align":  # the kill finds either part, or their border
        options += ["--contrastive_first", "4", "--contrastive_balance", "0.3"]
    options += ["--out"]
    launch = ["--nproc_per_node=2", *HERE] if world_size == 2 else []
    killed = start(world, *options, tmp_path / "cut", launch=launch)
    wait_for_checkpoint(tmp_path / "cut")
    kill(killed)
    assert not (tmp_path / "cut/config.json").exists()  # it was stopped before it could finish
    lines = (tmp_path / "cut/log.jsonl").read_text().splitlines()
    step = int(sorted(file.name for file in (tmp_path / "cut").glob("checkpoint-???????"))[-1][-7:])
    most = 28 if stage == "align" else 24
    assert 2 <= step <= len(lines) < most  # all that was done when it was killed, and no more
    for name, more in (("cut", ["--resume"]), ("whole", [])):
        args = [*world[1], *options, tmp_path / name, *more]
        if world_size == 1:
            called(train.main, world[0], *args)
        else:
            ranks(2, stage_of_rank, world[0], args)
    kept = (tmp_path / "cut/log.jsonl").read_text().splitlines()[:step]
    assert kept == lines[:step], "it began anew"  # the same times, too
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


def test_max_restarts_continues_by_itself(world, tmp_path):
    """A worker is killed; torchrun starts it again; the log is that of an undisturbed run."""
    options = ["--stage", "align", "--epochs", "8", "--save_every", "1", "--out"]
    agent = start(world, *options, tmp_path / "cut", launch=["--nproc_per_node=1", "--max-restarts=1", *HERE])
    wait_for_checkpoint(tmp_path / "cut")
    worker, = children(agent)
    os.kill(worker, signal.SIGKILL)
    trained(world, *options, tmp_path / "whole")
    assert agent.wait(timeout=120) == 0
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_python_train_py_makes_both_runs_and_scores_them(world, tmp_path):
    """Without --stage: align, instruct, and eval.py before, between and after."""
    run = script(world, "--steps", "2", "--out", tmp_path)
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    names = [str(tmp_path / name) for name in ("align/unaligned", "align", "instruct")]
    assert [result["ckpt"] for result in results] == names and all("accuracy_img" in line for line in results)
    assert (world[0] / "runs/last").read_text() == names[-1]  # eval.py asks it next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_knows_the_size_of_a_checkpoint(clip_folder, llama_folder, tmp_path, dtype):
    """Of two of instruct, in bytes; what is beside the numbers is small."""
    config = Config(stage="instruct", out=str(tmp_path), save_every=1)
    vlm = train.choose_learning(config, VLM.from_towers(clip_folder, llama_folder, dtype=dtype))
    optimizer, terms = train.build_optimizer(config, vlm, CPU)
    for step in (1, 2):
        checkpoint.save(config, step, vlm, optimizer, terms, {})
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".safetensors")]
    planned = plan.disk_parts(config, vlm, dtype, 3)["2 checkpoints"] * plan.GIB
    assert planned == pytest.approx(sum(file.stat().st_size for file in files), rel=0.06)


@pytest.mark.parametrize("which, count", [("none", 0), ("every-other", 1), ("every", 2)])
def test_the_options_reach_model_and_optimizer(world, monkeypatch, which, count):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", compiled.append)
    monkeypatch.chdir(world[0])
    config = options.configure("align", options.parse_args([
        *map(str, world[1]), "--checkpointing", which, "--feature_layer", "-1", "--weight_decay", "0.1",
        "--clip", "0.5", "--compile", str(count == 1)]))
    vlm = train.load_model(config, CPU, torch.float32)
    assert sum("forward" in vars(block) for block in vlm.llm.model.layers) == count
    assert vlm.vit.feature_layer == -1 and len(compiled) == (count == 1)
    optimizer, _ = train.build_optimizer(config, vlm, CPU)
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 0.5)


def test_dry_run_reads_and_writes_nothing(tmp_path):
    """Both stages, one after the other."""
    run = script((tmp_path, ["--preset", "tiny"]), "--dry_run")
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [report["dry_run"] for report in reports] == ["tiny align", "tiny instruct"]
    assert all(report["ms_per_step_fastest_of_2"] > 0 and report["predicted_gib"] > 0 for report in reports)
    assert "PFLOP" in run.stdout and not list(tmp_path.iterdir())
