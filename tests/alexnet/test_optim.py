"""The update rule by hand, and its schedule."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet import PaperSGD, plateau_schedule


def test_steps_computed_by_hand_across_a_change_of_rate():
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = PaperSGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    hand_w, hand_v = [1.0, -2.0], [0.0, 0.0]
    gradients = [(0.5, 1.0), (0.25, -1.0), (-0.5, 2.0), (0.1, 0.1)]
    for rate, gradient in zip((0.1, 0.1, 0.01, 0.01), gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i in range(2):
            hand_v[i] = 0.9 * hand_v[i] - 0.01 * rate * hand_w[i] - rate * gradient[i]
            hand_w[i] = hand_w[i] + hand_v[i]
    torch.testing.assert_close(w.detach(), torch.tensor(hand_w, dtype=torch.float64), rtol=1e-15, atol=0)


def step(optimizer_of, rates):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_of([w])
    for number, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.full_like(w, 0.3 * (number + 1))
        optimizer.step()
    return w.detach()


def ours(params):
    return PaperSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def theirs(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def test_equals_torch_s_sgd_while_the_rate_is_constant():
    torch.testing.assert_close(step(ours, [0.1] * 5), step(theirs, [0.1] * 5), rtol=1e-14, atol=0)


def test_velocity_keeps_the_old_rate_after_the_rate_drops():
    rates = [0.1, 0.1, 0.001]
    w = step(ours, rates)
    assert not torch.allclose(w, step(theirs, rates))
    # the old velocity moves on at nine tenths, hardly touched by the new rate
    before, after = step(ours, rates[:2]), w
    old_velocity = before - step(ours, rates[:1])
    torch.testing.assert_close(after - before, 0.9 * old_velocity - 0.001 * (0.01 * before + 0.9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "gradient in another order"])
def test_the_fused_update_equals_the_plain_one(layout, monkeypatch):
    torch.manual_seed(0)
    shape = (6, 4, 3, 3)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    fused = []
    real = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **named: (fused.append(1), real(*args, **named)))

    def train(dtype):
        w = start.to(dtype).clone()
        if layout == "channels last":
            w = w.contiguous(memory_format=torch.channels_last)
        w.requires_grad_()
        optimizer = PaperSGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
        for rate, gradient in zip((0.1, 0.1, 0.01, 0.01), gradients, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            w.grad = torch.empty_like(w).copy_(gradient)
            if layout == "gradient in another order":
                w.grad = w.grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        return w.detach()

    want = train(torch.float64)
    assert not fused  # it scales float32 alone
    torch.testing.assert_close(train(torch.float32).double(), want, rtol=0, atol=1e-6)
    assert len(fused) == (0 if layout == "gradient in another order" else 4)


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.0), (0.0, 0.9), (torch.tensor(0.1), 0.9)])
def test_rates_and_momenta_that_the_fused_kernel_has_not(lr, momentum):
    w = torch.ones(4, requires_grad=True)
    optimizer = PaperSGD([w], lr=0.1, momentum=momentum, weight_decay=0.01)
    optimizer.param_groups[0]["lr"] = lr
    w.grad = torch.full((4,), 2.0)
    optimizer.step()
    rate = float(lr)
    torch.testing.assert_close(w.detach(), torch.full((4,), 1 - rate * 2 - 0.01 * rate))


def test_a_parameter_without_gradient_stays_and_a_closure_is_called():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = PaperSGD([used, unused], lr=0.1)

    def closure():
        loss = used.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1e-4}])
def test_values_without_meaning_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PaperSGD([torch.ones(1, requires_grad=True)], **wrong)


def test_the_rate_is_divided_by_ten_at_each_plateau_three_times_and_no_more():
    optimizer = PaperSGD([torch.ones(1, requires_grad=True)], lr=0.01)
    schedule = plateau_schedule(optimizer, num_drops=3, patience=1)
    rates = []
    for error in [0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]:
        schedule.step(error)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == pytest.approx([0.01, 0.01, 0.01, 0.001])  # two validations without a new best
    assert rates[-1] == pytest.approx(1e-5)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.01, 0.001, 0.0001, 0.00001])


def test_the_update_of_other_devices_is_four_calls_however_many_parameters_and_equals_the_plain_formula():
    """As on a GPU, where every call is a few kernels; in float64 the CPU takes the same way."""
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 3, 3), (1,), (7, 2)]
    params = [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]
    plain = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    optimizer = PaperSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    for rate in (0.1, 0.1, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        for p in params:
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64)
        with Calls() as calls:
            optimizer.step()
        made = [name for name in calls.names if name != "zeros_like" and "record_function" not in name]
        assert made == ["_foreach_mul_", *["_foreach_add_"] * 3]
        for p, (w, v) in zip(params, plain, strict=True):
            v.copy_(0.9 * v - 0.01 * rate * w - rate * p.grad)
            w.add_(v)
            torch.testing.assert_close(p.detach(), w, rtol=1e-15, atol=1e-15)


class Calls(TorchDispatchMode):
    """Writes down the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})
