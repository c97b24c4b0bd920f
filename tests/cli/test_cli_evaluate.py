"""jobs/evaluate.py and jobs/predict.py, started as a user starts them; tests/models has what they compute."""

import json
import shutil

import mlflow
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from conftest import refused, started

import alexnet
from alexnet import images
from alexnet.intervals import error_interval
from orchestrator.config.recipes import digits
from orchestrator.tracking.training_run import Tracker
from orchestrator.train.run_folder import RunFolder


def save(folder, classes, num=10, size=72):
    net = alexnet.build("paper", num, width=0.0625, input_size=64, init="he", seed=1)
    build = {"preset": "paper", "num_classes": num, "width": 0.0625, "input_size": 64, "lrn": {}}
    description = alexnet.Description(build, tuple(classes), pixel_scale=1 / 64, epoch=3)
    alexnet.TrainedNet(net, description, np.full((size, size, 3), 99, np.float32)).save(folder)
    return folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "MODEL 'nowhere': is not there"),
        (["model"], "no run says what it was trained on; give shards with --data SHARDS"),
        (["model", "--data", "nowhere"], "nowhere: no such folder"),
        (["model", "--views", "7"], "--views: invalid choice: 7 (choose from 1, 10)"),
        (["model", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["run"], "has no checkpoint yet"),
        (["pickle.pt"], "pickle.pt: cannot be read as a dict of tensors alone"),
        (["model", "--data", "x", "--split", "test"], "invalid choice: 'test'"),
    ],
)
def test_a_wrong_evaluation_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", "abcdefghij")
    RunFolder("runs", "run").create(digits())
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04.")
    assert words in refused("evaluate", args, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model"], "the following arguments are required: --source"),
        (["model", "--source", "nowhere"], "--source nowhere: no such file or folder"),
        (["model", "--source", "empty"], "has no image"),
        (["model", "--source", "empty", "--output", "x.txt"], "ends in none of .parquet, .csv, .jsonl"),
        (["model", "--source", "empty", "--top", "11"], "--top 11: the model has 10 classes"),
        (["model", "--source", "many"], "has 101 images, more than a table shows; give --output"),
    ],
)
def test_a_wrong_prediction_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    save(tmp_path / "model", "abcdefghij")
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for i in range(101):
        (tmp_path / "many" / f"{i}.jpg").touch()
    assert words in refused("predict", args, tmp_path, monkeypatch, capsys)


