"""Every form in which a user may have the images: detected, labelled, and refused in one line when damaged."""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import types
from pathlib import Path

import cachetools
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from conftest import picture

from alexnet import images
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data.sources import Options, listing, open_source, read
from orchestrator.data.sources import ilsvrc as archives

WNIDS = ("n01440764", "n02102040", "n02979186", "n03000684")
NUMBERS = {"n01440764": 3, "n02102040": 1, "n02979186": 4, "n03000684": 2}  # the devkit has an order of its own
VAL = [2, 4, 1, 3, 3, 1]  # the devkit's numbers of the validation images


def samples() -> dict[str, list[bytes]]:
    """Three images of each class: from the folders of ALEXNET_TEST_IMAGES, if it is set, else made here."""
    folder = os.environ.get("ALEXNET_TEST_IMAGES")
    if folder:
        files = sorted(Path(folder).glob("*/*.JPEG"))
        return {wnid: [file.read_bytes() for file in files[3 * i : 3 * i + 3]] for i, wnid in enumerate(WNIDS)}
    random = np.random.default_rng(0)
    return {wnid: [picture(random, i % 3, (40 + 8 * k, 50)) for k in range(3)] for i, wnid in enumerate(WNIDS)}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def meta_mat() -> bytes:
    """Four classes, and one that is a group of others and so no class of any image."""
    rows = [(NUMBERS[wnid], wnid, f"name of {wnid}, other name", "", 0) for wnid in WNIDS] + [(5, "n1", "group", "", 2)]
    kinds = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    out = io.BytesIO()
    scipy.io.savemat(out, {"synsets": np.array(sorted(rows), dtype=kinds).reshape(-1, 1)})
    return out.getvalue()


def devkit(numbers: list[int] = VAL) -> dict[str, bytes]:
    truth = "".join(f"{number}\n" for number in numbers).encode()
    base = "ILSVRC2012_devkit_t12/data/"
    return {base + "meta.mat": meta_mat(), base + "ILSVRC2012_validation_ground_truth.txt": truth}


def val_files() -> dict[str, bytes]:
    """Named like the real ones; image i is one of the class that the devkit says."""
    of_number = {number: wnid for wnid, number in NUMBERS.items()}
    every = samples()
    return {f"ILSVRC2012_val_{i:08d}.JPEG": every[of_number[n]][i % 3] for i, n in enumerate(VAL, start=1)}


@pytest.fixture
def ilsvrc(tmp_path) -> Path:
    """A miniature of the three archives."""
    root = tmp_path / "ilsvrc"
    root.mkdir()
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{k}.JPEG": data for k, data in enumerate(files)})
        for wnid, files in samples().items()
    }
    (root / archives.TRAIN).write_bytes(tar_of(inner))
    (root / archives.VAL).write_bytes(tar_of(val_files()))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit(), "w:gz"))
    return root


def refused(root: object, words: str, **options: object) -> str:
    with pytest.raises(ValueError, match=words) as error:
        open_source(str(root), Options(**options))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_official_archives_are_read_in_place_with_the_devkits_labels(ilsvrc):
    said: list[str] = []
    source = open_source(str(ilsvrc), say=said.append)
    assert said[0] == f"format ilsvrc: it has {archives.TRAIN}"
    assert source.classes == WNIDS
    assert source.class_names[0] == "name of n01440764, other name"
    every = samples()
    train = source.splits["train"]
    assert [read(entry) for entry in train] == [data for wnid in WNIDS for data in every[wnid]]
    assert [entry.label for entry in train] == [i for i in range(4) for _ in range(3)]
    val = source.splits["val"]
    assert [WNIDS[entry.label] for entry in val] == [
        next(wnid for wnid, number in NUMBERS.items() if number == n) for n in VAL
    ]
    assert [read(entry) for entry in val] == list(val_files().values())
    assert len({entry.id for entry in (*train, *val)}) == 18
    assert source.misplaced == []


