"""What is shown of a prepared data set: its classes, its contact sheet, and what was found in the source."""

import io
import json
import re

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from alexnet import pictures
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine
from orchestrator.data import sheet
from orchestrator.data.prepare import prepare
from orchestrator.data.shards import MANIFEST, read_manifest
from orchestrator.data.sources import open_source
from orchestrator.data.view import CheckView, class_lines, show_prepared_source, show_source


def many_classes(manifest, rows):
    """A manifest of as many classes as `rows`, which are those of training."""
    names = tuple(f"c{i:02d}" for i in range(len(rows)))
    return manifest.model_copy(
        update={"classes": names, "class_rows": {"train": tuple(rows), "val": (1,) * len(rows)}, "class_names": ()}
    )


@pytest.mark.ray
def test_all_of_few_classes_are_named_in_the_order_of_their_labels(digit_shards):
    manifest = digit_shards[1]
    lines = [line.split() for line in class_lines(manifest)]
    assert lines[0] == ["class", "train", "val"]
    expected = zip(manifest.class_rows["train"], manifest.class_rows["val"], strict=True)
    assert lines[1:] == [[str(digit), str(train), str(val)] for digit, (train, val) in enumerate(expected)]
    assert sum(int(line[1]) for line in lines[1:]) == 1437


@pytest.mark.ray
def test_of_many_classes_the_ten_largest_and_the_ten_smallest_are_named(digit_shards):
    rows = [10 * (i * 7 % 25) + 1 for i in range(25)]  # all different
    lines = [line.split() for line in class_lines(many_classes(digit_shards[1], rows))[1:]]
    in_order = [[f"c{i:02d}", str(rows[i]), "1"] for i in sorted(range(25), key=lambda i: -rows[i])]
    assert lines == [*in_order[:10], ["...", "5", "more"], *in_order[-10:]]
    lines = class_lines(many_classes(digit_shards[1], rows[:20]))
    assert [line.split()[0] for line in lines[1:]] == [f"c{i:02d}" for i in range(20)]
    lines = class_lines(many_classes(digit_shards[1], rows[:21]))
    assert "... 1 more" in lines[11]


@pytest.mark.ray
def test_stored_images_are_the_first_of_their_class(ray_here, photographs, tmp_path):
    output = StoragePath.of(tmp_path / "out")
    manifest = prepare(open_source(str(photographs)), output, image_size=72, encoding="raw", rows_per_shard=9)
    table = pq.read_table([tmp_path / "out" / shard.file for shard in manifest.split("train")]).to_pylist()
    last = len(manifest.classes) - 1
    found = sheet.stored_images(output, manifest, [0, last], 3)
    assert found.keys() == {0, last}
    for label, images in found.items():
        rows = [row["image"] for row in table if row["label"] == label][:3]
        assert len(images) == 3
        assert [image.tobytes() for image in images] == rows


@pytest.mark.ray
def test_the_sheet_begins_with_the_mean_image_and_has_every_class(digit_shards, monkeypatch):
    drawn = []
    draw = pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet", lambda *args: drawn.append(args) or draw(*args))
    folder, manifest = StoragePath.of(digit_shards[0]), digit_shards[1]
    place = sheet.draw_classes(folder, manifest)
    [(images, captions, title)] = drawn
    assert captions == ["mean of the training images", *(str(digit) for digit in range(10) for _ in range(4))]
    assert images.shape == (41, 72, 72, 3)
    table = pq.read_table(digit_shards[0] / "train" / "shard-00000.parquet").to_pylist()
    zeros = [row["image"] for row in table if row["label"] == 0]
    for image, data in zip(images[1:5], zeros, strict=False):
        assert np.abs(image.astype(int) - np.asarray(PIL.Image.open(io.BytesIO(data)))).max() <= 2
    mean = np.load(digit_shards[0] / manifest.mean_image_file)
    assert np.abs(images[0] - mean).max() <= 0.5
    assert title == "digits: images of 10 of 10 classes, as stored"
    picture = PIL.Image.open(io.BytesIO(place.read()))
    assert (picture.format, picture.size) == ("PNG", (1200, 1090))
    place.remove()


def test_characters_that_the_font_lacks_are_no_warning():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    assert sheet.as_png(pictures.contact_sheet(images, ["\u732b"], "\u732b"))[:4] == b"\x89PNG"


@pytest.mark.ray
def test_a_check_repeats_what_was_found_in_the_source(ray_here, photographs, tmp_path, capsys):
    (photographs / "val").rename(tmp_path / "elsewhere")
    (photographs / "train" / "apple" / ".hidden.jpg").write_bytes(b"x")
    (photographs / "train" / "notes.txt").write_bytes(b"x")
    (photographs / "train" / "Apple").mkdir()
    (photographs / "train" / "Apple" / "x.png").write_bytes(
        next((photographs / "train" / "apple").iterdir()).read_bytes()
    )
    said: list[str] = []
    source = open_source(str(photographs / "train"), say=said.append)
    show_source(source, LiveLine())
    before = capsys.readouterr().out.splitlines()
    output = StoragePath.of(tmp_path / "out")
    prepare(source, output, image_size=64, max_rejected=0.5)
    manifest = read_manifest(output)
    assert manifest.found == tuple(said)
    assert said[0].startswith("format imagefolder: ")
    assert any("0.2 of every class is for validation, by seed 0: there is no part for it" in line for line in said)
    assert manifest.left_out == {"hidden": 1, "not an image by its name: .txt": 1}
    show_prepared_source(manifest, LiveLine())
    after = capsys.readouterr().out.splitlines()
    assert after[: len(said)] == said
    assert after[len(said)] == before[0]
    assert re.fullmatch(r"left out: 2 files or folders \(1 .*, 1 .*\), listed in rejected\.jsonl", after[len(said) + 1])
    assert after[len(said) + 2 :] == [line for line in before if line.startswith("warning: ")]
    assert "warning: the classes 'Apple' and 'apple' differ in their spelling alone" in after
    CheckView().begin(manifest)
    assert capsys.readouterr().out.splitlines()[: len(after)] == after
    document = json.loads((tmp_path / "out" / MANIFEST).read_text())
    for name in ("found", "left_out"):  # written before they were added
        del document[name]
    del document["manifest_sha256"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(document | {"schema_version": 1}))
    CheckView().begin(read_manifest(output))
    assert capsys.readouterr().out.splitlines()[0] == before[0]
