"""The paper's update rule and its schedule (paper, 5)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau


class PaperSGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum, the rate inside the velocity (paper, 5).

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    After the rate drops, the old velocity keeps the old rate; `torch.optim.SGD` applies the new rate to all of it.
    The two agree while the rate is constant. The gradient is the mean over the batch.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
    ) -> None:
        """params: parameters, or groups of them as for PyTorch's optimizers; a group can have its own lr."""
        if not lr > 0:
            raise ValueError(f"lr = {lr}: must be above 0; the paper has 0.01")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must be at least 0 and below 1; the paper has 0.9")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay = {weight_decay}: must not be negative; the paper has 0.0005")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            velocities = [self._velocity(p) for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, params, alpha=-group["weight_decay"] * group["lr"])
            torch._foreach_add_(velocities, [p.grad for p in params], alpha=-group["lr"])
            torch._foreach_add_(params, velocities)
        return loss

    def _velocity(self, param: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[param]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(param)
        velocity: Tensor = state["velocity"]
        return velocity


def plateau_schedule(optimizer: torch.optim.Optimizer, *, num_drops: int = 3, patience: int = 5) -> ReduceLROnPlateau:
    """Divide the rate by 10 whenever the validation error has not improved, at most `num_drops` times (paper, 5).

    Call `.step(error)` after every validation. The paper's authors judged by eye; `patience` is how many validations
    without a new best are tolerated before the rate drops. The rates of all parameter groups are divided alike.
    """
    lowest = [group["lr"] * 0.1**num_drops for group in optimizer.param_groups]
    eps = min(1e-8, 1e-3 * min(lowest))  # PyTorch's 1e-8 would leave small rates as they are
    return ReduceLROnPlateau(
        optimizer,
        mode="min",
        factor=0.1,
        patience=patience,
        threshold=0.0,
        threshold_mode="abs",
        min_lr=lowest,
        eps=eps,
    )
