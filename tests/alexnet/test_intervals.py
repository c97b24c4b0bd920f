"""Intervals against known values, their equation, and how often they cover the truth."""

import math

import numpy as np
import pytest

from alexnet.intervals import difference_interval, error_interval


@pytest.mark.parametrize(
    ("wrong", "total", "low", "high"),
    [(10, 100, 0.05523, 0.17437), (0, 20, 0.0, 0.16113), (50, 100, 0.40383, 0.59617), (3, 3, 0.43850, 1.0)],
)
def test_wilson_s_interval(wrong, total, low, high):
    assert error_interval(wrong, total) == pytest.approx((low, high), abs=2e-5)


def test_wilson_s_interval_solves_its_equation():
    """Its ends are the rates p at which the observed one is 1.96 standard errors of p away."""
    for wrongs, total in ((0, 10), (3, 360), (180, 360), (360, 360)):
        low, high = error_interval(wrongs, total)
        assert 0 <= low <= wrongs / total <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                away = abs(wrongs / total - end) / math.sqrt(end * (1 - end) / total)
                assert away == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says():
    """Of 4,000 pairs of nets whose true difference is -3 points: 95 % of them, within three standard errors."""
    random = np.random.default_rng(0)
    cells = random.multinomial(300, [0.08, 0.05, 0.07, 0.80], size=4000)  # mended, broken, both wrong, both right
    intervals = [difference_interval(int(mended), int(broken), 300) for mended, broken, *_ in cells]
    covered = np.mean([low <= 0.03 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000) + 0.005)
