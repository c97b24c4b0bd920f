"""Pictures of what a net learned."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def plain(text: str) -> str:
    """As matplotlib is to be given a text: without its mathematics between $ and $."""
    return text.replace("$", r"\$")


def contact_sheet(images_NHWC: NDArray[np.uint8], captions: Sequence[str], title: str) -> Figure:
    """Images (N, H, W, 3) side by side, eight in a row, each under its caption."""
    rows = -(-len(images_NHWC) // 8)
    figure = Figure(figsize=(12, 1.75 * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, 8, squeeze=False).ravel()
    for axes in places:
        axes.axis("off")
    for axes, image, caption in zip(places, images_NHWC, captions, strict=False):
        axes.imshow(image)
        axes.set_title(plain(caption), fontsize=7)
    figure.suptitle(plain(title))
    return figure


def learning_curves(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss and errors against epochs; history has one entry per epoch, with the keys of the training metrics."""
    epochs = [entry["epoch"] for entry in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for name, label in (("train/loss", "train"), ("val/loss", "validation")):
        losses.plot(epochs, [entry[name] for entry in history], marker=".", label=label)
    for name, label in (("val/top1_error", "top-1"), ("val/top5_error", "top-5")):
        if all(name in entry for entry in history):
            errors.plot(epochs, [100 * entry[name] for entry in history], marker=".", label=label)
    probed = [entry for entry in history if "train/top1_error" in entry]  # none of runs of 0.2
    if probed:
        known = [entry["epoch"] for entry in probed]
        trained, validated = (
            [100 * entry[name] for entry in probed] for name in ("train/top1_error", "val/top1_error")
        )
        color = errors.lines[0].get_color()
        errors.plot(known, trained, marker=".", color=color, linestyle="--", label="top-1, training images")
        errors.fill_between(known, trained, validated, color=color, alpha=0.12, linewidth=0)
    drops = [b["epoch"] for a, b in pairwise(history) if b["train/lr"] < a["train/lr"]]
    for axes in (losses, errors):
        for epoch in drops:  # the rate was divided before this epoch
            axes.axvline(epoch - 0.5, color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("epoch" + (" (dotted: rate divided by 10)" if drops else ""))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_ylabel("cross-entropy loss")
    errors.set_ylabel("error, %" if probed else "validation error, %")
    figure.suptitle(plain(title))
    return figure


NAMED_CLASSES = 40  # at most, whose names and counts can be read in a confusion matrix
BLOCKS = 50  # a side, of a matrix of more classes than can be seen


def confusion_matrix(counts: NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """counts (K, K): how many images of class i were taken for class j, as shares of class i's images.

    Up to NAMED_CLASSES classes are shown by name, in their order. More are sorted so that classes that are taken for
    each other are neighbours, and only the mistakes are shown; of thousands, the mean of a block of neighbours. Beside
    that matrix stand the pairs that are confused most.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(10, 9) if len(counts) <= NAMED_CLASSES else (14, 9), layout="constrained")
    if len(counts) <= NAMED_CLASSES:
        axes = figure.subplots()
        drawn = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        labels = [plain(name if len(name) <= 20 else name[:19] + "\u2026") for name in names]
        size = max(5, min(10, 220 // len(counts)))
        axes.set_xticks(range(len(counts)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(counts)), labels, fontsize=size)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=size - 1, color=color)
    else:
        axes, listed = figure.subplots(1, 2, width_ratios=(3, 1))
        order = neighbours(shares)
        mistakes = 100 * (shares * ~np.eye(len(counts), dtype=bool))[np.ix_(order, order)]
        edges = np.linspace(0, len(counts), min(len(counts), BLOCKS * 4) + 1).astype(int)[:-1]
        blocks = np.maximum.reduceat(np.maximum.reduceat(mistakes, edges, 0), edges, 1)
        drawn = axes.imshow(blocks, cmap="Blues", vmin=0, extent=(0, len(counts), len(counts), 0))
        listed.axis("off")
        listed.text(0, 1, _most_confused(counts, names), va="top", fontsize=8, transform=listed.transAxes)
        title += "; sorted so that classes that are confused are neighbours; without the diagonal"
    figure.colorbar(drawn, ax=axes, label="% of the class's images", shrink=0.7)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    figure.suptitle(plain(title), fontsize=10)
    return figure


def neighbours(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order of K classes in which those that are taken for each other are close: the leaves of a clustering."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    alike = (shares + shares.T) / 2
    apart = 1 - alike / max(1e-12, alike[~np.eye(len(alike), dtype=bool)].max())
    np.fill_diagonal(apart, 0)
    order: NDArray[np.int64] = leaves_list(linkage(squareform(np.clip(apart, 0, 1), checks=False), "average"))
    return order


def _most_confused(counts: NDArray[np.int64], names: Sequence[str], most: int = 30) -> str:
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, counts.shape), strict=True) if mistakes[i, j]]
    lines = [f"{mistakes[i, j]:4d}  {names[i][:24]} taken for {names[j][:24]}" for i, j in pairs]
    return plain("\n".join(["most confused (images)", *lines]))


def reliability_diagram(bins: Sequence[dict[str, Any]], title: str) -> Figure:
    """How often answers are right against how sure they are, by bins of confidence (low, high, images, confidence,
    accuracy), and how many images are in each."""
    figure = Figure(figsize=(6, 7), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    full = [each for each in bins if each["images"]]
    left, width = [each["low"] for each in bins], [each["high"] - each["low"] for each in bins]
    accuracies = [each["accuracy"] or 0 for each in bins]
    axes.bar(left, accuracies, width, align="edge", edgecolor="white", label="right")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    axes.plot([each["confidence"] for each in full], [each["accuracy"] for each in full], "k.", label="bin's mean")
    axes.set_ylabel("right, share of the images")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left")
    below.bar(left, [each["images"] for each in bins], width, align="edge", edgecolor="white", color="gray")
    below.set_xlabel("confidence: the probability of the likeliest class")
    below.set_ylabel("images")
    below.set_xlim(0, 1)
    for each in (axes, below):
        each.grid(alpha=0.3)
    figure.suptitle(plain(title), fontsize=10)
    return figure
