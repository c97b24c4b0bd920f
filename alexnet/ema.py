"""An exponential moving average of a net's weights, which often errs less than the last weights (Polyak and Juditsky
1992 for plain averages)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of the weights after each update, recent ones more: average <- d * average + (1 - d) * weights.

    d is decay, but at first (1 + updates) / (10 + updates), or the random initial weights would stay in it for long
    (TensorFlow's ExponentialMovingAverage with num_updates). Of a worker's part of a net it is the part of the average.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """It begins with the net's weights. Those of frozen layers never change and have no copy."""
        if not 0 < decay < 1:
            raise ValueError(f"decay = {decay}: must be above 0 and below 1, such as 0.999")
        self.decay, self._params = decay, dict(net.named_parameters())
        self._averages = {name: p.detach().clone() for name, p in self._params.items() if p.requires_grad}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after an update; updates: made so far, with this one."""
        if not self._averages:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        params: list[Tensor] = [self._params[name] for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), params, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the net's weights as they are now."""
        for name, average in self._averages.items():
            average.copy_(self._params[name])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average by the parameters' names, not copied; of frozen layers their weights."""
        return {name: self._averages.get(name, param.detach()) for name, param in self._params.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The net with the average in place of its weights, which return bit for bit. Nothing is saved within."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._averages.items():
            kept = average.clone()
            average.copy_(self._params[name])
            self._params[name].copy_(kept)
