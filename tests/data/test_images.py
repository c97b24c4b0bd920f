"""Decoding and resizing, odd files included."""

import io

import numpy as np
import PIL.Image
import pytest
from conftest import picture

from orchestrator.data import images


def encoded(image: PIL.Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


random = np.random.default_rng(0)
COLOUR = PIL.Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
GRAY16 = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (encoded(COLOUR, "JPEG"), (40, 30, 3)),
        (encoded(COLOUR.convert("L"), "JPEG"), (40, 30, 3)),
        (encoded(COLOUR.convert("CMYK"), "JPEG"), (40, 30, 3)),
        (encoded(COLOUR, "PNG"), (40, 30, 3)),
        (encoded(COLOUR.convert("RGBA"), "PNG"), (40, 30, 3)),
        (encoded(PIL.Image.fromarray(GRAY16), "PNG"), (40, 30, 3)),
        (encoded(COLOUR.convert("P"), "GIF", save_all=True, append_images=[COLOUR.rotate(90)]), (40, 30, 3)),
        (encoded(PIL.Image.new("RGB", (1, 1), "red"), "JPEG"), (1, 1, 3)),
    ],
    ids=["rgb", "gray", "cmyk", "png", "alpha", "png16", "animated-gif", "one-pixel"],
)
def test_whatever_can_be_read_becomes_rgb(data, shape):
    pixels = images.decode(data)
    assert pixels.shape == shape
    assert pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_clipped():
    pixels = images.decode(encoded(PIL.Image.fromarray(GRAY16), "PNG"))
    np.testing.assert_allclose(pixels[:, :, 0], GRAY16 / 257, atol=0.51)


def test_cmyk_and_rgb_of_one_picture_look_alike():
    smooth = COLOUR.resize((4, 4)).resize((64, 64), PIL.Image.Resampling.BICUBIC)
    rgb, cmyk = (images.decode(encoded(smooth.convert(mode), "JPEG", quality=95)) for mode in ("RGB", "CMYK"))
    assert np.abs(rgb.astype(int) - cmyk).mean() < 6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (encoded(COLOUR, "EPS"), "not an image in a format that is read: JPEG"),  # would be a program to run
        (encoded(COLOUR, "JPEG")[:400], "(?i)truncated"),
        (encoded(COLOUR, "PNG")[:200], "."),
        (encoded(PIL.Image.new("1", (30_000, 30_000)), "PNG"), "decompression bomb"),
    ],
    ids=["zero-bytes", "text", "postscript", "truncated-jpeg", "truncated-png", "bomb"],
)
def test_what_cannot_be_read_says_why(data, reason):
    with pytest.raises(images.NotAnImage, match=reason):
        images.decode(data)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256), (40, 30), (1, 1), (257, 512)])
def test_resizing_equals_pillow_and_takes_the_centre(shape):
    image = images.decode(picture(np.random.default_rng(1), 0, shape))
    out = images.resize_and_center(image, 64)
    height, width = shape
    size = (round(64 * width / height), 64) if width > height else (64, round(64 * height / width))
    pillow = np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BILINEAR))
    top, left = (size[1] - 64) // 2, (size[0] - 64) // 2
    assert out.shape == (64, 64, 3)
    assert np.abs(out.astype(int) - pillow[top : top + 64, left : left + 64]).max() <= 1


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_a_line_of_pixels_does_not_fill_the_memory(shape):
    assert images.resize_and_center(np.zeros((*shape, 3), np.uint8), 256).shape == (256, 256, 3)
