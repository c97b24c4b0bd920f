"""One MLflow run, written by the driver alone."""

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.base.environment import job_id
from orchestrator.base.exits import JobError
from orchestrator.base.redaction import redact
from orchestrator.tracking.note import LONGEST_NOTE, NOTE, USER, user
from orchestrator.tracking.sender import Sender
from orchestrator.tracking.store import RETRY_S, Metrics, Store, T, is_refusal, is_transient, said_if_slow

JOB = "ray.job_id"  # the tag by which a run's log is found: ray job logs ID
FINISH_TIMEOUT_S = 180.0  # with a server at a run's end
LAST_CALL_S = 5.0  # at least, for the run's status
HURRIED_TIMEOUT_S = 30.0  # where the process is to end soon: `ray job stop` waits 90 s


class Run:
    """One MLflow run. Once it is begun, a server that fails is no reason to stop: `warn` is told.

    patience_s: how long beginning a run, and storing a file, is retried if the server does not answer.
    note: its description (note.py), sent when it begins and when it ends.
    """

    def __init__(self, store: Store, warn: Callable[[str], None] = lambda text: None) -> None:
        self.store, self.client, self.warn, self.run_id = store, store.client, warn, ""
        self.patience_s, self.is_given_up = 0.0, False
        self.note = ""
        self.replaced: str | None = None  # the id of an earlier run that is not there any more
        self.sender = Sender(store, lambda: self.run_id, lambda text: self.warn(text))

    def begin(
        self,
        name: str,
        script: str,
        params: dict[str, Any],
        *,
        run_id: str | None = None,
        parent: str | None = None,
        look_for: bool = False,
    ) -> bool:
        """Begin a new run or resume an earlier one; returns whether it is new. script: the run's source.

        look_for: a run of this name and parent may exist whose id was lost in a crash.
        """
        with said_if_slow(self.store.uri):
            return self.patiently(lambda: self._begin(name, script, params, run_id, parent, look_for))

    def _begin(
        self, name: str, script: str, params: dict[str, Any], run_id: str | None, parent: str | None, look_for: bool
    ) -> bool:
        lost = None
        if look_for and not run_id and not self.run_id:
            condition = f"attributes.run_name = '{name}' and tags.mlflow.source.name = '{script}'"
            if parent:
                condition += f" and tags.mlflow.parentRunId = '{parent}'"
            found = self.client.search_runs([self.store.experiment_id], condition, max_results=1)
            lost = found[0].info.run_id if found else None
        if (earlier := run_id or lost) and self.store.exists(earlier):
            self.run_id = earlier
            self.client.update_run(earlier, "RUNNING")
            if "error" in self.client.get_run(earlier).data.tags:
                self.client.delete_tag(earlier, "error")
            if job := job_id():
                self.client.set_tag(earlier, JOB, job)
            self._send_note()
            if lost:  # it may have been made and not been told its settings
                try:
                    self._log_params(params)
                except Exception as error:
                    if not is_refusal(error):  # it has others, which cannot change
                        raise
            return False
        self.replaced = run_id
        tags = {"mlflow.runName": name, "mlflow.source.name": script, "mlflow.source.type": "LOCAL", USER: user()}
        if self.note:
            tags[NOTE] = self.note[:LONGEST_NOTE]
        if commit := _git_commit():
            tags["mlflow.source.git.commit"] = commit
        if parent:
            tags["mlflow.parentRunId"] = parent
        if job := job_id():
            tags[JOB] = job
        if not self.run_id:  # of an attempt that did not come to its end
            self.run_id = self.client.create_run(self.store.experiment_id, tags=tags).info.run_id
        self._log_params(params)
        return True

    def _send_note(self) -> None:
        if self.note:
            self.client.set_tag(self.run_id, NOTE, self.note[:LONGEST_NOTE])

    def _log_params(self, params: dict[str, Any]) -> None:
        import mlflow

        entities = [mlflow.entities.Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(self.run_id, params=entities)

    def say_if_replaced(self) -> None:
        """Tell that a new run was begun where an earlier one should have been resumed."""
        if self.replaced:
            self.warn(
                f"MLflow run {self.replaced} was deleted, or is in another store than {redact(self.store.uri)}; "
                f"run {self.run_id} takes its place"
            )

    def log(self, metrics: Metrics, step: int) -> None:
        """Metrics at an update, to be sent in the background."""
        self.sender.add(metrics, step)

    def log_epoch(self, metrics: dict[str, Any], more: Metrics | None = None) -> None:
        """An entry of a history: its `step` is the update that it was taken at."""
        self.sender.add_epoch(metrics, more)

    def complete(self, history: list[dict[str, Any]], metric: str) -> None:
        """Log those entries of a history at whose update the metric was not logged: a crash may have lost them."""
        self.sender.complete(history, metric)

    def patiently(self, call: Callable[[], T]) -> T:
        """Retry while the server is away, for up to patience_s. Raises the last error."""
        deadline, said = time.monotonic() + self.patience_s, False
        while True:
            try:
                return call()
            except Exception as error:
                if not is_transient(error):
                    raise
                if time.monotonic() >= deadline:
                    self.patience_s, self.is_given_up = 0.0, True
                    raise
                if self._is_gone():
                    raise
                if not said:
                    reason = self.store.reason(error)
                    self.warn(f"MLflow does not answer; retrying for up to {self.patience_s:.0f} s: {reason}")
                said = True
                time.sleep(RETRY_S)

    def _is_gone(self) -> bool:
        """Whether the run was deleted: some of MLflow's calls report that as a server's failure."""
        try:
            return bool(self.run_id) and not self.store.exists(self.run_id)
        except Exception:  # the server is away
            return False

    def log_picture(self, figure: Any, name: str) -> None:
        """A matplotlib figure as an artifact."""
        self._attach(name, lambda: self.client.log_figure(self.run_id, figure, name))

    def log_text(self, text: str, name: str) -> None:
        """A small file as an artifact."""
        self._attach(name, lambda: self.client.log_text(self.run_id, text, name))

    def log_files(self, files: Mapping[str, bytes], folder: str) -> None:
        """Files as artifacts in a folder, while the run goes on: a server that does not answer is not waited for."""
        patience, given_up = self.patience_s, self.is_given_up
        self.patience_s = 0.0
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                Path(temporary, name).write_bytes(data)
            self._attach(folder, lambda: self.client.log_artifacts(self.run_id, temporary, folder))
        self.patience_s, self.is_given_up = patience, given_up

    def _attach(self, what: str, call: Callable[[], Any]) -> None:
        """Nothing is tried of a server that was given up: each call could wait for it for a minute."""
        if self.is_given_up:
            self.warn(f"{what} did not reach MLflow, which does not answer")
            return
        try:
            self.patiently(call)
        except Exception as error:
            self.warn(f"{what} did not reach MLflow: {self.store.reason(error)}")

    @property
    def is_open(self) -> bool:
        return str(self.client.get_run(self.run_id).info.status) == "RUNNING"

    def tag(self, **tags: str) -> None:
        def set_all() -> None:
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value[:5000])

        self._attach(f"the tag{'s' if len(tags) > 1 else ''} {', '.join(tags)}", set_all)

    def finish(self, status: str, error: str | None = None, *, hurry: bool | None = None) -> None:
        """status: FINISHED, FAILED or KILLED. Never raises: it may run while an error is on its way.

        hurry: whether the process is to end soon; by default, unless the status is FINISHED.
        """
        if not self.run_id:
            return
        hurry = self.is_given_up or (status != "FINISHED" if hurry is None else hurry)
        deadline = time.monotonic() + (HURRIED_TIMEOUT_S if hurry else FINISH_TIMEOUT_S)
        self.sender.close(deadline - time.monotonic())
        left = max(deadline - time.monotonic(), LAST_CALL_S)
        if not within(left, lambda: self._mark(status, error, deadline)):
            self.warn(f"MLflow run {self.run_id} could not be marked {status}: no answer")

    def _mark(self, status: str, error: str | None, deadline: float) -> None:
        while True:
            try:
                if error:
                    self.client.set_tag(self.run_id, "error", error[:5000])
                self._send_note()
                self.client.set_terminated(self.run_id, status)
                return
            except Exception as trouble:
                if time.monotonic() > deadline or is_refusal(trouble):
                    self.warn(f"MLflow run {self.run_id} could not be marked {status}: {self.store.reason(trouble)}")
                    return
                time.sleep(RETRY_S)


