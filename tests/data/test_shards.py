"""Sources to shards on Ray Data, manifests of several versions, and how damage is reported."""

import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from conftest import make_photographs, picture

from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.data import images, shards
from orchestrator.data.prepare import prepare
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.sources import open_source


def test_the_digits_are_all_there_once_with_balanced_classes():
    source = open_source("digits")
    counts = {split: np.bincount([entry.label for entry in entries]) for split, entries in source.splits.items()}
    assert {split: int(count.sum()) for split, count in counts.items()} == {"train": 1437, "val": 360}
    assert counts["val"].min() >= 34
    assert len({entry.id for entries in source.splits.values() for entry in entries}) == 1797


def test_an_image_folder_lists_every_file_once_in_order(photographs):
    source = open_source(str(photographs))
    assert source.classes == ("apple", "pear")
    assert [len(source.splits[split]) for split in ("train", "val")] == [24, 8]
    assert [entry.id for split in ("train", "val") for entry in source.splits[split]] == list(range(32))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), r"has no images: 0 files \(none\); expected folders CLASS/IMAGE"),
        (lambda root: put(root, "train/a/0.jpg", "val/a/0.jpg"), r"1 class folder\(s\) of images"),
        (
            lambda root: put(root, "train/a/0.jpg", "train/b/0.jpg", "val/c/0.jpg"),
            "val/ has the class 'c', which is not in train/",
        ),
        (
            lambda root: [put(root, "train/a/0.jpg", "train/b/0.jpg"), (root / "val/a").mkdir(parents=True)],
            "val/ holds no images; remove it",
        ),
    ],
)
def test_a_folder_that_is_no_source_is_refused_in_one_line(tmp_path, spoil, named):
    spoil(tmp_path / "source")
    with pytest.raises(ValueError, match=named) as error:
        open_source(str(tmp_path / "source"))
    assert "\n" not in str(error.value)


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def rows_of(folder, manifest, split):
    return [row for shard in manifest.split(split) for row in pq.read_table((folder / shard.file).text).to_pylist()]


@pytest.mark.ray
def test_shards_hold_every_image_once_shuffled_with_exact_statistics(ray_here, photographs, tmp_path):
    output = StoragePath.of(tmp_path / "shards")
    manifest = prepare(open_source(str(photographs)), output, image_size=48, rows_per_shard=10)
    assert shards.read_manifest(output) == manifest
    assert manifest.rows == {"train": 24, "val": 8}
    assert manifest.class_rows == {"train": (12, 12), "val": (4, 4)}
    assert [shard.rows for shard in manifest.split("train")] == [10, 10, 4]
    rows = rows_of(output, manifest, "train")
    ids = [row["id"] for row in rows]
    assert sorted(ids) == list(range(24))
    assert ids != sorted(ids)
    assert all(row["name"].split("/")[1] == manifest.classes[row["label"]] for row in rows)

    source = {entry.id: entry for entry in open_source(str(photographs)).splits["train"]}
    pixels = []
    for row in rows:
        with open(source[row["id"]].path, "rb") as file:
            original = images.resize_and_center(images.decode(file.read()), 48)
        assert np.abs(images.decode(row["image"]).astype(int) - original).mean() < 6  # JPEG's own error
        pixels.append(original)
    flat = np.array(pixels).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(manifest.mean_rgb, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.covariance_rgb, np.cov(flat.T, bias=True), rtol=1e-9)
    values, vectors = np.array(manifest.eigenvalues), np.array(manifest.eigenvectors)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, manifest.covariance_rgb, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shards.read_mean_image(output, manifest), np.mean(pixels, axis=0), rtol=1e-6)
    shards.verify(output, manifest)


@pytest.mark.ray
def test_same_seed_same_bytes_whatever_the_parallelism(ray_here, photographs, tmp_path):
    source = open_source(str(photographs))
    made = [
        prepare(source, StoragePath.of(tmp_path / str(i)), image_size=48, rows_per_shard=5, parallelism=p, seed=seed)
        for i, (p, seed) in enumerate([(1, 0), (2, 0), (2, 1)])
    ]
    assert made[0] == made[1]
    assert made[0].digest != made[2].digest


