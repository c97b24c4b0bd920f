"""One Ray Train run that does not block its caller.

`TorchTrainer.fit()` starts a controller in a process of its own and blocks. Here the controller runs in a thread of
this process: it spends its life waiting for its workers, and another process would import for seconds at every start.
The parts that serve Ray Train's datasets, which the feed does not use, are left out for the same reason.

This is the only file that calls private names of Ray Train. ray_train_internals.py checks them before it imports them.
"""

import asyncio
import contextlib
import gc
import logging
import threading
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

from orchestrator.train import ray_train_internals  # noqa: F401 - first: it names what another Ray has otherwise

# isort: split
import ray
import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import FinishedState, ShuttingDownState
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from alexnet.allocator import release_freed_memory
from orchestrator.cluster.placement import Plan
from orchestrator.data.feed import warm_up
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.worker import train_worker

NUM_WARM = 4  # processes for the feed that start while the workers do
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)  # the latter is for controllers that are killed
KILL_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class RayTrainRun:
    """A fixed number of workers that train together; crashed ones are replaced."""

    def __init__(
        self,
        train_loop_config: dict[str, Any],
        plan: Plan,
        run: RunFolder,
        max_failures: int,
        pool: "WorkerPool | None" = None,
        keep_pool: bool = False,
    ) -> None:
        """Start it. If the run's folder has checkpoints, it resumes from the latest.

        train_loop_config: what every worker is called with. pool: workers to use, if they suit the plan. keep_pool:
        leave the workers as a pool at the end.
        """
        storage, folder = run.output.opened()
        label_selector = [{"ray.io/node-id": node} for node in plan.node_of_worker]
        trainer = _Trainer(
            train_worker,
            train_loop_config=train_loop_config,
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.layout.workers, use_gpu=plan.resources.use_gpu,
                resources_per_worker=plan.resources.per_worker(), placement_strategy=plan.strategy(),
                label_selector=label_selector or None,
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=folder,
                storage_filesystem=storage,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                # the last of those with the lowest error; Ray keeps the latest, too
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
                ),
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )  # fmt: skip
        self._controller: _Controller = trainer.fit().controller
        shape = (plan.layout.workers, str(plan.resources.per_worker()), plan.strategy(), plan.node_of_worker)
        if pool is not None and pool.shape != shape:
            log.debug("the pool of workers does not suit: %s instead of %s", pool.shape, shape)
            pool.release()
            pool = None
        self._controller.shape, self._controller.pool, self._controller.keep_pool = shape, pool, keep_pool
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._controller.run())
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()
        # a task finds an idle process only if that was started with exactly the workers' environment
        warm = ray.remote(num_cpus=0, runtime_env={"env_vars": get_env_vars_to_propagate()})(warm_up)
        for _ in range(min(NUM_WARM, plan.layout.workers * plan.resources.feed_tasks)):
            warm.remote()

    @property
    def pool(self) -> "WorkerPool | None":
        """The workers of a run that is over, if they came to its end and are to be kept."""
        return self._controller.pool

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, or is within so many seconds."""
        return self._over.wait(timeout_s)

    def result(self) -> Any:
        """Ray Train's result of a run that is over. Raises the controller's own error, if it failed itself."""
        if self._error is not None:
            raise self._error
        return self._controller.get_result()

    @property
    def placement_group_id(self) -> str | None:
        """The id of the workers' placement group, in hexadecimal; None if there is none yet."""
        group = self._controller.latest
        return (
            group.placement_group.placement_group.id.hex()
            if group is not None and group.placement_group is not None
            else None
        )

    def has_checkpoint(self, name: str) -> bool:
        """Whether Ray Train has stored all of the checkpoint of this name."""
        found = [entry.checkpoint.path for entry in list(self._controller._checkpoint_manager._checkpoint_results)]
        return any(path.rstrip("/").endswith(f"/{name}") for path in found)

    def kill(self) -> None:
        """Kill the workers, whatever they do, and free their resources."""
        if not self._over.is_set():
            with contextlib.suppress(RuntimeError):  # the run has ended, and its loop has closed, just now
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._controller.remove_placement_group()
            if not self._over.wait(KILL_TIMEOUT_S):
                log.info("Ray Train's controller has not ended within %.0f s", KILL_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            try:
                self._controller.free_resources()
            finally:
                self._over.set()
                self._loop.close()


@dataclass
class WorkerPool:
    """Workers between two runs. Their processes have imported all that a run needs, which is most of its start-up."""

    placement_group: Any  # the handle of their placement group
    workers: list[Worker]
    barrier: Any  # Ray Train's SynchronizationActor
    shape: tuple[Any, ...]

    @property
    def placement_group_id(self) -> str:
        found: str = self.placement_group.placement_group.id.hex()
        return found

    def release(self) -> None:
        """Kill the workers and free their resources."""
        for worker in self.workers:
            ray.kill(worker.actor)
        ray.kill(self.barrier)
        self.placement_group.shutdown()


_adopted = threading.local()


class _Barriers:
    """In place of Ray Train's SynchronizationActor: makes a new one, or resets a pool's."""

    def options(self, **options: Any) -> "_Barriers":
        self._options = options
        return self

    def remote(self, **settings: Any) -> Any:
        barrier = getattr(_adopted, "barrier", None)
        if barrier is None:
            return SynchronizationActor.options(**self._options).remote(**settings)
        ray.get(barrier.__ray_call__.remote(_reset, settings))
        return barrier


def _reset(actor: Any, settings: dict[str, Any]) -> None:
    actor.__init__(**settings)


def _clear() -> None:
    """In a worker, between two runs. Ray Train does not destroy the process group of a single worker."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    release_freed_memory()  # else memory grows with every run: fragments that one leaves do not fit the next
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _KeptWorkers(WorkerGroupState):  # type: ignore[misc]
    def shutdown(self) -> None:
        """Does nothing: the workers are a pool now."""


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    placement_group: Any = None  # its handle, once it is requested
    pool: WorkerPool | None = None  # workers to use

    def _start(self) -> None:
        _adopted.barrier = self.pool.barrier if self.pool else None
        try:
            super()._start()
        finally:
            _adopted.barrier = None

    def _create_placement_group(self, *args: Any) -> Any:
        self.placement_group = self.pool.placement_group if self.pool else super()._create_placement_group(*args)
        return self.placement_group

    def _create_workers(self, *args: Any, **options: Any) -> list[Worker]:
        if self.pool is None:
            found: list[Worker] = super()._create_workers(*args, **options)
        else:
            same = [replace(worker, distributed_context=None, log_file_path=None) for worker in self.pool.workers]
            found = self._assign_worker_ranks(same)
        return found

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        """As in Ray, but without a controller actor: there is none here, and our workers do not call it."""
        initialized = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(initialized)
        self._decorate_worker_log_file_paths(workers)


worker_group.SynchronizationActor = _Barriers()


class _Controller(TrainController):  # type: ignore[misc]
    _worker_group: _WorkerGroup | None

    def __init__(self, **parts: Any) -> None:
        self.latest: _WorkerGroup | None = None  # which may still be starting
        self.pool: WorkerPool | None = None  # workers to use; in the end, those that are left
        self.shape, self.keep_pool = tuple[Any, ...](), False
        self.worker_group_cls = SimpleNamespace(create=self._create)
        super().__init__(**parts)

    def _create(self, **parts: Any) -> _WorkerGroup:
        self.latest = _WorkerGroup(**parts)
        self.latest.pool, self.pool = self.pool, None  # after a crash, new workers start
        self.latest._start()
        return self.latest

    def _shutdown_worker_group(self) -> None:
        state, group = self.get_state(), self._worker_group
        ended = isinstance(state, ShuttingDownState) and isinstance(state.next_state, FinishedState)
        if not (self.keep_pool and ended and group is not None):
            super()._shutdown_worker_group()
            return
        held = group._worker_group_state
        group.execute(_clear)
        group._worker_group_state = _KeptWorkers(**{field.name: getattr(held, field.name) for field in fields(held)})
        group.shutdown()
        self._worker_group = None
        self.pool, group.placement_group = (
            WorkerPool(group.placement_group, held.workers, held.sync_actor, self.shape),
            None,
        )

    async def _run_control_loop_iteration(self) -> None:
        await asyncio.sleep(0)  # where a kill takes effect, even if workers fail to start again and again
        await super()._run_control_loop_iteration()

    def remove_placement_group(self) -> None:
        """Remove the workers' placement group, which kills them. Called from another thread, at any time."""
        if self.latest is not None and self.latest.placement_group is not None:
            self.latest.placement_group.shutdown()

    def free_resources(self) -> None:
        """Leave no workers and no placement group behind. Called when the control loop has ended."""
        group, self._worker_group = self._worker_group, None
        if group is not None and group.has_started():
            group.abort()
        self.remove_placement_group()


class _Trainer(TorchTrainer):  # type: ignore[misc]
    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED_CALLBACKS)
        ]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return SimpleNamespace(error=None, controller=_Controller(**parts))
