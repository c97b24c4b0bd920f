"""Exact sums over images, for the mean image and the covariance of colours: integers, in code compiled by numba."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

MAX_SIDE = 2**16  # pixels, exclusive: the sum of squares over a row fits in 32 bits
MAX_IMAGES = 2**23  # the sum of one pixel over the images fits in 32 bits


class Moments:
    """Sums of the images added so far, all (size, size, 3)."""

    def __init__(self, size: int) -> None:
        assert size < MAX_SIDE
        self.count = 0
        self.sums: NDArray[np.int32] = np.zeros((size, size, 3), np.int32)  # of each pixel
        self.products: NDArray[np.int64] = np.zeros((3, 3), np.int64)  # colour i times colour j, over all pixels

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add (size, size, 3) pixels."""
        self.count += 1
        assert self.count <= MAX_IMAGES and image.shape == self.sums.shape  # noqa: PT018
        _add(image, self.sums, self.products)


def _add(image: Any, sums: Any, products: Any) -> None:
    flat = sums.reshape(-1)
    for h in range(image.shape[0]):
        row = image[h].reshape(-1)
        rr = rg = rb = gg = gb = bb = np.uint32(0)
        for w in range(image.shape[1]):
            r, g, b = np.uint32(row[3 * w]), np.uint32(row[3 * w + 1]), np.uint32(row[3 * w + 2])
            rr += r * r
            rg += r * g
            rb += r * b
            gg += g * g
            gb += g * b
            bb += b * b
        products[0, 0] += rr
        products[1, 1] += gg
        products[2, 2] += bb
        for i, j, value in ((0, 1, rg), (0, 2, rb), (1, 2, gb)):
            products[i, j] += value
            products[j, i] += value
        start = h * row.size
        for i in range(row.size):
            flat[start + i] += row[i]


_add = numba.njit(nogil=True, cache=True)(_add)
