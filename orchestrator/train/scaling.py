"""What is known of the learning rate for a batch of another size."""

from orchestrator.config.recipes import RECIPES
from orchestrator.config.train import TrainConfig, make_config


def linear_scaling(config: TrainConfig, recipe: str | None) -> str | None:
    """A line about a rate that has not been scaled with the batch; None if there is nothing to say.

    recipe: whose rate a run has if it is given no other; None if that is not known: then it is the paper's, unless
    rate and batch are those of some recipe. Linear scaling is about SGD; a rate of LARS holds for a range of batches.
    """
    paper = make_config()
    usual = RECIPES[recipe]() if recipe else paper
    size, usual_size = config.global_batch_size, usual.global_batch_size
    whose = "the paper" if (usual_size, usual.lr) == (paper.global_batch_size, paper.lr) else f"recipe {recipe}"
    if "lars" in (config.optimizer, usual.optimizer) or size == usual_size or config.lr != usual.lr:
        return None
    known = [(each.global_batch_size, each.lr) for each in (make() for make in RECIPES.values())]
    if recipe is None and (size, config.lr) in known:
        return None
    return (
        f"linear scaling (Goyal et al. 2017) suggests --lr {usual.lr * size / usual_size:.4g} for a batch of {size} "
        f"where {whose} has {usual.lr:g} for {usual_size}"
    )
