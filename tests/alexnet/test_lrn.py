"""LRN against a loop that follows the paper's formula symbol by symbol, in every implementation."""

import math

import pytest
import torch
from torch import nn

from alexnet import local_response_norm
from alexnet.lrn import tensor_backward, tensor_forward, traceable_forward


def naive(a: torch.Tensor, k: float, n: int, alpha: float, beta: float, columns: int, relu: bool) -> torch.Tensor:
    """b_i = a_i / (k + alpha * SUM_j a_j^2) ** beta, j from max(0, i - n/2) to min(N - 1, i + n/2) within a column."""
    if relu:
        a = a.clamp(min=0)
    out = torch.empty_like(a)
    maps = a.shape[1] // columns
    for i in range(a.shape[1]):
        first = i // maps * maps
        total = torch.zeros_like(a[:, 0])
        for j in range(max(first, i - n // 2), min(first + maps - 1, i + n // 2) + 1):
            total += a[:, j] ** 2
        out[:, i] = a[:, i] / (k + alpha * total) ** beta
    return out


def fused(a, k, n, alpha, beta, columns, relu):
    return local_response_norm(a, k=k, n=n, alpha=alpha, beta=beta, columns=columns, relu=relu)


def traceable(a, k, n, alpha, beta, columns, relu):
    return traceable_forward(a, columns, k, n, alpha, beta, relu)


class TensorOperations(torch.autograd.Function):
    """What runs on devices other than the CPU, here on the CPU."""

    @staticmethod
    def forward(ctx, a, *constants):
        ctx.save_for_backward(a)
        k, n, alpha, beta, columns, relu = ctx.constants = constants
        return tensor_forward(a, columns, k, n, alpha, beta, relu)

    @staticmethod
    def backward(ctx, grad):
        k, n, alpha, beta, columns, relu = ctx.constants
        return tensor_backward(*ctx.saved_tensors, grad, columns, k, n, alpha, beta, relu), *[None] * 6


implementations = pytest.mark.parametrize(
    "lrn", [fused, TensorOperations.apply, traceable], ids=["fused", "tensor", "traceable"]
)
cases = pytest.mark.parametrize(
    ("shape", "k", "n", "alpha", "beta", "columns", "relu"),
    [
        ((2, 12, 3, 5), 2.0, 5, 1e-1, 0.75, 2, False),
        ((2, 12, 3, 5), 2.0, 5, 1e-1, 0.75, 2, True),
        ((1, 7, 1, 1), 1.0, 3, 2.0, 0.5, 1, False),  # one pixel, an odd number of maps
        ((3, 6, 5, 7), 2.0, 9, 0.3, 0.75, 3, True),  # a window wider than a column
        ((2, 4, 2, 2), 0.5, 1, 1.0, 1.3, 1, False),  # a window of one map
        ((4, 8, 30, 31), 2.0, 5, 1e-4, 0.75, 2, True),  # many tiles and a rest, the paper's constants
    ],
)


def random_input(shape, dtype=torch.float64):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    return a.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@implementations
@cases
def test_forward_and_backward_equal_a_naive_float64_loop(lrn, shape, k, n, alpha, beta, columns, relu):
    a = random_input(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, out = naive(a, k, n, alpha, beta, columns, relu), lrn(a, k, n, alpha, beta, columns, relu)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    (expected_grad,) = torch.autograd.grad(expected, a, grad)
    (out_grad,) = torch.autograd.grad(out, a, grad)
    torch.testing.assert_close(out_grad, expected_grad, rtol=1e-11, atol=1e-12)


@implementations
def test_gradcheck(lrn):
    a = random_input((2, 6, 2, 3))
    assert torch.autograd.gradcheck(lambda x: lrn(x, 2.0, 5, 0.2, 0.75, 2, False), a)


@pytest.mark.parametrize("beta", [0.75, 0.6, 0.0, 2.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_low_precision_is_as_near_as_its_type_allows(beta, dtype, tolerance):
    a = random_input((2, 96, 9, 9), dtype)
    grad = random_input((2, 96, 9, 9), dtype).detach() / 3
    exact = a.detach().double().requires_grad_()
    expected = naive(exact, 2.0, 5, 0.05, beta, 2, True)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    out = fused(a, 2.0, 5, 0.05, beta, 2, True)
    (out_grad,) = torch.autograd.grad(out, a, grad)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(out_grad.double(), expected_grad, rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("beta", [0.75, 0.4])
def test_huge_and_tiny_activations_stay_accurate(beta):
    a = torch.logspace(-18, 9, 200).reshape(1, 4, 50, 1).contiguous(memory_format=torch.channels_last)
    expected = naive(a.double(), 2.0, 5, 1e-4, beta, 1, False)
    torch.testing.assert_close(fused(a, 2.0, 5, 1e-4, beta, 1, False).double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_a_nan_stays_a_nan(beta):
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1, 8, 1, 1, dtype=dtype)
        a[0, 3] = math.nan
        assert fused(a, 2.0, 5, 1e-4, beta, 1, True)[0, 3].isnan().all()


def test_alpha_is_undivided_so_torch_needs_n_times_as_much():
    a = random_input((2, 10, 3, 3))
    torch.testing.assert_close(local_response_norm(a, alpha=1e-2), nn.LocalResponseNorm(5, 5e-2, 0.75, 2.0)(a))


def test_no_sum_crosses_from_one_column_into_the_next():
    a = torch.zeros(1, 96, 1, 1, dtype=torch.float64)
    a[0, 47] = 10.0
    b = a.clone()
    b[0, 48] = 100.0  # the neighbour of map 47 lives on the other GPU
    assert local_response_norm(a, columns=2)[0, 47] == local_response_norm(b, columns=2)[0, 47]
    assert local_response_norm(a, columns=1)[0, 47] != local_response_norm(b, columns=1)[0, 47]


def test_several_threads_give_the_bits_of_one():
    a = random_input((4, 12, 40, 40), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = local_response_norm(a)
        torch.set_num_threads(3)
        assert torch.equal(local_response_norm(a), one)
    finally:
        torch.set_num_threads(threads)


def test_an_empty_batch_passes_through():
    a = torch.empty(0, 12, 3, 3, requires_grad=True)
    local_response_norm(a).sum().backward()
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("wrong", [{"n": 4}, {"n": 0}, {"k": 0.0}, {"alpha": -1.0}, {"beta": -0.5}, {"columns": 5}])
def test_constants_without_meaning_are_refused_by_name(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match="columns" if name == "columns" else f"lrn_{name}"):
        local_response_norm(torch.zeros(1, 12, 1, 1), **wrong)
