"""The bridge between the towers: a projector from ViT width to LLM width, and the model that joins the three parts.

    vlm = VLM.from_towers("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", "mlp2x_gelu")
    vlm = VLM.from_pretrained("runs/7b/instruct")              # what train.py wrote
    patches = vlm.encode(pixels)                               # (B, 3, H, W) -> (B, N, C)
    new = vlm.generate(ids, pixels, max_new_tokens=32)         # ids with N placeholders for each image

LLaVA (Liu et al. 2023, arXiv 2304.08485; version 1.5: 2310.03744) joins two finished models with the smallest
possible part: each patch feature becomes, by one linear map (1.0) or a two-layer MLP (1.5), a vector that the LLM
reads as if it were a word. In the sequence an image is N placeholder ids; `splice` puts the projected patches in
their place.

Read next: losses.py (what pulls the projected patches towards the words), then data.py (where ids come from).
"""

import json
import math
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llm import LLM, LLMConfig
from vit import (TOKENIZER, ViT, ViTConfig, load_strictly, read_config, read_json, read_shard, read_weights, resolve,
                 write_looks, write_weights)

IMAGE_TOKEN_ID = -200  # LLaVA's placeholder: no row of the embedding table, so no vocabulary has to grow


# ----------------------------------------------------------------------------------------------------------------
# Projectors: (B, N, D) -> (B, `num_tokens(N)`, C)


