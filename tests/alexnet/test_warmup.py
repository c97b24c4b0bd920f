"""The warm-up of the rate: its values, and its interplay with a schedule."""

import pytest
import torch

from alexnet import PaperSGD, Warmup, plateau_schedule


def test_the_rate_rises_by_the_same_amount_at_every_update_and_then_stays():
    assert [Warmup(4).factor(updates) for updates in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [Warmup().factor(updates) for updates in (0, 1, 1000)] == [1.0, 1.0, 1.0]


def test_it_multiplies_the_rates_of_all_groups_for_one_update_and_leaves_what_the_schedule_has_set():
    w, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = PaperSGD([{"params": [w]}, {"params": [b], "lr": 0.3}], lr=0.1, momentum=0.0, weight_decay=0.0)
    schedule, warmup = plateau_schedule(optimizer, patience=0), Warmup(3)
    moved = []
    for updates in range(4):
        w.grad, b.grad, before = torch.ones_like(w), torch.ones_like(b), (w.item(), b.item())
        with warmup.applied(optimizer, updates):
            optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [
            pytest.approx(rate) for rate in moved_rates(updates)
        ]
        moved.append((before[0] - w.item(), before[1] - b.item()))
        schedule.step(0.5)  # a plateau from the second time on
    assert moved == [
        (pytest.approx(rate * factor), pytest.approx(3 * rate * factor))
        for rate, factor in ((0.1, 1 / 3), (0.1, 2 / 3), (0.01, 1), (0.001, 1))
    ]


def moved_rates(updates):
    drops = max(0, updates - 1)
    return (0.1 * 0.1**drops, 0.3 * 0.1**drops)


def test_rates_are_restored_when_an_update_fails():
    optimizer = PaperSGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with pytest.raises(RuntimeError), Warmup(7).applied(optimizer, 2):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 3 / 7)
        raise RuntimeError
    assert optimizer.param_groups[0]["lr"] == 0.1
