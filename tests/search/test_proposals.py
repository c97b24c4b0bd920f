"""Which configurations a search tries, and that an interruption changes none of them."""

import pytest

from orchestrator.config.recipes import digits
from orchestrator.search.config import make_search
from orchestrator.search.entries import EpochEnded, TrialEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.search.proposals import Proposals, ask_optuna, draw_fitting
from orchestrator.search.recipes import PAPERS_SPACE


def search(space=PAPERS_SPACE, **settings):
    return make_search(settings, digits().changed(workers=1, layout="single", epochs=9), space)


def metrics(epoch, error):
    return {"epoch": epoch, "step": epoch, "val/top1_error": error, "val/loss": error}


def proposed(config, path):
    """The configurations of all trials, each of which ends before the next is asked for."""
    journal = Journal(path)
    proposals = Proposals(config, journal, 1)
    while len(journal.trials) < config.num_trials:
        number = len(journal.trials)
        journal.write(TrialProposed(number=number, values=proposals.propose(number)))
        error = abs(journal.trials[number].values["lr"] - 0.02)
        journal.write(EpochEnded(number=number, metrics=metrics(1, error)))
        journal.write(TrialEnded(number=number, status="FINISHED" if number % 2 else "STOPPED", error=None))
    journal.close()
    return [record.values for record in journal.trials.values()]


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_trial_0_is_the_paper_s_and_a_search_proposes_the_same_after_any_interruption(tmp_path, searcher):
    config = search(searcher=searcher, num_samples=8)
    whole = proposed(config, tmp_path / "whole.jsonl")
    assert whole[0] == {
        "lr": 0.01,
        "weight_decay": 0.0005,
        "lrn_k": 2.0,
        "lrn_n": 5,
        "lrn_alpha": 1e-4,
        "lrn_beta": 0.75,
    }
    assert len({str(values) for values in whole}) == 8
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (3, 10, 17):
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[: 1 + kept - kept % 3]))
        assert proposed(config, tmp_path / "cut.jsonl") == whole
    assert whole != proposed(search(searcher=searcher, num_samples=8, search_seed=1), tmp_path / "other.jsonl")


def test_tpe_learns_where_the_errors_are_small(tmp_path):
    space = {"lr": {"loguniform": [0.0001, 1.0]}}
    config = search(space, searcher="tpe", num_samples=60)
    found = [values["lr"] for values in proposed(config, tmp_path / "journal.jsonl")]
    near = [0.005 < lr < 0.08 for lr in found]
    assert sum(near[40:]) > 10, "20 random ones would have 6 within these 1.2 of 4 decades"


def test_tpe_takes_what_failed_what_runs_and_a_paper_s_point_outside_of_the_space(tmp_path):
    config = search({"lr": {"uniform": [0.02, 0.1]}}, searcher="tpe", num_samples=9)
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(8):
        journal.write(
            TrialProposed(number=number, values=config.paper_baseline if not number else config.space.draw(0, number))
        )
    journal.write(TrialEnded(number=3, status="FAILED", error="loss is nan"))
    assert 0.02 <= ask_optuna(config, list(journal.trials.values()), 8)["lr"] <= 0.1


def test_a_grid_is_tried_in_order_and_the_paper_s_point_once(tmp_path):
    space = {"lr": {"grid": [0.01, 0.1]}, "lrn_n": {"grid": [3, 5]}}
    config = search(space, searcher="grid", num_samples=100)
    assert config.num_trials == 4
    found = proposed(config, tmp_path / "journal.jsonl")
    assert found == [
        {"lr": 0.01, "lrn_n": 5}, {"lr": 0.01, "lrn_n": 3}, {"lr": 0.1, "lrn_n": 3}, {"lr": 0.1, "lrn_n": 5},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 0}, "num_samples = 0: input should be greater than or equal to 1"),
        ({"metric": "val/accuracy"}, "metric = 'val/accuracy': input should be 'val/top1_error'"),
        ({"searcher": "grid"}, "a grid needs listed values"),
        ({"time_budget": "soon"}, "time_budget = 'soon': expected a time such as 90s, 30m or 2h"),
        ({"grace_epochs": 10}, "grace_epochs = 10: more than the 9 epochs of a trial"),
        ({"scheduler": "pbt", "searcher": "tpe"}, "scheduler = pbt: needs --searcher random"),
        ({"schedulr": "pbt"}, "schedulr: no such setting"),
    ],
)
def test_wrong_settings_are_one_line(settings, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        search(**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="lr: is a grid; say --searcher grid, or use choice"):
        search({"lr": {"grid": [0.1, 0.2]}})


def test_a_grid_that_is_cut_says_so(tmp_path):
    space = {"lr": {"grid": [0.01, 0.02, 0.05]}, "lrn_n": {"grid": [3, 5]}}
    whole = search(space, searcher="grid", num_samples=16)
    assert (whole.num_trials, whole.left_out) == (6, None), "the paper's are one of them"
    values = proposed(whole, tmp_path / "whole.jsonl")
    assert len({str(each) for each in values}) == 6
    cut = search(space, searcher="grid", num_samples=4)
    assert cut.left_out == "4 of the grid's 6 trials; for all of them: --num-samples 6"
    assert proposed(cut, tmp_path / "cut.jsonl") == values[:4]
    others = search({"lr": {"grid": [0.02, 0.05]}}, searcher="grid", num_samples=16)
    assert (others.num_trials, others.grid_size) == (3, 3), "and the paper's"


def test_settings_that_go_together_only_in_pairs_can_be_searched():
    space = {"workers": {"choice": [1, 2]}, "layout": {"choice": ["single", "columns"]}}
    config = search(space)
    assert config.valid_values_with("workers", 2) == {"workers": 2, "layout": "columns"}
    assert config.valid_values_with("workers", 1) == {"workers": 1}
    found = {(v["workers"], v["layout"]) for v in (draw_fitting(config, number) for number in range(20))}
    assert found == {(1, "single"), (2, "columns")}
    with pytest.raises(ValueError, match="space: workers = 2: "):
        search({"workers": {"choice": [1, 2]}}).valid_values_with("workers", 2)
