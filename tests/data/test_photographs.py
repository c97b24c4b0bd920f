"""What people have in their folders: junk beside the images, other names, other forms of labels, no validation part."""

import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from alexnet.images import NotAnImage
from orchestrator.base.storage import StoragePath
from orchestrator.data.sources import Options, open_source, read
from orchestrator.data.sources.imagefolder import near_equal
from orchestrator.data.sources.listing import read_range
from orchestrator.data.sources.tree import Tree, tree_of

CLASSES = ("bird", "cat", "dog")


def jpeg(number: int) -> bytes:
    """A picture of its own for every number."""
    return picture(np.random.default_rng(number), number % 2, (70, 80))


def write(root, files: dict[str, bytes | str]):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def folders(train="train/", val: str | None = "val/", counts=(6, 3)) -> dict[str, bytes]:
    """Images of three classes, all different."""
    files = {}
    for part, (prefix, count) in enumerate(zip((train, val), counts, strict=True)):
        if prefix is not None:
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    files[f"{prefix}{name}/{i}.jpg"] = jpeg(1000 * part + 100 * label + i)
    return files


def listed(source) -> dict[str, list[tuple[str, bytes]]]:
    """Class and bytes of every image, by split."""
    return {
        split: sorted((source.classes[entry.label], read(entry)) for entry in entries)
        for split, entries in source.splits.items()
    }


def expected(files: dict[str, bytes], train="train/", val="val/") -> dict[str, list[tuple[str, bytes]]]:
    found = {}
    for split, prefix in (("train", train), ("val", val)):
        found[split] = sorted(
            (name.removeprefix(prefix).split("/")[0], data) for name, data in files.items() if name.startswith(prefix)
        )
    return found


def said_of(root, options=None):
    lines: list[str] = []
    return open_source(str(root), options or Options(), say=lines.append), "\n".join(lines)


JUNK = {
    "train/.ipynb_checkpoints/x.jpg": "hidden",
    "train/__MACOSX/cat/x.jpg": "made by a file manager",
    "train/cat/@eaDir/x.jpg/SYNOPHOTO_THUMB_S.jpg": "made by a file manager",
    "train/cat/.thumbnails/x.jpg": "hidden",
    "train/cat/._x.jpg": "hidden",
    "train/cat/x.jpg~": "made by a file manager or a download",
    "train/cat/x.jpg.part": "made by a file manager or a download",
    "train/cat/Thumbs.db": "made by a file manager or a download",
    "val/dog/.DS_Store": "hidden",
    "val/dog/desktop.ini": "made by a file manager or a download",
    "train/cat/0.xml": "not an image by its name: .xml",
    "README.md": "not an image by its name: .md",
}


def test_what_is_no_data_is_left_out_by_rule_and_named(tmp_path):
    files = folders()
    write(tmp_path, files | dict.fromkeys(JUNK, jpeg(9)))
    source = open_source(str(tmp_path))
    assert source.classes == CLASSES
    assert listed(source) == expected(files)
    assert source.misplaced == []
    rules = {name.rstrip("/"): rule for name, rule in source.left_out}
    for name, rule in JUNK.items():  # a folder of junk is named once
        shown = next(n for n in rules if name == n or name.startswith(n + "/"))
        assert rules[shown] == rule


@pytest.mark.parametrize("prefix", ["", "train/", "pets/"])
def test_files_without_an_extension_beside_the_classes_are_no_images_and_within_them_are_looked_at(tmp_path, prefix):
    files = folders(prefix, None, counts=(6, 0)) | {f"{prefix}cat/00017": jpeg(77)}
    source = open_source(str(write(tmp_path, files | {f"{prefix}LICENSE": b"x", "annotation/cat/00017": b"x"})))
    together = listed(source)
    assert sorted(together["train"] + together["val"]) == expected(files, prefix, "nowhere/")["train"]
    assert source.misplaced == []
    assert sorted(name.rpartition("/")[2] for name, _ in source.left_out) == ["00017", "LICENSE"]


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ("train/", "valid/", ""),
        ("Train/", "Val/", ""),
        ("training/", "validation/", ""),
        ("Training/", "Testing/", "Testing/ is used for validation"),
        ("train/", "test/", "test/ is used for validation"),
        ("pets/train/", "pets/val/", ""),
        ("a/b/train2017/", "a/b/val2017/", ""),
        ("seg_train/seg_train/", "seg_test/seg_test/", "is used for validation"),
        ("train/animals/", "val/animals/", ""),
    ],
)
def test_the_usual_names_of_the_parts(tmp_path, train, val, words):
    files = folders(train, val)
    source, said = said_of(write(tmp_path, files))
    assert source.classes == CLASSES
    assert listed(source) == expected(files, train, val)
    assert words in said


def test_a_test_part_beside_a_val_part_is_left_out_and_said(tmp_path):
    files = folders()
    source, said = said_of(write(tmp_path, files | {"test/0.jpg": jpeg(5), "test/1.jpg": jpeg(6)}))
    assert listed(source) == expected(files)
    assert ("test/", "a part that is neither for training nor for validation") in source.left_out
    assert "test/ is left out" in said


