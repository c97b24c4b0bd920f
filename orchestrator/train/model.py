"""From a config to its net, to what updates it, and to what describes it beside its weights."""

import math
from dataclasses import asdict
from typing import Any

from torch import nn

import alexnet
from alexnet.lars import WholeSums
from alexnet.trained import Description
from orchestrator.config.layers import frozen_layers, layer_factors
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest


def build_net(config: TrainConfig, num_classes: int) -> alexnet.AlexNet:
    """The net that the config describes, its frozen layers without gradients."""
    arguments = _arguments(config, num_classes)
    net = alexnet.build(**arguments | {"lrn": config.lrn}, init=config.init, seed=config.seed)
    for layer in frozen_layers(config.freeze):
        net.get_submodule(layer).requires_grad_(False)
    return net


def make_optimizer(config: TrainConfig, net: nn.Module, whole_sums: WholeSums | None = None) -> alexnet.PaperSGD:
    """The update rule for a net, or for a worker's part of one, of which whole_sums are the ShardedNet's.

    Its first parameter group has the base rate and the layers without a factor, if there are any; each further group
    the layers of one factor.
    """
    factors = layer_factors(config.freeze, config.lr_factor)
    groups: dict[float, dict[str, Any]] = {1.0: {"params": [], "lr": config.lr}}
    for name, param in net.named_parameters():
        factor = factors.get(name.split(".")[0])
        if factor is not None:
            groups.setdefault(factor, {"params": [], "lr": config.lr * factor})["params"].append(param)
    rule = groups.values(), config.lr, config.momentum, config.weight_decay
    if config.optimizer == "lars":
        return alexnet.LARS(*rule, config.trust_coefficient, whole_sums)
    return alexnet.PaperSGD(*rule)


def make_warmup(config: TrainConfig, steps_per_epoch: int) -> alexnet.Warmup:
    """The warm-up of the rate, of one step at least if there is any."""
    return alexnet.Warmup(math.ceil(round(config.warmup_epochs * steps_per_epoch, 6)))


def describe(config: TrainConfig, manifest: Manifest, num_classes: int, epoch: int | None = None) -> Description:
    """What using the net takes besides its weights and its mean image."""
    return Description(
        build=_arguments(config, num_classes), classes=tuple(manifest.classes), pixel_scale=config.pixel_scale,
        class_names=tuple(manifest.class_names), epoch=epoch, data=manifest.source, digest=manifest.digest,
        exif=manifest.exif,
    )  # fmt: skip


def _arguments(config: TrainConfig, num_classes: int) -> dict[str, Any]:
    return {
        "preset": config.preset, "num_classes": num_classes, "input_size": config.crop_size, "width": config.width,
        "dropout": config.dropout, "lrn": config.lrn and asdict(config.lrn),
    }  # fmt: skip
