"""From a config to a Ray Train run, its events to whoever watches."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .exits import JobError, last_line
from .runs import RunFolder

Event = dict[str, Any]
START_PATIENCE_S = 90.0


@dataclass(frozen=True)
class Resources:
    """What a run asks of the cluster."""

    use_gpu: bool
    worker_cpus: float  # of each training worker
    feed_cpus: float  # of each of its Ray Data tasks
    feed_tasks: int  # of each worker, at a time


def share_cpus(total_cpus: float, total_gpus: float, workers: int, device: str = "auto") -> Resources:
    """Divide the cluster so that the workers and every worker's feed fit at once.

    A Ray Data task that waits for its consumer keeps its CPUs, and the workers wait for each other in every step: one
    worker's tasks must never be able to take all that another's need. Raises JobError where it cannot fit.
    """
    use_gpu = device == "gpu" or (device == "auto" and total_gpus > 0)
    if use_gpu and total_gpus < workers:
        raise JobError(
            f"--workers {workers}: the cluster has {total_gpus:g} GPU(s), and each worker needs one; "
            "ask for fewer workers, or say --device cpu"
        )
    if total_cpus <= 0:
        raise JobError("the cluster has no CPUs for Ray tasks; start a node with --num-cpus above 0")
    for_feed = 1.0 if total_cpus >= 2 else total_cpus / 2
    worker_cpus = _down(min(1.0, (total_cpus - for_feed) / workers))
    each = (total_cpus - workers * worker_cpus) / workers
    feed_cpus = _down(min(1.0, each))
    return Resources(use_gpu, worker_cpus, feed_cpus, max(1, int(each / feed_cpus)))


def _down(cpus: float) -> float:
    return int(cpus * 1000) / 1000  # Ray counts in ten-thousandths


def train(config: TrainConfig, data: Path, run: RunFolder, on_event: Callable[[Event], None]) -> None:
    """Run to the end, calling on_event with every event of rank 0, in order, in this thread.

    Ray must be connected. A run folder that holds checkpoints goes on from the latest.
    Raises JobError if training failed; Interrupted passes through and leaves the run to end with Ray.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .worker import train_worker

    total = ray.cluster_resources()
    resources = share_cpus(total.get("CPU", 0), total.get("GPU", 0), config.workers, config.device)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lives while we do
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    loop = {
        "config": config.model_dump(),
        "data": str(data.absolute()),
        "mailbox": mailbox,
        "feed_cpus": resources.feed_cpus,
        "feed_tasks": resources.feed_tasks,
    }
    per_worker = {"CPU": resources.worker_cpus} | ({"GPU": 1.0} if resources.use_gpu else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=resources.use_gpu, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=str(run.output),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(  # the best, and Ray keeps the latest beside it
                num_to_keep=1, checkpoint_score_attribute="val/top1_error", checkpoint_score_order="min"
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    outcome: dict[str, Any] = {}
    # not in the main thread: there Ray takes over Ctrl-C, and this loop has its own use for it
    thread = threading.Thread(target=_fit, args=(trainer, outcome), name="ray-train", daemon=True)
    thread.start()
    failure: str | None = None
    started, patience = False, time.monotonic() + START_PATIENCE_S
    while True:
        alive = thread.is_alive()
        for event in ray.get(mailbox.drain.remote()):
            started = True
            if event["kind"] == "failed":
                failure = event["text"]
            on_event(event)
        if not alive:
            break
        if not started and time.monotonic() > patience:
            patience = math.inf
            free = ray.available_resources()
            text = (
                f"the workers have not started in {START_PATIENCE_S:.0f} s; "
                f"waiting for {config.workers} of {per_worker}, "
                f"where the cluster has free: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}"
            )
            on_event({"kind": "warning", "text": text})
        thread.join(0.5)
    if failure is not None:
        raise JobError(failure)
    if "error" in outcome:
        raise JobError(_one_line(outcome["error"])) from outcome["error"]
    on_event({"kind": "finished"} | _kept_checkpoints(outcome["result"]))


class Mailbox:
    """An actor that holds events until the driver fetches them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def _fit(trainer: Any, outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = trainer.fit()
    except BaseException as error:  # handed to the thread that waits
        outcome["error"] = error


def _kept_checkpoints(result: Any) -> Event:
    """Paths of the last checkpoint and of the one with the lowest validation error."""
    best = result.get_best_checkpoint("val/top1_error", "min") if result.best_checkpoints else None
    return {
        "checkpoint": result.checkpoint.path if result.checkpoint else None,
        "best_checkpoint": best.path if best else None,
    }


def _one_line(error: BaseException) -> str:
    """The innermost reason of a failed run: the exception's own line, not the tracebacks around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, error = sorted(failures.items())[0]
        return f"worker {rank}: {last_line(error)}"
    return last_line(getattr(error, "controller_failure", error))
