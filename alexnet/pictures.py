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
