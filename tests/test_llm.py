"""The language tower against transformers' own, family by family: logits, gradients, cache, generation."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, assert_close, first_wrong, grades, layer_by_layer, llama_config, shaken
from safetensors.torch import save_file

from llm import LLM, NO_TOKEN, KVCache, choose, load_llm_config, rope_tables, rotate, visible_positions

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {  # name: (transformers' class, its config, what differs from llama_config)
    "llama 2, vicuna": ("LlamaForCausalLM", {}),
    "no grouped heads": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "one key-value head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "smollm2": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "wide heads": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama 3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, "rms_norm_eps": 1e-6}),
}


def their_llm(family):
    """A random model of transformers' own class, with the sizes of llama_config."""
    name, changes = FAMILIES[family]
    model_class = getattr(transformers, name)
    sizes = llama_config().to_diff_dict() | {"rope_parameters": None}
    kind = {"model_type": model_class.config_class.model_type, "architectures": [name]}
    return shaken(model_class(model_class.config_class(**(sizes | kind | changes))))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(tmp_path, family):
    theirs = their_llm(family)
    theirs.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path).requires_grad_()
    ids, direction = torch.randint(0, 75, (2, 40)), torch.randn(2, 40, 75)
    with layer_by_layer(ours, theirs):
        expected, logits = theirs(ids).logits, ours(ids)
        assert logits.shape == (2, 40, 75)
        assert_close(logits, expected)
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients.pop(name))
    assert not gradients


def test_only_the_places_asked_for_go_through_the_last_mlp(llama_folder):
    """Values and gradients are those of all positions; the last block's MLP sees n of them."""
    llm, at, seen = LLM.from_pretrained(llama_folder), torch.tensor([9, 3, 3, 0, 13]), []
    embeds, mask = torch.randn(2, 7, llm.config.hidden_size), torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False
    for block in llm.model.layers:
        block.mlp.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[:-1].numel()))
    found = []
    for all_of_them in (True, False):
        x = embeds.clone().requires_grad_()
        hidden = llm.hidden(x, mask).flatten(0, 1)[at] if all_of_them else llm.hidden(x, mask, at=at)
        hidden.square().sum().backward()
        found += [hidden, x.grad]
    assert_close(found[2], found[0])
    assert_close(found[3], found[1])
    assert seen[-1] == 5 and set(seen[:-1]) == {14}


@grades("rotate")
def test_rotate_turns_pairs_half_a_head_apart():
    """As complex numbers: dimension i is the real part and i + half the imaginary one."""
    x, positions = torch.randn(2, 5, 3, 8), torch.arange(5) + torch.tensor([[0], [7]])  # (B, S)
    frequencies, before = torch.tensor([1.0, 0.3, 0.1, 0.02]), x.clone()
    turned = rotate(x, *rope_tables(positions, frequencies, torch.float32))
    assert turned.shape == x.shape, f"{tuple(turned.shape)} is not (B, S, H, head_dim)"
    assert torch.equal(x, before), "x itself has changed: what is returned is to be a tensor of its own"
    assert torch.allclose(turned[0, 0], x[0, 0]), "position 0 has an angle of 0: nothing turns"
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1)), (
        "lengths change: this is no rotation, a sign or one of the two products is wrong")
    angles = (positions[..., None] * frequencies)[:, :, None]  # (B, S, 1, half)
    expected = torch.view_as_real(torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(()), angles))
    assert torch.allclose(turned, torch.cat([expected[..., 0], expected[..., 1]], dim=-1), atol=1e-6), (
        "turned the wrong way round, or other pairs: dimension i goes with i + half, not 2 i with 2 i + 1; "
        "or by other angles: each row has its positions, each pair its speed")
    half = rotate(x.bfloat16(), *rope_tables(positions, frequencies, torch.bfloat16))
    assert half.dtype == torch.bfloat16, "what is turned has lost its dtype"


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_save_and_generation_equal_transformers(tmp_path, family):
    """Prints the parity table. What we save opens in transformers as the same model; greedy answers are the
    same."""
    theirs, ids = their_llm(family), torch.randint(3, 75, (2, 40))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    if family == "llama 3":  # transformers 4 reads another key than 5
        assert json.loads((tmp_path / "ours/config.json").read_text())["rope_scaling"] == LLAMA3
    assert_close(again(ids).logits, theirs(ids).logits)
    expected = theirs.generate(ids[:1], max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 40:]
    assert ours.generate(ours.embed(ids[:1]), max_new_tokens=10)[0].tolist() == expected.tolist()
    half = LLM.from_pretrained(tmp_path / "theirs", torch.bfloat16)(ids)
    assert half.dtype == torch.bfloat16
    half = half.float()
    their_half = type(theirs).from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)(ids).logits.float()
    full, their_full = ours(ids), theirs(ids).logits
    print(f"{family:<20} logits, max abs difference: fp32 {(full - their_full).abs().max():.1e}, "
          f"bf16 {(half - their_half).abs().max():.1e}; largest logit {their_full.abs().max():.1f}")
    # in bfloat16 no two orders of summation agree: ours may be off by what theirs is off
    assert (half - full).abs().max() < 2 * (their_half - full).abs().max()


