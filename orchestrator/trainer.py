"""From a config to a Ray Train run, its events to whoever watches.

A run is a sequence of fits: each is one Ray Train run of a fixed number of workers, in an actor of its own. When a node
that held workers is lost, or an elastic run could use one that came, the fit ends and the next begins from the last
checkpoint in the shape that the cluster then allows. Ray Train itself replaces a crashed worker within a fit.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .exits import Interrupted, JobError, last_line
from .mailbox import Event, Mailbox
from .placement import Plan, alive, make_plan
from .runs import RunFolder

POLL_S = 0.5
NODES_EVERY_S = 2.0
SETTLED_S = 5.0  # a cluster that could take more workers is given this long to change its mind
START_PATIENCE_S = 90.0
STOP_PATIENCE_S = 60.0  # for the last step and its checkpoint


class Training:
    """A run under way. Ray must be connected. A run folder that holds checkpoints goes on from the latest."""

    def __init__(self, config: TrainConfig, data: Path, run: RunFolder, num_classes: int) -> None:
        """Start the workers. Raises JobError where they can never fit."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.config, self.data, self.run, self.num_classes = config, data, run, num_classes
        here = ray.get_runtime_context().get_node_id()
        self._here = NodeAffinitySchedulingStrategy(here, soft=False)  # what serves the driver lives where it does
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=self._here)(Mailbox).remote()
        self._fit: Any = None  # the actor that runs Ray Train now
        self._done: Any = None  # what it will have returned
        self._nodes: list[str] = []  # of its workers, once they have started
        self._begin()

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Run to the end, calling on_event with every event, in order, in this thread.

        Raises JobError if training failed. Interrupted passes through, after the workers have saved a checkpoint, if
        they can within STOP_PATIENCE_S. Workers never outlive this call.
        """
        try:
            while not self._follow_fit(on_event):
                self._wait_for_room(on_event)
        except Interrupted:
            self._stop(on_event)
            raise
        finally:
            self.end()

    def end(self) -> None:
        """End the workers, whatever they do."""
        import ray

        if self._fit is not None:
            ray.kill(self._fit)  # Ray Train's controller is its child, and the workers are the controller's
            self._fit = None

    def _begin(self) -> None:
        """Start a fit in the best shape that the cluster has room for now, if any."""
        import ray

        self._plan = make_plan(self.config, alive(ray.nodes()), self.num_classes)
        self._fit, self._done, self._nodes = None, None, []
        if self._plan is None:
            return
        resources, layout = self._plan.resources, self._plan.layout
        ray.get(self._mailbox.clear.remote())
        loop = {
            "config": self.config.model_dump(),
            "data": str(self.data.absolute()),
            "layout": layout.kind,
            "mailbox": self._mailbox,
            "feed_cpus": resources.feed_cpus,
            "feed_tasks": resources.feed_tasks,
        }
        self._fit = ray.remote(num_cpus=0, scheduling_strategy=self._here)(Fit).remote()
        self._done = self._fit.run.remote(
            loop, self._plan, self.run.name, str(self.run.output), self.config.max_failures
        )

    def _follow_fit(self, on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is at its end; False if the fit ended for another to begin."""
        import ray

        if self._plan is None or self._fit is None:
            return False
        on_event({"kind": "note", "text": self._plan.reason})
        failure: str | None = None
        started_at, patience = None, time.monotonic() + START_PATIENCE_S
        look_at, could_grow_since, asked = time.monotonic() + NODES_EVERY_S, math.inf, False
        stopped = False
        while True:
            over = bool(ray.wait([self._done], timeout=POLL_S)[0])
            for event in ray.get(self._mailbox.drain.remote()):
                if event["kind"] == "started":
                    started_at, self._nodes = time.monotonic(), event["nodes"]
                elif event["kind"] == "failed":
                    failure = event["text"]
                elif event["kind"] == "stopped":
                    stopped = True
                on_event(event | {"workers": self._plan.layout.workers})
            now = time.monotonic()
            if over:
                break
            if started_at is None and now > patience:
                patience = math.inf
                on_event({"kind": "warning", "text": self._why_waiting()})
            if now < look_at:
                continue
            look_at = now + NODES_EVERY_S
            nodes = alive(ray.nodes())
            lost = {*self._nodes, *self._plan.node_of_worker} - {node.id for node in nodes}
            if lost:
                text = f"{len(lost)} node(s) with workers of this run were lost; going on from the last checkpoint"
                on_event({"kind": "note", "text": text})
                self.end()
                return False
            if asked or started_at is None or not self._could_grow(nodes):
                could_grow_since = math.inf
                continue
            could_grow_since = min(could_grow_since, now)
            if now - could_grow_since >= SETTLED_S:
                on_event({"kind": "note", "text": "the cluster has room for more workers; saving a checkpoint to grow"})
                self._mailbox.ask_to_stop.remote()
                asked = True
        if failure is not None:
            raise JobError(failure)
        outcome = self._outcome()
        if "error" in outcome:
            raise JobError(outcome["error"])
        if stopped:
            self.end()
            return False
        on_event({"kind": "finished"} | outcome)
        return True

    def _outcome(self) -> dict[str, Any]:
        import ray

        try:
            outcome: dict[str, Any] = ray.get(self._done)
        except Exception as error:  # the actor itself died
            outcome = {"error": last_line(error)}
        return outcome

    def _could_grow(self, nodes: list[Any]) -> bool:
        low, high = self.config.worker_range
        if low == high or self._plan is None or self._plan.layout.workers == high:
            return False
        plan = make_plan(self.config, nodes, self.num_classes)
        return plan is not None and plan.layout.workers > self._plan.layout.workers

    def _wait_for_room(self, on_event: Callable[[Event], None]) -> None:
        """Begin the next fit as soon as the cluster has room for one."""
        said = 0.0
        while True:
            self._begin()
            if self._plan is not None:
                return
            if time.monotonic() - said > START_PATIENCE_S:
                said = time.monotonic()
                text = f"the cluster has no room for {self.config.workers} workers now; waiting for nodes"
                on_event({"kind": "warning", "text": text})
            time.sleep(NODES_EVERY_S)

    def _stop(self, on_event: Callable[[Event], None]) -> None:
        """Let the workers save where they are."""
        import ray

        if self._fit is None or not self._nodes:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # what cannot be saved any more is not
            self._mailbox.ask_to_stop.remote()
            ray.wait([self._done], timeout=STOP_PATIENCE_S)
            for event in ray.get(self._mailbox.drain.remote()):
                on_event(event)

    def _why_waiting(self) -> str:
        import ray

        assert self._plan is not None
        free = ray.available_resources()
        return (
            f"the workers have not started in {START_PATIENCE_S:.0f} s; "
            f"waiting for {self._plan.layout.workers} of {self._plan.resources.per_worker()}, "
            f"where the cluster has free: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}"
        )


class Fit:
    """An actor that is one Ray Train run: to kill it ends all of the run's processes."""

    def run(self, loop: dict[str, Any], plan: Plan, name: str, storage_path: str, max_failures: int) -> dict[str, Any]:
        """Returns the paths of the checkpoints, or the one line that says what went wrong."""
        import ray.train
        from ray.train.torch import TorchTrainer

        from .worker import train_worker

        places = [{"ray.io/node-id": node} for node in plan.node_of_worker]
        trainer = TorchTrainer(
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
        try:
            return _kept_checkpoints(trainer.fit())
        except Exception as error:
            return {"error": _one_line(error)}


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
