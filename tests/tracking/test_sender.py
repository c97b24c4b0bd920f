"""Metrics that a server takes late, refuses, or takes for a run that is gone."""

import threading
import time

import mlflow
import pytest
import requests
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
)

from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.tracking import sender, training_run
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store, is_refusal, is_transient


@pytest.fixture
def run(tmp_path):
    said = []
    run = Run(Store(f"sqlite:///{tmp_path}/mlflow.db"), said.append)
    run.begin("one", "jobs/train.py", {})
    run.said = said
    return run


def logged(run, metric):
    return [(point.step, point.value) for point in run.client.get_metric_history(run.run_id, metric)]


def error(code):
    return mlflow.exceptions.MlflowException("no", error_code=code)


def answered(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    ("found", "transient", "refusal"),
    [
        (error(RESOURCE_DOES_NOT_EXIST), False, True),
        (error(INVALID_PARAMETER_VALUE), False, True),
        (error(PERMISSION_DENIED), False, False),  # a password may be put right
        (error(INTERNAL_ERROR), True, False),
        (answered(404), False, True),
        (answered(502), True, False),
        (requests.ConnectionError(), True, False),
        (OSError("disk"), False, False),
    ],
)
def test_what_a_server_may_answer_otherwise_later(found, transient, refusal):
    assert (is_transient(found), is_refusal(found)) == (transient, refusal)


def test_a_run_that_was_deleted_is_said_once_and_holds_up_neither_training_nor_the_end(run):
    run.log({"train/loss": 3.0}, step=1)
    run.sender.close(10)
    run.client.delete_run(run.run_id)
    run.sender = sender.Sender(run.store, lambda: run.run_id, run.warn)
    begin = time.monotonic()
    for step in (2, 3):
        run.log({"train/loss": 2.0, "val/loss": 2.0}, step=step)
    run.complete([{"step": 4, "train/loss": 1.0}], "train/loss")
    run.finish("FINISHED")
    assert time.monotonic() - begin < 10
    refused = [line for line in run.said if "refused" in line]
    assert len(refused) == 1
    assert "the run's folder has them" in refused[0]
    assert "deleted" in refused[0]
    assert [line for line in run.said if "could not be marked FINISHED" in line] == run.said[1:]


def test_nothing_is_retried_for_a_run_that_was_deleted(run):
    """Whatever the server calls it: log_model reports a deleted run as an internal error."""
    run.patience_s = 60.0
    calls = []

    def call():
        calls.append(1)
        raise error(INTERNAL_ERROR)

    run.client.delete_run(run.run_id)
    with pytest.raises(mlflow.exceptions.MlflowException):
        run.patiently(call)
    assert (len(calls), run.said) == (1, [])


def test_a_server_that_hangs_at_the_end_holds_nobody_up(run, monkeypatch):
    monkeypatch.setattr("orchestrator.tracking.run.HURRIED_TIMEOUT_S", 0.2)
    monkeypatch.setattr("orchestrator.tracking.run.LAST_CALL_S", 0.2)
    hangs = threading.Event()
    for call in ("log_batch", "set_tag", "set_terminated"):
        monkeypatch.setattr(run.client, call, lambda *args, **kwargs: hangs.wait(30))
    begin = time.monotonic()
    run.log({"train/loss": 3.0}, step=1)
    run.finish("FAILED", "why")
    assert time.monotonic() - begin < 5
    assert run.said == [
        "1 set of metrics did not reach MLflow; the run's folder has them",
        f"MLflow run {run.run_id} could not be marked FAILED: no answer",
    ]
    hangs.set()


def test_once_a_server_is_given_up_nothing_more_is_tried(run, monkeypatch):
    tried = []

    def away(*args, **kwargs):
        tried.append(1)
        raise requests.ConnectionError("away")

    for call in ("log_text", "set_tag", "log_figure"):
        monkeypatch.setattr(run.client, call, away)
    run.log_text("a", "a.txt")
    run.log_picture(None, "b.png")
    run.tag(best="true")
    assert len(tried) == 1
    assert run.said == [
        "a.txt did not reach MLflow: away",
        "b.png did not reach MLflow, which does not answer",
        "the tag best did not reach MLflow, which does not answer",
    ]


def test_what_was_to_be_completed_counts_among_what_did_not_arrive(run, monkeypatch):
    def away(*args, **kwargs):
        raise requests.ConnectionError("away")

    monkeypatch.setattr(run.client, "get_metric_history", away)
    run.complete([{"step": 1, "val/loss": 1.0}, {"step": 2, "val/loss": 0.5}], "val/loss")
    run.sender.close(0.1)
    assert run.said[-1].startswith("2 sets of metrics did not reach MLflow")


