"""A search from its settings to what it learned: Ray Tune over training runs, all of it in a journal.

Ray Tune runs the trials, chooses with its schedulers and holds the resources; which trials there are, what came of them
and what follows after an interruption is decided here, from the journal alone.
"""

import contextlib
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from orchestrator.base.environment import command
from orchestrator.base.exits import Interrupted, JobError, catch_signals, signals_deferred
from orchestrator.base.terminal import duration, table
from orchestrator.cluster.capacity import cost_so_far, wait_for_nodes
from orchestrator.cluster.connection import connect
from orchestrator.cluster.join import join
from orchestrator.cluster.nodes import Node, alive, uses_gpu
from orchestrator.cluster.placement import OVERSEER_CPUS, make_plan, room_for, threads_for
from orchestrator.cluster.prices import Meter
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.search.analysis import as_result
from orchestrator.search.config import SearchConfig
from orchestrator.search.entries import CostSoFar, RunBegun, SearchBegun, WorkersStarted
from orchestrator.search.folder import BEST_YAML, SEARCH_YAML, TRIALS, TUNES_OWN, SearchFolder
from orchestrator.search.forecast import check_all
from orchestrator.search.journal import JOURNAL, Journal, TrialRecord
from orchestrator.search.mlflow_runs import MLFLOW_PAUSE_S, MLFLOW_STATUS
from orchestrator.search.plots import all_pictures
from orchestrator.search.retention import Retention
from orchestrator.search.view import SearchView
from orchestrator.tracking.run import FINISH_TIMEOUT_S, HURRIED_TIMEOUT_S, Run
from orchestrator.tracking.store import Store, redact, tracking_uri, ui_command
from orchestrator.train.mailbox import SAVE
from orchestrator.train.run_folder import KEPT
from orchestrator.train.run_lock import RunLock

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


