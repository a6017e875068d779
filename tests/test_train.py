"""The optimizer, data parallelism and checkpointing against PyTorch's own; the step against itself cut up in other
ways; the script as people run it."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn

import data
from lab import toy_world
import losses
import train
from projector import VLM
from train import Config, DataParallelAdamW


# ---- the command line ----------------------------------------------------------------------------------------------


def test_options_become_config():
    given = train.parse_args(["--stage", "align", "--preset", "tiny", "--lr", "0.5", "--resume", "--shard", "False"])
    config = train.configure("align", given)
    assert (config.lr, config.resume, config.shard, config.template) == (0.5, True, False, "plain")
    assert train.configure("instruct", {"preset": "tiny"}).init == "runs/tiny/align"


@pytest.mark.parametrize("argv", [["--learning_rate", "1"], ["--lr", "fast"], ["--stage", "finetune"], ["--lr"],
                                  ["--resume", "perhaps"], ["--contr", "patch"]])
def test_bad_options_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_args(argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_presets_name_existing_fields():
    for name, preset in train.PRESETS.items():
        for stage in ("align", "instruct"):
            config = train.configure(stage, {"preset": name})
            for field in config.__dataclass_fields__.values():
                assert isinstance(getattr(config, field.name), field.type), field.name


def test_the_prompt_comes_with_its_loss_or_when_asked_for():
    prompts = [train.configure("align", {"preset": "tiny"} | given).prompt for given in (
        {}, {"contrastive": "prompt"}, {"contrastive": "both", "prompt": "none"}, {"prompt": "one-word"})]
    assert prompts == ["none", "describe", "none", "one-word"]
    assert train.configure("instruct", {"preset": "tiny"}).prompt == "none"


# ---- the learning rate ---------------------------------------------------------------------------------------------


def test_learning_rate_of_llava():
    """LCS-558K at batch 256: 2181 steps, 66 of warm-up."""
    rate = partial(train.learning_rate, steps=2181, config=Config(lr=1e-3))
    assert rate(0) == 0 and rate(33) == pytest.approx(5e-4) and rate(66) == pytest.approx(1e-3)
    assert rate(66 + 2115 // 2) == pytest.approx(5e-4, rel=1e-2) and 0 < rate(2180) < 1e-8


# ---- the optimizer -------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What goes wrong in data parallelism: odd sizes, a module used twice, a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(577, 3))
        self.twice = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5)
        self.unused = nn.Parameter(torch.randn(7))

    def forward(self, x):
        return self.out(self.twice(torch.tanh(self.twice(self.table[x]))))


def odd_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 577, (8,), generator=generator), torch.randint(0, 5, (8,), generator=generator)


def odd_run(rank, world, folder, shard, micro, steps=10):
    """Ten steps of this rank; saves weights and gradient norms. Every rank starts from other weights on purpose."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(rank)
    model = Odd().double()
    optimizer = DataParallelAdamW(model.parameters(), weight_decay=0.1, clip=0.5, shard=shard, bucket_size=100)
    norms, share = [], 8 // world
    for step in range(steps):
        x, y = (part[rank * share : (rank + 1) * share] for part in odd_batch(step))
        pieces = list(zip(x.split(micro), y.split(micro)))
        for i, (x, y) in enumerate(pieces):
            if i == len(pieces) - 1:
                optimizer.last_backward()
            (nn.functional.cross_entropy(model(x), y, reduction="sum") / 8).backward()
        norms.append(optimizer.step(1e-2))
    torch.save((model.state_dict(), norms), f"{folder}/{rank}.pt")
    if world > 1:
        dist.barrier()  # nobody leaves while another still listens: gloo may abort then
        train.leave_ranks()


def torch_run(steps=10):
    """The same ten steps with torch.optim.AdamW and clip_grad_norm_."""
    torch.manual_seed(0)
    model, norms = Odd().double(), []
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=1e-2)
    for step in range(steps):
        x, y = odd_batch(step)
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y, reduction="sum").div(8).backward()
        model.unused.grad = torch.zeros_like(model.unused)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    return model.state_dict(), norms


@pytest.mark.parametrize("world, shard, micro", [(1, False, 8), (1, True, 3), (2, False, 4), (2, True, 2),
                                                 (4, False, 1), (4, True, 2)])
