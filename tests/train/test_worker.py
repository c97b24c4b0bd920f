"""A worker without Ray: when its loop reads losses, reports, warns and stops; its step; its link to the driver."""

import logging
import math
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import alexnet
from alexnet import augment
from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits
from orchestrator.data.order import rank_slice
from orchestrator.train import checkpoints, driver_link
from orchestrator.train import worker as loop
from orchestrator.train.driver_link import STOP_CODES, DriverLink
from orchestrator.train.messages import (
    Event,
    Failed,
    Logged,
    Stopped,
    TrialEvent,
    TrialStarted,
    Warned,
    WorkerPayload,
)
from orchestrator.train.model import build_net
from orchestrator.train.rendezvous import check_placement
from orchestrator.train.step import WorkerStep
from orchestrator.train.stuck import StuckWatch

STEPS, ROWS = 130, 130 * 64


class Link:
    """Keeps what is reported; asks to stop once `stop_at` polls were made."""

    def __init__(self, stop_at=math.inf):
        self.rank, self.events, self.polls, self.stop_at = 0, [], 0, stop_at

    def report_event(self, event):
        self.events.append(event)

    def poll_stop_request(self):
        self.polls += 1
        return STOP_CODES["drop"] if self.polls >= self.stop_at else 0.0


class Losses:
    """A step that trains nothing: step n of the run has the loss n."""

    def __init__(self, device, of):
        self.device, self.of, self.reads = device, of, []
        self.net, self.rows, self.config = SimpleNamespace(layout=Layout("single", 1)), {"train": ROWS}, digits()

    def on_device(self, batches):
        return batches

    def update(self, batch, step, total_step):
        return torch.tensor(self.of(total_step) * 64, dtype=torch.float64), 64

    def all_reduce(self, pending):
        self.reads.append(len(pending))
        return WorkerStep.all_reduce(self, pending)

    def size_of(self, split, step):
        return WorkerStep.size_of(self, split, step)


def make_worker(device, first, *, epoch=0, of=float, stop_at=math.inf, warmup=0, monkeypatch):
    """A worker that resumes `first` steps into an epoch."""
    monkeypatch.setattr(loop, "SHOW_EVERY_S", math.inf)  # no lines that depend on the clock
    worker = loop.Worker.__new__(loop.Worker)
    total = epoch * STEPS + first
    worker.config, worker.link, worker.device = digits(), Link(stop_at), SimpleNamespace(type=device)
    worker.net = SimpleNamespace(train=lambda: None)
    worker.optimizer, worker.warmup = SimpleNamespace(param_groups=[{"lr": 0.01}]), alexnet.Warmup(warmup)
    worker.step, worker.stuck = Losses(torch.device("cpu"), of), StuckWatch(10, "he")
    losses = [of(step) for step in range(epoch * STEPS, total)]
    worker.state = checkpoints.State(epoch=epoch, step=total, losses=losses)
    worker.feed = SimpleNamespace(
        num_steps=lambda split: STEPS, batches=lambda split, epoch, first: iter(range(first, STEPS))
    )
    return worker


def test_on_a_gpu_the_loss_is_logged_at_the_same_steps_wherever_the_epoch_was_resumed(monkeypatch):
    wanted = {}
    for device in ("cpu", "cuda"):
        for epoch in (0, 1):
            for first in (0, 1, 7, 19, 20, 21, 110, 125, 129):
                worker = make_worker(device, first, epoch=epoch, monkeypatch=monkeypatch)
                metrics = worker.train_epoch(epoch)
                points = {event.step: event for event in worker.link.events if event.kind == "step" and event.log}
                for step, event in points.items():
                    assert event.loss == pytest.approx(epoch * STEPS + step - 10.5)  # mean of the last 20
                    assert event.total_step == epoch * STEPS + step
                wanted.setdefault(epoch, set(points))
                assert set(points) == {step for step in wanted[epoch] if step > first}, (device, epoch, first)
                assert metrics["train/loss"] == epoch * STEPS + (STEPS - 1) / 2
                assert sum(worker.step.reads) == STEPS - first
    assert wanted[0] == wanted[1] == {20, 40, 60, 80, 100, 120}


