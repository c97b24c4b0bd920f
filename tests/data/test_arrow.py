"""Batches of Arrow files in object storage: each is read by itself, as it is in the file."""

import io
import struct

import pyarrow as pa
import pytest

from alexnet.images import NotAnImage
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data.sources import Entry, listing, read
from orchestrator.data.sources.arrow import _places, read_batch

ROWS, PER_BATCH, SIDE = 40, 10, 20_000  # bytes of an image


def table() -> pa.Table:
    names = pa.array([f"class {i % 3}" for i in range(ROWS)]).dictionary_encode()
    return pa.table({"image": [bytes([i]) * (SIDE + i) for i in range(ROWS)], "label": names})


def arrow(form) -> bytes:
    out = io.BytesIO()
    with form(out, table().schema) as writer:
        writer.write_table(table(), max_chunksize=PER_BATCH)
    return out.getvalue()


def with_changing_dictionaries() -> bytes:
    out, schema = io.BytesIO(), table().schema
    with pa.ipc.new_stream(out, schema) as writer:
        for first in range(0, ROWS, PER_BATCH):
            names = pa.array([f"class {first} {i % 3}" for i in range(PER_BATCH)]).dictionary_encode()
            columns = [pa.array([bytes([first + i]) for i in range(PER_BATCH)]), names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return out.getvalue()


FILES = {
    "stream": lambda: arrow(pa.ipc.new_stream),
    "file": lambda: arrow(pa.ipc.new_file),
    "changing": with_changing_dictionaries,
    "old": lambda: arrow(lambda out, schema: pa.ipc.new_stream(
        out, schema, options=pa.ipc.IpcWriteOptions(use_legacy_format=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_batch_is_that_of_the_whole_file(s3, tmp_path, name):
    root, _, _ = s3
    data = FILES[name]()
    here = StoragePath.of(tmp_path / "x.arrow")
    for place in (root / f"{name}.arrow", here):
        place.write(data)
    whole = [read_batch(here, index) for index in range(ROWS // PER_BATCH)]
    assert [batch["image"][0].as_py()[:1] for batch in whole] == [bytes([i]) for i in range(0, ROWS, PER_BATCH)]
    for index in (2, 0, 3, 1):
        found = read_batch(root / f"{name}.arrow", index)
        assert found.to_pylist() == whole[index].to_pylist()
    with pytest.raises(IndexError):
        read_batch(root / f"{name}.arrow", 4)


def test_a_row_costs_its_batch_and_not_the_file(s3, monkeypatch):
    root, _, _ = s3
    place = root / "cost.arrow"
    place.write(arrow(pa.ipc.new_stream))
    lengths: list[int] = []
    read_at = StoragePath.read_at
    monkeypatch.setattr(
        StoragePath, "read_at", lambda self, *where: lengths.append(len(found := read_at(self, *where))) or found
    )
    listing._recent.clear()
    rows = [Entry(i, 0, str(i), path=place.text, row_group=2, row=i) for i in (4, 7)]
    assert [read(row) for row in rows] == [bytes([24]) * (SIDE + 24), bytes([27]) * (SIDE + 27)]
    assert PER_BATCH * SIDE < sum(lengths) < 1.2 * PER_BATCH * SIDE  # of four batches
    before = len(lengths)
    read(Entry(0, 0, "0", path=place.text, row_group=0, row=0))
    assert len(lengths) - before <= 4, "the heads are not read again"
    with pytest.raises(NotAnImage, match="the row has no bytes"):
        read(Entry(0, 0, "0", path=place.text, row_group=0, row=PER_BATCH))
    with pytest.raises(StorageError, match=r"cost.arrow.*, row group 9: cannot be read"):
        read(Entry(0, 0, "0", path=place.text, row_group=9, row=0))


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("where", ["here", "there"])
def test_bytes_beyond_the_file_are_not_taken_for_an_image(s3, tmp_path, form, where):
    root, _, _ = s3
    data = arrow(form)
    ends = [SIDE * i + i * (i - 1) // 2 for i in range(PER_BATCH + 1)]  # of the images of the first batch
    offsets = struct.pack(f"<{PER_BATCH + 1}i", *ends)
    assert data.count(offsets) == 1
    moved = struct.pack(f"<{PER_BATCH + 1}i", *ends[:-1], 2**30)
    place = StoragePath.of(tmp_path / "moved.arrow") if where == "here" else root / f"moved-{form.__name__}.arrow"
    place.write(data.replace(offsets, moved))
    _places.cache_clear()
    listing._recent.clear()
    with pytest.raises(StorageError, match=r"moved.*, row group 0: cannot be read: .* out of bounds"):
        read(Entry(0, 0, "0", path=place.text, row_group=0, row=PER_BATCH - 1))


@pytest.mark.parametrize("change", [lambda d: d[: len(d) // 2], lambda d: d[:8] + b"\xff" * 60 + d[68:],
                                    lambda d: d[:4] + b"\xff" * 4 + d[8:]])  # fmt: skip
def test_a_damaged_stream_is_named(s3, change):
    root, _, _ = s3
    place = root / "damaged.arrow"
    place.write(change(arrow(pa.ipc.new_stream)))
    _places.cache_clear()
    listing._recent.clear()
    with pytest.raises(StorageError, match=r"damaged.arrow.*, row group 3: cannot be read"):
        read(Entry(0, 0, "0", path=place.text, row_group=3, row=0))
