"""How sure an error is: 95 % intervals of an error rate, and of the difference between two on the same images."""

import math

Z = 1.959964  # standard errors to each side of a 95 % interval


def error_interval(wrong: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an error rate, of `wrong` of `total` images: Wilson's, which stays within [0, 1]."""
    rate, z2 = wrong / total, Z * Z
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(mended: int, broken: int, total: int) -> tuple[float, float]:
    """The 95 % interval of the difference between two error rates, new less old, on the same `total` images.

    mended: images that only the old net gets wrong; broken: those that only the new one does. Wald's interval with half
    an image added to each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    n = total + 2
    difference = (broken - mended) / n
    half = Z * math.sqrt((broken + mended + 1) - (broken - mended) ** 2 / n) / n
    return max(-1.0, difference - half), min(1.0, difference + half)
