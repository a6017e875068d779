"""The order of the records: which make a step, and how they are dealt to ranks and micro-batches.

A step's gradient does not depend on how its samples are dealt. So step k takes the same records on any number
of ranks, and they are dealt for speed: rows of similar length together, similar work for each rank.

Letters: config is an options.Config, vlm a projector.VLM, samples a data.Conversations.
"""

import itertools
import math

import numpy as np
from tqdm import tqdm

import data
from losses import CONTRASTIVE
from plumbing.files import named
from plumbing.ranks import on_every_rank, rank, say, world_size
from plumbing.tokenizer import check_vocabulary, load_tokenizer
from running.records import load_records

CHUNK = 512  # records whose tokens are counted at once


def load_samples(config, vlm):
    """The records of this stage. ValueError for a tokenizer, or words of a prompt, that the LLM does not
    know."""
    tokenizer = load_tokenizer(config.llm)
    check_vocabulary(tokenizer, vlm.llm.config.vocab_size)
    prompts = data.PROMPTS.get(config.prompt) or config.prompt.split(" | ")
    with named("--prompt"):
        words = tokenizer(" ".join(prompts), add_special_tokens=False).input_ids
    if tokenizer.unk_token_id in words:
        raise ValueError(f"--prompt: the LLM does not know every word of {' | '.join(prompts)!r}")
    after_image, after_caption = prompts
    if "prompt" not in CONTRASTIVE[config.contrastive]:
        after_caption = None
    is_pairs = config.template == "plain" or config.contrastive != "none"
    records = load_records(config.annotations, "align" if is_pairs else None)
    if config.stage == "align" and not any("image" in record for record in records):
        raise ValueError(f"{config.annotations}: no record has an image, and align trains on nothing else")
    return data.Conversations(records, config.images, tokenizer, config.template, vlm.vit.config, config.fit,
                              (after_image, after_caption), config.cache)


# ------------------------------------------------------------------------------------------------------------
# Lengths

def longest_row(config, vlm) -> int:
    """Most tokens in a row."""
    return min(config.max_length, vlm.llm.config.max_position_embeddings)


def token_counts(config, samples, vlm) -> list:
    """The tokens of each record's row, image included. Counted, not estimated: a budget of tokens is a bound.

    Every rank counts its part. Bad records and missing pictures are told before the first step.
    """
    most = longest_row(config, vlm)
    counted = on_every_rank(lambda: count_mine(samples, vlm.num_image_tokens, most))
    lengths = [0] * len(samples)
    cut = []
    empty = []
    missing = set()
    for number, (part, of_cut, of_empty, of_missing) in enumerate(counted):
        lengths[number :: len(counted)] = part
        cut += of_cut
        empty += of_empty
        missing |= of_missing
    if missing:
        raise ValueError(f"{samples.images}: {len(missing)} pictures are missing, such as {min(missing)}; "
                         "`python -m running.check` finds all, and writes a list of the good records")
    if cut:
        say(f"{len(cut)} records are cut at {most} tokens, the first is {min(cut)}")
    if empty:
        say(f"warning: {len(empty)} records have no word of an answer within {most} tokens and teach "
            f"nothing, the first is {min(empty)}")
    return lengths


def count_mine(samples, num_image_tokens: int, most: int) -> tuple:
    """(lengths, numbers of rows that are cut, of rows without a label, names of missing pictures), of every
    W-th record from this rank's."""
    samples.read(0, with_pixels=False)  # a template that cannot be learned from is told here
    some = [samples.records[number] for number in range(min(100, len(samples)))]
    if any("image" in record for record in some) and not samples.images.is_dir():
        raise FileNotFoundError(f"{samples.images}: no such folder; --images names that of the pictures")
    lengths = []
    cut = []
    empty = []
    missing = set()
    mine = range(rank(), len(samples), world_size())
    with tqdm(desc="count tokens", total=len(mine), unit=" records", disable=rank() > 0, delay=2) as bar:
        for start in range(0, len(mine), CHUNK):
            numbers = mine[start : start + CHUNK]
            for number, length in zip(numbers, samples.count_tokens(numbers, num_image_tokens)):
                lengths.append(min(length, most))
                if length > most:
                    cut.append(number)
                    row = data.expand(samples.read(number, False), num_image_tokens, most)
                    if not any(label != data.IGNORE for label in row["labels"][1:]):
                        empty.append(number)
                name = samples.records[number].get("image")
                if name and not data.find_image(samples.images, name).is_file():
                    missing.add(name)
            bar.update(len(numbers))
    return lengths, cut, empty, missing


# ------------------------------------------------------------------------------------------------------------
# Steps

def subset(n: int, fraction: float, seed: int) -> list:
    """The sorted indices of a random `fraction` of n. With one seed, a smaller one is part of a larger
    one."""
    chosen = np.random.default_rng(seed).permutation(n)[: max(1, round(n * fraction))]
    return sorted(chosen.tolist())


