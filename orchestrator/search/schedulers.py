"""Which trials continue and which stop early: Ray Tune's schedulers, told the past by the journal, which records their
decisions.

The trial with the paper's constants is never stopped early: the others are compared with it.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.search import ray_tune_internals  # noqa: F401 - first: it names what another Ray has otherwise
from orchestrator.search.config import SearchConfig
from orchestrator.search.entries import EpochEnded, Exploited, Status, TrialEnded
from orchestrator.search.journal import PAPER_TRIAL, Journal, TrialRecord
from orchestrator.search.proposals import NotPickled, trial_config, trial_id
from orchestrator.search.trial import kept_checkpoint
from orchestrator.train.checkpoints import STATE

BRACKETS = 3  # of hyperband: first rungs at the grace, and at one and two factors more
QUANTILE = 0.25  # of a population: the best share, whose weights replace those of the worst share


class Listener(Protocol):
    """Who is notified (search.Search)."""

    def on_begin(self, record: TrialRecord) -> None: ...
    def on_epoch(self, record: TrialRecord, metrics: dict[str, Any]) -> None: ...
    def on_exploit(self, record: TrialRecord, donor: int) -> None: ...
    def on_end(self, record: TrialRecord) -> None: ...
    def on_process_lost(self, number: int) -> None: ...
    def on_turn(self) -> None: ...


class JournaledScheduler(NotPickled, TrialScheduler):  # type: ignore[misc]
    """Wraps Ray Tune's own scheduler: each result reaches it once, in order, and its decisions are recorded."""

    def __init__(self, config: SearchConfig, journal: Journal, trials: StoragePath, listener: Listener) -> None:
        """trials: where their runs are."""
        super().__init__()
        self.config, self.journal, self.listener = config, journal, listener
        self.inner = _scheduler(config, journal, trials, listener)
        self._metric, self._mode = config.metric, "min"
        self._to_stop: set[int] = set()  # by what was known before an interruption
        if isinstance(self.inner, AsyncHyperBandScheduler):
            self._recall()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        record = self.journal.trials[int(trial.trial_id)]
        self._add(tune_controller, trial)
        if isinstance(self.inner, PopulationBasedTraining):
            self.inner.recall(trial, record)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        record = self.journal.trials[int(trial.trial_id)]
        if result["epoch"] <= record.epoch:  # known from before an interruption
            return str(TrialScheduler.STOP if record.number in self._to_stop else TrialScheduler.CONTINUE)
        self._write(record, result)
        decision = self.inner.on_trial_result(tune_controller, trial, result)
        if record.number == PAPER_TRIAL and decision == TrialScheduler.STOP:
            return str(TrialScheduler.CONTINUE)
        return str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """At the last epoch, after a decision to stop, or where training failed or was interrupted."""
        record = self.journal.trials[int(trial.trial_id)]
        if result.get("interrupted"):
            return
        if "failed" in result:
            self._end(record, "FAILED", str(result["failed"]))
            return
        if result["epoch"] > record.epoch:
            self._write(record, result)
            self.inner.on_trial_complete(tune_controller, trial, result)
        self._end(record, "FINISHED" if record.epoch >= self.config.train.epochs else "STOPPED")

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """It may be retried."""
        self.inner.on_trial_error(tune_controller, trial)

    def give_up(self, trial: Any) -> None:
        """End a trial that has been retried often enough; its error is in Ray Tune's file."""
        path = Path(trial.error_file) if trial.error_file else None
        text = path.read_text() if path and path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        why = lines[-1].removeprefix(f"{JobError.__module__}.{JobError.__name__}: ") if lines else "its process died"
        self._end(self.journal.trials[int(trial.trial_id)], "FAILED", why)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self.inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self.inner.debug_string())

    def _write(self, record: TrialRecord, result: dict[str, Any]) -> None:
        metrics = {name: result[name] for name in result if name in ("epoch", "step") or name.startswith(_GROUPS)}
        self.journal.write(EpochEnded(number=record.number, metrics=metrics))
        self.listener.on_epoch(record, metrics)

    def _end(self, record: TrialRecord, status: Status, error: str | None = None) -> None:
        if not record.ended:
            self.journal.write(TrialEnded(number=record.number, status=status, error=error))
            self.listener.on_end(record)

    def _add(self, tune_controller: Any, trial: Any) -> None:
        """hyperband draws a trial's bracket from numpy's global state: the same one each time it is added."""
        state = np.random.get_state()
        np.random.seed([self.config.search_seed % 2**32, int(trial.trial_id)])
        self.inner.on_trial_add(tune_controller, trial)
        np.random.set_state(state)

    def _recall(self) -> None:
        """Replay all results to the scheduler, in order. A population learns of a trial when that is added."""
        known = {number: SimpleNamespace(trial_id=trial_id(record)) for number, record in self.journal.trials.items()}
        for trial in known.values():
            self._add(None, trial)
        for number, metrics in self.journal.results:
            if (
                self.inner.on_trial_result(None, known[number], metrics) == TrialScheduler.STOP
                and number != PAPER_TRIAL
            ):
                self._to_stop.add(number)


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training (Jaderberg et al., 2017) whose weights travel as checkpoints of our own."""

    def __init__(self, config: SearchConfig, journal: Journal, trials: StoragePath, listener: Listener) -> None:
        super().__init__(
            time_attr="epoch", metric=config.metric, mode="min", perturbation_interval=config.grace_epochs,
            quantile_fraction=QUANTILE, custom_explore_fn=lambda values: values, log_config=False,
        )  # fmt: skip
        self.config, self.journal, self.trials, self.listener = config, journal, trials, listener

    def recall(self, trial: Any, record: TrialRecord) -> None:
        """What was known of a trial at its last perturbation before an interruption."""
        epoch = record.epoch - record.epoch % self.config.grace_epochs
        if epoch:
            state, metrics = self._trial_state[trial], record.history[epoch - 1]
            state.last_perturbation_time = state.last_train_time = epoch
            state.last_score, state.last_result = -metrics[self.config.metric], metrics

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        # Ray Tune would pause a trial while others start, to be fair; here all run in parallel
        return str(TrialScheduler.CONTINUE) if decision == TrialScheduler.PAUSE else decision

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: list[Any], lower_quantile: list[Any]
    ) -> None:
        """The trials set their checkpoints aside themselves (trial.Trial)."""
        if trial not in lower_quantile or int(trial.trial_id) == PAPER_TRIAL:
            return
        record, state = self.journal.trials[int(trial.trial_id)], self._trial_state[trial]
        count = int(state.last_train_time) // self.config.grace_epochs
        seed = (self.config.search_seed * 1_000_003 + record.number * 1009 + count) % 2**63
        source = upper_quantile[int(np.random.Generator(np.random.Philox(key=[seed, 1])).integers(len(upper_quantile)))]
        donor = self.journal.trials[int(source.trial_id)]
        # where both have been: what the donor learned since is not this trial's
        epoch = min(int(self._trial_state[source].last_train_time), int(state.last_train_time))
        checkpoint = kept_checkpoint(self.trials, donor.folder, epoch)
        if (checkpoint / STATE).size() is None:
            return
        values = self.config.space.mutate(donor.values, seed)
        try:
            self.config.trial(values)
        except ValueError:  # its values do not go together
            values = donor.values
        start = {"checkpoint": str(checkpoint), "epoch": epoch, "lr": self.config.trial(donor.values).lr}
        self.journal.write(Exploited(number=record.number, donor=donor.number, values=values, start=start))
        self.listener.on_exploit(record, donor.number)
        tune_controller.pause_trial(trial, should_checkpoint=False)
        trial.set_config(trial_config(record))
        state.last_perturbation_time = state.last_train_time = epoch


class TuneCallback(NotPickled, Callback):  # type: ignore[misc]
    """Ray Tune's events other than results."""

    def __init__(
        self, scheduler: JournaledScheduler, listener: Listener, requeue: Callable[[TrialRecord], None]
    ) -> None:
        """requeue: puts a trial back in the queue."""
        self.scheduler, self.listener, self.requeue = scheduler, listener, requeue
        self.lost: dict[int, int] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.listener.on_turn()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.listener.on_begin(self.scheduler.journal.trials[int(trial.trial_id)])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.listener.on_process_lost(int(trial.trial_id))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune itself does not retry a process that dies while it switches to the next trial."""
        number = int(trial.trial_id)
        self.listener.on_process_lost(number)
        self.lost[number] = self.lost.get(number, 0) + 1
        if trial.run_metadata.num_failures >= trial.max_failures or self.lost[number] > trial.max_failures:
            self.scheduler.give_up(trial)
        else:
            self.requeue(self.scheduler.journal.trials[number])


_GROUPS = ("train/", "val/")


def _scheduler(config: SearchConfig, journal: Journal, trials: StoragePath, listener: Listener) -> TrialScheduler:
    if config.scheduler == "fifo":
        return FIFOScheduler()
    if config.scheduler == "pbt":
        return Population(config, journal, trials, listener)
    return AsyncHyperBandScheduler(
        time_attr="epoch", metric=config.metric, mode="min", max_t=config.train.epochs + 1,
        grace_period=config.grace_epochs, reduction_factor=config.reduction_factor,
        brackets=BRACKETS if config.scheduler == "hyperband" else 1,
    )  # fmt: skip
