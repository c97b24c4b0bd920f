"""What a preparation and a check print: their progress and their outcome."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.base.environment import command
from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.base.terminal import LiveLine, bar, duration
from orchestrator.data.shards import REJECTED

if TYPE_CHECKING:
    from orchestrator.base.storage import StoragePath
    from orchestrator.data.check import Report
    from orchestrator.data.prepare import Progress
    from orchestrator.data.shards import Manifest
    from orchestrator.data.sources import Source


SHOWN = 5  # names in a line
CAPTION = 40  # characters, below an image


def show_source(source: "Source", line: LiveLine) -> None:
    """What a source holds, what is left out of it, and what looks wrong."""
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in source.splits.items())
    names = ", ".join(source.classes[:SHOWN]) + (", ..." if len(source.classes) > SHOWN else "")
    line.print(f"{shown(source.name, LONGEST_VALUE)}: {len(source.classes)} classes ({names}), {counts} images")
    if source.left_out:
        rules = Counter(rule for _, rule in source.left_out)
        kinds = ", ".join(f"{count} {rule}" for rule, count in rules.most_common(SHOWN))
        line.print(f"left out: {len(source.left_out)} files or folders ({kinds}), such as {source.left_out[0][0]}")
    if source.misplaced:
        name, reason = source.misplaced[0]
        line.print(f"rejected: {len(source.misplaced)} files without a class, such as {name}: {reason}")
    for warning in source.warnings:
        line.print(f"warning: {warning}")


class PrepareView:
    """A preparation."""

    def __init__(self, output: "StoragePath") -> None:
        self.line, self.output = LiveLine(), output
        self.last: Progress | None = None

    def progress(self, progress: "Progress") -> None:
        new = progress.images_done - progress.images_kept
        rate = new / max(progress.elapsed_s, 1e-9)
        left = duration((progress.images_total - progress.images_done) / rate) if rate else "--:--"
        self.line.update(
            f"prepared {bar(progress.images_done / progress.images_total)} "
            f"{progress.images_done}/{progress.images_total} images  {rate:.0f} images/s  "
            f"rejected {progress.rejected}  ETA {left}"
        )
        self.last = progress

    def finished(self, manifest: "Manifest", training: str) -> None:
        """training: a command that trains on the shards."""
        size = sum(shard.size_bytes for shard in manifest.shards)
        rows = manifest.rows
        if self.last and self.last.images_kept:
            self.line.print(f"{self.last.images_kept} images were kept from an earlier attempt")
        if self.last and self.last.guessed:
            self.line.print(f"{len(self.last.guessed)} image(s) were scaled by a guess; first {self.last.guessed[0]}")
        self.line.print(
            f"wrote {len(manifest.shards)} shards ({size / 1e6:.1f} MB, digest {manifest.digest}) to {self.output}"
        )
        counted = sorted(zip(manifest.class_rows["train"], manifest.classes, strict=True))
        (least, smallest), (most, largest) = counted[0], counted[-1]
        self.line.print(f"training images by class: from {least} ({smallest}) to {most} ({largest})")
        self.line.print(f"look at them with: {command('prepare')} --check {shlex.quote(str(self.output))}")
        self.line.print(f"train with: {training}")
        self.line.print(
            f"{sum(rows.values())} rows ({rows['train']} train, {rows['val']} val), {manifest.rejected} rejected"
            + (f", listed in {self.output / REJECTED}" if manifest.rejected else "")
            + "".join(f", {count} {kind}" for kind, count in manifest.kinds.items())
        )


class CheckView:
    """A check (--check)."""

    def __init__(self) -> None:
        self.line = LiveLine()

    def progress(self, done: int, total: int, images_per_s: float) -> None:
        eta = duration((total - done) / images_per_s) if images_per_s else "--:--"
        self.line.update(f"checked {done}/{total} images  {images_per_s:.0f} images/s  ETA {eta}")

    def finished(self, report: "Report", picture: Path) -> None:
        from alexnet.pictures import contact_sheet

        rows, classes = report.manifest.rows, report.manifest.classes
        self.line.print(
            f"counts     {rows['train']} train and {rows['val']} val rows of {len(classes)} classes match the manifest"
        )
        for warning in report.manifest.warnings:
            self.line.print(f"warning    {warning}")
        self.line.print(f"decoding   all {report.images} images decoded")
        names = report.manifest.class_names or classes
        captions = [shown(names[label].split(",")[0], CAPTION) for label in report.labels]
        title = f"{shown(report.manifest.source, LONGEST_VALUE)}: training images as the net sees them"
        contact_sheet(report.samples, captions, title).savefig(picture, dpi=100)
        self.line.print(f"picture    {picture}")
        self.line.print(
            f"{report.images} images ok, {report.images_per_s:.0f} images/s decoded and cropped by "
            f"{report.num_tasks} tasks (digest {report.manifest.digest})"
        )
