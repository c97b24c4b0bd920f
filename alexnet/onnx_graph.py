"""A trained net as an ONNX graph, the mean image inside: pixels as they are in, scores or probabilities out.

Input `images`: float32 (N, 3, S, S), red, green and blue from 0 to 255, any N. Output `scores` or `probabilities`:
(N, K). Written with the package onnx alone, an operator for each layer, so that what runs it sees LRN as LRN.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import augment
from .lrn import LocalResponseNorm
from .net import AlexNet
from .presets.description import AdaptivePool, Conv, Pool

if TYPE_CHECKING:
    from .trained import TrainedNet

OPSET, IR_VERSION = 17, 8  # of 2022
TOLERANCE = 1e-4  # of a score, or of the largest score if that is above 1
INPUT = "images"


class Differs(RuntimeError):
    """onnxruntime does not give the net's own scores; the text is one line."""


class _Graph:
    """Nodes in order, each reading the one before."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._node, self._array = helper.make_node, numpy_helper.from_array
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.last = INPUT

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.constants.append(self._array(np.ascontiguousarray(array), name))
        return name

    def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> None:
        """A node that reads the last one's output, and these."""
        self.nodes.append(self._node(operator, [self.last, *inputs], [name], name=name, **attributes))
        self.last = name

    def add_many(self, operator: str, names: list[str], inputs: list[str], **attributes: Any) -> None:
        self.nodes.append(self._node(operator, inputs, names, name=names[0], **attributes))
        self.last = names[0]


def write(trained: "TrainedNet", file: Path, *, softmax: bool) -> list[str]:
    """Write the graph and compare it with the net in onnxruntime, where that is installed; returns remarks in lines.

    Raises ValueError of one line without the package onnx, Differs, OSError.
    """
    try:
        import onnx
    except ImportError:
        raise ValueError("onnx: the package is not installed; pip install 'alexnet-orchestrator[onnx]'") from None
    model = _model(trained, softmax)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())
    side = trained.net.input_size
    remarks = [f"expects {INPUT}: float32 (N, 3, {side}, {side}), RGB from 0 to 255, of {trained.image_size}-pixel "
               "images the centre; it subtracts the mean image itself"]  # fmt: skip
    difference = compare(file, trained, softmax=softmax)
    if difference is None:
        return [*remarks, "was not compared with the net: onnxruntime is not installed"]
    if not difference <= TOLERANCE:
        raise Differs(f"onnxruntime's answers differ from the net's by {difference:.1e}, more than {TOLERANCE:.0e}")
    what = "probabilities" if softmax else "scores"
    return [*remarks, f"gives the net's {what} in onnxruntime: those of 4 images differ by at most {difference:.1e}"]


