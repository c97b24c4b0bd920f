"""Texts in pictures are shown as they are."""

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
