"""What a worker records, without Ray: which steps, what is in them, and that nothing of it changes what it computes."""

import numpy as np
import pytest
import torch

import alexnet
from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits
from orchestrator.train.model import build_net
from orchestrator.train.profile import NoProfile, operations_of, profile_of
from orchestrator.train.profile_trace import Part, summary
from orchestrator.train.step import WorkerStep

STEPS = 6  # of an epoch
CPU = torch.device("cpu")


def train(num_profiled, epochs, steps=STEPS):
    """The parts that were sent, when (in steps made), the losses and the net, of a small net's training."""
    config = digits().changed(width=0.0625, global_batch_size=4)
    net = ShardedNet(build_net(config, 10).double(), Layout("single", 1))
    optimizer = alexnet.PaperSGD(net.parameters(), config.lr, config.momentum, config.weight_decay)
    rows = {"train": 4 * steps, "val": 4 * steps}
    step = WorkerStep(net, optimizer, torch.full((72, 72, 3), 100.0), config, rows, bf16=False)
    sent, losses, random = [], [], np.random.default_rng(0)
    profile = profile_of(num_profiled, net, CPU, lambda event: sent.append((len(losses), event)))
    step.span = profile.span
    batches = [
        {
            "image": random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8),
            "top": np.full(4, 2), "left": np.full(4, 3), "flip": np.zeros(4, bool), "label": np.arange(4),
        }
        for _ in range(steps)
    ]  # fmt: skip
    for epoch in range(epochs):
        for number, batch in enumerate(profile.steps(iter(batches), len(losses))):
            losses.append(float(step.update(batch, number, len(losses))[0]))
        with profile.span("validation"):
            for number, batch in enumerate(profile.batches(iter(batches))):
                step.evaluate(batch, number)
        with profile.span("checkpoint"):
            pass
        profile.epoch_ended(is_last=epoch + 1 == epochs)
    hooks = [*net.part.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooks)
    return [(made, Part.unpacked(event.part)) for made, event in sent], losses


def names(part):
    return [step.name for step in part.steps]


def outside(part):
    return [span.name for span in part.spans if span.name in ("validation", "checkpoint")]


def test_the_steps_after_the_first_three_are_recorded_and_the_end_of_their_epoch():
    sent, _ = train(2, epochs=2)
    assert [made for made, _ in sent] == [5, 6], "at once, and when the epoch has ended"
    (_, part), (_, more) = sent
    assert names(part) == ["4", "5"]
    assert (outside(part), outside(more)) == ([], ["validation", "checkpoint"])
    assert (names(more), more.operations) == ([], [])
    for step in part.steps:
        inside = [span.name for span in part.spans if step.start <= span.start < step.end]
        assert inside == ["data", "copy", "exchange", "forward", "backward", "update"]
        assert all(step.start <= span.end <= step.end for span in part.spans if step.start <= span.start < step.end)
        ran = {o.name for o in part.operations if step.start <= o.start and o.end <= step.end}
        assert {"aten::convolution", "aten::convolution_backward", "conv1", "fc8", "_LocalResponseNorm"} <= ran
    assert part.steps[0].end <= part.steps[1].start
    assert all(o.thread == "main" for o in part.operations)


def test_a_recording_goes_on_over_the_end_of_an_epoch_without_the_operators_of_its_validation():
    sent, _ = train(5, epochs=3)
    (made, part), (later, more) = sent
    assert (made, later) == (8, 12)
    assert names(part) == ["4", "5", "6", "7", "8"]
    assert (outside(part), outside(more)) == (["validation", "checkpoint"],) * 2
    within = [any(step.start <= o.start < step.end for step in part.steps) for o in part.operations]
    assert all(within)
    calls = [o.name for o in part.operations].count("aten::convolution_backward")
    assert calls == 5 * 5, "in each step; the net has five"


def test_the_parts_of_a_step_are_its_whole_time():
    [(_, part), _] = train(2, epochs=1)[0]
    [worker] = summary([part])["workers"]
    parts = ("compute", "exchange", "data_wait", "host", "idle")
    assert sum(worker[f"{name}_ms"] for name in parts) == pytest.approx(worker["step_ms"], abs=0.01)
    assert worker["compute_ms"] > 0
    assert worker["exchange_ms"] == 0


def test_more_steps_than_a_run_has_are_those_that_it_has():
    [(made, part)] = train(100, epochs=2)[0]
    assert made == 12
    assert names(part) == [str(number) for number in range(4, 13)]
    assert outside(part) == ["validation", "checkpoint"] * 2


def test_a_run_of_no_more_than_the_first_steps_sends_nothing():
    assert train(2, epochs=1, steps=3)[0] == []
    assert train(2, epochs=3, steps=1)[0] == []


def test_no_loss_changes_in_any_digit():
    assert train(0, epochs=2)[1] == train(4, epochs=2)[1]


def test_without_a_profile_the_loop_has_its_own_iterators_and_one_empty_block():
    profile = profile_of(0, None, CPU, None)
    assert isinstance(profile, NoProfile)
    batches = iter([])
    assert profile.steps(batches, 0) is batches
    assert profile.batches(batches) is batches
    assert profile.span("forward") is profile.span("backward")


def test_pytorch_s_times_become_nanoseconds_by_rank_0_s_clock():
    trace = {
        "baseTimeNanoseconds": 1_790_857_026_000_000_000,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 9, "tid": 0},
            {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "x", "ts": 1, "dur": 2},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 9, "tid": 11, "ts": 4888555411334.805, "dur": 2.5,
             "args": {"External id": 7, "Sequence number": 3}},
            {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 20, "ts": 4888555411335.0, "dur": 1.0,
             "args": {"External id": 7}},
        ],
    }  # fmt: skip
    start = 1_790_857_026_000_000_000 + 4_888_555_411_334_805 - 1000
    assert operations_of(trace, main=11, ahead=1000) == [
        ("cpu_op", "aten::mm", "main", start, start + 2500, 7, 3),
        ("kernel", "gemm", "20", start + 195, start + 1195, 7, -1),
    ]
