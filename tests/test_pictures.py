"""Pictures as people have them: plumbing/pictures.py. Right is what a viewer shows, or an error that names
the file."""

import io
import os
import unicodedata

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from plumbing.pictures import find_image, load_image


def save(path, color="red", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path, **how)
    return path


@pytest.mark.parametrize("wanted, there, found", [
    ("a.gif", ["a.jpg"], "a.jpg"),  # OCR-VQA
    ("a.jpg", ["a.JPG"], "a.JPG"),
    ("a.jpg", ["a.2.png"], None),  # another picture
    ("a.jpg", ["a.mask.png"], None),
    ("a.jpg", ["a.png", "a.gif"], None),  # which one?
    ("a.jpg", ["a.txt"], None),
    ("b/a.jpg", ["a.png"], None),
])
def test_a_missing_picture_is_only_replaced_by_the_one_of_its_name(tmp_path, wanted, there, found):
    for name in there:
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    path = find_image(tmp_path, wanted)
    assert path.is_file() == (found is not None)
    assert found is None or path.name == found


@pytest.mark.parametrize("written, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_with_an_accent_is_found_in_either_form(tmp_path, written, asked):
    for name in ("caf\u00e9.png", "m\u00e9dias/a.png"):
        save(tmp_path / unicodedata.normalize(written, name))
        assert find_image(tmp_path, unicodedata.normalize(asked, name)).is_file()


def test_a_link_below_the_folder_may_lead_out_and_a_name_may_not(tmp_path):
    save(tmp_path / "disk/coco/a.png")
    save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "disk/coco", tmp_path / "images/coco")
    assert load_image(find_image(tmp_path / "images", "coco/a.png")).getpixel((0, 0)) == (255, 0, 0)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "coco/../../secret.png"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            find_image(tmp_path / "images", name)


def test_a_png_may_hold_long_texts(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    save(tmp_path / "a.png", pnginfo=texts)
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def swapped_profile() -> bytes:
    """sRGB's profile with the colours of red and green swapped, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red = profile.index(b"rXYZ")
    green = profile.index(b"gXYZ")
    profile[red : red + 4] = b"gXYZ"
    profile[green : green + 4] = b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def test_a_colour_profile_is_applied_and_srgb_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path / "plain.png", (200, 30, 90))
    save(tmp_path / "srgb.png", (200, 30, 90), icc_profile=srgb)
    save(tmp_path / "other.png", (200, 30, 90), icc_profile=swapped_profile())
    save(tmp_path / "damaged.png", (200, 30, 90), icc_profile=b"no profile")
    for mode in ("RGBA", "P"):  # a screenshot of macOS is RGBA, with the display's profile
        picture = Image.new("RGB", (4, 4), (200, 30, 90)).convert(mode)
        picture.save(tmp_path / f"{mode}.png", icc_profile=swapped_profile())
    names = ("plain", "srgb", "other", "damaged", "RGBA", "P")
    pixel = {name: load_image(tmp_path / f"{name}.png").getpixel((0, 0)) for name in names}
    assert pixel["plain"] == pixel["srgb"] == pixel["damaged"] == (200, 30, 90)
    for name in ("other", "RGBA", "P"):
        red, green, blue = pixel[name]
        assert green > 150 and red < 80  # red and green have changed places


def test_bytes_in_base64_are_read_like_a_file(tmp_path):
    import base64
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(file, format="PNG")
    assert load_image(base64.b64encode(file.getvalue())).getpixel((0, 0)) == (0, 0, 255)
