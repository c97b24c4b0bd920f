"""The memory of a search: what is written is there again, whatever the writer's end."""

import pytest

from orchestrator.search.journal import Journal


def metrics(epoch, error, loss=1.0):
    return {"epoch": epoch, "step": 10 * epoch, "val/top1_error": error, "val/loss": loss}


def written(path):
    journal = Journal(path)
    journal.write("search", run_id="parent")
    for number in (0, 1):
        journal.write("trial", number=number, values={"lr": 0.1 / (number + 1)})
        journal.write("run", number=number, run_id=f"run{number}")
    for epoch, errors in enumerate([(0.5, 0.4), (0.3, 0.45)], start=1):
        for number, error in enumerate(errors):
            journal.write("epoch", number=number, metrics=metrics(epoch, error))
    journal.write("end", number=1, status="STOPPED", error=None)
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
    journal.write("end", number=1, status="STOPPED", error=None)
    journal.close()
    assert Journal(path).trials[1].ended
    assert path.read_bytes().count(b"\n") == whole.count(b"\n")


@pytest.mark.parametrize(
    "line", ['{"event": "epoch", "number": 9, "at_s": 1}', "no json", '{"event": "what", "number": 0, "at_s": 1}']
)
def test_damage_in_the_midst_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    written(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"journal.jsonl, line 4: damaged"):
        Journal(path)


def test_a_trial_that_goes_on_from_another_has_that_one_s_epochs_no_more_than_it_had(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for number in (0, 1):
        journal.write("trial", number=number, values={"lr": 0.1})
    for epoch in (1, 2, 3):
        journal.write("epoch", number=1, metrics=metrics(epoch, 0.5))
    start = {"checkpoint": "somewhere", "epoch": 2, "lr": 0.1}
    journal.write("exploit", number=1, donor=0, values={"lr": 0.2}, start=start)
    record = journal.trials[1]
    assert (record.epoch, record.values, record.start) == (2, {"lr": 0.2}, start)
    assert record.folder == "0001-1-from-0000-at-0002"


def test_what_a_search_has_cost_outlives_its_driver(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.usd is None
    journal.write("cost", usd=1.25)
    assert Journal(tmp_path / "journal.jsonl").usd == 1.25
