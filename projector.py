"""The bridge between the towers: a projector from ViT width to LLM width, and the model that joins the three.

    vlm = VLM.from_towers("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", "mlp2x_gelu")
    vlm = VLM.from_pretrained("runs/7b/instruct")              # what train.py wrote
    patches = vlm.encode(pixels)                               # (B, 3, H, W) -> (B, N, C)
    new = vlm.generate(ids, pixels, max_new_tokens=32)         # ids with N placeholders for each image

LLaVA (Liu et al. 2023, arXiv 2304.08485; version 1.5: 2310.03744) joins two finished models with the smallest
possible part: each patch feature becomes, by one linear map (1.0) or a two-layer MLP (1.5), a vector that the
LLM reads as if it were a word. In the sequence an image is N placeholder ids; `splice` puts the projected
patches in their place.

Read next: losses.py (what pulls the projected patches towards the words), then data.py (where ids come from).
"""

import math
import re
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llm import FAMILIES, LLM, LLMConfig
from plumbing.clip import vit_config_from_dict
from plumbing.files import TOKENIZER_FILES, named, read_json, resolve, resolve_model
from plumbing.llama import llm_config_from_dict, our_llm_name
from plumbing.llava import export_llava, find_projector, our_name
from plumbing.weights import load_strictly, read_config, read_shard, read_weights, write_weights
from vit import ViT, ViTConfig

# The placeholder: N of them in a batch's ids stand for one image. LLaVA's number, chosen because it is no row
# of the embedding table, so no vocabulary has to grow. (data.IMAGE_MARKER, which stands once, is replaced by
# these.)
IMAGE_TOKEN_ID = -200


# ------------------------------------------------------------------------------------------------------------
# Projectors: (B, P, D) -> (B, N, C). Each knows its `num_tokens` N.

