"""Evaluates trained nets on a split of shards: each alone, their ensemble, and pairs of them on the same images.

N images, K classes (the net's outputs), M models.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet.images import WORDNET_ID
from alexnet.intervals import error_interval
from alexnet.trained import TrainedNet, log_mean
from orchestrator.base.environment import command
from orchestrator.base.exits import JobError
from orchestrator.base.shown import quoted
from orchestrator.base.storage import StoragePath
from orchestrator.data import shards
from orchestrator.data.shards import Manifest, read_manifest
from orchestrator.models import metrics
from orchestrator.models.engine import Settings, start
from orchestrator.models.metrics import Calibration, Comparison
from orchestrator.models.shard_rows import Rows, ShardReader, ranges, read_rows
from orchestrator.models.words import in_words
from orchestrator.train.classes import has_top5

MOST_CONFUSED = 20  # pairs of classes
TOP = 5  # likeliest classes of an image that are kept
ENSEMBLE = "ensemble"

Progress = Callable[[int, int, float], None]  # images done, of how many, seconds
Keep = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], None]  # rows, classes and probabilities


@dataclass(frozen=True)
class Data:
    """A split of shards."""

    folder: StoragePath
    manifest: Manifest
    split: str
    rows: Rows

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    def outputs(self, trained: TrainedNet) -> tuple[str, ...]:
        """What a net's outputs are called, in the order of the data's classes."""
        return in_words(self.classes, self.manifest.class_names, trained.classes)

    @property
    def is_imagenet(self) -> bool:
        """Whether the published figures are of the same task: ImageNet's thousand classes."""
        return len(self.classes) == 1000 and all(WORDNET_ID.fullmatch(name) for name in self.classes)


def open_data(folder: str, split: str = "val") -> Data:
    """Raises ValueError of one line, DamagedData for shards that are not as the manifest says."""
    place = StoragePath.of(folder)
    manifest = read_manifest(place)
    if split not in manifest.rows:
        raise ValueError(f"--split {split}: {place} has {' and '.join(manifest.rows)}")
    if not manifest.rows[split]:
        raise ValueError(f"--split {split}: {place} has no images in it")
    of_split = manifest.model_copy(update={"shards": manifest.split(split)})
    shards.verify(place, of_split, whole=place.local is not None)
    return Data(place, manifest, split, read_rows(place, manifest, split))


def check_named(name: str, trained: TrainedNet) -> None:
    """Raises ValueError of one line for a net whose classes have no names, as in the files of other programs."""
    if not trained.description.classes:
        raise ValueError(
            f"MODEL {name}: has no names for its {trained.net.num_classes} outputs; give them: "
            f"{command('convert')} FILE --to net.safetensors --classes NAMES"
        )


def column_order(name: str, trained: TrainedNet, data: Data) -> NDArray[np.int64]:
    """Where the net has each of the data's classes, by their names, and then its outputs that are no class.

    Raises ValueError of one line where the classes are others, or the stored images of another size.
    """
    theirs = trained.description.classes
    if set(theirs) != set(data.classes) or len(set(theirs)) < len(theirs):
        check_named(name, trained)
        strange = next((each for each in theirs if each not in data.classes), None)
        missing = next((each for each in data.classes if each not in theirs), None)
        parts = [f"the model has {len(theirs)} classes and the data {len(data.classes)}"]
        parts += [f"{quoted(strange)} is not one of the data's"] if strange is not None else []
        parts += [f"{quoted(missing)} is not one of the model's"] if missing is not None else []
        raise ValueError(f"MODEL {name}: was trained on other classes than those of {data.folder}: {'; '.join(parts)}")
    if trained.image_size != data.manifest.image_size:
        size = trained.image_size
        raise ValueError(
            f"MODEL {name}: was trained on images stored at {size} pixels a side, those of {data.folder} have "
            f"{data.manifest.image_size}; prepare them again with --image-size {size}"
        )
    place = {each: number for number, each in enumerate(theirs)}
    return np.array([*(place[each] for each in data.classes), *range(len(theirs), trained.net.num_classes)], np.int64)


