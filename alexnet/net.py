"""The two-column net of 2012 as one single-device module: grouped convolutions are the columns.

N images, C maps, H rows, W columns of pixels. Column 0 is the first half of every layer's maps or units, so a
column's weights are a slice of the canonical state dict.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dropout import BatchPosition, Dropout
from .lrn import LocalResponseNorm

INITS = ("paper", "he")
PRESETS = ("paper",)


@dataclass(frozen=True)
class LRN:
    """The constants of local response normalisation; alpha multiplies the plain sum (paper, 3.3)."""

    k: float = 2.0
    n: int = 5
    alpha: float = 1e-4
    beta: float = 0.75


def build(
    preset: str = "paper",
    num_classes: int = 1000,
    *,
    input_size: int = 224,
    width: float = 1.0,
    lrn: LRN | None = None,
    dropout: float = 0.5,
    init: str = "paper",
    seed: int = 0,
) -> "AlexNet":
    """Build a net by the name of its preset, initialised from `seed` alone, in channels_last memory.

    width scales the number of maps and units of every layer; input_size is the side of the square input in pixels.
    init "paper" is N(0, 0.01) with biases of 1 in conv2, conv4, conv5, fc6 and fc7 (paper, 5); "he" scales each
    layer's deviation to sqrt(2 / fan_in) with biases of 0 and expects pixels scaled to a deviation of about 1: for
    small data, on which the paper's initialisation stays on the plateau of guessing.

    Raises ValueError for an unknown preset or init, and for sizes that leave a layer empty.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r}: unknown; the presets are {', '.join(PRESETS)}")
    net = AlexNet(num_classes, input_size=input_size, width=width, lrn=lrn or LRN(), dropout=dropout)
    net.initialize(init, seed)
    return net.to(memory_format=torch.channels_last)


class AlexNet(nn.Module):
    """The `paper` preset (paper, 3.5): 60,965,224 parameters with 1000 classes.

    Where the paper leaves a choice:
    - 224 pixels do not fit 55 windows of 11 at stride 4: the last window extends 3 pixels beyond the right and
      bottom edge and reads zeros there, as in the 2012 source. The same rule holds for any input size.
    - the order is convolution, ReLU, LRN, pooling, as in the text (the 2012 source puts LRN before ReLU in layer 1).
    - LRN stays within a column, as when each column lived on its own GPU.
    """

    columns = 2

    def __init__(
        self, num_classes: int, *, input_size: int = 224, width: float = 1.0, lrn: LRN, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes = {num_classes}: a classifier needs at least 2")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}: must be at least 0 and below 1; the paper has 0.5")
        self.input_size, self.num_classes = input_size, num_classes
        c1, c2, c3, c4, c5, f6, f7 = (
            _scaled(size, width, self.columns) for size in (96, 256, 384, 384, 256, 4096, 4096)
        )
        side = _sides(input_size)[-1]

        self.conv1 = BlockedConv2d(3, c1, 11, stride=4)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=self.columns)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)  # reads both columns
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, groups=self.columns)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1, groups=self.columns)
        self.fc6 = nn.Linear(c5 * side * side, f6)
        self.fc7 = nn.Linear(f6, f7)
        self.fc8 = nn.Linear(f7, num_classes)
        self.relu_norm = LocalResponseNorm(
            k=lrn.k, n=lrn.n, alpha=lrn.alpha, beta=lrn.beta, columns=self.columns, relu=True
        )
        self.pool = nn.MaxPool2d(3, stride=2)  # overlapping (paper, 3.4)
        self.dropout6, self.dropout7 = Dropout(dropout, 6), Dropout(dropout, 7)

    def forward(self, x_NCHW: Tensor, where: BatchPosition | None = None) -> Tensor:
        """Class scores before the softmax, (N, num_classes), of images (N, 3, input_size, input_size).

        `where` identifies the images, for dropout (alexnet/dropout.py).
        """
        return self.classify(self.features(x_NCHW), where)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """The output of the convolutional layers, flattened: (N, maps of conv5 * 6 * 6) for 224 pixels."""
        if x_NCHW.shape[1:] != (3, self.input_size, self.input_size):
            raise ValueError(
                f"images of shape {tuple(x_NCHW.shape)}: the net was built for (N, 3, {self.input_size}, "
                f"{self.input_size})"
            )
        x = self.pool(self.relu_norm(self.conv1(x_NCHW)))
        x = self.pool(self.relu_norm(self.conv2(x)))
        x = F.relu(self.conv3(x), inplace=True)
        x = F.relu(self.conv4(x), inplace=True)
        x = self.pool(F.relu(self.conv5(x), inplace=True))
        features: Tensor = x.flatten(1)
        return features

    def classify(self, x: Tensor, where: BatchPosition | None = None) -> Tensor:
        """Class scores (N, num_classes) of features."""
        x = self.dropout6(F.relu(self.fc6(x), inplace=True), where)
        x = self.dropout7(F.relu(self.fc7(x), inplace=True), where)
        scores: Tensor = self.fc8(x)
        return scores

    @torch.no_grad()
    def initialize(self, init: str, seed: int) -> None:
        """Draw all weights from `seed`, layer by layer in order; see `build` for the kinds."""
        if init not in INITS:
            raise ValueError(f"init = {init!r}: unknown; choose one of {', '.join(INITS)}")
        generator = torch.Generator().manual_seed(seed)
        ones = ("conv2", "conv4", "conv5", "fc6", "fc7")
        for name, layer in self.named_children():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            std = 0.01 if init == "paper" else math.sqrt(2 / layer.weight[0].numel())
            layer.weight.normal_(0, std, generator=generator)
            assert layer.bias is not None
            layer.bias.fill_(1.0 if init == "paper" and name in ones else 0.0)


