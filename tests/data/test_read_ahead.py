"""Members of archives in object storage: neighbours are read with one request, and the shards hold what they should."""

import io
import json
import tarfile
import threading
import zipfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_near import copied, photograph

from alexnet.images import NotAnImage, decode, resize_and_center
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data import read_ahead as ahead
from orchestrator.data.prepare import _tasks
from orchestrator.data.read_ahead import in_runs, read_ahead, together
from orchestrator.data.shard_writer import ShardWriter, pack
from orchestrator.data.sources import Entry, open_source

MB = 2**20


def ranged(position: int, start: int, length: int, path: str = "s3://bucket/a.tar", packed: int | None = None) -> Entry:
    return Entry(position, 0, str(position), path=path, start=start, length=length, packed=packed)


def test_neighbours_are_read_together_up_to_a_gap_and_a_size():
    entries = [
        ranged(0, 3 * MB, 10), ranged(1, 0, 100), ranged(2, 612, 100), ranged(3, 612, 10, "s3://bucket/b.tar"),
        ranged(4, 712 + 2**18, MB), ranged(5, 713 + 2**18 + MB + 2**18, 1), ranged(6, 20 * MB, 4 * MB),
        ranged(7, 24 * MB, 4 * MB), ranged(8, 28 * MB, 1), Entry(9, 0, "9", path="s3://bucket/9.jpg"),
        ranged(10, 0, 5, "/here/a.tar"), ranged(11, 40 * MB, 2**29),
    ]  # fmt: skip
    assert together(entries) == [[1, 2, 4], [5], [0], [6, 7], [8], [3], [9], [10], [11]]
    assert together([ranged(0, 0, 9 * MB, packed=50), ranged(1, 50, 9 * MB, packed=50)]) == [[0, 1]], (
        "as they are packed"
    )


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_shard_of_an_archive_in_object_storage_takes_a_few_requests(s3, tmp_path, kind, monkeypatch):
    root, _, _ = s3
    names = [f"{name}/{i:03d}.jpg" for name in ("cat", "dog") for i in range(100)]
    files = {name: copied(photograph(i % 30, 70), "") for i, name in enumerate(names)}
    files["cat/005.jpg"] = b"no image"
    (root / f"pets.{kind}").write(archive(kind, files))
    source = open_source((root / f"pets.{kind}").text)
    local = tmp_path / f"pets.{kind}"
    local.write_bytes((root / f"pets.{kind}").read())
    assert in_runs(open_source(str(local))).runs is None
    ordered = in_runs(source)
    assert ordered.runs == {"train": [32] * 5, "val": [32, 8]}
    for split, entries in ordered.splits.items():
        assert sorted(entry.id for entry in entries) == sorted(entry.id for entry in source.splits[split])
        assert [entry.start for entry in entries] == sorted(entry.start for entry in entries)
    requests: list[int] = []
    read_at = StoragePath.read_at
    monkeypatch.setattr(StoragePath, "read_at", lambda place, *args: requests.append(args[1]) or read_at(place, *args))
    results = [ShardWriter(StoragePath.of(tmp_path / "out"), 72, 90, 2)(task) for task in _tasks(ordered, 0, 64)]
    assert len(requests) == len(results) == 4, "of 200 images within the gap of each other"
    reports = [json.loads(result["report"]) for result in results]
    assert [result["failure"] for result in results] == [""] * 4
    assert [row["name"] for report in reports for row in report["rejected"]] == ["cat/005.jpg"]
    rows = pq.read_table([tmp_path / "out" / report["shard"]["file"] for report in reports]).to_pylist()
    assert sorted(row["name"] for row in rows) == sorted(files.keys() - {"cat/005.jpg"})
    ids = {entry.name: (entry.id, entry.label) for entries in source.splits.values() for entry in entries}
    assert all((row["id"], row["label"]) == ids[row["name"]] for row in rows)
    for row in rows[::10]:
        expected = resize_and_center(decode(files[row["name"]]), 72).astype(int)
        assert np.abs(decode(row["image"]) - expected).mean() < 4


