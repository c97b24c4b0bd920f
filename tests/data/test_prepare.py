"""Interrupted preparations, and object storage: a real S3 server on loopback, which goes away and comes back."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, make_photographs, picture

from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.data import prepare as preparation
from orchestrator.data import shards
from orchestrator.data.feed import Feed
from orchestrator.data.prepare import DRAWN, Progress, check_rejected, earlier_draw, prepare
from orchestrator.data.sources import Drawn, Entry, Source, near, open_source, versions
from orchestrator.data.view import PrepareView
from orchestrator.train.model import describe

pytestmark = [pytest.mark.ray]


@pytest.fixture
def many(tmp_path):
    """80 photographs."""
    return make_photographs(tmp_path / "many", {"train": 32, "val": 8})


def test_a_preparation_killed_three_times_ends_with_the_same_bytes(here, many, tmp_path):
    options = {"image_size": 64, "rows_per_shard": 4, "parallelism": 1}
    unbroken = prepare(open_source(str(many)), StoragePath.of(tmp_path / "unbroken"), **options)
    output = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), "--source", str(many), "--output", str(output)]
    command += ["--image-size", "64", "--rows-per-shard", "4", "--parallelism", "1"]
    written: dict[str, int] = {}
    for enough in (2, 7, 13):
        process = subprocess.Popen(command, env=os.environ | here, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(found(output)) < enough and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (output / shards.MANIFEST).exists()
        settled(output)
        now = found(output)
        assert len(now) < len(unbroken.shards)
        assert written.items() <= now.items()  # what was there was not made again
        written = noted(output, now)
    done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "images were kept from an earlier attempt" in done.stdout
    assert written.items() <= found(output).items()
    assert shards.read_manifest(StoragePath.of(output)) == unbroken
    shards.verify(StoragePath.of(output), unbroken)
    assert not (output / shards.UNFINISHED).exists()


def found(output) -> dict[str, int]:
    """Shards and when each was written."""
    return {str(p.relative_to(output)): p.stat().st_mtime_ns for p in output.glob("*/shard-*.parquet")}


def noted(output, now: dict[str, int]) -> dict[str, int]:
    """Those of them that another attempt will keep."""
    return {name: when for name, when in now.items() if (output / shards.UNFINISHED / (name + ".npz")).exists()}


def settled(output) -> None:
    """Wait until the tasks of a killed driver have stopped writing."""
    before = None
    while before != (before := (found(output), len(list(output.glob("**/*"))))):
        time.sleep(0.5)


def test_notes_of_other_settings_or_damaged_shards_are_not_kept(ray_here, many, tmp_path):
    source, output = open_source(str(many)), StoragePath.of(tmp_path / "out")
    kept: list[int] = []

    def again(**options):
        manifest = prepare(
            source, output, rows_per_shard=16, on_progress=lambda p: kept.append(p.images_kept), **options
        )
        return manifest, kept[-1]

    with pytest.raises(Enough):
        prepare(source, output, rows_per_shard=16, image_size=48, on_progress=stop)
    (tmp_path / "out/train/shard-00001.parquet").write_bytes(b"damaged")
    first, count = again(image_size=48)
    assert count == 80 - 16
    assert again(image_size=48) == (first, 0)  # what is finished leaves no notes
    with pytest.raises(Enough):
        prepare(source, output, rows_per_shard=8, image_size=48, on_progress=stop)
    other, count = again(image_size=40)
    assert count == 0
    assert other.image_size == 40
    assert sorted(p.name for p in (tmp_path / "out/train").iterdir()) == [f"shard-0000{i}.parquet" for i in range(4)]


class Enough(Exception):
    """Ends a preparation when all its shards are done, and their notes are there."""


def stop(progress: Progress) -> None:
    if progress.images_done == progress.images_total:
        raise Enough


def change_notes(output, change) -> None:
    for path in (output / shards.UNFINISHED).glob("*/*.npz"):
        with np.load(path) as found:
            fields = change(dict(found))
        np.savez(path, **fields)


def test_notes_of_before_they_had_a_version_are_read_and_newer_ones_refused(ray_here, many, tmp_path):
    source, output = open_source(str(many)), tmp_path / "out"
    options = {"rows_per_shard": 16, "image_size": 48}
    with pytest.raises(Enough):
        prepare(source, StoragePath.of(output), on_progress=stop, **options)

    def newer(fields):
        assert fields["schema_version"] == 1
        return fields | {"schema_version": np.array(2)}

    def older(fields):
        del fields["schema_version"]
        report = json.loads(str(fields["report"]))
        del report["guessed"]
        return fields | {"report": np.array(json.dumps(report))}

    change_notes(output, newer)
    with pytest.raises(
        JobError, match=r"_unfinished/.*\.npz: was written by a newer version .* or remove .*_unfinished"
    ) as error:
        prepare(source, StoragePath.of(output), **options)
    assert "\n" not in str(error.value)
    change_notes(output, older)
    kept = []
    prepare(source, StoragePath.of(output), on_progress=lambda p: kept.append(p.images_kept), **options)
    assert kept[-1] == 80


def test_a_note_that_was_cut_off_is_not_read(ray_here, many, tmp_path):
    source, output = open_source(str(many)), tmp_path / "out"
    with pytest.raises(Enough):
        prepare(source, StoragePath.of(output), rows_per_shard=16, image_size=48, on_progress=stop)
    notes = sorted((output / shards.UNFINISHED).glob("*/*.npz"))
    for number, path in enumerate(notes):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * number // len(notes)])
    kept = []
    prepare(
        source, StoragePath.of(output), rows_per_shard=16, image_size=48,
        on_progress=lambda p: kept.append(p.images_kept),
    )  # fmt: skip
    assert kept[-1] == 0


def test_a_file_that_was_replaced_is_seen_by_a_process_that_knew_the_old_one(many):
    entries = open_source(str(many)).splits["train"]
    before = versions(entries)
    with open(entries[3].path, "ab") as file:
        file.write(b"x")
    after = versions(entries)
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [3]
    assert after[3][0] == before[3][0] + 1


def test_a_file_of_many_entries_is_asked_for_its_version_once(tmp_path, monkeypatch):
    (tmp_path / "archive").write_bytes(b"x" * 100)
    entries = [Entry(i, 0, str(i), path=str(tmp_path / "archive"), start=i, length=1) for i in range(50)]
    entries += [Entry(50, 0, "bytes", data=b"x"), Entry(51, 0, "remote", path="s3://bucket/x")]
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *rest, **options: asked.append(path) or stat(path, *rest, **options))
    found = versions(entries)
    monkeypatch.undo()
    assert asked == [str(tmp_path / "archive")]
    assert found == [(100, (tmp_path / "archive").stat().st_mtime_ns)] * 50 + [None, None]


def test_images_whose_white_is_guessed_are_counted_and_named(ray_here, many, tmp_path, capsys):
    odd = many / "train/apple/float.tif"
    PIL.Image.fromarray(np.full((60, 60), 0.5, np.float32)).save(odd, "TIFF")
    source = open_source(str(many))
    view = PrepareView(StoragePath.of(tmp_path / "out"))
    manifest = prepare(source, StoragePath.of(tmp_path / "out"), image_size=48, on_progress=view.progress)
    assert manifest.rejected == 0
    line = "train/apple/float.tif: float32 pixels; the file does not say which value is white, 1 was assumed"
    assert (view.last.guessed, view.last.first_guessed) == (1, line)
    view.finished(manifest, "the command", StoragePath("classes.png"))
    assert f"1 image was scaled by a guess; first {line}" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(many, tmp_path, monkeypatch):
    source, output = open_source(str(many)), StoragePath.of(tmp_path / "out")
    preparation.check_space(source, output, 256, 90, 1024)
    monkeypatch.setattr(StoragePath, "free_bytes", lambda place: 1_000_000)
    with pytest.raises(ValueError, match=r"the shards need about 0\.0 GB, and the disk has 0\.0 GB free"):
        preparation.check_space(source, output, 256, 90, 1024)
    assert preparation.bytes_needed(source, 256, None, 1024) == int(1.1 * (80 * 256**2 * 3 + 256**2 * 12))


def test_an_output_among_the_images_is_refused(many, tmp_path):
    for output in (many, many / "train" / "shards"):
        with pytest.raises(ValueError, match="holds the images of --source"):
            preparation.check_apart(str(many), StoragePath.of(output))
    preparation.check_apart(str(many), StoragePath.of(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds the images of --source"):
        preparation.check_apart("s3://bucket/photos", StoragePath("s3://bucket/photos/train"))
    preparation.check_apart("s3://bucket/photos", StoragePath("s3://bucket/shards"))


def test_an_output_that_is_a_file_or_a_class_is_refused(tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        (photos / name / "0.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"--output .*file: is a file; give a folder"):
        preparation.check_apart(str(photos), StoragePath.of(tmp_path / "file"))
    for output in (photos / "cat", photos / "cat" / "shards"):
        with pytest.raises(ValueError, match="holds the images of --source"):
            preparation.check_apart(str(photos), StoragePath.of(output))
    preparation.check_apart(str(photos), StoragePath.of(photos / "shards"))
    (photos / "shards").mkdir()
    (photos / "shards" / "classes.png").write_bytes(b"x")
    preparation.check_apart(str(photos), StoragePath.of(photos / "shards"))


def test_a_split_without_a_readable_image_is_an_error(ray_here, many, tmp_path):
    for path in (many / "val").glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(JobError, match=r"no image of val could be read; the reasons are in .*rejected.jsonl"):
        prepare(open_source(str(many)), StoragePath.of(tmp_path / "out"), image_size=48, max_rejected=1.0)


def test_small_images_in_folders_are_stored_small(many):
    assert open_source(str(many)).image_size == 256
    small = picture(np.random.default_rng(0), 0, (32, 32))
    first = min(many.glob("train/*/*.JPEG"))
    whole = first.read_bytes()
    first.write_bytes(small)
    assert open_source(str(many)).image_size == 256, "one small image among photographs"
    first.write_bytes(whole)
    for path in many.glob("*/*/*.JPEG"):
        path.write_bytes(small)
    assert open_source(str(many)).image_size == 72


def test_only_our_own_leftovers_are_removed(ray_here, many, tmp_path):
    theirs = [tmp_path / "out/train" / name for name in ("shard-00000.tar", "shard-notes", "x.parquet")]
    ours = [tmp_path / "out/train" / name for name in ("shard-00099.parquet", ".shard-00000.parquet.0123abcd.partial")]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    prepare(open_source(str(many)), StoragePath.of(tmp_path / "out"), image_size=48)
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in ours)


def test_files_that_were_repaired_are_read_again(ray_here, many, tmp_path):
    broken = sorted((many / "train").glob("*/*.JPEG"))[:5]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"broken")
    options = {"image_size": 48, "rows_per_shard": 8}
    with pytest.raises(JobError, match="5 of 80 files could not be read"):
        prepare(open_source(str(many)), StoragePath.of(tmp_path / "out"), **options)
    for path, data in zip(broken, whole, strict=True):
        path.write_bytes(data)
    manifest = prepare(open_source(str(many)), StoragePath.of(tmp_path / "out"), **options)
    assert manifest.rejected == 0
    assert manifest.rows == {"train": 64, "val": 16}


def test_rows_of_a_table_sorted_by_class_are_mixed(ray_here, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from conftest import picture

    data = picture(np.random.default_rng(0), 0, (40, 40))
    for name, count in (("train", 640), ("val", 20)):
        labels = sorted(i % 10 for i in range(count))
        pq.write_table(
            pa.table({"image": [data] * count, "label": labels}), tmp_path / f"{name}.parquet", row_group_size=8
        )
    manifest = prepare(
        open_source(str(tmp_path)), StoragePath.of(tmp_path / "out"), image_size=32, rows_per_shard=64, encoding="raw"
    )
    for shard in manifest.split("train"):
        labels = pq.read_table(tmp_path / "out" / shard.file)["label"].to_pylist()
        assert len(set(labels)) >= 4  # from 8 row groups anywhere in the table
        runs = sum(a != b for a, b in itertools.pairwise(labels))
        assert runs > 30  # of at most 63


def upload(folder, place: StoragePath) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (place / path.relative_to(folder).as_posix()).write(path.read_bytes())


def test_from_object_storage_to_object_storage_and_through_the_feed(ray_here, s3, many, tmp_path):
    root, _, _ = s3
    options = {"image_size": 72, "rows_per_shard": 16}
    here = prepare(open_source(str(many)), StoragePath.of(tmp_path / "here"), **options)
    upload(many, root / "photographs")
    source = open_source((root / "photographs").text)
    assert source.format == "imagefolder"
    there = prepare(source, root / "shards", **options)
    assert there.shards == here.shards
    assert shards.read_manifest(root / "shards") == there
    assert (root / "shards").children().keys() == {"manifest.json", "mean_image.npy", "rejected.jsonl", "train", "val"}
    shards.verify(root / "shards", there)
    config = digits().changed(epochs=1, global_batch_size=16)
    feeds = [Feed(p, here, config, rank=0, world_size=1, num_cpus=0.25, num_tasks=1) for p in
             (root / "shards", StoragePath.of(tmp_path / "here"))]  # fmt: skip
    for feed in feeds:
        feed.start(0)
    for a, b in zip(*(feed.batches("train", 0) for feed in feeds), strict=True):
        assert a["image"].tobytes() == b["image"].tobytes()
    for feed in feeds:
        feed.close()
    (root / "shards" / there.shards[1].file).remove()
    with pytest.raises(shards.DamagedData, match="shard is missing"):
        shards.verify(root / "shards", there, whole=False)


@pytest.mark.ray
@pytest.mark.long
def test_a_server_that_goes_away_is_tried_again_then_named_and_the_rerun_completes(ray_here, s3, many, tmp_path):
    root, stop, restart = s3
    source = open_source(str(many))
    options = {"image_size": 48, "rows_per_shard": 8, "parallelism": 1}
    down = threading.Event()

    def go_away(progress: Progress) -> None:
        if not down.is_set():
            down.set()
            stop()

    start = time.monotonic()
    with pytest.raises(JobError, match=r"s3://bucket/folder/.*cannot be .*, after 3 attempts: .*kept") as error:
        prepare(source, root, on_progress=go_away, **options)
    assert time.monotonic() - start > sum((2.0, 5.0))
    assert "\n" not in str(error.value)
    timer = threading.Timer(2, restart)  # it comes back while the next attempt is already trying
    timer.start()
    kept: list[int] = []
    manifest = prepare(source, root, on_progress=lambda p: kept.append(p.images_kept), **options)
    timer.join()
    assert kept[-1] >= 8
    assert manifest == prepare(source, StoragePath.of(tmp_path / "here"), **options)
    assert json.loads((root / "manifest.json").read())["rows"] == {"train": 64, "val": 16}


def test_rotated_and_transparent_images_are_counted_in_the_manifest(ray_here, tmp_path):
    exif = PIL.Image.Exif()
    exif[274] = 6
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            PIL.Image.new("RGB", (90, 70), "red").save(folder / "phone.jpg", exif=exif)
            PIL.Image.new("RGBA", (70, 70), (9, 9, 9, 0)).save(folder / "clear.png")
    source = open_source(str(tmp_path / "source"))
    options = {"image_size": 64, "rows_per_shard": 8}
    manifest = prepare(source, StoragePath.of(tmp_path / "out"), **options)
    assert (manifest.kinds, manifest.exif) == ({"rotated": 4, "transparent": 4}, "apply")
    manifest = prepare(source, StoragePath.of(tmp_path / "as_is"), exif="ignore", **options)
    assert (manifest.kinds, manifest.exif) == ({"transparent": 4}, "ignore")
    described = describe(digits(), manifest, 2)
    assert (described.exif, described.applies_exif) == ("ignore", False)


@pytest.mark.parametrize(
    ("form", "classes", "rule"),
    [
        ("imagefolder", ("n01440764", "n02102040"), "ignore"),
        ("imagefolder", ("apple", "n02102040"), "apply"),
        ("ilsvrc", ("n01440764",), "ignore"),
        ("cifar10", ("cat",), "ignore"),
        ("parquet", ("n01440764",), "apply"),
    ],
)
def test_exif_is_ignored_where_it_usually_is(form, classes, rule):
    assert preparation.exif_rule(Source("x", form, classes, {})) == rule


def misplaced(count: int) -> Source:
    entries = {split: [Entry(i, i % 2, f"{i}.jpg", data=b"x") for i in (at, at + 1)]
               for split, at in (("train", 0), ("val", 2))}  # fmt: skip
    lost = [(f"lost/{9 - i}.jpg", "is in no class") for i in range(count)]
    return Source("photos", "imagefolder", ("cat", "dog"), entries, misplaced=lost, left_out=[("a.db", "hidden")])


def test_files_without_a_class_that_are_too_many_are_listed_in_the_output(tmp_path):
    output = StoragePath.of(tmp_path / "shards")
    check_rejected(misplaced(1), 0.2, output)
    assert output.children() == {}
    with pytest.raises(ValueError, match=r"2 of 6 files have no class or label, .*; they are listed in (.*)") as error:
        check_rejected(misplaced(2), 0.2, output)
    assert str(error.value).endswith(str(output / "rejected.jsonl"))
    rows = [json.loads(line) for line in (output / "rejected.jsonl").read().splitlines()]
    assert rows == [
        {"name": "lost/8.jpg", "reason": "is in no class"}, {"name": "lost/9.jpg", "reason": "is in no class"},
        {"name": "a.db", "reason": "hidden", "kind": "left out"},
    ]  # fmt: skip
    (output / "manifest.json").write(b"{}")
    (output / "rejected.jsonl").write(b"of the data set that is there")
    with pytest.raises(ValueError, match=r"listed in .*/_unfinished/rejected.jsonl$"):
        check_rejected(misplaced(2), 0.2, output)
    assert (output / "rejected.jsonl").read() == b"of the data set that is there"
    with pytest.raises(ValueError, match=r"such as lost/9.jpg: is in no class$"):
        check_rejected(misplaced(2), 0.2)


def test_a_preparation_that_is_resumed_has_the_split_that_was_drawn_at_first(ray_here, many, tmp_path, monkeypatch):
    place, output = str(many / "train"), StoragePath.of(tmp_path / "out")
    options = {"image_size": 48, "rows_per_shard": 8, "parallelism": 1}

    def stop(progress):
        raise KeyboardInterrupt

    first = open_source(place)
    unbroken = prepare(first, StoragePath.of(tmp_path / "unbroken"), **options)
    with pytest.raises(KeyboardInterrupt):
        prepare(first, output, **options, on_progress=stop)
    assert (output / "_unfinished" / DRAWN).size()
    monkeypatch.setattr(near, "look", lambda data: pytest.fail("looked at again"))
    again = open_source(place, earlier=earlier_draw(output))
    assert again.splits == first.splits
    assert sorted(again.drawn.val) == sorted(first.drawn.val)
    assert prepare(again, output, **options) == unbroken
    assert (output / "_unfinished" / DRAWN).size() is None


def test_what_was_drawn_is_read_again_unless_it_is_damaged(tmp_path):
    output = StoragePath.of(tmp_path)
    assert earlier_draw(output) is None
    drawn = Drawn("digest", (3, 5), ("a line",), ("a warning",))
    (output / "_unfinished" / DRAWN).write(json.dumps(drawn.to_json()).encode())
    assert earlier_draw(output) == drawn
    for damaged in (b"", b"[]", b"[" * 100_000, json.dumps(drawn.to_json() | {"schema_version": 99}).encode()):
        (output / "_unfinished" / DRAWN).write(damaged)
        assert earlier_draw(output) is None
