"""`--features FILE`: the frozen ViT's features of all images, kept. For small sets of images.

What the ViT shows the projector never changes, so each image goes through it once. The file is mapped into
memory, not read, and all processes share it.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from data import find_image, load_image, preprocess
from plumbing.files import named, whole
from plumbing.ranks import on_every_rank, rank, say
from running.checkpoint import fingerprint


def load(config, samples, vit, device) -> dict:
    """{image name: patch features (P, D)} of all images of `samples`. Rank 0 makes the file if it is missing.

    A file that was made of other pictures, or with another ViT, layer or fit, is made anew.
    """
    names = sorted({record["image"] for record in samples.records if "image" in record})
    if not names:
        raise ValueError(f"--features {config.features}: no record of {config.annotations} has an image")
    made_by = {
        "vit": config.vit,
        "weights": fingerprint(vit),  # and so the dtype
        "feature_layer": config.feature_layer,
        "fit": config.fit,
    }
    file = Path(config.features)

    def make_if_needed():
        if rank() > 0:
            return
        pictures = [picture_of(samples, name) for name in names]
        if not file.exists():
            make(file, pictures, samples, vit, device, made_by)
            return
        kept = read(file)
        changed = [name for name in made_by if kept["made_by"].get(name) != made_by[name]]
        if not set(pictures) <= set(kept["pictures"]):
            changed.append("pictures")
        if changed:
            say(f"{file}: made with other {' and '.join(changed)}; it is made anew")
            make(file, pictures, samples, vit, device, made_by)

    on_every_rank(make_if_needed)
    kept = read(file)
    names = [name for name, _, _ in kept["pictures"]]
    return dict(zip(names, kept["features"], strict=True))


def picture_of(samples, name: str) -> tuple:
    """Name, size and time of change of a picture."""
    file = find_image(samples.images, name)
    state = file.stat() if file.is_file() else None
    return name, state and state.st_size, state and state.st_mtime_ns


def read(file: Path) -> dict:
    """What `make` wrote, mapped into memory."""
    with named(file, "not a file of features"):
        kept = torch.load(file, mmap=True, weights_only=True)
        if not {"made_by", "pictures", "features"} <= kept.keys():
            raise ValueError("it holds other things")
        return kept


@torch.no_grad()
def make(file: Path, pictures: list, samples, vit, device, made_by: dict):
    """Write the features of the pictures [(name, size, time)]: P x D numbers a picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = []
    for start in tqdm(range(0, len(pictures), 32), desc=f"features -> {file}", unit=" batches"):
        pixels = []
        for name, _, _ in pictures[start : start + 32]:
            picture = load_image(find_image(samples.images, name))
            pixels.append(preprocess(picture, samples.tower, samples.fit))
        batch = torch.stack(pixels).to(device)  # (32, 3, H, W)
        features.append(vit(batch).cpu())  # (32, P, D)
    with whole(file) as building:
        torch.save({"made_by": made_by, "pictures": pictures, "features": torch.cat(features)}, building)
