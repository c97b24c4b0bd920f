"""What a preparation and a check print: what was found in a source, their progress and their outcome."""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.base.environment import command
from orchestrator.base.shown import LONGEST_VALUE, count_of, shown
from orchestrator.base.terminal import LiveLine, bar, columns, duration
from orchestrator.data.shards import MEAN_IMAGE, REJECTED

if TYPE_CHECKING:
    from orchestrator.base.storage import StoragePath
    from orchestrator.data.check import Report
    from orchestrator.data.prepare import Progress
    from orchestrator.data.shards import Manifest
    from orchestrator.data.sources import Source


SHOWN = 5  # names in a line


def show_source(source: "Source", line: LiveLine) -> None:
    """What a source holds, what is left out of it, and what looks wrong."""
    rows = {split: len(entries) for split, entries in source.splits.items()}
    line.print(_holds(source.name, source.classes, rows))
    if source.left_out:
        line.print(f"{_left_out(Counter(rule for _, rule in source.left_out))}, such as {source.left_out[0][0]}")
    if source.misplaced:
        name, reason = source.misplaced[0]
        line.print(f"rejected: {count_of(len(source.misplaced), 'file')} without a class, such as {name}: {reason}")
    for warning in source.warnings:
        line.print(f"warning: {warning}")


def show_prepared_source(manifest: "Manifest", line: LiveLine) -> None:
    """The same of a source that was prepared, from its manifest."""
    if manifest.found:  # none in those of before 0.3
        line.print(*manifest.found)
    line.print(_holds(manifest.source, manifest.classes, manifest.rows))
    if manifest.left_out:
        line.print(f"{_left_out(manifest.left_out)}, listed in {REJECTED}")
    for warning in manifest.warnings:
        line.print(f"warning: {warning}")


def _holds(name: str, classes: tuple[str, ...], rows: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in rows.items())
    names = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    return f"{shown(name, LONGEST_VALUE)}: {len(classes)} classes ({names}), {counts} images"


def _left_out(rules: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{count} {rule}" for rule, count in Counter(rules).most_common(SHOWN))
    return f"left out: {count_of(sum(rules.values()), 'file or folder', 'files or folders')} ({kinds})"


def class_lines(manifest: "Manifest") -> list[str]:
    """Classes by name with their rows: all of few; of many the largest and the smallest."""
    from orchestrator.data.sheet import named_classes

    def row(label: int) -> list[str]:
        train, val = (manifest.class_rows[split][label] for split in ("train", "val"))
        return ["", manifest.classes[label], *([words[label]] if words else []), str(train), str(val)]

    words = manifest.class_names
    largest, smallest = named_classes(manifest)
    rows = [row(label) for label in largest]
    if smallest:
        between = len(manifest.classes) - len(largest) - len(smallest)
        rows += [["", f"... {between} more", *[""] * (len(rows[0]) - 2)]] if between else []
        rows += [row(label) for label in smallest]
    return columns(["", "class", *(["in words"] if words else []), "train", "val"], rows)


def _kinds(manifest: "Manifest") -> str:
    return "".join(f", {count} {kind}" for kind, count in manifest.kinds.items())


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

    def finished(self, manifest: "Manifest", training: str, picture: "StoragePath") -> None:
        """training: a command that trains on the shards. picture: of their classes."""
        size = sum(shard.size_bytes for shard in manifest.shards)
        rows = manifest.rows
        if self.last and self.last.images_kept:
            were = "was" if self.last.images_kept == 1 else "were"
            self.line.print(f"{count_of(self.last.images_kept, 'image')} {were} kept from an earlier attempt")
        if self.last and self.last.guessed:
            were = "was" if self.last.guessed == 1 else "were"
            guessed = count_of(self.last.guessed, "image")
            self.line.print(f"{guessed} {were} scaled by a guess; first {self.last.first_guessed}")
        self.line.print(*class_lines(manifest))
        counted = sorted(zip(manifest.class_rows["train"], manifest.classes, strict=True))
        (least, smallest), (most, largest) = counted[0], counted[-1]
        self.line.print(f"training images by class: from {least} ({smallest}) to {most} ({largest})")
        self.line.print(
            f"wrote {count_of(len(manifest.shards), 'shard')} ({size / 1e6:.1f} MB, digest {manifest.digest}) to "
            f"{self.output}"
        )
        self.line.print(f"mean image: {self.output / MEAN_IMAGE}", f"contact sheet: {picture}")
        self.line.print(f"check them with: {command('prepare')} --check {shlex.quote(str(self.output))}")
        self.line.print(f"train with: {training}")
        self.line.print(
            f"{count_of(sum(rows.values()), 'row')} ({rows['train']} train, {rows['val']} val), "
            f"{manifest.rejected} rejected"
            + (f", listed in {self.output / REJECTED}" if manifest.rejected else "")
            + _kinds(manifest)
        )


class CheckView:
    """A check (--check)."""

    def __init__(self) -> None:
        self.line = LiveLine()

    def begin(self, manifest: "Manifest") -> None:
        """What the preparation found in the source."""
        show_prepared_source(manifest, self.line)
        self.line.print(*class_lines(manifest))
        self.line.print(f"{manifest.rejected} rejected{_kinds(manifest)}")

    def progress(self, done: int, total: int, images_per_s: float) -> None:
        eta = duration((total - done) / images_per_s) if images_per_s else "--:--"
        self.line.update(f"checked {done}/{total} images  {images_per_s:.0f} images/s  ETA {eta}")

    def finished(self, report: "Report", picture: Path) -> None:
        from alexnet.pictures import contact_sheet
        from orchestrator.data.sheet import as_png, caption

        manifest, rows = report.manifest, report.manifest.rows
        self.line.print(
            f"counts     {rows['train']} train and {rows['val']} val rows of {len(manifest.classes)} classes match the "
            "manifest"
        )
        self.line.print(f"decoding   all {report.images} images decoded")
        captions = [caption(manifest, label) for label in report.labels]
        title = f"{shown(manifest.source, LONGEST_VALUE)}: training images as the net sees them"
        picture.write_bytes(as_png(contact_sheet(report.samples, captions, title)))
        self.line.print(f"picture    {picture}")
        self.line.print(
            f"{report.images} images ok, {report.images_per_s:.0f} images/s decoded and cropped by "
            f"{count_of(report.num_tasks, 'task')} (digest {manifest.digest})"
        )
