"""The language tower against transformers' LlamaForCausalLM: logits, gradients, the cache, generation."""

import pytest
import torch
import transformers
from conftest import assert_close, llama_config, shaken

from llm import LLM


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
                                     {"tie_word_embeddings": True}, {"rope_theta": 500000.0}, {"head_dim": 16}])
def test_logits_and_gradients_equal_llama(tmp_path, changes):
    theirs = shaken(transformers.LlamaForCausalLM(llama_config(**changes)))
    theirs.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path).requires_grad_()
    ids, direction = torch.randint(0, 75, (2, 9)), torch.randn(2, 9, 75)
    expected, logits = theirs(ids).logits, ours(ids)
    assert logits.shape == (2, 9, 75)
    assert_close(logits, expected)
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients.pop(name))
    assert not gradients


def test_hidden_states_equal_llama(llama_folder):
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    ours, ids = LLM.from_pretrained(llama_folder), torch.randint(0, 75, (2, 9))
    assert_close(ours.hidden(ours.embed(ids)), theirs.model(ids).last_hidden_state)


def test_loads_in_the_dtype_asked_for(llama_folder):
    ours, ids = LLM.from_pretrained(llama_folder, torch.bfloat16), torch.randint(0, 75, (2, 9))
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    assert ours(ids).dtype == torch.bfloat16
    assert_close(ours(ids).float(), theirs(ids).logits.float(), 3e-2)


def test_save_opens_in_transformers(llama_folder, tmp_path):
    ours, ids = LLM.from_pretrained(llama_folder), torch.randint(0, 75, (1, 9))
    ours.save_pretrained(tmp_path)
    assert_close(transformers.LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, ours(ids))


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


def test_generation_equals_transformers(llama_folder):
    llm, theirs = LLM.from_pretrained(llama_folder), transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    ids = torch.randint(3, 75, (1, 6))
    expected = theirs.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 6:]
    assert llm.generate(llm.embed(ids), max_new_tokens=10)[0].tolist() == expected.tolist()


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
        assert (row[length:] == -1).all()


def test_too_many_positions(llama_folder):
    llm = LLM.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match="300 positions; this LLM has 256"):
        llm(torch.zeros(1, 300, dtype=torch.long))


def test_scaled_rope_is_refused(tmp_path):
    config = llama_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="linear"):
        LLM.from_pretrained(tmp_path)
