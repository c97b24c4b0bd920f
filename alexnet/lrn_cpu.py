"""Local response normalisation on the CPU: one pass over NHWC memory forward, one backward, compiled by numba.

A pixel's C maps lie side by side in memory, so that the window sums are a handful of shifted vector additions in
the first-level cache. `nn.LocalResponseNorm` makes the same sums with a 3-D average pool over all of memory.

The kernels take one column of TILE pixels at a time into a flat buffer, each pixel with n // 2 zeros before and after
it: then every step is one long loop without a branch, which the compiler turns into vector instructions.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

TILE = 16  # pixels; with 128 maps the five buffers fill 40 KB, about a first-level cache
ROWS_PER_THREAD = 2048  # with fewer pixels a thread costs more than it saves

_pool: ThreadPoolExecutor | None = None


def forward(a_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool) -> Tensor:
    """a_NCHW: channels_last float32, float64 or bfloat16; returns the same form."""
    out = torch.empty_like(a_NCHW)
    _run(_forward_rows, (_rows(a_NCHW), _rows(out)), columns, k, n, alpha, beta, relu)
    return out


def backward(
    a_NCHW: Tensor, grad_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool
) -> Tensor:
    """The gradient with respect to a_NCHW; all three channels_last and of one type."""
    out = torch.empty_like(a_NCHW)
    _run(_backward_rows, (_rows(a_NCHW), _rows(grad_NCHW), _rows(out)), columns, k, n, alpha, beta, relu)
    return out


def _rows(a_NCHW: Tensor) -> np.ndarray:
    """The memory of a channels_last tensor as (P, C); bfloat16 as its bits, as numpy has no such type."""
    rows = a_NCHW.detach().permute(0, 2, 3, 1).reshape(-1, a_NCHW.shape[1])
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _run(
    kernel: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    columns: int,
    k: float,
    n: int,
    alpha: float,
    beta: float,
    relu: bool,
) -> None:
    """Split the rows over torch's number of threads; the kernels hold no lock (numba's own pool may not be shared)."""
    wide = np.float64 if arrays[0].dtype == np.float64 else np.float32
    constants = (columns, wide(k), n, wide(alpha), wide(beta), relu)
    num_rows = arrays[0].shape[0]
    num_threads = max(1, min(torch.get_num_threads(), num_rows // ROWS_PER_THREAD))
    if num_threads == 1:
        kernel(*arrays, *constants)
        return
    bounds = np.linspace(0, num_rows, num_threads + 1).astype(int)
    parts = [tuple(array[lo:hi] for array in arrays) for lo, hi in pairwise(bounds)]
    futures = [_threads().submit(kernel, *part, *constants) for part in parts[1:]]
    kernel(*parts[0], *constants)
    for future in futures:
        future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lrn")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads


def _load(row, values, bits):  # type: ignore[no-untyped-def]
    """Read a row into `values`; `bits` is the same memory as unsigned integers."""


def _store(values, bits, row):  # type: ignore[no-untyped-def]
    """Write `values` into a row; bfloat16 rounds to nearest even."""


@overload(_load, inline="always")
def _load_typed(row, values, bits):  # type: ignore[no-untyped-def]
    if row.dtype == numba.uint16:

        def load(row, values, bits):  # type: ignore[no-untyped-def]
            for c in range(values.size):
                bits[c] = np.uint32(row[c]) << np.uint32(16)

    else:

        def load(row, values, bits):  # type: ignore[no-untyped-def]
            for c in range(values.size):
                values[c] = row[c]

    return load


@overload(_store, inline="always")
def _store_typed(values, bits, row):  # type: ignore[no-untyped-def]
    if row.dtype == numba.uint16:

        def store(values, bits, row):  # type: ignore[no-untyped-def]
            for c in range(values.size):
                b = bits[c]
                rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                quiet = (b >> np.uint32(16)) | np.uint32(0x40)  # rounding must not turn a NaN into infinity
                row[c] = np.uint16(quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)

    else:

        def store(values, bits, row):  # type: ignore[no-untyped-def]
            for c in range(values.size):
                row[c] = values[c]

    return store


def _inverse_power(scale, beta, log2, log2_bits, out, out_bits):  # type: ignore[no-untyped-def]
    """out = scale ** -beta."""


@overload(_inverse_power, inline="always")
def _inverse_power_typed(scale, beta, log2, log2_bits, out, out_bits):  # type: ignore[no-untyped-def]
    if scale.dtype == numba.float64:

        def power(scale, beta, log2, log2_bits, out, out_bits):  # type: ignore[no-untyped-def]
            for c in range(scale.size):
                out[c] = scale[c] ** -beta

    else:

        def power(scale, beta, log2, log2_bits, out, out_bits):  # type: ignore[no-untyped-def]
            if beta == np.float32(0.75):  # the paper's: two square roots
                for c in range(scale.size):
                    root = math.sqrt(scale[c])
                    out[c] = np.float32(1.0) / (root * math.sqrt(root))
                return
            # 2 ** (-beta * log2(scale)) in steps that vectorise; the C library's pow is one call per element.
            # scale = 2^e * m with m in [sqrt(1/2), sqrt(2)); log2(m) by its series in z = (m - 1) / (m + 1).
            for c in range(scale.size):
                log2[c] = scale[c]
            for c in range(scale.size):
                e = (log2_bits[c] - np.int32(0x3F3504F3)) >> np.int32(23)
                out[c] = np.float32(e)
                log2_bits[c] = log2_bits[c] - (e << np.int32(23))
            for c in range(scale.size):
                z = (log2[c] - np.float32(1.0)) / (log2[c] + np.float32(1.0))
                zz = z * z
                series = np.float32(1 / 9)
                series = series * zz + np.float32(1 / 7)
                series = series * zz + np.float32(1 / 5)
                series = series * zz + np.float32(1 / 3)
                series = series * zz + np.float32(1.0)
                log2[c] = out[c] + np.float32(2 / math.log(2)) * z * series
            for c in range(scale.size):
                y = max(min(-beta * log2[c], np.float32(127.0)), np.float32(-126.0))
                whole = math.floor(y + np.float32(0.5))
                f = (y - np.float32(whole)) * np.float32(math.log(2))
                series = np.float32(1 / 5040)
                series = series * f + np.float32(1 / 720)
                series = series * f + np.float32(1 / 120)
                series = series * f + np.float32(1 / 24)
                series = series * f + np.float32(1 / 6)
                series = series * f + np.float32(1 / 2)
                series = series * f + np.float32(1.0)
                log2[c] = series * f + np.float32(1.0)
                out_bits[c] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            for c in range(scale.size):
                out[c] = out[c] * log2[c]

    return power


def _unsigned(array):  # type: ignore[no-untyped-def]
    """The float array's memory as unsigned integers of the same width."""


