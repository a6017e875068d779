"""The generative loss (next-token cross-entropy, as in LLaVA), two contrastive losses, and their balance.

Contrastive, "patch" (CG-VLM, Liu et al. 2023, arXiv 2311.17945): the projected patches of an image should
resemble the *input embeddings* of its caption's tokens more than those of other captions,

    v_i   = mean over the N projected patches of image i
    s_ij  = mean over the tokens t of caption j of cos(v_i, e_jt)      e_jt: the LLM's embedding of t
    L_con = - 1/(2B) sum_i [ log softmax_j(scale * s_ij)[j = i] + log softmax_j(scale * s_ji)[j = i] ]

Here B counts the pairs of all ranks. The paper states: adapter output against the LLM's embedding layer,
pooled patches, averaged similarities, a batch loss as in CLIP, a plain sum with the captioning loss. Ours:
mean pooling, a learnable temperature.

Cosine is linear in the unit token vector, so the average moves inside: s_ij = unit(v_i) . mean_t unit(e_jt).
Ranks exchange two (B, C) matrices, and the LLM does not run.

Contrastive, "prompt" (our reading of Ak et al., ECCVW 2024): the same L_con over states of the *LLM*,

    v_i   = last hidden state at the last prompt token of  [image][prompt]
    c_j   = last hidden state at the last token of         [caption][prompt]         s_ij = cos(v_i, c_j)

Attention is causal. So the captioning pass [image][prompt][caption] already holds v_i, and one short
text-only pass is all that is added. The abstract states: a CLIP-like loss beside next-token prediction, in
the alignment stage, no extra data, prompts matter. Vectors, prompts, temperature and weight are ours.

Why sums. The means of a rank with 3 supervised tokens and of one with 30 do not average to the mean of 33. So
each rank returns its *share*: `generative_loss` a sum, to be divided by the tokens of all ranks and
micro-batches, `contrastive_loss` the part of its own rows. Shares add up to the loss of one process with the
whole batch. So gradients are summed over ranks, never averaged, whatever their number (lab/three_ideas.py).

W ranks speak in three ways. All-gather: (B, C) of each becomes (WB, C) on all. All-reduce: all get the sum of
what each has. Reduce-scatter: each gets its part (B, C) of the sum of what each has, (WB, C).

Why contrast first may work: a hypothesis. A fresh projector's output is nowhere near the words, and the LLM
reads noise. The patch loss needs no LLM, and the embedding table is frozen: so the image alone moves, to its
caption's mean word, and captioning starts among words. What could refute it was tried: a pull to that word
without negatives gains most of the answers, and nothing in captioning; on icons, whose kinds the ViT hardly
sees, contrast first gained nothing; after 4.5 passes it captions worse (lab/README.md).

Read next: lab/first_step.py, which adds the losses up, then train.py, which does so for many ranks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.ranks import all_gather, rank, reduce_scatter, world_size

CONTRASTIVE = {"none": (), "patch": ("patch",), "prompt": ("prompt",), "both": ("patch", "prompt")}


def at_least_fp32(x):
    """x in fp32, or in fp64 if it has that already. Long sums are computed in this."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x):
    """x / |x| along the last axis, in fp32. Zero stays zero."""
    return F.normalize(at_least_fp32(x), dim=-1)


# ------------------------------------------------------------------------------------------------------------
# The generative loss

def generative_loss(hidden, labels, head_weight, loss_at):
    """Summed next-token cross-entropy, a scalar in nats.

    loss_at (n,) the places in the flattened labels (B, S) whose *next* token is supervised (see
    data.collate); hidden (n, C) the last hidden states there; head_weight (V, C).

    Only these places go through the head. At 16 x 700 tokens and 32,000 words the fp32 logits of all places
    take 1.4 GB, those of the captions some 30 MB.
    """
    targets = labels.flatten()[loss_at + 1]  # (n,)
    logits = at_least_fp32(F.linear(hidden, head_weight))  # (n, V)
    return F.cross_entropy(logits, targets, reduction="sum")


def caption_pass(vlm, m, patches) -> tuple:
    """Run the LLM over one micro-batch `m` (a dict, see data.collate) with projected patches (I, N, C).

    Returns the summed generative loss, and the hidden states (B, C) just before each caption begins.
    Attention is causal, so these states have seen the image and the prompt, and nothing of the caption.
    """
    embeds = vlm.splice(m["ids"], patches, m["image_at"])  # (B, S, C)
    n = len(m["loss_at"])
    hidden = vlm.llm.hidden(embeds, at=torch.cat([m["loss_at"], m["state_at"]]))  # (n + B, C)
    loss = generative_loss(hidden[:n], m["labels"], vlm.llm.head_weight, m["loss_at"])
    return loss, hidden[n:]  # a scalar, (B, C)


