"""How wrong a net is: top-k errors with honest ties."""

import torch
from torch import Tensor


def topk_wrong(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: the label is not among the k best of scores (N, num_classes).

    A class that scores as much as the label's counts as better, so an all-equal output is wrong, and so is NaN
    (`torch.topk` breaks ties by position and would call the first k classes right).
    """
    own = scores.gather(1, labels[:, None].long())
    not_worse = (~(scores < own)).sum(1) - 1  # less the label itself
    return not_worse >= k


def count_errors(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: how many of the N images are wrong at top 1 and at top 5."""
    return torch.stack([topk_wrong(scores, labels, k).sum() for k in (1, 5)])
