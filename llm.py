"""The language tower: token ids, or embeddings in their place, in; next-token logits out.

    llm = LLM.from_pretrained("lmsys/vicuna-7b-v1.5")      # a folder, or a Hub id
    logits = llm(ids)                                      # (B, S) -> (B, S, V)
    new = llm.generate(llm.embed(ids), max_new_tokens=32)  # with a key-value cache -> (B, <= 32)

A Llama decoder (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288). GPT-2 has LayerNorm, learned
positions, a plain MLP and biases. Llama has RMSNorm, rotary positions (RoPE), a gated MLP (SwiGLU) and no
biases. RMSNorm divides by the root mean square, and subtracts no mean. Later Llamas have fewer key-value
heads than query heads (grouped-query attention, GQA). Vicuna, SmolLM2 and Mistral are Llamas of other sizes.
FAMILIES has what Qwen changes, `rope_frequencies` what Llama 3 does.

A vision-language model feeds it *embeddings*, because image tokens have no id. So everything below works on
embeddings, and `embed` is the only place where an id becomes a vector.

Module names are those of the Hugging Face checkpoints, which plumbing/llama.py reads.
Read next: data.py (where ids come from, and labels).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import llama
from plumbing.files import resolve, resolve_model
from plumbing.weights import config_from_dict, load_strictly, read_weights, write_weights


class Family(NamedTuple):
    architecture: str  # transformers' class
    has_bias: bool  # on queries, keys and values
    has_norm: bool  # an RMSNorm on each query and key


FAMILIES = {  # by config.json's model_type
    "llama": Family("LlamaForCausalLM", has_bias=False, has_norm=False),
    "mistral": Family("MistralForCausalLM", has_bias=False, has_norm=False),
    "qwen2": Family("Qwen2ForCausalLM", has_bias=True, has_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", has_bias=False, has_norm=True),
}
NO_TOKEN = -1  # fills a row of new ids behind its end


@dataclass
class LLMConfig:
    """Sizes of the tower under the names of Hugging Face's config.json. The defaults are Vicuna-7B v1.5."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # base of the rotary frequencies
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False  # True: the head is the embedding table itself
    bos_token_id: int | None = 1
    eos_token_id: int | list = 2  # generation stops here; Llama 3 lists several
    model_type: str = "llama"
    rope_parameters: dict | None = None  # only for Llama 3, see `rope_frequencies`

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise ValueError(f"the LLM's model_type is {self.model_type!r}; known: {', '.join(FAMILIES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} query heads cannot share "
                             f"{self.num_key_value_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of dimensions; a head of {self.head_dim} has an odd one")
        rope_frequencies(self, "cpu")  # with incomplete `rope_parameters`, fail now and not in the first step


# RoPE (Su et al. 2021, arXiv 2104.09864) turns queries and keys by angles that grow with their position. So
# the product of a query and a key depends only on their distance. Pairs of dimensions differ in speed.

def rope_frequencies(config: LLMConfig, device):
    """Radians that each pair of dimensions turns from one position to the next, (head_dim / 2,) in fp32:
    theta^(-2i / head_dim), so the first pairs turn fast and the last ones slowly.

    Llama 3.1 learned texts of `original_max_position_embeddings` tokens first, then longer ones. A pair that
    turns fewer than `low_freq_factor` times in the first length would meet new angles in a longer text, so it
    is slowed by `factor`. One of over `high_freq_factor` turns has met all angles: it stays. Between, a mix.
    """
    even = torch.arange(0, config.head_dim, 2, device=device).float()  # (head_dim / 2,)
    frequencies = config.rope_theta ** -(even / config.head_dim)  # (head_dim / 2,)
    if config.rope_parameters is None:
        return frequencies
    rope = config.rope_parameters
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short waves, 0: long ones
    return frequencies * (kept + (1 - kept) / rope["factor"])  # (head_dim / 2,)


