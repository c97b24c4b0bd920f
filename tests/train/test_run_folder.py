"""Runs' folders, on disk and in object storage."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.base.environment import default_output
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import digits
from orchestrator.search.entries import EpochEnded, TrialEnded, TrialProposed
from orchestrator.search.journal import Journal
from orchestrator.train.run_folder import RunFolder, check_identity, locate


@pytest.fixture(params=["disk", "s3"])
def output(request, tmp_path):
    return StoragePath.of(tmp_path / "runs") if request.param == "disk" else request.getfixturevalue("s3")[0] / "runs"


def test_a_folder_keeps_settings_and_result_wherever_it_is(output):
    run = RunFolder(output, "first")
    with pytest.raises(ValueError, match=r"--resume first: no run of that name in .*; it has none"):
        run.config()
    assert (run.exists(), run.result(), run.latest_checkpoint()) == (False, {}, None)
    run.create(digits())
    assert run.exists()
    assert run.config() == digits()
    with pytest.raises(ValueError, match=r"first\S* exists; choose another name, or resume it with: --resume first"):
        RunFolder(output, "first").create(digits())
    with pytest.raises(ValueError, match="it has: first"):
        RunFolder(output, "other").config()
    run.write_result({"status": "FINISHED"})
    assert run.result() == {"status": "FINISHED"}
    for epoch in (2, 10):
        (run.path / f"checkpoint-epoch-{epoch:04d}" / "state.json").write(b"{}")
    assert run.latest_checkpoint() == str(run.path / "checkpoint-epoch-0010")


def data_of(classes, digest="d1"):
    return SimpleNamespace(classes=tuple(classes), digest=digest)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("acb", "its class 1 is 'c', and the run's is 'b'; resume with the classes that it was trained on"),
        ("abx", "its class 2 is 'x', and the run's is 'c'"),
        ("ab", "has 2 classes, and the run 3"),
        ("abcd", "has 4 classes, and the run 3"),
    ],
)
def test_a_run_does_not_resume_with_other_classes(classes, words):
    before, data = {"classes": ["a", "b", "c"], "digest": "d1"}, StoragePath.of("/data")
    with pytest.raises(ValueError, match=f"^--data /data: {re.escape(words)}"):
        check_identity(before, data_of(classes), data)


def test_other_images_of_the_same_classes_are_told():
    before, data = {"classes": ["a", "b"], "digest": "d1"}, StoragePath.of("/data")
    assert check_identity(before, data_of("ab"), data) is None
    said = check_identity(before, data_of("ab", "d2"), data)
    assert said is not None
    assert "/data" in said
    assert said.endswith("their digest is d2, and was d1")


@pytest.mark.parametrize(
    ("resume", "output", "name"),
    [
        ("first", "runs", "first"),
        ("first/", "runs", "first"),
        ("runs/first", "runs", "first"),
        ("./runs/first/", "./runs", "first"),
        ("/x/y/first", "/x/y", "first"),
        ("/first", "/", "first"),
        ("s3://bucket/runs/first?region=a/b", "s3://bucket/runs?region=a/b", "first"),
    ],
)
def test_a_run_is_named_by_its_name_or_its_folder(resume, output, name, monkeypatch):
    monkeypatch.delenv("ALEXNET_OUTPUT", raising=False)
    assert locate("runs", resume) == (output, name)


def test_a_folder_and_another_output_contradict_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path / "a"), "a/first") == ("a", "first")
    with pytest.raises(ValueError, match=r"--resume a/first: is not in --output b; leave out --output"):
        locate("b", "a/first")
    with pytest.raises(ValueError, match=r"^--resume '-x': use at most 150 letters"):
        RunFolder("runs", "-x", "--resume")


SAMPLES = Path(__file__).parents[1] / "samples"


def test_a_result_of_0_2_is_read_and_says_nothing_of_its_data(tmp_path):
    run = RunFolder(tmp_path, "old")
    run.create(digits())
    old = json.loads((SAMPLES / "0.2" / "result.json").read_text())
    assert old.pop("schema_version") == 1
    run.write("result.json", (SAMPLES / "0.2" / "result.json").read_text())
    assert run.result() == old
    assert check_identity(old, data_of("abc"), StoragePath.of(tmp_path)) is None


def test_a_result_of_0_1_is_read_and_written_in_the_current_version(tmp_path):
    run = RunFolder(tmp_path, "finished")
    run.create(digits())
    old = json.loads((SAMPLES / "0.1" / "result.json").read_text())
    assert "schema_version" not in old
    run.write("result.json", json.dumps(old))
    result = run.result()
    assert result == old
    assert (result["status"], result["recipe"], len(result["history"])) == ("FINISHED", "digits", 3)
    assert result["best"]["val/top1_error"] == 0.08333333333333333
    run.write_result(result)
    written = json.loads((run.path / "result.json").read())
    assert next(iter(written)) == "schema_version"
    assert written == old | {"schema_version": 2}
    assert run.result() == old


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 3, "status": "FINISHED"}', "was written by a newer version of alexnet-orchestrator"),
        ('{"schema_version": "new"}', "schema_version is 'new', which is not a version number"),
        ('{"status": "FINI', "is not JSON (Unterminated string"),
        ("[" * 100_000, "is not JSON (nested too deeply)"),
        ("[1, 2]", "is not a JSON object; restore it, or remove it to resume without it"),
    ],
)
def test_a_result_that_is_newer_or_damaged_is_refused_in_one_line_that_names_the_file(output, text, words):
    run = RunFolder(output, "later")
    run.create(digits())
    run.write("result.json", text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        run.result()
    assert str(error.value).startswith(f"{run.path / 'result.json'}: {words}")
    assert "\n" not in str(error.value)


def test_a_journal_is_continued_wherever_it_is(output):
    place = RunFolder(output, "search").path
    if place.local is not None:
        place.local.mkdir(parents=True)
    journal = Journal(place / "journal.jsonl")
    journal.write(TrialProposed(number=0, values={"lr": 0.1}))
    journal.write(EpochEnded(number=0, metrics={"epoch": 1, "val/loss": 1.0, "val/top1_error": 0.5}))
    journal.close()
    again = Journal(place / "journal.jsonl")
    assert again.trials[0].epoch == 1
    again.write(TrialEnded(number=0, status="FINISHED"))
    again.close()
    again.close()
    assert (place / "journal.jsonl").read().count(b"\n") == 4
    assert Journal(place / "journal.jsonl").trials[0].status == "FINISHED"


def test_a_folder_is_copied_or_fetched_whole(output):
    folder = output / "one"
    for name in ("a.txt", "deeper/b.txt"):
        (folder / name).write(name.encode())
    folder.copy_folder(output / "two", last="a.txt")
    for place in (folder, output / "two"):
        with place.as_local_dir() as path:
            assert {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*.txt")} == {
                "a.txt": "a.txt", "deeper/b.txt": "deeper/b.txt",
            }  # fmt: skip
    folder.remove()
    assert not folder.is_folder()
    assert (output / "two" / "a.txt").read() == b"a.txt"


def test_where_runs_are_stored_can_be_set_once_for_all(monkeypatch):
    monkeypatch.setenv("ALEXNET_OUTPUT", "/shared/runs")
    assert default_output() == "/shared/runs"
    assert RunFolder(default_output(), "x").flag == ""
    monkeypatch.delenv("ALEXNET_OUTPUT")
    assert default_output() == "runs"
    assert RunFolder("/shared runs", "x").flag == " --output '/shared runs'"


@pytest.mark.ray
@pytest.mark.long
def test_a_run_and_a_search_live_in_object_storage_and_are_resumed_there(job, s3, here, digit_shards, tmp_path):
    output = (s3[0] / "runs").text
    args = ("--output", output, "--data", digit_shards[0], "--workers", 1, "--layout", "single")
    done = job("train", *args, "--epochs", 2, "--name", "first", cwd=tmp_path, **here)
    assert done.returncode == 0, done.stderr
    done = job("train", "--output", output, "--resume", "first", "--epochs", 3, cwd=tmp_path, **here)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch 2" in done.stdout
    run = StoragePath.of(output) / "first"
    result = json.loads((run / "result.json").read())
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3]
    assert result["checkpoint"] == str(run / "checkpoint-epoch-0003")
    assert (run / "checkpoint-epoch-0003" / "model.safetensors").size() > 1e6
    assert (run / "learning_curves.png").size() > 1e4
    assert not (tmp_path / "runs").exists()

    search = ("--output", output, "--data", digit_shards[0], "--num-samples", 2, "--epochs", 2, "--name", "search")
    done = job("tune", *search, cwd=tmp_path, **here)
    assert done.returncode == 0, done.stderr + done.stdout
    names = (StoragePath.of(output) / "search").children().keys()
    assert {"journal.jsonl", "search.yaml", "result.json", "best.yaml", "learning_curves.png", "trials"} <= names
    done = job("tune", "--output", output, "--resume", "search", "--num-samples", 3, cwd=tmp_path, **here)
    assert done.returncode == 0, done.stderr + done.stdout
    journal = (StoragePath.of(output) / "search" / "journal.jsonl").read().decode()
    assert journal.count('"event": "trial"') == 3
    assert journal.count('"event": "end"') == 3


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("history", "x", "history is 'x'"),
        ("history", [1], "history has no epochs"),
        ("mlflow_run_id", 5, "mlflow_run_id is 5"),
        ("cost_usd", "x", "cost_usd is 'x'"),
        ("cost_usd", True, "cost_usd is True"),
        ("config", ["a"], "config is"),
    ],
)
def test_a_result_whose_values_are_of_another_kind_is_refused_in_one_line(tmp_path, field, value, words):
    run = RunFolder(tmp_path, "run")
    run.create(digits())
    run.write_result({"history": [{"epoch": 1}], "mlflow_run_id": "a", "cost_usd": 1, "best": None})
    assert run.result()["cost_usd"] == 1
    run.write_result({field: value})
    with pytest.raises(ValueError, match=rf"result\.json: damaged: {words}.*remove it to resume") as error:
        run.result()
    assert "\n" not in str(error.value)
