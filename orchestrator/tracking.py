"""MLflow: one run per training run, written by the driver alone. The only module that imports mlflow.

(orchestrator/served_model.py is not imported: MLflow stores its text with a model and runs it where the model is used.)
"""

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .cluster import job_id, on_cluster
from .config import TrainConfig
from .exits import JobError, last_line
from .shards import Manifest
from .storage import Place

EXPERIMENT = "alexnet"
JOB = "ray.job_id"  # the tag by which a run's log is found: ray job logs ID
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# of one call to a server; MLflow's own seven tries take four minutes, in which nothing else would happen
ONE_CALL = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
RETRY_S = 2.0
PATIENCE_S = {False: 180.0, True: 30.0}  # with a server at a run's end, in a hurry or not; `ray job stop` waits 90 s
Metrics = dict[str, float]
T = TypeVar("T")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the current folder. Absolute, because Ray's workers run elsewhere.

    A server's user and password are taken out of it, and put where MLflow looks for them: messages name addresses.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    if not uri.startswith(("http://", "https://")) or uri == without_password(uri):
        return uri
    parts = urllib.parse.urlsplit(uri)
    found = {USER: parts.username, PASSWORD: parts.password, "MLFLOW_TRACKING_URI": without_password(uri)}
    os.environ.update({name: urllib.parse.unquote(value) for name, value in found.items() if value})
    return without_password(uri)


def ui_command(uri: str) -> str:
    """What opens the UI on these runs."""
    if uri.startswith(("http://", "https://")):
        through_ssh = ", or make ui on your own machine, which opens a way to the cluster" if on_cluster() else ""
        return f"open {without_password(uri)} in a browser{through_ssh}"
    mlflow = Path(sys.executable).with_name("mlflow")
    shown = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
    address = uri if uri == without_password(uri) else '"$MLFLOW_TRACKING_URI"'
    return f"{shown} ui --host 127.0.0.1 --backend-store-uri {address}"


def without_password(uri: str) -> str:
    """The address as it may be shown and stored."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else uri


class Store:
    """Where runs are kept: a server or a database, and an experiment in it."""

    def __init__(self, uri: str) -> None:
        """Connect, creating a new store where there is none. Raises ValueError of one line where that fails."""
        for variable, setting in (QUIET | ONE_CALL).items():
            os.environ.setdefault(variable, setting)
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        mlflow.set_tracking_uri(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        try:
            with _alone(uri):  # two jobs that make one database break it
                self.client = mlflow.MlflowClient(uri)
                experiment = self.client.get_experiment_by_name(name) or self._create(name)
        except Exception as error:  # whatever the store's driver raises: the user needs the address and the reason
            reason = self.masked((str(error).strip() or type(error).__name__).splitlines()[0])
            raise ValueError(f"MLflow at {without_password(uri)} cannot be reached: {reason[:200]}") from None
        self.experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage != "active":
            raise ValueError(
                f"MLflow experiment {name!r} was deleted: restore it with `mlflow experiments restore -x "
                f"{experiment.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME to another"
            )

    def _create(self, name: str) -> Any:
        """The experiment, new, unless another job was faster."""
        import mlflow

        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on training runs
        try:
            self.client.create_experiment(name, _artifacts(self.uri, name), tags=kind)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.client.get_experiment_by_name(name)

    def masked(self, text: str) -> str:
        """Without the password that the store's address may have."""
        return text.replace(self.uri, without_password(self.uri))

    def reason(self, error: BaseException) -> str:
        return self.masked(last_line(error))

    def exists(self, run_id: str) -> bool:
        """False for a run that was deleted, or belongs to another store."""
        import mlflow

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False