@pytest.mark.parametrize("prefix", ["", "pets/", "train/"])
def test_without_a_val_part_a_fifth_of_every_class_is_drawn(tmp_path, prefix):
    files = folders(prefix, None, counts=(20, 0))
    source, said = said_of(write(tmp_path, files))
    assert {s: Counter(e.label for e in es) for s, es in source.splits.items()} == {
        "train": {0: 16, 1: 16, 2: 16}, "val": {0: 4, 1: 4, 2: 4},
    }  # fmt: skip
    together = listed(source)
    assert sorted(together["train"] + together["val"]) == expected(files, prefix, "nowhere/")["train"]
    assert "0.2 of every class is for validation, by seed 0" in said
    again = open_source(str(tmp_path))
    assert listed(again) == together
    other = open_source(str(tmp_path), Options(seed=1))
    assert listed(other) != together
    half = open_source(str(tmp_path), Options(val_fraction=0.5))
    assert Counter(entry.label for entry in half.splits["val"]) == {0: 10, 1: 10, 2: 10}


def test_pipes_and_empty_files_are_not_compared(tmp_path):
    files = folders() | {"train/cat/empty.jpg": b"", "val/cat/empty.jpg": b""}
    write(tmp_path, files)
    os.mkfifo(tmp_path / "train/dog/pipe.jpg")
    assert open_source(str(tmp_path)).warnings == []


def test_copies_of_one_photograph_are_on_one_side_of_the_draw(tmp_path):
    files = {f"{name}/{i}-{copy}.jpg": jpeg(100 * label + i) for label, name in enumerate(CLASSES)
             for i in range(6) for copy in range(3)}  # fmt: skip
    source = open_source(str(write(tmp_path, files)))
    sides = listed(source)
    assert not {data for _, data in sides["train"]} & {data for _, data in sides["val"]}
    assert len(sides["val"]) >= 9


def test_of_classes_of_one_image_some_are_for_validation_alone(tmp_path):
    source = open_source(str(write(tmp_path, {f"class{i:02d}/0.jpg": jpeg(i) for i in range(20)})))
    assert {split: len(entries) for split, entries in source.splits.items()} == {"train": 16, "val": 4}
    assert source.warnings[0].startswith("no training images of class")
    assert (
        "every class has one image: 4 of these are for validation, and their classes cannot be learned" in source.found
    )


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    files = {f"{name}/{i}.jpg": jpeg(10 * label + i) for label, name in enumerate(("bus", "car", "train"))
             for i in range(5)}  # fmt: skip
    source = open_source(str(write(tmp_path, files)))
    assert source.classes == ("bus", "car", "train")


def test_what_looks_wrong_is_said(tmp_path):
    files = folders() | {"train/Cat/0.jpg": jpeg(70), "train/wolf/0.jpg": jpeg(71)}
    files["train/dog/twin.jpg"] = files["val/dog/0.jpg"]
    files |= {f"train/dog/{breed}/{i}.jpg": jpeg(80 + 3 * i + n) for n, breed in enumerate(("pug", "corgi"))
              for i in range(2)}  # fmt: skip
    (tmp_path / "train/fish").mkdir(parents=True)
    source = open_source(str(write(tmp_path, files)))
    assert source.classes == ("Cat", "bird", "cat", "dog", "wolf")
    text = "\n".join(source.warnings)
    assert "the classes 'Cat' and 'cat' differ in their spelling alone" in text
    assert "train/fish/ holds no images, and is no class" in text
    assert "the class dog holds folders, whose images are all of it: corgi, pug" in text
    assert "no validation images of Cat, wolf" in text
    assert "1 validation image is a training image, too: val/dog/0.jpg is train/dog/twin.jpg" in text


def test_nothing_looks_wrong_with_folders_as_they_should_be(tmp_path):
    assert open_source(str(write(tmp_path, folders()))).warnings == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.txt": "x"}, r"has no images: 1 file \(1 .txt\); expected folders CLASS/IMAGE"),
        ({"0.jpg": b"", "1.jpg": b""}, r"it has 0 class folders of images; .* there are 2 files \(2 .jpg\)"),
        ({f"{c}.{i}.jpg": b"" for c in ("cat", "dog") for i in range(5)}, r"is read with --label-pattern '\^\("),
        ({"0.jpg": b"", "notes.csv": "a,b\n1,2\n"}, "labels in a table are read with --labels notes.csv"),
        ({"only/0.jpg": b"", "only/1.jpg": b""}, "has 1 class folder of images"),
        ({"on\nly/0.jpg": b"", "on\nly/1.j\npg": b""}, r"has 1 class folder of images.* in on\\nly/"),
        ({"0.jpg": b"", "no\ntes.csv": "a,b\n1,2\n"}, r"labels in a table are read with --labels no\\ntes.csv"),
        ({"x/train/a/0.jpg": b"", "y/train/a/0.jpg": b""}, "holds several data sets, in x/, y/"),
        ({"a.tar.gz": b""}, "has no images"),
    ],
)
def test_what_cannot_be_read_says_what_is_there_and_what_would_work(tmp_path, files, words):
    with pytest.raises(ValueError, match=words) as error:
        open_source(str(write(tmp_path, files)))
    assert "\n" not in str(error.value)


# labels that are listed


def flat(prefix="images/", count=6) -> dict[str, bytes]:
    return {f"{prefix}{label}-{i}.jpg": jpeg(10 * label + i) for label in range(3) for i in range(count)}


def class_of(name: str) -> str:
    return CLASSES[int(name.rpartition("/")[2].split("-")[0])]