def check_ensemble(names: Sequence[str], nets: Sequence[TrainedNet]) -> None:
    """Raises ValueError of one line unless all nets have the same classes in the same order."""
    first = nets[0]
    for name, net in zip(names[1:], nets[1:], strict=True):
        if net.classes == first.classes:
            continue
        what = "its classes in another order" if set(net.classes) == set(first.classes) else "other classes"
        raise ValueError(f"MODEL {name}: has {what} than {names[0]}; an ensemble's models have the same in one order")


@dataclass
class _Collected:
    """What is kept of each image while a model answers."""

    not_worse: list[NDArray[np.int64]] = field(default_factory=list)
    predicted: list[NDArray[np.int64]] = field(default_factory=list)
    confidence: list[NDArray[np.float64]] = field(default_factory=list)
    loss: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, log_probabilities: NDArray[np.float64], valid: NDArray[np.bool_]) -> None:
        not_worse = metrics.num_not_worse(log_probabilities, valid)
        self.not_worse.append(not_worse)
        self.predicted.append(metrics.predicted(log_probabilities, valid, not_worse >= 1))
        self.confidence.append(np.exp(log_probabilities.max(1)))
        self.loss.append(-np.logaddexp.reduce(np.where(valid, log_probabilities, -np.inf), 1))


