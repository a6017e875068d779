"""The losses against their definitions written as plain loops, and against themselves on several ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import grades

import data
import losses


def places(labels):
    """The places in the flattened labels (B, S) whose next token carries loss, by a plain loop."""
    B, S = labels.shape
    return torch.tensor([b * S + s for b in range(B) for s in range(S - 1) if labels[b, s + 1] != -100],
                        dtype=torch.long)


def test_generative_loss_is_shifted_cross_entropy():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.tensor([[3, -100, 4, -100, 5], [-100, -100, 1, 2, -100]])
    logits, expected = hidden @ weight.T, 0.0
    for b in range(2):
        for s in range(1, 5):
            if labels[b, s] != -100:
                expected -= logits[b, s - 1].log_softmax(-1)[labels[b, s]]
    loss_at = places(labels)
    assert len(loss_at) == 4  # the label at position 0 has nothing to predict it from
    read = hidden.flatten(0, 1)[loss_at]
    assert torch.allclose(losses.generative_loss(read, labels, weight, loss_at), expected)


def test_generative_loss_without_labels_is_zero_with_zero_gradient():
    hidden, labels = torch.randn(0, 8, requires_grad=True), torch.full((1, 4), -100)
    loss = losses.generative_loss(hidden, labels, torch.randn(11, 8), places(labels))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


def test_generative_loss_is_computed_in_fp32():
    hidden, weight = torch.randn(8, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    labels = torch.randint(0, 11, (1, 9))
    found = losses.generative_loss(hidden, labels, weight, places(labels))
    logits = F.linear(hidden, weight).float()
    assert torch.equal(found, F.cross_entropy(logits, labels[0, 1:], reduction="sum"))


@grades("contrastive_loss")
def test_contrastive_loss_equals_the_triple_loop():
    """Over images, captions and the tokens of a caption, as the docstring of losses.py has it."""
    B, T, lengths = 4, 6, [6, 2, 3, 1]
    leaves = [torch.randn(B, 5, 8), torch.randn(B, T, 8), torch.tensor(9.0)]
    patches, embeds, scale = (x.requires_grad_() for x in leaves)
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    s = torch.zeros(B, B)
    for i in range(B):
        for j in range(B):
            for token in embeds[j, : lengths[j]]:
                s[i, j] += F.cosine_similarity(patches[i].mean(0), token, dim=0) / lengths[j]
    image_to_text, text_to_image = (scale * s).log_softmax(1), (scale * s).log_softmax(0)
    expected = -sum(image_to_text[i, i] + text_to_image[i, i] for i in range(B)) / (2 * B)
    image, text = losses.pool_patches(patches), losses.pool_caption(embeds, mask)
    loss, accuracy = losses.contrastive_loss(image, text, scale, torch.arange(B)[:, None])
    assert torch.allclose(loss, expected), (
        "not the InfoNCE of the definition: one direction alone, the scale left out, or a sum in place of "
        "the mean over both directions and all rows")
    found, right = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, expected))
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(found, right)), (
        "the loss is right, its gradient is not: images, captions and the scale learn from both directions")
    assert accuracy == sum(s[i].argmax() == i for i in range(B)) / B, (
        "the accuracy is the part of images whose most similar caption is their own")
    assert torch.allclose(image @ text.T, s, atol=1e-6)  # the identity that spares the triple loop


def test_the_losses_read_where_the_batch_says():
    """The place before each label, that before each row's first, and the last word of each text."""
    given, said, end = data.CONTEXT, data.ANSWER, data.END
    samples = []
    for roles, length in (([given] * 3 + [said] * 2, 4), ([given, said, said, end], 2), ([given] * 2, 3)):
        samples.append({"ids": [7] * len(roles), "roles": roles, "pixels": None, "text_ids": [7] * length,
                        "name": "x"})
    batch = data.collate(samples, 4, -1, 0, 8)
    assert torch.equal(batch["loss_at"], places(batch["labels"]))
    assert batch["state_at"].tolist() == [2, 5 + 0, 10]  # the third has no label
    assert batch["text_at"].tolist() == [3, 4 + 1, 8 + 2]


