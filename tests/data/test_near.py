"""Bursts and copies of a photograph that were resized or compressed anew: on one side of a draw, and said."""

import io
import json
import os
import sys
import zipfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexnet.images import NotAnImage, decode_gray
from orchestrator.data import sandbox
from orchestrator.data.sources import Drawn, Options, near, open_source, same
from orchestrator.data.sources.apart import open_apart
from orchestrator.data.sources.draw import Draw, with_val_drawn
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
    assert near.groups(near.looks(entries)[0]) == [i // 2 * 2 for i in range(60)]


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
    looks, _ = near.looks([entry(i, one) for i, one in enumerate(data)])
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
    with pytest.raises(NotAnImage, match="533x400 pixels are more than"):
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


@pytest.mark.parametrize("parts", [("",), ("train/", "val/")], ids=["drawn", "both parts"])
def test_images_that_are_not_compared_are_counted_and_the_first_is_named(tmp_path, parts):
    files = {
        f"{part}{name}/{i}.jpg": copied(photograph(100 * p + 10 * n + i), "")
        for p, part in enumerate(parts)
        for n, name in enumerate(("cat", "dog"))
        for i in range(6)
    }
    what_can = "unreadable, smaller than 64 pixels a side, or of one colour"
    said: list[str] = []
    open_source(str(write(tmp_path / "all", files)), say=said.append)
    assert not any("not compared" in line for line in said)
    files[f"{parts[0]}dog/2.jpg"] = b"no image"
    open_source(str(write(tmp_path / "one", files)), say=said.append)
    assert f"1 image is not compared with others, {parts[0]}dog/2.jpg: {what_can}" in said
    files[f"{parts[-1]}dog/4.jpg"] = copied(PIL.Image.new("RGB", (80, 80), "red"), "png")
    open_source(str(write(tmp_path / "two", files)), say=said.append)
    assert f"2 images are not compared with others, the first of them {parts[0]}dog/2.jpg: {what_can}" in said


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


def test_copies_in_other_classes_that_were_drawn_apart_are_told(tmp_path):
    files = {
        f"{name}/{i}.jpg": copied(photograph(100 * n + i), "")
        for n, name in enumerate(("cat", "dog"))
        for i in range(10)
    }
    files |= {f"both/{i}.jpg": copied(photograph(i), "resized" if i < 5 else "") for i in range(10)}
    source = open_source(str(write(tmp_path, files)))
    side = {entry.name: split for split, found in source.splits.items() for entry in found}
    apart = [i for i in range(10) if side[f"cat/{i}.jpg"] != side[f"both/{i}.jpg"]]
    same, nearly = [i for i in apart if i >= 5], [i for i in apart if i < 5]
    assert source.drawn is not None
    assert list(source.drawn.warnings) == source.warnings
    several, *warnings = source.warnings
    assert several.startswith("5 images are in several classes, such as both/")
    assert len(warnings) == bool(same) + bool(nearly) > 0
    if same:
        assert warnings[0].startswith(f"{len(same)} validation image")
    if nearly:
        assert f"{len(nearly)} validation image" in source.warnings[-1]
        assert "nearly the same as training images, such as " in source.warnings[-1]


def test_pairs_of_unlike_labels_alone_count_where_that_is_asked():
    a = np.zeros(256, np.float32)
    a[0] = 1
    looks = [Look(0, a), Look(0, a)]
    assert near.pairs(looks, looks) == {0: 0, 1: 0}
    assert near.pairs(looks, looks, ([0, 1], [0, 1])) == {0: 1, 1: 0}
    assert near.pairs(looks, looks, ([0, 0], [0, 0])) == {}


def test_every_file_is_read_once_for_its_content_and_its_pixels(tmp_path, monkeypatch):
    files = {f"{name}/{i}.jpg": copied(photograph(i), "") for name in ("cat", "dog") for i in range(4)}
    write(tmp_path, files)
    entries = [Entry(i, i % 2, name, path=str(tmp_path / name)) for i, name in enumerate(files)]
    reads: list[int] = []
    real = near.read
    monkeypatch.setattr(near, "read", lambda entry: reads.append(entry.id) or real(entry))
    monkeypatch.setattr(same, "read", lambda entry: pytest.fail("read a second time"))
    said: list[str] = []
    with_val_drawn(entries, said.append, Draw())
    assert sorted(reads) == list(range(8))


def test_copies_are_found_in_archives_and_rows_too(tmp_path):
    pictures = [copied(photograph(i), "") for i in range(8)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, numbers in (("train", (0, 1, 2)), ("val", (2, 3))):
            for name, first in (("cat", 0), ("dog", 4)):
                for i in numbers:
                    archive.writestr(f"{part}/{name}/{i}.jpg", pictures[first + i])
    table = pa.table({"image": [pictures[i] for i in (0, 1, 2, 3)], "label": [0, 1, 0, 1]})
    (tmp_path / "rows").mkdir()
    pq.write_table(table, tmp_path / "rows/train-0.parquet")
    pq.write_table(table.slice(2), tmp_path / "rows/val-0.parquet")
    for place, number in (("x.zip", 2), ("rows", 2)):
        said: list[str] = []
        warnings = open_source(str(tmp_path / place), say=said.append).warnings
        assert warnings[0].startswith(f"{number} validation images are training images, too: ")
        assert not any("not looked for" in line for line in said)


def test_rows_that_are_not_compared_and_files_that_are_too_many_bytes_are_said(tmp_path, monkeypatch):
    pictures = [copied(photograph(i), "") for i in range(4)]
    table = pa.table({"image": pictures, "label": [0, 1, 0, 1]})
    for part in ("train", "val"):
        pq.write_table(table, tmp_path / f"{part}-0.parquet")
    monkeypatch.setattr(same, "ACROSS", 7)
    said: list[str] = []
    open_source(str(tmp_path), say=said.append)
    assert "copies in both parts are not looked for among rows of tables and in object storage: 8 images" in said
    files = {f"{name}/{i}.jpg": pictures[i] + b"x" * (9 - i) for name in ("cat", "dog") for i in range(4)}
    monkeypatch.setattr(near, "MAX_IMAGES", 7)
    monkeypatch.setattr(same, "HASHED_BYTES", 10)
    open_source(str(write(tmp_path / "loose", files)), say=said.append)
    assert f"copies of files are not looked for: {same.TOO_MUCH}" in said


def test_a_long_look_says_how_far_it_is_and_that_is_no_part_of_what_was_found(tmp_path, monkeypatch):
    files = {f"{name}/{i}.jpg": copied(photograph(i), "") for name in ("cat", "dog") for i in range(4)}
    monkeypatch.setattr(near, "EVERY_S", 0)
    monkeypatch.setattr(near, "FIRST_S", 0)
    monkeypatch.setattr(near, "AT_A_TIME", 5)
    said: list[str] = []
    source = open_source(str(write(tmp_path, files)), say=said.append)
    assert [line for line in said if line.startswith("near-duplicates: ")] == [
        "near-duplicates: 5 of 8 images are looked at", "near-duplicates: 8 of 8 images are looked at",
    ]  # fmt: skip
    assert [line for line in said if not line.startswith("near-duplicates: ")] == source.found


def test_what_was_drawn_is_not_looked_at_again_until_a_file_changes(tmp_path, monkeypatch):
    files = {f"{name}/{i}.jpg": copied(photograph(i), "") for name in ("cat", "dog") for i in range(8)}
    files |= {f"{name}/{i}-copy.jpg": copied(photograph(i), "resized") for name in ("cat", "dog") for i in range(3)}
    place, looked = str(write(tmp_path, files)), []
    first = open_source(place)
    assert first.drawn is not None
    earlier = Drawn.of_json(json.loads(json.dumps(first.drawn.to_json())))
    real = near.look
    monkeypatch.setattr(near, "look", lambda data: looked.append(1) or real(data))
    assert open_source(place, earlier=earlier) == first
    assert not looked
    for other in (Options(seed=1), Options(val_fraction=0.3)):
        assert open_source(place, other, earlier=earlier).drawn != first.drawn
        assert looked
        looked.clear()
    (tmp_path / "cat/1.jpg").write_bytes(copied(photograph(77), ""))
    again = open_source(place, earlier=earlier)
    assert looked
    assert again == open_source(place)


@pytest.mark.parametrize(
    "change", [{"val": ["1"]}, {"val": 3}, {"lines": [1]}, {"digest": None}, {"schema_version": 2}]
)
def test_what_was_drawn_by_no_version_is_refused(change):
    sound = Drawn("x", (1,), ("line",), ()).to_json()
    assert Drawn.of_json(sound) == Drawn("x", (1,), ("line",), ())
    with pytest.raises(ValueError, match=r"a list of|not what was drawn"):
        Drawn.of_json(sound | change)


def test_an_image_that_crashes_its_decoder_costs_the_look_and_not_the_listing(tmp_path, monkeypatch):
    files = {f"{name}/{i}.jpg": copied(photograph(i), "") for name in ("cat", "dog") for i in range(5)}
    write(tmp_path, files | {"cat/bad.png": b"bad"})
    real = near.look
    monkeypatch.setattr(near, "look", lambda data: os.abort() if data == b"bad" else real(data))
    monkeypatch.setattr(sandbox, "_begin", sandbox._Forked)
    said: list[str] = []
    source = open_apart(str(tmp_path), say=said.append)
    line = "near-duplicates are not looked for, because their look ended early: crashed its reader (signal 6)"
    assert said == source.found
    assert said.count(line) == 1
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 9, "val": 2}
