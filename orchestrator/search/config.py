"""Every setting of a search: how it chooses and judges trials, the training settings they share, and their space."""

import math
import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.cluster.layout_choice import worker_counts
from orchestrator.config.models import dump_yaml, make_model, refuse_yes
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.search.space import Space, Values, make_space

METRICS = Literal["val/top1_error", "val/top5_error", "val/loss"]
GRID = "grid"
REDRAWS = 100  # of values that do not go together
# what a trial may change on its way
MUTABLE_BY_PBT = (
    "lr", "trust_coefficient", "momentum", "weight_decay", "dropout", "lrn_k", "lrn_n", "lrn_alpha", "lrn_beta", "flip",
    "color_noise",
)  # fmt: skip


class SearchSettings(BaseModel):
    """How trials are chosen and judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_samples: int = Field(
        16, ge=1, description="number of trials, the first with the paper's constants; a larger grid is cut off there"
    )
    searcher: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="random: drawn with --search-seed; grid: all combinations of the listed values; tpe: Optuna's TPE",
    )
    scheduler: Literal["asha", "hyperband", "pbt", "fifo"] = Field(
        "asha",
        description="asha stops underperforming trials at each rung; hyperband is asha with several first rungs; pbt "
        "continues underperforming trials from the weights of the best; fifo trains all to the end",
    )
    metric: METRICS = Field("val/top1_error", description="the metric to minimise")
    grace_epochs: int = Field(
        1, ge=1, description="asha: epochs before the first rung; pbt: epochs between two perturbations"
    )
    reduction_factor: int = Field(3, ge=2, description="asha: one trial in this many continues past each rung")
    max_concurrent: int | None = Field(
        None, ge=1, description="trials in parallel; automatic: as many as the cluster has room for"
    )
    time_budget: str | None = Field(
        None,
        description="time limit such as 90s, 30m or 2h, counted from when the cluster's nodes are ready; "
        "then the trials save checkpoints, and the search ends with what it has",
    )
    search_seed: int = Field(0, ge=0, lt=2**40, description="seed with which configurations are drawn")

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_yes(value, cls.model_fields[info.field_name or ""].annotation)

    @model_validator(mode="after")
    def _time_is_a_time(self) -> Self:
        if self.time_budget is not None:
            parse_time(self.time_budget)
        return self

    @property
    def time_budget_s(self) -> float | None:
        return parse_time(self.time_budget) if self.time_budget is not None else None


class SearchConfig(SearchSettings):
    """One search, resolved."""

    train: TrainConfig = Field(description="what all trials share")
    space: Space

    def trial(self, values: Values) -> TrainConfig:
        """The settings of a trial. Raises ValueError of one line where its values do not go together."""
        return self.train.changed(**values)

    def validation_error(self, values: Values) -> str | None:
        """What keeps a configuration from being trained, as far as its settings tell."""
        try:
            worker_counts(self.trial(values))
        except ValueError as error:
            return str(error)
        return None

    def fits(self, values: Values) -> bool:
        return self.validation_error(values) is None

    def valid_values_with(self, name: str, value: Any) -> Values:
        """Values of which one is this: beside what all trials share, or else beside others of the space that it goes
        with. Raises ValueError where none is found."""
        alone = {name: value}
        why = self.validation_error(alone)
        if why is None:
            return alone
        for attempt in range(REDRAWS):
            values = self.space.draw(self.search_seed, attempt) | alone
            if self.fits(values):
                return values
        raise ValueError(f"space: {name} = {value}: {why}")

    @property
    def most_workers(self) -> TrainConfig:
        """What all trials share, with the most workers that one may have."""
        choices = [d.values for d in self.space.dimensions if d.name == "workers"]
        return self.train.changed(workers=max(int(value) for value in choices[0])) if choices else self.train

    @property
    def paper_baseline(self) -> Values:
        return self.space.paper_baseline(self.train)

    @property
    def num_trials(self) -> int:
        return self.num_samples if self.searcher != GRID else min(self.num_samples, self.grid_size)

    @property
    def grid_size(self) -> int:
        """Trials of a whole grid: all combinations, and the paper's constants if they are none of them."""
        papers = self.paper_baseline
        known = all(papers[d.name] in d.values for d in self.space.dimensions)
        return math.prod(len(d.values) for d in self.space.dimensions) + (not known)

    @property
    def left_out(self) -> str | None:
        """What of a grid is not tried."""
        if self.searcher != GRID or self.num_trials == self.grid_size:
            return None
        return (
            f"{self.num_trials} of the grid's {self.grid_size} trials; for all of them: --num-samples {self.grid_size}"
        )

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SearchSettings.model_fields}

    def to_yaml(self) -> str:
        parts = {"search": self.settings(), "space": self.space.to_dict(), "train": self.train.model_dump()}
        return dump_yaml(parts, default_flow_style=None)


def make_search(settings: dict[str, Any], train: TrainConfig, space: dict[str, Any]) -> SearchConfig:
    """Raises ValueError of one line that names the setting, its value and what would work."""
    checked = make_model(SearchSettings, **settings)
    config = SearchConfig(**checked.model_dump(), train=train, space=make_space(space, train))
    if config.searcher == GRID:
        for values in config.space.grid():  # says which dimension has none
            if why := config.validation_error(values):
                raise ValueError(f"space: {values} cannot be trained: {why}")
    elif grids := [d.name for d in config.space.dimensions if d.kind == GRID]:
        raise ValueError(f"space: {grids[0]}: is a grid; say --searcher grid, or use choice")
    if config.scheduler != "fifo" and config.grace_epochs > train.epochs:
        raise ValueError(f"grace_epochs = {config.grace_epochs}: more than the {train.epochs} epochs of a trial")
    if train.worker_range[0] != train.worker_range[1]:
        raise ValueError(f"workers = {train.workers}: a trial has a fixed number of workers, such as 2")
    if config.scheduler == "pbt" and (stiff := [name for name in config.space.names if name not in MUTABLE_BY_PBT]):
        raise ValueError(
            f"space: {stiff[0]}: cannot change under a trial's weights, as pbt would; {', '.join(MUTABLE_BY_PBT)} can"
        )
    if config.scheduler == "pbt" and (config.searcher != "random" or config.num_samples < 2):
        raise ValueError("scheduler = pbt: needs --searcher random and at least 2 samples, to learn from each other")
    return config


def search_of(parts: dict[str, Any], where: str) -> SearchConfig:
    """From what `to_yaml` wrote. Raises ValueError of one line."""
    if set(parts) != {"search", "space", "train"}:
        raise ValueError(
            f"{where}: expected search, space and train, found {shown(', '.join(parts), LONGEST_VALUE) or 'nothing'}"
        )
    return make_search(parts["search"], make_config(**parts["train"]), parts["space"])


def parse_time(text: str) -> float:
    """ "90s", "30m" or "2h" to seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"time_budget = {text!r}: expected a time such as 90s, 30m or 2h")
    return seconds
