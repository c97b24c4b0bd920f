"""A model takes the champion's place only if it is better by more than chance on the same images."""

import numpy as np
import pytest

from orchestrator.models.promote import decide


def wrong(*parts):
    """Parts of (number of images, whether they are wrong)."""
    return np.concatenate([np.full(number, is_wrong) for number, is_wrong in parts])


def test_a_better_an_equal_and_a_worse_model():
    old = wrong((40, True), (160, False))
    better = decide(old, wrong((10, True), (190, False)))
    assert better.promote
    assert better.difference == pytest.approx(-0.15)
    assert better.text == (
        "top-1 error 5.00 % against the champion's 20.00 % on the same 200 images: -15.00 points, 95 % interval "
        f"{100 * better.interval[0]:+.2f} to {100 * better.interval[1]:+.2f}; better by more than chance: promoted"
    )
    worse = decide(wrong((10, True), (190, False)), old)
    assert (worse.promote, worse.interval) == (False, tuple(-end for end in reversed(better.interval)))
    assert worse.text.endswith("worse by more than chance: not promoted")
    equal = decide(old, old)
    assert (equal.promote, equal.difference) == (False, 0)
    assert equal.interval[0] == -equal.interval[1] != 0
    assert equal.text.endswith("not told apart by that many images: not promoted")


def test_the_same_difference_is_enough_or_not_by_which_images_are_wrong():
    """Both make 2 points fewer errors of 400; where they err on different images, that may be chance."""
    old = wrong((28, True), (372, False))
    assert decide(old, wrong((20, True), (380, False))).promote
    other = wrong((28, False), (20, True), (352, False))
    assert not decide(old, other).promote


@pytest.mark.parametrize(("old", "new"), [([], []), ([True], [True, False])])
def test_models_are_judged_on_the_same_images(old, new):
    with pytest.raises(ValueError, match="give those of the same images"):
        decide(np.array(old, bool), np.array(new, bool))
