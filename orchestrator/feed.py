"""The feed: shards to a worker's batches, through Ray Data.

An epoch is a plan: one order of all rows, a pure function of (shards, seed, epoch), cut into global batches. Each
worker trains on its own equal stretch of every global batch, in order. Ray Data runs the plan: a task takes the rows
that one worker needs for a few steps, reads them, decodes, crops, mirrors and colours them (alexnet/augment.py), and
sends uint8 pixels. The epochs and the validations between them are one stream, so that the next epoch is being
decoded while this one is validated. Nothing depends on the number of workers, tasks or CPUs.

N images, H rows, W columns, C colours.
"""

import collections
import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from alexnet import augment
from alexnet.allocator import keep_freed_memory

from .config import TrainConfig
from .exits import JobError
from .order import Order, plan_epoch, plan_validation
from .shards import DamagedData, Manifest, Shard
from .storage import Place

TASK_BYTES = 2**26  # pixels of a task's output: 445 images of 224 pixels, enough to outweigh its overhead
CHUNK_BYTES = 2**28  # of one execution's output, or two rounds of tasks if that is more; two executions at a time
STORE_SHARE = 0.5  # of the object stores, at most, for the executions of all workers of all runs
DECODED_AT_A_TIME = 4
RECENT_BYTES = 2**27  # of row groups that a feed process remembers; a window of 4096 JPEG rows is 90 MB
BLOCKS_AHEAD = 2  # a worker's own queue, in tasks' outputs
FAILURES = {"damaged": DamagedData, "failure": JobError}  # the only column of a block that says why there is no other
CLOSED_EVERY_S = 0.2  # how often a feed that nobody takes from looks whether it is closed
CLOSE_PATIENCE_S = 5.0  # for the tasks at work to end

Batch = dict[str, NDArray[Any]]
Columns = dict[str, NDArray[Any]]


def row_groups(shards: tuple[Shard, ...]) -> list[tuple[int, int, int]]:
    """(shard, row group within it, rows) of all row groups."""
    return [(s, g, rows) for s, shard in enumerate(shards) for g, rows in enumerate(shard.row_groups)]


