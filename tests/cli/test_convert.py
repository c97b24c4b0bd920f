"""jobs/convert.py: a run to one file, a file to another, and what is refused in one line."""

import os
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT, refused

import alexnet
from orchestrator.config.recipes import digits
from orchestrator.models.evaluate import check_named

BUILD = {"preset": "caffe", "num_classes": 3, "width": 0.0625, "input_size": 67, "lrn": {}}


@pytest.fixture
def model(tmp_path):
    """A checkpoint's folder."""
    net = alexnet.build("caffe", 3, width=0.0625, input_size=67, init="he", seed=1)
    description = alexnet.Description(BUILD | {"lrn": {"k": 1.0, "n": 5, "alpha": 2e-5, "beta": 0.75}}, ("a", "b", "c"))
    alexnet.TrainedNet(net, description, np.full((72, 72, 3), 99, np.float32)).save(tmp_path / "model")
    return tmp_path


def convert(folder, monkeypatch, capsys, *args):
    """What the command prints."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["convert.py", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "convert.py"), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_a_checkpoint_becomes_one_file_and_that_becomes_others(model, monkeypatch, capsys):
    lines = convert(model, monkeypatch, capsys, "model", "--to", "net.safetensors")
    size = (model / "net.safetensors").stat().st_size / 1e6
    assert lines == ["model: preset caffe, 3 classes, 67 pixels", f"  wrote {model}/net.safetensors, {size:.1f} MB"]
    (model / "names.txt").write_text("cat\ndog\nBär\n", "utf-8")
    given = ("net.safetensors", "--to", "named", "--as", "safetensors", "--classes", "names.txt")
    convert(model, monkeypatch, capsys, *given)
    (model / "named").rename(model / "named.safetensors")
    assert alexnet.load(model / "named.safetensors").classes == ("cat", "dog", "Bär")
    lines = convert(model, monkeypatch, capsys, "net.safetensors", "--to", "net.caffemodel")
    assert lines[3].startswith("  it expects blue, green, red less 104.00699, 116.66877, 122.67892")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 72, 72, 3), np.uint8)
    first = alexnet.load(model / "model").probabilities(pixels)
    np.testing.assert_array_equal(alexnet.load(model / "net.safetensors").probabilities(pixels), first)


def test_onnx_is_compared_with_the_net(model, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    lines = convert(model, monkeypatch, capsys, "model", "--to", "net.onnx", "--softmax")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert lines[3].startswith("  it gives the net's probabilities in onnxruntime: those of 4 images differ by at")


def test_a_run_can_start_from_a_file_of_another_program(model, monkeypatch, capsys):
    from orchestrator.cli import train

    convert(model, monkeypatch, capsys, "model", "--to", "net.caffemodel")
    args = train.parser().parse_args(["--start-from", "net.caffemodel"])
    start, config = train.start_from(args, digits(), model / "into")
    assert (config.preset, config.width, config.input_size, config.pixel_scale) == ("caffe", 0.0625, 67, 1.0)
    assert config.layout == "auto", "the recipe's is for its own net, and caffe cannot be trained in columns"
    args = train.parser().parse_args(["--start-from", "net.caffemodel", "--layout", "data"])
    assert train.start_from(args, digits().changed(layout="data"), model / "again")[1].layout == "data"
    expected, found = alexnet.load(model / "net.caffemodel"), alexnet.load(start.folder.local)
    assert found.description == start.description
    for name, tensor in expected.net.state_dict().items():
        np.testing.assert_array_equal(found.net.state_dict()[name], tensor)


def test_a_net_without_names_of_classes_says_which_flag_gives_them(model, monkeypatch, capsys):
    convert(model, monkeypatch, capsys, "model", "--to", "net.caffemodel")
    said = convert(model, monkeypatch, capsys, "net.caffemodel", "--to", "bare.safetensors")
    assert "  it has no names of its classes, which other commands compare with the data's: give --classes FILE" in said
    with pytest.raises(ValueError, match=r"^MODEL bare: has no names for its 3 outputs; .*convert.* --classes NAMES$"):
        check_named("bare", alexnet.load(model / "bare.safetensors"))
    assert check_named("model", alexnet.load(model / "model")) is None


REFUSED = [
    (["model", "--to", "net.h5"], r"net.h5: its extension is of no known format; the known are .safetensors, .pth"),
    (["model", "--to", "net.pth"], "the net is of preset caffe, and a state dict of torchvision is of preset torchvi"),
    (["model", "--to", "net.safetensors", "--softmax"], "--softmax: only --as onnx has it"),
    (["model", "--to", "model", "--as", "onnx"], "is a folder"),
    (["model", "--to", "nowhere/net.onnx"], "there is no folder"),
    (["model", "--to", "s3://bucket/net.onnx"], "--to s3://bucket/net.onnx: give a file on this machine"),
    (["model", "--to", "there.onnx"], "is already there; choose another name, or pass --overwrite"),
    (["none", "--to", "net.onnx"], "MODEL 'none': is not there"),
    (["there.onnx", "--to", "net.safetensors"], "there.onnx: is of no format that can be read; those are .safetensors"),
    (["model", "--to", "net.onnx", "--classes", "none.txt"], "--classes none.txt: No such file or directory"),
    (
        ["model", "--to", "net.onnx", "--classes", "names.txt"],
        "--classes names.txt: has 2 lines, the net has 3 out",
    ),
    (["model", "--to", "net.onnx", "--classes", "empty.txt"], "--classes empty.txt: line 2 is empty"),
    (
        ["model", "--to", "net.onnx", "--classes", "twice.txt"],
        "--classes twice.txt: 'cat' is on lines 1 and 3; each class has a name of its own",
    ),
]


@pytest.mark.parametrize(("args", "message"), REFUSED)
def test_what_cannot_be_converted_is_one_line(args, message, model, monkeypatch, capsys):
    (model / "there.onnx").write_bytes(b"x")
    (model / "names.txt").write_text("a\nb\n")
    (model / "twice.txt").write_text("cat\ndog\ncat\n")
    (model / "empty.txt").write_text("a\n \nb\n")
    before = sorted(path.name for path in model.iterdir())
    assert message in refused("convert", args, model, monkeypatch, capsys)
    assert sorted(path.name for path in model.iterdir()) == before
