"""What a run asks of a cluster, its folder, its checkpoints, its progress lines."""

import io

import pytest
import ray
import torch

from orchestrator.base.terminal import LiveLine, duration
from orchestrator.cluster.nodes import Node
from orchestrator.cluster.placement import make_plan
from orchestrator.config.recipes import digits
from orchestrator.config.train import make_config
from orchestrator.train import training as trainer
from orchestrator.train.rendezvous import wants_bf16
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.session import resumed
from orchestrator.train.view import TrainView


def test_a_run_folder_is_never_taken_twice(tmp_path):
    run = RunFolder(tmp_path, "first")
    run.create(digits())
    assert run.config() == digits()
    with pytest.raises(ValueError, match="--resume first"):
        run.create(digits())
    with pytest.raises(ValueError, match="it has: first"):
        RunFolder(tmp_path, "second").config()
    for wrong in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="letters, digits"):
            RunFolder(tmp_path, wrong)


def test_a_run_that_goes_on_keeps_what_its_checkpoint_has():
    config = digits()
    assert resumed(config, {"epochs": 40, "lr": config.lr}).epochs == 40
    with pytest.raises(ValueError, match="--lr: cannot change when a run is resumed, only --epochs"):
        resumed(config, {"lr": 0.5})


def test_precision_is_what_was_asked_for_and_auto_never_guesses_on_other_devices():
    assert wants_bf16("bf16", torch.device("cpu"))
    assert not wants_bf16("fp32", torch.device("cpu"))
    assert not wants_bf16("auto", torch.device("mps"))


def test_a_log_gets_plain_lines_and_a_terminal_one_live_line(monkeypatch):
    step = {"kind": "step", "epoch": 0, "epochs": 2, "step": 1, "steps": 4, "loss": 2.0, "images_per_s": 10.0}
    log = io.StringIO()
    view = TrainView()
    view.line = LiveLine(log)
    for number in range(1, 4):
        view.event(step | {"step": number})
    assert log.getvalue() == "epoch 1/2  step 1/4  loss 2.0000  10 images/s  ETA --:--\n"  # one, not three in a moment
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    view.line = LiveLine(terminal)
    monkeypatch.setenv("COLUMNS", "20")
    view.event(step | {"step": 4})
    assert terminal.getvalue() == "\r\x1b[2Kepoch 1/2  step 4/4", "a longer line would leave a part behind"
    view.line.print("done")
    assert terminal.getvalue().startswith("\r")
    assert terminal.getvalue().endswith("\r\x1b[2Kdone\n")


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (5, 65, 3605)] == ["0:05", "1:05", "1:00:05"]


@pytest.mark.parametrize(
    ("settings", "workers_on", "expected"),
    [
        ({"workers": 1}, ["a"], ""),  # the tasks of its feed take turns
        ({"workers": 2, "layout": "data"}, ["a", "a"], "feed"),  # whose tasks would no longer fit at once
        ({"workers": 2, "layout": "data"}, ["a", "idle"], "workers"),
        ({"workers": 1}, [], "workers"),  # it has not started: nobody knows where it would
    ],
)
def test_a_run_leaves_its_workers_alone_when_a_node_goes_that_it_does_not_need(
    settings, workers_on, expected, monkeypatch
):
    nodes = [Node("a", 4), Node("idle", 4)]
    training = trainer.Training.__new__(trainer.Training)
    training.config, training.num_classes, training.num_concurrent = make_config(**settings, device="cpu"), 10, 0
    training._counted, training._excused, training._nodes = {"a", "idle"}, set(), workers_on
    plan = make_plan(training.config, nodes, 10)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(trainer, "alive", lambda _: nodes)
    assert training._lost_nodes(plan) == ""
    monkeypatch.setattr(trainer, "alive", lambda _: nodes[:1])
    assert training._lost_nodes(plan) == expected
    assert training._lost_nodes(plan) == expected
    assert training._gone() == {"idle"}
