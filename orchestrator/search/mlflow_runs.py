"""The MLflow runs of a search: a parent, and a child for each trial. A server that is away holds up no trial."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from alexnet.trained import WEIGHTS
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.search.config import SearchConfig
from orchestrator.search.entries import RunBegun, SearchBegun
from orchestrator.search.folder import BEST_YAML, SEARCH_YAML
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.notes import search_note, trial_note
from orchestrator.tracking.run import FINISH_TIMEOUT_S, HURRIED_TIMEOUT_S, Run
from orchestrator.tracking.store import Store
from orchestrator.tracking.training_run import Tracker
from orchestrator.train.checkpoints import checkpoint_name
from orchestrator.train.model_card import how_it_ended
from orchestrator.train.model_log import EPOCH_TAG, log_model, register_model

PAUSE_S = 60.0  # after a call that failed: the trials' loop waits for each
MLFLOW_STATUS = {"FINISHED": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED"}  # of a trial, in MLflow's words
SCRIPT = "jobs/tune.py"  # the runs' source
STARTED = "started_with"  # tag: the command that began the search


@dataclass(frozen=True)
class About:
    """What the runs' descriptions say of the search."""

    command: str = ""  # that began it
    data: str = ""  # its data, in Markdown
    num_val: int = 1  # validation images
    trials: StoragePath | None = None  # the folder of the trials' runs


