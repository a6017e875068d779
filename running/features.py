"""`--features FILE`: the frozen ViT's features of all images, kept. For small sets of images.

What the ViT shows the projector never changes, so each image goes through it once. The file is mapped into
memory, not read, and all processes share it.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from data import find_image, load_image, preprocess
from plumbing.files import named, whole
from plumbing.ranks import barrier, rank
from running.checkpoint import fingerprint


def load(config, samples, vit, device) -> dict:
    """{image name: patch features (P, D)} of all images of `samples`. Rank 0 makes the file if it is missing.

    ValueError if the file was made with another ViT, layer or fit, or lacks an image.
    """
    made_by = {"vit": config.vit, "feature_layer": config.feature_layer, "fit": config.fit}
    made_by["weights"] = fingerprint(vit)  # and so the dtype
    names = sorted({record["image"] for record in samples.records if "image" in record})
    file = Path(config.features)
    if rank() == 0 and not file.exists():
        make(file, names, samples, vit, device, made_by)
    barrier()
    with named(file, "not a file of features"):
        kept = torch.load(file, mmap=True, weights_only=True)
        for key, value in made_by.items():
            before = kept["made_by"].get(key)
            if before != value:
                raise ValueError(f"{file}: features made with {key} {before!r}, not {value!r}; name another "
                                 "--features, or remove it")
        missing = set(names) - set(kept["names"])
        if missing:
            raise ValueError(f"{file}: lacks {len(missing)} images of these records, such as {min(missing)}")
        return dict(zip(kept["names"], kept["features"], strict=True))


@torch.no_grad()
def make(file: Path, names: list, samples, vit, device, made_by: dict):
    """Write the features of the images `names`: P x D numbers an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = []
    for start in tqdm(range(0, len(names), 32), desc=f"features -> {file}", unit=" batches"):
        pixels = []
        for name in names[start : start + 32]:
            picture = load_image(find_image(samples.images, name))
            pixels.append(preprocess(picture, samples.tower, samples.fit))
        batch = torch.stack(pixels).to(device)  # (32, 3, H, W)
        features.append(vit(batch).cpu())  # (32, P, D)
    with whole(file) as building:
        torch.save({"made_by": made_by, "names": names, "features": torch.cat(features)}, building)