class Run:
    """One MLflow run. Once it is begun, a server that fails is no reason to stop: `warn` is told.

    patience_s: how long to begin, and to store a file, is tried where a server does not answer.
    """

    def __init__(self, store: Store, warn: Callable[[str], None] = lambda text: None) -> None:
        self.store, self.client, self.warn, self.run_id = store, store.client, warn, ""
        self.patience_s, self._is_given_up = 0.0, False
        self._unsent: list[tuple[Metrics, int, int]] = []  # (metrics, step, time in ms)
        self._to_complete: tuple[list[dict[str, Any]], str] | None = None
        self._lock, self._news, self._closing = threading.Lock(), threading.Event(), False
        self._sender: threading.Thread | None = None

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
        """A new run, or an earlier one that goes on; returns whether it is new. script: that it comes from.

        look_for: there may be one of this name and parent whose id was not written down before a crash.
        """
        return self._patiently(lambda: self._begin(name, script, params, run_id, parent, look_for))

    def _begin(
        self, name: str, script: str, params: dict[str, Any], run_id: str | None, parent: str | None, look_for: bool
    ) -> bool:
        import mlflow

        if not run_id and look_for and not self.run_id:
            condition = f"attributes.run_name = '{name}' and tags.mlflow.source.name = '{script}'"
            if parent:
                condition += f" and tags.mlflow.parentRunId = '{parent}'"
            found = self.client.search_runs([self.store.experiment_id], condition, max_results=1)
            run_id = found[0].info.run_id if found else None
        if run_id and self.store.exists(run_id):
            self.run_id = run_id
            self.client.update_run(run_id, "RUNNING")
            if "error" in self.client.get_run(run_id).data.tags:
                self.client.delete_tag(run_id, "error")
            if job := job_id():
                self.client.set_tag(run_id, JOB, job)
            return False
        tags = {"mlflow.runName": name, "mlflow.source.name": script, "mlflow.source.type": "LOCAL"}
        if commit := _git_commit():
            tags["mlflow.source.git.commit"] = commit
        if parent:
            tags["mlflow.parentRunId"] = parent
        if job := job_id():
            tags[JOB] = job
        if not self.run_id:  # of an attempt that did not come to its end
            self.run_id = self.client.create_run(self.store.experiment_id, tags=tags).info.run_id
        entities = [mlflow.entities.Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(self.run_id, params=entities)
        return True

    def log(self, metrics: Metrics, step: int) -> None:
        """Metrics at an update. They are sent by a thread, again and again until the server takes them: neither
        training nor a signal waits for a server."""
        import mlflow

        with self._lock:
            self._unsent.append((metrics, step, mlflow.utils.time.get_current_time_millis()))
        self._wake()

    def log_epoch(self, metrics: dict[str, Any], more: Metrics | None = None) -> None:
        """An entry of a history: its `step` is the update that it was taken at."""
        values = {name: value for name, value in metrics.items() if name != "step"}
        self.log(values | (more or {}), step=metrics["step"])

    def complete(self, history: list[dict[str, Any]], metric: str) -> None:
        """Log those entries of a history at whose update the metric was not logged: a crash may have lost them."""
        self._to_complete = list(history), metric
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        if self._sender is None:
            self._sender = threading.Thread(target=self._send, name="mlflow", daemon=True)
            self._sender.start()

    def _send(self) -> None:
        said = False
        while not (self._closing and not self._unsent and self._to_complete is None):
            self._news.wait()
            self._news.clear()
            while self._unsent or self._to_complete is not None:
                try:
                    self._send_some()
                except Exception as error:  # training is worth more than its log
                    if not said:
                        self.warn(f"MLflow does not take metrics, they are kept: {self.store.reason(error)}")
                    said = True
                    time.sleep(RETRY_S)
                    continue
                said = False

    def _send_some(self) -> None:
        import mlflow

        if self._to_complete is not None:
            history, metric = self._to_complete
            there = {point.step for point in self.client.get_metric_history(self.run_id, metric)}
            self._to_complete = None
            with self._lock:
                waiting = {step for _, step, _ in self._unsent}
            for metrics in history:
                if metrics["step"] not in there | waiting:
                    self.log_epoch(metrics)
        with self._lock:
            batch = self._unsent[:200]  # five metrics each, and 1000 are the API's limit
        values = [
            mlflow.entities.Metric(key, value, when, at)
            for metrics, at, when in batch
            for key, value in metrics.items()
        ]
        for first in range(0, len(values), 1000):
            self.client.log_batch(self.run_id, metrics=values[first : first + 1000])
        with self._lock:
            del self._unsent[: len(batch)]

    def _patiently(self, call: Callable[[], T]) -> T:
        """Again while the server is away, for so long as its own restart may take. Raises the last error."""
        deadline, said = time.monotonic() + self.patience_s, False
        while True:
            try:
                return call()
            except Exception as error:
                if not _is_away(error):
                    raise
                if time.monotonic() >= deadline:
                    self.patience_s, self._is_given_up = 0.0, True
                    raise
                if not said:
                    self.warn(f"MLflow does not answer, it is tried again: {self.store.reason(error)}")
                said = True
                time.sleep(RETRY_S)

    def log_picture(self, figure: Any, name: str) -> None:
        """A matplotlib figure as an artifact."""
        try:
            self._patiently(lambda: self.client.log_figure(self.run_id, figure, name))
        except Exception as error:
            self.warn(f"{name} did not reach MLflow: {self.store.reason(error)}")

    def log_text(self, text: str, name: str) -> None:
        """A small file as an artifact."""
        try:
            self._patiently(lambda: self.client.log_text(self.run_id, text, name))
        except Exception as error:
            self.warn(f"{name} did not reach MLflow: {self.store.reason(error)}")

    @property
    def is_open(self) -> bool:
        return str(self.client.get_run(self.run_id).info.status) == "RUNNING"

    def tag(self, **tags: str) -> None:
        try:
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value[:5000])
        except Exception as error:
            self.warn(f"tags did not reach MLflow: {self.store.reason(error)}")

    def finish(self, status: str, error: str | None = None, *, hurry: bool | None = None) -> None:
        """status: FINISHED, FAILED or KILLED. Never raises: it may run while an error is on its way.

        hurry: whether the process is to end soon; of itself, if the status is no good one.
        """
        if not self.run_id:
            return
        hurry = self._is_given_up or (status != "FINISHED" if hurry is None else hurry)
        deadline = time.monotonic() + PATIENCE_S[hurry]
        self._closing = True
        self._news.set()
        if self._sender is not None:
            self._sender.join(max(0.0, deadline - time.monotonic()))
        if self._unsent or self._to_complete is not None:
            self.warn(f"{len(self._unsent)} set(s) of metrics did not reach MLflow; they are in the run's folder")
        while True:
            try:
                if error:
                    self.client.set_tag(self.run_id, "error", error[:5000])
                self.client.set_terminated(self.run_id, status)
                return
            except Exception as trouble:
                if time.monotonic() > deadline:
                    self.warn(f"MLflow run {self.run_id} could not be marked {status}: {self.store.reason(trouble)}")
                    return
                time.sleep(RETRY_S)


