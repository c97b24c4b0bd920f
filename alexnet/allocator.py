"""Large tensors on the CPU without a page fault for every 4 KB."""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next tensor; returns whether that was possible.

    By default glibc maps every tensor above a few megabytes anew and returns it to the kernel when it is freed, so each
    training step pays for clearing all of its pages again. In two runs one after the other, the full net
    trained at 91 images/s in bfloat16 with this and at 76 without (`benchmarks/step.py`, `--keep-default-malloc`; two
    cores, 2026-11-21); in float32 there was no difference. The process then holds on to its peak memory until it ends,
    or calls `release_freed_memory`: call this in training processes only. Only glibc on Linux knows these options.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    done = [mallopt(option, value) == 1 for option, value in settings]
    return all(done)


def use_one_arena() -> bool:
    """Tell the C library that threads which begin later allocate where the main one does; returns whether it could.

    Otherwise they get arenas of their own, whose memory goes back to the kernel whatever `keep_freed_memory` has set. A
    step of the full net in such a thread took 4.3 s and 330,000 page faults, and 3.1 s and none in the main arena
    (float32, batch 128, two cores of an EPYC, 2026-11-27). Call it first of all, before numpy and torch are imported,
    whose threads would get arenas that later ones then share. MALLOC_ARENA_MAX=1 does the same for a
    process that begins with it.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1


def release_freed_memory() -> bool:
    """Return the kept memory to the kernel, as between two trainings in one process; returns whether there was any."""
    trim = _of_glibc("malloc_trim")
    return trim is not None and trim(0) == 1


def _of_glibc(name: str) -> Any:
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
