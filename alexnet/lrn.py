"""Local response normalisation (paper, 3.3), within columns, forward and backward in closed form.

N images, C maps, H rows, W columns of pixels; P = N*H*W pixels, each a row of C maps in NHWC memory.
"""

import functools
import importlib.util

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def local_response_norm(
    a_NCHW: Tensor,
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    columns: int = 1,
    relu: bool = False,
) -> Tensor:
    """Divide each activation by (k + alpha * sum of squares over its n adjacent maps) ** beta (paper, 3.3).

    alpha multiplies the plain sum, as printed in the paper; PyTorch and Caffe divide it by n first, so
    `nn.LocalResponseNorm(n, alpha * n, beta, k)` is the same function. The C maps are `columns` equal halves
    (thirds, ...) and no sum crosses from one into the next, as when each column lives on its own GPU.

    With `relu` the function of relu(a_NCHW): the paper's order, in one pass over memory instead of two.
    The arithmetic is float32 (float64 for float64 input), whatever the input's type: bfloat16 would round
    alpha * sum away. The result has the input's type and channels_last memory.

    Raises ValueError if n is not odd and positive, or C is not a multiple of columns.
    """
    check_constants(k=k, n=n, alpha=alpha, beta=beta)
    if is_traced():
        return traceable_forward(a_NCHW, columns, k, n, alpha, beta, relu)
    if a_NCHW.shape[1] % columns:
        raise ValueError(f"{a_NCHW.shape[1]} maps cannot be split into {columns} columns")
    result: Tensor = _LocalResponseNorm.apply(a_NCHW, columns, k, n, alpha, beta, relu)
    return result


def check_constants(*, k: float, n: int, alpha: float, beta: float) -> None:
    """Raise ValueError, naming the constant, where the LRN formula has no meaning."""
    if n < 1 or n % 2 == 0:
        raise ValueError(f"lrn_n = {n}: the window is centred on a map, so n must be odd and positive, such as 5")
    if k <= 0:
        raise ValueError(f"lrn_k = {k}: must be above 0, or silent maps divide by zero; the paper has 2")
    if alpha < 0:
        raise ValueError(f"lrn_alpha = {alpha}: must not be negative; the paper has 1e-4 on the plain sum")
    if beta < 0:
        raise ValueError(f"lrn_beta = {beta}: must not be negative; the paper has 0.75")


class LocalResponseNorm(nn.Module):
    """`local_response_norm` as a layer without parameters, ReLU included where asked."""

    def __init__(self, *, k: float, n: int, alpha: float, beta: float, columns: int, relu: bool) -> None:
        super().__init__()
        check_constants(k=k, n=n, alpha=alpha, beta=beta)
        self.k, self.n, self.alpha, self.beta, self.columns, self.relu = k, n, alpha, beta, columns, relu

    def forward(self, a_NCHW: Tensor) -> Tensor:
        return local_response_norm(
            a_NCHW, k=self.k, n=self.n, alpha=self.alpha, beta=self.beta, columns=self.columns, relu=self.relu
        )

    def extra_repr(self) -> str:
        constants = f"k={self.k}, n={self.n}, alpha={self.alpha} (undivided), beta={self.beta}"
        return f"{constants}, columns={self.columns}, relu={self.relu}"


class _LocalResponseNorm(torch.autograd.Function):
    """Keeps only the input for the backward pass: recomputing the sums is cheaper than storing them."""

    @staticmethod
    def forward(ctx, a_NCHW, columns, k, n, alpha, beta, relu):  # type: ignore[no-untyped-def]
        a_NCHW = a_NCHW.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(a_NCHW)
        ctx.constants = (columns, k, n, alpha, beta, relu)
        return _implementation(a_NCHW)[0](a_NCHW, *ctx.constants)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx, grad_NCHW):  # type: ignore[no-untyped-def]
        (a_NCHW,) = ctx.saved_tensors
        grad_NCHW = grad_NCHW.contiguous(memory_format=torch.channels_last)
        grad = _implementation(a_NCHW)[1](a_NCHW, grad_NCHW, *ctx.constants)
        return grad, None, None, None, None, None, None


