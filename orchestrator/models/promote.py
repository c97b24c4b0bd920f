"""Whether a new model takes the champion's place: only if it is better by more than chance, on the same images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.base.exits import JobError
from orchestrator.models.metrics import compare
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
    found = compare(wrong_new, wrong_old)
    (low, high), difference = found.interval, found.difference
    new, old = (float(np.mean(wrong)) for wrong in (wrong_new, wrong_old))
    what = (
        f"top-1 error {100 * new:.2f} % against the champion's {100 * old:.2f} % on the same {found.num_images} "
        f"images: {100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    )
    if found.is_significant and difference < 0:
        verdict = "better by more than chance: promoted"
    elif found.is_significant:
        verdict = "worse by more than chance: not promoted"
    else:
        verdict = "not told apart by that many images: not promoted"
    return Decision(found.is_significant and difference < 0, f"{what}; {verdict}", difference, found.interval)


def promote(run: Run, registered: registry.Registered, decision: Decision | None, against: str | None) -> str:
    """Carry a decision out; returns a line that says which way it went and why.

    run: the MLflow run of the new model; registered: its version; against: the version that was the champion when it
    was evaluated, None if there was none; decision: against that. Raises JobError where another version has become the
    champion meanwhile, and what the server answers.
    """
    name, champion = registered.name, registry.champion(run.store, registered.name)
    if champion not in (against, registered.version):
        now = f"models:/{name}/{champion} is" if champion else f"models:/{name}@{registry.CHAMPION} is no version"
        before = f"models:/{name}/{against} was" if against else "none was"
        raise JobError(
            f"{registered.address}: is registered, and not the champion of {name}: {now} now, where {before} when they "
            "were compared; run it again to compare it with that"
        )
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
