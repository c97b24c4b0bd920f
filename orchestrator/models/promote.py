"""Whether a new model takes the champion's place: only if it is better by more than chance, on the same images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexnet.intervals import difference_interval
from orchestrator.tracking import registry
from orchestrator.tracking.run import Run


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


def promote(run: Run, registered: registry.Registered, decision: Decision | None) -> str:
    """Carry a decision out; returns a line that says which way it went and why.

    run: the MLflow run of the new model; registered: its version; decision: against the champion, None if there is no
    champion, or it is this version. Raises what the server answers.
    """
    name, champion = registered.name, registry.champion(run.store, registered.name)
    if champion == registered.version:
        return f"{registered.address} is the champion of {name} already"
    if champion is None:
        reason = "the first champion"
    elif decision is None or not decision.promote:
        why = decision.text if decision else "not compared with it"
        return f"models:/{name}/{champion} stays the champion of {name}: {why}"
    else:
        reason = decision.text
    registry.make_champion(run, registered, reason)
    return f"{registered.address} is now the champion of {name}: {reason}"
