"""One execution of Ray Data: a chunk of tasks to blocks, in order."""

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from orchestrator.base.exits import JobError
from orchestrator.data.reader import Columns, Task, TaskReader
from orchestrator.data.shards import DamagedData

FAILURES = {"damaged": DamagedData, "failure": JobError}  # the only column of a block that says why there is no other


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
