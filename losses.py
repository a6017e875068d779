"""The generative loss, the two contrastive losses beside it, and what makes them exact on any number of
ranks.

Generative loss: next-token cross-entropy over the supervised tokens, as in LLaVA.

Contrastive loss "patch" (CG-VLM, Liu et al. 2023, arXiv 2311.17945): the projected patches of an image should
resemble the *input embeddings* of its caption's tokens more than those of other captions,

    v_i   = mean over the N projected patches of image i
    s_ij  = mean over the tokens t of caption j of cos(v_i, e_jt)
    L_con = - 1/(2B) sum_i [ log softmax_j(scale * s_ij)[j = i] + log softmax_j(scale * s_ji)[j = i] ]

Stated by the paper: adapter output against the LLM's embedding layer, pooled patches, similarities averaged
over tokens, a batch loss as in CLIP, the captioning loss beside it. Our choice, because the paper's method
section is not available to us: mean pooling, a learnable temperature as in CLIP, weight 1.

Cosine is linear in the unit token vector, so the average moves inside: s_ij = unit(v_i) . mean_t unit(e_jt).
Two (B, C) matrices are all that ranks exchange, and the LLM is never run.

Contrastive loss "prompt" (our reading of Ak et al., ECCVW 2024): the same L_con over what the *LLM* makes of
both,

    v_i   = last hidden state at the last prompt token of  [image][prompt]
    t_j   = last hidden state at the last token of         [caption][prompt]         s_ij = cos(v_i, t_j)

Attention is causal, so the captioning pass [image][prompt][caption] holds v_i already, untouched by the
caption; one short text-only pass is all that is added. Stated by the abstract: a CLIP-like loss beside
next-token prediction, in the alignment stage, no extra data, and that prompts matter. Which vectors, which
prompts, temperature and weight are our choice.

Reduction. `contrastive_loss` returns this rank's *share*: the sum of the shares over all ranks is the loss of
one process holding the whole batch. `generative_loss` returns a sum; divided by the number of supervised
tokens of all ranks and micro-batches it is such a share. Gradients are then summed, never averaged, and the
balance of the losses does not depend on the number of GPUs.

Balance. Both papers write a plain sum. How much a loss then has to say depends on the towers, so its part of
the gradient is measured, and can be held: see "The balance" below, which is ours.

Read next: data.py; then train.py, which adds the losses up.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.ranks import all_gather, rank, reduce_scatter, world_size

CONTRASTIVE = {"none": (), "patch": ("patch",), "prompt": ("prompt",), "both": ("patch", "prompt")}


def at_least_fp32(x):
    """x in fp32, or in fp64 if it is that already: what sums over many numbers are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x):
    """x / |x| along the last axis, in fp32; zero stays zero."""
    return F.normalize(at_least_fp32(x), dim=-1)


# ------------------------------------------------------------------------------------------------------------
# The generative loss

def generative_loss(hidden, labels, head_weight, places=None):
    """Summed next-token cross-entropy of the supervised tokens: a scalar in nats; divide by their number.

    hidden (B, S, C) last hidden states, labels (B, S) with -100 where nothing is supervised, head_weight (V,
    C). Position s predicts token s + 1. Only supervised positions go through the head: at 16 x 700 tokens and
    32,000 words the fp32 logits of all of them would take 1.4 GB, those of the captions some 30 MB. `places`:
    those of `supervised_places`, where they are known.
    """
    places = supervised_places(labels) if places is None else places
    logits = at_least_fp32(F.linear(hidden.flatten(0, 1)[places], head_weight))  # (supervised tokens, V)
    return F.cross_entropy(logits, labels.flatten()[places + 1], reduction="sum")


def supervised_places(labels):
    """Where, in the flattened labels (B, S), the next token is supervised. Of labels on a GPU, it must be
    waited for."""
    return F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]


def count_supervised(labels) -> int:
    """The number of tokens in `generative_loss` of these labels: the first position is never predicted."""
    return int((labels[:, 1:] != -100).sum())


# ------------------------------------------------------------------------------------------------------------
# Image and text vectors, and the contrastive loss over them. `m` is a micro-batch, the samples that go
# through the LLM at once: the dict that data.collate describes.

def pool_patches(patches):
    """Unit image vectors (B, C) of projected patches (B, N, C). The mean is in fp32, without a copy of
    all."""
    return unit(patches.mean(dim=1, dtype=torch.promote_types(patches.dtype, torch.float32)))  # (B, C)


