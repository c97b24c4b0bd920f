"""A task of a preparation: entries of a source to one shard, the sums of its pixels, and a note that it is done."""

import collections
import hashlib
import io
import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alexnet import images
from orchestrator.base.exits import JobError, last_line
from orchestrator.base.schema import KEY, check_version
from orchestrator.base.storage import StoragePath
from orchestrator.data.decoder import Decoder
from orchestrator.data.read_ahead import read_ahead
from orchestrator.data.shards import ROW_GROUP_ROWS, UNFINISHED, schema, sha256
from orchestrator.data.sources import Entry, versions

NOTE_VERSION = 1


def pack(split: str, file: str, entries: list[Entry]) -> dict[str, bytes]:
    """The row that `ShardWriter` is called with: the shard's split, its file below the output, and what it holds."""
    return {"task": pickle.dumps({"split": split, "file": file, "entries": entries})}  # read by ShardWriter only


class ShardWriter:
    """Writes shards; called by Ray Data with the row of each."""

    def __init__(
        self,
        output: StoragePath,
        size: int,
        jpeg_quality: int | None,
        num_classes: int,
        row_group_rows: int = ROW_GROUP_ROWS,
        exif: bool = False,
        background: tuple[int, int, int] = images.WHITE,
    ) -> None:
        """size: side of the stored images in pixels. jpeg_quality: None for raw pixels. exif: turn images by it."""
        self.output, self.size, self.jpeg_quality, self.num_classes = output, size, jpeg_quality, num_classes
        self.row_group_rows, self.exif, self.background = row_group_rows, exif, background

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        """The report as JSON, the sums of Moments, whether the shard was kept, and a failure as one line or "".

        A failure is returned, because Ray Data would bury its one line under its own advice.
        """
        try:
            return self._result(pickle.loads(row["task"])) | {"failure": ""}
        except (JobError, OSError, MemoryError, pa.ArrowException) as failure:
            nothing = np.zeros(0)
            return {"report": "", "sums": nothing, "products": nothing, "kept": False, "failure": last_line(failure)}

    def _result(self, task: dict[str, Any]) -> dict[str, Any]:
        note = self.output / UNFINISHED / (task["file"] + ".npz")
        settings: list[Any] = [
            self.size,
            self.jpeg_quality,
            self.num_classes,
            self.row_group_rows,
            self.exif,
            self.background,
        ]
        fingerprint = hashlib.sha256(repr((settings, task, versions(task["entries"]))).encode()).hexdigest()
        kept = self._kept(note, fingerprint)
        if kept is not None:
            return kept
        result = self.make(task["split"], task["file"], task["entries"])
        data = io.BytesIO()
        arrays: dict[str, Any] = {name: np.array(value) for name, value in result.items()}
        arrays |= {KEY: np.array(NOTE_VERSION), "fingerprint": np.array(fingerprint)}
        np.savez(data, **arrays)
        note.write(data.getvalue())
        return result | {"kept": False}

    def _kept(self, note: StoragePath, fingerprint: str) -> dict[str, Any] | None:
        """The result of the same task in an earlier attempt, if its shard is still what it was then.

        Raises JobError for a note of a newer version, whose shard this one would otherwise make again.
        """
        if note.size() is None:
            return None
        data = note.read()
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                fields = {name: found[name] for name in found.files}
        except Exception:  # whatever numpy makes of a note that was cut off
            return None
        try:
            check_version({KEY: fields[KEY].item()} if KEY in fields else {}, NOTE_VERSION, note)
        except ValueError as error:
            raise JobError(f"{error}, or remove {self.output / UNFINISHED} to begin again") from None
        if str(fields.get("fingerprint")) != fingerprint:
            return None
        result = {"report": str(fields["report"]), "sums": fields["sums"], "products": fields["products"]}
        report = json.loads(result["report"])
        shard = report["shard"]
        if report["rejected"]:  # the user may have repaired them
            return None
        place = self.output / shard["file"]
        if shard["rows"] and (place.size() != shard["size_bytes"] or sha256(place) != shard["sha256"]):
            return None
        return result | {"kept": True}

    def make(self, split: str, file: str, entries: list[Entry]) -> dict[str, Any]:
        """Write the shard, whatever is there. Returns the report as JSON, and the sums of Moments."""
        from orchestrator.data.pixel_stats import Moments  # imports numba, which drivers do not need

        moments = Moments(self.size)
        made: list[tuple[int, bytes]] = []  # position and stored image
        counts: collections.Counter[str] = collections.Counter()
        rejected, guessed = [], []  # guessed: lines about images whose range of pixel values is not known
        decoder = Decoder(self.size, self.exif, self.background)
        for position, outcome in decoder.outcomes(entries, read_ahead(entries)):
            if outcome.pixels is None:
                rejected.append({"name": entries[position].name, "reason": outcome.reason})
                continue
            pixels = outcome.pixels
            counts.update(outcome.kinds)
            guessed += [f"{entries[position].name}: {note}" for note in outcome.notes]
            moments.add(pixels)
            stored = pixels.tobytes() if self.jpeg_quality is None else images.encode(pixels, self.jpeg_quality)
            made.append((position, stored))
        made.sort(key=lambda pair: pair[0])
        kept = [entries[position] for position, _ in made]
        labels = np.array([entry.label for entry in kept], np.int32)
        shard = {"file": file, "split": split, "rows": len(kept)}
        if kept:
            rest = {"id": [entry.id for entry in kept], "name": [entry.name for entry in kept]}
            shard |= self.write(self.output / file, {"image": [stored for _, stored in made], "label": labels} | rest)
        class_rows = np.bincount(labels, minlength=self.num_classes).tolist()
        report = {
            "shard": shard, "rejected": rejected, "guessed": guessed, "images": len(entries), "class_rows": class_rows,
            "counts": dict(counts),
        }  # fmt: skip
        return {"report": json.dumps(report), "sums": moments.sums, "products": moments.products}

    def write(self, place: StoragePath, columns: dict[str, Any]) -> dict[str, Any]:
        """Write columns as a Parquet file. Returns what a manifest's Shard says of the file."""
        form = schema("raw" if self.jpeg_quality is None else "jpeg", self.size)
        sink = pa.BufferOutputStream()
        # compressed or dictionary-encoded images would be slower to read (docs/data.md)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        if self.jpeg_quality is None:
            options["data_page_size"] = 2 * self.row_group_rows * 3 * self.size**2  # one page: the rows are contiguous
        pq.write_table(pa.table(columns, schema=form), sink, row_group_size=self.row_group_rows, **options)
        data = sink.getvalue().to_pybytes()
        place.write(data)
        rows = len(columns["id"])
        groups = [min(self.row_group_rows, rows - first) for first in range(0, rows, self.row_group_rows)]
        found = {"row_groups": groups, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return found | ({"pixels_at": _pixels_at(data, columns["image"])} if self.jpeg_quality is None else {})


def _pixels_at(data: bytes, images_of_rows: list[bytes]) -> list[int]:
    """The byte of a file of raw images where the pixels of each row group begin, at the end of its only page.

    Empty if they are not there.
    """
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