class Search:
    """One search of jobs/tune.py. What the user can have wrong is found when it is made."""

    def __init__(self, folder: SearchFolder, config: SearchConfig, *, resume: bool) -> None:
        """Raises ValueError of one line, or DamagedData."""
        self.folder, self.config, self.resume = folder, config, resume
        join(folder.output)
        self.data = Dataset(config.train, folder.output)
        check_all(config, self.data)
        if folder.exists() and not resume:
            folder.create_search(config)  # says why not
        self.store = Store(tracking_uri())
        if not resume:
            folder.create_search(config)
        self.claim = RunLock(folder)
        self.journal = Journal(folder.path / JOURNAL)
        self.retention = Retention(config, self.journal, folder.path / TRIALS)
        if resume:
            folder.change_search(config)
        self.view = SearchView(config, self.journal)
        self.parent = Run(self.store, self._warn)
        self.children: dict[int, Run] = {}
        self.placement_groups: dict[int, str] = {}  # placement groups of the trials' workers
        self.stop: int | str | None = None  # a signal's number, or why else the search is to end
        self.deadline = math.inf
        self._told, self._drained, self._try_mlflow_at = False, 0.0, 0.0
        self._endings: list[threading.Thread] = []  # of runs in MLflow
        self.usd = self.journal.usd  # so far, of all nodes
        self.meter = Meter(self.usd or 0.0)
        self._ended_at: dict[int, float] = {}

    def run(self) -> None:
        """Raises JobError or Interrupted; the MLflow runs and the result then say FAILED or KILLED."""
        try:
            self._search()
        except Interrupted as stop:  # before or after the trials
            self._wrap_up("KILLED", f"stopped by {stop}")
            self.view.say(f"stopped; go on with: {self._command()}")
            raise
        except BaseException as error:
            text = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
            self._wrap_up("FAILED", text)
            raise
        finally:
            self.journal.close()
            self.claim.release()
        if isinstance(self.stop, int):
            raise Interrupted(self.stop)

    def _search(self) -> None:
        """Ray, the data, the runs of MLflow, the trials, and what came of them."""
        connect()
        import ray

        begun = [record for record in self.journal.trials.values() if not record.ended]
        left = len(begun) + max(0, self.config.num_trials - len(self.journal.trials))
        wish = min(left, self.config.max_concurrent or left)
        wait_for_nodes(self.config.most_workers, wish, self.folder.output, self.view.say)
        self.deadline = time.monotonic() + (self.config.time_budget_s or math.inf)
        self.data.prepare(self.config.train, self.view.say)
        with signals_deferred():
            nodes = alive(ray.nodes())
            at_once = room_for(self.config.most_workers, nodes, max(1, left), self.config.max_concurrent)
            if left:
                self._check_plans(nodes, at_once)
            threads = threads_for(self.config.most_workers, nodes, at_once, os.cpu_count() or 1)
        if self.config.scheduler == "pbt" and at_once < left:
            raise JobError(
                f"scheduler = pbt: trains its trials side by side, and there is room for {at_once} of {left}; "
                f"choose --num-samples {at_once}, or --max-concurrent {left} to share the CPUs"
            )
        if self.config.train.threads is None:  # what the trials' numbers depend on is kept with them
            self.config = self.config.model_copy(update={"train": self.config.train.changed(threads=threads)})
            self.folder.change_search(self.config)
        self.view.config = self.config
        self._begin_parent()
        manifest, train = self.data.manifest, self.config.train
        self.view.say(
            f"search {self.folder.name}: {left} of {self.config.num_trials} trials of {train.epochs} epochs to go, "
            f"{at_once} at a time, {train.workers} worker(s) of {train.threads} thread(s) each; "
            f"{self.config.searcher}, {self.config.scheduler}; {manifest.source}, {manifest.rows['train']} train and "
            f"{manifest.rows['val']} val images"
        )
        if self.config.left_out:
            self._warn(self.config.left_out)
        if left:
            self._tune(at_once)
        unfinished = [record for record in self.journal.trials.values() if not record.ended]
        errors = [record.error for record in self.journal.trials.values() if record.status == "FAILED"]
        if self.stop is None and len(errors) == len(self.journal.trials):
            raise JobError(f"every trial failed; trial 0: {errors[0]}" if errors else "no trial was begun")
        if isinstance(self.stop, int):
            self._wrap_up("KILLED", f"stopped by {signal.Signals(self.stop).name}")
        else:
            self._wrap_up("FINISHED")
        if self.stop is not None:
            why = "the time budget is used up" if self.stop == "budget" else "stopped"
            self.view.say(f"{why}; {len(unfinished)} trial(s) have saved checkpoints; go on with: {self._command()}")

    def _check_plans(self, nodes: list[Node], at_once: int) -> None:
        """Raises JobError for trials that the cluster, as it is now, could never place."""
        varied = [d for d in self.config.space.dimensions if d.name in ("layout", "spread")]
        configs = [self.config.most_workers]
        for dimension in varied:
            configs = [config.changed(**{dimension.name: value}) for config in configs for value in dimension.values]
        for config in configs:
            with contextlib.suppress(ValueError):  # not a pair that a trial could have
                make_plan(config, nodes, self.data.num_classes(config), at_once)

    def _tune(self, at_once: int) -> None:
        """Hand the trials to Ray Tune, and stay until the last one ends."""
        os.environ |= TUNE_ENV | {"TUNE_MAX_PENDING_TRIALS_PG": str(at_once)}
        from ray import tune

        from orchestrator.search.proposals import Proposals
        from orchestrator.search.schedulers import JournaledScheduler, TuneCallback
        from orchestrator.search.trial import Trial
        from orchestrator.train.training import make_mailbox

        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # that trials failed, which is said at their end
        trials = self.folder.path / TRIALS
        (self.folder.path / TUNES_OWN).remove()
        storage, folder = self.folder.path.opened()
        with signals_deferred():
            self.mailbox = make_mailbox()
            self.proposals = Proposals(self.config, self.journal, at_once)
            self.judge = JournaledScheduler(self.config, self.journal, trials, self)
            common = {
                "train": self._pinned().model_dump(),
                "data": self.data.folder.text,
                "output": str(trials),
                "num_classes": self.data.num_classes(self.config.train),
                "num_concurrent": at_once,
                "mailbox": self.mailbox,
                "keep_every": self.config.grace_epochs if self.config.scheduler == "pbt" else None,
            }
            trainable = tune.with_resources(tune.with_parameters(Trial, **common), {"CPU": OVERSEER_CPUS})
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=self.proposals, scheduler=self.judge, num_samples=self.config.num_trials,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=TUNES_OWN, storage_path=folder, storage_filesystem=storage, verbose=0,
                    callbacks=[TuneCallback(self.judge, self, self.proposals.requeue)],
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
            self._keep_the_best(ended_before=time.monotonic())
            if all(record.ended for record in self.journal.trials.values()):
                (trials / KEPT).remove()
            (self.folder.path / TUNES_OWN).remove()

    def _pinned(self) -> TrainConfig:
        """Of the trials: a process that starts again while no GPU lives would take `auto` for the CPU."""
        import ray

        on_gpu = uses_gpu(self.config.train.device, ray.cluster_resources().get("GPU", 0))
        return self.config.train.changed(device="gpu" if on_gpu else "cpu")

    # what the judge and Ray Tune tell

    def on_begin(self, record: TrialRecord) -> None:
        self.view.begun(record)
        self._begin_child(record)

    def _begin_child(self, record: TrialRecord) -> None:
        """The trial's run in MLflow; where the server is away, it is tried again at later epochs, and at the end."""
        if record.number in self.children:
            return
        run = self.children[record.number] = Run(self.store, self._warn)
        try:
            params = self.config.trial(record.values).model_dump()
            run.begin(
                f"{self.folder.name}-{record.number:04d}", "jobs/tune.py", params, run_id=record.run_id,
                parent=self.parent.run_id, look_for=self.resume,
            )  # fmt: skip
            if run.run_id != record.run_id:
                self.journal.write(RunBegun(number=record.number, run_id=run.run_id))
            if record.history:
                run.complete(record.history, self.config.metric)
        except Exception as error:
            self._warn(f"MLflow takes no run for trial {record.number} yet: {self.store.reason(error)}")
            self.children.pop(record.number)
            self._try_mlflow_at = time.monotonic() + MLFLOW_PAUSE_S

    def on_epoch(self, record: TrialRecord, metrics: dict[str, Any]) -> None:
        if run := self.children.get(record.number):
            run.log_epoch(metrics)
        elif time.monotonic() > self._try_mlflow_at:
            self._begin_child(record)
        if self.usd is not None:
            self.journal.write(CostSoFar(usd=round(self.usd, 4)))
        self.retention.drop_kept()
        ranked = self.journal.ranked(self.config.metric)
        best = ranked[0].best(self.config.metric) if ranked else None
        if best:
            cost = {} if self.usd is None else {"cost/usd": self.usd}
            self.parent.log({f"best/{self.config.metric.split('/')[1]}": best[self.config.metric]} | cost,
                            step=len(self.journal.results))  # fmt: skip

    def on_exploit(self, record: TrialRecord, donor: int) -> None:
        self.view.exploited(record, donor)
        if run := self.children.get(record.number):
            values = ", ".join(f"{name} {value}" for name, value in record.values.items())
            run.tag(**{f"exploit.{len(self.journal.results):06d}": f"from trial {donor}: {values}"})

    def on_end(self, record: TrialRecord) -> None:
        self.view.ended(record)
        if run := self.children.pop(record.number, None):  # beside the loop: the server may be away
            self._finish(run, MLFLOW_STATUS[record.status], record.error, hurry=False)
        self._ended_at[record.number] = time.monotonic()
        self._keep_the_best(ended_before=time.monotonic() - SETTLED_S)

    def on_process_lost(self, number: int) -> None:
        """Of a trial. Its workers die with it; the room they had would stay reserved."""
        from ray import PlacementGroupID
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        if room := self.placement_groups.pop(number, None):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(room))))

    def on_turn(self) -> None:
        """Ten times a second, in the loop of Ray Tune."""
        now = time.monotonic()
        if self.stop is None and now > self.deadline:
            self.stop = "budget"
        if self.stop is not None and not self._told:
            self._told = True
            self.view.say("stopping: the trials save their checkpoints (again to end at once)")
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

        events: list[dict[str, Any]] = ray.get(self.mailbox.drain.remote(SEARCH))
        for event in events:
            if event["kind"] == "placement_group":
                self.placement_groups[event["number"]] = event["id"]
                continue
            self.view.event(event)
            if event["kind"] == "started" and not self.journal.trials[event["number"]].ended:
                self.journal.write(WorkersStarted(number=event["number"], after_s=round(event["after_s"], 3)))

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Nothing but a note: Ray may be in the midst of something."""
        self.stop = signum
        signal.signal(signum, signal.SIG_DFL)  # a second Ctrl-C ends at once

    # around the trials

    def _begin_parent(self) -> None:
        settings = self.config.settings() | {f"space.{d.name}": str(d) for d in self.config.space.dimensions}
        settings |= {f"train.{name}": value for name, value in self.config.train.model_dump().items()}
        known = self.journal.parent_run_id
        self.parent.patience_s = FINISH_TIMEOUT_S
        self.parent.begin(self.folder.name, "jobs/tune.py", settings, run_id=known, look_for=self.resume)
        if self.parent.run_id != known:
            self.journal.write(SearchBegun(run_id=self.parent.run_id))
        self.parent.log_text(self.config.to_yaml(), SEARCH_YAML)
        for record in self.journal.trials.values():
            if not record.ended:
                continue
            if not record.run_id:
                self._begin_child(record)
                run = self.children.pop(record.number, None)
            else:
                run = self._run_of(record)
                if run and not run.is_open:
                    continue
            if run:  # a killed driver left it so
                run.complete(record.history, self.config.metric)
                self._finish(run, MLFLOW_STATUS[record.status], record.error, hurry=False)

    def _run_of(self, record: TrialRecord) -> Run | None:
        """Its run in MLflow, if it has one that is still there."""
        try:
            if not record.run_id or not self.store.exists(record.run_id):
                return None
        except Exception as error:  # whatever a server answers that is away
            self._warn(f"MLflow does not answer about trial {record.number}: {self.store.reason(error)}")
            return None
        run = Run(self.store, self._warn)
        run.run_id = record.run_id
        return run

    def _wrap_up(self, status: str, error: str | None = None) -> None:
        """Whatever came of it: result, pictures, the best settings; and every MLflow run at its end."""
        result = as_result(self.config, self.journal, self.data.rows["val"])
        result |= {"name": self.folder.name, "status": status, "error": error}
        result |= {"mlflow_run_id": self.parent.run_id, "mlflow_tracking_uri": redact(self.store.uri)}
        result |= {} if self.usd is None else {"cost_usd": round(self.usd, 4)}
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
            self._finish_children(status)
            if status != "FINISHED":
                self.parent.patience_s = 0.0
            if self.parent.run_id:
                self._log_what_came_of_it(result, pictures, best)
                self.parent.finish(status, error)
        if result["best"] is not None:
            self._show(result, list(pictures))

    def _finish_children(self, status: str) -> None:
        """The runs of trials that are not at their end, in MLflow, side by side: the server may be away."""
        for record in self.journal.trials.values():
            if record.ended:
                away = status != "FINISHED" or time.monotonic() < self._try_mlflow_at
                if not record.run_id and self.parent.run_id and not away:  # the server was, when it began
                    self._begin_child(record)
                    if run := self.children.pop(record.number, None):
                        self._finish(run, MLFLOW_STATUS[record.status], record.error, hurry=False)
                continue
            run = self.children.pop(record.number, None)
            if run is None and self.parent.run_id:
                run = self._run_of(record)
            if run is not None:
                self._finish(run, "KILLED", "the search was stopped before the trial's end; it can go on", hurry=True)
        deadline = time.monotonic() + (FINISH_TIMEOUT_S if status == "FINISHED" else HURRIED_TIMEOUT_S)
        for end in self._endings:
            end.join(max(0.0, deadline - time.monotonic()))

    def _finish(self, run: Run, status: str, error: str | None, *, hurry: bool) -> None:
        end = threading.Thread(target=run.finish, args=(status, error), kwargs={"hurry": hurry}, daemon=True)
        end.start()
        self._endings.append(end)

    def _log_what_came_of_it(self, result: dict[str, Any], pictures: dict[str, Any], best: TrainConfig | None) -> None:
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

    def best_settings(self) -> TrainConfig:
        """Of the best trial, whole: `jobs/train.py --config` of them comes to the same numbers."""
        return self.config.trial(self.journal.ranked(self.config.metric)[0].values)

    def _show(self, result: dict[str, Any], pictures: list[str]) -> None:
        whole = self.config.train.epochs * len(self.journal.trials)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["importance"].items())
        changed = " (its settings changed on the way)" if self.journal.trials[result["best"]].start else ""
        rows = [
            ("epochs", f"{result['epochs_used']}, where all trials to the end would be {whole}"),
            ("time", duration(result["elapsed_s"])),
            *([("cost", f"${result['cost_usd']:.2f} for all nodes")] if "cost_usd" in result else []),
            ("importance", shares or "too few trials to say"),
            ("pictures", f"{', '.join(pictures)} in {self.folder.path}"),
            ("train the best", result["command"] + changed),
            ("result", str(self.folder.path / "result.json")),
            ("MLflow run", result["mlflow_run_id"] or "none"),
            ("see it", ui_command(self.store.uri)),
        ]
        self.view.say("\n".join(["", *self.view.findings(self.data.rows["val"]), "", table(rows)]))
        sys.stdout.flush()

    def _keep_the_best(self, ended_before: float) -> None:
        records = self.journal.trials.values()
        at_rest = {r.number for r in records if r.ended and self._ended_at.get(r.number, 0.0) <= ended_before}
        self.retention.keep_the_best(at_rest)

    def _command(self) -> str:
        return f"{command('tune')}{self.folder.flag} --resume {self.folder.name}"

    def _warn(self, text: str) -> None:
        self.view.say(f"warning: {text}")
