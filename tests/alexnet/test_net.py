"""The paper's net: shapes, counts, names, columns."""

import math

import pytest
import torch
from torch.nn import functional as F

import alexnet
from alexnet.net import BlockedConv2d


def test_the_paper_net_has_60_965_224_parameters_under_their_canonical_names():
    shapes = {name: tuple(p.shape) for name, p in alexnet.build("paper", num_classes=1000).state_dict().items()}
    assert shapes == {
        "conv1.weight": (96, 3, 11, 11), "conv1.bias": (96,),
        "conv2.weight": (256, 48, 5, 5), "conv2.bias": (256,),
        "conv3.weight": (384, 256, 3, 3), "conv3.bias": (384,),
        "conv4.weight": (384, 192, 3, 3), "conv4.bias": (384,),
        "conv5.weight": (256, 192, 3, 3), "conv5.bias": (256,),
        "fc6.weight": (4096, 9216), "fc6.bias": (4096,),
        "fc7.weight": (4096, 4096), "fc7.bias": (4096,),
        "fc8.weight": (1000, 4096), "fc8.bias": (1000,),
    }  # fmt: skip
    assert sum(math.prod(shape) for shape in shapes.values()) == 60_965_224


def shapes_of(net: alexnet.AlexNet, size: int) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    for layer in net.children():
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(tuple(output.shape[1:])))
    net.eval()(torch.zeros(1, 3, size, size))
    return seen


def test_every_layer_of_a_224_pixel_image_has_the_paper_s_shape():
    assert shapes_of(alexnet.build("paper"), 224) == [
        (96, 55, 55), (96, 55, 55), (96, 27, 27),  # conv1, ReLU and LRN, pool
        (256, 27, 27), (256, 27, 27), (256, 13, 13),
        (384, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6),
        (4096,), (4096,), (4096,), (4096,), (1000,),  # each hidden layer, then its dropout
    ]  # fmt: skip


def test_a_slim_net_on_64_pixels_is_the_same_code():
    net = alexnet.build("paper", num_classes=10, width=0.25, input_size=64)
    assert shapes_of(net, 64)[:3] == [(24, 15, 15), (24, 15, 15), (24, 7, 7)]
    assert net.fc6.weight.shape == (1024, 64)


def test_224_pixels_read_as_227_with_zeros_on_the_right_and_bottom():
    conv = BlockedConv2d(3, 4, 11, stride=4).double()  # in float32 the two differ by the CPU's rounding
    image = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(conv(image), F.conv2d(F.pad(image, (0, 3, 0, 3)), conv.weight, conv.bias, 4))


@pytest.mark.parametrize("size", [11, 12, 13, 15, 16, 64, 67, 97])
def test_blocks_compute_the_strided_convolution_and_its_gradients(size):
    conv = BlockedConv2d(3, 4, 11, stride=4).double()
    image = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    missing = -(size - 11) % 4
    expected = F.conv2d(F.pad(image, (0, missing, 0, missing)), conv.weight, conv.bias, 4)
    out = conv(image)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    wanted = (image, conv.weight, conv.bias)
    ours, theirs = (torch.autograd.grad(result, wanted, grad) for result in (out, expected))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_columns_meet_before_conv3_and_the_fc_layers_and_nowhere_else():
    net = alexnet.build("paper", num_classes=10, width=0.25, input_size=64).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    for name in ("conv2", "conv3"):
        getattr(net, name).register_forward_hook(lambda layer, inputs, output, name=name: seen.update({name: output}))
    net(x)
    before = dict(seen)
    half = net.conv1.weight.shape[0] // 2
    with torch.no_grad():
        net.conv1.weight[:half] += 1.0  # column 0
    net(x)
    maps = before["conv2"].shape[1] // 2
    assert not torch.equal(seen["conv2"][:, :maps], before["conv2"][:, :maps])
    assert torch.equal(seen["conv2"][:, maps:], before["conv2"][:, maps:]), "column 1 must not see column 0 yet"
    assert not torch.equal(seen["conv3"][:, -1], before["conv3"][:, -1]), "conv3 reads both columns"


def test_paper_initialisation():
    net = alexnet.build("paper", num_classes=100, width=0.5)
    for name in ("conv2", "conv4", "conv5", "fc6", "fc7"):
        assert torch.all(getattr(net, name).bias == 1), name
    for name in ("conv1", "conv3", "fc8"):
        assert torch.all(getattr(net, name).bias == 0), name
    for name in ("conv1", "conv3", "fc6", "fc8"):
        assert getattr(net, name).weight.std().item() == pytest.approx(0.01, rel=0.03)


def test_he_initialisation_scales_with_fan_in_and_has_no_biases():
    net = alexnet.build("paper", num_classes=100, width=0.5, init="he")
    assert net.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (24 * 25)), rel=0.03)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    a = alexnet.build("paper", 10, width=0.25, input_size=64, seed=5)
    torch.manual_seed(2)
    b, c = (alexnet.build("paper", 10, width=0.25, input_size=64, seed=seed) for seed in (5, 6))
    assert torch.equal(a.fc6.weight, b.fc6.weight)
    assert not torch.equal(a.fc6.weight, c.fc6.weight)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"preset": "googlenet"}, "googlenet"), ({"init": "xavier"}, "xavier"), ({"input_size": 32}, "input_size"),
        ({"width": 0.01}, "width"), ({"width": 0.3}, "width"), ({"num_classes": 1}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        alexnet.build(**wrong)


def test_images_of_another_size_are_refused():
    net = alexnet.build("paper", 10, width=0.25, input_size=64)
    with pytest.raises(ValueError, match="64"):
        net(torch.zeros(1, 3, 72, 72))


def test_the_cost_counts_what_the_guide_counts():
    from alexnet.cost import estimate

    cost = estimate(num_classes=1000, input_size=224, width=1.0, global_batch_size=128)
    assert cost.num_parameters == 60_965_224
    assert cost.training_flops / 6 == pytest.approx(
        0.72e9, rel=0.01
    )  # multiply-adds forward (2.3 of them by conv3 alone)
    assert cost.memory_bytes > 3 * 4 * cost.num_parameters
