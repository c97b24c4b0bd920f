"""Rows to Parquet shards."""

import collections
import functools
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.base.exits import JobError, last_line
from orchestrator.base.storage import StoragePath
from orchestrator.data import images
from orchestrator.data.shards import (
    ROW_GROUP_ROWS,
    UNFINISHED,
    schema,
    sha256,
)
from orchestrator.data.sources import Entry, read, version

READ_AHEAD = 32  # files of a remote source, while others are decoded
READERS = 16


class _ShardWriter:
    """The task that turns a stretch of entries into one Parquet file and the sums of its pixels."""

    def __init__(self, output: StoragePath, size: int, jpeg_quality: int | None, num_classes: int) -> None:
        self.output, self.size, self.jpeg_quality, self.num_classes = output, size, jpeg_quality, num_classes

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        """The report, the sums, and the one line of a failure, which Ray Data would bury under its own."""
        try:
            return self._done(pickle.loads(row["task"])) | {"failure": ""}
        except (JobError, OSError, pa.ArrowException) as failure:
            nothing = np.zeros(0)
            return {"report": "", "sums": nothing, "products": nothing, "kept": False, "failure": last_line(failure)}

    def _done(self, task: dict[str, Any]) -> dict[str, Any]:
        note = self.output / UNFINISHED / (task["file"] + ".npz")
        settings = [self.size, self.jpeg_quality, self.num_classes, ROW_GROUP_ROWS]
        versions = [version(entry) for entry in task["entries"]]
        fingerprint = hashlib.sha256(repr((settings, task, versions)).encode()).hexdigest()
        kept = self._done_before(note, fingerprint)
        if kept is not None:
            return kept
        result = self._make(task)
        data = io.BytesIO()
        arrays: dict[str, Any] = {name: np.array(value) for name, value in result.items()}
        np.savez(data, fingerprint=np.array(fingerprint), **arrays)
        note.write(data.getvalue())
        return result | {"kept": False}

    def _done_before(self, note: StoragePath, fingerprint: str) -> dict[str, Any] | None:
        """The result of the same task in an earlier attempt, if its shard is as it was then."""
        if note.size() is None:
            return None
        data = note.read()
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                if str(found["fingerprint"]) != fingerprint:
                    return None
                result = {"report": str(found["report"]), "sums": found["sums"], "products": found["products"]}
            report = json.loads(result["report"])
        except Exception:  # a note that was cut off says nothing
            return None
        shard = report["shard"]
        if report["rejected"]:  # the user may have mended them
            return None
        place = self.output / shard["file"]
        if shard["rows"] and (place.size() != shard["size_bytes"] or sha256(place) != shard["sha256"]):
            return None
        return result | {"kept": True}

    def _make(self, task: dict[str, Any]) -> dict[str, Any]:
        from orchestrator.data.pixel_stats import Moments  # and numba, which drivers do without

        moments = Moments(self.size)
        data: list[bytes] = []
        kept: list[Entry] = []
        rejected = []
        for entry, load in _ahead(task["entries"]):
            try:
                pixels = images.resize_and_center(images.decode(load()), self.size)
            except images.NotAnImage as reason:
                rejected.append({"name": entry.name, "reason": str(reason)})
                continue
            moments.add(pixels)
            data.append(pixels.tobytes() if self.jpeg_quality is None else images.encode(pixels, self.jpeg_quality))
            kept.append(entry)
        labels = np.array([entry.label for entry in kept], np.int32)
        shard = {"file": task["file"], "split": task["split"], "rows": len(kept)}
        if kept:
            rest = {"id": [entry.id for entry in kept], "name": [entry.name for entry in kept]}
            shard |= self._write(self.output / task["file"], {"image": data, "label": labels} | rest)
        class_rows = np.bincount(labels, minlength=self.num_classes).tolist()
        report = {"shard": shard, "rejected": rejected, "images": len(task["entries"]), "class_rows": class_rows}
        return {"report": json.dumps(report), "sums": moments.sums, "products": moments.products}

    def _write(self, place: StoragePath, columns: dict[str, Any]) -> dict[str, Any]:
        form = schema("raw" if self.jpeg_quality is None else "jpeg", self.size)
        sink = pa.BufferOutputStream()
        # compressed or dictionary-encoded images would be slower to read (docs/data.md)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        if self.jpeg_quality is None:
            options["data_page_size"] = 2 * ROW_GROUP_ROWS * 3 * self.size**2  # one page, so that the rows lie together
        pq.write_table(pa.table(columns, schema=form), sink, row_group_size=ROW_GROUP_ROWS, **options)
        data = sink.getvalue().to_pybytes()
        place.write(data)
        rows = len(columns["id"])
        groups = [min(ROW_GROUP_ROWS, rows - first) for first in range(0, rows, ROW_GROUP_ROWS)]
        found = {"row_groups": groups, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return found | ({"pixels_at": _pixels_at(data, columns["image"])} if self.jpeg_quality is None else {})


def _pixels_at(data: bytes, images_of_rows: list[bytes]) -> list[int]:
    """Where the pixels of each row group begin in a file of raw images: at the end of its one page. Empty if not so."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    found, first = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        column, pixels = group.column(0), b"".join(images_of_rows[first : first + group.num_rows])
        start = column.data_page_offset + column.total_compressed_size - len(pixels)
        if data[start : start + len(pixels)] != pixels:
            return []
        found.append(start)
        first += group.num_rows
    return found


def _ahead(entries: list[Entry]) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Every entry and how to get its bytes; those of object storage are under way before they are asked for."""
    if not any(entry.path and "://" in entry.path and entry.row is None for entry in entries):
        for entry in entries:
            yield entry, functools.partial(read, entry)
        return
    with ThreadPoolExecutor(READERS) as pool:
        waiting: collections.deque[tuple[Entry, Any]] = collections.deque()
        for entry in entries:
            waiting.append((entry, pool.submit(read, entry)))
            if len(waiting) > READ_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result
        for first, future in waiting:
            yield first, future.result
