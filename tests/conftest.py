"""Shared by all tests: repeatable arithmetic, the project on the path, and tiny random folders of transformers' own."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers

import data
from lab import toy_world

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs real weights and packages beyond requirements.txt; run with -m real")


def pytest_collection_modifyitems(config, items):
    if "real" not in config.option.markexpr:
        items[:] = [item for item in items if "real" not in item.keywords]


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP vision tower of transformers, random, on disk: 16 patches of an image of 32, width 32, 3 blocks."""
    torch.manual_seed(1)
    config = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                           num_attention_heads=4, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("clip")
    shaken(transformers.CLIPVisionModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A Llama of transformers, random, on disk, with the toy world's tokenizer: width 32, 2 blocks, 4 heads on 2."""
    folder = tmp_path_factory.mktemp("llama")
    toy_world.write_tokenizer(folder)
    vocabulary = len(data.load_tokenizer(folder))
    shaken(transformers.LlamaForCausalLM(llama_config(vocab_size=vocabulary))).save_pretrained(folder)
    return folder


def llama_config(**changes):
    sizes = dict(vocab_size=75, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0,
                 bos_token_id=1, eos_token_id=2)
    return transformers.LlamaConfig(**(sizes | changes))


def shaken(model):
    """The model with every parameter moved: a norm left at 1 and a bias left at 0 would hide that nobody loads them."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def assert_close(ours, theirs, tolerance=1e-5):
    """Largest difference, relative to the largest value."""
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert difference < tolerance, f"relative difference {difference:.1e}"