@pytest.mark.parametrize("truth", ["archive", "unpacked", "kaggle"])
def test_flat_validation_images_take_their_labels_from_the_files_beside_them(tmp_path, truth):
    base = tmp_path / "ILSVRC/Data/CLS-LOC" if truth == "kaggle" else tmp_path
    for wnid, files in samples().items():
        (base / "train" / wnid).mkdir(parents=True)
        for k, data in enumerate(files):
            (base / "train" / wnid / f"{k}.JPEG").write_bytes(data)
    (base / "val").mkdir()
    for name, data in val_files().items():
        (base / "val" / name).write_bytes(data)
    if truth != "kaggle":
        refused(tmp_path, "val/ is flat, so its labels must come from")
    if truth == "archive":
        (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit([*VAL, 1]), "w:gz"))
    elif truth == "unpacked":
        (tmp_path / "ILSVRC2012_devkit_t12/data").mkdir(parents=True)
        for name, data in devkit([*VAL, 1]).items():
            (tmp_path / name).write_bytes(data)
    else:
        of_number = {number: wnid for wnid, number in NUMBERS.items()}
        rows = [f"ILSVRC2012_val_{i:08d},{of_number[n]} 1 2 3 4 {of_number[n]} 5 6 7 8" for i, n in enumerate(VAL, 1)]
        rows.append("ILSVRC2012_val_00000007,n01440764 1 2 3 4")
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
        (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a {wnid}, b\n" for wnid in WNIDS))
    (base / "val" / "other.JPEG").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert source.format == "imagefolder"
    assert [NUMBERS[WNIDS[entry.label]] for entry in source.splits["val"]] == VAL
    assert len(source.class_names) == 4
    reasons = dict(source.misplaced)
    assert "has no label in" in reasons["val/other.JPEG"]
    assert "missing, though" in reasons["val/ILSVRC2012_val_00000007"]


def test_damaged_and_unsafe_archives_are_refused_in_one_line(ilsvrc):
    whole = {name: (ilsvrc / name).read_bytes() for name in os.listdir(ilsvrc)}
    train = bytearray(whole[archives.TRAIN])

    def with_train(data: bytes) -> None:
        (ilsvrc / archives.TRAIN).write_bytes(data)

    # the header of the second image in the first inner archive: tarfile itself would take it for the end
    second = train.index(b"n01440764_1.JPEG")
    train[second] ^= 0xFF
    with_train(bytes(train))
    assert f"{archives.TRAIN}: n01440764.tar: damaged" in refused(ilsvrc, "download it again")
    with_train(whole[archives.TRAIN][: len(train) // 2])
    refused(ilsvrc, f"{archives.TRAIN}: truncated")
    with_train(b"not a tar at all" * 100)
    assert refused(ilsvrc, f"{archives.TRAIN}: is not a tar: ").endswith("header")
    with_train(b"")
    refused(ilsvrc, f"{archives.TRAIN}: damaged: empty file; download it again$")
    for name in ("../n01440764.tar", "/etc/n01440764.tar", "a/../../b.tar"):
        with_train(tar_of({name: b""}))
        refused(ilsvrc, f"member '{name}' has an absolute or parent path")
    inner = tar_of({"/tmp/x.JPEG": b"x"})
    with_train(tar_of({"n01440764.tar": inner, "n02102040.tar": inner}))
    refused(ilsvrc, "n01440764.tar: member '/tmp/x.JPEG' has an absolute")
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as tar:
        info = tarfile.TarInfo("n01440764.tar")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with_train(link.getvalue())
    refused(ilsvrc, "is a link or device, not a file$")
    with_train(whole[archives.TRAIN])
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of({"../meta.mat": meta_mat()}, "w:gz"))
    refused(ilsvrc, r"member '\.\./meta.mat' has an absolute or parent path$")
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(whole["ILSVRC2012_devkit_t12.tar.gz"][:300])
    refused(ilsvrc, r"ILSVRC2012_devkit_t12.tar.gz: damaged: .*; download it again")
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"<html>")
    refused(ilsvrc, r"ILSVRC2012_devkit_t12.tar.gz: is not a gzipped tar: Not a gzipped file \(b'<h'\)$")
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of({"a": b""}, "w:gz"))
    refused(ilsvrc, r"ILSVRC2012_devkit_t12.tar.gz: has no meta.mat, which the published one has$")
    flipped = bytearray(whole["ILSVRC2012_devkit_t12.tar.gz"])
    flipped[-6] ^= 1  # the checksum at the very end
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(flipped)
    refused(ilsvrc, r"ILSVRC2012_devkit_t12.tar.gz: damaged: .*; download it again")
    with_train(tar_of({"a/n01440764.tar": tar_of({}), "n01440764.tar": tar_of({})}))
    refused(ilsvrc, "has two members named 'n01440764.tar', the published one has each once$")
    with_train(whole[archives.TRAIN])
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit([9]), "w:gz"))
    refused(ilsvrc, "9 is not the number of a class in meta.mat: they are of two devkits$")
    (ilsvrc / archives.VAL).unlink()
    refused(ilsvrc, f"has no {archives.VAL}")


