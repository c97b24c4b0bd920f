"""Weights that are kept for good, every so many epochs."""

import os

import pytest

from orchestrator.base.storage import StoragePath
from orchestrator.train import keep
from orchestrator.train.keep import is_kept, keep_weights
from orchestrator.train.run_folder import RunFolder

FILES = {"model.safetensors": b"weights", "net.json": b"{}", "mean_image.npy": b"mean"}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-x"
    folder.mkdir()
    for name, data in (FILES | {"velocity.safetensors": b"v", "state.json": b"s"}).items():
        (folder / name).write_bytes(data)
    return folder


def read(place):
    return {name: (place / name).read() for name in place.files()}


def test_the_epochs_that_are_kept_are_the_multiples():
    assert [epoch for epoch in range(1, 31) if is_kept(epoch, 10)] == [10, 20, 30]
    assert [epoch for epoch in range(1, 4) if is_kept(epoch, 1)] == [1, 2, 3]
    assert not any(is_kept(epoch, 0) for epoch in range(100))


def test_all_is_kept_that_another_program_needs_and_nothing_that_only_resuming_does(checkpoint, tmp_path):
    run = RunFolder(tmp_path / "runs", "first")
    keep_weights(checkpoint, run.path, 10)
    assert read(run.path / "kept-epoch-0010") == FILES
    assert sorted(os.listdir(tmp_path / "runs" / "first")) == ["kept-epoch-0010"]
    assert run.latest_checkpoint() is None, "it is none to resume from"
    (checkpoint / "model.safetensors").write_bytes(b"again")
    keep_weights(checkpoint, run.path, 10)  # after a crash
    assert read(run.path / "kept-epoch-0010") == FILES | {"model.safetensors": b"again"}


def test_where_the_weights_are_the_rest_is(checkpoint, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(keep.StoragePath, "write", lambda self, data: written.append(self.name))
    keep_weights(checkpoint, StoragePath.of(tmp_path / "run"), 5)
    assert written[-1] == "model.safetensors"
    assert sorted(written) == sorted(FILES)


def test_weights_are_kept_in_object_storage(checkpoint, s3):
    bucket, _, _ = s3
    keep_weights(checkpoint, bucket / "run", 3)
    assert read(bucket / "run" / "kept-epoch-0003") == FILES
