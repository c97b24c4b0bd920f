"""One execution of Ray Data: packed tasks to blocks of rows, in the order of the tasks."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from orchestrator.data.reader import Columns, Task, TaskReader, pack, raise_failure


class FeedClosed(Exception):
    """The feed was closed: nobody will take what it has under way."""


class Execution:
    """Ray Data at work on blocks of tasks. It runs to its end, however slowly the results are taken."""

    def __init__(
        self, reader: TaskReader, blocks: list[list[Task]], num_cpus: float, num_tasks: int, closed: threading.Event
    ) -> None:
        """Starts at once: num_cpus for each Ray Data task, num_tasks of them at a time. It ends early if `closed` is
        set."""
        import ray.data
        from ray.data import ExecutionOptions

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        options = ExecutionOptions()
        options.preserve_order = True
        context.execution_options = options
        self.num_blocks = len(blocks)
        items = [{"tasks": pack(block)} for block in blocks]
        # not from_arrow, which starts a task that needs a whole CPU: no node may have one left
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
        """The rows of each block of tasks, in order. Raises what a task raised, FeedClosed once the feed is closed."""
        import ray
        from ray.data.block import BlockAccessor

        while (result := self._results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            if self._closed.is_set():
                raise FeedClosed
            columns: Columns = BlockAccessor.for_block(ray.get(result)).to_batch_format("numpy")
            raise_failure(columns)
            yield columns

    def _run(self) -> None:
        import ray

        try:
            for bundle in self._dataset.iter_internal_ref_bundles():
                ray.wait(bundle.block_refs, timeout=0, fetch_local=True)  # the pixels travel ahead of use
                for block in bundle.block_refs:
                    self._results.put(block)
                if self._closed.is_set():
                    break  # dropping the iterator ends Ray Data's execution
            self._results.put(None)
        except BaseException as error:
            self._results.put(error)
