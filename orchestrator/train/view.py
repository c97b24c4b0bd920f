"""A training run on the terminal: a live line of its steps, and one line per epoch."""

import time
from typing import Any

from orchestrator.base.terminal import LiveLine, duration, percent
from orchestrator.train.messages import EpochEnded, Event, Note, Step, Warned


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
