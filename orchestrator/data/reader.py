"""The feed's tasks: which rows one takes, and how it reads, decodes, crops, mirrors and colours them.

Runs in Ray Data's processes, which import no torch: that is why they start quickly.

N images, H rows, W columns, C colours.
"""

import json
from collections.abc import Iterator, MutableMapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import cachetools
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from alexnet import augment
from alexnet.allocator import keep_freed_memory
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.order import (
    Order,
    plan_epoch,
    plan_probe,
    plan_validation,
    rank_slice,
    row_groups,
    rows_of_pass,
)
from orchestrator.data.shards import DamagedData, Manifest, Shard

DECODED_AT_A_TIME = 4  # JPEG images
RECENT_BYTES = 2**27  # of row groups that a feed process caches; a window of 4096 JPEG rows is 90 MB
# by the name of the only column that a failed task returns; the subclass comes first
FAILURES = {"damaged": DamagedData, "failure": JobError}

Columns = dict[str, NDArray[Any]]
Batch = Columns  # a worker's rows of one step: image (N, H, W, C) uint8, label, id, position, top, left, flip, shift


@dataclass(frozen=True)
class Task:
    """Some steps of one pass, for one worker."""

    epoch: int
    split: str  # or probe: a part of train, as validation reads it
    first_step: int
    last_step: int  # exclusive


def pack(tasks: list[Task]) -> str:
    """Tasks as a cell of the column `tasks` that `TaskReader` is called with."""
    return json.dumps([astuple(task) for task in tasks])


def raise_failure(columns: Columns) -> None:
    """Raise the JobError that a task returned in place of its rows, if it did."""
    for name, kind in FAILURES.items():
        if name in columns:
            raise kind(str(columns[name][0]))


class TaskReader:
    """Reads, decodes and augments the rows of tasks."""

    def __init__(
        self, folder: StoragePath, manifest: Manifest, config: TrainConfig, rank: int, world_size: int
    ) -> None:
        self.folder, self.manifest, self.config, self.rank, self.world_size = folder, manifest, config, rank, world_size
        self.margin = manifest.image_size - config.crop_size
        self.cuts = config.augment_on == "feed"
        self.side = config.crop_size if self.cuts else manifest.image_size  # of the images that are sent

    def order(self, split: str, epoch: int) -> Order:
        """The rows of a pass, in order."""
        num_rows = rows_of_pass(split, self.manifest.rows)
        return _order(self.shards(split), split, self.config.seed, epoch, self.config.shuffle_window, num_rows)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards that a pass reads."""
        return self.manifest.split("val" if split == "val" else "train")

    def rank_slices(self, task: Task) -> list[tuple[int, int]]:
        """Where this worker's part of each of the task's steps begins and ends in the pass."""
        num_rows = rows_of_pass(task.split, self.manifest.rows)
        size = self.config.global_batch_size
        steps = range(task.first_step, task.last_step)
        return [rank_slice(step, num_rows, size, self.rank, self.world_size) for step in steps]

    def __call__(self, rows: Columns) -> Iterator[Columns]:
        """The rows of packed tasks, or the one column of FAILURES that says why there are none."""
        keep_freed_memory()
        results = []
        for task in (Task(*fields) for text in rows["tasks"] for fields in json.loads(text)):
            positions = np.concatenate([np.arange(lo, hi) for lo, hi in self.rank_slices(task)])
            if len(positions):
                try:
                    results.append(self.read(task, positions))
                except JobError as failure:  # returned, because Ray Data would bury its one line under its own advice
                    column = next(name for name, kind in FAILURES.items() if isinstance(failure, kind))
                    results = [{column: np.array([str(failure)])}]
                    break
        yield from results

    def read(self, task: Task, positions: NDArray[np.int64]) -> Columns:
        """The rows at these positions of the task's pass: read and decoded by row group, each cut into its place; or,
        where the device cuts, each whole, and the `shift` of its colours (N, 3) float32.

        Raises DamagedData, JobError where a file cannot be read.
        """
        config, manifest, total = self.config, self.manifest, len(positions)
        order, shards = self.order(task.split, task.epoch), self.shards(task.split)
        places = row_groups(shards)
        group, row = order.group[positions], order.row[positions]
        labels, ids = np.empty(total, np.int64), np.empty(total, np.int64)
        groups: list[tuple[RowGroup, NDArray[np.int64]]] = []
        for g in np.unique(group):
            shard, index, _ = places[g]
            where = np.flatnonzero(group == g)
            found = read_row_group(self.folder / shards[shard].file, index, shards[shard].pixels_at[index : index + 1])
            labels[where], ids[where] = found.labels[row[where]], found.ids[row[where]]
            groups.append((found, where))
        if task.split == "train":
            draws = augment.draw(ids, seed=config.seed, epoch=task.epoch, margin=self.margin, flip=config.flip)
            noise = config.color_noise
        else:
            draws, noise = augment.center(total, margin=self.margin), "none"
        values, vectors = np.array(manifest.eigenvalues), np.array(manifest.eigenvectors)
        shift = augment.color_shift(draws.normal, values, vectors, noise)
        image = np.empty((total, self.side, self.side, 3), np.uint8)
        for found, where in groups:
            for pixels, which, place in found.decoded(row[where].astype(np.int64), where, manifest.image_size):
                if self.cuts:
                    augment.crop_flip_shift(
                        pixels, draws.of(place), shift[place], self.side, which=which, out=image, place=place
                    )
                else:
                    image[place] = pixels[which]
        result: Columns = {"image": image, "label": labels, "id": ids, "position": positions}
        result |= {"top": draws.top, "left": draws.left, "flip": draws.flip}
        return result if self.cuts else result | {"shift": shift}


@dataclass(frozen=True)
class RowGroup:
    """A row group in memory."""

    images: pa.Array | NDArray[np.uint8]  # JPEG: binary; raw: binary of a fixed size, or the file's bytes from there on
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    name: str  # for messages
    size: int  # bytes of memory

    def decoded(
        self, rows: NDArray[np.int64], place: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        """Pixels (M, size, size, 3), which of them are wanted, and their places: the i-th of `rows` at `place[i]`.

        Raw pixels come all at once, as stored. JPEG is decoded a few images at a time, so that their pixels are still
        in the processor's cache when they are cut. Raises DamagedData.
        """
        if isinstance(self.images, np.ndarray):
            count = len(self.labels)
            yield self.images[: count * 3 * size**2].reshape(count, size, size, 3), rows, place
            return
        if pa.types.is_fixed_size_binary(self.images.type):
            pixels = np.frombuffer(self.images.buffers()[1], np.uint8).reshape(-1, size, size, 3)
            yield pixels[self.images.offset :], rows, place
            return
        pixels = np.empty((DECODED_AT_A_TIME, size, size, 3), np.uint8)
        for first in range(0, len(rows), DECODED_AT_A_TIME):
            part = rows[first : first + DECODED_AT_A_TIME]
            for target, row in zip(pixels, part, strict=False):
                try:
                    data = memoryview(self.images[row].as_buffer()).cast("B")
                    simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=target)
                except (ValueError, TypeError) as error:  # the latter: the row has no bytes
                    raise DamagedData(f"{self.name}: image {self.ids[row]} cannot be decoded: {error}") from None
            yield pixels, np.arange(len(part)), place[first : first + DECODED_AT_A_TIME]

    def decode_into(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Some rows, in order, into pixels (N, size, size, 3). Raises DamagedData."""
        for pixels, which, place in self.decoded(rows, np.arange(len(rows)), out.shape[1]):
            out[place] = pixels[which]  # a copy: the next ones are decoded into the same memory


