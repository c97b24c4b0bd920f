"""From what the workers recorded to one trace that Perfetto opens, and a summary of where the time of a step goes.

Times are nanoseconds since the epoch by rank 0's clock. An interval is a pair of them, (start, end).
"""

import gzip
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from orchestrator.base.schema import KEY
from orchestrator.base.shown import count_of
from orchestrator.base.terminal import columns
from orchestrator.train.messages import Profiled

WARM_UP_STEPS = 3  # of a session, before the first that is recorded
MOST_STEPS = 100  # a longer trace is slow to open, and tells no more
SUMMARY_VERSION = 1
FOLDER, TRACE, SUMMARY = "profile", "trace.json.gz", "summary.json"
PARTS = ("compute", "exchange", "data_wait", "host", "idle")  # of a step's time; the first that applies counts
SHOWN_AS = {"data_wait": "data wait"}
OUTSIDE_STEPS = ("validation", "checkpoint")  # spans after an epoch's steps
NUM_OPERATORS = 10
LONGEST_GAP = 100_000_000  # in a trace, between what was recorded
MAIN, SPANS, COLLECTIVES = "operators", "steps", "exchange"  # threads of a worker in the trace
GRADIENTS, LOSSES = "gradients", "losses"  # in the place of a layer: what an exchange is for
BACKWARD = "autograd::engine::evaluate_function"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of PyTorch's profiler

Interval = tuple[int, int]


class Span(NamedTuple):
    """A part of the training loop's work."""

    name: str
    start: int
    end: int


class Operation(NamedTuple):
    """An event of PyTorch's profiler."""

    category: str  # PyTorch's: cpu_op, user_annotation, kernel, ...
    name: str
    thread: str  # main, or PyTorch's id of another thread or of a GPU's stream
    start: int
    end: int
    id: int = 0  # that a kernel has in common with the operator that launched it
    sequence: int = -1  # that a backward operator has in common with its forward operator


@dataclass
class Part:
    """What one worker recorded."""

    rank: int
    layers: list[str]  # the names of the annotations around a layer's forward pass
    steps: list[Span] = field(default_factory=list)  # named by their number in the run, from 1
    spans: list[Span] = field(default_factory=list)  # within the steps, and those of OUTSIDE_STEPS and within these
    operations: list[Operation] = field(default_factory=list)

    def packed(self) -> bytes:
        return gzip.compress(json.dumps(asdict(self)).encode(), compresslevel=3)

    @classmethod
    def unpacked(cls, data: bytes) -> "Part":
        found = json.loads(gzip.decompress(data))
        return cls(
            found["rank"],
            found["layers"],
            [Span(*span) for span in found["steps"]],
            [Span(*span) for span in found["spans"]],
            [Operation(*operation) for operation in found["operations"]],
        )


class Collector:
    """Puts the workers' parts together, as they come.

    Workers that are started anew record again; parts of different starts are never mixed.
    """

    def __init__(self) -> None:
        self._start = 0  # of the workers whose parts are collected
        self._parts: dict[int, Part] = {}
        self._more: dict[int, Part] = {}  # what came after an epoch's steps
        self.is_done = False  # whether there has been a profile
        self.is_whole = False  # whether the last one has the end of its epoch, too

    def add(self, event: Profiled) -> list[Part] | None:
        """All workers' parts, by rank, if this one completes them; None if others are still to come."""
        if event.start != self._start:
            self._start, self._parts, self._more = event.start, {}, {}
        wanted = self._more if event.rank in self._parts else self._parts
        wanted[event.rank] = Part.unpacked(event.part)
        if len(wanted) < event.workers:
            return None
        self.is_done, self.is_whole = True, wanted is self._more
        if self.is_whole:
            for rank, more in self._more.items():
                self._parts[rank].spans += more.spans
            self._more = {}
        return [part for _, part in sorted(self._parts.items())]