@pytest.mark.parametrize(
    ("table", "line", "options"),
    [
        ("labels.csv", "{name},{label}", {}),
        ("labels.csv", "{stem},{label}", {}),
        ("images/metadata.csv", "{last},{label}", {}),
        ("labels.tsv", "{name}\t{label}", {}),
        ("labels.csv", "{name};{label}", {}),
        ("odd.csv", "{name},{label}", {"labels": "odd.csv", "image_column": "where", "label_column": "what"}),
        ("images/metadata.jsonl", '{{"file_name": "{last}", "label": "{label}"}}', {}),
    ],
)
def test_a_table_beside_the_images(tmp_path, table, line, options):
    files = flat()
    separator = next(c for c in ",\t;" if c in line)
    header = separator.join(("where", "what") if options else ("file_name", "label")) + "\n"
    rows = [
        line.format(name=n, last=n.split("/")[1], stem=n.split("/")[1].removesuffix(".jpg"), label=class_of(n))
        for n in files
    ]
    text = ("" if table.endswith("jsonl") else header) + "\n".join(rows)
    source, said = said_of(write(tmp_path, files | {table: text}), Options(**options))
    assert source.format == "table"
    assert source.classes == CLASSES
    together = listed(source)
    assert sorted(together["train"] + together["val"]) == sorted((class_of(n), d) for n, d in files.items())
    assert f"labels come from {table}" in said


def test_a_table_s_rows_and_images_without_each_other_are_named_and_its_parts_are_kept(tmp_path):
    files = flat()
    rows = [f"{name},{class_of(name)},{'valid' if name.endswith('-0.jpg') else 'train'}" for name in list(files)[1:]]
    rows += ["images/gone.jpg,cat,train", f"{list(files)[1]},dog,train"]
    text = "image,class,split\n" + "\n".join(rows)
    source = open_source(str(write(tmp_path, files | {"labels.csv": text})))
    assert sorted(entry.name for entry in source.splits["val"]) == ["images/1-0.jpg", "images/2-0.jpg"]
    assert sorted(source.misplaced) == [
        ("images/0-0.jpg", "has no label in labels.csv"),
        ("images/0-1.jpg", "labels.csv lists it a second time"),
        ("images/gone.jpg", "labels.csv lists it, and it is not there"),
    ]


def test_a_table_is_read_once(tmp_path, monkeypatch):
    files = {f"{i}.jpg": jpeg(i) for i in range(4)}
    table = "file,label\n" + "".join(f"{name},{CLASSES[i % 2]}\n" for i, name in enumerate(files))
    write(tmp_path, files | {"labels.csv": table, "notes.csv": "day,weather\n1,fair\n"})
    read_tables = []
    whole = Tree.read
    monkeypatch.setattr(Tree, "read", lambda tree, name: read_tables.append(name) or whole(tree, name))
    assert open_source(str(tmp_path)).format == "table"
    assert sorted(read_tables) == ["labels.csv", "notes.csv"]


def test_numbers_for_labels_are_in_the_order_of_numbers(tmp_path):
    files = {f"{i}.jpg": jpeg(i) for i in range(24)}
    text = "id,label\n" + "\n".join(f"{i},{i % 12}" for i in range(24))
    source = open_source(str(write(tmp_path, files | {"train.csv": text})))
    assert source.classes == tuple(map(str, range(12)))