def test_on_a_gpu_losses_are_read_back_every_20_steps_only(monkeypatch):
    worker = make_worker("cuda", 7, monkeypatch=monkeypatch)
    worker.train_epoch(0)
    assert worker.step.reads == [13, 20, 20, 20, 20, 20, 10]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("epoch", "first"), [(0, 0), (0, 7), (0, 45), (0, 50), (0, 59), (0, 101), (1, 0), (1, 13)])
def test_a_stuck_net_is_noticed_within_an_epoch_wherever_it_was_resumed(device, epoch, first, monkeypatch):
    """At the next multiple of 50 updates, or on a GPU when losses are next read; at the latest at the epoch's end."""
    worker = make_worker(device, first, epoch=epoch, of=lambda step: math.log(10), monkeypatch=monkeypatch)
    due = 50 * (worker.state.step // 50 + 1) - epoch * STEPS  # as a step of the epoch
    if device == "cuda":
        due = -(-due // 20) * 20
    due = min(due, STEPS)
    seen = []
    worker.link.report_event = lambda event: seen.append((worker.state.step - epoch * STEPS, event))
    worker.train_epoch(epoch)
    warned = [step for step, event in seen if isinstance(event, Warned)]
    assert warned == [due]


@pytest.mark.parametrize(("device", "stops_after"), [("cpu", 33), ("cuda", 40)])
def test_a_stop_request_ends_the_epoch_when_losses_are_next_read(device, stops_after, monkeypatch):
    worker = make_worker(device, 0, stop_at=33, monkeypatch=monkeypatch)
    with pytest.raises(loop.StopRequested):
        worker.train_epoch(0)
    assert (worker.state.step, len(worker.state.losses)) == (stops_after, stops_after)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_diverged_net_is_reported_with_its_step_and_its_losses_before_are_kept(device, monkeypatch):
    worker = make_worker(device, 7, of=lambda step: math.nan if step >= 44 else 1.0, monkeypatch=monkeypatch)
    with pytest.raises(loop.Diverged, match=r"loss is nan at step 45 \(epoch 1\).* lower --lr than 0\.01"):
        worker.train_epoch(0)
    assert worker.state.losses == [1.0] * 44


@pytest.mark.parametrize(
    ("step", "loss", "init", "words"),
    [
        (49, 2.3026, "paper", None),
        (50, 2.3026, "paper", "--init he --pixel-scale 0.0156"),
        (50, 2.2, "paper", None),
        (500, math.log(10), "he", "another --lr"),
    ],
)
def test_a_net_that_only_guesses_gets_one_warning(step, loss, init, words):
    watch = StuckWatch(10, init)
    texts = [watch.check(step, [9.0] * 10 + [loss] * 20) for _ in range(2)]
    assert texts[1] is None
    if words is None:
        assert texts[0] is None
    else:
        assert f"after {step} steps" in texts[0]
        assert "no better than guessing, ln(10) = 2.3026" in texts[0]
        assert words in texts[0]
        assert ("--init" in texts[0]) == (init == "paper")  # no remedy that is already in use


def make_step(config, rows):
    net = ShardedNet(build_net(config, 10).double(), Layout("single", 1))
    optimizer = alexnet.PaperSGD(net.parameters(), config.lr, config.momentum, config.weight_decay)
    mean = torch.full((72, 72, 3), 100.0)
    return WorkerStep(net, optimizer, mean, config, rows, bf16=False)


def make_batch(random, size):
    return {
        "image": random.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8),
        "top": random.integers(0, 9, size, dtype=np.int32), "left": random.integers(0, 9, size, dtype=np.int32),
        "flip": random.integers(0, 2, size).astype(bool), "label": random.integers(0, 10, size),
    }  # fmt: skip


@pytest.mark.parametrize("preset", alexnet.PRESETS)
def test_a_step_is_the_paper_s_update_on_the_mean_loss_of_the_global_batch(preset):
    """A short last batch of 6 images, against the same step written out."""
    config = digits().changed(preset=preset, dropout=0.0, global_batch_size=8, workers=1, layout="single")
    batch, step = make_batch(np.random.default_rng(0), 6), make_step(config, {"train": 14, "val": 8})
    assert [step.size_of("train", number) for number in (0, 1)] == [8, 6]
    twin = build_net(config, 10).double()
    x = (torch.from_numpy(batch["image"]).float() - 100).mul(config.pixel_scale).permute(0, 3, 1, 2).double()
    labels = torch.from_numpy(batch["label"])
    loss = torch.nn.functional.cross_entropy(twin(x), labels)
    loss.backward()
    loss_sum, images = step.update(batch, 1, 0)
    assert (images, loss_sum.dtype) == (6, torch.float64)
    torch.testing.assert_close(loss_sum, loss.detach() * 6)
    for ours, theirs in zip(step.net.parameters(), twin.parameters(), strict=True):
        expected = theirs - config.lr * theirs.grad - config.weight_decay * config.lr * theirs
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
        assert ours.grad is None
    assert step.all_reduce([(loss_sum, 6, 1.0), (loss_sum * 2, 8, 0.0)]) == [
        (loss_sum.item(), 6.0, 1.0), (2 * loss_sum.item(), 8.0, 0.0),
    ]  # fmt: skip


def test_evaluation_counts_losses_and_errors_and_changes_nothing():
    config, rows = digits().changed(global_batch_size=8, workers=1, layout="single"), {"train": 14, "val": 8}
    batch, step = make_batch(np.random.default_rng(1), 8), make_step(config, rows)
    step.net.eval()
    before = {name: tensor.clone() for name, tensor in step.net.state_dict().items()}
    scores, labels = step.scores("val", 0, batch, 0)
    loss, top1, top5, images, *by_class = step.evaluate(batch, 0).tolist()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(scores, labels, reduction="sum").item())
    assert [top1, top5] == alexnet.count_errors(scores, labels).tolist()
    assert images == 8
    wrong = scores.argmax(1) != labels
    assert by_class == [int(wrong[labels == label].sum()) for label in range(10)]
    assert sum(by_class) == top1 > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in step.net.state_dict().items())


