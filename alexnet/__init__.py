"""The net of Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012, in plain PyTorch.

    net = alexnet.build("paper", num_classes=1000)
    optimizer = alexnet.PaperSGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)

Names are fetched when first used, so that a process which only crops images (alexnet.augment) never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import keep_freed_memory, release_freed_memory, use_one_arena
    from .augment import MeanSubtraction
    from .ema import WeightAverage
    from .evaluate import count_errors, errors_by_class, topk_wrong
    from .lars import LARS
    from .lrn import LocalResponseNorm, local_response_norm
    from .net import PRESETS, AlexNet, build, num_parameters
    from .optim import PaperSGD, plateau_schedule
    from .presets import LRN, Preset
    from .trained import Description, TrainedNet, load
    from .warmup import Warmup

__version__ = "0.2.0"  # of the whole distribution: pyproject.toml and orchestrator read it here

_HOMES = {
    "allocator": ("keep_freed_memory", "release_freed_memory", "use_one_arena"),
    "augment": ("MeanSubtraction",),
    "ema": ("WeightAverage",),
    "evaluate": ("count_errors", "errors_by_class", "topk_wrong"),
    "lars": ("LARS",),
    "lrn": ("LocalResponseNorm", "local_response_norm"),
    "net": ("PRESETS", "AlexNet", "build", "num_parameters"),
    "optim": ("PaperSGD", "plateau_schedule"),
    "presets": ("LRN", "Preset"),
    "trained": ("Description", "TrainedNet", "load"),
    "warmup": ("Warmup",),
}

__all__ = [
    "LARS",
    "LRN",
    "PRESETS",
    "AlexNet",
    "Description",
    "LocalResponseNorm",
    "MeanSubtraction",
    "PaperSGD",
    "Preset",
    "TrainedNet",
    "Warmup",
    "WeightAverage",
    "__version__",
    "build",
    "count_errors",
    "errors_by_class",
    "keep_freed_memory",
    "load",
    "local_response_norm",
    "num_parameters",
    "plateau_schedule",
    "release_freed_memory",
    "topk_wrong",
    "use_one_arena",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module 'alexnet' has no attribute {name!r}")
