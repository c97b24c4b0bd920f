"""Fully connected layers: oneDNN's products against float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alexnet import linear as module
from alexnet.linear import Linear, linear


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr(module, "pays", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))


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


def test_gradients_of_gradients_equal_float64():
    layer, x = Linear(300, 260), values(3, 300, seed=0)
    torchs = nn.Linear(300, 260).double()
    torchs.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    found = []
    for net, z in ((layer, x.clone().requires_grad_()), (torchs, x.double().requires_grad_())):
        [gradient] = torch.autograd.grad((net(z) ** 2).sum(), z, create_graph=True)
        gradient.square().sum().backward()
        found.append((z.grad.double(), net.weight.grad.double()))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*Sparse:UserWarning")
def test_transforms_and_sparse_inputs_are_pytorchs():
    layer, x = Linear(300, 260), values(3, 300, seed=0)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.func.vmap(lambda z: layer(z[None])[0])(x), plain)
    gradient = torch.func.grad(lambda z: layer(z).sum())(x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x.to_sparse()), plain, rtol=1e-4, atol=1e-4)
