"""What the user sees while a job runs: one live line in a terminal, plain lines every few seconds in a log."""

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .checking import Report
    from .prepare import Progress
    from .shards import Manifest
    from .sources import Source
    from .storage import Place

LOG_EVERY_S = 5.0


class LiveLine:
    """A line that rewrites itself on a terminal and repeats itself, seldom, anywhere else."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._last = 0.0
        self._shown = False

    def update(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns  # of a longer one a part would stay behind
            self.stream.write("\r\x1b[2K" + text[: width - 1])
            self.stream.flush()
            self._shown = True
        elif now - self._last >= LOG_EVERY_S:
            self._last = now
            print(text, file=self.stream, flush=True)

    def print(self, text: str = "") -> None:
        """A line that stays."""
        if self._shown:
            self.stream.write("\r\x1b[2K")
            self._shown = False
        print(text, file=self.stream, flush=True)


class LiveBlock:
    """Lines that rewrite themselves on a terminal, as many as fit on it, and repeat themselves, seldom, elsewhere."""

    def __init__(self, every_s: float, stream: TextIO | None = None) -> None:
        self.stream, self.every_s = stream or sys.stdout, every_s
        self.live = self.stream.isatty()
        self._last = -every_s
        self._shown = 0

    def update(self, lines: list[str]) -> None:
        now = time.monotonic()
        if self.live:
            width, height = shutil.get_terminal_size()
            shown = [line[: width - 1] for line in lines[: height - 1]]
            self._clear()
            self.stream.write("\n".join(shown) + "\n")
            self.stream.flush()
            self._shown = len(shown)
        elif now - self._last >= self.every_s:
            self._last = now
            print("\n".join(lines), file=self.stream, flush=True)

    def print(self, text: str = "") -> None:
        """Lines that stay, above the others."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._shown:
            self.stream.write(f"\x1b[{self._shown}F\x1b[J")
            self._shown = 0


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def bar(done: float, width: int = 20) -> str:
    """A fraction from 0 to 1, for eyes."""
    full = int(done * width)
    return "[" + "#" * full + "." * (width - full) + "]"


def columns(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns under their titles."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [titles, *rows]
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


class PrepareView:
    """The life of `jobs/prepare.py`."""

    def __init__(self, source: "Source", output: "Place") -> None:
        self.line, self.output, self.kept = LiveLine(), output, 0
        counts = ", ".join(f"{len(entries)} {split}" for split, entries in source.splits.items())
        self.line.print(f"{source.name}: {len(source.classes)} classes, {counts} images")

    def progress(self, progress: "Progress") -> None:
        new = progress.images_done - progress.images_kept
        rate = new / max(progress.elapsed_s, 1e-9)
        left = duration((progress.images_total - progress.images_done) / rate) if rate else "--:--"
        self.line.update(
            f"prepared {bar(progress.images_done / progress.images_total)} "
            f"{progress.images_done}/{progress.images_total} images  {rate:.0f} images/s  "
            f"rejected {progress.rejected}  ETA {left}"
        )
        self.kept = progress.images_kept

    def finished(self, manifest: "Manifest") -> None:
        size = sum(shard.size_bytes for shard in manifest.shards)
        rows = manifest.rows
        recipe = "imagenette " if manifest.image_size >= 224 else ""
        if self.kept:
            self.line.print(f"{self.kept} images were there from an earlier attempt and are kept")
        self.line.print(
            f"wrote {len(manifest.shards)} shards, {size / 1e6:.1f} MB, digest {manifest.digest}, to {self.output}; "
            f"train with: python jobs/train.py {recipe}--data {shlex.quote(str(self.output))}"
        )
        self.line.print(
            f"{sum(rows.values())} rows ({rows['train']} train, {rows['val']} val), {manifest.rejected} rejected"
            + (f", listed in {self.output / 'rejected.jsonl'}" if manifest.rejected else "")
        )


class CheckView:
    """The life of `jobs/prepare.py --check`."""

    def __init__(self) -> None:
        self.line = LiveLine()

    def progress(self, done: int, total: int, images_per_s: float) -> None:
        eta = duration((total - done) / images_per_s) if images_per_s else "--:--"
        self.line.update(f"checked {done}/{total} images  {images_per_s:.0f} images/s  ETA {eta}")

    def finished(self, report: "Report", picture: Path) -> None:
        from alexnet.pictures import contact_sheet

        rows, classes = report.manifest.rows, report.manifest.classes
        self.line.print(
            f"counts     {rows['train']} train and {rows['val']} val rows, {len(classes)} classes: as there"
        )
        self.line.print(f"decoding   all {report.images} images")
        names = report.manifest.class_names or classes
        captions = [names[label].split(",")[0] for label in report.labels]
        title = f"{report.manifest.source}: training images as the net sees them"
        contact_sheet(report.samples, captions, title).savefig(picture, dpi=100)
        self.line.print(f"picture    {picture}")
        self.line.print(
            f"{report.images} images ok, {report.images_per_s:.0f} images/s decoded and cut by {report.num_tasks} "
            f"tasks (digest {report.manifest.digest})"
        )


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


def percent(error: float) -> str:
    return f"{100 * error:.2f} %"