def test_a_column_that_is_not_there_is_named(tmp_path):
    write(tmp_path, flat() | {"labels.csv": "file_name,what\na,b\n"})
    for options, words in (
        ({"labels": "labels.csv"}, "name the column with --label-column; its columns are file_name, what"),
        ({"labels": "labels.csv", "label_column": "x"}, "--label-column x: is not a column of labels.csv"),
        ({"labels": "nowhere.csv"}, "--labels nowhere.csv: is not in .*; there are labels.csv"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(str(tmp_path), Options(**options))


def test_classes_in_the_names_of_files(tmp_path):
    files = {f"{name}.{i}.jpg": jpeg(10 * label + i) for label, name in enumerate(CLASSES) for i in range(5)}
    source, _ = said_of(write(tmp_path, files | {"other.jpg": jpeg(99)}), Options(label_pattern=r"^([a-z]+)\.\d"))
    assert source.classes == CLASSES
    together = listed(source)
    assert sorted(together["train"] + together["val"]) == sorted((n.split(".")[0], d) for n, d in files.items())
    assert source.misplaced == [("other.jpg", r"its name does not match ^([a-z]+)\.\d")]
    for pattern, words in (("cat", "has no group"), ("(", "is not a regular expression"), ("(zebra)", "matches none")):
        with pytest.raises(ValueError, match=words):
            open_source(str(tmp_path), Options(label_pattern=pattern))


def test_tiny_imagenet(tmp_path):
    wnids = ("n01443537", "n02124075")
    files: dict[str, bytes | str] = {f"train/{w}/images/{w}_{i}.JPEG": jpeg(10 * k + i) for k, w in enumerate(wnids)
                                     for i in range(4)}  # fmt: skip
    files |= {f"train/{w}/{w}_boxes.txt": "x" for w in wnids}
    files |= {f"val/images/val_{i}.JPEG": jpeg(100 + i) for i in range(4)}
    files["val/val_annotations.txt"] = "".join(f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t62\t62\n" for i in range(4))
    files |= {"words.txt": "n01443537\tgoldfish\nn02124075\tEgyptian cat\n", "test/images/test_0.JPEG": jpeg(200)}
    source, said = said_of(write(tmp_path, files))
    assert source.classes == wnids
    assert source.class_names == ("goldfish", "Egyptian cat")
    assert [(entry.name, entry.label) for entry in source.splits["val"]] == [
        (f"val/images/val_{i}.JPEG", i % 2) for i in range(4)
    ]
    assert len(source.splits["train"]) == 8
    assert source.warnings == []
    assert "its labels come from val/val_annotations.txt" in said


def test_caffe_s_lists(tmp_path):
    files: dict[str, bytes | str] = dict(flat())
    names = list(files)
    for part, chosen in (("train", names[3:]), ("val", names[:3])):
        files[f"{part}.txt"] = "".join(f"{name} {name.split('/')[1][0]}\n" for name in chosen)
    source, _ = said_of(write(tmp_path, files))
    assert (source.format, source.classes) == ("caffe", ("0", "1", "2"))
    assert sorted(entry.name for entry in source.splits["val"]) == names[:3]
    assert all(entry.name.split("/")[1][0] == source.classes[entry.label] for entry in source.splits["train"])


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_tars_of_webdataset(tmp_path, kind):
    def shard(first: int, count: int) -> bytes:
        members = {}
        for i in range(first, first + count):
            label = str(i % 3) if kind == "cls" else json.dumps({"label": i % 3})
            members |= {f"s{i:04d}.jpg": jpeg(i), f"s{i:04d}.{kind}": label.encode()}
        if kind == "json":
            members |= {"s9999.jpg": jpeg(9999), "s9999.cls": b"0"}
        return tar(members)

    write(
        tmp_path, {f"set-train-{n:06d}.tar": shard(6 * n, 6) for n in range(2)} | {"set-val-000000.tar": shard(50, 3)}
    )
    source = open_source(str(tmp_path), Options(format="webdataset"))
    assert source.classes == ("0", "1", "2")
    assert listed(source)["val"][:1] == [("0", jpeg(51))]
    found = {(source.classes[e.label], read(e)) for e in source.splits["train"]}
    assert {(str(i % 3), jpeg(i)) for i in range(12)} <= found
    if kind == "cls":
        assert open_source(str(tmp_path)).format == "webdataset"
        single, _ = said_of(tmp_path / "set-train-000000.tar")
        assert sum(map(len, single.splits.values())) == 6


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_folders_is_read_in_place(tmp_path, packing):
    files = folders("photos/train/", "photos/val/")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", packing) as archive:
        for name, data in (files | {"__MACOSX/photos/train/cat/._0.jpg": b"x", "photos/.DS_Store": b"x"}).items():
            archive.writestr(name, data)
    source = open_source(str(tmp_path / "photos.zip"))
    assert listed(source) == expected(files, "photos/train/", "photos/val/")
    assert dict(source.left_out) == {"__MACOSX/": "made by a file manager", "photos/.DS_Store": "hidden"}
    assert os.listdir(tmp_path) == ["photos.zip"]


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_a_zip_is_held_against_its_checksum(tmp_path, packing):
    files = folders("train/", "val/") | {"notes.csv": b"file,label\n"}
    with zipfile.ZipFile(tmp_path / "x.zip", "w", packing) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    entries = [e for split in open_source(str(tmp_path / "x.zip")).splits.values() for e in split]
    tree = tree_of(StoragePath.of(tmp_path / "x.zip"))
    whole = bytearray((tmp_path / "x.zip").read_bytes())
    first, notes = entries[0], tree.files["notes.csv"].start
    for at in (first.start + (first.packed or first.length) // 2, notes + (packing == zipfile.ZIP_DEFLATED)):
        whole[at] ^= 1
    (tmp_path / "x.zip").write_bytes(whole)
    with pytest.raises(NotAnImage, match=r"^damaged in the archive: ") as error:
        read(first)
    if packing == zipfile.ZIP_STORED:
        changed = zlib.crc32(whole[first.start : first.start + first.length])
        right = zlib.crc32(files[first.name])
        assert str(error.value) == f"damaged in the archive: its CRC-32 is {changed:08x} instead of {right:08x}"
    together = read_range(entries)
    assert str(together[0]) == str(error.value)
    assert together[1:] == [files[entry.name] for entry in entries[1:]]
    with pytest.raises(ValueError, match=r"x\.zip: notes\.csv: damaged in the archive: "):
        tree.read("notes.csv")


def test_archives_of_each_part_and_a_tar(tmp_path):
    files = folders("", None)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    (tmp_path / "val.tar").write_bytes(tar({f"val/{name}/x.jpg": jpeg(500 + i) for i, name in enumerate(CLASSES)}))
    source = open_source(str(tmp_path))
    assert listed(source)["val"] == [(name, jpeg(500 + i)) for i, name in enumerate(CLASSES)]
    assert len(source.splits["train"]) == 18
    whole = open_source(str(write(tmp_path / "t", {"all.tar": tar(folders())}) / "all.tar"))
    assert listed(whole) == expected(folders())


def bad_zip(kind: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../evil/0.jpg" if kind == "parent" else "cat/0.jpg", b"x" * 1000)
        archive.writestr("dog/0.jpg", b"y" * 1000)
    if kind == "empty":
        return b""
    data = bytearray(buffer.getvalue())
    if kind == "encrypted":
        data[data.index(b"PK\x01\x02") + 8] |= 1
    if kind == "cut":
        del data[len(data) // 2 :]
    if kind == "text":
        data[:] = b"no zip at all" * 100
    if kind == "version":
        data[data.index(b"PK\x01\x02") + 6] = 99
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("parent", "has an absolute or parent path"),
        ("encrypted", "is encrypted"),
        ("cut", "cannot be read as a zip: File is not a zip file; download it again$"),
        ("empty", "; download it again$"),
        ("text", "cannot be read as a zip: File is not a zip file$"),
        ("version", r"zip file version 9\.9$"),
    ],
)
def test_bad_zips_are_refused_in_one_line(tmp_path, kind, words):
    (tmp_path / "x.zip").write_bytes(bad_zip(kind))
    with pytest.raises(ValueError, match=words) as error:
        open_source(str(tmp_path / "x.zip"))
    assert "\n" not in str(error.value)


def test_a_member_that_unpacks_to_gigabytes_is_no_image(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("cat/0.jpg", "dog/0.jpg", "cat/1.jpg", "dog/1.jpg"):
            archive.writestr(name, jpeg(1))
        archive.writestr("cat/bomb.jpg", bytes(2**29))
    assert path.stat().st_size < 2**20
    entries = [entry for entries in open_source(str(path)).splits.values() for entry in entries]
    bomb = next(entry for entry in entries if entry.name.endswith("bomb.jpg"))
    with pytest.raises(NotAnImage, match="536870912 bytes are more than any photograph has"):
        read(bomb)


def test_shards_within_the_source_are_no_part_of_it(tmp_path):
    files = folders("", None, counts=(6, 0))
    before = listed(open_source(str(write(tmp_path, files))))
    written = {"out/manifest.json": b"{}", "out/train/shard-00000.parquet": b"x", "out/contact_sheet.png": jpeg(5)}
    source = open_source(str(write(tmp_path, written)))
    assert source.classes == CLASSES
    assert listed(source) == before
    assert source.left_out == [("out/", "shards that were prepared")]


def test_photographs_beside_shards_are_no_shards(tmp_path):
    """A class folder into which shards were written keeps its photographs."""
    before = listed(open_source(str(write(tmp_path, folders("", None, counts=(6, 0))))))
    made = {"manifest.json": b"{}", "train/shard-00000.parquet": b"x", "classes.png": jpeg(5), "mean_image.npy": b"x"}
    source = open_source(str(write(tmp_path, {f"{CLASSES[0]}/{name}": data for name, data in made.items()})))
    assert listed(source) == before


@pytest.mark.parametrize("text", ["café".encode("latin-1"), "cat".encode("utf-16")], ids=["latin-1", "utf-16"])
def test_a_table_that_is_no_text_in_utf_8_is_refused(tmp_path, text):
    """Guessed letters could make one class of two."""
    table = b"file_name,label\n0.jpg," + text + b"\n1.jpg,dog\n"
    write(tmp_path, {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "labels.csv": table})
    with pytest.raises(ValueError, match=r"labels\.csv: is no text in UTF-8, at byte \d+; save it as UTF-8"):
        open_source(str(tmp_path), Options(labels="labels.csv"))


@pytest.mark.parametrize("val", [None, "val"], ids=["drawn", "given"])
def test_one_photograph_in_two_classes_is_told(tmp_path, val):
    files = {f"train/{name}/{i}.jpg": jpeg(10 * label + i) for label, name in enumerate(CLASSES) for i in range(6)}
    files |= {f"{val}/{name}/{i}.jpg": jpeg(99 + 10 * label + i) for label, name in enumerate(CLASSES) for i in range(2)
              } if val else {}  # fmt: skip
    other = f"{val or 'train'}/{CLASSES[1]}/same.jpg"
    source = open_source(str(write(tmp_path, files | {other: files[f"train/{CLASSES[0]}/0.jpg"]})))
    [line] = [line for line in source.warnings if "several classes" in line]
    assert line.startswith("1 image is in several classes, such as ")
    assert f"{CLASSES[0]}/0.jpg" in line
    assert f"{CLASSES[1]}/same.jpg" in line


@pytest.mark.parametrize("form", ["table", "webdataset", "parquet", "imagefolder"])
def test_a_val_part_that_is_drawn_anew_is_left_out_in_words(tmp_path, form):
    names = {"train": [(i, i % 3) for i in range(30)], "val": VAL, "test": [(200 + i, i % 3) for i in range(3)]}
    for part, rows in names.items():
        if form == "webdataset":
            members = [(f"{n:04d}.jpg", jpeg(n)) for n, _ in rows] + [(f"{n:04d}.cls", b"%d" % k) for n, k in rows]
            write(tmp_path, {f"set-{part}-0.tar": tar(dict(sorted(members, key=lambda member: member[0][:4])))})
        elif form == "parquet":
            hub(tmp_path / f"{part}.parquet", rows, names=CLASSES)
        else:
            prefix = "{part}/{label}/{n}.jpg" if form == "imagefolder" else "{part}/{n}.jpg"
            write(tmp_path, {prefix.format(part=part, label=CLASSES[k], n=n): jpeg(n) for n, k in rows})
    if form == "table":
        lines = [f"{part}/{n}.jpg,{CLASSES[k]}" for part, rows in names.items() for n, k in rows]
        write(tmp_path, {"labels.csv": "file_name,label\n" + "\n".join(lines)})
    source, said = said_of(tmp_path)
    assert {split: len(entries) for split, entries in source.splits.items()} == {"train": 30, "val": 3}
    assert any("test" in line and "left out" in line for line in said.splitlines()), said
    drawn, said = said_of(tmp_path, Options(val_fraction=0.2))
    assert {split: len(entries) for split, entries in drawn.splits.items()} == {"train": 24, "val": 6}
    together = sorted(data for entries in listed(drawn).values() for _, data in entries)
    assert together == sorted(jpeg(n) for n, _ in names["train"])
    shown = said + "".join(f"{name}: {rule}" for name, rule in drawn.left_out)
    assert "val" in re.sub("0.2 of every.*", "", shown)
    assert "left out" in shown or "--val-fraction draws" in shown


# Parquet as it lies on Hugging Face's hub


def hub(path, rows: list[tuple[int, int]], *, image="image", label="label", names=None, more=None, bytes_=True):
    """A file of (number of the picture, label), with ClassLabel's names in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": jpeg(n) if bytes_ else None, "path": f"{n}.jpg"} for n, _ in rows]
    columns = {image: pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    columns |= {name: pa.array([value] * len(rows)) for name, value in (more or {}).items()}
    columns[label] = pa.array([value for _, value in rows])
    table = pa.table(columns)
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}, image: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


TRAIN, VAL = [(i, i % 3) for i in range(9)], [(100 + i, i % 3) for i in range(3)]


@pytest.mark.parametrize(
    ("train", "val", "form"),
    [
        ("mnist/train-00000-of-00001.parquet", "mnist/test-00000-of-00001.parquet", {}),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet", {"image": "img"}),
        (
            "cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet",
            {"image": "img", "label": "fine_label", "more": {"coarse_label": 0}},
        ),
        (
            "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet",
            {"label": "labels", "more": {"image_file_path": "/home/x/a.jpg"}},
        ),
        ("data/train-00000-of-00008.parquet", "data/validation-00000-of-00003.parquet", {}),
        ("full_size/train/0000.parquet", "full_size/validation/0000.parquet", {}),
        ("default/train/0000.parquet", "default/test/0000.parquet", {}),
        ("train/values-0.parquet", "val/values-0.parquet", {}),
    ],
)  # fmt: skip
def test_the_layouts_of_the_hub(tmp_path, train, val, form):
    hub(tmp_path / train, TRAIN, names=CLASSES, **form)
    hub(tmp_path / val, VAL, names=CLASSES, **form)
    source = open_source(str(tmp_path))
    assert (source.format, source.classes) == ("parquet", CLASSES)
    assert listed(source) == {
        "train": sorted((CLASSES[label], jpeg(n)) for n, label in TRAIN),
        "val": sorted((CLASSES[label], jpeg(n)) for n, label in VAL),
    }


def test_names_of_each_part_are_mapped_by_name(tmp_path):
    hub(tmp_path / "train.parquet", TRAIN, names=CLASSES)
    hub(tmp_path / "val.parquet", VAL, names=("dog", "bird", "cat"))  # 0 is a dog here
    source = open_source(str(tmp_path))
    assert [(source.classes[e.label], read(e)) for e in source.splits["val"]] == [
        ("dog", jpeg(100)), ("bird", jpeg(101)), ("cat", jpeg(102)),
    ]  # fmt: skip


def test_several_sets_in_one_folder_are_not_merged(tmp_path):
    for config in ("full_size", "160px"):
        for part in ("train", "validation"):
            hub(tmp_path / config / part / "0000.parquet", TRAIN if part == "train" else VAL, names=CLASSES)
    with pytest.raises(ValueError, match="holds several sets: 160px, full_size; choose one with --config"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), Options(config="160px"))
    assert {split: len(entries) for split, entries in source.splits.items()} == {"train": 9, "val": 3}
    assert all("160px" in entry.path for entry in source.splits["train"])
    with pytest.raises(ValueError, match="--config x: is none of the sets"):
        open_source(str(tmp_path), Options(config="x"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 2, 3] * 4, ("1", "2", "3")),
        ([0, 5, 11] * 4, ("0", "5", "11")),
        ([True, False] * 6, ("False", "True")),
        (["b", "a"] * 6, ("a", "b")),
        ([0.0, 1.0, float("nan")] * 4, ("0", "1")),
    ],
)
def test_labels_of_any_kind_are_classes_of_their_own_and_none_is_empty(tmp_path, labels, classes):
    for part in ("train", "val"):
        rows = pa.table({"image": [jpeg(i) for i in range(12)], "Label": labels})
        pq.write_table(rows, tmp_path / f"{part}.parquet")
    source = open_source(str(tmp_path))
    assert source.classes == classes
    for entry in source.splits["train"]:
        value = labels[entry.row]
        assert source.classes[entry.label] == (str(int(value)) if isinstance(value, float) else str(value))
    assert all(reason == "the row has no label" for _, reason in source.misplaced)
    assert len(source.misplaced) == 2 * sum(value != value for value in labels)


def test_labels_that_are_none_are_the_reason_given(tmp_path):
    hub(tmp_path / "train.parquet", TRAIN, names=CLASSES)
    hub(tmp_path / "test.parquet", [(n, -1) for n, _ in VAL], names=CLASSES)
    with pytest.raises(ValueError, match="its val part holds no image with a label: its label -1 is not one of"):
        open_source(str(tmp_path))


def test_columns_are_named_by_the_user(tmp_path):
    for part in ("train", "val"):
        rows = pa.table({"thumb": [b"x"] * 6, "photo": [jpeg(i) for i in range(6)], "kind": [0, 1] * 3})
        pq.write_table(rows, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"has no column of labels; .*; name one with --label-column"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), Options(image_column="photo", label_column="kind"))
    assert [read(entry) for entry in source.splits["train"]] == [jpeg(i) for i in range(6)]
    with pytest.raises(ValueError, match="--image-column x: is not a column"):
        open_source(str(tmp_path), Options(image_column="x", label_column="kind"))


def test_rows_that_name_a_file_instead_of_its_bytes(tmp_path):
    write(tmp_path, {f"{n}.jpg": jpeg(n) for n, _ in [*TRAIN, *VAL[1:]]})
    hub(tmp_path / "train.parquet", TRAIN, names=CLASSES, bytes_=False)
    hub(tmp_path / "val.parquet", VAL, names=CLASSES, bytes_=False)
    source = open_source(str(tmp_path))
    assert [read(entry) for entry in source.splits["train"]] == [jpeg(n) for n, _ in TRAIN]
    assert source.misplaced == [
        ("val/100.jpg", "the row has no bytes, and its path '100.jpg' is not a file of the source")
    ]


def test_one_file_of_one_part(tmp_path):
    hub(tmp_path / "all.parquet", [(i, i % 3) for i in range(30)], names=CLASSES)
    for place in (tmp_path, tmp_path / "all.parquet"):
        source = open_source(str(place))
        assert {s: Counter(e.label for e in es) for s, es in source.splits.items()} == {
            "train": {0: 8, 1: 8, 2: 8}, "val": {0: 2, 1: 2, 2: 2},
        }  # fmt: skip
        assert sorted(read(e) for es in source.splits.values() for e in es) == sorted(jpeg(i) for i in range(30))
        assert sum(source.runs["train"]) == 24


def test_what_save_to_disk_writes(tmp_path):
    for part, rows in (("train", TRAIN), ("test", VAL)):
        hub(tmp_path / "x.parquet", rows, names=CLASSES)
        table = pq.read_table(tmp_path / "x.parquet")
        (tmp_path / "d" / part).mkdir(parents=True)
        with pa.ipc.new_stream(tmp_path / "d" / part / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
        write(tmp_path / "d" / part, {"state.json": "{}", "dataset_info.json": "{}"})
    write(tmp_path / "d", {"dataset_dict.json": "{}"})
    source = open_source(str(tmp_path / "d"))
    assert source.classes == CLASSES
    assert [(e.label, read(e)) for e in source.splits["train"]] == [(label, jpeg(n)) for n, label in TRAIN]
    assert [(e.label, read(e)) for e in source.splits["val"]] == [(label, jpeg(n)) for n, label in VAL]


# what a reader of the code found


def test_an_interrupted_preparation_within_the_source_is_no_part_of_it(tmp_path):
    files = flat("") | {"labels.csv": b"file_name,label\n" + b"".join(
        f"{name},{class_of(name)}\n".encode() for name in flat(""))}  # fmt: skip
    before = open_source(str(write(tmp_path, files)))
    write(
        tmp_path, {"shards/train/shard-00000.parquet": b"x", "shards/_unfinished/train/shard-00000.parquet.npz": b"x"}
    )
    after = open_source(str(tmp_path))
    assert (after.format, listed(after), after.warnings) == ("table", listed(before), before.warnings)
    assert ("shards/", "shards that were prepared") in after.left_out


def test_a_class_whose_name_begins_like_a_part_is_no_empty_part(tmp_path):
    files = {f"{name}/{i}.jpg": jpeg(10 * n + i) for n, name in enumerate(("Val_d_Isere", "dev_board", "laptop"))
             for i in range(5)}  # fmt: skip
    (tmp_path / ".dev").mkdir(parents=True)
    assert open_source(str(write(tmp_path, files))).classes == ("Val_d_Isere", "dev_board", "laptop")


def test_a_listed_image_that_is_missing_takes_no_other_s_place(tmp_path):
    files = {"b/1.jpg": jpeg(1), "b/2.jpg": jpeg(2), "c/3.jpg": jpeg(3), "c/4.jpg": jpeg(4)}
    text = "file,label\na/1.jpg,cat\nb/1.jpg,dog\n2.jpg,cat\ndata/c/3.jpg,dog\n4,cat\n"
    write(tmp_path, files | {"labels.csv": text})
    _, said = said_of(tmp_path)
    assert "labels.csv is not used: --labels labels.csv reads it" in said
    source = open_source(str(tmp_path), Options(labels="labels.csv", val_fraction=0.5))
    together = listed(source)
    assert sorted(together["train"] + together["val"]) == sorted(
        [("dog", jpeg(1)), ("cat", jpeg(2)), ("dog", jpeg(3)), ("cat", jpeg(4))]
    )
    assert source.misplaced == [("a/1.jpg", "labels.csv lists it, and it is not there")]


def zipped(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_archives_of_classes_keep_their_folders_and_files_beside_archives_are_seen(tmp_path):
    for part, first in (("train", 0), ("val", 100)):
        for n, name in enumerate(("cat", "dog")):
            zipped(tmp_path / part / f"{name}.zip", {f"{i}.jpg": jpeg(first + 10 * n + i) for i in range(4)})
    write(tmp_path, {"LICENSE": b"x"})
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert listed(source)["val"] == sorted(("cat", jpeg(100 + i)) for i in range(4)) + sorted(
        ("dog", jpeg(110 + i)) for i in range(4)
    )
    assert ("LICENSE", "in no class folder") in source.left_out


def test_a_table_beside_an_archive_and_names_that_are_there_twice(tmp_path):
    names = flat("")
    zipped(tmp_path / "images.zip", names)
    text = "file_name,label\n" + "".join(f"{name},{class_of(name)}\n" for name in names)
    for options in (Options(), Options(labels="labels.csv")):
        source = open_source(str(write(tmp_path, {"labels.csv": text})), options)
        assert (source.format, sum(map(len, source.splits.values()))) == ("table", 18)
    zipped(tmp_path / "more" / "images.zip", {"a.jpg": b"x"})
    zipped(tmp_path / "more.zip", {"images/a.jpg": b"y"})
    with pytest.raises(ValueError, match=r"more/images/a\.jpg is there twice, once in"):
        open_source(str(tmp_path))


def test_train_itself_comes_before_folders_that_are_called_like_it(tmp_path):
    files = folders() | {f"{part}/{name}/0.jpg": jpeg(900 + n) for n, (part, name) in enumerate(
        (part, name) for part in ("train_masks", "Valid_old") for name in CLASSES)}  # fmt: skip
    assert listed(open_source(str(write(tmp_path, files)))) == expected(folders())
    only = {name.replace("train/", "train_a/"): data for name, data in folders().items()}
    only |= {name.replace("train/", "train_b/"): data for name, data in folders(val=None, counts=(6, 0)).items()}
    with pytest.raises(ValueError, match="several folders may be for training: train_a/, train_b/"):
        open_source(str(write(tmp_path / "x", only)))


def test_a_contest_s_test_part_without_labels_is_left_out(tmp_path):
    files = {f"train/{name}.{i}.jpg": jpeg(10 * n + i) for n, name in enumerate(("cat", "dog")) for i in range(6)}
    files |= {f"test1/{i}.jpg": jpeg(300 + i) for i in range(8)}
    source = open_source(str(write(tmp_path, files)), Options(label_pattern="^(cat|dog)"))
    assert source.misplaced == []
    assert sum(rule == "of the test part, and without a label" for _, rule in source.left_out) == 8
    assert sum(map(len, source.splits.values())) == 12


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("labels.csv", "file_name,label,split\n0-0.jpg,cat,holdout\n", "split = 'holdout': is no part; expected train"),
        ("labels.csv", "file_name, label, Split\n0-0.jpg,cat,2\n", "Split = '2': is no part"),
        ("labels.csv", 'file_name,label\n0-0.jpg,"' + "x" * 200_000, "cannot be read: field larger than field limit"),
    ],
)
def test_a_table_that_says_what_is_not_understood_is_refused(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=words) as error:
        open_source(str(write(tmp_path, flat("") | {name: text})), Options(labels=name))
    assert "\n" not in str(error.value)


def test_json_lines_may_have_blank_ones_and_other_separators_in_texts(tmp_path):
    lines = [json.dumps({"file_name": n, "label": class_of(n) + "\u2028x"}, ensure_ascii=False) for n in flat("")]
    source = open_source(str(write(tmp_path, flat("") | {"metadata.jsonl": "\n\n".join(lines) + "\n"})))
    assert source.classes == tuple(f"{name}\u2028x" for name in CLASSES)


def test_an_unrelated_table_and_a_link_to_itself_end_nothing(tmp_path):
    files = folders() | {"notes.csv": 'a,b\n1,"' + "x" * 200_000}
    write(tmp_path, files)
    os.symlink("a", tmp_path / "train" / "a")
    source = open_source(str(tmp_path))
    assert listed(source) == expected(folders())
    assert any(name == "train/a" and "cannot be looked at" in rule for name, rule in source.left_out)


def test_a_linked_class_deep_below_is_followed(tmp_path):
    write(tmp_path / "elsewhere", {f"{i}.jpg": jpeg(500 + i) for i in range(4)})
    root = write(tmp_path / "root", folders("archive/imagenet/train/", "archive/imagenet/val/"))
    (root / "archive/imagenet/train/eagle").symlink_to(tmp_path / "elsewhere")
    assert open_source(str(root)).classes == ("bird", "cat", "dog", "eagle")


def test_files_that_are_larger_than_any_photograph_are_not_read(tmp_path):
    write(tmp_path, folders())
    with open(tmp_path / "train/cat/film.3gp", "wb") as file:
        file.truncate(2**33)  # a hole: no byte on the disk
    entry = next(e for e in open_source(str(tmp_path)).splits["train"] if e.name.endswith("film.3gp"))
    with pytest.raises(NotAnImage, match="8589934592 bytes are more than any photograph has"):
        read(entry)


def test_of_a_webdataset_s_sample_the_first_image_counts_and_null_is_no_label(tmp_path):
    members = {}
    for i in range(6):
        members |= {f"{i}.jpg": jpeg(i), f"{i}.mask.png": jpeg(90 + i), f"{i}.json": json.dumps({"label": "ab"[i % 2]})}
    members |= {"8.jpg": jpeg(8), "8.json": '{"label": null}', "8.cls": ""}
    write(tmp_path, {"a.tar": tar({name: d.encode() if isinstance(d, str) else d for name, d in members.items()}),
                     "notes.md": b"x"})  # fmt: skip
    source = open_source(str(tmp_path), Options(format="webdataset"))
    assert source.classes == ("a", "b")
    assert sorted(data for entries in listed(source).values() for _, data in entries) == sorted(map(jpeg, range(6)))
    assert source.misplaced == [("a.tar/8", "has no label")]
    assert ("notes.md", "not a tar") in source.left_out
    assert sum("mask.png" in name for name, _ in source.left_out) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "image.nosuch"}, "--image-column image.nosuch: is not bytes in"),
        ({"label_column": "annotation.label"}, "--label-column annotation.label: is not a column of"),
        ({"format": "caffe"}, "--format caffe: needs train.txt and val.txt with lines PATH LABEL; "),
    ],
)
def test_what_is_stated_wrongly_is_one_line(tmp_path, options, words):
    path = tmp_path / "train.parquet"
    hub(path, TRAIN, names=CLASSES, more={"annotation": {"label": 1}})
    with pytest.raises(ValueError, match=words) as error:
        open_source(str(tmp_path), Options(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"val_fraction": 0.3}, {"labels": "x.csv"}, {"label_pattern": "(a)"}])
def test_forms_of_fixed_parts_refuse_what_they_have_no_use_for(option):
    with pytest.raises(ValueError, match="digits has parts and labels of its own; leave it out"):
        open_source("digits", Options(**option))


def test_classes_that_differ_by_a_sign_are_not_alike():
    assert near_equal(["-1", "1", "C", "C++", "a b"]) == []
    assert len(near_equal(["a_b", "A b", "caf\u00e9", "cafe"])) == 2
