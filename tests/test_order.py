"""The order of the records: what makes a step, and how it is dealt to ranks and micro-batches; lengths."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_ids
import torch
from conftest import ROOT, refusal
from PIL import Image
from scripts import how_it_ends, refused, trained
from test_data import TEXT, TOWER, chat_tokenizer, llama2, record
from test_ids import CAPTIONS, RECORDS

import data
import train
from running import costs, options, order
from running.options import Config

CPU = torch.device("cpu")


def vlm_of(image_tokens=4, most=2048):
    """As much of a model as the order of the records looks at."""
    llm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=most, vocab_size=100))
    return SimpleNamespace(num_image_tokens=image_tokens, image_token_id=-200, llm=llm,
                           vit=SimpleNamespace(config=TOWER))


# ---- which records make a step -----------------------------------------------------------------------------


def test_subsets_are_nested():
    parts = [set(order.subset(1000, fraction, seed=3)) for fraction in (0.01, 0.1, 0.5, 1)]
    assert [len(part) for part in parts] == [10, 100, 500, 1000]
    assert all(small < large for small, large in zip(parts, parts[1:]))
    assert order.subset(1000, 0.1, seed=4) != order.subset(1000, 0.1, seed=3)


def test_every_pass_has_an_order_of_its_own():
    orders = [order.epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(found) == list(range(50)) for found in orders)
    assert len({tuple(found) for found in orders}) == 4
    assert orders[3] == order.epoch_order(50, 1, 1)


@pytest.mark.parametrize("options, steps", [
    ({}, 6), ({"epochs": 0.1}, 1), ({"steps": 4}, 4), ({"data_fraction": 0.5}, 3),
    ({"contrastive": "patch", "contrastive_first": 5}, 11)])
def test_the_steps_of_a_run(options, steps):
    """21 records, two passes, eight in a step; contrast first comes on top."""
    assert order.count_steps(Config(**{"batch": 8, "epochs": 2.0} | options), 21) == steps


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    assert order.split_batch(Config(batch=8, micro_batch=2), 2) == (2, 2)
    for world, micro_batch in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"batch of 8 does not divide into {world} ranks"):
            order.split_batch(Config(batch=8, micro_batch=micro_batch), world)


# ---- how a step is dealt -----------------------------------------------------------------------------------


def cost(part, lengths):
    """Tokens of a micro-batch, padding included."""
    return len(part) * max(lengths[i] for i in part)


@pytest.mark.parametrize("budget, contrastive", [(0, "none"), (60, "none"), (60, "patch"), (1, "none")])
def test_every_number_of_ranks_takes_the_same_records(budget, contrastive):
    """Six steps of eight: two passes over 21 records, and a part of a third. In each step the ranks together
    take what one rank takes at once; all have as many micro-batches, and where vectors are exchanged as many
    samples."""
    config = Config(batch=8, micro_batch=2, epochs=2.0, seed=3, micro_tokens=budget, contrastive=contrastive)
    lengths = [1 + 17 * i % 40 for i in range(21)]
    steps = order.count_steps(config, len(lengths))
    at_once = replace(config, micro_batch=8, micro_tokens=0)
    whole = [part for ((part,),) in order.deal(at_once, lengths, steps, 1)]
    counts = Counter(itertools.chain(*whole))
    assert Counter(counts.values()) == {2: 15, 3: 6}
    assert len({*whole[0], *whole[1]}) == 16 and len({*whole[0], *whole[1], *whole[2]}) == 21
    for world in (1, 2, 4):
        for ranks, batch in zip(order.deal(config, lengths, steps, world), whole, strict=True):
            parts = [*itertools.chain(*ranks)]
            assert len(ranks) == world and sorted(itertools.chain(*parts)) == sorted(batch)
            assert len({len(parts) for parts in ranks}) == 1 and max(map(len, parts)) <= 2
            assert contrastive == "none" or {sum(map(len, parts)) for parts in ranks} == {8 // world}
            assert not budget or all(len(part) == 1 or cost(part, lengths) <= budget for part in parts)


def realistic(n, seed):
    """Lengths like mix665k's: text log-normal with a median of 150 tokens, 576 more in 15 of 16 rows."""
    rng = np.random.default_rng(seed)
    text = rng.lognormal(np.log(150), 0.9, n)
    return (text + 576 * (rng.random(n) < 15 / 16)).clip(1, 2048).astype(int).tolist()


def lost(dealt, lengths):
    """The part of the ranks' time that is padding or waiting: a step ends with its slowest rank."""
    real = time = 0
    for ranks in dealt:
        real += sum(lengths[i] for parts in ranks for part in parts for i in part)
        time += len(ranks) * max(sum(cost(part, lengths) for part in parts) for parts in ranks)
    return 1 - real / time


@pytest.mark.parametrize("options, most", [
    ({"micro_tokens": 8192}, 0.08), ({"micro_tokens": 4096}, 0.06),
    ({"micro_tokens": 4096, "contrastive": "patch"}, 0.06)])
