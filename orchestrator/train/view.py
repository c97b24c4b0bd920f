"""What the user sees of a training run."""

import time
from typing import TYPE_CHECKING, Any

from orchestrator.base.terminal import LiveLine, duration, percent

if TYPE_CHECKING:
    pass


class TrainView:
    """The life of `jobs/train.py`: takes the worker's events as they come."""

    def __init__(self) -> None:
        self.line = LiveLine()
        self._first: tuple[float, float] | None = None  # (time, epochs done) at the first step seen

    def event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "step":
            self.line.update(self._step(event))
        elif kind == "epoch":
            self.line.print(epoch_line(event["metrics"], event["epochs"]))
        elif kind in ("note", "warning"):
            self.line.print(("warning: " if kind == "warning" else "") + event["text"])

    def _step(self, event: dict[str, Any]) -> str:
        done = event["epoch"] + event["step"] / event["steps"]
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, done_then = self._first
        rate = (done - done_then) / (now - start) if done > done_then else None
        eta = duration((event["epochs"] - done) / rate) if rate else "--:--"
        return (
            f"epoch {event['epoch'] + 1}/{event['epochs']}  step {event['step']}/{event['steps']}  "
            f"loss {event['loss']:.4f}  {event['images_per_s']:.0f} images/s  ETA {eta}"
        )


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {metrics['epoch']}/{epochs}  "
        f"train loss {metrics['train/loss']:.4f}  val loss {metrics['val/loss']:.4f}  "
        f"top-1 error {percent(metrics['val/top1_error'])}  top-5 error {percent(metrics['val/top5_error'])}  "
        f"lr {metrics['train/lr']:g}  {metrics['train/images_per_s']:.0f} images/s"
    )
