"""The rows of shards for evaluation: all of a split, as stored, each once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.base.storage import StoragePath
from orchestrator.data import shards
from orchestrator.data.order import row_groups
from orchestrator.data.reader import RowGroup, read_row_group
from orchestrator.data.shards import DamagedData, Manifest
from orchestrator.models.engine import Pixels, Run

DECODED_TOGETHER = 16  # images of one thread at a time


@dataclass(frozen=True)
class Rows:
    """What is known of a split's images beside their pixels, in stored order."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Range:
    """Consecutive rows of a split."""

    first: int
    last: int  # exclusive


def read_rows(folder: StoragePath, manifest: Manifest, split: str) -> Rows:
    """All rows of a split without their pixels. Raises DamagedData; ValueError for labels beyond the classes."""
    tables = []
    for shard in manifest.split(split):
        place = folder / shard.file
        try:
            with place.open() as file:
                tables.append(pq.read_table(file, columns=["id", "label", "name"]))
        except (OSError, pa.ArrowException) as error:
            raise DamagedData(f"{place}: shard cannot be read: {str(error).splitlines()[0]}") from None
    table = pa.concat_tables(tables)
    if len(table) != manifest.rows[split]:
        raise DamagedData(f"{folder}: its {split} shards have {len(table)} rows, the manifest {manifest.rows[split]}")
    labels = table["label"].to_numpy().astype(np.int64)
    found = [table["label"].to_numpy() for table in tables]
    ends = [(int(each.min()), int(each.max())) if len(each) else (0, 0) for each in found]
    of_split = manifest.model_copy(update={"shards": manifest.split(split)})
    shards.check_labels(folder, of_split, ends, len(manifest.classes))
    return Rows(table["id"].to_numpy(), labels, table["name"].to_pylist())


def ranges(num_rows: int, batch_size: int) -> Iterator[Range]:
    """All rows in batches, of which the last may be short."""
    for first in range(0, num_rows, batch_size):
        yield Range(first, min(first + batch_size, num_rows))


class ShardReader:
    """Reads ranges of a split's rows."""

    def __init__(self, folder: StoragePath, manifest: Manifest, split: str) -> None:
        self.folder, self.shards, self.size = folder, manifest.split(split), manifest.image_size
        self.groups = row_groups(self.shards)
        self.starts = np.cumsum([0, *(rows for _, _, rows in self.groups)])

    def fetch(self, task: Range) -> list[tuple[RowGroup, NDArray[np.int64]]]:
        """The row groups of a range, and which rows of each."""
        found = []
        first = int(np.searchsorted(self.starts, task.first, "right")) - 1
        for number in range(first, len(self.groups)):
            start, (at, index, rows) = int(self.starts[number]), self.groups[number]
            if start >= task.last:
                break
            shard = self.shards[at]
            group = read_row_group(self.folder / shard.file, index, shard.pixels_at[index : index + 1])
            found.append((group, np.arange(max(0, task.first - start), min(rows, task.last - start))))
        return found

    def decode(self, task: Range, fetched: list[tuple[RowGroup, NDArray[np.int64]]], run: Run) -> Pixels:
        """The pixels, in order. Raises DamagedData."""
        stored = np.empty((task.last - task.first, self.size, self.size, 3), np.uint8)
        parts, at = [], 0
        for group, rows in fetched:
            for first in range(0, len(rows), DECODED_TOGETHER):
                part = rows[first : first + DECODED_TOGETHER]
                parts.append((group, part, stored[at : at + len(part)]))
                at += len(part)
        assert at == len(stored), f"rows {task} are not all there"
        run(lambda part: part[0].decode_into(*part[1:]), parts)
        return Pixels(stored, np.concatenate([group.ids[rows] for group, rows in fetched]))
