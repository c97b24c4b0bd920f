"""A preset as one single-device module: grouped convolutions are the columns.

N images, C maps, H rows, W columns of pixels. A column is an equal, consecutive part of every layer's maps or units, so
its weights are a slice of the canonical state dict.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import presets
from .dropout import BatchPosition, Dropout
from .linear import Linear
from .lrn import LocalResponseNorm
from .presets import LRN, Preset, preset_of
from .presets.description import AdaptivePool, Conv, FullyConnected, Gaussian, Pool
from .winograd import WinogradConv2d

INITS = ("paper", "he")
PRESETS = tuple(presets.PRESETS)


def build(
    preset: str = "paper",
    num_classes: int = 1000,
    *,
    input_size: int | None = None,
    width: float = 1.0,
    lrn: LRN | None = None,
    dropout: float = 0.5,
    init: str = "paper",
    seed: int = 0,
) -> "AlexNet":
    """Build a net by the name of its preset, initialised from `seed` alone, in channels_last memory.

    width scales the number of maps and units of every layer; input_size is the side of the square input in pixels;
    where it or the constants of LRN are not given, they are the preset's own.
    init "paper" is the preset's own; of the paper's net N(0, 0.01) with biases of 1 in conv2, conv4, conv5, fc6 and fc7
    (paper, 5); "he" scales each layer's deviation to sqrt(2 / fan_in) with biases of 0 and expects pixels scaled to a
    deviation of about 1: for small data, on which the paper's initialisation stays on the plateau of guessing.

    Raises ValueError for an unknown preset or init, for LRN in a net without, and for sizes that leave a layer empty.
    """
    net = AlexNet(preset_of(preset), num_classes, input_size=input_size, width=width, lrn=lrn, dropout=dropout)
    net.initialize(init, seed)
    return net.to(memory_format=torch.channels_last)


class AlexNet(nn.Module):
    """The net that a preset describes (alexnet/presets/). Layers with weights have the names that they have there."""

    def __init__(
        self,
        preset: Preset,
        num_classes: int,
        *,
        input_size: int | None = None,
        width: float = 1.0,
        lrn: LRN | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes = {num_classes}: a classifier needs at least 2")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}: must be at least 0 and below 1; the paper has 0.5")
        if lrn is not None and not preset.has_lrn:
            raise ValueError(f"lrn: preset {preset.name} has no LRN; leave it out")
        self.preset, self.num_classes = preset, num_classes
        self.input_size = preset.input_size if input_size is None else input_size
        self.num_features = preset.features(self.input_size, width)
        maps = 3
        for conv in preset.convs:
            self.add_module(conv.name, _convolution(conv, maps, preset.scaled(conv.maps, width), preset.columns))
            maps = preset.scaled(conv.maps, width)
        units = self.num_features
        for layer in preset.fully_connected:
            outputs = num_classes if layer.units is None else preset.scaled(layer.units, width)
            self.add_module(layer.name, Linear(units, outputs))
            units = outputs
        # what forward runs, in order: names of modules, or "relu" (of plain text, since tracers cannot read a preset)
        self._features = self._add_steps(lrn or preset.lrn)
        self._second = self._features.index(preset.convs[1].name)
        self._classifier = self._add_classifier(dropout)

    def _add_steps(self, lrn: LRN | None) -> list[str]:
        """Make the modules that follow the convolutions; equal ones are one module. Returns the convolutional part."""
        names: list[str] = []
        pools: dict[Pool | AdaptivePool, str] = {}
        for conv in self.preset.convs:
            names.append(conv.name)
            for step in conv.then:
                if step == "relu":
                    names.append("relu")
                elif step == "lrn":
                    after_relu = names[-1] == "relu"  # then both in one pass over memory
                    names[len(names) - after_relu :] = ["relu_norm" if after_relu else "norm"]
                    if names[-1] not in self._modules:
                        assert lrn is not None
                        self.add_module(names[-1], _norm(lrn, self.preset, after_relu))
                else:
                    if step not in pools:
                        kind = _pool_name(step)
                        pools[step] = kind if kind not in self._modules else f"{kind}_{conv.name}"
                        self.add_module(pools[step], _pooling(step))
                    names.append(pools[step])
        return names

    def _add_classifier(self, dropout: float) -> list[str]:
        """Make the dropouts. Returns the fully connected part."""
        names: list[str] = []
        for layer in self.preset.fully_connected:
            steps = [layer.name, *([layer.activation] if layer.activation else [])]
            if layer.dropout is not None:
                position = self.preset.position(layer)
                self.add_module(f"dropout{position}", Dropout(dropout, position))
                steps.insert(0 if layer.dropout == "of input" else len(steps), f"dropout{position}")
            names += steps
        return names

    def forward(self, x_NCHW: Tensor, where: BatchPosition | None = None) -> Tensor:
        """Class scores before the softmax, (N, num_classes), of images (N, 3, input_size, input_size).

        `where` identifies the images, for dropout (alexnet/dropout.py).
        """
        return self.classify(self.features(x_NCHW), where)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """The output of the convolutional layers, flattened: (N, num_features), of the paper's net 256 * 6 * 6."""
        if x_NCHW.shape[1:] != (3, self.input_size, self.input_size):
            raise ValueError(
                f"images of shape {tuple(x_NCHW.shape)}: the net was built for (N, 3, {self.input_size}, "
                f"{self.input_size})"
            )
        return self.upper(self.lower(x_NCHW))

    def lower(self, x_NCHW: Tensor) -> Tensor:
        """What comes before the second convolution. Images may be of any size, and need not be square."""
        return self._run(self._features[: self._second], x_NCHW)

    def upper(self, maps: Tensor) -> Tensor:
        """The features of what `lower` returns."""
        return self.after_second(self.second(maps))

    @property
    def second(self) -> nn.Conv2d:
        """The second convolution, which reads what `lower` returns."""
        found = getattr(self, self._features[self._second])
        assert isinstance(found, nn.Conv2d)
        return found

    def after_second(self, maps: Tensor) -> Tensor:
        """The features of what the second convolution returns."""
        return self._run(self._features[self._second + 1 :], maps).flatten(1)

    def _run(self, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            x = F.relu(x, inplace=True) if name == "relu" else getattr(self, name)(x)
        return x

    def classify(self, x: Tensor, where: BatchPosition | None = None) -> Tensor:
        """Class scores (N, num_classes) of features."""
        for name in self._classifier:
            if name == "relu":
                x = F.relu(x, inplace=True)
            else:
                layer = getattr(self, name)
                x = layer(x, where) if isinstance(layer, Dropout) else layer(x)
        return x

    def dropout_of(self, layer: FullyConnected) -> Dropout:
        """The dropout of a layer's input or output."""
        found = getattr(self, f"dropout{self.preset.position(layer)}")
        assert isinstance(found, Dropout)
        return found

    @torch.no_grad()
    def initialize(self, init: str, seed: int) -> None:
        """Draw all weights from `seed`, layer by layer in order; see `build` for the kinds."""
        if init not in INITS:
            raise ValueError(f"init = {init!r}: unknown; choose one of {', '.join(INITS)}")
        generator = torch.Generator().manual_seed(seed)
        for described in self.preset.layers:
            layer = getattr(self, described.name)
            fan_in = layer.weight[0].numel()
            own = described.init if init == "paper" else Gaussian(math.sqrt(2 / fan_in))
            if isinstance(own, Gaussian):
                layer.weight.normal_(0, own.std, generator=generator)
                layer.bias.fill_(own.bias)
            else:
                bound = 1 / math.sqrt(fan_in)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


class BlockedConv2d(nn.Conv2d):
    """A convolution with a large stride and few maps, computed with stride 1 over blocks of pixels.

    Each stride x stride block of pixels becomes one position with stride * stride * C maps, and the kernel likewise
    (zeros make it a whole number of blocks): the same sums, in a shape that convolution libraries are fast at.

    ceil: zeros on the right and bottom complete the last window: 224 pixels are read as 227, whose 55 windows fit.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int, padding: int = 0, ceil: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.edge, self.ceil = padding, ceil

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, maps, rows, columns): 1 + (H + 2 * padding - kernel) / stride rows, rounded as asked."""
        stride, kernel, maps_in = self.stride[0], self.kernel_size[0], self.in_channels
        if self.edge:
            x_NCHW = F.pad(x_NCHW, (self.edge,) * 4)
        rounded = math.ceil if self.ceil else math.floor
        blocks = math.ceil(kernel / stride)  # a kernel's side in blocks
        rows, columns = (rounded((size - kernel) / stride) + blocks for size in x_NCHW.shape[2:])  # the image's
        x = _blocks(x_NCHW, stride, rows, columns)
        weight = F.pad(self.weight, (0, blocks * stride - kernel) * 2)
        weight = weight.reshape(self.out_channels, maps_in, blocks, stride, blocks, stride)
        weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(self.out_channels, -1, blocks, blocks)
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), self.bias)


