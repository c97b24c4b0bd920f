"""MLflow: one run, its statuses, a model that can be used."""

import os
import shlex
import socket
import subprocess
import sys

import mlflow
import numpy as np
import pytest
import requests
import torch
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

import alexnet
from orchestrator.base.redaction import redact
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.tracking import run as tracking
from orchestrator.tracking.store import Store, tracking_uri, tracking_uri_of, ui_command
from orchestrator.tracking.training_run import Tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def test_the_default_store_is_an_absolute_path_in_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert "127.0.0.1" in ui_command(tracking_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri() == "http://tracker:5000"


def test_an_unreachable_server_is_one_line_without_its_password():
    with pytest.raises(ValueError, match="cannot be reached") as error:
        Tracker("http://user:secret@127.0.0.1:9")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_no_password_is_shown_or_stored():
    assert redact("https://user:secret@host:1/path") == "https://host:1/path"
    assert redact("postgresql://user:a/b@secret@host:1/path") == "postgresql://host:1/path"
    assert redact("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert redact("http://host:5000/path") == "http://host:5000/path"
    assert "secret" not in ui_command("https://user:secret@host")
    place = "sqlite:////home/me/my runs/mlflow.db"
    assert shlex.split(ui_command(place))[-2:] == ["--backend-store-uri", place]
    assert ui_command("postgresql://user:secret@host/db").endswith('--backend-store-uri "$MLFLOW_TRACKING_URI"')


def test_a_server_s_password_is_taken_out_of_its_address(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:se%40cret@host:1/path")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "another")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    assert tracking_uri() == "https://host:1/path"
    assert tracking_uri() == "https://host:1/path"
    found = [os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")]
    assert found == ["https://host:1/path", "user", "se@cret"]


def test_a_run_is_tracked_where_it_was_before(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    default = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri_of(None) == (default, None)
    assert tracking_uri_of(default) == (default, None)
    before = f"sqlite:///{tmp_path}/before.db"
    gone = f"MLflow at {before}, where it was tracked, is not there (no such file); tracked in {default}"
    assert tracking_uri_of(before) == (default, gone)
    (tmp_path / "before.db").touch()
    assert tracking_uri_of(before) == (before, f"tracked in {before}, as before")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert tracking_uri_of(uri) == (uri, f"tracked in {uri}, as before")
    found, said = tracking_uri_of(uri)
    assert found == default
    assert "is not there (connection refused)" in said
    assert tracking_uri_of("postgresql://host/db")[0] == default  # its password is not known
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////other.db")
    assert tracking_uri_of(before) == ("sqlite:////other.db", None)


@pytest.mark.ray
def test_a_run_in_the_place_of_a_deleted_one_and_other_data_are_told(uri, digit_shards):
    folder, manifest = digit_shards
    said, first = [], Tracker(uri)
    first.start("first", digits(), manifest, StoragePath.of(folder))
    first.finish("KILLED")
    run_id, client = first.run.run_id, first.run.client
    shards = (manifest.shards[0].model_copy(update={"sha256": "0" * 64}), *manifest.shards[1:])
    for data, new in ((manifest, True), (manifest.model_copy(update={"shards": shards}), True)):
        again = Tracker(uri)
        again.start("first", digits(), data, StoragePath.of(folder), run_id=run_id, new_data=new, warn=said.append)
        again.finish("KILLED")
        assert again.run.run_id == run_id
        digests = {found.dataset.digest for found in client.get_run(run_id).inputs.dataset_inputs}
        assert len(client.get_run(run_id).inputs.dataset_inputs) == len(digests)
        assert digests == {manifest.digest, data.digest}
    assert said == []
    client.delete_run(run_id)
    third = Tracker(uri)
    third.start("first", digits(), manifest, StoragePath.of(folder), run_id=run_id, warn=said.append)
    third.finish("KILLED")
    assert said == [
        f"MLflow run {run_id} was deleted, or is in another store than {uri}; run {third.run.run_id} takes its place"
    ]


@pytest.mark.slow
def test_jobs_that_make_one_store_at_the_same_moment_share_it(tmp_path):
    make = "import sys; from orchestrator.tracking.store import Store; print(Store(sys.argv[1]).experiment_id)"
    command = [sys.executable, "-c", make, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [job.communicate(timeout=120)[0] for job in jobs] == ["1\n"] * 3


@pytest.mark.ray
def test_what_a_crash_did_not_send_is_sent_when_the_run_goes_on(uri, digit_shards):
    tracker = Tracker(uri)
    tracker.start("hole", digits(), digit_shards[1], StoragePath.of(digit_shards[0]))
    history = [{"epoch": epoch, "step": 10 * epoch, "val/loss": 1 / epoch} for epoch in (1, 2, 3)]
    tracker.run.log_epoch(history[0])
    tracker.finish("KILLED")
    again = Tracker(uri)
    again.start("hole", digits(), digit_shards[1], StoragePath.of(digit_shards[0]), run_id=tracker.run.run_id)
    again.run.complete(history, "val/loss")
    again.finish("FINISHED")
    found = again.run.client.get_metric_history(tracker.run.run_id, "val/loss")
    assert [(point.step, point.value) for point in found] == [(10, 1.0), (20, 0.5), (30, 1 / 3)]


@pytest.mark.ray
def test_a_server_that_fails_for_a_while_costs_no_metric_and_no_training(uri, digit_shards, monkeypatch):
    tracker, said = Tracker(uri), []
    tracker.start("flaky", digits(), digit_shards[1], StoragePath.of(digit_shards[0]), warn=said.append)
    working = tracker.run.client.log_batch

    def down(*args, **kwargs):
        raise mlflow.exceptions.MlflowException("503 Service Unavailable")

    monkeypatch.setattr(tracker.run.client, "log_batch", down)
    tracker.run.log({"train/loss": 3.0}, step=1)
    tracker.run.log({"train/loss": 2.0}, step=2)
    monkeypatch.setattr(tracker.run.client, "log_batch", working)
    tracker.run.log({"train/loss": 1.0}, step=3)
    tracker.finish("FINISHED")
    history = mlflow.MlflowClient(uri).get_metric_history(tracker.run.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(said) == 1
    assert "503" in said[0]


AWAY, REFUSED = (
    mlflow.exceptions.MlflowException("503"),
    mlflow.exceptions.MlflowException("no", error_code=INVALID_PARAMETER_VALUE),
)


@pytest.mark.parametrize(
    ("patience_s", "errors", "succeeds"),
    [
        (60.0, [AWAY, ConnectionError(), requests.Timeout()], True),
        (60.0, [PermissionError()], False),
        (60.0, [REFUSED], False),
        (0.0, [AWAY], False),
    ],
)
def test_a_server_that_is_away_is_waited_for_and_one_that_answers_is_taken_at_its_word(
    uri, monkeypatch, patience_s, errors, succeeds
):
    monkeypatch.setattr(tracking, "RETRY_S", 0.01)
    said, left = [], [*errors, None]
    run = tracking.Run(Store(uri), said.append)
    run.patience_s = patience_s

    def call():
        if error := left.pop(0):
            raise error
        return "done"

    if succeeds:
        assert run.patiently(call) == "done"
        assert len(said) == 1
        assert "retrying" in said[0]
    else:
        with pytest.raises(type(errors[0])):
            run.patiently(call)
        assert (left, said) == ([None], [])


def test_a_deleted_experiment_is_said_before_anything_starts(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    tracker = Tracker(uri)
    tracker.run.client.delete_experiment(tracker.run.store.experiment_id)
    with pytest.raises(ValueError, match="'gone' was deleted: restore it"):
        Tracker(uri)


@pytest.mark.ray
def test_a_run_keeps_its_parameters_data_and_status_and_goes_on_under_its_id(uri, digit_shards):
    folder, manifest = digit_shards
    tracker = Tracker(uri)
    tracker.start("one", digits(), manifest, StoragePath.of(folder))
    tracker.run.log({"train/loss": 2.5}, step=1)
    tracker.finish("KILLED", "stopped by SIGTERM")
    client = mlflow.MlflowClient(uri)
    run = client.get_run(tracker.run.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["error"] == "stopped by SIGTERM"
    assert run.data.params == {name: str(value) for name, value in digits().resolved().items()}
    assert run.inputs.dataset_inputs[0].dataset.digest == manifest.digest
    assert {"config.yaml", "manifest.json"} <= {item.path for item in client.list_artifacts(tracker.run.run_id)}

    again = Tracker(uri)
    again.start("one", digits(), manifest, StoragePath.of(folder), run_id=tracker.run.run_id)
    assert client.get_run(tracker.run.run_id).info.status == "RUNNING"
    again.finish("FINISHED")
    assert again.run.run_id == tracker.run.run_id
    assert client.get_run(tracker.run.run_id).info.status == "FINISHED"


@pytest.mark.ray
@pytest.mark.slow
def test_the_logged_model_predicts_what_the_net_predicts(uri, digit_shards, tmp_path):
    import pyarrow.parquet as pq

    from alexnet import images

    folder, manifest = digit_shards
    net = alexnet.build("paper", 10, width=0.25, input_size=64, init="he").eval()
    build = {"preset": "paper", "num_classes": 10, "width": 0.25, "input_size": 64, "lrn": {}}
    mean = np.load(folder / manifest.mean_image_file)
    description = alexnet.Description(build, tuple(manifest.classes), pixel_scale=1 / 64)
    alexnet.TrainedNet(net, description, mean).save(tmp_path / "net")
    tracker = Tracker(uri)
    tracker.start("model", digits(), manifest, StoragePath.of(folder))
    tracker.log_model(tmp_path / "net")
    tracker.finish("FINISHED")

    rows = pq.read_table(folder / manifest.split("val")[0].file).slice(0, 6).to_pylist()
    stored = np.array([images.decode(row["image"]) for row in rows])
    model = mlflow.pyfunc.load_model(f"runs:/{tracker.run.run_id}/model")
    x = torch.from_numpy((stored - mean)[:, 4:68, 4:68] / 64).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = torch.softmax(net(x), 1).numpy()
    np.testing.assert_allclose(model.predict(stored, params={"probabilities": True}), expected, rtol=1e-4, atol=1e-6)