class Tracker(Run):
    """The MLflow run of a training run."""

    def __init__(self, uri: str) -> None:
        """Connect, creating a new store where there is none. Raises ValueError of one line where that fails."""
        super().__init__(Store(uri))
        self.patience_s = PATIENCE_S[False]
        self._monitor: Any = None

    def start(
        self,
        name: str,
        config: TrainConfig,
        manifest: Manifest,
        data: Place,
        *,
        run_id: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Begin a run, or go on with an earlier one; log what is known at the start.

        From here on a server that fails is no reason to stop training: `warn` is told, and metrics are sent later.
        """
        self.warn = warn
        if self.begin(name, "jobs/train.py", config.model_dump(), run_id=run_id):
            self._log_dataset(manifest, data)
        else:
            self.client.set_tag(self.run_id, "resumed.epochs", str(config.epochs))
        patience, self.patience_s = self.patience_s, 0.0  # the workers are at work already
        self.log_text(config.to_yaml(), "config.yaml")
        self.log_text(manifest.model_dump_json(indent=1), "manifest.json")
        self.patience_s, self._is_given_up = patience, False
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=bool(run_id))
        self._monitor.start()

    def log_model(
        self, weights: Path, mean_image: Path, description: dict[str, Any], image_size: int, num_classes: int
    ) -> None:
        """The net as an MLflow model: stored images in, class probabilities out. Nothing in it is pickled.

        `description` is what orchestrator/served_model.py reads.
        """
        import mlflow
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, image_size, image_size, 3))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, num_classes))]),
        )
        # advice for authors of models; not catch_warnings, which is no good beside MLflow's own threads
        warnings.filterwarnings("ignore", message="(?is).*input example", category=UserWarning)
        here = Path(__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            described = Path(folder, "net.json")
            described.write_text(json.dumps(description, indent=1))

            def log() -> None:
                with mlflow.start_run(run_id=self.run_id, log_system_metrics=False):
                    mlflow.pyfunc.log_model(
                        name="model",
                        python_model=str(here / "served_model.py"),
                        artifacts={"weights": str(weights), "mean_image": str(mean_image), "net": str(described)},
                        code_paths=[str(here.parent / "alexnet")],
                        signature=signature,
                        pip_requirements=["torch", "numpy", "numba", "safetensors"],
                    )

            try:
                self._patiently(log)
            except Exception as error:
                self.warn(f"the model did not reach MLflow; its weights are in {weights}: {self.store.reason(error)}")

    def finish(self, status: str, error: str | None = None, *, hurry: bool | None = None) -> None:
        if self._monitor is not None:
            with contextlib.suppress(Exception):  # the run's status is worth more
                self._monitor.finish()
        super().finish(status, error, hurry=hurry)

    def _log_dataset(self, manifest: Manifest, data: Place) -> None:
        from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        class Folder(FileSystemDatasetSource):  # type: ignore[misc]
            """A folder of shards; MLflow records its path and never loads it."""

            uri = property(lambda self: str(data))

            @staticmethod
            def _get_source_type() -> str:
                return "local" if data.local else data.text.split("://")[0]

            def load(self, dst_path: str | None = None) -> str:
                return str(data)

            @staticmethod
            def _can_resolve(raw_source: Any) -> bool:
                return False

            def to_dict(self) -> dict[str, str]:
                return {"uri": self.uri}

            @classmethod
            def from_dict(cls, source_dict: dict[str, str]) -> "Folder":
                return cls()

        dataset = MetaDataset(Folder(), name=manifest.source, digest=manifest.digest)
        entity = dataset._to_mlflow_entity()
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])]
        self.client.log_inputs(self.run_id, inputs)


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
        raise JobError(f"{without_password(uri)}: {run.store.reason(error)}") from None
    if metric != [1.5] or files != ["doctor.txt"]:
        raise JobError(f"{without_password(uri)}: what was written reads as {metric} and {files}")
    return time.monotonic() - start


def _artifacts(uri: str, experiment: str) -> str | None:
    """A local store keeps its files beside its database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///"))
    return (database.absolute().parent / "mlartifacts" / experiment).as_uri()


def _is_away(error: Exception) -> bool:
    """Whether this may be a server that is starting again, and not its answer."""
    import mlflow
    import requests

    if isinstance(error, mlflow.exceptions.MlflowException):
        status = int(error.get_http_status_code())
        return status >= 500 or status == 429
    if isinstance(error, requests.HTTPError):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError))


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process of this machine at a time, where the store is a file."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
    lock = os.open(folder, os.O_RDONLY) if folder.is_dir() else None
    try:
        if lock is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _git_commit() -> str | None:
    """The commit of the code, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
