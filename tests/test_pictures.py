"""Pictures as people have them: plumbing/pictures.py. Right is what a viewer shows, or an error that names
the file."""

import io
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import data
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
def test_pictures_stand_upright(tmp_path, orientation, ending):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # a red corner
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the inverse of what a viewer does
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{ending}", exif=exif)
    found = np.asarray(data.load_image(tmp_path / f"x.{ending}"), dtype=int)
    assert found.shape == (32, 64, 3) and np.abs(found - np.asarray(upright)).mean() < 4


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg",
                                         exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 20)
    assert data.load_image(tmp_path / "x.jpg").size == (8, 4)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    found = np.asarray(data.load_image(tmp_path / f"x.{ending}"))
    assert np.abs(found[..., 0].astype(int) - values / 257).max() <= 1


def test_transparent_ground_is_white(tmp_path):
    for mode, clear, ink in (("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("LA", (0, 0), (0, 255))):
        image = Image.new(mode, (4, 4), clear)
        image.putpixel((1, 1), ink)
        image.save(tmp_path / "x.png")
        found = data.load_image(tmp_path / "x.png")
        assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (0, 0, 0)
    for mode, color in (("L", 7), ("RGB", (1, 2, 3)), ("P", 0)):  # one color stands for "nothing"
        Image.new(mode, (4, 4), color).save(tmp_path / "x.png", transparency=color)
        assert data.load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    grey = Image.fromarray(np.array([[0, 32768]], dtype=np.uint16))
    grey.save(tmp_path / "a.png", transparency=0)
    picture = data.load_image(tmp_path / "a.png")
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (127, 127, 127)]


def test_the_folder_of_pictures_may_be_beside_what_a_link_leads_to(tmp_path):
    """LINK/.. is where the link leads, for us as for the system."""
    (tmp_path / "disk/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/inner")
    Image.new("RGB", (4, 4)).save(tmp_path / "disk/a.png")
    for name in ("a.png", "./x/../a.png"):
        assert find_image(tmp_path / "link/..", name).is_file()
