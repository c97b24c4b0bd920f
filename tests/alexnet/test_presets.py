"""The presets beside the paper's: counts, initialisation, and their arithmetic against independent references."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn import functional as F

import alexnet
from alexnet.cost import estimate
from alexnet.layouts import Layout
from alexnet.net import PRESETS, num_parameters
from alexnet.partition import possible
from alexnet.presets import preset_of

PARAMETERS = {"paper": 60_965_224, "caffe": 60_965_224, "torchvision": 61_100_840}  # with 1000 classes, as published


def test_every_preset_is_listed_with_its_name_source_and_differences():
    assert PRESETS == alexnet.PRESETS == tuple(PARAMETERS)
    for name in PRESETS:
        preset = preset_of(name)
        assert preset.name == name
        assert preset.source
        assert all(line.endswith(".") for line in preset.differences), "sentences"


def test_the_readme_has_a_row_for_every_preset_with_its_number_of_parameters():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in readme.splitlines() if line.startswith("  | `")}
    assert set(PRESETS) <= rows.keys()
    for name in PRESETS:
        assert f"{PARAMETERS[name]:,}" in rows[name]
        assert f"{preset_of(name).input_size} pixels" in rows[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_published_number_of_parameters_and_canonical_names(name):
    with torch.device("meta"):
        net = alexnet.AlexNet(preset_of(name), 1000)
    assert num_parameters(net) == PARAMETERS[name]
    layers = [*(f"conv{i}" for i in range(1, 6)), *(f"fc{i}" for i in range(6, 9))]
    assert list(net.state_dict()) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert net.preset is preset_of(name)
    assert net.input_size == {"paper": 224, "caffe": 227, "torchvision": 224}[name]


@pytest.mark.parametrize(("name", "multiply_adds"), [("paper", 724e6), ("caffe", 724e6), ("torchvision", 714e6)])
def test_costs_follow_the_description(name, multiply_adds):
    """Multiply-adds by hand: outputs of a convolution times the numbers that each reads, and the other weights."""
    preset = preset_of(name)
    sides = (55, 27, 13, 13, 13)
    maps = [3, *(conv.maps for conv in preset.convs)]
    by_hand = sum(
        side**2 * out * conv.kernel**2 * read // (preset.columns if conv.reads == "own column" else 1)
        for conv, side, (read, out) in zip(preset.convs, sides, pairwise(maps), strict=True)
    )
    by_hand += maps[-1] * 36 * 4096 + 4096 * 4096 + 4096 * 1000
    settings = {"num_classes": 1000, "input_size": preset.input_size, "width": 1.0, "global_batch_size": 128}
    cost = estimate(preset=name, **settings)
    assert cost.num_parameters == cost.part_parameters == PARAMETERS[name]
    assert cost.training_flops == 6 * by_hand
    assert by_hand == pytest.approx(multiply_adds, rel=0.01)
    shared = estimate(preset=name, **settings, layout=Layout("hybrid", 2))
    fully_connected = (maps[-1] * 36 + 1) * 4096 + 4097 * 4096 + 4096 * 1000
    assert shared.part_parameters == PARAMETERS[name] - fully_connected // 2


def test_which_layouts_a_preset_can_have():
    assert {name: possible(preset_of(name)) for name in PRESETS} == {
        "paper": ("single", "data", "columns", "hybrid"),
        "caffe": ("single", "data", "hybrid"),
        "torchvision": ("single", "data", "hybrid"),
    }


def test_torchvision_s_initial_weights_scores_and_gradients_are_torchvision_s():
    """The same seed draws the same weights, in the same order."""
    torch.manual_seed(5)
    theirs = torchvision.models.alexnet(num_classes=100)
    ours = alexnet.build("torchvision", 100, seed=5)
    names = dict(zip(dict(theirs.named_parameters()), dict(ours.named_parameters()), strict=True))
    own = dict(ours.named_parameters())
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(own[names[name]], param, rtol=1e-5, atol=1e-8)
    with torch.no_grad():  # equal to the last bit from here on
        for name, param in theirs.named_parameters():
            own[names[name]].copy_(param)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    scores, wanted = ours.eval()(image), theirs.eval()(image)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    for net, result in ((ours, scores), (theirs, wanted)):
        F.cross_entropy(net(image) + 0 * result, torch.tensor([3, 97])).backward()
    for name, param in theirs.named_parameters():
        scale = param.grad.abs().max()
        torch.testing.assert_close(own[names[name]].grad / scale, param.grad / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [63, 64, 97, 224])
def test_torchvision_s_shapes_at_other_sizes_are_torchvision_s(size):
    theirs = torchvision.models.alexnet(num_classes=2).features.to("meta")
    with torch.device("meta"):
        net = alexnet.AlexNet(preset_of("torchvision"), 2, input_size=size)
        seen = []
        net.adaptive_pool.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape))
        net.features(torch.empty(1, 3, size, size))
        assert seen == [theirs(torch.empty(1, 3, size, size)).shape]
    assert net.num_features == 9216


def test_torchvision_drops_what_fc6_and_fc7_read():
    net = alexnet.build("torchvision", 10, width=0.25, input_size=64, init="he").train()
    read = {}
    for name in ("fc6", "fc7", "fc8"):
        getattr(net, name).register_forward_pre_hook(lambda layer, x, name=name: read.update({name: x[0].detach()}))
    whole = net.features(torch.randn(8, 3, 64, 64)).detach()
    net.classify(whole)
    assert ((read["fc6"] == 2 * whole) | (read["fc6"] == 0)).all()
    live = whole != 0
    assert (read["fc6"][live] == 0).double().mean() == pytest.approx(0.5, abs=0.05)
    assert (read["fc7"] == 0).double().mean() == pytest.approx(0.75, abs=0.1), "half by ReLU, half of the rest"
    assert (read["fc8"] == 0).double().mean() == pytest.approx(0.5, abs=0.15), "by ReLU alone"


def caffe_reference(state, x):
    """BVLC AlexNet in float64, from Caffe's definitions, one operation a line."""

    def lrn(a):  # alpha over n, k = 1, and the window runs over all maps
        squares = F.pad(a * a, (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, i : i + a.shape[1]] for i in range(5))
        return a / (1 + 1e-4 / 5 * total) ** 0.75

    def pool(a):  # windows of 3 at stride 2; Caffe rounds their number up
        count = math.ceil((a.shape[-1] - 3) / 2) + 1
        windows = F.pad(a, (0, 2, 0, 2), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2)
        return windows[:, :, :count, :count].amax((-2, -1))

    def conv(name, x, groups=1, **how):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], groups=groups, **how)

    x = pool(lrn(conv("conv1", x, stride=4).relu()))
    x = pool(lrn(conv("conv2", x, groups=2, padding=2).relu()))
    x = conv("conv3", x, padding=1).relu()
    x = conv("conv4", x, groups=2, padding=1).relu()
    x = pool(conv("conv5", x, groups=2, padding=1).relu()).flatten(1)
    x = F.linear(x, state["fc6.weight"], state["fc6.bias"]).relu()
    x = F.linear(x, state["fc7.weight"], state["fc7.bias"]).relu()
    return F.linear(x, state["fc8.weight"], state["fc8.bias"])


