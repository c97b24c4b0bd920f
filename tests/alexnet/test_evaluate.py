"""Top-k errors with honest ties."""

import math

import torch

from alexnet import count_errors, errors_by_class, topk_wrong


def test_the_rank_of_the_label_decides():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    labels = torch.tensor([1, 2, 0])
    assert topk_wrong(scores, labels, 1).tolist() == [False, True, True]
    assert topk_wrong(scores, labels, 2).tolist() == [False, False, True]


def test_an_all_equal_output_is_wrong():
    assert count_errors(torch.zeros(4, 10), torch.arange(4)).tolist() == [4, 4]


def test_a_tie_counts_against_the_label_wherever_it_stands():
    scores = torch.tensor([[1.0, 1.0, 0.0]])
    assert topk_wrong(scores, torch.tensor([0]), 1).item()
    assert topk_wrong(scores, torch.tensor([1]), 1).item()
    assert not topk_wrong(scores, torch.tensor([0]), 2).item()


def test_nan_is_wrong():
    assert count_errors(torch.full((2, 10), math.nan), torch.tensor([0, 9])).tolist() == [2, 2]


def test_without_ties_it_agrees_with_topk():
    scores = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 20, (500,), generator=torch.Generator().manual_seed(1))
    for k in (1, 5):
        right = (scores.topk(k).indices == labels[:, None]).any(1)
        assert torch.equal(topk_wrong(scores, labels, k), ~right)


def test_errors_of_a_class_are_those_of_its_own_images():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.1, 0.8], [0.0, 0.9, 0.1]])
    assert errors_by_class(scores, torch.tensor([0, 1, 1, 1], dtype=torch.int32)).tolist() == [0, 2, 0]
    assert errors_by_class(scores[:0], torch.empty(0, dtype=torch.long)).tolist() == [0, 0, 0]