def test_little_of_the_ranks_time_is_padding_or_waiting(options, most):
    for seed in (0, 1):
        lengths = realistic(10000, seed)
        dealt = order.deal(Config(batch=128, micro_batch=16, **options), lengths, 60, 8)
        assert lost(dealt, lengths) <= most


@pytest.mark.parametrize("contrastive", ["none", "patch"])
def test_random_deals_keep_every_sample_the_bound_and_equal_shares(contrastive):
    """As many micro-batches on every rank; with a contrastive loss as many samples, too."""
    rng = random.Random(0)
    for _ in range(1170):
        world, share = rng.choice((1, 2, 3, 4, 8)), rng.choice((2, 4, 6, 8, 12, 16))
        size = rng.choice([n for n in range(1, share + 1) if share % n == 0])
        lengths = [int(rng.lognormvariate(4, rng.choice((0.1, 1.5)))) + 1 for _ in range(world * share)]
        budget = rng.choice((0, 1, max(lengths), rng.randrange(1, 3000)))
        config = Config(batch=len(lengths), micro_batch=size, micro_tokens=budget, contrastive=contrastive)
        (ranks,) = order.deal(config, lengths, 1, world)
        parts = [*itertools.chain(*ranks)]
        assert sorted(itertools.chain(*parts)) == [*range(world * share)]
        assert len({len(own) for own in ranks}) == 1 and max(map(len, parts)) <= size
        assert not budget or all(len(part) == 1 or cost(part, lengths) <= budget for part in parts)
        if contrastive != "none":
            assert {sum(map(len, own)) for own in ranks} == {share} and len({*map(len, parts)}) == 1


def test_the_largest_micro_batch_is_the_one_with_most_tokens():
    lengths = [9, 8, 3, 3, 3, 3]
    assert order.largest_micro_batch([[[[0]], [[1]]], [[[2, 3, 4, 5]]]], lengths) == (4, 3)


# ---- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "llama2", "llama2 legacy", "llava", "unigram", "chatml", "llama3",
                                  "llama3 trimmed", "qwen3"])
def test_counted_tokens_are_those_of_the_rows(name):
    """For each template and record of tests/test_ids.py that makes a row: every token, the image's included,
    whether it is counted alone or among others."""
    tokenizer = test_ids.tokenizer_of(name)
    for template in ("plain", "v1", "chat"):
        taken = []
        for one in (CAPTIONS if template == "plain" else RECORDS).values():
            try:
                samples = data.Conversations([one], "", tokenizer, template, TOWER, "pad")
                row = data.expand(samples.read(0, with_pixels=False), 16, 9999)
            except ValueError:
                continue  # such as a template that has no place for thoughts
            taken.append((one, len(row["ids"])))
        if taken:
            samples = data.Conversations([one for one, _ in taken], "", tokenizer, template, TOWER, "pad")
            assert samples.count_tokens(range(len(taken)), 16) == [length for _, length in taken]
            assert samples.count_tokens([1], 16) == [taken[1][1]]


def mixed_samples(n):
    """English and Chinese, whose characters take two or three tokens each; texts of a word and of many."""
    rng, records = random.Random(0), []
    for number in range(n):
        words = " ".join(rng.choices(("red", "circle", "a"), k=int(rng.lognormvariate(3, 1)) + 1))
        text = words if number % 2 else "".join(rng.choices("红色圆形的", k=len(words)))
        picture = {"image": "sample.png"} if number % 3 else {}
        records.append(record("<image>\n" * bool(picture) + "What?", text, **picture))
    return data.Conversations(records, ROOT / "lab", chat_tokenizer("chatml"), "v1", TOWER, "pad")


@pytest.mark.parametrize("contrastive", ["none", "patch"])
def test_micro_tokens_bound_every_pass_whatever_the_language(contrastive):
    """The tensors of all passes are made: none has more tokens, padding included."""
    samples, vlm = mixed_samples(120), vlm_of(16)
    config = Config(batch=24, micro_batch=8, micro_tokens=1500, max_length=700, contrastive=contrastive)
    lengths = order.token_counts(config, samples, vlm)
    dealt = order.deal(config, lengths, 5, 3)
    largest = 0
    for part in itertools.chain(*itertools.chain(*dealt)):
        rows = [samples.read(i, with_pixels=False) | {"pixels": None} for i in part]
        for row, i in zip(rows, part):
            row["pixels"] = torch.zeros(3, 8, 8) if "image" in samples.records[i] else None
        ids = data.collate(rows, 16, -200, 0, 8, 700)["ids"]
        assert ids.numel() == cost(part, lengths) <= 1500
        largest = max(largest, ids.numel())
    assert largest == math.prod(order.largest_micro_batch(dealt, lengths)) > 1200


