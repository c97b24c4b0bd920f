"""A training job from its settings to its result: the data checked, the run tracked and shown, the result written."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from alexnet import pictures
from orchestrator.base import logs
from orchestrator.base.environment import command
from orchestrator.base.exits import Interrupted, JobError, last_line, name_and_line, signals_deferred
from orchestrator.base.redaction import redact, redact_all
from orchestrator.base.shown import LONGEST_VALUE, count_of, quoted, shown
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.cluster.capacity import check_machine, cost_so_far, wait_for_nodes
from orchestrator.cluster.connection import connect
from orchestrator.cluster.join import join
from orchestrator.cluster.layout_choice import worker_counts
from orchestrator.cluster.prices import Meter
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.tracking.store import tracking_uri_of
from orchestrator.tracking.training_run import Tracker
from orchestrator.train import checkpoints, profile_trace
from orchestrator.train.classes import ClassErrors, warn_if_unequal
from orchestrator.train.messages import (
    EpochEnded,
    Event,
    Finished,
    Logged,
    Metrics,
    Note,
    Profiled,
    Started,
    Step,
    Stopped,
    Warned,
)
from orchestrator.train.model_card import data_line, how_it_ended, run_note
from orchestrator.train.model_log import log_model, register_model
from orchestrator.train.overfitting import overfitting_warning
from orchestrator.train.pretrained import Pretrained, said_of_start
from orchestrator.train.record import RECORD
from orchestrator.train.run_folder import CONFIG, RESULT, RUN_LOG, RunFolder, check_identity
from orchestrator.train.run_lock import RunLock
from orchestrator.train.stored import recorded_settings
from orchestrator.train.training import Training
from orchestrator.train.view import SHOWN, TrainView, results

MUTABLE_ON_RESUME = (
    "epochs",
    "workers",
    "layout",
    "device",
    "precision",
    "threads",
    "spread",
    "data",
    "max_failures",
    "keep_every",
    "accumulate",
    "augment_on",
)

log = logging.getLogger(__name__)


def settings_of(run: RunFolder) -> TrainConfig:
    """The settings of a run that is to be resumed: those of its config.yaml, which must be what its newest checkpoint
    was made with, but for what may change. Raises ValueError of one line."""
    written, config = run.settings(CONFIG, "run"), run.config()
    if (found := recorded_settings(run)) is None:
        return config
    name, recorded = found
    where, has = run.path / CONFIG, config.model_dump(mode="json")
    hint = f"the settings that {name} was made with are in its {RECORD}"
    for field, value in recorded.items():
        if field not in written:
            raise ValueError(f"{where}: damaged: has no {shown(field, LONGEST_VALUE)}; restore it: {hint}")
        if field in has and field not in MUTABLE_ON_RESUME and has[field] != value:
            raise ValueError(
                f"{where}: {field} is {quoted(has[field])}, and was {quoted(value)}: it cannot change when a run is "
                f"resumed; restore it: {hint}"
            )
    return config


def resumed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The settings of a resumed run. Raises ValueError for a change that would contradict its checkpoint."""
    wrong = [
        name for name, value in changes.items() if name not in MUTABLE_ON_RESUME and value != getattr(config, name)
    ]
    if wrong:
        flag = wrong[0].replace("_", "-")
        allowed = ", ".join("--" + name.replace("_", "-") for name in MUTABLE_ON_RESUME)
        raise ValueError(f"--{flag}: cannot change when a run is resumed, only {allowed} can; start a new run instead")
    return config.changed(**changes)


def best_of(history: Sequence[Metrics]) -> Metrics:
    """The entry with the lowest error; the last of equal ones, as Ray Train keeps the last of equal checkpoints."""
    return min(reversed(history), key=lambda entry: entry["val/top1_error"])


def nothing_left(run: RunFolder, config: TrainConfig) -> list[str]:
    """What to say of a run that is resumed although it has finished all its epochs; empty if there is more to train."""
    result = run.result()
    done = len(result.get("history") or ())
    if result.get("status") != "FINISHED" or done != config.epochs or not all(result.get(name) for name in SHOWN):
        return []
    resume = f"{command('train')}{run.flag} --resume {run.name}"
    uri, _ = tracking_uri_of(result["mlflow_tracking_uri"])
    return [
        f"run {run.name} has trained all of its {count_of(done, 'epoch')}, so nothing is left to do; "
        f"to train more: {resume} --epochs N, with N above {done}",
        "",
        *results(result, run, uri),
    ]


