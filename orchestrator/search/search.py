"""A search from its settings to its outcome: Ray Tune over training runs, all of it in a journal.

Ray Tune runs the trials, applies its schedulers and holds the resources. Which trials there are, how they ended, and
what happens after an interruption is decided here, from the journal alone.
"""

import contextlib
import enum
import logging
import math
import os
import shlex
import signal
import sys
import time
from types import FrameType
from typing import Any

from orchestrator.base import logs
from orchestrator.base.environment import command, command_line
from orchestrator.base.exits import Interrupted, JobError, catch_signals, name_and_line, signals_deferred
from orchestrator.base.redaction import redact, redact_all
from orchestrator.base.shown import count_of
from orchestrator.cluster.capacity import check_machine, cost_so_far, wait_for_nodes
from orchestrator.cluster.connection import connect
from orchestrator.cluster.join import join
from orchestrator.cluster.nodes import alive, uses_gpu
from orchestrator.cluster.placement import OVERSEER_CPUS, room_for, threads_for
from orchestrator.cluster.prices import Meter
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.search.analysis import as_result
from orchestrator.search.config import SearchConfig
from orchestrator.search.entries import CostSoFar, WorkersStarted
from orchestrator.search.folder import BEST_YAML, TRIALS, TUNES_OWN, SearchFolder
from orchestrator.search.forecast import check_all, check_plans
from orchestrator.search.journal import JOURNAL, Journal, TrialRecord
from orchestrator.search.mlflow_runs import About, SearchRuns
from orchestrator.search.plots import all_pictures
from orchestrator.search.report import summary
from orchestrator.search.retention import Retention
from orchestrator.search.view import SearchView
from orchestrator.tracking.store import Store, tracking_uri_of
from orchestrator.train.mailbox import SAVE
from orchestrator.train.messages import Logged, PlacementGroupMade, TrialEvent, TrialPayload, TrialStarted
from orchestrator.train.model_card import data_line
from orchestrator.train.run_folder import KEPT, RUN_LOG, check_identity
from orchestrator.train.run_lock import RunLock

log = logging.getLogger(__name__)

RETRIES = 2  # of a trial whose own process died
DRAIN_EVERY_S = 0.5
SETTLED_S = 120.0  # after its end a trial's workers may still be putting a checkpoint away
TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of its own state: the journal has it
    "TUNE_FORCE_TRIAL_CLEANUP_S": "120",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints even when told not to
}


class StopReason(enum.Enum):
    """Why a search ends before all its trials do."""

    TIME_BUDGET = None
    INTERRUPTED = signal.SIGINT
    TERMINATED = signal.SIGTERM

    @property
    def signum(self) -> signal.Signals | None:
        found: signal.Signals | None = self.value
        return found

    @staticmethod
    def of(signum: int) -> "StopReason":
        return StopReason.INTERRUPTED if signum == signal.SIGINT else StopReason.TERMINATED


