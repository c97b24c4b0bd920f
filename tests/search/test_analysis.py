"""What a search says it learned, held against trials whose truth is known."""

import io
import math

import pytest

from orchestrator.base.terminal import LiveBlock
from orchestrator.config.recipes import digits
from orchestrator.search import analysis
from orchestrator.search.config import make_search
from orchestrator.search.entries import EpochEnded, TrialEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.search.plots import all_pictures
from orchestrator.search.view import SearchView
from orchestrator.train.messages import Step

SPACE = {"lr": {"loguniform": [0.001, 0.1]}, "lrn_n": {"choice": [3, 5, 7]}, "weight_decay": {"uniform": [0.0, 0.1]}}


def metrics(epoch, error):
    return {"epoch": epoch, "step": epoch, "val/top1_error": error, "val/loss": 2 * error}


@pytest.fixture
def searched(tmp_path):
    """30 trials in which only lr matters: the error is the distance of its logarithm from 0.02's, less with epochs."""
    config = make_search(
        {"num_samples": 30, "reduction_factor": 3}, digits().changed(workers=1, layout="single", epochs=9), SPACE
    )
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(30):
        values = config.space.draw(0, number) if number else config.paper_baseline
        journal.write(TrialProposed(number=number, values=values))
        error = abs(math.log10(values["lr"] / 0.02)) / 3
        epochs = 9 if not number or error < 0.1 else 3 if error < 0.2 else 1
        for epoch in range(1, epochs + 1):
            journal.write(EpochEnded(number=number, metrics=metrics(epoch, error + 0.1 / epoch)))
        journal.write(TrialEnded(number=number, status="FINISHED" if epochs == 9 else "STOPPED", error=None))
    return config, journal


def test_the_setting_that_matters_is_found(searched):
    shares = analysis.importance(*searched)
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_few_trials_or_equal_ones_say_nothing_of_importance(tmp_path):
    config = make_search({}, digits().changed(workers=1, layout="single"), SPACE)
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(5):
        journal.write(TrialProposed(number=number, values=config.space.draw(0, number)))
        if number == 3:
            assert analysis.importance(config, journal) == {}
        journal.write(EpochEnded(number=number, metrics=metrics(1, 0.5)))
    assert analysis.importance(config, journal) == {}


def test_the_best_is_held_against_the_paper_s_with_the_noise_of_the_validation_set(searched):
    config, journal = searched
    found = analysis.compare(config, journal, 360)
    papers = math.log10(2) / 3 + 0.1 / 9
    assert found.paper_baseline == pytest.approx(papers)
    assert found.best < papers
    assert found.margin == pytest.approx(math.sqrt((found.best * (1 - found.best) + papers * (1 - papers)) / 360))
    assert "more than twice the standard error" in str(found)
    assert "within twice" in str(analysis.compare(config, journal, 10))


def test_what_failed_is_no_finding(tmp_path):
    config = make_search({}, digits().changed(workers=1, layout="single"), SPACE)
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(2):
        journal.write(TrialProposed(number=number, values=config.paper_baseline))
        journal.write(EpochEnded(number=number, metrics=metrics(1, 0.1 * (number + 1))))
    journal.write(TrialEnded(number=0, status="FAILED", error="training diverged"))
    assert analysis.as_result(config, journal, 100)["best"] == 1, "though its error is larger"
    assert analysis.compare(config, journal, 100) is None
    said = SearchView(config, journal).findings(100)
    assert said[-1] == "no comparison with the paper's constants, whose trial failed: training diverged"
    journal.write(TrialEnded(number=1, status="FAILED", error="training diverged"))
    assert analysis.as_result(config, journal, 100)["best"] is None


def test_epochs_used_and_expected(searched):
    config, journal = searched
    assert analysis.epochs_used(journal) == sum(record.epoch for record in journal.trials.values())
    assert analysis.rungs(config) == [1, 3]
    # the paper's 9; 29 others for one epoch, a third of them for two more, a ninth for six more
    assert analysis.expected_epochs(config) == round(9 + 29 + 29 / 3 * 2 + 29 / 9 * 6)
    fifo = make_search(config.settings() | {"scheduler": "fifo"}, config.train, config.space.to_dict())
    assert analysis.expected_epochs(fifo) == 30 * 9


def test_every_picture_is_drawn_also_of_a_search_that_just_began(searched, tmp_path):
    config, journal = searched
    drawn = all_pictures(config, journal)
    assert set(drawn) == {
        "learning_curves.png",
        "parameters.png",
        "parallel_coordinates.png",
        "importance.png",
        "rungs.png",
    }
    for name, figure in drawn.items():
        figure.savefig(tmp_path / name)
        axes = figure.axes[0]
        assert axes.lines or axes.collections or axes.patches, name
    lengths = {len(line.get_xdata()) for line in drawn["learning_curves.png"].axes[0].lines if line.get_marker() == "."}
    assert lengths == {1, 3, 9}
    marks = sum(len(group.get_offsets()) for group in drawn["rungs.png"].axes[0].collections)
    judged = [sum(record.epoch >= epoch for record in journal.trials.values()) for epoch in analysis.rungs(config)]
    assert marks == sum(judged)  # a mark a trial and rung, the paper's too

    young = Journal(tmp_path / "young.jsonl")
    assert all_pictures(config, young) == {}
    young.write(TrialProposed(number=0, values=config.paper_baseline))
    young.write(EpochEnded(number=0, metrics=metrics(1, 0.5)))
    assert set(all_pictures(config, young)) == {"learning_curves.png", "parameters.png", "rungs.png"}


def test_the_table_names_every_trial_with_its_values_and_what_it_does(searched):
    config, journal = searched
    view = SearchView(config, journal)
    journal.write(TrialProposed(number=30, values=config.space.draw(0, 30)))
    view.begun(journal.trials[30])
    event = Step(
        epoch=0, epochs=9, step=5, steps=20, total_step=5, loss=2.0, lr=0.01, images_per_s=100.0, log=False
    )  # fmt: skip
    view.event(30, event)
    view.event(1, event)  # which has ended: it came late
    head, titles, first, *rest = view.lines()
    assert "30 of 30 trials done, 1 under way" in head
    assert titles.split() == ["trial", "lr", "lrn_n", "weight_decay", "epoch", "top1_error", "status"]
    assert first.startswith("30 ")
    assert first.endswith("epoch 1 25 %, loss 2.000, 100 images/s")
    ranked = [int(line.split()[0]) for line in rest]
    assert ranked == [record.number for record in journal.ranked("val/top1_error")][: len(rest)]
    best = journal.trials[ranked[0]]
    assert f"{best.values['lr']:.4g}" in rest[0]
    assert any("the paper's constants" in line for line in view.table(list(journal.trials.values())))
    assert "against" in view.findings(360)[-1]


def test_a_terminal_s_table_is_redrawn_in_its_place_and_a_log_s_is_seldom_repeated():
    log, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (log, terminal):
        block = LiveBlock(60.0, stream)
        block.update(["one", "two"])
        block.update(["three", "four"])
        block.print("said")
    assert log.getvalue() == "one\ntwo\nsaid\n"
    assert terminal.getvalue() == "one\ntwo\n\x1b[2F\x1b[Jthree\nfour\n\x1b[2F\x1b[Jsaid\n"
