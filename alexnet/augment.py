"""Random crops, mirror images and PCA colour noise on uint8 batches (paper, 4.1), and what the device does with them.

N images, H rows, W columns, C = 3 colours. What happens to an image depends on (seed, epoch, image id) alone: not on
the batch it is in, nor on the process that makes it. The first half of this file needs numpy only, because the
processes that make batches should not have to import torch.
"""

from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

COLOR_NOISES = ("none", "paper", "code2012")
COLOR_STD = 0.1  # of the random multiples (paper, 4.1)
CODE2012_SHRINK = 1.1  # the 2012 source divides the noisy image, less the mean image, by this


class Draws(NamedTuple):
    """The random choices for N images."""

    top: NDArray[np.int32]  # (N,) first row of the crop
    left: NDArray[np.int32]  # (N,) first column of the crop
    flip: NDArray[np.bool_]  # (N,) mirror the crop left to right
    normal: NDArray[np.float32]  # (N, 3) standard normal, one per principal component

    def of(self, part: slice | NDArray[np.int64]) -> "Draws":
        """The choices for some of the images."""
        return Draws(self.top[part], self.left[part], self.flip[part], self.normal[part])


def draw(ids: NDArray[np.int64], *, seed: int, epoch: int, margin: int, flip: bool = True) -> Draws:
    """Draw for the images with these ids; margin is the stored side less the crop's, in pixels.

    A counter-based hash of (seed, epoch, id) replaces a stream of random numbers: any image's draws can be made
    anywhere, at any time, for a whole batch at once.
    """
    bits = _hash(ids, seed, epoch, 6)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    top = np.floor(uniform[:, 0] * (margin + 1)).astype(np.int32)
    left = np.floor(uniform[:, 1] * (margin + 1)).astype(np.int32)
    flips = (bits[:, 2] >> np.uint64(63)).astype(np.bool_) & flip
    # Box and Muller: two uniform numbers make two normal ones
    radius = np.sqrt(-2 * np.log(uniform[:, 2:4]))
    angle = 2 * np.pi * uniform[:, 4:6]
    normal = np.stack(
        [radius[:, 0] * np.cos(angle[:, 0]), radius[:, 0] * np.sin(angle[:, 0]), radius[:, 1] * np.cos(angle[:, 1])],
        axis=1,
    )
    return Draws(top, left, flips, normal.astype(np.float32))


