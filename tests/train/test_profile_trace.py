"""From what workers recorded to a trace and a summary: known times in, exact numbers out."""

import gzip
import json

import pytest
from conftest import assert_nested

from orchestrator.train import profile_trace
from orchestrator.train.messages import Profiled
from orchestrator.train.profile_trace import (
    PARTS,
    Collector,
    Operation,
    Part,
    Span,
    clock_offset,
    lines,
    summary,
    trace,
    union,
    without,
)

MS = 1_000_000
BASE = 1_790_000_000 * 1000 * MS  # as of time.time_ns()
FUNCTION = "autograd::engine::evaluate_function: "


def span(name, start, end):
    return Span(name, BASE + round(start * MS), BASE + round(end * MS))


def op(name, start, end, *, thread="main", category="cpu_op", launch=0, sequence=-1):
    return Operation(category, name, thread, BASE + round(start * MS), BASE + round(end * MS), launch, sequence)


def layer(name, start, end):
    return op(name, start, end, category="user_annotation")


def gloo(name, start, end, thread="77"):
    return op(f"gloo:{name}", start, end, thread=thread, category="user_annotation")


def part(rank=0, late=0.0):
    """A step of 100 ms on a CPU. late: milliseconds that its first exchange takes longer, and the step with it."""
    end = 100 + late
    return Part(
        rank,
        ["conv1", "fc8"],
        [span("4", 0, end)],
        [
            span("data", 0, 5),
            span("copy", 5, 6),
            span("forward", 6, 40 + late),
            span("backward", 40 + late, 90 + late),
            span("exchange", 92 + late, 98 + late),
            span("validation", 200, 300),
            span("data", 210, 220),
            span("checkpoint", 310, 312),
        ],
        [
            op("_GatherRows", 6, 12, sequence=1),  # images, for conv1
            op("c10d::_allgather_base_", 7, 8),
            gloo("all_gather", 8, 12),
            op("aten::copy_", 9, 10, thread="77"),  # of the exchange: no computation of the worker's
            layer("conv1", 12, 20),
            op("aten::conv2d", 13, 20, sequence=2),
            op("aten::mkldnn_convolution", 14, 19),
            layer("fc8", 20, 40 + late),
            op("aten::mm", 20, 30, sequence=3),
            op("_SumPartial", 30, 40 + late, sequence=4),
            op("aten::clone", 30, 31),
            op("c10d::allreduce_", 31, 32),
            gloo("all_reduce", 32, 38 + late),
            op(FUNCTION + "MmBackward0", 40 + late, 60 + late, sequence=3),
            op("aten::mm", 40 + late, 60 + late),
            op(FUNCTION + "_GatherRowsBackward", 60 + late, 70 + late, sequence=1),
            op("c10d::alltoall_base_", 61 + late, 62 + late),
            gloo("all_to_all", 62 + late, 66 + late),
            op("aten::sum", 66 + late, 69 + late),
            op(FUNCTION + "torch::autograd::AccumulateGrad", 70 + late, 75 + late),
            op("aten::add_", 70 + late, 73 + late),
            op("c10d::allreduce_", 73 + late, 74 + late),
            gloo("all_reduce", 74 + late, 85 + late, thread="78"),  # hidden from 75 to 80, exposed from 80 to 85
            op("aten::mm", 75 + late, 80 + late),
            op("c10d::allreduce_", 93 + late, 94 + late),
            gloo("all_reduce", 94 + late, 98 + late),
        ],
    )


def test_every_instant_of_a_step_counts_once_for_the_first_part_that_applies():
    [worker] = summary([part()])["workers"]
    assert worker == {
        "rank": 0,
        "step_ms": 100.0,
        "compute_ms": 49.0,  # 13-20, 20-30, 30-31, 40-60, 66-69, 70-73, 75-80, without what waits for exchanges
        "exchange_ms": 24.0,  # 8-12, 32-38, 62-66, 74-75, 80-85, 94-98: what no computation hides
        "data_wait_ms": 5.0,
        "host_ms": 18.0,  # the rest of the spans' 96 ms
        "idle_ms": 4.0,  # 90-92, 98-100
        "spans_ms": {"data": 5.0, "copy": 1.0, "forward": 34.0, "backward": 50.0, "exchange": 6.0},
        "outside_ms": {"validation": 100.0, "checkpoint": 2.0},
    }
    assert sum(worker[f"{name}_ms"] for name in PARTS) == worker["step_ms"]


