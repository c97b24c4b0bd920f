"""What a net costs before it is built: parameters, arithmetic, memory, and what its workers exchange."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .net import AlexNet, num_parameters
from .partition import Layout, Partition
from .presets import preset_of

LABEL_BYTES = 16  # of an image: its label and how it was cut
POOLS = nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d


@dataclass(frozen=True)
class Cost:
    """Of one training step on one worker, in float32; of a part of the batch where it is computed in parts."""

    num_parameters: int  # of the whole net
    training_flops: float  # per image, forward and backward, over all workers; a multiply-add counts as two
    part_parameters: int  # that this worker holds
    memory_bytes: float  # weights, gradients, velocities, an average and the activations kept for the backward pass


@dataclass(frozen=True)
class Exchange:
    """Bytes that one worker sends in a training step, for one reason."""

    name: str
    forward_bytes: float
    backward_bytes: float
    overlaps: bool = False  # with arithmetic, so that only part of it is waited for
    layer: str | None = None  # before whose arithmetic it is made forward, and after it backward; of fc8's scores after

    @property
    def size_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes


@dataclass(frozen=True)
class LayerCost:
    """Of one layer of the whole net."""

    name: str
    kind: str  # conv, fc, pool
    parameters: int
    outputs: int  # numbers per image, before pooling
    kept: int  # numbers per image that the backward pass needs
    inputs: int  # numbers per image
    multiply_adds: int  # per image


@lru_cache(maxsize=64)
def _shapes(preset: str, num_classes: int, input_size: int, width: float) -> AlexNet:
    """A net on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AlexNet(preset_of(preset), num_classes, input_size=input_size, width=width)


@lru_cache(maxsize=64)
def layers_of(preset: str, num_classes: int, input_size: int, width: float) -> tuple[LayerCost, ...]:
    """The layers in order, with their sizes for one image."""
    net = _shapes(preset, num_classes, input_size, width)
    with torch.device("meta"):
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | POOLS):
                layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output)))
        net(torch.empty(1, 3, input_size, input_size))
    names = {layer: name for name, layer in net.named_children()}
    found: list[LayerCost] = []
    for layer, x, output in seen:
        out = output.numel()
        if isinstance(layer, nn.Conv2d):
            # the output is kept by ReLU or LRN; what LRN makes of it is as large, and kept by the pooling
            adds = out * layer.weight[0].numel()
            found.append(LayerCost(names[layer], "conv", num_parameters(layer), out, 2 * out, x.numel(), adds))
        elif isinstance(layer, nn.Linear):
            adds = layer.weight.numel()
            found.append(LayerCost(names[layer], "fc", num_parameters(layer), out, out, x.numel(), adds))
        else:
            found.append(LayerCost(names[layer], "pool", 0, out, out, x.numel(), 0))
    return tuple(found)


def estimate(
    *,
    num_classes: int,
    input_size: int,
    width: float,
    global_batch_size: int,
    preset: str = "paper",
    layout: Layout | None = None,
    averaged: bool = False,
) -> Cost:
    """Of a net under a layout; on a single worker if none is given. averaged: an average of the weights is kept.

    Raises ValueError where the net cannot be split.
    """
    layout = layout or Layout("single", 1)
    partition = Partition(preset_of(preset), layout)
    partition.check(_shapes(preset, num_classes, input_size, width))
    layers = layers_of(preset, num_classes, input_size, width)
    own_images, group_images = global_batch_size / layout.workers, global_batch_size / layout.replicas
    part, numbers = _part_parameters(layers, partition), 0.0
    gathered = {partition.gathers_rows, *partition.gathers_maps}
    for layer in layers:
        is_cut = layer.name in partition.sharded or (layer.kind == "pool" and layout.kind == "columns")
        share = 1 / layout.group_size if is_cut else 1.0
        images = own_images if layout.kind == "hybrid" and layer.kind != "fc" else group_images
        numbers += images * layer.kept * share
        if layer.name in gathered:
            numbers += images * layer.inputs
    images = own_images if layout.kind == "hybrid" else group_images
    numbers += images * 3 * input_size**2
    total = sum(layer.parameters for layer in layers)
    flops = 3 * 2 * sum(layer.multiply_adds for layer in layers)
    return Cost(total, flops, part, 4.0 * ((4 if averaged else 3) * part + numbers))


def communication(
    layout: Layout,
    *,
    num_classes: int,
    input_size: int,
    width: float,
    global_batch_size: int,
    preset: str = "paper",
    bytes_per_activation: int = 4,
    bytes_per_gradient: int = 4,
) -> list[Exchange]:
    """What one worker sends in a training step, by exchange; all workers of a layout send the same.

    Collectives run in rings: to gather (P - 1) times the own part, to sum over P workers 2 (P - 1) / P of
    the whole. bytes_per_activation: 4 in float32, 2 in bfloat16; bytes_per_gradient: of gradients and scores, which are
    summed in float32 even then; images travel as bytes.
    """
    partition = Partition(preset_of(preset), layout)
    layers = {layer.name: layer for layer in layers_of(preset, num_classes, input_size, width)}
    workers, size = layout.workers, layout.group_size
    own_images, group_images = global_batch_size / workers, global_batch_size / layout.replicas
    found = []
    if layout.kind == "columns":
        image_bytes = own_images * (size - 1) * (3 * input_size**2 + LABEL_BYTES)
        found.append(Exchange("images", image_bytes, 0, layer=next(iter(layers))))
    gathered = [(name, own_images) for name in [partition.gathers_rows] if name]
    gathered += [(name, group_images / size) for name in partition.gathers_maps]
    for name, images in gathered:
        sent = images * (size - 1) * layers[name].inputs * bytes_per_activation
        found.append(Exchange(f"input of {name}", sent, sent, layer=name))
    if size > 1:
        scores = _ring(size) * group_images * num_classes * bytes_per_gradient
        head = partition.preset.head.name
        found.append(Exchange(f"scores of {head}", scores, 0, layer=head))
    if layout.kind == "hybrid":
        summed, among = sum(layer.parameters for layer in layers.values() if layer.kind == "conv"), workers
    else:
        summed, among = _part_parameters(tuple(layers.values()), partition), layout.replicas
    if among > 1:
        found.append(Exchange("gradients", 0, _ring(among) * summed * bytes_per_gradient, overlaps=True))
    return found


def _part_parameters(layers: tuple[LayerCost, ...], partition: Partition) -> int:
    """Parameters of one worker's part; the last layer's biases are on every worker, whole."""
    total = 0
    for layer in layers:
        whole = layer.outputs if layer.name == partition.preset.head.name else 0
        parts = partition.layout.group_size if layer.name in partition.sharded else 1
        total += (layer.parameters - whole) // parts + whole
    return total


def _ring(workers: int) -> float:
    """What a worker sends in an all-reduce, as a fraction of the tensor's size."""
    return 2 * (workers - 1) / workers
