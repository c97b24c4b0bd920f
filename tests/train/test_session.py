"""What a run refuses before anything is started."""

import pytest

from orchestrator.config.recipes import digits
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.session import Session


def begin(data, tmp_path, monkeypatch, **changes):
    monkeypatch.chdir(tmp_path)
    config = digits().changed(data=str(data), **changes)
    return Session(RunFolder(tmp_path / "runs", "refused"), config, resume=False, recipe="digits")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 9}, "has label 9, but there are 9 classes"),
        ({"input_size": 80}, "above the 72 pixels"),
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


@pytest.mark.ray
def test_a_tracking_server_that_is_not_there_is_refused(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached"):
        begin(digit_shards[0], tmp_path, monkeypatch)
