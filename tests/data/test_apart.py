"""A source is listed in a process of its own, and what comes back is looked at as if a stranger had sent it."""

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.base.exits import JobError
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data import sandbox
from orchestrator.data.reader import read_row_group
from orchestrator.data.shards import DamagedData
from orchestrator.data.sources import Entry, Options, Source, apart, open_source
from orchestrator.data.sources.apart import open_apart, packed, unpacked
from orchestrator.data.sources.devkit import read_small_archive

ROOT = StoragePath("/photos")


def source(**changes) -> Source:
    entries = {
        "train": [
            Entry(0, 0, "train/a.jpg", path="/photos/a.jpg"),
            Entry(1, 1, "train/\udcff.jpg", path="/photos/x\udcff.tar", start=512, length=9, packed=5, crc=2**32 - 1),
        ],
        "val": [
            Entry(2, 0, "val/b", path="/photos", row_group=1, row=2, column="image"),
            Entry(3, 1, "val/c", data=b"P6"),
        ],
    }
    found = Source(
        "photos", "tar", ("cat", "dog"), entries, image_size=72, class_names=("a cat", "a\ndog"),
        misplaced=[("m", "why")], left_out=[("l", "\ud800")], warnings=["w"], found=["f"],
        runs={"train": [1, 1], "val": [2]},
    )  # fmt: skip
    return replace(found, **changes)


@pytest.mark.parametrize("changes", [{}, {"runs": None, "misplaced": [], "warnings": []}])
def test_a_source_comes_back_as_it_was(changes):
    assert unpacked(packed(source(**changes)), ROOT) == source(**changes)