def test_equals_torch_adamw_on_any_number_of_ranks(tmp_path, world, shard, micro):
    """Weights after ten steps and all gradient norms, whatever the ranks, shards and micro-batches, in fp64."""
    if world == 1:
        odd_run(0, 1, tmp_path, shard, micro)
    else:
        torch.multiprocessing.spawn(odd_run, (world, tmp_path, shard, micro), nprocs=world)
    weights, norms = torch_run()
    for rank in range(world):
        ours, our_norms = torch.load(tmp_path / f"{rank}.pt")
        assert our_norms == pytest.approx(norms, rel=1e-12)
        for name, tensor in weights.items():
            assert torch.allclose(ours[name], tensor, rtol=1e-10, atol=1e-12), name


class Witness(DataParallelAdamW):
    """Notes, whenever a bucket is sent, how many parameters backward has yet to reach."""

    sent = None

    def send(self, bucket):
        self.sent = (self.sent or []) + [sum(len(b.waiting) for b in self.buckets)]
        super().send(bucket)


def test_buckets_leave_while_backward_goes_on():
    """The first is sent when the last layer is done and all others wait; on one rank as on many."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = Witness(model.parameters(), bucket_size=128)
    model(torch.randn(2, 8)).sum().backward()
    assert optimizer.sent is None  # a micro-batch that is not the last sends nothing
    optimizer.last_backward()
    model(torch.randn(2, 8)).sum().backward()
    assert optimizer.sent == [4, 2, 0]


def test_second_step_remembers_no_gradient():
    layer = nn.Linear(3, 3)
    optimizer = DataParallelAdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    assert optimizer.step(1e-2) > 0
    (0 * layer(torch.ones(1, 3)).sum()).backward()
    assert optimizer.step(1e-2) == 0


def test_small_updates_survive_bfloat16():
    """Ten steps of 2e-5 in one direction move a weight of 0.02 by 2e-4; in bfloat16 alone most are rounded away."""
    weight = nn.Parameter(torch.full((1000,), 0.02).bfloat16())
    optimizer = DataParallelAdamW([weight])
    for _ in range(10):
        weight.float().sum().backward()
        optimizer.step(2e-5)
    assert torch.allclose(optimizer.buckets[0].master, torch.tensor(0.02).bfloat16().float() - 2e-4, atol=1e-7)
    assert torch.equal(weight.data, optimizer.buckets[0].master.bfloat16())


def test_float16_skips_a_step_that_overflows():
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = DataParallelAdamW([weight])
    (weight.float().sum() * math.inf).backward()
    assert not math.isfinite(optimizer.step(1e-2))
    assert optimizer.loss_scale == 2.0**15 and (weight == 1).all() and optimizer.steps == 0
    (optimizer.loss_scale * (weight.float() * 1e-9).sum()).backward()  # 1e-9 alone is zero in float16
    assert optimizer.step(1e-2) == pytest.approx(2e-9, rel=1e-2)
    assert (weight < 1).all()


def test_gradients_that_are_not_finite_change_nothing():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    optimizer = DataParallelAdamW(layer.parameters())
    (layer(torch.ones(1, 2)).sum() * math.nan).backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step(1e-2)
    assert torch.equal(layer.weight, before)


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.3)

    def forward(self, x, factor):
        return x + self.down(self.drop(torch.relu(self.up(x)))) * factor


def chain(checkpointing, shared=False, needs_grad=True):
    """(output, input gradient, weight gradients, how often each weight's hook fired) of four layers with dropout."""
    torch.manual_seed(0)
    layers = [Layer() for _ in range(4)] if not shared else [Layer()] * 4
    x, fired = torch.randn(32, 16, requires_grad=needs_grad), []
    parameters = list(nn.ModuleList(layers).parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    run = {id(layer): layer.forward for layer in layers}
    if checkpointing:
        run = {key: train.checkpointed(forward) for key, forward in run.items()}
    torch.manual_seed(5)
    y = x
    for layer in layers:
        y = run[id(layer)](y, 0.5)
    y.square().sum().backward()
    return y, x.grad, [p.grad for p in parameters], len(fired)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_checkpointing_changes_no_bit(shared, needs_grad):
    """With dropout, with one module used four times, with an input that needs no gradient; hooks fire once."""
    plain, ours = chain(False, shared, needs_grad), chain(True, shared, needs_grad)
    assert torch.equal(plain[0], ours[0])
    assert (plain[1] is None and ours[1] is None) or torch.equal(plain[1], ours[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], ours[2], strict=True))
    assert plain[3] == ours[3] == len(plain[2])


def test_checkpointing_keeps_autocast():
    layer, x = Layer(), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = train.checkpointed(layer.eval().forward)(x, 1.0)
    y.sum().backward()  # outside autocast: the second run must still compute in bfloat16
    ours = layer.up.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, 1.0)
    y.sum().backward()
    assert torch.equal(ours, layer.up.weight.grad)


