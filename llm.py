"""The language tower: token ids, or embeddings in their place, in; next-token logits out.

    llm = LLM.from_pretrained("lmsys/vicuna-7b-v1.5")      # a folder, or a Hub id
    logits = llm(ids)                                      # (B, S) -> (B, S, V)
    new = llm.generate(llm.embed(ids), max_new_tokens=32)  # with a key-value cache -> (B, <= 32)

A Llama decoder (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288). Against GPT-2 it has RMSNorm for
LayerNorm, rotary positions (RoPE) for learned ones, a gated MLP (SwiGLU), no biases, and in the larger models
fewer key-value heads than query heads (grouped-query attention, GQA). Vicuna, TinyLlama, SmolLM2 and Mistral
are Llamas of other sizes; what Qwen changes is in the table FAMILIES, what Llama 3 changes in
`rope_frequencies`.

A vision-language model feeds it *embeddings*: image tokens have no id. So everything below works on
embeddings, and `embed` is the only place where an id becomes a vector.

Module names are those of the Hugging Face checkpoints. Read next: projector.py.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from plumbing.files import named, resolve, resolve_model
from plumbing.llama import llm_config_from_dict, llm_config_to_dict, our_llm_name
from plumbing.weights import load_strictly, read_config, read_weights, write_weights


FAMILIES = {  # by config.json's model_type: transformers' class, a bias on q, k and v, a norm on q and k
    "llama": ("LlamaForCausalLM", False, False), "mistral": ("MistralForCausalLM", False, False),
    "qwen2": ("Qwen2ForCausalLM", True, False), "qwen3": ("Qwen3ForCausalLM", False, True),
}


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
    rope_parameters: dict | None = None  # for Llama 3 alone, see `rope_frequencies`

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise ValueError(f"the LLM's model_type is {self.model_type!r}; known: {', '.join(FAMILIES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads, key_heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"{heads} query heads cannot share {key_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of dimensions; a head of {self.head_dim} has an odd one")
        rope_frequencies(self, "cpu")  # an error now, not in the first step


class RMSNorm(nn.Module):
    """x / rms(x) * weight. PyTorch's own kernel computes in fp32 where x has less."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# RoPE (Su et al. 2021, arXiv 2104.09864): queries and keys are turned by angles that grow with their
# position, so that their product depends on the distance alone. Pairs of dimensions turn at different speeds.


def rope_frequencies(config: LLMConfig, device):
    """Angle per position of each pair of dimensions, (head_dim / 2,) in fp32: theta^(-2i / head_dim).

    Llama 3.1 and later were trained on `original_max_position_embeddings` first and then stretched: waves
    longer than that length / low_freq_factor are slowed down by `factor`, waves shorter than length /
    high_freq_factor are kept, and those between are blended.
    """
    even = torch.arange(0, config.head_dim, 2, device=device).float()  # (head_dim / 2,)
    frequencies = config.rope_theta ** -(even / config.head_dim)
    if config.rope_parameters is None:
        return frequencies
    rope = config.rope_parameters
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    turns = length * frequencies / (2 * math.pi)  # full turns within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short waves, 0: long ones
    return frequencies * (kept + (1 - kept) / rope["factor"])