def train(entry: Entry) -> dict[str, list[Entry]]:
    return {"train": [entry], "val": source().splits["val"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": train(Entry(0, 0, "x", path="/etc/passwd"))}, "an image that is not in the source"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/../etc/passwd"))}, "an image that is not in the source"),
        ({"splits": train(Entry(0, 0, "x", path="/photos2/a"))}, "an image that is not in the source"),
        ({"splits": train(Entry(0, 0, "x"))}, "an image that is not in the source"),
        ({"splits": train(Entry(0, 2, "x", data=b""))}, "an image without a class"),
        ({"splits": train(Entry(0, -1, "x", data=b""))}, "an image without a class"),
        ({"splits": train(Entry(2, 0, "x", data=b""))}, "two images of one number"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", start=-1, length=2))}, "a place before the beginning"),
        ({"splits": train(Entry(-1, 0, "x", data=b""))}, "an image without a class"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a\0b"))}, "an image that is not in the source"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", row=1))}, "at no place that a file has"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", row=1, row_group=0, start=1, length=1))}, "at no place"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", row_group=1))}, "at no place that a file has"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", column="image"))}, "at no place that a file has"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", start=1))}, "at no place that a file has"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", length=1))}, "at no place that a file has"),
        ({"splits": train(Entry(0, 0, "x", path="/photos/a", start=2**62, length=2**62))}, "at no place"),
        ({"splits": train(Entry(0, 0, "x", data=b"", start=1, length=1))}, "at no place that a file has"),
        ({"image_size": 0}, "images of 0 pixels"),
        ({"image_size": -72}, "images of -72 pixels"),
        ({"image_size": 10**6}, "images of 1000000 pixels"),
        ({"image_size": True}, "image_size"),
        ({"class_names": ("a cat",)}, "names in words of other classes"),
        ({"misplaced": [["name", 1]]}, "a pair that is no text"),
        ({"runs": {"train": "2", "val": [2]}}, "runs that are not its images"),
        ({"runs": {"train": [1], "val": [2]}}, "runs that are not its images"),
        ({"runs": {"train": [3, -1], "val": [2]}}, "runs that are not its images"),
        ({"image_size": "72"}, "image_size"),
        ({"classes": ["cat", 2]}, "classes"),
        ({"misplaced": ["name"]}, "misplaced"),
    ],
)
def test_a_listing_that_no_source_has_is_refused(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        unpacked(packed(source(**changes)), ROOT)
    assert str(error.value).startswith("--source /photos: cannot be listed: its listing is not sound: ")


@pytest.mark.parametrize("split", [-1, 2, None])
def test_an_image_of_another_part_than_train_and_val_is_refused(monkeypatch, split):
    """-1 would be val to Python."""
    table = pa.table
    changed = [split, 0, 1, 1]
    monkeypatch.setattr(apart.pa, "table", lambda columns, schema: table(columns | {"split": changed}, schema=schema))
    data = packed(source())
    with pytest.raises(ValueError, match="its listing is not sound: an image of no part"):
        unpacked(data, ROOT)


def test_what_is_no_listing_at_all_is_refused():
    other = io.BytesIO()
    with pa.ipc.new_stream(other, pa.schema([("id", pa.int64())])) as writer:
        writer.write_table(pa.table({"id": [1]}))
    sound = packed(source())
    (size,) = struct.unpack("<Q", sound[:8])
    for data in (
        b"",
        b"\xff" * 8,
        sound[:100],
        sound[:-9],
        sound[: 8 + size] + other.getvalue(),
        b"\2" + b"\0" * 7 + b"[]",
    ):
        with pytest.raises(ValueError, match="its listing is not sound"):
            unpacked(data, ROOT)


@pytest.mark.parametrize(("kind", "error"), [("value", ValueError), ("job", JobError), ("storage", StorageError)])
def test_errors_for_the_user_come_back_as_what_they_are(kind, error):
    with pytest.raises(error, match="line") as raised:
        unpacked(apart._with_head({"error": kind, "message": "line"}, b""), ROOT)
    assert (type(raised.value), str(raised.value)) == (error, "line")


@pytest.fixture(params=["forked", "started"])
def way(request, monkeypatch):
    """Both ways to begin a child: a fork, and where that is not safe a new interpreter."""
    if request.param == "started":
        monkeypatch.setattr(sandbox.threading, "active_count", lambda: 2)


def test_a_folder_is_listed_as_here_with_its_lines_and_its_errors(way, photographs):
    here, there = [], []
    wanted = open_source(str(photographs), Options(seed=3), say=here.append)
    assert open_apart(str(photographs), Options(seed=3), say=there.append) == wanted
    assert there == here
    assert len(here) == 1
    with pytest.raises(ValueError, match="no such folder or file") as error:
        open_apart(str(photographs / "nowhere"))
    assert str(error.value) == error_of(str(photographs / "nowhere"))
    assert os.listdir(photographs.parent) == [photographs.name]


def error_of(place: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_source(place)
    return str(error.value)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (os.abort, "crashed its reader (signal 6)"),
        (lambda: bytes(2**40), "needs more than"),
        (lambda: {}["x"], "KeyError: 'x'"),
        (lambda: Path("written").write_text("x"), "OSError: [Errno 27] File too large"),
    ],
)
def test_a_reader_that_fails_ends_in_one_line(photographs, monkeypatch, tmp_path, act, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox.threading, "active_count", lambda: 1)
    monkeypatch.delitem(sandbox.sys.modules, "ray", raising=False)
    monkeypatch.setattr(apart, "open_source", lambda *args, **options: act())
    with pytest.raises(ValueError, match="cannot be listed: ") as error:
        open_apart(str(photographs))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_that_aborts_its_reader_is_refused(way, tmp_path):
    (tmp_path / "x.parquet").write_bytes(hostile.aborting_parquet())
    with pytest.raises(ValueError, match=r"x.parquet: cannot be listed: crashed its reader \(signal 6\)"):
        open_apart(str(tmp_path / "x.parquet"))


def damaged_zip(change) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("train/cat/kätzchen.jpg", b"x" * 200)
    return change(out.getvalue())


