"""A trained net from its folder: from images to probabilities, by one view and by ten."""

import json

import numpy as np
import pytest
import torch

import alexnet
from alexnet import augment, images
from alexnet.trained import Description, load

CLASSES = tuple("abcd")
BUILD = {"preset": "paper", "num_classes": 4, "width": 0.0625, "input_size": 64, "dropout": 0.5}


@pytest.fixture(scope="module")
def trained():
    net = alexnet.build(**BUILD, init="he", seed=3, lrn=alexnet.LRN(k=1.5, n=3, alpha=0.01, beta=0.5))
    description = Description(
        BUILD | {"lrn": {"k": 1.5, "n": 3, "alpha": 0.01, "beta": 0.5}}, CLASSES, pixel_scale=1 / 64, epoch=7
    )
    mean = np.random.default_rng(0).uniform(0, 255, (73, 73, 3)).astype(np.float32)
    return alexnet.TrainedNet(net, description, mean)


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def pictures(num=5):
    return np.random.default_rng(1).integers(0, 256, (num, 73, 73, 3), dtype=np.uint8)


def naive(trained, stored, views):
    """Probabilities by slices in float64, an image at a time."""
    net, mean, found = trained.net.double(), trained.mean_image.astype(np.float64), []
    corners = [(0, 0), (0, 9), (9, 0), (9, 9), (4, 4)]
    for image in stored:
        x = (image - mean) / 64
        crops = [x[top : top + 64, left : left + 64] for top, left in (corners if views == 10 else corners[4:])]
        crops += [crop[:, ::-1] for crop in crops] if views == 10 else []
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found.append(torch.softmax(net(batch), 1).mean(0).numpy())
    net.float()
    return np.stack(found)


@pytest.mark.parametrize("views", [1, 10])
def test_probabilities_are_those_of_a_naive_loop(trained, views):
    """Mirrored crops less the mean image's own place mirrored: the mean is cut and mirrored like the image."""
    stored = pictures()
    found = trained.probabilities(stored, views)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, naive(trained, stored, views), rtol=1e-4, atol=1e-6)


def test_a_folder_gives_back_the_same_net(trained, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["mean_image.npy", "model.safetensors", "net.json"]
    again = load(folder)
    assert again.description == trained.description
    assert again.classes == CLASSES
    np.testing.assert_array_equal(again.probabilities(pictures()), trained.probabilities(pictures()))


def test_outputs_without_a_class_are_numbered(trained):
    spare = alexnet.TrainedNet(trained.net, Description(BUILD, ("a", "b")), trained.mean_image)
    assert spare.classes == ("a", "b", "class 2", "class 3")


def test_a_file_is_stored_as_a_preparation_stores_it(trained):
    wide = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    data = images.encode(wide, 95)
    np.testing.assert_array_equal(trained.stored(data), images.resize_and_center(images.decode(data), 73))


def test_there_are_one_or_ten_views(trained):
    with pytest.raises(ValueError, match=r"views = 7: choose 1, the centre crop, or 10, the paper's"):
        trained.probabilities(pictures(), 7)
    ten = augment.views(1, margin=32, number=10)
    places = [(int(draws.top[0]), int(draws.left[0]), bool(draws.flip[0])) for draws in ten]
    assert places[:5] == [(0, 0, False), (0, 32, False), (32, 0, False), (32, 32, False), (16, 16, False)]
    assert [place[:2] for place in places[5:]] == [place[:2] for place in places[:5]]
    assert all(place[2] for place in places[5:])


DAMAGE = [
    ("{", "is not JSON"),
    ("[]", "is not a JSON object"),
    ({"schema_version": 2}, "is of version 2, this program reads up to 1"),
    ({"classes": None}, "'classes' is None"),
    ({"classes": [1]}, "classes are not all text"),
    ({"pixel_scale": True}, "'pixel_scale' is True"),
    ({"pixel_scale": 0}, "pixel_scale is 0; it is more than 0"),
    ({"pixel_scale": 10**400}, "pixel_scale is 1000"),
    ({"build": BUILD | {"width": 1e308}}, "build: "),
    ({"build": BUILD | {"input_size": -(10**12)}}, "build: input_size = -1000000000000: too small"),
    ({"exif": "turn"}, "exif is 'turn'; it is apply or ignore"),
    ({"class_names": ["one"]}, "has 1 class_names for 4 classes"),
    ({"nonsense": 1}, "'nonsense' is 1, which is not what a net's description has"),
    ({"build": {"preset": "lenet"}}, "build: preset = 'lenet': unknown"),
    ({"build": BUILD | {"rnn": 1}}, "build: .*unexpected keyword argument 'rnn'"),
    ({"classes": list("abcde")}, "5 classes, but the net has 4 outputs"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGE)
def test_a_damaged_description_is_one_line_that_names_it(folder, changes, message):
    file = folder / "net.json"
    text = changes if isinstance(changes, str) else json.dumps(json.loads(file.read_text()) | changes)
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"net.json: {message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_weights_of_another_net_are_one_line(trained, folder, tmp_path):
    other = alexnet.build(**BUILD | {"num_classes": 5}, init="he")
    alexnet.TrainedNet(other, trained.description, trained.mean_image).save(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"fc8.(weight|bias) is 5.*, and the net's is 4.*: is it of another net\?"):
        load(folder)
    whole = (tmp_path / "other" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: is not a whole safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; a model's folder holds"):
        load(folder)


def test_a_mean_image_of_another_form_is_one_line(folder):
    for array in (np.zeros((63, 63, 3), np.float32), np.zeros((73, 73, 3)), np.full((73, 73, 3), np.nan, np.float32)):
        np.save(folder / "mean_image.npy", array)
        with pytest.raises(ValueError, match=r"mean_image.npy: has .*; expected float32 \(S, S, 3\), S at least 64"):
            load(folder)
    (folder / "mean_image.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"mean_image.npy: is no array of numpy"):
        load(folder)


def test_more_classes_than_the_weights_have_take_no_memory(folder):
    file = folder / "net.json"
    described = json.loads(file.read_text())
    described["build"]["num_classes"] = 10**9
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"model.safetensors: fc8.(weight|bias) is 4.*, and the net's is 1000000000"):
        load(folder)


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    net = alexnet.build(**BUILD, init="he")
    with torch.no_grad():
        net.fc7.bias[0] = torch.nan
    alexnet.TrainedNet(net, trained.description, trained.mean_image).save(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"model.safetensors: fc7.bias has numbers that are not finite"):
        load(tmp_path / "nan")
