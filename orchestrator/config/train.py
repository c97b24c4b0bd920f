"""Every setting of a training run: one frozen, validated model, in groups. Flags, YAML and help are made from it."""

import re
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.config.models import make_model


class NetSettings(BaseModel):
    """The net."""

    preset: Literal["paper"] = Field("paper", description="which AlexNet; paper is the two-column net of the text")
    width: float = Field(1.0, gt=0, le=4, description="factor on the number of maps and units of every layer")
    input_size: int = Field(224, ge=64, description="side in pixels of the square crop that the net sees")
    num_classes: int | None = Field(None, ge=2, description="outputs; automatic is as many as the data has classes")
    init: Literal["paper", "he"] = Field(
        "paper", description="paper: N(0, 0.01), biases of 1; he: scaled by fan-in, for small data"
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="probability of zeroing a unit of fc6 and fc7")
    lrn_k: float = Field(2.0, gt=0, description="LRN: k in (k + alpha * SUM a^2) ** beta")
    lrn_n: int = Field(5, ge=1, description="LRN: adjacent maps in the sum; odd")
    lrn_alpha: float = Field(
        1e-4, ge=0, description="LRN: alpha, multiplying the plain sum as in the paper (PyTorch's is n times this)"
    )
    lrn_beta: float = Field(0.75, ge=0, description="LRN: beta, the exponent")


class InputSettings(BaseModel):
    """The images."""

    data: str = Field("digits", description="folder or URI made by jobs/prepare.py, or digits: the embedded data")
    flip: bool = Field(True, description="mirror half of the training images left to right")
    color_noise: Literal["none", "paper", "code2012"] = Field(
        "paper", description="PCA colour shift: by eigenvalue (paper's text), by deviation (2012 source), or none"
    )
    pixel_scale: float = Field(
        1.0, gt=0, description="factor on the mean-subtracted pixels; the paper's net sees -255 to 255"
    )
    shuffle_window: int = Field(
        4096, ge=1, description="rows among which each epoch's order is mixed, beside the order of row groups"
    )


class OptimizerSettings(BaseModel):
    """The optimizer."""

    epochs: int = Field(90, ge=1, description="passes over the training set")
    global_batch_size: int = Field(128, ge=1, description="images an update, over all workers together")
    lr: float = Field(0.01, gt=0, description="learning rate at the start")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the velocity")
    weight_decay: float = Field(0.0005, ge=0, description="of every weight and bias, times the rate")
    lr_drops: int = Field(3, ge=0, description="how often the rate is divided by 10 when validation stops improving")
    lr_patience: int = Field(5, ge=0, description="validations without a new best before the rate drops")
    seed: int = Field(0, ge=0, lt=2**40, description="of the weights, the order and all augmentation")


class WorkerSettings(BaseModel):
    """The workers."""

    workers: int | str = Field(
        1, description="Ray Train workers; a range such as 2..8 follows the cluster as nodes leave and come"
    )
    layout: Literal["auto", "single", "data", "columns", "hybrid"] = Field(
        "auto",
        description="how the net lies over the workers: columns is a worker a column (paper), data a whole net each, "
        "hybrid data parallel convolutions and model parallel fc layers; auto takes the cheapest and says why",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto: a GPU for each worker if the cluster has any"
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto",
        description="of the arithmetic; auto: bf16 where the hardware is fast at it, else fp32; "
        "fp64: slow, and the same losses in every layout to many digits",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each worker; automatic is an equal share of its machine's"
    )
    spread: bool = Field(
        False, description="a worker a node, for machines with one GPU each: columns then speak over the network"
    )
    max_failures: int = Field(
        2, ge=0, description="crashed workers to survive, from the last checkpoint; a lost node does not count"
    )


class TrainConfig(WorkerSettings, OptimizerSettings, InputSettings, NetSettings):
    """One training run, resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lrn_n % 2 == 0:
            raise ValueError(f"lrn_n = {self.lrn_n}: the window is centred on a map, so n must be odd, such as 5")
        parse_workers(self.workers)
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the greatest number of workers."""
        return parse_workers(self.workers)

    def changed(self, **fields: Any) -> "TrainConfig":
        """A copy with some fields changed, validated again. Raises ValueError of one line."""
        return make_config(**self.model_dump() | fields)

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return text


def parse_workers(text: str | int) -> tuple[int, int]:
    """ "4" to (4, 4), "2..8" to (2, 8). Raises ValueError."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(text).strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ValueError(f"workers = {text!r}: expected a number such as 4, or a range such as 2..8")
    return low, high


def make_config(**fields: Any) -> TrainConfig:
    """Raises ValueError of one line that names the field, its value and what is wrong with it."""
    return make_model(TrainConfig, **fields)
