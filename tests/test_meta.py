"""A step at full shape on the meta device: shapes and dtypes without numbers, so that 7B fits anywhere. Peak
memory against the plan's sum, operations against `flops_per_step`, and how often a GPU would be waited for.

    python tests/test_meta.py    # the memory table: every loss, way of checkpointing and preset
"""

import sys
import weakref
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_step
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import losses
import train
from running import costs, options, order, plan

META, aten = torch.device("meta"), torch.ops.aten


class Watch(TorchDispatchMode):
    """Adds up the storages that are alive on the meta device, and counts what would wait for a GPU: a number
    or a tensor that is brought to the CPU (here, ones). What has a size that depends on numbers is an error
    of PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.alive, self.live, self.peak, self.waits = {}, 0, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._opname, kwargs or {}
        is_meta = any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(args))
        if is_meta and function.namespace == "c10d":  # the message is sent with nothing in it
            done = function(*tree_map(lambda x: torch.empty(0) if isinstance(x, torch.Tensor) else x, args))
            return (args[0], done[-1]) if isinstance(done, tuple) else done
        leaves = torch.device(kwargs.get("device") or "meta") != META
        if is_meta and (leaves or name == "_local_scalar_dense"):
            self.waits[name] += 1
            return 1.0 if name == "_local_scalar_dense" else torch.ones(args[0].shape, dtype=args[0].dtype)
        out = function(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self.keep(x.untyped_storage())
        return out

    def keep(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.live -= self.alive.pop(key)


class RMSNorm(torch.autograd.Function):
    """A GPU has one kernel each way, which keeps x and a number a row; elsewhere PyTorch takes it apart."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), x.new_empty(x.shape[-1]) if ctx.needs_input_grad[1] else None


def use_gpu_kernels(monkeypatch):
    """On the meta device PyTorch chooses others, and refuses the fused optimizer."""
    def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: RMSNorm.apply(x, weight))
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                        lambda: ["meta"])


@pytest.fixture
def kernels(monkeypatch):
    use_gpu_kernels(monkeypatch)


def second_step(stage, preset, world=1, text=0, dtype=torch.bfloat16, is_first=False, **given):
    """(config, model, what was seen of the second step, GiB by the plan) at full shape, on rank 0 of so
    many; of captioning steps, or of those of contrast first."""
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        config = options.configure(stage, {"preset": preset} | given)
        with Watch() as watch:
            vlm = bench_step.random_model(config, costs.shapes_of(config), META, dtype)
            optimizer, terms = train.build_optimizer(config, vlm, META)
            micro_batches = bench_step.random_step(config, vlm, text)
            for _ in range(2):  # in the second the optimizer has its moments
                watch.waits.clear()
                watch.peak = watch.live
                step = 0 if is_first else config.contrastive_first
                train.train_step(vlm, terms, optimizer, micro_batches, config, 1e-3, step)
        largest = order.largest_micro_batch(*plan.typical_step(config, vlm, world, text))
        outlined = costs.outline(config)
        return config, vlm, watch, sum(plan.memory_parts(config, outlined, dtype, *largest, world).values())
    finally:
        if world > 1:
            dist.destroy_process_group()


SHORT = [  # stage, preset, ranks, tokens of text in each row (0: typical), options
    ("align", "7b", 8, 0, {}), ("align", "7b", 8, 0, {"checkpointing": "every", "contrastive": "both"}),
    ("align", "7b", 8, 0, {"checkpointing": "every-other", "micro_batch": 32}),
    ("instruct", "7b", 8, 0, {}), ("instruct", "7b", 8, 1471, {"checkpointing": "none"}),
    ("instruct", "7b", 8, 0, {"shard": False}), ("instruct", "small", 8, 0, {}),
    ("align", "speedrun", 1, 0, {"batch": 64}), ("instruct", "speedrun", 16, 0, {}),
    ("instruct", "speedrun", 4, 0, {"shard": True, "micro_batch": 8}),
    ("instruct", "tiny", 1, 0, {}), ("instruct", "tiny", 8, 0, {}), ("instruct", "tiny", 16, 0, {}),
    ("align", "small", 8, 0, {"features": "f", "batch": 128})]


