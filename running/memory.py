"""The memory of a rank at the worst moment of a step, by arithmetic. `python tests/test_meta.py` holds it
against what is alive then on the meta device: within 5 %, for every preset."""

import math

from torch import nn

from llm import FAMILIES
from losses import CONTRASTIVE
from running.costs import count_weights

GIB = 2**30
BUCKET_SIZE = 2**22  # of train.py's DataParallelAdamW


def block_memory(config, vlm, tokens: int, asked: int, itemsize: int) -> tuple:
    """(bytes that a block keeps for its backward, bytes of its gradients there): attention over so many
    tokens, and the MLP where it is asked for."""
    c = vlm.llm.config
    C = c.hidden_size
    MLP = c.intermediate_size
    _, _, has_norm = FAMILIES[c.model_type]
    heads = c.num_attention_heads + c.num_key_value_heads
    heads *= c.head_dim
    in_attention = C  # the residual
    in_attention += 2 * heads  # q and what attention makes of it; k and v
    in_attention += has_norm * heads  # q and k before their norm
    in_mlp = C  # the residual
    in_mlp += 3 * MLP  # the factors of the gated MLP
    if config.stage == "instruct":  # what goes into the matrices, whose gradients need it
        in_attention += C
        in_mlp += C + MLP
    gradients = 3 * MLP
    gradients += 2 * C
    if config.stage == "instruct":
        gradients -= MLP  # what went into the last matrix is gone by then
    kept = tokens * in_attention + asked * in_mlp
    return itemsize * kept, itemsize * asked * gradients


def images_memory(config, vlm, itemsize: int, world: int) -> int:
    """Bytes of pixels, features, and what the projector and each loss keep at the cut, of a rank's whole
    batch."""
    v = vlm.vit.config
    C = vlm.llm.config.hidden_size
    layers = sum(isinstance(module, nn.Linear) for module in vlm.projector.modules())
    vectors = 2 * layers  # what goes into a layer and what comes out
    vectors += len(CONTRASTIVE[config.contrastive])  # a gradient of each loss
    pixels = 0 if config.features else 3 * v.image_size**2 * 4
    features = vlm.vit.num_patches * v.hidden_size * itemsize
    tokens = vlm.num_image_tokens * C * itemsize
    images = config.batch // world
    return images * (pixels + features + vectors * tokens)


def memory_sum(config, vlm, dtype, rows: int, length: int, world: int) -> dict:
    """GiB that one of `world` ranks needs at the worst moment of a step, by purpose.

    The largest micro-batch has `rows` rows of `length` tokens. Left out: what CUDA, NCCL and fragmentation
    take. Memory grows while the LLM goes forward and falls while it goes back. The gradients of what learns
    grow meanwhile. So the worst moment is where backward begins, or where it ends.
    """
    c = vlm.llm.config
    itemsize = dtype.itemsize
    llm_learns = config.stage == "instruct"
    shards = world if config.shard else 1
    learning = count_weights(vlm, only_learning=True) / shards
    text = max(1, length - 1 - vlm.num_image_tokens)
    asked = rows * (text + 1)  # of the last block's MLP
    block, sweep = block_memory(config, vlm, rows * length, rows * length, itemsize)
    last, last_sweep = block_memory(config, vlm, rows * length, asked, itemsize)
    blocks = c.num_hidden_layers
    whole = {"none": blocks, "every-other": blocks // 2, "every": 0}[config.checkpointing]
    inputs = rows * length * c.hidden_size * itemsize
    kept = whole * block + (blocks - whole) * inputs
    last_is_whole = whole * 2 > blocks - 1  # of "every-other", the odd ones
    if last_is_whole:
        kept += last - block
    recomputed = 0 if whole else block
    recomputed_last = 0 if whole else last
    logits = rows * text * c.vocab_size * 4  # fp32; the loss makes two gradients of their size
    passes = math.ceil(config.batch // world / rows)
    waiting = 1  # passes that await backward
    if "prompt" in CONTRASTIVE[config.contrastive]:
        waiting = passes
    gradients = 4 * learning
    head = 0  # the first gradient to come
    sent = 0  # the last
    late = 0  # the last of the pass before, on its way to the other ranks
    if llm_learns:
        table = c.vocab_size * c.hidden_size
        opened = min(BUCKET_SIZE, shards * learning)  # a bucket's fp32 gradient is there as a whole
        if not c.tie_word_embeddings:
            opened = max(opened, table)
        if passes > 1 and shards == 1:
            opened = 0  # since the first pass
        head = table * itemsize + 4 * opened
        sent = table * itemsize
        if shards > 1:
            sent += 4 * table
            late = 4 * table * (1 + 1 / shards)  # and this rank's part of the sum
    begins = waiting * (kept + logits)
    freed = last if last_is_whole else inputs  # when the block before the last has its turn
    begins += max(2 * logits, head + last_sweep + recomputed_last - logits,
                  head + sweep + recomputed - logits - freed)
    if passes > 1:
        begins += gradients + late  # of the earlier passes
    ends = gradients
    if llm_learns:
        ends += max(block + sweep, sent)
    masters = 8 if itemsize == 4 else 12  # fp32 weights are their own masters
    moment = max(begins, ends)
    moment += images_memory(config, vlm, itemsize, world)
    return {
        "weights": count_weights(vlm) * itemsize / GIB,
        "masters and moments": learning * masters / GIB,
        "activations and gradients": moment / GIB,
    }