def pool_caption(embeds, mask):
    """Text vectors (B, C): the mean of the unit vectors of embeds (B, T, C), where mask (B, T) is True.

    Not a unit vector: the paper averages similarities, not embeddings, and its length carries how alike the
    tokens are. A caption without tokens gives zeros.
    """
    filled = mask[..., None].to(embeds.dtype)  # (B, T, 1)
    return (unit(embeds) * filled).sum(1) / filled.sum(1).clamp(min=1)  # (B, C)


def hidden_at(hidden, positions):
    """Hidden states (B, C) in `hidden` (B, S, C), one of each row at `positions` (B,)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]  # (B, C)


def last_before_labels(labels):
    """(B,) the position before the first supervised token in labels (B, S): the last that sees no caption."""
    return (labels != -100).int().argmax(1) - 1


def find_places(vlm, m) -> dict:
    """Where images and supervised tokens stand in a micro-batch: found before it goes to a GPU, nobody has to
    wait for the GPU to say so. And the `first` position that the losses read, the one before the first
    supervised token: the LLM's last block need not compute those before it. (It then needs a mask, which
    costs a GPU its fastest attention: so 0 where this spares less than three quarters.)"""
    first = max(0, int((m["labels"] != -100).any(0).int().argmax()) - 1)
    first = first if first > 0.75 * m["labels"].shape[1] else 0
    return {"image_places": vlm.image_places(m["ids"], len(m["pixels"])), "first": first,
            "supervised_places": supervised_places(m["labels"][:, first:])}


def caption_pass(vlm, m, patches) -> tuple:
    """Through the LLM with one micro-batch: its summed generative loss, and the hidden states (B, C) just
    before each caption begins. Attention is causal: they know the image and the prompt, and nothing of the
    caption."""
    m = m if "first" in m else m | find_places(vlm, m)
    embeds = vlm.splice(m["ids"], patches, m["image_places"])  # (B, S, C)
    hidden = vlm.llm.hidden(embeds, first=m["first"])  # (B, S - first, C)
    labels = m["labels"][:, m["first"] :]  # (B, S - first)
    return (generative_loss(hidden, labels, vlm.llm.head_weight, m["supervised_places"]),
            hidden_at(hidden, last_before_labels(labels)))


def patch_vectors(vlm, micro_batches, patches) -> tuple:
    """Image and text vectors, each (B, C), of the patch loss. It needs no LLM, only its embedding table."""
    image, text = [], []
    for m, p in zip(micro_batches, patches):
        image.append(pool_patches(p))
        text.append(pool_caption(vlm.llm.embed(m["caption_ids"]), m["caption_mask"]))
    return torch.cat(image), torch.cat(text)


def prompt_vectors(vlm, micro_batches, image_states) -> tuple:
    """Image and text vectors, each (B, C), of the prompted loss: one text-only pass of the LLM."""
    image, text = [], []
    for m, state in zip(micro_batches, image_states):
        hidden = vlm.llm.hidden(vlm.llm.embed(m["text_ids"]))  # (B, T', C)
        image.append(unit(state))
        text.append(unit(hidden_at(hidden, m["text_mask"].sum(1) - 1)))
    return torch.cat(image), torch.cat(text)


class ContrastiveTerm(nn.Module):
    """What a contrastive loss carries from step to step: its temperature and its weight.

    The temperature is CLIP's (section 2.5): a learnable scale of the similarities, exp(log_scale), from
    1/0.07 and at most 100. The parameter is the logarithm, in fp32, and takes no weight decay. `clamp_` after
    every optimizer step.

    The weight: `weight` itself, as the papers write it, or, with a `share` above 0, whatever makes the
    gradient of this loss that share of the captioning loss's (see "The balance").
    """

    def __init__(self, weight: float = 1.0, share: float = 0.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.fixed_weight, self.share = weight, share
        self.squares = [0.0, 0.0]  # of the captioning loss's gradient and of our own: moving averages

    def forward(self):
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self):
        self.log_scale.clamp_(0, math.log(100))

    def measure(self, generative: float, own: float, steps: int = 1):
        """Take in the squared norms of the two gradients at the cut, own as of weight 1, into averages over
        about ten steps; so many `steps` have gone by since the last time."""
        if math.isfinite(generative + own):  # a float16 step that overflows teaches nothing
            old, new = 0.9**steps, (generative, own)
            self.squares = [old * a + (1 - old) * b for a, b in zip(self.squares, new)]

    def weight(self) -> float:
        """To multiply this loss with. Both averages start at 0, so their ratio is unbiased from the first."""
        generative, own = self.squares
        return self.share * math.sqrt(generative / own) if self.share and own else self.fixed_weight


def contrastive_loss(image, text, scale, keys):
    """This rank's shares of the symmetric InfoNCE over the global batch, in nats, and of its retrieval
    accuracy.

    image (B, C), text (B, C): row i of one belongs to row i of the other; `scale` multiplies their products.
    `keys` (B, K) int64 identify captions and images: two rows that share any key describe both images equally
    well, or show the same one, and are no negatives of each other. Local rows meet the columns of all ranks,
    B x WB products a rank. The accuracy is the part of images whose most similar caption is their own (R@1).
    """
    B, C = image.shape
    all_image, all_text, all_keys = gather(image), gather(text), gather(keys)  # (WB, C), (WB, C), (WB, K)
    rows = torch.arange(B, device=image.device)
    own = rank() * B + rows  # (B,) where our own pairs stand among all
    image_to_text = scale * image @ all_text.T  # (B, WB)
    text_to_image = scale * text @ all_image.T  # (B, WB)

    # An equal caption or image elsewhere in the batch is no negative. A pair's own place stays: the positive.
    false_negative = (keys[:, None] == all_keys[None]).any(-1)  # (B, WB)
    false_negative[rows, own] = False
    image_to_text = image_to_text.masked_fill(false_negative, -torch.inf)
    text_to_image = text_to_image.masked_fill(false_negative, -torch.inf)

    loss = (F.cross_entropy(image_to_text, own, reduction="sum")
            + F.cross_entropy(text_to_image, own, reduction="sum"))
    correct = (image_to_text.argmax(1) == own).sum()
    return loss / (2 * len(all_keys)), correct / len(all_keys)


# ------------------------------------------------------------------------------------------------------------
# The balance. Both papers write a plain sum. On real towers (SmolLM2-135M, DINOv2-small; lab/README.md) the
# patch loss then has 0.04 to 0.13 of the captioning loss's gradient, at a right angle to it, and in 70 steps
# falls from 3.52 to 3.37, where alone it falls to 2.4. A weight does not travel between towers, a share of
# the gradient does. The losses meet at the cut behind the projector: there their gradients are measured,
# weighted and added up. That, and the share as an option, are ours.

MEASURE_EVERY, HOLD_EVERY = 50, 10  # steps, with the prompted loss: see `measure_every`


def measure_every(terms) -> int:
    """Steps from one measurement to the next. With the prompted loss, whose gradient at the cut takes a
    backward of its own through the LLM, 50, or 10 where a share is to be held; else each is measured."""
    if "prompt" not in terms:
        return 1
    return HOLD_EVERY if any(term.share for term in terms.values()) else MEASURE_EVERY


def contrast(vlm, micro_batches, terms, cuts: dict, amplified: float) -> tuple:
    """The contrastive losses of a step, and their gradients, `amplified`, back to the cuts.

    `cuts` {loss: [tensor of each micro-batch that its image vectors come from]}. Returns this rank's shares
    {loss, loss_retrieval}; {loss: [gradient at each cut]}; {loss: gradient of its log_scale}. Unweighted.
    """
    keys = torch.cat([m["keys"] for m in micro_batches])  # (B, 2)
    shares, at_cut, of_scale = {}, {}, {}
    for name, cut in cuts.items():
        vectors = {"patch": patch_vectors, "prompt": prompt_vectors}[name]
        loss, accuracy = contrastive_loss(*vectors(vlm, micro_batches, cut), terms[name](), keys)
        shares |= {name: loss.detach(), f"{name}_retrieval": accuracy}
        *at_cut[name], of_scale[name] = torch.autograd.grad(amplified * loss, [*cut, terms[name].log_scale])
    return shares, at_cut, of_scale


@torch.no_grad()
def products(at_cut: dict) -> dict:
    """Squared norms of the gradients {loss: [(I, N, C) of each micro-batch]} at the cut, and their products
    with the captioning loss's: this rank's shares, {"patch_square": scalar, "patch_product": ...}."""
    sums = {}
    for name, parts in at_cut.items():
        if parts:
            norms = [torch.linalg.vector_norm(part, dtype=at_least_fp32(part).dtype) for part in parts]
            sums[f"{name}_square"] = sum(norm**2 for norm in norms)
        if parts and name != "generative" and at_cut["generative"]:
            pairs = zip(parts, at_cut["generative"])
            sums[f"{name}_product"] = sum((at_least_fp32(a) * at_least_fp32(b)).sum() for a, b in pairs)
    return sums


@torch.no_grad()
def weighted_sum(gradients: list, at_cut: dict, weights: dict) -> list:
    """The gradient of the weighted sum of all losses at the cut, one for each micro-batch. `gradients` are
    those that have come through the LLM, None where nothing has; they are added to in place."""
    for name, weight in weights.items():
        for i, part in enumerate(at_cut.get(name, ())):
            has = gradients[i] is not None
            gradients[i] = gradients[i].add_(part, alpha=weight) if has else weight * part
    return gradients


@torch.no_grad()
def norms(vlm, micro_batches, patches) -> dict:
    """Summed norms of projected patches and of the answers' word embeddings, and how many: shares. Cosines
    do not see the gap between the two (arXiv 2512.08374)."""
    sums = dict.fromkeys(("projected_norm", "projected", "word_norm", "words"), 0)
    for m, p in zip(micro_batches, patches):
        words = vlm.llm.embed(m["caption_ids"])  # (B, T, C)
        has_image = (m["ids"] == vlm.image_token_id).any()  # else the patches are a dummy's
        for name, count, vectors, counts in (("projected_norm", "projected", p, has_image),
                                             ("word_norm", "words", words, m["caption_mask"])):
            lengths = torch.linalg.vector_norm(vectors, dim=-1, dtype=at_least_fp32(vectors).dtype)
            sums[name] += (lengths * counts).sum()
            sums[count] += counts.expand_as(lengths).sum()
    return sums


def figures(sums: dict, terms, amplified: float, batch: int) -> dict:
    """What the log shows of a step's sums over all ranks; also tells each term how large the gradients are.

    generative, patch, prompt   the losses, in nats; NAME_retrieval the part of images that find their caption
    NAME_grad       norm of the loss's gradient at the cut, as of weight 1 (gradients came `amplified`)
    NAME_weight     what the loss is multiplied with
    NAME_ratio      norm of the weighted gradient over that of the captioning loss's
    NAME_cosine     between the two gradients
    NAME_relative   loss / ln(batch): 1 is what knowing nothing costs
    projected_norm, word_norm   mean norms of projected patches and of the answers' word embeddings

    None stands for what has no value: a float16 step that overflowed, a ratio to nothing.
    """
    line = {"projected_norm": ratio(sums["projected_norm"], sums["projected"]),
            "word_norm": ratio(sums["word_norm"], sums["words"])}
    for name in ("generative", *terms):
        line |= {key: sums[key] for key in (name, f"{name}_retrieval") if key in sums}
        if f"{name}_square" in sums:
            line[f"{name}_grad"] = math.sqrt(sums[f"{name}_square"]) / amplified
    captioning = line.get("generative_grad")
    for name, term in terms.items():
        own = line.get(f"{name}_grad")
        if captioning is not None and own is not None:
            term.measure(captioning**2, own**2, measure_every(terms))
            line[f"{name}_ratio"] = ratio(term.weight() * own, captioning)
            line[f"{name}_cosine"] = ratio(sums[f"{name}_product"] / amplified**2, captioning * own)
        if name in sums:
            line[f"{name}_relative"] = ratio(sums[name], math.log(batch))
        line[f"{name}_weight"] = term.weight() if "generative" in sums else 1.0  # alone, in contrast first
    parts = [line.get("generative", 0.0)] + [line[f"{name}_weight"] * line.get(name, 0.0) for name in terms]
    line["loss"] = sum(parts)
    return {key: value if value is not None and math.isfinite(value) else None for key, value in line.items()}


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None


# ------------------------------------------------------------------------------------------------------------
# Exchange between ranks. One process is the degenerate case: rank 0 of 1, and a gather that changes nothing.


class GatherWithGradient(torch.autograd.Function):
    """(B, ...) on each of W ranks -> (WB, ...), in rank order, on all of them.

    Rank r's rows enter the loss of *every* rank, so their gradient is the sum of what all ranks say about
    them: the backward of an all-gather is a reduce-scatter with SUM. Two common shortcuts are wrong.
    Gathering without gradient loses about half of it; returning the own slice alone loses what the other
    ranks' rows say about ours. Either changes with W, and with it the balance with the generative loss.
    """

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])  # (WB, ...)
        all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        out = gradient.new_empty(gradient.shape[0] // world_size(), *gradient.shape[1:])  # (B, ...)
        reduce_scatter(out, gradient.contiguous())
        return out


def gather(x):
    """x (B, ...) of every rank, (WB, ...), with gradient. B must be the same on every rank."""
    return GatherWithGradient.apply(x) if world_size() > 1 else x
