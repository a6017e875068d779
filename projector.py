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

import shutil
from pathlib import Path

import torch
from torch import nn

from llm import LLM
from vit import ViT, load_strictly, read_json, read_shard, resolve, write_weights

IMAGE_TOKEN_ID = -200  # LLaVA's placeholder: no row of the embedding table, so no vocabulary has to grow
PROJECTORS = ("linear", "mlp2x_gelu")


def build_projector(kind: str, D: int, C: int) -> nn.Module:
    """A fresh projector, (B, N, D) -> (B, N, C). Parameter names are those of LLaVA's own checkpoints."""
    if kind == "linear":
        return nn.Linear(D, C)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(D, C), nn.GELU(), nn.Linear(C, C))
    raise ValueError(f"projector {kind!r} is not one of {', '.join(PROJECTORS)}")


class VLM(nn.Module):
    """Image -> vit -> projector -> llm. It holds the three parts and says how an image enters the sequence."""

    def __init__(self, vit: ViT, llm: LLM, projector_kind: str, sources=None):
        super().__init__()
        self.vit, self.llm, self.projector_kind = vit, llm, projector_kind
        self.projector = build_projector(projector_kind, vit.config.hidden_size, llm.config.hidden_size)
        self.sources = sources or {}  # where the towers came from: {"vit": folder or id, "llm": folder or id}
        self.image_token_id = IMAGE_TOKEN_ID

    @property
    def num_image_tokens(self) -> int:
        return self.vit.num_tokens  # N

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
    def generate(self, ids, pixels, max_new_tokens: int = 32, mask=None):
        """Greedy answers to left-padded prompts: ids, mask (B, S), pixels (I, 3, H, W) -> (B, <= max_new_tokens)."""
        return self.llm.generate(self.splice(ids, self.encode(pixels)), mask, max_new_tokens)

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
        """A run directory: config.json, projector.safetensors and, once it has been tuned, llm/."""
        folder = resolve(folder)
        config = read_json(folder / "config.json")
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
        write_weights(self.projector, folder, config | ours, "projector.safetensors")
        if with_llm:
            self.llm.save_pretrained(folder / "llm")
            for file in resolve(self.sources["llm"]).glob("*token*"):  # the tokenizer goes where its LLM goes
                shutil.copy(file, Path(folder) / "llm")