def saved_bytes(llm, ids):
    """Bytes that autograd holds between forward and backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = llm.hidden(llm.embed(ids))
    hidden.sum().backward()
    return sum(storages.values()), [p.grad.clone() for p in llm.parameters() if p.grad is not None]


def test_checkpointing_saves_memory_in_the_llm(llama_folder):
    from llm import LLM
    ids, held, gradients = torch.randint(0, 75, (4, 64)), {}, {}
    for which in ("none", "every-other", "every"):
        llm = LLM.from_pretrained(llama_folder).requires_grad_()
        train.checkpoint_blocks(llm.model.layers, which)
        held[which], gradients[which] = saved_bytes(llm, ids)
    print("bytes held for backward:", held)
    assert held["every"] < 0.5 * held["none"] and held["every"] < held["every-other"] < held["none"]
    for which in ("every-other", "every"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[which], strict=True))


# ---- one step, cut up in other ways --------------------------------------------------------------------------------


def conversation_samples(tokenizer, template, text_only=()):
    """Eight samples of different lengths from toy scenes; those numbered in `text_only` have no image."""
    import random
    rng, scenes, samples = random.Random(0), toy_world.scenes()["train"], []
    for number in range(8):
        scene = scenes[number // 2]  # pairs share a scene, so some captions come twice
        question, answer = toy_world.open_question(scene, "color", rng)
        answer = answer if template == "v1" else toy_world.CAPTION.format(**scene)
        has_image = number not in text_only
        turns = [("human", f"{data.IMAGE}\n{question}" if has_image else question), ("gpt", answer)]
        ids, roles = data.tokenise(data.make_template(template, tokenizer)(turns), tokenizer, has_image)
        pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(number)) if has_image else None
        summary = tokenizer(answer + "\n" + toy_world.DESCRIBE[number % 2]).input_ids  # of two lengths
        samples.append({"ids": ids, "roles": roles, "pixels": pixels, "summary_ids": summary, "name": str(number)})
    return samples


def contrastive_scales(contrastive):
    return torch.nn.ModuleDict({name: losses.ContrastiveScale() for name in losses.TERMS[contrastive]})


class Recorder(DataParallelAdamW):
    """Keeps the summed, unclipped gradients of every step; of this rank's slices where they are sharded."""

    def update(self, lr, shrink):
        self.gradients = getattr(self, "gradients", []) + [[b.total.clone() for b in self.buckets]]
        super().update(lr, shrink)


def three_steps(clip_folder, llama_folder, options, micro, shard=False, text_only=(), rank=0, world=1):
    """(log lines of three steps on one batch, gradients of the first) of this rank, in fp64."""
    config = Config(**options, contrastive_weight=0.7)
    stage = config.stage
    torch.manual_seed(0)
    vlm = VLM.from_towers(clip_folder, llama_folder, "mlp2x_gelu", dtype=torch.float64)
    vlm.llm.requires_grad_(stage == "instruct")
    train.checkpoint_blocks(vlm.llm.model.layers, "every")
    scales, tokenizer = contrastive_scales(config.contrastive).double(), data.load_tokenizer(llama_folder)
    samples = conversation_samples(tokenizer, "plain" if stage == "align" else "v1", text_only)
    optimizer = Recorder([p for p in [*vlm.parameters(), *scales.parameters()] if p.requires_grad], shard=shard)
    share = 8 // world
    mine = samples[rank * share : (rank + 1) * share]
    batches = [data.collate(mine[i : i + micro], 16, -200, 0, 32) for i in range(0, share, micro)]
    lines = [train.train_step(vlm, scales, optimizer, batches, config, lr=1e-3) for _ in range(3)]
    return lines, optimizer.gradients[0]


