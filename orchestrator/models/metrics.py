"""What evaluating computes from answers and labels: errors with intervals, confusion, calibration, paired comparison.

N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet.intervals import difference_interval

CONFIDENCE = 0.95
NUM_BINS = 15  # of confidence, for the calibration error

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def num_not_worse(log_probabilities: Floats, valid: Bools) -> Ints:
    """(N,): how many classes that are not valid are at least as likely as the likeliest valid one, or NaN.

    valid: (N, K), True for the classes that are right for an image; one, or several. An image is wrong at top k if k
    classes or more are: the honest ties of alexnet/evaluate.py.
    """
    best = np.where(valid, log_probabilities, -np.inf).max(1, keepdims=True)
    found: Ints = (~(log_probabilities < best) & ~valid).sum(1)
    return found


def predicted(log_probabilities: Floats, valid: Bools, wrong: Bools) -> Ints:
    """(N,): the likeliest class; of an image that is wrong because of a tie, one that is not valid."""
    shown = np.where(valid & wrong[:, None], -np.inf, log_probabilities)
    found: Ints = shown.argmax(1)
    return found


def top_k(log_probabilities: Floats, k: int) -> tuple[Ints, NDArray[np.float32]]:
    """(N, k): the likeliest classes, the first the likeliest, and their probabilities; ties in the classes' order."""
    order = np.argsort(-log_probabilities, 1, kind="stable")[:, :k]
    return order, np.exp(np.take_along_axis(log_probabilities, order, 1)).astype(np.float32)


def confusion(labels: Ints, predictions: Ints, num_classes: int) -> Ints:
    """(K, K): how many images of class i were taken for class j."""
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    found: Ints = counts.reshape(num_classes, num_classes).astype(np.int64)
    return found


@dataclass(frozen=True)
class Calibration:
    """How far the net's confidence in its answers is from how often they are right."""

    ece: float  # expected calibration error: the mean over images of |accuracy - confidence| of their bin
    bins: list[dict[str, Any]]  # low, high, images, confidence, accuracy; the last two None of an empty bin


def calibration(confidence: Floats, wrong: Bools, num_bins: int = NUM_BINS) -> Calibration:
    """By bins (low, high] of equal width. confidence: the probability of the likeliest class."""
    number = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    images = np.bincount(number, minlength=num_bins)
    confident = np.bincount(number, confidence, num_bins)
    right = np.bincount(number, ~wrong, num_bins)
    bins = [
        {"low": i / num_bins, "high": (i + 1) / num_bins, "images": int(n),
         "confidence": float(confident[i] / n) if n else None, "accuracy": float(right[i] / n) if n else None}
        for i, n in enumerate(images)
    ]  # fmt: skip
    return Calibration(float(np.abs(right - confident).sum() / len(wrong)), bins)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    num_images: int
    only_first_wrong: int
    only_second_wrong: int
    difference: float  # of the top-1 errors, the first's less the second's
    interval: tuple[float, float]  # of the difference, 95 %
    p_value: float  # McNemar's exact test, two-sided: that neither is better

    @property
    def is_significant(self) -> bool:
        """Whether one is better: the interval leaves 0 out. McNemar's exact test, which asks for more, can differ."""
        return not self.interval[0] <= 0 <= self.interval[1]


def compare(first_wrong: Sequence[bool] | Bools, second_wrong: Sequence[bool] | Bools) -> Comparison:
    """Compare two models by which images each got wrong: a paired comparison, which needs far fewer images than one of
    two independent errors.

    Raises ValueError for no images, or not the same number of each.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(first_wrong, bool), np.asarray(second_wrong, bool)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"errors of {first.shape} and {second.shape} images: give those of the same images")
    num, b, c = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p_value = float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    return Comparison(num, b, c, (b - c) / num, difference_interval(b, c, num), p_value)
