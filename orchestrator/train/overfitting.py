"""Overfitting, told from a run's history: validation stands still while the training images are still being learned."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alexnet.intervals import error_interval
from orchestrator.base.terminal import percent
from orchestrator.config.train import TrainConfig
from orchestrator.data.order import rows_of_pass

TRAIN, VAL, RATE = "train/top1_error", "val/top1_error", "train/lr"
PATIENCE = 5  # epochs without a better validation error
WINDOW = 3  # epochs that an error is averaged over, and that the gap must last


def overfitting_warning(
    history: Sequence[Mapping[str, Any]], config: TrainConfig, rows: Mapping[str, int]
) -> str | None:
    """A line after the first epoch of a run at which it overfits; None after any other, and so at most one line a run.

    history: of all its epochs. rows: images of train and of val.
    """
    sizes = rows["val"], rows_of_pass("probe", rows)
    if not overfits(history, *sizes, num_drops=config.lr_drops):
        return None
    if any(overfits(history[:last], *sizes, num_drops=config.lr_drops) for last in range(len(history))):
        return None
    best, then, now, recent = _best(history), _at_best(history), history[-1], _mean(history[-WINDOW:])
    return (
        f"validation error has not improved since epoch {history[best]['epoch']} ({percent(history[best][VAL])} then, "
        f"{percent(now[VAL])} now), while that on training images fell from {percent(then)} to {percent(recent)}: "
        f"the net is overfitting. What helps: {', '.join(_remedies(config))}"
    )


def overfits(history: Sequence[Mapping[str, Any]], num_val: int, num_probe: int, *, num_drops: int) -> bool:
    """Whether the history ends in overfitting. All of this must hold:

    - The validation error has not improved for PATIENCE epochs, nor after the rate was divided meanwhile, WINDOW epochs
      or more before the end, if a division was to come: that is what usually ends a plateau.
    - The error on training images, averaged over WINDOW epochs, has fallen since by more than its standard error.
    - The 95 % intervals of both errors have been apart for WINDOW epochs.
    """
    best, last = _best(history), len(history) - 1
    if last - best < PATIENCE or not all(TRAIN in entry for entry in history[max(0, best - WINDOW + 1) :]):
        return False
    drops = [later for later, (a, b) in enumerate(pairwise(history), start=1) if b[RATE] < a[RATE]]
    divided = bool(drops) and best < drops[-1] <= last - WINDOW + 1
    if len(drops) < num_drops and not divided:
        return False
    recent, then = history[-WINDOW:], _at_best(history)
    if then - _mean(recent) <= math.sqrt(then * (1 - then) / num_probe):
        return False
    return all(_interval(entry[TRAIN], num_probe)[1] < _interval(entry[VAL], num_val)[0] for entry in recent)


def _interval(error: float, count: int) -> tuple[float, float]:
    """Of an error that was measured on so many images."""
    return error_interval(error * count, count)


def _best(history: Sequence[Mapping[str, Any]]) -> int:
    """Where the validation error is lowest, the first of equal ones; -1 of no history."""
    errors = [entry[VAL] for entry in history]
    return errors.index(min(errors)) if errors else -1


def _at_best(history: Sequence[Mapping[str, Any]]) -> float:
    """The error on training images at the best epoch, averaged over the epochs up to it."""
    best = _best(history)
    return _mean(history[max(0, best - WINDOW + 1) : best + 1])


def _mean(entries: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(entry[TRAIN] for entry in entries) / len(entries))


def _remedies(config: TrainConfig) -> list[str]:
    """What this run does not do, or could do more of."""
    missing = ["--flip"] if not config.flip else []
    missing += ["--color-noise paper"] if config.color_noise == "none" else []
    return [
        *([f"augmentation that suits the images ({', '.join(missing)})"] if missing else ["more training images"]),
        f"a higher --dropout than {config.dropout:g}",
        f"a higher --weight-decay than {config.weight_decay:g}",
        "fewer --epochs: the best epoch's checkpoint is kept",
    ]
