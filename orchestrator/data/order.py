"""The order in which rows are taken, for the shards of a preparation and the batches of an epoch. Pure functions.

Rows lie in row groups, the unit in which Parquet is read, so an order is over groups first and over rows second.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.shards import Shard

PROBE_SHARE = 20  # of the training rows, one in so many at most
PROBE_MOST = 10_000
PROBE_KEY = 1  # beside the seed, so that the order is not that of an epoch


def row_groups(shards: tuple[Shard, ...]) -> list[tuple[int, int, int]]:
    """(shard, row group in the shard, rows in the group) for all row groups."""
    return [(s, g, rows) for s, shard in enumerate(shards) for g, rows in enumerate(shard.row_groups)]


def rank_slice(step: int, num_rows: int, global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where a worker's part of a global batch begins and ends in the order.

    The last batch may be smaller; it is shared as evenly as possible, so a worker's part of it can be empty.
    """
    first = step * global_batch_size
    size = min(global_batch_size, num_rows - first)
    return first + size * rank // world_size, first + size * (rank + 1) // world_size


def batch_parts(
    step: int, num_rows: int, global_batch_size: int, world_size: int, accumulate: int
) -> list[list[tuple[int, int]]]:
    """The parts in which a global batch is computed: of each, where every worker's images begin and end in the order.

    Every worker cuts its own images into as many parts, as equal as may be. Of a small last batch some can be empty;
    those in which no worker has an image are left out.
    """
    slices = [rank_slice(step, num_rows, global_batch_size, rank, world_size) for rank in range(world_size)]
    parts = [
        [(lo + (hi - lo) * part // accumulate, lo + (hi - lo) * (part + 1) // accumulate) for lo, hi in slices]
        for part in range(accumulate)
    ]
    return [part for part in parts if any(lo < hi for lo, hi in part)]


def rows_of_pass(kind: str, rows: Mapping[str, int]) -> int:
    """Rows of a pass, from those of each split.

    probe: training rows on which errors are measured as on validation rows. As many as of val, so that both errors are
    as certain; but at most a twentieth of train, which takes about 2 % as long as training on all of it
    (benchmarks/freeze.py), and 10,000, whose error has a standard error of half a point.
    """
    if kind != "probe":
        return rows[kind]
    return min(rows["val"], max(1, rows["train"] // PROBE_SHARE), PROBE_MOST)


@dataclass(frozen=True)
class Order:
    """The rows of one pass, in order."""

    group: NDArray[np.int32]  # (N,) which row group
    row: NDArray[np.int32]  # (N,) which row of it

    def __len__(self) -> int:
        return len(self.group)


def plan_epoch(rows_per_group: NDArray[np.int64], *, seed: int, epoch: int, window: int) -> Order:
    """The row groups in random order, then their rows shuffled within windows of about `window` rows."""
    random = np.random.default_rng([seed, epoch])
    permuted = random.permutation(len(rows_per_group))
    group = np.repeat(permuted, rows_per_group[permuted]).astype(np.int32)
    starts = np.cumsum(rows_per_group[permuted]) - rows_per_group[permuted]
    row = (np.arange(len(group)) - np.repeat(starts, rows_per_group[permuted])).astype(np.int32)
    # rows are sorted by window, then by a random number; a window begins at the beginning of a row group
    key = np.repeat(starts // window, rows_per_group[permuted]) + random.random(len(group))
    mixed = np.argsort(key, kind="stable")
    return Order(group[mixed], row[mixed])


def plan_validation(rows_per_group: NDArray[np.int64]) -> Order:
    """All rows, as stored."""
    group = np.repeat(np.arange(len(rows_per_group)), rows_per_group).astype(np.int32)
    starts = np.cumsum(rows_per_group) - rows_per_group
    return Order(group, (np.arange(len(group)) - np.repeat(starts, rows_per_group)).astype(np.int32))


def plan_probe(rows_per_group: NDArray[np.int64], *, seed: int, num_rows: int) -> Order:
    """The same `num_rows` training rows in every epoch: row groups drawn by the seed, whole but for the last.

    Few groups are read, and not some rows of all. Rows lie where a shuffle put them, so any groups are a fair sample.
    """
    drawn = np.random.default_rng([seed, 0, PROBE_KEY]).permutation(len(rows_per_group))
    group = np.repeat(drawn, rows_per_group[drawn]).astype(np.int32)
    starts = np.cumsum(rows_per_group[drawn]) - rows_per_group[drawn]
    row = (np.arange(len(group)) - np.repeat(starts, rows_per_group[drawn])).astype(np.int32)
    return Order(group[:num_rows], row[:num_rows])
