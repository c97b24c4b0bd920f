"""A run under way, with a fit and a cluster that are played; its folder, its settings, its progress lines."""

import io
import signal
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch

from orchestrator.base.exits import Interrupted, JobError
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine, duration
from orchestrator.cluster.nodes import Node
from orchestrator.config.recipes import digits
from orchestrator.config.train import make_config
from orchestrator.train import ray_train, training
from orchestrator.train.attempts import Attempts
from orchestrator.train.driver_link import DriverLink
from orchestrator.train.mailbox import DROP, SAVE
from orchestrator.train.messages import (
    EpochEnded,
    Failed,
    Finished,
    Logged,
    Note,
    PlacementGroupMade,
    Raised,
    Started,
    StartFrom,
    Step,
    Stopped,
    Warned,
)
from orchestrator.train.rendezvous import wants_bf16
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.session import resumed
from orchestrator.train.training import Training, TrainingFailed
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


def test_a_resumed_run_keeps_the_settings_that_its_checkpoint_depends_on():
    config = digits()
    assert resumed(config, {"epochs": 40, "lr": config.lr}).epochs == 40
    with pytest.raises(ValueError, match="--lr: cannot change when a run is resumed, only --epochs"):
        resumed(config, {"lr": 0.5})


def test_precision_is_what_was_asked_for_and_auto_never_guesses_on_other_devices():
    assert wants_bf16("bf16", torch.device("cpu"))
    assert not wants_bf16("fp32", torch.device("cpu"))
    assert not wants_bf16("auto", torch.device("mps"))


def test_a_log_gets_plain_lines_and_a_terminal_one_live_line(monkeypatch):
    step = Step(
        epoch=0, epochs=2, step=1, steps=4, total_step=1, loss=2.0, lr=0.01, images_per_s=10.0, log=False
    )  # fmt: skip
    log = io.StringIO()
    view = TrainView()
    view.line = LiveLine(log)
    for number in range(1, 4):
        view.event(replace(step, step=number))
    assert log.getvalue() == "epoch 1/2  step 1/4  loss 2.0000  10 images/s  ETA --:--\n"  # one, not three in a moment
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    view.line = LiveLine(terminal)
    monkeypatch.setenv("COLUMNS", "20")
    view.event(replace(step, step=4))
    assert terminal.getvalue() == "\r\x1b[2Kepoch 1/2  step 4/4", "a longer line would leave a part behind"
    view.line.print("done")
    assert terminal.getvalue().startswith("\r")
    assert terminal.getvalue().endswith("\r\x1b[2Kdone\n")


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (5, 65, 3605)] == ["0:05", "1:05", "1:00:05"]


def test_notes_and_epochs_get_a_line_each_and_a_worker_s_log_none():
    log, view = io.StringIO(), TrainView()
    view.line = LiveLine(log)
    view.event(Note(text="a note"))
    view.event(Warned(text="a warning"))
    view.event(Logged(rank=1, level=10, name="x", text="a line of the log", at=0.0))
    metrics = {
        "epoch": 3, "step": 69, "train/loss": 1.5, "train/lr": 0.01, "train/images_per_s": 1234.5, "val/loss": 0.25,
        "val/top1_error": 0.0833, "val/top5_error": 0.002,
    }  # fmt: skip
    view.event(EpochEnded(epochs=9, metrics=metrics, history=[metrics]))
    assert log.getvalue().splitlines() == [
        "a note",
        "warning: a warning",
        "epoch 3/9  train loss 1.5000  val loss 0.2500  top-1 error 8.33 %  top-5 error 0.20 %  lr 0.01  1234 images/s",
    ]


# a run under way