def test_images_that_come_whole_are_cut_like_those_that_come_cut():
    """In parts, too, each of which has its own of what belongs to its images."""
    config = digits().changed(global_batch_size=8, workers=1, layout="single")
    random, rows = np.random.default_rng(3), {"train": 14, "val": 8}
    whole = make_batch(random, 8) | {
        "image": random.integers(0, 256, (8, 72, 72, 3), dtype=np.uint8),
        "shift": random.normal(0, 30, (8, 3)).astype(np.float32),
    }
    draws = augment.Draws(whole["top"], whole["left"], whole["flip"], whole["shift"])
    cut = {name: column for name, column in whole.items() if name != "shift"}
    cut["image"] = augment.crop_flip_shift(whole["image"], draws, whole["shift"], 64)
    losses = []
    for batch, accumulate in ((whole, 1), (cut, 1), (whole, 4), (cut, 4)):
        losses.append(make_step(config.changed(accumulate=accumulate), rows).update(batch, 0, 0)[0].item())
    assert losses[0] == losses[1]
    assert losses[2] == losses[3] == pytest.approx(losses[0], rel=1e-12)


@pytest.mark.parametrize("rank", range(4))
def test_only_a_group_s_first_worker_counts_its_images(rank):
    config, rows = digits().changed(global_batch_size=8), {"train": 14, "val": 14}
    step = make_step(config, rows)
    net = step.net
    layout = Layout("columns", 4)
    called = type("Net", (SimpleNamespace,), {"__call__": lambda self, *given: net(*given)})
    step.net = called(
        layout=layout, rank=rank, is_group_leader=rank % 2 == 0, zero_grad=net.zero_grad,
        share_images=lambda rows, sizes: torch.cat([rows] * 3)[: sum(sizes)],
        share_labels=lambda rows, sizes: torch.cat([rows] * 3)[: sum(sizes)],
    )  # fmt: skip
    slices = [rank_slice(1, 14, 8, other, 4) for other in layout.group_of(rank)]
    lo, hi = slices[rank % 2]
    loss, images = step.update(make_batch(np.random.default_rng(2), hi - lo), 1, 0)
    group = sum(last - first for first, last in slices)
    assert images == (group if rank % 2 == 0 else 0)
    assert (loss > 0) == (rank % 2 == 0)
    assert (step.evaluate(make_batch(np.random.default_rng(2), hi - lo), 1)[3] > 0) == (rank % 2 == 0)


