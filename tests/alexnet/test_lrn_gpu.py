"""LRN's kernels for GPUs without one: what they compute in Triton's interpreter, and what Triton's compiler makes of
them. What only a GPU can show is in test_gpu.py."""

import math
import os
import re
import subprocess
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lrn_cases import CASES, TOLERANCES, channels_last, make_case, wanted

from alexnet import local_response_norm, lrn

triton = pytest.importorskip("triton")

from alexnet import lrn_gpu  # noqa: E402

PAPERS = (2, 2.0, 5, 1e-4, 0.75, True)  # columns, k, n, alpha, beta, relu


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process in which Triton interprets kernels: it asks for that when it is imported."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
        pool.submit(int).result()
    yield lambda function, *args: pool.submit(function, *args).result()
    pool.shutdown()


def both_passes(a, grad, constants):
    assert os.environ["TRITON_INTERPRET"] == "1"
    out, found = lrn_gpu.forward(a, *constants), lrn_gpu.backward(a, grad, *constants)
    for tensor in (out, found):
        assert (tensor.dtype, tensor.shape) == (a.dtype, a.shape)
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    return out.double().numpy(), found.double().numpy()


def assert_close(found, exact, rtol, atol):
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_passes_equal_a_naive_loop_in_float64(interpreted, case):
    """In float64, and as near as its type allows in each of the others."""
    a, grad, constants = make_case(*case)
    for dtype, tolerance in TOLERANCES.items():
        given = a.to(dtype), grad.to(dtype)
        found = interpreted(both_passes, *given, constants)
        assert_close(found, wanted(*given, constants), tolerance, tolerance)


@pytest.mark.parametrize("beta", [0.75, 0.4])
def test_huge_and_tiny_activations_stay_accurate(interpreted, beta):
    a = torch.logspace(-18, 9, 200).reshape(1, 4, 50, 1).contiguous(memory_format=torch.channels_last)
    constants = (1, 2.0, 5, 1e-4, beta, False)
    out, _ = interpreted(both_passes, a, torch.ones_like(a), constants)
    exact, _ = wanted(a, torch.ones_like(a), constants)
    torch.testing.assert_close(torch.from_numpy(out), exact, rtol=1e-5, atol=0)


def test_activations_whose_squares_overflow_become_zero_and_no_gradient_is_nan(interpreted):
    a = torch.full((1, 4, 1, 1), 1e25).contiguous(memory_format=torch.channels_last)
    for beta in (0.75, 0.6):
        out, grad = interpreted(both_passes, a, torch.ones_like(a), (1, 2.0, 3, 1e-4, beta, True))
        assert (out == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_a_nan_stays_a_nan_in_its_window_and_no_further(interpreted, beta):
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1, 16, 1, 1, dtype=dtype)
        a[0, 3] = math.nan
        out, grad = interpreted(both_passes, a, torch.ones_like(a), (2, 2.0, 5, 1e-4, beta, True))
        assert [int(c) for c in range(16) if math.isnan(out[0, c, 0, 0])] == [1, 2, 3, 4, 5]
        assert [int(c) for c in range(16) if math.isnan(grad[0, c, 0, 0])] == [0, 1, 2, 3, 4, 5, 6, 7]


def within_nan(columns, maps):
    """Both passes over maps that lie between NaN, into memory that lies between ones: what is read and what written."""
    total = 2 * 3 * columns * maps
    memory = [torch.full((total + 200,), math.nan) for _ in range(2)] + [torch.ones(total + 200) for _ in range(2)]
    a, grad, out, out_grad = (flat[100:-100].view(2, 3, 1, columns * maps).permute(0, 3, 1, 2) for flat in memory)
    for number, tensor in enumerate((a, grad)):
        tensor.copy_(channels_last(a.shape, number))
    constants = (columns, 2.0, 5, 0.1, 0.75, False)
    lrn_gpu._run(lrn_gpu._forward, (a, out), *constants)
    lrn_gpu._run(lrn_gpu._backward, (a, grad, out_grad), *constants)
    edges = [edge for flat in memory[2:] for edge in (flat[:100], flat[-100:])]
    assert all(bool((edge == 1).all()) for edge in edges)
    return out.double().numpy(), out_grad.double().numpy()


@pytest.mark.parametrize(("columns", "maps"), [(1, 7), (3, 1), (2, 171)])
def test_nothing_is_read_or_written_beyond_the_maps(interpreted, columns, maps):
    shape = (2, columns * maps, 3, 1)
    a, grad = (channels_last(shape, number).float() for number in (0, 1))
    exact = wanted(a, grad, (columns, 2.0, 5, 0.1, 0.75, False))
    assert_close(interpreted(within_nan, columns, maps), exact, 3e-6, 3e-6)


def as_a_layer(a, grad):
    """As on a GPU: the kernels behind the layer that nets use."""
    with mock.patch.object(lrn, "_implementation", return_value=(lrn_gpu.forward, lrn_gpu.backward)):
        a.requires_grad_()
        out = local_response_norm(a, alpha=0.1, columns=2, relu=True)
        (found,) = torch.autograd.grad(out, a, grad)
    return out.detach().double().numpy(), found.double().numpy()


