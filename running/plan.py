"""What a run will take, told before anything is loaded: parameters, memory, disk, passes over the records."""

import math
import shutil
from pathlib import Path

import torch
from torch import nn

from llm import FAMILIES
from losses import CONTRASTIVE
from plumbing.ranks import say, total_memory, world_size
from running.order import split_batch, subset

TEXT_TOKENS = {"align": 20, "instruct": 250}  # of a typical sample of LLaVA's two data sets, beside its image
GIB = 2**30


def row_length(config, vlm) -> int:
    """Tokens of a typical sample: BOS, image, text."""
    return 1 + vlm.num_image_tokens + TEXT_TOKENS[config.stage]


def count_weights(module, only_learning: bool = False) -> int:
    """Parameters of a module, or those of them that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_learning)


def block_memory(config, vlm, tokens: int, itemsize: int) -> tuple:
    """(bytes that a block keeps for its backward, bytes of its gradients there) for so many tokens."""
    c = vlm.llm.config
    C = c.hidden_size
    MLP = c.intermediate_size
    _, _, has_norm = FAMILIES[c.model_type]
    heads = c.num_attention_heads + c.num_key_value_heads
    heads *= c.head_dim
    kept = 2 * C  # two residuals
    kept += 2 * heads  # q and what attention makes of it; k and v
    kept += has_norm * heads  # q and k before their norm
    kept += 3 * MLP  # the factors of the gated MLP
    if config.stage == "instruct":  # what goes into the matrices, whose gradients need it
        kept += 2 * C
        kept += MLP
    gradients = 3 * MLP
    gradients += 2 * C
    size = tokens * itemsize
    return size * kept, size * gradients


def images_memory(config, vlm, itemsize: int) -> int:
    """Bytes of pixels, features, and what the projector and each loss keep at the cut, of a rank's whole
    batch."""
    v = vlm.vit.config
    C = vlm.llm.config.hidden_size
    layers = sum(isinstance(module, nn.Linear) for module in vlm.projector.modules())
    vectors = 2 * layers  # what goes into a layer and what comes out
    vectors += len(CONTRASTIVE[config.contrastive])  # a gradient of each loss
    pixels = 3 * v.image_size**2 * 4
    features = vlm.vit.num_patches * v.hidden_size * itemsize
    tokens = vlm.num_image_tokens * C * itemsize
    images = config.batch // world_size()
    return images * (pixels + features + vectors * tokens)


def memory_sum(config, vlm, dtype, rows: int, length: int) -> dict:
    """GiB that a rank needs at the worst moment of a step, by purpose.

    The largest micro-batch has `rows` rows of `length` tokens. Left out: what CUDA, NCCL and fragmentation
    take. Memory grows while the LLM goes forward and falls while it goes back. The gradients of what learns
    grow meanwhile. So the worst moment is where backward begins, or where it ends.
    """
    c = vlm.llm.config
    itemsize = dtype.itemsize
    llm_learns = config.stage == "instruct"
    shards = world_size() if config.shard else 1
    learning = count_weights(vlm, only_learning=True) / shards
    block, sweep = block_memory(config, vlm, rows * length, itemsize)
    blocks = c.num_hidden_layers
    whole = {"none": blocks, "every-other": blocks // 2, "every": 0}[config.checkpointing]
    inputs = rows * length * c.hidden_size * itemsize
    kept = whole * block + (blocks - whole) * inputs
    recomputed = 0 if whole else block
    text = max(1, length - 1 - vlm.num_image_tokens)
    logits = rows * text * c.vocab_size * 4  # fp32; the loss makes two gradients of their size
    passes = math.ceil(config.batch // world_size() / rows)
    waiting = 1  # passes that await backward
    if "prompt" in CONTRASTIVE[config.contrastive]:
        waiting = passes
    gradients = 4 * learning
    head = 0  # the head's gradient, on its way
    if llm_learns:
        head = c.vocab_size * c.hidden_size * (4 + itemsize)
    begins = waiting * (kept + logits)
    begins += max(2 * logits, sweep + recomputed - logits)
    begins += gradients if passes > 1 else head  # of the earlier passes
    ends = gradients
    if llm_learns:
        sent = head if world_size() > 1 else 0
        ends += max(block + sweep, sent)
    masters = 8 if itemsize == 4 else 12  # fp32 weights are their own masters
    moment = max(begins, ends)
    moment += images_memory(config, vlm, itemsize)
    return {
        "weights": count_weights(vlm) * itemsize / GIB,
        "masters and moments": learning * masters / GIB,
        "activations and gradients": moment / GIB,
    }


def contrastive_words(config) -> str:
    """The contrastive loss, and its weight if it is not the papers' plain sum."""
    words = [config.contrastive]
    if config.contrastive_first:
        words.append(f"alone in the first {config.contrastive_first} steps")
    if config.contrastive_balance:
        words.append(f"at {config.contrastive_balance} of the captioning gradient")
    elif config.contrastive_weight != 1:
        words.append(f"at weight {config.contrastive_weight:g}")
    return ", ".join(words)