class PixelShuffle(nn.Module):
    """Each 2 x 2 square of patches becomes one token, an MLP of the four side by side: N = P / 4."""

    def __init__(self, D: int, C: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * D, C), nn.GELU(), nn.Linear(C, C))

    def forward(self, x):
        B, P, D = x.shape
        half = math.isqrt(P) // 2
        x = x.view(B, half, 2, half, 2, D).transpose(2, 3)  # (B, half, half, 2, 2, D)
        return self.mlp(x.reshape(B, P // 4, 4 * D))  # (B, N, C)


class Resampler(nn.Module):
    """N = P / 4 learned queries; each gathers what it wants from all patches by one round of attention. (A
    small cousin of Flamingo's, Alayrac et al. 2022, arXiv 2204.14198.) Its tokens carry no position."""

    def __init__(self, P: int, D: int, C: int, heads: int = 4):
        super().__init__()
        self.heads, self.queries = heads, nn.Parameter(torch.randn(P // 4, C) * C**-0.5)
        self.norm = nn.LayerNorm(D)
        self.key, self.value, self.out = nn.Linear(D, C), nn.Linear(D, C), nn.Linear(C, C)

    def forward(self, x):
        B, P, D = x.shape
        x = self.norm(x)
        q = self.queries.expand(B, -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, .)
        k = self.key(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, P, C / heads)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, P, C / heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)


def build_projector(kind: str, P: int, D: int, C: int) -> nn.Module:
    """A fresh projector: linear, mlpKx_gelu (K linear layers), pixel_shuffle or resampler. The parameter
    names of the first two are those of LLaVA's own checkpoints. ValueError for any other kind, and where P
    does not fit."""
    if kind == "linear":
        projector, N = nn.Linear(D, C), P
    elif match := re.fullmatch(r"mlp([1-9])x_gelu", kind):
        more = []
        for _ in range(int(match[1]) - 1):
            more += [nn.GELU(), nn.Linear(C, C)]
        projector, N = nn.Sequential(nn.Linear(D, C), *more), P
    elif kind == "pixel_shuffle":
        if math.isqrt(P) % 2:
            raise ValueError(f"pixel_shuffle joins 2 x 2 patches; {math.isqrt(P)} in a row cannot be halved")
        projector, N = PixelShuffle(D, C), P // 4
    elif kind == "resampler":
        projector, N = Resampler(P, D, C), P // 4
    else:
        raise ValueError(f"projector {kind!r} is none of linear, mlp[1-9]x_gelu, pixel_shuffle, resampler")
    projector.num_tokens = N
    return projector


# ------------------------------------------------------------------------------------------------------------
# The model

class VLM(nn.Module):
    """Image -> vit -> projector -> llm: the three parts, and how an image enters the sequence."""

    def __init__(self, vit: ViT, llm: LLM, projector_kind: str, sources=None):
        super().__init__()
        self.vit, self.llm, self.projector_kind = vit, llm, projector_kind
        self.projector = build_projector(projector_kind, vit.num_patches, vit.config.hidden_size,
                                         llm.config.hidden_size)
        self.sources = sources or {}  # where the towers came from: {"vit": folder or id, "llm": folder or id}
        self.image_token_id, self.template = IMAGE_TOKEN_ID, None  # the template that it was tuned with

    @property
    def num_image_tokens(self) -> int:
        return self.projector.num_tokens  # N

    def encode(self, pixels):
        """Projected patches: (B, 3, H, W) -> (B, N, C). The ViT is frozen in every stage; where its features
        (B, P, D) are known already, they take the place of the pixels."""
        with torch.no_grad():
            features = self.vit(pixels) if pixels.ndim == 4 else pixels  # (B, P, D)
        return self.projector(features)  # (B, N, C)

    def image_places(self, ids, I: int):
        """(I N,) where in the flattened ids (B, S) the placeholders of I images stand, or (0,). ValueError
        where the numbers do not fit. Of ids on a GPU, it must be waited for."""
        is_image, N = ids == self.image_token_id, self.num_image_tokens  # (B, S)
        counts = is_image.sum(1)  # (B,) the placeholders of each row
        if (counts % N).any() or counts.sum() not in (0, I * N):
            raise ValueError(f"{counts.tolist()} placeholders in the rows; {I} images of {N} tokens")
        return is_image.flatten().nonzero()[:, 0]

    def splice(self, ids, patches, places=None):
        """Embeddings (B, S, C) of `ids` (B, S), each image's N placeholders replaced by a row of patches (I,
        N, C). `places`: those of `image_places`, where they are known.

        The images come in reading order, I of them in the whole batch. A batch without any placeholder takes
        (and ignores) one image, so that the projector gets a gradient, of zero, from a batch of text too: in
        data parallelism every rank must take part in every sum. ValueError where the numbers do not fit. """
        B, S = ids.shape
        places = self.image_places(ids, len(patches)) if places is None else places
        # The placeholder is no row of the embedding table; any row does, as what stands there is replaced.
        embeds = self.llm.embed(ids.masked_fill(ids == self.image_token_id, 0)).flatten(0, 1)  # (B S, C)
        # The places in reading order are filled from `patches` in reading order: row by row, image by image,
        # patch by patch. This one line is how LLaVA's LLM sees.
        embeds.index_copy_(0, places, patches.to(embeds.dtype).flatten(0, 1)[: len(places)])
        return embeds.view(B, S, -1)  # (B, S, C)

    def forward(self, ids, pixels, mask=None):
        """Logits (B, S, V) at every position. Training asks `llm.hidden` instead, and needs few of them."""
        return self.llm(embeds=self.splice(ids, self.encode(pixels)), mask=mask)

    @torch.no_grad()
    def generate(self, ids, pixels, max_new_tokens: int = 32, mask=None, **how):
        """Answers to left-padded prompts: ids, mask (B, S), pixels (I, 3, H, W) -> (B, <= max_new_tokens).
        Greedy; `how` passes temperature, top_p and end_tokens on to LLM.generate."""
        return self.llm.generate(self.splice(ids, self.encode(pixels)), mask, max_new_tokens, **how)

    @classmethod
    def from_towers(cls, vit, llm, projector="mlp2x_gelu", feature_layer=-2, dtype=torch.float32,
                    device="cpu"):
        """Two pretrained towers (folders or Hub ids), frozen, and a fresh projector between them."""
        sources = {"vit": str(vit), "llm": str(llm)}
        vlm = cls(ViT.from_pretrained(vit, feature_layer, dtype, device),
                  LLM.from_pretrained(llm, dtype, device), projector, sources)
        vlm.projector.to(device, dtype)
        return vlm

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A run directory, or a folder that transformers' LlavaForConditionalGeneration wrote, such as
        llava-hf/llava-1.5-7b-hf. Frozen."""
        folder = resolve_model(folder)
        config = read_json(folder / "config.json")
        with named(folder, "cannot be opened"):
            is_llava = str(config.get("model_type")).startswith("llava")
            load = load_original if is_llava and "text_config" not in config else load_llava
            load = load if is_llava else load_run_directory
            return load(folder, config, dtype, device).requires_grad_(False).eval()

    def save(self, folder, config: dict, with_llm: bool):
        """Write a run directory that `from_pretrained` opens, config.json last. `config` is kept there beside
        our own keys; of towers that no stage changed it says where they are, they are not copied."""
        ours = self.sources | {"projector": self.projector_kind, "feature_layer": self.vit.feature_layer}
        if with_llm:
            self.llm.save_pretrained(Path(folder) / "llm")
            source = resolve(self.sources["llm"], TOKENIZER_FILES)  # the tokenizer goes where its LLM goes
            for pattern in TOKENIZER_FILES:
                for file in source.glob(pattern):
                    shutil.copy(file, Path(folder) / "llm")
        write_weights(dict(self.projector.named_parameters()), folder, config | ours, "projector.safetensors")

    def load_projector(self, folder, dtype=torch.float32, device="cpu") -> list:
        """Load projector.safetensors of a run directory, or LLaVA's mm_projector.bin (that file, or in its
        folder), strictly; return the names of the tensors loaded."""
        file = find_projector(folder)
        load_strictly(self.projector, read_shard(file), file, dtype, device,
                      lambda name: name.rpartition("mm_projector.")[2])
        return [f"projector.{name}" for name, _ in self.projector.named_parameters()]

    def export(self, folder):
        """Write what transformers opens as a LlavaForConditionalGeneration: weights, config, tokenizer,
        processor. ValueError for a projector or a tower that this class does not know."""
        export_llava(self, Path(folder), FAMILIES[self.llm.config.model_type][0])


def load_run_directory(folder: Path, config: dict, dtype, device) -> VLM:
    """What `VLM.save` wrote: config.json, projector.safetensors and, once it has been tuned, llm/."""
    for name, kind in (("vit", str), ("llm", str), ("projector", str), ("feature_layer", int)):
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{folder}/config.json: {name} is {config.get(name)!r}; a run directory has "
                             f"{'a number' if kind is int else 'a name'} there")
    has_llm = (folder / "llm").is_dir()
    if config.get("stage") == "instruct" and not has_llm:
        raise FileNotFoundError(f"{folder}/llm: no such folder; this run tuned the LLM and has lost it")
    llm = folder / "llm" if has_llm else config["llm"]
    vlm = VLM.from_towers(config["vit"], llm, config["projector"], config["feature_layer"], dtype, device)
    vlm.load_projector(folder, dtype, device)
    vlm.template = config.get("template")
    return vlm


def load_original(folder: Path, config: dict, dtype, device) -> VLM:
    """LLaVA's own checkpoints, such as liuhaotian/llava-v1.5-7b: the LLM's config.json with `mm_` fields, the
    projector among the LLM's weights, the vision tower named and not contained. ValueError for what version
    1.5 does not have: tiles, marks around an image, a tuned tower."""
    from transformers import AutoConfig  # imported late: it takes seconds
    family = config["model_type"].partition("_")[2] or "llama"
    tiles = config.get("mm_patch_merge_type", "flat")
    if config.get("mm_use_im_start_end") or tiles != "flat" or not config.get("mm_vision_tower"):
        raise ValueError(f"{folder}: of LLaVA's own checkpoints only those like version 1.5's are supported")
    values = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"}).to_dict()
    vit = ViT.from_pretrained(config["mm_vision_tower"], config["mm_vision_select_layer"], dtype, device)
    with torch.device("meta"):  # shapes only; the weights come from the files
        llm = LLM(llm_config_from_dict(LLMConfig, values, folder))
        vlm = VLM(vit, llm, config.get("mm_projector_type", "linear"),
                  {"vit": config["mm_vision_tower"], "llm": str(folder)})
    parts = nn.ModuleDict({"llm": llm, "projector": vlm.projector})

    def rename(name):
        ours = name.removeprefix("model.mm_")
        return ours if ours != name else our_llm_name(f"llm.{name}", llm.config.tie_word_embeddings)

    load_strictly(parts, read_weights(folder), folder, dtype, device, rename)
    return vlm


# ------------------------------------------------------------------------------------------------------------
# transformers' LLaVA format: one config.json for both towers, all weights under one index

def load_llava(folder: Path, _, dtype, device) -> VLM:
    """A folder in that format. ValueError where it holds what we do not compute."""
    config = read_config(folder, ("llava",))  # config.json once more, with transformers' defaults filled in
    if config["projector_hidden_act"] != "gelu" or not isinstance(config["vision_feature_layer"], int):
        raise ValueError(f"{folder}: only a GELU projector over a single feature layer is supported")
    with torch.device("meta"):  # shapes only; the weights come from the files
        vit = ViT(vit_config_from_dict(ViTConfig, config["vision_config"], folder), config["vision_feature_layer"])
        llm = LLM(llm_config_from_dict(LLMConfig, config["text_config"], folder))
        vlm = VLM(vit, llm, "mlp2x_gelu", {"vit": str(folder), "llm": str(folder)})
    strategy = config["vision_feature_select_strategy"]
    if (strategy == "default") != vit.config.family.class_token:
        raise ValueError(f"{folder}: {strategy!r} does not drop just the class token")
    vlm.image_token_id = config.get("image_token_index") or config["image_token_id"]
    rename = partial(our_name, is_tied=llm.config.tie_word_embeddings)
    return load_strictly(vlm, read_weights(folder), folder, dtype, device, rename)