def at(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    place = data.rindex(mark) + offset
    return data[:place] + value + data[place + len(value) :]


# what the fuzzer found, in the smallest form
ZIPS = {
    "a name that is no UTF-8": lambda data: at(data, b"PK\1\2", 46 + 11, b"\xb9\xb9"),
    "no name": lambda data: at(at(data, b"PK\1\2", 28, struct.pack("<HH", 0, 23)), b"PK\1\2", 46, b"\0" * 23),
    "a header before the file": lambda data: at(data, b"PK\1\2", 42, b"\xff\xff\xff\xff"),
    "a directory before the file": lambda data: data[-22:],
    "an end of nothing": lambda data: b"PK\5\6",
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_damaged_directory_of_a_zip_is_named(name, tmp_path):
    (tmp_path / "x.zip").write_bytes(damaged_zip(ZIPS[name]))
    with pytest.raises(ValueError, match=r"x.zip") as error:
        open_source(str(tmp_path / "x.zip"))
    assert type(error.value) is ValueError


@pytest.mark.parametrize("size", ["-1", str(2**63), str(2**70)])
@pytest.mark.parametrize("kind", ["cls", "jpg"])
def test_a_member_of_an_impossible_size_is_named(kind, size, tmp_path):
    info = tarfile.TarInfo(f"0001.{kind}")
    info.pax_headers = {"size": size}
    first = tarfile.TarInfo("0000.cls").tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "x.tar").write_bytes(first + info.tobuf(tarfile.PAX_FORMAT) + b"\0" * 1024)
    with pytest.raises(ValueError, match=f"x.tar: damaged: a member of {size} bytes"):
        open_source(str(tmp_path / "x.tar"))


def test_a_sparse_member_of_an_impossible_size_is_named(tmp_path):
    """Its header states another size, which hides this one from what comes after it."""
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 2**70
    data = info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=f"x.tar.gz: damaged: a member of {2**70} bytes"):
        read_small_archive(StoragePath.of(tmp_path / "x.tar.gz"), {"a"})


def test_an_archive_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(place):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(StoragePath, "read", refuse)
    with pytest.raises(ValueError, match=r"x.tar.gz: cannot be read: Permission denied$"):
        read_small_archive(StoragePath.of(tmp_path / "x.tar.gz"), {"a"})


def test_a_shard_without_a_column_is_damage(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 2, "label": pa.array([0, 1], pa.int32())}), tmp_path / "x.parquet")
    with pytest.raises(DamagedData, match=r"x.parquet, row group 0: has no column id$"):
        read_row_group(StoragePath.of(tmp_path / "x.parquet"), 0)


def test_a_name_in_a_footer_that_is_no_utf8_is_damage(tmp_path):
    table = pa.table({"image": [b"x"] * 2, "label": pa.array([0, 1], pa.int32()), "id": [0, 1], "name": ["a", "b"]})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"name", b"n\xffme"))
    with pytest.raises(DamagedData, match=r"x.parquet, row group 0: cannot be read"):
        read_row_group(StoragePath.of(tmp_path / "x.parquet"), 0)
    with pytest.raises(ValueError, match=r"x.parquet: cannot be read as Parquet") as error:
        open_source(str(tmp_path / "x.parquet"))
    assert type(error.value) is ValueError


def test_an_endless_line_of_a_list_is_quoted_in_part(tmp_path):
    (tmp_path / "train.txt").write_text("x" * 5000)
    (tmp_path / "val.txt").write_text("")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.txt, line 1: 'x+'\.\.\. \(5000 characters\) is not `PATH LABEL`"):
        open_source(str(tmp_path))


def test_the_request_is_plain_json(monkeypatch, photographs):
    sent = []
    monkeypatch.setattr(sandbox, "run", lambda reader, data, **options: sent.append(data) or reader(data, print))
    open_apart(str(photographs), Options(val_fraction=0.5))
    assert json.loads(sent[0])["options"]["val_fraction"] == 0.5
