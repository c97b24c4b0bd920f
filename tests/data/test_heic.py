"""Photographs of phones in HEIC, which pillow-heif reads."""

import io

import numpy as np
import PIL.Image
import pytest

from alexnet import images
from orchestrator.data.sources import near

pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install pillow-heif")


@pytest.fixture(autouse=True)
def opener():
    pillow_heif.register_heif_opener()


def quarters() -> np.ndarray:
    """Red, blue, green and black: every orientation differs."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:40, :60, 0] = pixels[40:, :60, 1] = pixels[:40, 60:, 2] = 255
    return pixels


def encoded(image: PIL.Image.Image, form: str, orientation: int = 1) -> bytes:
    exif, data = PIL.Image.Exif(), io.BytesIO()
    exif[images.ORIENTATION] = orientation
    image.save(data, form, quality=95, exif=exif.tobytes())
    return data.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_once_as_a_jpeg_of_its_orientation_is(orientation):
    image, kinds = PIL.Image.fromarray(quarters()), []
    data = encoded(image, "HEIF", orientation)
    assert data[4:12] == b"ftypheic"
    expected = images.decode(encoded(image, "JPEG", orientation), exif=True)
    for exif in (True, False):  # libheif turns it, whether asked or not
        found = images.decode(data, exif=exif, count=kinds.append)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 3
    assert kinds == ["rotated"] * 2 * (orientation > 1)


def test_gray_and_transparent_ones_are_counted_and_laid_over_the_background():
    kinds: list[str] = []
    pixels = quarters()
    assert images.decode(encoded(PIL.Image.fromarray(pixels[:, :, 1]), "HEIF"), count=kinds.append).shape == (
        80,
        120,
        3,
    )
    half = PIL.Image.fromarray(np.dstack([pixels, np.full((80, 120), 128, np.uint8)]))
    data = io.BytesIO()
    half.save(data, "HEIF", quality=-1)  # without loss
    found = images.decode(data.getvalue(), count=kinds.append)
    assert kinds == ["gray", "transparent"]
    assert np.abs(found[10, 10].astype(int) - [255, 127, 127]).max() <= 2


def test_a_damaged_one_is_no_image():
    data = encoded(PIL.Image.fromarray(quarters()), "HEIF")
    for size in (40, 300, len(data) - 50):
        with pytest.raises(images.NotAnImage):
            images.decode(data[:size])
    with pytest.raises(images.NotAnImage, match=r"not an image in a format that is read: .*, HEIC$"):
        images.decode(b"no image")


def test_a_jpeg_copy_of_one_is_its_near_duplicate():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)).resize((400, 300))
    first, second = near.look(encoded(image, "HEIF")), near.look(encoded(image, "JPEG"))
    assert near.groups([first, second]) == [0, 0]
