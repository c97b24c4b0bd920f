"""The same numbers on a GPU as on the CPU."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lrn_cases import CASES, TOLERANCES, make_case, wanted
from torch.nn import functional as F

import alexnet
from alexnet import MeanSubtraction, PaperSGD, augment, count_errors, local_response_norm, lrn
from alexnet.dropout import BatchPosition, keep_mask
from alexnet.layouts import Layout, ShardedNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 means float32: no TF32 in matrix products and convolutions."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def difference(a, b):
    """Norm of the difference of two tensors relative to the second's."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def build():
    return alexnet.build("paper", 7, input_size=64, width=0.125, init="he", seed=3)


def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, 64, 64, generator=random), torch.randint(0, 7, (12,), generator=random)


def forward_backward(device, dtype, bf16=False):
    """Scores and gradients of a batch with dropout, whose masks depend on the images alone."""
    net = build().to(device, dtype)
    images, labels = (tensor.to(device) for tensor in batch())
    where = BatchPosition(11, 2, torch.arange(12, device=device))
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        scores = net(images.to(dtype).contiguous(memory_format=torch.channels_last), where)
    F.cross_entropy(scores.to(dtype), labels).backward()
    return {"scores": scores} | {name: param.grad for name, param in net.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "bf16", "bound"),
    [(torch.float64, False, 1e-9), (torch.float32, False, 1e-4), (torch.float32, True, 0.3)],
    ids=["fp64", "fp32", "bf16"],
)
def test_scores_and_gradients_of_the_net_are_those_of_the_cpu_in_float64(dtype, bf16, bound):
    """In bfloat16, with 8 bits, the first layers' gradients are off by a sixth on a CPU too; a wrong one is by 1."""
    wanted, found = forward_backward("cpu", torch.float64), forward_backward("cuda", dtype, bf16)
    assert found.keys() == wanted.keys()
    worst = max((difference(found[name], wanted[name]), name) for name in wanted)
    assert worst[0] < bound, worst


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("relu", [False, True])
def test_lrn_and_its_gradient_are_those_of_the_cpu(dtype, bound, relu):
    random = torch.Generator().manual_seed(1)
    a, grad = (torch.randn(2, 12, 5, 7, generator=random).mul(3).to(dtype) for _ in range(2))
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        x = a.to(device, kind).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = local_response_norm(x, alpha=0.1, columns=2, relu=relu)
        assert out.dtype == kind
        results.append((out, *torch.autograd.grad(out, x, grad.to(device, kind))))
    for found, exact in zip(results[1], results[0], strict=True):
        assert difference(found, exact) < bound


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_of_lrn_equal_a_naive_loop_in_float64(case, dtype):
    """Through the layer, which must have taken them: where Triton cannot compile, the warning fails the test."""
    a, grad, (columns, k, n, alpha, beta, relu) = make_case(*case)
    x = a.to("cuda", dtype).requires_grad_()
    assert "lrn_gpu" in lrn._implementation(x)[0].__module__
    out = local_response_norm(x, k=k, n=n, alpha=alpha, beta=beta, columns=columns, relu=relu)
    (found,) = torch.autograd.grad(out, x, grad.to("cuda", dtype))
    assert (out.dtype, found.dtype) == (dtype, dtype)
    for ours, exact in zip(
        (out, found), wanted(a.to(dtype), grad.to(dtype), (columns, k, n, alpha, beta, relu)), strict=True
    ):
        torch.testing.assert_close(ours.detach().cpu().double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_lrn_takes_activations_and_gradients_in_any_memory_and_an_empty_batch():
    random = torch.Generator().manual_seed(1)
    a, grad = (torch.randn(3, 20, 8, 8, generator=random) for _ in range(2))
    results = []
    for device in ("cpu", "cuda"):
        x = a.to(device)[:, ::2, 1:, ::3].requires_grad_()
        out = local_response_norm(x, alpha=0.1, columns=2, relu=True)
        results.append((out, *torch.autograd.grad(out, x, grad.to(device)[:, ::2, ::3, 1:].transpose(2, 3))))
    for found, exact in zip(results[1], results[0], strict=True):
        assert difference(found, exact) < 1e-6
    assert local_response_norm(torch.empty(0, 12, 3, 3, device="cuda")).shape == (0, 12, 3, 3)


def test_lrn_of_more_than_2_to_the_31_numbers():
    """The last image by itself, and as the last of a batch that is larger."""
    images = 2**31 // (96 * 55 * 55) + 2
    if torch.cuda.mem_get_info()[0] < 6 * 2 * images * 96 * 55 * 55:
        pytest.skip("needs 26 GB of the GPU's memory")
    a = torch.ones(images, 96, 55, 55, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    a[-1] = torch.randn(96, 55, 55, generator=torch.Generator().manual_seed(5)).cuda()
    x, last = a.requires_grad_(), a[-1:].detach().clone(memory_format=torch.channels_last).requires_grad_()
    outs = [local_response_norm(each, alpha=0.1, columns=2, relu=True) for each in (x, last)]
    assert torch.equal(outs[0][-1:], outs[1])
    grads = [torch.autograd.grad(out, each, torch.ones_like(out))[0] for out, each in zip(outs, (x, last), strict=True)]
    assert torch.equal(grads[0][-1:], grads[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_lrn_runs_on_the_gpu_of_its_input_whichever_is_the_current_one():
    a = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(6))
    found = local_response_norm(a.to("cuda:1"), alpha=0.1, columns=2)
    assert found.device == torch.device("cuda", 1)
    assert difference(found, local_response_norm(a, alpha=0.1, columns=2)) < 1e-6


@pytest.mark.parametrize("kind", ["data", "hybrid"])
def test_one_rank_on_nccl_trains_the_net_of_the_cpu(kind, tmp_path):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        total = torch.ones(3, device="cuda")
        dist.all_reduce(total)
        assert total.tolist() == [1.0] * 3
        placed, whole = ShardedNet(build().double().cuda(), Layout(kind, 1)), build().double()
        images, labels = batch()
        for net, device in ((placed, "cuda"), (whole, "cpu")):
            optimizer = PaperSGD(net.parameters(), lr=0.01)
            for step in range(3):
                where = BatchPosition(11, step, torch.arange(12, device=device))
                x = images.to(device, torch.float64)
                scores = net(x, where, [12]) if net is placed else net(x, where)
                F.cross_entropy(scores, labels.to(device)).backward()
                optimizer.step()
                net.zero_grad()
        weights = dict(whole.named_parameters())
        for name, tensor in placed.gather_full(dict(placed.part.named_parameters())):
            assert tensor.device.type == "cpu"
            assert difference(tensor, weights[name]) < 1e-9, name
    finally:
        dist.destroy_process_group()


def test_the_mean_image_is_subtracted_bit_for_bit_as_on_the_cpu():
    random = torch.Generator().manual_seed(2)
    mean = torch.rand(24, 24, 3, generator=random) * 255
    images = torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8, generator=random)
    draws = augment.draw(torch.arange(30).numpy(), seed=0, epoch=0, margin=8)
    cut = [torch.from_numpy(part) for part in (draws.top, draws.left, draws.flip)]
    wanted = MeanSubtraction(mean, 16, 1 / 64)(images, *cut)
    found = MeanSubtraction(mean.cuda(), 16, 1 / 64)(images.cuda(), *(part.cuda() for part in cut))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), wanted)


