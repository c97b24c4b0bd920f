"""Settings that name layers: what is frozen, what learns at which rate, and what is refused."""

import pytest

import alexnet
from orchestrator.config.layers import GROUPS, LAYERS, frozen_layers, layer_factors
from orchestrator.config.train import make_config
from orchestrator.search.config import make_search


def test_the_layers_are_those_of_the_net_first_to_last():
    net = alexnet.build("paper", 10, input_size=64, width=0.125)
    assert tuple(dict.fromkeys(name.split(".")[0] for name, _ in net.named_parameters())) == LAYERS
    assert GROUPS["conv"] + GROUPS["fc"] == LAYERS
    assert all(name.startswith(group) for group, layers in GROUPS.items() for name in layers)


@pytest.mark.parametrize(
    ("given", "kept", "frozen"),
    [
        ("none", "none", ()), ("", "none", ()), ("conv1", "conv1", ("conv1",)),
        ("conv2, conv1", "conv1,conv2", ("conv1", "conv2")), ("fc6,conv", "conv1,conv2,conv3,conv4,conv5,fc6",
        (*GROUPS["conv"], "fc6")), ("conv1,conv1", "conv1", ("conv1",)),
    ],
)  # fmt: skip
def test_equal_choices_of_frozen_layers_are_equal_however_they_are_written(given, kept, frozen):
    config = make_config(freeze=given)
    assert config.freeze == kept
    assert frozen_layers(config.freeze) == frozen
    assert make_config(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "kept", "factors"),
    [
        ("none", "none", [1] * 8),
        ("fc8=10,conv=0.1", "conv=0.1,fc8=10", [0.1] * 5 + [1, 1, 10]),
        ("conv3=2, conv=.5", "conv=0.5,conv3=2", [0.5, 0.5, 2, 0.5, 0.5, 1, 1, 1]),
        ("fc=1e1,fc7=1", "fc=10,fc7=1", [1] * 5 + [10, 1, 10]),
    ],
)
def test_a_layer_s_own_factor_wins_over_its_group_s(given, kept, factors):
    config = make_config(lr_factor=given)
    assert config.lr_factor == kept
    assert layer_factors(config.freeze, config.lr_factor) == dict(zip(LAYERS, factors, strict=True))
    assert make_config(**config.model_dump()) == config


def test_a_group_s_factor_is_for_its_layers_that_are_not_frozen():
    assert layer_factors("conv1,conv2,fc", "conv=0.1") == {"conv3": 0.1, "conv4": 0.1, "conv5": 0.1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": "conv9"}, ["freeze = 'conv9'", "no layer 'conv9'", ", ".join(LAYERS)]),
        ({"freeze": "conv,fc"}, ["freeze = 'conv,fc'", "nothing would be left to train", "fc8"]),
        ({"freeze": ",".join(LAYERS)}, ["nothing would be left to train"]),
        ({"freeze": "none,conv6"}, ["no layer 'conv6'"]),
        ({"lr_factor": "conv6=2"}, ["lr_factor = 'conv6=2'", "no layer 'conv6'", "conv and fc"]),
        ({"lr_factor": "conv1"}, ["conv1: expected a layer and its factor, such as conv=0.1,fc8=10"]),
        ({"lr_factor": "conv1=a"}, ["conv1=a: expected a number"]),
        ({"lr_factor": "conv1=0"}, ["conv1=0", "--freeze conv1"]),
        ({"lr_factor": "conv1=-1"}, ["conv1=-1", "above 0"]),
        ({"lr_factor": "conv1=nan"}, ["conv1=nan", "above 0"]),
        ({"lr_factor": "conv1=inf"}, ["conv1=inf", "above 0"]),
        ({"lr_factor": "fc8=2,fc8=3"}, ["fc8 is there twice"]),
        ({"lr_factor": "conv1=2", "freeze": "conv1"}, ["lr_factor = 'conv1=2'", "conv1 is frozen"]),
        ({"lr_factor": "conv=2", "freeze": "conv"}, ["lr_factor = 'conv=2'", "conv is frozen"]),
        ({"keep_every": -1}, ["keep_every = -1"]),
    ],
)
def test_what_means_nothing_is_one_line_with_what_would_work(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        make_config(**fields)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_search_varies_them_but_not_under_a_trial_s_weights():
    space = {"freeze": {"choice": ["none", "conv1,conv2"]}, "lr_factor": {"choice": ["none", "fc8=10"]}}
    assert make_search({}, make_config(), space).space.names == ("freeze", "lr_factor")
    for name in space:
        with pytest.raises(ValueError, match=f"^space: {name}: cannot change under a trial's weights"):
            make_search({"scheduler": "pbt"}, make_config(), {name: space[name]})
    with pytest.raises(ValueError, match=r"^space: freeze = 'conv9'.*no layer"):
        make_search({}, make_config(), {"freeze": {"choice": ["none", "conv9"]}})
