"""Gradual warm-up of the learning rate (Goyal et al. 2017, arXiv 1706.02677, 2.2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Warmup:
    """A rate that rises over the first `steps` updates, by the same amount at each, from lr / steps to lr.

    It multiplies the rate that a schedule has set. It is a function of the number of updates alone, so there is nothing
    to save, and a run that is resumed within it goes on as if it had never stopped.
    """

    steps: int = 0

    def factor(self, updates: int) -> float:
        """On the rate of the update that comes after so many."""
        return min(1.0, (updates + 1) / self.steps) if self.steps else 1.0

    @contextmanager
    def applied(self, optimizer: torch.optim.Optimizer, updates: int) -> Iterator[None]:
        """Rates as they are for this update; afterwards those that the schedule has set, in all digits."""
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.factor(updates)
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
