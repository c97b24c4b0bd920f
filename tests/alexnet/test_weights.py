"""Weights in and out: torchvision's, Caffe's and ours give the scores that they gave where they came from."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alexnet
from alexnet import augment, caffemodel, onnx_graph, protobuf, weights

MEAN_BGR = np.array([104.00699, 116.66877, 122.67892])


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_new_files_get(tmp_path, umask):
    before = os.umask(umask)
    try:
        for name in ("a.safetensors", "a.pth", "a.onnx"):
            weights.write(made("torchvision", 64), tmp_path / name)
        weights.write(made("caffe", 64), tmp_path / "a.caffemodel")
        made().save(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.*")}
    assert len(modes) == 7
    assert set(modes.values()) == {0o666 & ~umask}


def made(preset="paper", input_size=None, mean=None, stored=8, **changes):
    """A slim net whose LRN would show a wrong window, and a mean image without symmetry."""
    lrn = {"k": 1.5, "n": 3, "alpha": 0.01, "beta": 0.5} if preset != "torchvision" else None
    build = {"preset": preset, "num_classes": 4, "width": 0.0625, "input_size": input_size, "lrn": lrn} | changes
    net = alexnet.build(**build | {"lrn": lrn and alexnet.LRN(**lrn)}, init="he", seed=3)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.1, 0.1, generator=torch.Generator().manual_seed(len(name)))
    side = net.input_size + stored
    random = np.random.default_rng(0).uniform(0, 255, (side, side, 3))
    mean = random if mean is None else np.broadcast_to(mean, random.shape)
    build["input_size"] = net.input_size
    description = alexnet.Description(build, tuple("abcd"), pixel_scale=1 / 64, epoch=7)
    return alexnet.TrainedNet(net, description, mean.astype(np.float32).copy())


def pictures(trained, num=3):
    side = trained.image_size
    return np.random.default_rng(1).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def scores(trained, stored):
    margin = trained.image_size - trained.net.input_size
    return trained.scores(stored, augment.center(len(stored), margin=margin)).double().numpy()


# ---- our own single file


def test_one_file_gives_back_the_same_net(tmp_path):
    trained, file = made("caffe", 67), tmp_path / "net.safetensors"
    assert weights.write(trained, file) == []
    again = alexnet.load(file)
    assert again.description == trained.description
    np.testing.assert_array_equal(again.mean_image, trained.mean_image)
    np.testing.assert_array_equal(again.probabilities(pictures(trained)), trained.probabilities(pictures(trained)))
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_safetensors_alone_opens_it_with_canonical_names(tmp_path):
    trained = made(input_size=64)
    weights.write(trained, tmp_path / "net.safetensors")
    found = load_file(tmp_path / "net.safetensors")
    assert found.keys() - {"mean_image"} == trained.net.state_dict().keys()
    for name, tensor in trained.net.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


# ---- torchvision


@pytest.fixture(scope="module")
def theirs():
    """torchvision's module, which has one size."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return torchvision.models.alexnet(num_classes=5).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict_of_torchvision_gives_torchvisions_scores(theirs, tmp_path, suffix):
    file = tmp_path / f"alexnet{suffix}"
    save_file(theirs.state_dict(), file) if suffix == ".safetensors" else torch.save(theirs.state_dict(), file)
    trained = alexnet.load(file)
    assert trained.classes == tuple(f"class {number}" for number in range(5))
    assert (trained.net.preset.name, trained.image_size, trained.net.input_size) == ("torchvision", 256, 224)
    stored = pictures(trained, 2)
    crop = torch.from_numpy(stored[:, 16:240, 16:240]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((crop - mean) / std)
    assert expected.abs().max() > 0.01
    np.testing.assert_allclose(scores(trained, stored), expected, rtol=0, atol=1e-5)
    if suffix == ".pth":  # and back
        remarks = weights.write(trained, tmp_path / "back.pth")
        assert remarks == [
            "expects Resize(256), CenterCrop(224), ToTensor(), Normalize([0.485, 0.456, 0.406], "
            "[0.229, 0.224, 0.225]) of torchvision.transforms"
        ]
        back = torch.load(tmp_path / "back.pth", weights_only=True)
        assert list(back) == list(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=0)


def test_a_scale_and_a_mean_colour_of_ones_own_are_told_to_torchvisions_users(tmp_path):
    """Normalize with what is printed gives our scores, since zeros beyond the edge stay zeros."""
    trained = made("torchvision", 64, mean=np.array([51.0, 102.0, 153.0]))
    remarks = weights.write(trained, tmp_path / "net.pth")
    assert remarks[0] == "is 0.0625 times as wide as torchvision.models.alexnet, which cannot load it as it is"
    assert "Normalize([0.2, 0.4, 0.6], [0.229, 0.224, 0.225])" in remarks[1]
    assert "is not of ImageNet's mean colour" in remarks[2]
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    net = alexnet.build("torchvision", 4, width=0.0625, input_size=64).eval()
    net.load_state_dict({weights.NAMES[name]: tensor for name, tensor in state.items()})
    stored = pictures(trained)
    crop = (stored[:, 4:68, 4:68] / 255 - [0.2, 0.4, 0.6]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = net(torch.from_numpy(crop).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(scores(trained, stored), expected, rtol=0, atol=1e-5)
    assert "has no mean image" in weights.write(made("torchvision", 64), tmp_path / "other.pth")[2]


# ---- Caffe: a writer of its own, after caffe.proto, and a naive net


def number(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def sub(at, data):
    return number(8 * at + 2) + number(len(data)) + data


def blob(array, form):
    flat = array.ravel()
    if form == "shape, doubles":
        return sub(7, sub(1, b"".join(map(number, array.shape)))) + sub(8, flat.astype("<f8").tobytes())
    axes = (1,) * (4 - array.ndim) + array.shape
    old = b"".join(number(8 * at) + number(axis) for at, axis in enumerate(axes, 1))
    if form == "axes, unpacked":
        return old + b"".join(number(8 * 5 + 5) + struct.pack("<f", value) for value in flat)
    return old + sub(5, flat.astype("<f4").tobytes())


FIELDS = {1: (2, 4, 5, 6, 18), 2: (100, 1, 2, 7, 118)}  # of the net: layers; of a layer: name, type, blobs, lrn_param
ENUM = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18, "Dropout": 6}


def caffe_file(arrays, version, form="axes", order=("LRN", "Pooling"), lrn=None, input_dim=()):
    """A NetParameter of these weights, by layer, as Caffe has them: conv1 of blue, green and red."""
    layers, name_at, type_at, blobs_at, lrn_at = FIELDS[version]
    net = sub(1, b"AlexNet") + b"".join(number(8 * 4) + number(axis) for axis in input_dim)
    for name, pair in arrays.items():
        kinds = [(name, "Convolution" if name.startswith("conv") else "InnerProduct", pair)]
        if name in ("conv1", "conv2"):
            kinds += [(f"{kind.lower()}{name[-1]}", kind, ()) for kind in order]
        for layer_name, kind, blobs in kinds:
            layer = sub(name_at, layer_name.encode())
            layer += sub(type_at, kind.encode()) if version == 2 else number(8 * type_at) + number(ENUM[kind])
            layer += b"".join(sub(blobs_at, blob(array, form)) for array in blobs)
            if kind == "LRN" and lrn is not None:
                n, alpha, beta, k = lrn
                floats = ((2, alpha), (3, beta), (5, k))
                constants = b"".join(number(8 * at + 5) + struct.pack("<f", value) for at, value in floats)
                layer += sub(lrn_at, number(8) + number(n) + constants)
            net += sub(layers, layer)
    return net


def caffe_arrays():
    """A sixteenth of BVLC AlexNet's maps."""
    random = np.random.default_rng(5)
    shapes = {
        "conv1": (6, 3, 11, 11), "conv2": (16, 3, 5, 5), "conv3": (24, 16, 3, 3), "conv4": (24, 12, 3, 3),
        "conv5": (16, 12, 3, 3), "fc6": (256, 16 * 6 * 6), "fc7": (256, 256), "fc8": (4, 256),
    }  # fmt: skip
    arrays = {}
    for name, shape in shapes.items():
        deviation = np.sqrt(2 / np.prod(shape[1:])) / (64 if name == "conv1" else 1)
        arrays[name] = (random.normal(0, deviation, shape).astype(np.float32),
                        random.uniform(-0.1, 0.1, shape[0]).astype(np.float32))  # fmt: skip
    return arrays


def naive_caffe(arrays, bgr_CHW, lrn):
    """BVLC AlexNet's scores of one image in float64, by Caffe's definitions."""

    def convolve(x, name, stride=1, pad=0, groups=1):
        weight, bias = (array.astype(np.float64) for array in arrays[name])
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        size, out = weight.shape[-1], []
        for part, kernels in zip(np.split(x, groups), np.split(weight, groups), strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(part, (size, size), (1, 2))[:, ::stride, ::stride]
            out.append(np.einsum("chwij,ocij->ohw", windows, kernels, optimize=True))
        return np.maximum(np.concatenate(out) + bias[:, None, None], 0)

    def normalize(x):
        n, alpha, beta, k = lrn
        padded = np.pad(x**2, ((n // 2, n // 2), (0, 0), (0, 0)))
        return x / (k + alpha / n * sum(padded[i : i + len(x)] for i in range(n))) ** beta

    def pool(x):
        side = -(-(x.shape[1] - 3) // 2) + 1  # rounded up
        x = np.pad(x, ((0, 0), (0, 2), (0, 2)), constant_values=-np.inf)
        return np.stack([x[:, i : i + 2 * side : 2, j : j + 2 * side : 2][:, :side, :side]
                         for i in range(3) for j in range(3)]).max(0)  # fmt: skip

    x = pool(normalize(convolve(bgr_CHW, "conv1", stride=4)))
    x = pool(normalize(convolve(x, "conv2", pad=2, groups=2)))
    x = convolve(convolve(x, "conv3", pad=1), "conv4", pad=1, groups=2)
    x = pool(convolve(x, "conv5", pad=1, groups=2)).ravel()
    for name in ("fc6", "fc7"):
        x = np.maximum(arrays[name][0].astype(np.float64) @ x + arrays[name][1], 0)
    return arrays["fc8"][0].astype(np.float64) @ x + arrays["fc8"][1]


@pytest.mark.parametrize(
    ("version", "form", "lrn"),
    [(1, "axes", None), (1, "axes, unpacked", (5, 1e-4, 0.75, 1.0)), (2, "shape, doubles", (3, 0.05, 0.5, 2.0))],
)
def test_a_caffemodel_gives_the_scores_of_a_naive_net_in_float64(version, form, lrn, tmp_path):
    arrays, file = caffe_arrays(), tmp_path / "bvlc.caffemodel"
    file.write_bytes(caffe_file(arrays, version, form, lrn=lrn))
    trained = alexnet.load(file)
    assert (trained.net.preset.name, trained.image_size, trained.net.input_size) == ("caffe", 256, 227)
    assert trained.classes == ("class 0", "class 1", "class 2", "class 3")
    stored = pictures(trained, 2)
    expected = []
    for image in stored:
        crop = image[14:241, 14:241].transpose(2, 0, 1)[::-1].astype(np.float64)  # blue, green, red
        expected.append(naive_caffe(arrays, crop - MEAN_BGR[:, None, None], lrn or (5, 1e-4, 0.75, 1.0)))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(scores(trained, stored), expected, rtol=0, atol=1e-5)


def test_a_written_caffemodel_is_read_back_with_the_same_scores(tmp_path):
    """The scale, and a mean colour that is not ImageNet's, go into conv1."""
    trained, file = made("caffe", 67, mean=np.array([51.0, 102.0, 153.0]), stored=189), tmp_path / "net.caffemodel"
    remarks = weights.write(trained, file)
    assert (
        remarks[1] == "expects blue, green, red less 104.00699, 116.66877, 122.67892, from 0 to 255, 67 pixels a side"
    )
    again = alexnet.load(file)
    assert again.image_size == trained.image_size == 256
    assert dict(again.description.build["lrn"]) == pytest.approx({"k": 1.5, "n": 3, "alpha": 0.01, "beta": 0.5})
    np.testing.assert_allclose(scores(again, pictures(again)), scores(trained, pictures(trained)), rtol=0, atol=1e-5)
    assert "has no mean image" in weights.write(made("caffe", 67), tmp_path / "other.caffemodel")[2]


def test_caffes_own_protobuf_reads_what_was_written(tmp_path):
    """google.protobuf's reader of unknown fields finds the layers in order, and their blobs."""
    from google.protobuf import empty_pb2, unknown_fields

    weights.write(made("caffe", 67, mean=MEAN_BGR), tmp_path / "net.caffemodel")
    message = empty_pb2.Empty.FromString((tmp_path / "net.caffemodel").read_bytes())
    layers = []
    for field in unknown_fields.UnknownFieldSet(message):
        if field.field_number == 100:
            inner = list(unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(field.data)))
            texts = [each.data.decode() for each in inner if each.field_number in (1, 2)]
            layers.append((*texts, sum(each.field_number == 7 for each in inner)))
    assert layers[:5] == [("conv1", "Convolution", 2), ("relu1", "ReLU", 0), ("norm1", "LRN", 0),
                          ("pool1", "Pooling", 0), ("conv2", "Convolution", 2)]  # fmt: skip
    assert layers[-1] == ("fc8", "InnerProduct", 2)
    assert sum(blobs for _, _, blobs in layers) == 16


# ---- ONNX


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("preset", "input_size"),
    [(name, None) for name in alexnet.PRESETS] + [("paper", 65), ("caffe", 70), ("torchvision", 96)],
)
def test_onnxruntime_gives_the_nets_scores(preset, input_size, softmax, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    trained, file = made(preset, input_size), tmp_path / "net.onnx"
    remarks = weights.write(trained, file, softmax=softmax)
    assert "in onnxruntime: those of 4 images differ by at most" in remarks[1]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for num in (1, 3):
        stored = pictures(trained, num)
        crop = stored[:, 4:-4, 4:-4].transpose(0, 3, 1, 2).astype(np.float32)
        [found] = session.run(None, {"images": crop})
        expected = trained.probabilities(stored) if softmax else scores(trained, stored)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))
    model = onnx.load(file)
    properties = {each.key: each.value for each in model.metadata_props}
    assert properties["classes"] == '["a", "b", "c", "d"]'
    assert alexnet.Description.of_json(properties["description"], "it") == trained.description
    assert [node.op_type for node in model.graph.node].count("LRN") == {"paper": 4, "caffe": 2}.get(preset, 0)


def test_a_graph_that_gives_other_scores_is_not_left(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_graph, "_pads", lambda side, windows, size, stride, padding: [padding] * 4)
    with pytest.raises(onnx_graph.Differs, match=r"onnxruntime's answers differ from the net's by .*, more than 1e-04"):
        weights.write(made("paper", 65), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_or_onnxruntime_it_says_so(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert weights.write(made(input_size=64), tmp_path / "net.onnx")[1].startswith("was not compared with the net")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match=r"onnx: the package is not installed; pip install 'alexnet-orchestrator"):
        weights.write(made(input_size=64), tmp_path / "other.onnx")


# ---- what is refused, in one line


def refused(file, content=None):
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        alexnet.load(file)
    assert str(error.value).startswith(f"{file}: ")
    return str(error.value).removeprefix(f"{file}: ")


class Harmful:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_with_code_does_not_run(tmp_path):
    harmful = Harmful()
    harmful.folder = str(tmp_path / "harm")
    torch.save({"features.0.weight": harmful}, tmp_path / "net.pth")
    assert "cannot be read as a dict of tensors alone" in refused(tmp_path / "net.pth")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(harmful))
    assert "cannot be read as a dict of tensors alone" in refused(tmp_path / "old.pt")
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "old.pt").read_bytes())
    assert (tmp_path / "harm").exists(), "it would have done harm"


def test_foreign_pth_files_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "net.pth"
    torch.save(torch.zeros(3), file)
    assert refused(file) == "holds a Tensor and no state dict, a dict of tensors by name"
    torch.save({"features.0.weight": 3}, file)
    assert "'features.0.weight' is no plain tensor" in refused(file)
    whole = {name: torch.zeros(()) for name in weights.NAMES}
    torch.save(whole | {"bn.weight": torch.zeros(3)}, file)
    assert "has 'bn.weight'; torchvision's AlexNet has classifier.1.bias" in refused(file)
    torch.save({name: value for name, value in whole.items() if name != "features.3.bias"}, file)
    assert "lacks 'features.3.bias'" in refused(file)
    torch.save(whole, file)
    assert refused(file) == "build: num_classes = 1: a classifier needs at least 2"
    for width, reason in ((1000, "and the net's is"), (10**6, "build: ")):  # of more memory than any machine has
        claimed = torch.zeros(1).expand(64 * width)
        torch.save(whole | {"features.0.bias": claimed, "classifier.6.bias": torch.zeros(9)}, file)
        assert reason in refused(file)
    content = file.read_bytes()
    assert "cannot be read" in refused(file, content[: len(content) // 2])
    assert "cannot be read" in refused(file, b"")
    monkeypatch.setattr(weights, "MAX_BYTES", 10**6)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(2 * 10**6))
    assert file.stat().st_size < 10**4
    assert "unpacks to 2000000 bytes, more than 1000000" in refused(file)


def test_foreign_safetensors_are_refused(tmp_path):
    file = tmp_path / "net.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    assert "has neither a description of its net nor torchvision's names" in refused(file)
    trained = made(input_size=64)
    trained.save(tmp_path / "folder")
    assert "give its folder" in refused(tmp_path / "folder" / "model.safetensors")
    weights.write(trained, file)
    content = file.read_bytes()
    assert "is not a whole safetensors file" in refused(file, content[:-1])
    state = {name: tensor.contiguous() for name, tensor in trained.net.state_dict().items()}
    mean = {"mean_image": torch.from_numpy(trained.mean_image)}
    described = {"alexnet": trained.description.to_json()}
    save_file(state, file, described)
    assert "has no mean_image" in refused(file)
    save_file(state | {"mean_image": torch.zeros(63, 63, 3)}, file, described)
    assert "has float32 (63, 63, 3); expected float32 (S, S, 3), S at least 64" in refused(file)
    save_file(state | mean | {"fc9.bias": torch.zeros(3)}, file, described)
    assert "the file has 'fc9.bias', and the other does not" in refused(file)
    save_file(state | mean | {"fc8.bias": torch.zeros(4, dtype=torch.int32)}, file, described)
    assert "fc8.bias has numbers of type torch.int32" in refused(file)
    save_file(state | mean | {"fc8.bias": torch.tensor([1, torch.nan, 0, 0])}, file, described)
    assert "fc8.bias has numbers that are not finite" in refused(file)
    for wrong in ({"num_classes": 10**15}, {"width": 1e6}, {"width": "wide"}, {"input_size": 10**6}, {"rnn": 1}):
        build = dict(trained.description.build) | wrong
        save_file(state | mean, file, {"alexnet": alexnet.Description(build, ()).to_json()})
        refused(file)
    save_file(state | mean, file, {"alexnet": "{"})
    assert "is not JSON" in refused(file)


def with_layer(name, *blobs):
    return {**caffe_arrays(), name: blobs}


CAFFE_DAMAGE = [
    (b"", "is no caffemodel: it has no layers"),
    (b"\xff" * 20, "is no whole caffemodel (a number of more than 10 bytes"),
    (number(8 * 100 + 2) + number(2**62) + b"ab", f"field 100 claims {2**62} bytes where 2 are left"),
    (b"\x0b" * 10**5, "wire type 3"),
    (b"\x00\x00", "field 0"),
    (sub(100, sub(7, sub(7, sub(1, number(2**63) * 4)))), "a blob of 0 bytes of floats"),
    (sub(100, sub(7, sub(7, sub(1, b"\x01" * 1000)))), "more than 32 axes"),
    (sub(100, sub(7, sub(7, sub(1, number(2**62) * 2)) + sub(5, bytes(4)))), "a blob of 1 numbers that claims to be"),
    (sub(100, sub(1, b"conv1") + sub(7, sub(5, bytes(5)))), "a blob of 5 bytes of floats"),
]


@pytest.mark.parametrize(("content", "message"), CAFFE_DAMAGE)
def test_hostile_protobufs_are_one_line(content, message, tmp_path):
    assert message in refused(tmp_path / "net.caffemodel", content)


def test_messages_nested_deeply_are_not_followed(tmp_path):
    nested = b""
    for _ in range(5000):
        nested = sub(100, nested)
    assert "has no weights of layer conv1" in refused(tmp_path / "net.caffemodel", nested)


def test_caffemodels_of_other_nets_are_refused(tmp_path):
    file, arrays = tmp_path / "net.caffemodel", caffe_arrays()
    content = caffe_file(arrays, 2)
    assert "is no whole caffemodel" in refused(file, content[:-10])
    assert "pools before LRN, as CaffeNet does" in refused(file, caffe_file(arrays, 1, order=("Pooling", "LRN")))
    extra = caffe_file(arrays | {"fc9": arrays["fc8"]}, 2)
    assert "has weights of layer 'fc9'; BVLC AlexNet has conv1, conv2" in refused(file, extra)
    fewer = caffe_file({name: pair for name, pair in arrays.items() if name != "fc7"}, 2)
    assert "has no weights of layer fc7" in refused(file, fewer)
    assert "conv3 has not one weight and one bias" in refused(
        file, caffe_file(arrays | {"conv3": arrays["conv3"][:1]}, 2)
    )
    ungrouped = arrays | {"conv2": (np.zeros((16, 6, 5, 5), np.float32), arrays["conv2"][1])}
    assert "conv2.weight is 16 x 6 x 5 x 5, and the net's is 16 x 3 x 5 x 5" in refused(file, caffe_file(ungrouped, 2))
    assert "its LRN is over 0 maps" in refused(file, caffe_file(arrays, 2, lrn=(0, 1, 1, 1)))


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    assert "is of no format that can be read; those are .safetensors, .pth, .pt" in refused(tmp_path / "net.h5", b"x")
    with pytest.raises(ValueError, match=r"net.h5: its extension is of no known format; the known are .safetensors"):
        weights.write(made(input_size=64), tmp_path / "net.h5")
    for form in ("torchvision", "caffemodel"):
        with pytest.raises(ValueError, match=r"the net is of preset paper, and a .* is of preset (torchvision|caffe)"):
            weights.write(made(input_size=64), tmp_path / "net", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.h5"]


def test_numbers_of_the_wire_are_written_as_they_are_read():
    for value in (0, 1, 127, 128, 300, 2**35, 2**64 - 1):
        assert protobuf.varint(value) == number(value)
        assert list(protobuf.varints(memoryview(number(value)))) == [value]
    assert caffemodel.PRESET.name == "caffe"
