"""The entries of a search's journal.jsonl, one JSON object per line, told apart by `event` (docs/formats.md).

Fields are written in the order in which they are declared here, between `event` and `at_s`, the search's age in
seconds.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SCHEMA_VERSION = 1  # of the file; those written before it had one begin without a Header
Status = Literal["RUNNING", "FINISHED", "STOPPED", "FAILED"]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Header:
    """The first line of the file."""

    event: ClassVar = "journal"
    schema_version: int


@dataclass(frozen=True)
class SearchBegun:
    """The search has a parent run in MLflow."""

    event: ClassVar = "search"
    run_id: str


@dataclass(frozen=True)
class TrialProposed:
    """A trial was drawn; `values` are those of the settings that vary."""

    event: ClassVar = "trial"
    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RunBegun:
    """The trial has a run in MLflow."""

    event: ClassVar = "run"
    number: int
    run_id: str


@dataclass(frozen=True)
class WorkersStarted:
    """The trial's workers are training; benchmarks/search_overhead.py reads it."""

    event: ClassVar = "started"
    number: int
    after_s: float  # since the trial was asked for


@dataclass(frozen=True)
class EpochEnded:
    """The trial was trained and validated for one more epoch."""

    event: ClassVar = "epoch"
    number: int
    metrics: Metrics


@dataclass(frozen=True)
class Exploited:
    """The trial takes another's weights (population-based training)."""

    event: ClassVar = "exploit"
    number: int
    donor: int
    values: Mapping[str, Any]
    start: Mapping[str, Any]  # checkpoint, epoch, and lr: the donor's initial learning rate


@dataclass(frozen=True)
class TrialEnded:
    """The trial will not be trained any further."""

    event: ClassVar = "end"
    number: int
    status: Status
    error: str | None = None


@dataclass(frozen=True)
class CostSoFar:
    """What all nodes have cost, in US dollars."""

    event: ClassVar = "cost"
    usd: float


Entry = (
    Header | SearchBegun | TrialProposed | RunBegun | WorkersStarted | EpochEnded | Exploited | TrialEnded | CostSoFar
)
KINDS: dict[str, type[Entry]] = {
    kind.event: kind
    for kind in (
        Header, SearchBegun, TrialProposed, RunBegun, WorkersStarted, EpochEnded, Exploited, TrialEnded, CostSoFar
    )
}  # fmt: skip


def to_json(entry: Entry, at_s: float) -> dict[str, Any]:
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return {"event": entry.event, **fields, "at_s": at_s}


def from_json(document: dict[str, Any]) -> tuple[Entry, float]:
    """The entry and its `at_s`. Raises ValueError, KeyError or TypeError for what is no entry."""
    fields = dict(document)
    event, at_s = fields.pop("event"), float(fields.pop("at_s"))
    if event not in KINDS:
        raise ValueError(f"{event!r} is not an event of a search")
    return KINDS[event](**fields), at_s
