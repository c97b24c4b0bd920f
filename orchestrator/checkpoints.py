"""What a run needs to go on: weights and velocities as safetensors, the rest as JSON. Nothing is pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet import PaperSGD

WEIGHTS = "model.safetensors"  # the canonical state dict (alexnet/net.py)
VELOCITIES = "velocity.safetensors"  # of the update rule, under the same names
STATE = "state.json"


class State(BaseModel):
    """Where a run is."""

    model_config = ConfigDict(extra="forbid")
    epoch: int = 0  # passes completed
    step: int = 0  # updates made
    history: list[dict[str, int | float]] = []  # one entry an epoch


def save(folder: Path, net: nn.Module, optimizer: PaperSGD, schedule: ReduceLROnPlateau, state: State) -> None:
    """Write a checkpoint into an empty folder."""
    velocities = {
        name: optimizer.state[param]["velocity"].contiguous()
        for name, param in net.named_parameters()
        if param in optimizer.state
    }
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / WEIGHTS)
    save_file(velocities, folder / VELOCITIES)
    rest = {
        "state": state.model_dump(),
        "lr": [group["lr"] for group in optimizer.param_groups],
        "schedule": schedule.state_dict(),
    }
    (folder / STATE).write_text(json.dumps(rest, indent=1))


def load(folder: Path, net: nn.Module, optimizer: PaperSGD, schedule: ReduceLROnPlateau) -> State:
    """Put net, optimizer and schedule back to where `save` found them."""
    net.load_state_dict(load_file(folder / WEIGHTS))
    velocities = load_file(folder / VELOCITIES)
    for name, param in net.named_parameters():
        if name in velocities:
            optimizer.state[param]["velocity"] = torch.empty_like(param).copy_(velocities[name])
    rest: dict[str, Any] = json.loads((folder / STATE).read_text())
    for group, lr in zip(optimizer.param_groups, rest["lr"], strict=True):
        group["lr"] = lr
    schedule.load_state_dict(rest["schedule"])
    return State(**rest["state"])
