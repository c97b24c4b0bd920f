"""Predictions of images from anywhere: what is read, in which order, and what is left of an unfinished file."""

import csv
import dataclasses
import io
import json
import os
import re
import zipfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import refused

import alexnet
from alexnet import images
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.cli import predict as command
from orchestrator.cli.predict import turns
from orchestrator.models.engine import Settings
from orchestrator.models.look import own_images
from orchestrator.models.predict import EntryReader, find_images, predict
from orchestrator.models.row_file import RowFile, check_form
from orchestrator.tracking.served_model import Classifier

BUILD = {"preset": "paper", "num_classes": 3, "width": 0.0625, "input_size": 64, "lrn": {}}


@pytest.fixture(scope="module")
def net():
    made = alexnet.build("paper", 3, width=0.0625, input_size=64, init="he", seed=4)
    description = alexnet.Description(
        BUILD, ("n1", "n2", "n3"), pixel_scale=1 / 64, class_names=("crane", "dog", "crane")
    )
    mean = np.random.default_rng(4).uniform(0, 255, (72, 72, 3)).astype(np.float32)
    return alexnet.TrainedNet(made, description, mean)


def picture(seed, form="JPEG"):
    out = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(small).resize((120 + seed, 90)).save(out, form)
    return out.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Nine images in folders, one of them no image, and what lies beside them."""
    root = tmp_path / "photos"
    for i in range(8):
        file = root / f"folder-{i % 2}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i, "PNG" if i % 3 else "JPEG"))
    (root / "folder-1" / "broken.jpg").write_bytes(b"no picture")
    (root / "notes.txt").write_text("none")
    (root / ".hidden.jpg").write_bytes(b"")
    return root


def expected(net, data):
    """Probabilities of one image by slices in float64."""
    stored = images.resize_and_center(images.decode(data, exif=True), 72)
    x = ((stored - net.mean_image.astype(np.float64)) / 64)[4:68, 4:68]
    with torch.no_grad():
        scores = net.net.double()(torch.from_numpy(x[None]).permute(0, 3, 1, 2))
    net.net.float()
    return torch.softmax(scores, 1)[0].numpy()


def predictions(net, source, top=3, **changes):
    names, classes, shares, rejected = [], [], [], []
    for part in predict(net, find_images(str(source)), Settings(**{"batch_size": 4} | changes), top=top):
        names += part.names
        classes += part.classes
        shares += part.probabilities
        rejected += part.rejected
    return names, classes, shares, rejected


def test_a_folder_in_sorted_order_with_what_cannot_be_read(net, tree):
    found = find_images(str(tree))
    assert (found.total, found.left_out) == (9, 2)
    names, classes, shares, rejected = predictions(net, tree)
    assert names == sorted(str(f.relative_to(tree)) for f in tree.glob("folder-*/[0-9]*"))
    assert [name for name, _ in rejected] == ["folder-1/broken.jpg"]
    words = ("crane (n1)", "dog", "crane (n3)")
    for name, guesses, given in zip(names, classes, shares, strict=True):
        right = expected(net, (tree / name).read_bytes())
        assert guesses == [words[i] for i in np.argsort(-right)]
        np.testing.assert_allclose(given, -np.sort(-right), rtol=1e-4)


def test_an_image_a_pattern_a_zip_and_parquet_give_the_same(net, tree, tmp_path):
    names, classes, _, _ = predictions(net, tree, top=1)
    known = dict(zip(names, classes, strict=True))
    assert predictions(net, tree / "folder-0" / "0.jpg", top=1)[:2] == (["0.jpg"], [known["folder-0/0.jpg"]])
    by_pattern = predictions(net, tree / "**" / "*.png", top=1)
    assert by_pattern[0] == sorted(str(file) for file in tree.glob("**/*.png"))
    assert by_pattern[1] == [known[name.removeprefix(f"{tree}/")] for name in by_pattern[0]]
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(names):
            archive.write(tree / name, name)
    assert predictions(net, tmp_path / "all.zip", top=1)[:2] == (names, classes)
    rows = [{"bytes": (tree / name).read_bytes(), "path": name} for name in names]
    pq.write_table(pa.table({"image": rows, "file_name": names}), tmp_path / "a.parquet", row_group_size=3)
    assert predictions(net, tmp_path / "a.parquet", top=1)[:2] == (names, classes)
    pq.write_table(pa.table({"image": rows}), tmp_path / "b.parquet", row_group_size=5)
    numbered = predictions(net, tmp_path / "b.parquet", top=1)
    assert numbered[0][5:7] == ["b.parquet, row group 1, row 0", "b.parquet, row group 1, row 1"]
    assert numbered[1] == classes


def test_a_flipped_byte_in_a_zip_is_rejected_by_its_name(net, tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("folder-0/0.jpg", "folder-1/1.png"):
            archive.write(tree / name, name)
        middle = archive.getinfo("folder-0/0.jpg").compress_size // 2
    data = bytearray((tmp_path / "all.zip").read_bytes())
    data[data.index(b"\xff\xd8\xff") + middle] ^= 1
    (tmp_path / "all.zip").write_bytes(data)
    names, _, _, [(rejected, why)] = predictions(net, tmp_path / "all.zip")
    assert (names, rejected) == (["folder-1/1.png"], "folder-0/0.jpg")
    assert why.startswith("damaged in the archive: its CRC-32 is ")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/dev/null", "^--source /dev/null: is a device, neither a folder nor a file that can be read; give an image"),
        ("pipe.zip", "is a pipe, neither a folder nor a file"),
        ("pipes", r"pipes/b\.zip: cannot be read as a zip: is a pipe, not a file$"),
        ("nowhere", "no such file or folder; give an image"),
        ("*.jpg", "no image matches it"),
        ("empty", "has no image: 0 files"),
        ("texts", "has no image: 1 file "),
        ("plain.parquet", "has no column of image bytes; it has number"),
        ("broken.parquet", "cannot be read as a table"),
    ],
)
def test_a_source_without_images_is_one_line(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "pipes").mkdir()
    for name in ("pipe.zip", "pipes/b.zip"):
        os.mkfifo(tmp_path / name)
    pq.write_table(pa.table({"number": [1]}), tmp_path / "plain.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=words) as error:
        find_images(source)
    assert "\n" not in str(error.value)


def test_a_source_of_an_endless_name_is_one_line_of_bounded_length(net, tmp_path, monkeypatch, capsys):
    net.save(tmp_path / "net")
    line = refused("predict", [str(tmp_path / "net"), "--source", "x" * 5000], tmp_path, monkeypatch, capsys)
    assert re.match(
        r"predict.py: error: --source x{600,} \.\.\. \(\d+ more characters\) \.\.\. .*: no such file or ", line
    )
    assert len(line) < 1100


def test_a_table_without_images_stops_no_folder(net, tree):
    before = predictions(net, tree)
    pq.write_table(pa.table({"number": [1]}), tree / "folder-0" / "plain.parquet")
    (tree / "broken.parquet").write_bytes(b"PAR1")
    (tree / "labels.csv").write_text("file,label\n")
    found = find_images(str(tree))
    assert (found.total, found.left_out) == (9, 3)
    names, classes, shares, rejected = predictions(net, tree)
    assert (names, classes, shares) == before[:3]
    assert [name for name, _ in rejected] == ["broken.parquet", "folder-0/plain.parquet", "folder-1/broken.jpg"]
    assert rejected[0][1].startswith("cannot be read as a table: ")
    assert rejected[1][1] == "has no column of image bytes; it has number"


SCHEMA = pa.schema([("name", pa.string()), ("classes", pa.list_(pa.string()))])


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_rows_are_written_as_they_come_and_appear_at_the_end(tmp_path, form):
    place = StoragePath.of(tmp_path / f"rows.{form}")
    with RowFile(place, SCHEMA) as file:
        file.write({"name": ["a", 'b,"'], "classes": [["x", "y"], ["z"]]})
        file.write({"name": ["c"], "classes": [[]]})
        assert not place.local.exists()
    rows = [("a", ["x", "y"]), ('b,"', ["z"]), ("c", [])]
    if form == "parquet":
        assert [tuple(row.values()) for row in pq.read_table(place.local).to_pylist()] == rows
    elif form == "csv":
        found = list(csv.reader(place.local.open()))
        assert found[0] == ["name", "classes"]
        assert [(name, json.loads(cell)) for name, cell in found[1:]] == rows
    else:
        assert [tuple(json.loads(line).values()) for line in place.local.open()] == rows
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


def test_a_file_that_was_not_finished_leaves_the_one_before(tmp_path):
    place = StoragePath.of(tmp_path / "rows.csv")
    place.write(b"before")
    with pytest.raises(JobError), RowFile(place, SCHEMA) as file:
        file.write({"name": ["a"], "classes": [[]]})
        raise JobError("no more")
    assert place.read() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    with pytest.raises(ValueError, match=r"ends in none of \.parquet, \.csv, \.jsonl"):
        check_form(StoragePath.of("rows.txt"))


def test_an_output_that_cannot_be_written_is_named_as_it_was_given(net, tmp_path):
    (tmp_path / "file").write_text("")
    output = StoragePath.of(tmp_path / "file" / "x.csv")
    with pytest.raises(JobError, match=f"^--output {output}: cannot be written "):
        command.write(net, None, None, output, None)


def test_rows_go_to_object_storage_whole(s3):
    place = s3[0] / "rows.jsonl"
    with RowFile(place, SCHEMA) as file:
        file.write({"name": ["a"], "classes": [["x"]]})
        assert place.size() is None
    assert json.loads(place.read()) == {"name": "a", "classes": ["x"]}


def test_images_in_object_storage(net, tree, s3):
    for name in ("folder-0/0.jpg", "folder-1/1.png"):
        (s3[0] / name).write((tree / name).read_bytes())
    here = predictions(net, tree, top=1)
    there = predictions(net, s3[0], top=1)
    assert there[0] == ["folder-0/0.jpg", "folder-1/1.png"]
    assert there[1] == [here[1][here[0].index(name)] for name in there[0]]


def test_an_image_that_crashes_its_decoder_is_rejected_and_no_other(net, tree, monkeypatch):
    """Foreign images are decoded in a process of their own, as in preparing data."""
    before = predictions(net, tree)
    bad, read = (tree / "folder-1" / "1.png").read_bytes(), images._decode_with_pillow

    def crashing(data, *args):
        return os.abort() if data == bad else read(data, *args)

    monkeypatch.setattr(images, "_decode_with_pillow", crashing)
    names, classes, shares, rejected = predictions(net, tree)
    assert rejected == [("folder-1/1.png", "crashes its decoder (signal 6)"), *before[3]]
    kept = [i for i, name in enumerate(before[0]) if name != "folder-1/1.png"]
    assert (names, classes) == tuple([before[part][i] for i in kept] for part in range(2))
    np.testing.assert_allclose(shares, [before[2][i] for i in kept], rtol=1e-4)


@pytest.mark.parametrize(
    ("classes", "exif", "turned"),
    [("abc", "", True), ("abc", "apply", True), ("abc", "ignore", False), ("n", "", False), ("n", "apply", True)],
)
def test_predict_look_and_the_served_model_turn_images_as_the_training_images_were(
    net, tmp_path, classes, exif, turned
):
    file, state = tmp_path / "turned.jpg", PIL.Image.Exif()
    state[images.ORIENTATION] = 6
    marked = np.zeros((90, 120, 3), np.uint8)
    marked[:30], marked[:, :40] = (250, 0, 0), (0, 0, 250)
    PIL.Image.fromarray(marked).save(file, "JPEG", quality=95, exif=state)
    named = tuple(classes) if classes == "abc" else ("n01440764", "n01443537", "n01484850")
    described = dataclasses.replace(net.description, classes=named, class_names=(), exif=exif)
    trained = alexnet.TrainedNet(net.net, described, net.mean_image)
    expected = images.resize_and_center(images.decode(file.read_bytes(), exif=turned), 72)
    reader = EntryReader(72, exif=turns(trained, None))
    [entry] = find_images(str(file)).entries()
    by_predict = reader.decode([entry], reader.fetch([entry]), lambda function, parts: list(map(function, parts)))
    np.testing.assert_array_equal(by_predict.stored[0], expected)
    np.testing.assert_array_equal(own_images(trained, [file])[0][0], expected)
    served = Classifier()
    served.trained, served.reads_files = trained, False
    np.testing.assert_array_equal(served.stored(file.read_bytes(), 0, 1), expected)
    assert [turns(trained, asked) for asked in ("apply", "ignore")] == [True, False]


def test_an_output_that_is_there_is_kept_and_few_classes_are_all_shown(tmp_path, capsys):
    net = alexnet.build("paper", 3, width=0.125, input_size=64, init="he")
    build = {"preset": "paper", "num_classes": 3, "width": 0.125, "input_size": 64}
    trained = alexnet.TrainedNet(net, alexnet.Description(build, ("a", "b", "c")), np.zeros((72, 72, 3), np.float32))
    trained.save(tmp_path / "model")
    PIL.Image.new("RGB", (80, 80), (200, 10, 30)).save(tmp_path / "red.png")
    output = tmp_path / "labels.csv"
    output.write_text("mine")
    flags = command.parser()
    given = [str(tmp_path / "model"), "--source", str(tmp_path / "red.png"), "--output", str(output)]
    with pytest.raises(SystemExit):
        command.main(flags, flags.parse_args(given))
    assert "labels.csv: is already there; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert command.main(flags, flags.parse_args([*given, "--overwrite"])) == 0
    [row] = csv.DictReader(output.open())
    assert sorted(json.loads(row["classes"])) == ["a", "b", "c"]
    with pytest.raises(SystemExit):
        command.main(flags, flags.parse_args([*given, "--overwrite", "--top", "4"]))
    assert "--top 4: the model has 3 classes" in capsys.readouterr().err


def test_a_pipe_is_not_replaced_by_the_output(tmp_path):
    os.mkfifo(tmp_path / "out.csv")
    with pytest.raises(ValueError, match=r"--output .*out.csv: is a pipe; name a file"):
        check_form(StoragePath.of(tmp_path / "out.csv"))
