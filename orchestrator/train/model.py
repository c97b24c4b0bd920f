"""From a config to its net, and what is written beside its weights so that it can be used without the config."""

from dataclasses import asdict
from typing import Any

import alexnet
from alexnet.trained import Description
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest


def build_net(config: TrainConfig, num_classes: int) -> alexnet.AlexNet:
    """The net that the config describes."""
    arguments = _arguments(config, num_classes)
    return alexnet.build(**arguments | {"lrn": config.lrn}, init=config.init, seed=config.seed)


def describe(config: TrainConfig, manifest: Manifest, num_classes: int, epoch: int | None = None) -> Description:
    """What using the net takes besides its weights and its mean image."""
    return Description(
        build=_arguments(config, num_classes), classes=tuple(manifest.classes), pixel_scale=config.pixel_scale,
        class_names=tuple(manifest.class_names), epoch=epoch, data=manifest.source, digest=manifest.digest,
    )  # fmt: skip


def _arguments(config: TrainConfig, num_classes: int) -> dict[str, Any]:
    return {
        "preset": config.preset, "num_classes": num_classes, "input_size": config.crop_size, "width": config.width,
        "dropout": config.dropout, "lrn": config.lrn and asdict(config.lrn),
    }  # fmt: skip