def print_plan(config, vlm, device, dtype, steps: int, largest: tuple):
    """What a reader wants to know before the first step. ValueError if it does not fit into a rank's memory.

    `largest`: rows of the largest micro-batch, and their tokens.
    """
    why = "a GPU" if torch.cuda.is_available() else "no GPU"
    micro_batch, _ = split_batch(config, world_size())
    say(f"\nstage {config.stage}, preset {config.preset} ({why} here): {steps} steps of {config.batch} on "
        f"{world_size()} rank(s) in micro-batches of {micro_batch}; "
        f"contrastive loss: {contrastive_words(config)}")
    if config.preset == "small":
        say("the learning rates of this preset are a guess: nobody has tuned them")
    say(f"{'module':<12}{'parameters':>16}{'learning':>16}  source")
    for name in ("vit", "projector", "llm"):
        part = getattr(vlm, name)
        learning = count_weights(part, only_learning=True)
        say(f"{name:<12}{count_weights(part):>16,}{learning:>16,}  {getattr(config, name)}")
    say(f"{str(dtype).removeprefix('torch.')}; norms, softmax, losses and optimizer in float32")
    memory = memory_sum(config, vlm, dtype, *largest)
    parts = ", ".join(f"{name} {size:.3g}" for name, size in memory.items())
    needs = sum(memory.values())
    has = total_memory(device) / GIB
    rows, tokens = largest
    say(f"memory of a rank, GiB, with {rows} rows of {tokens} tokens: {parts}; sum {needs:.3g} of {has:.3g}")
    if needs > has:
        raise ValueError(f"{config.preset} {config.stage} needs about {needs:.0f} GiB a rank, not {has:.0f}: "
                         "more ranks with --shard, a smaller --micro_batch or preset, --checkpointing every")


def print_passes(config, records: int, steps: int):
    """How often each record comes by. Contrast first has as many steps for few records as for many."""
    used = len(subset(records, config.data_fraction, config.seed))
    first = config.contrastive_first * config.batch / used
    after = steps * config.batch / used - first
    words = f"{used:,} records: {after:.3g} passes"
    if first:
        words += f" behind {first:.3g} of contrast first"
    if first > 10:
        words += ", many for so few: see --contrastive_first"
    say(words)


def check_disk(config, vlm, dtype, steps: int):
    """ValueError if the disk cannot hold the run: what learned, and up to three checkpoints.

    Two checkpoints are kept while a third is being written. Those of a resumed run are there already.
    """
    copies = 0
    if config.save_every and not config.resume:
        copies = min(3, (steps - 1) // config.save_every)
    out = Path(config.out).absolute()
    existing = next(path for path in (out, *out.parents) if path.exists())
    has = shutil.disk_usage(existing).free / GIB
    needs = count_weights(vlm, only_learning=True) * (dtype.itemsize + 12 * copies) / GIB
    say(f"on disk, GiB: {needs:.3g} of {has:.3g} that are free")
    if needs > has:
        raise ValueError(f"{config.out}: the run and its checkpoints take {needs:.3g} GiB, and its disk has "
                         f"{has:.3g}: another --out, or a larger --save_every (0: no checkpoints)")
