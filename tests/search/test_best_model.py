"""The model of a search's best trial in MLflow: logged to its run, which stays as it ended."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import save_file

from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.search import forecast
from orchestrator.search.config import make_search
from orchestrator.search.entries import EpochEnded, RunBegun, TrialEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.search.mlflow_runs import SearchRuns
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store
from orchestrator.train.model import build_net

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other


def config_of(metric="val/top1_error"):
    train = digits().changed(workers=1, layout="single", width=0.0625, epochs=3)
    return make_search({"metric": metric}, train, {"lr": {"loguniform": [0.001, 0.1]}})


@pytest.fixture
def ended(tmp_path):
    """A search whose only trial was stopped early, after its second epoch was the best; its folder of trials; the run
    of the trial; what was warned of."""
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    config, journal, said = config_of(), Journal(tmp_path / "journal.jsonl"), []
    run = Run(store)
    run.begin("search-0000", "jobs/tune.py", {})
    journal.write(TrialProposed(0, {"lr": 0.02}))
    journal.write(RunBegun(0, run.run_id))
    for epoch, error in enumerate([0.5, 0.2, 0.3], start=1):
        journal.write(EpochEnded(0, {"epoch": epoch, "val/top1_error": error, "val/loss": error}))
    journal.write(TrialEnded(0, "STOPPED"))
    run.finish("KILLED", hurry=False)
    runs = SearchRuns(store, config, journal, "search", resume=False, warn=said.append)
    np.save(tmp_path / "mean.npy", np.zeros((72, 72, 3), np.float32))
    digest = hashlib.sha256((tmp_path / "mean.npy").read_bytes()).hexdigest()
    manifest = SimpleNamespace(
        mean_image_file="mean.npy", mean_image_sha256=digest, classes=["0"], class_names=[], exif="", image_size=72,
        source="mine", digest="d", rows={"train": 400, "val": 100},
    )  # fmt: skip
    data = SimpleNamespace(manifest=manifest, folder=StoragePath.of(tmp_path), num_classes=lambda config: 10)
    yield SimpleNamespace(
        runs=runs, trials=StoragePath.of(tmp_path / "trials"), run=run, said=said, data=data, record=journal.trials[0]
    )
    journal.close()


def store_checkpoint(ended, epoch):
    folder = ended.trials.local / "0000" / f"checkpoint-epoch-{epoch:04d}"
    folder.mkdir(parents=True)
    weights = build_net(config_of().train, 10).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def test_the_best_trial_s_run_gets_its_model_and_stays_as_it_ended(ended):
    import mlflow

    before = ended.run.client.get_run(ended.run.run_id).info
    for epoch in (2, 3):
        store_checkpoint(ended, epoch)
    told = []
    ended.runs.log_best_model(ended.record, ended.data, ended.trials, "tuned", "tune --register tuned", told.append)
    assert (ended.said, told) == ([], ["registered as models:/tuned/1"])
    assert "| top-1 | 20.00 % |" in (ended.trials.local / "0000" / "model_card.md").read_text()
    assert ended.run.client.get_model_version("tuned", "1").tags["top1_error"] == "0.200000"
    after = ended.run.client.get_run(ended.run.run_id)
    assert after.data.tags["model.epoch"] == "2"
    assert (after.info.status, after.info.end_time) == ("KILLED", before.end_time)
    model = mlflow.pyfunc.load_model(f"runs:/{ended.run.run_id}/model")
    images = np.zeros((2, 72, 72, 3), np.uint8)
    assert model.predict(images, params={"probabilities": True}).shape == (2, 10)
    ended.runs.log_best_model(ended.record, ended.data, ended.trials, "tuned", "", told.append)  # resumed: it is there
    assert (ended.said, told[1:]) == ([], ["registered as models:/tuned/1, which it was before"])


def test_a_best_trial_whose_checkpoints_are_gone_is_one_warning(ended):
    ended.runs.log_best_model(ended.record, ended.data, ended.trials, "tuned", "tune --register tuned")
    assert ended.said == [
        "the checkpoint of the best trial, 0, is gone: no model is logged to MLflow",
        "no model was registered as tuned; register it later: tune --register tuned",
    ]
    assert "model.epoch" not in ended.run.client.get_run(ended.run.run_id).data.tags


@pytest.mark.parametrize("num_classes", [5, 6])
def test_a_search_for_the_top_5_error_of_five_classes_is_refused(num_classes):
    data = SimpleNamespace(check=lambda config: None, num_classes=lambda config: num_classes)
    forecast.check_all(config_of("val/top1_error"), data)
    if num_classes == 6:
        forecast.check_all(config_of("val/top5_error"), data)
        return
    with pytest.raises(ValueError, match=r"^metric = val/top5_error: always 0 of 5 classes.*choose val/top1_error"):
        forecast.check_all(config_of("val/top5_error"), data)
