"""A run that starts from a trained net: which settings and weights it takes, and what it says of the rest."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import alexnet
from alexnet.layouts import Layout, ShardedNet
from orchestrator.base.storage import StoragePath
from orchestrator.cli import train
from orchestrator.config.recipes import digits
from orchestrator.train.model import build_net
from orchestrator.train.pretrained import Pretrained, check_frozen, said_of_start

LRN = {"k": 1.0, "n": 3, "alpha": 0.001, "beta": 0.5}
BUILD = {"preset": "paper", "num_classes": 3, "width": 0.125, "input_size": 64, "lrn": LRN, "dropout": 0.5}
OWN = {
    "preset": "paper", "width": 0.125, "input_size": 64, "lrn_k": 1.0, "lrn_n": 3, "lrn_alpha": 0.001, "lrn_beta": 0.5,
    "pixel_scale": 0.5,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A model's folder, of a net of three classes."""
    net = alexnet.build("paper", 3, width=0.125, input_size=64, lrn=alexnet.LRN(**LRN), init="he", seed=5)
    description = alexnet.Description(BUILD, ("a", "b", "c"), pixel_scale=0.5)
    alexnet.TrainedNet(net, description, np.full((72, 72, 3), 9, np.float32)).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def start(model):
    description = alexnet.load(model).description
    return Pretrained(StoragePath.of(model), description, "mine")


def net_of(num_classes, **settings):
    config = digits().changed(**OWN, **settings)
    return ShardedNet(build_net(config, num_classes), Layout("single", 1))


def manifest_of(classes, image_size=72):
    return SimpleNamespace(classes=tuple(classes), image_size=image_size)


def test_the_net_and_what_it_is_given_are_the_model_s_and_the_rest_the_run_s(model, tmp_path):
    args = train.parser().parse_args(["--start-from", str(model), "--lr", "0.002", "--dropout", "0.1"])
    _, config, _ = train.resolve(args)
    start, config = train.start_from(args, config, tmp_path / "into")
    assert start.text == str(model)
    assert config == digits().changed(**OWN, lr=0.002, dropout=0.1)


def test_a_flag_wins_and_is_said_and_one_with_which_the_weights_do_not_fit_is_refused(model, tmp_path, capsys):
    args = train.parser().parse_args(["--start-from", str(model), "--pixel-scale", "1", "--lrn-n", "5"])
    _, config = train.start_from(args, train.resolve(args)[1], tmp_path / "into")
    assert (config.pixel_scale, config.lrn_n, config.lrn_k) == (1.0, 5, 1.0)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"lrn_n is 5, and {model} was trained with 3",
        f"pixel_scale is 1.0, and {model} was trained with 0.5",
    ]
    for name, value, own in (("width", "0.25", 0.125), ("input_size", "72", 64)):
        args = train.parser().parse_args(["--start-from", str(model), f"--{name.replace('_', '-')}", value])
        with pytest.raises(ValueError, match=rf"^{name} = {value}: .*model has {own}; leave {name} out$"):
            train.start_from(args, train.resolve(args)[1], tmp_path / "into")


def test_what_a_file_of_settings_leaves_open_is_the_model_s(model, tmp_path, capsys):
    """A run's config.yaml has all settings, and null for those that are automatic."""
    file = tmp_path / "config.yaml"
    file.write_text(digits().changed(width=OWN["width"], input_size=None, lr=0.003).to_yaml())
    assert "lrn_k: null" in file.read_text()
    args = train.parser().parse_args(["--start-from", str(model), "--config", str(file)])
    _, config = train.start_from(args, train.resolve(args)[1], tmp_path / "into")
    own = {name: value for name, value in OWN.items() if name.startswith("lrn")}
    assert {name: getattr(config, name) for name in own} == own
    assert (config.input_size, config.lr) == (64, 0.003)
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith(("lrn", "input_size"))]


def test_of_the_same_classes_all_weights_are_taken(start, model):
    net = net_of(3)
    start.load_weights(net, ("a", "b", "c"), 3)
    wanted = alexnet.load(model).net.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.part.state_dict().items())


@pytest.mark.parametrize(("classes", "outputs"), [(("a", "b"), 2), (("a", "b", "d"), 3), (("a", "b", "c"), 4)])
def test_of_other_classes_the_last_layer_starts_anew(start, model, classes, outputs):
    net, fresh = net_of(outputs), net_of(outputs)
    start.load_weights(net, classes, outputs)
    wanted = alexnet.load(model).net.state_dict()
    for name, tensor in net.part.state_dict().items():
        assert torch.equal(tensor, (fresh.part.state_dict() if name.startswith("fc8.") else wanted)[name]), name
    with pytest.raises(ValueError, match=r"^freeze: fc8 starts anew, .* leave fc8 out$"):
        start.load_weights(net_of(outputs, freeze="fc8"), classes, outputs)


def test_what_a_run_starts_from_is_kept_in_its_folder(start, model, tmp_path):
    run = StoragePath.of(tmp_path / "run")
    assert Pretrained.of_run(run) is None
    start.store(run)
    kept = Pretrained.of_run(run)
    assert kept is not None
    assert sorted((run / "start").files()) == ["mean_image.npy", "model.safetensors", "net.json"]
    assert kept.description == start.description
    for name in (run / "start").files():
        assert (run / "start" / name).read() == (model / name).read_bytes()


def test_the_mean_image_is_the_model_s_where_it_fits_the_data(start):
    assert (start.mean_image(np.zeros((72, 72, 3), np.float32)) == 9).all()
    assert (start.mean_image(np.zeros((80, 80, 3), np.float32)) == 0).all()


def test_weights_of_another_net_are_refused_in_one_line(start):
    config = digits().changed(**OWN | {"width": 0.25})
    net = ShardedNet(build_net(config, 3), Layout("single", 1))
    with pytest.raises(ValueError, match=r"model\.safetensors: is not of the net that the run's settings describe$"):
        start.load_weights(net, ("a", "b", "c"), 3)


def test_what_is_not_the_model_s_is_said(start):
    config = digits()
    assert said_of_start(start, config, manifest_of("abc")) == "starting from the weights of mine"
    assert said_of_start(start, config, manifest_of("abcd", 80)) == (
        "starting from the weights of mine; fc8 starts anew, for 4 classes that are not the model's; the mean image is "
        "the data's, of 80 pixels: the model's has 72"
    )
    assert said_of_start(None, config, manifest_of("abc")) is None


def test_layers_are_frozen_only_of_a_trained_net(start):
    frozen = digits().changed(freeze="conv1")
    check_frozen(digits(), None)
    check_frozen(frozen, start)
    with pytest.raises(ValueError, match=r"^freeze = conv1: would keep random weights; give .* --start-from MODEL, or"):
        check_frozen(frozen, None)
