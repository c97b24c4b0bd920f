"""Orders of rows that lie in groups, such as those of Parquet files: pure functions of what they are given."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.shards import Shard


def row_groups(shards: tuple[Shard, ...]) -> list[tuple[int, int, int]]:
    """(shard, row group within it, rows) of all row groups."""
    return [(s, g, rows) for s, shard in enumerate(shards) for g, rows in enumerate(shard.row_groups)]


def rank_slice(step: int, num_rows: int, global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where in the order a worker's part of a global batch begins and ends; the last batch may be smaller.

    A short last batch is shared as evenly as it goes, so a worker's part of it can be empty.
    """
    first = step * global_batch_size
    size = min(global_batch_size, num_rows - first)
    return first + size * rank // world_size, first + size * (rank + 1) // world_size


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
