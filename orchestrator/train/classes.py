"""Classes of unequal size: their weights in the loss, and how wrong a net is class by class."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from orchestrator.base.shown import count_of
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest

UNEQUAL = 10  # times as many images as another class has


def has_top5(num_classes: int) -> bool:
    """Whether a top-5 error means anything: among five classes every guess is one of the first five."""
    return num_classes > 5


def loss_weights(config: TrainConfig, manifest: Manifest, num_classes: int) -> list[float] | None:
    """Of each output of the net, for the training loss; None: all alike.

    balanced: N / (classes * count of the class), over the classes that have training images: on average over these
    images 1, so that the same learning rate fits.
    """
    if config.class_weights == "none":
        return None
    counts = [*manifest.class_rows["train"], *[0] * num_classes][:num_classes]
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 1.0 for count in counts]


def warn_if_unequal(config: TrainConfig, manifest: Manifest) -> str | None:
    """A line about classes of which one has more than UNEQUAL times the training images of another."""
    counts = manifest.class_rows["train"]
    most, least = max(counts), min(counts)
    if config.class_weights != "none" or most <= UNEQUAL * least:
        return None
    other, one = (f"{count} ({manifest.classes[counts.index(count)]})" for count in (most, least))
    without = counts.count(0)
    compensates = "--class-weights balanced compensates"
    if without:
        compensates += f", but not for the {count_of(without, 'class', 'classes')} without any"
    return f"training images by class: from {one} to {other}; {compensates}"


class ClassErrors:
    """The errors of a run's epochs class by class, for its result."""

    def __init__(self, manifest: Manifest, known: Mapping[str, Any]) -> None:
        """known: the result of the run so far, of which the last and the best epoch are told."""
        self.manifest = manifest
        self._errors: dict[int, list[float | None]] = {}  # by epoch
        rows = known.get("per_class", [])
        if [row["class"] for row in rows] == list(manifest.classes):
            for entry, key in (("metrics", "top1_error"), ("best", "best_top1_error")):
                self._errors[known[entry]["epoch"]] = [row[key] for row in rows]

    def add(self, epoch: int, wrong: Sequence[int]) -> None:
        """wrong: of each class the validation images that were wrong at top 1 after an epoch."""
        pairs = zip_longest(wrong, self.manifest.class_rows["val"], fillvalue=0)
        errors = [number / count if count else None for number, count in pairs]
        self._errors[epoch] = errors[: len(self.manifest.classes)]

    def table(self, last: int, best: int) -> list[dict[str, Any]]:
        """A row for each class, with its errors after the last and the best epoch; None where it is not known."""
        rows, unknown = self.manifest.class_rows, [None] * len(self.manifest.classes)
        columns = rows["train"], rows["val"], self._errors.get(last, unknown), self._errors.get(best, unknown)
        return [
            {"class": name, "train": train, "val": val, "top1_error": now, "best_top1_error": then}
            for name, train, val, now, then in zip(self.manifest.classes, *columns, strict=True)
        ]