def test_checksums_of_the_official_archives_are_verified(ilsvrc, monkeypatch):
    text = refused(ilsvrc, "its MD5 is", verify=True)
    assert str(ilsvrc / archives.TRAIN) in text
    assert "1d675b47d978889d74fa0da5fadfb00e; download it again" in text
    right = {name: hashlib.md5((ilsvrc / name).read_bytes()).hexdigest() for name in os.listdir(ilsvrc)}
    monkeypatch.setattr(archives, "MD5", right)
    said: list[str] = []
    open_source(str(ilsvrc), Options(verify=True), say=said.append)
    assert sum("checking the MD5" in line for line in said) == 3


def table(path: Path, labels: list[object], *, nested: bool, metadata: dict[bytes, bytes] | None = None) -> list[bytes]:
    """A Parquet file in row groups of 4, in the form of Hugging Face or the plain one; returns the images."""
    random = np.random.default_rng(len(labels))
    data = [picture(random, 0, (40, 50 + i)) for i in range(len(labels))]
    names = [f"image-{i}.JPEG" for i in range(len(labels))]
    rows = pa.array([{"bytes": d, "path": n} for d, n in zip(data, names, strict=True)]) if nested else pa.array(data)
    found = pa.table({"image": rows, "label": labels}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(found, path, row_group_size=4)
    return data


def test_hugging_face_parquet_is_read_row_by_row(tmp_path):
    features = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}, "image": {}}}}
    metadata = {b"huggingface": json.dumps(features).encode()}
    train = table(tmp_path / "data/train-00000-of-00002-ab.parquet", [0, 1, 0, 1, 1], nested=True, metadata=metadata)
    more = table(tmp_path / "data/train-00001-of-00002-cd.parquet", [2, 0, -1], nested=True, metadata=metadata)
    val = table(tmp_path / "data/validation-00000-of-00001.parquet", [2, 2], nested=True, metadata=metadata)
    table(tmp_path / "data/test-00000-of-00001.parquet", [-1, -1], nested=True, metadata=metadata)
    said: list[str] = []
    source = open_source(str(tmp_path), say=said.append)
    assert source.format == "parquet"
    assert source.classes == ("cat", "dog", "emu")
    assert [entry.label for entry in source.splits["train"]] == [0, 1, 0, 1, 1, 2, 0]
    assert [read(entry) for entry in source.splits["train"]] == [*train, *more[:2]]
    assert [read(entry) for entry in source.splits["val"]] == val
    assert source.runs == {"train": [4, 1, 2], "val": [2]}
    assert source.misplaced == [("train/image-2.JPEG", "its label -1 is not one of the 3 classes")]
    assert any("test-00000-of-00001.parquet: left out" in line for line in said)
    assert source.image_size == 72
    assert any("stored at 72" in line for line in said)

    # what a preparation has put, or is putting, below is no part of it
    for folder, note in (("done", "manifest.json"), ("begun", "_unfinished/train-00000.json")):
        table(tmp_path / folder / "train/shard-00000.parquet", [0, 1], nested=False)
        (tmp_path / folder / note).parent.mkdir(exist_ok=True)
        (tmp_path / folder / note).write_text("{}")
    assert open_source(str(tmp_path)).splits == source.splits


def test_plain_parquet_with_words_for_labels_and_test_for_val(tmp_path):
    data = table(tmp_path / "train.parquet", ["b", "a", "b", "a", "a", "b"], nested=False)
    table(tmp_path / "test.parquet", ["b", "c"], nested=False)
    source = open_source(str(tmp_path))
    assert source.classes == ("a", "b")
    assert [entry.label for entry in source.splits["train"]] == [1, 0, 1, 0, 0, 1]
    assert read(source.splits["train"][5]) == data[5]
    assert [name.split("/")[0] for name, _ in source.misplaced] == ["val"]


def test_a_row_group_is_read_once_for_all_its_rows_even_if_it_is_larger_than_the_cache(tmp_path, monkeypatch):
    data = table(tmp_path / "train.parquet", [0, 1, 0, 1, 1], nested=False)
    table(tmp_path / "val.parquet", [0, 1], nested=False)
    entries = open_source(str(tmp_path)).splits["train"]
    size_of = listing._recent.getsizeof
    assert size_of(types.SimpleNamespace(nbytes=1000)) == 1000
    assert size_of(types.SimpleNamespace(nbytes=2**40)) == listing._recent.maxsize == 2**28
    reads: list[int] = []
    read_column = listing._read_column
    monkeypatch.setattr(
        listing, "_read_column", lambda place, group, name: reads.append(group) or read_column(place, group, name)
    )
    for size, expected in ((2**28, [0, 1]), (10, [0, 1, 0])):
        cache = cachetools.LRUCache(size, getsizeof=lambda column, size=size: min(column.nbytes, size))
        monkeypatch.setattr(listing, "_recent", cache)
        reads.clear()
        assert [read(entry) for entry in (*entries, entries[0])] == [*data, data[0]]
        assert reads == expected


