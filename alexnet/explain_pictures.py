"""Pictures of what alexnet/explain.py finds. N images, C maps, H rows, W columns of pixels, K classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from .explain import NOISE, colouredness_of_columns
from .pictures import plain

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

TOP = 5  # classes with a bar
TRUE, WRONG = "#2a7d4f", "#8a8f98"  # bars: of the true class, of others
STRONGEST = 16  # maps of a column
DISTINCT = 20  # classes with a colour of their own
GRAY = 128


@dataclass(frozen=True)
class Answer:
    """What a net says of an image."""

    image: Images  # (S, S, 3)
    caption: str  # what it is
    top: Sequence[tuple[str, float, bool]]  # the likeliest classes: name, probability, whether it is the true one


def kernels(weights: Floats, columns: int, title: str, scale: NDArray[np.float32] | None = None) -> Figure:
    """The kernels (C, 3, H, W) of the first layer as images, each column apart (paper, Figure 3).

    Gray is a weight of 0. scale: (C,) the weight of each kernel that is drawn brightest, by default its largest.
    """
    if scale is None:
        scale = np.abs(weights).max(axis=(1, 2, 3))
    shares = colouredness_of_columns(weights, columns)
    per_column = len(weights) // columns
    across = next((n for n in (16, 12, 8) if per_column % n == 0), min(16, per_column))
    down = -(-per_column // across)
    figure = Figure(figsize=(9, columns * (9 * down / across + 0.35) + 0.5), layout="constrained")
    places = figure.subplots(columns, 1, squeeze=False).ravel()
    pixels = np.clip(weights / np.maximum(scale, 1e-30)[:, None, None, None] * 127 + GRAY, 0, 255).astype(np.uint8)
    for column, (axes, part) in enumerate(zip(places, np.split(pixels, columns), strict=True)):
        _show(axes, _tiled(part.transpose(0, 2, 3, 1), across, 255))
        name = f"column {column}: " if columns > 1 else ""
        axes.set_title(f"{name}{per_column} kernels, colour {shares[column]:.2f}", fontsize=10)
    figure.suptitle(plain(title), fontsize=11)
    figure.supxlabel(f"colour: mean share of energy that is not gray; 0 is gray, noise {NOISE:.2f}", fontsize=8)
    return figure


def feature_maps(image: Images, maps: dict[str, Floats], columns: int, title: str) -> Figure:
    """The strongest maps of one image after each convolution, each column apart; bright is active."""
    heights = [1.4, *([1.0] * len(maps))]
    figure = Figure(figsize=(9, 1.35 * sum(heights)), layout=ConstrainedLayoutEngine(wspace=0.08))
    grid = figure.add_gridspec(len(maps) + 1, columns, height_ratios=heights)
    first = figure.add_subplot(grid[0, :])
    _show(first, image)
    first.set_title("what the net sees", fontsize=9)
    for row, (name, found) in enumerate(maps.items(), start=1):
        for column, part in enumerate(np.split(found, columns)):
            strength = part.mean(axis=(1, 2))
            chosen = part[np.argsort(-strength, kind="stable")[:STRONGEST]]
            top = chosen.max(axis=(1, 2), keepdims=True)
            drawn = (255 * np.divide(chosen, top, out=np.zeros_like(chosen), where=top > 0)).astype(np.uint8)
            axes = figure.add_subplot(grid[row, column])
            tiles = _tiled(colormaps["magma"](drawn)[..., :3], STRONGEST // 2 if columns > 1 else STRONGEST, 1.0)
            _show(axes, tiles)
            where = f", column {column}" if columns > 1 else ""
            dead = int((part.max(axis=(1, 2)) == 0).sum())
            silent = f", {dead} silent" if dead else ""
            size = f"{part.shape[1]}x{part.shape[2]}"
            axes.set_title(f"{name}{where}: {len(chosen)} of {len(part)} maps, {size}{silent}", fontsize=8)
    figure.suptitle(plain(title), fontsize=11)
    return figure


def predictions(answers: Sequence[Answer], title: str) -> Figure:
    """Images with the probabilities of their likeliest classes as bars (paper, Figure 4, left)."""
    across = min(4, len(answers))
    down = -(-len(answers) // across)
    figure = Figure(figsize=(2.4 * across + 0.2, 3.7 * down + 0.4), layout="constrained")
    grid = figure.add_gridspec(2 * down, across, height_ratios=[2.3, 1.2] * down)
    for number, answer in enumerate(answers):
        row, column = divmod(number, across)
        picture = figure.add_subplot(grid[2 * row, column])
        _show(picture, answer.image)
        picture.set_title(_short(answer.caption), fontsize=9)
        bars = figure.add_subplot(grid[2 * row + 1, column])
        lines = range(len(answer.top))
        colours = [TRUE if right else WRONG for _, _, right in answer.top]
        bars.barh(lines, [probability for _, probability, _ in answer.top], color=colours, height=0.85, alpha=0.55)
        for line, (name, probability, right) in enumerate(answer.top):
            weight = "bold" if right else "normal"
            bars.text(0.02, line, f"{_short(name)}  {100 * probability:.0f} %", va="center", fontsize=8, weight=weight)
        bars.set(xlim=(0, 1), ylim=(TOP - 0.4, -0.6), xticks=[], yticks=[])
    figure.suptitle(plain(title), fontsize=11)
    return figure


def neighbours(answers: Sequence[Answer], found: Sequence[Sequence[tuple[Images, str]]], title: str) -> Figure:
    """Each image, then those nearest to it, the nearest first, under their captions (paper, Figure 4, right)."""
    across = 1 + max(map(len, found))
    figure = Figure(figsize=(1.45 * across, 1.7 * len(answers) + 0.4), layout="constrained")
    rows = figure.subplots(len(answers), across, squeeze=False)
    for places, answer, near in zip(rows, answers, found, strict=True):
        for axes in places:
            axes.axis("off")
        _show(places[0], answer.image)
        places[0].set_title(_short(answer.caption, 18), fontsize=8, weight="bold")
        for axes, (image, caption) in zip(places[1:], near, strict=False):
            _show(axes, image)
            axes.set_title(_short(caption, 22), fontsize=8)
    figure.suptitle(plain(title), fontsize=11)
    return figure


def captioned(images: Sequence[Images], captions: Sequence[Sequence[str]], title: str, across: int = 4) -> Figure:
    """Images, `across` in a row, each under some lines of caption."""
    across = min(across, len(images))
    down = -(-len(images) // across)
    figure = Figure(figsize=(2.2 * across + 0.2, 2.55 * down + 0.4), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes in places:
        axes.axis("off")
    for axes, image, lines in zip(places, images, captions, strict=False):
        _show(axes, image)
        axes.set_title("\n".join(map(_short, lines)), fontsize=8.5)
    figure.suptitle(plain(title), fontsize=11)
    return figure


def overlay(image: Images, heat: Floats) -> Images:
    """An image (S, S, 3) in gray, coloured by a map (H, W) that is stretched over it: blue 0, red the map's most."""
    import PIL.Image

    gray = image.mean(axis=2, keepdims=True) / 255
    top = float(heat.max())
    small = PIL.Image.fromarray(heat / top if top > 0 else np.zeros_like(heat))
    large = np.clip(np.asarray(small.resize(image.shape[1::-1], PIL.Image.Resampling.BILINEAR)), 0, 1)
    coloured = colormaps["turbo"](large)[..., :3]
    drawn: Images = (255 * (0.5 * gray + 0.5 * coloured)).astype(np.uint8)
    return drawn


