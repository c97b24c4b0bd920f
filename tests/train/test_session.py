"""What a run refuses before anything is started, what it writes of its events, and what its log holds."""

import errno
import hashlib
import io
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

import alexnet
from orchestrator.base import logs
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine
from orchestrator.cli import train
from orchestrator.config.recipes import digits
from orchestrator.train import session as session_module
from orchestrator.train import view
from orchestrator.train.classes import ClassErrors
from orchestrator.train.messages import EpochEnded, Finished, Logged, Started, Stopped
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.session import Session, nothing_left
from orchestrator.train.view import TrainView, results


def begin(data, tmp_path, monkeypatch, **changes):
    monkeypatch.chdir(tmp_path)
    config = digits().changed(data=str(data), **changes)
    return Session(RunFolder(tmp_path / "runs", "refused"), config, resume=False, recipe="digits")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 9}, "has label 9, but there are 9 classes"),
        ({"input_size": 80}, "larger than the 72 pixels"),
        ({"global_batch_size": 2000}, "more than the 1437 training images"),
        ({"width": 0.3}, "width = 0.3"),
        ({"workers": 3, "global_batch_size": 63}, "workers = 3: layout columns needs a multiple of 2"),
        ({"global_batch_size": 65}, "global_batch_size = 65: not divisible by 2 workers; 64 or 66 would be"),
        ({"workers": "3..3", "layout": "hybrid", "global_batch_size": 63}, "fc6 has 1024 units, which 3 workers"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(digit_shards, tmp_path, monkeypatch, changes, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        begin(digit_shards[0], tmp_path, monkeypatch, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_cannot_keep_what_it_starts_from_leaves_no_folder(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(session_module, "Dataset", lambda config, output: SimpleNamespace(to_prepare=True))
    monkeypatch.setattr(session_module, "join", lambda output: None)

    def store(place):
        (place / "start" / "model.safetensors").write(b"a part of it")
        if fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = []

    def begin_from():
        run = RunFolder(tmp_path / "runs", "tuned")
        made.append(Session(run, digits(), resume=False, recipe="digits", start=SimpleNamespace(store=store)))

    if fails:
        with pytest.raises(OSError, match="No space left on device"):
            begin_from()
        assert not (tmp_path / "runs" / "tuned").exists()
        return
    begin_from()
    logs.close_run_log()
    made[0].lock.release()
    assert (tmp_path / "runs" / "tuned" / "start" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "tuned" / "config.yaml").exists()


@pytest.mark.ray
def test_a_tracking_server_that_is_not_there_is_refused(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached"):
        begin(digit_shards[0], tmp_path, monkeypatch)


@pytest.mark.ray
def test_fewer_epochs_than_a_run_has_are_refused(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, config = RunFolder(tmp_path, "run"), digits().changed(data=str(digit_shards[0]), epochs=1)
    run.create(config)
    run.write_result({"history": [entry(1, 0.5), entry(2, 0.4)]})
    for _ in range(2):  # the run can be resumed at once with others
        with pytest.raises(ValueError, match=r"^epochs = 1: the run has completed 2; set --epochs 2 or more$"):
            Session(run, config, resume=True, recipe=None)


@pytest.mark.parametrize("resume", [True, False])
def test_a_result_of_a_newer_version_is_refused_when_its_run_is_resumed(digit_shards, tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    config, run = digits().changed(data=str(digit_shards[0])), RunFolder(tmp_path / "runs", "later")
    if resume:
        run.create(config)
        run.write("result.json", '{"schema_version": 3, "status": "KILLED"}')
        with pytest.raises(ValueError, match=r"later/result\.json: was written by a newer version"):
            Session(run, config, resume=True, recipe=None)
        assert not (tmp_path / "runs" / "later" / "run.log").exists()
        return
    session = Session(run, config, resume=False, recipe=None)  # and a new run has none
    assert session.result == {}
    assert logs.run_log() == run.path / "run.log"
    session.lock.release()
    logs.close_run_log()


@pytest.mark.ray
def test_a_run_is_refused_other_classes_before_anything_is_touched(digit_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, run = digits().changed(data=str(digit_shards[0])), RunFolder(tmp_path / "runs", "first")
    run.create(config)
    run.write_result({"status": "KILLED", "classes": [*digit_shards[1].classes[1:], "0"], "digest": "d"})
    with pytest.raises(ValueError, match=r"its class 0 is '0', and the run's is '1'; resume with the classes"):
        Session(run, config, resume=True, recipe=None)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def model_data(folder, name="mean.npy", classes=("0",)):
    """Data of which a model is logged: the mean image of 72 pixels, in a file of that name below the folder."""
    mean = np.full((72, 72, 3), 7, np.float32)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        np.save(opened, mean)
    manifest = SimpleNamespace(
        mean_image_file=name, mean_image_sha256=hashlib.sha256(file.read_bytes()).hexdigest(), image_size=72,
        classes=classes, class_names=(), exif="apply", source="mine", digest="d", rows={"train": 400, "val": 100},
    )  # fmt: skip
    return SimpleNamespace(folder=StoragePath.of(folder), num_classes=lambda config: 10, manifest=manifest)


def test_the_model_in_mlflow_has_the_mean_image_of_its_checkpoint(session, tmp_path):
    """It may have started from another net, whose mean image it keeps."""
    net = alexnet.build("paper", 10, width=0.0625, input_size=64)
    build = {"preset": "paper", "num_classes": 10, "width": 0.0625, "input_size": 64}
    start = alexnet.Description(build, tuple("abcdefghij"), epoch=1)
    alexnet.TrainedNet(net, start, np.full((72, 72, 3), 99, np.float32)).save(tmp_path / "checkpoint")
    logged = []

    def log_model(folder, *rest, **more):
        found = alexnet.load(folder)
        logged.append((found.mean_image.max(), found.description.epoch))

    session.tracker.log_model = log_model
    session.result = {
        "history": [entry(1, 0.5)], "best": entry(1, 0.5), "best_checkpoint": str(tmp_path / "checkpoint"),
    }  # fmt: skip
    session.data = model_data(tmp_path / "data")
    session._log_outcome()
    assert logged == [(99, 1)]


def test_the_mean_image_s_name_decides_nothing_about_where_it_is_written(session, tmp_path):
    """It is under a plain name in a temporary folder, even if a manifest's check were to fail."""
    logged = []

    def log_model(folder, **step):
        logged.append(sorted(path.name for path in folder.iterdir()))
        assert np.load(folder / "mean_image.npy").max() == 7
        return "m-1"

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    session.tracker.log_model = log_model
    session.result = {"history": [entry(1, 0.5)], "best": entry(1, 0.5), "best_checkpoint": str(tmp_path)}
    for name in ("below/mean.npy", "../mine.npy"):
        (tmp_path / "data").mkdir(exist_ok=True)
        session.data = model_data(tmp_path / "data", name)
        session._log_outcome()
    assert logged == 2 * [["mean_image.npy", "model.safetensors", "model_card.md", "net.json"]]


@pytest.mark.parametrize(("newest", "logged"), [(None, 1), (1, 1), (2, 0)])
def test_a_model_is_logged_only_if_it_is_newer_than_what_mlflow_has(session, tmp_path, newest, logged):
    """A run that is resumed, and has no better epoch since, logs it once."""
    models = []
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    session.data = model_data(tmp_path)
    session.tracker.newest_step = lambda: newest
    session.tracker.log_model = lambda folder, step: models.append(step) or "m-1"
    session.result = {"history": [entry(2, 0.5)], "best": entry(2, 0.5), "best_checkpoint": str(tmp_path)}
    session._log_outcome()
    assert models == logged * [2]
    assert ("tag", ("model.epoch", "2")) in session.tracker.calls


def test_a_model_that_cannot_be_stored_does_not_fail_the_run(session, tmp_path):
    def full(folder, **step):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    session.data, session.tracker.log_model = model_data(tmp_path), full
    session.result = {"history": [entry(1, 0.5)], "best": entry(1, 0.5), "best_checkpoint": str(tmp_path)}
    session._log_outcome()
    shown = " ".join(session.shown.getvalue().split())
    assert (
        "warning: the model could not be stored ([Errno 28] No space left on device); its checkpoint is kept" in shown
    )
    assert "MLflow has no model of this run; store and register it later: python jobs/train.py" in shown
    assert "--resume run --register NAME" in shown


# events


def entry(epoch, error):
    return {
        "epoch": epoch, "step": 23 * epoch, "train/loss": 1.0, "train/lr": 0.01, "train/images_per_s": 100.0,
        "val/loss": 1.0, "val/top1_error": error, "val/top5_error": 0.0,
    }  # fmt: skip


class Tracked:
    """In place of the Tracker: what was logged, in order."""

    run = property(lambda self: self)

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.items()))


@pytest.fixture
def session(tmp_path):
    session = Session.__new__(Session)
    session.run, session.config, session.resume, session.under_way = RunFolder(tmp_path, "run"), digits(), False, False
    session.run.create(session.config)
    session.result, session.tracker, session.meter = {}, Tracked(), None
    session.started, session.elapsed_before_s = time.monotonic(), 0.0
    manifest = SimpleNamespace(classes=("cat", "dog"), class_rows={"train": (30, 2), "val": (8, 4)})
    session.class_errors = ClassErrors(manifest, {})
    known = SimpleNamespace(source="mine", digest="d", classes=("cat", "dog"), rows={"train": 32, "val": 12})
    session.data = SimpleNamespace(manifest=known)
    session.view = TrainView()
    session.shown = io.StringIO()
    session.view.line = LiveLine(session.shown)
    return session


def written(session):
    return json.loads((session.run.path / "result.json").read())


@pytest.mark.parametrize(
    ("errors", "kept", "best_while_it_runs", "best"),
    [
        ([0.5, 0.3, 0.3, 0.4], 3, 3, 3),  # of equal ones the last, as Ray Train keeps them
        ([0.3, 0.3, 0.3], 3, 3, 3),
        ([0.1, 0.4, 0.3], 3, 1, 3),  # the first was another run's: its checkpoint is not here
    ],
)
def test_the_best_epoch_of_a_result_is_that_of_its_best_checkpoint(session, errors, kept, best_while_it_runs, best):
    history = [entry(epoch, error) for epoch, error in enumerate(errors, start=1)]
    session.on_event(EpochEnded(epochs=len(errors), metrics=history[-1], history=history))
    assert written(session)["best"] == history[best_while_it_runs - 1]
    paths = {f"checkpoint-epoch-{epoch:04d}": epoch for epoch in (kept, len(errors))}
    last, *_ = (str(session.run.path / name) for name, epoch in paths.items() if epoch == len(errors))
    chosen, *_ = (str(session.run.path / name) for name, epoch in paths.items() if epoch == kept)
    session.on_event(Finished(checkpoint=last, best_checkpoint=chosen))
    assert session.result["best"] == history[best - 1]
    assert (session.result["checkpoint"], session.result["best_checkpoint"]) == (last, chosen)


def test_the_model_in_mlflow_is_of_the_epoch_that_it_is_said_to_be(session, tmp_path, monkeypatch):
    history = [entry(epoch, error) for epoch, error in enumerate([0.5, 0.3, 0.3, 0.4], start=1)]
    session.on_event(EpochEnded(epochs=4, metrics=history[-1], history=history))
    for epoch in (3, 4):
        (session.run.path / f"checkpoint-epoch-{epoch:04d}" / "model.safetensors").write(str(epoch).encode())
    session.on_event(
        Finished(
            checkpoint=f"{session.run.path}/checkpoint-epoch-0004",
            best_checkpoint=f"{session.run.path}/checkpoint-epoch-0003",
        )
    )
    session.data, models = model_data(tmp_path), []

    def log_model(folder, **step):
        models.append(((folder / "model.safetensors").read_text(), json.loads((folder / "net.json").read_text())))
        return "m-1"

    session.tracker.log_model = log_model
    session._log_outcome()
    [(weights, described)] = models
    assert (weights, described["epoch"]) == ("3", 3)
    assert ("tag", ("model.epoch", "3")) in session.tracker.calls
    assert session.result["best"]["epoch"] == 3


def test_the_result_has_the_errors_of_each_class_in_the_last_and_the_best_epoch(session):
    history = [entry(epoch, error) for epoch, error in enumerate([0.5, 0.3, 0.3, 0.4], start=1)]
    for epoch, wrong in enumerate([(8, 4), (1, 1), (2, 2), (4, 4)], start=1):
        event = EpochEnded(epochs=4, metrics=history[epoch - 1], history=history[:epoch], wrong=wrong)
        session.on_event(event)
    assert written(session)["per_class"] == [
        {"class": "cat", "train": 30, "val": 8, "top1_error": 0.5, "best_top1_error": 0.25},
        {"class": "dog", "train": 2, "val": 4, "top1_error": 1.0, "best_top1_error": 0.5},
    ]
    assert "per_class" not in session.tracker.calls[-1][1]
    assert all("per_class" not in each for each in written(session)["history"])
    last, best = (f"{session.run.path}/checkpoint-epoch-000{epoch}" for epoch in (4, 2))
    session.on_event(Finished(checkpoint=last, best_checkpoint=best))
    assert [row["best_top1_error"] for row in session.result["per_class"]] == [1 / 8, 1 / 4]


def test_of_five_classes_no_top_5_error_is_shown(session, monkeypatch, capsys):
    metrics = entry(1, 0.3)
    session.on_event(EpochEnded(epochs=2, metrics=metrics, history=[metrics]))
    del metrics["val/top5_error"]
    session.on_event(EpochEnded(epochs=2, metrics=metrics, history=[metrics]))
    many, few = session.shown.getvalue().splitlines()
    assert few == many.replace("top-5 error 0.00 %  ", "")
    assert "top-5" not in few
    session.result |= {"elapsed_s": 1.0, "session_s": 1.0, "checkpoint": "none", "mlflow_run_id": "none"}
    results = "\n".join(view.results(session.result, session.run, "sqlite:///mlflow.db"))
    assert "top-1 error" in results
    assert "top-5" not in results
    assert "  time         0:01\n" in results


def test_events_are_tracked_shown_and_written(session):
    started = Started(
        precision="fp32", device="cpu", nodes=["a"], epoch=1, step=5, history=[entry(1, 0.5)], workers=2
    )  # fmt: skip
    session.on_event(started)
    session.on_event(Started(**{**vars(started), "lost": True}))
    session.on_event(Stopped(epoch=1, step=7))
    assert session.shown.getvalue().splitlines() == [
        "training on cpu in fp32, 2 workers, resumed after epoch 1 and 5 steps",
        "a worker was lost; resuming from the last checkpoint, after epoch 1 and 5 steps",
        "a checkpoint was saved after 1 epoch and 7 steps",
    ]
    assert written(session)["history"] == [entry(1, 0.5)]
    assert session.tracker.calls == []


def test_a_line_of_a_worker_s_log_goes_to_the_run_s_log_and_nowhere_else(session, monkeypatch):
    recorded = []
    monkeypatch.setattr(logs, "record", lambda *args: recorded.append(args))
    session.on_event(Logged(rank=1, level=20, name="orchestrator.train.worker", text="a line", at=5.0))
    assert recorded == [(1, 20, "orchestrator.train.worker", "a line", 5.0)]
    assert session.shown.getvalue() == ""
    assert not (session.run.path / "result.json").size()


def test_the_time_of_a_run_is_that_of_all_its_sessions(session, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("orchestrator.train.session.time", SimpleNamespace(monotonic=lambda: clock.now))
    session.started, session.elapsed_before_s = 90.0, 500.0
    session.on_event(Started(precision="fp32", device="cpu", nodes=["a"], epoch=1, step=0, history=[entry(1, 0.5)]))
    clock.now = 120.0
    session.on_event(EpochEnded(epochs=2, metrics=entry(2, 0.5), history=[entry(1, 0.5), entry(2, 0.5)]))
    assert {name: written(session)[name] for name in ("elapsed_s", "session_s", "startup_s")} == {
        "elapsed_s": 530.0, "session_s": 30.0, "startup_s": 10.0,
    }  # fmt: skip
    clock.now = 150.0
    session._end("KILLED", "stopped by SIGINT")
    result = written(session)
    assert (result["elapsed_s"], result["session_s"]) == (560.0, 60.0)
    shown = view.results(result | {"mlflow_run_id": "none"}, session.run, "sqlite:///mlflow.db")
    assert "  time         9:20, of which 1:00 since it was resumed" in shown


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, history = RunFolder(tmp_path / "runs", "done"), [entry(1, 0.5), entry(2, 0.25)]
    run.create(digits().changed(data=str(tmp_path / "gone"), epochs=2))
    result = {
        "status": "FINISHED", "history": history, "metrics": history[1], "best": history[1], "images_per_s": 100.0,
        "elapsed_s": 65.0, "mlflow_run_id": "abc", "mlflow_tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip
    run.write_result(result)
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "done").iterdir()}
    flags = train.parser()
    assert train.main(flags, flags.parse_args(["--resume", "done"])) == 0
    first, empty, title, *rows = capsys.readouterr().out.splitlines()
    assert first == (
        "run done has trained all of its 2 epochs, so nothing is left to do; "
        "to train more: python jobs/train.py --resume done --epochs N, with N above 2"
    )
    assert (empty, title, rows[0]) == ("", "results after 2 epochs", "  top-1 error  25.00 % (best 25.00 %, epoch 2)")
    assert {path: path.read_bytes() for path in (tmp_path / "runs" / "done").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert nothing_left(run, run.config().changed(epochs=3)) == []
    for status in ("KILLED", "RUNNING", "FAILED"):  # its last checkpoint, or its model, may be missing
        run.write_result(result | {"status": status})
        assert nothing_left(run, run.config()) == []


def test_the_terminal_says_once_that_a_run_overfits_after_the_line_of_that_epoch(session):
    session.config = session.config.changed(lr_drops=0)
    session.data.manifest.rows = {"train": 40_000, "val": 2_000}
    history = []
    for epoch, error in enumerate([0.5, 0.4, *[0.42] * 8], start=1):
        history.append(entry(epoch, error) | {"train/top1_error": 0.5 - 0.05 * epoch})
        session.on_event(EpochEnded(epochs=10, metrics=history[-1], history=list(history)))
    lines = session.shown.getvalue().splitlines()
    [place] = [number for number, line in enumerate(lines) if "overfitting" in line]
    assert lines[place - 1].startswith("epoch 7/10")
    assert lines[place].startswith(
        "warning: validation error has not improved since epoch 2 (40.00 % then, 42.00 % now)"
    )


def test_results_say_the_error_on_training_images_of_runs_that_measured_it(tmp_path):
    run = RunFolder(tmp_path, "run")
    result = {
        "metrics": entry(4, 0.4), "best": entry(3, 0.3), "images_per_s": 100.0, "elapsed_s": 61.0, "checkpoint": "c",
        "mlflow_run_id": "r",
    }  # fmt: skip
    assert results(result, run, "sqlite:///m.db")[:2] == [
        "results after 4 epochs", "  top-1 error  40.00 % (best 30.00 %, epoch 3)",
    ]  # fmt: skip
    result["metrics"] |= {"train/top1_error": 0.25}
    assert results(result, run, "sqlite:///m.db")[1] == (
        "  top-1 error  40.00 % (best 30.00 %, epoch 3), on training images 25.00 %"
    )