def test_parquet_that_holds_no_images_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), tmp_path / "train.parquet")
    refused(tmp_path, r"has no column of image bytes; .*; name one with --image-column")
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), tmp_path / "val.parquet")
    refused(tmp_path, r"has no column of image bytes; its columns are x \(double\), label \(int64\)")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense")
    refused(tmp_path, "train.parquet: cannot be read as Parquet")


def cifar_batches(count: int = 3) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {b"data": data, b"labels": [int(n) for n in random.integers(0, 10, count)]}
        files[batch] = pickle.dumps(content | {b"filenames": [b"f%d.png" % i for i in range(count)]}, protocol=2)
    files["batches.meta"] = pickle.dumps({b"label_names": [b"class%d" % i for i in range(10)]}, protocol=2)
    return files


@pytest.mark.parametrize("packed", [True, False])
def test_cifar_in_the_python_form(tmp_path, packed):
    files = cifar_batches()
    if packed:
        inside = {f"cifar-10-batches-py/{name}": data for name, data in files.items()}
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(tar_of(inside, "w:gz"))
    else:
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, data in files.items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
    source = open_source(str(tmp_path))
    assert source.format == "cifar10"
    assert source.classes == tuple(f"class{i}" for i in range(10))
    assert {split: len(entries) for split, entries in source.splits.items()} == {"train": 15, "val": 3}
    original = pickle.loads(files["data_batch_2"])
    entry = source.splits["train"][4]
    assert entry.label == original[b"labels"][1]
    pixels = images.decode(read(entry))
    np.testing.assert_array_equal(pixels, original[b"data"][1].reshape(3, 32, 32).transpose(1, 2, 0))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_something_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = cifar_batches() | {"data_batch_3": pickle.dumps({b"data": Evil()})}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    refused(tmp_path, "data_batch_3: is not a batch of CIFAR-10: names .*mkdir, which no CIFAR batch does$")
    (tmp_path / "data_batch_3").write_bytes(files["data_batch_2"][:1000])
    refused(tmp_path, "data_batch_3: is not a batch of CIFAR-10: pickle data was truncated; download it again$")
    (tmp_path / "data_batch_3").write_bytes(b"")
    refused(tmp_path, "data_batch_3: is not a batch of CIFAR-10: EOFError.*; download it again$")
    (tmp_path / "data_batch_3").write_bytes(files["batches.meta"])
    refused(tmp_path, "data_batch_3: is not a batch of CIFAR-10: it has no data$")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "data_batch_3").unlink()
    refused(tmp_path, "has no data_batch_3")


@pytest.mark.parametrize("form", ["auto", "cifar10"])
@pytest.mark.parametrize("name", ["pipe", "pipe.zip", "pipe.tar", "pipe.parquet"])
def test_a_pipe_is_no_source_and_is_not_waited_for(tmp_path, name, form):
    os.mkfifo(tmp_path / name)
    text = refused(tmp_path / name, "is a pipe, neither a folder nor a file that can be read; give", format=form)
    assert text.startswith(f"--source {tmp_path / name}: ")
    if name != "pipe":
        refused(tmp_path, r"pipe\.\w+.*: (cannot be read.*)?is a pipe, not a file")
    assert "is a device, neither a folder nor a file" in refused("/dev/null", "/dev/null: ", format=form)


def test_shards_are_no_source(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "holds shards already")


def test_a_format_that_is_given_is_not_detected(ilsvrc):
    refused(ilsvrc, r"has no images: 3 files \(2 .tar, 1 .gz\); expected folders CLASS/IMAGE", format="imagefolder")


