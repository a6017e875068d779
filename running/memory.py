"""The memory of a rank at the worst moment of a step, by arithmetic. `python tests/test_meta.py` holds it
against what is alive then on the meta device: within 5 %, for every preset (tiny's align, of some MiB, is
planned up to a fifth too large)."""

import math

from torch import nn

from llm import FAMILIES
from losses import CONTRASTIVE
from running.costs import count_weights

GIB = 2**30
BUCKET_SIZE = 2**22  # of train.py's DataParallelAdamW


def block_memory(config, vlm, itemsize: int) -> tuple:
    """Bytes a token: (what a block keeps for its backward, its gradients there)."""
    c = vlm.llm.config
    C = c.hidden_size
    MLP = c.intermediate_size
    _, _, has_norm = FAMILIES[c.model_type]
    heads = c.num_attention_heads + c.num_key_value_heads
    heads *= c.head_dim
    kept = 2 * C  # the residual, before attention and before the MLP
    kept += 2 * heads  # q and what attention makes of it; k and v
    kept += has_norm * heads  # q and k before their norm
    kept += 3 * MLP  # the factors of the gated MLP
    gradients = 3 * MLP + 2 * C
    if config.stage == "instruct":  # what goes into the matrices, whose gradients need it
        kept += 2 * C + MLP
        gradients -= MLP  # what went into the last matrix is gone by then
    return itemsize * kept, itemsize * gradients


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


def memory_parts(config, vlm, dtype, rows: int, length: int, world: int) -> dict:
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
    passes = math.ceil(config.batch // world / rows)
    has_prompt = "prompt" in CONTRASTIVE[config.contrastive]
    tokens = rows * length
    text = rows * max(1, length - 1 - vlm.num_image_tokens)

    kept, going_back = (tokens * size for size in block_memory(config, vlm, itemsize))  # of a block
    inputs = tokens * c.hidden_size * itemsize
    blocks = c.num_hidden_layers
    whole = {"none": blocks, "every-other": blocks // 2, "every": 0}[config.checkpointing]
    logits = text * c.vocab_size * 4  # fp32; the loss makes two gradients of their size
    forward = whole * kept + (blocks - whole) * inputs + logits
    if has_prompt:  # all passes await backward
        forward *= passes
    recomputed = 0 if whole else kept
    gradients = 4 * learning
    head = 0  # the first gradient to come, and its fp32 bucket
    table = c.vocab_size * c.hidden_size
    if llm_learns:
        head = table * itemsize + 4 * min(BUCKET_SIZE, shards * learning)
    begins = forward + max(2 * logits, head + going_back + recomputed - logits)
    if passes > 1:
        begins += gradients  # of the earlier passes
    if passes > 1 and llm_learns and shards > 1:
        begins += 4 * table * (1 + 1 / shards)  # the last of these is on its way to the other ranks
    ends = gradients
    if llm_learns:
        ends += kept + going_back
    masters = 8 if itemsize == 4 else 12  # fp32 weights are their own masters
    moment = max(begins, ends) + images_memory(config, vlm, itemsize, world)
    return {
        "weights": count_weights(vlm) * itemsize / GIB,
        "masters and moments": learning * masters / GIB,
        "activations and gradients": moment / GIB,
    }
