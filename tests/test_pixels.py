"""What happens to a pixel."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.pixels import (
    crop_each,
    crop_equal,
    crop_on_device,
    deep_to_unit,
    encoded_size,
    flatten_transparency,
    luma,
    resize_to_cover,
)


@pytest.mark.parametrize(
    ("mode", "colour", "background", "expected_mode", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (0, 0, 255), "RGB", (0, 0, 255)),
        ("RGBA", (255, 0, 0, 255), (0, 0, 255), "RGB", (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255), "L", 255),
        ("LA", (0, 0), (255, 0, 0), "RGB", (255, 0, 0)),
        ("1", 1, (0, 0, 0), "L", 255),
        ("L", 9, (0, 0, 0), "L", 9),
        ("CMYK", (0, 255, 255, 0), (0, 0, 0), "RGB", (255, 0, 0)),
    ],
)
def test_modes(mode, colour, background, expected_mode, expected):
    flat = flatten_transparency(Image.new(mode, (2, 2), colour), background)
    assert (flat.mode, flat.getpixel((0, 0))) == (expected_mode, expected)


def test_palette_with_transparency():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    assert flatten_transparency(image, (0, 0, 0)).getpixel((0, 0)) == (10, 20, 30)
    image.info["transparency"] = 0
    assert flatten_transparency(image, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(("mode", "key"), [("RGB", (9, 9, 9)), ("L", 9)])
def test_a_colour_key_is_transparency(tmp_path, mode, key):
    """PNG's tRNS chunk leaves the mode as it is."""
    Image.new(mode, (2, 2), key).save(tmp_path / "a.png", transparency=key)
    flat = flatten_transparency(Image.open(tmp_path / "a.png"), (255, 255, 255))
    assert flat.mode == mode
    assert flat.getpixel((0, 0)) in (255, (255, 255, 255))


def test_stock_loses_what_is_kept_here(tmp_path):
    """Pitfall 4.17: convert("RGB") drops transparency, 16 bits and grey."""
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert clear.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert flatten_transparency(clear, (255, 255, 255)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[30000, 30001]], np.uint16))
    assert len(set(np.asarray(deep.convert("I").convert("RGB")).ravel())) == 1
    assert len(np.unique(np.asarray(deep_to_unit(flatten_transparency(deep, (0, 0, 0)))))) == 2


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_float_images_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"pixels of mode F must be in \[0, 1\]"):
        deep_to_unit(Image.fromarray(np.full((2, 2), value, np.float32)))


def test_resize_has_antialiasing():
    """One-pixel stripes at half the size are grey; nearest or plain bilinear sampling keeps
    stripes.
    """
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_to_cover(Image.fromarray(stripes), (16, 16), True)).astype(int)
    assert (
        np.abs(small[:, 2:-2] - 127).max() <= 20
    )  # bicubic's ripple; aliasing would give 0 and 255


@pytest.mark.parametrize(
    ("source", "size"), [((20, 24), (8, 8)), ((24, 20), (8, 12)), ((5, 7), (16, 8))]
)
def test_rectangles_are_covered_without_distortion(source, size):
    image = Image.new("L", source[::-1])
    covered = resize_to_cover(image, size, False)
    assert covered.height >= size[0]
    assert covered.width >= size[1]
    assert covered.height == size[0] or covered.width == size[1]
    assert resize_to_cover(image, size, True).size == size[::-1]


def images(shape, count=6):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 8), (8, 8)), ((3, 12, 8), (8, 8)), ((3, 9, 13), (8, 12))]
)
@pytest.mark.parametrize("flip", [False, True])
def test_the_three_ways_to_crop_are_one(shape, size, flip):
    whole, draws = images(shape), np.random.default_rng(1).random((6, 3))
    expected = crop_each(list(whole), draws, size, flip=flip, channels=shape[0], deep=False)
    assert torch.equal(crop_on_device(torch.from_numpy(whole), draws, size, flip=flip), expected)
    assert torch.equal(crop_equal(whole.copy(), draws, size, flip=flip), expected)


def test_depths_are_brought_together():
    plain = np.array([0, 255], np.uint8).reshape(1, 1, 2)
    deep = np.array([-1, 1], np.float32).reshape(1, 1, 2)
    for as_deep, values in ((True, [-1.0, 1.0]), (False, [0, 255])):
        found = crop_each([plain, deep], np.zeros((2, 3)), (1, 2), flip=False, channels=1,
                          deep=as_deep)  # fmt: skip
        assert found.flatten(1).tolist() == [values] * 2


def test_luma_is_pillows_within_a_rounding():
    pixels = images((3, 16, 16))[0]
    pillow = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L")).astype(int)
    # Pillow's weights are rounded to 16 bits: a half may be rounded the other way.
    assert np.abs(luma(pixels)[0].astype(int) - pillow).max() <= 1


def test_the_luma_of_an_image_does_not_depend_on_its_company():
    many = images((3, 7, 5), 50)
    assert np.array_equal(luma(many), np.stack([luma(image) for image in many]))


def test_one_bit_with_a_transparent_value_is_put_on_the_background():
    image = Image.new("1", (2, 2), 0)
    image.info["transparency"] = 0
    assert flatten_transparency(image, (255, 255, 255)).getpixel((0, 0)) in (255, (255,) * 3)


def test_the_size_of_a_file_is_that_of_the_picture_as_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 16)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (8, 16)).save(tmp_path / "b.jpg")
    Image.new("RGB", (8, 16)).save(tmp_path / "c.tif", exif=exif)  # Pillow turns its size
    names = ("a.jpg", "b.jpg", "c.tif")
    sizes = [encoded_size({"path": str(tmp_path / name), "bytes": None}) for name in names]
    assert sizes == [(8, 16), (16, 8), (8, 16)]
    assert datasets.Image().decode_example(
        {"path": str(tmp_path / "c.tif"), "bytes": None}
    ).size == (16, 8)