@pytest.mark.ray
def test_broken_files_are_listed_with_their_reasons_and_the_rest_is_kept(ray_here, tmp_path):
    root = make_photographs(tmp_path / "source", {"train": 12, "val": 4})
    good = picture(np.random.default_rng(0), 0, (50, 50))
    odd = root / "train" / "apple"
    for name, data in {
        "truncated.JPEG": good[:300],
        "text.JPEG": b"hello",
        "zero.JPEG": b"",
        "gif.JPEG": picture(np.random.default_rng(1), 0, (50, 50), "GIF"),
        "gray.JPEG": picture(np.random.default_rng(1), 0, (50, 50), mode="L"),
    }.items():
        (odd / name).write_bytes(data)
    PIL.Image.new("1", (30_000, 30_000)).save(odd / "bomb.png")
    os.symlink(root / "nowhere", odd / "dangling.JPEG")
    os.mkfifo(odd / "pipe.JPEG")
    with open(os.fsencode(odd) + b"/caf\xe9.JPEG", "wb") as file:
        file.write(good)
    (root / "train" / "README").write_text("not in a class folder")

    manifest = prepare(open_source(str(root)), StoragePath.of(tmp_path / "out"), image_size=32, max_rejected=0.5)
    rejected = [json.loads(line) for line in (tmp_path / "out" / shards.REJECTED).read_text().splitlines()]
    assert {row["name"].split("/")[-1] for row in rejected} == {
        "truncated.JPEG", "text.JPEG", "zero.JPEG", "bomb.png", "dangling.JPEG", "README",
        "pipe.JPEG", "caf\\udce9.JPEG",
    }  # fmt: skip
    assert all(row["reason"] for row in rejected)
    assert manifest.rejected == 8
    assert manifest.rows == {"train": 26, "val": 8}  # the GIF and the grayscale picture among them

    with pytest.raises(JobError, match=r"8 of 42 .* more than --max-rejected 0\.01"):
        prepare(open_source(str(root)), StoragePath.of(tmp_path / "out"), image_size=32)
    assert not (tmp_path / "out" / shards.MANIFEST).exists()


@pytest.mark.ray
def test_every_kind_of_damage_names_the_shard(digit_shards, tmp_path):
    import shutil

    original, manifest = digit_shards
    for number in range(12):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        path = folder / manifest.shards[number % len(manifest.shards)].file
        data = bytearray(path.read_bytes())
        if number == 0:
            path.unlink()
        elif number == 1:
            path.write_bytes(data[:-1])
        else:  # one flipped bit, anywhere
            data[len(data) * (number - 2) // 10] ^= 1
            path.write_bytes(data)
        with pytest.raises(shards.DamagedData, match=path.name):
            shards.verify(StoragePath.of(folder), manifest)


@pytest.mark.ray
def test_labels_beyond_the_classes_are_refused(digit_shards):
    folder, manifest = digit_shards
    ranges = shards.label_ranges(StoragePath.of(folder), manifest)
    shards.check_labels(StoragePath.of(folder), manifest, ranges, 10)
    with pytest.raises(ValueError, match="label 9, but there are 9 classes"):
        shards.check_labels(StoragePath.of(folder), manifest, ranges, 9)


@pytest.mark.parametrize("quality", [90, None], ids=["jpeg", "raw"])
def test_row_groups_have_as_many_rows_as_asked(photographs, tmp_path, quality):
    entries = open_source(str(photographs)).splits["val"]
    writer = ShardWriter(StoragePath.of(tmp_path), 40, quality, 2, row_group_rows=3)
    shard = json.loads(writer.make("val", "val/shard-00000.parquet", entries)["report"])["shard"]
    assert shard["row_groups"] == [3, 3, 2]
    metadata = pq.read_metadata(tmp_path / "val/shard-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 2]
    assert len(shard.get("pixels_at", ())) == (3 if quality is None else 0)


def test_a_source_given_for_shards_is_recognised(photographs):
    with pytest.raises(ValueError, match="looks like a source"):
        shards.read_manifest(StoragePath.of(photographs))


SAMPLE = Path(__file__).parent.parent / "samples" / "0.1" / shards.MANIFEST


def manifest_of(folder, **changes):
    """The sample with some fields changed, as a file's reader sees it."""
    (folder / shards.MANIFEST).write_text(json.dumps(json.loads(SAMPLE.read_text()) | changes))
    return shards.read_manifest(StoragePath.of(folder))


def test_a_manifest_of_version_0_1_is_read(tmp_path):
    manifest = manifest_of(tmp_path)
    assert "schema_version" not in json.loads(SAMPLE.read_text())
    assert manifest.schema_version == shards.SCHEMA_VERSION
    assert manifest.rows == {"train": 1437, "val": 360}
    assert manifest.digest == "efc490ca8f16f6bf"
    again = json.loads(manifest.model_dump_json())
    assert again.pop("schema_version") == 1
    assert (again.pop("warnings"), again.pop("kinds")) == ([], {})
    assert again == json.loads(SAMPLE.read_text()), "nothing else of it changes"


def test_a_manifest_of_a_newer_version_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json: was written by a newer version .*2.*; upgrade it") as error:
        manifest_of(tmp_path, schema_version=2, classes="what it will be")
    assert "\n" not in str(error.value)
    assert str(tmp_path / shards.MANIFEST) in str(error.value)


@pytest.mark.parametrize("text", ['{"format": 1}', "[1]", "", '{"format"', "\xff", "null"])
def test_a_manifest_of_another_form_is_refused(tmp_path, text):
    (tmp_path / shards.MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest.json: .*; prepare the data again") as error:
        shards.read_manifest(StoragePath.of(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"format": 2}, "format: Input should be 1"),
        ({"schema_version": "1"}, "schema_version is '1', which is not a version number"),
        ({"rows": {"train": "many"}}, "rows.train: Input should be a valid integer"),
    ],
)
def test_what_a_manifest_of_this_version_cannot_hold_is_refused(tmp_path, changes, words):
    manifest_of(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        manifest_of(tmp_path, **changes)