def rope_tables(positions, frequencies, dtype):
    """cos and signed sin (B or 1, S, 1, head_dim) of the angles at `positions` (B or 1, S), in fp32 at first.

    A pair turns to (first cos - second sin, second cos + first sin): hence the sign of the first half.
    """
    angles = positions[..., None, None].float() * frequencies  # (B, S, 1, head_dim / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # each (B, S, 1, head_dim)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + half]) of x (B, S, H, head_dim) by its angle: cos and sin of `rope_tables`.

    Hugging Face's weights pair i with i + half, Meta's own files pair 2i with 2i + 1.
    """
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # (B, S, H, head_dim), the other one of each pair
    return torch.addcmul(x * cos, partner, sin)  # (B, S, H, head_dim)


class KVCache:
    """Keys and values of every layer for up to `max_len` positions, so that each is computed once."""

    def __init__(self, config: LLMConfig, batch: int, max_len: int, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions filled so far; `LLM.hidden` raises it when all layers have appended

    def append(self, layer: int, k, v):
        """Store k, v (B, key heads, S, head_dim) after the earlier ones; return all of this layer so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def visible_positions(mask, start: int, S: int, device):
    """(mask, is_causal) of scaled_dot_product_attention, for S queries behind `start` cached positions.

    A query sees itself and what stands before it, but no padding, where `mask` (B, keys) is False. Padding
    still sees itself: over no key at all, some kernels of attention give NaN, others 0. A mask of None is
    faster: a single query sees everything before it, and a whole sequence is plainly causal.
    """
    if mask is None and S == 1:
        return None, False
    if mask is None and start == 0:
        return None, True
    query = torch.arange(start, start + S, device=device)[:, None]  # (S, 1)
    key = torch.arange(start + S, device=device)  # (keys,)
    visible = key <= query  # (S, keys)
    if mask is not None:
        visible = (visible & mask[:, None]) | (key == query)  # (B, S, keys)
        visible = visible[:, None]  # (B, 1, S, keys)
    return visible, False


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads. (B, S, C) -> (B, S, C)."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.layer = layer
        C = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        family = FAMILIES[config.model_type]
        self.q_proj = nn.Linear(C, query_width, family.has_bias)
        self.k_proj = nn.Linear(C, key_width, family.has_bias)
        self.v_proj = nn.Linear(C, key_width, family.has_bias)
        self.o_proj = nn.Linear(query_width, C, bias=False)
        norm = nn.RMSNorm if family.has_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, visible=None, is_causal=True, cache=None):
        B, S, C = x.shape
        q = self.q_norm(self.q_proj(x).view(B, S, -1, self.head_dim))  # (B, S, H, head_dim)
        k = self.k_norm(self.k_proj(x).view(B, S, -1, self.head_dim))  # (B, S, key heads, head_dim)
        v = self.v_proj(x).view(B, S, -1, self.head_dim)  # (B, S, key heads, head_dim)
        # Rotate before the transpose, so that attention's result lies in memory as the last line needs it.
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, S, head_dim)
        k = rotate(k, cos, sin).transpose(1, 2)  # (B, key heads, S, head_dim)
        v = v.transpose(1, 2)  # (B, key heads, S, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, key heads, start + S, head_dim)
        groups = q.shape[1] // k.shape[1]  # so many query heads share one key-value head
        if groups > 1 and not is_causal:  # no fused GPU kernel takes a mask with GQA: heads become queries
            q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, key heads, groups S, head_dim)
            visible = visible if visible is None else torch.cat(groups * [visible], dim=-2)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, enable_gqa=is_causal and groups > 1)
        x = x.reshape(B, -1, S, self.head_dim)  # (B, H, S, head_dim)
        return self.o_proj(x.transpose(1, 2).flatten(2))  # (B, S, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). (B, S, C) -> (B, S, C)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP. Each reads normalised input and adds to x. (B, S, C) -> (B, S, C).

    With `at` (n,), places of the flattened positions, the MLP runs there alone, and (n, C) comes out.
    """

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, visible=None, is_causal=True, cache=None, at=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, is_causal, cache)
        if at is not None:
            x = x.flatten(0, 1)[at]  # (n, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding table, blocks, final norm: what the checkpoints call `model`."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LLM(nn.Module):
    """`llm(ids (B, S)) -> logits (B, S, V)`. `hidden` stops before the head: a loss may need few logits."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """The output matrix (V, C): its own, or the embedding table if the two are tied."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def embed(self, ids):
        return self.model.embed_tokens(ids)  # (B, S, C)

    def hidden(self, embeds, mask=None, cache=None, at=None):
        """Last hidden states (B, S, C), after the final norm, of embeddings (B, S, C).

        `mask` (B, earlier and new positions) is False at left padding. Only left padding needs one: attention
        is causal, so no real token sees padding on its right. Positions count real tokens only. `cache` holds
        the earlier positions and grows by S. `at` (n,): only these places of the flattened positions, so
        (n, C). Attention of the last block needs them all, its MLP does not.
        """
        B, S, C = embeds.shape
        start = 0 if cache is None else cache.length
        if start + S > self.config.max_position_embeddings:
            raise ValueError(f"{start + S} positions; this LLM has {self.config.max_position_embeddings}")
        if mask is None:
            positions = torch.arange(start, start + S, device=embeds.device)[None]  # (1, S)
        else:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]  # (B, S)
        cos, sin = rope_tables(positions, rope_frequencies(self.config, embeds.device), embeds.dtype)
        visible, is_causal = visible_positions(mask, start, S, embeds.device)
        x = embeds
        *blocks, last = self.model.layers
        for block in blocks:
            x = block(x, cos, sin, visible, is_causal, cache)  # (B, S, C)
        x = last(x, cos, sin, visible, is_causal, cache, at)  # (B, S, C), or (n, C)
        if cache is not None:
            cache.length += S
        return self.model.norm(x)  # (B, S, C), or (n, C)

    def logits(self, hidden):
        return F.linear(hidden, self.head_weight)  # (..., V)

    def forward(self, ids, mask=None):
        """Logits (B, S, V) at every position of `ids` (B, S)."""
        return self.logits(self.hidden(self.embed(ids), mask))  # (B, S, V)

    @torch.no_grad()
    def generate(self, embeds, mask=None, max_new_tokens: int = 32, temperature: float = 0.0,
                 top_p: float = 1.0, end_tokens=()):
        """Continue left-padded prompts: embeddings (B, S, C), mask (B, S) -> new ids (B, <= max_new_tokens).

        Temperature 0 is greedy. Above 0, `choose` samples with torch's own random state. A row stops at one
        of the config's end tokens or of `end_tokens`. It keeps that token, and NO_TOKEN fills the rest.
        """
        B, S, C = embeds.shape
        if mask is not None and mask.all():
            mask = None  # attention without a mask is faster
        ends = self.config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        ends = torch.tensor([*ends, *end_tokens], device=embeds.device)
        cache = KVCache(self.config, B, S + max_new_tokens, embeds.dtype, embeds.device)
        is_done = torch.zeros(B, dtype=torch.bool, device=embeds.device)
        rows = torch.arange(B, device=embeds.device)  # (B,)
        at = S * (rows + 1) - 1  # (B,) the last place of each prompt
        new = []
        while len(new) < max_new_tokens:
            hidden = self.hidden(embeds, mask, cache, at)  # (B, C)
            token = choose(self.logits(hidden), temperature, top_p)  # (B,)
            new.append(token.masked_fill(is_done, NO_TOKEN))
            is_done |= torch.isin(token, ends)
            if is_done.all():
                break
            embeds = self.embed(token)[:, None]  # (B, 1, C): the cache holds the rest
            at = rows
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)  # (B, one more)
        return torch.stack(new, dim=1)  # (B, <= max_new_tokens)

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """The frozen LLM of a folder of one of FAMILIES, or of a folder in a LLaVA format, or of a run that
        tuned it. ValueError if a tensor is missing or left over."""
        folder = llama.home(resolve_model(folder_or_id))
        with torch.device("meta"):  # only shapes: the weights come from the files
            llm = cls(load_llm_config(folder))
        our_name = partial(llama.our_name, is_tied=llm.config.tie_word_embeddings)
        load_strictly(llm, read_weights(folder, our_name), folder, dtype, device, our_name)
        return llm.requires_grad_(False).eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers opens as the family's own class."""
        config = llama.config_json(self.config, FAMILIES[self.config.model_type].architecture)
        write_weights(dict(self.named_parameters()), folder, config)


def choose(logits, temperature: float, top_p: float):
    """The next token (B,) of each row of logits (B, V): the likeliest at temperature 0, else a sample.

    Samples come from the smallest set of tokens that holds `top_p` of the probability (Holtzman et al. 2020,
    arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probabilities = (logits.float() / temperature).softmax(-1)  # (B, V)
    probabilities, tokens = probabilities.sort(-1, descending=True)  # each (B, V)
    before = probabilities.cumsum(-1) - probabilities  # (B, V), the sum of all likelier tokens
    kept = probabilities.masked_fill(before >= top_p, 0)  # (B, V); the likeliest always stays
    return tokens.gather(1, torch.multinomial(kept, 1))[:, 0]  # (B,)


def load_llm_config(folder_or_id) -> LLMConfig:
    """The sizes of the LLM in a folder or on the Hub, without its weights."""
    folder = llama.home(resolve(folder_or_id, ["*.json"]))
    return config_from_dict(LLMConfig, llama.read_sizes(folder, FAMILIES), folder)