class Session:
    """One run of jobs/train.py. What the user can get wrong is checked when it is made.

    register: the name under which its best model is registered in MLflow. profile: steps to record; 0: none. Raises
    ValueError of one line for wrong settings, DamagedData for shards that do not match their manifest.
    """

    register: str | None = None
    profile: int = 0

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        *,
        resume: bool,
        recipe: str | None,
        start: Pretrained | None = None,
        register: str | None = None,
        profile: int = 0,
    ) -> None:
        self.run, self.config, self.resume, self.recipe, self.register = run, config, resume, recipe, register
        self.profile, self.profiles = profile, profile_trace.Collector()
        self.view = TrainView()
        join(run.output)
        self.data = Dataset(config, run.output)
        worker_counts(config)  # raises if no number of workers will do
        check_machine(config)
        if run.exists() and not resume:
            run.create(config)  # raises: the name is taken
        before = run.result() if resume else {}
        if not self.data.to_prepare:
            check_identity(before, self.data.manifest, self.data.folder)
        uri, self.told = tracking_uri_of(before.get("mlflow_tracking_uri"))
        self.tracker = Tracker(uri)
        if not resume:
            run.make()
            if start is not None:
                try:
                    start.store(run.path)
                except BaseException:
                    run.path.remove()  # or neither --name nor --resume would take the name
                    raise
            run.change(config)  # last: what has no config is not resumed, and so never without what it starts from
        self.start = start
        self.lock = RunLock(run)
        self.result = self.run.result()
        done = len(self.result.get("history") or ())
        if config.epochs < done:
            self.lock.release()
            raise ValueError(f"epochs = {config.epochs}: the run has completed {done}; set --epochs {done} or more")
        if why := logs.open_run_log(run.path / RUN_LOG):
            self.view.event(Warned(text=f"this run has no log: {why}"))
        log.info("run %s, %s: %s", run.name, "resumed" if resume else "new", config.model_dump())
        self.started, self.elapsed_before_s = time.monotonic(), self.result.get("elapsed_s") or 0.0
        self.under_way = False

    def train(self) -> None:
        """Train to the end. Raises JobError or Interrupted; the MLflow run and the result are then FAILED or KILLED."""
        try:
            self._train()
        finally:
            logs.close_run_log()  # before another process may open it
            self.lock.release()

    def _train(self) -> None:
        try:
            self._begin().follow(self.on_event)
            self._warn_if_not_profiled(
                f"this session made no more than its first {count_of(profile_trace.WARM_UP_STEPS, 'step')}"
            )
            self._log_outcome()
        except Interrupted as stop:
            log.info("stopped by %s", stop)
            self._warn_if_not_profiled("this session was stopped before its steps were made")
            self._end("KILLED", f"stopped by {stop}")
            self.view.line.print(f"stopped; resume with: {self._command()}")
            stop.said = True
            raise
        except BaseException as error:
            log.info("the run failed", exc_info=True)  # one line of it is for the terminal
            self._end("FAILED", str(error) if isinstance(error, JobError) else name_and_line(error))
            raise
        self._end("FINISHED")
        self.view.line.print("", *results(self.result, self.run, self.tracker.run.store.uri))
        sys.stdout.flush()

    def _begin(self) -> Training:
        """Ray, the bundled data if it is asked for, the workers, the MLflow run, the first result."""
        say = self.view.line.print
        connect()
        self.meter = Meter(self.result.get("cost_usd") or 0.0)
        wait_for_nodes(self.config, 1, self.run.output, say)
        self.data.prepare(self.config, say)
        manifest = self.data.manifest
        workers = f"{self.config.workers} worker{'' if self.config.workers == 1 else 's'}"
        say(
            f"run {self.run.name}: {shown(manifest.source, LONGEST_VALUE)}, {len(manifest.classes)} classes, "
            f"{manifest.rows['train']} train and {manifest.rows['val']} val images; "
            f"{workers}, global batch {self.config.global_batch_size}"
            + (f" in {self.config.accumulate} parts" if self.config.accumulate > 1 else "")
        )
        if text := warn_if_unequal(self.config, manifest):
            say(text)
        self.class_errors = ClassErrors(manifest, self.result)
        if self.told:
            say(self.told)
        if not self.resume and (text := said_of_start(self.start, self.config, manifest)):
            say(text)
        self.result |= {} if self.start is None else {"started_from": self.start.text}
        new_data = check_identity(self.result, manifest, self.data.folder)
        if new_data:
            say(new_data)
        # the workers start while MLflow does; if that fails, they end with Ray
        with signals_deferred():
            classes = self.data.num_classes(self.config)
            training = Training(self.config, self.data.folder, self.run, classes, profile=self.profile)
        self.tracker.start(
            self.run.name,
            self.config,
            manifest,
            self.data.folder,
            run_id=self.result.get("mlflow_run_id"),
            new_data=self.resume and self.result.get("digest") != manifest.digest,
            note=self._note("running"),
            warn=lambda text: self.view.event(Warned(text=text)),
        )
        log.info("MLflow run %s at %s", self.tracker.run.run_id, redact(self.tracker.run.store.uri))
        self.result |= {
            "name": self.run.name,
            "status": "RUNNING",
            "recipe": self.recipe or self.result.get("recipe"),
            "config": self.config.model_dump(),
            "mlflow_run_id": self.tracker.run.run_id,
            "mlflow_tracking_uri": redact(self.tracker.run.store.uri),
            "classes": list(manifest.classes),
            "digest": manifest.digest,
        }
        self.run.write_result(self.result)
        return training

    def on_event(self, event: Event) -> None:
        """Track an event, show it, and write what is new in the result."""
        if isinstance(event, Logged):
            logs.record(event.rank, event.level, event.name, event.text, event.at)
            return
        usd = self._cost()
        match event:
            case Started():
                self._on_start(event)
            case Step() if event.log:
                self.tracker.run.log({"train/step_loss": event.loss}, step=event.total_step)
            case EpochEnded():
                log.info("epoch %d of %d: %s", event.metrics["epoch"], event.epochs, event.metrics)
                self.tracker.run.log_epoch(event.metrics, {} if usd is None else {"cost/usd": usd})
                self.class_errors.add(event.metrics["epoch"], event.wrong)
                self._keep(event.history)
            case Stopped():
                where = f"{count_of(event.epoch, 'epoch')} and {count_of(event.step, 'step')}"
                self.view.event(Note(text=f"a checkpoint was saved after {where}"))
            case Profiled():
                self._on_profile(event)
            case Finished():
                self._on_finish(event)
        self.view.event(event)
        if isinstance(event, EpochEnded):
            text = overfitting_warning(event.history, self.config, self.data.manifest.rows)
            if text is not None:
                log.info("%s", text)
                self.view.event(Warned(text=text))

    def _cost(self) -> float | None:
        """Dollars so far, kept for the result."""
        usd = cost_so_far(self.meter)
        if usd is not None:
            self.result["cost_usd"] = round(usd, 4)
        return usd

    def _keep(self, history: Sequence[Metrics]) -> None:
        """Write what is known after each epoch into the result."""
        self.result |= {
            "metrics": history[-1],
            "best": best_of(history),
            "history": list(history),
            "images_per_s": history[-1]["train/images_per_s"],
        }
        self._keep_classes()
        self._keep_time()
        self.run.write_result(self.result)

    def _keep_time(self) -> None:
        """The time of this session, and of the whole run."""
        session_s = time.monotonic() - self.started
        self.result |= {"elapsed_s": self.elapsed_before_s + session_s, "session_s": session_s}

    def _keep_classes(self) -> None:
        last, best = self.result["metrics"]["epoch"], self.result["best"]["epoch"]
        self.result["per_class"] = self.class_errors.table(last, best)

    def _on_start(self, event: Started) -> None:
        first = not self.under_way
        if first:
            self.result["startup_s"] = time.monotonic() - self.started
        if event.history:  # the checkpoint may be ahead of what a killed driver had written, or sent
            self._keep(event.history)
            if self.resume and first:
                self.tracker.run.complete(list(event.history), "val/loss")
        if self.resume and first:
            self.run.change(self.config)  # now that it is known to train
        self.under_way = True
        text = f"training on {event.device} in {event.precision}, {count_of(event.workers, 'worker')}"
        where = f"epoch {event.epoch}" + (f" and {count_of(event.step, 'step')}" if event.step else "")
        if event.lost:
            text = f"a worker was lost; resuming from the last checkpoint, after {where}"
        elif event.epoch or event.step:
            text += f", resumed after {where}"
        log.info("%s; nodes of the workers: %s", text, ", ".join(event.nodes))
        self.view.event(Note(text=text))

    def _on_finish(self, event: Finished) -> None:
        self.result |= {"checkpoint": event.checkpoint, "best_checkpoint": event.best_checkpoint}
        log.info("checkpoint %s, best checkpoint %s", event.checkpoint, event.best_checkpoint)
        for entry in self.result.get("history", []):  # an entry may be another run's, without a checkpoint here
            if event.best_checkpoint == str(self.run.path / checkpoints.checkpoint_name(entry["epoch"])):
                self.result["best"] = entry
                self._keep_classes()

    def _warn_if_not_profiled(self, why: str) -> None:
        if self.profile and not self.profiles.is_done:
            self._warn(f"--profile {self.profile}: no profile, since {why}")

    def _on_profile(self, event: Profiled) -> None:
        """Write the trace and its summary once all workers' parts are there; show it the first time."""
        parts = self.profiles.add(event)
        if parts is None:
            return
        found = profile_trace.summary(parts)
        files = {
            profile_trace.TRACE: profile_trace.trace(parts),
            profile_trace.SUMMARY: (json.dumps(found, indent=1) + "\n").encode(),
        }
        folder = self.run.path / profile_trace.FOLDER
        try:
            for name, data in files.items():
                (folder / name).write(data)
        except (OSError, StorageError) as error:  # a full disk, say: the training goes on
            self._warn(f"the profile could not be stored: {last_line(error)}")
            return
        self.tracker.run.log_files(files, profile_trace.FOLDER)
        if not self.profiles.is_whole:
            lines = profile_trace.lines(found)
            self.view.line.print(*lines, f"the trace, for ui.perfetto.dev: {folder / profile_trace.TRACE}")

    def _log_outcome(self) -> None:
        """The learning curves, and the best model, to the run's folder and MLflow."""
        history = self.result.get("history")
        if not history:
            return
        figure = pictures.learning_curves(history, self.run.name)
        self.run.write_picture("learning_curves.png", figure, dpi=120)
        self.tracker.run.log_picture(figure, "learning_curves.png")
        if not self.result["best_checkpoint"]:
            self.view.event(Warned(text="the best epoch's checkpoint is not stored: no model is logged to MLflow"))
            return
        best = StoragePath.of(self.result["best_checkpoint"])
        entry = self.result["best"]
        run, again = self.tracker.run, f"{self._command()} --register {self.register or 'NAME'}"
        try:
            logged = log_model(self.tracker, self.config, self.data, best, entry, self.run.path)
        except (OSError, StorageError) as error:  # a full disk, say: the training is done
            self._warn(f"the model could not be stored ({last_line(error)}); its checkpoint is kept")
            logged = False
        if logged and self.register:
            register_model(run, self.register, self.config, self.data, entry, again, self.view.line.print)
        elif not logged:
            what = f"no model was registered as {self.register}" if self.register else "MLflow has no model of this run"
            self._warn(f"{what}; store and register it later: {again}")

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        self.view.event(Warned(text=text))

    def _command(self) -> str:
        """That resumes the run."""
        return f"{command('train')}{self.run.flag} --resume {self.run.name}"

    def _note(self, how: str) -> str:
        """The run's description in MLflow."""
        manifest = self.data.manifest
        return run_note(
            self.config, data_line(manifest), self.run.path, how, manifest.rows["val"], self.result.get("best")
        )

    def _end(self, status: str, error: str | None = None) -> None:
        error = redact_all(error) if error else None
        self.result |= {"status": status, "error": error}
        self._keep_time()
        try:
            if self.tracker.run.run_id:
                self.tracker.run.note = self._note(how_it_ended(status, error, len(self.result.get("history") or ())))
            if status != "FINISHED":
                self.result["checkpoint"] = self.run.latest_checkpoint()
            self.run.write_result(self.result)
            log.info("%s: %s", status, self.run.path / RESULT)
        finally:  # storage may be what failed
            self.tracker.finish(status, error)
