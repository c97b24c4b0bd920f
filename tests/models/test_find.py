"""A trained net is found by what a user calls it."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

import alexnet
from orchestrator.config.recipes import digits
from orchestrator.models import find
from orchestrator.train.run_folder import RunFolder

BUILD = {"preset": "paper", "num_classes": 3, "width": 0.0625, "input_size": 64, "lrn": {}}


def save(folder, seed=0):
    net = alexnet.build("paper", 3, width=0.0625, input_size=64, init="he", seed=seed)
    description = alexnet.Description(BUILD, ("a", "b", "c"), epoch=seed)
    alexnet.TrainedNet(net, description, np.full((72, 72, 3), 9, np.float32)).save(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with two checkpoints, of which the first is the best."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = RunFolder(tmp_path / "runs", "mine")
    folder.create(digits())
    for epoch in (3, 4):
        save(folder.path.local / f"checkpoint-epoch-{epoch:04d}", epoch)
    folder.write_result(
        {"best_checkpoint": "/elsewhere/mine/checkpoint-epoch-0003", "mlflow_run_id": "abc",
         "mlflow_tracking_uri": "sqlite:////elsewhere/mlflow.db"}
    )  # fmt: skip
    return folder


def test_a_run_by_name_by_folder_and_by_checkpoint(run, tmp_path):
    """The run was moved since: its best checkpoint is the one of that name in its folder."""
    into = tmp_path / "into"
    for text in ("mine", "runs/mine", str(tmp_path / "runs" / "mine")):
        found = find.find_model(text, into)
        assert (found.name, found.load().description.epoch) == ("mine", 3)
        assert found.run == run.path
        assert (found.mlflow_run_id, found.mlflow_uri) == ("abc", f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert found.data == str(tmp_path / "runs" / "_data" / "digits")
    last = find.find_model("runs/mine/checkpoint-epoch-0004", into)
    assert (last.name, last.load().description.epoch) == ("mine-checkpoint-epoch-0004", 4)
    assert not into.exists(), "what is on this disk is not copied"


def test_a_copied_checkpoint_is_a_model_without_a_run(run, tmp_path):
    save(tmp_path / "copy", 5)
    found = find.find_model(str(tmp_path / "copy"), tmp_path / "into")
    assert (found.name, found.run, found.data, found.load().description.epoch) == ("copy", None, None, 5)


def test_several_models_get_names_of_their_own(run, tmp_path):
    found = find.find_models(["mine", "runs/mine", "mine"], tmp_path / "into")
    assert [model.name for model in found] == ["mine", "mine-2", "mine-3"]


def test_the_best_trial_stands_for_a_search(run, tmp_path):
    folder = RunFolder(tmp_path / "runs", "tuned")
    folder.make()
    folder.write("search.yaml", "")
    for trial, epoch in (("0000", 9), ("0001", 2), ("0001-a", 5), ("0001-a", 6), ("00010", 5)):
        save(folder.path.local / "trials" / trial / f"checkpoint-epoch-{epoch:04d}", epoch)
    trials = [{"number": 0, "best": {"epoch": 9}}, {"number": 1, "best": {"epoch": 5}, "mlflow_run_id": "t1"}]
    folder.write_result({"trials": trials, "best": 1, "mlflow_tracking_uri": None})
    found = find.find_model("tuned", tmp_path / "into")
    assert found.path == folder.path.local / "trials" / "0001-a" / "checkpoint-epoch-0005"
    assert (found.name, found.mlflow_run_id, found.run) == ("tuned", "t1", folder.path)
    folder.write_result({"trials": trials, "best": None})
    with pytest.raises(ValueError, match=r"MODEL 'tuned': the search .* has no best trial yet"):
        find.find_model("tuned", tmp_path / "into")


def test_an_older_checkpoint_is_described_by_its_run_and_data(run, tmp_path, monkeypatch):
    for name in ("net.json", "mean_image.npy"):
        (run.path.local / "checkpoint-epoch-0003" / name).unlink()
    with pytest.raises(ValueError, match=r"was written before 0.3 .*, and its data, .*digits, is not there"):
        find.find_model("mine", tmp_path / "into")
    data = tmp_path / "runs" / "_data" / "digits"
    data.mkdir(parents=True)
    np.save(data / "mean.npy", np.full((72, 72, 3), 9, np.float32))
    manifest = SimpleNamespace(
        classes=("a", "b", "c"), class_names=(), exif="", source="digits", digest="d", image_size=72,
        mean_image_file="mean.npy",
        mean_image_sha256=hashlib.sha256((data / "mean.npy").read_bytes()).hexdigest(),
    )  # fmt: skip
    (data / "manifest.json").write_text("{}")
    monkeypatch.setattr(find, "read_manifest", lambda folder: manifest)
    run.change(digits().changed(width=0.0625))
    found = find.find_model("mine", tmp_path / "into")
    assert found.path == tmp_path / "into"
    description = found.load().description
    assert (description.classes, description.epoch, description.pixel_scale) == (("a", "b", "c"), 3, 1 / 64)
    run.write_result({"best_checkpoint": "checkpoint-epoch-0003", "digest": "other"})
    with pytest.raises(ValueError, match=r"digits is not what it was trained on"):
        find.find_model("mine", tmp_path / "into")


WRONG = [
    ("yours", r"MODEL 'yours': is not there; give the name of a run, .*; .*runs has: mine$"),
    ("nowhere/mine", r"MODEL 'nowhere/mine': is not there"),
    ("runs", r"MODEL 'runs': .*runs is neither a run nor a checkpoint"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_not_there_is_one_line(run, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        find.find_model(text, tmp_path / "into")
    assert "\n" not in str(error.value)


def test_a_run_without_a_checkpoint_is_one_line(run, tmp_path):
    RunFolder(tmp_path / "runs", "new").create(digits())
    with pytest.raises(ValueError, match=r"MODEL 'new': the run .*new has no checkpoint yet"):
        find.find_model("new", tmp_path / "into")


@pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other
def test_a_model_in_mlflow_is_fetched_by_run_and_by_alias(run, tmp_path, monkeypatch):
    import mlflow

    from orchestrator.tracking.store import Store
    from orchestrator.tracking.training_run import Tracker

    uri = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker(uri)
    tracker.run.begin("logged", "jobs/train.py", {"data": "shards/mine"})
    save(tmp_path / "net", 8)
    tracker.log_model(tmp_path / "net")
    tracker.finish("FINISHED", hurry=False)
    client, run_id = Store(uri).client, tracker.run.run_id
    mlflow.set_tracking_uri(uri)
    mlflow.register_model(f"runs:/{run_id}/model", "digits")
    client.set_registered_model_alias("digits", "champion", "1")
    for number, address in enumerate((f"runs:/{run_id}/model", "models:/digits/1", "models:/digits@champion")):
        found = find.find_model(address, tmp_path / "into" / str(number))
        assert found.load().description.epoch == 8
        assert (found.mlflow_run_id, found.mlflow_uri, found.data) == (run_id, uri, "shards/mine")
    assert found.name == "digits@champion"
    for address in ("models:/digits@nobody", "models:/other/1", "runs:/123/model", "runs:/123"):
        with pytest.raises(ValueError, match=rf"{address}: cannot be fetched from MLflow at sqlite") as error:
            find.find_model(address, tmp_path / "into" / "none")
        assert "\n" not in str(error.value)
    assert json.loads((found.path / "net.json").read_text())["epoch"] == 8


def test_a_stopped_run_is_its_best_epoch_not_its_last(run, tmp_path):
    """A run that was stopped has no best checkpoint in its result yet; a trial has no result."""
    run.write_result({"best": {"epoch": 3, "val/top1_error": 0.1}})
    save(run.path.local / "checkpoint-epoch-0004-step-000007", 5)
    assert find.find_model("mine", tmp_path / "into").load().description.epoch == 3
    (run.path.local / "result.json").unlink()
    errors = {1: 0.5, 2: 0.4, 3: 0.2, 4: 0.3}
    history = [{"epoch": epoch, "val/top1_error": error} for epoch, error in errors.items()]
    state = run.path.local / "checkpoint-epoch-0004-step-000007" / "state.json"
    state.write_text(json.dumps({"state": {"history": history}}))
    assert find.find_model("mine", tmp_path / "into").load().description.epoch == 3
    state.write_text("damaged")
    assert find.find_model("mine", tmp_path / "into").load().description.epoch == 5, "its last"


def test_the_digits_are_kept_with_the_runs_also_for_a_search_and_a_model_in_mlflow(run, tmp_path):
    folder = RunFolder(tmp_path / "runs", "tuned")
    folder.make()
    folder.write("search.yaml", "")
    trial = RunFolder(folder.path / "trials", "0000")
    trial.create(digits())
    save(trial.path.local / "checkpoint-epoch-0002", 2)
    folder.write_result({"trials": [{"number": 0, "best": {"epoch": 2}}], "best": 0})
    assert find.find_model("tuned", tmp_path / "into").data == str(tmp_path / "runs" / "_data" / "digits")
