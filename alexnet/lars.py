"""Layer-wise adaptive rates for large batches (You, Gitman and Ginsburg 2017, arXiv 1708.03888)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .optim import PaperSGD

WholeSums = Callable[[Sequence[Tensor], Tensor], Tensor]


class LARS(PaperSGD):
    """PaperSGD with a rate of its own for every layer's weights (You et al., Algorithm 1).

        local <- trust * |w| / (|gradient| + weight_decay * |w|)
        v <- momentum * v - lr * local * (gradient + weight_decay * w)
        w <- w + v

    Norms are of whole tensors. local is trust alone where either norm is 0, and for biases, which are tensors of one
    dimension: these have no weight decay either. To leave biases out is usual (MLPerf's ResNet-50, MoCo v3), but there
    their rate is the whole lr. A net without batch normalisation would not survive that: lr = 10 is usual here, and
    with trust = 0.001 the biases then learn at 0.01, which is the paper's rate (Krizhevsky et al. 2012, 5).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
        trust: float = 0.001,
        whole_sums: WholeSums | None = None,
    ) -> None:
        """params: as of PaperSGD. trust: the trust coefficient, eta. whole_sums: from parameters, of which this process
        may hold a part, and sums over what it holds, a row for each, those over the whole tensors."""
        if not trust > 0:
            raise ValueError(f"trust = {trust}: must be above 0; You et al. have 0.001")
        super().__init__(params, lr, momentum, weight_decay)
        self.defaults["trust"] = trust
        for group in self.param_groups:
            group.setdefault("trust", trust)
        self.whole_sums = whole_sums

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"whole_sums": self.whole_sums}  # PyTorch's copies nothing of ours

    def _update(self) -> None:
        given = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        adapted = [(p, grad, group) for p, grad, group in given if p.dim() > 1]
        local = dict(zip((p for p, _, _ in adapted), self._local_rates(adapted), strict=True))
        for p, grad, group in given:
            velocity = self._velocity(p).mul_(group["momentum"])
            if p in local:
                rate = (group["lr"] * local[p]).to(p.dtype)
                velocity.addcmul_(p, rate, value=-group["weight_decay"]).addcmul_(grad, rate, value=-1)
            else:
                velocity.add_(grad, alpha=-group["lr"] * group["trust"])
            p.add_(velocity)

    def _local_rates(self, adapted: Sequence[tuple[Tensor, Tensor, dict[str, Any]]]) -> list[Tensor]:
        """The factor on lr of each parameter, float64 scalars on its device: nothing waits for the device."""
        if not adapted:
            return []
        params, grads, groups = zip(*adapted, strict=True)
        norms = torch.stack(torch._foreach_norm([*params, *grads], dtype=torch.float64))
        sums = norms.square().view(2, -1).T.contiguous()
        if self.whole_sums is not None:
            sums = self.whole_sums(params, sums)
        of_weights, of_gradients = sums.sqrt().unbind(1)
        trust, decay = (of_weights.new_tensor([group[name] for group in groups]) for name in ("trust", "weight_decay"))
        local = trust * of_weights / (of_gradients + decay * of_weights)
        return list(torch.where((of_weights > 0) & (of_gradients > 0), local, trust).unbind())
