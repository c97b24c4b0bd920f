"""A fully connected layer whose products on the CPU are oneDNN's where PyTorch's own BLAS is slow.

PyTorch multiplies float32 matrices by Intel's MKL, which holds back on other makers' CPUs. On two cores of an AMD EPYC
with AVX-512 fc6 took, for a batch of 128: forward 69 ms by MKL and 48 by oneDNN, the input's gradient 78 and 51, the
weights' gradient 62 and 53 (2026-11-27). On Intel's CPUs, in other types and layouts, on other devices, under a tracer
or a transform of torch.func, and for gradients of gradients this is `nn.Linear`.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .lrn import is_traced

SMALLEST = 2**16  # weights of a layer from which it pays


class Linear(nn.Linear):
    """`nn.Linear`, faster."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out,): (N, out)."""
    if (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or x.layout != torch.strided
        or x.dim() != 2
        or weight.numel() < SMALLEST
        or not x.numel()
        or torch.is_autocast_enabled("cpu")
        or is_traced()
        or is_transformed()
        or not pays()
    ):
        return F.linear(x, weight, bias)
    found: Tensor = _OneDnnLinear.apply(x, weight, bias)
    return found


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        product = F.linear if torch.is_grad_enabled() else _product  # with create_graph it is differentiated again
        grad_x = product(grad, weight.t()) if wants_x else None
        grad_weight = product(grad.t(), x.t()) if wants_weight else None
        grad_bias = grad.sum(0) if wants_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times weight transposed, plus bias."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which an autograd.Function has other rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def pays() -> bool:
    """Whether the CPU is one that MKL holds back on, and this PyTorch has the operation, which is not a public one."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except OSError:
        return False
