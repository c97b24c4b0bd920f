"""What a net is, as data: its layers in order, their initialisation, its constants. Everything else follows from it:
the module (alexnet/net.py), its partitions (alexnet/partition.py) and its cost (alexnet/cost.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class LRN:
    """The constants of local response normalisation; alpha multiplies the plain sum (paper, 3.3)."""

    k: float = 2.0
    n: int = 5
    alpha: float = 1e-4
    beta: float = 0.75


@dataclass(frozen=True)
class Gaussian:
    """Weights from N(0, std), biases constant."""

    std: float
    bias: float = 0.0


@dataclass(frozen=True)
class UniformByFanIn:
    """Weights and biases from U(-b, b), b = 1 / sqrt(fan_in): PyTorch's default for both kinds of layer."""


Initialisation: TypeAlias = Gaussian | UniformByFanIn


@dataclass(frozen=True)
class Pool:
    """Pooling over square windows.

    ceil: whether a last window that hangs over the right and bottom edge counts.
    """

    kind: Literal["max", "average"]
    size: int
    stride: int
    padding: int = 0
    ceil: bool = False

    def side(self, side: int) -> int:
        """Of the output, for an input of this side; below 1 if no window fits."""
        out = _windows(side, self.size, self.stride, self.padding, self.ceil)
        # no window may begin beyond the edge, as in PyTorch and Caffe
        return out - 1 if self.ceil and (out - 1) * self.stride >= side + self.padding else out


@dataclass(frozen=True)
class AdaptivePool:
    """Averages over size x size windows of equal parts, for any input."""

    size: int

    def side(self, side: int) -> int:
        return self.size if side > 0 else 0


Step: TypeAlias = Literal["relu", "lrn"] | Pool | AdaptivePool


@dataclass(frozen=True)
class Conv:
    """A convolution and what follows it, in order.

    ceil: whether a last window that hangs over the right and bottom edge counts; it reads zeros there.
    reads: the input's maps that a map sees: those of its own column, or those of all.
    """

    name: str
    maps: int
    kernel: int
    init: Initialisation
    stride: int = 1
    padding: int = 0
    ceil: bool = False
    reads: Literal["own column", "all columns"] = "all columns"
    then: tuple[Step, ...] = ("relu",)

    def side(self, side: int) -> int:
        """Of the convolution's own output, for an input of this side; below 1 if no window fits."""
        return _windows(side, self.kernel, self.stride, self.padding, self.ceil)


@dataclass(frozen=True)
class FullyConnected:
    """A fully connected layer, which reads all columns.

    units: None for one per class. dropout: of its input, or of its output after the activation.
    """

    name: str
    units: int | None
    init: Initialisation
    activation: Literal["relu"] | None = "relu"
    dropout: Literal["of input", "of output"] | None = None


@dataclass(frozen=True)
class Preset:
    """A net with a name. Sizes are those at width 1."""

    name: str
    title: str  # one line, for lists
    source: str
    differences: tuple[str, ...]  # from the paper's net, in sentences
    convs: tuple[Conv, ...]
    fully_connected: tuple[FullyConnected, ...]
    input_size: int  # default side of the input, in pixels
    columns: int = 1
    lrn: LRN | None = None  # default constants; None: the net has no LRN
    lrn_reads: Literal["own column", "all columns"] = "own column"

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        assert len(set(names)) == len(names), f"{self.name}: two layers have one name"
        assert self.convs[0].reads == "all columns", f"{self.name}: all columns read the image"
        assert self.has_lrn == (self.lrn is not None), f"{self.name}: LRN without constants, or constants without LRN"
        assert [layer.name for layer in self.fully_connected if layer.units is None] == [self.head.name]
        assert self.head.dropout != "of output", f"{self.name}: the scores are not dropped"

    @property
    def layers(self) -> tuple[Conv | FullyConnected, ...]:
        """All layers with weights, in order."""
        return (*self.convs, *self.fully_connected)

    @property
    def head(self) -> FullyConnected:
        """The last layer, whose outputs are the scores of the classes."""
        return self.fully_connected[-1]

    @property
    def has_lrn(self) -> bool:
        return any("lrn" in conv.then for conv in self.convs)

    def position(self, layer: Conv | FullyConnected) -> int:
        """The layer's place, from 1."""
        return 1 + self.layers.index(layer)

    def scaled(self, size: int, width: float) -> int:
        """Maps or units of a layer at this width. Raises ValueError where they are none, or the columns cannot share
        them."""
        scaled = round(size * width)
        if scaled < self.columns or scaled % self.columns or abs(scaled - size * width) > 1e-6:
            shared = f"which {self.columns} columns cannot share" if self.columns > 1 else "which is no whole number"
            raise ValueError(f"width = {width}: {size} maps become {size * width:g}, {shared}; try 0.25")
        return scaled

    def features(self, input_size: int, width: float) -> int:
        """Numbers per image that the first fully connected layer reads. Raises ValueError for too small an image."""
        return self.scaled(self.convs[-1].maps, width) * self.side(input_size) ** 2

    def side(self, input_size: int) -> int:
        """Side in pixels of the last convolutional layer's maps. Raises ValueError for too small an image."""
        for name, side in self._sides(input_size):
            if side < 1:
                least = next(size for size in range(max(1, input_size), 4096) if self._fits(size))
                raise ValueError(
                    f"input_size = {input_size}: too small for {name} of preset {self.name}; use at least {least}, "
                    f"its own is {self.input_size}"
                )
        return side

    def _fits(self, input_size: int) -> bool:
        return all(side >= 1 for _, side in self._sides(input_size))

    def _sides(self, side: int) -> Iterator[tuple[str, int]]:
        """Side of the output of every convolution and pooling, in order, to the first that no window fits."""
        for conv in self.convs:
            side = conv.side(side)
            yield conv.name, side
            for step in conv.then:
                if isinstance(step, Pool | AdaptivePool) and side >= 1:
                    side = step.side(side)
                    yield f"the pooling after {conv.name}", side
            if side < 1:
                return


def _windows(side: int, size: int, stride: int, padding: int, ceil: bool) -> int:
    """How many windows lie side by side; 0 or less if not even one fits."""
    if side + 2 * padding < size:
        return 0
    rest = (side + 2 * padding - size) / stride
    return 1 + (math.ceil(rest) if ceil else math.floor(rest))