def test_a_caption_that_is_too_long_for_its_prompt_loses_its_front():
    """Its state is read behind the prompt: BOS and the prompt stay."""
    sample = {"ids": [1, 7], "roles": [data.CONTEXT, data.ANSWER], "pixels": None, "name": "x"}
    texts = [1, *range(20, 40), 98, 99], [1, 5, 98, 99]
    batch = data.collate([sample | {"text_ids": text} for text in texts], 4, -1, 0, 8, max_length=5)
    assert batch["text_ids"].tolist() == [[1, 38, 39, 98, 99], [1, 5, 98, 99, 0]]
    assert batch["text_at"].tolist() == [4, 5 + 3]


@grades("contrastive_loss")
def test_equal_captions_are_not_negatives():
    """Rows 0 and 2 share a caption: the loss is that of the score matrix without the two false negatives."""
    image, text, keys = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([[7], [8], [7], [9]]) + 2**55
    text[2] = text[0]
    image[2] = 9 * text[2]
    s = image @ text.T
    s[0, 2] = s[2, 0] = -math.inf
    expected = (F.cross_entropy(s, torch.arange(4)) + F.cross_entropy(s.T, torch.arange(4))) / 2
    loss, accuracy = losses.contrastive_loss(image, text, torch.tensor(1.0), keys)
    assert torch.allclose(loss, expected), (
        "an equal caption counts as a negative, or a pair's own place, the positive, was masked with it; "
        "or keys that differ are taken as equal: they have 56 bits")
    assert accuracy == (s.argmax(1) == torch.arange(4)).float().mean(), (
        "whose caption comes twice finds it twice: in the accuracy, too, the other one does not count")


@grades("contrastive_loss")
def test_one_picture_with_two_captions_is_no_negative_of_itself():
    """Rows 1 and 3 show one image: as with one caption, the loss can fall to nothing."""
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    keys = torch.tensor([[0, 5], [1, 6], [2, 7], [3, 6]])
    s = image @ text.T
    s[1, 3] = s[3, 1] = -math.inf
    expected = (F.cross_entropy(s, torch.arange(4)) + F.cross_entropy(s.T, torch.arange(4))) / 2
    assert torch.allclose(losses.contrastive_loss(image, text, torch.tensor(1.0), keys)[0], expected), (
        "rows that share any one of their keys, here the image's, are no negatives of each other")


def test_padding_and_empty_captions():
    embeds, mask = torch.randn(2, 5, 8), torch.tensor([[True, True, False, False, False], [False] * 5])
    pooled = losses.pool_caption(embeds, mask)
    embeds[:, 2:] = 1e6
    assert torch.equal(losses.pool_caption(embeds, mask), pooled)
    assert (pooled[1] == 0).all()


def test_a_long_caption_in_bfloat16_has_all_its_tokens_counted():
    """301 equal tokens have the mean of one; bfloat16 cannot count to 301."""
    token = torch.randn(1, 1, 8, dtype=torch.bfloat16)
    alone = losses.pool_caption(token, torch.ones(1, 1, dtype=torch.bool))
    many = losses.pool_caption(token.expand(1, 301, 8), torch.ones(1, 301, dtype=torch.bool))
    assert torch.allclose(many, alone, rtol=1e-5)


def test_scale_starts_at_clip_and_is_clamped():
    term = losses.ContrastiveTerm()
    assert term.scale().item() == pytest.approx(1 / 0.07)
    for value, clamped in ((9.0, 100.0), (-3.0, 1.0)):
        term.log_scale.data.fill_(value)
        term.clamp_()
        assert term.scale().item() == pytest.approx(clamped)