def test_times_are_means_over_steps_and_those_of_operators_over_workers_too():
    found = summary([part(0), part(1, late=10)])
    assert (found["steps"], found["first_step"]) == (1, 4)
    assert [worker["step_ms"] for worker in found["workers"]] == [100.0, 110.0]
    assert [worker["exchange_ms"] for worker in found["workers"]] == [24.0, 34.0]
    assert found["operators"][0] == {"name": "aten::mm", "ms": 35.0, "calls": 3.0, "share": 0.3333}
    own = {row["name"]: row["ms"] for row in found["operators"]}
    assert (own["aten::conv2d"], own["aten::mkldnn_convolution"]) == (2.0, 5.0), "without what they call"
    assert not any("c10d" in name or "Gather" in name or "copy_" in name for name in own)
    first, second = part(0), part(0)
    second.steps[0] = Span("5", *second.steps[0][1:])
    for values in (second.steps, second.spans, second.operations):
        values[:] = [value._replace(start=value.start + 100 * MS, end=value.end + 100 * MS) for value in values]
    two = Part(0, first.layers, first.steps + second.steps, first.spans[:5] + second.spans[:5],
               first.operations + second.operations)  # fmt: skip
    [worker] = summary([two])["workers"]
    assert (worker["step_ms"], worker["compute_ms"], worker["idle_ms"]) == (100.0, 49.0, 4.0)


def test_an_exchange_is_told_by_what_it_is_for():
    found = {
        (row["for"], row["pass"], row["collective"]): (row["ms"], row["calls"]) for row in summary([part()])["exchange"]
    }
    assert found == {
        ("conv1", "forward", "allgather"): (4.0, 1.0),
        ("conv1", "backward", "alltoall"): (4.0, 1.0),
        ("fc8", "forward", "allreduce"): (6.0, 1.0),
        ("gradients", "backward", "allreduce"): (11.0, 1.0),
        ("losses", "forward", "allreduce"): (4.0, 1.0),
    }


