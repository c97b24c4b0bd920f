"""Models under a name in MLflow: their versions, and the champion."""

from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import requests

from orchestrator.base.exits import JobError
from orchestrator.config.recipes import digits
from orchestrator.models.promote import decide, promote
from orchestrator.tracking import registry
from orchestrator.tracking.run import Run
from orchestrator.tracking.store import Store
from orchestrator.train.model import describe
from orchestrator.train.model_log import register_model, version_facts

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its own dependencies warn about each other


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}")


@pytest.fixture
def run(store):
    """A run with two models, of epochs 3 and 12, the second of which was logged last."""
    said = []
    run = Run(store, said.append)
    run.said = said
    run.begin("one", "jobs/train.py", {})
    for epoch in (3, 12):
        run.model_id = log(run, epoch)
    return run


def log(run, epoch, status="READY"):
    client = run.store.client
    model = client.create_logged_model(run.store.experiment_id, name="model", source_run_id=run.run_id)
    client.finalize_logged_model(model.model_id, status)
    client.log_outputs(run.run_id, [mlflow.entities.LoggedModelOutput(model.model_id, step=epoch)])
    return model.model_id


def test_a_model_is_a_version_once(run, store):
    first = registry.register(run, "mine", {"epoch": "12", "data.digest": "d"}, "What it is.")
    assert (first.address, first.is_new) == ("models:/mine/1", True)
    found = store.client.get_model_version("mine", "1")
    assert (found.run_id, found.source) == (run.run_id, f"models:/{run.model_id}")
    assert found.tags == {"epoch": "12", "data.digest": "d"}
    assert found.description == "What it is."
    again = registry.register(run, "mine", {})
    assert (again.address, again.is_new) == ("models:/mine/1", False)
    log(run, 20)
    assert registry.register(run, "mine", {}).address == "models:/mine/2"


def test_a_model_whose_files_did_not_arrive_is_none(run, store):
    log(run, 40, "FAILED")
    assert registry.newest_step(store, run.run_id) == 12
    assert registry.register(run, "whole", {}).is_new
    assert store.client.get_model_version("whole", "1").source == f"models:/{run.model_id}"
    empty = Run(store, run.said.append)
    empty.begin("empty", "jobs/train.py", {})
    log(empty, 1, "FAILED")
    assert registry.newest_step(store, empty.run_id) is None
    with pytest.raises(ValueError, match="has no model in MLflow"):
        registry._newest_model(store, empty.run_id)


def test_a_run_that_is_gone_has_no_parameters_and_a_server_that_fails_is_named_in_one_line(run, store, monkeypatch):
    assert registry.params_of(store, run.run_id) is not None
    assert registry.params_of(store, "0" * 32) is None

    def fail(run_id):
        raise mlflow.exceptions.MlflowException("no\ndatabase")  # INTERNAL_ERROR

    monkeypatch.setattr(store.client, "get_run", fail)
    with pytest.raises(ValueError, match=rf"^the run {run.run_id}: cannot be asked for in MLflow at sqlite:") as error:
        registry.params_of(store, run.run_id)
    assert "\n" not in str(error.value)


def test_the_champion_is_an_alias_that_moves_and_says_why(run, store):
    assert registry.champion(store, "nobody") is None
    first = registry.register(run, "moving", {})
    assert registry.champion(store, "moving") is None
    registry.make_champion(run, first, "the first")
    assert registry.champion(store, "moving") == "1"
    log(run, 30)
    second = registry.register(run, "moving", {})
    assert registry.champion(store, "moving") == "1"
    registry.make_champion(run, second, "better by more than chance")
    assert registry.champion(store, "moving") == "2"
    assert store.client.get_model_version("moving", "2").tags["champion.reason"] == "better by more than chance"


def test_the_champion_is_replaced_only_by_a_better_model(run, store):
    """The first model is champion; then come a worse, an equal and a better one."""
    old = np.arange(200) < 40
    first = registry.register(run, "best", {})
    assert promote(run, first, None, None) == "models:/best/1 is now the champion of best: the first champion"
    assert promote(run, first, None, None) == "models:/best/1 is the champion of best already"
    for number, (num_wrong, verdict) in enumerate(((80, "worse"), (40, "not told apart"), (5, "better")), start=2):
        log(run, 100 + number)
        decision = decide(old, np.arange(200) < num_wrong)
        said = promote(run, registry.register(run, "best", {}), decision, "1")
        assert verdict in said
        if verdict == "better":
            assert said == f"models:/best/4 is now the champion of best: {decision.text}"
        else:
            assert said == f"models:/best/1 stays the champion of best: {decision.text}"
        assert registry.champion(store, "best") == ("4" if verdict == "better" else "1")
    assert store.client.get_model_version("best", "4").tags["champion.reason"] == decision.text