def steps_of_rank(rank, world, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(three_steps(*args, rank, world), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still listens: gloo may abort then
    train.leave_ranks()


def assert_same_steps(one, others):
    """Log lines and gradients of one process against those of the ranks, given in order."""
    for other in others:
        for ours, theirs in zip(other[0], one[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    for number, whole in enumerate(one[1]):
        parts = [other[1][number] for other in others]
        found = torch.cat(parts) if len(parts[0]) < len(whole) else parts[0]  # slices, or the whole on each
        assert (found[: len(whole)] - whole).norm() <= 1e-10 * whole.norm()


INSTRUCT = {"stage": "instruct"}
ALIGN = {name: {"stage": "align", "contrastive": name} for name in losses.TERMS}
LARGEST = ALIGN["patch"] | {"pool": "max", "reduce": "max"}


@pytest.mark.parametrize("options", [INSTRUCT, *ALIGN.values(), LARGEST], ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_change_nothing(clip_folder, llama_folder, options, micro):
    text_only = (2, 5) if options == INSTRUCT else ()
    whole = three_steps(clip_folder, llama_folder, options, 8, text_only=text_only)
    assert whole[0][0]["grad_norm"] > 0 and whole[0][2]["loss"] < whole[0][0]["loss"]
    assert_same_steps(whole, [three_steps(clip_folder, llama_folder, options, micro, text_only=text_only)])


@pytest.mark.parametrize("options, world, shard", [
    *((options, world, False) for options in (ALIGN["patch"], ALIGN["prompt"], ALIGN["both"], LARGEST)
      for world in (2, 4)), (INSTRUCT, 2, False), (INSTRUCT, 2, True), (INSTRUCT, 4, True)],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value))
def test_ranks_change_nothing(clip_folder, llama_folder, tmp_path, options, world, shard):
    """Losses, scale, norm and gradients; with micro-batches of 2, equal captions on different ranks, checkpointing
    on, and in the instruct stage a last rank whose batch has no image at all."""
    text_only = (4, 5, 6, 7) if options == INSTRUCT else ()
    whole = three_steps(clip_folder, llama_folder, options, 8, text_only=text_only)
    torch.multiprocessing.spawn(
        steps_of_rank, (world, tmp_path, clip_folder, llama_folder, options, 2, shard, text_only), nprocs=world)
    assert_same_steps(whole, [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)])


def test_the_image_vector_knows_the_prompt_and_not_the_caption(clip_folder, llama_folder):
    """Other captions of other lengths after the same picture and prompt: the same vector; another prompt: another."""
    vlm, tokenizer = VLM.from_towers(clip_folder, llama_folder, "linear"), data.load_tokenizer(llama_folder)
    pixels, vectors = torch.randn(3, 32, 32), {}
    long = "the picture has a large " * 3
    for prompt, caption in (("Describe the picture.", "a red ring"), ("Describe the picture.", long),
                            ("What size is it?", "a red ring"), ("", "a red ring"), ("", "blue")):
        pieces = data.plain([("human", data.IMAGE), ("gpt", caption)], tokenizer.eos_token, prompt)
        ids, roles = data.tokenise(pieces, tokenizer, True)
        batch = data.collate([{"ids": ids, "roles": roles, "pixels": pixels, "name": "x"}], 16, -200, 0, 32)
        _, vector = train.caption_pass(vlm, batch, vlm.encode(batch["pixels"]))
        vectors.setdefault(prompt, []).append(vector)
    for same in vectors.values():
        assert all(torch.allclose(same[0], other, atol=1e-5) for other in same)
    firsts = [same[0] for same in vectors.values()]
    assert not torch.allclose(firsts[0], firsts[1], atol=0.1) and not torch.allclose(firsts[0], firsts[2], atol=0.1)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)])  # among others; alone, with collate's dummy image
def test_the_contrastive_loss_needs_an_image_with_each_caption(clip_folder, llama_folder, rows):
    vlm = VLM.from_towers(clip_folder, llama_folder, "linear")
    samples = conversation_samples(data.load_tokenizer(llama_folder), "v1", (3,))[rows]
    with pytest.raises(ValueError, match="a record here has none"):
        train.train_step(vlm, contrastive_scales("patch"), DataParallelAdamW(vlm.projector.parameters()),
                         [data.collate(samples, 16, -200, 0, 32)], Config(stage="align", contrastive="patch"), 1e-3)


