"""The console scripts, and jobs/*.py: signals are caught before a command and all that it needs are imported."""

import importlib
import sys
from collections.abc import Sequence

from alexnet.allocator import use_one_arena
from orchestrator.base.exits import end_at_once_on_signals, end_without_teardown, open_closed_streams
from orchestrator.cluster.connection import prepare_workers

# What the fork server imports for workers: first what does not import Ray. PyTorch's optimizers import its compiler.
WORKERS = ("alexnet.kernels:compile_kernels", "torch._dynamo", "orchestrator.data.feed", "orchestrator.train.step")
WITH_RAY = (
    "ray._private.workers.default_worker", "ray.tune", "orchestrator.train.ray_train",
    "ray.data._internal.execution.streaming_executor", "ray.data._internal.planner",
)  # fmt: skip
NO_RAY = {"-h", "--help", "--version", "--dry-run"}


def train() -> int:
    return _start("train", WITH_RAY)


def tune() -> int:
    return _start("tune", (*WITH_RAY, "orchestrator.search.trial"))


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


def _start(command: str, with_ray: Sequence[str] = ()) -> int:
    """Run orchestrator/cli/COMMAND.py; returns the exit status. with_ray: what its workers will have to import."""
    end_with = end_without_teardown()
    end_at_once_on_signals()  # imports take seconds
    use_one_arena()  # before there are threads
    open_closed_streams()
    if with_ray and NO_RAY.isdisjoint(sys.argv):
        prepare_workers(WORKERS, with_ray)
    status: int = importlib.import_module(f"orchestrator.cli.{command}").script()
    end_with(status)
    return status
