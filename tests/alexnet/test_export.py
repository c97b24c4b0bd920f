"""The net outside eager PyTorch: what torch.export, torch.jit.trace and torch.onnx record gives the eager scores."""

import io
import sys

import pytest
import torch

import alexnet

CLOSE = {"rtol": 0, "atol": 1e-5}


def make() -> alexnet.AlexNet:
    lrn = alexnet.LRN(alpha=1e-2)  # so large that a wrong window would show
    return alexnet.build("paper", 10, width=0.25, input_size=64, lrn=lrn, init="he").eval()


def images(number: int) -> torch.Tensor:
    return 30 * torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(number))


def check(recorded, net: alexnet.AlexNet) -> None:
    """At batch sizes other than the one it was recorded with, too."""
    with torch.no_grad():
        for number in (1, 2, 3, 7):
            scores = net(images(number))
            assert scores.abs().max() > 0.1
            torch.testing.assert_close(recorded(images(number)), scores, **CLOSE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.export.save takes channels_last weights for parts
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_net_gives_the_eager_scores_for_any_number_of_images(strict, tmp_path):
    net = make()
    batch = {0: torch.export.Dim("images")}
    program = torch.export.export(net, (images(3),), dynamic_shapes={"x_NCHW": batch}, strict=strict)
    check(program.module(), net)
    torch.export.save(program, tmp_path / "net.pt2")
    check(torch.export.load(tmp_path / "net.pt2").module(), net)


# the trace takes the side of the images for a constant, as the net itself does; TorchScript itself is deprecated
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_traced_net_that_was_saved_gives_the_eager_scores(tmp_path):
    net = make()
    torch.jit.save(torch.jit.trace(net, (images(3),)), tmp_path / "net.pt")
    check(torch.jit.load(tmp_path / "net.pt"), net)


def test_a_compiled_net_is_one_graph_with_the_eager_gradients():
    eager, net = make().double(), make().double()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for run in (eager, compiled):
        run(images(2).double()).square().sum().backward()
    for ours, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_an_onnx_model_of_the_net_is_well_formed(dynamo):
    onnx = pytest.importorskip("onnx", reason="torch.onnx needs the package onnx")
    if dynamo:
        pytest.importorskip("onnxscript", reason="its newer exporter needs the package onnxscript")
    file = io.BytesIO()
    dynamic = {"dynamic_axes": {"x_NCHW": {0: "images"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": {"x_NCHW": {0: torch.export.Dim("images")}}}
    torch.onnx.export(make(), (images(3),), file, input_names=["x_NCHW"], dynamo=dynamo, **dynamic)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    assert {"Conv", "Gemm"} <= {node.op_type for node in model.graph.node}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_without_the_package_onnx_torch_says_so(monkeypatch):
    """All of the net's operations have an ONNX form; only the package is missing."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(torch.onnx.OnnxExporterError, match="onnx is not installed"):
        torch.onnx.export(make(), (images(3),), io.BytesIO(), input_names=["x_NCHW"], dynamo=False)
