"""Local response normalisation on a GPU: one pass over NHWC memory forward, one backward, as kernels of Triton.

A pixel's C maps lie side by side in memory, each column's part of them a run of `size` numbers: memory is rows of that
many numbers, one for every pixel and column. A program takes BLOCK numbers wherever rows begin and end, so that no
number of maps wastes threads. A window is read by loads at shifted addresses; all but the first of them come from the
first-level cache, so that each number crosses the memory bus once.

The backward pass needs the scale of every map of the window, and so the squares of many windows: their loads are mostly
the same, and the compiler merges them, into 2n - 1 of the activations and n of the gradients. Windows of more than
UNROLLED maps are summed in loops instead, whose backward pass makes n * n loads.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a program
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # said, for its default differs between versions of Triton
UNROLLED = 9  # maps of a window whose loads are written out
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def forward(a_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool) -> Tensor:
    """a_NCHW: channels_last, of one of DTYPES; returns the same form."""
    out = torch.empty_like(a_NCHW, memory_format=torch.channels_last)
    _run(_forward, (a_NCHW, out), columns, k, n, alpha, beta, relu)
    return out


def backward(
    a_NCHW: Tensor, grad_NCHW: Tensor, columns: int, k: float, n: int, alpha: float, beta: float, relu: bool
) -> Tensor:
    """The gradient with respect to a_NCHW; all three channels_last and of one type."""
    out = torch.empty_like(a_NCHW, memory_format=torch.channels_last)
    _run(_backward, (a_NCHW, grad_NCHW, out), columns, k, n, alpha, beta, relu)
    return out


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled for this device and type; found out with the paper's constants. Where they
    cannot, for want of a C compiler as a rule, it is said once, as a warning."""
    if dtype not in DTYPES:
        return False
    maps = torch.ones(1, 96, 1, 1, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    try:
        for relu in (True, False):
            forward(maps, 2, 2.0, 5, 1e-4, 0.75, relu)
        backward(maps, maps, 2, 2.0, 5, 1e-4, 0.75, True)
    except Exception as error:  # of Triton, its compilers and the machine's: a kind for each
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"LRN on {device} in {dtype} takes slower tensor operations, for Triton cannot compile its kernels: "
            f"{reason[0]}; it needs a C compiler, such as gcc, on every machine with a GPU",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def constants(dtype: torch.dtype, maps: int, columns: int, n: int, beta: float, relu: bool) -> dict[str, bool | int]:
    """What the kernels are compiled for: other types, sizes, windows and powers have kernels of their own."""
    wide = dtype == torch.float64
    size = maps // columns
    half = min(n // 2, size - 1)  # a window that is wider than a column reads all of it
    papers = beta == 0.75 and not wide  # then the power is two square roots
    unroll = half <= UNROLLED // 2
    return {"SIZE": size, "HALF": half, "RELU": relu, "WIDE": wide, "PAPERS": papers, "UNROLL": unroll, "BLOCK": BLOCK}


def _run(
    kernel: "triton.JITFunction[..., None]",
    tensors: tuple[Tensor, ...],
    columns: int,
    k: float,
    n: int,
    alpha: float,
    beta: float,
    relu: bool,
) -> None:
    a = tensors[0]
    if not a.numel():
        return
    fixed = constants(a.dtype, a.shape[1], columns, n, beta, relu)
    with torch.cuda.device_of(a):  # Triton launches on the current device
        kernel[triton.cdiv(a.numel(), BLOCK),](*tensors, a.numel(), k, alpha, beta, **fixed, **OPTIONS)


@triton.jit
def _place(total, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first number, and for each of its numbers: its place after the first, its map within its column,
    and whether it is one. The first alone may be beyond 2**31."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    here = ((first % SIZE).to(tl.int32) + offset) % SIZE
    return first, offset, here, offset < total - first


@triton.jit
def _load(source, shift, here, inside, SIZE: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr):
    """The numbers `shift` maps further, after ReLU, in which a NaN stays one; zeros beyond the column."""
    there = here + shift
    found = tl.load(source + shift, mask=inside & (there >= 0) & (there < SIZE), other=0.0)
    found = found.to(tl.float64 if WIDE else tl.float32)
    if RELU:
        found = tl.where(found < 0, 0.0, found)
    return found


@triton.jit
def _scale(
    a, shift, here, inside, k, alpha,
    SIZE: tl.constexpr, HALF: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """k + alpha * the sum of squares over the window whose centre is `shift` maps further."""
    total = tl.zeros(here.shape, tl.float64 if WIDE else tl.float32)
    if UNROLL:
        for d in tl.static_range(-HALF, HALF + 1):
            value = _load(a, shift + d, here, inside, SIZE, RELU, WIDE)
            total += value * value
    else:
        for d in range(-HALF, HALF + 1):
            value = _load(a, shift + d, here, inside, SIZE, RELU, WIDE)
            total += value * value
    return k + alpha * total


@triton.jit
def _power(scale, beta, PAPERS: tl.constexpr):
    """scale ** -beta."""
    if PAPERS:
        root = tl.rsqrt(scale)
        return root * tl.sqrt(root)
    else:
        return tl.exp2(-beta * tl.log2(scale))


@triton.jit
def _share(
    a, grad, shift, here, inside, k, alpha, beta,
    SIZE: tl.constexpr, HALF: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, PAPERS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """g a s ** (-beta - 1) of the map that is `shift` further; zeros beyond the column."""
    scale = _scale(a, shift, here, inside, k, alpha, SIZE, HALF, RELU, WIDE, UNROLL)
    value = _load(a, shift, here, inside, SIZE, RELU, WIDE)
    given = _load(grad, shift, here, inside, SIZE, False, WIDE)
    if PAPERS:
        root = tl.rsqrt(scale)
        return given * value * (root * tl.sqrt(root) * (root * root))
    else:
        return given * value * tl.exp2((-beta - 1) * tl.log2(scale))


@triton.jit
def _number(value, WIDE: tl.constexpr):
    """A constant in the type of the arithmetic."""
    return tl.full((), value, tl.float64 if WIDE else tl.float32)


# Nothing is compiled anew for another address or number of images. And unless the compiler is told that an address is a
# multiple of 16 bytes, each thread takes one number at a time, and neighbours in a warp are neighbours in memory. With
# four to a thread, each load at a shifted address would be four, of every fourth number.
@triton.jit(do_not_specialize=["a", "out", "total"])
def _forward(
    a, out, total: tl.int64, k: tl.float64, alpha: tl.float64, beta: tl.float64,
    SIZE: tl.constexpr, HALF: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, PAPERS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, alpha, beta = _number(k, WIDE), _number(alpha, WIDE), _number(beta, WIDE)
    first, offset, here, inside = _place(total, SIZE, BLOCK)
    a += first + offset
    scale = _scale(a, 0, here, inside, k, alpha, SIZE, HALF, RELU, WIDE, UNROLL)
    value = _load(a, 0, here, inside, SIZE, RELU, WIDE)
    result = value * _power(scale, beta, PAPERS)
    tl.store(out + first + offset, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["a", "grad", "out", "total"])
def _backward(
    a, grad, out, total: tl.int64, k: tl.float64, alpha: tl.float64, beta: tl.float64,
    SIZE: tl.constexpr, HALF: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, PAPERS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, alpha, beta = _number(k, WIDE), _number(alpha, WIDE), _number(beta, WIDE)
    first, offset, here, inside = _place(total, SIZE, BLOCK)
    a += first + offset
    grad += first + offset
    spread = tl.zeros(here.shape, tl.float64 if WIDE else tl.float32)
    if UNROLL:
        for d in tl.static_range(-HALF, HALF + 1):
            spread += _share(a, grad, d, here, inside, k, alpha, beta, SIZE, HALF, RELU, WIDE, PAPERS, UNROLL)
    else:
        for d in range(-HALF, HALF + 1):
            spread += _share(a, grad, d, here, inside, k, alpha, beta, SIZE, HALF, RELU, WIDE, PAPERS, UNROLL)
    scale = _scale(a, 0, here, inside, k, alpha, SIZE, HALF, RELU, WIDE, UNROLL)
    value = _load(a, 0, here, inside, SIZE, RELU, WIDE)
    direct = _load(grad, 0, here, inside, SIZE, False, WIDE) * _power(scale, beta, PAPERS)
    result = direct - 2 * alpha * beta * value * spread
    if RELU:
        result = tl.where(value != 0, result, 0.0)
    tl.store(out + first + offset, result.to(out.dtype.element_ty), mask=inside)
