"""Who goes on: the schedulers' decisions, and that they are the same after an interruption."""

import itertools
from types import SimpleNamespace

import pytest

from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.search.config import make_search
from orchestrator.search.entries import TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.search.proposals import trial_config
from orchestrator.search.schedulers import JournaledScheduler
from orchestrator.search.trial import kept_checkpoint

SPACE = {"lr": {"loguniform": [0.001, 0.1]}, "lrn_n": {"choice": [3, 5, 7]}}


class Told:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        return lambda *args: self.heard.append((name, *args))


def search(**settings):
    epochs = settings.pop("epochs", 9)
    return make_search(settings, digits().changed(workers=1, layout="single", epochs=epochs), SPACE)


class FakeTrial:
    """As much of Ray Tune's as a scheduler sees."""

    def __init__(self, number):
        self.trial_id, self.status, self.config, self.last_result = f"{number:04d}", "RUNNING", {}, {}
        keeps = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.experiment_tag, self.run_metadata = "", SimpleNamespace(checkpoint_manager=keeps)

    def is_finished(self):
        return False

    def set_config(self, config):
        self.config = config


def result(epoch, error):
    return {"epoch": epoch, "step": epoch, "val/top1_error": error, "val/loss": error}


def errors(number, epoch):
    """Trial 3 is best, trial 0, the paper's, the worst of all."""
    return (0.9 if number == 0 else abs(number - 3) * 0.1) + 0.2 / epoch


def drive(config, journal, tmp_path, until=None):
    """Let eight trials report in turn, as long as they may; returns the scheduler's listener."""
    told = Told()
    scheduler = JournaledScheduler(config, journal, StoragePath.of(tmp_path), told)
    for number in range(8):
        if number not in journal.trials:
            journal.write(TrialProposed(number=number, values=config.space.draw(0, number)))
    live = {number: FakeTrial(number) for number, record in journal.trials.items() if not record.ended}
    reported = dict.fromkeys(live, 0)
    for one in live.values():
        scheduler.on_trial_add(None, one)
    steps = itertools.count()
    while live:
        for number, one in list(live.items()):
            if until is not None and next(steps) >= until:
                return told
            reported[number] += 1  # an interrupted trial tells everything again
            last = result(reported[number], errors(number, reported[number]))
            done = reported[number] == config.train.epochs
            if done or scheduler.on_trial_result(None, one, last) == "STOP":
                scheduler.on_trial_complete(None, one, last)
                del live[number]
    return told


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "fifo"])
def test_decisions_are_the_same_after_interruptions_at_every_point(tmp_path, scheduler):
    config = search(scheduler=scheduler, grace_epochs=1, reduction_factor=3)
    whole = Journal(tmp_path / "whole.jsonl")
    drive(config, whole, tmp_path)
    ends = {number: (record.status, record.epoch) for number, record in whole.trials.items()}
    assert all(record.ended for record in whole.trials.values())
    if scheduler == "fifo":
        assert set(ends.values()) == {("FINISHED", 9)}
    else:
        assert ends[0] == ("FINISHED", 9), "the paper's is never stopped, though it is the worst"
        assert ends[3] == ("FINISHED", 9)
        assert sum(status == "STOPPED" for status, _ in ends.values()) >= 3
        assert {epoch for status, epoch in ends.values() if status == "STOPPED"} <= {1, 3, 9}
    for number in range(1, len(whole.results), 4):
        path = tmp_path / f"cut{number}.jsonl"
        drive(config, Journal(path), tmp_path, until=number)
        drive(config, Journal(path), tmp_path)
        again = Journal(path)
        assert {n: (record.status, record.epoch) for n, record in again.trials.items()} == ends, number
        assert [m["epoch"] for m in again.trials[3].history] == list(range(1, 10)), "each epoch once"


