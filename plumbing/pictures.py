"""Pictures: find a file, read it as a viewer shows it."""

import base64
import contextlib
import io
import math
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from plumbing.files import named

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a PNG may hold long texts: viewers show it
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PIXELS = 178_956_970  # Pillow's own limit. A larger picture may be a bomb, and takes gigabytes


def existing(path: Path) -> Path:
    """The path. If it is missing: the one picture beside it with the same stem, or the path in another
    Unicode form.

    OCR-VQA's .gif files are often kept as .jpg. macOS writes an accent as a letter and a sign.
    """
    if path.is_file() or not path.stem:
        return path
    for form in ("NFC", "NFD"):
        for other in (Path(unicodedata.normalize(form, str(path))),
                      path.with_name(unicodedata.normalize(form, path.name))):
            if other.is_file():
                return other
    others = []
    for suffix in SUFFIXES:  # tried one by one: to list a folder of 200,000 pictures takes long
        for form in (suffix, suffix.upper(), suffix.title()):
            other = path.with_name(path.stem + form)
            if other.is_file() and not any(map(other.samefile, others)):  # .jpg and .JPG may be one
                others.append(other)
    return others[0] if len(others) == 1 else path


def find_image(folder, name: str) -> Path:
    """Where the picture that a record names lies.

    ValueError for a name that leads out of the folder: else the author of a record could have any file of
    this machine read. A link in the folder may lead out: whoever has the pictures made it. """
    within = os.path.relpath(Path(folder, name), folder)  # `folder` may be a link and `..`
    if within.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{name!r} leads out of the folder of images, {folder}")
    return existing(Path(folder, within))


def load_image(source) -> Image.Image:
    """The RGB picture at a path, or in `bytes` (a picture file in base64), as a viewer shows it.

    LLaVA's own code calls `convert("RGB")` and no more. We differ from it if the camera was held sideways
    (EXIF), if there is another colour profile than sRGB, if a grey has more than 8 bits (it would turn
    white), and if the ground is transparent (ours is white; a black drawing would turn black on black). An
    error names the file. """
    name = "in base64"
    if not isinstance(source, bytes):
        name = existing(Path(source))
        if not name.is_file():
            raise FileNotFoundError(f"{name}: no such image")
    with named(name, "not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's do not name the file
        Image.MAX_IMAGE_PIXELS = None  # ours is checked below, and says what to do
        file = io.BytesIO(base64.b64decode(source)) if isinstance(source, bytes) else name
        with Image.open(file) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; raise plumbing/pictures.py's "
                                 f"MAX_PIXELS, {MAX_PIXELS}, for files that you trust")
            image.load()
            plain = image if image.mode in ("CMYK", "L") else to_rgb(image)  # a profile is of these or of RGB
            picture = to_rgb(in_srgb(plain, image.info.get("icc_profile")))
            picture.info = {}  # of the EXIF data only the orientation, and only if it is not damaged
            with contextlib.suppress(Exception):
                picture.getexif()[0x0112] = image.getexif().get(0x0112, 1)
            return ImageOps.exif_transpose(picture)


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture with its colour profile applied, as a viewer does. Without a profile it is sRGB already."""
    if not profile:
        return image
    with contextlib.suppress(Exception):  # a damaged profile, or a Pillow without ImageCms
        from PIL import ImageCms
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits down to 8, lay transparent pictures over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale white to 255. White is 65,535; of floats, 1, 255 or 65,535: the first that no pixel exceeds."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = values.max()
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((white for white in whites if largest <= white), largest)
    values[values == image.info.get("transparency")] = white  # one grey may be named transparent
    values = values.clip(0, white) * (255 / white)
    return Image.fromarray(values.astype(np.uint8))
