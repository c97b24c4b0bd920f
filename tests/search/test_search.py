"""Whole searches, run as a user runs them, and what they survive."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import psutil
import pytest
import ray
from conftest import ROOT, error_of, only_line, refused, started

from orchestrator.search.journal import Journal
from orchestrator.train.run_folder import RunFolder

pytestmark = [pytest.mark.filterwarnings("ignore")]


def result_of(place, name):
    return json.loads((place / "runs" / name / "result.json").read_text())


def journal_of(place, name):
    journal = Journal(place / "runs" / name / "journal.jsonl")
    journal.close()
    return journal


def learned(place, name):
    """Of every trial, what the seed decides: its values, its end and its epochs, without their speed."""
    return {
        number: (record.values, record.status, [
            {key: value for key, value in entry.items() if "images_per_s" not in key} for entry in record.history
        ])
        for number, record in journal_of(place, name).trials.items()
    }  # fmt: skip


RAY_DATAS = ("_StatsActor", "AutoscalingCoordinatorActor", "_AutoscalingCoordinatorActor")  # one of each a cluster


def held():
    """What is taken of the cluster: CPUs, placement groups, living actors."""
    from ray.util import placement_group_table

    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
    of_jobs = sorted(name for name in actors if name not in RAY_DATAS)
    return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0), len(groups), of_jobs


def settles_to_nothing(within_s=30):
    gc.collect()  # of a run in this process, an actor's handle
    deadline = time.monotonic() + within_s
    while held() != (0, 0, []) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert held() == (0, 0, [])


KEPT = ("RayTrainWorker", "ResourceTrainable", "SynchronizationActor")  # processes that trials hand on


def memory_mb():
    """Of the trials' processes, without those of the feed, which come and go."""
    used = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(name in " ".join(child.cmdline()) for name in KEPT):
                used += child.memory_full_info().uss
    return used / 1e6


# far from where training diverges, which is elsewhere on every processor
TAME = """
lr: {loguniform: [0.002, 0.02]}
weight_decay: {loguniform: [1.0e-5, 1.0e-3]}
lrn_k: {uniform: [1.5, 2.5]}
lrn_n: {choice: [3, 5]}
lrn_alpha: {loguniform: [1.0e-5, 1.0e-3]}
lrn_beta: {uniform: [0.6, 0.9]}
"""
TAMED = ("--space", "tame.yaml")  # in the folder where the searches run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    (folder / "tame.yaml").write_text(TAME)
    return folder