def test_predictions_to_a_file_say_what_could_not_be_read(tmp_path, monkeypatch, capsys):
    save(tmp_path / "model", "abcdefghij")
    (tmp_path / "in").mkdir()
    for name in ("b.png", "a.png"):
        PIL.Image.new("RGB", (80, 90), (200, 10, 10)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "c.png").write_bytes(b"none")
    args = ["model", "--source", "in", "--output", "out.parquet", "--top", "2", "--views", "10"]
    status, out, _ = started("predict", args, tmp_path, monkeypatch, capsys)
    assert (status, out.splitlines()[-1]) == (
        0, f"2 predictions in {tmp_path}/out.parquet, 1 could not be read, listed in "
        f"{tmp_path}/out.parquet.rejected.jsonl",
    )  # fmt: skip
    table = pq.read_table("out.parquet").to_pydict()
    assert list(table) == ["name", "classes", "probabilities"]
    assert table["name"] == ["a.png", "b.png"]
    assert [len(row) for row in table["classes"] + table["probabilities"]] == [2, 2, 2, 2]
    [rejected] = map(json.loads, (tmp_path / "out.parquet.rejected.jsonl").open())
    assert rejected["name"] == "c.png"
    status, out, err = started("predict", ["model", "--source", "in"], tmp_path, monkeypatch, capsys)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["image", "a.png", "b.png", "1"]
    assert 'warning: "c.png": cannot be read' in err
    args = ["model", "--source", "in/c.png", "--output", "none.csv"]
    status, _, err = started("predict", args, tmp_path, monkeypatch, capsys)
    assert status == 1
    assert "none of its 1 images could be read: c.png: not an image" in err
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_an_evaluation_leaves_files_and_values_in_the_models_run(digit_shards, tmp_path, monkeypatch, capsys):
    """The model's MLflow run had ended; it still has its status and its end. Without a server that is a warning."""
    shards, manifest = digit_shards
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client = mlflow.MlflowClient(store)
    experiment = client.create_experiment("alexnet", (tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.set_terminated(run_id, "KILLED", 12345)
    run = RunFolder(tmp_path / "runs", "mine")
    run.create(digits().changed(data=str(shards)))
    save(run.path.local / "checkpoint-epoch-0003", manifest.classes)
    run.write_result({"best_checkpoint": "checkpoint-epoch-0003", "mlflow_run_id": run_id})
    capsys.readouterr()  # of MLflow, which made its store
    status, out, err = started("evaluate", ["mine"], tmp_path, monkeypatch, capsys)
    assert (status, err) == (0, "")
    found = json.loads((run.path.local / "evaluation.json").read_text())
    [model] = found["models"]
    assert (found["schema_version"], model["name"], model["views"]) == (1, "mine", 1)
    assert model["num_images"] == manifest.rows["val"] == sum(row["images"] for row in model["per_class"])
    wrong = round(model["top1_error"] * model["num_images"])
    assert model["top1_interval"] == list(error_interval(wrong, model["num_images"]))
    assert f"{100 * model['top1_error']:.2f} %" in out
    table = pq.read_table(run.path.local / "predictions.parquet")
    assert table.column_names == ["id", "name", "label", "classes", "probabilities"]
    guessed = [row["classes"][0] != manifest.classes[row["label"]] for row in table.to_pylist()]
    assert sum(guessed) == wrong
    kept = client.get_run(run_id)
    assert (kept.info.status, kept.info.end_time) == ("KILLED", 12345)
    assert kept.data.metrics["eval/top1_error"] == pytest.approx(model["top1_error"])
    assert {file.path for file in client.list_artifacts(run_id, "eval")} == {
        "eval/evaluation.json", "eval/confusion.png", "eval/reliability.png"
    }  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, out, _ = started("evaluate", ["mine", "--output", "again"], tmp_path, monkeypatch, capsys)
    assert status == 0
    assert "warning: the evaluation did not reach MLflow" in out


def fitted(folder, shards, manifest):
    """A model whose last layer is fitted to validation images: right about most of them."""
    [shard] = [pq.read_table(shards / part.file) for part in manifest.split("val")][:1]
    trained = alexnet.load(folder)
    stored = np.stack([images.decode(data) for data in shard["image"].to_pylist()])
    net, labels = trained.net, torch.tensor(shard["label"].to_pylist())
    inputs = []
    hook = net.fc8.register_forward_hook(lambda layer, given, output: inputs.append(given[0]))
    trained.probabilities(stored)
    hook.remove()
    wanted = torch.nn.functional.one_hot(labels, 10).float()
    with torch.no_grad():
        net.fc8.weight.copy_(torch.linalg.lstsq(inputs[0].double(), wanted.double(), driver="gelsd").solution.T)
        net.fc8.bias.zero_()
    trained.save(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_the_champion_changes_only_for_a_better_model(digit_shards, tmp_path, monkeypatch, capsys):
    """A first model, an equal one, a worse one, a better one."""
    shards, manifest = digit_shards
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)

    def promoted(name, change=lambda folder: None):
        run = RunFolder(tmp_path / "runs", name)
        run.create(digits().changed(data=str(shards)))
        folder = save(run.path.local / "checkpoint-epoch-0003", manifest.classes)
        change(folder)
        tracker = Tracker(uri)
        tracker.run.begin(name, "jobs/train.py", {})
        tracker.log_model(folder, step=3)
        tracker.finish("FINISHED", hurry=False)
        run.write_result({"best_checkpoint": folder.name, "mlflow_run_id": tracker.run.run_id})
        capsys.readouterr()
        status, out, err = started("evaluate", [name, "--promote", "digits"], tmp_path, monkeypatch, capsys)
        assert (status, err) == (0, "")
        return out.splitlines()[-1], client.get_model_version_by_alias("digits", "champion").version

    def guessing(folder):
        trained = alexnet.load(folder)
        torch.nn.init.zeros_(trained.net.fc8.weight)
        torch.nn.init.zeros_(trained.net.fc8.bias)
        trained.save(folder)

    first, version = promoted("first")
    assert (first, version) == ("models:/digits/1 is now the champion of digits: the first champion", 1)
    equal, version = promoted("equal")
    assert version == 1
    assert equal.endswith("not told apart by that many images: not promoted")
    worse, version = promoted("worse", guessing)
    assert version == 1
    assert worse.endswith("worse by more than chance: not promoted")
    better, version = promoted("better", lambda folder: fitted(folder, shards, manifest))
    assert version == 4
    assert better.startswith("models:/digits/4 is now the champion of digits: top-1 error ")
    assert better.endswith("better by more than chance: promoted")
    other = tmp_path / "runs" / "better" / "checkpoint-epoch-0005"
    shutil.copytree(other.with_name("checkpoint-epoch-0003"), other)
    described = json.loads((other / "net.json").read_text())
    (other / "net.json").write_text(json.dumps(described | {"epoch": 5}))
    line = refused("evaluate", [str(other), "--promote", "digits"], tmp_path, monkeypatch, capsys)
    assert "is of epoch 5, and the model in MLflow of epoch 3: give runs:/" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model", "model", "--promote", "x"], "--promote x: takes one MODEL, not 2"),
        (
            ["model", "--register", "x"],
            "--register x: MODEL model has no run in MLflow whose model",
        ),
        (["model", "--register", "x", "--promote", "y"], "--register x: --promote y registers the model, too"),
        (["model", "--promote", "a/b"], "argument --promote: NAME 'a/b': use at most 150 letters"),
    ],
)
def test_what_cannot_be_registered_is_one_line(tmp_path, monkeypatch, capsys, args, words):
    save(tmp_path / "model", "abcdefghij")
    monkeypatch.setattr("orchestrator.cli.evaluate.open_data", lambda folder, split: None)
    monkeypatch.setattr("orchestrator.cli.evaluate.column_order", lambda *args: None)
    assert words in refused("evaluate", [*args, "--data", "x"], tmp_path, monkeypatch, capsys)
