"""Texts in pictures are shown as they are, and learning curves show what a history has."""

import warnings

import numpy as np
import pytest

from alexnet.pictures import confusion_matrix, contact_sheet, learning_curves, neighbours, plain, reliability_diagram

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


def test_a_confusion_matrix_of_few_classes_has_every_count_and_name():
    counts = np.array([[5, 2, 0], [0, 7, 0], [1, 0, 0]])
    texts = [text.get_text() for text in drawn(confusion_matrix(counts, ["a$", "b", "c"], "it"))]
    assert {"5", "2", "7", "1", plain("a$"), "b", "c"} <= set(texts)


def test_a_confusion_matrix_of_many_classes_lists_the_pairs_and_puts_them_side_by_side():
    """Classes that are taken for each other are neighbours, wherever they were."""
    counts = np.diag(np.full(300, 10))
    for a, b in ((0, 150), (7, 290), (33, 210)):
        counts[a, b] = counts[b, a] = 4
    counts[150, 0] = 9
    order = neighbours(counts / counts.sum(1, keepdims=True)).tolist()
    assert sorted(order) == list(range(300))
    assert [abs(order.index(a) - order.index(b)) for a, b in ((0, 150), (7, 290), (33, 210))] == [1, 1, 1]
    texts = [text.get_text() for text in drawn(confusion_matrix(counts, [f"c{i}" for i in range(300)], "it"))]
    listed = next(text for text in texts if text.startswith("most confused"))
    assert listed.splitlines()[1] == "   9  c150 taken for c0"
    assert len(listed.splitlines()) == 7


def test_a_reliability_diagram_has_a_bar_for_every_bin():
    bins = [
        {"low": 0.0, "high": 0.5, "images": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1.0, "images": 8, "confidence": 0.9, "accuracy": 0.75},
    ]
    figure = reliability_diagram(bins, "it")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 0.75]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0, 8]
