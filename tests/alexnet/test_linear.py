"""Fully connected layers: oneDNN's products against float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alexnet import linear as module
from alexnet.linear import Linear, linear


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr(module, "_pays", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_images", [1, 7, 128])
def test_output_and_gradients_equal_float64(num_images, bias):
    x, weight, b, grad = values(num_images, 300, seed=0), values(260, 300, seed=1), values(260, seed=2), None
    mine = [each.clone().requires_grad_() for each in (x, weight, b)]
    exact = [each.double().requires_grad_() for each in (x, weight, b)]
    out = linear(mine[0], mine[1], mine[2] if bias else None)
    assert type(out.grad_fn).__name__ == "_OneDnnLinearBackward"  # not nn.Linear's
    want = F.linear(exact[0], exact[1], exact[2] if bias else None)
    grad = values(num_images, 260, seed=3)
    out.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-4)
    for a, b64 in zip(mine[: 2 + bias], exact, strict=False):
        torch.testing.assert_close(a.grad.double(), b64.grad, rtol=0, atol=1e-4)
        assert a.grad.stride() == a.stride()


def test_what_is_frozen_gets_no_gradient():
    layer = Linear(300, 260)
    layer.weight.requires_grad_(False)
    x = values(4, 300, seed=0)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((260,), 4.0))


@pytest.mark.parametrize(
    ("dtype", "shape", "autocast"),
    [(torch.float64, (4, 300), False), (torch.float32, (2, 4, 300), False), (torch.float32, (4, 300), True),
     (torch.float32, (0, 300), False)],
)  # fmt: skip
def test_elsewhere_it_is_pytorchs(dtype, shape, autocast):
    layer, torchs = Linear(300, 260).to(dtype), nn.Linear(300, 260).to(dtype)
    torchs.load_state_dict(layer.state_dict())
    x = torch.ones(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), torchs(x))
