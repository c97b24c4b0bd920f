"""From a config to its net."""

import alexnet
from orchestrator.config.train import TrainConfig


def build_net(config: TrainConfig, num_classes: int) -> alexnet.AlexNet:
    """The net that the config describes."""
    lrn = alexnet.LRN(k=config.lrn_k, n=config.lrn_n, alpha=config.lrn_alpha, beta=config.lrn_beta)
    return alexnet.build(
        config.preset, num_classes, input_size=config.input_size, width=config.width, lrn=lrn,
        dropout=config.dropout, init=config.init, seed=config.seed,
    )  # fmt: skip
