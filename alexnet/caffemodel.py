"""Weights as Caffe stores them: a NetParameter of Protocol Buffers (BVLC/caffe, src/caffe/proto/caffe.proto).

Layers are of version 1 (field `layers`, until 2014) or 2 (`layer`); a blob has its shape, or num, channels, height and
width, and floats or doubles. conv1 reads blue, green, red, where ours reads red, green, blue. fc6 reads maps, rows,
columns, as ours does.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import protobuf
from .presets import LRN, PRESETS, Preset
from .protobuf import Damaged

PRESET = PRESETS["caffe"]
MEAN_BGR = (104.00699, 116.66877, 122.67892)  # of ImageNet, which goes with BVLC's weights
STORED = 256  # side of the images that they were cut from
MAX_BYTES = 2**31 - 1  # of a message
MAX_LAYERS = 1000  # BVLC AlexNet has 24
MAX_AXES = 32  # of a blob, as in Caffe

NET_INPUT, NET_INPUT_DIM, NET_LAYERS_V1, NET_INPUT_SHAPE, NET_LAYER = 3, 4, 2, 8, 100
BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE = 5, 7, 8
LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_REGION, LRN_K = 1, 2, 3, 4, 5
OLD_TYPES = {15: "LRN", 17: "Pooling"}  # of version 1, as far as needed


@dataclass(frozen=True)
class _Fields:
    """The numbers of a layer's fields in one version."""

    name: int
    type: int
    bottom: int
    top: int
    blobs: int
    lrn: int


V1 = _Fields(name=4, type=5, bottom=2, top=3, blobs=6, lrn=18)
V2 = _Fields(name=1, type=2, bottom=3, top=4, blobs=7, lrn=118)


@dataclass
class _Layer:
    name: str = ""
    type: str = ""
    blobs: list[NDArray[np.float32]] = field(default_factory=list)
    lrn: memoryview | None = None


@dataclass(frozen=True)
class CaffeNet:
    """What a file holds, in our order of colours."""

    weights: Mapping[str, NDArray[np.float32]]  # by canonical name; without axes of 1 in front
    lrn: LRN
    input_size: int


