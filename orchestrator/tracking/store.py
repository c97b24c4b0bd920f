"""Where MLflow runs are kept: a server or a database, and an experiment in it."""

import contextlib
import fcntl
import os
import shlex
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.base import logs
from orchestrator.base.environment import on_cluster
from orchestrator.base.exits import last_line, signals_deferred
from orchestrator.base.redaction import credentials, redact, without_credentials
from orchestrator.base.sockets import why_silent
from orchestrator.base.terminal import LiveLine

EXPERIMENT = "alexnet"
MLFLOW_ENV = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# of one call to a server; MLflow's own seven tries take four minutes, in which nothing else would happen
ONE_CALL = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
RETRY_S = 2.0
SLOW_S = 5.0
SERVER_TIMEOUT_S = 5.0  # for the server of an earlier session to answer
REFUSALS = (400, 404, 409, 410, 413, 422)  # statuses
Metrics = dict[str, float]
T = TypeVar("T")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the current folder. Absolute, because Ray's workers run elsewhere.

    A server's user and password are taken out of it, and put where MLflow looks for them: messages name addresses.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    if not is_server(uri) or uri == without_credentials(uri):
        return uri
    user, password = credentials(uri) or ("", "")
    found = {USER: user, PASSWORD: password, "MLFLOW_TRACKING_URI": without_credentials(uri)}
    os.environ.update({name: urllib.parse.unquote(value) for name, value in found.items() if value})
    return without_credentials(uri)


def tracking_uri_of(earlier: str | None) -> tuple[str, str | None]:
    """The store of a run that is resumed, and a line about it where it is not the default one.

    That is MLFLOW_TRACKING_URI if it is set; else where the run was tracked before, if that is still there.
    earlier: the run's `mlflow_tracking_uri`.
    """
    default = tracking_uri()
    if os.environ.get("MLFLOW_TRACKING_URI") or not earlier or earlier == default:
        return default, None
    if why := _why_missing(earlier):
        return default, f"MLflow at {redact(earlier)}, where it was tracked, is not there ({why}); tracked in {default}"
    return earlier, f"tracked in {redact(earlier)}, as before"


def _why_missing(uri: str) -> str | None:
    """Why a store cannot be used again; None if it can."""
    if is_server(uri):
        address = urllib.parse.urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        return why_silent(address.hostname or "", port, SERVER_TIMEOUT_S)
    if uri.startswith("sqlite:///"):
        return None if Path(uri.removeprefix("sqlite:///").partition("?")[0]).is_file() else "no such file"
    return "its address is not complete without MLFLOW_TRACKING_URI"  # a database, whose password is not kept


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def ui_command(uri: str) -> str:
    """What opens the UI on these runs."""
    if is_server(uri):
        through_ssh = ", or make ui on your own machine, which opens a way to the cluster" if on_cluster() else ""
        return f"open {redact(uri)} in a browser{through_ssh}"
    mlflow = Path(sys.executable).with_name("mlflow")
    shown = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
    address = shlex.quote(uri) if uri == redact(uri) else '"$MLFLOW_TRACKING_URI"'
    return f"{shlex.quote(str(shown))} ui --host 127.0.0.1 --backend-store-uri {address}"


class Store:
    """Where runs are kept: a server or a database, and an experiment in it."""

    def __init__(self, uri: str) -> None:
        """Connect, creating a new store where there is none. Raises ValueError of one line where that fails."""
        for variable, setting in (MLFLOW_ENV | ONE_CALL).items():
            os.environ.setdefault(variable, setting)
        with signals_deferred():
            import mlflow

        logs.keep_off_terminal("mlflow", "alembic")
        self.uri = uri
        mlflow.set_tracking_uri(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        try:
            # two jobs that make one database break it, and so does one that is stopped in the midst of it
            with said_if_slow(uri), _file_lock(uri), contextlib.nullcontext() if is_server(uri) else signals_deferred():
                self.client = mlflow.MlflowClient(uri)
                experiment = self.client.get_experiment_by_name(name) or self._create(name)
        except Exception as error:  # whatever the store's driver raises: the user needs the address and the reason
            reason = self.redacted((str(error).strip() or type(error).__name__).splitlines()[0])
            raise ValueError(f"MLflow at {redact(uri)} cannot be reached: {reason[:200]}") from None
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

    def redacted(self, text: str) -> str:
        """Without the passwords of addresses, the store's above all."""
        return redact(text.replace(self.uri, redact(self.uri)))

    def reason(self, error: BaseException) -> str:
        return self.redacted(last_line(error))

    def exists(self, run_id: str) -> bool:
        """False for a run that was deleted, or belongs to another store."""
        import mlflow

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False


@contextlib.contextmanager
def said_if_slow(uri: str) -> Iterator[None]:
    """Say that MLflow is waited for, once a server has taken SLOW_S: one that hangs would be silent for a minute."""
    if not is_server(uri):  # a database that is made takes its time, and does not hang
        yield
        return
    waiting = threading.Timer(SLOW_S, LiveLine().print, [f"waiting for MLflow at {redact(uri)}, which does not answer"])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _artifacts(uri: str, experiment: str) -> str | None:
    """A local store keeps its files beside its database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///"))
    return (database.absolute().parent / "mlartifacts" / experiment).as_uri()


def is_transient(error: Exception) -> bool:
    """Whether this may be a server that is starting again, and not its answer."""
    import mlflow
    import requests

    if isinstance(error, mlflow.exceptions.MlflowException):
        status = int(error.get_http_status_code())
        return status >= 500 or status in (408, 429)
    if isinstance(error, requests.HTTPError):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError))


def is_refusal(error: Exception) -> bool:
    """Whether it is a server's answer that will not change: a deleted run, a value that it does not take. Not a refused
    password: that may be put right while a job runs."""
    import mlflow
    import requests

    if isinstance(error, mlflow.exceptions.MlflowException):
        return int(error.get_http_status_code()) in REFUSALS
    return isinstance(error, requests.HTTPError) and getattr(error.response, "status_code", 0) in REFUSALS


@contextlib.contextmanager
def _file_lock(uri: str) -> Iterator[None]:
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