def test_workers_that_cannot_train_together_where_they_are_get_one_line():
    columns, data = Layout("columns", 4), Layout("data", 4)
    check_placement(columns, ["a", "a", "b", "b"], [None] * 4, spread=False)
    check_placement(columns, ["a", "b", "b", "a"], [None] * 4, spread=True)
    check_placement(data, ["a", "b", "c", "d"], ["0", "1", "2", "3"], spread=False)
    with pytest.raises(ValueError, match=r"workers 2 and 3 hold the columns of one net but are on different nodes"):
        check_placement(columns, ["a", "a", "b", "c"], [None] * 4, spread=False)
    with pytest.raises(ValueError, match=r"workers 1 and 3 share one GPU.*or use --device cpu"):
        check_placement(data, ["a"] * 4, ["0", "1", "2", "1"], spread=False)


class Actor:
    """The mailbox, and what of Ray a link uses: replies arrive when `deliver` is called."""

    def __init__(self):
        self.sent, self.replies, self.broken = [], {}, False
        self.put = SimpleNamespace(remote=self._put)

    def _put(self, topic, event):
        if self.broken:
            raise RuntimeError("the mailbox is gone")
        self.sent.append((topic, event))
        return len(self.sent)

    def wait(self, refs, timeout):
        done = [ref for ref in refs if ref in self.replies]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref):
        return self.replies.get(ref)


@pytest.fixture
def actor(monkeypatch):
    actor = Actor()
    monkeypatch.setattr(driver_link, "ray", actor)
    return actor


EVENT = Stopped(epoch=1, step=2)


def test_only_rank_0_reports_and_a_late_reply_to_an_event_is_not_lost(actor):
    links = [DriverLink(actor, "topic", rank) for rank in range(2)]
    for link in links:
        link.report_event(EVENT)
    assert actor.sent == [("topic", EVENT)]
    assert links[0].poll_stop_request() == 0.0
    actor.replies[1] = "save"
    links[0].report_event(EVENT)  # whose own reply has not come
    assert links[0].poll_stop_request() == STOP_CODES["save"]
    assert links[1].poll_stop_request() == 0.0
    assert links[0].all_reduce_stop(torch.device("cpu"), 1) == STOP_CODES["save"]


def test_every_rank_logs_and_a_mailbox_that_is_gone_breaks_nothing(actor):
    link = DriverLink(actor, "topic", 3)
    link.log(logging.INFO, "ray", "a line", 12.5)
    assert actor.sent == [("topic", Logged(rank=3, level=logging.INFO, name="ray", text="a line", at=12.5))]
    link.flush_log()
    actor.broken = True
    link.log(logging.INFO, "ray", "a line", 12.5)
    actor.wait = None
    link.flush_log()


@pytest.fixture
def payload(actor, monkeypatch):
    monkeypatch.setattr(loop.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(loop, "Worker", lambda config, folder, payload, link: _raise())
    yield WorkerPayload(
        config=digits().model_dump(), data="nowhere", layout="single", mailbox=actor, topic="topic",
        run="runs/run", start=None, feed_cpus=1.0, feed_tasks=1, num_concurrent=1,
    )  # fmt: skip
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__module__.startswith("orchestrator")]:
        root.removeHandler(handler)


def _raise():
    raise FAILURES[0]


FAILURES = [RuntimeError("a broken worker")]


def test_the_traceback_of_a_worker_that_fails_is_in_the_log_with_its_rank(payload, actor, monkeypatch):
    monkeypatch.setattr(loop, "_train", lambda payload, link: _raise())
    with pytest.raises(RuntimeError, match="a broken worker"):
        loop.train_worker({"payload": payload})
    lines = [event for _, event in actor.sent if isinstance(event, Logged)]
    assert len(lines) == 1
    assert (lines[0].rank, lines[0].level) == (1, logging.ERROR)
    assert "Traceback" in lines[0].text
    assert lines[0].text.endswith("RuntimeError: a broken worker")


def test_impossible_settings_end_all_workers_with_one_line_from_any_rank(payload, actor, monkeypatch):
    monkeypatch.setitem(globals(), "FAILURES", [ValueError("fc6 has 3 units")])
    loop.train_worker({"payload": payload})
    assert [event for _, event in actor.sent if isinstance(event, Failed)] == [Failed(text="fc6 has 3 units")]


def test_events_name_their_kind():
    events = (*typing.get_args(Event), TrialStarted, TrialEvent)
    kinds = [event.kind for event in events]
    assert len(set(kinds)) == len(kinds)
    for event in events:  # the class's constant, and what the field says
        assert typing.get_type_hints(event)["kind"] == typing.Literal[event.kind]