# ------------------------------------------------------------------------------------------------------------
# Image and text vectors

def pool_patches(patches):
    """Unit image vectors (B, C) of projected patches (B, N, C)."""
    dtype = torch.promote_types(patches.dtype, torch.float32)  # sums in fp32, without a copy of all patches
    return unit(patches.mean(dim=1, dtype=dtype))  # (B, C)


def pool_caption(embeds, mask):
    """Text vectors (B, C): the mean of the unit vectors of embeds (B, T, C) where mask (B, T) is True.

    These are not unit vectors. The paper averages similarities, not embeddings, so the length of the mean
    says how alike the tokens are. A caption without tokens gives zeros.
    """
    total = (unit(embeds) * mask[..., None]).sum(1)  # (B, C)
    return total / mask.sum(1, keepdim=True).clamp(min=1)  # (B, C)


def vectors(name, vlm, micro_batches, patches, states) -> tuple:
    """Image and text vectors, each (B, C), of one contrastive loss over all micro-batches of this rank.

    patches: projected, (I, N, C) of each micro-batch. states: (B, C) of each, as from `caption_pass`.
    """
    for m in micro_batches:
        if len(m["image_at"]) < len(m["ids"]) * vlm.num_image_tokens:
            raise ValueError("the contrastive loss pairs each caption with one image; a record here has none")
    image = []
    text = []
    if name == "patch":  # no LLM, only its embedding table
        for m, projected in zip(micro_batches, patches):
            words = vlm.llm.embed(m["caption_ids"])  # (B, T, C)
            image.append(pool_patches(projected))
            text.append(pool_caption(words, m["caption_mask"]))
    else:  # "prompt": one text-only pass of the LLM
        for m, state in zip(micro_batches, states):
            hidden = vlm.llm.hidden(vlm.llm.embed(m["text_ids"]), at=m["text_at"])  # (B, C)
            image.append(unit(state))
            text.append(unit(hidden))
    return torch.cat(image), torch.cat(text)


# ------------------------------------------------------------------------------------------------------------
# The contrastive loss

