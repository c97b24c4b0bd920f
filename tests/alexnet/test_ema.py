"""The moving average of the weights: its values, and that a net can lend its place to it."""

import pytest
import torch
from torch import nn

from alexnet import WeightAverage


def layer():
    net = nn.Linear(2, 1, bias=True).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0]]))
        net.bias.fill_(0.5)
    return net


def test_the_average_is_the_one_written_out_and_young_ones_weigh_the_latest_weights_more():
    net = layer()
    average, by_hand = WeightAverage(net, 0.3), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    decays = []
    for updates in range(1, 6):
        with torch.no_grad():
            net.weight.mul_(-1.5)
        average.update(updates)
        decays.append(min(0.3, (1 + updates) / (10 + updates)))
        by_hand = decays[-1] * by_hand + (1 - decays[-1]) * net.weight.detach()
        torch.testing.assert_close(average.weights["weight"], by_hand, rtol=1e-14, atol=0)
    assert decays == [pytest.approx(2 / 11), pytest.approx(3 / 12), 0.3, 0.3, 0.3]


def test_within_applied_the_net_has_the_average_and_afterwards_its_own_weights_bit_for_bit():
    net = layer()
    average = WeightAverage(net, 0.9)
    with torch.no_grad():
        net.weight.mul_(1 / 3)
    average.update(1)
    own, other = net.weight.detach().clone(), average.weights["weight"].clone()
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(net.weight, other)
        raise RuntimeError
    assert torch.equal(net.weight, own)
    assert torch.equal(average.weights["weight"], other)
    assert not torch.equal(own, other)


def test_frozen_weights_have_no_copy_and_a_restart_takes_the_net_s_weights():
    net = layer()
    net.bias.requires_grad_(False)
    average = WeightAverage(net, 0.9)
    assert average.weights["bias"].data_ptr() == net.bias.data_ptr()
    assert average.weights["weight"].data_ptr() != net.weight.data_ptr()
    with torch.no_grad():
        net.weight.fill_(7.0)
    assert not torch.equal(average.weights["weight"], net.weight)
    average.restart()
    assert torch.equal(average.weights["weight"], net.weight)


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_without_meaning_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay = .*such as 0\.999"):
        WeightAverage(layer(), decay)


def test_a_net_with_nothing_to_train_has_nothing_to_average():
    average = WeightAverage(torch.nn.Linear(3, 4).requires_grad_(False), 0.9)
    average.update(1)
    assert average.weights["weight"].shape == (4, 3)
