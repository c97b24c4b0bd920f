"""A convolution of 3 x 3 by Winograd's algorithm on the CPU, with less than a third of the multiplications.

Tiles of 5 x 5 pixels are computed from windows of 7 x 7 as the interpolation of polynomials' product (Winograd 1980;
Lavin and Gray, arXiv:1509.09308): the windows' and the kernels' values at 49 points (alexnet/winograd_cpu.py) are
multiplied point by point, which is one product of matrices a point, in place of 25 * 9 multiplications. The gradients
are the transposed steps in turn.

On two cores of an AMD EPYC with AVX-512 a training step of the paper's net made 50.7 images/s, 1.14 times those of
torchvision's, and with the library's convolutions 44.7, 0.97 times (`python benchmarks/step.py --precision fp32`,
2026-11-27). Outputs and gradients of conv3, conv4 and conv5 differed from those in float64 by 1.3e-6 to 2.5e-6 of their
norm, the library's by 2e-7 to 1e-6. Such a training's peak of memory was 3.4 GB, with the library's 3.1 GB.

In other types, on other devices and CPUs than AMD's, under a tracer or a transform of torch.func, for gradients of
gradients, in memory that is not channels_last, and where it would not pay this is `nn.Conv2d`.

N images, C maps, H rows, W columns of pixels; G groups of maps, T tiles of all images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import is_transformed, pays
from .lrn import is_traced

TILE, SIZE = 5, 49  # pixels of a tile along an axis, and points of it in all
FEWEST_MAPS, FEWEST_TILES, SAVING = 128, 256, 2.4  # from which it pays: maps of a group, tiles, multiplications
LARGEST = 128  # images at a time: their values at the points are in memory


class WinogradConv2d(nn.Conv2d):
    """`nn.Conv2d` of 3 x 3 with padding 1, faster."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return conv3x3(x_NCHW, self.weight, self.bias, self.groups)


def conv3x3(x_NCHW: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """`F.conv2d` with padding 1 of x_NCHW and weight (maps, C / groups, 3, 3)."""
    if (
        is_traced()
        or is_transformed()
        or torch.is_autocast_enabled("cpu")
        or any(tensor is not None and tensor.dtype != torch.float32 for tensor in (x_NCHW, weight, bias))
        or x_NCHW.device.type != "cpu"
        or x_NCHW.layout != torch.strided
        or x_NCHW.dim() != 4
        or not x_NCHW.is_contiguous(memory_format=torch.channels_last)
        or not _saves_enough(x_NCHW, weight, groups)
        or not pays()
    ):
        return F.conv2d(x_NCHW, weight, bias, padding=1, groups=groups)
    found: Tensor = _Winograd.apply(x_NCHW, weight, bias, groups)
    return found


def tiles(side: int) -> int:
    """Tiles that cover an axis."""
    return -(-side // TILE)


def _saves_enough(x_NCHW: Tensor, weight: Tensor, groups: int) -> bool:
    num_images, maps_in, height, width = x_NCHW.shape
    num_tiles = tiles(height) * tiles(width)
    return (
        maps_in == weight.shape[1] * groups
        and min(weight.shape[1], len(weight) // groups) >= FEWEST_MAPS
        and num_images * num_tiles >= FEWEST_TILES
        and 9 * height * width >= SAVING * SIZE * num_tiles
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NCHW, weight, bias, groups):  # type: ignore[no-untyped-def]
        from . import winograd_cpu as cpu  # numba takes a while to import

        ctx.save_for_backward(x_NCHW, weight)
        ctx.groups, ctx.bias_sizes = groups, None if bias is None else bias.shape
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        shape = len(x_NCHW), len(weight), *x_NCHW.shape[2:]
        y_NCHW = torch.empty(shape, memory_format=torch.channels_last)  # no view, or ReLU could not change it in place
        kernels = cpu.kernel_transform(weight, groups).transpose(1, 2)
        added = weight.new_zeros(len(weight)) if bias is None else bias.contiguous()
        for part in _parts(x_NHWC):
            values = torch.bmm(cpu.input_transform(x_NHWC[part], groups), kernels)
            cpu.output_transform(values, added, y_NCHW[part].permute(0, 2, 3, 1))
        return y_NCHW

    @staticmethod
    def backward(ctx, grad_NCHW):  # type: ignore[no-untyped-def]
        from . import winograd_cpu as cpu

        x_NCHW, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # with create_graph it is differentiated again
            again = torch.ops.aten.convolution_backward(
                grad_NCHW, x_NCHW, weight, ctx.bias_sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], ctx.groups,
                [wants_x, wants_weight, wants_bias],
            )  # fmt: skip
            return *again, None
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        grad_NHWC = grad_NCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        grad_x = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
        grad_weight = torch.empty_like(weight, memory_format=torch.channels_last)
        kernels: Any = cpu.kernel_transform(weight, ctx.groups) if wants_x else None
        grad_kernels: Any = None
        for part in _parts(x_NHWC) if wants_x or wants_weight else []:
            grad_values = cpu.output_adjoint(grad_NHWC[part], ctx.groups)
            if wants_weight:
                product = torch.bmm(grad_values.transpose(1, 2), cpu.input_transform(x_NHWC[part], ctx.groups))
                grad_kernels = product if grad_kernels is None else grad_kernels.add_(product)
            if wants_x:
                cpu.input_adjoint(torch.bmm(grad_values, kernels), grad_x[part].permute(0, 2, 3, 1))
        if wants_weight:
            cpu.kernel_adjoint(grad_kernels, grad_weight.permute(0, 2, 3, 1))
        return (
            grad_x if wants_x else None,
            grad_weight if wants_weight else None,
            grad_NHWC.flatten(0, 2).sum(0) if wants_bias else None,
            None,
        )


def _parts(x_NHWC: Tensor) -> list[slice]:
    """Of the batch, one after another."""
    return [slice(first, first + LARGEST) for first in range(0, len(x_NHWC), LARGEST)]
