"""Local response normalisation on the CPU: one pass over NHWC memory forward, one backward, compiled by numba.

A pixel's C maps lie side by side in memory, so that the window sums are a handful of shifted vector additions in
the first-level cache. `nn.LocalResponseNorm` makes the same sums with a 3-D average pool over all of memory.

The kernels take one column of one pixel at a time into buffers, with n // 2 zeros before and after where a window reads
them. Every step is a loop without a branch over C / columns maps, which the compiler turns into vector instructions;
the paper's window and power, n = 5 and beta = 0.75, are taken in one loop. With 48 and 128 maps that is as fast as
memory allows. Both passes write their steps out: as functions, a pass takes a tenth longer, with other constants a
quarter. (Buffers of 16 pixels, which were here before, took twice as long: they left the first-level cache.)
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from .compiled import compiled, split

ROWS_PER_THREAD = 2048  # with fewer pixels a thread costs more than it saves


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
    wide = np.float64 if arrays[0].dtype == np.float64 else np.float32
    constants = (columns, wide(k), n, wide(alpha), wide(beta), relu)
    split(lambda lo, hi: kernel(*(array[lo:hi] for array in arrays), *constants), len(arrays[0]), ROWS_PER_THREAD)


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


@compiled
def _window_sum(source, n, target):  # type: ignore[no-untyped-def]
    """target[c] = sum of the n source values that begin at c."""
    for c in range(target.size):
        target[c] = source[c]
    for d in range(1, n):
        for c in range(target.size):
            target[c] += source[c + d]


@compiled
def _square(values, relu, squares):  # type: ignore[no-untyped-def]
    """Squares of the values, after ReLU, in which a NaN stays one."""
    if relu:
        for c in range(values.size):
            value = values[c] if not values[c] < 0 else type(values[c])(0)
            values[c] = value
            squares[c] = value * value
    else:
        for c in range(values.size):
            squares[c] = values[c] * values[c]


@compiled
def _is_papers(n, beta):  # type: ignore[no-untyped-def]
    """Whether the window has 5 maps, and the power is two square roots."""
    return n == 5 and beta == np.float32(0.75)


@compiled
def _forward_rows(a, out, columns, k, n, alpha, beta, relu):  # type: ignore[no-untyped-def]
    num_rows, num_maps = a.shape
    size, half, one = num_maps // columns, n // 2, type(k)(1)
    values, squares = np.empty(size, type(k)), np.zeros(size + 2 * half, type(k))
    scale, log2, factor = np.empty(size, type(k)), np.empty(size, type(k)), np.empty(size, type(k))
    bits, log2_bits, factor_bits = _unsigned(values), log2.view(np.int32), factor.view(np.int32)
    middle = squares[half : half + size]
    for p in range(num_rows):
        for column in range(columns):
            lo = column * size
            _load(a[p, lo : lo + size], values, bits)
            _square(values, relu, middle)
            if _is_papers(n, beta):
                for c in range(size):
                    total = squares[c] + squares[c + 1] + squares[c + 2] + squares[c + 3] + squares[c + 4]
                    root = one / math.sqrt(k + alpha * total)
                    values[c] = values[c] * (root * math.sqrt(root))
            else:
                _window_sum(squares, n, scale)
                for c in range(size):
                    scale[c] = k + alpha * scale[c]
                _inverse_power(scale, beta, log2, log2_bits, factor, factor_bits)
                for c in range(size):
                    values[c] = values[c] * factor[c]
            _store(values, bits, out[p, lo : lo + size])


@compiled
def _backward_rows(a, grad, out, columns, k, n, alpha, beta, relu):  # type: ignore[no-untyped-def]
    num_rows, num_maps = a.shape
    size, half, zero, one = num_maps // columns, n // 2, type(k)(0), type(k)(1)
    values, grads = np.empty(size, type(k)), np.empty(size, type(k))
    squares, shares = np.zeros(size + 2 * half, type(k)), np.zeros(size + 2 * half, type(k))
    scale, log2, factor = np.empty(size, type(k)), np.empty(size, type(k)), np.empty(size, type(k))
    bits, grad_bits = _unsigned(values), _unsigned(grads)
    log2_bits, factor_bits = log2.view(np.int32), factor.view(np.int32)
    middle, shared = squares[half : half + size], shares[half : half + size]
    minus_two_alpha_beta = type(k)(-2) * alpha * beta
    for p in range(num_rows):
        for column in range(columns):
            lo = column * size
            _load(a[p, lo : lo + size], values, bits)
            _load(grad[p, lo : lo + size], grads, grad_bits)
            _square(values, relu, middle)
            if _is_papers(n, beta):
                for c in range(size):
                    total = squares[c] + squares[c + 1] + squares[c + 2] + squares[c + 3] + squares[c + 4]
                    root = one / math.sqrt(k + alpha * total)
                    grads[c] = grads[c] * (root * math.sqrt(root))
                    shared[c] = grads[c] * values[c] * (root * root)
                for c in range(size):
                    factor[c] = shares[c] + shares[c + 1] + shares[c + 2] + shares[c + 3] + shares[c + 4]
            else:
                _window_sum(squares, n, scale)
                for c in range(size):
                    scale[c] = k + alpha * scale[c]
                _inverse_power(scale, beta, log2, log2_bits, factor, factor_bits)
                for c in range(size):
                    grads[c] = grads[c] * factor[c]
                    shared[c] = grads[c] * values[c] / scale[c]
                _window_sum(shares, n, factor)
            if relu:
                for c in range(size):
                    dense = grads[c] + minus_two_alpha_beta * values[c] * factor[c]
                    grads[c] = dense if values[c] != 0 else zero
            else:
                for c in range(size):
                    grads[c] = grads[c] + minus_two_alpha_beta * values[c] * factor[c]
            _store(grads, grad_bits, out[p, lo : lo + size])
