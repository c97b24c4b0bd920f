"""What a dry run says of a rate that has not been scaled with the batch."""

import pytest

from orchestrator.config.recipes import RECIPES, digits, imagenet
from orchestrator.config.train import make_config
from orchestrator.train.scaling import linear_scaling


@pytest.mark.parametrize(
    ("config", "recipe", "rate", "meant_for"),
    [
        (imagenet().changed(global_batch_size=1024), "imagenet", "0.08", "the paper has 0.01 for 128"),
        (imagenet().changed(global_batch_size=32), "imagenet", "0.0025", "the paper has 0.01 for 128"),
        (digits().changed(global_batch_size=256), "digits", "0.04", "recipe digits has 0.01 for 64"),
        (digits().changed(global_batch_size=128), "digits", "0.02", "recipe digits has 0.01 for 64"),
        (make_config(global_batch_size=512), None, "0.04", "the paper has 0.01 for 128"),
    ],
)
def test_a_rate_that_was_not_scaled_gets_one_line(config, recipe, rate, meant_for):
    assert linear_scaling(config, recipe) == (
        f"linear scaling (Goyal et al. 2017) suggests --lr {rate} for a batch of {config.global_batch_size} where "
        f"{meant_for}"
    )


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (imagenet().changed(global_batch_size=1024, lr=0.08), "imagenet"),
        (imagenet().changed(global_batch_size=1024, lr=0.02), "imagenet"),
        (imagenet().changed(global_batch_size=4096, optimizer="lars"), "imagenet"),
        (RECIPES["imagenet-lars-4096"]().changed(optimizer="sgd", global_batch_size=512), "imagenet-lars-4096"),
        (digits(), None),  # its config.yaml
        *((make(), name) for name, make in RECIPES.items()),
    ],
)
def test_where_batch_and_rate_go_together_and_of_lars_nothing_is_said(config, recipe):
    assert linear_scaling(config, recipe) is None
