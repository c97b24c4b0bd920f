"""The images of a data set, one after the other in bounded memory, in this process.

N images, S the side at which they are stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.base.storage import StoragePath
from orchestrator.data.order import row_groups
from orchestrator.data.reader import read_row_group
from orchestrator.data.shards import DamagedData, read_manifest

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Stored:
    """An image of a data set."""

    image: Images  # (S, S, 3)
    label: int
    name: str  # its path in the source


class Part:
    """The train or val part of a data set; of a large one, row groups evenly apart."""

    def __init__(self, data: StoragePath, split: str, at_most: int | None = None) -> None:
        """at_most: images, but for the rest of a row group. Raises ValueError if there is no data set."""
        self.data, self.manifest, self.split = data, read_manifest(data), split
        self.shards = self.manifest.split(split)
        self.groups = row_groups(self.shards)
        self.total = self.manifest.rows[split]
        if at_most is not None and at_most < self.total:
            count = max(1, round(len(self.groups) * at_most / self.total))
            self.groups = [self.groups[i * len(self.groups) // count] for i in range(count)]
        self.rows = sum(rows for _, _, rows in self.groups)

    def batches(self) -> Iterator[tuple[Images, NDArray[np.int64]]]:
        """All images (N, S, S, 3) and their labels, in order, a row group at a time.

        Raises DamagedData; JobError where a file cannot be read.
        """
        for shard, group, rows in self.groups:
            yield self._read(shard, group, np.arange(rows))

    def at(self, position: int) -> Stored:
        """The image that is so many images from the first. Raises like `batches`."""
        ends = np.cumsum([rows for _, _, rows in self.groups])
        which = int(np.searchsorted(ends, position, side="right"))
        shard, group, rows = self.groups[which]
        row = position - int(ends[which]) + rows
        images, labels = self._read(shard, group, np.array([row]))
        return Stored(images[0], int(labels[0]), self._name(shard, group, row))

    def _read(self, shard: int, group: int, rows: NDArray[np.int64]) -> tuple[Images, NDArray[np.int64]]:
        size, file = self.manifest.image_size, self.shards[shard]
        found = read_row_group(self.data / file.file, group, file.pixels_at[group : group + 1])
        images = np.empty((len(rows), size, size, 3), np.uint8)
        found.decode_into(rows, images)
        return images, found.labels[rows]

    def _name(self, shard: int, group: int, row: int) -> str:
        place = self.data / self.shards[shard].file
        try:
            with place.open() as file:
                column = pq.ParquetFile(file).read_row_group(group, columns=["name"])["name"]
        except (OSError, pa.ArrowException) as error:
            raise DamagedData(f"{place}, row group {group}: cannot be read: {str(error).splitlines()[0]}") from None
        return str(column[row].as_py())
