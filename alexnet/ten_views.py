"""Ten views of an image (paper, 4.1) that share their first layer.

The five crops overlap: conv1, LRN and pooling of the whole stored image hold those of every crop whose corner lies on
the grid of the pooled maps, but for the last row and column, whose windows end in zeros beyond a crop's edge where the
image goes on. Those are computed from a strip of each crop. The rest of the net is computed for every crop.

N images, S the stored side, I the net's input, both in pixels.
"""

import math

import torch
from torch import Tensor

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
        side = _first_side(size)
        for draws in views(1, margin=margin, number=10)[5 * flip : 5 * flip + 5]:
            top, left = int(draws.top[0]), int(draws.left[0])
            left = margin - left if flip else left
            part = maps[:, :, top // GRID : top // GRID + side, left // GRID : left // GRID + side]
            part = part.clone(memory_format=torch.channels_last)
            crop = whole[:, :, top : top + size, left : left + size]
            if top < margin:
                part[:, :, -1:, :] = net.lower(crop[:, :, -STRIP:, :])
            if left < margin:
                part[:, :, :, -1:] = net.lower(crop[:, :, :, -STRIP:])
            found.append(net.classify(net.upper(part)))
    return found


def _first_side(size: int) -> int:
    return 1 + (1 + math.ceil((size - 11) / 4) - 3) // 2
