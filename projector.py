"""The bridge between the towers: a projector from ViT width to LLM width, and the model that joins the three.

    vlm = VLM.from_towers("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", "mlp2x_gelu")
    vlm = VLM.from_pretrained("runs/7b/instruct")              # what train.py wrote
    patches = vlm.encode(pixels)                               # (B, 3, H, W) -> (B, N, C)
    new = vlm.generate(ids, pixels, max_new_tokens=32)         # ids with N placeholders for each image

LLaVA (Liu et al. 2023, arXiv 2304.08485; version 1.5: 2310.03744) joins two finished models with the smallest
possible part. One linear map (1.0) or a two-layer MLP (1.5) turns each patch feature into a vector, which the
LLM reads as if it were a word. In the sequence an image is N placeholder ids. `splice` puts the projected
patches in their place. plumbing/llava.py knows the formats of other people's models on disk.

Read next: losses.py (what pulls projected patches towards words).
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import IMAGE_MARKER, SYSTEM, v1
from llm import FAMILIES, LLM
from plumbing import clip, llama, llava
from plumbing.files import TOKENIZER_FILES, copy_files, named
from plumbing.llava import find_projector
from plumbing.tokenizer import tokenizer_folder
from plumbing.weights import load_strictly, write_weights
from vit import ViT


# ------------------------------------------------------------------------------------------------------------
# Projectors: (B, P, D) -> (B, N, C)

class PixelShuffle(nn.Module):
    """Join each 2 x 2 square of patches into one token (torch: unshuffle), by an MLP of all 4: N = P / 4."""

    def __init__(self, D: int, C: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * D, C), nn.GELU(), nn.Linear(C, C))

    def forward(self, x):
        B, P, D = x.shape
        half = math.isqrt(P) // 2
        x = x.view(B, half, 2, half, 2, D).transpose(2, 3)  # (B, half, half, 2, 2, D)
        return self.mlp(x.reshape(B, P // 4, 4 * D))  # (B, N, C)


class Resampler(nn.Module):
    """N = P / 4 learned queries collect from all patches by one round of attention.

    A small cousin of Flamingo's (Alayrac et al. 2022, arXiv 2204.14198). Its tokens carry no position.
    """

    def __init__(self, P: int, D: int, C: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(P // 4, C) * C**-0.5)
        self.norm = nn.LayerNorm(D)
        self.key = nn.Linear(D, C)
        self.value = nn.Linear(D, C)
        self.out = nn.Linear(C, C)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, heads, L, C / heads)

    def forward(self, x):
        B, P, D = x.shape
        x = self.norm(x)
        q = self.split_heads(self.queries.expand(B, -1, -1))  # (B, heads, N, C / heads)
        k = self.split_heads(self.key(x))  # (B, heads, P, C / heads)
        v = self.split_heads(self.value(x))  # (B, heads, P, C / heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, N, C)


def build_projector(kind: str, P: int, D: int, C: int) -> nn.Module:
    """A fresh projector, which knows its `num_tokens` N.

    `kind`: linear, mlpKx_gelu (K linear layers), pixel_shuffle or resampler. The parameters of the first two
    have the names of LLaVA's own checkpoints.
    """
    mlp = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    N = P
    if kind == "linear":
        projector = nn.Linear(D, C)
    elif mlp:
        further = []
        for _ in range(int(mlp[1]) - 1):
            further += [nn.GELU(), nn.Linear(C, C)]
        projector = nn.Sequential(nn.Linear(D, C), *further)
    elif kind == "pixel_shuffle":
        if math.isqrt(P) % 2:
            raise ValueError(f"pixel_shuffle joins 2 x 2 patches; {math.isqrt(P)} in a row cannot be halved")
        projector = PixelShuffle(D, C)
        N = P // 4
    elif kind == "resampler":
        projector = Resampler(P, D, C)
        N = P // 4
    else:
        raise ValueError(f"projector {kind!r} is none of linear, mlp[1-9]x_gelu, pixel_shuffle, resampler")
    projector.num_tokens = N
    return projector


# ------------------------------------------------------------------------------------------------------------
# The model

class VLM(nn.Module):
    """Image -> vit -> projector -> llm: the three parts, and how an image enters the sequence.

    `sources` says which folders or Hub ids the towers came from: {"vit": ..., "llm": ...}.
    """

    def __init__(self, vit: ViT, llm: LLM, projector_kind: str, sources=None):
        super().__init__()
        self.vit = vit
        self.llm = llm
        self.projector_kind = projector_kind
        self.projector = build_projector(
            projector_kind, vit.num_patches, vit.config.hidden_size, llm.config.hidden_size)
        self.sources = sources or {}
        self.image_token_id = IMAGE_MARKER
        self.template = None  # the name of the template that the model was tuned with

    @property
    def num_image_tokens(self) -> int:
        return self.projector.num_tokens  # N

    def encode(self, pixels):
        """Projected patches: (B, 3, H, W) -> (B, N, C). Also takes the ViT's features (B, P, D), if known."""
        features = pixels
        if pixels.ndim == 4:
            with torch.no_grad():  # the ViT is frozen in every stage
                features = self.vit(pixels)  # (B, P, D)
        return self.projector(features)  # (B, N, C)

    def splice(self, ids, patches, image_at=None):
        """Replace the placeholders in `ids` (B, S) by `patches` (I, N, C): embeddings (B, S, C).

        `image_at` (I N,) says where the placeholders stand in the flattened ids. data.collate finds that on
        the CPU, so that a GPU does not have to synchronise. The images come in reading order.

        A batch of text alone still runs the projector, on one image of zeros, and takes none of its rows. So
        its gradient is zero, but it is there: the ranks add gradients up, and none must wait for another's.
        """
        B, S = ids.shape
        I, N, C = patches.shape
        if image_at is None:
            image_at = self.find_placeholders(ids)  # (I N,)
        if len(image_at) != I * N and (len(image_at), I) != (0, 1):  # (0, 1): text alone
            raise ValueError(f"{len(image_at)} placeholders; {I} images of {N} tokens")
        # The placeholder may have no row in the embedding table. Any row will do: it is replaced.
        words = ids.masked_fill(ids == self.image_token_id, 0)  # (B, S)
        embeds = self.llm.embed(words).flatten(0, 1)  # (B S, C)
        patches = patches.to(embeds.dtype).flatten(0, 1)  # (I N, C)
        # This line is how LLaVA's LLM sees: row by row, image by image, patch by patch.
        embeds.index_copy_(0, image_at, patches[: len(image_at)])
        return embeds.view(B, S, C)  # (B, S, C)

    def find_placeholders(self, ids):
        """Places of the placeholders in the flattened ids (B, S): (I N,). On a GPU this call synchronises."""
        is_image = ids == self.image_token_id  # (B, S)
        counts = is_image.sum(1)  # (B,)
        if (counts % self.num_image_tokens).any():
            raise ValueError(f"{counts.tolist()} placeholders in the rows; "
                             f"an image has {self.num_image_tokens}")
        return is_image.flatten().nonzero()[:, 0]  # (I N,)

    def forward(self, ids, pixels, mask=None):
        """Logits (B, S, V) at every position. Training needs only a few of them and calls `llm.hidden`."""
        embeds = self.splice(ids, self.encode(pixels))  # (B, S, C)
        return self.llm.logits(self.llm.hidden(embeds, mask))  # (B, S, V)

    @torch.no_grad()
    def generate(self, ids, pixels, max_new_tokens: int = 32, mask=None, **how):
        """Answer left-padded prompts: ids, mask (B, S), pixels (I, 3, H, W) -> (B, <= max_new_tokens).

        Greedy, unless `how` has a temperature (see LLM.generate: also top_p, end_tokens).
        """
        return self.llm.generate(self.splice(ids, self.encode(pixels)), mask, max_new_tokens, **how)

    @classmethod
    def from_towers(cls, vit, llm, projector="mlp2x_gelu", feature_layer=-2, dtype=torch.float32,
                    device="cpu"):
        """Two pretrained towers (folders or Hub ids), frozen, and a fresh projector between them."""
        sources = {"vit": str(vit), "llm": str(llm)}
        vit = ViT.from_pretrained(vit, feature_layer, dtype, device)
        llm = LLM.from_pretrained(llm, dtype, device)
        vlm = cls(vit, llm, projector, sources)
        vlm.projector.to(device, dtype)
        return vlm

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """The frozen model of a run directory, or of a folder in transformers' LLaVA format (such as
        llava-hf/llava-1.5-7b-hf) or in LLaVA's own (liuhaotian/llava-v1.5-7b)."""
        with named(folder, "cannot be opened"):
            found = llava.describe(folder)
            vlm = cls.from_towers(
                found["vit"], found["llm"], found["projector"], found["feature_layer"], dtype, device)
            vlm.load_projector(folder, dtype, device)
        vlm.image_token_id = found.get("image_token_id", IMAGE_MARKER)
        vlm.template = found["template"]
        return vlm.requires_grad_(False).eval()

    def load_projector(self, folder, dtype=torch.float32, device="cpu") -> list:
        """Load the projector of any folder that `from_pretrained` opens, or of LLaVA's mm_projector.bin.
        Return the names of its tensors."""
        place = find_projector(folder)
        load_strictly(self.projector, llava.read_projector(place), place, dtype, device)
        return [f"projector.{name}" for name, _ in self.projector.named_parameters()]

    def save(self, folder, config: dict, with_llm: bool):
        """Write a run directory: `config` with our own keys, the projector, and in llm/ a tuned LLM.

        Towers that no stage changed are not copied: config.json names their folders.
        """
        if with_llm:
            self.llm.save_pretrained(Path(folder) / "llm")
            copy_files(tokenizer_folder(self.sources["llm"]), TOKENIZER_FILES, Path(folder) / "llm")
        ours = self.sources | {"projector": self.projector_kind, "feature_layer": self.vit.feature_layer}
        write_weights(dict(self.projector.named_parameters()), folder, config | ours, "projector.safetensors")

    def export(self, folder):
        """Write a folder that transformers opens as a LlavaForConditionalGeneration: weights, config.json,
        tokenizer, processor."""
        vit, llm = self.vit.config, self.llm.config
        settings = {"projector": self.projector_kind, "feature_layer": self.vit.feature_layer,
                    "image_tokens": self.num_image_tokens, "has_class_token": vit.family.class_token,
                    "tokenizer": self.sources["llm"], "template": self.template}
        vision = clip.config_json(vit)
        text = llama.config_json(llm, FAMILIES[llm.model_type].architecture)
        llava.export(folder, self.named_parameters(), vision, text, settings, SYSTEM, v1)
        clip.write_preprocessor_config(vit, folder, "pad")  # as instruct trains and eval.py asks
