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

from alexnet import images
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.data import shards
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
        (lambda root: put(root, "train/a/0.jpg", "val/a/0.jpg"), "1 class folder of images"),
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

    source = open_source(str(root))
    source.found.append("names such as caf\udce9.JPEG")
    source.left_out.append(("caf.\udce9", "not an image by its name: .\udce9"))
    manifest = prepare(source, StoragePath.of(tmp_path / "out"), image_size=32, max_rejected=0.5)
    assert manifest.found[-1] == r"names such as caf\udce9.JPEG"
    assert manifest.left_out == {"in no class folder": 1, r"not an image by its name: .\udce9": 1}
    assert shards.read_manifest(StoragePath.of(tmp_path / "out")) == manifest
    rejected = [json.loads(line) for line in (tmp_path / "out" / shards.REJECTED).read_text().splitlines()]
    assert {row["name"].split("/")[-1] for row in rejected} == {
        "truncated.JPEG", "text.JPEG", "zero.JPEG", "bomb.png", "dangling.JPEG", "README",
        "pipe.JPEG", "caf\\udce9.JPEG", "caf.\\udce9",
    }  # fmt: skip
    assert all(row["reason"] for row in rejected)
    assert [row["name"] for row in rejected if row.get("kind") == "left out"] == ["train/README", "caf.\\udce9"]
    assert manifest.rejected == 7
    assert manifest.rows == {"train": 26, "val": 8}  # the GIF and the grayscale picture among them

    with pytest.raises(JobError, match=r"7 of 41 .* more than --max-rejected 0\.01"):
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


@pytest.mark.parametrize(("version", "schema_version"), [("0.1", None), ("0.2", 1)])
def test_a_manifest_of_before_there_were_checksums_is_read(tmp_path, version, schema_version):
    sample = SAMPLE.parent.parent / version
    before = json.loads((sample / shards.MANIFEST).read_text())
    assert before.get("schema_version") == schema_version
    manifest = shards.read_manifest(StoragePath.of(sample))
    assert manifest.schema_version == shards.SCHEMA_VERSION
    assert manifest.rows == {"train": 1437, "val": 360}
    assert manifest.digest == "efc490ca8f16f6bf"
    again = json.loads(manifest.model_dump_json())
    assert again.pop("manifest_sha256") == shards.checksum(again)
    assert again.pop("schema_version") == 2
    assert (again.pop("warnings"), again.pop("kinds"), again.pop("found"), again.pop("left_out")) == ([], {}, [], {})
    assert again.pop("exif") == ""
    before.pop("schema_version", None)
    assert again == before, "nothing else of it changes"


def test_a_manifest_of_a_newer_version_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json: was written by a newer version .*3.*; upgrade it") as error:
        manifest_of(tmp_path, schema_version=3, classes="what it will be")
    assert "\n" not in str(error.value)
    assert str(tmp_path / shards.MANIFEST) in str(error.value)


def written(folder, document):
    (folder / shards.MANIFEST).write_text(json.dumps(document))
    return StoragePath.of(folder)


def sample_of_now(**changes):
    sealed = json.loads(shards.read_manifest(StoragePath.of(SAMPLE.parent)).model_dump_json())
    return sealed | changes


def test_a_manifest_is_under_its_own_checksum(tmp_path):
    manifest = shards.read_manifest(written(tmp_path, sample_of_now()))
    assert manifest.manifest_sha256 == "36aa58c58bed0052cd69ad212470b28a99d697fad2bce3ca5d84f6263c23ecc6"
    reordered = dict(reversed(sample_of_now().items()))
    assert shards.read_manifest(written(tmp_path, reordered)) == manifest, "its form does not matter"
    for changes in (
        {"source": "other"}, {"seed": 1}, {"rejected": 1}, {"mean_rgb": [1.0, 2.0, 3.0]}, {"image_size": 71},
        {"mean_image_file": "other.npy"}, {"mean_image_sha256": "0" * 64}, {"classes": list("abcdefghij")},
        {"class_names": list("abcdefghij")}, {"jpeg_quality": 50}, {"manifest_sha256": ""},
        {"manifest_sha256": "0" * 64}, {"warnings": ["other"]}, {"kinds": {"gray": 1}},
        {"found": ["other"]}, {"left_out": {"hidden": 1}},
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"manifest.json: was changed after it was written.*prepare the data again"
        ):
            shards.read_manifest(written(tmp_path, sample_of_now(**changes)))
    changed = sample_of_now()
    del changed["manifest_sha256"]
    with pytest.raises(ValueError, match="was changed after"):
        shards.read_manifest(written(tmp_path, changed))