def test_a_row_keeps_its_place_whatever_the_order_of_reading(s3, tmp_path):
    """As a shard has always been written: in the order of its entries."""
    root, _, _ = s3
    pictures = [copied(photograph(i, 70), "") for i in range(6)]
    (root / "a.bin").write(b"".join(pictures))
    (root / "alone.jpg").write(pictures[5])
    starts = np.cumsum([0, *map(len, pictures)])
    order = [3, 1, 5, 0, 4, 2]
    entries = [
        Entry(i, 0, str(i), path=(root / "a.bin").text, start=int(starts[i]), length=len(pictures[i])) for i in order
    ]
    entries[2] = Entry(5, 0, "5", path=(root / "alone.jpg").text)
    assert [position for position, _ in read_ahead(entries)] == [3, 1, 5, 0, 4, 2]
    assert [load() for _, load in read_ahead(entries)] == [pictures[i] for i in (0, 1, 2, 3, 4, 5)]
    ShardWriter(StoragePath.of(tmp_path), 72, 90, 1)(pack("train", "a.parquet", entries))
    assert pq.read_table(tmp_path / "a.parquet")["id"].to_pylist() == order


def test_a_damaged_member_fails_alone_and_a_failed_request_all_of_its_run(s3):
    root, _, _ = s3
    packed = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    good = packed.compress(b"good" * 50) + packed.flush()
    (root / "a.bin").write(good + b"\xff" * 20)
    path = (root / "a.bin").text
    entries = [ranged(0, 0, 200, path, packed=len(good)), ranged(1, len(good), 200, path, packed=20)]
    loads = dict(read_ahead(entries))
    assert loads[0]() == b"good" * 50
    with pytest.raises(NotAnImage, match="damaged in the archive"):
        loads[1]()
    gone = (root / "gone.bin").text
    for _, load in read_ahead([ranged(0, 0, 5, gone), ranged(1, 5, 5, gone)]):
        with pytest.raises(StorageError, match=r"gone\.bin.*: cannot be read"):
            load()


class Storage:
    """In the place of object storage: what is being read or held, at most."""

    def __init__(self, monkeypatch, size_of):
        self.size_of, self.lock = size_of, threading.Lock()
        self.held = self.most = 0
        monkeypatch.setattr(StoragePath, "read", lambda place, before: self.read(place, before))

    def read(self, place, before):
        size = self.size_of(int(place.name))
        before(size)
        with self.lock:
            self.held += size
            self.most = max(self.most, self.held)
        return bytes([int(place.name) % 256]) * size


@pytest.mark.parametrize(("size", "most"), [(300, 900), (3000, 3000)], ids=["three of 300", "one of 3000 alone"])
def test_what_is_read_ahead_is_bounded_by_its_bytes(monkeypatch, size, most):
    monkeypatch.setattr(ahead, "BYTES_AHEAD", 1000)
    storage = Storage(monkeypatch, lambda number: size if number == 20 else 300)
    found = []
    for position, load in read_ahead([Entry(i, 0, str(i), path=f"s3://bucket/{i}") for i in range(60)]):
        data = load()
        assert data == bytes([position]) * storage.size_of(position)
        found.append(position)
        with storage.lock:
            storage.held -= len(data)
    assert found == list(range(60))
    assert storage.most == most


def test_a_reading_that_is_given_up_leaves_no_thread_that_waits(monkeypatch):
    monkeypatch.setattr(ahead, "BYTES_AHEAD", 1)
    storage = Storage(monkeypatch, lambda number: 300)
    some = read_ahead([Entry(i, 0, str(i), path=f"s3://bucket/{i}") for i in range(60)])
    next(some)[1]()
    before = threading.active_count()
    read = storage.most
    some.close()
    assert threading.active_count() < before
    assert storage.most == read, "nothing more is read"


def test_a_file_that_fails_keeps_no_room_and_one_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(ahead, "BYTES_AHEAD", 500)
    storage = Storage(monkeypatch, lambda number: 2**29 if number == 1 else 400)
    whole = storage.read

    def read_some(place, before):
        if place.name == "2":
            raise FileNotFoundError(2, "no such object")
        return whole(place, before)

    monkeypatch.setattr(StoragePath, "read", read_some)
    reasons = {}
    for position, load in read_ahead([Entry(i, 0, str(i), path=f"s3://bucket/{i}") for i in range(5)]):
        try:
            assert len(load()) == 400
        except NotAnImage as reason:
            reasons[position] = str(reason)
    assert reasons == {
        1: "536870912 bytes are more than any photograph has", 2: "cannot be read: no such object",
    }  # fmt: skip
