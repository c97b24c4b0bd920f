"""Which checkpoints a search keeps, and how often it lists the storage."""

import pytest

from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.search.config import make_search
from orchestrator.search.entries import EpochEnded, Exploited, TrialEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.search.retention import Retention, age_of_kept


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal.jsonl")


def add(journal, tmp_path, number, error, status=None):
    journal.write(TrialProposed(number, {"lr": 0.01}))
    journal.write(EpochEnded(number, {"epoch": 1, "step": 1, "val/top1_error": error, "val/loss": error}))
    store(tmp_path, f"{number:04d}/checkpoint-epoch-0001")
    if status:
        journal.write(TrialEnded(number, status))


def store(tmp_path, name):
    (StoragePath.of(tmp_path) / "trials" / name / "state.json").write(b"{}")


def retention_of(journal, tmp_path, **settings):
    config = make_search(settings, digits().changed(workers=1, layout="single"), {"lr": {"choice": [0.01, 0.02]}})
    return Retention(config, journal, StoragePath.of(tmp_path) / "trials")


def kept(tmp_path):
    return sorted(path.parent.name for path in (tmp_path / "trials").glob("*/checkpoint-*"))


def test_the_checkpoints_of_the_best_are_kept_even_if_the_one_ahead_of_it_fails(journal, tmp_path):
    for number, (error, status) in enumerate([(0.5, None), (0.2, "STOPPED"), (0.1, None), (0.3, "STOPPED")]):
        add(journal, tmp_path, number, error, status)
    retention = retention_of(journal, tmp_path)
    retention.keep_the_best({1, 3})
    assert kept(tmp_path) == ["0000", "0001", "0002"], "trial 2 is ahead and still training"
    journal.write(TrialEnded(2, "FAILED", "training diverged"))
    retention.keep_the_best({1, 2, 3})
    assert kept(tmp_path) == ["0000", "0001"]


def test_checkpoints_stay_until_the_trial_s_workers_have_ended(journal, tmp_path):
    for number in range(3):
        add(journal, tmp_path, number, 0.1 * (number + 1), "STOPPED")
    retention = retention_of(journal, tmp_path)
    retention.keep_the_best({0, 1})
    assert kept(tmp_path) == ["0000", "0002"]
    retention.keep_the_best({0, 1, 2})
    assert kept(tmp_path) == ["0000"]


@pytest.mark.parametrize(("number", "longer"), [(1234, 12340), (1000, 10001)])
def test_a_trial_s_checkpoints_are_its_own_however_many_trials_there_are(journal, tmp_path, number, longer):
    add(journal, tmp_path, 1, 0.1, "FINISHED")  # the best
    add(journal, tmp_path, number, 0.5, "STOPPED")
    add(journal, tmp_path, longer, 0.4)
    retention_of(journal, tmp_path).keep_the_best({1, number})
    assert kept(tmp_path) == ["0001", f"{longer:04d}"]


def test_storage_is_listed_once_for_each_trial_not_at_every_end(journal, tmp_path, monkeypatch):
    asked, listing = [], StoragePath.children
    monkeypatch.setattr(StoragePath, "children", lambda place: asked.append(place.name) or listing(place))
    retention = retention_of(journal, tmp_path)
    for number in range(12):
        add(journal, tmp_path, number, 0.9 - number / 100, "STOPPED")
        retention.keep_the_best(set(range(number + 1)))
    assert sorted(asked) == [f"{number:04d}" for number in range(1, 11)]
    assert kept(tmp_path) == ["0000", "0011"]


def test_a_population_keeps_the_last_two_of_each_trial_and_what_one_starts_from(journal, tmp_path):
    for number in (0, 1, 1234, 12340):
        journal.write(TrialProposed(number, {"lr": 0.01}))
    names = {f"{run}-checkpoint-epoch-{epoch:04d}" for run in ("0000", "0001", "1234", "12340") for epoch in (2, 4, 6)}
    names.add("0001-1-from-0000-at-0002-checkpoint-epoch-0004")
    for name in names:
        store(tmp_path, f"kept/{name}")
    start = {"checkpoint": "runs/kept/0000-checkpoint-epoch-0002", "epoch": 2, "lr": 0.01}
    journal.write(Exploited(1, 0, {"lr": 0.02}, start))
    retention_of(journal, tmp_path, scheduler="pbt").drop_kept()
    removed = names - {path.name for path in (tmp_path / "trials" / "kept").iterdir()}
    assert removed == {
        "0001-checkpoint-epoch-0002", "0001-checkpoint-epoch-0004", "1234-checkpoint-epoch-0002",
        "12340-checkpoint-epoch-0002",
    }  # fmt: skip
    assert age_of_kept("0001-2-from-0000-at-0002-checkpoint-epoch-0004") == (2, 4)


def test_weights_that_trials_keep_go_with_their_checkpoints(journal, tmp_path):
    for number in range(3):
        add(journal, tmp_path, number, 0.1 * (number + 1), "STOPPED")
        store(tmp_path, f"{number:04d}/kept-epoch-0001")
    retention_of(journal, tmp_path).keep_the_best({0, 1, 2})
    assert [path.parent.name for path in (tmp_path / "trials").glob("*/kept-epoch-*")] == ["0000"]
