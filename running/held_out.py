"""`--val FILE`: the losses on held-out records, which no step trains on, measured while a run trains.

    held = load(config, samples, vlm)                                # None without --val
    line |= measure(config, vlm, terms, held, step, steps, signals)  # {"val_generative": .., ..}

The price that contrast has in captioning does not show in the training loss. So all held-out records are
captioned, also while contrast comes first and training does without the LLM.

As many records are compared as a batch has, or all if there are fewer. What is left behind the last full
batch is captioned and not compared.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import losses
from plumbing.ranks import agree, on_every_rank, rank, say, sum_over_ranks, world_size
from running import loading, order


def load(config, samples, vlm) -> tuple | None:
    """(held-out samples, their micro-batches [batch][number in the batch], of all ranks). `samples`: those of
    training, which are looked through for records that are in both."""
    if not config.val:
        return None
    held = order.load_samples(replace(config, annotations=config.val), vlm)
    content = data.key_of(held.records.text)
    agree({"held-out records": len(held), "held-out records of key": content})
    say(f"{len(held)} records of {config.val} are held out")
    repeated = count_repeated(samples.records, held.records)
    if repeated:
        say(f"warning: {repeated} of them are in {config.annotations}, too")
    if len(held) < world_size():
        raise ValueError(f"--val {config.val}: {len(held)} records, fewer than ranks")
    lengths = order.token_counts(config, held, vlm)
    shuffled = order.epoch_order(len(held), config.seed, 0)  # a file may be sorted, and neighbours alike
    cuts = []
    for start in range(0, len(held), config.batch):
        batch = shuffled[start : start + config.batch]
        longest_first = sorted(batch, key=lambda i: -lengths[i])
        size = max(1, min(config.micro_batch, len(batch) // world_size()))  # each rank has one, if it can
        cuts.append(order.cut_by_tokens(longest_first, lengths, size, config.micro_tokens))
    return held, cuts


def count_repeated(records, held_records) -> int:
    """How many held-out records are among `records`, of which every rank looks at its part."""
    held = [identity(record) for record in held_records]
    wanted = set(held)

    def look():
        mine = range(rank(), len(records), world_size())
        return wanted.intersection(identity(records[number]) for number in mine)

    found = set()
    for names in on_every_rank(look):
        found |= names
    return sum(name in found for name in held)


def identity(record: dict) -> str:
    """Id and text of a record, or all of it if it has no id."""
    if "id" in record:
        return repr((record["id"], record["conversations"]))
    return repr(record)


@torch.no_grad()
def measure(config, vlm, terms, held, step: int, steps: int, signals) -> dict:
    """The keys of the log, from the weights that this step left. {} if nothing is held out or due, or once a
    rank has one of the `signals` to stop: a job has seconds to end, and these take minutes.

    val_generative       nats a token: over all held-out records, sum of the losses / number of tokens
    val_NAME             a contrastive loss in nats, mean over the batches
    val_NAME_retrieval   the part of images whose most similar caption is their own
    """
    if not held or not is_due(config, step, steps):
        return {}
    samples, cuts = held
    candidates = sum(map(len, cuts[0]))
    device = vlm.llm.head_weight.device
    mine = [cut[rank() :: world_size()] for cut in cuts]
    loader = loading.make_loader(config, samples, vlm, mine, device)
    nats = tokens = 0.0
    compared = {name: [] for name in terms}  # loss -> [(loss, retrieval) of each batch]
    bar = tqdm(cuts, desc="held out", unit=" batches", delay=2, leave=False, disable=rank() > 0)
    for cut, micro_batches in zip(bar, loader):
        if sum_over_ranks([len(signals)], device).any():  # on any rank
            return {}
        micro_batches = [data.to_device(m, device) for m in micro_batches]
        patches = [vlm.encode(m["pixels"]) for m in micro_batches]  # each (I, N, C)
        states = []  # each (B, C)
        for m, projected in zip(micro_batches, patches):
            loss, state = losses.caption_pass(vlm, m, projected)
            nats += loss.double()
            tokens += len(m["loss_at"])
            states.append(state)
        if sum(map(len, cut)) < candidates:
            break  # the rest
        for name in terms:
            image, text = losses.vectors(name, vlm, micro_batches, patches, states)  # each (B, C)
            keys = torch.cat([m["keys"] for m in micro_batches])  # (B, 2)
            everyones = on_every_rank(lambda: (image.cpu(), text.cpu(), keys.cpu()))
            gathered = [torch.cat(parts) for parts in zip(*everyones)]  # of the whole batch
            compared[name].append(compare(*gathered, terms[name].scale().cpu()))
    nats, tokens = sum_over_ranks([nats, tokens], device).tolist()
    line = {"val_generative": nats / max(1, tokens)}
    for name, pairs in compared.items():
        loss, retrieval = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
        line[f"val_{name}"] = loss
        line[f"val_{name}_retrieval"] = retrieval
    for key, value in line.items():
        if not math.isfinite(value):  # in float16
            line[key] = None
    return line


def is_due(config, step: int, steps: int) -> bool:
    """In the first step, of rate 0 (what the run begins with), in every `val_every`-th and in the last."""
    if step in (0, steps - 1):
        return True
    return config.val_every > 0 and (step + 1) % config.val_every == 0


def compare(image, text, keys, scale) -> tuple:
    """(loss, retrieval): losses.contrastive_loss as it is for one process that has all n rows. That one wants
    as many rows from every rank, and a file may have any number."""
    scores = scale * image @ text.T  # (n, n)
    own = torch.arange(len(keys))
    is_equal = (keys[:, None] == keys[None]).any(-1)  # (n, n): an equal caption or image is no negative
    is_equal.fill_diagonal_(False)
    scores = scores.masked_fill(is_equal, -torch.inf)
    loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    return loss.item(), (scores.argmax(1) == own).double().mean().item()