def test_the_clamp_of_the_scale_holds_in_the_optimizer():
    scale = losses.ContrastiveScale()
    optimizer = DataParallelAdamW(scale.parameters())
    for _ in range(3):
        (-1e3 * scale.log_scale).backward()
        optimizer.step(5.0)
        scale.clamp_()
    assert scale().item() == pytest.approx(100)
    optimizer.load_state_dict(optimizer.state_dict())
    assert scale().item() == pytest.approx(100)


def test_a_step_without_supervised_tokens_is_an_error(clip_folder, llama_folder):
    vlm = VLM.from_towers(clip_folder, llama_folder, "linear")
    batch = data.collate(conversation_samples(data.load_tokenizer(llama_folder), "plain"), 16, -200, 0, 32)
    batch["labels"].fill_(data.IGNORE)
    with pytest.raises(ValueError, match="no token"):
        train.train_step(vlm, contrastive_scales("none"), DataParallelAdamW(vlm.projector.parameters()), [batch],
                         Config(stage="align"), 1e-3)


# ---- which records make which step ---------------------------------------------------------------------------------


def test_every_rank_count_takes_the_same_records(monkeypatch):
    config = Config(batch=8, micro_batch=2, epochs=2.0, seed=3)
    steps = train.count_steps(config, 21)
    assert steps == math.ceil(42 / 8)
    whole = [i for batch in train.micro_batches_of_rank(replace(config, micro_batch=8), [1] * 21, steps) for i in batch]
    assert sorted(whole[:21]) == list(range(21)) == sorted(whole[21:42])
    for world in (2, 4):
        monkeypatch.setattr(train, "world_size", lambda: world)
        per_rank = []
        for rank in range(world):
            monkeypatch.setattr(train, "rank", lambda: rank)
            batches = train.micro_batches_of_rank(config, [1] * 21, steps)
            parts = len(batches) // steps
            per_rank.append([sum(batches[s * parts : (s + 1) * parts], []) for s in range(steps)])
        assert [i for step in zip(*per_rank) for part in step for i in part] == whole
    monkeypatch.setattr(train, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch of 8 does not divide into 3 ranks"):
        train.split_batch(config)


# ---- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder, llama_folder):
    """A folder to run in: a small toy world, and random towers under the names of the options."""
    folder = tmp_path_factory.mktemp("run")
    toy_world.write_world(folder / "toy", align=24, instruct=24, text=4, test=8)
    return folder, ["--preset", "tiny", "--vit", clip_folder, "--llm", llama_folder, "--batch", "8", "--micro_batch",
                    "4", "--images", folder / "toy/images", "--epochs", "2"]


HERE = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # a rendezvous of one agent, on any free port


def command(world, *args, name="train.py", launch=()):
    """train.py with the options of `world`, or eval.py; as `python` or, with `launch`, as torchrun starts it."""
    folder, options = world
    launch = ["-m", "torch.distributed.run", *launch] if launch else []
    parts = [sys.executable, *launch, ROOT / name, *(options if name == "train.py" else []), *args]
    return {"args": [str(part) for part in parts], "cwd": folder}


def script(world, *args, check=True, **how):
    """Run to the end; an exit status other than 0 fails the test, unless that is what it is about."""
    run = subprocess.run(**command(world, *args, **how), capture_output=True, text=True, timeout=240)
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def start(world, *args, **how):
    """Run in the background, in a process group of its own."""
    return subprocess.Popen(**command(world, *args, **how), start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def stage_options(world, stage):
    return ["--stage", stage, "--annotations", world[0] / f"toy/{stage}.json"]


def wait_for(pattern, folder):
    deadline = time.time() + 120
    while not list(folder.glob(pattern)):
        assert time.time() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.01)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("ms", "memory_mib")} for line in lines]