class Search:
    """One search of jobs/tune.py. The constructor finds what the user may have got wrong."""

    def __init__(
        self, folder: SearchFolder, config: SearchConfig, *, resume: bool, register: str | None = None
    ) -> None:
        """register: the name under which the best model is registered in MLflow. Raises ValueError of one line, or
        DamagedData."""
        self.folder, self.config, self.resume, self.register = folder, config, resume, register
        join(folder.output)
        self.data = Dataset(config.train, folder.output)
        check_all(config, self.data)
        check_machine(config.most_workers)
        if folder.exists() and not resume:
            folder.create_search(config)  # says why not
        before = folder.result() if resume else {}
        if not self.data.to_prepare:
            check_identity(before, self.data.manifest, self.data.folder)
        self.classes, self.digest = before.get("classes"), before.get("digest")  # of the data it was begun with
        uri, self.told = tracking_uri_of(before.get("mlflow_tracking_uri"))
        self.store = Store(uri)
        if not resume:
            folder.create_search(config)
        self.lock = RunLock(folder)
        self.journal = Journal(folder.path / JOURNAL)
        if resume and not self.journal.trials and (folder.path / TRIALS).children():
            raise ValueError(
                f"--resume {folder.name}: {folder.path / JOURNAL} has no trials, though {TRIALS}/ has; restore it, or "
                "start a new search"
            )
        self.retention = Retention(config, self.journal, folder.path / TRIALS)
        if resume:
            folder.change_search(config)
        self.view = SearchView(config, self.journal)
        if why := logs.open_run_log(folder.path / RUN_LOG):
            self._warn(f"this search has no log: {why}")
        self.runs = SearchRuns(self.store, config, self.journal, folder.name, resume=resume, warn=self._warn)
        self.placement_groups: dict[int, str] = {}  # of the trials' workers, in hexadecimal
        self.stop: StopReason | None = None  # why the search is to end before all its trials do
        self.deadline = math.inf
        self._told, self._drained = False, 0.0
        self.usd = self.journal.usd  # so far, of all nodes
        self.meter = Meter(self.usd or 0.0)
        self._ended_at: dict[int, float] = {}

    def run(self) -> None:
        """Search to the end. Raises JobError or Interrupted; MLflow runs and result are then FAILED or KILLED."""
        try:
            self._search()
        except Interrupted as stop:  # before or after the trials
            self._wrap_up("KILLED", f"stopped by {stop}")
            self.view.say(f"stopped; resume with: {self._command()}")
            stop.said = True
            raise
        except BaseException as error:
            log.info("the search failed", exc_info=True)  # one line of it is for the terminal
            text = str(error) if isinstance(error, JobError) else name_and_line(error)
            self._wrap_up("FAILED", text)
            raise
        finally:
            try:
                self.journal.close()
            finally:
                logs.close_run_log()  # before another process may open it
                self.lock.release()
        if self.stop is not None and self.stop.signum is not None:
            raise Interrupted(self.stop.signum, said=True)

    def _search(self) -> None:
        """Ray, the data, the MLflow runs, the trials, and their outcome."""
        connect()
        import ray

        begun = [record for record in self.journal.trials.values() if not record.ended]
        left = len(begun) + max(0, self.config.num_trials - len(self.journal.trials))
        wanted = min(left, self.config.max_concurrent or left)
        wait_for_nodes(self.config.most_workers, wanted, self.folder.output, self.view.say)
        self.deadline = time.monotonic() + (self.config.time_budget_s or math.inf)
        self.data.prepare(self.config.train, self.view.say)
        with signals_deferred():
            nodes = alive(ray.nodes())
            at_once = room_for(self.config.most_workers, nodes, max(1, left), self.config.max_concurrent)
            if left:
                check_plans(self.config, self.data, nodes, at_once)
            threads = threads_for(self.config.most_workers, nodes, at_once, os.cpu_count() or 1)
        if self.config.scheduler == "pbt" and at_once < left:
            raise JobError(
                f"scheduler = pbt: trains all its trials in parallel, and there is room for {at_once} of {left}; "
                f"choose --num-samples {at_once}, or --max-concurrent {left} to share the CPUs"
            )
        if self.config.train.threads is None:  # what the trials' numbers depend on is kept with them
            self.config = self.config.model_copy(update={"train": self.config.train.changed(threads=threads)})
            self.folder.change_search(self.config)
        self.view.config = self.config
        manifest, train = self.data.manifest, self.config.train
        new_data = check_identity({"classes": self.classes, "digest": self.digest}, manifest, self.data.folder)
        for line in filter(None, (self.told, new_data)):
            self.view.say(line)
        began = command_line("tune") if not self.resume else self._command()
        about = About(redact_all(began), data_line(manifest), manifest.rows["val"], self.folder.path / TRIALS)
        self.runs.begin(self.config, digest=manifest.digest if new_data else None, about=about)
        self.classes, self.digest = list(manifest.classes), manifest.digest
        self.folder.write_result(self._outcome("RUNNING", None))  # for a --resume after this process was killed
        each = f"{count_of(train.worker_range[1], 'worker')} of {count_of(train.threads or 1, 'thread')} each"
        self.view.say(
            f"search {self.folder.name}: {left} of {count_of(self.config.num_trials, 'trial')} of "
            f"{count_of(train.epochs, 'epoch')} to go, {at_once} at a time, {each}; {self.config.searcher}, "
            f"{self.config.scheduler}; {manifest.source}, {manifest.rows['train']} train and "
            f"{manifest.rows['val']} val images"
        )
        if not left:
            can_grow = self.config.searcher != "grid" or self.config.left_out
            more = "; --num-samples N adds more" if can_grow else ""
            ended = count_of(len(self.journal.trials), "trial")
            self.view.say(f"nothing is left to do: all of its {ended} have ended{more}")
        if self.config.left_out:
            self._warn(self.config.left_out)
        if left:
            self._tune(at_once)
        unfinished = [record for record in self.journal.trials.values() if not record.ended]
        errors = [record.error for record in self.journal.trials.values() if record.status == "FAILED"]
        if self.stop is None and len(errors) == len(self.journal.trials):
            raise JobError(f"every trial failed; trial 0: {errors[0]}" if errors else "no trial was begun")
        if self.stop is not None and self.stop.signum is not None:
            self._wrap_up("KILLED", f"stopped by {self.stop.signum.name}")
        else:
            self._wrap_up("FINISHED")
        if self.stop is not None:
            why = "the time budget is used up" if self.stop is StopReason.TIME_BUDGET else "stopped"
            saved = f"{count_of(len(unfinished), 'trial')} {'has' if len(unfinished) == 1 else 'have'}"
            self.view.say(f"{why}; {saved} saved checkpoints; resume with: {self._command()}")

    def _tune(self, at_once: int) -> None:
        """Hand the trials to Ray Tune and wait until the last one ends."""
        os.environ |= TUNE_ENV | {"TUNE_MAX_PENDING_TRIALS_PG": str(at_once)}
        from ray import tune

        from orchestrator.search.proposals import Proposals
        from orchestrator.search.schedulers import JournaledScheduler, TuneCallback
        from orchestrator.search.trial import Trial
        from orchestrator.train.training import make_mailbox

        logs.keep_off_terminal("ray.tune", "ray.tune.tune")  # a trial that failed is reported at its end
        trials = self.folder.path / TRIALS
        (self.folder.path / TUNES_OWN).remove()
        storage, folder = self.folder.path.opened()
        with signals_deferred():
            self.mailbox = make_mailbox()
            self.proposals = Proposals(self.config, self.journal, at_once)
            self.scheduler = JournaledScheduler(self.config, self.journal, trials, self)
            payload = TrialPayload(
                train=self._pinned().model_dump(),
                data=self.data.folder.text,
                output=str(trials),
                num_classes=self.data.num_classes(self.config.train),
                num_concurrent=at_once,
                mailbox=self.mailbox,
                keep_every=self.config.grace_epochs if self.config.scheduler == "pbt" else None,
            )
            trainable = tune.with_resources(tune.with_parameters(Trial, payload=payload), {"CPU": OVERSEER_CPUS})
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=self.proposals, scheduler=self.scheduler, num_samples=self.config.num_trials,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=TUNES_OWN, storage_path=folder, storage_filesystem=storage, verbose=0,
                    callbacks=[TuneCallback(self.scheduler, self, self.proposals.requeue)],
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            )  # fmt: skip
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            tuner.fit()
        finally:
            catch_signals()
            with contextlib.suppress(Exception):  # Ray itself may be gone
                self._drain()  # what the trials said last
            self._keep_the_best(ended_before=time.monotonic())
            if all(record.ended for record in self.journal.trials.values()):
                (trials / KEPT).remove()
            (self.folder.path / TUNES_OWN).remove()

    def _pinned(self) -> TrainConfig:
        """The trials' common settings with the device fixed: a process that restarts while no GPU node is alive would
        take `auto` for the CPU."""
        import ray

        on_gpu = uses_gpu(self.config.train.device, ray.cluster_resources().get("GPU", 0))
        return self.config.train.changed(device="gpu" if on_gpu else "cpu")

    # what the scheduler and Ray Tune report

    def on_begin(self, record: TrialRecord) -> None:
        log.info("trial %d begins: %s", record.number, record.values)
        self.view.begun(record)
        self.runs.begin_trial(record)

    def on_epoch(self, record: TrialRecord, metrics: dict[str, Any]) -> None:
        if self.usd is not None:
            self.journal.write(CostSoFar(usd=round(self.usd, 4)))
        self.retention.drop_kept()
        self.runs.log_epoch(record, metrics, self.usd)

    def on_exploit(self, record: TrialRecord, donor: int) -> None:
        self.view.exploited(record, donor)
        self.runs.tag_exploit(record, donor)

    def on_end(self, record: TrialRecord) -> None:
        self.view.ended(record)
        self.runs.end_trial(record)
        self._ended_at[record.number] = time.monotonic()
        self._keep_the_best(ended_before=time.monotonic() - SETTLED_S)

    def on_process_lost(self, number: int) -> None:
        """A trial's process died, and its workers with it; their placement group would stay reserved."""
        from ray import PlacementGroupID
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        if group := self.placement_groups.pop(number, None):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))

    def on_turn(self) -> None:
        """Called ten times a second in Ray Tune's loop."""
        now = time.monotonic()
        if self.stop is None and now > self.deadline:
            self.stop = StopReason.TIME_BUDGET
        if self.stop is not None and not self._told:
            self._told = True
            self.view.say("stopping: the trials save their checkpoints (press Ctrl-C again to quit at once)")
            self.proposals.close()
            from orchestrator.search.trial import SEARCH

            self.mailbox.ask_to_stop.remote(SEARCH, SAVE)
        if now - self._drained >= DRAIN_EVERY_S:
            self._drained = now
            self._drain()
            usd = cost_so_far(self.meter)
            self.usd = self.usd if usd is None else usd
            self.view.refresh()

    def _drain(self) -> None:
        import ray

        from orchestrator.search.trial import SEARCH

        found: list[TrialEvent] = ray.get(self.mailbox.drain.remote(SEARCH))
        for trial_event in found:
            number, event = trial_event.number, trial_event.event
            if isinstance(event, Logged):
                logs.record(event.rank, event.level, event.name, event.text, event.at, trial=number)
            elif isinstance(event, PlacementGroupMade):
                self.placement_groups[number] = event.id
            else:
                self.view.event(number, event)
                if isinstance(event, TrialStarted) and not self.journal.trials[number].ended:
                    self.journal.write(WorkersStarted(number=number, after_s=round(event.after_s, 3)))

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Only take a note: Ray may be in the middle of something."""
        self.stop = StopReason.of(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second Ctrl-C ends at once

    def _wrap_up(self, status: str, error: str | None = None) -> None:
        """Write result, pictures and the best settings, and end every MLflow run."""
        error = redact_all(error) if error else None
        result = self._outcome(status, error)
        pictures, best = {}, None
        try:
            if result["best"] is not None:
                pictures, best = all_pictures(self.config, self.journal), self.best_settings()
                for name, figure in pictures.items():
                    self.folder.write_picture(name, figure, dpi=110)
                self.folder.write(BEST_YAML, best.to_yaml())
                result["command"] = f"{command('train')} --config {shlex.quote(str(self.folder.path / BEST_YAML))}"
            self.folder.write_result(result)
        finally:  # storage may be what failed
            self.runs.end(status, error, result, pictures, best)
        if status == "FINISHED" and result["best"] is not None:
            self.runs.log_best_model(
                self.journal.trials[result["best"]], self.data, self.folder.path / TRIALS, self.register,
                f"{self._command()} --register {self.register}", self.view.say,
            )  # fmt: skip
        if result["best"] is not None:
            lines = summary(result, self.config, self.journal, self.folder, list(pictures), self.store.uri)
            self.view.say("", *self.view.findings(self.data.rows["val"]), "", *lines.splitlines())
            sys.stdout.flush()

    def _outcome(self, status: str, error: str | None) -> dict[str, Any]:
        """result.json so far."""
        result = as_result(self.config, self.journal, self.data.rows["val"])
        result |= {"name": self.folder.name, "status": status, "error": error}
        result |= {"mlflow_run_id": self.runs.parent.run_id, "mlflow_tracking_uri": redact(self.store.uri)}
        result |= {"classes": self.classes, "digest": self.digest}
        result |= {} if self.usd is None else {"cost_usd": round(self.usd, 4)}
        return result

    def best_settings(self) -> TrainConfig:
        """All settings of the best trial: `jobs/train.py --config` reproduces its results."""
        return self.config.trial(self.journal.ranked(self.config.metric)[0].values)

    def _keep_the_best(self, ended_before: float) -> None:
        records = self.journal.trials.values()
        at_rest = {r.number for r in records if r.ended and self._ended_at.get(r.number, 0.0) <= ended_before}
        self.retention.keep_the_best(at_rest)

    def _command(self) -> str:
        return f"{command('tune')}{self.folder.flag} --resume {self.folder.name}"

    def _warn(self, text: str) -> None:
        self.view.say(f"warning: {text}")
