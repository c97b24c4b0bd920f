"""One Ray Train run, started and not waited for.

`TorchTrainer.fit()` blocks, and so could only be called in a process of its own: a thread of the driver cannot take its
signals. Here its controller is created as fit() does, and handed out. What serves the datasets of Ray Train, which the
feed does without, is left out: each helper is a process more to start, seconds on a small machine.

This is the one place that knows Ray Train's insides; the version of Ray is pinned.
"""

from types import SimpleNamespace
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

from .feed import warm_up
from .placement import Plan
from .worker import train_worker

WARM = 4  # processes for the feed that start while the workers do
NOT_USED = (DatasetsCallback, PlacementGroupCleanerCallback)  # of the latter, `Training.end` does the work


def start(loop: dict[str, Any], plan: Plan, name: str, storage_path: str, max_failures: int) -> tuple[Any, Any]:
    """The controller, an actor that takes its workers with it when it is killed, and what it will have returned when
    the run is over: its `get_result()` then says how."""
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
            name=name,
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(  # the best, and Ray keeps the latest beside it
                num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )  # fmt: skip
    controller: Any = trainer.fit().controller
    done = controller.run.remote()
    # a task finds an idle process only if that was started with the very environment that the workers will have
    warm = ray.remote(num_cpus=0, runtime_env={"env_vars": get_env_vars_to_propagate()})(warm_up)
    for _ in range(min(WARM, plan.layout.workers * plan.resources.feed_tasks)):
        warm.remote()
    return controller, done


class _Trainer(TorchTrainer):  # type: ignore[misc]
    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_USED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        kind = ray.remote(num_cpus=0, label_selector=here)(TrainController)  # its environment is the whole job's
        return SimpleNamespace(error=None, controller=kind.remote(**parts))
