"""Sizes and constants for the kernels of LRN, and what they should give: in Triton's interpreter and on a GPU."""

import torch
from test_lrn import naive

# maps of a column, columns, n, beta, relu, (images, height, width)
CASES = [
    (48, 2, 5, 0.75, True, (2, 5, 7)),  # the paper's, over many blocks and a rest
    (48, 2, 5, 0.6, False, (1, 5, 7)),
    (96, 1, 5, 0.75, False, (3, 2, 3)),
    (96, 3, 3, 1.3, True, (1, 3, 1)),
    (5, 3, 5, 0.75, True, (4, 9, 11)),
    (5, 1, 3, 0.5, False, (2, 31, 1)),
    (3, 2, 9, 0.75, True, (3, 1, 1)),  # windows wider than a column
    (3, 3, 201, 0.4, False, (2, 3, 3)),
    (1, 1, 5, 0.75, False, (2, 3, 5)),
    (1, 3, 1, 2.5, True, (2, 3, 5)),
    (48, 1, 1, 0.75, False, (1, 3, 3)),
    (48, 2, 9, 1.0, True, (1, 3, 3)),  # the widest that is written out
    (48, 1, 15, 0.75, True, (1, 3, 3)),  # in loops
    (5, 2, 5, 0.0, True, (1, 3, 3)),
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

Constants = tuple[int, float, int, float, float, bool]  # columns, k, n, alpha, beta, relu


def make_case(
    maps: int, columns: int, n: int, beta: float, relu: bool, size: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, Constants]:
    """Activations and gradients of a case in float64, and its constants."""
    images, height, width = size
    shape = (images, maps * columns, height, width)
    return channels_last(shape, 1) * 3, channels_last(shape, 2), (columns, 2.1, n, 0.13, beta, relu)


def channels_last(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def wanted(a: torch.Tensor, grad: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive loop's output and gradient in float64."""
    columns, k, n, alpha, beta, relu = constants
    exact = a.detach().double().requires_grad_()
    out = naive(exact, k, n, alpha, beta, columns, relu)
    return out.detach(), torch.autograd.grad(out, exact, grad.double())[0]
