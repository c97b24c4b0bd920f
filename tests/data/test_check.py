"""Checking a data set, and the feed run alone over it."""

import hashlib
import json
import shutil

import cachetools
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.data import check as checking
from orchestrator.data import reader, shards
from orchestrator.data.prepare import prepare
from orchestrator.data.reader import Task, TaskReader
from orchestrator.data.shards import DamagedData, read_manifest
from orchestrator.data.sources import open_source

pytestmark = pytest.mark.ray


def checked(folder):
    said, seen = [], []
    report = checking.check(StoragePath.of(folder), said.append, lambda done, total, rate: seen.append((done, total)))
    return report, said, seen


def test_a_good_data_set_is_counted_decoded_and_shown(digit_shards):
    report, said, seen = checked(digit_shards[0])
    assert report.images == 1797
    assert report.images_per_s > 0
    assert said[0].endswith("and the mean image match the manifest")
    assert seen[-1][1] == 1797
    assert report.samples.shape == (48, 64, 64, 3)
    assert len(set(report.labels.tolist())) > 5, "shuffled"


def replaced(folder, change):
    """The first training shard rewritten by `change`, and the manifest with its new checksum: a consistent lie."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][0]
    table = change(pq.read_table(folder / entry["file"]))
    pq.write_table(table, folder / entry["file"], row_group_size=128, compression="none", use_dictionary=False)
    data = (folder / entry["file"]).read_bytes()
    entry |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["manifest_sha256"] = shards.checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_column(table, name, values):
    return table.set_column(
        table.schema.get_field_index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type)
    )


def test_what_the_checksums_do_not_see_is_found(digit_shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(digit_shards[0], broken)
    replaced(broken, lambda t: with_column(t, "image", [b"no JPEG", *t["image"].to_pylist()[1:]]))
    with pytest.raises(JobError, match=r"shard-00000.parquet, row group 0: image \d+ cannot be decoded"):
        checked(broken)
    miscounted = tmp_path / "miscounted"
    shutil.copytree(digit_shards[0], miscounted)
    replaced(miscounted, lambda t: with_column(t, "label", [(v + 1) % 10 for v in t["label"].to_pylist()]))
    with pytest.raises(DamagedData, match=r"train has \d+ rows of '0' instead of 142, .* of \d more classes; prepare"):
        checked(miscounted)


def test_of_many_classes_with_other_rows_three_are_named(digit_shards):
    manifest = digit_shards[1]
    rows = np.array(manifest.class_rows["val"])
    some = rows.copy()
    some[[1, 4]] += 1
    assert checking._differences(manifest, "val", some) == (
        f"{rows[1] + 1} rows of '1' instead of {rows[1]}, {rows[4] + 1} rows of '4' instead of {rows[4]}"
    )
    assert checking._differences(manifest, "val", rows + 1).endswith(
        f"{rows[2] + 1} rows of '2' instead of {rows[2]} and other numbers of 7 more classes"
    )


def test_raw_shards_hold_the_pixels_themselves_and_feed_the_same_crops(photographs, tmp_path, ray_here):
    source = open_source(str(photographs))
    prepare(source, StoragePath.of(tmp_path / "jpeg"), image_size=72, jpeg_quality=100)
    prepare(source, StoragePath.of(tmp_path / "raw"), image_size=72, encoding="raw")
    read = {}
    for name in ("jpeg", "raw"):
        manifest = read_manifest(StoragePath.of(tmp_path / name))
        assert manifest.encoding == name
        config = checking.feed_config(manifest).changed(color_noise="none")
        task_reader = TaskReader(StoragePath.of(tmp_path / name), manifest, config, 0, 1)
        read[name] = task_reader.read(Task(0, "train", 0, 1), np.arange(manifest.rows["train"]))
    assert read["raw"]["label"].tolist() == read["jpeg"]["label"].tolist()
    assert np.abs(read["raw"]["image"].astype(int) - read["jpeg"]["image"]).mean() < 2
    assert all(len(shard.pixels_at) == len(shard.row_groups) for shard in manifest.shards)
    unmapped = tuple(shard.model_copy(update={"pixels_at": ()}) for shard in manifest.shards)
    reader._recent.clear()
    task_reader = TaskReader(
        StoragePath.of(tmp_path / "raw"), manifest.model_copy(update={"shards": unmapped}), config, 0, 1
    )
    again = task_reader.read(Task(0, "train", 0, 1), np.arange(manifest.rows["train"]))
    assert again["image"].tobytes() == read["raw"]["image"].tobytes()
    column = pq.read_table(tmp_path / "raw" / read_manifest(StoragePath.of(tmp_path / "raw")).shards[0].file)["image"]
    assert column.type == pa.binary(3 * 72 * 72)
    assert checked(tmp_path / "raw")[0].images == 32


def cache_of(size, sizeof):
    return cachetools.LRUCache(size, getsizeof=lambda value: min(sizeof(value), size))


def test_the_last_row_groups_are_cached_and_no_more(digit_shards, monkeypatch):
    folder, manifest = digit_shards
    path = StoragePath.of(folder / manifest.shards[0].file)
    reader._recent.clear()
    first = reader.read_row_group(path, 0)
    assert reader.read_row_group(path, 0) is first
    assert reader._recent.maxsize == 2**27
    assert reader._recent.currsize == first.size == first.images.nbytes

    monkeypatch.setattr(reader, "_recent", cache_of(first.size + 1, lambda group: group.size))
    first = reader.read_row_group(path, 0)
    second = reader.read_row_group(path, 1)
    assert list(reader._recent) == [(path, 1)]
    assert reader.read_row_group(path, 1) is second
    assert reader.read_row_group(path, 0) is not first


def test_the_row_group_that_was_read_last_is_the_last_to_leave_the_cache(digit_shards, monkeypatch):
    folder, manifest = digit_shards
    path = StoragePath.of(folder / manifest.shards[0].file)
    groups = [reader.read_row_group(path, index) for index in range(3)]
    monkeypatch.setattr(reader, "_recent", cache_of(sum(g.size for g in groups) - 1, lambda group: group.size))
    for index in (0, 1, 0, 2):
        reader.read_row_group(path, index)
    assert list(reader._recent) == [(path, 0), (path, 2)]


def test_a_row_group_larger_than_the_cache_is_cached_alone(digit_shards, monkeypatch):
    """Its rows are read by one task after the other: it must not be read anew for each of them."""
    folder, manifest = digit_shards
    path = StoragePath.of(folder / manifest.shards[0].file)
    assert reader._recent.getsizeof(reader.RowGroup(np.empty(0), np.empty(0), np.empty(0), "", 2**40)) == 2**27
    monkeypatch.setattr(reader, "_recent", cache_of(10, lambda group: group.size))
    assert reader.read_row_group(path, 0) is reader.read_row_group(path, 0)


def test_a_corrupt_manifest_is_one_line(digit_shards, tmp_path):
    shutil.copytree(digit_shards[0], tmp_path / "x")
    (tmp_path / "x" / shards.MANIFEST).write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"manifest.json: source: Field required; prepare the data again"):
        checked(tmp_path / "x")


def test_shards_of_before_manifests_had_a_version_are_checked_like_others(digit_shards, tmp_path):
    shutil.copytree(digit_shards[0], tmp_path / "x")
    document = json.loads((tmp_path / "x" / shards.MANIFEST).read_text())
    assert document.pop("schema_version") == 2
    del document["manifest_sha256"]
    (tmp_path / "x" / shards.MANIFEST).write_text(json.dumps(document))
    report, _, _ = checked(tmp_path / "x")
    assert report.manifest == digit_shards[1]
    assert report.manifest.digest == digit_shards[1].digest