def test_align_instruct_eval_as_scripts(world):
    """The three commands in order, each finding what the one before left."""
    folder = world[0]
    out = script(world, *stage_options(world, "align")).stdout
    assert "vit" in out and "projector" in out and "tokens carry loss" in out
    align = folder / "runs/tiny/align"
    assert {"config.json", "projector.safetensors", "log.jsonl", "results.json"} <= {f.name for f in align.iterdir()}
    log = log_of(align)
    assert len(log) == 6 and {"generative", "patch", "patch_scale", "patch_retrieval", "grad_norm"} <= log[0].keys()
    out = script(world, *stage_options(world, "instruct")).stdout
    assert "loaded projector.0.weight, projector.0.bias, projector.2.weight, projector.2.bias" in out
    assert (folder / "runs/tiny/instruct/llm/model.safetensors").exists()
    scored = script(world, "--bench", "scienceqa", "--data", folder / "toy/scienceqa", name="eval.py")
    result = json.loads(scored.stdout.splitlines()[-1])
    assert result["questions"] == 8 and result["questions_img"] == 6 and result["ckpt"] == "runs/tiny/instruct"
    saved = json.loads((folder / "runs/tiny/instruct/scienceqa.json").read_text())
    assert saved["scores"] == result and len(saved["predictions"]) == 8
    captions = ["--data", folder / "toy/captions.json", "--images", folder / "toy/images"]
    for bench, key in (("pope", "f1"), ("mme", "accuracy_plus"), ("retrieval", "image_to_text_r1"), ("gap", "tacs")):
        where = captions if bench in ("retrieval", "gap") else ["--data", folder / "toy" / bench]
        result = json.loads(script(world, "--bench", bench, *where, name="eval.py").stdout.splitlines()[-1])
        assert key in result and (folder / f"runs/tiny/instruct/{bench}.json").exists()
    before = (align / "projector.safetensors").read_bytes()
    assert "is now runs/tiny/align.old" in script(world, *stage_options(world, "align"), "--steps", "1").stdout
    assert (folder / "runs/tiny/align.old/projector.safetensors").read_bytes() == before  # nothing was lost
    image = next((folder / "toy/images").iterdir())
    drawn = script(world, "--bench", "heatmap", "--image", image, "--text", "a red circle", "--ckpt", "runs/tiny/align",
                   "runs/tiny/instruct", "--out", "map.png", name="eval.py")
    assert len(json.loads(drawn.stdout.splitlines()[-1])["runs"]) == 2 and (folder / "map.png").exists()
    asked = script(world, "--ask", image, "What color is the shape?", name="eval.py")
    assert json.loads(asked.stdout.splitlines()[-1])["question"] == "What color is the shape?"


@pytest.mark.parametrize("stage, ranks, shard", [("align", 1, False), ("align", 2, False), ("instruct", 1, False),
                                                 ("instruct", 2, True)])
def test_killed_and_resumed_equals_uninterrupted(world, tmp_path, stage, ranks, shard):
    """Six steps = some steps, kill -9, --resume: every logged number and every weight, bit for bit."""
    if stage == "instruct" and not (world[0] / "runs/tiny/align").exists():
        script(world, *stage_options(world, "align"))
    options = [*stage_options(world, stage), "--shard", str(shard), "--save_every", "1", "--checkpointing", "every"]
    launch = ["--nproc_per_node=2", *HERE] if ranks == 2 else []
    script(world, *options, "--out", tmp_path / "whole", launch=launch)
    killed = start(world, *options, "--out", tmp_path / "cut", launch=launch)
    wait_for("checkpoint-000000[23]", tmp_path / "cut")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut/config.json").exists()  # it was stopped before it could finish
    resumed = script(world, *options, "--out", tmp_path / "cut", "--resume", launch=launch)
    assert "resumed from" in resumed.stdout
    assert without_times(log_of(tmp_path / "cut")) == without_times(log_of(tmp_path / "whole"))
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 2


def test_loader_workers_change_nothing(world, tmp_path):
    """Samples read by two loader processes, or kept in memory, make the run that reading them in place makes."""
    options = [*stage_options(world, "align"), "--contrastive", "both", "--prompt", "describe", "--out"]
    script(world, *options, tmp_path / "none", "--cache", "False")
    for name, more in (("workers", ["--workers", "2", "--cache", "False"]), ("cache", ["--cache", "True"])):
        script(world, *options, tmp_path / name, *more)
        assert without_times(log_of(tmp_path / name)) == without_times(log_of(tmp_path / "none"))


def test_two_nodes_log_what_one_process_logs(world, tmp_path):
    """Two agents with a rendezvous, as on two machines; every logged number equals that of one process."""
    options = [*stage_options(world, "align"), "--out"]
    launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    agents = [start(world, *options, tmp_path / "two", launch=launch) for _ in range(2)]
    script(world, *options, tmp_path / "one")
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert without_times([ours])[0] == pytest.approx(without_times([theirs])[0], rel=1e-4)


