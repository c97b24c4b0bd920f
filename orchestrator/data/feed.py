"""The feed: shards to a worker's batches, through Ray Data.

An epoch is a plan: one order of all rows, a pure function of (shards, seed, epoch), cut into global batches (order.py).
Each worker trains on an equal slice of every global batch, in order. A task reads the rows that one worker needs for a
few steps, decodes, crops, mirrors and colours them, and sends uint8 pixels (reader.py); with `augment_on` device it
sends what it decoded. Ray Data runs the tasks, a chunk of them in each execution (execution.py). The passes of all
epochs, training, validation and the probe, are one stream, so that the next epoch is decoded while this one is
validated. No batch depends on the number of workers, tasks or CPUs.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from alexnet import augment
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.execution import Execution, FeedClosed
from orchestrator.data.order import rank_slice, rows_of_pass
from orchestrator.data.reader import Batch, Columns, Task, TaskReader
from orchestrator.data.shards import Manifest

TASK_BYTES = 2**26  # of a task's output: 445 images of 224 pixels, enough to outweigh the cost of a task
CHUNK_BYTES = 2**28  # of an execution's output, or two rounds of tasks if that is more; two executions at a time
STORE_SHARE = 0.5  # of the object stores, at most, for the executions of all workers of all runs
BLOCKS_AHEAD = 2  # task outputs in a worker's own queue
CLOSED_EVERY_S = 0.2  # how often a full queue checks whether the feed was closed
CLOSE_TIMEOUT_S = 5.0  # for the thread that fills the queue to end


class Feed:
    """One worker's batches of a run, in the order in which the training loop asks for them."""

    def __init__(
        self,
        folder: StoragePath,
        manifest: Manifest,
        config: TrainConfig,
        *,
        rank: int,
        world_size: int,
        num_cpus: float,
        num_tasks: int,
        num_concurrent: int = 1,
        passes: Sequence[str] = ("train", "val"),
    ) -> None:
        """num_cpus: of each task. num_tasks: of this worker at a time; briefly twice as many when one execution follows
        another, if there are CPUs. `placement.share_cpus` chooses both so that every worker gets its share, because
        workers wait for each other. num_concurrent: runs that share the cluster. passes: of each epoch, in order."""
        self.reader = TaskReader(folder, manifest, config, rank, world_size)
        self.manifest, self.config, self.rank, self.world_size = manifest, config, rank, world_size
        self.num_cpus, self.num_tasks, self.num_concurrent = num_cpus, num_tasks, num_concurrent
        self.passes = tuple(passes)
        self.steps_per_task, self.steps_per_chunk = self._steps(None)
        self._queue: queue.Queue[Columns | BaseException] = queue.Queue(BLOCKS_AHEAD)
        self._left: Columns | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the stream, wherever it is. Call it before disconnecting from Ray."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def num_steps(self, split: str) -> int:
        """Global batches in a pass."""
        return -(-rows_of_pass(split, self.manifest.rows) // self.config.global_batch_size)

    def start(self, first_epoch: int, first_step: int = 0) -> None:
        """Begin the stream at a step of an epoch's training; then come its other passes, the next epoch's training, ...

        The steps before it are not read.
        """
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        stores = [has.get("object_store_memory", 0.0) for has in nodes if has.get("CPU") or has.get("GPU")]
        self.steps_per_task, self.steps_per_chunk = self._steps(sum(stores) or None)
        tasks = self._tasks(first_epoch, first_step)
        self._thread = threading.Thread(target=self._fill, args=(tasks,), name="feed", daemon=True)
        self._thread.start()

    def rank_slice(self, split: str, step: int, rank: int) -> tuple[int, int]:
        """Where a worker's part of a step begins and ends in the pass."""
        num_rows = rows_of_pass(split, self.manifest.rows)
        return rank_slice(step, num_rows, self.config.global_batch_size, rank, self.world_size)

    def batches(self, split: str, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The worker's part of every step of a pass; that of the last step can be empty. Ask for passes in order."""
        for step in range(first_step, self.num_steps(split)):
            lo, hi = self.rank_slice(split, step, self.rank)
            batch = self._take(hi - lo)
            # a lost, repeated or reordered row must not go unnoticed
            assert np.array_equal(batch["position"], np.arange(lo, hi)), (
                f"{split} rows {lo}:{hi} of epoch {epoch} are not the plan's"
            )
            yield batch

    def _steps(self, store_bytes: float | None) -> tuple[int, float]:
        """Steps per task and per chunk: fewer where the object store is small; of a task at least one."""
        step = 3 * self.reader.side**2 * self.config.global_batch_size / self.world_size
        chunk = max(CHUNK_BYTES, 2 * self.num_tasks * TASK_BYTES)
        if store_bytes is not None:
            chunk = min(chunk, int(STORE_SHARE * store_bytes / (2 * self.world_size * self.num_concurrent)))
        task = min(TASK_BYTES, chunk / (2 * self.num_tasks))
        return max(1, int(task / step)), chunk / step

    def _tasks(self, first_epoch: int, first_step: int) -> Iterator[Task]:
        for epoch in range(first_epoch, self.config.epochs):
            for split in self.passes:
                total = self.num_steps(split)
                begin = first_step if (epoch, split) == (first_epoch, "train") else 0
                for first in range(begin, total, self.steps_per_task):
                    yield Task(epoch, split, first, min(first + self.steps_per_task, total))

    def _fill(self, tasks: Iterator[Task]) -> None:
        """Put the blocks of all tasks into the queue, in order, and a failure for the consumer to raise."""
        try:
            for block in self._blocks(tasks):
                self._put(block)
            self._put(RuntimeError("the feed ended before the run: rows are missing"))
        except FeedClosed:
            pass
        except BaseException as error:
            with contextlib.suppress(FeedClosed):
                self._put(error)

    def _put(self, block: Columns | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(block, timeout=CLOSED_EVERY_S)
            except queue.Full:
                continue
        raise FeedClosed

    def _blocks(self, tasks: Iterator[Task]) -> Iterator[Columns]:
        """Run the tasks on Ray Data, a chunk at a time; the next chunk begins while the last tasks of this one run.

        A chunk's output fits in the object store, so its execution runs to its end however slow training is, and no
        task waits for a consumer. A single long execution would stall at the store's limit instead, and Ray Data's
        scheduling thread then spins: measured at 0.6 of a core in every training process.
        """
        running = collections.deque[Execution]()
        while True:
            if not running and not self._begin_chunk(tasks, running):
                return
            execution = running[0]
            for number, block in enumerate(execution.blocks()):
                if len(running) == 1 and execution.num_blocks - number <= self.num_tasks + BLOCKS_AHEAD:
                    self._begin_chunk(tasks, running)
                yield block
            running.popleft()

    def _begin_chunk(self, tasks: Iterator[Task], running: "collections.deque[Execution]") -> bool:
        if self._closed.is_set():
            raise FeedClosed
        blocks: list[list[Task]] = []
        steps = 0.0
        while steps < self.steps_per_chunk and (block := self._next_block(tasks)):
            blocks.append(block)
            steps += sum(task.last_step - task.first_step for task in block)
        if blocks:
            running.append(Execution(self.reader, blocks, self.num_cpus, self.num_tasks, self._closed))
        return bool(blocks)

    def _next_block(self, tasks: Iterator[Task]) -> list[Task]:
        """Tasks for one task of Ray's: several passes of them where passes are short."""
        block: list[Task] = []
        steps = 0
        while steps < self.steps_per_task and (task := next(tasks, None)):
            block.append(task)
            steps += task.last_step - task.first_step
        return block

    def _take(self, count: int) -> Batch:
        """The next `count` rows of the stream: views of one block, or a copy where they straddle two."""
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
    """Import and compile what tasks need, in one of Ray's processes, so that the first ones find it done."""
    import ray.data  # noqa: F401

    tiny = np.zeros((1, 8, 8, 3), np.uint8)
    augment.crop_flip_shift(tiny, augment.center(1, margin=0), np.zeros((1, 3), np.float32), 8)
