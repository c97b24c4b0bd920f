"""The space of a search: which settings vary, and how. Drawing from it is a pure function of (seed, trial's number).

In YAML, one line a setting:

    lr: {loguniform: [0.001, 0.1]}      # likewise uniform, and randint for whole numbers; both ends are included
    lrn_n: {choice: [3, 5, 7, 9]}       # or grid, for --searcher grid
"""

import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orchestrator.base.shown import LONGEST_VALUE, quoted, shown
from orchestrator.config.train import TrainConfig

KINDS = ("choice", "grid", "uniform", "loguniform", "randint")
EXAMPLE = "such as {loguniform: [0.001, 0.1]}"
CLOCK = "epochs"  # the time by which a search judges its trials
SHARED = ("data", "device", "max_failures")  # of what the cluster is asked for once
PAPER_VALUES = ("lr", "momentum", "weight_decay", "dropout")  # its constants, beside those of LRN
CHECKED = 1000  # values of a range of whole numbers
DIGITS = 4  # of a drawn number: enough to tell trials apart, few enough to read
RESAMPLE, FACTORS = 0.25, (0.8, 1.25)  # of a mutation: how often a value is drawn anew, else how far it moves

Values = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """One setting that varies: over values, or between two ends, which belong to it."""

    name: str
    kind: str
    values: tuple[Any, ...]  # the low and the high end, or all there are

    @property
    def listed(self) -> bool:
        return self.kind in ("choice", "grid")

    def at(self, u: float) -> Any:
        """The value at a point from 0 to 1 of the dimension."""
        if self.listed:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "randint":
            return int(min(low + int(u * (high - low + 1)), high))
        x = math.exp(math.log(low) + u * math.log(high / low)) if self.kind == "loguniform" else low + u * (high - low)
        return min(max(float(f"{x:.{DIGITS}g}"), low), high)

    def position(self, value: Any) -> float:
        """Where a value lies, from 0 to 1; outside of that if it is not in the space."""
        if self.listed:
            if value not in self.values:
                return -1.0
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high = self.values
        if self.kind == "loguniform":
            return math.log(value / low) / math.log(high / low) if value > 0 else -math.inf
        return float((value - low) / (high - low))

    def neighbour(self, value: Any, upward: bool) -> Any:
        """A value a little higher or lower, within the dimension."""
        if self.listed:
            index = self.values.index(value) if value in self.values else len(self.values) // 2
            return self.values[min(max(index + (1 if upward else -1), 0), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "randint":
            return min(max(value + (1 if upward else -1), low), high)
        return min(max(float(f"{value * FACTORS[upward]:.{DIGITS}g}"), low), high)

    def __str__(self) -> str:
        if self.listed:
            return f"{self.kind} of {', '.join(f'{value}' for value in self.values)}"
        return f"{self.kind} from {self.values[0]:g} to {self.values[1]:g}"


@dataclass(frozen=True)
class Space:
    """Dimensions by the order of their names, so that a file's order changes nothing."""

    dimensions: tuple[Dimension, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    def draw(self, seed: int, number: int) -> Values:
        """The configuration of a trial."""
        points = np.random.Generator(np.random.Philox(key=[seed, number])).random(len(self.dimensions))
        return {d.name: d.at(u) for d, u in zip(self.dimensions, points, strict=True)}

    def grid(self) -> Iterator[Values]:
        """All combinations, the last name varying fastest. Raises ValueError for a range, which has no grid."""
        for d in self.dimensions:
            if not d.listed:
                raise ValueError(f"space: {d.name} = {d}: a grid needs listed values, such as {{grid: [...]}}")
        for values in itertools.product(*(d.values for d in self.dimensions)):
            yield dict(zip(self.names, values, strict=True))

    def mutate(self, values: Values, seed: int) -> Values:
        """A neighbouring configuration: every value is moved a little, or now and then drawn anew."""
        random = np.random.Generator(np.random.Philox(key=[seed, 0]))
        fresh = {}
        for d in self.dimensions:
            resample, place, up = random.random(3)
            fresh[d.name] = d.at(place) if resample < RESAMPLE else d.neighbour(values[d.name], bool(up >= 0.5))
        return values | fresh

    def paper_baseline(self, base: TrainConfig) -> Values:
        """The paper's constants for what varies, of LRN the preset's own; where the paper's would not fit the data, as
        the size of the net, the base's."""
        own = {name: TrainConfig.model_fields[name].default for name in PAPER_VALUES}
        if base.net.lrn is not None:
            own |= {f"lrn_{name}": value for name, value in asdict(base.net.lrn).items()}
        return {name: own[name] if name in own else base.resolved()[name] for name in self.names}

    def to_dict(self) -> dict[str, Any]:
        return {d.name: {d.kind: list(d.values)} for d in self.dimensions}


def make_space(fields: dict[str, Any], base: TrainConfig) -> Space:
    """Validate a space against the settings that it would change. Raises ValueError of one line."""
    if not fields:
        raise ValueError(f"space: empty; name at least one setting, {EXAMPLE}")
    return Space(tuple(_dimension(name, fields[name], base) for name in sorted(fields)))


def _dimension(name: str, given: Any, base: TrainConfig) -> Dimension:
    if name not in TrainConfig.model_fields:
        near = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
        raise ValueError(
            f"space: {shown(name, LONGEST_VALUE)}: no such setting; "
            + (f"did you mean {near[0]}?" if near else "see --help")
        )
    if name == CLOCK:
        raise ValueError(f"space: {name}: is the clock of the search and cannot vary; set --epochs instead")
    if name in SHARED:
        raise ValueError(f"space: {name}: is the same for all trials; set --{name.replace('_', '-')} instead")
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise ValueError(f"space: {name} = {quoted(given)}: expected one of {', '.join(KINDS)}, {EXAMPLE}")
    kind, values = next(iter(given.items()))
    said = f"space: {name} = {kind} {quoted(values)}"
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{said}: expected a list of values")
    values = [_number(value) for value in values]
    dimension = Dimension(name, kind, tuple(values))
    if dimension.listed:
        if len(set(map(repr, values))) < len(values):
            raise ValueError(f"{said}: a value is there twice")
    else:
        _check_ends(said, name, kind, values)
    every = range(values[0], values[1] + 1)[:CHECKED] if kind == "randint" else values
    for value in every:
        try:
            fitting = getattr(base.changed(**{name: value}), name)
        except ValueError as error:
            raise ValueError(f"space: {error}") from None
        if name == "workers" and not str(value).isdigit():
            raise ValueError(f"{said}: a trial has a fixed number of workers, such as 2")
        if type(fitting) is not type(value) and not isinstance(fitting, float):
            raise ValueError(f"{said}: {quoted(value)} should be a {type(fitting).__name__}")
    return dimension


def _number(value: Any) -> Any:
    """YAML takes 1e-5 for a text: it wants 1.0e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_ends(said: str, name: str, kind: str, values: Any) -> None:
    if len(values) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{said}: expected two numbers, the low and the high end, {EXAMPLE}")
    low, high = values
    if not low < high:
        raise ValueError(f"{said}: empty; the low end {low:g} is not below the high end {high:g}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{said}: a logarithmic range begins above 0, such as at 1e-6")
    field = TrainConfig.model_fields[name].annotation
    kinds = typing.get_args(field) if isinstance(field, types.UnionType) else (field,)
    whole = int in kinds and float not in kinds
    if not whole and float not in kinds:
        raise ValueError(f"{said}: is no number; use choice")
    if whole != (kind == "randint"):
        better = "randint or choice" if whole else "uniform or loguniform"
        raise ValueError(f"{said}: is a {'whole' if whole else 'real'} number; use {better}")
    if whole and not all(isinstance(v, int) for v in values):
        raise ValueError(f"{said}: expected whole numbers")
