"""Convolutions by Winograd's algorithm against float64, and where the library's are taken instead."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import alexnet
from alexnet import winograd
from alexnet.winograd import WinogradConv2d


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr(winograd, "pays", lambda: True)


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(winograd, "FEWEST_MAPS", 1)
    monkeypatch.setattr(winograd, "FEWEST_TILES", 1)
    monkeypatch.setattr(winograd, "SAVING", 0)


def values(*shape, seed):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def layer(maps_in=8, maps=8, groups=1, bias=True):
    conv = WinogradConv2d(maps_in, maps, groups, bias).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for seed, param in enumerate(conv.parameters()):
            param.copy_(values(*param.shape, seed=seed))
    return conv


def library(conv):
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups, bias=conv.bias is not None)
    plain.load_state_dict(conv.state_dict())
    return plain


def ran(out):
    return type(out.grad_fn).__name__ == "_WinogradBackward"


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("num_images", "maps_in", "maps", "groups", "height", "width"),
    [(1, 8, 8, 1, 5, 5), (2, 3, 5, 1, 1, 1), (3, 64, 48, 2, 13, 13), (2, 65, 130, 1, 6, 11), (5, 6, 9, 3, 27, 14),
     (4, 16, 70, 1, 9, 8), (1, 1, 1, 1, 2, 3), (130, 4, 4, 2, 7, 7)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_float64(of_any_size, num_images, maps_in, maps, groups, height, width, bias):
    conv = layer(maps_in, maps, groups, bias)
    exact = library(conv).double()
    x, grad = values(num_images, maps_in, height, width, seed=2), values(num_images, maps, height, width, seed=3)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out, want = conv(mine), exact(theirs)
    assert ran(out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.backward(grad)
    want.backward(grad.double())
    for found, true in zip(
        [out, mine.grad, *(param.grad for param in conv.parameters())],
        [want, theirs.grad, *(param.grad for param in exact.parameters())],
        strict=True,
    ):
        assert relative(found, true) < 1e-5
    assert conv.weight.grad.stride() == conv.weight.stride()


@pytest.mark.parametrize("side", range(5, 28))
def test_every_side_equals_float64(of_any_size, side):
    conv, x = layer(4, 6, 2), values(2, 4, side, side + 1, seed=2)
    assert relative(conv(x), library(conv).double()(x.double())) < 5e-6


def test_rounding_is_of_the_order_of_the_librarys_for_the_papers_layer():
    conv, x = layer(256, 384), values(8, 256, 13, 13, seed=2).relu()
    grad = values(8, 384, 13, 13, seed=3)
    exact, found = library(conv).double(), []
    for net, images in ((conv, x.requires_grad_()), (exact, x.detach().double().requires_grad_())):
        out = net(images)
        found.append([out, *torch.autograd.grad(out, [images, *net.parameters()], grad.to(out.dtype))])
    assert max(relative(mine, true) for mine, true in zip(*found, strict=True)) < 4e-6


def test_weights_and_gradients_of_other_memory_are_taken(of_any_size):
    conv, exact = layer(), library(layer()).double()
    conv.weight.data = conv.weight.data.contiguous()
    x, grad = values(2, 8, 7, 7, seed=2), values(2, 8, 14, 7, seed=3)[:, :, ::2].contiguous()[:, :, :, :]
    out = conv(x)
    out.backward(grad)
    exact(x.double()).backward(grad.double())
    assert ran(out)
    assert relative(conv.weight.grad, exact.weight.grad) < 5e-6
    assert conv.weight.grad.stride() == conv.weight.stride()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "all but bias"])
def test_what_is_frozen_gets_no_gradient(of_any_size, frozen):
    conv, exact, x = layer(), library(layer()).double(), values(2, 8, 7, 7, seed=2)
    conv.weight.requires_grad_(frozen not in ("weight", "all but bias"))
    conv.bias.requires_grad_(frozen != "bias")
    mine = x.clone().requires_grad_(frozen not in ("input", "all but bias"))
    theirs = x.double().requires_grad_()
    conv(mine).square().sum().backward()
    exact(theirs).square().sum().backward()
    for tensor, true in ((conv.weight, exact.weight), (conv.bias, exact.bias), (mine, theirs)):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.requires_grad:
            assert relative(tensor.grad, true.grad) < 1e-5


@pytest.mark.parametrize(
    ("x", "autocast"),
    [(values(2, 128, 13, 13, seed=2).double(), False), (values(128, 128, 13, 13, seed=2), True),
     (values(128, 128, 13, 13, seed=2).contiguous(), False), (values(128, 128, 13, 26, seed=2)[..., ::2], False),
     (values(1, 128, 13, 13, seed=2), False), (values(0, 128, 13, 13, seed=2), False),
     (values(128, 128, 6, 6, seed=2), False), (values(128, 13, 13, seed=2), False)],
)  # fmt: skip
def test_elsewhere_it_is_the_librarys(x, autocast):
    conv = layer(128, 128).to(x.dtype)
    plain = library(conv).to(x.dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = conv(x)
        assert not ran(out)
        assert torch.equal(out, plain(x))


@pytest.mark.parametrize("what", ["CPU", "maps"])
def test_where_it_does_not_pay_it_is_the_librarys(monkeypatch, what):
    if what == "CPU":
        monkeypatch.setattr(winograd, "pays", lambda: False)
    maps = 128 if what == "CPU" else 64
    assert not ran(layer(maps, maps)(values(128, maps, 13, 13, seed=2)))


def test_a_training_batch_of_the_paper_takes_it_in_three_layers():
    net = alexnet.build("paper", 10)
    names = [name for name, conv in net.named_children() if isinstance(conv, WinogradConv2d)]
    assert names == ["conv3", "conv4", "conv5"]
    seen = []
    for name in names:
        getattr(net, name).register_forward_hook(lambda conv, inputs, out: seen.append(ran(out)))
    net.features(torch.zeros(32, 3, 224, 224).contiguous(memory_format=torch.channels_last))
    assert seen == [True, True, True]


def test_wrong_shapes_are_the_librarys_errors():
    with pytest.raises(RuntimeError, match="expected input"):
        layer(128, 128)(values(128, 127, 13, 13, seed=2))


def test_gradients_of_gradients_equal_float64(of_any_size):
    found = []
    for net, dtype in ((layer(), torch.float32), (library(layer()).double(), torch.float64)):
        x = values(2, 8, 7, 7, seed=2).to(dtype).requires_grad_()
        [gradient] = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append((x.grad, net.weight.grad, net.bias.grad))
    for mine, exact in zip(*found, strict=True):
        assert relative(mine, exact) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_transforms_are_the_librarys(of_any_size):
    conv, x = layer(), values(3, 8, 7, 7, seed=2)
    plain = library(conv)(x)
    torch.testing.assert_close(torch.func.vmap(lambda z: conv(z[None])[0])(x), plain, rtol=1e-4, atol=1e-4)
    want = x.clone().requires_grad_()
    library(conv)(want).sum().backward()
    gradient = torch.func.grad(lambda z: conv(z).sum())(x)
    torch.testing.assert_close(gradient, want.grad, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = conv(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, F.conv2d(torch.ones_like(x), conv.weight, padding=1), rtol=1e-4, atol=1e-4)


def test_without_gradients_the_output_is_the_same(of_any_size):
    conv, x = layer(), values(3, 8, 13, 13, seed=2)
    with torch.no_grad():
        plain = conv(x)
    with torch.inference_mode():
        inferred = conv(x)
    assert torch.equal(plain, conv(x).detach())
    assert torch.equal(plain, inferred)


def test_threads_change_nothing_but_rounding_and_runs_change_nothing(of_any_size):
    conv, threads = layer(64, 64, 2), torch.get_num_threads()
    found = {}
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            x = values(20, 64, 13, 13, seed=2).requires_grad_()
            out = conv(x)
            found.setdefault(number, []).append(
                [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])]
            )
    finally:
        torch.set_num_threads(threads)
    for one, first, second in zip(*found[1], *found[2], strict=True):
        assert torch.equal(first, second)
        assert relative(one, first.double()) < 2e-6


def test_parts_of_a_batch_equal_the_whole(of_any_size, monkeypatch):
    conv, found = layer(), []
    for largest in (128, 4):
        monkeypatch.setattr(winograd, "LARGEST", largest)
        x = values(10, 8, 13, 13, seed=2).requires_grad_()
        out = conv(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])])
    for whole, parts in zip(*found, strict=True):
        assert relative(parts, whole.double()) < 2e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(of_any_size, value):
    conv, x, grad = layer(), values(2, 8, 7, 7, seed=2), values(2, 8, 7, 7, seed=3)
    x[0, 3, 2, 2] = value
    out = conv(x.requires_grad_())
    plain = library(conv)
    want = plain(x)
    assert not out[~want.isfinite()].isfinite().any()
    assert out[1].isfinite().all()  # another image
    grad[0, 3, 2, 2] = value
    mine = torch.autograd.grad(out, [x, *conv.parameters()], grad)
    theirs = torch.autograd.grad(want, [x, *plain.parameters()], grad)
    for found, other in zip(mine, theirs, strict=True):
        assert not other.isfinite().all()
        assert not found[~other.isfinite()].isfinite().any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(of_any_size):
    conv, x, threads = layer(), values(8, 8, 7, 7, seed=2), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            before = winograd_input(x)
            child = os.fork()
            if not child:
                os._exit(0 if torch.equal(winograd_input(x), before) else 1)
    finally:
        torch.set_num_threads(threads)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ran(conv(x))


def winograd_input(x):
    from alexnet import winograd_cpu

    return winograd_cpu.input_transform(x.permute(0, 2, 3, 1), 1)


def test_a_training_has_the_losses_of_the_librarys(of_any_size, monkeypatch):
    losses = []
    for on in (True, False):
        monkeypatch.setattr(winograd, "pays", lambda on=on: on)
        net = alexnet.build("paper", 10, width=0.125, init="he", dropout=0)
        optimizer = alexnet.PaperSGD(net.parameters(), lr=1e-3)
        images = values(16, 3, 224, 224, seed=0)
        labels = torch.arange(16) % 10
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] != losses[1]  # not one and the same
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
