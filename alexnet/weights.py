"""A trained net in one file: our own, torchvision's weights, Caffe's weights, ONNX.

    from alexnet import load, weights

    weights.write(load("bvlc_alexnet.caffemodel"), Path("alexnet.onnx"))

Of the formats only our own and ONNX have the classes and the mean image inside. The others' mean is ImageNet's, with
which their published weights were trained.
"""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from . import caffemodel, onnx_graph
from .lrn import LocalResponseNorm
from .presets import LRN, preset_of
from .trained import MEAN_IMAGE, WEIGHTS, Description, TrainedNet, assemble, read_safetensors, write_safetensors

FORMATS = {".safetensors": "safetensors", ".pth": "torchvision", ".pt": "torchvision", ".caffemodel": "caffemodel",
           ".onnx": "onnx"}  # fmt: skip
METADATA, MEAN_TENSOR = "alexnet", "mean_image"  # canonical names of weights have a dot
MAX_BYTES = 2**31  # of an unpacked .pth: eight times AlexNet

# torchvision's transforms for its ImageNet weights, of pixels in [0, 1]
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STORED = 256
LAYERS = {
    "features.0": "conv1", "features.3": "conv2", "features.6": "conv3", "features.8": "conv4", "features.10": "conv5",
    "classifier.1": "fc6", "classifier.4": "fc7", "classifier.6": "fc8",
}  # fmt: skip
NAMES = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in LAYERS.items() for kind in ("weight", "bias")}


def format_of(file: Path, stated: str | None = None) -> str:
    """The format of a file to be written: the stated one, or that of its extension. Raises ValueError."""
    if stated is None and file.suffix.lower() not in FORMATS:
        raise ValueError(f"{file}: its extension is of no known format; the known are {', '.join(FORMATS)}")
    return stated or FORMATS[file.suffix.lower()]


def read(file: Path) -> TrainedNet:
    """The net of a file, by its extension. Raises ValueError of one line."""
    found = FORMATS.get(file.suffix.lower())
    if found == "safetensors":
        return _read_safetensors(file)
    if found == "torchvision":
        return _of_torchvision(_read_pickle(file), file)
    if found == "caffemodel":
        return _of_caffe(file)
    readable = [suffix for suffix, name in FORMATS.items() if name != "onnx"]
    raise ValueError(f"{file}: is of no format that can be read; those are {', '.join(readable)}")


def write(trained: TrainedNet, file: Path, stated: str | None = None, *, softmax: bool = False) -> list[str]:
    """Write a net to a file, all or nothing. Returns remarks on its use, in lines.

    softmax: whether an ONNX graph ends in probabilities instead of scores. Raises ValueError of one line for a net that
    the format cannot have, OSError, and onnx_graph.Differs if onnxruntime does not give the net's own scores.
    """
    chosen = format_of(file, stated)
    if softmax and chosen != "onnx":
        raise ValueError(f"softmax: only the format onnx has it, {chosen} is weights alone")
    writers: dict[str, Callable[[Path], list[str]]] = {
        "safetensors": lambda unfinished: _write_safetensors(trained, unfinished),
        "torchvision": lambda unfinished: _write_torchvision(trained, unfinished),
        "caffemodel": lambda unfinished: _write_caffe(trained, unfinished),
        "onnx": lambda unfinished: onnx_graph.write(trained, unfinished, softmax=softmax),
    }
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        remarks = writers[chosen](unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return remarks


def with_classes(trained: TrainedNet, classes: Sequence[str]) -> TrainedNet:
    """The net with a name for each of its outputs. Raises ValueError where their numbers differ."""
    if len(classes) != trained.net.num_classes:
        raise ValueError(f"{len(classes)} classes, but the net has {trained.net.num_classes} outputs")
    return TrainedNet(trained.net, replace(trained.description, classes=tuple(classes), class_names=()),
                      trained.mean_image)  # fmt: skip


def _read_safetensors(file: Path) -> TrainedNet:
    tensors = read_safetensors(file)
    try:
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({str(error).splitlines()[0]:.100})") from None
    if METADATA in metadata:
        if MEAN_TENSOR not in tensors:
            raise ValueError(f"{file}: has no {MEAN_TENSOR}; take the model from its run again")
        if tensors[MEAN_TENSOR].dtype != torch.float32:
            raise ValueError(f"{file}: {MEAN_TENSOR} is of {tensors[MEAN_TENSOR].dtype}; expected torch.float32")
        mean_image = tensors.pop(MEAN_TENSOR).numpy()
        return assemble(Description.of_json(metadata[METADATA], str(file)), tensors, mean_image, str(file))
    if tensors.keys() & NAMES.keys():
        return _of_torchvision(tensors, file)
    hint = f"; give its folder, with {MEAN_IMAGE} and net.json" if file.name == WEIGHTS else ""
    raise ValueError(f"{file}: has neither a description of its net nor torchvision's names{hint}")


def _write_safetensors(trained: TrainedNet, file: Path) -> list[str]:
    tensors = _state(trained) | {MEAN_TENSOR: torch.from_numpy(np.ascontiguousarray(trained.mean_image))}
    write_safetensors(tensors, file, {"format": "pt", METADATA: trained.description.to_json()})
    return []


def _state(trained: TrainedNet) -> dict[str, torch.Tensor]:
    """Canonical names to float32 in the usual order of memory."""
    state = trained.net.state_dict()
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()}


