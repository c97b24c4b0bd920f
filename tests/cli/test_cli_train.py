"""Whole training runs, started as a user starts them."""

import contextlib
import gzip
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import mlflow
import psutil
import pytest
import torch
from conftest import ROOT, assert_nested, assert_same_history, only_line, refused, started
from safetensors.torch import load_file

import alexnet
from orchestrator.config.recipes import digits
from orchestrator.models.find import find_model
from orchestrator.train import record
from orchestrator.train.profile_trace import PARTS
from orchestrator.train.run_folder import RunFolder

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def finished(job, place):
    """A short digits run, in float64, where every machine computes the same; its folder is `place`.

    With a Ray of its own, which replaces handlers of loggers when it starts.
    """
    done = job("train", "--epochs", "3", "--precision", "fp64", "--name", "first", cwd=place)
    assert done.returncode == 0, done.stderr
    return done


def result_of(place, name):
    return json.loads((place / "runs" / name / "result.json").read_text())


@pytest.mark.ray
@pytest.mark.slow
def test_training_ends_with_a_table_a_result_and_an_mlflow_run(finished, place):
    for words in ("results after 3 epochs", "top-1 error", "checkpoint", "MLflow run", "mlflow ui --host 127.0.0.1"):
        assert words in finished.stdout
    assert "ray" not in finished.stderr.lower(), "no chatter that a user cannot use"
    result = result_of(place, "first")
    assert result["status"] == "FINISHED"
    assert len(result["history"]) == 3
    assert result["metrics"] == result["history"][-1]
    assert result["metrics"]["val/top1_error"] < 0.5, "0.09 on every CPU"
    assert result["metrics"]["step"] == 3 * 23
    assert result["images_per_s"] > 0
    assert result["config"]["epochs"] == 3
    assert os.path.isfile(os.path.join(result["checkpoint"], "model.safetensors"))
    assert 1 <= len(list((place / "runs" / "first").glob("checkpoint-epoch-*"))) <= 2, "the best and the last"

    run = mlflow.MlflowClient(result["mlflow_tracking_uri"]).get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/top1_error"] == pytest.approx(result["metrics"]["val/top1_error"])
    assert {"train/loss", "train/images_per_s", "train/lr", "val/top5_error", "val/loss"} <= set(run.data.metrics)
    client = mlflow.MlflowClient(result["mlflow_tracking_uri"])
    assert {"config.yaml", "manifest.json", "learning_curves.png"} <= {
        i.path for i in client.list_artifacts(run.info.run_id)
    }
    assert sorted(p.name for p in place.iterdir()) == ["mlartifacts", "mlflow.db", "runs"], (
        "nothing else is left behind"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_s_log_holds_its_changes_of_state_and_ray_s_lines_and_the_terminal_does_not(finished, place):
    assert finished.stderr == ""
    assert "worker group" not in finished.stdout
    log, result = (place / "runs" / "first" / "run.log").read_text(), result_of(place, "first")
    best = result["best"]["epoch"]
    for words in (
        r"orchestrator\.train\.session: run first, new: .*'epochs': 3",
        r"orchestrator\.train\.training: starting 2 workers: layout columns",
        rf"MLflow run {result['mlflow_run_id']} at sqlite",
        r"training on cpu in fp64, 2 workers; nodes of the workers: \w+",
        r"epoch 1 of 3: .*'val/top1_error'",
        r"decision: the fit is over",
        rf"logging the model of epoch {best} to MLflow, from \S+checkpoint-epoch-000{best}",
        r"FINISHED: \S+result\.json",
        r"ray\.train\S*worker_group: Started training worker group of size 2",
    ):
        assert re.search(words, log), (words, log)
    assert result["schema_version"] == 2


@pytest.mark.ray
@pytest.mark.long
def test_a_net_is_fine_tuned_from_a_run_that_may_be_gone_when_it_is_resumed(finished, job, place, here):
    shutil.copytree(place / "runs" / "first", place / "source")
    flags = ("--freeze", "conv", "--lr-factor", "fc8=2", "--keep-every", "1", "--precision", "fp64")
    done = job("train", "--start-from", "source", *flags, "--epochs", "1", "--name", "tuned", cwd=place, **here)
    assert done.returncode == 0, done.stderr
    assert "starting from the weights of source\n" in done.stdout
    source = load_file(find_model(str(place / "source"), place).path / "model.safetensors")
    shutil.rmtree(place / "source")
    done = job("train", "--resume", "tuned", "--epochs", "2", cwd=place, **here)
    assert done.returncode == 0, done.stderr
    result, kept = result_of(place, "tuned"), place / "runs" / "tuned"
    assert result["started_from"] == "source"
    assert [0 <= entry["train/top1_error"] < 0.5 > entry["val/top1_error"] for entry in result["history"]] == [True] * 2
    assert sorted(path.name for path in kept.glob("kept-*")) == ["kept-epoch-0001", "kept-epoch-0002"]
    for epoch in (1, 2):
        trained = alexnet.load(kept / f"kept-epoch-{epoch:04d}")
        assert trained.description.epoch == epoch
        weights = load_file(kept / f"kept-epoch-{epoch:04d}" / "model.safetensors")
        assert {name.split(".")[0] for name in weights if torch.equal(weights[name], source[name])} == {
            "conv1", "conv2", "conv3", "conv4", "conv5",
        }  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_nan_stops_the_run_and_names_the_step(finished, place, here, monkeypatch, capsys):
    args = ["--epochs", "2", "--lr", "1e6", "--name", "wild"]
    status, _, err = started("train", args, place, monkeypatch, capsys, **here)
    assert status == 1
    assert re.search(r"error: loss is (nan|inf) at step \d+ \(epoch 1\): training diverged; try a lower --lr", err)
    result = result_of(place, "wild")
    assert result["status"] == "FAILED"
    run = mlflow.MlflowClient(result["mlflow_tracking_uri"]).get_run(result["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert "step" in run.data.tags["error"]


def start(place, *args, **env):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-u", str(ROOT / "jobs" / "train.py"), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=clean | env, stdout=pipe, stderr=pipe, text=True)


def read_until(process, words):
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} never came: {''.join(seen)} {process.stderr.read()}")


def stop(process, signum, place, name):
    """Stop a run as a user or a scheduler does; returns what it printed from here on."""
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert re.search(r"a checkpoint was saved after \d+ epochs? and \d+ steps?", out), out
    assert f"--resume {name}" in out
    result = result_of(place, name)
    assert result["status"] == "KILLED"
    run = mlflow.MlflowClient(result["mlflow_tracking_uri"]).get_run(result["mlflow_run_id"])
    assert run.info.status == "KILLED"


@pytest.mark.ray
@pytest.mark.long
def test_a_run_stopped_twice_goes_on_in_other_layouts_as_if_it_had_never_stopped(finished, recorded, place, job, here):
    process = start(place, "--epochs", "500", "--precision", "fp64", "--name", "stopped")
    read_until(process, "epoch 2/500  train loss")
    stop(process, signal.SIGINT, place, "stopped")
    process = start(place, "--resume", "stopped", "--layout", "single", "--workers", "1", **here)
    read_until(process, "resumed after epoch")
    read_until(process, "train loss")
    stop(process, signal.SIGTERM, place, "stopped")
    changes = ("--epochs", "7", "--layout", "hybrid", "--workers", "4")
    resumed = job("train", "--resume", "stopped", *changes, cwd=place, **here)
    assert resumed.returncode == 0, resumed.stderr
    assert "layout hybrid over 4 workers, as asked" in resumed.stdout
    assert re.search(r"resumed after epoch \d and \d+ steps?", resumed.stdout)
    assert "results after 7 epochs" in resumed.stdout
    history = result_of(place, "stopped")["history"]
    assert len(history) == 7
    assert_same_history(history, recorded)


def train_workers():
    """Of all runs on this process's Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_survived_and_a_killed_driver_s_run_is_resumed(
    finished, recorded, place, here, monkeypatch, capsys
):
    others = train_workers()  # of runs before that have just ended
    process = start(place, "--epochs", "500", "--precision", "fp64", "--name", "survivor", **here)
    read_until(process, "epoch 2/500  train loss")
    workers = [worker for worker in train_workers() if worker not in others]
    assert len(workers) == 2
    workers[0].kill()
    read_until(process, "a worker was lost; resuming from the last checkpoint")
    read_until(process, "train loss")
    workers = [worker for worker in train_workers() if worker not in others]
    process.kill()
    process.wait(30)
    assert psutil.wait_procs(workers, timeout=30)[1] == [], "Ray ends the workers of a driver that is gone"
    before = result_of(place, "survivor")
    assert before["status"] == "RUNNING"
    epochs = len(before["history"]) + 1
    args = ["--resume", "survivor", "--epochs", epochs]
    status, _, err = started("train", args, place, monkeypatch, capsys, **here)
    assert status == 0, err
    after = result_of(place, "survivor")
    assert after["status"] == "FINISHED"
    assert after["mlflow_run_id"] == before["mlflow_run_id"]
    assert [entry["epoch"] for entry in after["history"]] == list(range(1, epochs + 1))
    assert_same_history(after["history"], recorded)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_resumes_from_the_newest_whole_checkpoint_and_names_what_is_damaged(
    finished, place, here, monkeypatch, capsys
):
    folder = shutil.copytree(place / "runs" / "first", place / "runs" / "broken")
    for name in sorted(folder.glob("checkpoint-epoch-*")):
        assert record.verify(name).made["precision"] == "fp64"
    later = shutil.copytree(folder / "checkpoint-epoch-0003", folder / "checkpoint-epoch-0004")
    weights = bytearray((later / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (later / "model.safetensors").write_bytes(weights)
    (folder / "checkpoint_manager_snapshot.json").write_text("")  # as a killed driver could leave it
    args = ["--resume", "broken", "--epochs", "4"]
    status, out, err = started("train", args, place, monkeypatch, capsys, **here)
    assert (status, err) == (0, "")
    assert f"{later / 'model.safetensors'}: damaged: its SHA-256 is not that of what was written; it is not used" in out
    assert "resumed after epoch 3" in out
    assert (folder / "damaged-checkpoint-epoch-0004").is_dir()
    assert record.verify(folder / "checkpoint-epoch-0004")
    result = result_of(place, "broken")
    assert result["status"] == "FINISHED"
    assert result["history"][:3] == result_of(place, "first")["history"]
    assert result["history"][3]["epoch"] == 4


@pytest.mark.ray
@pytest.mark.slow
def test_a_flipped_byte_in_a_shard_ends_the_run_and_names_the_shard(finished, place, here, monkeypatch, capsys):
    data = place / "runs" / "_data" / "damaged"
    shutil.copytree(place / "runs" / "_data" / "digits", data)
    shard = next(iter(sorted((data / "train").iterdir())))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    args = ["--data", data, "--epochs", "1", "--name", "damaged"]
    status, out, err = started("train", args, place, monkeypatch, capsys, **here)
    shutil.rmtree(data)
    assert status == 1
    assert shard.name in only_line(out, err)


@pytest.mark.ray
@pytest.mark.slow
def test_a_profile_shows_whole_steps_of_all_workers_and_changes_no_loss(finished, place, here, monkeypatch, capsys):
    """25 of the 46 steps of two epochs, from the fourth on: over the end of the first epoch."""
    args = ["--epochs", "2", "--precision", "fp64", "--name", "profiled", "--profile", "25"]
    status, out, err = started("train", args, place, monkeypatch, capsys, **here)
    assert status == 0, err
    assert "profile of 25 steps from step 4, 2 workers; ms per step\nworker  step " in out
    result = result_of(place, "profiled")
    for profiled, plain in zip(result["history"], result_of(place, "first")["history"][:2], strict=True):
        assert profiled | {"train/images_per_s": 0} == plain | {"train/images_per_s": 0}

    folder = place / "runs" / "profiled" / "profile"
    found = json.loads((folder / "summary.json").read_text())
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"worker 0", "worker 1"}
    assert_nested(events)
    for worker in found["workers"]:
        spans = worker["spans_ms"]
        assert set(spans) == {"data", "copy", "exchange", "forward", "backward", "update"}
        assert 0.9 < sum(spans.values()) / worker["step_ms"] <= 1, "the rest is the loop's own"
        parts = [worker[f"{part}_ms"] for part in PARTS]
        assert sum(parts) == pytest.approx(worker["step_ms"], rel=0.01)
        assert set(worker["outside_ms"]) == {"validation", "checkpoint"}
        steps = [e for e in events if e["pid"] == worker["rank"] + 1 and e.get("cat") == "step"]
        assert [e["name"] for e in steps] == [f"step {number}" for number in range(4, 29)]
        assert sum(e["dur"] for e in steps) / 25_000 == pytest.approx(worker["step_ms"], abs=0.01)
    exchanged = {(row["for"], row["pass"], row["collective"]): row["calls"] for row in found["exchange"]}
    assert exchanged == {  # docs/layouts.md
        ("conv1", "forward", "allgather"): 3.0,  # images, their crops, their labels
        ("conv3", "forward", "allgather"): 1.0, ("conv3", "backward", "alltoall"): 1.0,
        ("fc6", "forward", "allgather"): 1.0, ("fc6", "backward", "alltoall"): 1.0,
        ("fc7", "forward", "allgather"): 1.0, ("fc7", "backward", "alltoall"): 1.0,
        ("fc8", "forward", "allreduce"): 1.0, ("losses", "forward", "allreduce"): 1.0,
    }  # fmt: skip
    client = mlflow.MlflowClient(result["mlflow_tracking_uri"])
    stored = {file.path for file in client.list_artifacts(result["mlflow_run_id"], "profile")}
    assert stored == {"profile/trace.json.gz", "profile/summary.json"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_config_of_an_earlier_run_gives_its_settings(finished, place, monkeypatch, capsys):
    config = place / "runs" / "first" / "config.yaml"
    args = ["imagenet", "--config", config, "--dry-run"]
    _, out, _ = started("train", args, place, monkeypatch, capsys)
    assert out.startswith(config.read_text())
    args = ["--config", config, "--epochs", "9", "--dry-run"]
    _, out, _ = started("train", args, place, monkeypatch, capsys)
    assert "epochs: 9" in out


def test_a_dry_run_starts_nothing(job, tmp_path, monkeypatch, capsys):
    done = job("train", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("lr: 0.01", "1437 train, 360 val", "1,279,082", "23 per epoch, 690 in total", "GB per worker"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "my settings.yaml").write_text("epochs: 3\n")
    args = ["--config", "my settings.yaml", "--dry-run"]
    status, out, err = started("train", args, tmp_path, monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert "69 in total" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["alexnett"], "recipe 'alexnett': unknown; the recipes are digits, imagenette, imagenet, "),
        (["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
        (["--lr", "0"], "lr = 0.0: input should be greater than 0"),
        (["--global-batch-size", "65"], "global_batch_size = 65: not divisible by 2 workers; 64 or 66 would be"),
        (["--data", "nowhere"], "no such folder"),
        (["--resume", "nothing"], "no run of that name"),
        (["--resume", "elsewhere/nothing/"], "--resume nothing: no run of that name in "),
        (["--resume", "runs/not a name"], "--resume 'not a name': use at most 150 letters"),
        (
            ["--workers", "1024", "--layout", "data", "--global-batch-size", "1024", "--device", "cpu"],
            "--workers 1024: this machine has ",
        ),
        (["--name", "a/b"], "use at most 150 letters, digits"),
        (["--config", "none.yaml"], "No such file"),
        (["--start-from", "none"], "MODEL 'none': is not there"),
        (["--resume", "first", "--start-from", "none"], "resumes with the settings it has; leave out --start-from"),
        (
            ["--freeze", "conv", "--dry-run"],
            "freeze = conv1,conv2,conv3,conv4,conv5: would keep random weights; give a trained net with --start",
        ),
        (["--freeze", "conv9"], "freeze = 'conv9': no layer 'conv9'; there are conv1, conv2"),
        (["--lr-factor", "conv1=0"], "lr_factor = 'conv1=0': conv1=0: a factor is above 0; to keep a layer as it is"),
        (["imagenette"], "no such folder"),
        (["--profile", "0"], "argument --profile: 0: must be a number of steps from 1 to 100"),
        (["--profile", "101"], "argument --profile: 101: must be a number of steps from 1 to 100"),
        (["--profile", "two"], "argument --profile: two: must be a number of steps from 1 to 100"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    assert words in refused("train", args, tmp_path, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["train", "tune"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("shards", "CWD/shards"), ("/a/shards", "/a/shards"), ("digits", "digits"), ("s3://b/x", "s3://b/x")],
)
def test_a_folder_of_data_is_kept_as_an_absolute_path(job, given, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = importlib.import_module(f"orchestrator.cli.{job}")
    _, config, _ = command.resolve(command.parser().parse_args(["--data", given]))
    assert getattr(config, "train", config).data == kept.replace("CWD", str(tmp_path))


def test_a_run_is_resumed_by_its_folder_from_anywhere(tmp_path, monkeypatch):
    from orchestrator.cli import train

    old = digits().changed(data="shards")  # as 0.2 wrote it
    RunFolder(tmp_path / "runs", "first").create(old)
    monkeypatch.chdir(tmp_path)
    for given in ("first", "runs/first", f"{tmp_path}/runs/first/"):
        folder, config, resume = train.resolve(train.parser().parse_args(["--resume", given]))
        assert (str(folder.path), resume) == (f"{tmp_path}/runs/first", True)
        assert config == old.changed(data=f"{tmp_path}/shards")
