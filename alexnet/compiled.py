"""Functions that numba compiles, and the threads on which they run."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

_pool: ThreadPoolExecutor | None = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # "contract" and the others leave NaN and infinity alone: a diverged net must look diverged.
    found: Callable[..., Any] = numba.njit(
        nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"}
    )(function)
    return found


def split(call: Callable[[int, int], Any], number: int, at_least: int) -> None:
    """Call for ranges (from, to) that make up `number`, on torch's number of threads, of at least `at_least` each.

    What is compiled holds no lock, so that the calls run at the same time; numba's own threads may not be shared.
    """
    num_threads = max(1, min(torch.get_num_threads(), number // at_least))
    first, *others = pairwise(np.linspace(0, number, num_threads + 1).astype(int).tolist())
    futures = [_threads().submit(call, *bounds) for bounds in others]
    call(*first)
    for future in futures:
        future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compiled")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads
