"""From a config to a Ray Train run, its events to whoever watches.

A run is a sequence of fits: each is one Ray Train run of a fixed number of workers (fit.py). When a node that held
workers is lost, or an elastic run could use one that came, the fit ends and the next begins from the last checkpoint in
the shape that the cluster then allows. Ray Train itself replaces a crashed worker within a fit.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Literal

from orchestrator.base.exits import Interrupted, JobError, last_line, signals_deferred
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.capacity import CapacityRequest
from orchestrator.cluster.layout_choice import worker_counts
from orchestrator.cluster.nodes import alive, uses_gpu
from orchestrator.cluster.placement import Plan, make_plan
from orchestrator.cluster.prices import node_types
from orchestrator.config.train import TrainConfig
from orchestrator.train.checkpoints import checkpoint_name
from orchestrator.train.mailbox import DROP, SAVE, Mailbox
from orchestrator.train.messages import Logged, StartFrom, WorkerPayload
from orchestrator.train.run_folder import RunFolder

Event = dict[str, Any]

POLL_S = 0.5
NODES_EVERY_S = 2.0
SETTLED_S = 5.0  # a cluster that could take more workers is given this long to change its mind
START_PATIENCE_S = 90.0
STOP_PATIENCE_S = 60.0  # for the last step and its checkpoint
DROP_PATIENCE_S = 15.0  # for workers that might be used again; starting new ones costs about as much
STARVED_PATIENCE_S = 300.0  # for a last step whose images may have to wait for CPUs that are gone
REQUEST_EVERY_S = 30.0
LOST_PATIENCE_S = 10.0  # for Ray to notice that a node is gone whose workers are


class Training:
    """A run under way. Ray must be connected. A run folder that holds checkpoints goes on from the latest."""

    def __init__(
        self,
        config: TrainConfig,
        data: StoragePath,
        run: RunFolder,
        num_classes: int,
        *,
        num_concurrent: int = 0,
        mailbox: Any = None,
        start: Event | None = None,
        pool: Any = None,
        keep_pool: bool = False,
    ) -> None:
        """Start the workers. Raises JobError where they do not fit.

        num_concurrent: of make_plan. mailbox: an actor to use, else one is made. start: another
        run's checkpoint, as {"checkpoint": path, "lr": its initial rate}, for a run that has none of its own. pool:
        workers that an earlier run left, to be used if they will do. keep_pool: leave such a pool at the end, if the
        workers come to theirs.
        """
        self.config, self.data, self.run, self.num_classes = config, data, run, num_classes
        self.num_concurrent, self.start, self.pool, self._keep_pool = num_concurrent, start, pool, keep_pool
        self._fit: Any = None  # fit.RayTrainRun
        self._mailbox = mailbox or make_mailbox()
        self._topic = ""  # a new one for every fit: no news comes from the one before
        self._cancelled: str | None = None
        self._counted: set[str] = set()  # the nodes that the plan was made from
        self._excused: set[str] = set()  # of those, lost ones that the fit can do without
        self._nodes: list[str] = []  # of its workers, once they have started
        self._request: CapacityRequest | None = None  # for nodes
        try:
            self._plan = self._make_plan()
        except JobError:
            if not num_concurrent:
                raise
            self._plan = None  # a trial: there was room when the search began, and will be again
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
            self._stop(on_event, SAVE)
            raise
        except _Cancelled:
            if self._cancelled == SAVE or self._keep_pool:
                self._stop(on_event, self._cancelled or DROP)
        finally:
            self.end()

    def cancel(self, *, save: bool) -> None:
        """Make `follow`, in another thread, return soon; with a last checkpoint, if that is wished."""
        self._cancelled = SAVE if save else DROP

    def checkpoint_after(self, epoch: int) -> str | None:
        """Where the checkpoint of an epoch is, if it is complete and still there."""
        name = checkpoint_name(epoch)
        return str(self.run.path / name) if self._fit is not None and self._fit.has_checkpoint(name) else None

    def end(self) -> None:
        """End the fit, whatever its workers do."""
        if self._fit is not None:
            self._fit.kill()
            self.pool, self._fit = self._fit.pool, None

    def _make_plan(self) -> Plan | None:
        import ray

        nodes = alive(ray.nodes())
        self._counted, self._excused = {node.id for node in nodes}, set()
        return make_plan(self.config, nodes, self.num_classes, self.num_concurrent)

    def _begin(self, plan: Plan) -> None:
        """Start a fit."""
        self._plan, self._nodes, self._topic = plan, [], uuid.uuid4().hex
        payload = WorkerPayload(
            config=self.config.model_dump(), data=self.data.text, layout=plan.layout.kind, mailbox=self._mailbox,
            topic=self._topic, start=StartFrom(**self.start) if isinstance(self.start, dict) else self.start,
            feed_cpus=plan.resources.feed_cpus, feed_tasks=plan.resources.feed_tasks,
            num_concurrent=max(1, self.num_concurrent),
        )  # fmt: skip
        from orchestrator.train.ray_train import RayTrainRun  # imports Ray, which may not be imported before connect()

        pool, self.pool = self.pool, None
        self._fit = RayTrainRun({"payload": payload}, plan, self.run, self.config.max_failures, pool, self._keep_pool)

    def _follow_fit(self, plan: Plan, on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is at its end; False if the fit ended for another to begin."""

        on_event({"kind": "note", "text": plan.reason})
        try:
            ends = self._watch_fit(plan, on_event)
        finally:
            self._release_request()
        if ends is None:
            return False
        with signals_deferred():
            return self._fit_is_over(plan, ends, on_event)

    def _watch_fit(self, plan: Plan, on_event: Callable[[Event], None]) -> dict[str, Event] | None:
        """Until it ends by itself; returns the events that it ended with, or None if it was ended for lost nodes."""
        patience, look_at, could_grow_since = time.monotonic() + START_PATIENCE_S, 0.0, math.inf
        asked, save_by, request_at, room = False, math.inf, 0.0, None
        while True:
            with signals_deferred():
                over = self._fit.wait(POLL_S)
                if self._fit.placement_group_id not in (room, None):
                    room = self._fit.placement_group_id
                    on_event({"kind": "placement_group", "id": room})
                ends = self._deliver(on_event)
            self._end_if_cancelled()
            if over or ends:
                return ends
            now = time.monotonic()
            if now < look_at:
                continue
            look_at = now + NODES_EVERY_S
            with signals_deferred():
                if not self._nodes and now > patience:
                    patience = math.inf
                    on_event({"kind": "warning", "text": self._why_waiting(plan)})
                lost = self._lost_nodes(plan)
                if lost == "workers" or now > save_by:
                    self._end_for_lost_nodes(on_event)
                    return None
                if lost == "feed" and save_by == math.inf:
                    text = "nodes were lost that the feed counted on; saving a checkpoint to go on with the others"
                    on_event({"kind": "note", "text": text})
                    self._mailbox.ask_to_stop.remote(self._topic, SAVE)
                    self._release_request()  # it would take what the last step needs
                    asked, save_by = True, now + STARVED_PATIENCE_S
                if self._nodes and not asked and now >= request_at:
                    request_at = now + self._request_growth(plan)
                if asked or not self._nodes or not self._could_grow(plan):
                    could_grow_since = math.inf
                    continue
                could_grow_since = min(could_grow_since, now)
                if now - could_grow_since >= SETTLED_S:
                    text = "the cluster has room for more workers; saving a checkpoint to grow"
                    on_event({"kind": "note", "text": text})
                    self._mailbox.ask_to_stop.remote(self._topic, SAVE)
                    self._release_request()
                    asked = True

    def _fit_is_over(self, plan: Plan, ends: dict[str, Event], on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is at its end, too. Raises JobError if it failed."""

        if "failed" in ends:  # one worker says why; the others may wait for it in a collective
            self._fit.wait(STOP_PATIENCE_S / 10)
            raise TrainingFailed(ends["failed"]["text"])
        outcome = self._outcome()
        if "error" in outcome:
            deadline = time.monotonic() + LOST_PATIENCE_S
            while time.monotonic() < deadline:  # was it a node? Ray may notice the workers before it does
                if self._gone() - self._excused:
                    self._end_for_lost_nodes(on_event)
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
        for message in ray.get(self._mailbox.drain.remote(self._topic)):
            if isinstance(message, Logged):
                continue
            event: Event = vars(message) | {"kind": message.kind}
            if event["kind"] == "started":
                crashed = bool(self._nodes)  # it is not the first start of this fit
                self._nodes = event["nodes"]
                assert self._plan is not None
                event = event | {"workers": self._plan.layout.workers, "crashed": crashed}
            elif event["kind"] in ("failed", "stopped"):
                ends[event["kind"]] = event
            on_event(event)
        return ends

    def _outcome(self) -> dict[str, Any]:
        if not self._fit.wait(STOP_PATIENCE_S):
            return {"error": f"the workers did not end in {STOP_PATIENCE_S:.0f} s"}
        try:
            result = self._fit.result()
        except Exception as error:  # the controller itself failed
            return {"error": last_line(error)}
        return {"error": _one_line(result.error)} if result.error else self._kept_checkpoints(result)

    def _kept_checkpoints(self, result: Any) -> Event:
        """Where the last checkpoint is, and the one with the lowest validation error."""
        best = result.get_best_checkpoint("val/top1_error", "min") if result.best_checkpoints else None
        found = {"checkpoint": result.checkpoint, "best_checkpoint": best}
        return {key: str(self.run.path / PurePath(kept.path).name) if kept else None for key, kept in found.items()}

    def _gone(self) -> set[str]:
        """Nodes that the plan was made from, and that are no more."""
        import ray

        return self._counted - {node.id for node in alive(ray.nodes())}

    def _lost_nodes(self, plan: Plan) -> Literal["", "feed", "workers"]:
        """Whether nodes were lost that the fit needs: those of its workers, or CPUs that its feed was given.

        The tasks of several workers must fit at once (placement.share_cpus); those of a single one can take turns.
        """
        import ray

        lost = self._gone() - self._excused
        if not lost:
            return ""
        if not self._nodes or lost & {*self._nodes, *plan.node_of_worker}:
            return "workers"
        try:
            now = make_plan(self.config, alive(ray.nodes()), self.num_classes, self.num_concurrent)
        except JobError:
            now = None
        if plan.layout.workers > 1 and (now is None or replace(now, reason=plan.reason) != plan):
            return "feed"
        self._excused |= lost
        return ""

    def _end_for_lost_nodes(self, on_event: Callable[[Event], None]) -> None:
        on_event({"kind": "note", "text": f"{len(self._gone())} node(s) were lost; going on from the last checkpoint"})
        self.end()

    def _request_growth(self, plan: Plan) -> float:
        """Of an elastic run on a cluster that starts nodes: ask for the next larger number of workers. To be called
        again after so many seconds, as it returns.

        The wish waits behind this fit's own room. Once it is granted it is given up, for the room to be seen as free;
        it is renewed if the run has not grown by then, as where only a crashed worker's room was free for a moment.
        """
        if self._request is not None:
            if not self._request.ready(0):
                return NODES_EVERY_S
            self._release_request()
            return REQUEST_EVERY_S
        larger = [workers for workers in worker_counts(self.config) if workers > plan.layout.workers]
        if not larger or self.num_concurrent or not node_types():
            return math.inf
        self._request = CapacityRequest(self.config, min(larger) - plan.layout.workers, on_gpu=plan.resources.use_gpu)
        return NODES_EVERY_S

    def _release_request(self) -> None:
        if self._request is not None:
            self._request.end()
            self._request = None

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
        try:
            while True:
                self._end_if_cancelled()
                with signals_deferred(), contextlib.suppress(JobError):  # there was room before, and will be again
                    plan = self._make_plan()
                    if plan is not None:
                        return plan
                if self._request is None:
                    self._request = CapacityRequest(self.config, self.config.worker_range[0], on_gpu=self._wants_gpu())
                if time.monotonic() - said > START_PATIENCE_S:
                    said = time.monotonic()
                    text = f"the cluster has no room for {self.config.workers} worker(s) now; waiting for nodes"
                    on_event({"kind": "warning", "text": text})
                time.sleep(NODES_EVERY_S)
        finally:
            self._release_request()

    def _wants_gpu(self) -> bool:
        """Settled by the first plan; before there is one, auto takes what the cluster has."""
        import ray

        with signals_deferred():
            return uses_gpu(self.config.device, ray.cluster_resources().get("GPU", 0))

    def _stop(self, on_event: Callable[[Event], None], how: str) -> None:
        """Let the workers come to an end by themselves, and SAVE where they are, or DROP it."""
        import ray

        if self._fit is None or not self._nodes or self._fit.wait(0):
            return
        with contextlib.suppress(ray.exceptions.RayError):  # what cannot be saved any more is not
            self._mailbox.ask_to_stop.remote(self._topic, how)
            self._fit.wait(STOP_PATIENCE_S if how == SAVE else DROP_PATIENCE_S)
            if how == SAVE and "stopped" not in self._deliver(on_event):
                text = (
                    f"the workers did not stop in {STOP_PATIENCE_S:.0f} s; what came after the last checkpoint is lost"
                )
                on_event({"kind": "warning", "text": text})

    def _end_if_cancelled(self) -> None:
        if self._cancelled:
            raise _Cancelled

    def _why_waiting(self, plan: Plan) -> str:
        import ray

        free = ray.available_resources()
        return (
            f"the workers have not started in {START_PATIENCE_S:.0f} s; "
            f"waiting for {plan.layout.workers} of {plan.resources.per_worker()} ({plan.strategy()}), "
            f"where the cluster has free: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}"
        )


class TrainingFailed(JobError):
    """As the workers say themselves, and would again: a diverged net, damaged data, impossible settings."""


class _Cancelled(Exception):
    """`Training.cancel` was called."""


def make_mailbox() -> Any:
    """An actor beside this process, for as long as somebody holds it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _one_line(error: BaseException) -> str:
    """The innermost reason of a failed run: the exception's own line, not the tracebacks around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, error = sorted(failures.items())[0]
        return f"worker {rank}: {last_line(error)}"
    return last_line(getattr(error, "controller_failure", error))
