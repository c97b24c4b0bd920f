"""How wrong a net is: top-k errors with honest ties."""

import torch
from torch import Tensor


def topk_wrong(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: the label is not among the k best of scores (N, num_classes).

    A class that scores as much as the label's counts as better, so an all-equal output is wrong, and so is NaN
    (`torch.topk` breaks ties by position and would call the first k classes right).
    """
    return _num_not_worse(scores, labels) >= k


def count_errors(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: how many of the N images are wrong at top 1 and at top 5."""
    not_worse = _num_not_worse(scores, labels)
    return torch.stack([(not_worse >= k).sum() for k in (1, 5)])


def errors_by_class(scores: Tensor, labels: Tensor) -> Tensor:
    """(num_classes,) int64: of each class, how many of its images are wrong at top 1."""
    wrong = topk_wrong(scores, labels, 1).long()
    return wrong.new_zeros(scores.shape[1]).scatter_add_(0, labels.long(), wrong)


def _num_not_worse(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,): how many other classes score as much as the label, or more, or NaN."""
    own = scores.gather(1, labels[:, None].long())
    return (~(scores < own)).sum(1) - 1  # less the label itself