def rope_tables(positions, frequencies, dtype):
    """cos and sin (B or 1, S, 1, head_dim / 2) of the angles at `positions` (B or 1, S), computed in fp32."""
    angles = positions[..., None, None].float() * frequencies  # (B, S, 1, head_dim / 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + half]) of x (B, S, H, head_dim) by its angle.

    This half-split layout is that of the Hugging Face weights. (Meta's own files pair 2i with 2i + 1: the
    same rotation of permuted weights.)
    """
    first, second = x.chunk(2, dim=-1)  # each (B, S, H, head_dim / 2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)  # (B, S, H, head_dim)


class KVCache:
    """Keys and values of every layer for up to `max_len` positions; made for one `generate`."""

    def __init__(self, config: LLMConfig, batch: int, max_len: int, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions filled so far; all layers of one pass write at the same place

    def append(self, layer: int, k, v):
        """Store k, v (B, key heads, S, head_dim) behind what is there; return all of this layer's so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, S: int):
        """All layers have appended S positions."""
        self.length += S


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads. (B, S, C) -> (B, R, C), of the
    R positions from `first` on."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.head_dim, self.layer = config.head_dim, layer
        _, has_bias, has_norm = FAMILIES[config.model_type]
        C, query_width = config.hidden_size, config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, query_width, has_bias)
        self.k_proj = nn.Linear(C, key_width, has_bias)
        self.v_proj = nn.Linear(C, key_width, has_bias)
        self.o_proj = nn.Linear(query_width, C, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if has_norm else nn.Identity()

    def forward(self, x, cos, sin, visible, cache, first):
        B, S, _ = x.shape
        R = S - first
        q = self.q_norm(self.q_proj(x[:, first:]).view(B, R, -1, self.head_dim))  # (B, R, H, head_dim)
        k = self.k_norm(self.k_proj(x).view(B, S, -1, self.head_dim))  # (B, S, key heads, head_dim)
        v = self.v_proj(x).view(B, S, -1, self.head_dim)  # (B, S, key heads, head_dim)
        # turned before they are transposed: so attention's result lies in memory as the last line needs it
        q = rotate(q, cos[:, first:], sin[:, first:]).transpose(1, 2)  # (B, H, R, head_dim)
        k, v = rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)  # (B, key heads, S, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # now start + S keys, the cached ones first
        is_causal = visible is None and (cache is None or S > 1)  # one query behind others sees them all
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal,
                                           enable_gqa=k.shape[1] != q.shape[1])  # (B, H, R, head_dim)
        return self.o_proj(x.transpose(1, 2).reshape(B, R, -1))  # (B, R, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm: attention, then the MLP, each added to what came in. (B, S, C) -> (B, R, C), of the R
    positions from `first` on, which see those before, too."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, visible=None, cache=None, first=0):
        x = x[:, first:] + self.self_attn(self.input_layernorm(x), cos, sin, visible, cache, first)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding table, blocks, final norm: what the checkpoints call `model`."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


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
        """The output matrix (V, C): its own, or the embedding table where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def embed(self, ids):
        return self.model.embed_tokens(ids)  # (B, S, C)

    def hidden(self, embeds, mask=None, cache=None, first: int = 0):
        """Last hidden states (B, S - first, C), after the final norm, of embeddings (B, S, C). Those before
        `first` are not asked for, and so the last block does not compute them: keys and values alone.

        `mask` (B, positions so far) is False at left padding; leave it out where nothing is padded on the
        left. Right padding needs no mask: attention is causal, so nothing real ever sees it. Positions count
        real tokens only. `cache` holds the earlier positions, and grows by S. ValueError beyond the LLM's
        positions.
        """
        B, S, _ = embeds.shape
        start = cache.length if cache is not None else 0
        if start + S > self.config.max_position_embeddings:
            raise ValueError(f"{start + S} positions; this LLM has {self.config.max_position_embeddings}")
        if mask is None:
            positions = torch.arange(start, start + S, device=embeds.device)[None]  # (1, S)
        else:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]  # (B, S)
        cos, sin = rope_tables(positions, rope_frequencies(self.config, embeds.device), embeds.dtype)
        visible = visible_positions(mask, start, S, embeds.device)
        *blocks, last = self.model.layers
        x = embeds
        for block in blocks:
            x = block(x, cos, sin, visible, cache)
        visible = visible_positions(mask, start, S, embeds.device, first) if first else visible
        x = last(x, cos, sin, visible, cache, first)  # (B, S - first, C)
        if cache is not None:
            cache.advance(S)
        return self.model.norm(x)  # (B, S - first, C)

    def logits(self, hidden):
        return F.linear(hidden, self.head_weight)  # (..., V)

    def forward(self, ids=None, embeds=None, mask=None, cache=None):
        """Logits (B, S, V) of `ids` (B, S), or of `embeds` (B, S, C) given in their place."""
        embeds = self.embed(ids) if embeds is None else embeds
        return self.logits(self.hidden(embeds, mask, cache))  # (B, S, V)

    @torch.no_grad()
    def generate(self, embeds, mask=None, max_new_tokens: int = 32, temperature: float = 0.0,
                 top_p: float = 1.0, end_tokens=()):
        """Continuation of left-padded prompts: embeddings (B, S, C), mask (B, S) -> new ids (B, <= max).

        Greedy at temperature 0; above it, sampled from the smallest set of tokens that holds `top_p` of the
        probability (Holtzman et al. 2020, arXiv 1904.09751), with torch's own random state. A row stops at
        one of the config's end tokens or of `end_tokens`, which is kept, and is filled up with NO_TOKEN
        behind it.
        """
        B, S, _ = embeds.shape
        if mask is not None:  # without padding attention needs none, and is faster
            mask = None if mask.all() else F.pad(mask, (0, max_new_tokens), value=True)  # (B, S + max)
        ends = self.config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), *end_tokens]
        ends = torch.tensor(ends, device=embeds.device)
        cache = KVCache(self.config, B, S + max_new_tokens, embeds.dtype, embeds.device)
        done = torch.zeros(B, dtype=torch.bool, device=embeds.device)
        new = []
        for length in range(S, S + max_new_tokens):
            seen = None if mask is None else mask[:, :length]
            hidden = self.hidden(embeds, seen, cache, first=embeds.shape[1] - 1)  # (B, 1, C)
            token = choose(self.logits(hidden[:, 0]), temperature, top_p)  # (B,)
            new.append(token.masked_fill(done, NO_TOKEN))
            done |= torch.isin(token, ends)
            if done.all():
                break
            embeds = self.embed(token)[:, None]  # (B, 1, C): the cache knows the rest
        return torch.stack(new, dim=1)  # (B, <= max_new_tokens)

    def hidden_behind(self, embeds, mask, ends) -> list:
        """Last hidden states (B, T, C) for each of `ends`, ids (B, T), right behind the same left-padded
        prompts: embeddings (B, S, C), mask (B, S). The prompts are computed once: the cache is wound back."""
        B, S, _ = embeds.shape
        longest = max(ids.shape[1] for ids in ends)
        cache, found = KVCache(self.config, B, S + longest, embeds.dtype, embeds.device), []
        self.hidden(embeds, mask, cache)
        for ids in ends:
            cache.length = S  # what the one before has stored there is overwritten
            seen = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)  # (B, S + T)
            found.append(self.hidden(self.embed(ids), seen, cache))
        return found

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """The frozen LLM of a folder of one of FAMILIES. Strict: see weights.load_strictly."""
        folder = resolve_model(folder_or_id)
        with torch.device("meta"):  # shapes only; the weights come from the files
            llm = cls(load_llm_config(folder))
        rename = partial(our_llm_name, is_tied=llm.config.tie_word_embeddings)
        load_strictly(llm, read_weights(folder), folder, dtype, device, rename)
        return llm.requires_grad_(False).eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers opens as what it was loaded from."""
        architecture = FAMILIES[self.config.model_type][0]
        config = llm_config_to_dict(self.config, architecture)
        write_weights(dict(self.named_parameters()), folder, config)