def _implementation(a: Tensor):  # type: ignore[no-untyped-def]
    """The (forward, backward) pair for a's device: compiled loops on the CPU, kernels on a GPU where Triton can make
    them, tensor operations elsewhere."""
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64, torch.bfloat16):
        from . import lrn_cpu  # numba takes a while to import, and only CPU training needs it

        return lrn_cpu.forward, lrn_cpu.backward
    if a.device.type == "cuda" and _has_triton():
        from . import lrn_gpu  # which imports Triton

        if lrn_gpu.works_on(a.device, a.dtype):
            return lrn_gpu.forward, lrn_gpu.backward
    return tensor_forward, tensor_backward


@functools.cache
def _has_triton() -> bool:
    """PyTorch brings it where it is made for GPUs of NVIDIA or AMD on Linux."""
    return importlib.util.find_spec("triton") is not None


def tensor_forward(a_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool) -> Tensor:
    """The layer in tensor operations, for any device."""
    a = _by_column(a_NCHW.relu() if relu else a_NCHW, columns)
    scale = k + alpha * _window_sum(a * a, n)
    return (a * scale.pow(-beta)).flatten(1, 2).to(a_NCHW.dtype)


def tensor_backward(
    a_NCHW: Tensor, grad_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool
) -> Tensor:
    """Gradient with respect to the input: g_i s_i^-b - 2 alpha b a_i SUM_j g_j a_j s_j^(-b-1), j around i."""
    a, grad = _by_column(a_NCHW.relu() if relu else a_NCHW, columns), _by_column(grad_NCHW, columns)
    scale = k + alpha * _window_sum(a * a, n)
    direct = grad * scale.pow(-beta)
    spread = _window_sum(direct * a / scale, n)
    dense = direct - (2 * alpha * beta) * a * spread
    if relu:
        dense = dense * (a != 0)
    return dense.flatten(1, 2).to(a_NCHW.dtype)


def is_traced() -> bool:
    """Whether operations are being recorded, by torch.export, torch.compile, torch.jit.trace or, through one of them,
    torch.onnx, rather than only computed: compiled loops and autograd.Functions cannot be."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def traceable_forward(a_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool) -> Tensor:
    """The layer in operations that a tracer can record for any number of images, and autograd differentiate: no size
    is read, nothing is changed in place. Equal to `tensor_forward` but for the order of its sums."""
    a = a_NCHW.relu() if relu else a_NCHW
    a = torch.unflatten(a if a.dtype == torch.float64 else a.float(), 1, (columns, -1))
    padded = F.pad(a * a, (0, 0, 0, 0, n // 2, n // 2))  # zeros beyond the first and the last map of a column
    total = padded[:, :, : 1 - n or None]
    for first in range(1, n):
        total = total + padded[:, :, first : first + 1 - n or None]
    result: Tensor = (a * (k + alpha * total).pow(-beta)).flatten(1, 2).to(a_NCHW.dtype)
    return result


def _by_column(a_NCHW: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) to (N, columns, C / columns, H, W), in at least float32."""
    a = a_NCHW if a_NCHW.dtype == torch.float64 else a_NCHW.float()
    num_images, maps, height, width = a.shape
    return a.reshape(num_images, columns, maps // columns, height, width)


def _window_sum(a: Tensor, n: int) -> Tensor:
    """Sum over the n maps centred on each map, along dimension 2; maps beyond the edge count as zero."""
    half, maps = n // 2, a.shape[2]
    total = a.clone()
    for shift in range(1, min(half, maps - 1) + 1):
        total[:, :, shift:] += a[:, :, :-shift]
        total[:, :, :-shift] += a[:, :, shift:]
    return total
