"""The settings of a training run: one frozen, validated model, in groups. Flags, YAML and --help come from it."""

import re
from dataclasses import asdict, replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from alexnet.presets import LRN, PRESETS, Preset, preset_of
from orchestrator.config.layers import canonical_factors, canonical_freeze, layer_factors
from orchestrator.config.models import dump_yaml, make_model, refuse_yes


def _own(values: dict[str, float]) -> str:
    """How the help tells a default that depends on the preset."""
    return "automatic: the preset's own, " + ", ".join(f"{value:g} of {name}" for name, value in values.items())


_NETS = "; ".join(f"{preset.name}: {preset.title}" for preset in PRESETS.values())
_LRN = {name: preset.lrn for name, preset in PRESETS.items() if preset.lrn}


TRUST_COEFFICIENT = 0.001  # You et al. 2017, and the solvers that its authors published
LRN_SETTINGS = ("lrn_k", "lrn_n", "lrn_alpha", "lrn_beta")


class NetSettings(BaseModel):
    """The net."""

    preset: str = Field("paper", description=f"which AlexNet; {_NETS}")
    width: float = Field(1.0, gt=0, le=4, description="multiplies the number of maps and units of every layer")
    input_size: int | None = Field(
        None,
        ge=64,
        description="side of the square input crop, in pixels; "
        + _own({name: preset.input_size for name, preset in PRESETS.items()}),
    )
    num_classes: int | None = Field(None, ge=2, description="outputs of the net; automatic: one per class of the data")
    init: Literal["paper", "he"] = Field(
        "paper",
        description="paper: the preset's own, of the paper N(0, 0.01), biases of 1; he: by fan-in, for small data",
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout probability of fc6 and fc7")
    lrn_k: float | None = Field(
        None,
        gt=0,
        description="LRN: k in (k + alpha * SUM a^2) ** beta; " + _own({name: lrn.k for name, lrn in _LRN.items()}),
    )
    lrn_n: int | None = Field(
        None,
        ge=1,
        description="LRN: number of adjacent maps in the sum, odd; "
        + _own({name: lrn.n for name, lrn in _LRN.items()}),
    )
    lrn_alpha: float | None = Field(
        None,
        ge=0,
        description="LRN: alpha, the factor on the plain sum as in the paper (PyTorch's and Caffe's is n times this); "
        + _own({name: lrn.alpha for name, lrn in _LRN.items()}),
    )
    lrn_beta: float | None = Field(
        None, ge=0, description="LRN: beta, the exponent; " + _own({name: lrn.beta for name, lrn in _LRN.items()})
    )


class InputSettings(BaseModel):
    """The images."""

    data: str = Field("digits", description="folder or URI written by jobs/prepare.py, or digits: the bundled dataset")
    flip: bool = Field(True, description="mirror half of the training images horizontally")
    color_noise: Literal["none", "paper", "code2012"] = Field(
        "paper",
        description="PCA colour augmentation: scaled by eigenvalue (paper), by its square root (code2012), or none",
    )
    pixel_scale: float = Field(
        1.0, gt=0, description="multiplies the pixels after the mean is subtracted; the paper's net sees -255 to 255"
    )
    shuffle_window: int = Field(
        4096, ge=1, description="rows shuffled together in each epoch, after the row groups are shuffled"
    )


class OptimizerSettings(BaseModel):
    """The optimizer."""

    epochs: int = Field(90, ge=1, description="passes over the training set")
    global_batch_size: int = Field(128, ge=1, description="images per update, over all workers")
    optimizer: Literal["sgd", "lars"] = Field(
        "sgd",
        description="update rule; sgd: the paper's, with momentum; lars: for large batches, with rates of its own for "
        "every layer (You et al. 2017), whose --lr is around 10",
    )
    trust_coefficient: float = Field(
        TRUST_COEFFICIENT,
        gt=0,
        description="lars: a layer's rate is lr times this, times the norm of its weights over that of its gradient; "
        "of biases it is lr times this",
    )
    lr: float = Field(0.01, gt=0, description="initial learning rate; with warmup_epochs, that after the warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the update")
    weight_decay: float = Field(
        0.0005,
        ge=0,
        description="weight decay of all weights and, but for lars, biases, multiplied by the learning rate",
    )
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        description="epochs, such as 2.5, over whose steps the learning rate rises linearly to lr (Goyal et al. 2017)",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay, such as 0.999, of an exponential moving average of the weights, which then takes their "
        "place in validation and in the saved model; 0: none",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="weights of the classes in the training loss; balanced: inversely proportional to their numbers of "
        "training images, 1 on average over the images",
    )
    lr_drops: int = Field(
        3, ge=0, description="how often at most the learning rate is divided by 10, when validation stops improving"
    )
    lr_patience: int = Field(5, ge=0, description="epochs without improvement before the learning rate drops")
    seed: int = Field(
        0, ge=0, lt=2**40, description="seed of the initial weights, the order of the images and the augmentation"
    )


class LayerSettings(BaseModel):
    """What single layers learn."""

    freeze: str = Field(
        "none",
        description="layers that keep their weights, such as conv1,conv2; conv and fc mean all of a kind",
    )
    lr_factor: str = Field(
        "none",
        description="factors on the learning rate of layers, such as conv=0.1,fc8=10; a layer's own wins over its "
        "group's, conv or fc",
    )