def read(file: Path) -> CaffeNet:
    """The weights of BVLC AlexNet. Raises ValueError of one line."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise Damaged(f"{size} bytes, and a message has at most {MAX_BYTES}")
        layers, input_size = _net(memoryview(file.read_bytes()))
    except Damaged as error:
        raise ValueError(f"{file}: is no whole caffemodel ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    if not layers:
        raise ValueError(f"{file}: is no caffemodel: it has no layers")
    known = [layer.name for layer in PRESET.layers]
    weights: dict[str, NDArray[np.float32]] = {}
    for layer in layers:
        if not layer.blobs:
            continue
        if layer.name not in known:
            raise ValueError(f"{file}: has weights of layer {layer.name!r:.40}; BVLC AlexNet has {', '.join(known)}")
        if len(layer.blobs) != 2 or f"{layer.name}.weight" in weights:
            raise ValueError(f"{file}: {layer.name} has not one weight and one bias")
        weights |= zip((f"{layer.name}.weight", f"{layer.name}.bias"), layer.blobs, strict=True)
    if missing := [name for name in known if f"{name}.weight" not in weights]:
        raise ValueError(f"{file}: has no weights of layer {missing[0]}; BVLC AlexNet has {', '.join(known)}")
    _check_order(layers, file)
    if weights["conv1.weight"].ndim != 4:
        raise ValueError(f"{file}: conv1.weight is {weights['conv1.weight'].shape}; it has 4 axes")
    weights["conv1.weight"] = np.ascontiguousarray(weights["conv1.weight"][:, ::-1])
    return CaffeNet(weights, _lrn(layers, file), input_size or PRESET.input_size)


def _net(message: memoryview) -> tuple[list[_Layer], int | None]:
    """The layers in order, and the side of the input where it is told."""
    layers: list[_Layer] = []
    dims: list[int] = []
    for number, wire, value, data in protobuf.fields(message):
        if number == NET_LAYER and wire == protobuf.BYTES:
            layers.append(_layer(data, V2))
        elif number == NET_LAYERS_V1 and wire == protobuf.BYTES:
            layers.append(_layer(data, V1))
        elif number == NET_INPUT_DIM:
            dims += _numbers(wire, value, data)
        elif number == NET_INPUT_SHAPE and wire == protobuf.BYTES:
            dims += _shape(data)
        if len(layers) > MAX_LAYERS:
            raise Damaged(f"more than {MAX_LAYERS} layers")
        if len(dims) > MAX_AXES:
            raise Damaged(f"an input of more than {MAX_AXES} axes")
    square = len(dims) == 4 and dims[1] == 3 and dims[2] == dims[3] and dims[2] <= 4096
    return layers, dims[2] if square else None


def _layer(message: memoryview, version: _Fields) -> _Layer:
    layer = _Layer()
    for number, wire, value, data in protobuf.fields(message):
        if number == version.name and wire == protobuf.BYTES:
            layer.name = bytes(data).decode("utf-8", "replace")
        elif number == version.type:
            is_text = wire == protobuf.BYTES
            layer.type = bytes(data).decode("utf-8", "replace") if is_text else OLD_TYPES.get(value, "")
        elif number == version.blobs and wire == protobuf.BYTES:
            layer.blobs.append(_blob(data))
        elif number == version.lrn and wire == protobuf.BYTES:
            layer.lrn = data
    return layer


def _blob(message: memoryview) -> NDArray[np.float32]:
    """An array without axes of 1 in front, in float32."""
    old = [1, 1, 1, 1]
    shape: list[int] | None = None
    floats, doubles = bytearray(), bytearray()
    for number, wire, value, data in protobuf.fields(message):
        if number == BLOB_DATA and wire in (protobuf.BYTES, protobuf.FIXED32):  # packed or one by one
            floats += data
        elif number == BLOB_DOUBLE and wire in (protobuf.BYTES, protobuf.FIXED64):
            doubles += data
        elif number == BLOB_SHAPE and wire == protobuf.BYTES:
            shape = _shape(data)
        elif 1 <= number <= 4 and wire == protobuf.VARINT:
            old[number - 1] = value
    if len(floats) % 4 or len(doubles) % 8 or bool(floats) == bool(doubles):
        raise Damaged(f"a blob of {len(floats)} bytes of floats and {len(doubles)} of doubles")
    values = np.frombuffer(floats, "<f4") if floats else np.frombuffer(doubles, "<f8")
    axes = old if shape is None else shape
    while len(axes) > 1 and axes[0] == 1:
        axes = axes[1:]
    count = 1
    for axis in axes:
        count *= axis
    if count != values.size:
        raise Damaged(f"a blob of {values.size} numbers that claims to be {' x '.join(map(str, axes))}"[:200])
    return values.astype(np.float32, copy=False).reshape(axes)


def _shape(message: memoryview) -> list[int]:
    axes: list[int] = []
    for number, wire, value, data in protobuf.fields(message):
        if number == 1:
            axes += _numbers(wire, value, data)
        if len(axes) > MAX_AXES:
            raise Damaged(f"a blob of more than {MAX_AXES} axes")
    return axes


def _numbers(wire: int, value: int, data: memoryview) -> Iterable[int]:
    """Of a repeated field, packed or one by one."""
    if len(data) > 10 * MAX_AXES:
        raise Damaged(f"more than {MAX_AXES} axes")
    return protobuf.varints(data) if wire == protobuf.BYTES else [value]


def _check_order(layers: list[_Layer], file: Path) -> None:
    """CaffeNet has the same shapes, and pooling before LRN: its weights would give wrong scores without a word."""
    kinds = [layer.type for layer in layers if layer.type in ("LRN", "Pooling")]
    if "LRN" in kinds and kinds[0] == "Pooling":
        raise ValueError(f"{file}: pools before LRN, as CaffeNet does; only BVLC AlexNet, with LRN first, can be read")


def _lrn(layers: list[_Layer], file: Path) -> LRN:
    """The constants, of which all LRN layers must have the same; the preset's where the file has none."""
    assert PRESET.lrn is not None
    found = {_constants(layer.lrn, file) for layer in layers if layer.type == "LRN" and layer.lrn is not None}
    if len(found) > 1:
        raise ValueError(f"{file}: its LRN layers have different constants, which preset caffe cannot have")
    return found.pop() if found else PRESET.lrn


