"""From a config to a training run under way, its events to whoever follows it.

A run is a sequence of fits: each is one Ray Train run of a fixed number of workers (ray_train.py). When a node of its
workers is lost, or an elastic run could use a node that joined, the fit ends and the next begins from the last
checkpoint, with the layout that the cluster then allows (watch.py decides, elastic.py knows the nodes). Within a fit
Ray Train itself replaces a crashed worker.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from orchestrator.base.exits import Interrupted, JobError, last_line, name_and_line, signals_deferred
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.placement import Plan
from orchestrator.config.train import TrainConfig
from orchestrator.train.attempts import Attempts
from orchestrator.train.checkpoints import checkpoint_name
from orchestrator.train.elastic import ElasticPlanner
from orchestrator.train.mailbox import DROP, SAVE, Mailbox
from orchestrator.train.messages import (
    Event,
    Failed,
    Finished,
    Note,
    PlacementGroupMade,
    Raised,
    Started,
    StartFrom,
    Stopped,
    Warned,
    WorkerPayload,
)
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.stored import restore_list
from orchestrator.train.watch import Decision, Facts, NodeFacts, Watch

POLL_S = 0.5
STOP_TIMEOUT_S = 60.0  # for the last step and its checkpoint
SAID_AFTER_S = 2.0  # that the workers still stop
DROP_TIMEOUT_S = 15.0  # for workers that might be used again; starting new ones takes about as long
LOST_TIMEOUT_S = 10.0  # for Ray to notice that a node is gone whose workers are

log = logging.getLogger(__name__)


class Training:
    """A run under way. Ray must be connected. If the run's folder has checkpoints, it resumes from the latest."""

    def __init__(
        self,
        config: TrainConfig,
        data: StoragePath,
        run: RunFolder,
        num_classes: int,
        *,
        num_concurrent: int = 0,
        mailbox: Any = None,
        start: StartFrom | None = None,
        pool: Any = None,
        keep_pool: bool = False,
        profile: int = 0,
    ) -> None:
        """Start the workers. Raises JobError if the cluster has no room for them.

        num_concurrent: of make_plan. mailbox: an actor to use; None: a new one. start: another run's checkpoint, for a
        run that has none of its own. pool: an earlier run's workers, to be used if they suit this run. keep_pool:
        leave such a pool at the end, if the workers come to theirs. profile: steps to record after each start.
        """
        self.data, self.run, self.start, self.pool, self._keep_pool = data, run, start, pool, keep_pool
        self._profile = profile
        self.planner = ElasticPlanner(config, num_classes, num_concurrent)
        self._fit: Any = None  # ray_train.RayTrainRun
        self._mailbox = mailbox or make_mailbox()
        self._topic = ""  # a new one for every fit, so that no event of an earlier one arrives
        self._cancelled: str | None = None
        self._logged: NodeFacts | None = None
        self._told: list[str] = []  # what was found of checkpoints, for the next fit's first events
        self._worker_nodes: list[str] = []  # ids of the workers' nodes, once they have started
        try:
            self._plan = self.planner.plan()
        except JobError:
            if not num_concurrent:
                raise
            self._plan = None  # a trial: there was room when the search began, and will be again
        if self._plan is not None:  # a run that began on GPUs must not resume without them
            self.planner.config = config.changed(device="gpu" if self._plan.resources.use_gpu else "cpu")
            self._begin(self._plan)

    @property
    def config(self) -> TrainConfig:
        """With the device that the first plan has settled."""
        return self.planner.config

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Run to the end, calling on_event with every event, in order, in this thread.

        Raises JobError if training failed. Interrupted passes through after the workers have saved a checkpoint, if
        they can within STOP_TIMEOUT_S. The workers have been killed when this returns.
        """
        try:
            while not (self._plan and self._follow_fit(self._plan, on_event)):
                plan = self.planner.wait_for_room(self._raise_if_cancelled, lambda text: on_event(Warned(text=text)))
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
        """Make `follow`, in another thread, return soon; with save, after a last checkpoint."""
        log.info("cancelled, %s", "with a last checkpoint" if save else "without a checkpoint")
        self._cancelled = SAVE if save else DROP

    def checkpoint_after(self, epoch: int) -> str | None:
        """Where the checkpoint of an epoch is; None if it is not stored yet, or no longer."""
        name = checkpoint_name(epoch)
        return str(self.run.path / name) if self._fit is not None and self._fit.has_checkpoint(name) else None

    def end(self) -> None:
        """Kill the fit, whatever its workers do."""
        if self._fit is not None:
            self._fit.kill()
            self.pool, self._fit = self._fit.pool, None

    def _begin(self, plan: Plan) -> None:
        """Start a fit."""
        self._plan, self._worker_nodes, self._topic = plan, [], uuid.uuid4().hex
        self._attempts = Attempts(self.config.max_failures + 1)
        payload = WorkerPayload(
            config=self.config.model_dump(),
            data=self.data.text,
            layout=plan.layout.kind,
            mailbox=self._mailbox,
            topic=self._topic,
            run=self.run.path.text,
            start=self.start,
            feed_cpus=plan.resources.feed_cpus,
            feed_tasks=plan.resources.feed_tasks,
            num_concurrent=max(1, self.planner.num_concurrent),
            profile=self._profile,
        )
        from orchestrator.train.ray_train import RayTrainRun  # imports Ray, which may not be imported before connect()

        restore_list(self.run, self._told.append)
        log.info("starting %s: %s; %s", count_of(plan.layout.workers, "worker"), plan.reason, plan)
        pool, self.pool = self.pool, None
        self._fit = RayTrainRun({"payload": payload}, plan, self.run, self.config.max_failures, pool, self._keep_pool)

    def _follow_fit(self, plan: Plan, on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is over; False if only the fit is, and another is to begin."""
        for text in self._told:
            on_event(Warned(text=text))
        self._told.clear()
        on_event(Note(text=plan.reason))
        try:
            reports = self._watch_fit(plan, on_event)
        finally:
            self.planner.release_capacity()
        return reports is not None and self._conclude_fit(reports, on_event)

    def _watch_fit(self, plan: Plan, on_event: Callable[[Event], None]) -> "_Reports | None":
        """Wait for the fit's end; returns the reports that came last, or None if it was ended for lost nodes."""
        watch, placement_group = Watch.begin(time.monotonic()), None
        while True:
            with signals_deferred():
                over = self._fit.wait(POLL_S)
                if self._fit.placement_group_id not in (placement_group, None):
                    placement_group = self._fit.placement_group_id
                    on_event(PlacementGroupMade(id=placement_group))
                reports = self._deliver(on_event)
            with signals_deferred():
                watch, decisions = watch.step(self._facts(watch, plan, over, reports))
                for decision in decisions:
                    log.info("decision: %s", decision.value)
                    match decision:
                        case Decision.CANCEL:
                            raise _Cancelled
                        case Decision.FIT_OVER:
                            return reports
                        case Decision.WARN_NOT_STARTED:
                            on_event(Warned(text=self.planner.why_waiting(plan, placement_group)))
                        case Decision.END_FOR_LOST_NODES:
                            self._end_for_lost_nodes(on_event)
                            return None
                        case Decision.SAVE_FOR_LOST_FEED:
                            text = "nodes were lost that feed the workers; saving a checkpoint to resume without them"
                            self._ask_to_save(text, on_event)
                        case Decision.SAVE_TO_GROW:
                            text = "the cluster has room for more workers; saving a checkpoint to grow"
                            self._ask_to_save(text, on_event)
                        case Decision.REQUEST_CAPACITY:
                            self.planner.request_capacity(plan)
                        case Decision.RELEASE_CAPACITY:
                            self.planner.release_capacity()

    def _facts(self, watch: Watch, plan: Plan, over: bool, reports: "_Reports") -> Facts:
        """What the watch is to know now; the nodes are asked about only when it is time, and only what it needs."""
        now, cancelled, ended = time.monotonic(), self._cancelled is not None, bool(reports)
        if cancelled or over or ended or not watch.needs_nodes(now):
            return Facts(now=now, cancelled=cancelled, over=over, ended=ended)
        started, lost = bool(self._worker_nodes), self.planner.lost(plan, self._worker_nodes)
        nodes = NodeFacts(
            started=started,
            lost=lost,
            could_grow=watch.needs_growth(started, lost) and self.planner.could_grow(plan),
            capacity=self.planner.capacity(plan) if watch.needs_capacity(now, started, lost) else "unavailable",
        )
        if nodes != self._logged:
            self._logged = nodes
            log.debug("nodes: %s", nodes)
        return Facts(now=now, nodes=nodes)

    def _ask_to_save(self, why: str, on_event: Callable[[Event], None]) -> None:
        on_event(Note(text=why))
        self._mailbox.ask_to_stop.remote(self._topic, SAVE)

    def _conclude_fit(self, reports: "_Reports", on_event: Callable[[Event], None]) -> bool:
        """Returns whether the run is over, too. Raises JobError if it failed."""
        if reports.failed is not None:  # one worker reports why; the others may wait for it in a collective
            self._fit.wait(STOP_TIMEOUT_S / 10)
            raise TrainingFailed(reports.failed.text)
        self._fit.wait(STOP_TIMEOUT_S)
        with signals_deferred():
            outcome = self._outcome()
            late = self._deliver(on_event)  # what came between the last look and the fit's end
        if late.failed is not None:
            raise TrainingFailed(late.failed.text)
        if isinstance(outcome, str):
            log.info("the fit failed: %s", outcome)
            deadline = time.monotonic() + LOST_TIMEOUT_S
            while time.monotonic() < deadline:  # was it a node? Ray may notice the loss of the workers first
                with signals_deferred():
                    if self.planner.untolerated_losses():
                        self._end_for_lost_nodes(on_event)
                        return False
                time.sleep(POLL_S)
            raise JobError(self._attempts.of_the_last(outcome))
        with signals_deferred():
            if reports.stopped is not None or late.stopped is not None:
                self.end()
                return False
            on_event(outcome)
        return True

    def _deliver(self, on_event: Callable[[Event], None]) -> "_Reports":
        """Pass on the events in the mailbox; returns those that end a fit."""
        import ray

        reports = _Reports()
        for event in ray.get(self._mailbox.drain.remote(self._topic)):
            if isinstance(event, Started):
                self._worker_nodes = list(event.nodes)
                assert self._plan is not None
                event = replace(event, workers=self._plan.layout.workers, lost=self._attempts.started())
            elif isinstance(event, Raised):
                if text := self._attempts.raised(event):
                    on_event(Warned(text=text))
                continue
            elif isinstance(event, Failed):
                reports = replace(reports, failed=event)
            elif isinstance(event, Stopped):
                reports = replace(reports, stopped=event)
            on_event(event)
        return reports

    def _outcome(self) -> Finished | str:
        """Where the checkpoints of a fit are that came to its end; or, in one line, why it failed."""
        if not self._fit.wait(0):
            return f"the workers did not end within {STOP_TIMEOUT_S:.0f} s"
        try:
            result = self._fit.result()
        except Exception as error:  # the controller itself failed
            log.info("Ray Train's controller failed", exc_info=True)
            return last_line(error)
        if result.error:
            log.info("Ray Train's run failed", exc_info=result.error)
            return _one_line(result.error)
        best = result.get_best_checkpoint("val/top1_error", "min") if result.best_checkpoints else None
        return Finished(checkpoint=self._path_of(result.checkpoint), best_checkpoint=self._path_of(best))

    def _path_of(self, checkpoint: Any) -> str | None:
        return str(self.run.path / PurePath(checkpoint.path).name) if checkpoint else None

    def _end_for_lost_nodes(self, on_event: Callable[[Event], None]) -> None:
        lost = self.planner.lost_nodes()
        log.info("lost nodes: %s", ", ".join(sorted(lost)) or "none")
        were = f"{count_of(len(lost), 'node')} {'was' if len(lost) == 1 else 'were'}"
        on_event(Note(text=f"{were} lost; resuming from the last checkpoint"))
        self.end()

    def _stop(self, on_event: Callable[[Event], None], how: str) -> None:
        """Let the workers end by themselves and SAVE their work, or DROP it."""
        import ray

        if self._fit is None or not self._worker_nodes or self._fit.wait(0):
            return
        log.info("asking the workers to stop (%s)", how)
        with contextlib.suppress(ray.exceptions.RayError):  # what cannot be saved any more is lost
            self._mailbox.ask_to_stop.remote(self._topic, how)
            over = self._fit.wait(SAID_AFTER_S)
            if how == SAVE and not over:
                on_event(Note(text="stopping: the workers end their step and save a checkpoint"))
            over = over or self._fit.wait(STOP_TIMEOUT_S if how == SAVE else DROP_TIMEOUT_S)
            stopped = self._deliver(on_event).stopped is not None
            if how == SAVE and not stopped and isinstance(outcome := self._outcome(), str):
                text = outcome if over else f"the workers did not stop within {STOP_TIMEOUT_S:.0f} s"
                on_event(Warned(text=f"{text}; their work since the last checkpoint is lost"))

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise _Cancelled


class TrainingFailed(JobError):
    """The workers report a failure that would recur: a diverged net, damaged data, impossible settings."""


@dataclass(frozen=True)
class _Reports:
    """Of workers that end their fit: why they failed, or that they stopped as they were asked to."""

    failed: Failed | None = None
    stopped: Stopped | None = None

    def __bool__(self) -> bool:
        return self.failed is not None or self.stopped is not None


class _Cancelled(Exception):
    """`Training.cancel` was called."""


def make_mailbox() -> Any:
    """An actor on this node, for as long as a process holds its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _one_line(error: BaseException) -> str:
    """The innermost reason of a failed run: the exception's own line, not the tracebacks around it."""
    from orchestrator.train.driver_link import is_of_a_collective  # imports Ray

    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, error = min(failures.items(), key=lambda found: (is_of_a_collective(found[1]), found[0]))
        return f"worker {rank}: {name_and_line(error)}"
    return last_line(getattr(error, "controller_failure", error))
