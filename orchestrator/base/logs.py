"""Python's logging in this project's processes: a run's log, and what the terminal shows."""

import logging
from collections.abc import Callable
from typing import Any

from orchestrator.base.storage import StoragePath

FORMAT = "%(asctime)s %(levelname)s %(rank)s %(name)s: %(message)s"

_open: list[tuple[StoragePath, logging.Handler]] = []


def set_up(verbose: bool) -> None:
    """What the terminal shows: with `verbose` everything, else warnings."""
    logging.getLogger("orchestrator").setLevel(logging.DEBUG if verbose else logging.WARNING)


def keep_off_terminal(*names: str) -> None:
    """Let these loggers' lines go where the root logger's go, and nowhere else."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [logging.NullHandler()]  # without any, Python prints warnings itself
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def open_run_log(path: StoragePath) -> None:
    """Append every record to this file from now on."""
    close_run_log()
    if path.local is None:
        return
    handler = logging.FileHandler(path.local, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT, defaults={"rank": "driver"}))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger("orchestrator").setLevel(logging.DEBUG)
    _open.append((path, handler))


def close_run_log() -> None:
    """Write no more of it."""
    while _open:
        _, handler = _open.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def run_log() -> StoragePath | None:
    """The run's log that is open."""
    return _open[-1][0] if _open else None


def record(rank: int, level: int, name: str, text: str, at: float, trial: int | None = None) -> None:
    """A line of a worker into the run's log."""
    made = logging.LogRecord(name, level, "", 0, text, None, None)
    made.created, made.rank = at, f"rank {rank}" if trial is None else f"trial {trial} rank {rank}"
    for _, handler in _open:
        handler.handle(made)


def forward(send: Callable[[int, str, str, float], Any]) -> None:
    """In a worker: hand every record to `send`: level, logger's name, text, seconds since the epoch. Replaces an
    earlier one."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward(send))
    logging.getLogger("orchestrator").setLevel(logging.DEBUG)


class _Forward(logging.Handler):
    def __init__(self, send: Callable[[int, str, str, float], Any]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.send(record.levelno, record.name, self.format(record), record.created)
        except Exception:
            self.handleError(record)