def center(num_images: int, *, margin: int) -> Draws:
    """No randomness: the centre crop of every image, as for validation."""
    middle = np.full(num_images, margin // 2, np.int32)
    return Draws(middle, middle, np.zeros(num_images, np.bool_), np.zeros((num_images, 3), np.float32))


def views(num_images: int, *, margin: int, number: int) -> list[Draws]:
    """The fixed crops of every image that a net's answers are averaged over: the centre's (1); or the four corners' and
    the centre's, and their mirror images (10; paper, 4.1). Raises ValueError for another number."""
    middle = center(num_images, margin=margin)
    if number == 1:
        return [middle]
    if number != 10:
        raise ValueError(f"views = {number}: choose 1, the centre crop, or 10, the paper's")
    corners = [(top, left) for top in (0, margin) for left in (0, margin)]
    places = [*corners, (margin // 2, margin // 2)]
    return [
        middle._replace(
            top=np.full(num_images, top, np.int32),
            left=np.full(num_images, left, np.int32),
            flip=np.full(num_images, flip, np.bool_),
        )
        for flip in (False, True)
        for top, left in places
    ]


def color_shift(
    normal: NDArray[np.float32], eigenvalues: NDArray[np.float64], eigenvectors: NDArray[np.float64], noise: str
) -> NDArray[np.float32]:
    """What is added to every pixel of an image, (N, 3) in units of pixel values in [0, 255].

    eigenvalues (3,) and eigenvectors (3, 3; one per column) belong to the covariance of RGB values over the training
    set, in squared pixel values. "paper": the magnitude is the eigenVALUE times N(0, 0.1), as its text has it, with
    pixel values in [0, 1] (in [0, 255] it would be hundreds of grey levels). "code2012": the standard deviation times
    N(0, 0.1); that source has subtracted the mean image before, and then divides by 1.1, as `MeanSubtraction` does when
    asked.
    """
    if noise == "none":
        return np.zeros((len(normal), 3), np.float32)
    if noise == "paper":
        magnitude = eigenvalues / 255.0  # = 255 * (eigenvalue of values in [0, 1])
    elif noise == "code2012":
        magnitude = np.sqrt(np.maximum(eigenvalues, 0))
    else:
        raise ValueError(f"color_noise = {noise!r}: unknown; choose one of {', '.join(COLOR_NOISES)}")
    shift: NDArray[np.float64] = (COLOR_STD * normal * magnitude) @ eigenvectors.T
    return shift.astype(np.float32)


def crop_flip_shift(
    images_NHWC: NDArray[np.uint8],
    draws: Draws,
    shift: NDArray[np.float32],
    size: int,
    *,
    which: NDArray[np.int64] | None = None,
    out: NDArray[np.uint8] | None = None,
    place: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """(N, H, W, 3) uint8 to (N, size, size, 3) uint8: cut, mirror, add the shift, round and saturate.

    The i-th draw and shift are for image `which[i]`, and its crop goes to `out[place[i]]`; in order where not given.
    """
    height, width, _ = images_NHWC.shape[1:]
    num_images = len(draws.top)
    if out is None:
        out = np.empty((num_images, size, size, 3), np.uint8)
    which, place = (np.arange(num_images) if chosen is None else chosen for chosen in (which, place))
    rows, out_rows = images_NHWC.reshape(-1, height, width * 3), out.reshape(-1, size, size * 3)
    plain = not np.any(shift)
    shift_row = np.tile(shift, size)  # (N, size * 3)
    cut = (draws.top, draws.left, draws.flip)
    _crop_flip_shift(rows, which, *cut, plain, shift_row, out_rows, place)
    return out


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _crop_flip_shift(rows, which, top, left, flip, plain, shift_row, out_rows, place):  # type: ignore[no-untyped-def]
    _, size, num_bytes = out_rows.shape
    half = np.float32(0.5)
    for i in range(len(which)):
        start = 3 * left[i]
        for y in range(size):
            source = rows[which[i], top[i] + y, start : start + num_bytes]
            target = out_rows[place[i], y]
            if flip[i]:
                for x in range(size):
                    here, there = np.uintp(3 * x), np.uintp(3 * (size - 1 - x))  # unsigned: no test for negatives
                    target[there] = source[here]
                    target[there + np.uintp(1)] = source[here + np.uintp(1)]
                    target[there + np.uintp(2)] = source[here + np.uintp(2)]
            else:
                for b in range(num_bytes):
                    target[b] = source[b]
            if not plain:
                for b in range(num_bytes):
                    value = np.float32(target[b]) + shift_row[i, b]
                    target[b] = np.uint8(min(max(value, np.float32(0)), np.float32(255)) + half)


def _hash(ids: NDArray[np.int64], seed: int, epoch: int, words: int) -> NDArray[np.uint64]:
    """(N, words) independent 64-bit words per id: SplitMix64's finaliser over key and counter (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed], np.uint64) + _GOLDEN) ^ np.uint64(epoch))
        rows = _mix(ids.astype(np.uint64) + key)
        counters = np.arange(1, words + 1, dtype=np.uint64) * _GOLDEN
        return _mix(rows[:, None] + counters[None, :])


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def crop_flip_shift_tensors(
    images_NHWC: "Tensor", top: "Tensor", left: "Tensor", flip: "Tensor", shift: "Tensor", size: int
) -> "Tensor":
    """`crop_flip_shift` on the device that the images are on, the same in every bit. top, left, flip: (N,) of integers
    and bools; shift: (N, 3)."""
    import torch

    num_images, height, width, colors = images_NHWC.shape
    row, image = width * colors, height * width * colors
    shape = (num_images, height - size + 1, width - size + 1, size, size, colors)
    windows = images_NHWC.contiguous().as_strided(shape, (image, row, colors, row, colors, 1))
    cut = windows[torch.arange(num_images, device=images_NHWC.device), top.long(), left.long()]
    cut = torch.where(flip[:, None, None, None], cut.flip(2), cut)
    return cut.float().add_(shift[:, None, None]).clamp_(0, 255).add_(0.5).to(torch.uint8)


class MeanSubtraction:
    """Makes the net's float input on the device: subtract the mean image, cut like each image (paper, 2).

    mean_HWC: (H, W, 3) float32, the stored images' mean over the training set, in [0, 255].
    scale multiplies the difference; the paper's net sees it as it is.
    """

    def __init__(self, mean_HWC: "Tensor", size: int, scale: float = 1.0) -> None:
        import torch

        height, width, colors = mean_HWC.shape
        if size > min(height, width):
            raise ValueError(f"crop of {size} pixels from stored images of {height}x{width}: make input_size smaller")
        both = torch.stack([mean_HWC, mean_HWC.flip(1)]).contiguous()  # [0] as it is, [1] mirrored
        self.size, self.margin, self.scale = size, width - size, scale
        shape = (2, height - size + 1, width - size + 1, size, size, colors)
        self._windows = both.as_strided(
            shape, (height * width * colors, width * colors, colors, width * colors, colors, 1)
        )

    def __call__(
        self, images_NHWC: "Tensor", top: "Tensor", left: "Tensor", flip: "Tensor", *, divisor: float = 1.0
    ) -> "Tensor":
        """uint8 crops (N, size, size, 3) and how they were cut, to a float32 channels_last (N, 3, size, size), divided
        by `divisor` on top of the scale."""
        import torch

        # mirrored after the cut at `left` = cut from the mirrored image at margin - left
        mean = self._windows[flip.long(), top.long(), torch.where(flip, self.margin - left, left).long()]
        centered = torch.sub(images_NHWC, mean, out=mean)
        if self.scale != divisor:
            centered.mul_(self.scale / divisor)
        return centered.permute(0, 3, 1, 2)
