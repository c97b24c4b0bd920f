"""AlexNet's best-known failure: a loss that stays on the plateau of random guessing."""

import math
from collections.abc import Sequence

STUCK_STEPS = 50  # between two checks, and before the first
STUCK_WINDOW = 20  # steps whose mean loss is checked
STUCK_MARGIN = 0.01  # below ln(classes), as a fraction of it
STUCK_REMEDIES = {
    "paper": "The paper's initialisation can stay on this plateau for long on small data; "
    "try --init he --pixel-scale 0.0156",
    "he": "If it lasts, try another --lr: the paper's 0.01 is meant for batches of 128",
}


class StuckWatch:
    """Warns once, when the loss is still that of guessing."""

    def __init__(self, num_classes: int, init: str) -> None:
        self.num_classes, self.init, self._warned = num_classes, init, False

    def is_due(self, total_step: int, new_steps: int, *, last: bool) -> bool:
        """Whether to check now: a multiple of STUCK_STEPS is among the latest `new_steps` of `total_step` updates, or
        the epoch is at its end. So however many losses are read at a time, and wherever the run was resumed."""
        return last or total_step // STUCK_STEPS > (total_step - new_steps) // STUCK_STEPS

    def check(self, total_step: int, losses: Sequence[float]) -> str | None:
        """A warning if the mean of the epoch's last losses is no better than guessing; None otherwise."""
        recent, guess = losses[-STUCK_WINDOW:], math.log(self.num_classes)
        mean = sum(recent) / len(recent)
        if self._warned or total_step < STUCK_STEPS or mean < (1 - STUCK_MARGIN) * guess:
            return None
        self._warned = True
        return (
            f"after {total_step} steps the loss is {mean:.4f}, no better than guessing, "
            f"ln({self.num_classes}) = {guess:.4f}. " + STUCK_REMEDIES[self.init]
        )