class CheckpointSettings(BaseModel):
    """The checkpoints."""

    keep_every: int = Field(
        0,
        ge=0,
        description="keep the weights of every so many epochs, beside the best and the last checkpoint; 0: none",
    )


class WorkerSettings(BaseModel):
    """The workers."""

    workers: int | str = Field(
        1, description="number of Ray Train workers; a range such as 2..8 adapts as nodes leave and join"
    )
    layout: Literal["auto", "single", "data", "columns", "hybrid"] = Field(
        "auto",
        description="how the model is partitioned: columns: one worker per column (paper); data: data parallel; "
        "hybrid: data-parallel convolutions and model-parallel fc layers; auto: the cheapest, with the reason printed",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto: one GPU per worker if the cluster has GPUs, else CPU"
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto",
        description="floating-point format; auto: bf16 where the hardware accelerates it, else fp32; "
        "fp64: slow, for comparing layouts to many digits",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a worker computes its images of an update, one after the other, adding up their "
        "gradients: less memory, the same result",
    )
    augment_on: Literal["feed", "device"] = Field(
        "feed",
        description="where images are cut, mirrored and coloured, with the same result; feed: on CPUs, which send what "
        "is cut out; device: where the net is, which gets whole images",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per worker; automatic: an equal share of the node's CPUs"
    )
    spread: bool = Field(
        False, description="one worker per node, for nodes with one GPU each; columns then communicate over the network"
    )
    max_failures: int = Field(
        2, ge=0, description="worker crashes to tolerate, resuming from the last checkpoint; a lost node does not count"
    )


class TrainConfig(CheckpointSettings, WorkerSettings, LayerSettings, OptimizerSettings, InputSettings, NetSettings):
    """All settings of one training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_yes(value, cls.model_fields[info.field_name or ""].annotation)

    @field_validator("workers")
    @classmethod
    def _one_form(cls, value: int | str) -> int | str:
        """Flags pass text: "2" and 2 must be equal wherever settings are compared."""
        low, high = parse_workers(value)
        return low if low == high else f"{low}..{high}"

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown; the presets are {', '.join(PRESETS)}")
        return value

    @field_validator("freeze")
    @classmethod
    def _one_order(cls, value: str) -> str:
        return canonical_freeze(value)

    @field_validator("lr_factor")
    @classmethod
    def _one_order_of_factors(cls, value: str) -> str:
        return canonical_factors(value)

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        layer_factors(self.freeze, self.lr_factor)  # raises
        return self

    @model_validator(mode="after")
    def _check_trust(self) -> Self:
        if self.optimizer != "lars" and self.trust_coefficient != TRUST_COEFFICIENT:
            raise ValueError(
                f"trust_coefficient = {self.trust_coefficient}: optimizer {self.optimizer} has none; leave it out, or "
                "choose optimizer lars"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs:g}: the run has epochs = {self.epochs}, so its rate would never "
                "be lr; warm up for fewer epochs"
            )
        return self

    @model_validator(mode="after")
    def _check_lrn(self) -> Self:
        given = {name: getattr(self, name) for name in LRN_SETTINGS if getattr(self, name) is not None}
        if given and not self.net.has_lrn:
            name, value = next(iter(given.items()))
            raise ValueError(f"{name} = {value}: preset {self.preset} has no LRN; leave it out")
        if self.lrn_n is not None and self.lrn_n % 2 == 0:
            raise ValueError(f"lrn_n = {self.lrn_n}: the window is centred on a map, so n must be odd, such as 5")
        return self

    @property
    def net(self) -> Preset:
        """The description of the net."""
        return preset_of(self.preset)

    @property
    def crop_size(self) -> int:
        """The side of the net's input: input_size, or the preset's own."""
        return self.input_size or self.net.input_size

    @property
    def lrn(self) -> LRN | None:
        """The constants of LRN: those set, and for the others the preset's own; None for a net without."""
        own = self.net.lrn
        if own is None:
            return None
        given = {name.removeprefix("lrn_"): getattr(self, name) for name in LRN_SETTINGS}
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def resolved(self) -> dict[str, Any]:
        """All settings, with the preset's own values in the place of those that are automatic by it."""
        lrn = {} if self.lrn is None else {f"lrn_{name}": value for name, value in asdict(self.lrn).items()}
        return self.model_dump() | {"input_size": self.crop_size} | lrn

    @property
    def images_at_once(self) -> int:
        """Images of a global batch that all workers together compute at a time."""
        return self.global_batch_size // self.accumulate

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        return parse_workers(self.workers)

    def changed(self, **fields: Any) -> "TrainConfig":
        """A copy with some fields changed, validated again. Raises ValueError of one line."""
        return make_config(**self.model_dump() | fields)

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump())


def parse_workers(text: str | int) -> tuple[int, int]:
    """Turn "4" into (4, 4) and "2..8" into (2, 8). Raises ValueError, without the field's name, which pydantic adds."""
    match = re.fullmatch(r"([0-9]+)(?:\.\.([0-9]+))?", str(text).strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ValueError("expected a number such as 4, or a range such as 2..8")
    return low, high


def make_config(**fields: Any) -> TrainConfig:
    """A validated TrainConfig. Raises ValueError of one line that names the field, its value and what is wrong."""
    return make_model(TrainConfig, **fields)