def test_images_are_cut_mirrored_and_coloured_bit_for_bit_as_on_the_cpu():
    random = np.random.default_rng(7)
    images = random.integers(0, 256, (30, 24, 24, 3), dtype=np.uint8)
    draws, shift = (
        augment.draw(np.arange(30), seed=0, epoch=0, margin=8),
        random.normal(0, 40, (30, 3)).astype(np.float32),
    )
    given = (torch.from_numpy(part).cuda() for part in (images, draws.top, draws.left, draws.flip, shift))
    found = augment.crop_flip_shift_tensors(*given, 16)
    assert np.array_equal(found.cpu().numpy(), augment.crop_flip_shift(images, draws, shift, 16))


def test_dropout_masks_are_those_of_the_cpu():
    masks = [
        keep_mask(BatchPosition(1, 2, torch.arange(64, device=device)), 6, range(33, 99), 0.5)
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(masks[0], masks[1].cpu())


def test_the_update_rule_is_that_of_the_cpu():
    random = torch.Generator().manual_seed(3)
    start, grads = torch.randn(50, generator=random).double(), torch.randn(4, 50, generator=random).double()
    weights = []
    for device in ("cpu", "cuda"):
        w = start.to(device).clone().requires_grad_()
        optimizer = PaperSGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
        for grad, rate in zip(grads, (0.1, 0.1, 0.01, 0.01), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            w.grad = grad.to(device)
            optimizer.step()
        assert optimizer.state[w]["velocity"].device.type == device
        weights.append(w.detach().cpu())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-14, atol=1e-15)


def test_errors_are_counted_as_on_the_cpu():
    random = torch.Generator().manual_seed(4)
    scores, labels = torch.randint(0, 9, (500, 20), generator=random).float(), torch.arange(500) % 20  # with ties
    scores[7] = float("nan")
    assert torch.equal(count_errors(scores.cuda(), labels.cuda()).cpu(), count_errors(scores, labels))
