"""The engine of evaluating and predicting: tasks of images through trained nets, in order, each exactly once.

A worker reads and decodes a task and runs it through all nets, so that pixels never travel between processes. Two tasks
are with each worker: one is read while the other is computed. Without a cluster the only worker is this process;
elsewhere they are Ray actors, one per GPU, or per node where there are none. The nets go to them once.

N images, S the stored side in pixels, M nets, K classes.
"""

import collections
import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet.allocator import keep_freed_memory
from alexnet.augment import MeanSubtraction
from alexnet.trained import TrainedNet
from orchestrator.base.environment import num_cpus
from orchestrator.base.exits import JobError, lacks_memory, last_line, no_memory, signals_deferred
from orchestrator.base.shown import count_of
from orchestrator.cluster.placement import WORKERS_PER_CPU
from orchestrator.train.rendezvous import wants_bf16

BATCH_SIZE = 128  # images of a task
AHEAD = 2  # tasks with each worker: one is read while another is computed
RESTARTS = 3  # of an actor whose node was lost

T = TypeVar("T")
Asked = TypeVar("Asked", contravariant=True)
Run = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]  # a function over a sequence, on several threads


@dataclass(frozen=True)
class Settings:
    """How nets are applied."""

    views: int = 1  # or 10 (alexnet.augment.views)
    precision: str = "fp32"  # or bf16
    batch_size: int = BATCH_SIZE
    device: str = "auto"  # cpu, cuda
    threads: int | None = None  # of each worker's arithmetic and decoding; None: one per CPU that it has


@dataclass(frozen=True)
class Pixels:
    """What a reader makes of a task."""

    stored: NDArray[np.uint8]  # (N, S, S, 3)
    ids: NDArray[np.int64]  # (N,) which of the source's images they are
    names: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()  # (name, reason) of those that could not be read


@dataclass(frozen=True)
class Answer:
    """What the nets say about a task."""

    ids: NDArray[np.int64]  # (N,)
    log_probabilities: NDArray[np.float64]  # (M, N, K)
    names: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a task has no answer: one line."""

    kind: type[JobError]
    text: str


class Reader(Protocol[Asked]):
    """Reads tasks: where bytes are, and what becomes of them."""

    def fetch(self, task: Asked) -> Any:
        """The bytes of a task's images. Raises JobError."""

    def decode(self, task: Asked, fetched: Any, run: Run) -> Pixels:
        """Their pixels. Raises JobError."""