def clock_offset(own: Sequence[Interval], first: Sequence[Interval]) -> int:
    """How far a worker's clock is ahead of rank 0's, in nanoseconds.

    own, first: when, by its own clock, this worker and rank 0 entered and left each of several exchanges that no worker
    leaves before all have entered. 0 where the clocks do not differ by more than can be told, as on one machine.
    """
    least = max(enter - leave for (enter, _), (_, leave) in zip(own, first, strict=True))
    most = min(leave - enter for (_, leave), (enter, _) in zip(own, first, strict=True))
    return 0 if least <= 0 <= most else (least + most) // 2


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """What summary.json has (docs/formats.md). Milliseconds are means per step."""
    read = [Reading(part) for part in parts]
    num_steps = len(parts[0].steps)
    count = num_steps * len(parts)
    operators: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    exchanges: Counter[tuple[str, str, str]] = Counter()
    times: Counter[tuple[str, str, str]] = Counter()
    for reading in read:
        for name, ns in reading.dear():
            operators[name] += ns
            calls[name] += 1
        for operation, what in reading.collectives():
            exchanges[what] += 1
            times[what] += operation.end - operation.start
    whole = sum(step.end - step.start for part in parts for step in part.steps)
    return {
        KEY: SUMMARY_VERSION,
        "steps": num_steps,
        "first_step": int(parts[0].steps[0].name),
        "workers": [_of_worker(reading) for reading in read],
        "operators": [
            {"name": name, "ms": _ms(ns, count), "calls": calls[name] / count, "share": round(ns / whole, 4)}
            for name, ns in operators.most_common(NUM_OPERATORS)
        ],
        "exchange": [
            {
                "for": what[0], "pass": what[1], "collective": what[2], "ms": _ms(ns, count),
                "calls": exchanges[what] / count,
            }
            for what, ns in times.most_common()
        ],
    }  # fmt: skip


def lines(found: Mapping[str, Any]) -> list[str]:
    """A summary as the terminal shows it."""
    steps, first = found["steps"], found["first_step"]
    rows = [
        [
            str(worker["rank"]),
            f"{worker['step_ms']:.1f}",
            *(f"{worker[f'{part}_ms']:.1f} ({worker[f'{part}_ms'] / worker['step_ms']:.0%})" for part in PARTS),
        ]
        for worker in found["workers"]
    ]
    operators = [
        [row["name"], f"{row['ms']:.1f}", f"{row['share']:.1%}", f"{row['calls']:g}"] for row in found["operators"]
    ]
    which = f"step {first}" if steps == 1 else f"{steps} steps from step {first}"
    return [
        f"profile of {which}, {count_of(len(rows), 'worker')}; ms per step",
        *columns(["worker", "step", *(SHOWN_AS.get(part, part) for part in PARTS)], rows),
        *columns(["dearest operators", "ms", "share", "calls"], operators),
    ]


def trace(parts: Sequence[Part]) -> bytes:
    """A trace in Chrome's JSON format, gzipped: a process for every worker, and in it a thread for the loop's spans,
    those of the operators, of the collectives, and of each of a GPU's streams.

    The time between the steps and the end of their epoch is cut to LONGEST_GAP, with a slice that says so.
    """
    recorded = union((span.start, span.end) for part in parts for span in (*part.steps, *part.spans))
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(recorded) if start - end > LONGEST_GAP]
    clock = _Clock(recorded[0][0], gaps)
    events = [event for part in parts for event in _process(Reading(part), clock)]
    return gzip.compress(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode(), compresslevel=6)


@dataclass(frozen=True)
class _Clock:
    """The times of a trace."""

    base: int
    gaps: Sequence[Interval]  # that are cut to LONGEST_GAP; nothing was recorded in them

    def microseconds(self, time: int) -> float:
        cut = sum(end - start - LONGEST_GAP for start, end in self.gaps if end <= time)
        return (time - self.base - cut) / 1000