def test_cut_and_empty_rows_are_told_before_the_first_step(capsys):
    """Record 1 is cut within its answer, record 2 and 3 before it."""
    texts = ("red", "red"), ("red", "red " * 300), ("red " * 300, "red"), ("red " * 400, "red")
    samples = data.Conversations([record(*turns) for turns in texts], "", llama2(False), "v1", TOWER, "pad")
    lengths = order.token_counts(Config(max_length=200), samples, vlm_of())
    said = capsys.readouterr().out
    assert lengths[0] < 200 and lengths[1:] == [200] * 3
    assert "3 records are cut at 200 tokens, the first is 1" in said
    assert "2 records have no word of an answer within 200 tokens and teach nothing, the first is 2" in said
    assert order.token_counts(Config(max_length=9999), samples, vlm_of(most=200)) == lengths


@pytest.mark.parametrize("bad, message", [
    (record("q", "a " * 300, "<image>\nq", "b", image="x"), "the image does not fit into 99 tokens"),
    (record("\ud800", "a"), "'utf-8' codec can't encode"), (record("q", "\ud800"), "'utf-8' codec")])
def test_bad_records_are_told_before_the_first_step(bad, message):
    samples = data.Conversations([TEXT, bad], "", llama2(False), "v1", TOWER, "pad")
    with pytest.raises(ValueError, match=f"^record 'r': {message}[^\n]*$"):
        order.token_counts(Config(max_length=99), samples, vlm_of())


def told_of_missing(rank, ranks, folder):
    records = [record("<image>\nq", "a", image=f"{number}.png") for number in (5, 1, 3, 4, 1)]
    samples = data.Conversations([TEXT, *records], folder, llama2(False), "v1", TOWER, "pad")
    return refusal(order.token_counts, Config(), samples, vlm_of())


def test_missing_pictures_are_counted_before_the_first_step(ranks, tmp_path):
    """On all ranks: else a run ends where it meets the first, and once more whenever it is resumed."""
    Image.new("RGB", (4, 4)).save(tmp_path / "4.jpg")  # of another suffix: it is found
    said = f"{tmp_path}: 3 pictures are missing, such as 1.png; `python -m running.check` finds all, and "
    assert all(text.startswith(said) for text in ranks(2, told_of_missing, tmp_path))
    for number in (1, 3, 5):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    assert told_of_missing(0, 1, tmp_path) == ""


def counted(rank, ranks, n):
    """On each rank: the counts of all, and the numbers of the records that this one has counted."""
    samples, mine = mixed_samples(n), []
    count = samples.count_tokens
    samples.count_tokens = lambda numbers, image: mine.extend(numbers) or count(numbers, image)
    return order.token_counts(Config(), samples, vlm_of()), mine


def test_each_rank_counts_its_part_and_all_have_the_whole(ranks):
    (alone, all_numbers), found = counted(0, 1, 11), ranks(2, counted, 11)
    assert all_numbers == [*range(11)]
    assert [mine for _, mine in found] == [[*range(0, 11, 2)], [*range(1, 11, 2)]]
    assert [lengths for lengths, _ in found] == [alone, alone]


# ---- the start of a run ------------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_the_folder_as_it_was(world, tmp_path):
    out = tmp_path / "out"
    images = world[0] / "data/toy/images"
    options = ["--stage", "align", "--save_every", "2", "--out", out, "--images", images]
    last = how_it_ends(train.main, world[0], *world[1], *options, "--llm", "none")
    assert "none: no such folder" in last and not out.exists()
    trained(world, *options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([*json.loads((world[0] / "data/toy/align.json").read_text())[:8],
                               record("<image>\nq", "\ud800", image="x")]))
    for more in (["--annotations", bad], ["--images", tmp_path], ["--clip", "-1"]):
        how_it_ends(train.main, world[0], *world[1], *options, *more)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_own_words_stand_behind_the_image_and_the_caption(world, monkeypatch):
    """--prompt "a | b", with the prompted loss and, its first part, without it."""
    monkeypatch.chdir(world[0])
    words = ["--prompt", "What size is it? | Where is the shape?", "--contrastive"]
    seen = {}
    for contrastive in ("prompt", "none"):
        config = options.configure("align", options.parse_args([*map(str, world[1]), *words, contrastive]))
        samples = order.load_samples(config, costs.outline(config, by_name=False))
        caption = samples.records[0]["conversations"][1]["value"]
        seen[contrastive] = sample = samples[0]
        text = samples.tokenizer.decode([i for i in sample["ids"] if i != data.IMAGE_MARKER])
        assert sample["ids"][1] == data.IMAGE_MARKER and text == f"<s> \n What size is it? {caption} \n"
    assert samples.tokenizer.decode(seen["prompt"]["text_ids"]) == f"<s> {caption} \n Where is the shape?"
    assert "text_ids" not in seen["none"]


def test_a_missing_folder_of_pictures_is_told_before_a_model_is_loaded(align, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    said = refused(align, "--out", "blind", "--images", "nowhere")
    assert said == "train.py: nowhere: no such folder; --images names that of the pictures"
