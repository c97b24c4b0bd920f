"""Bursts and copies of a photograph that were resized or compressed anew: on one side of a draw, and said."""

import io
import sys

import numpy as np
import PIL.Image
import pytest

from alexnet.images import NotAnImage, decode_gray
from orchestrator.data.sources import Options, near, open_source
from orchestrator.data.sources.listing import Entry
from orchestrator.data.sources.near import Look

WAYS = ("resized", "compressed", "png", "cropped")


def photograph(number: int, side: int = 200) -> PIL.Image.Image:
    """Smooth blobs of a seed: unlike any of another seed, and as compressible as a photograph."""
    rng = np.random.default_rng(number)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side * 4 // 3, side), PIL.Image.Resampling.BICUBIC)


def copied(image: PIL.Image.Image, way: str) -> bytes:
    """A file of an image, in one of WAYS, or as it is."""
    data = io.BytesIO()
    if way == "resized":
        image = image.resize((image.width * 3 // 5, image.height * 3 // 5), PIL.Image.Resampling.BILINEAR)
    if way == "cropped":  # the camera moved a little
        image = image.crop((3, 2, image.width, image.height))
    image.save(data, "PNG" if way == "png" else "JPEG", quality=30 if way == "compressed" else 90)
    return data.getvalue()


def entry(number: int, data: bytes, label: int = 0) -> Entry:
    return Entry(number, label, f"{number}.jpg", data=data)


def test_the_hash_and_the_pixels_are_those_of_a_naive_computation():
    gray = np.random.default_rng(0).integers(0, 256, (72 * 2, 144 * 2), np.uint8).astype(np.float64)
    data = io.BytesIO()
    PIL.Image.fromarray(gray.astype(np.uint8)).save(data, "PNG")
    found = near.look(data.getvalue())
    rows = np.array([[gray[36 // 2 * i : 36 // 2 * (i + 1), 32 * j : 32 * (j + 1)].mean() for j in range(9)]
                     for i in range(8)])  # fmt: skip
    rows = np.rint(rows)
    expected = [rows[i, j + 1] > rows[i, j] for i in range(8) for j in range(8)]
    assert f"{found.bits:064b}" == "".join(str(int(bit)) for bit in expected)
    small = np.rint(gray.reshape(16, 9, 16, 18).mean(axis=(1, 3))).ravel()
    small -= small.mean()
    assert found.pixels @ small / np.linalg.norm(small) == pytest.approx(1, abs=1e-3)
    assert np.linalg.norm(found.pixels) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_near_its_original_and_no_other(way):
    images = [photograph(number) for number in range(30)]
    entries = [entry(2 * i + k, copied(image, w)) for i, image in enumerate(images) for k, w in enumerate(("", way))]
    assert near.groups(near.looks(entries)) == [i // 2 * 2 for i in range(60)]


def test_what_cannot_be_compared_is_in_no_group():
    small, black = photograph(1, 48), PIL.Image.new("RGB", (100, 100))
    data = [
        copied(small, ""),
        copied(small, ""),
        copied(black, ""),
        copied(black, "png"),
        b"no image",
        b"no image",
        b"",
    ]
    looks = near.looks([entry(i, one) for i, one in enumerate(data)])
    assert looks == [None] * 7
    assert near.groups(looks) == list(range(7))


def test_chains_are_one_group_named_by_its_first_and_both_measures_count():
    a = np.zeros(256, np.float32)
    a[:2] = 0.6, 0.8
    b = a[::-1].copy()
    ten, eleven = (1 << 10) - 1, (1 << 11) - 1
    looks = [Look(ten << 10, a), None, Look(0, a), Look(eleven << 40, a), Look(ten, a), Look(0, b)]
    assert near.groups(looks) == [0, 1, 0, 3, 0, 5]  # 20 bits between the first and the fifth
    looks[2] = None
    assert near.groups(looks) == [0, 1, 2, 3, 4, 5]
    looks[2] = Look(0, a)
    assert near.pairs(looks[:3], looks[3:]) == {1: 2}
    assert near.pairs(looks[:3], [looks[0], looks[2]]) == {0: 0, 1: 0}


def test_a_class_whose_images_are_all_alike_has_no_groups(monkeypatch):
    unlike = np.eye(256, dtype=np.float32)
    looks = [Look(0, unlike[i]) for i in range(250)]
    assert near.groups(looks) is None  # 31,125 pairs for 250 images
    assert near.groups(looks[:200]) == list(range(200))
    monkeypatch.setattr(near, "PAIRS", 1000)  # in many pieces
    assert near.groups(looks[:200]) == list(range(200))


def test_gray_pixels_of_a_jpeg_are_those_of_the_whole_image_and_foreign_bytes_are_refused(monkeypatch):
    image = photograph(3, 400)
    gray, shorter = decode_gray(copied(image, ""), 32)
    assert gray.shape == (50, 67)
    assert shorter == 400
    expected = np.asarray(image.convert("L").resize((67, 50), PIL.Image.Resampling.BOX)).astype(int)
    assert np.abs(gray - expected).mean() < 2
    png, shorter = decode_gray(copied(image, "png"), 32)
    assert (png.shape, shorter) == ((400, 533), 400)
    assert np.abs(png - np.asarray(image.convert("L")).astype(int)).max() <= 1
    cmyk = io.BytesIO()
    image.convert("CMYK").save(cmyk, "JPEG")
    assert decode_gray(cmyk.getvalue(), 32)[0].shape == (400, 533)
    monkeypatch.setattr(sys.modules[decode_gray.__module__], "MAX_PIXELS", 100_000)
    with pytest.raises(NotAnImage, match="533x400 is more than"):
        decode_gray(copied(image, ""), 32)


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sides_of(source):
    """The numbers of the photographs on each side."""
    return {
        split: {entry.name.split("/")[-1].split("-")[0] for entry in found} for split, found in source.splits.items()
    }


def test_bursts_and_copies_are_on_one_side_of_a_draw(tmp_path, monkeypatch):
    files = {}
    for label, name in enumerate(("cat", "dog")):
        for i in range(12):
            for way in ("", *WAYS) if i < 6 else ("",):
                files[f"{name}/{100 * label + i}-{way}.jpg"] = copied(photograph(100 * label + i), way)
    said: list[str] = []
    source = open_source(str(write(tmp_path, files)), say=said.append)
    sides = sides_of(source)
    assert not sides["train"] & sides["val"]
    assert sides["train"] | sides["val"] == {str(100 * label + i) for label in range(2) for i in range(12)}
    assert "60 images are near-duplicates of others of their class: each such group is on one side" in said
    for label in range(2):  # 7 of 36 are wanted, and a group of 5 is taken whole or not at all
        assert 5 <= sum(entry.label == label for entry in source.splits["val"]) <= 7
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # the same by one thread, and in small pieces
    monkeypatch.setattr(near, "AT_A_TIME", 7)
    again = open_source(str(tmp_path))
    assert again.splits == source.splits
    monkeypatch.setattr(near, "groups", lambda looks: list(range(len(looks))))
    assert sides_of(open_source(str(tmp_path)))["train"] & sides["val"], "the draw alone separates copies"


def test_too_many_or_remote_images_are_not_compared_and_that_is_said(tmp_path, monkeypatch):
    files = {f"{name}/{i}.jpg": copied(photograph(i), "") for name in ("cat", "dog") for i in range(6)}
    monkeypatch.setattr(near, "MAX_IMAGES", 11)
    said: list[str] = []
    open_source(str(write(tmp_path, files)), say=said.append)
    assert "bursts and resized copies are not looked for: that is done of up to 11 images" in said
    monkeypatch.setattr(near, "is_here", lambda entry: False)
    open_source(str(tmp_path), say=said.append)
    assert "bursts and copies that were resized or compressed anew are not looked for in object storage" in said


def test_a_class_that_is_one_burst_is_drawn_one_by_one_and_that_is_said(tmp_path):
    files = {f"cat/{i}.jpg": copied(photograph(0), ("", *WAYS)[i % 5]) + bytes(i) for i in range(10)}
    files |= {f"dog/{i}.jpg": copied(photograph(1 + i), "") for i in range(10)}
    said: list[str] = []
    source = open_source(str(write(tmp_path, files)), say=said.append)
    assert [entry.label for entry in source.splits["val"]] == [0, 0, 1, 1]
    assert "the images of 1 class are all near-duplicates of each other, and are drawn one by one" in said


def test_near_duplicates_in_both_parts_are_counted_beside_those_that_are_the_same(tmp_path):
    files = {}
    for p, part in enumerate(("train", "val")):
        for n, name in enumerate(("cat", "dog")):
            files |= {f"{part}/{name}/{i}.jpg": copied(photograph(1000 * p + 100 * n + i), "") for i in range(8)}
    files["val/cat/1.jpg"] = files["train/cat/3.jpg"]
    files["val/cat/2.jpg"] = copied(photograph(4), "resized")
    files["val/dog/5.jpg"] = copied(photograph(105), "compressed")
    warnings = open_source(str(write(tmp_path, files))).warnings
    assert warnings == [
        "1 validation image is a training image, too: val/cat/1.jpg is train/cat/3.jpg; errors on such images say "
        "nothing about new ones",
        "2 validation images are nearly the same as training images, such as val/cat/2.jpg and train/cat/4.jpg: "
        "bursts, or copies; errors on such images say little about new ones",
    ]
    drawn = open_source(str(tmp_path), Options(val_fraction=0.25)).warnings
    assert drawn == []
