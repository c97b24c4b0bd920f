"""What a search would be, for --dry-run, and whether its trials can be trained."""

import contextlib

from alexnet.layouts import Layout
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import table
from orchestrator.cluster.layout_choice import cost_of, worker_counts
from orchestrator.cluster.nodes import Node
from orchestrator.cluster.placement import make_plan, room_for
from orchestrator.data.dataset import Dataset
from orchestrator.search.analysis import expected_epochs, rungs
from orchestrator.search.config import SearchConfig
from orchestrator.train.classes import has_top5


def describe(config: SearchConfig, output: StoragePath, images_per_s: float | None) -> str:
    """What a search would be, for --dry-run; images_per_s: of a trial, as the user states. Raises ValueError of one
    line."""
    from orchestrator.train.forecast import Machines, time_and_cost

    data = Dataset(config.train, output, verify=False)
    check_all(config, data)
    epochs, whole = expected_epochs(config), config.num_trials * config.train.epochs
    stages = ", ".join(map(str, rungs(config)))
    judged = f"{config.scheduler}" + (f", judging after epoch {stages}" if stages else "")
    judged += "; each bracket starts at a different one" if stages and config.scheduler == "hyperband" else ""
    machines = Machines.of(config.most_workers, config.max_concurrent or config.num_trials)
    workers = config.most_workers.worker_range[1]
    at_once = room_for(config.most_workers, machines.nodes, config.num_trials, config.max_concurrent)
    cost = cost_of(config.train, Layout("single", 1), data.num_classes(config.train))
    facts = [
        ("data", f"{config.train.data}: {data}"),
        (
            "trials",
            f"{config.num_trials} of {count_of(config.train.epochs, 'epoch')}, by {config.searcher} and {judged}",
        ),
        *([("left out", config.left_out)] if config.left_out else []),
        (
            "number 0",
            ", ".join(f"{name} {value}" for name, value in config.paper_baseline.items()) + ": the paper's constants",
        ),
        *((d.name, str(d)) for d in config.space.dimensions),
        ("epochs", f"about {epochs} in all, where all trials to the end would be {whole}"),
        ("nodes", machines.text),
        *([("would start", f"{machines.started[1]} of {machines.started[0]}")] if machines.started else []),
        ("at once", count_of(at_once, "trial")),
        *time_and_cost(config.train, output, data, epochs, machines, cost, workers, images_per_s, at_once),
    ]
    return f"{config.to_yaml()}\n{table(facts)}\n\nnothing was started (--dry-run)"


def check_all(config: SearchConfig, data: Dataset) -> None:
    """Check the settings of the trials against the data, at the ends of every dimension. Raises ValueError."""
    data.check(config.train)
    _check_metric(config, data.num_classes(config.train))
    worker_counts(config.train)
    config.trial(config.paper_baseline)
    for dimension in config.space.dimensions:
        for value in dimension.values:
            trial = config.trial(config.valid_values_with(dimension.name, value))
            data.check(trial)
            _check_metric(config, data.num_classes(trial))
            worker_counts(trial)


def _check_metric(config: SearchConfig, num_classes: int) -> None:
    if config.metric == "val/top5_error" and not has_top5(num_classes):
        raise ValueError(
            f"metric = {config.metric}: always 0 of {num_classes} classes, each of which is among the first five; "
            "choose val/top1_error or val/loss"
        )


def check_plans(config: SearchConfig, data: Dataset, nodes: list[Node], at_once: int) -> None:
    """Raises JobError for trials that the cluster, as it is now, could never place."""
    varied = [d for d in config.space.dimensions if d.name in ("layout", "spread")]
    configs = [config.most_workers]
    for dimension in varied:
        configs = [each.changed(**{dimension.name: value}) for each in configs for value in dimension.values]
    for each in configs:
        with contextlib.suppress(ValueError):  # not a pair that a trial could have
            make_plan(each, nodes, data.num_classes(each), at_once)