def worker_stretch(step: int, num_rows: int, global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where in the order a worker's part of a global batch begins and ends; the last batch may be smaller.

    A short last batch is shared as evenly as it goes, so a worker's part of it can be empty.
    """
    first = step * global_batch_size
    size = min(global_batch_size, num_rows - first)
    return first + size * rank // world_size, first + size * (rank + 1) // world_size


@dataclass(frozen=True)
class Task:
    """Some steps of one pass, for one worker."""

    epoch: int
    split: str
    first_step: int
    last_step: int  # exclusive


class TaskReader:
    """Reads, decodes and augments the rows of a task. Runs in Ray Data's processes, which need no torch."""

    def __init__(self, folder: Place, manifest: Manifest, config: TrainConfig, rank: int, world_size: int) -> None:
        self.folder, self.manifest, self.config, self.rank, self.world_size = folder, manifest, config, rank, world_size
        self.margin = manifest.image_size - config.input_size

    def order(self, split: str, epoch: int) -> Order:
        return _order(self.manifest.split(split), split, self.config.seed, epoch, self.config.shuffle_window)

    def stretches(self, task: Task) -> list[tuple[int, int]]:
        num_rows = self.manifest.rows[task.split]
        size = self.config.global_batch_size
        steps = range(task.first_step, task.last_step)
        return [worker_stretch(step, num_rows, size, self.rank, self.world_size) for step in steps]

    def __call__(self, rows: Columns) -> Iterator[Columns]:
        """A block of tasks to columns: image (N, H, W, C) uint8, how it was cut, label, id, position in the pass."""
        keep_freed_memory()
        results = []
        for fields in chain.from_iterable(json.loads(text) for text in rows["tasks"]):
            task = Task(*fields)
            positions = np.concatenate([np.arange(lo, hi) for lo, hi in self.stretches(task)])
            if len(positions):
                try:
                    results.append(self.read(task, positions))
                except JobError as failure:  # its one line, which Ray Data would bury under its own
                    kind = "damaged" if isinstance(failure, DamagedData) else "failure"
                    results = [{kind: np.array([str(failure)])}]
                    break
        yield from results

    def read(self, task: Task, positions: NDArray[np.int64]) -> Columns:
        """The rows at these positions of the task's pass: group by group, decoded, and cut into their places."""
        config, manifest, total = self.config, self.manifest, len(positions)
        order, shards = self.order(task.split, task.epoch), manifest.split(task.split)
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
        if task.split == "val":
            draws, noise = augment.center(total, margin=self.margin), "none"
        else:
            draws = augment.draw(ids, seed=config.seed, epoch=task.epoch, margin=self.margin, flip=config.flip)
            noise = config.color_noise
        values, vectors = np.array(manifest.eigenvalues), np.array(manifest.eigenvectors)
        shift = augment.color_shift(draws.normal, values, vectors, noise)
        image = np.empty((total, config.input_size, config.input_size, 3), np.uint8)
        for found, where in groups:
            for pixels, which, place in found.decoded(row[where].astype(np.int64), where, manifest.image_size):
                augment.crop_flip_shift(
                    pixels, draws.of(place), shift[place], config.input_size, which=which, out=image, place=place
                )
        result: Columns = {"image": image, "label": labels, "id": ids, "position": positions}
        return result | {"top": draws.top, "left": draws.left, "flip": draws.flip}


@dataclass(frozen=True)
class RowGroup:
    """A row group in memory."""

    images: pa.Array | NDArray[np.uint8]  # binary: JPEG; binary of a fixed size, or bytes from their first: raw pixels
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    name: str  # for people
    size: int  # bytes

    def decoded(
        self, rows: NDArray[np.int64], place: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        """Pixels (M, size, size, 3), which of them are wanted, and their places: the i-th of `rows` at `place[i]`.

        Raw pixels are all there, as they lie in the file. JPEG is decoded a few images at a time, whose pixels stay in
        the processor's cache until they are cut.
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
                data = memoryview(self.images[row].as_buffer()).cast("B")
                try:
                    simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=target)
                except ValueError as error:
                    raise DamagedData(f"{self.name}: image {self.ids[row]} cannot be decoded: {error}") from None
            yield pixels, np.arange(len(part)), place[first : first + DECODED_AT_A_TIME]


_recent: collections.OrderedDict[tuple[Place, int], RowGroup] = collections.OrderedDict()


def read_row_group(place: Place, index: int, pixels_at: tuple[int, ...] = ()) -> RowGroup:
    """From the file, or from memory: the tasks of a shuffle window all need the same row groups.

    A process remembers the last RECENT_BYTES of them, so each is read about once a pass by every process at work, and
    not once a task. Raw pixels of a local file whose place in it is known are not read at all, but mapped into memory.
    """
    found = _recent.pop((place, index), None)
    if found is None:
        mapped = bool(pixels_at) and place.local is not None
        columns = ["label", "id"] if mapped else ["image", "label", "id"]
        try:
            table = place.attempt(lambda: _open(place).read_row_group(index, columns=columns), "read")
        except (OSError, pa.ArrowException) as error:
            text = f"{place}, row group {index}: cannot be read: {str(error).splitlines()[0]}"
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, or the way there: it may pass
                raise JobError(text) from None
            raise DamagedData(text) from None
        images = _mapped(place)[pixels_at[0] :] if mapped else table["image"].combine_chunks()
        labels, ids = table["label"].to_numpy().astype(np.int64), table["id"].to_numpy()
        found = RowGroup(images, labels, ids, f"{place}, row group {index}", ids.nbytes if mapped else images.nbytes)
        total = found.size + sum(group.size for group in _recent.values())
        while _recent and total > RECENT_BYTES:
            total -= _recent.popitem(last=False)[1].size
    _recent[place, index] = found
    return found


class Feed:
    """One worker's batches of a run, from its first epoch to its last, in the order in which the loop asks for them."""

    def __init__(
        self,
        folder: Place,
        manifest: Manifest,
        config: TrainConfig,
        *,
        rank: int,
        world_size: int,
        num_cpus: float,
        num_tasks: int,
        side_by_side: int = 1,
    ) -> None:
        """num_cpus a task, num_tasks of this worker's at a time (twice as many where one execution follows another, if
        there are CPUs): `placement.share_cpus` says what leaves every worker its part, for they wait for each other.
        side_by_side: runs that share the cluster."""
        self.reader = TaskReader(folder, manifest, config, rank, world_size)
        self.manifest, self.config, self.rank, self.world_size = manifest, config, rank, world_size
        self.num_cpus, self.num_tasks, self.side_by_side = num_cpus, num_tasks, side_by_side
        self.steps_per_task, self.steps_per_chunk = self._steps(None)
        self._queue: queue.Queue[Columns | BaseException] = queue.Queue(BLOCKS_AHEAD)
        self._left: Columns | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the stream, wherever it is: to be called before Ray is left."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE_S)

    def num_steps(self, split: str) -> int:
        return -(-self.manifest.rows[split] // self.config.global_batch_size)

    def start(self, first_epoch: int, first_step: int = 0) -> None:
        """Begin the stream at a step of an epoch's training; then its validation, the next epoch's training, and so on.

        Nothing of the steps before is read.
        """
        import ray

        able = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        stores = [has.get("object_store_memory", 0.0) for has in able if has.get("CPU") or has.get("GPU")]
        self.steps_per_task, self.steps_per_chunk = self._steps(sum(stores) or None)
        tasks = self._tasks(first_epoch, first_step)
        self._thread = threading.Thread(target=self._fill, args=(tasks,), name="feed", daemon=True)
        self._thread.start()

    def stretch(self, split: str, step: int, rank: int) -> tuple[int, int]:
        """Where in the pass a worker's part of a step begins and ends."""
        return worker_stretch(step, self.manifest.rows[split], self.config.global_batch_size, rank, self.world_size)

    def batches(self, split: str, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The worker's part of every step of a pass; a part can be empty in the last. Passes are asked for in order."""
        for step in range(first_step, self.num_steps(split)):
            lo, hi = self.stretch(split, step, self.rank)
            batch = self._take(hi - lo)
            # a lost, repeated or reordered row must not pass for training
            assert np.array_equal(batch["position"], np.arange(lo, hi)), (
                f"{split} rows {lo}:{hi} of epoch {epoch} are not the plan's"
            )
            yield batch

    def _steps(self, store_bytes: float | None) -> tuple[int, float]:
        """How many steps make a task and a chunk: less where the object store is small, and always at least one."""
        step = 3 * self.config.input_size**2 * self.config.global_batch_size / self.world_size
        chunk = max(CHUNK_BYTES, 2 * self.num_tasks * TASK_BYTES)
        if store_bytes is not None:
            chunk = min(chunk, int(STORE_SHARE * store_bytes / (2 * self.world_size * self.side_by_side)))
        task = min(TASK_BYTES, chunk / (2 * self.num_tasks))
        return max(1, int(task / step)), chunk / step

    def _tasks(self, first_epoch: int, first_step: int) -> Iterator[Task]:
        for epoch in range(first_epoch, self.config.epochs):
            for split in ("train", "val"):
                total = self.num_steps(split)
                begin = first_step if (epoch, split) == (first_epoch, "train") else 0
                for first in range(begin, total, self.steps_per_task):
                    yield Task(epoch, split, first, min(first + self.steps_per_task, total))

    def _fill(self, tasks: Iterator[Task]) -> None:
        """Put the blocks of all tasks into the queue, in order; a failure too, for the consumer to raise."""
        try:
            for block in self._blocks(tasks):
                self._put(block)
            self._put(RuntimeError("the feed ended before the run: rows are missing"))
        except _Closed:
            pass
        except BaseException as error:
            with contextlib.suppress(_Closed):
                self._put(error)

    def _put(self, block: Columns | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(block, timeout=CLOSED_EVERY_S)
            except queue.Full:
                continue
        raise _Closed

    def _blocks(self, tasks: Iterator[Task]) -> Iterator[Columns]:
        """Run the tasks on Ray Data, a chunk at a time; the next begins when the last tasks of one are at work.

        A chunk's output fits in the object store, so its execution runs through and ends, however slow the trainer is,
        and no task waits for a consumer. One long execution would be held back by the store's limit instead, and Ray
        Data's scheduling thread then spins: measured at 0.6 of a core in every training process.
        """
        running = collections.deque[_Execution]()
        while True:
            if not running and not self._begin_chunk(tasks, running):
                return
            execution = running[0]
            for number, block in enumerate(execution.blocks()):
                if len(running) == 1 and execution.num_blocks - number <= self.num_tasks + BLOCKS_AHEAD:
                    self._begin_chunk(tasks, running)
                yield block
            running.popleft()

    def _begin_chunk(self, tasks: Iterator[Task], running: "collections.deque[_Execution]") -> bool:
        if self._closed.is_set():
            raise _Closed
        blocks: list[list[Task]] = []
        steps = 0.0
        while steps < self.steps_per_chunk and (block := self._next_block(tasks)):
            blocks.append(block)
            steps += sum(task.last_step - task.first_step for task in block)
        if blocks:
            running.append(_Execution(self.reader, blocks, self.num_cpus, self.num_tasks, self._closed))
        return bool(blocks)

    def _next_block(self, tasks: Iterator[Task]) -> list[Task]:
        """As many tasks as one of Ray's should do: several passes, where they are short."""
        block: list[Task] = []
        steps = 0
        while steps < self.steps_per_task and (task := next(tasks, None)):
            block.append(task)
            steps += task.last_step - task.first_step
        return block

    def _take(self, count: int) -> Batch:
        """The next `count` rows of the stream: views where they lie in one block, a copy where they straddle two."""
        parts: list[Columns] = []
        while count:
            if self._left is None:
                block = self._queue.get()
                if isinstance(block, BaseException):
                    raise block
                self._left = block
            size = len(self._left["position"])
            taken = min(size, count)
            parts.append({name: column[:taken] for name, column in self._left.items()})
            self._left = {name: column[taken:] for name, column in self._left.items()} if taken < size else None
            count -= taken
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self._empty()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _empty(self) -> Batch:
        return self.reader.read(Task(0, "val", 0, 0), np.empty(0, np.int64))


def warm_up() -> None:
    """Import what the tasks import, in one of Ray's processes, which they will then find ready."""
    import ray.data  # noqa: F401

    tiny = np.zeros((1, 8, 8, 3), np.uint8)
    augment.crop_flip_shift(tiny, augment.center(1, margin=0), np.zeros((1, 3), np.float32), 8)


class _Closed(Exception):
    """The run is over, or given up: nobody takes from the feed any more."""


class _Execution:
    """Blocks of tasks run by Ray Data, all of them whether or not anybody takes the results yet."""

    def __init__(
        self, reader: TaskReader, blocks: list[list[Task]], num_cpus: float, num_tasks: int, closed: threading.Event
    ) -> None:
        import ray.data
        from ray.data import ExecutionOptions

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        options = ExecutionOptions()
        options.preserve_order = True
        context.execution_options = options
        self.num_blocks = len(blocks)  # of results
        items = [{"tasks": json.dumps([astuple(task) for task in block])} for block in blocks]
        # not from_arrow: it starts a task that wants a whole CPU, and no node may have one left
        self._dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            reader,
            batch_size=None,
            batch_format="numpy",
            num_cpus=num_cpus,
            compute=ray.data.TaskPoolStrategy(size=min(num_tasks, len(items))),
        )
        self._closed = closed
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="feed execution", daemon=True).start()

    def blocks(self) -> Iterator[Columns]:
        """In the order of the tasks. Raises what one of them raised."""
        import ray
        from ray.data.block import BlockAccessor

        while (result := self._results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            if self._closed.is_set():
                raise _Closed
            columns: Columns = BlockAccessor.for_block(ray.get(result)).to_batch_format("numpy")
            for name, kind in FAILURES.items():
                if name in columns:
                    raise kind(str(columns[name][0]))
            yield columns

    def _run(self) -> None:
        import ray

        try:
            for bundle in self._dataset.iter_internal_ref_bundles():
                ray.wait(bundle.block_refs, timeout=0, fetch_local=True)  # the pixels begin to travel here
                for block in bundle.block_refs:
                    self._results.put(block)
                if self._closed.is_set():
                    break  # Ray Data ends an execution whose iterator is dropped
            self._results.put(None)
        except BaseException as error:
            self._results.put(error)


@lru_cache(maxsize=4)
def _order(shards: tuple[Shard, ...], split: str, seed: int, epoch: int, window: int) -> Order:
    rows = np.array([rows for _, _, rows in row_groups(shards)], np.int64)
    return plan_validation(rows) if split == "val" else plan_epoch(rows, seed=seed, epoch=epoch, window=window)


@lru_cache(maxsize=64)
def _mapped(place: Place) -> NDArray[np.uint8]:
    return np.asarray(np.memmap(place.text, np.uint8, mode="r"))


@lru_cache(maxsize=64)
def _open(place: Place) -> pq.ParquetFile:
    return pq.ParquetFile(place.open(), pre_buffer=place.local is None)