@pytest.fixture(scope="module")
def searched(job, place, here, digit_shards):
    """A search of five trials on the session's Ray."""
    done = job(
        "tune", "--data", digit_shards[0], "--name", "small", "--num-samples", 5, "--epochs", 4, "--grace-epochs", 1,
        *TAMED, cwd=place, **here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    settles_to_nothing()  # early-stopped trials, and all others, have given back what they had
    return done


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_ends_with_its_best_trials_pictures_and_a_tree_of_mlflow_runs(searched, place):
    for words in ("best of 5 trials", "the paper's constants", "epochs", "importance", "mlflow ui"):
        assert words in searched.stdout
    assert "ray" not in searched.stderr.lower(), "no chatter that a user cannot use"
    result, journal = result_of(place, "small"), journal_of(place, "small")
    assert result["status"] == "FINISHED"
    assert {trial["status"] for trial in result["trials"]} == {"FINISHED", "STOPPED"}
    assert result["trials"][0]["status"] == "FINISHED"
    assert result["epochs_used"] == sum(trial["epochs"] for trial in result["trials"]) < 5 * 4
    files = {path.name for path in (place / "runs" / "small").iterdir()}
    pictures = {"learning_curves.png", "parameters.png", "parallel_coordinates.png", "importance.png", "rungs.png"}
    assert files == pictures | {"best.yaml", "journal.jsonl", "result.json", "run.log", "search.yaml", "trials"}
    kept = {path.parent.name for path in (place / "runs" / "small" / "trials").glob("*/checkpoint-*")}
    assert kept == {"0000", f"{result['best']:04d}"}, "others' checkpoints would fill the disk"

    client = mlflow.MlflowClient(result["mlflow_tracking_uri"])
    parent = client.get_run(result["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["command"].endswith("best.yaml")
    assert parent.data.metrics["best/top1_error"] == min(trial["best"]["val/top1_error"] for trial in result["trials"])
    assert pictures | {"best.yaml", "search.yaml"} <= {item.path for item in client.list_artifacts(parent.info.run_id)}
    for number, record in journal.trials.items():
        child = client.get_run(record.run_id)
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == {"FINISHED": "FINISHED", "STOPPED": "KILLED"}[record.status]
        assert child.data.params["lr"] == str(record.values["lr"])
        assert (child.data.tags.get("best") == "true") == (number == result["best"])
        history = client.get_metric_history(record.run_id, "val/top1_error")
        assert [point.value for point in history] == [entry["val/top1_error"] for entry in record.history]


@pytest.mark.ray
@pytest.mark.slow
def test_training_with_the_best_settings_comes_to_the_best_trial_s_numbers(searched, place, here, monkeypatch, capsys):
    best = journal_of(place, "small").trials[result_of(place, "small")["best"]]
    args = ["--config", place / "runs" / "small" / "best.yaml", "--name", "again"]
    status, _, err = started("train", args, place, monkeypatch, capsys, **here)
    assert status == 0, err
    history = result_of(place, "again")["history"]
    assert len(history) >= best.epoch
    for ours, theirs in zip(history, best.history, strict=False):
        for name in ("train/loss", "val/loss", "val/top1_error", "val/top5_error"):
            assert ours[name] == theirs[name], (ours["epoch"], name)


def start(place, *args, **env):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-u", str(ROOT / "jobs" / "tune.py"), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=clean | env, stdout=pipe, stderr=pipe, text=True)


def wait_for_epochs(place, name, count):
    path = place / "runs" / name / "journal.jsonl"
    deadline = time.monotonic() + 300  # the first step of a fresh clone compiles
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b'"event": "epoch"') >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{count} epochs never came")


def killed_and_then_stopped(place, here, digit_shards, name, kill_after, more):
    """A search of three trials whose driver is killed after so many epochs, resumed, and stopped by Ctrl-C after so
    many; returns its journal at both ends."""
    data = ("--data", digit_shards[0], "--num-samples", 3, "--epochs", 4, "--scheduler", "fifo")
    process = start(place, *data, "--name", name, *TAMED, **here)
    wait_for_epochs(place, name, kill_after)
    process.kill()
    process.wait(30)
    killed = journal_of(place, name)
    process = start(place, "--resume", name, **here)
    wait_for_epochs(place, name, len(killed.results) + more)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"resume with: python jobs/tune.py --resume {name}" in out
    result = result_of(place, name)
    assert result["status"] == "KILLED"
    assert mlflow.MlflowClient(result["mlflow_tracking_uri"]).get_run(result["mlflow_run_id"]).info.status == "KILLED"
    stopped = journal_of(place, name)
    assert_continued(place, name, killed, stopped)
    return killed, stopped


def assert_continued(place, name, before, after):
    """No trial of a search is lost or made twice, no epoch is written twice, and the values and the histories are
    those of the undisturbed search of the same seed, some of whose trials asha has stopped."""
    undisturbed = learned(place, "small")
    for number, (values, _, history) in learned(place, name).items():
        assert values == undisturbed[number][0]
        known = undisturbed[number][2]
        assert history[: len(known)] == known[: len(history)]
    events = [json.loads(line) for line in (place / "runs" / name / "journal.jsonl").read_text().splitlines()]
    trials = [event["number"] for event in events if event["event"] == "trial"]
    epochs = [(event["number"], event["metrics"]["epoch"]) for event in events if event["event"] == "epoch"]
    assert len(trials) == len(set(trials)) == len(after.trials)
    assert len(epochs) == len(set(epochs)) == sum(record.epoch for record in after.trials.values())
    for number, record in before.trials.items():
        assert after.trials[number].run_id == record.run_id or record.run_id is None
        assert after.trials[number].epoch >= record.epoch
    assert after.parent_run_id == before.parent_run_id


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_driver_was_killed_goes_on_and_is_stopped_by_ctrl_c(searched, place, here, digit_shards):
    killed, stopped = killed_and_then_stopped(place, here, digit_shards, "resumed", kill_after=2, more=2)
    assert len(stopped.results) > len(killed.results)


@pytest.mark.ray
@pytest.mark.long
def test_a_search_that_was_killed_and_then_stopped_ends_as_if_nothing_had_happened(
    searched, job, place, here, digit_shards
):
    _, before = killed_and_then_stopped(place, here, digit_shards, "broken", kill_after=2, more=3)
    done = job("tune", "--resume", "broken", cwd=place, **here)
    assert done.returncode == 0, done.stderr
    after = journal_of(place, "broken")
    assert_continued(place, "broken", before, after)
    assert [(record.status, record.epoch) for record in after.trials.values()] == [("FINISHED", 4)] * 3
    result = result_of(place, "broken")
    client = mlflow.MlflowClient(result["mlflow_tracking_uri"])
    parent = client.get_run(result["mlflow_run_id"])
    assert (parent.info.status, parent.data.tags.get("error")) == ("FINISHED", None)
    children = [client.get_run(record.run_id) for record in after.trials.values()]
    assert {(child.info.status, child.data.tags.get("error")) for child in children} == {("FINISHED", None)}


@pytest.mark.ray
@pytest.mark.long
def test_a_worker_and_a_trial_s_process_are_killed_and_a_trial_diverges(job, place, here, digit_shards):
    """One search survives all three: the others' numbers are those of the undisturbed search."""
    (place / "space.yaml").write_text("lr: {choice: [0.008, 1.0e+6]}\n")
    args = (
        "--data",
        digit_shards[0],
        "--space",
        place / "space.yaml",
        "--num-samples",
        4,
        "--epochs",
        3,
        "--search-seed",
        7,
    )
    process = start(place, *args, "--scheduler", "fifo", "--name", "shot", **here)
    wait_for_epochs(place, "shot", 2)
    family = {child: " ".join(child.cmdline()) for child in psutil.Process(os.getpid()).children(recursive=True)}
    next(child for child, name in family.items() if "RayTrainWorker" in name).kill()
    wait_for_epochs(place, "shot", 4)
    next(child for child, name in family.items() if "ResourceTrainable" in name and child.is_running()).kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err + out
    settles_to_nothing()
    trials = journal_of(place, "shot").trials
    assert {record.status for record in trials.values()} == {"FINISHED", "FAILED"}
    by_values = {}
    for record in trials.values():
        if record.values["lr"] > 1:
            assert re.match(r"loss is (nan|inf) at step \d+", record.error)
        else:
            errors = [(entry["epoch"], entry["val/loss"]) for entry in record.history]
            assert [epoch for epoch, _ in errors] == [1, 2, 3]
            assert by_values.setdefault(record.values["lr"], errors) == errors, "equal settings, equal numbers"
    client = mlflow.MlflowClient(result_of(place, "shot")["mlflow_tracking_uri"])
    failed = next(record for record in trials.values() if record.status == "FAILED")
    run = client.get_run(failed.run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", failed.error)


@pytest.mark.ray
@pytest.mark.long
def test_an_exploited_trial_starts_from_the_better_one_s_weights(job, place, here, digit_shards):
    (place / "two.yaml").write_text("lr: {choice: [1.0e-6, 0.01]}\n")
    done = job(
        "tune", "--data", digit_shards[0], "--space", place / "two.yaml", "--scheduler", "pbt", "--grace-epochs", 2,
        "--num-samples", 2, "--epochs", 7, "--name", "population", "--search-seed", 6,
        cwd=place, **here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in (place / "runs" / "population" / "journal.jsonl").read_text().splitlines()]
    exploit = next(line for line in lines if line["event"] == "exploit")
    number, donor = exploit["number"], exploit["donor"]
    since = lines[lines.index(exploit) :]
    its_own = [
        line["metrics"] for line in lines[: lines.index(exploit)] if line.get("number") == number and "metrics" in line
    ]
    donors = [line["metrics"] for line in lines if line.get("number") == donor and "metrics" in line]
    first = next(line["metrics"] for line in since if line["event"] == "epoch" and line["number"] == number)
    assert first["epoch"] == exploit["start"]["epoch"] + 1
    at = {entry["epoch"]: entry["val/top1_error"] for entry in donors}
    assert its_own[-1]["val/top1_error"] > 0.7, "a rate of a millionth learns nothing"
    assert first["val/top1_error"] < at[exploit["start"]["epoch"]] + 0.1, (
        "its first error is that of the weights it took"
    )
    assert "continues from trial" in done.stdout
    assert len(journal_of(place, "population").trials) == 2
    assert not list((place / "runs" / "population" / "trials").glob("kept/*"))


@pytest.mark.ray
@pytest.mark.long
def test_a_driver_killed_twice_at_random_moments_loses_no_trial(job, place, here, digit_shards):
    """By asha, whose judgements depend on who is first, and with TPE's model of what came before."""
    args = (
        "--data",
        digit_shards[0],
        "--num-samples",
        8,
        "--epochs",
        4,
        "--grace-epochs",
        1,
        "--searcher",
        "tpe",
        *TAMED,
    )
    process = start(place, *args, "--name", "long-asha", **here)
    import random

    known = {}
    for _ in range(2):
        wait_for_epochs(place, "long-asha", len(known) + 1)
        time.sleep(random.uniform(1, 12))
        assert process.poll() is None, "it was over before it was to be killed"
        process.kill()
        process.wait(30)
        before = journal_of(place, "long-asha").trials
        for number, record in known.items():
            assert (before[number].values, before[number].run_id) == (record.values, record.run_id)
            if record.ended:
                assert before[number] == record
        known = before
        process = start(place, "--resume", "long-asha", **here)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    trials = journal_of(place, "long-asha").trials
    assert sorted(trials) == list(range(8))
    assert {record.status for record in trials.values()} == {"FINISHED", "STOPPED"}
    assert trials[0].status == "FINISHED"
    for number, record in known.items():
        assert trials[number].values == record.values
        assert trials[number].history[: record.epoch] == record.history
        if record.ended:
            assert trials[number] == record
    for record in trials.values():
        assert [entry["epoch"] for entry in record.history] == list(range(1, record.epoch + 1))
        assert (record.epoch == 4) == (record.status == "FINISHED")
    lines = (place / "runs" / "long-asha" / "journal.jsonl").read_text()
    assert lines.count('"event": "trial"') == lines.count('"event": "end"') == 8


@pytest.mark.ray
@pytest.mark.long
def test_a_driver_killed_twice_at_random_moments_changes_nothing(job, place, here, digit_shards):
    data = ("--data", digit_shards[0], "--num-samples", 6, "--epochs", 4, "--scheduler", "fifo", *TAMED)
    whole = job("tune", *data, "--name", "long-whole", cwd=place, **here)
    assert whole.returncode == 0, whole.stderr
    import random

    moments = [random.uniform(1, 20), random.uniform(1, 20)]
    print(f"killed after {moments} s")
    process = start(place, *data, "--name", "long-broken", **here)
    for moment in moments:
        wait_for_epochs(place, "long-broken", 1)
        time.sleep(moment)
        assert process.poll() is None, "it was over before it was to be killed"
        process.kill()
        process.wait(30)
        process = start(place, "--resume", "long-broken", **here)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert learned(place, "long-broken") == learned(place, "long-whole")


@pytest.mark.ray
@pytest.mark.long
def test_thirty_early_stopped_trials_give_everything_back(job, place, here, digit_shards):
    """While the search goes on, too: its end would hide what a trial had kept."""
    args = (
        "--num-samples",
        36,
        "--epochs",
        6,
        "--reduction-factor",
        16,
        "--grace-epochs",
        1,
        "--name",
        "thirty",
        *TAMED,
    )
    path, seen = place / "runs" / "thirty" / "journal.jsonl", []
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(job, "tune", "--data", digit_shards[0], *args, cwd=place, **here)
        while not search.done():
            ended = path.read_bytes().count(b'"event": "end"') if path.exists() else 0
            cpus, groups, actors = held()
            seen.append((ended, cpus, groups, len(actors), memory_mb()))
            time.sleep(1)
    done = search.result()
    assert done.returncode == 0, done.stderr
    early, late = ([sample for ended, *sample in seen if low <= ended < high] for low, high in ((6, 16), (26, 36)))
    first, last = ([max(column) for column in zip(*samples, strict=True)] for samples in (early, late))
    print(f"at most, CPUs, placement groups, actors and MB: in trials 7 to 16 {first}, in the last ten {last}")
    assert all(b <= a for a, b in zip(first[:3], last[:3], strict=True))
    assert last[3] < first[3] + 330, "MB; what kept all that trials had freed grew by 440"
    stopped = [record for record in journal_of(place, "thirty").trials.values() if record.status == "STOPPED"]
    print(f"{len(stopped)} were stopped; afterwards {held()}")
    assert len(stopped) >= 30
    settles_to_nothing()


@pytest.mark.ray
@pytest.mark.long
def test_a_search_whose_time_is_up_ends_well_and_goes_on_with_more(job, place, here, digit_shards):
    args = (
        "--data",
        digit_shards[0],
        "--num-samples",
        3,
        "--epochs",
        6,
        "--scheduler",
        "fifo",
        "--name",
        "hurried",
        *TAMED,
    )
    done = job("tune", *args, "--time-budget", "25s", cwd=place, **here)
    assert done.returncode == 0, done.stderr
    assert "the time budget is used up" in done.stdout
    assert any(not record.ended for record in journal_of(place, "hurried").trials.values())
    done = job("tune", "--resume", "hurried", "--time-budget", "5m", "--num-samples", 2, cwd=place, **here)
    assert done.returncode == 0, done.stderr
    assert {record.status for record in journal_of(place, "hurried").trials.values()} == {"FINISHED"}


@pytest.mark.ray
@pytest.mark.long
def test_a_search_in_which_nothing_could_be_trained_says_why(job, place, here, digit_shards):
    (place / "wild.yaml").write_text("momentum: {uniform: [0.8, 0.9]}\n")
    args = ("--space", place / "wild.yaml", "--lr", "1e6", "--num-samples", 2, "--epochs", 2, "--name", "wild")
    done = job("tune", "--data", digit_shards[0], *args, cwd=place, **here)
    assert done.returncode == 1
    assert re.search(r"error: every trial failed; trial 0: loss is (nan|inf) at step \d+", error_of(done))
    assert result_of(place, "wild")["status"] == "FAILED"
    settles_to_nothing()


@pytest.mark.ray
@pytest.mark.long
def test_two_column_trials_run_two_at_a_time(job, tmp_path, digit_shards):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 8, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        env = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        (tmp_path / "tame.yaml").write_text(TAME)
        args = ("--workers", 2, "--layout", "columns", "--num-samples", 4, "--max-concurrent", 2, "--epochs", 3, *TAMED)
        done = job("tune", "--data", digit_shards[0], *args, "--name", "columns", cwd=tmp_path,
                   RAY_ADDRESS=cluster.address, **env)  # fmt: skip
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 at a time, 2 workers" in done.stdout
    trials = journal_of(tmp_path, "columns").trials
    assert len(trials) == 4
    assert all(record.ended and record.status != "FAILED" for record in trials.values())
    for folder in (tmp_path / "runs" / "columns" / "trials").iterdir():
        config = RunFolder(folder.parent, folder.name).config()
        assert (config.layout, config.worker_range) == ("columns", (2, 2))
    at_work, most = set(), 0
    for line in (tmp_path / "runs" / "columns" / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "epoch":
            at_work.add(event["number"])
            most = max(most, len(at_work))
        elif event["event"] == "end":
            at_work.discard(event["number"])
    assert most == 2


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_cluster_has_no_room_for_is_said_at_once(place, here, digit_shards, monkeypatch, capsys):
    args = ["--data", digit_shards[0], "--device", "gpu", "--name", "no-gpu"]
    status, out, err = started("tune", args, place, monkeypatch, capsys, **here)
    assert status == 1
    assert "a trial of 1 worker needs one GPU and the cluster has 0" in only_line(out, err)
    assert result_of(place, "no-gpu")["status"] == "FAILED"


def test_a_dry_run_says_what_it_would_cost_and_starts_nothing(tmp_path, monkeypatch, capsys):
    status, out, err = started("tune", ["--dry-run"], tmp_path, monkeypatch, capsys)
    assert status == 0, err
    for words in ("16 of 18 epochs", "loguniform from 0.001 to 0.1", "about 88 in all", "would be 288", "the paper's"):
        assert words in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["digitz"], "recipe 'digitz': unknown; the recipes are digits, imagenette, imagenet"),
        (["--num-samples", "0"], "num_samples = 0: input should be greater than or equal to 1"),
        (["--metric", "val/acc"], "invalid choice: 'val/acc'"),
        (["--space", "none.yaml"], "--space none.yaml: No such file"),
        (["--space", "unknown.yaml"], "space: lrr: no such setting; did you mean lr?"),
        (["--space", "turned.yaml"], "the low end 0.1 is not below the high end 0.01"),
        (["--space", "zero.yaml"], "a logarithmic range begins above 0"),
        (["--lr", "0.1"], "--lr: lr varies in this search; leave out the flag"),
        (["--workers", "1..2"], "workers = 1..2: a trial has a fixed number of workers"),
        (["--time-budget", "soon"], "time_budget = 'soon': expected a time such as 90s, 30m or 2h"),
        (["--resume", "nothing"], "no search of that name"),
        (["--resume", "elsewhere/nothing/"], "--resume nothing: no search of that name in "),
        (
            ["--workers", "1024", "--layout", "data", "--global-batch-size", "1024", "--device", "cpu"],
            "--workers 1024: this machine has ",
        ),
        (["--resume", "nothing", "--lr", "1"], "--lr: cannot change when a search is resumed, only --num-samples"),
        (["--schedular", "fifo"], "unknown argument --schedular; did you mean --scheduler?"),
        (["--data", "nowhere"], "no such folder"),
    ],
)
def test_a_wrong_search_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    for name, text in {"unknown": "lrr: {uniform: [0, 1]}", "turned": "lr: {uniform: [0.1, 0.01]}",
                       "zero": "lr: {loguniform: [0, 1]}"}.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert words in refused("tune", args, tmp_path, monkeypatch, capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tracking_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in refused("tune", [], tmp_path, monkeypatch, capsys)
