"""A trained net as a thing that can be used: its weights, and with them all that an image must go through before.

    trained = alexnet.load("runs/digits-20261126-102157/checkpoint-epoch-0030")
    probabilities = trained.probabilities(np.stack([trained.stored(file.read_bytes()) for file in files]), views=10)

A model's folder holds WEIGHTS, DESCRIPTION and MEAN_IMAGE; every checkpoint is one, and so is the model in MLflow.
alexnet/weights.py has the same in one file, and reads and writes those of others.
N images, S the side at which they are stored, in pixels, K classes.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import augment, images, ten_views
from .augment import MeanSubtraction
from .net import AlexNet
from .presets import LRN, preset_of

WEIGHTS = "model.safetensors"  # the canonical state dict (alexnet/net.py)
DESCRIPTION = "net.json"
MEAN_IMAGE = "mean_image.npy"
VERSION = 1  # of DESCRIPTION
VIEWS = (1, 10)
EXIF_RULES = ("apply", "ignore")
MAX_SCALE = 1e30  # of pixels: no float32 could hold what is beyond


@dataclass(frozen=True)
class Description:
    """What using a net takes besides its weights and its mean image."""

    build: Mapping[str, Any]  # arguments of alexnet.build; `lrn` as a mapping of its constants
    classes: tuple[str, ...]  # by the label; a net may have more outputs than these
    pixel_scale: float = 1.0  # multiplies the pixels after the mean image is subtracted
    class_names: tuple[str, ...] = ()  # the classes in words, where the data has them
    epoch: int | None = None  # passes that it was trained for
    data: str = ""  # name of what it was trained on
    digest: str = ""  # of the images that it was trained on
    exif: str = ""  # of EXIF_RULES: whether those were turned by the orientation that they state; empty: not recorded
    schema_version: int = field(default=VERSION)

    @property
    def applies_exif(self) -> bool:
        """Whether images are turned by their EXIF orientation, as those were that the net was trained on; where that is
        not recorded, as preparing them does unless it is told: all but ImageNet's."""
        if self.exif:
            return self.exif == "apply"
        return not self.classes or not all(images.WORDNET_ID.fullmatch(name) for name in self.classes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def of_json(text: str | bytes, where: str) -> "Description":
        """What `to_json` wrote. Raises ValueError of one line that names `where` and the field."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: is not JSON; take the model from its run again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{where}: is not a JSON object; take the model from its run again")
        version = found.pop("schema_version", VERSION)
        if type(version) is not int or version > VERSION:
            raise ValueError(f"{where}: is of version {version!r:.20}, this program reads up to {VERSION}: upgrade it")
        kinds: dict[str, Any] = {
            "build": dict, "classes": list, "pixel_scale": (int, float), "class_names": list,
            "epoch": (int, type(None)), "data": str, "digest": str, "exif": str,
        }  # fmt: skip
        for name, value in found.items():
            if name not in kinds or not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise ValueError(f"{where}: {name!r:.40} is {value!r:.40}, which is not what a net's description has")
        if missing := {"build", "classes"} - found.keys():
            raise ValueError(f"{where}: has no {min(missing)}; take the model from its run again")
        for name in ("classes", "class_names"):
            if not all(isinstance(each, str) for each in found.setdefault(name, [])):
                raise ValueError(f"{where}: {name} are not all text")
            found[name] = tuple(found[name])
        if found["class_names"] and len(found["class_names"]) != len(found["classes"]):
            counts = f"{len(found['class_names'])} class_names for {len(found['classes'])} classes"
            raise ValueError(f"{where}: has {counts}; take the model from its run again")
        if found.get("exif", "") not in ("", *EXIF_RULES):
            raise ValueError(f"{where}: exif is {found['exif']!r:.40}; it is {' or '.join(EXIF_RULES)}")
        if not 0 < found.setdefault("pixel_scale", 1.0) < MAX_SCALE:
            raise ValueError(f"{where}: pixel_scale is {found['pixel_scale']!r:.40}; it is more than 0, and a float")
        return Description(**found)


class TrainedNet:
    """A net with its classes and its input: from images to probabilities."""

    def __init__(self, net: AlexNet, description: Description, mean_image: NDArray[np.float32]) -> None:
        """mean_image: (S, S, 3), in grey levels from 0 to 255."""
        self.net, self.description, self.mean_image = net.eval(), description, mean_image
        self.image_size = len(mean_image)
        self.subtract_mean = MeanSubtraction(torch.from_numpy(mean_image), net.input_size, description.pixel_scale)

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each of the net's outputs."""
        named = self.description.classes
        return (*named, *(f"class {number}" for number in range(len(named), self.net.num_classes)))

    def stored(self, data: bytes, *, exif: bool | None = None) -> NDArray[np.uint8]:
        """The bytes of an image file as (S, S, 3): shorter side to S, then the centre, as preparing data does.

        exif: whether it is turned by the orientation that it states; None: as the training images were. Raises
        images.NotAnImage.
        """
        turn = self.description.applies_exif if exif is None else exif
        return images.resize_and_center(images.decode(data, exif=turn), self.image_size)

    def inputs(self, stored_NHWC: NDArray[np.uint8], draws: augment.Draws) -> torch.Tensor:
        """What the net reads of one crop of each image: (N, 3, input_size, input_size) float32, without the mean."""
        none = np.zeros((len(stored_NHWC), 3), np.float32)
        crops = augment.crop_flip_shift(stored_NHWC, draws, none, self.net.input_size)
        device = next(self.net.parameters()).device
        return self.subtract_mean(*(torch.from_numpy(part).to(device) for part in (crops, *draws[:3])))

    @torch.inference_mode()
    def scores(self, stored_NHWC: NDArray[np.uint8], draws: augment.Draws) -> torch.Tensor:
        """Class scores (N, K), before the softmax, of one crop of each image."""
        scores: torch.Tensor = self.net(self.inputs(stored_NHWC, draws))
        return scores

    def probabilities(self, stored_NHWC: NDArray[np.uint8], views: int = 1) -> NDArray[np.float32]:
        """(N, K) float32 of images (N, S, S, 3): of the centre crop, or the mean over ten views (paper, 4.1)."""
        total: torch.Tensor | float = 0.0
        stored = np.ascontiguousarray(stored_NHWC)
        for draws in augment.views(len(stored), margin=self.image_size - self.net.input_size, number=views):
            total = total + torch.softmax(self.scores(stored, draws).float(), 1)
        assert isinstance(total, torch.Tensor)
        mean: NDArray[np.float32] = (total / views).cpu().numpy()
        return mean

    def log_probabilities(self, stored_NHWC: NDArray[np.uint8], views: int = 1) -> NDArray[np.float64]:
        """(N, K) float64, the logarithm of `probabilities`: of two classes, the one with the higher score has more."""
        stored, margin = np.ascontiguousarray(stored_NHWC), self.image_size - self.net.input_size
        if views == 10 and ten_views.can_share(self.net, self.image_size):
            scores = self._ten_scores(stored)
        else:
            scores = [self.scores(stored, draws) for draws in augment.views(len(stored), margin=margin, number=views)]
        parts = [torch.log_softmax(each.double(), 1) for each in scores]
        found: NDArray[np.float64] = log_mean(torch.stack(parts)).cpu().numpy()
        return found

    @torch.inference_mode()
    def _ten_scores(self, stored_NHWC: NDArray[np.uint8]) -> list[torch.Tensor]:
        """Of each of the ten views, (N, K)."""
        device = next(self.net.parameters()).device
        mean = torch.from_numpy(self.mean_image).to(device)
        centered = (torch.from_numpy(stored_NHWC).to(device) - mean).mul_(self.description.pixel_scale)
        return ten_views.ten_scores(self.net, centered.permute(0, 3, 1, 2))

    def save(self, folder: str | Path) -> None:
        """Write a model's folder, which `load` reads."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_safetensors(state, Path(folder, WEIGHTS))
        write_description(Path(folder), self.description, self.mean_image)


def log_mean(log_probabilities: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mean over the first dimension of probabilities that are given by their logarithms."""
    return torch.logsumexp(log_probabilities, 0) - math.log(len(log_probabilities))


def write_safetensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file, of the mode that any new file gets: the library's own is for its owner alone."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, str(file), metadata)
    file.chmod(mode & 0o777)


def write_description(folder: Path, description: Description, mean_image: NDArray[np.float32]) -> None:
    """Write what makes a folder with WEIGHTS a model's folder."""
    np.save(folder / MEAN_IMAGE, mean_image, allow_pickle=False)
    (folder / DESCRIPTION).write_text(description.to_json())


def load(path: str | os.PathLike[str]) -> TrainedNet:
    """The net of a model's folder, such as a checkpoint, or of a file (alexnet/weights.py), on the CPU.

    Raises ValueError of one line.
    """
    folder = Path(path)
    if folder.is_file():
        from . import weights  # which needs this module

        return weights.read(folder)
    missing = next((name for name in (WEIGHTS, DESCRIPTION, MEAN_IMAGE) if not (folder / name).is_file()), None)
    if missing:
        raise ValueError(
            f"{folder}: has no {missing}; a model's folder holds {WEIGHTS}, {DESCRIPTION} and {MEAN_IMAGE}"
        )
    description = Description.of_json((folder / DESCRIPTION).read_bytes(), str(folder / DESCRIPTION))
    side = description.build.get("input_size")
    mean_image = read_mean_image(folder / MEAN_IMAGE, side if isinstance(side, int) else 0)
    tensors = read_safetensors(folder / WEIGHTS)
    return assemble(description, tensors, mean_image, str(folder / DESCRIPTION), str(folder / WEIGHTS))


def assemble(
    description: Description, tensors: Mapping[str, torch.Tensor], mean_image: NDArray[np.float32], where: str,
    where_tensors: str | None = None,
) -> TrainedNet:  # fmt: skip
    """A net from its parts. where: the file of the description, for messages; where_tensors: that of the tensors, if it
    is another. Raises ValueError of one line; what a description claims takes no memory before it is
    known to be that of the tensors."""
    arguments = {name: value for name, value in description.build.items() if name not in ("init", "seed")}
    try:
        lrn = arguments.pop("lrn", None)
        preset, num_classes = preset_of(arguments.pop("preset", "paper")), arguments.pop("num_classes", 1000)
        with torch.device("meta"):
            net = AlexNet(preset, num_classes, **arguments, lrn=None if lrn is None else LRN(**lrn))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{where}: build: {str(error).partition(chr(10))[0]:.200}") from None
    _check_classes(description, net, where)
    check_mean_image(mean_image, net.input_size, where)
    where = where_tensors or where
    check_tensors(net, tensors, where)
    if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{where}: {damaged[0]} has numbers that are not finite")
    net = net.to_empty(device="cpu")
    net.load_state_dict(tensors)
    return TrainedNet(net.to(memory_format=torch.channels_last), description, mean_image)


def _check_classes(description: Description, net: AlexNet, where: str) -> None:
    if len(description.classes) > net.num_classes:
        raise ValueError(f"{where}: {len(description.classes)} classes, but the net has {net.num_classes} outputs")


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises ValueError of one line."""
    try:
        return dict(load_file(str(file)))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({str(error).splitlines()[0]:.100})") from None


def check_tensors(net: AlexNet, found: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises ValueError of one line where a state dict is not this net's by names and shapes."""
    state = net.state_dict()
    if surplus := sorted(found.keys() ^ state.keys()):
        there = "the file has" if surplus[0] in found else "the net has"
        raise ValueError(f"{where}: {there} {surplus[0]!r:.60}, and the other does not: is it of another net?")
    for name, tensor in found.items():
        if tensor.shape != state[name].shape:
            has, wants = (" x ".join(map(str, each.shape)) for each in (tensor, state[name]))
            raise ValueError(f"{where}: {name} is {has}, and the net's is {wants}: is it of another net?")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} has numbers of type {tensor.dtype}; weights are floats")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{where}: {name} claims more numbers than there are in the file")


def read_mean_image(file: Path, input_size: int) -> NDArray[np.float32]:
    """(S, S, 3) float32, S at least the net's input. Raises ValueError of one line."""
    try:
        mean: NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise ValueError(f"{file}: is no array of numpy") from None
    check_mean_image(mean, input_size, str(file))
    return mean


def check_mean_image(mean: NDArray[np.float32], input_size: int, where: str) -> None:
    """Raises ValueError of one line where it is not (S, S, 3) float32, S at least the net's input."""
    side = mean.shape[0] if mean.ndim == 3 else 0
    if mean.dtype != np.float32 or mean.shape != (side, side, 3) or side < input_size or not np.isfinite(mean).all():
        raise ValueError(f"{where}: has {mean.dtype} {mean.shape}; expected float32 (S, S, 3), S at least {input_size}")