def test_a_decision_that_was_written_but_not_carried_out_is_remembered(tmp_path):
    config = search(scheduler="asha")
    path = tmp_path / "journal.jsonl"
    drive(config, Journal(path), tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    first_end = next(i for i, line in enumerate(lines) if b'"end"' in line)
    path.write_bytes(b"".join(lines[:first_end]))  # the driver died between the result and the end
    journal = Journal(path)
    number, metrics = journal.results[-1]
    scheduler = JournaledScheduler(config, journal, StoragePath.of(tmp_path), Told())
    one = FakeTrial(number)
    scheduler.on_trial_add(None, one)
    assert scheduler.on_trial_result(None, one, result(metrics["epoch"], metrics["val/top1_error"])) == "STOP"


def test_a_failed_trial_is_written_down_with_its_line_and_an_interrupted_one_is_not_at_its_end(tmp_path):
    config, journal, told = search(), Journal(tmp_path / "journal.jsonl"), Told()
    scheduler = JournaledScheduler(config, journal, StoragePath.of(tmp_path), told)
    for number in (0, 1, 2):
        journal.write(TrialProposed(number=number, values={"lr": 0.1, "lrn_n": 5}))
        scheduler.on_trial_add(None, FakeTrial(number))
    scheduler.on_trial_complete(None, FakeTrial(0), {"failed": "loss is nan at step 7 (epoch 1)", "done": True})
    scheduler.on_trial_complete(None, FakeTrial(1), {"interrupted": True, "done": True})
    scheduler.on_trial_error(None, FakeTrial(2))
    assert [record.status for record in journal.trials.values()] == ["FAILED", "RUNNING", "RUNNING"]
    (tmp_path / "error.txt").write_text("Traceback\n  ...\norchestrator.base.exits.JobError: worker 0: out of memory\n")
    scheduler.give_up(SimpleNamespace(trial_id="0002", error_file=str(tmp_path / "error.txt")))
    assert journal.trials[0].error == "loss is nan at step 7 (epoch 1)"
    assert (journal.trials[2].status, journal.trials[2].error) == ("FAILED", "worker 0: out of memory")
    assert [name for name, *_ in told.heard] == ["on_end", "on_end"]


class Controller:
    """As much of Ray Tune's as population-based training uses."""

    search_alg = None

    def __init__(self, trials):
        self.trials, self.paused = trials, []

    def get_trials(self):
        return self.trials

    def pause_trial(self, one, should_checkpoint):
        assert not should_checkpoint
        one.status = "PAUSED"
        self.paused.append(one)


def test_of_a_population_the_worst_goes_on_from_the_best_and_the_paper_s_from_itself(tmp_path):
    config = search(scheduler="pbt", num_samples=8, grace_epochs=2)
    journal, told = Journal(tmp_path / "journal.jsonl"), Told()
    scheduler = JournaledScheduler(config, journal, StoragePath.of(tmp_path), told)
    trials = [FakeTrial(number) for number in range(8)]
    controller = Controller(trials)
    for number, one in enumerate(trials):
        journal.write(
            TrialProposed(number=number, values=config.paper_baseline if not number else config.space.draw(0, number))
        )
        scheduler.on_trial_add(controller, one)
        (kept_checkpoint(StoragePath.of(tmp_path), journal.trials[number].folder, 2) / "state.json").write(b"{}")
    for epoch in (1, 2):
        for number in (3, 2, 4, 1, 5, 6, 0, 7):  # the worst last, who is the paper's and trial 7
            decision = scheduler.on_trial_result(controller, trials[number], result(epoch, errors(number, epoch)))
            if epoch == 1:
                assert decision == "CONTINUE"
    moved = [int(one.trial_id) for one in controller.paused]
    assert 7 in moved
    assert 0 not in moved
    record = journal.trials[7]
    donor = next(donor for name, moved_record, donor in told.heard if name == "on_exploit" and moved_record is record)
    assert donor in (2, 3, 4)
    assert record.start["checkpoint"] == str(kept_checkpoint(StoragePath.of(tmp_path), journal.trials[donor].folder, 2))
    assert record.start["lr"] == journal.trials[donor].values["lr"]
    assert trials[7].config == trial_config(record)
    assert record.epoch == 2

    journal.close()
    again = JournaledScheduler(config, Journal(tmp_path / "journal.jsonl"), StoragePath.of(tmp_path), told)
    for one in trials:
        one.status = "RUNNING"
        again.on_trial_add(controller, one)
    state = again.inner._trial_state[trials[3]]
    assert (state.last_perturbation_time, state.last_score) == (2, pytest.approx(-errors(3, 2)))
