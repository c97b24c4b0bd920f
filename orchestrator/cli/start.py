"""The console scripts, and jobs/*.py: signals are caught before a command and all that it needs are imported."""

import importlib

from alexnet.allocator import use_one_arena
from orchestrator.base.exits import end_at_once_on_signals, open_closed_streams


def train() -> int:
    return _start("train")


def tune() -> int:
    return _start("tune")


def prepare() -> int:
    return _start("prepare")


def evaluate() -> int:
    return _start("evaluate")


def predict() -> int:
    return _start("predict")


def doctor() -> int:
    return _start("doctor")


def tracking() -> int:
    return _start("tracking")


def look() -> int:
    return _start("look")


def convert() -> int:
    return _start("convert")


def ui() -> int:
    return _start("ui")


def _start(command: str) -> int:
    """Run orchestrator/cli/COMMAND.py; returns the exit status."""
    end_at_once_on_signals()  # imports take seconds
    use_one_arena()  # before there are threads
    open_closed_streams()
    status: int = importlib.import_module(f"orchestrator.cli.{command}").script()
    return status
