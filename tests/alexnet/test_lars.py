"""LARS: against loops in numpy, and the same in every layout."""

import copy
import math

import numpy as np
import pytest
import test_layouts
import torch
from gloo import run_gloo

from alexnet.lars import LARS
from alexnet.layouts import Layout, ShardedNet

KINDS = ("data", "columns", "hybrid")
STEPS = 6
# by name: the settings of the optimizer's groups, by the layers that they have
FACTORS = {"conv2": 0.5, "fc8": 3.0}


def naive(weights, gradients, rates, momentum, decay, trust):
    """Algorithm 1 of You et al. in plain loops: the weights after a step for each of the rates."""
    shape = weights.shape
    w, v = [float(x) for x in weights.flatten()], [0.0] * weights.size
    for rate, gradient in zip(rates, gradients, strict=True):
        g = [float(x) for x in gradient.flatten()]
        if weights.ndim == 1:
            local, own_decay = trust, 0.0
        else:
            own_decay, w_squares, g_squares = decay, 0.0, 0.0
            for x in w:
                w_squares += x * x
            for x in g:
                g_squares += x * x
            local = trust
            if w_squares > 0 and g_squares > 0:
                local = trust * math.sqrt(w_squares) / (math.sqrt(g_squares) + decay * math.sqrt(w_squares))
        for i in range(len(w)):
            v[i] = momentum * v[i] - rate * local * (g[i] + own_decay * w[i])
            w[i] += v[i]
    return np.array(w).reshape(shape)


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (4, 7), (6,)])
def test_it_is_the_algorithm_of_the_paper_written_out_in_loops(shape):
    random, rates = np.random.default_rng(0), [2.0, 2.0, 0.2, 0.2]
    start, gradients = random.normal(size=shape), [random.normal(size=shape) * 30 for _ in rates]
    w = torch.tensor(start, requires_grad=True)
    optimizer = LARS([w], lr=2.0, momentum=0.8, weight_decay=0.03, trust=0.02)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.tensor(gradient)
        optimizer.step()
    wanted = naive(start, gradients, rates, 0.8, 0.03, 0.02)
    np.testing.assert_allclose(w.detach().numpy(), wanted, rtol=1e-13)
    assert np.abs(wanted - start).max() > 0.01


@pytest.mark.parametrize("zero", ["weights", "gradient"])
def test_without_a_norm_the_rate_is_that_of_biases(zero):
    w = torch.zeros(2, 2, dtype=torch.float64) if zero == "weights" else torch.ones(2, 2, dtype=torch.float64)
    w.requires_grad_()
    w.grad = torch.ones_like(w) if zero == "weights" else torch.zeros_like(w)
    LARS([w], lr=10.0, weight_decay=0.5, trust=0.001).step()
    assert w.flatten().tolist() == pytest.approx([-0.01 if zero == "weights" else 1 - 0.01 * 0.5] * 4, rel=1e-12)


def test_a_layer_without_a_gradient_stays_and_the_factor_of_a_group_multiplies_its_update():
    kept, plain, fast = (torch.full((2, 2), 3.0, dtype=torch.float64, requires_grad=True) for _ in range(3))
    optimizer = LARS([{"params": [kept, plain]}, {"params": [fast], "lr": 20.0}], lr=2.0)
    plain.grad, fast.grad = torch.ones_like(plain), torch.ones_like(fast)
    optimizer.step()
    assert torch.equal(kept, torch.full_like(kept, 3.0))
    torch.testing.assert_close(3 - fast, 10 * (3 - plain), rtol=1e-12, atol=0)


def test_its_state_resumes_exactly():
    def steps(optimizer, w, numbers):
        for number in numbers:
            w.grad = torch.full_like(w, 1.0 + number)
            optimizer.step()

    def pieces():
        w = torch.ones(3, 2, requires_grad=True)
        return LARS([w], lr=5.0, trust=0.01), w

    whole, w = pieces()
    steps(whole, w, range(6))
    first, half = pieces()
    steps(first, half, range(3))
    then, again = pieces()
    again.data.copy_(half.data)
    then.load_state_dict(first.state_dict())
    assert then.param_groups[0]["trust"] == 0.01
    steps(then, again, range(3, 6))
    assert torch.equal(again, w)


@pytest.mark.parametrize("wrong", [{"trust": 0.0}, {"trust": float("nan")}, {"lr": -1.0}, {"momentum": 1.0}])
def test_values_without_meaning_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LARS([torch.ones(1, requires_grad=True)], **wrong)


# in layouts


def train(rank, kind, workers, local_norms=False):
    """Weights and losses after some steps, whole, on rank 0."""
    net = ShardedNet(test_layouts.build(torch.float64, 0.5), Layout(kind, workers), rank)
    groups = {factor: {"params": [], "lr": 5.0 * factor} for factor in (1.0, *FACTORS.values())}
    for name, param in net.part.named_parameters():
        groups[FACTORS.get(name.split(".")[0], 1.0)]["params"].append(param)
    optimizer = LARS(groups.values(), lr=5.0, trust=0.01, whole_sums=None if local_norms else net.whole_sums)
    losses = []
    for step in range(STEPS):
        losses.append(test_layouts.backward(net, step, torch.float64))
        optimizer.step()
        net.zero_grad()
    weights = test_layouts.collected(net, dict(net.part.named_parameters()), "weight")
    velocities = {name: optimizer.state[p]["velocity"] for name, p in net.part.named_parameters()}
    return {"losses": torch.stack(losses)} | weights | test_layouts.collected(net, velocities, "velocity")


def everything(rank, workers):
    found = {kind: train(rank, kind, workers) for kind in KINDS}
    return found | {"norms of parts": train(rank, "columns", workers, local_norms=True)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_every_layout_takes_the_norms_of_whole_layers(workers):
    found, wanted = run_gloo(workers, everything, workers)[0], train(0, "single", 1)
    apart = found.pop("norms of parts")
    for kind, trained in found.items():
        assert trained.keys() == wanted.keys()
        for name, tensor in trained.items():
            assert test_layouts.difference(tensor, wanted[name]) < 1e-10, f"{kind} {workers}: {name}"
    assert max(test_layouts.difference(apart[name], wanted[name]) for name in wanted) > 1e-3


@pytest.mark.parametrize(("weight", "gradient"), [(1e25, 1.0), (1.0, 1e-25)])
def test_norms_are_of_float64_and_a_copy_keeps_what_sums_them(weight, gradient):
    p = torch.nn.Parameter(torch.full((3, 3), weight))
    optimizer = copy.deepcopy(LARS([p], lr=1.0, trust=0.01, weight_decay=0.0, whole_sums=four_times_the_weights))
    q = optimizer.param_groups[0]["params"][0]
    q.grad = torch.full((3, 3), gradient)
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((3, 3), weight * (1 - 0.02)), rtol=1e-6, atol=0)


def four_times_the_weights(params, sums):
    return sums * torch.tensor([4.0, 1.0], dtype=torch.float64)