def test_max_restarts_continues_by_itself(world, tmp_path):
    """A worker is killed; torchrun starts it again; the log is that of an undisturbed run."""
    options = [*stage_options(world, "align"), "--epochs", "4", "--save_every", "1", "--out"]
    agent = start(world, *options, tmp_path / "cut", launch=["--nproc_per_node=1", "--max-restarts=1", *HERE])
    wait_for("checkpoint-000000[23]", tmp_path / "cut")
    worker, = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    script(world, *options, tmp_path / "whole")
    assert agent.wait(timeout=120) == 0
    assert without_times(log_of(tmp_path / "cut")) == without_times(log_of(tmp_path / "whole"))


def test_dry_run_reads_and_writes_nothing(tmp_path):
    for stage in ("align", "instruct"):
        run = script((tmp_path, ["--preset", "tiny"]), "--stage", stage, "--dry_run")
        report = json.loads(run.stdout.splitlines()[-1])
        assert report["ms_per_step_fastest_of_2"] > 0 and report["predicted_gib"] > 0 and "EFLOP" in run.stdout
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_refused_before_loading(tmp_path):
    run = script((tmp_path, ["--preset", "13b"]), "--stage", "instruct", "--dry_run", check=False)
    assert run.returncode != 0 and "13,015,864,320" in run.stdout  # parameters of the LLM: the plan came first
    assert "needs about" in run.stderr.splitlines()[-1]


def test_missing_data_names_data_set_and_ways_on(tmp_path):
    run = script((tmp_path, ["--preset", "7b"]), "--stage", "align", check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert all(part in last for part in ("blip_laion_cc_sbu_558k.json", "liuhaotian/LLaVA-Pretrain", "--dry_run",
                                         "--preset tiny"))


def test_a_run_stopped_while_it_was_saved_can_be_saved_again(clip_folder, llama_folder, tmp_path, monkeypatch):
    """Its llm/ is already in place, its config.json is not."""
    monkeypatch.chdir(tmp_path)
    vlm = VLM.from_towers(clip_folder, llama_folder, "linear")
    (tmp_path / "out/llm").mkdir(parents=True)
    (tmp_path / "out/llm/old").touch()
    train.save_run(Config(stage="instruct", out=str(tmp_path / "out")), vlm, {})
    VLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/llm/old").exists() and not (tmp_path / "out.partial").exists()


BAD_INPUT = [
    (["--batch", "7", "--micro_batch", "2"], "batch of 7 does not divide"),
    (["--annotations", "none.json"], "none.json: no such file"),
    (["--vit", "no/such-tower"], "no/such-tower"),
    (["--images", "/nowhere"], r"record 'align-\d+': /nowhere/align-\d+.png: no such image"),
    (["--images", "/nowhere", "--workers", "1"], r"record 'align-\d+': /nowhere/align-\d+.png: no such image"),
    (["--contrastive", "prompted"], "invalid choice: 'prompted'"),
    (["--template", "v2"], "invalid choice: 'v2'"),
    (["--data_fraction", "0"], "data_fraction is 0"),
    (["--steps", "-5"], "--steps and --save_every not below"),
    (["--contrastive", "prompt", "--template", "v1"], "need --template plain"),
    (["--contrastive", "prompt", "--prompt", "none", "--template", "v1"], "need --template plain"),
    (["--contrastive", "none", "--prompt", "describe", "--template", "v1"], "need --template plain"),
    (["--prompt_text", "So:"], "belong to --contrastive prompt or both"),
]


@pytest.mark.parametrize("args, message", BAD_INPUT)
def test_bad_input_ends_in_one_line(world, tmp_path, args, message):
    run = script(world, *stage_options(world, "align"), *args, "--out", tmp_path / "out", check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert re.search(message, last) and not (tmp_path / "out").exists()


def test_instruct_refuses_what_does_not_fit(world, tmp_path):
    missing = script(world, *stage_options(world, "instruct"), "--init", tmp_path / "none", check=False)
    assert "no align run to start from" in missing.stderr and missing.returncode != 0
    script(world, *stage_options(world, "align"), "--out", tmp_path / "linear", "--projector", "linear")
    other = script(world, *stage_options(world, "instruct"), "--init", tmp_path / "linear", check=False)
    assert "made with projector 'linear', this run has 'mlp2x_gelu'" in other.stderr


def test_eval_without_a_run_says_what_to_do(tmp_path):
    run = script((tmp_path, []), "--bench", "scienceqa", name="eval.py", check=False)
    assert run.returncode != 0 and run.stderr.strip().splitlines()[-1].startswith("eval.py: no run to score yet")
