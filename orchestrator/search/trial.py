"""A trial of a search: a complete training run, as Ray Tune sees one.

Trials use a process one after the other, and each leaves its workers to the next: importing what they need is most of a
run's start-up.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from orchestrator.base import logs
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import make_config
from orchestrator.data.shards import DamagedData
from orchestrator.train.checkpoints import STATE, checkpoint_name
from orchestrator.train.messages import (
    DRIVER,
    EpochEnded,
    Event,
    Failed,
    Logged,
    Metrics,
    PlacementGroupMade,
    Started,
    StartFrom,
    Step,
    TrialEvent,
    TrialPayload,
    TrialSettings,
    TrialStarted,
    Warned,
)
from orchestrator.train.ray_train import KILL_TIMEOUT_S
from orchestrator.train.run_folder import KEPT, RunFolder
from orchestrator.train.training import STOP_TIMEOUT_S, Training, TrainingFailed

log = logging.getLogger(__name__)

SEARCH = "search"  # the mailbox's topic for what the trials report to the driver, and for its request that they stop
POLL_S = 0.5
TELL_EVERY_S = 2.0  # of steps
END_TIMEOUT_S = STOP_TIMEOUT_S + KILL_TIMEOUT_S + 15.0  # longer than Training takes to save, then to kill its workers
CHECKPOINT_TIMEOUT_S = 120.0


class Trial(tune.Trainable):  # type: ignore[misc]
    """Trains in the background and returns an epoch a step.

    A result holds an epoch's metrics; `failed`, one line, where training failed as it would again; `interrupted` where
    the search is stopping and a checkpoint has been saved. Anything else is raised, for Ray Tune to try again. The
    epochs of an earlier session are returned again, from the checkpoint: the journal knows them.
    """

    def setup(self, config: dict[str, Any], payload: TrialPayload) -> None:
        """config: of proposals.trial_config. payload: what all trials share."""
        self.payload, self._pool = payload, None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end(save=False)
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        with contextlib.suppress(RuntimeError):  # then they end with this process
            self._end(save=False)
        if self._pool is not None:
            self._pool.release()

    def step(self) -> dict[str, Any]:
        while True:
            if ray.get(self.payload.mailbox.is_stopping.remote(SEARCH)):
                self._end(save=True)
                return {"interrupted": True, "done": True}
            try:
                event = self._run.events.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(event, _Epoch):
                epoch = event.metrics["epoch"]
                done = epoch >= self._run.train.epochs
                if done:  # the last checkpoint is being stored
                    self._run.thread.join(END_TIMEOUT_S)
                    if failure := self._run.failure_to_end():
                        return failure
                elif event.live and self.payload.keep_every and epoch % self.payload.keep_every == 0:
                    self._run.keep(epoch)
                return event.metrics | {"done": done}
            if isinstance(event, Failed):
                return {"failed": event.text, "done": True}
            raise event.error

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing for Ray Tune to keep: Ray Train has stored it, and the trial finds it there."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        pass

    def _begin(self, config: dict[str, Any]) -> None:
        pool, self._pool = self._pool, None
        self._run = _Run(trial_settings(config), self.payload, pool)

    def _end(self, *, save: bool) -> None:
        """Raises RuntimeError if the workers do not end; Ray Tune then restarts this process."""
        self._run.cancel(save=save)
        self._run.thread.join(END_TIMEOUT_S)
        if self._run.thread.is_alive():
            raise RuntimeError(f"the workers of trial {self._run.number} did not end in {END_TIMEOUT_S:.0f} s")
        self._pool, self._run.pool = self._run.pool, None


@dataclass(frozen=True)
class _Epoch:
    """An epoch was trained, or is known from a checkpoint if it is not live."""

    metrics: Metrics
    live: bool


@dataclass(frozen=True)
class _Broken:
    """What Ray Tune should try again."""

    error: BaseException


class _Run:
    """The training run of one trial, followed in a thread."""

    def __init__(self, settings: TrialSettings, payload: TrialPayload, pool: Any) -> None:
        self.number, self.folder, self.start = settings.number, settings.folder, settings.start
        self.payload, self.pool = payload, pool
        self.train = make_config(**{**payload.train, **settings.values})
        self.events: queue.Queue[_Epoch | Failed | _Broken] = queue.Queue()
        logs.forward(self._log)
        self._cancelled, self._told, self._since, self._epoch = threading.Event(), 0.0, time.monotonic(), 0
        self._training: Training | None = None
        if pool is not None:
            self._tell(PlacementGroupMade(id=pool.placement_group_id))
        self.thread = threading.Thread(target=self._follow, name="trial", daemon=True)
        self.thread.start()

    def failure_to_end(self) -> dict[str, Any] | None:
        """After the last epoch: how training failed nevertheless, as where its checkpoint could not be stored. Raises
        what Ray Tune should try again."""
        if self.thread.is_alive():
            raise RuntimeError(f"trial {self.number}: storing the last checkpoint took more than {END_TIMEOUT_S:.0f} s")
        while not self.events.empty():
            event = self.events.get()
            if isinstance(event, Failed):
                return {"failed": event.text, "done": True}
            if isinstance(event, _Broken):
                raise event.error
        return None

    def cancel(self, *, save: bool) -> None:
        self._cancelled.set()
        if self._training is not None:
            self._training.cancel(save=save)

    def keep(self, epoch: int) -> None:
        """Set an epoch's checkpoint aside for trials that may continue from it."""
        target = kept_checkpoint(StoragePath(self.payload.output), self.folder, epoch)
        if (target / STATE).size() is not None:
            return
        deadline, found = time.monotonic() + CHECKPOINT_TIMEOUT_S, None
        while found is None and self.thread.is_alive() and time.monotonic() < deadline:
            found = self._training.checkpoint_after(epoch) if self._training else None
            time.sleep(POLL_S / 5)
        if found is not None:
            with contextlib.suppress(OSError):  # a later epoch's has replaced it meanwhile
                StoragePath(found).copy_folder(target, last=STATE)

    def _follow(self) -> None:
        run = RunFolder(StoragePath(self.payload.output), self.folder)
        try:
            if not run.exists():
                run.create(self.train)
            training = Training(
                self.train, StoragePath(self.payload.data), run, self.payload.num_classes,
                num_concurrent=self.payload.num_concurrent, mailbox=self.payload.mailbox,
                start=self.start, pool=self.pool, keep_pool=True,
            )  # fmt: skip
            self._training, self.pool = training, None
            if self._cancelled.is_set():
                training.cancel(save=False)
            try:
                training.follow(self._on_event)
            finally:
                self.pool = training.pool
        except (TrainingFailed, DamagedData, ValueError) as error:
            self.events.put(Failed(text=str(error)))
        except BaseException as error:
            log.info("trial %d", self.number, exc_info=True)
            self.events.put(_Broken(error))

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Started):
            for metrics in event.history:
                self._put(metrics, live=False)
            after_s = time.monotonic() - self._since
            self._tell(TrialStarted(after_s=after_s, lost=event.lost, epoch=event.epoch))
        elif isinstance(event, EpochEnded):
            self._put(event.metrics, live=True)
        elif isinstance(event, Step):
            if time.monotonic() - self._told >= TELL_EVERY_S:
                self._told = time.monotonic()
                self._tell(event)
        elif isinstance(event, PlacementGroupMade | Warned | Logged):
            self._tell(event)

    def _put(self, metrics: dict[str, Any], *, live: bool) -> None:
        """Pass an epoch on once: a replaced worker reports what its checkpoint has again."""
        if metrics["epoch"] == self._epoch + 1:
            self._epoch += 1
            self.events.put(_Epoch(dict(metrics), live))

    def _tell(self, event: TrialStarted | Step | Warned | PlacementGroupMade | Logged) -> None:
        self.payload.mailbox.put.remote(SEARCH, TrialEvent(number=self.number, event=event))

    def _log(self, level: int, name: str, text: str, at: float) -> None:
        """A line of this process into the search's log."""
        self._tell(Logged(rank=DRIVER, level=level, name=name, text=text, at=at))


def trial_settings(config: Mapping[str, Any]) -> TrialSettings:
    """From what Ray Tune was given, plain values (proposals.trial_config)."""
    start = config["start"]
    return TrialSettings(**{**config, "start": StartFrom(**start) if start else None})


def kept_checkpoint(output: StoragePath, folder: str, epoch: int) -> StoragePath:
    """Where a trial, by its run's folder, sets the checkpoint of an epoch aside."""
    return output / KEPT / f"{folder}-{checkpoint_name(epoch)}"