def _constants(message: memoryview, file: Path) -> LRN:
    n, floats = 5, {LRN_ALPHA: 1.0, LRN_BETA: 0.75, LRN_K: 1.0}
    for number, wire, value, data in protobuf.fields(message):
        if number == LRN_SIZE and wire == protobuf.VARINT:
            n = value
        elif number == LRN_REGION and value:
            raise ValueError(f"{file}: its LRN is within maps, that of AlexNet is over adjacent maps")
        elif number in floats and wire == protobuf.FIXED32:
            floats[number] = float(str(np.frombuffer(data, "<f4")[0]))  # 1e-4 as it was written
    if not 0 < n < 1000:
        raise ValueError(f"{file}: its LRN is over {n} maps")
    return LRN(k=floats[LRN_K], n=n, alpha=floats[LRN_ALPHA] / n, beta=floats[LRN_BETA])


def write(file: Path, weights: Mapping[str, NDArray[np.float32]], lrn: LRN, input_size: int) -> None:
    """A file of version 2, for a net with conv1 of red, green, blue."""
    with file.open("wb") as out:
        out.write(protobuf.field(1, b"AlexNet") + protobuf.field(NET_INPUT, b"data"))
        out.write(b"".join(protobuf.field(NET_INPUT_DIM, size) for size in (1, 3, input_size, input_size)))
        bottom = "data"
        for name, kind in _in_order(PRESET):
            top = bottom if kind == "ReLU" else name
            parts = [protobuf.field(V2.name, name.encode()), protobuf.field(V2.type, kind.encode()),
                     protobuf.field(V2.bottom, bottom.encode()), protobuf.field(V2.top, top.encode())]  # fmt: skip
            if kind == "LRN":
                parts.append(protobuf.field(V2.lrn, _lrn_message(lrn)))
            if kind in ("Convolution", "InnerProduct"):
                weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
                parts += (_blob_field(weight[:, ::-1] if name == PRESET.convs[0].name else weight), _blob_field(bias))
            out.write(protobuf.field(NET_LAYER, parts))
            bottom = top


def _in_order(preset: Preset) -> list[tuple[str, str]]:
    """Names and types of the layers, by Caffe's customs."""
    found: list[tuple[str, str]] = []
    for position, conv in enumerate(preset.convs, 1):
        found.append((conv.name, "Convolution"))
        for step in conv.then:
            kind = {"relu": "ReLU", "lrn": "LRN"}.get(str(step), "Pooling")
            found.append(({"ReLU": "relu", "LRN": "norm", "Pooling": "pool"}[kind] + str(position), kind))
    for position, layer in enumerate(preset.fully_connected, 1 + len(preset.convs)):
        found.append((layer.name, "InnerProduct"))
        if layer.activation:
            found.append((f"relu{position}", "ReLU"))
    return found


def _lrn_message(lrn: LRN) -> list[bytes]:
    floats = ((LRN_ALPHA, lrn.alpha * lrn.n), (LRN_BETA, lrn.beta), (LRN_K, lrn.k))
    return [protobuf.field(LRN_SIZE, lrn.n), *(protobuf.fixed32(at, struct.pack("<f", value)) for at, value in floats)]


def _blob_field(array: NDArray[np.float32]) -> bytes:
    shape = protobuf.field(1, [protobuf.varint(axis) for axis in array.shape])
    data = protobuf.field(BLOB_DATA, array.astype("<f4").tobytes())
    return protobuf.field(V2.blobs, [protobuf.field(BLOB_SHAPE, shape), data])
