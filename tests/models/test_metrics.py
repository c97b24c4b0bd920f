"""Intervals, paired comparison and calibration against known values and naive sums."""

from math import comb

import numpy as np
import pytest

from orchestrator.models import metrics


def test_a_paired_comparison_counts_the_images_on_which_two_models_differ():
    first = np.array([1] * 6 + [0] * 1 + [1] * 20 + [0] * 73, bool)
    second = np.array([0] * 6 + [1] * 1 + [1] * 20 + [0] * 73, bool)
    found = metrics.compare(first, second)
    assert (found.only_first_wrong, found.only_second_wrong, found.num_images) == (6, 1, 100)
    assert found.difference == pytest.approx(0.05)
    assert found.p_value == pytest.approx(2 * sum(comb(7, k) for k in (0, 1)) / 2**7)
    assert not found.is_significant
    p, q, n = 7 / 102, 2 / 102, 102  # Bonett and Price: one more of each kind
    half = 1.959964 * ((p + q - (p - q) ** 2) / n) ** 0.5
    assert found.interval == pytest.approx((p - q - half, p - q + half), abs=1e-6)
    assert found.interval[0] < 0 < found.interval[1]


def test_equal_models_are_not_told_apart_and_other_images_are_refused():
    found = metrics.compare([True, False, False], [True, False, False])
    assert (found.difference, found.p_value) == (0, 1)
    with pytest.raises(ValueError, match="give those of the same images"):
        metrics.compare([True], [True, False])


def test_a_clear_difference_is_significant():
    first = np.array([1] * 30 + [0] * 70, bool)
    found = metrics.compare(first, np.zeros(100, bool))
    assert found.is_significant
    assert found.interval[0] > 0


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    random = np.random.default_rng(0)
    confidence = np.concatenate([random.uniform(0, 1, 300), [0.0, 1.0, 1 / 15, 2 / 15]])
    wrong = random.random(304) < 0.4
    total = 0.0
    for low in range(15):
        inside = [
            i for i, c in enumerate(confidence) if low / 15 < c <= (low + 1) / 15 or (low == 0 and c == 0)
        ]  # fmt: skip
        if inside:
            accuracy = sum(not wrong[i] for i in inside) / len(inside)
            total += len(inside) / 304 * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    found = metrics.calibration(confidence, wrong)
    assert found.ece == pytest.approx(total)
    assert sum(each["images"] for each in found.bins) == 304


def test_an_empty_bin_has_no_accuracy():
    found = metrics.calibration(np.array([0.95, 0.99]), np.array([False, True]))
    assert found.bins[0] == {"low": 0, "high": 1 / 15, "images": 0, "confidence": None, "accuracy": None}
    assert found.bins[-1]["accuracy"] == 0.5
    assert found.ece == pytest.approx(0.97 - 0.5)


def test_a_tie_with_a_class_that_is_not_valid_is_wrong_and_its_class_is_the_answer():
    scores = np.log([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2]])
    valid = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    not_worse = metrics.num_not_worse(scores, valid)
    assert not_worse.tolist() == [1, 0, 1]
    assert metrics.predicted(scores, valid, not_worse >= 1).tolist() == [1, 0, 0]
    nothing = np.full((1, 3), np.nan)
    assert metrics.num_not_worse(nothing, valid[:1]).tolist() == [2]


def test_the_likeliest_classes_come_first_and_ties_in_order():
    classes, shares = metrics.top_k(np.log([[0.1, 0.3, 0.3, 0.2, 0.1]]), 3)
    assert classes.tolist() == [[1, 2, 3]]
    np.testing.assert_allclose(shares, [[0.3, 0.3, 0.2]], rtol=1e-6)


def test_confusion_counts_images_of_a_class_by_what_they_were_taken_for():
    found = metrics.confusion(np.array([0, 0, 2, 2]), np.array([0, 1, 1, 1]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [0, 2, 0]]
