"""The model in MLflow: what it takes and answers, in process and through MLflow's own scoring server."""

import asyncio
import base64
import io
import json
import threading

import mlflow
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from conftest import picture

import alexnet
from alexnet import images
from alexnet.images_apart import ApartDecoder
from orchestrator.tracking.training_run import Tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other
CLASSES = tuple("abcdefg")


@pytest.fixture(scope="module")
def logged(tmp_path_factory, compiled):
    """A net's folder, and the address of its model in MLflow."""
    folder = tmp_path_factory.mktemp("served")
    net = alexnet.build("paper", 7, width=0.0625, input_size=64, init="he", seed=3)
    build = {"preset": "paper", "num_classes": 7, "width": 0.0625, "input_size": 64, "lrn": {}}
    words = tuple(f"letter {name}" for name in CLASSES)
    described = alexnet.Description(build, CLASSES, class_names=words, pixel_scale=1 / 64)
    alexnet.TrainedNet(net, described, np.full((72, 72, 3), 100, np.float32)).save(folder / "net")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}")
    said = []
    tracker.run.warn = said.append
    tracker.run.begin("served", "jobs/train.py", {})
    assert tracker.log_model(folder / "net", step=3)
    tracker.finish("FINISHED", hurry=False)
    assert said == []
    return folder / "net", f"runs:/{tracker.run.run_id}/model"


@pytest.fixture(scope="module")
def trained(logged):
    return alexnet.load(logged[0])


@pytest.fixture(scope="module")
def model(logged):
    return mlflow.pyfunc.load_model(logged[1])


@pytest.fixture(scope="module")
def files():
    """A large JPEG, a PNG with transparency, a JPEG of the stored side."""
    random = np.random.default_rng(1)
    return [
        picture(random, 0, (90, 120)),
        picture(random, 1, (200, 130), "PNG", "RGBA"),
        picture(random, 2, (72, 72)),
    ]


@pytest.fixture(scope="module")
def expected(trained, files):
    return trained.probabilities(np.stack([trained.stored(file) for file in files]))


def all_of(model, data, **params):
    return model.predict(data, params={"probabilities": True} | params)