def _blocks(x_NCHW: Tensor, stride: int, rows: int, columns: int) -> Tensor:
    """(N, C, H, W), zeros beyond its edge, to (N, stride * stride * C, rows, columns) in channels_last memory."""
    num_images, maps, height, width = x_NCHW.shape
    high, wide = math.ceil(height / stride), math.ceil(width / stride)
    if (high * stride, wide * stride) != (height, width):
        x_NCHW = F.pad(x_NCHW, (0, wide * stride - width, 0, high * stride - height))
    x = x_NCHW.permute(0, 2, 3, 1).reshape(num_images, high, stride, wide, stride, maps)
    x = x.permute(0, 1, 3, 2, 4, 5)[:, :rows, :columns]  # N, row of blocks, block, row in block, column in block, map
    if high < rows or wide < columns:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, max(0, columns - wide), 0, max(0, rows - high)))
    return x.reshape(num_images, rows, columns, stride * stride * maps).permute(0, 3, 1, 2)


def num_parameters(net: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in net.parameters())


def _convolution(conv: Conv, maps_in: int, maps: int, columns: int) -> nn.Conv2d:
    if conv.stride > 1 and conv.reads == "all columns":
        return BlockedConv2d(maps_in, maps, conv.kernel, stride=conv.stride, padding=conv.padding, ceil=conv.ceil)
    assert not conv.ceil, f"{conv.name}: windows beyond the edge are those of strides over all maps only"
    groups = columns if conv.reads == "own column" else 1
    if (conv.kernel, conv.stride, conv.padding) == (3, 1, 1):
        return WinogradConv2d(maps_in, maps, groups)
    return nn.Conv2d(maps_in, maps, conv.kernel, stride=conv.stride, padding=conv.padding, groups=groups)


def _norm(lrn: LRN, preset: Preset, relu: bool) -> LocalResponseNorm:
    columns = preset.columns if preset.lrn_reads == "own column" else 1
    return LocalResponseNorm(k=lrn.k, n=lrn.n, alpha=lrn.alpha, beta=lrn.beta, columns=columns, relu=relu)


def _pooling(pool: Pool | AdaptivePool) -> nn.Module:
    if isinstance(pool, AdaptivePool):
        return nn.AdaptiveAvgPool2d(pool.size)
    kind = nn.MaxPool2d if pool.kind == "max" else nn.AvgPool2d
    return kind(pool.size, stride=pool.stride, padding=pool.padding, ceil_mode=pool.ceil)


def _pool_name(pool: Pool | AdaptivePool) -> str:
    if isinstance(pool, AdaptivePool):
        return "adaptive_pool"
    return "pool" if pool.kind == "max" else "average_pool"
