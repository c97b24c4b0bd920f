"""What a pass over a data set shows of a net: its surest mistakes, and the images nearest to some in fc7.

N images, U units of fc7, K classes. Memory is bounded: features are kept of the images asked for and of a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexnet.explain import Nearest, features_and_probabilities
from alexnet.trained import TrainedNet
from orchestrator.models import metrics
from orchestrator.models.stored import Images, Part, Stored

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # which images, how many are done, of how many

SHOWN = 8  # validation images with bars and neighbours
MISTAKES = 12
SAMPLE = 1000  # images whose features are drawn as points: t-SNE takes seconds for these
NEIGHBOURS = 6


@dataclass(frozen=True)
class Seen:
    """An image of a data set or of the user's, and what the net says of it."""

    image: Images  # (S, S, 3)
    name: str
    label: int | None  # its true class
    probabilities: Floats  # (K,)
    features: Floats  # (U,)

    @property
    def answer(self) -> int:
        """The likeliest class; of an image that is wrong because of a tie, one that is not its own, as evaluating has
        it (metrics.py)."""
        return int(_answers(self.probabilities[None], None if self.label is None else np.array([self.label]))[0][0])

    def best(self, count: int) -> list[int]:
        """The likeliest classes, the first the likeliest."""
        found: list[int] = metrics.top_k(self.probabilities[None].astype(np.float64), count)[0][0].tolist()
        return found

    def alone(self) -> "Seen":
        """A copy, which does not keep the batch that it was in."""
        copies = (self.image.copy(), self.name, self.label, self.probabilities.copy(), self.features.copy())
        return Seen(*copies)


@dataclass(frozen=True)
class Validation:
    """What a pass over the validation part shows."""

    images: int
    wrong: int
    shown: list[Seen]  # evenly apart
    mistakes: list[Seen]  # the surest first
    features: Floats  # (N, U) of a sample
    labels: NDArray[np.int64]  # (N,) of the sample


def see(trained: TrainedNet, images: list[tuple[Images, str]]) -> list[Seen]:
    """What the net says of images and their names, whose true class is not known."""
    if not images:
        return []
    features, probabilities = features_and_probabilities(trained, np.stack([image for image, _ in images]))
    return [Seen(*each, None, probabilities[i], features[i]) for i, each in enumerate(images)]


def validate(trained: TrainedNet, part: Part, progress: Progress) -> Validation:
    """Ask the net about every image of the part. Raises DamagedData; JobError where a file cannot be read."""
    shown, sampled = ({i * part.rows // count for i in range(count)} for count in (SHOWN, min(SAMPLE, part.rows)))
    kept: list[tuple[int, Seen]] = []
    mistakes: list[tuple[float, int, Seen]] = []
    features_of_sample, labels_of_sample = [], []
    done = wrong = 0
    for images, labels in part.batches():
        features, probabilities = features_and_probabilities(trained, images)
        is_wrong = _answers(probabilities, labels)[1]
        surest = np.argsort(-probabilities.max(axis=1), kind="stable")
        missed = surest[is_wrong[surest]]
        wrong += len(missed)
        near = [Seen(images[i], "", int(labels[i]), probabilities[i], features[i]) for i in range(len(labels))]
        kept += [(done + i, seen.alone()) for i, seen in enumerate(near) if done + i in shown]
        mistakes += [(-float(probabilities[i].max()), done + int(i), near[i].alone()) for i in missed[:MISTAKES]]
        mistakes = sorted(mistakes, key=lambda each: each[:2])[:MISTAKES]
        chosen = [i for i in range(len(labels)) if done + i in sampled]
        features_of_sample.append(features[chosen])
        labels_of_sample.append(labels[chosen])
        done += len(labels)
        progress("validation", done, part.rows)
    named = _named(part, kept)
    worst = _named(part, [(position, seen) for _, position, seen in mistakes])
    return Validation(done, wrong, named, worst, np.concatenate(features_of_sample), np.concatenate(labels_of_sample))


def nearest(
    trained: TrainedNet, part: Part, queries: list[Seen], progress: Progress
) -> list[list[tuple[Stored, float]]]:
    """Of each query the NEIGHBOURS nearest images of the part, and their distances in fc7; exact.

    Raises DamagedData; JobError where a file cannot be read.
    """
    found = Nearest(np.stack([query.features for query in queries]), NEIGHBOURS)
    for images, _ in part.batches():
        found.add(features_and_probabilities(trained, images)[0])
        progress("training", found.seen, part.rows)
    rows = zip(found.positions.tolist(), found.distances.tolist(), strict=True)
    return [
        [(part.at(position), distance) for position, distance in zip(positions, distances, strict=True)]
        for positions, distances in rows
    ]


def _answers(probabilities: Floats, labels: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each image the class that it is taken for, and whether that is wrong, by the rule of metrics.py for ties."""
    valid = np.zeros(probabilities.shape, np.bool_)
    if labels is not None:
        valid[np.arange(len(labels)), labels] = True
    shares = probabilities.astype(np.float64)
    wrong = metrics.num_not_worse(shares, valid) >= 1
    return metrics.predicted(shares, valid, wrong), wrong


def _named(part: Part, found: list[tuple[int, Seen]]) -> list[Seen]:
    return [Seen(**seen.__dict__ | {"name": part.at(position).name}) for position, seen in found]
