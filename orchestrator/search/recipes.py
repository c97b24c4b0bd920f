"""Search recipes: functions that return a whole, validated search."""

from collections.abc import Callable

from orchestrator.config.recipes import digits, imagenet, imagenette
from orchestrator.search.config import SearchConfig, make_search

PAPERS_SPACE: dict[str, dict[str, list[float]]] = {
    "lr": {"loguniform": [0.001, 0.1]},
    "weight_decay": {"loguniform": [1e-5, 1e-2]},
    "lrn_k": {"uniform": [0.5, 4.0]},
    "lrn_n": {"choice": [3, 5, 7, 9]},
    "lrn_alpha": {"loguniform": [1e-5, 1e-2]},
    "lrn_beta": {"uniform": [0.25, 1.0]},
}


def search_digits() -> SearchConfig:
    """The paper's constants on the digits: 16 trials of the slim net, each on one worker of one thread.

    Command: python jobs/tune.py
    """
    train = digits().changed(workers=1, layout="single", epochs=18)
    return make_search({"num_samples": 16, "grace_epochs": 2}, train, PAPERS_SPACE)


def search_imagenette() -> SearchConfig:
    """The same space for the full net on photographs, a worker a trial.

    Command: python jobs/tune.py imagenette --data shards/imagenette
    Cost: 32 trials of up to 30 epochs, about 126 epochs by asha. Not run here.
    """
    return make_search({"num_samples": 32, "grace_epochs": 1}, imagenette().changed(epochs=30), PAPERS_SPACE)


def search_imagenet() -> SearchConfig:
    """The same space for the paper's run, the net over two GPUs a trial; not run here: neither data nor GPUs.

    Command: python jobs/tune.py imagenet --data shards/imagenet
    """
    train = imagenet().changed(workers=2, layout="columns", epochs=30)
    return make_search({"num_samples": 32, "grace_epochs": 1}, train, PAPERS_SPACE)


SEARCHES: dict[str, Callable[[], SearchConfig]] = {
    "digits": search_digits,
    "imagenette": search_imagenette,
    "imagenet": search_imagenet,
}
