"""One step: a batch through the net."""

import warnings
from typing import Any

import torch
from torch import Tensor

CUT = ("top", "left", "flip", "label")  # what travels beside an image's pixels


def as_tensor(array: Any) -> Tensor:
    """A tensor over the array's memory, which may be read-only: the caller does not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