def compare(file: Path, trained: "TrainedNet", *, softmax: bool) -> float | None:
    """The largest difference between onnxruntime's answers and the net's, for batches of 1 and 3 random images, as a
    part of the largest answer if that is above 1; None without onnxruntime."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it keeps an id of this device in the home directory
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    random, stored, crop = np.random.default_rng(0), trained.image_size, trained.net.input_size
    first, largest = (stored - crop) // 2, 0.0
    for number in (1, 3):
        pixels = random.integers(0, 256, (number, stored, stored, 3), np.uint8)
        ours = trained.scores(pixels, augment.center(number, margin=stored - crop)).float()
        expected = (torch.softmax(ours, 1) if softmax else ours).cpu().numpy()
        cut = pixels[:, first : first + crop, first : first + crop].transpose(0, 3, 1, 2).astype(np.float32)
        [found] = session.run(None, {INPUT: cut})
        difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        largest = difference if not difference <= largest else largest  # also if it is no number
    return largest


def _model(trained: "TrainedNet", softmax: bool) -> Any:
    from onnx import TensorProto, helper

    net, graph = trained.net, _Graph()
    side = net.input_size
    first = (trained.image_size - side) // 2
    mean = trained.mean_image[first : first + side, first : first + side].transpose(2, 0, 1)[None]
    graph.add("Sub", "difference", graph.constant("mean_image", mean))
    scale = graph.constant("pixel_scale", np.array(trained.description.pixel_scale, np.float32))
    graph.add("Mul", "pixels", scale)
    for conv in net.preset.convs:
        side = _add_convolution(graph, net, conv, side)
    graph.add("Flatten", "features", axis=1)
    for layer in net.preset.fully_connected:
        graph.add("Gemm", layer.name, *_weights(graph, net, layer.name), transB=1)
        if layer.activation:
            graph.add("Relu", f"{layer.name}_relu")
    output = "probabilities" if softmax else "scores"
    graph.add("Softmax" if softmax else "Identity", output, **({"axis": 1} if softmax else {}))
    shape = [("N", 3, net.input_size, net.input_size), ("N", net.num_classes)]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, "AlexNet",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape[0])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape[1])],
            graph.constants, doc_string=net.preset.title,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="alexnet-orchestrator",
    )  # fmt: skip
    helper.set_model_props(model, {
        "input": f"RGB from 0 to 255, shorter side resized to {trained.image_size} pixels, the centre "
                 f"{net.input_size} x {net.input_size}",
        "classes": json.dumps(trained.classes), "description": trained.description.to_json(),
    })  # fmt: skip
    return model


def _weights(graph: _Graph, net: AlexNet, layer: str) -> list[str]:
    state = net.state_dict()
    names = (f"{layer}.weight", f"{layer}.bias")
    return [graph.constant(name, state[name].detach().cpu().float().numpy()) for name in names]


def _add_convolution(graph: _Graph, net: AlexNet, conv: Conv, side: int) -> int:
    """A convolution and what follows it; returns the side of its maps."""
    groups = net.preset.columns if conv.reads == "own column" else 1
    pads = _pads(side, conv.side(side), conv.kernel, conv.stride, conv.padding)
    graph.add("Conv", conv.name, *_weights(graph, net, conv.name), group=groups, strides=[conv.stride] * 2,
              kernel_shape=[conv.kernel] * 2, pads=pads)  # fmt: skip
    side = conv.side(side)
    for position, step in enumerate(conv.then):
        name = f"{conv.name}_{step if isinstance(step, str) else 'pool'}{position}"
        if step == "relu":
            graph.add("Relu", name)
        elif step == "lrn":
            _add_lrn(graph, net, name)
        elif isinstance(step, Pool):
            assert step.kind == "max" or not step.padding, "averages would count the padding"
            graph.add("MaxPool" if step.kind == "max" else "AveragePool", name, kernel_shape=[step.size] * 2,
                      strides=[step.stride] * 2,
                      pads=_pads(side, step.side(side), step.size, step.stride, step.padding))  # fmt: skip
            side = step.side(side)
        else:
            assert isinstance(step, AdaptivePool)
            _add_averages(graph, name, side, step.size)
            side = step.size
    return side


def _pads(side: int, windows: int, size: int, stride: int, padding: int) -> list[int]:
    """Top, left, bottom and right, so that exactly so many windows fit; those over the edge are completed."""
    end = max(padding, (windows - 1) * stride + size - side - padding)
    return [padding, padding, end, end]


def _add_lrn(graph: _Graph, net: AlexNet, name: str) -> None:
    """LRN of the maps of each column. ONNX divides alpha by the size."""
    norm = next(module for module in net.modules() if isinstance(module, LocalResponseNorm))
    constants = {"size": norm.n, "alpha": norm.alpha * norm.n, "beta": norm.beta, "bias": norm.k}
    if norm.columns == 1:
        graph.add("LRN", name, **constants)
        return
    columns = [f"{name}_column{column}" for column in range(norm.columns)]
    graph.add_many("Split", columns, [graph.last], axis=1)
    normed = [f"{column}_norm" for column in columns]
    for column, result in zip(columns, normed, strict=True):
        graph.add_many("LRN", [result], [column], **constants)
    graph.add_many("Concat", [name], normed, axis=1)


def _add_averages(graph: _Graph, name: str, side: int, size: int) -> None:
    """Averages over size x size windows, the i-th from floor(i * side / size) to ceil((i + 1) * side / size), as a
    product with matrices; nothing where the maps have this size already."""
    if side == size:
        return
    average = np.zeros((size, side), np.float32)
    for row in range(size):
        start, end = row * side // size, -(-(row + 1) * side // size)
        average[row, start:end] = 1 / (end - start)
    graph.add("MatMul", f"{name}_columns", graph.constant(f"{name}_right", average.T))
    left = graph.constant(f"{name}_left", average)
    graph.add_many("MatMul", [name], [left, graph.last])
