"""What a run resumes from: weights and velocities as safetensors, the rest as JSON. Nothing is pickled.

A checkpoint is canonical: the whole net's tensors under the whole net's names, whatever layout wrote it, so any layout
on any number of workers can resume from it.
"""

import json
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet import PaperSGD, WeightAverage
from alexnet.layouts import ShardedNet
from alexnet.trained import WEIGHTS
from orchestrator.base.schema import KEY, check_version, load_json
from orchestrator.base.shown import LONGEST_VALUE, count_of, quoted, shown
from orchestrator.train.run_folder import CHECKPOINT_PREFIX

LAST_WEIGHTS = "last.safetensors"  # of a run with an average of its weights, which then is in WEIGHTS
VELOCITIES = "velocity.safetensors"  # of the update rule, under the same names
STATE = "state.json"
LONGEST_REASON = 200  # characters
NEEDED = {"best", "num_bad_epochs", "last_epoch"}  # of PyTorch's schedule
STATE_VERSION = 2  # of state.json: beside a record.json (record.py); 1, and 0 without the key, are read too


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """The folder's name for a checkpoint after whole epochs and, within the next, steps."""
    return f"{CHECKPOINT_PREFIX}{epoch:04d}" + (f"-step-{step:06d}" if step else "")


class State(BaseModel):
    """Where a run is. Order, augmentation and dropout are functions of it and of the seed: there is no other state."""

    model_config = ConfigDict(extra="forbid")
    epoch: int = 0  # passes completed
    step: int = 0  # updates made
    losses: list[float] = []  # of the steps of an unfinished epoch
    digest: str = ""  # of the data it was trained on
    history: list[dict[str, int | float]] = []  # one entry per epoch


def save(
    folder: Path | None,
    net: ShardedNet,
    optimizer: PaperSGD,
    schedule: ReduceLROnPlateau,
    state: State,
    average: WeightAverage | None = None,
) -> None:
    """Write a checkpoint into an empty folder: as its weights the average, if there is one, for whoever uses them.

    All workers of a group call this together. Its first has a folder and writes, one tensor at a time; the others have
    None.
    """
    part = net.part
    weights = {name: param.detach() for name, param in part.named_parameters()}
    velocities = {
        name: optimizer.state[param]["velocity"] for name, param in part.named_parameters() if param in optimizer.state
    }
    if average is not None:
        _write(folder and folder / LAST_WEIGHTS, net, weights)
        weights = average.weights
    _write(folder and folder / WEIGHTS, net, weights)
    _write(folder and folder / VELOCITIES, net, velocities)
    if folder:
        rest = {
            KEY: STATE_VERSION,
            "state": state.model_dump(),
            "lr": [group["lr"] for group in optimizer.param_groups],
            "schedule": schedule.state_dict(),
        }
        (folder / STATE).write_text(json.dumps(rest, indent=1))


def load(
    folder: Path,
    net: ShardedNet,
    optimizer: PaperSGD,
    schedule: ReduceLROnPlateau,
    average: WeightAverage | None = None,
) -> State:
    """Restore a worker's part of the net, its optimizer, its schedule and its average to what `save` found.

    An average that the checkpoint lacks begins with its weights. Raises ValueError for a checkpoint of another net, and
    for one that a newer version wrote.
    """
    rest, state = _read_state(folder / STATE, len(optimizer.param_groups), schedule.state_dict())
    params = dict(net.part.named_parameters())
    saved = _weights(folder / WEIGHTS, net)
    last = _weights(folder / LAST_WEIGHTS, net) if (folder / LAST_WEIGHTS).exists() else saved
    with torch.no_grad():
        for name, weight in last.items():
            params[name].copy_(weight)
        if average is not None:
            for name, weight in average.weights.items():
                weight.copy_(saved[name])
        for name, velocity in parts_of(folder / VELOCITIES, net):
            if name not in params or velocity.shape != params[name].shape:
                raise ValueError(f"{folder / VELOCITIES}: damaged: {quoted(name)} is the velocity of no weight")
            optimizer.state[params[name]]["velocity"] = torch.empty_like(params[name]).copy_(velocity)
    for group, lr in zip(optimizer.param_groups, rest["lr"], strict=True):
        group["lr"] = lr
    schedule.load_state_dict(rest["schedule"])
    return state