class SearchRuns:
    """Begins, feeds and ends them. The journal has their ids."""

    def __init__(
        self,
        store: Store,
        config: SearchConfig,
        journal: Journal,
        name: str,
        *,
        resume: bool,
        warn: Callable[[str], None],
    ) -> None:
        """name: of the search. resume: runs may be there whose ids a crash kept from the journal."""
        self.store, self.config, self.journal, self.name, self.resume = store, config, journal, name, resume
        self.warn = warn
        self.parent = Run(store, warn)
        self.about = About()
        self._children: dict[int, Run] = {}  # of trials that are under way
        self._begun_in_part: dict[int, Run] = {}  # of trials whose run's beginning failed
        self._endings: list[threading.Thread] = []
        self._retry_at = 0.0

    def begin(self, config: SearchConfig, digest: str | None = None, about: About | None = None) -> None:
        """The parent, and the ends of children that a killed driver left open. config: as it is now resolved.

        digest: of the data, if they are others than those that the search began with.
        """
        self.config, self.about = config, about or self.about
        settings = config.settings() | {f"space.{d.name}": str(d) for d in config.space.dimensions}
        settings |= {f"train.{name}": value for name, value in config.train.resolved().items()}
        known = self.journal.parent_run_id
        self.parent.patience_s = FINISH_TIMEOUT_S
        self.parent.note = search_note(config, self.about.data, "running", self.about.command)
        is_new = self.parent.begin(self.name, SCRIPT, settings, run_id=known, look_for=self.resume)
        self.parent.say_if_replaced()
        if is_new:
            self.parent.tag(**{STARTED: self.about.command})
        else:
            self._take_command()
        if digest:
            self.parent.tag(**{"data.digest": digest})
        if self.parent.run_id != known:
            self.journal.write(SearchBegun(run_id=self.parent.run_id))
        self.parent.log_text(config.to_yaml(), SEARCH_YAML)
        for record in self.journal.trials.values():
            if not record.ended:
                continue
            if not record.run_id:
                self.begin_trial(record)
                run = self._children.pop(record.number, None)
            else:
                run = self._run_of(record)
                if run and not self._is_open(run, record):
                    continue
            if run:
                run.complete(record.history, config.metric)
                self._finish(run, record, MLFLOW_STATUS[record.status], record.error, hurry=False)

    def _take_command(self) -> None:
        """The command that began a resumed search, for its description."""
        try:
            command = self.store.client.get_run(self.parent.run_id).data.tags.get(STARTED)
        except Exception as error:  # the server has just answered, and may be away again
            self.warn(f"MLflow does not answer about the search: {self.store.reason(error)}")
            return
        if command:
            self.about = replace(self.about, command=command)

    def begin_trial(self, record: TrialRecord) -> None:
        """The trial's run; where the server is away, it is tried again at later epochs, and at the end."""
        if record.number in self._children:
            return
        number, half = record.number, self._begun_in_part.pop(record.number, None)
        run = self._children[number] = half or Run(self.store, self.warn)
        run.note = self._note_of(record, "running")
        try:
            params = self.config.trial(record.values).resolved()
            run.begin(
                f"{self.name}-{record.number:04d}", SCRIPT, params, run_id=record.run_id,
                parent=self.parent.run_id, look_for=self.resume or half is not None,
            )  # fmt: skip
            if not self.parent.replaced:  # else all of them are, which was said
                run.say_if_replaced()
            if run.run_id != record.run_id:
                self.journal.write(RunBegun(number=number, run_id=run.run_id))
            if record.history:
                run.complete(record.history, self.config.metric)
        except Exception as error:
            reason = self.store.reason(error)
            self.warn(f"could not create the MLflow run of trial {number}; will retry: {reason}")
            self._begun_in_part[number] = self._children.pop(number)
            self._retry_at = time.monotonic() + PAUSE_S

    def log_epoch(self, record: TrialRecord, metrics: dict[str, Any], usd: float | None) -> None:
        """An epoch of a trial, and the best of all so far."""
        if run := self._children.get(record.number):
            run.log_epoch(metrics)
        elif time.monotonic() > self._retry_at:
            self.begin_trial(record)
        ranked = self.journal.ranked(self.config.metric)
        best = ranked[0].best(self.config.metric) if ranked else None
        if best:
            cost = {} if usd is None else {"cost/usd": usd}
            values = {f"best/{self.config.metric.split('/')[1]}": best[self.config.metric]} | cost
            self.parent.log(values, step=len(self.journal.results))

    def tag_exploit(self, record: TrialRecord, donor: int) -> None:
        """Say that a trial continues from another's weights."""
        if run := self._children.get(record.number):
            values = ", ".join(f"{name} {value}" for name, value in record.values.items())
            run.tag(**{f"exploit.{len(self.journal.results):06d}": f"from trial {donor}: {values}"})

    def end_trial(self, record: TrialRecord) -> None:
        """Beside the trials' loop: the server may be away."""
        if run := self._children.pop(record.number, None):
            self._finish(run, record, MLFLOW_STATUS[record.status], record.error, hurry=False)

    def end(
        self,
        status: str,
        error: str | None,
        result: dict[str, Any],
        pictures: dict[str, Any],
        best: TrainConfig | None,
    ) -> None:
        """All runs, and what the search came to. status: FINISHED, FAILED or KILLED."""
        begun = bool(self.parent.run_id)
        how = how_it_ended(status, error, result["epochs_used"])
        self.parent.note = search_note(self.config, self.about.data, how, self.about.command, result)
        if status == "FINISHED":
            self._end_children(status)
            if begun:
                self._log_outcome(result, pictures, best)
        else:  # in parallel: the process is to end soon, and the server may hang
            self.parent.patience_s = 0.0
            outcome = threading.Thread(target=self._log_outcome, args=(result, pictures, best), daemon=True)
            deadline = time.monotonic() + HURRIED_TIMEOUT_S
            if begun:
                outcome.start()
            self._end_children(status)
            if begun:
                outcome.join(max(0.0, deadline - time.monotonic()))
        if begun:
            self.parent.finish(status, error)

    def log_best_model(
        self, record: TrialRecord, data: Dataset, trials: StoragePath,
        register: str | None = None, later: str = "", say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """The model of the best trial, whose run has ended. trials: the folder of the trials' runs.

        register: the name under which it is registered. later: the command that does so, if it fails now.
        """
        run = None if self.parent.is_given_up else self._run_of(record)
        entry = self._log_best_model(run, record, data, trials) if run else None
        if register and (run is None or entry is None):
            self.warn(f"no model was registered as {register}; register it later: {later}")
        elif register and run and entry:
            run.patience_s = FINISH_TIMEOUT_S
            register_model(run, register, self.config.trial(record.values), data, entry, later, say)

    def _log_best_model(
        self, run: Run, record: TrialRecord, data: Dataset, trials: StoragePath
    ) -> dict[str, Any] | None:
        """The epoch that the model is of; None where it is not in MLflow, which was warned of."""
        try:
            found = _best_checkpoint(record, trials, self.config.metric)
            if found is None:
                self.warn(f"the checkpoint of the best trial, {record.number}, is gone: no model is logged to MLflow")
                return None
            checkpoint, entry = found
            known = self.store.client.get_run(run.run_id)
            if known.data.tags.get(EPOCH_TAG) == str(entry["epoch"]):
                return entry  # logged by an earlier session
            try:
                config = self.config.trial(record.values)
                logged = log_model(Tracker(self.store.uri, run), config, data, checkpoint, entry, checkpoint.parent)
            finally:  # MLflow ends a run a second time when it is given a model
                self.store.client.set_terminated(run.run_id, known.info.status, known.info.end_time)
        except Exception as error:  # whatever the storage or the server answers: the search is over
            self.warn(f"the model of the best trial did not reach MLflow: {self.store.reason(error)}")
            return None
        return entry if logged else None

    def _run_of(self, record: TrialRecord) -> Run | None:
        """A trial's run, if it has one that is still there."""
        try:
            if not record.run_id or not self.store.exists(record.run_id):
                return None
        except Exception as error:  # whatever a server answers that is away
            self.warn(f"MLflow does not answer about trial {record.number}: {self.store.reason(error)}")
            return None
        run = Run(self.store, self.warn)
        run.run_id = record.run_id
        return run

    def _is_open(self, run: Run, record: TrialRecord) -> bool:
        try:
            return run.is_open
        except Exception as error:  # it was there a moment ago
            self.warn(f"MLflow does not answer about trial {record.number}: {self.store.reason(error)}")
            return False

    def _end_children(self, status: str) -> None:
        """End the runs of unfinished trials, in parallel: the server may be away."""
        for record in self.journal.trials.values():
            if record.ended:
                away = status != "FINISHED" or time.monotonic() < self._retry_at
                if not record.run_id and self.parent.run_id and not away:  # the server was, when it began
                    self.begin_trial(record)
                    self.end_trial(record)
                continue
            run = self._children.pop(record.number, None)
            if run is None and self.parent.run_id:
                run = self._run_of(record)
            if run is not None:
                why = "the search was stopped before the trial's end; it can resume"
                self._finish(run, record, "KILLED", why, hurry=True)
        deadline = time.monotonic() + (FINISH_TIMEOUT_S if status == "FINISHED" else HURRIED_TIMEOUT_S)
        for end in self._endings:
            end.join(max(0.0, deadline - time.monotonic()))

    def _note_of(self, record: TrialRecord, how: str) -> str:
        """A trial's description."""
        return trial_note(self.config, record, how, self.name, self.about.data, self.about.num_val, self.about.trials)

    def _finish(self, run: Run, record: TrialRecord, status: str, error: str | None, *, hurry: bool) -> None:
        how = how_it_ended(record.status if record.ended else status, error, record.epoch)
        run.note = self._note_of(record, how)
        end = threading.Thread(target=run.finish, args=(status, error), kwargs={"hurry": hurry}, daemon=True)
        end.start()
        self._endings.append(end)

    def _log_outcome(self, result: dict[str, Any], pictures: dict[str, Any], best: TrainConfig | None) -> None:
        for name, figure in pictures.items():
            self.parent.log_picture(figure, name)
        if best is None:
            return
        self.parent.log_text(best.to_yaml(), BEST_YAML)
        self.parent.tag(command=result.get("command", ""), best_trial=str(result["best"]),
                        against_the_paper=str(result["against_the_paper"]))  # fmt: skip
        for record in self.journal.trials.values():
            is_best = record.number == result["best"]
            if (is_best or self.resume) and (run := self._run_of(record)):  # another may have been, before
                run.tag(best="true" if is_best else "false")


def _best_checkpoint(
    record: TrialRecord, trials: StoragePath, metric: str
) -> tuple[StoragePath, dict[str, Any]] | None:
    """The checkpoint of a trial's best epoch, or else of the best of those that are there, and that epoch. Ray Train
    keeps the one of the lowest top-1 error, which need not be the best by another metric, and the last."""
    since = record.start["epoch"] if record.start else 0  # what came before was trained with other settings
    history = [entry for entry in record.history if entry["epoch"] > since] or record.history
    for entry in sorted(history, key=lambda entry: (entry[metric], entry["val/loss"])):
        for folder in (record.folder, *reversed(record.earlier_folders)):
            checkpoint = trials / folder / checkpoint_name(entry["epoch"])
            if (checkpoint / WEIGHTS).size() is not None:
                return checkpoint, entry
    return None
