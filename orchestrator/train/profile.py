"""What a worker records for --profile N: N steps, by spans of the training loop and by PyTorch's profiler.

The first steps of a session are left out: memory is found and kernels are chosen in them. PyTorch's profiler runs in
the steps alone; spans go on to the end of the epoch, whose validation and checkpoint they show. Nothing that is
computed depends on any of it.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function

from alexnet.layouts import ShardedNet
from orchestrator.train.messages import Profiled
from orchestrator.train.profile_trace import WARM_UP_STEPS, Interval, Operation, Part, Span, clock_offset

CLOCK_ROUNDS = 10
CATEGORIES = ("cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")

log = logging.getLogger(__name__)
T = TypeVar("T")
_NOTHING = nullcontext()


class Spans(Protocol):
    """Records, under a name, how long a with block takes."""

    def __call__(self, name: str, /) -> AbstractContextManager[None]: ...


def no_span(name: str) -> AbstractContextManager[None]:
    """Records nothing."""
    return _NOTHING


class NoProfile:
    """Of a run without --profile."""

    span = staticmethod(no_span)

    def steps(self, batches: Iterator[T], total_step: int) -> Iterator[T]:
        return batches

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        return batches

    def epoch_ended(self, *, is_last: bool) -> None:
        pass


class Profile:
    """Records, and sends what it recorded: after its steps, and once more when their epoch has ended.

    All workers of a run have one, and call its methods at the same places: it exchanges their clocks.
    """

    def __init__(self, num_steps: int, net: ShardedNet, device: torch.device, send: Callable[[Profiled], None]) -> None:
        self.num_steps, self.net, self.device, self.send = num_steps, net, device, send
        self._wall = time.time_ns() - time.perf_counter_ns()  # a clock that is set while it is read would jump
        self._start, self._ahead = 0, 0  # rank 0's time at the first step; how far this worker's clock is ahead
        self._seen = 0  # steps of this session
        self._layers = [name for name, _ in net.part.named_children()]
        self._part = Part(net.rank, self._layers)
        self._torch: Any = None  # PyTorch's profiler while it runs
        self._hooks: list[Any] = []
        self._spanning = False
        self._is_sent = self._is_over = False

    def steps(self, batches: Iterator[T], total_step: int) -> Iterator[T]:
        """An epoch's batches; from when one is asked for to when the next is, it is a step.

        total_step: updates made before the first.
        """
        try:
            while True:
                if self._torch is None and self._seen >= WARM_UP_STEPS and not self._is_sent:
                    self._begin()
                start = self._now()
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                if self._torch is not None:
                    self._add("data", start)
                yield batch
                self._seen += 1
                total_step += 1
                if self._torch is not None:
                    done = len(self._part.steps) + 1 == self.num_steps
                    if done:
                        self._sync()
                    self._part.steps.append(Span(str(total_step), *self._shared(start, self._now())))
                    if done:
                        self._end()
                        self._send()
        finally:  # also of a run that is stopped here
            self._end()
        self._spanning = bool(self._part.steps or self._is_sent) and not self._is_over

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Those of another pass."""
        while True:
            with self.span("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._span(name) if self._spanning else _NOTHING

    def epoch_ended(self, *, is_last: bool) -> None:
        """After its checkpoint. is_last: whether it is the run's last epoch."""
        if self._is_over or not (self._is_sent or is_last):
            return
        if self._part.steps or self._is_sent:
            self._send()
        self._is_over = True
        self._spanning = False

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._add(name, start)

    def _add(self, name: str, start: int) -> None:
        self._part.spans.append(Span(name, *self._shared(start, self._now())))

    def _now(self) -> int:
        return self._wall + time.perf_counter_ns()

    def _shared(self, start: int, end: int) -> Interval:
        """Times of this worker's clock by rank 0's."""
        return start - self._ahead, end - self._ahead

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, layer in self.net.part.named_children():
            self._hooks += _annotate(name, layer)
        self._torch = torch.profiler.profile(activities=activities, acc_events=True)
        self._torch.start()
        if not self._start:
            self._agree_on_clock()
        self._spanning = True
        self._sync()

    def _end(self) -> None:
        """End PyTorch's profiler, if it runs, and take over what it recorded."""
        self._spanning = False
        if self._torch is None:
            return
        self._torch.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with tempfile.TemporaryDirectory(prefix="profile-") as folder:
            file = Path(folder, "trace.json")
            self._torch.export_chrome_trace(str(file))
            found = json.loads(file.read_bytes())
        self._torch = None
        if self._part.steps:
            first, last = self._part.steps[0].start, self._part.steps[-1].end
            read = operations_of(found, threading.get_native_id(), self._ahead)
            self._part.operations += [operation for operation in read if first <= operation.start < last]

    def _send(self) -> None:
        part, self._part = self._part, Part(self.net.rank, self._layers)
        packed = part.packed()
        self.send(Profiled(rank=self.net.rank, workers=self.net.layout.workers, start=self._start, part=packed))
        self._is_sent = True
        log.debug("profile: %d steps, %d operations, %d bytes", len(part.steps), len(part.operations), len(packed))

    def _agree_on_clock(self) -> None:
        """Find out how far this worker's clock is ahead of rank 0's."""
        self._start, workers = self._now(), self.net.layout.workers
        if workers == 1:
            return
        own = torch.empty(CLOCK_ROUNDS, 2, dtype=torch.int64)
        for number in range(CLOCK_ROUNDS):
            own[number, 0] = self._now()
            dist.all_reduce(token := torch.zeros(1, device=self.device))
            token.item()  # on a GPU the exchange is over only now
            own[number, 1] = self._now()
        all_times = torch.empty(workers * CLOCK_ROUNDS, 2, dtype=torch.int64, device=self.device)
        dist.all_gather_into_tensor(all_times, own.to(self.device))
        first = [(int(enter), int(leave)) for enter, leave in all_times[:CLOCK_ROUNDS].tolist()]
        self._start = first[0][0]
        self._ahead = clock_offset([(int(enter), int(leave)) for enter, leave in own.tolist()], first)

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile_of(
    num_steps: int, net: ShardedNet, device: torch.device, send: Callable[[Profiled], None]
) -> Profile | NoProfile:
    """num_steps: to record; 0: none. send: how the driver gets what was recorded."""
    return Profile(num_steps, net, device, send) if num_steps else NoProfile()


def operations_of(trace: dict[str, Any], main: int, ahead: int = 0) -> list[Operation]:
    """Those of a trace that PyTorch's profiler exported. main: the native id of the thread that trains; ahead:
    nanoseconds to be taken from its times."""
    base = trace.get("baseTimeNanoseconds", 0) - ahead
    events = [event for event in trace["traceEvents"] if event["ph"] == "X" and event.get("cat") in CATEGORIES]
    found = []
    for event in events:
        start, args = base + round(event["ts"] * 1000), event.get("args", {})
        thread = "main" if event["tid"] == main else str(event["tid"])
        found.append(
            Operation(
                event["cat"], event["name"], thread, start, start + round(event["dur"] * 1000),
                args.get("External id", 0), args.get("Sequence number", -1),
            )
        )  # fmt: skip
    return found


def _annotate(name: str, layer: torch.nn.Module) -> list[Any]:
    """Let the profiler see when a layer begins and ends its forward pass; returns the hooks, to be removed."""
    running: list[Any] = []

    def begin(*_: object) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(begin, prepend=True), layer.register_forward_hook(end)]
