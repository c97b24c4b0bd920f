"""Numbers about what a net learned, against naive references."""

import numpy as np
import pytest

import alexnet
from alexnet import explain, explain_pictures
from alexnet.pictures import plain


def trained(input_size=96, width=0.0625):
    net = alexnet.build("paper", 3, width=width, input_size=input_size, init="he", seed=5)
    build = {"preset": "paper", "num_classes": 3, "width": width, "input_size": input_size, "lrn": {}}
    mean = np.full((input_size + 8, input_size + 8, 3), 120, np.float32)
    return alexnet.TrainedNet(net, alexnet.Description(build, ("a", "b", "c"), pixel_scale=1 / 64), mean)


def pictures(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_gray_kernels_have_no_colour_and_opposed_colours_are_all_colour():
    random = np.random.default_rng(0)
    shape = random.normal(size=(11, 11))
    colours = {"gray": (1, 1, 1), "red": (1, 0, 0), "red against green": (1, -1, 0), "yellow": (1, 1, 0)}
    kernels = np.array([[weight * shape for weight in colour] for colour in colours.values()], np.float32)
    assert explain.colouredness(kernels) == pytest.approx([0, 2 / 3, 1, 1 / 3], abs=1e-6)
    assert explain.colouredness(7 * kernels) == pytest.approx(explain.colouredness(kernels)), "whatever their size"
    assert explain.colouredness(np.zeros((1, 3, 11, 11), np.float32)) == [0]
    noise = random.normal(size=(500, 3, 11, 11)).astype(np.float32)
    assert explain.colouredness(noise).mean() == pytest.approx(explain.NOISE, abs=0.005)


def test_each_column_has_its_own_colour():
    shape = np.ones((11, 11), np.float32)
    gray, red = (np.stack([shape * weight for weight in colour]) for colour in ((1, 1, 1), (1, 0, 0)))
    assert explain.colouredness_of_columns(np.stack([gray, gray, red, gray]), 2) == pytest.approx([0, 1 / 3], abs=1e-6)
    assert explain.colouredness_of_columns(np.stack([gray, gray, red, gray]), 1) == pytest.approx([1 / 6], abs=1e-6)


def test_the_nearest_are_those_of_brute_force_and_the_first_of_equals_wins():
    random = np.random.default_rng(1)
    features = random.normal(size=(700, 40)).astype(np.float32)
    features[650] = features[3]
    queries = np.concatenate([random.normal(size=(4, 40)).astype(np.float32), features[3:4] + 1e-4])
    found = explain.Nearest(queries, 6)
    for part in np.split(features, [128, 256, 300, 301, 600]):
        found.add(part)
    distances = np.array([[np.sqrt(np.square(q.astype(np.float64) - f).sum()) for f in features] for q in queries])
    expected = np.argsort(distances, axis=1, kind="stable")[:, :6]
    assert found.positions.tolist() == expected.tolist()
    assert found.positions[4, :2].tolist() == [3, 650]
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, expected, 1), rtol=1e-5)
    assert found.seen == 700


def test_fewer_images_than_neighbours_are_all_of_them():
    found = explain.Nearest(np.zeros((2, 3), np.float32), 6)
    found.add(np.array([[2, 0, 0], [1, 0, 0]], np.float32))
    assert found.positions.tolist() == [[1, 0], [1, 0]]