@pytest.mark.parametrize("size", [227, 70, 68])  # 68: the last window of conv1 would hang over the edge
def test_caffe_s_scores_and_gradients_are_those_of_its_definitions(size):
    net = alexnet.build("caffe", 7, input_size=size, width=0.125, init="he").double().eval()
    image = 100 * torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    state = {name: param.detach().clone().requires_grad_() for name, param in net.named_parameters()}
    scores, wanted = net(image), caffe_reference(state, image)
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-9)
    for result in (scores, wanted):
        result.square().sum().backward()
    for name, param in net.named_parameters():
        scale = state[name].grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(param.grad / scale, state[name].grad / scale, rtol=0, atol=1e-9)


def test_caffe_s_lrn_sees_both_columns_and_the_paper_s_does_not():
    for name, columns in (("caffe", 1), ("paper", 2)):
        net = alexnet.build(name, 10, width=0.25, input_size=64)
        maps = torch.zeros(1, 24, 1, 1)
        maps[0, 11] = maps[0, 12] = 100.0  # on both sides of the border
        alone = maps.clone()
        alone[0, 12] = 0
        assert torch.equal(net.relu_norm(maps)[0, 11], net.relu_norm(alone)[0, 11]) == (columns == 2)


def test_caffe_s_initialisation():
    net = alexnet.build("caffe", num_classes=100, width=0.5)
    biases = {name: getattr(net, name).bias.unique().tolist() for name, _ in net.named_children() if name[-1].isdigit()
              and hasattr(getattr(net, name), "bias")}  # fmt: skip
    tenth = pytest.approx([0.1])
    assert biases == {
        "conv1": [0.0], "conv2": tenth, "conv3": [0.0], "conv4": tenth, "conv5": tenth, "fc6": tenth, "fc7": tenth,
        "fc8": [0.0],
    }  # fmt: skip
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc8"):
        assert getattr(net, name).weight.std().item() == pytest.approx(0.01, rel=0.03), name
    for name in ("fc6", "fc7"):
        assert getattr(net, name).weight.std().item() == pytest.approx(0.005, rel=0.03), name


def test_constants_of_lrn_are_the_preset_s_own_unless_given():
    def constants(*args, **kwargs):
        norm = alexnet.build(*args, width=0.25, input_size=64, **kwargs).relu_norm
        return norm.k, norm.n, norm.alpha, norm.beta

    assert constants("paper", 10) == (2.0, 5, 1e-4, 0.75)
    assert constants("caffe", 10) == (1.0, 5, 2e-5, 0.75)
    assert constants("caffe", 10, lrn=alexnet.LRN(k=3.0)) == (3.0, 5, 1e-4, 0.75)
    with pytest.raises(ValueError, match="preset torchvision has no LRN"):
        alexnet.build("torchvision", 10, width=0.25, input_size=64, lrn=alexnet.LRN())


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("caffe", 40, "input_size = 40: too small for the pooling after conv5 of preset caffe; use at least 55"),
        (
            "torchvision",
            40,
            "input_size = 40: too small for the pooling after conv5 of preset torchvision; use at least",
        ),
        ("paper", 8, "input_size = 8: too small for conv1 of preset paper; use at least 64, its own is 224"),
    ],
)
def test_an_image_that_is_too_small_is_refused_with_the_least_that_is_not(name, size, words):
    with pytest.raises(ValueError, match=words) as error:
        alexnet.build(name, 10, width=0.25, input_size=size)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    assert alexnet.build(name, 10, width=0.25, input_size=least).num_features > 0
    with pytest.raises(ValueError, match="too small"):
        alexnet.build(name, 10, width=0.25, input_size=least - 1)
