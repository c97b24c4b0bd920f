"""The transforms of Winograd's algorithm F(5x5, 3x3) on the CPU, over channels_last memory, compiled by numba.

A tile is 5 x 5 pixels of the output and reads a window of 7 x 7 of the input; both are polynomials' coefficients, which
are evaluated at, or interpolated from, 7 x 7 points. A tile's transform is that of its lines, then of its columns.

N images, H rows, W columns of pixels, G groups of C maps each; T tiles of all images. The values at the points are
(G * 49, T, C): of each group and point a matrix.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled, split
from .winograd import SIZE, TILE, tiles

POINTS, KERNEL = 7, 3  # along an axis
BLOCK = 64  # maps at a time: two buffers of 49 of them are in the first-level cache
POSITIVE = (0.25, 0.875, 1.875)  # the points: these, the same below zero, and infinity; of few bits, to round little
PER_THREAD = 2  # images, or kernels; with fewer a thread costs more than it saves

P0, P1, P2 = (np.float32(p) for p in POSITIVE)
Q0, Q1, Q2 = (np.float32(p**2) for p in POSITIVE)
C0, C1, C2 = (np.float32(p**3) for p in POSITIVE)
R0, R1, R2 = (np.float32(p**4) for p in POSITIVE)
# (x^2 - b^2) (x^2 - c^2) = x^4 - S x^2 + M for each point's other two, and the product over all three
S0, S1, S2 = Q1 + Q2, Q0 + Q2, Q0 + Q1
M0, M1, M2 = Q1 * Q2, Q0 * Q2, Q0 * Q1
# 1 / (2 p (p^2 - b^2) (p^2 - c^2)), by which interpolation multiplies
F0, F1, F2 = (
    np.float32(1 / (2 * p * (p**2 - b**2) * (p**2 - c**2)))
    for p, b, c in zip(POSITIVE, POSITIVE[1:] + POSITIVE[:1], POSITIVE[2:] + POSITIVE[:2], strict=True)
)
A4, A2, A0 = Q0 + Q1 + Q2, Q0 * Q1 + Q0 * Q2 + Q1 * Q2, Q0 * Q1 * Q2


def kernel_transform(weight: Tensor, groups: int) -> Tensor:
    """The values (G * 49, maps / G, C) of kernels (maps, C, 3, 3), divided by what interpolation divides by."""
    kernels = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    values = weight.new_empty(groups * SIZE, len(weight) // groups, weight.shape[1])
    return _run(_kernel_tiles, kernels, values)


def kernel_adjoint(values: Tensor, grad_NHWC: Tensor) -> None:
    """The transpose of `kernel_transform`: write the gradient (maps, 3, 3, C) of kernels, from that of the values."""
    _run(_kernel_adjoint_tiles, grad_NHWC, values)


def input_transform(x_NHWC: Tensor, groups: int) -> Tensor:
    """The values (G * 49, T, C) of the windows of x_NHWC (N, H, W, G * C), which has zeros beyond its edge."""
    return _run(_input_tiles, x_NHWC, _new_values(x_NHWC, groups))


def output_transform(values: Tensor, bias: Tensor, y_NHWC: Tensor) -> None:
    """Write y_NHWC (N, H, W, G * C), the tiles that have these values (G * 49, T, C), plus bias (G * C,)."""
    _run(_output_tiles, y_NHWC, values, bias.detach().numpy())


def output_adjoint(grad_NHWC: Tensor, groups: int) -> Tensor:
    """The transpose of `output_transform`: from the gradient of y_NHWC that of the values (G * 49, T, C)."""
    return _run(_output_adjoint_tiles, grad_NHWC, _new_values(grad_NHWC, groups))


def input_adjoint(values: Tensor, grad_NHWC: Tensor) -> None:
    """The transpose of `input_transform`: write the gradient of x_NHWC, from that of the values (G * 49, T, C)."""
    _run(_input_adjoint_tiles, grad_NHWC, values)


def _new_values(pixels_NHWC: Tensor, groups: int) -> Tensor:
    num_images, height, width, maps = pixels_NHWC.shape
    return pixels_NHWC.new_empty(groups * SIZE, num_images * tiles(height) * tiles(width), maps // groups)


def _run(kernel: Callable[..., Any], pixels_NHWC: Tensor, values: Tensor, *more: np.ndarray) -> Tensor:
    images, points = pixels_NHWC.detach().numpy(), values.numpy()
    split(lambda lo, hi: kernel(images, points, *more, lo, hi), len(images), PER_THREAD)
    return values


# The transforms of lines: from [point][line][map] to [line][point][map], so that a second one is that of the columns.
# Flat arrays and lengths known when it is compiled, since only then the compiler sees that nothing overlaps.


@compiled
def _input_lines(a, out):  # type: ignore[no-untyped-def]
    for line in range(POINTS):
        for c in range(BLOCK):
            d0, d1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            d2, d3 = a[(2 * POINTS + line) * BLOCK + c], a[(3 * POINTS + line) * BLOCK + c]
            d4, d5 = a[(4 * POINTS + line) * BLOCK + c], a[(5 * POINTS + line) * BLOCK + c]
            d6 = a[(6 * POINTS + line) * BLOCK + c]
            even, odd = P0 * (M0 * d0 - S0 * d2 + d4), M0 * d1 - S0 * d3 + d5
            out[(line * POINTS + 0) * BLOCK + c] = odd + even
            out[(line * POINTS + 1) * BLOCK + c] = odd - even
            even, odd = P1 * (M1 * d0 - S1 * d2 + d4), M1 * d1 - S1 * d3 + d5
            out[(line * POINTS + 2) * BLOCK + c] = odd + even
            out[(line * POINTS + 3) * BLOCK + c] = odd - even
            even, odd = P2 * (M2 * d0 - S2 * d2 + d4), M2 * d1 - S2 * d3 + d5
            out[(line * POINTS + 4) * BLOCK + c] = odd + even
            out[(line * POINTS + 5) * BLOCK + c] = odd - even
            out[(line * POINTS + 6) * BLOCK + c] = d6 - A4 * d4 + A2 * d2 - A0 * d0


@compiled
def _input_adjoint_lines(a, out):  # type: ignore[no-untyped-def]
    for line in range(POINTS):
        for c in range(BLOCK):
            v0, v1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            v2, v3 = a[(2 * POINTS + line) * BLOCK + c], a[(3 * POINTS + line) * BLOCK + c]
            v4, v5 = a[(4 * POINTS + line) * BLOCK + c], a[(5 * POINTS + line) * BLOCK + c]
            v6 = a[(6 * POINTS + line) * BLOCK + c]
            e0, e1, e2 = P0 * (v0 - v1), P1 * (v2 - v3), P2 * (v4 - v5)
            o0, o1, o2 = v0 + v1, v2 + v3, v4 + v5
            out[(line * POINTS + 0) * BLOCK + c] = M0 * e0 + M1 * e1 + M2 * e2 - A0 * v6
            out[(line * POINTS + 1) * BLOCK + c] = M0 * o0 + M1 * o1 + M2 * o2
            out[(line * POINTS + 2) * BLOCK + c] = A2 * v6 - S0 * e0 - S1 * e1 - S2 * e2
            out[(line * POINTS + 3) * BLOCK + c] = -(S0 * o0 + S1 * o1 + S2 * o2)
            out[(line * POINTS + 4) * BLOCK + c] = e0 + e1 + e2 - A4 * v6
            out[(line * POINTS + 5) * BLOCK + c] = o0 + o1 + o2
            out[(line * POINTS + 6) * BLOCK + c] = v6


@compiled
def _output_lines(a, out, num_lines):  # type: ignore[no-untyped-def]
    for line in range(num_lines):
        for c in range(BLOCK):
            m0, m1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            m2, m3 = a[(2 * POINTS + line) * BLOCK + c], a[(3 * POINTS + line) * BLOCK + c]
            m4, m5 = a[(4 * POINTS + line) * BLOCK + c], a[(5 * POINTS + line) * BLOCK + c]
            m6 = a[(6 * POINTS + line) * BLOCK + c]
            s0, s1, s2, d0, d1, d2 = m0 + m1, m2 + m3, m4 + m5, m0 - m1, m2 - m3, m4 - m5
            out[(line * POINTS + 0) * BLOCK + c] = s0 + s1 + s2
            out[(line * POINTS + 1) * BLOCK + c] = P0 * d0 + P1 * d1 + P2 * d2
            out[(line * POINTS + 2) * BLOCK + c] = Q0 * s0 + Q1 * s1 + Q2 * s2
            out[(line * POINTS + 3) * BLOCK + c] = C0 * d0 + C1 * d1 + C2 * d2
            out[(line * POINTS + 4) * BLOCK + c] = R0 * s0 + R1 * s1 + R2 * s2 + m6


@compiled
def _output_adjoint_lines(a, out, num_lines):  # type: ignore[no-untyped-def]
    for line in range(num_lines):
        for c in range(BLOCK):
            y0, y1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            y2, y3 = a[(2 * POINTS + line) * BLOCK + c], a[(3 * POINTS + line) * BLOCK + c]
            y4 = a[(4 * POINTS + line) * BLOCK + c]
            even, odd = y0 + Q0 * y2 + R0 * y4, P0 * y1 + C0 * y3
            out[(line * POINTS + 0) * BLOCK + c] = even + odd
            out[(line * POINTS + 1) * BLOCK + c] = even - odd
            even, odd = y0 + Q1 * y2 + R1 * y4, P1 * y1 + C1 * y3
            out[(line * POINTS + 2) * BLOCK + c] = even + odd
            out[(line * POINTS + 3) * BLOCK + c] = even - odd
            even, odd = y0 + Q2 * y2 + R2 * y4, P2 * y1 + C2 * y3
            out[(line * POINTS + 4) * BLOCK + c] = even + odd
            out[(line * POINTS + 5) * BLOCK + c] = even - odd
            out[(line * POINTS + 6) * BLOCK + c] = y4


@compiled
def _kernel_lines(a, out, num_lines):  # type: ignore[no-untyped-def]
    for line in range(num_lines):
        for c in range(BLOCK):
            w0, w1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            w2 = a[(2 * POINTS + line) * BLOCK + c]
            even, odd = F0 * (w0 + Q0 * w2), F0 * P0 * w1
            out[(line * POINTS + 0) * BLOCK + c] = odd + even
            out[(line * POINTS + 1) * BLOCK + c] = odd - even
            even, odd = F1 * (w0 + Q1 * w2), F1 * P1 * w1
            out[(line * POINTS + 2) * BLOCK + c] = odd + even
            out[(line * POINTS + 3) * BLOCK + c] = odd - even
            even, odd = F2 * (w0 + Q2 * w2), F2 * P2 * w1
            out[(line * POINTS + 4) * BLOCK + c] = odd + even
            out[(line * POINTS + 5) * BLOCK + c] = odd - even
            out[(line * POINTS + 6) * BLOCK + c] = w2


@compiled
def _kernel_adjoint_lines(a, out, num_lines):  # type: ignore[no-untyped-def]
    for line in range(num_lines):
        for c in range(BLOCK):
            u0, u1 = a[(0 * POINTS + line) * BLOCK + c], a[(1 * POINTS + line) * BLOCK + c]
            u2, u3 = a[(2 * POINTS + line) * BLOCK + c], a[(3 * POINTS + line) * BLOCK + c]
            u4, u5 = a[(4 * POINTS + line) * BLOCK + c], a[(5 * POINTS + line) * BLOCK + c]
            u6 = a[(6 * POINTS + line) * BLOCK + c]
            d0, d1, d2 = F0 * (u0 - u1), F1 * (u2 - u3), F2 * (u4 - u5)
            s0, s1, s2 = F0 * P0 * (u0 + u1), F1 * P1 * (u2 + u3), F2 * P2 * (u4 + u5)
            out[(line * POINTS + 0) * BLOCK + c] = d0 + d1 + d2
            out[(line * POINTS + 1) * BLOCK + c] = s0 + s1 + s2
            out[(line * POINTS + 2) * BLOCK + c] = Q0 * d0 + Q1 * d1 + Q2 * d2 + u6


@compiled
def _load(image, top, left, side, first, number, a):  # type: ignore[no-untyped-def]
    """side x side pixels of an image (H, W, C), `number` maps of each from `first`; zeros beyond its edge."""
    for i in range(side):
        for j in range(side):
            row, column = top + i, left + j
            target = a[(i * POINTS + j) * BLOCK : (i * POINTS + j) * BLOCK + number]
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                source = image[row, column, first : first + number]
                for c in range(number):
                    target[c] = source[c]
            else:
                for c in range(number):
                    target[c] = 0


@compiled
def _load_values(values, tile, first, number, a):  # type: ignore[no-untyped-def]
    for p in range(SIZE):
        source, target = values[p, tile, first : first + number], a[p * BLOCK : p * BLOCK + number]
        for c in range(number):
            target[c] = source[c]


@compiled
def _store_values(a, values, tile, first, number):  # type: ignore[no-untyped-def]
    for p in range(SIZE):
        source, target = a[p * BLOCK : p * BLOCK + number], values[p, tile, first : first + number]
        for c in range(number):
            target[c] = source[c]


@compiled
def _kernel_tiles(kernels, values, lo, hi):  # type: ignore[no-untyped-def]
    outputs, maps = values.shape[1], values.shape[2]
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    for kernel in range(lo, hi):
        group = kernel // outputs
        for first in range(0, maps, BLOCK):
            number = min(BLOCK, maps - first)
            _load(kernels[kernel], 0, 0, KERNEL, first, number, a)
            _kernel_lines(a, b, KERNEL)
            _kernel_lines(b, a, POINTS)
            _store_values(a, values[group * SIZE : (group + 1) * SIZE], kernel % outputs, first, number)


@compiled
def _kernel_adjoint_tiles(grad, values, lo, hi):  # type: ignore[no-untyped-def]
    outputs, maps = values.shape[1], values.shape[2]
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    for kernel in range(lo, hi):
        group = kernel // outputs
        for first in range(0, maps, BLOCK):
            number = min(BLOCK, maps - first)
            _load_values(values[group * SIZE : (group + 1) * SIZE], kernel % outputs, first, number, a)
            _kernel_adjoint_lines(a, b, POINTS)
            _kernel_adjoint_lines(b, a, KERNEL)
            for i in range(KERNEL):
                for j in range(KERNEL):
                    source = a[(i * POINTS + j) * BLOCK : (i * POINTS + j) * BLOCK + number]
                    target = grad[kernel, i, j, first : first + number]
                    for c in range(number):
                        target[c] = source[c]


@compiled
def _input_tiles(x, values, lo, hi):  # type: ignore[no-untyped-def]
    groups, maps = values.shape[0] // SIZE, values.shape[2]
    high, wide = -(-x.shape[1] // TILE), -(-x.shape[2] // TILE)
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    for image in range(lo, hi):
        for tile in range(high * wide):
            top, left = tile // wide * TILE, tile % wide * TILE
            for group in range(groups):
                for first in range(0, maps, BLOCK):
                    number = min(BLOCK, maps - first)
                    _load(x[image], top - 1, left - 1, POINTS, group * maps + first, number, a)
                    _input_lines(a, b)
                    _input_lines(b, a)
                    _store_values(
                        a, values[group * SIZE : (group + 1) * SIZE], image * high * wide + tile, first, number
                    )


@compiled
def _output_tiles(y, values, bias, lo, hi):  # type: ignore[no-untyped-def]
    groups, maps = values.shape[0] // SIZE, values.shape[2]
    high, wide = -(-y.shape[1] // TILE), -(-y.shape[2] // TILE)
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    for image in range(lo, hi):
        for tile in range(high * wide):
            top, left = tile // wide * TILE, tile % wide * TILE
            for group in range(groups):
                for first in range(0, maps, BLOCK):
                    number = min(BLOCK, maps - first)
                    _load_values(
                        values[group * SIZE : (group + 1) * SIZE], image * high * wide + tile, first, number, a
                    )
                    _output_lines(a, b, POINTS)
                    _output_lines(b, a, TILE)
                    channel = group * maps + first
                    added = bias[channel : channel + number]
                    for i in range(min(TILE, y.shape[1] - top)):
                        for j in range(min(TILE, y.shape[2] - left)):
                            source = a[(i * POINTS + j) * BLOCK : (i * POINTS + j) * BLOCK + number]
                            target = y[image, top + i, left + j, channel : channel + number]
                            for c in range(number):
                                target[c] = source[c] + added[c]


@compiled
def _output_adjoint_tiles(grad, values, lo, hi):  # type: ignore[no-untyped-def]
    groups, maps = values.shape[0] // SIZE, values.shape[2]
    high, wide = -(-grad.shape[1] // TILE), -(-grad.shape[2] // TILE)
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    for image in range(lo, hi):
        for tile in range(high * wide):
            top, left = tile // wide * TILE, tile % wide * TILE
            for group in range(groups):
                for first in range(0, maps, BLOCK):
                    number = min(BLOCK, maps - first)
                    _load(grad[image], top, left, TILE, group * maps + first, number, a)
                    _output_adjoint_lines(a, b, TILE)
                    _output_adjoint_lines(b, a, POINTS)
                    _store_values(
                        a, values[group * SIZE : (group + 1) * SIZE], image * high * wide + tile, first, number
                    )


@compiled
def _input_adjoint_tiles(grad, values, lo, hi):  # type: ignore[no-untyped-def]
    groups, maps = values.shape[0] // SIZE, values.shape[2]
    high, wide = -(-grad.shape[1] // TILE), -(-grad.shape[2] // TILE)
    a, b = np.zeros(SIZE * BLOCK, np.float32), np.zeros(SIZE * BLOCK, np.float32)
    grad[lo:hi] = 0
    for image in range(lo, hi):
        for tile in range(high * wide):
            top, left = tile // wide * TILE - 1, tile % wide * TILE - 1
            for group in range(groups):
                for first in range(0, maps, BLOCK):
                    number = min(BLOCK, maps - first)
                    _load_values(
                        values[group * SIZE : (group + 1) * SIZE], image * high * wide + tile, first, number, a
                    )
                    _input_adjoint_lines(a, b)
                    _input_adjoint_lines(b, a)
                    channel = group * maps + first
                    for i in range(max(0, -top), min(POINTS, grad.shape[1] - top)):
                        for j in range(max(0, -left), min(POINTS, grad.shape[2] - left)):
                            source = a[(i * POINTS + j) * BLOCK : (i * POINTS + j) * BLOCK + number]
                            target = grad[image, top + i, left + j, channel : channel + number]
                            for c in range(number):
                                target[c] += source[c]
