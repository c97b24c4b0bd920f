"""How sure an error is: 95 % intervals of an error rate, and of the difference between two on the same images."""

import math

Z = 1.959963984540054  # standard errors to each side of a 95 % interval


def error_interval(wrong: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an error rate, of `wrong` of `total` images; it stays within [0, 1]."""
    rate, z2 = wrong / total, Z * Z
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return centre - half if wrong > 0 else 0.0, centre + half if wrong < total else 1.0


def difference_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """The 95 % interval of the first error rate less the second, of two nets on the same `total` images.

    only_first, only_second: images that only the one gets wrong. Bonett and Price's adjusted Wald interval for paired
    proportions (2012).
    """
    p, q = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (total + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)
