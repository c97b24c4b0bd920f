"""The tracking server: `mlflow server` with a database, files and a password, restarted if it dies.

Its folder, which only its owner may read, holds the database (unless it is elsewhere), the artifacts (likewise), the
password that was made at the first start, and the log. What a client needs is in client.env there, in the form that a
shell and `clusters/environment` read.
"""

import configparser
import contextlib
import ctypes
import io
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orchestrator.base.exits import JobError

FOLDER = Path("~/alexnet-tracking")
PORT = 5000
USER = "alexnet"
CLIENT, SERVER, AUTH, KEY, LOG, PID = "client.env", "server.env", "auth.ini", "session.key", "server.log", "pid"
DATABASE, ARTIFACTS = "TRACKING_DATABASE", "TRACKING_ARTIFACTS"  # lines of server.env
START_TIMEOUT_S = 120.0  # the first start makes the database
SLOW_S = 5.0
RESTART_PAUSE_S = 2.0
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
PROCESSES = 1  # of the server: where there are several, uvicorn kills those that take more than five seconds to import


@dataclass(frozen=True)
class TrackingServer:
    """One server and its folder. Its database and its artifacts are there, unless server.env says where else."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = PORT

    @property
    def uri(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Start it in the background, unless it runs; returns when it answers. Raises JobError.

        say: is told if that takes longer than SLOW_S.
        """
        if self.answers():
            if self.pid() is not None:
                return
            raise JobError(
                f"{self.uri}: answers already, and is not the server of {self.folder}; choose another --port"
            )
        self.stop()
        self.write_settings()
        log = os.open(self.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        run = [sys.executable, "-m", "orchestrator.tracking.server", str(self.folder), self.host, str(self.port)]
        keeper = subprocess.Popen(
            run, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        os.close(log)
        _write(self.folder / PID, f"{keeper.pid}\n")
        began, said = time.monotonic(), False
        while not self.answers():
            if not said and time.monotonic() - began > SLOW_S:
                said = True
                say(f"waiting for MLflow at {self.uri}; its log: {self.folder / LOG}")
            if keeper.poll() is not None or time.monotonic() - began > START_TIMEOUT_S:
                self.stop()
                raise JobError(f"the tracking server does not answer at {self.uri}; {self.folder / LOG} says why")
            time.sleep(0.3)

    def stop(self) -> bool:
        """End it, if it runs; returns whether it did."""
        pid = self.pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                os.killpg(pid, 0)
                time.sleep(0.1)
            os.killpg(pid, signal.SIGKILL)
        (self.folder / PID).unlink(missing_ok=True)
        return True

    def pid(self) -> int | None:
        """Of the process that keeps it running."""
        try:
            pid = int((self.folder / PID).read_text())
            return pid if b"orchestrator.tracking.server" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
        except (OSError, ValueError):
            return None

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def write_settings(self) -> None:
        """The folder, and in it the password, the same as before if there was one. Raises JobError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        except OSError as error:
            raise JobError(f"{self.folder}: cannot be made: {error.strerror}") from None
        password = read_settings(self.folder / CLIENT).get("MLFLOW_TRACKING_PASSWORD") or secrets.token_urlsafe(24)
        client = {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
        _write(self.folder / CLIENT, "".join(f"{name}={value}\n" for name, value in client.items()))
        if not (self.folder / KEY).exists():
            _write(self.folder / KEY, secrets.token_hex(32))
        auth = io.StringIO()
        settings = configparser.ConfigParser(interpolation=None)
        settings["mlflow"] = {
            "default_permission": "READ",
            "database_uri": f"sqlite:///{self.folder / 'users.db'}",
            "admin_username": USER,
            "admin_password": password,
        }
        settings.write(auth)
        _write(self.folder / AUTH, auth.getvalue())

    def keep_running(self) -> NoReturn:
        """Run the server, and again whenever it ends. What may hold a password travels in the environment."""
        chosen = read_settings(self.folder / SERVER)
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": chosen.get(DATABASE) or f"sqlite:///{self.folder / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS_DESTINATION": chosen.get(ARTIFACTS) or str(self.folder / "artifacts"),
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / AUTH),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": (self.folder / KEY).read_text(),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a second server, for evaluations of language models
            "PYTHONWARNINGS": "ignore",
        }
        hosts = f"{self.host}:{self.port},localhost:*,127.0.0.1:*"  # a tunnel may end at any port
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", self.host, "--port", str(self.port),
            "--app-name", "basic-auth", "--workers", str(PROCESSES), "--allowed-hosts", hosts,
        ]  # fmt: skip
        os.umask(0o077)
        while True:
            status = subprocess.call(command, env=environment, cwd=self.folder, preexec_fn=_end_with_the_keeper)
            print(f"the server ended with status {status}; starting it again", file=sys.stderr, flush=True)
            time.sleep(RESTART_PAUSE_S)


def _end_with_the_keeper() -> None:
    """In the server's process: it would hold the port if it lived on, and nobody would restart it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def read_settings(path: Path) -> dict[str, str]:
    """The lines NAME=value of a file; none where there is no file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _write(path: Path, text: str) -> None:
    """For its owner alone, and whole or not at all: a lost password locks everybody out. Raises JobError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise JobError(f"{path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    folder, host, port = sys.argv[1:]
    TrackingServer(Path(folder), host, int(port)).keep_running()
