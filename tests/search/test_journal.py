"""The memory of a search: what is written is there again, whatever the writer's end."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.search.entries import (
    KINDS,
    CostSoFar,
    EpochEnded,
    Exploited,
    Header,
    RunBegun,
    SearchBegun,
    TrialEnded,
    TrialProposed,
    from_json,
    to_json,
)
from orchestrator.search.journal import Journal


def metrics(epoch, error, loss=1.0):
    return {"epoch": epoch, "step": 10 * epoch, "val/top1_error": error, "val/loss": loss}


def written(path):
    journal = Journal(path)
    journal.write(SearchBegun(run_id="parent"))
    for number in (0, 1):
        journal.write(TrialProposed(number=number, values={"lr": 0.1 / (number + 1)}))
        journal.write(RunBegun(number=number, run_id=f"run{number}"))
    for epoch, errors in enumerate([(0.5, 0.4), (0.3, 0.45)], start=1):
        for number, error in enumerate(errors):
            journal.write(EpochEnded(number=number, metrics=metrics(epoch, error)))
    journal.write(TrialEnded(number=1, status="STOPPED", error=None))
    journal.close()
    return journal


def test_what_is_read_is_what_was_written(tmp_path):
    before = written(tmp_path / "journal.jsonl")
    after = Journal(tmp_path / "journal.jsonl")
    assert after.trials == before.trials
    assert after.results == before.results
    assert after.parent_run_id == "parent"
    assert [record.ended for record in after.trials.values()] == [False, True]
    assert [record.number for record in after.ranked("val/top1_error")] == [0, 1]
    assert after.elapsed_s >= before.elapsed_s


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_that_a_crash_cut_off_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # the end of trial 1 was being written
    journal = Journal(path)
    assert not journal.trials[1].ended
    journal.write(TrialEnded(number=1, status="STOPPED", error=None))
    journal.close()
    assert Journal(path).trials[1].ended
    assert path.read_bytes().count(b"\n") == whole.count(b"\n")


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "epoch", "number": 9, "at_s": 1}',
        "no json",
        '{"event": "what", "number": 0, "at_s": 1}',
        "[" * 100_000,
        '{"event": "' + "x" * 10**6 + '", "number": 0, "at_s": 1}',
    ],
    ids=lambda line: line[:40],
)
def test_damage_in_the_midst_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    written(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"journal.jsonl, line 4: damaged") as error:
        Journal(path)
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert str(error.value).isprintable()


def test_a_trial_that_goes_on_from_another_has_that_one_s_epochs_no_more_than_it_had(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for number in (0, 1):
        journal.write(TrialProposed(number=number, values={"lr": 0.1}))
    for epoch in (1, 2, 3):
        journal.write(EpochEnded(number=1, metrics=metrics(epoch, 0.5)))
    start = {"checkpoint": "somewhere", "epoch": 2, "lr": 0.1}
    journal.write(Exploited(number=1, donor=0, values={"lr": 0.2}, start=start))
    record = journal.trials[1]
    assert (record.epoch, record.values, record.start) == (2, {"lr": 0.2}, start)
    assert record.folder == "0001-1-from-0000-at-0002"


def test_what_a_search_has_cost_outlives_its_driver(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.usd is None
    journal.write(CostSoFar(usd=1.25))
    assert Journal(tmp_path / "journal.jsonl").usd == 1.25


SAMPLE = Path(__file__).parent.parent / "samples" / "0.1" / "journal.jsonl"  # as version 0.1 wrote it


def test_a_new_journal_begins_with_its_version_and_a_newer_one_is_refused_in_one_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    first, *rest = path.read_text().splitlines(keepends=True)
    assert json.loads(first) == {"event": "journal", "schema_version": 1, "at_s": pytest.approx(0, abs=5)}
    path.write_text(first.replace('"schema_version": 1', '"schema_version": 2') + "".join(rest))
    with pytest.raises(ValueError, match=r"^[^\n]*journal\.jsonl: was written by a newer version[^\n]*$"):
        Journal(path)


def test_a_journal_from_before_there_were_versions_is_read_and_continued(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(SAMPLE.read_bytes())
    journal = Journal(path)
    assert path.read_bytes() == SAMPLE.read_bytes(), "reading adds nothing"
    assert [(r.number, r.status, r.epoch) for r in journal.trials.values()] == [
        (0, "FINISHED", 6), (1, "STOPPED", 2), (2, "RUNNING", 0), (3, "RUNNING", 0),
    ]  # fmt: skip
    assert journal.trials[0].history[-1]["val/loss"] == 0.12199130290084415
    before = journal.elapsed_s
    journal.write(EpochEnded(3, metrics(1, 0.3)))
    journal.close()
    assert path.read_bytes().startswith(SAMPLE.read_bytes())
    again = Journal(path)
    assert again.trials[3].epoch == 1
    assert again.elapsed_s >= before
    again.close()


def test_every_entry_of_an_earlier_journal_is_written_again_byte_for_byte():
    kinds = set()
    for name in ("journal.jsonl", "journal-pbt.jsonl"):
        for line in SAMPLE.with_name(name).read_text().splitlines():
            entry, at_s = from_json(json.loads(line))
            assert json.dumps(to_json(entry, at_s)) == line
            kinds.add(type(entry))
    assert kinds == set(KINDS.values()) - {Header}, "the samples have every kind that version 0.1 wrote"


def test_the_settings_of_a_search_of_0_1_are_read(tmp_path):
    from orchestrator.search.folder import SearchFolder

    (tmp_path / "old").mkdir()
    shutil.copy(SAMPLE.with_name("search.yaml"), tmp_path / "old")
    config = SearchFolder(tmp_path, "old").search()
    assert (config.num_samples, config.scheduler, config.train.epochs) == (6, "asha", 6)
    assert config.space.names == ("lr", "lrn_alpha", "lrn_beta", "lrn_k", "lrn_n", "weight_decay")
    assert config.train.workers == 1