def test_inputs_and_gradients_in_any_memory_are_taken(interpreted):
    a, grad = (torch.randn(3, 20, 5, 8, generator=torch.Generator().manual_seed(seed)).mul(3) for seed in (3, 4))
    exact = wanted(a, grad, (2, 2.0, 5, 0.1, 0.75, True))
    assert_close(interpreted(as_a_layer, a, grad), exact, 3e-6, 3e-6)  # NCHW
    part, every = a[:, ::2, 1:, ::3], grad.transpose(2, 3)[:, ::2, ::2, 1:]  # strided; the gradient transposed
    part, every = part[:, :, :, :3], every[:, :, :3].transpose(2, 3)
    exact = wanted(part, every, (2, 2.0, 5, 0.1, 0.75, True))
    assert_close(interpreted(as_a_layer, part, every), exact, 3e-6, 3e-6)


def test_an_empty_batch_starts_no_kernel():
    """In this process, where none could run."""
    a = torch.empty(0, 12, 3, 3).contiguous(memory_format=torch.channels_last)
    assert lrn_gpu.forward(a, *PAPERS).shape == lrn_gpu.backward(a, a, *PAPERS).shape == a.shape


class Driver:
    """A GPU of NVIDIA for which Triton may compile, and that runs nothing."""

    def __init__(self, capability):
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What Triton's compiler makes of both kernels when they are called, for the paper's 48 maps of a column; it leaves
    nothing in the home directory, where its cache is."""
    kernels = lrn_gpu._forward, lrn_gpu._backward
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    run, made = triton.JITFunction.run, []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda *args, warmup, **named: made.append(run(*args, warmup=True, **named))
    )

    def compile_for(dtype, capability, n=5, beta=0.75):
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        for kernel in kernels:
            kernel.device_caches.clear()
        made.clear()
        a = torch.ones(1, 96, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        lrn_gpu.forward(a, 2, 2.0, n, 1e-4, beta, True)
        lrn_gpu.backward(a, a, 2, 2.0, n, 1e-4, beta, True)
        return list(made)

    yield compile_for
    for kernel in kernels:
        kernel.device_caches.clear()


@pytest.mark.parametrize("dtype", lrn_gpu.DTYPES, ids=str)
def test_the_kernels_compile_for_a_gpu_and_read_each_shift_once(dtype, compiled, tmp_path):
    for made, loads in zip(compiled(dtype, 90), (5, 9 + 5), strict=True):
        text = made.asm["ttgir"]
        assert text.count("tt.load") == loads
        assert text.count("tt.store") == 1
        assert set(re.findall(r"sizePerThread = \[(\d+)\]", text)) == {"1"}
        assert "convert_layout" not in text
        assert made.metadata.shared == 0
        assert local_memory(made.asm["cubin"], tmp_path) == 0


def test_constants_are_float64_and_the_number_of_numbers_int64_whatever_they_are(compiled):
    """An argument that is 1, or that 16 divides, would be another kernel; a float of Python would be float32."""
    for made in compiled(torch.float64, 90):
        signature = made.src.signature
        assert [signature[name] for name in ("total", "k", "alpha", "beta")] == ["i64", "fp64", "fp64", "fp64"]
        assert not any(made.src.attrs.values())


def local_memory(cubin, folder):
    """Bytes a thread of a compiled kernel keeps outside its registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    found = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", found)[1]) + int(re.search(r"LOCAL:(\d+)", found)[1])


@pytest.mark.parametrize(("capability", "n", "beta"), [(75, 5, 0.75), (80, 5, 0.6), (100, 15, 0.75)])
def test_they_compile_for_other_generations_windows_and_powers(capability, n, beta, compiled):
    assert all("cubin" in made.asm for made in compiled(torch.float32, capability, n, beta))


def test_a_machine_that_cannot_compile_is_told_once_and_has_tensor_operations(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(lrn_gpu, "forward", fail)
    lrn_gpu.works_on.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match=r"LRN on cpu in torch.float32 .*: Failed to find C compiler.*gcc"
        ) as said:
            assert not lrn_gpu.works_on(torch.device("cpu"), torch.float32)
        assert len(said) == 1
        assert "\n" not in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not lrn_gpu.works_on(torch.device("cpu"), torch.float32)
            assert not lrn_gpu.works_on(torch.device("cpu"), torch.int32)
    finally:
        lrn_gpu.works_on.cache_clear()


@pytest.mark.parametrize(("there", "works"), [(True, True), (True, False), (False, True)])
def test_a_gpu_takes_the_kernels_where_they_work_and_tensor_operations_elsewhere(there, works, monkeypatch):
    monkeypatch.setattr(lrn, "_has_triton", lambda: there)
    monkeypatch.setattr(lrn_gpu, "works_on", lambda device, dtype: works)
    a = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    kernels, operations = (lrn_gpu.forward, lrn_gpu.backward), (lrn.tensor_forward, lrn.tensor_backward)
    assert lrn._implementation(a) == (kernels if there and works else operations)
    assert lrn._implementation(torch.empty(1))[0].__module__ == "alexnet.lrn_cpu"
