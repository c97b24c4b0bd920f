"""What a trial returns to Ray Tune."""

import queue
import threading
from types import SimpleNamespace

import pytest

from orchestrator.base.exits import JobError
from orchestrator.search import trial as module
from orchestrator.search.trial import Trial, _Broken, _Epoch, _Run
from orchestrator.train import ray_train, training
from orchestrator.train.messages import Failed

EPOCH = _Epoch({"epoch": 3, "val/loss": 0.5}, live=True)


def trial_after_its_last_epoch(monkeypatch, follow, *after):
    """A trial of three epochs whose thread has reported the last one, and then `after`."""
    monkeypatch.setattr(module.ray, "get", lambda ref: False)
    run = _Run.__new__(_Run)
    run.number, run.train, run.events = 7, SimpleNamespace(epochs=3), queue.Queue()
    run.events.put(EPOCH)
    run.thread = threading.Thread(target=lambda: (follow(), [run.events.put(event) for event in after]), daemon=True)
    run.thread.start()
    trial = Trial.__new__(Trial)
    mailbox = SimpleNamespace(is_stopping=SimpleNamespace(remote=lambda topic: None))
    trial._run, trial.payload = run, SimpleNamespace(mailbox=mailbox, keep_every=None)
    return trial


def test_a_trial_is_done_once_its_last_checkpoint_is_stored(monkeypatch):
    trial = trial_after_its_last_epoch(monkeypatch, lambda: None)
    assert trial.step() == EPOCH.metrics | {"done": True}


def test_a_trial_whose_last_checkpoint_could_not_be_stored_is_not_done(monkeypatch):
    error = JobError("s3://bucket: access denied")
    trial = trial_after_its_last_epoch(monkeypatch, lambda: None, _Broken(error))
    with pytest.raises(JobError, match="access denied"):
        trial.step()


def test_a_trial_that_fails_for_good_after_its_last_epoch_is_failed(monkeypatch):
    trial = trial_after_its_last_epoch(monkeypatch, lambda: None, Failed(text="no space"))
    assert trial.step() == {"failed": "no space", "done": True}


def test_a_trial_that_is_still_storing_when_its_time_is_up_is_not_done(monkeypatch):
    monkeypatch.setattr(module, "END_TIMEOUT_S", 0.1)
    stored = threading.Event()
    trial = trial_after_its_last_epoch(monkeypatch, stored.wait)
    with pytest.raises(RuntimeError, match="trial 7: storing the last checkpoint took more than"):
        trial.step()
    stored.set()


def test_a_trial_waits_longer_for_its_workers_than_training_does():
    """For a last checkpoint, and then to kill them."""
    assert training.STOP_TIMEOUT_S + ray_train.KILL_TIMEOUT_S < module.END_TIMEOUT_S