def test_a_run_that_was_made_and_not_told_its_settings_is_found_and_told_them(run):
    made = run.client.create_run(run.store.experiment_id, tags={"mlflow.runName": "two", "mlflow.source.name": "x.py"})
    again = Run(run.store)
    assert not again.begin("two", "x.py", {"lr": 0.1}, look_for=True)
    assert again.run_id == made.info.run_id
    assert run.client.get_run(made.info.run_id).data.params == {"lr": "0.1"}


@pytest.mark.ray
def test_a_server_that_is_slow_once_at_the_start_is_waited_for_at_the_end(tmp_path, monkeypatch, digit_shards):
    monkeypatch.setattr("orchestrator.tracking.run.RETRY_S", 0.01)
    monkeypatch.setattr(training_run, "FINISH_TIMEOUT_S", 0.1)
    folder, manifest = digit_shards
    tracker = training_run.Tracker(f"sqlite:///{tmp_path}/mlflow.db")

    def away(*args, **kwargs):
        raise requests.ConnectionError("away")

    monkeypatch.setattr(tracker.run.client, "log_inputs", away)
    tracker.start("one", digits(), manifest, StoragePath.of(folder))
    tracker.finish("FINISHED")
    assert (tracker.run.patience_s, tracker.run.is_given_up) == (0.1, False)


def test_one_value_that_is_refused_costs_no_other(run):
    for step, name in enumerate(("train/loss", "no|such;name", "val/loss")):
        run.log({"lr": 0.1, name: 1.0}, step=step)
    run.finish("FINISHED")
    assert (logged(run, "lr"), logged(run, "train/loss")) == ([(0, 0.1), (1, 0.1), (2, 0.1)], [(0, 1.0)])
    assert logged(run, "val/loss") == [(2, 1.0)]
    assert len(run.said) == 1
    assert "no|such;name" in run.said[0]
    assert run.client.get_run(run.run_id).info.status == "FINISHED"


def test_a_refused_password_is_tried_again(run, monkeypatch):
    monkeypatch.setattr(sender, "RETRY_S", 0.01)
    working, left = run.client.log_batch, [error(PERMISSION_DENIED)] * 3

    def log_batch(*args, **kwargs):
        if left:
            raise left.pop()
        working(*args, **kwargs)

    monkeypatch.setattr(run.client, "log_batch", log_batch)
    run.log({"train/loss": 3.0}, step=1)
    run.finish("FINISHED")
    assert logged(run, "train/loss") == [(1, 3.0)]
    assert len(run.said) == 1


@pytest.mark.ray
@pytest.mark.parametrize(
    ("call", "run_id", "failures", "warnings"),
    [
        ("log_inputs", None, [error(INTERNAL_ERROR), requests.ConnectionError()], 1),
        ("log_inputs", None, [error(INVALID_PARAMETER_VALUE)], 1),
        ("set_tag", "earlier", [error(INTERNAL_ERROR)], 1),
        ("set_tag", "earlier", [error(INVALID_PARAMETER_VALUE)], 1),
    ],
)
def test_a_server_that_restarts_after_a_run_has_begun_does_not_fail_it(
    tmp_path, monkeypatch, digit_shards, call, run_id, failures, warnings
):
    monkeypatch.setattr("orchestrator.tracking.run.RETRY_S", 0.01)
    folder, manifest = digit_shards
    uri, said = f"sqlite:///{tmp_path}/mlflow.db", []
    if run_id:
        first = training_run.Tracker(uri)
        first.start("one", digits(), manifest, StoragePath.of(folder))
        first.finish("KILLED")
        run_id = first.run.run_id
    tracker = training_run.Tracker(uri)
    working, left = getattr(tracker.run.client, call), list(failures)

    def failing(*args, **kwargs):
        if left:
            raise left.pop(0)
        return working(*args, **kwargs)

    monkeypatch.setattr(tracker.run.client, call, failing)
    tracker.start("one", digits(), manifest, StoragePath.of(folder), run_id=run_id, warn=said.append)
    tracker.finish("FINISHED")
    assert (left, len(said)) == ([], warnings)
    found = tracker.run.client.get_run(tracker.run.run_id)
    assert found.info.status == "FINISHED"
    if is_transient(failures[0]):
        assert found.inputs.dataset_inputs[0].dataset.digest == manifest.digest
        assert not run_id or found.data.tags["resumed.epochs"] == "30"
