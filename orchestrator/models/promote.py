"""Whether a new model takes the champion's place: only if it is better by more than chance, on the same images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexnet.intervals import difference_interval


@dataclass(frozen=True)
class Decision:
    """Of one new model against one old model."""

    promote: bool
    text: str  # which way it went and why, one line
    difference: float  # of the top-1 errors, new less old
    interval: tuple[float, float]  # of the difference, 95 %


def decide(wrong_old: NDArray[np.bool_], wrong_new: NDArray[np.bool_]) -> Decision:
    """Of each image, whether the champion and the new model get it wrong, in the same order.

    Promoted where the whole 95 % interval of the difference in top-1 error is below 0. Raises ValueError for none, or
    not the same number, of images.
    """
    old, new = np.asarray(wrong_old, bool), np.asarray(wrong_new, bool)
    if old.shape != new.shape or old.ndim != 1 or not len(old):
        raise ValueError(f"images = {old.size} and {new.size}: both models are judged on the same images, at least one")
    total, mended, broken = len(old), int((old & ~new).sum()), int((new & ~old).sum())
    low, high = difference_interval(mended, broken, total)
    difference = float(new.mean() - old.mean())
    what = (
        f"top-1 error {100 * new.mean():.2f} % against the champion's {100 * old.mean():.2f} % on the same {total} "
        f"images: {100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    )
    if high < 0:
        verdict = "better by more than chance: promoted"
    elif low > 0:
        verdict = "worse by more than chance: not promoted"
    else:
        verdict = "not told apart by that many images: not promoted"
    return Decision(high < 0, f"{what}; {verdict}", difference, (low, high))
