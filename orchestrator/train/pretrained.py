"""The trained net that a run starts from: kept in the run's folder, so that resuming needs nothing else."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet.layouts import ShardedNet
from alexnet.presets import LRN, preset_of
from alexnet.trained import DESCRIPTION, MEAN_IMAGE, WEIGHTS, Description
from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.base.storage import StoragePath
from orchestrator.config.layers import NONE
from orchestrator.config.train import TrainConfig
from orchestrator.data.shards import Manifest
from orchestrator.train import checkpoints

START = "start"  # the model's folder in the run's
LAST_LAYER = preset_of("paper").head.name  # and of the other presets
NEEDED = ("preset", "width", "input_size")  # settings without which the weights do not fit


@dataclass(frozen=True)
class Pretrained:
    """A model's folder that a run starts from."""

    folder: StoragePath
    description: Description
    text: str = ""  # what the user called it

    @staticmethod
    def of_run(run: StoragePath) -> "Pretrained | None":
        """What a run started from; None if it did from nothing. Raises ValueError for a damaged description."""
        place = run / START / DESCRIPTION
        if place.size() is None:
            return None
        return Pretrained(run / START, Description.of_json(place.read(), str(place)))

    def store(self, run: StoragePath) -> None:
        """Copy it into a run's folder, the description last: where that is, the rest is."""
        for name in (WEIGHTS, MEAN_IMAGE, DESCRIPTION):
            (run / START / name).write((self.folder / name).read())

    def settings(self) -> dict[str, Any]:
        """The settings that make the net, and what it is given, those that it was trained with."""
        build = self.description.build
        preset = preset_of(build.get("preset", "paper"))
        own = asdict(preset.lrn) | dict(build.get("lrn") or {}) if preset.lrn else dict.fromkeys(asdict(LRN()))
        return {
            "preset": preset.name,
            "width": build.get("width", 1.0),
            "input_size": build.get("input_size") or preset.input_size,
            **{f"lrn_{name}": value for name, value in own.items()},
            "pixel_scale": self.description.pixel_scale,
        }

    def differences(self, given: Mapping[str, Any]) -> list[str]:
        """Lines about settings that were given, and are others than the model's. Raises ValueError of one line for
        those with which its weights do not fit."""
        own = self.settings()
        others = {name: given[name] for name in own if name in given and given[name] != own[name]}
        for name in NEEDED:
            if name in others:
                raise ValueError(f"{name} = {others[name]}: {self} has {own[name]}; leave {name} out")
        return [f"{name} is {value}, and {self} was trained with {own[name]}" for name, value in others.items()]

    def keeps_last_layer(self, classes: Sequence[str], num_classes: int) -> bool:
        """Whether the last layer's outputs mean the same in a run on these classes."""
        outputs = self.description.build.get("num_classes", 1000)
        return (tuple(classes), num_classes) == (self.description.classes, outputs)

    def mean_image(self, of_data: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's mean image, which its weights are used to; the data's where that is of another size."""
        found = self._mean_image()
        return found if (found.shape, found.dtype) == (of_data.shape, of_data.dtype) else of_data

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained on, as they were stored."""
        return len(self._mean_image())

    def load_weights(self, net: ShardedNet, classes: Sequence[str], num_classes: int) -> None:
        """Replace a worker's part of the weights, but for a last layer of other classes. Raises ValueError."""
        anew = () if self.keeps_last_layer(classes, num_classes) else (f"{LAST_LAYER}.weight", f"{LAST_LAYER}.bias")
        params = dict(net.part.named_parameters())
        if not all(params[name].requires_grad for name in anew):
            raise ValueError(
                f"freeze: {LAST_LAYER} starts anew, for classes that are not the model's, and would never learn them; "
                f"leave {LAST_LAYER} out"
            )
        with self.folder.as_local_dir() as folder, torch.no_grad():
            found = dict(checkpoints.parts_of(folder / WEIGHTS, net, without=anew))
            wanted = {name: param.shape for name, param in params.items() if name not in anew}
            if {name: weight.shape for name, weight in found.items()} != wanted:
                raise ValueError(f"{self.folder / WEIGHTS}: is not of the net that the run's settings describe")
            for name, weight in found.items():
                params[name].copy_(weight)

    def _mean_image(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.load(io.BytesIO((self.folder / MEAN_IMAGE).read()), allow_pickle=False)
        return found

    def __str__(self) -> str:
        return shown(self.text or self.folder, LONGEST_VALUE)


def check_frozen(config: TrainConfig, start: Pretrained | None) -> None:
    """Raises ValueError of one line for layers that would keep the weights of the seed, which nothing has trained."""
    if start is None and config.freeze != NONE:
        raise ValueError(
            f"freeze = {config.freeze}: would keep random weights; give a trained net with --start-from MODEL, or "
            "leave out --freeze"
        )


def said_of_start(start: Pretrained | None, config: TrainConfig, manifest: Manifest) -> str | None:
    """A line about what a new run starts from, and what of it is not the model's; None if there is nothing to say."""
    if start is None:
        return None
    num_classes = config.num_classes or len(manifest.classes)
    text = f"starting from the weights of {start}"
    if not start.keeps_last_layer(manifest.classes, num_classes):
        text += f"; {LAST_LAYER} starts anew, for {num_classes} classes that are not the model's"
    if start.image_size != manifest.image_size:
        text += f"; the mean image is the data's, of {manifest.image_size} pixels: the model's has {start.image_size}"
    return text
