"""What a dry run says of a rate that has not been scaled with the batch."""

import pytest

from orchestrator.config.recipes import digits, imagenet
from orchestrator.config.train import make_config
from orchestrator.train.scaling import linear_scaling


@pytest.mark.parametrize(
    ("config", "recipe", "suggested"),
    [
        (imagenet().changed(global_batch_size=1024), "imagenet", "--lr 0.08 for a batch of 1024 where the paper has 0.01 for 128"),
        (imagenet().changed(global_batch_size=32), "imagenet", "--lr 0.0025 for a batch of 32 where the paper has 0.01 for 128"),
        (digits().changed(global_batch_size=256), "digits", "--lr 0.04 for a batch of 256 where recipe digits has 0.01 for 64"),
        (digits().changed(global_batch_size=128), "digits", "--lr 0.02 for a batch of 128 where recipe digits has 0.01 for 64"),
        (make_config(global_batch_size=512), None, "--lr 0.04 for a batch of 512 where the paper has 0.01 for 128"),
        (imagenet().changed(global_batch_size=1024, lr=0.08), "imagenet", None),
        (imagenet().changed(global_batch_size=1024, lr=0.02), "imagenet", None),
        (imagenet().changed(global_batch_size=4096, lr=0.01, optimizer="lars"), "imagenet", None),
        (imagenet(), "imagenet", None),
        (digits(), "digits", None),
        (digits(), None, None),  # its config.yaml
    ],
)  # fmt: skip
def test_a_rate_that_was_not_scaled_gets_one_line_and_any_other_none(config, recipe, suggested):
    wanted = None if suggested is None else f"linear scaling (Goyal et al. 2017) suggests {suggested}"
    assert linear_scaling(config, recipe) == wanted
