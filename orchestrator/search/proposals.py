"""Which configuration is tried next: Ray Tune asks here for trials, all functions of the seed and the journal."""

import itertools
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.search.search_algorithm import SearchAlgorithm

from orchestrator.search.config import GRID, REDRAWS, SearchConfig
from orchestrator.search.entries import TrialProposed
from orchestrator.search.journal import PAPER_TRIAL, Journal, TrialRecord
from orchestrator.search.space import Space, Values

STARTUP_SHARE = 3  # one trial in this many is drawn at random before Optuna's model is asked


class NotPickled:
    """Not pickled by Ray Tune, whose own restart is never used: the journal replaces it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(NotPickled, SearchAlgorithm):  # type: ignore[misc]
    """First the trials that an interrupted search left unfinished, then new ones; 0 has the paper's constants."""

    def __init__(self, config: SearchConfig, journal: Journal, max_concurrent: int) -> None:
        self.config, self.journal, self.max_concurrent = config, journal, max_concurrent
        self.total, self.live = config.num_trials, set[int]()
        self.waiting = [record for record in journal.trials.values() if not record.ended]
        self.spec: dict[str, Any] = {}

    @property
    def total_samples(self) -> int:
        return len(self.waiting) + max(0, self.total - len(self.journal.trials))

    def add_configurations(self, experiments: Any) -> None:
        self.spec = experiments[0].spec

    def next_trial(self) -> Trial | None:
        if len(self.live) >= self.max_concurrent or self._none_is_left():
            return None
        if self.waiting:
            record = self.waiting.pop(0)
        else:
            number = len(self.journal.trials)
            self.journal.write(TrialProposed(number=number, values=self.propose(number)))
            record = self.journal.trials[number]
        self.live.add(record.number)
        return Trial(
            self.spec["run"], config=trial_config(record), trial_id=trial_id(record), experiment_tag=record.folder,
            storage=self.spec["storage"], checkpoint_config=self.spec["checkpoint_config"],
            placement_group_factory=self.spec["resources_per_trial"], max_failures=self.spec["max_failures"],
            evaluated_params=record.values,
        )  # fmt: skip

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.live.discard(int(trial_id))

    def is_finished(self) -> bool:
        # a population's trials hand their processes on while any of them runs
        return self._none_is_left() and not (self.config.scheduler == "pbt" and self.live)

    def _none_is_left(self) -> bool:
        return self._finished or (not self.waiting and len(self.journal.trials) >= self.total)

    def close(self) -> None:
        """No more trials."""
        self.set_finished()

    def requeue(self, record: TrialRecord) -> None:
        """A trial whose process was lost."""
        self.live.discard(record.number)
        self.waiting.append(record)

    def propose(self, number: int) -> Values:
        """The values of a new trial."""
        config = self.config
        if number == PAPER_TRIAL:
            return config.paper_baseline
        if config.searcher == GRID:
            others = (values for values in config.space.grid() if values != config.paper_baseline)
            return next(itertools.islice(others, number - 1, None))
        if config.searcher == "tpe":
            values = ask_optuna(config, list(self.journal.trials.values()), number)
            if config.fits(values):
                return values
        return draw_fitting(config, number)


def draw_fitting(config: SearchConfig, number: int) -> Values:
    """The values of a random trial, drawn again where they do not go together. Raises ValueError if they hardly ever
    do."""
    for attempt in range(REDRAWS):
        values = config.space.draw(config.search_seed, number + (attempt << 32))
        if config.fits(values):
            return values
    raise ValueError(f"space: of {REDRAWS} configurations none can be trained: {config.validation_error(values)}")


def trial_id(record: TrialRecord) -> str:
    return f"{record.number:04d}"


def trial_config(record: TrialRecord) -> dict[str, Any]:
    """What Ray Tune hands to a trial."""
    return {"number": record.number, "values": record.values, "start": record.start, "folder": record.folder}


def ask_optuna(config: SearchConfig, records: list[TrialRecord], number: int) -> Values:
    """The proposal of a tree-structured Parzen estimator that knows these trials (Bergstra et al., NIPS 2011).

    Its study is made anew from the records, and its randomness from the seed and the number, so that it proposes the
    same after an interruption.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    startup = min(10, max(4, config.num_samples // STARTUP_SHARE))
    sampler = optuna.samplers.TPESampler(
        seed=(config.search_seed * 1_000_003 + number) % 2**32, n_startup_trials=startup, constant_liar=True
    )
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for record in records:
        if all(0 <= d.position(record.values[d.name]) <= 1 for d in config.space.dimensions):
            study.add_trial(as_optuna(record, config.space, config.metric))
    trial = study.ask(distributions(config.space))
    # what is drawn from a range is rounded as all draws are
    return {d.name: d.at(d.position(trial.params[d.name])) for d in config.space.dimensions}


def as_optuna(record: TrialRecord, space: Space, metric: str) -> Any:
    """A trial as Optuna knows it: one that was stopped early is pruned, with its errors by epoch."""
    import optuna

    state = {
        "RUNNING": optuna.trial.TrialState.RUNNING, "FINISHED": optuna.trial.TrialState.COMPLETE,
        "STOPPED": optuna.trial.TrialState.PRUNED, "FAILED": optuna.trial.TrialState.FAIL,
    }[record.status]  # fmt: skip
    best = record.best(metric)
    return optuna.trial.create_trial(
        state=state,
        params=record.values,
        distributions=distributions(space),
        value=best[metric] if record.status == "FINISHED" and best else None,
        intermediate_values={entry["epoch"]: entry[metric] for entry in record.history},
    )


def distributions(space: Space) -> dict[str, Any]:
    import optuna

    found: dict[str, Any] = {}
    for d in space.dimensions:
        if d.listed:
            found[d.name] = optuna.distributions.CategoricalDistribution(d.values)
        elif d.kind == "randint":
            found[d.name] = optuna.distributions.IntDistribution(*d.values)
        else:
            low, high = d.values
            found[d.name] = optuna.distributions.FloatDistribution(low, high, log=d.kind == "loguniform")
    return found