@pytest.mark.parametrize("broken", ["model.embed_tokens", "model.layers.0.self_attn.k_proj",
                                    "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.up_proj"])
def test_where_parity_fails_a_table_names_the_first_wrong_layer(llama_folder, broken):
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    ours, ids = LLM.from_pretrained(llama_folder), torch.randint(0, 75, (2, 9))
    with torch.no_grad():
        ours.get_submodule(broken).weight *= 1.5
    with pytest.raises(AssertionError) as error, layer_by_layer(ours, theirs):
        assert_close(ours(ids), theirs(ids).logits)
    assert first_wrong(error) == broken and str(error.value).startswith("relative difference")
    assert all(str(error.value).count(f"\n{name} ") == 1 for name in ("model.embed_tokens", "the whole"))
    assert str(error.value).count("\nmodel.layers.") == 2 * 9
    assert not any(module._forward_hooks for model in (ours, theirs) for module in model.modules())


@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("start, S", [(0, 1), (0, 4), (3, 1), (3, 2)])
def test_what_a_query_sees_equals_a_plain_loop(start, S, padding):
    """Earlier real tokens, and itself: a query without any key would make NaN."""
    keys, padding_ends = start + S, padding or 0
    mask = None if padding is None else torch.arange(keys)[None] >= padding
    visible, is_causal = visible_positions(mask, start, S, "cpu")
    if visible is None:
        visible = torch.ones(S, keys, dtype=torch.bool)
        visible = visible.tril() if is_causal else visible
    else:
        assert not is_causal
    for query in range(start, keys):
        for key in range(keys):
            expected = padding_ends <= key <= query or key == query
            assert visible.reshape(S, keys)[query - start, key] == expected


