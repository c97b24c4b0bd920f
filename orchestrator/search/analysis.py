"""What a search learned: who was best, by how much, which settings mattered, and what it cost."""

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.search.config import SearchConfig
from orchestrator.search.journal import PAPER_TRIAL, Journal, TrialRecord

TOP = 5
LEAST_TRIALS = 4  # to estimate importance


@dataclass(frozen=True)
class Comparison:
    """The best trial against the paper's constants."""

    best: float
    paper_baseline: float
    margin: float | None  # standard error of the difference between two error rates, of as many validation images
    same: bool  # the best is the paper's

    def __str__(self) -> str:
        if self.same:
            return "nothing was better than the paper's constants"
        if self.margin is None:
            return f"{self.best:.4f} against {self.paper_baseline:.4f} with the paper's constants"
        difference, noise = 100 * (self.best - self.paper_baseline), 100 * self.margin
        clear = "more than twice" if abs(difference) > 2 * noise else "within twice"
        return (
            f"{100 * self.best:.2f} % against {100 * self.paper_baseline:.2f} % with the paper's constants: "
            f"{difference:+.2f} points, {clear} the standard error of {noise:.2f} points for that many validation "
            "images"
        )


def compare(config: SearchConfig, journal: Journal, num_val: int) -> Comparison | None:
    """None where either has no epoch, or failed."""
    ranked = journal.ranked(config.metric)
    trial = journal.trials.get(PAPER_TRIAL)
    papers = trial.best(config.metric) if trial and trial.status != "FAILED" else None
    if not ranked or papers is None:
        return None
    first = ranked[0].best(config.metric)
    assert first is not None
    best, other = first[config.metric], papers[config.metric]
    margin = None
    if config.metric.endswith("error"):
        margin = math.sqrt((best * (1 - best) + other * (1 - other)) / num_val)
    return Comparison(best, other, margin, ranked[0].number == PAPER_TRIAL)


def epochs_used(journal: Journal) -> int:
    """Of all trials together; what was trained twice after an interruption counts once."""
    return len(journal.results)


def common_epoch(records: list[TrialRecord]) -> int:
    """The last epoch that all of them reached."""
    return min((record.epoch for record in records), default=0)


def importance(config: SearchConfig, journal: Journal) -> dict[str, float]:
    """The share of each setting in the variance of the metric (fANOVA, Hutter et al., 2014, as Optuna computes it).

    All trials are compared at the last epoch that every one reached. Empty where there are fewer than
    LEAST_TRIALS, or all are alike.
    """
    import optuna

    from orchestrator.search.proposals import distributions

    space = config.space
    records = [
        record
        for record in journal.trials.values()
        if record.history and all(0 <= d.position(record.values[d.name]) <= 1 for d in space.dimensions)
    ]
    epoch = common_epoch(records)
    values = [record.history[epoch - 1][config.metric] for record in records]
    if len(records) < LEAST_TRIALS or max(values) == min(values):
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    for record, value in zip(records, values, strict=True):
        study.add_trial(
            optuna.trial.create_trial(params=record.values, distributions=distributions(space), value=value)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def rungs(config: SearchConfig) -> list[int]:
    """The epochs at which asha judges."""
    found, epoch = [], config.grace_epochs
    while config.scheduler in ("asha", "hyperband") and epoch < config.train.epochs:
        found.append(epoch)
        epoch *= config.reduction_factor
    return found


def expected_epochs(config: SearchConfig) -> int:
    """Of a whole search: at each rung one in `reduction_factor` continues, and the paper's trial always does.

    For hyperband, whose brackets begin at other rungs, as if it were asha; pbt and fifo stop nobody.
    """
    epochs, others = config.train.epochs, config.num_trials - 1
    stages = [*rungs(config), epochs]
    total, alive, before = float(epochs), float(others), 0
    for stage in stages:
        total += alive * (stage - before)
        alive, before = max(1.0, alive / config.reduction_factor) if others else 0.0, stage
    return round(total)


def as_result(config: SearchConfig, journal: Journal, num_val: int) -> dict[str, Any]:
    """For result.json."""
    ranked, comparison = journal.ranked(config.metric), compare(config, journal, num_val)
    best = ranked[0].number if ranked and ranked[0].status != "FAILED" else None
    return {
        "metric": config.metric,
        "trials": [
            {
                "number": record.number, "status": record.status, "epochs": record.epoch, "values": record.values,
                "best": record.best(config.metric), "error": record.error, "mlflow_run_id": record.run_id,
            }
            for record in journal.trials.values()
        ],
        "best": best,
        "against_the_paper": str(comparison) if comparison else None,
        "importance": importance(config, journal),
        "epochs_used": epochs_used(journal),
        "elapsed_s": journal.elapsed_s,
    }  # fmt: skip
