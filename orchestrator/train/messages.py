"""All that processes tell each other: events from workers to the driver and on to whoever watches, and what a worker
or a trial is started with.

Frozen dataclasses, told apart by `kind`, of the standard library alone: the mailbox actor imports them, and must start
at once. Times are seconds, errors fractions in [0, 1]; an entry of a history is described in docs/formats.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Metrics = dict[str, Any]
DRIVER = -1  # the rank of a process that is no worker


@dataclass(frozen=True, kw_only=True)
class Started:
    """The workers are at work, from their checkpoint on."""

    precision: str  # fp32, bf16 or fp64
    device: str
    nodes: Sequence[str]  # Ray's node id of every rank
    epoch: int  # passes completed
    step: int  # of the epoch that was broken off
    history: Sequence[Metrics]
    workers: int = 0  # added by the driver
    lost: bool = False  # added by the driver: they replace workers of the same fit that were lost, with no error
    kind: Literal["started"] = "started"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step was made."""

    epoch: int  # passes completed
    epochs: int
    step: int  # of this epoch
    steps: int
    total_step: int
    loss: float  # mean of the last steps
    lr: float
    images_per_s: float
    log: bool  # whether it is a point of MLflow's train/step_loss
    kind: Literal["step"] = "step"


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch was trained and validated."""

    epochs: int
    metrics: Metrics
    history: Sequence[Metrics]
    wrong: Sequence[int] = ()  # of each class the validation images that are wrong at top 1
    kind: Literal["epoch"] = "epoch"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """All workers have stopped as they were asked to, and saved a checkpoint if they were asked for one."""

    epoch: int
    step: int
    kind: Literal["stopped"] = "stopped"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Training failed and would fail again: one line."""

    text: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True, kw_only=True)
class Raised:
    """A worker raised an exception, after which Ray Train starts all of them again, unless it did so often enough."""

    rank: int
    text: str  # one line
    kind: Literal["raised"] = "raised"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line for the user."""

    text: str
    kind: Literal["note"] = "note"


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A line for the user, of something that may need a hand."""

    text: str
    kind: Literal["warning"] = "warning"


@dataclass(frozen=True, kw_only=True)
class PlacementGroupMade:
    """The workers' placement group, in hexadecimal: whoever outlives the driver gives it back."""

    id: str
    kind: Literal["placement_group"] = "placement_group"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run is at its end; where its checkpoints are."""

    checkpoint: str | None
    best_checkpoint: str | None
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A line of a worker's log, for OUTPUT/NAME/run.log."""

    rank: int
    level: int  # of Python's logging
    name: str  # of its logger
    text: str
    at: float  # seconds since the epoch
    kind: Literal["log"] = "log"


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What a worker recorded for --profile: its steps; then, in a second one, the end of the epoch."""

    rank: int
    workers: int
    start: int  # the same of all workers that started together, and of no others
    part: bytes  # of orchestrator/train/profile_trace.py
    kind: Literal["profile"] = "profile"


Event = (
    Started
    | Step
    | EpochEnded
    | Stopped
    | Failed
    | Raised
    | Note
    | Warned
    | PlacementGroupMade
    | Finished
    | Logged
    | Profiled
)


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial's workers are at work."""

    after_s: float  # since the trial was asked for
    epoch: int
    lost: bool
    kind: Literal["trial_started"] = "trial_started"


@dataclass(frozen=True, kw_only=True)
class TrialEvent:
    """What a trial of a search tells the search's driver."""

    number: int
    event: TrialStarted | Step | Warned | PlacementGroupMade | Logged
    kind: Literal["trial"] = "trial"


@dataclass(frozen=True, kw_only=True)
class StartFrom:
    """Another run's checkpoint, for a run that has none of its own."""

    checkpoint: str  # a StoragePath's text
    lr: float  # that run's initial rate
    epoch: int = 0  # passes it had completed


@dataclass(frozen=True, kw_only=True)
class WorkerPayload:
    """What a worker is started with."""

    config: Mapping[str, Any]  # of TrainConfig, validated again by the worker
    data: str  # a StoragePath's text
    layout: str
    mailbox: Any  # the actor
    topic: str  # of this start of the workers
    run: str  # the run's folder, a StoragePath's text
    start: StartFrom | None
    feed_cpus: float  # of each Ray Data task
    feed_tasks: int  # of this worker, at a time
    num_concurrent: int  # runs that share the cluster
    profile: int = 0  # steps to record


@dataclass(frozen=True, kw_only=True)
class TrialPayload:
    """What all trials of a search have in common."""

    train: Mapping[str, Any]  # of TrainConfig
    data: str
    output: str  # where their runs are
    num_classes: int
    num_concurrent: int
    mailbox: Any
    keep_every: int | None  # epochs; of a population: how often a checkpoint is set aside


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What sets one trial apart."""

    number: int
    values: Mapping[str, Any]  # of the settings that vary
    start: StartFrom | None
    folder: str  # the name of its run