class PixelShuffle(nn.Module):
    """Each 2 x 2 square of patches becomes one token, an MLP of the four side by side: a quarter of the tokens."""

    def __init__(self, D: int, C: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * D, C), nn.GELU(), nn.Linear(C, C))

    def forward(self, x):
        B, N, D = x.shape
        side = math.isqrt(N)
        x = x.view(B, side // 2, 2, side // 2, 2, D).transpose(2, 3)  # (B, side / 2, side / 2, 2, 2, D)
        return self.mlp(x.reshape(B, N // 4, 4 * D))  # (B, N / 4, C)


class Resampler(nn.Module):
    """A quarter as many learned queries as patches; each gathers what it wants from all of them by one round of
    attention. (A small cousin of Flamingo's, Alayrac et al. 2022, arXiv 2204.14198.) The tokens have no place."""

    def __init__(self, N: int, D: int, C: int, heads: int = 4):
        super().__init__()
        self.heads, self.queries = heads, nn.Parameter(torch.randn(N // 4, C) * C**-0.5)
        self.norm, self.key, self.value, self.out = nn.LayerNorm(D), nn.Linear(D, C), nn.Linear(D, C), nn.Linear(C, C)

    def forward(self, x):
        B, N, D = x.shape
        x = self.norm(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or N / 4, C / heads)
                   for y in (self.queries.expand(B, -1, -1), self.key(x), self.value(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N / 4, C)


def build_projector(kind: str, N: int, D: int, C: int) -> nn.Module:
    """A fresh projector: linear, mlpNx_gelu (N linear layers), pixel_shuffle or resampler. Parameter names of the first
    two are those of LLaVA's own checkpoints."""
    if kind == "linear":
        return nn.Linear(D, C)
    if layers := re.fullmatch(r"mlp([1-9])x_gelu", kind):
        more = [layer for _ in range(int(layers[1]) - 1) for layer in (nn.GELU(), nn.Linear(C, C))]
        return nn.Sequential(nn.Linear(D, C), *more)
    if kind == "pixel_shuffle" and math.isqrt(N) % 2 == 0:
        return PixelShuffle(D, C)
    if kind == "resampler":
        return Resampler(N, D, C)
    if kind == "pixel_shuffle":
        raise ValueError(f"pixel_shuffle joins 2 x 2 patches; {math.isqrt(N)} in a row cannot be halved")
    raise ValueError(f"projector {kind!r} is none of linear, mlpNx_gelu (such as mlp2x_gelu), pixel_shuffle, resampler")


def num_tokens(kind: str, N: int) -> int:
    """How many tokens a projector makes of N patches."""
    return N // 4 if kind in ("pixel_shuffle", "resampler") else N


# ----------------------------------------------------------------------------------------------------------------
# The model


class VLM(nn.Module):
    """Image -> vit -> projector -> llm. It holds the three parts and says how an image enters the sequence."""

    def __init__(self, vit: ViT, llm: LLM, projector_kind: str, sources=None):
        super().__init__()
        self.vit, self.llm, self.projector_kind = vit, llm, projector_kind
        self.projector = build_projector(projector_kind, vit.num_tokens, vit.config.hidden_size,
                                         llm.config.hidden_size)
        self.sources = sources or {}  # where the towers came from: {"vit": folder or id, "llm": folder or id}
        self.image_token_id = IMAGE_TOKEN_ID

    @property
    def num_image_tokens(self) -> int:
        return num_tokens(self.projector_kind, self.vit.num_tokens)  # N, nowhere else computed

    def encode(self, pixels):
        """Projected patches: (B, 3, H, W) -> (B, N, C). The ViT is frozen in every stage."""
        with torch.no_grad():
            features = self.vit(pixels.to(self.vit.dtype))  # (B, N, D)
        return self.projector(features)  # (B, N, C)

    def splice(self, ids, patches):
        """Embeddings (B, S, C) of `ids` (B, S), each image's N placeholders replaced by a row of `patches` (I, N, C).

        The images come in reading order, I of them in the whole batch. A batch without any placeholder takes (and
        ignores) one image, so that every rank runs the same modules in every step.
        """
        B, S = ids.shape
        here = ids == self.image_token_id  # (B, S)
        per_row = here.sum(1)  # (B,)
        odd = per_row % self.num_image_tokens != 0
        if odd.any() or (per_row.sum() != patches.shape[0] * patches.shape[1] and here.any()):
            row = int(odd.float().argmax()) if odd.any() else "?"
            raise ValueError(f"row {row} of the batch: placeholders per row are {per_row.tolist()}, and "
                             f"{patches.shape[0]} images bring {self.num_image_tokens} tokens each")
        embeds = self.llm.embed(ids.masked_fill(here, 0))  # (B, S, C)
        return embeds.masked_scatter(here[..., None], patches.to(embeds.dtype))  # (B, S, C)

    def forward(self, ids, pixels, mask=None):
        """Logits (B, S, V) at every position. Training asks `llm.hidden` instead, and needs few of them."""
        return self.llm(embeds=self.splice(ids, self.encode(pixels)), mask=mask)

    @torch.no_grad()
    def generate(self, ids, pixels, max_new_tokens: int = 32, mask=None, temperature: float = 0.0, top_p: float = 1.0):
        """Answers to left-padded prompts: ids, mask (B, S), pixels (I, 3, H, W) -> (B, <= max_new_tokens). Greedy, or
        sampled: see LLM.generate."""
        return self.llm.generate(self.splice(ids, self.encode(pixels)), mask, max_new_tokens, temperature, top_p)

    # ---- on disk ----------------------------------------------------------------------------------------------

    @classmethod
    def from_towers(cls, vit, llm, projector="mlp2x_gelu", feature_layer=-2, dtype=torch.float32, device="cpu"):
        """Two pretrained towers (folders or Hub ids), frozen, and a fresh projector between them."""
        vlm = cls(ViT.from_pretrained(vit, feature_layer, dtype, device), LLM.from_pretrained(llm, dtype, device),
                  projector, {"vit": str(vit), "llm": str(llm)})
        vlm.projector.to(device, dtype)
        return vlm

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A run directory: config.json, projector.safetensors and, once it has been tuned, llm/. Or a folder that
        transformers' LlavaForConditionalGeneration wrote, such as llava-hf/llava-1.5-7b-hf."""
        folder = resolve(folder)
        config = read_json(folder / "config.json")
        if config.get("model_type") == "llava":
            return cls.from_llava(folder, dtype, device)
        for name, kind in (("vit", str), ("llm", str), ("projector", str), ("feature_layer", int)):
            if not isinstance(config.get(name), kind):
                raise ValueError(f"{folder}/config.json: {name} is {config.get(name)!r}; a run directory has "
                                 f"{'a number' if kind is int else 'a name'} there")
        if config.get("stage") == "instruct" and not (folder / "llm").is_dir():
            raise FileNotFoundError(f"{folder}/llm: no such folder; this run tuned the LLM and has lost it")
        llm = folder / "llm" if (folder / "llm").is_dir() else config["llm"]
        vlm = cls.from_towers(config["vit"], llm, config["projector"], config["feature_layer"], dtype, device)
        vlm.load_projector(folder, dtype, device)
        return vlm.eval()

    def load_projector(self, folder, dtype=torch.float32, device="cpu") -> list:
        """Load projector.safetensors of a run directory, strictly; return the names of the tensors loaded."""
        file = Path(folder) / "projector.safetensors"
        load_strictly(self.projector, read_shard(file), file, dtype, device)
        return [f"projector.{name}" for name, _ in self.projector.named_parameters()]

    def save(self, folder, config: dict, with_llm: bool):
        """Write a run directory that `from_pretrained` opens. `config` is kept in config.json beside our own keys.

        Towers that no stage changed are not copied; config.json says where they are.
        """
        ours = self.sources | {"projector": self.projector_kind, "feature_layer": self.vit.feature_layer}
        write_weights(dict(self.projector.named_parameters()), folder, config | ours, "projector.safetensors")
        if with_llm:
            self.llm.save_pretrained(folder / "llm")
            source = resolve(self.sources["llm"], TOKENIZER)  # the tokenizer goes where its LLM goes
            for file in [file for pattern in TOKENIZER for file in source.glob(pattern)]:
                shutil.copy(file, Path(folder) / "llm")

    @classmethod
    def from_llava(cls, folder, dtype=torch.float32, device="cpu"):
        """A folder in transformers' LLaVA format: one config.json for both towers, all weights under one index."""
        config = read_config(folder, ("llava",))
        if config["projector_hidden_act"] != "gelu" or not isinstance(config["vision_feature_layer"], int):
            raise ValueError(f"{folder}: only a GELU projector over a single feature layer is supported")
        with torch.device("meta"):
            vit = ViT(ViTConfig.from_dict(config["vision_config"], folder), config["vision_feature_layer"])
            llm = LLM(LLMConfig.from_dict(config["text_config"], folder))
            vlm = cls(vit, llm, "mlp2x_gelu", {"vit": str(folder), "llm": str(folder)})
        if (config["vision_feature_select_strategy"] == "default") != vit.config.class_token:
            raise ValueError(f"{folder}: vision_feature_select_strategy "
                             f"{config['vision_feature_select_strategy']!r} does not drop just the class token")
        vlm.image_token_id = config.get("image_token_index") or config["image_token_id"]
        tensors = ((our_name(name), tensor) for name, tensor in read_weights(folder)
                   if not (vlm.llm.config.tie_word_embeddings and name.endswith("lm_head.weight"))
                   and not name.endswith(("position_ids", "inv_freq")) and ".head." not in name)
        return load_strictly(vlm, tensors, folder, dtype, device)

    def export(self, folder):
        """Write what transformers opens as a LlavaForConditionalGeneration: weights, config, tokenizer, processor.

        There, the placeholder is a token of its own, `<image>`, with a row in the embedding table that is never read;
        where the table has no spare row for it, it grows by one.
        """
        from transformers import AutoTokenizer
        if self.projector_kind != "mlp2x_gelu":
            raise ValueError(f"transformers' LLaVA has no projector {self.projector_kind!r}, only mlp2x_gelu")
        if self.vit.config.model_type == "dinov2":
            raise ValueError("a DINOv2 tower is read, not written")
        folder, llm, vit = Path(folder), self.llm.config, self.vit.config
        tokenizer = AutoTokenizer.from_pretrained(resolve(self.sources["llm"], TOKENIZER))
        tokenizer.add_tokens("<image>", special_tokens=True)
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        vocab_size = max(llm.vocab_size, image_token_id + 1)
        tensors = {}
        for name, parameter in self.named_parameters():
            tensor = parameter.detach()
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = F.pad(tensor, (0, 0, 0, vocab_size - llm.vocab_size))  # (vocab_size, C)
            tensors[their_name(name)] = tensor
        write_weights(tensors, folder, {
            "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
            "vision_config": vit.to_dict(), "text_config": llm.to_dict() | {"vocab_size": vocab_size},
            "image_token_index": image_token_id, "image_seq_length": self.num_image_tokens,
            "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_feature_layer": self.vit.feature_layer, "tie_word_embeddings": llm.tie_word_embeddings,
            "vision_feature_select_strategy": "default" if vit.class_token else "full"})
        (folder / "generation_config.json").write_text(json.dumps(
            {"bos_token_id": llm.bos_token_id, "eos_token_id": llm.eos_token_id,
             "pad_token_id": tokenizer.pad_token_id}))
        tokenizer.save_pretrained(folder)
        write_looks(vit, folder)
        (folder / "processor_config.json").write_text(json.dumps(
            {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": vit.patch_size,
             "num_additional_image_tokens": int(vit.class_token),
             "vision_feature_select_strategy": "default" if vit.class_token else "full"}))


def our_name(name: str) -> str:
    """Of a tensor in transformers' LLaVA format, the name in VLM; there are an older and a newer form of it."""
    name = name.removeprefix("model.")
    name = re.sub(r"^vision_tower\.(vision_model\.)?", "vit.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "llm.model.", name)  # newer form
    name = re.sub(r"^language_model\.|^(?=lm_head\.)", "llm.", name)
    return re.sub(r"^multi_modal_projector\.linear_([12])\.", lambda m: f"projector.{2 * int(m[1]) - 2}.", name)


def their_name(name: str) -> str:
    """The other way round, in the older form, which every version of transformers reads."""
    name = re.sub(r"^vit\.", "vision_tower.vision_model.", re.sub(r"^llm\.", "language_model.", name))
    return re.sub(r"^projector\.([02])\.", lambda m: f"multi_modal_projector.linear_{int(m[1]) // 2 + 1}.", name)