def test_features_are_fc7_after_relu_and_the_maps_are_those_of_each_convolution(compiled):
    model, images = trained(), pictures(3, 104)
    features, probabilities = explain.features_and_probabilities(model, images)
    assert features.shape == (3, 256)
    assert features.min() == 0 < features.max()
    weight, bias = (each.detach().numpy() for each in (model.net.fc8.weight, model.net.fc8.bias))
    scores = np.exp(features.astype(np.float64) @ weight.T + bias)
    np.testing.assert_allclose(probabilities, scores / scores.sum(1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(probabilities, model.probabilities(images), rtol=1e-5)
    maps = explain.feature_maps(model, images[1])
    shapes = {
        "conv1": (6, 23, 23),
        "conv2": (16, 11, 11),
        "conv3": (24, 5, 5),
        "conv4": (24, 5, 5),
        "conv5": (16, 5, 5),
    }
    assert {name: each.shape for name, each in maps.items()} == shapes
    assert all(each.min() == 0 < each.max() for each in maps.values())
    crop = (images[1, 4:100, 4:100].astype(np.float64) - 120) / 64
    kernel = model.net.conv1.weight.detach().numpy()[2].transpose(1, 2, 0)
    for row, column in ((0, 0), (5, 17)):
        window = crop[4 * row : 4 * row + 11, 4 * column : 4 * column + 11]
        assert maps["conv1"][2, row, column] == pytest.approx(max((window * kernel).sum(), 0), rel=1e-4, abs=1e-5)
    assert not model.net._forward_hooks
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.net.children())


@pytest.mark.parametrize(("preset", "columns"), [("caffe", 2), ("torchvision", 1)])
def test_other_nets_are_explained_too(compiled, preset, columns):
    net = alexnet.build(preset, 3, width=0.25, init="he")
    side = net.input_size
    described = alexnet.Description({"preset": preset, "num_classes": 3, "width": 0.25}, ("a", "b", "c"), 1 / 64)
    model = alexnet.TrainedNet(net, described, np.full((side, side, 3), 120, np.float32))
    images = pictures(2, side)
    features, probabilities = explain.features_and_probabilities(model, images)
    weight, bias = (each.detach().numpy() for each in (net.fc8.weight, net.fc8.bias))
    scores = np.exp(features.astype(np.float64) @ weight.T + bias)
    np.testing.assert_allclose(probabilities, scores / scores.sum(1, keepdims=True), rtol=1e-4)
    maps = explain.feature_maps(model, images[0])
    assert list(maps) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert explain.grad_cam(model, images, np.array([0, 2])).shape == (2, *maps["conv5"].shape[1:])
    assert len(explain_pictures.feature_maps(images[0], maps, columns, preset).axes) == 1 + 5 * columns


def naive_grad_cam(net, maps, label):
    """Loops over maps (C, H, W) of the last convolution: pooling, three layers, and their derivatives backwards."""
    maps = maps.astype(np.float64)
    side = (maps.shape[1] - 3) // 2 + 1
    pooled, source = np.zeros((len(maps), side, side)), {}
    for c, i, j in np.ndindex(pooled.shape):
        window = maps[c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        a, b = divmod(int(window.argmax()), 3)  # the first of equals
        pooled[c, i, j], source[c, i, j] = window[a, b], (c, 2 * i + a, 2 * j + b)
    layers = [[each.detach().numpy().astype(np.float64) for each in (fc.weight, fc.bias)]
              for fc in (net.fc6, net.fc7, net.fc8)]  # fmt: skip
    (w6, b6), (w7, b7), (w8, _) = layers
    h6 = np.maximum(w6 @ pooled.ravel() + b6, 0)
    h7 = np.maximum(w7 @ h6 + b7, 0)
    back = (w6.T @ ((w7.T @ (w8[label] * (h7 > 0))) * (h6 > 0))).reshape(pooled.shape)
    gradient = np.zeros(maps.shape)
    for at, where in source.items():
        gradient[where] += back[at]
    return np.maximum(sum(gradient[c].mean() * maps[c] for c in range(len(maps))), 0)


def test_grad_cam_is_that_of_a_naive_loop_and_leaves_the_net_as_it_was(compiled):
    model, images = trained(), pictures(4, 104, seed=2)
    labels = np.array([0, 1, 2, 1])
    found = explain.grad_cam(model, images, labels)
    assert found.shape == (4, 5, 5)
    for image, label, heat in zip(images, labels, found, strict=True):
        expected = naive_grad_cam(model.net, explain.feature_maps(model, image)["conv5"], label)
        np.testing.assert_allclose(heat, expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert (found.reshape(4, -1).max(1) > 0).sum() >= 2, "maps of zeros would be equal whatever they are"
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.net.children())


def test_the_principal_plane_is_that_of_the_covariance():
    random = np.random.default_rng(3)
    features = (random.normal(size=(60, 5)) * [1, 9, 0.1, 4, 1] + 7).astype(np.float32)
    points, share = explain.principal_plane(features)
    values, vectors = np.linalg.eigh(np.cov(features.astype(np.float64).T, bias=True))
    assert share == pytest.approx(values[:-3:-1] / values.sum(), rel=1e-6)
    centered = features - features.mean(axis=0, dtype=np.float64)
    for found, vector in zip(points.T, vectors.T[:-3:-1], strict=True):
        expected = centered @ vector
        np.testing.assert_allclose(found, expected * np.sign(expected[np.abs(expected).argmax()]), rtol=1e-6, atol=1e-6)
        assert found[np.abs(found).argmax()] > 0
    same, nothing = explain.principal_plane(np.ones((4, 5), np.float32))
    assert not same.any()
    assert not nothing.any()


def test_a_weight_of_0_is_gray_and_the_scale_can_be_given():
    kernels = np.zeros((4, 3, 11, 11), np.float32)
    kernels[1, 0] = 0.5
    for scale, red in ((None, 255), (np.full(4, 1.0, np.float32), 191)):
        figure = explain_pictures.kernels(kernels, 2, "$", scale)
        assert len(figure.axes) == 2
        drawn = np.asarray(figure.axes[0].images[0].get_array())
        assert drawn[5, 5].tolist() == [128, 128, 128]
        assert drawn[5, 17].tolist() == [red, 128, 128]
        assert figure.axes[1].get_title() == "column 1: 2 kernels, colour 0.00"
        assert figure.axes[0].get_title() == "column 0: 2 kernels, colour 0.33"
    assert explain_pictures.kernels(kernels, 1, "$").axes[0].get_title() == "4 kernels, colour 0.17"


def test_an_overlay_is_red_where_the_map_is_greatest():
    heat = np.zeros((5, 5), np.float32)
    heat[4, 0] = 3
    drawn = explain_pictures.overlay(np.full((50, 50, 3), 100, np.uint8), heat).astype(int)
    assert drawn[49, 0, 0] > drawn[49, 0, 2] + 40
    assert drawn[0, 49, 2] >= drawn[0, 49, 0]
    assert explain_pictures.overlay(np.zeros((50, 50, 3), np.uint8), np.zeros((5, 5), np.float32)).shape == (50, 50, 3)


def test_bars_say_the_class_its_probability_and_whether_it_is_right():
    image = np.zeros((8, 8, 3), np.uint8)
    answer = explain_pictures.Answer(image, "$x$", [("a$b", 0.75, False), ("c", 0.25, True)])
    bars = explain_pictures.predictions([answer], "t").axes[1]
    assert [text.get_text() for text in bars.texts] == [plain("a$b  75 %"), "c  25 %"]
    assert [bar.get_width() for bar in bars.patches] == [0.75, 0.25]
    assert bars.texts[1].get_weight() == "bold"