def epoch_order(n: int, seed: int, epoch: int) -> list:
    """A permutation of n, new in each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def split_batch(config, world: int) -> tuple:
    """(most samples in a micro-batch, fewest micro-batches in a step) of each of `world` ranks."""
    part = config.batch // world
    size = max(1, min(config.micro_batch, part))
    if config.batch % world or part % size:
        raise ValueError(f"a batch of {config.batch} does not divide into {world} ranks and micro-batches of "
                         f"{config.micro_batch}")
    return size, part // size


def count_steps(config, n: int) -> int:
    """The steps of a run over n records, those of contrast first included."""
    kept = len(subset(n, config.data_fraction, config.seed))
    of_epochs = max(1, math.ceil(kept * config.epochs / config.batch))
    return config.contrastive_first + (config.steps or of_epochs)


def deal(config, lengths: list, steps: int, world: int) -> list:
    """The indices of every micro-batch: [step][rank][number in the step]. `lengths`: tokens of all records.

    A batch that runs short at a pass's end starts the next pass.
    """
    size, _ = split_batch(config, world)
    budget = config.micro_tokens
    kept = subset(len(lengths), config.data_fraction, config.seed)
    order = []
    for epoch in itertools.count():
        if len(order) >= steps * config.batch:
            break
        order += epoch_order(len(kept), config.seed, epoch)
    dealt = []
    for start in range(0, steps * config.batch, config.batch):
        batch = [kept[i] for i in order[start : start + config.batch]]
        if config.contrastive == "none":
            dealt.append(spread(batch, lengths, size, budget, world))
        else:
            dealt.append(spread_evenly(batch, lengths, size, budget, world))
    return dealt


def spread(batch: list, lengths, size: int, budget: int, world: int) -> list:
    """Split a step's samples into [rank][micro-batch], with little padding and similar work for each rank.

    A micro-batch holds samples of similar length: at most `size` of them and, with a `budget` above 0, at
    most so many tokens, padding included (but one sample at least). Every rank gets as many micro-batches as
    any other.
    """
    longest_first = sorted(batch, key=lambda i: -lengths[i])
    cut = cut_by_tokens(longest_first, lengths, size, budget)
    if budget:  # as many micro-batches as these, but filled evenly
        wanted = math.ceil(len(cut) / world) * world
        bound = budget
        even = sum(lengths[i] for i in batch) / wanted
        budget = min(bound, max(even, lengths[longest_first[0]]))
        cut = cut_by_tokens(longest_first, lengths, size, budget)
        while len(cut) > wanted:
            budget = min(bound, budget * 1.01)
            cut = cut_by_tokens(longest_first, lengths, size, budget)

    def cost(part):
        return len(part) * lengths[part[0]]  # padded to the longest, which comes first

    while len(cut) % world:  # one more micro-batch: halve the dearest
        dearest = max((part for part in cut if len(part) > 1), key=cost)
        half = len(dearest) // 2
        cut.remove(dearest)
        cut += [dearest[:half], dearest[half:]]
    cut.sort(key=cost, reverse=True)
    dealt = [[] for _ in range(world)]
    for start in range(0, len(cut), world):  # each round gives the dearest to the rank with the least so far
        ranks = sorted(dealt, key=lambda parts: sum(map(cost, parts)))
        for parts, part in zip(ranks, cut[start : start + world]):
            parts.append(part)
    return dealt


def spread_evenly(batch: list, lengths, size: int, budget: int, world: int) -> list:
    """`spread` for a contrastive loss: ranks exchange one vector of each sample, so all have as many samples.

    All micro-batches are of one size: the largest that divides `size` and whose longest row fits the budget.
    """
    if budget:
        fitting = budget // max(lengths[i] for i in batch)
        size = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, fitting))
    dealt = spread(batch, lengths, size, 0, world)
    assert len({sum(map(len, parts)) for parts in dealt}) == 1, "ranks with unequal parts"
    return dealt


def cut_by_tokens(longest_first, lengths, size: int, budget: float) -> list:
    """Lists of at most `size` samples and, with a budget, of at most so many tokens (but of one at least)."""
    cut = []
    for i in longest_first:
        is_full = not cut or len(cut[-1]) == size
        if not is_full and budget:
            longest = lengths[cut[-1][0]]
            is_full = longest * (len(cut[-1]) + 1) > budget
        if is_full:
            cut.append([])
        cut[-1].append(i)
    return cut


def largest_micro_batch(dealt: list, lengths: list) -> tuple:
    """(samples, tokens of the longest) of the micro-batch with most tokens, padding included."""
    sizes = set()
    for ranks in dealt:
        for part in itertools.chain(*ranks):
            sizes.add((len(part), max(lengths[i] for i in part)))
    return max(sizes, key=math.prod)
