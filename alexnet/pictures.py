"""Pictures of what a net learned."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure


def learning_curves(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss and errors against epochs; history has one object an epoch with the keys of the training metrics."""
    epochs = [entry["epoch"] for entry in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for name, label in (("train/loss", "train"), ("val/loss", "validation")):
        losses.plot(epochs, [entry[name] for entry in history], marker=".", label=label)
    for name, label in (("val/top1_error", "top-1"), ("val/top5_error", "top-5")):
        errors.plot(epochs, [100 * entry[name] for entry in history], marker=".", label=label)
    drops = [b["epoch"] for a, b in pairwise(history) if b["train/lr"] < a["train/lr"]]
    for axes in (losses, errors):
        for epoch in drops:  # the rate was divided before this epoch
            axes.axvline(epoch - 0.5, color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("epoch" + (" (dotted: rate divided by 10)" if drops else ""))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_ylabel("cross-entropy loss")
    errors.set_ylabel("validation error, %")
    figure.suptitle(title)
    return figure
