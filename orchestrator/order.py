"""Orders of rows that lie in groups, such as those of Parquet files: pure functions of what they are given."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """The rows of one pass, in order: (N,) row group and row within it."""

    group: NDArray[np.int32]  # which of the groups
    row: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.group)


def plan_epoch(rows_per_group: NDArray[np.int64], *, seed: int, epoch: int, window: int) -> Order:
    """The row groups in a random order; then the rows of every `window` rows or so mixed among themselves."""
    random = np.random.default_rng([seed, epoch])
    permuted = random.permutation(len(rows_per_group))
    group = np.repeat(permuted, rows_per_group[permuted]).astype(np.int32)
    starts = np.cumsum(rows_per_group[permuted]) - rows_per_group[permuted]
    row = (np.arange(len(group)) - np.repeat(starts, rows_per_group[permuted])).astype(np.int32)
    # a row's place: its window, then a random number; windows are cut between row groups
    key = np.repeat(starts // window, rows_per_group[permuted]) + random.random(len(group))
    mixed = np.argsort(key, kind="stable")
    return Order(group[mixed], row[mixed])


def plan_validation(rows_per_group: NDArray[np.int64]) -> Order:
    """Every row once, as stored."""
    group = np.repeat(np.arange(len(rows_per_group)), rows_per_group).astype(np.int32)
    starts = np.cumsum(rows_per_group) - rows_per_group
    return Order(group, (np.arange(len(group)) - np.repeat(starts, rows_per_group)).astype(np.int32))
