"""Ten views that share their first layer are those that are computed one by one."""

import numpy as np
import pytest
import torch

import alexnet
from alexnet import augment, ten_views


def make(input_size, image_size):
    build = {"preset": "paper", "num_classes": 7, "width": 0.0625, "input_size": input_size}
    net = alexnet.build(**build, init="he", seed=1)
    mean = np.random.default_rng(0).uniform(0, 255, (image_size, image_size, 3)).astype(np.float32)
    return alexnet.TrainedNet(net, alexnet.Description(build, tuple("abcdefg"), pixel_scale=1 / 64), mean)


@pytest.mark.parametrize(("input_size", "image_size"), [(64, 80), (224, 256), (72, 104)])
def test_every_view_has_the_scores_that_it_has_alone(input_size, image_size):
    trained = make(input_size, image_size)
    assert ten_views.can_share(trained.net, image_size)
    stored = np.random.default_rng(1).integers(0, 256, (3, image_size, image_size, 3), dtype=np.uint8)
    shared = trained._ten_scores(stored)
    alone = [trained.scores(stored, draws) for draws in augment.views(3, margin=image_size - input_size, number=10)]
    assert len(shared) == 10
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3), "views differ, or the test says nothing"
    np.testing.assert_allclose(np.exp(trained.log_probabilities(stored, 10)), trained.probabilities(stored, 10), 1e-4)


@pytest.mark.parametrize(("input_size", "image_size"), [(64, 72), (64, 64), (66, 82), (68, 84)])
def test_crops_off_the_grid_are_not_shared(input_size, image_size):
    trained = make(input_size, image_size)
    assert not ten_views.can_share(trained.net, image_size)
    stored = np.random.default_rng(1).integers(0, 256, (2, image_size, image_size, 3), dtype=np.uint8)
    np.testing.assert_allclose(np.exp(trained.log_probabilities(stored, 10)), trained.probabilities(stored, 10), 1e-4)
