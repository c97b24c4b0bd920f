"""Python's logging in this project's processes: a run's log, and what the terminal shows.

Loggers are `logging.getLogger(__name__)`, below "orchestrator" and "alexnet". OUTPUT/NAME/run.log gets everything from
DEBUG on, Ray's and MLflow's lines too; the terminal gets none of it unless -v asks for it.
"""

import collections
import contextlib
import datetime
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.base.exits import JobError, last_line
from orchestrator.base.redaction import redact_all
from orchestrator.base.shown import shown
from orchestrator.base.storage import StoragePath

FORMAT = "%(asctime)s %(levelname)s %(rank)s %(name)s: %(message)s"
OURS = ("orchestrator", "alexnet")
THEIRS = ("ray", "mlflow")
APART = ("ray", "ray.data", "ray.train", "mlflow")  # loggers that libraries may keep from passing lines on
CHATTY = ("matplotlib", "PIL", "numba", "asyncio", "urllib3", "botocore", "s3fs", "fsspec")  # thousands of DEBUG lines
# warnings that every trial or search repeats, about progress bars and files of Ray Tune that are switched off here
MEANINGLESS = ("ray.data._internal.progress", "ray.tune.analysis.experiment_analysis")
EARLY_LINES = 1000  # kept until the run's folder is there
UPLOAD_EVERY_S = 30.0
ON_TERMINAL = "orchestrator.base.terminal"  # the logger of what the terminal shows anyway

Send = Callable[[int, str, str, float], Any]


class _Formatter(logging.Formatter):
    """Times with their offset from UTC; no passwords or tokens, and no control characters."""

    def __init__(self) -> None:
        super().__init__(FORMAT, defaults={"rank": "driver"})

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shown(line, None) for line in redact_all(super().format(record)).split("\n"))


class _RunLog(logging.FileHandler):
    """The file of a run's log: itself, or a copy that is uploaded now and then and at the end."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self._folder = None if path.local is not None else tempfile.TemporaryDirectory(prefix="run-log-")
        self._copy = path.local or Path(self._folder.name if self._folder else "", "run.log")
        if self._folder is not None and path.size() is not None:
            self._copy.write_bytes(path.read())
        super().__init__(self._copy, encoding="utf-8")
        self.setFormatter(_Formatter())
        self._done, self._uploaded, self._told = threading.Event(), -1, False  # bytes
        self._thread = threading.Thread(target=self._upload_now_and_then, name="run-log", daemon=True)
        if self._folder is not None:
            self._thread.start()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk, say: it is told once, and tried again, for a run is worth more than its log."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            text = f"warning: the log can no longer be written: {last_line(error)} ({self.path})"
            print(shown(redact_all(text), None), file=sys.stderr, flush=True)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what was kept of it until now
            self._tell(error)
        except ValueError:  # a file that is closed already
            pass
        if self._folder is not None and not self._done.is_set():
            self._done.set()
            self._thread.join()  # an older upload that is under way must not come after the last one
            self._upload()
            self._folder.cleanup()

    def _upload_now_and_then(self) -> None:
        while not self._done.wait(UPLOAD_EVERY_S):
            self._upload()

    def _upload(self) -> None:
        try:
            data = self._copy.read_bytes()
            if len(data) != self._uploaded:
                self.path.write(data)
                self._uploaded = len(data)
        except Exception as error:  # the run goes on without
            if self._done.is_set():  # else it is tried again
                self._tell(error)


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Of -v: our own lines from DEBUG on, those of Ray and MLflow from INFO on."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter())

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == ON_TERMINAL:
            return False
        library = record.name.partition(".")[0]
        return library in OURS or (library in THEIRS and record.levelno >= logging.INFO)


class _Early(logging.Handler):
    """Holds the last lines until the run's log is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.records: collections.deque[logging.LogRecord] = collections.deque(maxlen=EARLY_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Forward(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self.send = send
        self._sending = threading.local()  # what `send` itself logs is not sent

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(self._sending, "now", False):
            return
        self._sending.now = True
        try:
            with contextlib.suppress(Exception):  # training is worth more than its log
                self.send(record.levelno, record.name, self.format(record), record.created)
        finally:
            self._sending.now = False


_open: list[_RunLog] = []
_last: list[StoragePath] = []  # the latest that was opened, if any
_early, _silent = _Early(), logging.NullHandler()  # without any handler, Python prints warnings itself
_terminal: list[_Terminal] = []


def set_up(verbose: bool) -> None:
    """At the start of a command: keep its lines for the run's log; with `verbose` show them on standard error, too."""
    _last.clear()
    _early.records.clear()
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(_silent)
        logger.addHandler(_early)
    root = logging.getLogger()
    for handler in _terminal:
        root.removeHandler(handler)
    _terminal.clear()
    if verbose:
        _terminal.append(_Terminal())
        root.addHandler(_terminal[0])
        if not root.isEnabledFor(logging.INFO):
            root.setLevel(logging.INFO)


def keep_off_terminal(*names: str) -> None:
    """Let these loggers' lines go where the root logger's go, and nowhere else; with -v to the terminal, too."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [logging.NullHandler()]  # without any, Python prints warnings itself
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def open_run_log(path: StoragePath) -> str | None:
    """Append every line to this file from now on, after those that were logged since `set_up`. Returns why that cannot
    be done, if it cannot: a run is worth more than its log."""
    close_run_log()
    try:
        handler = _RunLog(path)
    except (OSError, JobError) as error:
        return last_line(error)
    for record in list(_early.records):
        handler.handle(record)
    _early.records.clear()
    for name in OURS:
        logging.getLogger(name).removeHandler(_early)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in MEANINGLESS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    _open.append(handler)
    _last[:] = [path]
    return None


def close_run_log() -> None:
    """Write no more of it."""
    while _open:
        handler = _open.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def run_log() -> StoragePath | None:
    """The run's log that was opened last in this command."""
    return _last[-1] if _last else None


def record(rank: int, level: int, name: str, text: str, at: float, trial: int | None = None) -> None:
    """A line of another process into the run's log: of a worker, or of a trial's driver (rank below 0)."""
    made = logging.LogRecord(name, level, "", 0, text, None, None)
    who = "driver" if rank < 0 else f"rank {rank}"
    made.created, made.rank = at, who if trial is None else f"trial {trial} {who}"
    for handler in (*_open, *_terminal):
        handler.handle(made)


def forward(send: Send) -> None:
    """In a worker: hand every line to `send`: level, logger's name, text with its traceback, seconds since the epoch.
    Replaces an earlier one; what `send` raises is dropped."""
    ours, root = _Forward(send), logging.getLogger()
    for logger in (root, *map(logging.getLogger, APART)):
        for handler in [handler for handler in logger.handlers if isinstance(handler, _Forward)]:
            logger.removeHandler(handler)
        if logger is root or not logger.propagate:
            logger.addHandler(ours)
    for name in MEANINGLESS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG)
