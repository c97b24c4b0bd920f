"""What a run resumes from: weights and velocities as safetensors, the rest as JSON. Nothing is pickled.

A checkpoint is canonical: the whole net's tensors under the whole net's names, whatever layout wrote it, so any layout
on any number of workers can resume from it.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet import PaperSGD
from alexnet.layouts import ShardedNet
from orchestrator.base.schema import KEY, check_version, load_json
from orchestrator.train.run_folder import CHECKPOINT_PREFIX

WEIGHTS = "model.safetensors"  # the canonical state dict (alexnet/net.py)
VELOCITIES = "velocity.safetensors"  # of the update rule, under the same names
STATE = "state.json"
STATE_VERSION = 1  # of state.json; 0, without the key, is read too


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


def save(folder: Path | None, net: ShardedNet, optimizer: PaperSGD, schedule: ReduceLROnPlateau, state: State) -> None:
    """Write a checkpoint into an empty folder.

    All workers of a group call this together. Its first has a folder and writes, one tensor at a time; the others have
    None.
    """
    part = net.part
    weights = {name: param.detach() for name, param in part.named_parameters()}
    velocities = {
        name: optimizer.state[param]["velocity"] for name, param in part.named_parameters() if param in optimizer.state
    }
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


def load(folder: Path, net: ShardedNet, optimizer: PaperSGD, schedule: ReduceLROnPlateau) -> State:
    """Restore a worker's part of the net, its optimizer and its schedule to what `save` found.

    Raises ValueError for a checkpoint of another net, and for one that a newer version wrote.
    """
    rest: dict[str, Any] = load_json((folder / STATE).read_bytes())
    check_version(rest, STATE_VERSION, folder / STATE)
    params = dict(net.part.named_parameters())
    weights = dict(_read(folder / WEIGHTS, net))
    if weights.keys() != params.keys():
        wrong = sorted(weights.keys() ^ params.keys())[0]
        raise ValueError(f"{folder / WEIGHTS}: {wrong} is in the checkpoint or in the net, but not in both")
    for name, weight in weights.items():
        if weight.shape != params[name].shape:
            has, wants = (" x ".join(map(str, tensor.shape)) for tensor in (weight, params[name]))
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {has} there, and {wants} in this net: use data with the same classes, "
                "and the settings of the net it was saved from"
            )
    with torch.no_grad():
        for name, weight in weights.items():
            params[name].copy_(weight)
        for name, velocity in _read(folder / VELOCITIES, net):
            optimizer.state[params[name]]["velocity"] = torch.empty_like(params[name]).copy_(velocity)
    for group, lr in zip(optimizer.param_groups, rest["lr"], strict=True):
        group["lr"] = lr
    schedule.load_state_dict(rest["schedule"])
    return State(**rest["state"])


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


def _read(path: Path, net: ShardedNet) -> Iterator[tuple[str, Tensor]]:
    """This worker's part of every tensor in the file; nothing else of it is read."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            tensor = file.get_slice(name)
            yield name, tensor[net.local_slice(name, tensor.get_shape()[net.layout.shard_dim(name)])]