@dataclass(frozen=True)
class Result:
    """How wrong a model is, or an ensemble."""

    name: str
    views: int
    classes: tuple[str, ...]  # of the data, in words
    outputs: tuple[str, ...]  # these, and the net's outputs that are no class
    loss: float
    labels: NDArray[np.int64]  # (N,) the class that each image counts for
    predicted: NDArray[np.int64]  # (N,)
    wrong: NDArray[np.bool_]  # (N,) at top 1
    wrong5: NDArray[np.bool_] | None  # None where there are five classes or fewer
    calibration: Calibration

    @property
    def top1_error(self) -> float:
        return float(self.wrong.mean())

    @property
    def top5_error(self) -> float | None:
        return None if self.wrong5 is None else float(self.wrong5.mean())

    def confusion(self) -> NDArray[np.int64]:
        """(K, K): images of class i taken for class j, the net's outputs that are no class included."""
        return metrics.confusion(self.labels, self.predicted, len(self.outputs))

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class of the data."""
        num = len(self.classes)
        images, wrong = (np.bincount(self.labels[which], minlength=num) for which in (slice(None), self.wrong))
        wrong5 = None if self.wrong5 is None else np.bincount(self.labels[self.wrong5], minlength=num)
        taken = np.bincount(self.predicted, minlength=num)
        return [
            {
                "class": name,
                "images": int(images[i]),
                "top1_error": float(wrong[i] / images[i]) if images[i] else None,
                "top5_error": float(wrong5[i] / images[i]) if wrong5 is not None and images[i] else None,
                "predicted": int(taken[i]),
            }
            for i, name in enumerate(self.classes)
        ]

    def confused(self, most: int = MOST_CONFUSED) -> list[dict[str, Any]]:
        """The pairs of a class and what it was taken for that are the most frequent, ties in the classes' order."""
        counts = self.confusion()
        images = counts.sum(1)
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        return [
            {"class": self.outputs[i], "taken_for": self.outputs[j], "images": int(counts[i, j]),
             "share": float(counts[i, j] / images[i])}
            for i, j in zip(*np.unravel_index(order, counts.shape), strict=True) if counts[i, j]
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """As evaluation.json has it (docs/formats.md)."""
        num = len(self.wrong)
        return {
            "name": self.name,
            "views": self.views,
            "num_images": num,
            "loss": self.loss,
            "top1_error": self.top1_error,
            "top5_error": self.top5_error,
            "top1_interval": list(error_interval(int(self.wrong.sum()), num)),
            "top5_interval": None if self.wrong5 is None else list(error_interval(int(self.wrong5.sum()), num)),
            "ece": self.calibration.ece,
            "calibration": self.calibration.bins,
            "per_class": self.per_class(),
            "confused": self.confused(),
        }


@dataclass(frozen=True)
class Evaluation:
    """Of one model or several on the same images."""

    models: list[Result]
    ensemble: Result | None
    comparisons: list[tuple[str, str, Comparison]]
    left_out: int  # images without a valid label
    images_per_s: float

    @property
    def results(self) -> list[Result]:
        """The models', and the ensemble's if there is one."""
        return [*self.models, *([self.ensemble] if self.ensemble else [])]


def evaluate(
    models: Sequence[tuple[str, TrainedNet]],
    data: Data,
    settings: Settings,
    *,
    valid: NDArray[np.bool_] | None = None,
    num_workers: int | None = None,
    keep: Keep = lambda rows, classes, probabilities: None,
    progress: Progress = lambda done, total, seconds: None,
) -> Evaluation:
    """Apply all models to every image once, and compute how wrong they are.

    valid: (N, K of the data), other labels than the data's; images without any are left out. keep: gets the likeliest
    classes of every image as they come: the model's, or the ensemble's. Raises ValueError of one line before it begins,
    JobError where it cannot go on.
    """
    names, nets = [name for name, _ in models], [net for _, net in models]
    check_ensemble(names, nets)
    orders = [column_order(name, net, data) for name, net in models]
    order = orders[0]
    num_rows, num_outputs = len(data.rows), len(order)
    known: NDArray[np.bool_] = np.ones(num_rows, np.bool_) if valid is None else np.any(valid, axis=1)
    collected = [_Collected() for _ in range(len(nets) + (len(nets) > 1))]
    reader = ShardReader(data.folder, data.manifest, data.split)
    begun, done, used = time.monotonic(), 0, []
    with start(nets, reader, settings, num_workers) as engine:
        for answer in engine.answers(ranges(num_rows, settings.batch_size)):
            rows = np.arange(done, done + len(answer.ids))
            assert np.array_equal(answer.ids, data.rows.ids[rows]), f"rows {done} on are not those that were asked for"
            found = answer.log_probabilities[:, :, order]
            if len(nets) > 1:
                found = np.concatenate([found, log_mean(torch.from_numpy(found)).numpy()[None]])
            right = np.zeros((len(rows), num_outputs), np.bool_)
            if valid is None:
                right[np.arange(len(rows)), data.rows.labels[rows]] = True
            else:
                right[:, : len(data.classes)] = valid[rows]
            for each, log_probabilities in zip(collected, found, strict=True):
                each.add(log_probabilities[known[rows]], right[known[rows]])
            keep(rows, *metrics.top_k(found[-1], min(TOP, num_outputs)))
            used.append(_counted_for(data.rows.labels[rows], right)[known[rows]])
            done += len(rows)
            progress(done, num_rows, time.monotonic() - begun)
    if done != num_rows:
        raise JobError(f"{done} of {num_rows} images were answered: rows are missing")
    labels = np.concatenate(used)
    outputs = data.outputs(nets[0])
    each_name = [*names, *([ENSEMBLE] if len(nets) > 1 else [])]
    results = [
        _result(name, part, labels, outputs, data, settings) for name, part in zip(each_name, collected, strict=True)
    ]
    pairs = [(a.name, b.name, metrics.compare(a.wrong, b.wrong)) for a, b in combinations(results, 2)]
    speed = num_rows / max(time.monotonic() - begun, 1e-9)
    ensemble = results[-1] if len(nets) > 1 else None
    return Evaluation(results[: len(nets)], ensemble, pairs, int((~known).sum()), speed)


def _counted_for(labels: NDArray[np.int64], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The class that each image counts for in tables: the data's label, or the first valid one if that is not valid."""
    found: NDArray[np.int64] = np.where(right[np.arange(len(labels)), labels], labels, right.argmax(1))
    return found


def _result(
    name: str, part: _Collected, labels: NDArray[np.int64], outputs: tuple[str, ...], data: Data, settings: Settings
) -> Result:
    not_worse, taken = np.concatenate(part.not_worse), np.concatenate(part.predicted)
    wrong = not_worse >= 1
    return Result(
        name,
        settings.views,
        outputs[: len(data.classes)],
        outputs,
        float(np.concatenate(part.loss).mean()),
        labels,
        np.where(wrong, taken, labels),  # with several valid labels, any of them is right
        wrong,
        not_worse >= 5 if has_top5(len(outputs)) else None,
        metrics.calibration(np.concatenate(part.confidence), wrong),
    )
