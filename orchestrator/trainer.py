"""From a config to a Ray Train run, its events to whoever watches.

A run is a sequence of fits: each is one Ray Train run of a fixed number of workers (fit.py). When a node that held
workers is lost, or an elastic run could use one that came, the fit ends and the next begins from the last checkpoint in
the shape that the cluster then allows. Ray Train itself replaces a crashed worker within a fit.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from .config import TrainConfig
from .exits import Interrupted, JobError, last_line, signals_deferred
from .mailbox import Event, Mailbox
from .placement import Plan, alive, make_plan
from .runs import RunFolder
from .storage import Place

POLL_S = 0.5
NODES_EVERY_S = 2.0
SETTLED_S = 5.0  # a cluster that could take more workers is given this long to change its mind
START_PATIENCE_S = 90.0
STOP_PATIENCE_S = 60.0  # for the last step and its checkpoint
LOST_PATIENCE_S = 10.0  # for Ray to notice that a node is gone whose workers are


class Training:
    """A run under way. Ray must be connected. A run folder that holds checkpoints goes on from the latest."""

    def __init__(self, config: TrainConfig, data: Place, run: RunFolder, num_classes: int) -> None:
        """Start the workers. Raises JobError where they do not fit."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.config, self.data, self.run, self.num_classes = config, data, run, num_classes
        here = ray.get_runtime_context().get_node_id()
        self._here = NodeAffinitySchedulingStrategy(here, soft=False)  # what serves the driver lives where it does
        self._fit: Any = None  # Ray Train's controller
        self._done: Any = None  # what it will have returned
        self._mailbox: Any = None  # a new one for every fit: no news comes from the one before
        self._counted: set[str] = set()  # the nodes that the plan was made from
        self._nodes: list[str] = []  # of its workers, once they have started
        self._others: set[str] = set()  # this job's placement groups that were there before it
        self._plan = self._make_plan()
        if self._plan is not None:  # what began on GPUs does not go on without them
            self.config = config.changed(device="gpu" if self._plan.resources.use_gpu else "cpu")
            self._begin(self._plan)

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Run to the end, calling on_event with every event, in order, in this thread.

        Raises JobError if training failed. Interrupted passes through, after the workers have saved a checkpoint, if
        they can within STOP_PATIENCE_S. The workers are told to die before this returns.
        """
        try:
            while not (self._plan and self._follow_fit(self._plan, on_event)):
                plan = self._wait_for_room(on_event)
                with signals_deferred():
                    self._begin(plan)
        except Interrupted:
            self._stop(on_event)
            raise
        finally:
            self.end()

    def end(self) -> None:
        """End the fit, whatever its workers do."""
        import ray
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        if self._fit is None:
            return
        ray.kill(self._fit)
        self._fit = None
        # the workers' placement group would stay reserved when their controller is killed; with it go the workers
        for name in _placement_groups() - self._others:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))

    def _make_plan(self) -> Plan | None:
        import ray

        nodes = alive(ray.nodes())
        self._counted = {node.id for node in nodes if node.cpus or node.gpus}
        return make_plan(self.config, nodes, self.num_classes)

    def _begin(self, plan: Plan) -> None:
        """Start a fit."""
        import ray

        self._plan, self._nodes, self._others = plan, [], _placement_groups()
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=self._here)(Mailbox).remote()
        loop = {
            "config": self.config.model_dump(),
            "data": self.data.text,
            "layout": plan.layout.kind,
            "mailbox": self._mailbox,
            "feed_cpus": plan.resources.feed_cpus,
            "feed_tasks": plan.resources.feed_tasks,
        }
        from . import fit  # imports Ray, which may not be imported before connect()

        self._fit, self._done = fit.start(loop, plan, self.run.name, str(self.run.output), self.config.max_failures)

    def _follow_fit(self, plan: Plan, on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is at its end; False if the fit ended for another to begin."""
        import ray

        on_event({"kind": "note", "text": plan.reason})
        patience, look_at, could_grow_since = time.monotonic() + START_PATIENCE_S, 0.0, math.inf
        asked = False
        while True:
            with signals_deferred():
                over = bool(ray.wait([self._done], timeout=POLL_S)[0])
                ends = self._deliver(on_event)
            if over or ends:
                break
            now = time.monotonic()
            if now < look_at:
                continue
            look_at = now + NODES_EVERY_S
            with signals_deferred():
                if not self._nodes and now > patience:
                    patience = math.inf
                    on_event({"kind": "warning", "text": self._why_waiting(plan)})
                if self._lost_nodes(plan, on_event):
                    return False
                if asked or not self._nodes or not self._could_grow(plan):
                    could_grow_since = math.inf
                    continue
                could_grow_since = min(could_grow_since, now)
                if now - could_grow_since >= SETTLED_S:
                    text = "the cluster has room for more workers; saving a checkpoint to grow"
                    on_event({"kind": "note", "text": text})
                    self._mailbox.ask_to_stop.remote()
                    asked = True
        with signals_deferred():
            return self._fit_is_over(plan, ends, on_event)

    def _fit_is_over(self, plan: Plan, ends: dict[str, Event], on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is at its end, too. Raises JobError if it failed."""
        import ray

        if "failed" in ends:  # one worker says why; the others may wait for it in a collective
            ray.wait([self._done], timeout=STOP_PATIENCE_S / 10)
            raise JobError(ends["failed"]["text"])
        outcome = self._outcome()
        if "error" in outcome:
            deadline = time.monotonic() + LOST_PATIENCE_S
            while time.monotonic() < deadline:  # was it a node? Ray may notice the workers before it does
                if self._lost_nodes(plan, on_event):
                    return False
                time.sleep(POLL_S)
            raise JobError(outcome["error"])
        if "stopped" in ends:
            self.end()
            return False
        on_event({"kind": "finished"} | outcome)
        return True

    def _deliver(self, on_event: Callable[[Event], None]) -> dict[str, Event]:
        """Hand over what is in the mailbox; returns the events that end a fit, by their kind."""
        import ray

        ends = {}
        for event in ray.get(self._mailbox.drain.remote()):
            if event["kind"] == "started":
                crashed = bool(self._nodes)  # it is not the first start of this fit
                self._nodes = event["nodes"]
                assert self._plan is not None
                event |= {"workers": self._plan.layout.workers, "crashed": crashed}
            elif event["kind"] in ("failed", "stopped"):
                ends[event["kind"]] = event
            on_event(event)
        return ends

    def _outcome(self) -> dict[str, Any]:
        import ray

        ray.wait([self._done], timeout=STOP_PATIENCE_S)
        try:
            ray.get(self._done, timeout=0)
            result = ray.get(self._fit.get_result.remote(), timeout=STOP_PATIENCE_S)
        except Exception as error:  # the controller itself died
            return {"error": last_line(error)}
        return {"error": _one_line(result.error)} if result.error else _kept_checkpoints(result)

    def _lost_nodes(self, plan: Plan, on_event: Callable[[Event], None]) -> bool:
        """End the fit if nodes were lost that it needs: those of its workers, or of its feed."""
        import ray

        nodes = alive(ray.nodes())
        lost = self._counted - {node.id for node in nodes}
        if not lost:
            return False
        if self._nodes and not lost & {*self._nodes, *plan.node_of_worker}:
            with contextlib.suppress(JobError):
                if make_plan(self.config, nodes, self.num_classes) == plan:  # the rest will do
                    self._counted -= lost
                    return False
        on_event({"kind": "note", "text": f"{len(lost)} node(s) were lost; going on from the last checkpoint"})
        self.end()
        return True

    def _could_grow(self, plan: Plan) -> bool:
        """Whether there is room for more workers that nobody else has taken."""
        import ray

        low, high = self.config.worker_range
        if low == high or plan.layout.workers == high:
            return False
        larger = make_plan(self.config, alive(ray.nodes()), self.num_classes)
        more = larger.layout.workers - plan.layout.workers if larger else 0
        free = ray.available_resources()
        return more > 0 and all(
            free.get(name, 0) >= more * count for name, count in plan.resources.per_worker().items()
        )

    def _wait_for_room(self, on_event: Callable[[Event], None]) -> Plan:
        """The next fit's plan, as soon as the cluster has room for one."""
        said = -math.inf
        while True:
            with signals_deferred(), contextlib.suppress(JobError):  # there was room before, and will be again
                plan = self._make_plan()
                if plan is not None:
                    return plan
            if time.monotonic() - said > START_PATIENCE_S:
                said = time.monotonic()
                text = f"the cluster has no room for {self.config.workers} worker(s) now; waiting for nodes"
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
            if "stopped" not in self._deliver(on_event):
                text = (
                    f"the workers did not stop in {STOP_PATIENCE_S:.0f} s; what came after the last checkpoint is lost"
                )
                on_event({"kind": "warning", "text": text})

    def _why_waiting(self, plan: Plan) -> str:
        import ray

        free = ray.available_resources()
        return (
            f"the workers have not started in {START_PATIENCE_S:.0f} s; "
            f"waiting for {plan.layout.workers} of {plan.resources.per_worker()} ({plan.strategy()}), "
            f"where the cluster has free: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}"
        )


def _placement_groups() -> set[str]:
    """Of this Ray job, whose id their ids end with, and not gone."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        name for name, group in placement_group_table().items() if group["state"] != "REMOVED" and name.endswith(job)
    }


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
