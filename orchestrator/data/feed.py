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
import queue
import threading
from collections.abc import Iterator

import numpy as np

from alexnet import augment
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.execution import _Closed, _Execution
from orchestrator.data.order import rank_slice
from orchestrator.data.reader import Batch, Columns, Task, TaskReader
from orchestrator.data.shards import Manifest

TASK_BYTES = 2**26  # pixels of a task's output: 445 images of 224 pixels, enough to outweigh its overhead
CHUNK_BYTES = 2**28  # of one execution's output, or two rounds of tasks if that is more; two executions at a time
STORE_SHARE = 0.5  # of the object stores, at most, for the executions of all workers of all runs
BLOCKS_AHEAD = 2  # a worker's own queue, in tasks' outputs
CLOSED_EVERY_S = 0.2  # how often a feed that nobody takes from looks whether it is closed
CLOSE_PATIENCE_S = 5.0  # for the tasks at work to end


class Feed:
    """One worker's batches of a run, from its first epoch to its last, in the order in which the loop asks for them."""

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
    ) -> None:
        """num_cpus a task, num_tasks of this worker's at a time (twice as many where one execution follows another, if
        there are CPUs): `placement.share_cpus` says what leaves every worker its part, for they wait for each other.
        num_concurrent: runs that share the cluster."""
        self.reader = TaskReader(folder, manifest, config, rank, world_size)
        self.manifest, self.config, self.rank, self.world_size = manifest, config, rank, world_size
        self.num_cpus, self.num_tasks, self.num_concurrent = num_cpus, num_tasks, num_concurrent
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

    def rank_slice(self, split: str, step: int, rank: int) -> tuple[int, int]:
        """Where in the pass a worker's part of a step begins and ends."""
        return rank_slice(step, self.manifest.rows[split], self.config.global_batch_size, rank, self.world_size)

    def batches(self, split: str, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The worker's part of every step of a pass; a part can be empty in the last. Passes are asked for in order."""
        for step in range(first_step, self.num_steps(split)):
            lo, hi = self.rank_slice(split, step, self.rank)
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
            chunk = min(chunk, int(STORE_SHARE * store_bytes / (2 * self.world_size * self.num_concurrent)))
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