@pytest.mark.parametrize(
    ("form", "needs"),
    [
        ("ilsvrc", f"{archives.TRAIN}, {archives.VAL} and ILSVRC2012_devkit_t12.tar.gz in a folder"),
        ("cifar10", "cifar-10-python.tar.gz, or its folder cifar-10-batches-py"),
        ("webdataset", "tars of KEY.jpg and KEY.cls"),
        ("parquet", "Parquet or Arrow files, which are not in an archive"),
        ("caffe", "train.txt and val.txt with lines PATH LABEL"),
        ("table", "a table of labels (.csv, .tsv, .jsonl, .txt)"),
    ],
)
def test_a_format_that_is_given_says_what_it_needs_and_what_is_there(tmp_path, form, needs):
    for name in ("cat/0.jpg", "dog/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    text = refused(tmp_path, "needs", format=form)
    assert text == f"--format {form}: needs {needs}; --source {tmp_path} has 2 files (2 .jpg) in cat/, dog/"
    if form in ("ilsvrc", "cifar10"):
        assert refused(tmp_path / "cat/0.jpg", "needs", format=form).endswith("cat/0.jpg is a file")


def test_a_part_of_a_stated_format_is_not_taken_for_all_of_it(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    text = refused(tmp_path, "has no", format="cifar10")
    assert text.endswith(
        "cifar-10-batches-py has no data_batch_1; expected cifar-10-batches-py/ or cifar-10-python.tar.gz"
    )
    (tmp_path / "a.tar").write_bytes(tar_of({"0.jpg": b"x", "1.jpg": b"x"}))
    text = refused(tmp_path / "a.tar", "label", format="webdataset")
    assert text.endswith("its tars have no image with a label beside it, KEY.jpg and KEY.cls; a.tar/0 has no label")


def test_a_class_may_be_a_link_to_a_folder(tmp_path, photographs):
    (photographs / "train" / "pear").rename(tmp_path / "elsewhere")
    (photographs / "train" / "pear").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(photographs))
    assert [sum(entry.label == label for entry in source.splits["train"]) for label in (0, 1)] == [12, 12]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([{"a": 1}] * 4, "is not one column of numbers or words"),
        ([0.5, 1.0, 0.0, 1.0], "numbers that are not whole"),
        ([0, 1, 2, 1440764], "has the label 1440764 among 4 rows of train"),
        ([7, 7, 7, 7], "has the label 7 among 4 rows of train"),
    ],
)
def test_odd_label_columns_are_refused(tmp_path, labels, words):
    for name in ("train", "val"):
        table(tmp_path / f"{name}.parquet", labels, nested=False)
    refused(tmp_path, words)


def test_a_fault_of_the_disk_is_no_fault_of_the_image(photographs, monkeypatch):
    entry = open_source(str(photographs)).splits["train"][0]
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(StorageError, match=r"000\.JPEG: cannot be read: I/O error"):
        read(entry)
    monkeypatch.undo()
    os.remove(entry.path)
    with pytest.raises(StorageError, match="was listed and is not there"):
        read(entry)


def test_links_to_folders_that_hold_them_are_left_out_not_followed(tmp_path, photographs):
    (photographs / "train" / "apple" / "loop").symlink_to(photographs)
    (photographs / "train" / "all").symlink_to(photographs / "train")  # a class that holds everything
    source = open_source(str(photographs))
    assert source.classes == ("apple", "pear")
    assert len(source.splits["train"]) == 24
    assert source.left_out == [
        ("train/all/", "a link to a folder that holds it"),
        ("train/apple/loop/", "a link to a folder that holds it"),
    ]


def test_paths_join_and_refuse_secrets():
    assert str(StoragePath.of("s3://bucket/a/?region=x") / "b") == "s3://bucket/a/b?region=x"
    assert (StoragePath("s3://bucket/a?region=x") / "b?.txt").name == "b?.txt"
    assert StoragePath.of("file:///tmp/x%20y#z").local == Path("/tmp/x y#z")
    assert StoragePath.of("/tmp/what?/x").name == "x"
    for text, words in [
        ("nosuch://x/y", "nosuch://x: cannot be opened"),
        ("s3://", "names no bucket"),
        ("s3://bucket/x?bogus=1", "bogus=...: cannot be set in a URI"),
        ("s3://bu cket/x", "s3://bu cket: cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            StoragePath.of(text)
    for secret in ("s3://key:secret@bucket/a", "s3://key:sec/ret@bucket/a", "abfs://c@account/x?sig=secret"):
        with pytest.raises(ValueError, match=r"credentials|cannot be set") as error:
            StoragePath.of(secret)
        assert "sec" not in str(error.value)


def test_what_fsspec_opens_is_a_path_too():
    place = StoragePath.of("memory://box/folder")
    (place / "a/b.bin").write(b"12345")
    assert (place / "a/b.bin").read() == b"12345"
    assert (place / "a/b.bin").size() == 5
    assert place.files() == ["a/b.bin"]
    assert place.children() == {"a": True}
    (place / "a").remove()
    assert place.files() == []