class GatherWithGradient(torch.autograd.Function):
    """(B, ...) on each of W ranks -> (WB, ...) on all of them, in rank order.

    A rank's rows are columns in the loss of *every* rank: negatives, and on their own rank the positives. So
    their gradient is the sum of what all ranks say, and the backward of an all-gather is a reduce-scatter
    with SUM. (In align only images need it. Captions are columns, too, but come from a frozen LLM.)

    Two common shortcuts are wrong, and neither the loss nor the retrieval shows it, nor any test on one rank.
    A gather without gradient loses all terms in which our row is a column. Returning only this rank's slice
    of this rank's gradient loses those in the other ranks' losses. (It is right where every rank computes all
    WB x WB products, as OpenCLIP does by default, up to the 1/W of a mean. Here each computes B x WB.)
    """

    @staticmethod
    def forward(ctx, x):
        B, *rest = x.shape
        out = x.new_empty(world_size() * B, *rest)  # (WB, ...)
        all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        WB, *rest = gradient.shape
        out = gradient.new_empty(WB // world_size(), *rest)  # (B, ...)
        reduce_scatter(out, gradient.contiguous())
        return out


def gather(x):
    """x (B, ...) of every rank as (WB, ...), with gradient. B must be the same on every rank."""
    if world_size() == 1:
        return x
    return GatherWithGradient.apply(x)


def contrastive_loss(image, text, scale, keys):
    """This rank's shares of the symmetric InfoNCE over the global batch, in nats, and of its accuracy.

    image (B, C), text (B, C): row i of one belongs to row i of the other; `scale` multiplies their products.
    keys (B, K) int64 identify captions and images: two rows that share a key are no negatives of each other.
    Local rows meet the columns of all ranks: B x WB products a rank. The accuracy is the part of images whose
    most similar caption is their own (R@1).
    """
    B, C = image.shape
    all_image = gather(image)  # (WB, C)
    all_text = gather(text)  # (WB, C)
    all_keys = gather(keys)  # (WB, K)
    own = rank() * B + torch.arange(B, device=image.device)  # (B,) where our own pairs stand among all
    image_to_text = scale * image @ all_text.T  # (B, WB)
    text_to_image = scale * text @ all_image.T  # (B, WB)

    # An equal caption or image elsewhere in the batch is no negative. A pair's own place stays: the positive.
    false_negative = (keys[:, None] == all_keys[None]).any(-1)  # (B, WB)
    false_negative.scatter_(1, own[:, None], False)
    image_to_text = image_to_text.masked_fill(false_negative, -torch.inf)
    text_to_image = text_to_image.masked_fill(false_negative, -torch.inf)

    of_images = F.cross_entropy(image_to_text, own, reduction="sum")
    of_texts = F.cross_entropy(text_to_image, own, reduction="sum")
    loss = (of_images + of_texts) / (2 * len(all_keys))
    correct = (image_to_text.argmax(1) == own).sum()
    return loss, correct / len(all_keys)


# ------------------------------------------------------------------------------------------------------------
# The balance
#
# CG-VLM writes a plain sum, but a weight that suits one pair of towers may not suit another. All losses
# reach the projector through the projected patches alone. train_step stops each backward there, at the *cut*:
# gradients of one shape are measured, weighted and added up. Cut and balance are ours, not CG-VLM's.

class ContrastiveTerm(nn.Module):
    """The temperature and the weight of one contrastive loss.

    The temperature is CLIP's (section 2.5): a learnable scale of the similarities, exp(log_scale), from
    1/0.07 and at most 100. The parameter is the logarithm, in fp32, and takes no weight decay.

    The weight is fixed, as in a plain sum. With a `balance` above 0 it follows the gradients: it is
    whatever makes the norm of this loss's gradient `balance` times that of the captioning loss's.
    """

    def __init__(self, weight: float = 1.0, balance: float = 0.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.fixed_weight = weight
        self.balance = balance
        # Moving averages of two squared norms: of captioning's gradient, of our own. Checkpoints keep them.
        self.squares = [0.0, 0.0]

    def scale(self):
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self):
        """Keep the scale between 1 and 100. Called after every optimizer step."""
        self.log_scale.clamp_(0, math.log(100))

    def measure(self, generative: float, own: float):
        """Take the squared norms of the two gradients at the cut into averages over about ten steps."""
        if not math.isfinite(generative + own):
            return  # a float16 step that overflows says nothing
        old_generative, old_own = self.squares
        self.squares = [
            0.9 * old_generative + 0.1 * generative,
            0.9 * old_own + 0.1 * own,
        ]

    def weight(self) -> float:
        """What this loss is multiplied with. Both averages start at 0: their ratio is right from step 0."""
        generative, own = self.squares
        if self.balance and own:
            return self.balance * math.sqrt(generative / own)
        return self.fixed_weight


def clamp_scales(terms) -> dict:
    """Clamp all terms. Returns their scales, {"patch_scale": number, ..}."""
    for term in terms.values():
        term.clamp_()
    if not len(terms):
        return {}
    scales = torch.stack([term.scale() for term in terms.values()]).tolist()  # a GPU is waited for once
    return {f"{name}_scale": scale for name, scale in zip(terms, scales)}


@torch.no_grad()
def products(at_cut: dict) -> dict:
    """This rank's shares of squared norms and inner products of the gradients at the cut.

    at_cut {loss: [gradient (I, N, C) of each micro-batch]} -> {"patch_square": scalar, "patch_product": ..}.
    A product is that with the captioning loss's gradient.
    """
    sums = {}
    for name, parts in at_cut.items():
        sums[f"{name}_square"] = dot(parts, parts)
        if name != "generative" and "generative" in at_cut:
            sums[f"{name}_product"] = dot(parts, at_cut["generative"])
    return sums


def dot(ours: list, theirs: list):
    """The inner product, a scalar, of two lists of tensors."""
    total = 0.0
    for a, b in zip(ours, theirs):
        total = total + torch.linalg.vecdot(at_least_fp32(a).flatten(), at_least_fp32(b).flatten())
    return total


def measure(sums: dict, terms, loss_scale: float):
    """Tell each term how large its gradient and the captioning loss's are. `sums` are over all ranks."""
    for name, term in terms.items():
        if f"{name}_product" in sums:
            generative = sums["generative_square"] / loss_scale**2
            own = sums[f"{name}_square"] / loss_scale**2
            term.measure(generative, own)


@torch.no_grad()
def weighted_sum(at_cut: dict, weights: dict) -> list:
    """The gradient of the weighted sum of all losses at the cut, one (I, N, C) for each micro-batch.

    A loss without a weight has weight 1.
    """
    totals = []
    for parts in zip(*at_cut.values()):  # of one micro-batch, from each loss
        weighted = [weights.get(name, 1.0) * part for name, part in zip(at_cut, parts)]
        totals.append(sum(weighted))
    return totals
