"""One Ray Train run, started and not waited for.

`TorchTrainer.fit()` starts a controller in a process of its own and blocks. Here the controller runs in a thread of
this process: it spends its life waiting for its workers, and a process more would be seconds of importing at every
start. What serves the datasets of Ray Train, which the feed does without, is left out for the same reason.

This is the one place that knows Ray Train's insides; the version of Ray is pinned.
"""

import asyncio
import gc
import threading
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

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

WARM = 4  # processes for the feed that start while the workers do
NOT_USED = (DatasetsCallback, PlacementGroupCleanerCallback)  # the latter is for controllers that are killed
KILL_PATIENCE_S = 30.0


class RayTrainRun:
    """A fixed number of workers at one training; crashed ones are replaced."""

    def __init__(
        self,
        loop: dict[str, Any],
        plan: Plan,
        run: RunFolder,
        max_failures: int,
        pool: "WorkerPool | None" = None,
        keep_pool: bool = False,
    ) -> None:
        """Start it. A run whose folder has checkpoints goes on from the latest. pool: workers to use."""
        storage, folder = run.output.opened()
        places = [{"ray.io/node-id": node} for node in plan.node_of_worker]
        trainer = _Trainer(
            train_worker,
            train_loop_config=loop,
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.layout.workers, use_gpu=plan.resources.use_gpu,
                resources_per_worker=plan.resources.per_worker(), placement_strategy=plan.strategy(),
                label_selector=places or None,
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=folder,
                storage_filesystem=storage,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                checkpoint_config=ray.train.CheckpointConfig(  # the best, and Ray keeps the latest beside it
                    num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
                ),
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )  # fmt: skip
        self._controller: _Controller = trainer.fit().controller
        shape = (plan.layout.workers, str(plan.resources.per_worker()), plan.strategy(), plan.node_of_worker)
        if pool is not None and pool.shape != shape:
            pool.release()
            pool = None
        self._controller.shape, self._controller.pool, self._controller.keep_pool = shape, pool, keep_pool
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._controller.run())
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()
        # a task finds an idle process only if that was started with the very environment that the workers will have
        warm = ray.remote(num_cpus=0, runtime_env={"env_vars": get_env_vars_to_propagate()})(warm_up)
        for _ in range(min(WARM, plan.layout.workers * plan.resources.feed_tasks)):
            warm.remote()

    @property
    def pool(self) -> "WorkerPool | None":
        """The workers of a run that is over, if they came to its end and were to be kept."""
        return self._controller.pool

    def wait(self, timeout_s: float) -> bool:
        """Whether it was over within this time."""
        return self._over.wait(timeout_s)

    def result(self) -> Any:
        """Ray Train's result of a run that is over. Raises what broke the controller itself."""
        if self._error is not None:
            raise self._error
        return self._controller.get_result()

    @property
    def placement_group_id(self) -> str | None:
        """The id of the workers' placement group, in hexadecimal, once there is one."""
        begun = self._controller.begun
        return (
            begun.placement_group.placement_group.id.hex()
            if begun is not None and begun.placement_group is not None
            else None
        )

    def has_checkpoint(self, name: str) -> bool:
        """Whether Ray Train has the checkpoint of this name whole."""
        found = [entry.checkpoint.path for entry in list(self._controller._checkpoint_manager._checkpoint_results)]
        return any(path.rstrip("/").endswith(f"/{name}") for path in found)

    def kill(self) -> None:
        """End the workers, whatever they do, and give back what they held."""
        if not self._over.is_set():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._controller.remove_placement_group()
            self._over.wait(KILL_PATIENCE_S)

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
                self._controller.give_back()
            finally:
                self._over.set()
                self._loop.close()


@dataclass
class WorkerPool:
    """Workers between two runs: their processes have imported all that a run needs, which is most of its start."""

    placement_group: Any  # the handle of their placement group
    workers: list[Worker]
    barrier: Any  # Ray Train's SynchronizationActor
    shape: tuple[Any, ...]

    @property
    def placement_group_id(self) -> str:
        found: str = self.placement_group.placement_group.id.hex()
        return found

    def release(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        ray.kill(self.barrier)
        self.placement_group.shutdown()


_adopting = threading.local()


class _Barriers:
    """In the place of Ray Train's SynchronizationActor: a pool's, as good as new, or a new one."""

    def options(self, **options: Any) -> "_Barriers":
        self._options = options
        return self

    def remote(self, **settings: Any) -> Any:
        barrier = getattr(_adopting, "barrier", None)
        if barrier is None:
            return SynchronizationActor.options(**self._options).remote(**settings)
        ray.get(barrier.__ray_call__.remote(_renew, settings))
        return barrier


def _renew(actor: Any, settings: dict[str, Any]) -> None:
    actor.__init__(**settings)


def _clear() -> None:
    """Between two runs, in a worker: the process group of a single worker is not left by Ray Train."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    release_freed_memory()  # it would grow with every run: pieces of what one kept do not fit the next
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Kept(WorkerGroupState):  # type: ignore[misc]
    def shutdown(self) -> None:
        """The workers are a pool now."""


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    placement_group: Any = None  # its placement group, once it is asked for
    pool: WorkerPool | None = None  # to start with

    def _start(self) -> None:
        _adopting.barrier = self.pool.barrier if self.pool else None
        try:
            super()._start()
        finally:
            _adopting.barrier = None

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
        """As in the library, but for the controller, which is no actor here: none of our workers asks for it."""
        begun = [
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
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


worker_group.SynchronizationActor = _Barriers()


class _Controller(TrainController):  # type: ignore[misc]
    _worker_group: _WorkerGroup | None

    def __init__(self, **parts: Any) -> None:
        self.begun: _WorkerGroup | None = None  # the latest, which may still be starting
        self.pool: WorkerPool | None = None  # to start with; and what is left in the end
        self.shape, self.keep_pool = tuple[Any, ...](), False
        self.worker_group_cls = SimpleNamespace(create=self._create)
        super().__init__(**parts)

    def _create(self, **parts: Any) -> _WorkerGroup:
        self.begun = _WorkerGroup(**parts)
        self.begun.pool, self.pool = self.pool, None  # those who start anew after a crash are new
        self.begun._start()
        return self.begun

    def _shutdown_worker_group(self) -> None:
        state, group = self.get_state(), self._worker_group
        ended = isinstance(state, ShuttingDownState) and isinstance(state.next_state, FinishedState)
        if not (self.keep_pool and ended and group is not None):
            super()._shutdown_worker_group()
            return
        held = group._worker_group_state
        group.execute(_clear)
        group._worker_group_state = _Kept(**{field.name: getattr(held, field.name) for field in fields(held)})
        group.shutdown()
        self._worker_group = None
        self.pool, group.placement_group = (
            WorkerPool(group.placement_group, held.workers, held.sync_actor, self.shape),
            None,
        )

    async def _run_control_loop_iteration(self) -> None:
        await asyncio.sleep(0)  # where a kill takes effect, also while workers are tried again and again
        await super()._run_control_loop_iteration()

    def remove_placement_group(self) -> None:
        """Take the room from the workers, with which they die. Called from another thread, at any time."""
        if self.begun is not None and self.begun.placement_group is not None:
            self.begun.placement_group.shutdown()

    def give_back(self) -> None:
        """Leave nothing behind. Called when the loop has ended."""
        group, self._worker_group = self._worker_group, None
        if group is not None and group.has_started():
            group.abort()
        self.remove_placement_group()


class _Trainer(TorchTrainer):  # type: ignore[misc]
    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_USED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return SimpleNamespace(error=None, controller=_Controller(**parts))