def test_on_a_gpu_kernels_compute_and_operators_are_the_host():
    device = {"thread": "7", "category": "kernel"}
    found = summary([
        Part(
            0, ["conv1"], [span("9", 0, 20)], [span("data", 0, 8), span("forward", 8, 16)],
            [
                layer("conv1", 8, 12), op("aten::conv2d", 8, 10, launch=5),
                op("c10d::allreduce_", 10, 11, launch=6),
                op("sgemm", 2, 5, launch=4, **device),  # launched before; the host waits for data meanwhile
                op("sgemm", 9, 14, launch=5, **device),
                op("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 12, 18, launch=6, thread="20", category="kernel"),
            ],
        )
    ])  # fmt: skip
    [worker] = found["workers"]
    assert [worker[f"{name}_ms"] for name in PARTS] == [8.0, 4.0, 5.0, 1.0, 2.0]
    assert [(row["name"], row["ms"]) for row in found["operators"]] == [("aten::conv2d", 5.0), ("sgemm", 3.0)]
    [exchange] = found["exchange"]
    assert (exchange["for"], exchange["collective"], exchange["ms"]) == ("conv1", "allreduce", 6.0)


def test_the_terminal_shows_a_row_for_every_worker_and_operator():
    found = lines(summary([part(0), part(1)]))
    assert found[:4] == [
        "profile of step 4, 2 workers; ms per step",
        "worker  step   compute     exchange    data wait  host        idle",
        "0       100.0  49.0 (49%)  24.0 (24%)  5.0 (5%)   18.0 (18%)  4.0 (4%)",
        "1       100.0  49.0 (49%)  24.0 (24%)  5.0 (5%)   18.0 (18%)  4.0 (4%)",
    ]
    assert found[4:6] == [
        "dearest operators         ms    share  calls",
        "aten::mm                  35.0  35.0%  3",
    ]


def test_the_trace_has_a_process_for_every_worker_and_its_spans_nest():
    events = json.loads(gzip.decompress(trace([part(0), part(1)])))["traceEvents"]
    named = {(e["name"], e["pid"]): e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert {named["process_name", pid] for pid in (1, 2)} == {"worker 0", "worker 1"}
    threads = {e["tid"]: (e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert sorted(threads.values()) == [
        (pid, name) for pid in (1, 2) for name in ("exchange 1", "exchange 2", "operators", "steps")
    ]
    assert_nested(events)
    one = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert min(e["ts"] for e in one) == 0
    step = next(e for e in one if e["name"] == "step 4")
    assert (step["ts"], step["dur"]) == (0, 100_000), "in microseconds"
    assert [e["name"] for e in one if threads[e["tid"]][1] == "exchange 1" and "args" in e] == [
        "conv1: allgather", "fc8: allreduce", "conv1: alltoall", "losses: allreduce",
    ]  # fmt: skip
    assert next(e for e in one if e["name"] == "aten::mkldnn_convolution")["args"] == {"layer": "conv1"}


def test_time_in_which_nothing_was_recorded_is_cut_from_the_trace_alike_for_all_workers():
    parts = [part(0), part(1, late=5)]
    for found in parts:
        found.spans += [span("validation", 60_000, 60_400)]
    events = json.loads(gzip.decompress(trace(parts)))["traceEvents"]
    for pid in (1, 2):
        mine = {e["name"]: (e["ts"], e["dur"]) for e in events if e["pid"] == pid and e["ph"] == "X"}
        assert mine["59.7 s left out"] == (312_000, 100_000)
        assert mine["validation"] == (412_000, 400_000)
        assert mine["checkpoint"] == (310_000, 2_000), "100 ms after the step, as it was"
    assert_nested(events)


@pytest.mark.parametrize(
    ("ahead", "found"),
    [(0, 0), (40, 0), (5000, 5000), (-5000, -5000)],  # 40: less than an exchange takes, so perhaps nothing
)
def test_a_clock_is_compared_by_exchanges_that_nobody_leaves_before_all_have_entered(ahead, found):
    entered = {"first": (0, 1000, 2000), "own": (300, 980, 2050)}
    over = [max(pair) + 50 for pair in zip(*entered.values(), strict=True)]
    first = list(zip(entered["first"], [end + 10 for end in over], strict=True))
    own = [(enter + ahead, end + 10 + ahead) for enter, end in zip(entered["own"], over, strict=True)]
    assert abs(clock_offset(own, first) - found) <= 35
    if found == 0:
        assert clock_offset(own, first) == 0


def profiled(rank, start, found):
    return Profiled(rank=rank, workers=2, start=start, part=found.packed())


def test_parts_of_workers_that_were_started_anew_are_never_mixed_with_earlier_ones():
    collector = Collector()
    assert collector.add(profiled(0, 1, part(0))) is None
    assert collector.add(profiled(1, 2, part(1, late=10))) is None  # after a crash
    assert not collector.is_done
    found = collector.add(profiled(0, 2, part(0, late=20)))
    assert [(one.rank, one.steps[0].end - BASE) for one in found] == [(0, 120 * MS), (1, 110 * MS)]
    assert found == [part(0, late=20), part(1, late=10)], "nothing is lost on the way"


def test_the_end_of_the_epoch_is_added_when_all_workers_have_come_to_it():
    collector = Collector()
    more = [Part(rank, [], [], [span("validation", 400, 410 + rank)], []) for rank in (0, 1)]
    assert collector.add(profiled(0, 1, part(0))) is None
    assert collector.add(profiled(0, 1, more[0])) is None  # before the other's steps are there
    assert collector.add(profiled(1, 1, part(1))) == [part(0), part(1)]
    assert (collector.is_done, collector.is_whole) == (True, False)
    whole = collector.add(profiled(1, 1, more[1]))
    assert collector.is_whole
    assert [one.spans[-1] for one in whole] == [span("validation", 400, 410), span("validation", 400, 411)]


def test_intervals_are_joined_and_cut():
    assert union([(5, 9), (0, 2), (2, 4), (6, 7), (8, 12), (3, 3)]) == [(0, 4), (5, 12)]
    assert without([(0, 10), (20, 30)], [(0, 2), (4, 6), (9, 21), (29, 40)]) == [(2, 4), (6, 9), (21, 29)]
    assert without([(0, 10)], []) == [(0, 10)]


def test_the_fields_of_the_summary_are_described(request):
    text = (request.config.rootpath / "docs" / "formats.md").read_text()
    section = text.split("## profile/", 1)[1].split("\n## ", 1)[0]
    found = summary([part()])
    rows = {*found, *found["workers"][0], *found["operators"][0], *found["exchange"][0]}
    assert {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")} == rows
    assert found["schema_version"] == profile_trace.SUMMARY_VERSION