NO_TOKEN = -1  # what stands behind the end of a finished row


def choose(logits, temperature: float, top_p: float):
    """The next token (B,) of each row of logits (B, V): see `generate`."""
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probabilities, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    before = probabilities.cumsum(-1) - probabilities  # (B, V) what likelier tokens hold together
    kept = probabilities.masked_fill(before >= top_p, 0)  # the likeliest always stays
    return tokens.gather(1, torch.multinomial(kept, 1))[:, 0]  # (B,)


def visible_positions(mask, start: int, S: int, device, first: int = 0):
    """What each of S new queries, from `first` on, may see, (B or 1, 1, S - first, start + S) boolean; None
    means plain causal attention, which of a single query is all.

    One explicit mask or `is_causal`, never both: where the two meet, a padded row can lose all its keys and
    turn to NaN. For the same reason every position may see itself, padding included.
    """
    if mask is None and (start + first == 0 or S == 1):
        return None
    query = torch.arange(start + first, start + S, device=device)[:, None]  # (S - first, 1)
    key = torch.arange(start + S, device=device)[None]  # (1, start + S)
    causal = key <= query  # (S - first, start + S)
    if mask is None:
        return causal[None, None]  # (1, 1, S - first, start + S)
    return (causal & (mask[:, None, :] | (key == query)))[:, None]  # (B, 1, S - first, start + S)


# ------------------------------------------------------------------------------------------------------------
# For training: blocks that are compiled, and that compute again in backward what they did not keep

def checkpointed(function):
    """`function`, keeping only its arguments for backward: the rest is computed again when backward first
    asks.

    While it runs, each tensor that autograd wants to save is replaced by its number. When backward asks for
    the first of them, the function runs a second time, and what autograd saves then is given out under these
    numbers. (The older way, an autograd.Function that calls backward inside its own, fires a shared module's
    hooks twice.)
    """
    def run(*args):
        if not torch.is_grad_enabled():
            return function(*args)
        state, numbers, saved = random_state(), itertools.count(), {}

        def unpack(number):
            if number not in saved:
                saved.update(enumerate(saved_tensors(function, args, state)))
            return saved.pop(number)

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: next(numbers), unpack):
            return function(*args)

    return run


def saved_tensors(function, args, state: list) -> list:
    """What autograd saves in a run of `function`, in order: a second run, with the first's random state."""
    tensors, detached = [], []
    for arg in args:
        is_tensor = isinstance(arg, torch.Tensor)
        detached.append(arg.detach().requires_grad_(arg.requires_grad) if is_tensor else arg)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x.detach()), lambda _: None)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus), torch.enable_grad(), hooks:
        set_random_state(state)
        function(*detached)
    return tensors


def random_state() -> list:
    """Of the CPU and, where there is one, of this rank's GPU."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(state: list):
    for set_state, value in zip((torch.set_rng_state, torch.cuda.set_rng_state), state):
        set_state(value)


def checkpoint_blocks(blocks, which: str):
    """"every" block, "every-other" (half the recomputation for half the saving), or "none"."""
    for i, block in enumerate(blocks):
        if which == "every" or (which == "every-other" and i % 2 == 0):
            block.forward = checkpointed(block.forward)


def compile_blocks(blocks):
    """One graph for all blocks and lengths, and a few for a last block that computes a part; before
    `checkpoint_blocks`, which runs it twice."""
    compiled = torch.compile(type(blocks[0]).forward, dynamic=True)
    for block in blocks:
        block.forward = partial(compiled, block)


# ------------------------------------------------------------------------------------------------------------
# On disk: config.json and the names of the tensors

def load_llm_config(folder_or_id) -> LLMConfig:
    """The sizes of the LLM in a folder or on the Hub, without its weights."""
    folder = resolve(folder_or_id, ["*.json"])
    with named(folder):
        return llm_config_from_dict(LLMConfig, read_config(folder, FAMILIES), folder)
