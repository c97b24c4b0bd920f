"""A training run on the terminal: a live line of its steps, one line per epoch, and its results."""

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.base.shown import count_of
from orchestrator.base.terminal import LiveLine, duration, percent, table
from orchestrator.tracking.store import ui_command
from orchestrator.train.messages import EpochEnded, Event, Note, Step, Warned
from orchestrator.train.run_folder import RESULT, RunFolder

SHOWN = ("metrics", "best", "images_per_s", "elapsed_s", "mlflow_run_id")  # of result.json, at the end of a run


class TrainView:
    """Shows the events of a run as they come."""

    def __init__(self) -> None:
        self.line = LiveLine()
        self._first: tuple[float, float] | None = None  # (time, epochs done) at the first step shown

    def event(self, event: Event) -> None:
        """Show an event; those of other kinds are not shown."""
        match event:
            case Step():
                self.line.update(self._step(event))
            case EpochEnded():
                self.line.print(epoch_line(event.metrics, event.epochs))
            case Note():
                self.line.print(event.text)
            case Warned():
                self.line.print(f"warning: {event.text}")

    def _step(self, step: Step) -> str:
        done = step.epoch + step.step / step.steps
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, done_then = self._first
        rate = (done - done_then) / (now - start) if done > done_then else None
        eta = duration((step.epochs - done) / rate) if rate else "--:--"
        return (
            f"epoch {step.epoch + 1}/{step.epochs}  step {step.step}/{step.steps}  "
            f"loss {step.loss:.4f}  {step.images_per_s:.0f} images/s  ETA {eta}"
        )


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """The line of an epoch. metrics: an entry of a history (docs/formats.md)."""
    top5 = f"top-5 error {percent(metrics['val/top5_error'])}  " if "val/top5_error" in metrics else ""
    return (
        f"epoch {metrics['epoch']}/{epochs}  "
        f"train loss {metrics['train/loss']:.4f}  val loss {metrics['val/loss']:.4f}  "
        f"top-1 error {percent(metrics['val/top1_error'])}  {top5}"
        f"lr {metrics['train/lr']:g}  {metrics['train/images_per_s']:.0f} images/s"
    )


def results(result: Mapping[str, Any], run: RunFolder, uri: str) -> list[str]:
    """The lines at the end of a run. result: what result.json has; uri: of MLflow."""
    last, best = result["metrics"], result["best"]
    time_s, session_s = result["elapsed_s"], result.get("session_s", result["elapsed_s"])
    best_error = f"best {percent(best['val/top1_error'])}"
    trained = f", on training images {percent(last['train/top1_error'])}" if "train/top1_error" in last else ""
    rows = [
        (
            "top-1 error",
            f"{percent(last['val/top1_error'])} ({best_error}, epoch {best['epoch']}){trained}",
        ),
        *([("top-5 error", percent(last["val/top5_error"]))] if "val/top5_error" in last else []),
        ("loss", f"train {last['train/loss']:.4f}, validation {last['val/loss']:.4f}"),
        ("speed", f"{result['images_per_s']:.0f} images/s in the last epoch"),
        (
            "time",
            duration(time_s) + (f", of which {duration(session_s)} since it was resumed" if session_s < time_s else ""),
        ),
        *([("cost", f"${result['cost_usd']:.2f} for all nodes")] if "cost_usd" in result else []),
        ("checkpoint", str(result.get("checkpoint"))),
        ("result", str(run.path / RESULT)),
        ("MLflow run", result["mlflow_run_id"]),
        ("open the UI", ui_command(uri)),
    ]
    return [f"results after {count_of(last['epoch'], 'epoch')}", *table(rows).splitlines()]
