"""Texts in pictures are shown as they are, and learning curves show what a history has."""

import warnings

import numpy as np
import pytest

from alexnet.pictures import contact_sheet, learning_curves, plain

BROKEN = ["$", "$x$", "a $\\frac{$ b", "US$5 and US$7", r"\$", r"\\$ $", "$\\undefined$", "100 % & ~ ^ {"]


def drawn(figure):
    figure.canvas.draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


@pytest.mark.parametrize("text", BROKEN)
def test_a_dollar_sign_is_no_mathematics(text):
    figure = contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), [text], text)
    titles = [artist for artist in drawn(figure) if artist.get_text() == plain(text)]
    assert len(titles) == 2
    for title in titles:
        assert title._preprocess_math(title.get_text()) == (text, False)
    metrics = {"train/loss": 1.0, "val/loss": 1.0, "val/top1_error": 0.5, "val/top5_error": 0.1, "train/lr": 0.01}
    assert drawn(learning_curves([{"epoch": 1, **metrics}], text))


def test_the_error_on_training_images_is_drawn_from_the_epoch_on_in_which_it_was_first_measured():
    """A run that 0.2 began has epochs without it."""
    history = [
        {"epoch": epoch, "train/loss": 1.0, "val/loss": 1.0, "val/top1_error": 0.5, "train/lr": 0.01}
        for epoch in range(1, 5)
    ]
    _, errors = learning_curves(history, "old").axes
    assert [line.get_label() for line in errors.lines] == ["top-1"]
    assert (errors.get_ylabel(), len(errors.collections)) == ("validation error, %", 0)
    for entry, error in zip(history[2:], (0.3, 0.2), strict=True):
        entry["train/top1_error"] = error
    _, errors = learning_curves(history, "resumed").axes
    trained = errors.lines[1]
    assert trained.get_label() == "top-1, training images"
    assert (list(trained.get_xdata()), list(trained.get_ydata())) == ([3, 4], [30.0, 20.0])
    assert errors.get_ylabel() == "error, %"
    [gap] = errors.collections
    low, high = gap.get_datalim(errors.transData).get_points()
    assert (low.tolist(), high.tolist()) == ([3, 20], [4, 50])