class Reading:
    """A part with what its operations are: what each is nested in, which layer it is for, and whether it computes."""

    def __init__(self, part: Part) -> None:
        self.part = part
        operations = part.operations
        self.on_gpu = any(operation.category in ON_DEVICE for operation in operations)
        gloo = {operation.thread for operation in operations if operation.name.startswith("gloo:")}
        self.gloo_threads = sorted(gloo)
        self.order = sorted(range(len(operations)), key=lambda i: (operations[i].start, -operations[i].end))
        self.parent = self._nest()
        self.exchanging = self._exchanging()
        self.layer, self.way = self._layers()
        self.launched_by = {
            operation.id: i
            for i, operation in enumerate(operations)
            if operation.category == "cpu_op" and operation.id and operation.thread not in gloo
        }

    def _nest(self) -> list[int]:
        """The index of the operation that each is directly within on its thread; -1: of none."""
        operations, parent = self.part.operations, [-1] * len(self.part.operations)
        open_on: defaultdict[str, list[int]] = defaultdict(list)
        for i in self.order:
            if operations[i].category in ON_DEVICE:
                continue
            stack = open_on[operations[i].thread]
            while stack and operations[stack[-1]].end <= operations[i].start:
                stack.pop()
            parent[i] = stack[-1] if stack else -1
            stack.append(i)
        return parent

    def _exchanging(self) -> set[int]:
        """The operators that start a collective, or contain one: between what they contain they wait for it."""
        found: set[int] = set()
        for i, operation in enumerate(self.part.operations):
            if operation.name.startswith("c10d::"):
                while i != -1 and i not in found:
                    found.add(i)
                    i = self.parent[i]
        return found

    def _layers(self) -> tuple[list[str], list[str]]:
        """Of each operator the layer that it is for, "" if of none, and the pass, forward or backward.

        What is exchanged before a layer is for that layer: it is its input. Backward operators are for the layer of
        the forward operator with their sequence number.
        """
        operations, names = self.part.operations, set(self.part.layers)
        layer, way = [""] * len(operations), ["forward"] * len(operations)
        begun = [operations[i] for i in self.order if operations[i].name in names]
        of_sequence: dict[int, str] = {}
        for i in self.order:
            operation, above = operations[i], self.parent[i]
            if operation.category == "user_annotation" and operation.name in names:
                layer[i] = operation.name
            elif operation.name.startswith(BACKWARD):
                way[i] = "backward"
                accumulates = operation.name.endswith("AccumulateGrad")
                layer[i] = GRADIENTS if accumulates else of_sequence.get(operation.sequence, "")
            elif above != -1 and (layer[above] or way[above] == "backward"):
                layer[i], way[i] = layer[above], way[above]
            elif i in self.exchanging:
                layer[i] = self._next_layer(operation, begun)
            if operation.sequence >= 0 and way[i] == "forward":
                of_sequence[operation.sequence] = layer[i]
        return layer, way

    def _next_layer(self, operation: Operation, begun: Sequence[Operation]) -> str:
        step_end = next((step.end for step in self.part.steps if step.end > operation.start), 0)
        return next((layer.name for layer in begun if operation.end <= layer.start < step_end), LOSSES)

    def collectives(self) -> Iterator[tuple[Operation, tuple[str, str, str]]]:
        """The exchanges on gloo's threads or a GPU's streams: (what for, pass, kind) of each."""
        asked: defaultdict[str, list[int]] = defaultdict(list)  # those who asked for them, by kind, in order
        for i in self.order:
            operation = self.part.operations[i]
            if operation.name.startswith("c10d::") and operation.thread not in self.gloo_threads:
                asked[_kind(operation.name)].append(i)
        waiting = {kind: iter(found) for kind, found in asked.items()}
        for i in self.order:
            operation = self.part.operations[i]
            if operation.name.startswith("gloo:"):
                asker = next(waiting.get(_kind(operation.name), iter(())), None)
            elif _is_nccl(operation):
                asker = self.launched_by.get(operation.id)
            else:
                continue
            what = (LOSSES, "forward") if asker is None else (self.layer[asker] or LOSSES, self.way[asker])
            yield operation, (*what, _kind(operation.name))

    def dear(self) -> Iterator[tuple[str, int]]:
        """The name of each operator that computes, and its own time, without what it calls; on a GPU its kernels'."""
        operations = self.part.operations
        if self.on_gpu:
            for operation in operations:
                if operation.category in ON_DEVICE and not _is_nccl(operation):
                    launcher = self.launched_by.get(operation.id)
                    name = operation.name if launcher is None else operations[launcher].name
                    yield name, operation.end - operation.start
            return
        own = [operation.end - operation.start for operation in operations]
        for i, above in enumerate(self.parent):
            if above != -1:
                own[above] -= operations[i].end - operations[i].start
        for i, operation in enumerate(operations):
            if self._computes(i):
                yield operation.name.removeprefix(f"{BACKWARD}: "), max(0, own[i])

    def _computes(self, i: int) -> bool:
        operation = self.part.operations[i]
        return operation.category == "cpu_op" and i not in self.exchanging and operation.thread not in self.gloo_threads

    def times(self) -> dict[str, int]:
        """Nanoseconds of all steps by PARTS; each instant counts for the first part that applies."""
        operations = self.part.operations
        host = [(span.start, span.end) for span in self.part.spans if span.name != "data"]
        computing = [(o.start, o.end) for i, o in enumerate(operations) if self._computes(i)]
        if self.on_gpu:
            host += computing
            computing = [(o.start, o.end) for o in operations if o.category in ON_DEVICE and not _is_nccl(o)]
        wanted = {
            "compute": computing,
            "exchange": [(o.start, o.end) for o, _ in self.collectives()],
            "data_wait": [(span.start, span.end) for span in self.part.spans if span.name == "data"],
            "host": host,
        }
        left = union((step.start, step.end) for step in self.part.steps)
        found = {}
        for name, intervals in wanted.items():
            before, left = left, without(left, union(intervals))
            found[name] = length(before) - length(left)
        return found | {"idle": length(left)}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif start < end:
            found.append((start, end))
    return found


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of the intervals the others do not cover; both disjoint and in order."""
    found, first = [], 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        i = first
        while i < len(others) and others[i][0] < end:
            if start < others[i][0]:
                found.append((start, others[i][0]))
            start = max(start, others[i][1])
            i += 1
        if start < end:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def _of_worker(reading: Reading) -> dict[str, Any]:
    part, steps = reading.part, reading.part.steps
    count = len(steps)
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for span in part.spans:
        if any(step.start <= span.start < step.end for step in steps):
            inside[span.name] += span.end - span.start
        elif span.name in OUTSIDE_STEPS:
            outside[span.name] += span.end - span.start
    return {
        "rank": part.rank,
        "step_ms": _ms(sum(step.end - step.start for step in steps), count),
        **{f"{name}_ms": _ms(ns, count) for name, ns in reading.times().items()},
        "spans_ms": {name: _ms(ns, count) for name, ns in inside.items()},
        "outside_ms": {name: _ms(ns, 1) for name, ns in outside.items()},
    }


def _ms(ns: float, count: int) -> float:
    return round(ns / 1e6 / count, 4)


def _is_nccl(operation: Operation) -> bool:
    return operation.category == "kernel" and operation.name.startswith("nccl")


def _kind(name: str) -> str:
    """allgather: of gloo:all_gather, c10d::_allgather_base_ and ncclDevKernel_AllGather_RING."""
    if name.startswith("nccl"):
        name = name.partition("_")[2].partition("_")[0]
    return name.rpartition(":")[2].lower().replace("_", "").removesuffix("base")


def _process(reading: Reading, clock: _Clock) -> Iterator[dict[str, Any]]:
    """The events of a worker. Ids of threads are unique over all workers: Perfetto may tell threads by them alone."""
    part = reading.part
    pid = part.rank + 1  # 0 is the idle process
    where = [_thread_of(operation, reading) for operation in part.operations]
    threads = [SPANS, MAIN, *sorted(set(where) - {MAIN})]
    tids = {name: 100 * pid + number for number, name in enumerate(threads)}

    def event(name: str, category: str, thread: str, start: int, end: int, args: object = None) -> dict[str, Any]:
        return {
            "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tids[thread],
            "ts": clock.microseconds(start), "dur": (end - start) / 1000, **({"args": args} if args else {}),
        }  # fmt: skip

    for step in part.steps:
        yield event(f"step {step.name}", "step", SPANS, step.start, step.end)
    for span in part.spans:
        yield event(span.name, "span", SPANS, span.start, span.end)
    for start, end in clock.gaps:
        yield event(f"{(end - start) / 1e9:.1f} s left out", "gap", SPANS, start, start + LONGEST_GAP)
    collectives = {id(operation): what for operation, what in reading.collectives()}
    for i, operation in enumerate(part.operations):
        name, args = operation.name, None
        if what := collectives.get(id(operation)):
            name, args = f"{what[0]}: {what[2]}", {"pass": what[1], "operator": operation.name}
        elif reading.layer[i] and operation.name != reading.layer[i]:
            args = {"layer": reading.layer[i]}
        yield event(name, operation.category, where[i], operation.start, operation.end, args)
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"worker {part.rank}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for name, tid in tids.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _thread_of(operation: Operation, reading: Reading) -> str:
    """The name of its thread in the trace."""
    if operation.category in ON_DEVICE:
        return f"GPU stream {operation.thread}"
    if operation.category == "gpu_user_annotation":
        return f"layers on GPU stream {operation.thread}"
    if operation.thread in reading.gloo_threads:
        return f"{COLLECTIVES} {reading.gloo_threads.index(operation.thread) + 1}"
    return MAIN if operation.thread == "main" else f"{MAIN}, thread {operation.thread}"