def close(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_answer_is_a_table_of_the_best_classes(model, files, expected):
    table = model.predict(files)
    assert list(table) == ["class", "class_name", "probability", "top"]
    for row, probabilities in zip(table.to_dict("records"), expected, strict=True):
        order = sorted(range(7), key=lambda label: -probabilities[label])[:5]
        assert [each["class"] for each in row["top"]] == [CLASSES[label] for label in order]
        assert [each["class_name"] for each in row["top"]] == [f"letter {CLASSES[label]}" for label in order]
        values = [each["probability"] for each in row["top"]]
        assert values == pytest.approx([probabilities[label] for label in order], rel=1e-5)
        assert (row["class"], row["probability"]) == (CLASSES[order[0]], values[0])
    assert [len(row) for row in model.predict(files, params={"top": 2}).top] == [2, 2, 2]
    assert [len(row) for row in model.predict(files, params={"top": 99}).top] == [7, 7, 7]


def test_bytes_base64_and_tables_of_them_are_the_same_pictures(model, files, expected):
    texts = [base64.encodebytes(file).decode() for file in files]  # with newlines
    forms = [
        files,
        tuple(files),
        texts,
        pd.Series(files),
        pd.DataFrame({"label": [1, 2, 3], "image": files}),
        pd.DataFrame({"anything": texts}),
        {"image": files},
        [{"image": {"bytes": file, "path": None}} for file in files],  # Hugging Face
        np.array(texts),
        [memoryview(files[0]), "data:image/png;base64," + texts[1], bytearray(files[2])],
    ]
    for form in forms:
        close(all_of(model, form), expected)
    close(all_of(model, files[1]), expected[1:2])
    assert model.predict([]).empty
    assert all_of(model, []).shape == (0, 7)


def test_arrays_of_any_size_are_resized_to_the_stored_side(model, trained, expected, files):
    stored = np.stack([trained.stored(file) for file in files])
    close(all_of(model, stored), expected)
    close(all_of(model, stored, views=10), trained.probabilities(stored, 10))
    large = np.random.default_rng(0).integers(0, 256, (2, 100, 150, 3), dtype=np.uint8)
    resized = np.stack([images.resize_and_center(each, 72) for each in large])
    close(all_of(model, large), trained.probabilities(resized))
    close(all_of(model, large[0].astype(np.int64)), trained.probabilities(resized[:1]))
    close(all_of(model, [large[0], stored[1]]), trained.probabilities(np.stack([resized[0], stored[1]])))
    many = np.concatenate([stored] * 14)  # more than are taken at a time
    close(all_of(model, many), np.concatenate([expected] * 14))


PIXELS = np.zeros((2, 8, 8, 3), np.uint8)
JPEG = images.encode(np.zeros((8, 8, 3), np.uint8), 90)
WRONG = [
    ([JPEG, JPEG[:40]], r"^image 2 of 2: "),
    ([b""], "^empty file$"),
    (["not base64!"], "^a text that is not base64, 'not base64!': give the bytes of image files"),
    (PIXELS[..., :2], r"^image 1 of 2: an array of shape \(8, 8, 2\)"),
    (PIXELS / 2.0, "^image 1 of 2: an array of float64: pixels are whole numbers from 0 to 255"),
    (PIXELS.astype(int) - 1, "pixels are whole numbers from 0 to 255"),
    (PIXELS[0, 0], r"^an array of shape \(8, 3\) and type uint8"),
    ([[[1, 2], [3]]], "^setting an array element|^an array"),
    ([5], r"^an array of shape \(\)"),
    (5, "^an input of type int"),
    (np.broadcast_to(np.uint8(0), (1, 20000, 6000, 3)), "^6000x20000 pixels, at most 100000000 are read"),
    (pd.DataFrame({"a": [1], "b": [2]}), "^columns a, b: the pictures are in a column `image`"),
    ([{"picture": JPEG}], "^fields picture: a picture is in the field `image`"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_what_is_no_picture_is_refused_in_one_line(model, data, message):
    with pytest.raises(ValueError, match=message) as error:
        model.predict(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("params", "message"), [({"views": 5}, "^views = 5: 1 or 10"), ({"top": 0}, "^top = 0: at")])
def test_parameters_out_of_range_are_refused(model, params, message):
    with pytest.raises(ValueError, match=message):
        model.predict([JPEG], params=params)


def test_files_are_read_only_by_a_model_that_was_loaded_to_read_them(model, logged, files, expected, tmp_path):
    for number, file in enumerate(files):
        (tmp_path / str(number)).write_bytes(file)
    paths = [tmp_path / str(number) for number in range(3)]
    with pytest.raises(ValueError, match=r'^image 1 of 3: files are read by .* model_config={"files": True}'):
        model.predict(paths)
    with pytest.raises(ValueError, match="is not base64"):
        model.predict([str(paths[0])])
    reading = mlflow.pyfunc.load_model(logged[1], model_config={"files": True})
    close(all_of(reading, paths), expected)
    close(all_of(reading, pd.DataFrame({"image": map(str, paths)})), expected)
    close(all_of(reading, str(paths[2])), expected[2:])
    with pytest.raises(ValueError, match="nowhere: No such file"):
        reading.predict([tmp_path / "nowhere"])


def test_nothing_of_the_model_is_pickled(logged, tmp_path):
    """All files are text, but for weights, mean image."""
    place = mlflow.artifacts.download_artifacts(logged[1], dst_path=str(tmp_path))
    info = mlflow.models.Model.load(place)
    assert "python_model" not in info.flavors["python_function"], "the name of a pickle"
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    binary = []
    for file in tmp_path.rglob("*"):
        if file.is_file():
            try:
                file.read_text()
            except UnicodeDecodeError:
                binary.append(file.name)
    assert sorted(binary) == ["mean_image.npy", "model.safetensors"]
    assert info.load_input_example(place) == [base64.b64encode(_slope()).decode()]
    assert [param.name for param in info.signature.params.params] == ["top", "views", "probabilities"]


def _slope():
    slope = np.linspace(0, 255, 48).astype(np.uint8)
    return images.encode(np.repeat(np.tile(slope, (48, 1))[:, :, None], 3, axis=2), 90)


# over HTTP: MLflow's scoring server, called without a network


@pytest.fixture
def post(model, monkeypatch):
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "")  # set by init, for this process's life
    from mlflow.pyfunc import scoring_server

    app = scoring_server.init(model)

    def post(body, kind="application/json"):
        """The status and the body of an answer."""
        sent, body = [], body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/invocations",
            "raw_path": b"/invocations", "query_string": b"", "root_path": "", "scheme": "http", "server": ("here", 1),
            "client": ("here", 2), "headers": [(b"content-type", kind.encode())],
        }  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        text = b"".join(message.get("body", b"") for message in sent).decode()
        return sent[0]["status"], json.loads(text)

    return post


def test_each_of_mlflow_s_forms_of_json_is_taken(post, files, expected, trained):
    texts = [base64.b64encode(file).decode() for file in files]
    forms = [
        {"inputs": texts},
        {"inputs": {"image": texts}},
        {"instances": texts},
        {"instances": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"inputs": np.stack([trained.stored(file) for file in files]).tolist()},
    ]
    for form in forms:
        status, answer = post(form | {"params": {"probabilities": True}})
        assert status == 200, answer
        np.testing.assert_allclose(answer["predictions"], expected, rtol=1e-5, atol=1e-7)
    status, answer = post({"inputs": texts, "params": {"top": 2}})
    assert [row["class"] for row in answer["predictions"]] == [CLASSES[label] for label in expected.argmax(1)]
    assert [len(row["top"]) for row in answer["predictions"]] == [2, 2, 2]
    table = io.BytesIO()
    pd.DataFrame({"image": files}).to_parquet(table)
    status, answer = post(table.getvalue(), "application/vnd.apache.parquet")
    assert [row["class"] for row in answer["predictions"]] == [CLASSES[label] for label in expected.argmax(1)]


def test_a_broken_jpeg_is_status_400_and_one_line(post):
    texts = [base64.b64encode(data).decode() for data in (JPEG, JPEG[: len(JPEG) // 2], b"GIF89a")]
    status, answer = post({"inputs": texts[:2]})
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert answer["message"].startswith("image 2 of 2: ")
    assert len(answer["message"]) < 200, "not the whole input"
    assert "\n" not in answer["message"]
    assert "stack_trace" not in answer
    assert post({"inputs": texts[2:]})[0] == 400
    assert post({"inputs": texts[:1], "params": {"views": 3}})[0] == 400


def test_strangers_images_are_decoded_in_a_process_of_limits(post, model, monkeypatch):
    small, large = io.BytesIO(), io.BytesIO()
    PIL.Image.new("RGB", (80, 80), "red").save(small, "PNG")
    PIL.Image.new("RGBA", (8600, 8600), (1, 2, 3, 4)).save(large, "PNG", compress_level=1)
    small, large = (base64.b64encode(file.getvalue()).decode() for file in (small, large))
    classifier = model.unwrap_python_model()
    monkeypatch.setattr(images, "_decode_with_pillow", lambda *args: pytest.fail("decoded in the server"))
    monkeypatch.setattr(classifier, "decoder", ApartDecoder(seconds=0))
    status, answer = post({"inputs": [small, large]})
    assert (status, answer["message"]) == (400, "image 2 of 2: takes more than 0 seconds to decode")
    assert post({"inputs": [small]})[0] == 200


def test_a_client_cannot_have_the_server_read_a_file(post, tmp_path):
    file = tmp_path / "secret"
    PIL.Image.new("RGB", (80, 80)).save(file, "PNG")
    asked = [
        {"inputs": [str(file)]},
        {"inputs": [f"file://{file}"]},
        {"inputs": [{"image": {"path": str(file)}}]},
        {"dataframe_records": [{"image": str(file)}]},
        {"inputs": [str(file)], "params": {"files": True}},
        {"inputs": [str(file)], "model_config": {"files": True}},
    ]
    for body in asked:
        status, answer = post(body)
        assert status == 400, (body, answer)


def test_requests_at_the_same_time_wait_for_each_other(model, files, expected):
    """The net's kernels would be shared by the server's threads."""
    inside, most, found = [], [], {}
    classifier = model.unwrap_python_model()
    working = classifier.trained.probabilities

    def probabilities(batch, views):
        inside.append(1)
        most.append(len(inside))
        answer = working(batch, views)
        inside.pop()
        return answer

    classifier.trained.probabilities = probabilities
    try:
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: all_of(model, files[i])})) for i in (0, 1, 2, 0, 1, 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        classifier.trained.probabilities = working
    assert max(most) == 1
    for i in range(3):
        close(found[i], expected[i : i + 1])