def within(timeout_s: float, call: Callable[[], object]) -> bool:
    """Call it in a thread; returns whether it has come to its end in so many seconds. If not, it is left behind: a
    server that hangs must not hold up the end of a process."""
    thread = threading.Thread(target=call, name="mlflow-end", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()


def round_trip(uri: str) -> float:
    """Write a metric and an artifact to a server, read them, delete them; returns seconds.

    Raises JobError, or ValueError where it cannot be reached.
    """
    start = time.monotonic()
    run = Run(Store(uri))
    try:
        run.begin("doctor", "jobs/doctor.py", {})
        run.client.log_metric(run.run_id, "doctor", 1.5)
        run.client.log_text(run.run_id, "doctor", "doctor.txt")
        metric = [point.value for point in run.client.get_metric_history(run.run_id, "doctor")]
        files = [item.path for item in run.client.list_artifacts(run.run_id)]
        run.client.set_terminated(run.run_id, "FINISHED")
        run.client.delete_run(run.run_id)
    except Exception as error:  # whatever the server answers
        raise JobError(f"{redact(uri)}: {run.store.reason(error)}") from None
    if metric != [1.5] or files != ["doctor.txt"]:
        raise JobError(f"{redact(uri)}: what was written reads as {metric} and {files}")
    return time.monotonic() - start


def _git_commit() -> str | None:
    """The commit of the code, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