def _read_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of what torch.save wrote, without running code from it. Raises ValueError of one line."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise ValueError(f"unpacks to {size} bytes, more than {MAX_BYTES}")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in zip, pickle and torch
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{file}: cannot be read as a dict of tensors alone ({reason:.150})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: holds a {type(found).__name__} and no state dict, a dict of tensors by name")
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{file}: {name!r:.60} is no plain tensor; save net.state_dict() alone")
    return found


def _of_torchvision(found: Mapping[str, torch.Tensor], file: Path) -> TrainedNet:
    """torchvision's AlexNet as preset torchvision. Its pixels are divided by a deviation per colour, ours by one for
    all: the ratios go into conv1, which is exact, since zeros beyond the edge stay zeros."""
    if strange := sorted(found.keys() ^ NAMES.keys()):
        what = "has" if strange[0] in found else "lacks"
        raise ValueError(f"{file}: {what} {strange[0]!r:.60}; torchvision's AlexNet has {min(NAMES)} ... {max(NAMES)}")
    tensors = {NAMES[name]: tensor.detach() for name, tensor in found.items()}
    common = sum(STD_RGB) / 3
    description = Description(
        _build("torchvision", tensors["conv1.bias"].numel(), tensors["fc8.bias"].numel(), 224), (),
        pixel_scale=1 / (255 * common),
    )  # fmt: skip
    mean_image = _uniform([255 * mean for mean in MEAN_RGB], STORED)
    ratios = torch.tensor([common / std for std in STD_RGB], dtype=torch.float64)
    trained = assemble(description, tensors, mean_image, str(file))
    _scale_colours(trained.net.state_dict()["conv1.weight"], ratios)
    return trained


def _write_torchvision(trained: TrainedNet, file: Path) -> list[str]:
    _only(trained, "torchvision")
    state = _state(trained)
    factors = torch.tensor([255 * trained.description.pixel_scale * std for std in STD_RGB], dtype=torch.float64)
    state["conv1.weight"] = state["conv1.weight"].clone()  # the net's own otherwise, where it is in this order already
    _scale_colours(state["conv1.weight"], factors)
    torch.save({theirs: state[ours] for theirs, ours in NAMES.items()}, file)
    remarks = _of_other_width(trained, "torchvision.models.alexnet")
    means = ", ".join(f"{mean / 255:.4g}" for mean in trained.mean_image.mean((0, 1), np.float64))
    remarks += [f"expects Resize({trained.image_size}), CenterCrop({trained.net.input_size}), ToTensor(), "
               f"Normalize([{means}], [{', '.join(map(str, STD_RGB))}]) of torchvision.transforms"]  # fmt: skip
    if not _is_uniform(trained.mean_image):
        remarks.append("has no mean image, only its mean of each colour is above: scores differ a little")
    if not np.allclose(trained.mean_image.mean((0, 1), np.float64) / 255, MEAN_RGB, atol=1e-4):
        remarks.append("is not of ImageNet's mean colour, with which this program would read it: keep a .safetensors")
    return remarks + _of_other_size(trained, STORED, preset_of("torchvision").input_size)


