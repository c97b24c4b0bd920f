"""Ten views of an image (paper, 4.1) that share their first two convolutions.

The five crops overlap: conv1, LRN and pooling of the whole stored image hold those of every crop whose corner lies on
the grid of the pooled maps, but for the last row and column, whose windows end in zeros beyond a crop's edge where the
image goes on. Those are computed from a strip of each crop. conv2 is shared in the same way, but for the rows and
columns whose windows reach beyond a crop's edge, or the strips. The rest of the net is computed for every crop.

N images, S the stored side, I the net's input, both in pixels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .augment import views
from .net import AlexNet

GRID = 8  # pixels: conv1's stride times the pooling's
STRIP = 16  # pixels from the edge that the last pooled row is computed from: conv1's last three windows begin there


def can_share(net: AlexNet, image_size: int) -> bool:
    """Whether it is the paper's net, all crops' corners lie on the grid, and the strips are where they should be."""
    if net.preset.name != "paper":
        return False
    margin = image_size - net.input_size
    windows = 1 + math.ceil((net.input_size - 11) / 4)  # of conv1, along a side
    at_the_end = net.input_size - 4 * (windows - 3) == STRIP and windows % 2 == 1
    return margin > 0 and margin % (2 * GRID) == 0 and at_the_end


def ten_scores(net: AlexNet, centered_NCHW: Tensor) -> list[Tensor]:
    """The scores (N, classes) of each of the ten views, in the order of `alexnet.augment.views`.

    centered_NCHW: stored images (N, 3, S, S), the mean image subtracted.
    """
    size, margin = net.input_size, centered_NCHW.shape[-1] - net.input_size
    found: list[Tensor] = []
    for flip in (False, True):
        whole = centered_NCHW.flip(3).contiguous(memory_format=torch.channels_last) if flip else centered_NCHW
        maps = net.lower(whole)
        second = net.second(maps)
        side = _first_side(size)
        for draws in views(1, margin=margin, number=10)[5 * flip : 5 * flip + 5]:
            top, left = int(draws.top[0]), int(draws.left[0])
            left = margin - left if flip else left
            window = (..., slice(top // GRID, top // GRID + side), slice(left // GRID, left // GRID + side))
            part = maps[window].clone(memory_format=torch.channels_last)
            crop = whole[:, :, top : top + size, left : left + size]
            if top < margin:
                part[:, :, -1:, :] = net.lower(crop[:, :, -STRIP:, :])
            if left < margin:
                part[:, :, :, -1:] = net.lower(crop[:, :, :, -STRIP:])
            begins, ends = (top > 0, left > 0), (top < margin, left < margin)
            found.append(
                net.classify(net.after_second(_second_of_crop(net.second, second[window], part, begins, ends)))
            )
    return found


def _second_of_crop(
    conv: nn.Conv2d, shared: Tensor, maps: Tensor, begins: tuple[bool, bool], ends: tuple[bool, bool]
) -> Tensor:
    """The convolution of a crop's maps, which is `shared` but near the crop's own edges.

    begins, ends: whether the image goes on before the crop, and after it, above or below it and to its sides. After the
    crop one more row differs, which reads the row of maps that is not shared.
    """
    out, edge = shared.clone(memory_format=torch.channels_last), conv.kernel_size[0] // 2
    for axis in (2, 3):
        zeros = [edge] * 4  # left, right, top, bottom
        if begins[axis - 2]:
            pad = [*zeros]
            pad[1 if axis == 3 else 3] = 0
            out.narrow(axis, 0, edge)[:] = _unpadded(conv, F.pad(maps.narrow(axis, 0, 2 * edge), pad))
        if ends[axis - 2]:
            pad, num, side = [*zeros], edge + 1, maps.shape[axis]
            pad[0 if axis == 3 else 2] = 0
            rows = maps.narrow(axis, side - num - edge, num + edge)
            out.narrow(axis, side - num, num)[:] = _unpadded(conv, F.pad(rows, pad))
    return out


def _unpadded(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    return F.conv2d(maps.contiguous(memory_format=torch.channels_last), conv.weight, conv.bias, groups=conv.groups)


def _first_side(size: int) -> int:
    return 1 + (1 + math.ceil((size - 11) / 4) - 3) // 2