EVIL = [
    "../x", "../../x", "a/../../x", "/etc/x", "/", "", ".", "..", "a//b", "a/", "./a", "a\\b", "..\\x", "a\x00b",
    "a\nb", "a\x1b[2Jb", "a\u202eb", "\ud800", "s3://bucket/x", "file:///etc/x", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_a_name_in_a_manifest_stays_in_its_folder(tmp_path, name):
    outside = tmp_path / "x"
    outside.write_text("mine")
    (tmp_path / "run" / "data").mkdir(parents=True)
    parts = json.loads(SAMPLE.read_text())["shards"]
    for changes in ({"mean_image_file": name}, {"shards": [parts[0] | {"file": name}, *parts[1:]]}):
        with pytest.raises(ValueError, match=r"manifest.json: (shards.0.file|mean_image_file): ") as error:
            manifest_of(tmp_path / "run" / "data", **changes)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert outside.read_text() == "mine"


def test_plain_names_of_any_folder_are_taken(tmp_path):
    parts = json.loads(SAMPLE.read_text())["shards"]
    for name in ("a", "train/a b.parquet", "train/..a", "tr\u00e4in/x..", "a/b/c/d"):
        assert manifest_of(tmp_path, shards=[parts[0] | {"file": name}, *parts[1:]]).shards[0].file == name


def shard(**changes):
    parts = json.loads(SAMPLE.read_text())["shards"]
    return {"shards": [parts[0] | changes, *parts[1:]]}


def counts(**changes):
    return {"class_rows": json.loads(SAMPLE.read_text())["class_rows"] | changes}


ZERO = [[0.0] * 3] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {"train": 1037, "val": 360}}, "manifest.json: rows.train is 1037, but its shards have 1437; prepare"),
        ({"rows": {"train": 1437}}, "rows and class_rows: expected train and val"),
        ({"rows": {"train": 1437, "val": 360, "test": 0}}, "rows and class_rows: expected train and val"),
        (counts(train=[1437]), "class_rows.train has 1 classes, but classes has 10"),
        (counts(val=[360] + [1] * 9), "rows.val is 360, but its classes have 369"),
        (counts(val=[-1, 361] + [0] * 8), "class_rows.val.0: Input should be greater than or equal to 0, not -1"),
        ({"classes": list("012345678")}, "class_rows.train has 10 classes, but classes has 9"),
        ({"classes": list("0123456788")}, "the class '8' is there twice"),
        ({"class_names": ["zero"]}, "class_names has 1 names for 10 classes"),
        (shard(rows=1), "shards.0: rows is 1, but its row_groups have"),
        (shard(split="test"), "shards.0.split: Input should be 'train' or 'val', not 'test'"),
        (shard(sha256="0"), "shards.0.sha256: String should match pattern '^[0-9a-f]{64}$', not '0'"),
        (shard(sha256="G" * 64), "shards.0.sha256: "),
        (shard(pixels_at=[1]), "shards.0: pixels_at has 1 entries for"),
        (shard(pixels_at=[10**9] * 8), "pixels_at of 'train/shard-00000.parquet' is beyond its"),
        (shard(file="train/shard-00001.parquet"), "the file 'train/shard-00001.parquet' is there twice"),
        (shard(file="mean_image.npy"), "the file 'mean_image.npy' is there twice"),
        ({"mean_image_file": "manifest.json"}, "the file 'manifest.json' is there twice"),
        ({"mean_image_sha256": ""}, "mean_image_sha256: String should match pattern"),
        ({"image_size": 0}, "image_size: Input should be greater than or equal to 1, not 0"),
        ({"image_size": 65536}, "image_size: Input should be less than 65536"),
        ({"jpeg_quality": None}, "jpeg_quality is None, but encoding is jpeg"),
        ({"jpeg_quality": 101}, "jpeg_quality: Input should be less than or equal to 100, not 101"),
        ({"mean_rgb": [float("nan"), 1, 1]}, "mean_rgb.0: Input should be a finite number, not nan"),
        ({"mean_rgb": [1, 2]}, "mean_rgb: Tuple should have at least 3 items"),
        ({"mean_rgb": [1, 2, 256]}, "mean_rgb is [1.0, 2.0, 256.0], not grey levels"),
        ({"eigenvalues": [1.0, 0.0, 0.0]}, "eigenvalues and eigenvectors are not those of covariance_rgb"),
        ({"eigenvalues": [10**400, 0.0, 0.0]}, "eigenvalues.0: "),
        ({"eigenvectors": ZERO}, "eigenvectors are not at right angles"),
        ({"covariance_rgb": ZERO}, "eigenvalues and eigenvectors are not those"),
        ({"covariance_rgb": [[1e300] * 3] * 3}, "covariance_rgb or eigenvectors: larger than"),
        ({"covariance_rgb": [[1.0, 2.0, 3.0], *ZERO[:2]]}, "covariance_rgb is not symmetric"),
    ],
)
def test_what_a_manifest_says_twice_must_be_the_same(tmp_path, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        manifest_of(tmp_path, **changes)
    assert str(error.value).isprintable()
    assert str(error.value).endswith("; prepare the data again")
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_huge_manifest_is_refused_in_a_short_line(tmp_path):
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 10_000, json.dumps({"x" * 10**6: 1}),
                 json.dumps({"schema_version": "x" * 10**6}), json.dumps({"rows": {"x" * 10**6: 1}}),
                 json.dumps({"source": ["\x1b" * 10**6]})):  # fmt: skip
        (tmp_path / shards.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: ") as error:
            shards.read_manifest(StoragePath.of(tmp_path))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_mean_image_of_another_form_is_damage(tmp_path):
    for number, array in enumerate((np.zeros((72, 72), np.float32), np.zeros((72, 72, 3)), None)):
        file = tmp_path / shards.MEAN_IMAGE
        file.write_bytes(b"no array") if array is None else np.save(file, array)
        digest = shards.sha256(StoragePath.of(file))
        manifest = manifest_of(tmp_path, mean_image_sha256=digest)
        with pytest.raises(shards.DamagedData, match=r"mean_image.npy: (has|is no array)"):
            shards.read_mean_image(StoragePath.of(tmp_path), manifest)
        assert manifest.image_size == 72, number


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