def _weights(path: Path, net: ShardedNet) -> dict[str, Tensor]:
    """This worker's part of the weights in a file. Raises ValueError of one line for those of another net."""
    params = dict(net.part.named_parameters())
    weights = dict(parts_of(path, net))
    if weights.keys() != params.keys():
        wrong = sorted(weights.keys() ^ params.keys())[0]
        raise ValueError(f"{path}: {shown(wrong, LONGEST_VALUE)} is in the checkpoint or in the net, but not in both")
    for name, weight in weights.items():
        if weight.shape != params[name].shape:
            has, wants = (" x ".join(map(str, tensor.shape)) for tensor in (weight, params[name]))
            raise ValueError(
                f"{path}: {name} is {has} there, and {wants} in this net: use data with the same classes, and the "
                "settings of the net it was saved from"
            )
    return weights


def _read_state(path: Path, num_rates: int, schedule: dict[str, Any]) -> tuple[dict[str, Any], State]:
    """The content of a state.json, whose parts are of the kinds of the run's own. Raises ValueError of one line that
    names the file and the field."""
    try:
        rest = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: is not JSON ({shown(error, LONGEST_VALUE)}); resume from another checkpoint"
        ) from None
    if not isinstance(rest, dict):
        raise ValueError(f"{path}: is not a JSON object; resume from another checkpoint")
    check_version(rest, STATE_VERSION, path)
    lr, there = rest.get("lr"), rest.get("schedule")
    wrong = None
    if not (isinstance(lr, list) and len(lr) == num_rates and all(_is_number(rate) for rate in lr)):
        wrong = f"lr is {quoted(lr)}; expected {count_of(num_rates, 'number')}"
    elif not isinstance(there, dict) or not there.keys() >= NEEDED:
        wrong = f"schedule is {quoted(there)}; expected the fields {', '.join(sorted(NEEDED))}"
    else:
        odd = next((name for name in schedule if name in there and not _alike(there[name], schedule[name])), None)
        wrong = f"schedule.{odd} is {quoted(there[odd])}" if odd else None
    try:
        state = State.model_validate(rest.get("state"))
    except ValidationError as error:
        first = error.errors()[0]
        where = shown(".".join(map(str, ("state", *first["loc"]))), LONGEST_VALUE)
        wrong = f"{where}: {shown(first['msg'], LONGEST_VALUE)}"
    if wrong is not None:
        raise ValueError(f"{path}: damaged: {wrong}; resume from another checkpoint")
    return rest, state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alike(value: Any, known: Any) -> bool:
    """Whether two values are of one kind: numbers, lists of them, or none; or the same text, such as a mode's name."""
    if isinstance(known, list):
        return isinstance(value, list) and all(_is_number(each) for each in value)
    if known is None or _is_number(known):
        return value is None or _is_number(value) or (known is None and isinstance(value, list))
    return bool(value == known) if isinstance(known, str) else isinstance(value, type(known))


def scale_rate(factor: float, optimizer: PaperSGD, schedule: ReduceLROnPlateau) -> None:
    """Scale the rate and the floor of its drops, for a run that starts from another's checkpoint at its own rate.

    The velocities too: by the paper's rule they are sums of rate times gradient, and those of a high rate would carry
    the weights far away before a low rate could change their direction.
    """
    for group in optimizer.param_groups:
        group["lr"] *= factor
    for state in optimizer.state.values():
        state["velocity"].mul_(factor)
    schedule.min_lrs = [lr * factor for lr in schedule.min_lrs]


def _write(path: Path | None, net: ShardedNet, parts: dict[str, Tensor]) -> None:
    """A safetensors file, written one tensor at a time: no worker ever holds more than one whole tensor.

    The format (a length, a JSON header of names, types, shapes and offsets, the bytes) follows the safetensors
    documentation; the library's own writer needs all tensors at once.
    """
    tensors = net.gather_full(parts)
    if path is None:
        for _ in tensors:
            pass
        return
    header, end = {}, 0
    for name, part in parts.items():
        shape = net.canonical_shape(name, part)
        size = int(torch.Size(shape).numel()) * part.element_size()
        header[name] = {"dtype": _DTYPES[part.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, whole in tensors:
            assert whole is not None
            file.write(whole.contiguous().numpy().data)


_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def parts_of(path: Path, net: ShardedNet, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """This worker's part of every tensor in the file but those `without`; nothing else of it is read. Raises
    ValueError."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                if name in without:
                    continue
                tensor = file.get_slice(name)
                shape, kind = tensor.get_shape(), tensor.get_dtype()
                if kind not in _DTYPES.values() or len(shape) <= net.partition.shard_dim(name):
                    raise SafetensorError(f"{quoted(name)} is {kind} of shape {shape}")
                yield name, tensor[net.local_slice(name, shape[net.partition.shard_dim(name)])]
    except (SafetensorError, OSError) as error:
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__, LONGEST_REASON)
        raise ValueError(f"{path}: cannot be read: {reason}; resume from another checkpoint") from None