def test_one_batch_can_be_learned():
    """The loss starts near ln B and falls to almost nothing when the image side is free to move."""
    patches, text = torch.randn(16, 4, 32, requires_grad=True), losses.unit(torch.randn(16, 32))
    term, keys, history = losses.ContrastiveTerm(), torch.arange(16)[:, None], []
    optimizer = torch.optim.Adam([patches, *term.parameters()], lr=0.05)
    for _ in range(60):
        loss, accuracy = losses.contrastive_loss(losses.pool_patches(patches), text, term.scale(), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > math.log(16) * 0.8 and history[-1] < 0.01 and accuracy == 1


@pytest.mark.exercise
@grades("pool_patches")
def test_max_pooling_takes_the_largest_of_each_channel():
    """Grades an exercise: `pool_patches` with the maximum in place of the mean, and all else as it was."""
    patches = torch.randn(2, 5, 8, requires_grad=True)
    image = losses.pool_patches(patches)
    assert image.shape == (2, 8), f"{tuple(image.shape)}: not (B, C): another axis than the patches' is gone"
    assert torch.allclose(image.norm(dim=1), torch.ones(2)), "the vectors have lost their length of 1"
    largest = torch.stack([torch.stack([max(column) for column in rows.T]) for rows in patches])  # (B, C)
    assert torch.allclose(image, losses.unit(largest)), (
        "not the largest number of each channel: still the mean, the largest by magnitude, or that of "
        "patches that were made unit vectors first")
    image[:, 0].sum().backward()
    assert ((patches.grad != 0).sum(1) == 1).all(), (
        "in each channel one patch has the maximum, and it alone gets a gradient")
    assert losses.pool_patches(patches.bfloat16()).dtype == torch.float32, "unit vectors come in fp32"
    test_one_batch_can_be_learned()


# ---- several ranks -----------------------------------------------------------------------------------------


def inputs():
    torch.manual_seed(3)
    patches, embeds = torch.randn(8, 5, 8, dtype=torch.float64), torch.randn(8, 6, 8, dtype=torch.float64)
    embeds += patches.mean(1, keepdim=True)  # so that some images find their captions
    mask = torch.arange(6)[None] < torch.randint(1, 7, (8, 1))
    keys = torch.tensor([[1, 2, 3, 4, 1, 6, 7, 3], [0, 1, 2, 3, 4, 5, 1, 7]]).T  # of captions and of images
    return patches, embeds, mask, keys


def gradients(rows) -> tuple:
    """Loss share and the gradients of patches, token embeddings and log-scale for these rows of the batch."""
    patches, embeds, mask, keys = (x[rows] for x in inputs())
    term = losses.ContrastiveTerm()
    patches.requires_grad_(), embeds.requires_grad_()
    T = mask.sum(1).max()  # ranks pad their captions to different lengths
    text = losses.pool_caption(embeds[:, :T], mask[:, :T])
    loss, accuracy = losses.contrastive_loss(losses.pool_patches(patches), text, term.scale(), keys)
    loss.backward()
    return loss.detach(), accuracy, patches.grad, embeds.grad, term.log_scale.grad


def compared(a, b) -> str:
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    return f"{a.norm() / b.norm():.2f} of the length and a cosine of {cosine:.2f}"


def gradients_of_rank(rank, world):
    share = 8 // world
    return gradients(slice(rank * share, (rank + 1) * share))


@pytest.mark.parametrize("world", [2, 4])
@grades("the loss, or its backward,")
def test_any_number_of_ranks_gives_the_gradient_of_one(ranks, world):
    loss, accuracy, patches, embeds, log_scale = gradients(slice(None))
    shares = list(zip(*ranks(world, gradients_of_rank, seconds=60)))
    assert torch.allclose(sum(shares[0]), loss, rtol=1e-6), (
        "the ranks' losses do not add up to that of one process: local rows meet the columns of all ranks, "
        "own pairs stand rank * B further on, and the sum is divided by the rows of all ranks")
    assert torch.allclose(sum(shares[1]), accuracy), "the ranks' accuracies are no shares of one process's"
    for found, expected in ((shares[2], patches), (shares[3], embeds)):
        assert torch.allclose(torch.cat(found), expected, rtol=1e-5, atol=1e-8), (
            f"beside one process's, the ranks' gradient has {compared(torch.cat(found), expected)}: a row "
            "enters the loss of every rank, and its gradient is the sum of what all of them say about it")
    assert torch.allclose(sum(shares[4]), log_scale, rtol=1e-6), (
        "the ranks' gradients of the scale do not add up to that of one process")


def test_what_is_measured_is_without_the_loss_scale_and_without_overflows():
    """Of float16."""
    term = losses.ContrastiveTerm(balance=0.3)
    sums = {"generative_square": 4 * 2.0**32, "patch_square": 2.0**32, "patch_product": 0.0}
    losses.measure(sums, {"patch": term}, 2.0**16)
    assert term.squares == pytest.approx([0.4, 0.1])
    for odd in (math.inf, math.nan):
        term.measure(odd, 1.0)
        term.measure(1.0, odd)
    assert term.weight() == pytest.approx(0.6)
