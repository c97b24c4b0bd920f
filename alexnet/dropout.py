"""Dropout whose mask depends on the image, not on the process that computes it (paper, 4.2).

N images, U units of a layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchPosition(NamedTuple):
    """What the randomness of a batch's images depends on."""

    seed: int
    step: int  # updates made before this one
    position: Tensor  # (N,) int64, of each image in the global batch


class Dropout(nn.Module):
    """Zero each unit with probability p in training and scale the others by 1 / (1 - p); at test change nothing.

    The paper multiplies by 1 - p at test instead: the same function. What is zeroed depends on (seed, step, position
    in the global batch, layer, unit) alone, so any worker can draw its part of the mask and no layout changes it.
    Without a BatchPosition the mask comes from torch's global generator.
    """

    def __init__(self, p: float, layer: int, first_unit: int = 0) -> None:
        """first_unit: this worker's first of the layer's units, where it holds only some of them."""
        super().__init__()
        self.p, self.layer, self.first_unit = p, layer, first_unit

    def forward(self, x_NU: Tensor, where: BatchPosition | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return x_NU
        if where is None:
            return F.dropout(x_NU, self.p)
        units = range(self.first_unit, self.first_unit + x_NU.shape[1])
        return x_NU * (keep_mask(where, self.layer, units, self.p).to(x_NU.dtype) * (1 / (1 - self.p)))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def keep_mask(where: BatchPosition, layer: int, units: range, p: float) -> Tensor:
    """(N, U) bool: which of these units of a layer survive.

    A counter-based hash (SplitMix64's finaliser, Steele et al. 2014) makes 64 bits for every two units of an image.
    """
    key = _mix_int(_mix_int(_mix_int(where.seed) ^ where.step) + layer)
    rows = _mix(where.position.long() + _signed(key))
    first, last = units.start // 2, (units.stop + 1) // 2
    words = torch.arange(first + 1, last + 1, device=rows.device) * _signed(_GOLDEN)
    bits = _mix(rows[:, None] + words[None, :]).view(torch.int32)  # (N, 2 * words)
    skipped = units.start - 2 * first
    return bits[:, skipped : skipped + len(units)] >= round(p * 2**32) - 2**31


_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around; shifts are made logical by masks."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(_MIX1)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(_MIX2)
    return z ^ ((z >> 31) & (2**33 - 1))


def _mix_int(z: int) -> int:
    z = (z + _GOLDEN) % 2**64
    z = (z ^ (z >> 30)) * _MIX1 % 2**64
    z = (z ^ (z >> 27)) * _MIX2 % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