class PlayedFit:
    """In place of RayTrainRun: `script` has what the mailbox holds at each poll, and when the fit is over."""

    made: list["PlayedFit"]
    scripts: deque

    def __init__(self, train_loop_config, plan, run, max_failures, pool, keep_pool):
        self.payload, self.plan, self.killed, self.pool = train_loop_config["payload"], plan, False, pool
        self.script, self.over, self.placement_group_id = deque(type(self).scripts.popleft()), False, None
        type(self).made.append(self)

    def wait(self, timeout_s):
        if self.script and self.script[0] == "over":
            self.over = True
        return self.over

    def drain(self):
        events = self.script.popleft() if self.script else []
        return [] if events == "over" else events

    def result(self):
        best = SimpleNamespace(path="somewhere/run/checkpoint-epoch-0003")
        last = SimpleNamespace(path="somewhere/run/checkpoint-epoch-0004")
        return SimpleNamespace(
            error=self.error, checkpoint=last, best_checkpoints=[1], get_best_checkpoint=lambda metric, mode: best
        )

    error = None

    def kill(self):
        self.killed = True


STARTED = Started(precision="fp32", device="cpu", nodes=["a", "a"], epoch=0, step=0, history=[])
STOPPED = Stopped(epoch=2, step=5)


class Run:
    """A training, its played fits and cluster, and what came of it."""

    def __init__(self, folder, monkeypatch):
        self.events, self.asked, self.folder, self.nodes = [], [], folder, [Node("a", 4), Node("b", 4)]
        self.fits, self.clock, self.free = [], 0.0, {"CPU": 0.0}
        monkeypatch.setattr(PlayedFit, "made", self.fits, raising=False)
        monkeypatch.setattr(ray_train, "RayTrainRun", PlayedFit)
        monkeypatch.setattr(ray, "get", lambda found: found)
        monkeypatch.setattr(ray, "nodes", list)
        monkeypatch.setattr(ray, "available_resources", lambda: self.free)
        monkeypatch.setattr("orchestrator.train.elastic.alive", lambda _: list(self.nodes))
        monkeypatch.setattr(training.time, "monotonic", self.tick)
        monkeypatch.setattr(training.time, "sleep", lambda seconds: None)
        self.set = lambda **attributes: [
            monkeypatch.setattr(PlayedFit, name, value, raising=False) for name, value in attributes.items()
        ]

    def tick(self):
        self.clock += 1.0
        return self.clock

    def begin(self, *scripts, start=None, **settings):
        self.set(scripts=deque(scripts))
        mailbox = SimpleNamespace(
            drain=SimpleNamespace(remote=lambda topic: self.fits[-1].drain()),
            ask_to_stop=SimpleNamespace(remote=lambda topic, how: self.asked.append(how)),
        )
        config = make_config(**{"workers": 2, "layout": "data", "device": "cpu"} | settings)
        run = RunFolder(self.folder, "run")
        self.training = Training(config, StoragePath("/data"), run, 10, mailbox=mailbox, start=start)
        return self

    def follow(self):
        self.training.follow(self.events.append)
        return [event for event in self.events if not isinstance(event, Note)]

    @property
    def notes(self):
        return [event.text for event in self.events if isinstance(event, Note)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_a_run_passes_on_its_events_and_ends_with_its_checkpoints(run, tmp_path):
    line = Logged(rank=1, level=10, name="x", text="a line", at=1.0)
    start = StartFrom(checkpoint="/other/checkpoint-epoch-0001", lr=0.02)
    run.begin([[], [STARTED, line], [STARTED], "over"], start=start)
    assert run.follow() == [
        replace(STARTED, workers=2),
        line,
        replace(STARTED, workers=2, lost=True),
        Finished(
            checkpoint=f"{tmp_path}/run/checkpoint-epoch-0004", best_checkpoint=f"{tmp_path}/run/checkpoint-epoch-0003"
        ),
    ]
    assert len(run.fits) == 1
    assert run.fits[0].payload.start == start
    assert run.fits[0].payload.config["device"] == "cpu"
    assert run.fits[0].killed


def test_a_placement_group_is_reported_when_it_is_made(run):
    run.set(placement_group_id=None)
    run.begin([[], [STARTED], [], "over"])
    run.fits[0].placement_group_id = "abc"
    assert run.follow()[0] == PlacementGroupMade(id="abc")
    assert sum(isinstance(event, PlacementGroupMade) for event in run.events) == 1


def test_a_failure_that_would_recur_ends_the_run_with_its_text(run):
    run.begin([[STARTED], [Failed(text="one"), Failed(text="loss is nan at step 7")]])
    with pytest.raises(TrainingFailed, match=r"^loss is nan at step 7$"):
        run.follow()
    assert run.fits[0].killed


def test_a_fit_that_ray_gives_up_fails_the_run_in_one_line(run):
    run.set(error=SimpleNamespace(worker_failures={1: ValueError("a\nb"), 0: ValueError("first\nwhy it failed")}))
    run.begin([[STARTED], "over"])
    with pytest.raises(JobError, match=r"^worker 0: ValueError: why it failed$"):
        run.follow()


def test_a_fit_whose_node_is_lost_is_followed_by_another_on_the_nodes_that_are_left(run):
    run.begin([[STARTED], [], []], [[STARTED], "over"], workers="1..2")
    run.fits[0].script.extend([[]] * 10)
    lose = run.fits[0].drain

    def drain():
        if len(run.fits[0].script) == 8:
            run.nodes = [Node("b", 1)]
        return lose()

    run.fits[0].drain = drain
    events = run.follow()
    assert [fit.plan.layout.workers for fit in run.fits] == [2, 1]
    assert run.fits[0].killed
    assert "1 node was lost; resuming from the last checkpoint" in run.notes
    assert [type(event) for event in events] == [Started, Started, Finished]
    assert not events[1].lost, "another fit is no crash"


def test_a_run_that_the_cluster_has_room_for_saves_and_grows(run):
    run.nodes = [Node("a", 1)]
    run.begin([[STARTED], *[[]] * 12, [STOPPED], "over"], [[STARTED], "over"], workers="1..2")
    assert run.fits[0].plan.layout.workers == 1
    run.nodes, run.free = [Node("a", 1), Node("b", 8)], {"CPU": 9.0}
    run.follow()
    assert run.asked == [SAVE]
    assert "the cluster has room for more workers; saving a checkpoint to grow" in run.notes
    assert [fit.plan.layout.workers for fit in run.fits] == [1, 2]


@pytest.mark.parametrize(("save", "asked"), [(True, [SAVE]), (False, [])])
def test_a_cancelled_run_saves_if_it_is_to(run, save, asked):
    run.begin([[STARTED], [], [], [], [STOPPED]])
    drain = run.fits[0].drain

    def cancel():
        if len(run.fits[0].script) == 3:
            run.training.cancel(save=save)
        return drain()

    run.fits[0].drain = cancel
    run.follow()
    assert run.asked == asked
    assert run.fits[0].killed
    assert not any(isinstance(event, Finished) for event in run.events)


def test_a_cancelled_run_whose_workers_are_to_be_kept_lets_them_end(run):
    run.begin([[STARTED], [], []])
    run.training._keep_pool = True
    run.training.cancel(save=False)
    run.training._worker_nodes = ["a"]
    run.follow()
    assert run.asked == [DROP]


def test_what_workers_say_between_the_last_look_and_the_end_of_their_fit_is_heard(run):
    line = Logged(rank=0, level=10, name="x", text="the last line", at=1.0)
    run.begin([[STARTED], "over", [line, Failed(text="loss is nan at step 7")]])
    with pytest.raises(TrainingFailed, match=r"^loss is nan at step 7$"):
        run.follow()
    assert run.events[-2:] == [line, Failed(text="loss is nan at step 7")]


@pytest.mark.parametrize(
    ("script", "error", "warning"),
    [
        (["over", []], None, None),  # it came to its end by itself, at that moment
        (["over", [STOPPED]], None, None),
        ([[], [], []], None, "the workers did not stop within 60 s; their work since the last checkpoint is lost"),
        (
            ["over", []],
            SimpleNamespace(worker_failures={0: OSError("no space left")}),
            "worker 0: OSError: no space left; their work since the last checkpoint is lost",
        ),
    ],
)
def test_a_run_that_is_interrupted_says_that_work_is_lost_where_it_is(run, monkeypatch, script, error, warning):
    run.begin([[STARTED], *script])
    if error is not None:
        run.set(error=error)
    fit, deliver = run.fits[0], run.training._deliver

    def interrupt(on_event):
        reports = deliver(on_event)
        if len(fit.script) == len(script) and not run.asked:
            raise Interrupted(signal.SIGINT)
        return reports

    fit.wait = lambda timeout_s: bool(timeout_s and run.asked and PlayedFit.wait(fit, timeout_s)) or fit.over
    monkeypatch.setattr(run.training, "_deliver", interrupt)
    with pytest.raises(Interrupted):
        run.follow()
    assert run.asked == [SAVE]
    assert [event.text for event in run.events if isinstance(event, Warned)] == ([warning] if warning else [])


@pytest.mark.parametrize(("looks", "said"), [(1, 0), (2, 1)])
def test_a_stop_that_takes_a_while_is_said_once_and_a_quick_one_is_not(run, looks, said):
    """looks: how often the fit is waited for until its workers have ended."""
    run.begin([[STARTED]])
    run.training._worker_nodes = ["a"]
    waited: list[float] = []

    def wait(timeout_s):
        waited.append(timeout_s)
        run.fits[0].over = sum(each > 0 for each in waited) >= looks
        return run.fits[0].over

    run.fits[0].wait = wait
    run.training._stop(run.events.append, SAVE)
    assert [each for each in waited if each] == [2.0, 60.0][:looks]
    assert run.notes == ["stopping: the workers end their step and save a checkpoint"] * said
    run.training._stop(run.events.append, DROP)
    assert len(run.notes) == said


# attempts of a fit


def test_an_exception_of_ours_is_told_by_its_line_and_attempt_and_only_what_vanished_is_lost(run):
    raised = [Raised(rank=1, text="ZeroDivisionError: division by zero"), Raised(rank=0, text="KeyError: 'x'")]
    run.begin([[STARTED], raised, [STARTED], [], [STARTED], "over"], max_failures=4)
    events = run.follow()
    told = "attempt 1 of 5 failed: worker 1: ZeroDivisionError: division by zero; resuming from the last checkpoint"
    assert [event.text for event in events if isinstance(event, Warned)] == [told]
    assert [event.lost for event in events if isinstance(event, Started)] == [False, False, True]


def test_the_error_of_the_last_attempt_is_the_run_s_and_says_which_attempt_it_was(run):
    run.set(error=SimpleNamespace(worker_failures={0: RuntimeError("[gloo/pair.cc:1] closed"), 1: KeyError("x")}))
    raised = [Raised(rank=1, text="KeyError: 'x'")]
    run.begin([[STARTED], raised, [STARTED], raised, "over"], max_failures=1)
    with pytest.raises(JobError, match=r"^worker 1: KeyError: 'x' \(attempt 2 of 2\)$"):
        run.follow()
    assert [event.text for event in run.events if isinstance(event, Warned)] == [
        "attempt 1 of 2 failed: worker 1: KeyError: 'x'; resuming from the last checkpoint"
    ]


def test_attempts_that_fail_before_their_workers_are_at_work_are_counted():
    attempts = Attempts(3)
    found = [attempts.raised(Raised(rank=rank, text="ValueError: no")) for rank in (0, 1, 1, 0, 0)]
    assert [text and text[:14] for text in found] == ["attempt 1 of 3", None, "attempt 2 of 3", None, None]
    assert attempts.of_the_last("no room") == "no room (attempt 3 of 3)"
    assert Attempts(3).of_the_last("no room") == "no room"


@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (ValueError("why:\n  this"), "ValueError: this"),
        (AssertionError(), "AssertionError"),
        (JobError("one line"), "one line"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), None),
        (torch.distributed.DistBackendError("NCCL error"), None),
    ],
)
def test_a_worker_reports_its_own_errors_and_not_those_of_an_exchange(monkeypatch, error, sent):
    put = []
    mailbox = SimpleNamespace(put=SimpleNamespace(remote=lambda topic, event: put.append((topic, event))))
    monkeypatch.setattr("ray.wait", lambda refs, timeout: None)
    DriverLink(mailbox, "topic", 1).report_error(error)
    assert put == ([("topic", Raised(rank=1, text=sent))] if sent else [])