class Worker(Generic[T]):
    """Answers tasks, several of which may be asked for at the same time."""

    def __init__(self, nets: Sequence[TrainedNet], reader: Reader[T], settings: Settings, threads: int) -> None:
        """threads: of torch, and of those that decode."""
        self.reader, self.settings, self.threads = reader, settings, threads
        self.device = torch.device(_device(settings.device))
        if self.device.type == "cpu":
            keep_freed_memory()
        self.nets = [_on(net, self.device) for net in nets]
        self.bf16 = wants_bf16(settings.precision, self.device)
        self._fetching = threading.Lock()  # what caches row groups is not made for several threads
        # on a CPU, decoding beside the arithmetic would only take its cores away
        self._cores = threading.Lock() if self.device.type == "cpu" else contextlib.nullcontext()
        self._decoding = ThreadPoolExecutor(threads, "decode")
        self._computing = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))

    def answer(self, task: T) -> Answer | Failure:
        """What all nets say, or a failure, because Ray would bury its one line under tracebacks."""
        try:
            with self._fetching:
                fetched = self.reader.fetch(task)
            with self._cores:
                pixels = self.reader.decode(task, fetched, self._run)
                found = self._computing.submit(self._compute, pixels.stored).result()
        except JobError as error:
            return Failure(type(error), str(error))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            return Failure(JobError, no_memory(error, "a smaller --batch-size may do"))
        return Answer(pixels.ids, found, pixels.names, pixels.rejected)

    def _run(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(self._decoding.map(function, items))

    def _compute(self, stored: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return np.stack([net.log_probabilities(stored, self.settings.views) for net in self.nets])

    def close(self) -> None:
        """End its threads."""
        self._decoding.shutdown(wait=False, cancel_futures=True)
        self._computing.shutdown(wait=False, cancel_futures=True)


class _Here(Generic[T]):
    """This process as a worker."""

    def __init__(self, worker: Worker[T]) -> None:
        self.worker, self._asking = worker, ThreadPoolExecutor(AHEAD, "ask")

    def submit(self, task: T) -> "Future[Any]":
        return self._asking.submit(self.worker.answer, task)

    def close(self) -> None:
        self._asking.shutdown(wait=False, cancel_futures=True)
        self.worker.close()


class _Actor(Generic[T]):
    """A Ray actor as a worker."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def submit(self, task: T) -> "Future[Any]":
        with signals_deferred():
            found: Future[Any] = self.handle.answer.remote(task).future()
        return found

    def close(self) -> None:
        import ray

        with signals_deferred():
            ray.kill(self.handle)


@dataclass
class Engine(Generic[T]):
    """Workers that answer tasks."""

    workers: list[_Here[T] | _Actor[T]] = field(default_factory=list)

    def answers(self, tasks: Iterable[T]) -> Iterator[Answer]:
        """The answer to every task, in order; tasks are taken as they are needed. Raises JobError."""
        waiting: collections.deque[Future[Any]] = collections.deque()
        tasks, number = iter(tasks), 0
        while True:
            while len(waiting) < AHEAD * len(self.workers):
                try:
                    task = next(tasks)
                except StopIteration:
                    break
                waiting.append(self.workers[number % len(self.workers)].submit(task))
                number += 1
            if not waiting:
                return
            yield _answer(waiting.popleft())

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> "Engine[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start(
    nets: Sequence[TrainedNet], reader: Reader[T], settings: Settings, num_workers: int | None = None
) -> Engine[T]:
    """Start the workers. num_workers: None for this process alone, or for as many actors as a cluster has GPUs, or
    nodes if it has none. Ray must be connected wherever there are actors (`needs_ray`)."""
    if not needs_ray(num_workers):
        return Engine([_Here(Worker(nets, reader, settings, settings.threads or num_cpus()))])
    import ray

    with signals_deferred():
        made = _actors(nets, reader, settings, num_workers)
        waiting = [handle.ready.remote() for handle in made]
    try:
        ray.get(waiting)
    except ray.exceptions.RayError as error:
        raise JobError(f"the workers could not be started: {last_line(error)}") from None
    return Engine([_Actor(handle) for handle in made])


def needs_ray(num_workers: int | None) -> bool:
    """Whether the workers are actors: those that are asked for, and those of a cluster's job."""
    return num_workers is not None or bool(os.environ.get("RAY_ADDRESS"))


def _actors(nets: Sequence[TrainedNet], reader: Reader[T], settings: Settings, num_workers: int | None) -> list[Any]:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if settings.device != "cpu" else 0
    if settings.device == "cuda" and not gpus:
        raise JobError("--device cuda: the cluster has no GPU; use --device cpu")
    count = num_workers or gpus or len(nodes)
    cpus = int(sum(node["CPU"] for node in nodes))
    if count > (gpus or WORKERS_PER_CPU * cpus):
        needs = f"{count_of(cpus, 'CPU')}, for {WORKERS_PER_CPU} workers each"
        what = f"{count_of(gpus, 'GPU')}, and each worker needs one" if gpus else needs
        raise JobError(f"--workers {count}: the cluster has {what}; use fewer workers")
    each = min(cpus // count, int(min(node["CPU"] for node in nodes))) or math.floor(1000 * cpus / count) / 1000
    threads = settings.threads or max(1, int(each))
    options: dict[str, Any] = {
        "num_cpus": each, "max_concurrency": AHEAD, "max_restarts": RESTARTS, "max_task_retries": RESTARTS,
        "scheduling_strategy": "SPREAD",
    }  # fmt: skip
    if gpus:
        options["num_gpus"] = 1
    actor = ray.remote(**options)(_Remote)
    shared = ray.put(list(nets))
    return [actor.remote(shared, reader, settings, threads) for _ in range(count)]


class _Remote(Worker[Any]):
    """A worker in a process of its own."""

    def ready(self) -> bool:
        return True


def _answer(future: "Future[Any]") -> Answer:
    try:
        found = future.result()
    except JobError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("ray"):  # the actor's process or node is gone
            raise JobError(f"a worker failed: {last_line(error)}") from None
        raise
    if isinstance(found, Failure):
        raise found.kind(found.text)
    assert isinstance(found, Answer)
    return found


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise JobError("--device cuda: there is no GPU here; use --device cpu")
    return asked


def _on(trained: TrainedNet, device: torch.device) -> TrainedNet:
    """A net on a device, with its mean image."""
    if device.type == "cpu":
        return trained
    moved = TrainedNet(trained.net.to(device), trained.description, trained.mean_image)
    mean_image = torch.from_numpy(trained.mean_image).to(device)
    moved.subtract_mean = MeanSubtraction(mean_image, trained.net.input_size, trained.description.pixel_scale)
    return moved