def _of_caffe(file: Path) -> TrainedNet:
    found = caffemodel.read(file)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in found.weights.items()}
    build = _build("caffe", tensors["conv1.bias"].numel(), tensors["fc8.bias"].numel(), found.input_size)
    stored = max(caffemodel.STORED, found.input_size)
    mean_image = _uniform(caffemodel.MEAN_BGR[::-1], stored)
    return assemble(Description(build | {"lrn": asdict(found.lrn)}, ()), tensors, mean_image, str(file))


def _write_caffe(trained: TrainedNet, file: Path) -> list[str]:
    """conv1 has no zeros beyond the edge, so that the scale of the pixels and a mean colour other than ImageNet's go
    into its weights and biases exactly."""
    _only(trained, "caffe")
    state = {name: tensor.numpy() for name, tensor in _state(trained).items()}
    weight = state["conv1.weight"].astype(np.float64) * trained.description.pixel_scale
    surplus = np.array(caffemodel.MEAN_BGR[::-1]) - trained.mean_image.mean((0, 1), np.float64)
    bias = state["conv1.bias"] + weight.sum((2, 3)) @ surplus
    folded = {"conv1.weight": weight.astype(np.float32), "conv1.bias": bias.astype(np.float32)}
    norm = next(module for module in trained.net.modules() if isinstance(module, LocalResponseNorm))
    lrn = LRN(k=norm.k, n=norm.n, alpha=norm.alpha, beta=norm.beta)
    caffemodel.write(file, state | folded, lrn, trained.net.input_size)
    values = ", ".join(map(str, caffemodel.MEAN_BGR))
    remarks = _of_other_width(trained, "BVLC AlexNet")
    remarks += [f"expects blue, green, red less {values}, from 0 to 255, {trained.net.input_size} pixels a side"]
    if not _is_uniform(trained.mean_image):
        remarks.append("has no mean image, its mean of each colour is subtracted instead: scores differ a little")
    return remarks + _of_other_size(trained, max(caffemodel.STORED, trained.net.input_size), trained.net.input_size)


def _of_other_size(trained: TrainedNet, stored: int, input_size: int) -> list[str]:
    """A remark where the file does not say what images the net was trained on: this program takes them for these."""
    if (trained.image_size, trained.net.input_size) == (stored, input_size):
        return []
    own = f"{trained.net.input_size} of {trained.image_size} pixels"
    return [f"was trained on {own}, and would be read here as {input_size} of {stored}: keep a .safetensors"]


def _build(preset: str, maps: int, num_classes: int, input_size: int) -> dict[str, object]:
    """Arguments of alexnet.build for a net whose conv1 has so many maps."""
    width = maps / preset_of(preset).convs[0].maps
    return {"preset": preset, "num_classes": num_classes, "input_size": input_size, "width": width, "dropout": 0.5,
            "lrn": None}  # fmt: skip


def _of_other_width(trained: TrainedNet, theirs: str) -> list[str]:
    width = trained.description.build.get("width", 1.0)
    return [] if width == 1 else [f"is {width:g} times as wide as {theirs}, which cannot load it as it is"]


def _only(trained: TrainedNet, preset: str) -> None:
    if trained.net.preset.name != preset:
        what = {"torchvision": "a state dict of torchvision", "caffe": "a caffemodel"}[preset]
        raise ValueError(f"the net is of preset {trained.net.preset.name}, and {what} is of preset {preset}; "
                         "choose safetensors or onnx")  # fmt: skip


@torch.no_grad()
def _scale_colours(weight_OIHW: torch.Tensor, factors: torch.Tensor) -> None:
    weight_OIHW.copy_(weight_OIHW.double() * factors[None, :, None, None])


def _uniform(rgb: Sequence[float], side: int) -> NDArray[np.float32]:
    return np.tile(np.array(rgb, np.float32), (side, side, 1))


def _is_uniform(mean_image: NDArray[np.float32]) -> bool:
    return bool(np.ptp(mean_image, axis=(0, 1)).max() < 1e-3)