def planes(
    named: dict[str, NDArray[np.float64]], labels: NDArray[np.int64], names: Sequence[str], title: str
) -> Figure:
    """Images as points (N, 2), one plane beside the other, coloured by class; of many classes the commonest are."""
    figure = Figure(figsize=(5.2 * len(named), 5.9), layout="constrained")
    counts = np.bincount(labels, minlength=len(names))
    coloured = np.sort(np.argsort(-counts, kind="stable")[:DISTINCT])
    coloured = coloured[counts[coloured] > 0]
    colours = colormaps["tab10" if len(coloured) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for axes, (name, points) in zip(figure.subplots(1, len(named), squeeze=False).ravel(), named.items(), strict=True):
        rest = ~np.isin(labels, coloured)
        if rest.any():
            axes.scatter(*points[rest].T, s=6, color="#c8c8c8", label="other classes")
        for colour, label in zip(colours, coloured, strict=False):
            axes.scatter(*points[labels == label].T, s=9, color=colour, label=_short(names[label]), linewidths=0)
        axes.set(title=plain(name), xticks=[], yticks=[])
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=5, fontsize=8, markerscale=2, frameon=False)
    figure.suptitle(plain(title), fontsize=11)
    return figure


def _show(axes: Axes, image: NDArray[Any]) -> None:
    axes.imshow(image, interpolation="nearest" if len(image) < 400 else "antialiased")
    axes.axis("off")


def _tiled(tiles_NHWC: NDArray[Any], across: int, background: float) -> NDArray[Any]:
    """Tiles (N, H, W, 3) as one picture, `across` in a row, a line of the background between them."""
    count, height, width, colours = tiles_NHWC.shape
    down = -(-count // across)
    sheet = np.full((down * (height + 1) - 1, across * (width + 1) - 1, colours), background, tiles_NHWC.dtype)
    for number, tile in enumerate(tiles_NHWC):
        top, left = number // across * (height + 1), number % across * (width + 1)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _short(text: str, longest: int = 30) -> str:
    """As it fits above a small image."""
    return plain(text if len(text) <= longest else text[: longest - 1] + "…")
