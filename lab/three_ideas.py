"""Three ideas that train.py's step rests on, each beside a plain computation, without a process group.

    python -m lab.three_ideas    # a second

A projector, an LLM of one frozen layer, and a batch in two halves: micro-batches, or what two ranks hold.
Each line has a loss, and the projector's gradient against that of one process with the whole batch: length
and cosine. It is right if both are 1. The loss does not tell: under 3 it is the same in every line.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lab import parser_of
from losses import contrastive_loss, pool_patches, unit

B, N, D, C, V = 8, 4, 16, 16, 10  # samples, patches, widths of ViT and LLM, vocabulary
HALVES = (slice(0, B // 2), slice(B // 2, B))
SCALE = 1 / 0.07  # of the similarities
PLACES = torch.arange(B)  # of the rows in the batch

# A gathered row enters the losses of both ranks. Which part of its gradient comes back to its owner: of what
# the owner's own loss says, and of what the other rank's says?
GATHERS = {
    "no gradient": (0.0, 0.0),
    "own slice": (1.0, 0.0),
    "mean": (0.5, 0.5),
    "sum": (1.0, 1.0),
}


def contrast(patches, texts):
    """The contrastive loss of one process."""
    keys = PLACES[: len(texts), None]  # no two captions are equal
    return contrastive_loss(pool_patches(patches), texts, SCALE, keys)[0]


def share(patches, texts, half, of_own, of_other):
    """A rank's share of the contrastive loss: its own rows against all columns, which were gathered."""
    image = pool_patches(patches)  # (B, C)
    part = torch.full((B, 1), of_other)
    part[half] = of_own
    gathered = part * image + (1 - part) * image.detach()  # the same value, a part of its gradient
    to_texts = SCALE * image[half] @ texts.T  # (B / 2, B)
    to_images = SCALE * texts[half] @ gathered.T  # (B / 2, B)
    loss = F.cross_entropy(to_texts, PLACES[half], reduction="sum")
    loss = loss + F.cross_entropy(to_images, PLACES[half], reduction="sum")
    return loss / (2 * B)


def main(argv=None):
    parser_of("lab.three_ideas", __doc__).parse_args(argv)
    torch.manual_seed(0)
    projector = nn.Linear(D, C)
    llm = nn.Linear(C, V).requires_grad_(False)
    patches = projector(torch.randn(B, N, D))  # (B, N, C)
    texts = unit(torch.randn(B, C))  # they do not learn, as in the align stage
    labels = torch.randint(V, (B, N))
    labels[HALVES[0], 1:] = -100  # short captions: 4 tokens carry loss in this half, 16 in the other
    tokens = (labels >= 0).sum()

    def captioning(patches, labels):
        """A sum over tokens, as in losses.generative_loss."""
        return F.cross_entropy(llm(patches).flatten(0, 1), labels.flatten(), reduction="sum")

    def gradient(ends, starts=None):
        found = torch.autograd.grad(ends, projector.parameters(), starts, retain_graph=True)
        return nn.utils.parameters_to_vector(found)

    def show(name, loss, ours):
        length = ours.norm() / true.norm()
        cosine = F.cosine_similarity(ours, true, dim=0)
        print(f"{name:<44}{loss:8.4f}{length:8.4f}{cosine:8.4f}")

    print(f"{'1. The cut equals no cut':<44}{'loss':>8}{'length':>8}{'cosine':>8}")
    loss = captioning(patches, labels) / tokens + contrast(patches, texts)
    true = gradient(loss)
    show("one backward", loss, true)
    leaf = patches.detach().requires_grad_()  # the cut: gradients stop here
    loss = contrast(leaf, texts)  # of all pictures
    loss.backward()
    for half in HALVES:  # the LLM takes one micro-batch at a time
        part = captioning(leaf[half], labels[half]) / tokens
        part.backward()
        loss = loss + part
    show("each loss to the cut, then once from there", loss, gradient(patches, leaf.grad))
    loss = captioning(patches, labels) / tokens
    for half in HALVES:
        loss = loss + contrast(patches[half], texts[half]) / 2
    show("contrast in each micro-batch alone", loss, gradient(loss))

    print("\n2. Summed shares equal one process, averaged means do not")
    loss = captioning(patches, labels) / tokens
    true = gradient(loss)
    show("one process", loss, true)
    shares = 0.0
    means = 0.0
    for half in HALVES:
        summed = captioning(patches[half], labels[half])
        shares = shares + summed / tokens
        means = means + summed / (labels[half] >= 0).sum() / 2
    show("each rank's sum over all ranks' tokens", shares, gradient(shares))
    show("each rank's mean, averaged", means, gradient(means))

    print("\n3. What comes back through a gather")
    loss = contrast(patches, texts)
    true = gradient(loss)
    show("one process", loss, true)
    for name, parts in GATHERS.items():
        loss = 0.0
        for half in HALVES:
            loss = loss + share(patches, texts, half, *parts)
        show(f"two ranks: {name}", loss, gradient(loss))


if __name__ == "__main__":
    main()