# one that is larger than the cache counts as all of it: the rows of a task come from few groups, often from one
_recent: MutableMapping[tuple[StoragePath, int], RowGroup] = cachetools.LRUCache(
    RECENT_BYTES, getsizeof=lambda group: min(group.size, RECENT_BYTES)
)


def read_row_group(place: StoragePath, index: int, pixels_at: tuple[int, ...] = ()) -> RowGroup:
    """From the cache, or from the file. Raises DamagedData, JobError where the file cannot be read.

    All tasks of a shuffle window need the same row groups. The cache makes each process that is at work read a group
    about once per pass, rather than once per task.
    """
    found = _recent.get((place, index))
    if found is None:
        found = _recent[place, index] = _read_row_group(place, index, pixels_at)
    return found


def _read_row_group(place: StoragePath, index: int, pixels_at: tuple[int, ...]) -> RowGroup:
    """Raw pixels whose place in a local file is known are not read, but mapped into memory."""
    mapped = bool(pixels_at) and place.local is not None
    columns = ["label", "id"] if mapped else ["image", "label", "id"]
    try:
        table = place.with_retries(lambda: _open(place).read_row_group(index, columns=columns), "read")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: of names in its footer
        text = f"{place}, row group {index}: cannot be read: {str(error).splitlines()[0]}"
        if isinstance(error, OSError) and error.errno is not None:  # the disk or the network: another try may succeed
            raise JobError(text) from None
        raise DamagedData(text) from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise DamagedData(f"{place}, row group {index}: has no column {missing[0]}")
    images = _mapped(place)[pixels_at[0] :] if mapped else table["image"].combine_chunks()
    labels, ids = table["label"].to_numpy().astype(np.int64), table["id"].to_numpy()
    return RowGroup(images, labels, ids, f"{place}, row group {index}", ids.nbytes if mapped else images.nbytes)


@lru_cache(maxsize=4)
def _order(shards: tuple[Shard, ...], split: str, seed: int, epoch: int, window: int, num_rows: int) -> Order:
    rows = np.array([rows for _, _, rows in row_groups(shards)], np.int64)
    if split == "train":
        return plan_epoch(rows, seed=seed, epoch=epoch, window=window)
    return plan_validation(rows) if split == "val" else plan_probe(rows, seed=seed, num_rows=num_rows)


@lru_cache(maxsize=64)
def _mapped(place: StoragePath) -> NDArray[np.uint8]:
    return np.asarray(np.memmap(place.text, np.uint8, mode="r"))


@lru_cache(maxsize=64)
def _open(place: StoragePath) -> pq.ParquetFile:
    return pq.ParquetFile(place.open(), pre_buffer=place.local is None)