@overload(_unsigned, inline="always")
def _unsigned_typed(array):  # type: ignore[no-untyped-def]
    if array.dtype == numba.float64:
        return lambda array: array.view(np.uint64)
    return lambda array: array.view(np.uint32)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # "contract" and the others leave NaN and infinity alone: a diverged net must look diverged.
    compiled: Callable[..., Any] = numba.njit(
        nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"}
    )(function)
    return compiled


@_compiled
def _window_sum(source, n, target):  # type: ignore[no-untyped-def]
    """target[i] = sum of the n source values centred on i; the first and last n // 2 of target stay untouched."""
    half, size = n // 2, source.size - 2 * (n // 2)
    if n == 5:  # the paper's: one pass instead of five
        for i in range(size):
            target[i + 2] = source[i] + source[i + 1] + source[i + 2] + source[i + 3] + source[i + 4]
        return
    for i in range(size):
        target[i + half] = source[i]
    for d in range(1, n):
        for i in range(size):
            target[i + half] += source[i + d]


@_compiled
def _load_tile(rows, lo, size, half, relu, values, bits):  # type: ignore[no-untyped-def]
    """Column lo:lo + size of some pixels into the flat buffer, between its zeros."""
    for r in range(rows.shape[0]):
        start = r * (size + 2 * half) + half
        _load(rows[r, lo : lo + size], values[start : start + size], bits[start : start + size])
    if relu:
        for i in range(values.size):
            values[i] = values[i] if not values[i] < 0 else type(values[i])(0)  # a NaN stays