class BlockedConv2d(nn.Conv2d):
    """A convolution with a large stride and few maps, computed with stride 1 over blocks of pixels.

    Zeros on the right and bottom complete the last window: 224 pixels are read as 227, whose 55 windows of 11 fit.
    Each stride x stride block of pixels becomes one position with stride * stride * C maps, and the kernel likewise
    (zeros make it a whole number of blocks): the same sums, in a shape that convolution libraries are fast at.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, H) to (N, maps, out, out), out = 1 + ceil((H - kernel) / stride)."""
        stride, kernel, maps_in = self.stride[0], self.kernel_size[0], self.in_channels
        out = 1 + math.ceil((x_NCHW.shape[-1] - kernel) / stride)
        blocks = math.ceil(kernel / stride)  # a kernel's side in blocks
        side = out - 1 + blocks  # the image's
        x = _blocks(x_NCHW, stride, side)
        weight = F.pad(self.weight, (0, blocks * stride - kernel) * 2)
        weight = weight.reshape(self.out_channels, maps_in, blocks, stride, blocks, stride)
        weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(self.out_channels, -1, blocks, blocks)
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), self.bias)


def _blocks(x_NCHW: Tensor, stride: int, side: int) -> Tensor:
    """(N, C, H, H), zeros beyond its edge, to (N, stride * stride * C, side, side) in channels_last memory."""
    num_images, maps, height, _ = x_NCHW.shape
    whole = math.ceil(height / stride)
    if whole * stride != height:
        x_NCHW = F.pad(x_NCHW, (0, whole * stride - height) * 2)
    x = x_NCHW.permute(0, 2, 3, 1).reshape(num_images, whole, stride, whole, stride, maps)
    x = x.permute(0, 1, 3, 2, 4, 5)[:, :side, :side]  # N, row of blocks, block, row in block, column in block, map
    if whole < side:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, side - whole, 0, side - whole))
    return x.reshape(num_images, side, side, stride * stride * maps).permute(0, 3, 1, 2)


def num_parameters(net: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in net.parameters())


def _sides(input_size: int) -> tuple[int, int, int, int]:
    """Side in pixels of the maps after conv1, pool1, pool2 and pool5: 55, 27, 13, 6 for 224."""
    if input_size < 11:
        raise ValueError(f"input_size = {input_size}: smaller than conv1's 11-pixel kernel; the paper has 224")
    conv1 = 1 + math.ceil((input_size - 11) / 4)
    pool1 = 1 + (conv1 - 3) // 2
    pool2 = 1 + (pool1 - 3) // 2
    pool5 = 1 + (pool2 - 3) // 2
    if min(conv1, pool1, pool2) < 3:
        raise ValueError(f"input_size = {input_size}: too small for three poolings; use at least 64, the paper has 224")
    return conv1, pool1, pool2, pool5


def _scaled(size: int, width: float, columns: int) -> int:
    scaled = round(size * width)
    if scaled < columns or scaled % columns or abs(scaled - size * width) > 1e-6:
        raise ValueError(
            f"width = {width}: {size} maps become {size * width:g}, which {columns} columns cannot share; try 0.25"
        )
    return scaled