def test_a_champion_that_another_process_made_meanwhile_stays(run, store):
    """The new model was compared with version 1, or with none."""
    first = registry.register(run, "raced", {})
    promote(run, first, None, None)
    log(run, 200)
    second = registry.register(run, "raced", {})
    registry.make_champion(run, second, "another process was faster")
    log(run, 201)
    third = registry.register(run, "raced", {})
    better = decide(np.arange(200) < 40, np.arange(200) < 5)
    for against, was in (("1", "models:/raced/1 was"), (None, "none was")):
        with pytest.raises(JobError) as error:
            promote(run, third, better, against)
        assert str(error.value) == (
            f"models:/raced/3: is registered, and not the champion of raced: models:/raced/2 is now, where {was} when "
            "they were compared; run it again to compare it with that"
        )
    assert registry.champion(store, "raced") == "2"


def data():
    manifest = SimpleNamespace(
        source="mine *now*", digest="d1", classes=("a", "b"), rows={"train": 400, "val": 200}, class_names=(), exif=""
    )
    return SimpleNamespace(manifest=manifest)


def test_a_version_that_is_evaluated_tells_what_one_that_is_trained_does():
    trained, manifest = describe(digits(), data().manifest, 2, 12), data().manifest
    by_training = version_facts(trained, manifest, ENTRY)
    assert by_training[0] == {"data.digest": "d1", "top1_error": "0.050000", "epoch": "12"}
    assert by_training[1].startswith("AlexNet (paper, width 0.25, 64 pixels). mine ")
    other = SimpleNamespace(**manifest.__dict__ | {"digest": "d2", "rows": {"train": 400, "val": 100}})
    tags, about = version_facts(trained, other, ENTRY, "train")
    assert tags == by_training[0] | {"evaluated.digest": "d2"}
    assert about.endswith("top-1 error 5.00 % (3.26 to 7.60 %) after epoch 12, of 400 training images.")


ENTRY = {"epoch": 12, "val/top1_error": 0.05, "val/loss": 0.2}


def test_a_version_tells_its_data_error_and_epoch(run, store):
    said = []
    found = register_model(run, "told", digits(), data(), ENTRY, "train --resume one", said.append)
    assert said == ["registered as models:/told/1"]
    version = store.client.get_model_version("told", found.version)
    assert version.tags == {"data.digest": "d1", "top1_error": "0.050000", "epoch": "12"}
    assert r"mine \*now\*, digest `d1`: 2 classes, 400 training and 200 validation images" in version.description
    assert "top-1 error 5.00 % (2.74 to 8.96 %) after epoch 12" in version.description


def test_a_server_that_was_away_for_a_moment_is_asked_again(run, monkeypatch):
    monkeypatch.setattr("orchestrator.tracking.run.RETRY_S", 0.01)
    run.patience_s, working, left = 60.0, run.client.create_model_version, [requests.ConnectionError()]

    def create_model_version(*args, **kwargs):
        if left:
            raise left.pop()
        return working(*args, **kwargs)

    monkeypatch.setattr(run.client, "create_model_version", create_model_version)
    said = []
    assert register_model(run, "later", digits(), data(), ENTRY, "", said.append).version == "1"
    assert (left, said) == ([], ["registered as models:/later/1"])


def test_a_failure_is_a_warning_that_names_the_command(store):
    said, warned = [], []
    run = Run(store, warned.append)
    run.begin("empty", "jobs/train.py", {})
    later = "python jobs/train.py --resume one --register mine"
    assert register_model(run, "mine", digits(), data(), ENTRY, later, said.append) is None
    [line] = warned
    assert line.startswith("the model was not registered as mine: ")
    assert line.endswith(f"the run {run.run_id} has no model in MLflow; register it later: {later}")
    assert said == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a b", "-a", "x" * 200, "a'b", "a\nb"])
def test_a_name_that_mlflow_cannot_have_is_one_line(name):
    assert registry.check_name("--register", "my-net_2.0") == "my-net_2.0"
    with pytest.raises(ValueError, match=r"^--register .*: use at most 150 letters") as error:
        registry.check_name("--register", name)
    assert "\n" not in str(error.value)