@_compiled
def _store_tile(values, bits, lo, size, half, rows):  # type: ignore[no-untyped-def]
    for r in range(rows.shape[0]):
        start = r * (size + 2 * half) + half
        _store(values[start : start + size], bits[start : start + size], rows[r, lo : lo + size])


@_compiled
def _forward_rows(a, out, columns, k, n, alpha, beta, relu):  # type: ignore[no-untyped-def]
    num_rows, num_maps = a.shape
    size, half = num_maps // columns, n // 2
    length = TILE * (size + 2 * half)
    values, squares = np.zeros(length, type(k)), np.zeros(length, type(k))
    scale, log2, factor = np.ones(length, type(k)), np.empty(length, type(k)), np.empty(length, type(k))
    bits, log2_bits, factor_bits = _unsigned(values), log2.view(np.int32), factor.view(np.int32)
    for p in range(0, num_rows, TILE):
        for column in range(columns):
            lo = column * size
            _load_tile(a[p : p + TILE], lo, size, half, relu, values, bits)
            for i in range(length):
                squares[i] = values[i] * values[i]
            _window_sum(squares, n, scale)
            for i in range(length):
                scale[i] = k + alpha * scale[i]
            _inverse_power(scale, beta, log2, log2_bits, factor, factor_bits)
            for i in range(length):
                values[i] = values[i] * factor[i]
            _store_tile(values, bits, lo, size, half, out[p : p + TILE])


@_compiled
def _backward_rows(a, grad, out, columns, k, n, alpha, beta, relu):  # type: ignore[no-untyped-def]
    num_rows, num_maps = a.shape
    size, half = num_maps // columns, n // 2
    length = TILE * (size + 2 * half)
    values, grads, window = np.zeros(length, type(k)), np.zeros(length, type(k)), np.zeros(length, type(k))
    scale, log2, factor = np.ones(length, type(k)), np.empty(length, type(k)), np.empty(length, type(k))
    bits, grad_bits = _unsigned(values), _unsigned(grads)
    log2_bits, factor_bits = log2.view(np.int32), factor.view(np.int32)
    minus_two_alpha_beta = type(k)(-2) * alpha * beta
    for p in range(0, num_rows, TILE):
        for column in range(columns):
            lo = column * size
            _load_tile(a[p : p + TILE], lo, size, half, relu, values, bits)
            _load_tile(grad[p : p + TILE], lo, size, half, False, grads, grad_bits)
            for i in range(length):
                window[i] = values[i] * values[i]
            _window_sum(window, n, scale)
            for i in range(length):
                scale[i] = k + alpha * scale[i]
            _inverse_power(scale, beta, log2, log2_bits, factor, factor_bits)
            for i in range(length):
                grads[i] = grads[i] * factor[i]
                window[i] = grads[i] * values[i] / scale[i]
            _window_sum(window, n, factor)
            if relu:
                for i in range(length):
                    dense = grads[i] + minus_two_alpha_beta * values[i] * factor[i]
                    grads[i] = dense if values[i] != 0 else type(k)(0)
            else:
                for i in range(length):
                    grads[i] = grads[i] + minus_two_alpha_beta * values[i] * factor[i]
            for i in range(half):  # the edge of factor was not summed: keep the zeros around the pixels
                grads[i] = grads[length - 1 - i] = type(k)(0)
            _store_tile(grads, grad_bits, lo, size, half, out[p : p + TILE])
