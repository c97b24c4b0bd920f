"""When a run is told that it overfits: on histories, without a net."""

import math
import random

import pytest

from orchestrator.config.recipes import digits
from orchestrator.train.overfitting import overfitting_warning

ROWS = {"train": 40_000, "val": 2_000}  # 2,000 probed


def history_of(train, val, rates=None):
    rates = rates or [0.01] * len(val)
    return [
        {"epoch": epoch, "train/top1_error": a, "val/top1_error": b, "train/lr": rate}
        for epoch, (a, b, rate) in enumerate(zip(train, val, rates, strict=True), start=1)
    ]


def warned(history, **changes):
    """After which epochs, and with what, as a run would ask."""
    config = digits().changed(**{"lr_drops": 0} | changes)
    texts = {last: overfitting_warning(history[:last], config, ROWS) for last in range(1, len(history) + 1)}
    return {epoch: text for epoch, text in texts.items() if text}


# 3 epochs in which both fall, then validation stands at 40 % and worse
TRAIN = [0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01]
VAL = [0.6, 0.5, 0.4, 0.41, 0.42, 0.42, 0.43, 0.43, 0.44, 0.44, 0.45, 0.45]


def test_a_run_that_overfits_is_told_once_what_is_seen_and_what_helps():
    told = warned(history_of(TRAIN, VAL))
    assert list(told) == [8], "5 epochs after the best, and not again"
    assert told[8] == (
        "validation error has not improved since epoch 3 (40.00 % then, 43.00 % now), while that on training images "
        "fell from 50.00 % to 20.00 %: the net is overfitting. What helps: augmentation that suits the images (--flip, "
        "--color-noise paper), a higher --dropout than 0.2, a higher --weight-decay than 0.0005, fewer --epochs: the "
        "best epoch's checkpoint is kept"
    )


def test_nothing_is_recommended_that_the_run_does_already():
    [text] = warned(history_of(TRAIN, VAL), flip=True, color_noise="paper").values()
    assert "--flip" not in text
    assert "--color-noise" not in text
    assert "more training images, a higher --dropout" in text


def test_no_run_is_told_before_its_sixth_epoch():
    assert warned(history_of([0.5, 0.4, 0.2, 0.1, 0.01], [0.4, 0.6, 0.7, 0.8, 0.9])) == {}


def test_a_plateau_is_not_overfitting_while_the_rate_is_still_to_be_divided():
    assert warned(history_of(TRAIN, VAL), lr_drops=3) == {}
    rates = [0.01] * 7 + [0.001] * 5  # before epoch 8, and of no use
    assert list(warned(history_of(TRAIN, VAL, rates), lr_drops=3)) == [10], "3 epochs at the new rate"
    before = [0.01, 0.01] + [0.001] * 10  # before the best epoch: there is another division to come
    assert warned(history_of(TRAIN, VAL, before), lr_drops=3) == {}
    assert list(warned(history_of(TRAIN, VAL, before), lr_drops=1)) == [8]


def test_a_net_that_has_stopped_learning_its_images_too_does_not_overfit():
    train = [*TRAIN[:3], *[0.3] * 9]
    assert list(warned(history_of(train, VAL))) == [8]  # it has fallen from 0.5
    assert warned(history_of([0.1] * 12, VAL)) == {}
    assert warned(history_of([0.0] * 12, [0.02] * 12)) == {}


def test_a_gap_within_the_intervals_is_no_gap():
    assert (
        warned(history_of([0.43, 0.42, 0.42, 0.40, 0.39, 0.39, 0.38, 0.38, 0.38], [0.43, 0.42, 0.4, *[0.405] * 6]))
        == {}
    )


@pytest.mark.parametrize("seed", range(20))
def test_noise_around_a_plateau_is_not_taken_for_overfitting(seed):
    """Both errors at 30 %, measured on 2,000 images each: nothing is learned and there is no gap."""
    draw = random.Random(seed)

    def measured(error):
        return draw.gauss(error, math.sqrt(error * (1 - error) / 2000))

    assert warned(history_of([measured(0.3) for _ in range(40)], [measured(0.3) for _ in range(40)])) == {}


def test_a_run_that_improves_is_not_told_however_large_its_gap():
    assert warned(history_of([0.5 * 0.7**n for n in range(20)], [0.6 - 0.01 * n for n in range(20)])) == {}


def test_epochs_of_an_earlier_version_tell_nothing():
    history = history_of(TRAIN, VAL)
    for entry in history[:2]:
        del entry["train/top1_error"]
    assert warned(history) == {}, "what was learned before the best epoch is not known"
    for entry in history:
        entry.pop("train/top1_error", None)
    assert warned(history) == {}