def test_right_padding_changes_nothing_before_it(llama_folder):
    ours, ids = LLM.from_pretrained(llama_folder), torch.randint(0, 75, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    assert torch.allclose(ours(padded)[:, :9], ours(ids), atol=1e-5)


def test_left_padding_changes_nothing_behind_it(llama_folder):
    ours, ids = LLM.from_pretrained(llama_folder), torch.randint(0, 75, (1, 9))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    logits = ours(padded, mask=torch.arange(13)[None] >= 4)
    assert logits.isfinite().all()  # padded rows too: each may see itself
    assert torch.allclose(logits[:, 4:], ours(ids), atol=1e-5)


def without_cache(llm, ids, new):
    """The reference for generation: the whole sequence again for every token."""
    for _ in range(new):
        ids = torch.cat([ids, llm(ids)[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == llm.config.eos_token_id:
            break
    return ids[0, -new:] if ids.shape[1] > new else ids[0]


def test_batched_generation_equals_each_prompt_alone(llama_folder):
    """Cached, batched and left-padded, against one prompt at a time without a cache: token for token."""
    llm = LLM.from_pretrained(llama_folder)
    llm.config.eos_token_id = -5  # never: the ends are tested below
    prompts = [torch.randint(3, 75, (1, n)) for n in (3, 7, 1, 5)]
    ids = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.arange(7)[None] >= 7 - p.shape[1] for p in prompts])
    batch = llm.generate(llm.embed(ids), mask, max_new_tokens=12)
    for row, prompt in zip(batch, prompts):
        assert row.tolist() == without_cache(llm, prompt, 12).tolist()
        assert row.tolist() == llm.generate(llm.embed(prompt), max_new_tokens=12)[0].tolist()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_sequence_in_parts_equals_the_whole(llama_folder, padding):
    """Through the cache, several positions at a time and one, with and without left padding."""
    llm, ids = LLM.from_pretrained(llama_folder, torch.float64), torch.randint(0, 75, (2, 9))
    embeds, cache = llm.embed(ids), KVCache(llm.config, 2, 9, torch.float64, "cpu")
    mask = torch.arange(9)[None] >= torch.tensor([[padding], [0]]) if padding else None
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        seen = mask[:, :end] if padding else None
        parts.append(llm.hidden(embeds[:, start:end], seen, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), llm.hidden(embeds, mask))


def test_no_kernel_gets_a_mask_and_shared_heads(llama_folder, monkeypatch):
    """On a GPU no fused one takes both; without a mask they may."""
    attention, seen = F.scaled_dot_product_attention, []

    def noted(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        seen.append((attn_mask is not None, is_causal, enable_gqa))
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    ours, embeds = LLM.from_pretrained(llama_folder), torch.randn(2, 9, 32)
    for mask in (None, torch.arange(9) >= torch.tensor([[4], [0]])):
        ours.generate(embeds, mask, max_new_tokens=2)
    assert set(seen) == {(False, True, True), (False, False, False), (True, False, False)}


def test_each_row_stops_at_its_own_end(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    llm.config.eos_token_id = -5
    ids = torch.randint(3, 75, (3, 4))
    free = llm.generate(llm.embed(ids), max_new_tokens=10)
    llm.config.eos_token_id = int(free[1, 2])  # some row's third token
    stopped = llm.generate(llm.embed(ids), max_new_tokens=10)
    for row, whole in zip(stopped, free):
        ends = (whole == llm.config.eos_token_id).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 10
        assert row[:length].tolist() == whole[:length].tolist()
        assert (row[length:] == NO_TOKEN).all()


def test_sampling_follows_temperature_and_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    cases = (1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.7, 2), (1.0, 1e-6, 1), (2.0, 0.6, 2)
    for temperature, top_p, support in cases:
        counts = choose(logits, temperature, top_p).bincount(minlength=4) / 20000
        expected = (logits[0] / temperature).softmax(-1)
        expected[support:] = 0
        assert torch.allclose(counts, expected / expected.sum(), atol=0.02), (temperature, top_p)
    assert (choose(logits, 0.0, 1.0) == 0).all()


def test_sampled_generation_is_repeatable_and_differs_by_row(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    embeds = llm.embed(torch.randint(3, 75, (1, 4)).expand(3, 4))
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(llm.generate(embeds, max_new_tokens=8, temperature=1.5, top_p=0.95))
    assert torch.equal(*draws) and not torch.equal(draws[0][0], draws[0][1])


PEAK = """
import os, resource, sys, torch
from llm import LLM
small, *cases = sys.argv[1:]
LLM.from_pretrained(small)
for case in cases:
    if os.fork() == 0:  # a process's peak never falls, so each case has one of its own
        LLM.from_pretrained(small)  # what the imports take: a process that was forked has yet to touch them
        folder, dtype = case.split(",")
        before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        llm = LLM.from_pretrained(folder, getattr(torch, dtype))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(sum(p.nbytes for p in llm.parameters()) / 2**20, peak - before, flush=True)
        os._exit(0)
    os.wait()
"""


def write_shards(folder, suffix):
    """A model in five shards of 16 bits a weight, as large checkpoints are published; the largest in MiB."""
    llama_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LLM(load_llm_config(folder)).named_parameters()}
    place = {name: name.split(".")[2] if ".layers." in name else "rest" for name in shapes}
    for shard in set(place.values()):
        names = [name for name in shapes if place[name] == shard]
        tensors = {name: torch.full(shapes[name], 0.5, dtype=torch.bfloat16) for name in names}
        if suffix == "bin":
            torch.save(tensors, folder / f"{shard}.bin")
        else:
            save_file(tensors, folder / f"{shard}.safetensors", {"format": "pt"})
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(
        {"weight_map": {name: f"{shard}.{suffix}" for name, shard in place.items()}}))
    return max(file.stat().st_size for file in folder.glob(f"*.{suffix}")) / 2**20


CASES = [(suffix, dtype) for suffix in ("safetensors", "bin") for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def peaks(llama_folder, tmp_path_factory):
    """For each case, in MiB: (the largest shard, the loaded model, peak beyond the imports)."""
    folder = tmp_path_factory.mktemp("shards")
    largest = {}
    for suffix in ("safetensors", "bin"):
        (folder / suffix).mkdir()
        largest[suffix] = write_shards(folder / suffix, suffix)
    cases = [f"{folder / suffix},{dtype}" for suffix, dtype in CASES]
    run = subprocess.run([sys.executable, "-c", PEAK, llama_folder, *cases], cwd=ROOT, check=True,
                         capture_output=True, text=True)
    return {case: (largest[case[0]], *map(float, line.split()))
            for case, line in zip(CASES, run.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize("suffix, dtype", CASES)
def test_loading_takes_the_model_and_one_shard(peaks, suffix, dtype):
    """Peak host memory."""
    largest, model, taken = peaks[suffix, dtype]
    print(f"{suffix}, {dtype}: model {model:.0f} MiB, largest shard {largest:.0f}, taken {taken:.0f}")
    assert taken < model + largest + 40  # what an allocator keeps for later; all shards at once: 90 more


def test_too_many_positions(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match="300 positions; this LLM has 256"):
        llm(torch.zeros(1, 300, dtype=torch.long))


def test_mistrals_window_bounds_the_positions(tmp_path):
    transformers.MistralConfig(sliding_window=64, max_position_embeddings=256).save_pretrained(tmp_path)
    assert load_llm_config(tmp_path).max_position_embeddings == 64


def test_generation_config_lists_the_ends(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_llm_config(tmp_path).eos_token_id == [5, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_llm_config(tmp_path).eos_token_id == 2
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    message = "neither config.json nor generation_config.json has an eos_token_id"
    with pytest.raises(ValueError, match=message):
        load_llm_config(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"attention_bias": True}, "attention_bias is True; only False is supported"),
    ({"is_causal": False}, "is_causal is False; only True is supported"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"num_key_value_heads": 3}, "folder: 4 query heads cannot")])
def test_what_we_do_not_compute_is_refused(llama_folder, tmp_path, changes, message):
    (tmp_path / "folder").mkdir()
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "folder/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_llm_config(tmp_path / "folder")


def test_scaled_rope_is_refused(tmp_path):
    config = llama_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="linear"):
        LLM.from_pretrained(tmp_path)