@pytest.mark.parametrize("stage, preset, world, text, options", SHORT)
def test_the_plan_knows_the_peak_and_a_gpu_is_waited_for_three_times(kernels, stage, preset, world, text,
                                                                     options):
    _, _, watch, planned = second_step(stage, preset, world, text, **options)
    assert watch.peak / 2**30 == pytest.approx(planned, rel=0.05)
    assert watch.waits.total() <= 3


def test_contrast_first_needs_less_memory_than_what_follows(kernels):
    _, _, watch, planned = second_step("align", "7b", 8, is_first=True)
    assert watch.peak / 2**30 < 0.95 * planned and watch.waits.total() <= 3


@pytest.mark.parametrize("stage, preset, options", [
    ("align", "small", {}), ("align", "small", {"projector": "pixel_shuffle"}), ("instruct", "small", {}),
    ("align", "small", {"projector": "resampler"}), ("align", "7b", {}), ("instruct", "7b", {})])
def test_operations_are_those_that_pytorch_counts(kernels, stage, preset, options):
    """Attention by its formula: PyTorch counts all pairs, causal attention needs half, and its backward
    computes one product again."""
    one = {"batch": 4, "micro_batch": 4, "checkpointing": "none", "contrastive": "none"}
    with FlopCounterMode(display=False) as counter:
        config, vlm, _, _ = second_step(stage, preset, **one | options)
    counted = Counter({op.__name__: n / 2 for op, n in counter.get_flop_counts()["Global"].items()})  # a step
    matrices = sum(n for name, n in counted.items() if "attention" not in name)
    assert matrices + costs.attention_flops(config, vlm) == pytest.approx(
        sum(costs.flops_per_step(config, vlm).values()), rel=0.02)


WAYS = "every", "every-other", "none"
LONG = [(stage, preset, world, 0, {})
        for preset in options.PRESETS for stage in ("align", "instruct") for world in (1, 8, 16)]
LONG += [("align", "7b", 8, 0, {"contrastive": loss, "checkpointing": way, "micro_batch": 32})
         for loss in losses.CONTRASTIVE for way in WAYS]
LONG += [("instruct", "7b", 8, text, {"checkpointing": way, "shard": shard})
         for text in (0, 1471) for way in WAYS for shard in (True, False)]
LONG += [("align", "7b", 1, 0, {"contrastive": loss, "checkpointing": "every"})
         for loss in ("patch", "prompt")]
LONG += [("instruct", "7b", 8, 0, {"micro_tokens": 0}), ("instruct", "13b", 8, 1471, {}),
         ("instruct", "7b", 8, 0, {"micro_batch": 4}), ("instruct", "7b", 4, 0, {"llm": "Qwen/Qwen3-0.6B"})]
LONG += [("align", "small", 1, 0, given) for given in (
    {"projector": "pixel_shuffle"}, {"contrastive": "both"}, {"checkpointing": "every"}, {"features": "f"})]
LONG += [("instruct", "small", 1, 1851, {}), ("align", "7b", 8, 0, {"features": "f"}),
         ("instruct", "small", 1, 1851, {"checkpointing": "every", "micro_batch": 4})]

if __name__ == "__main__":  # the whole table, in some minutes
    with pytest.MonkeyPatch.context() as patch:
        use_gpu_kernels(patch)
        for stage, preset, world, text, given in LONG:
            _, _, watch, planned = second_step(stage, preset, world, text, **given)
            peak = watch.peak / 2**30
            print(f"{stage:<9}{preset:<9} W={world:<3} text {text:<5} peak {peak:8.4g} GiB, planned "
                  f"{planned:8.4g}, ratio {peak / planned:.3f} {given or ''}", flush=True)
