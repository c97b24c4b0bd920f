"""The parts of a training step on this machine, each measured alone, and real steps of several processes beside them.

The parts are what a simulation is made of: a worker's arithmetic with exchanges that return at once, exchanges of two
processes that do nothing else, images decoded, calls of Ray. Nothing of them is fitted to the real steps. For
benchmarks/scale.py; times are seconds.
"""

import contextlib
import io
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import layouts
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from simulation import Compute, Exchanging, Plan, Send, Wait, rounds
from sklearn.datasets import load_sample_images
from torch import Tensor

import alexnet
from alexnet import augment
from alexnet.layouts import Layout
from orchestrator.cluster.nodes import Node
from orchestrator.cluster.placement import make_plan
from orchestrator.config.recipes import imagenet
from orchestrator.data.order import batch_parts
from orchestrator.data.prepare import JPEG_QUALITY, ROWS_PER_SHARD
from orchestrator.data.reader import RowGroup
from orchestrator.data.shards import ROW_GROUP_ROWS

RECORDED, WARM = 10, 3  # steps
SMALL_BYTES, LARGE_BYTES = 2**12, 2**23  # of the exchanges that are timed alone
KINDS = ("all_reduce", "all_gather", "all_to_all")
EXCHANGES = {"small": 200, "large": 20}  # how often each
BLOCK, BLOCKS = 4, 5  # real steps that are timed together, and how often
EPOCH_STEPS, VAL_STEPS = 16, 4  # of the epoch that is timed


@dataclass(frozen=True)
class Work:
    """What is trained here: a slim net, so that all of it takes minutes."""

    side: int = 224
    width: float = 0.25
    batch: int = 64


# --- a worker alone ---


class _Recorder:
    """Takes the place of the exchanges of a worker's step: they return at once, and are noted with the time between."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.ops, self.last = layout, list[Compute | Send](), 0.0
        self.member: Any = None  # the group of the workers that hold one net

    def _note(self, kind: str, group: Any, whole_bytes: float, overlaps: bool) -> None:
        self.ops.append(Compute(time.perf_counter() - self.last))
        members = dist.get_world_size(group)
        sent = {
            "all_reduce": 2 * (members - 1) / members * whole_bytes,
            "all_gather": (members - 1) * whole_bytes,
            "all_to_all": (members - 1) / members * whole_bytes,
        }[kind]
        among = "member" if group.group_name == self.member.group_name else "replica"
        self.ops.append(Send(kind, sent, among, overlaps))

    def all_reduce(self, tensor: Tensor, *, group: Any = None, async_op: bool = False) -> Any:
        self._note("all_reduce", group, tensor.nbytes, async_op)
        work = _Done(tensor)
        self.last = time.perf_counter()
        return work

    def all_gather_into_tensor(self, out: Tensor, own: Tensor, *, group: Any = None) -> None:
        self._note("all_gather", group, own.nbytes, False)
        out.view(-1, *own.shape).copy_(own)
        self.last = time.perf_counter()

    def all_to_all_single(self, out: Tensor, given: Tensor, *sizes: Any, group: Any = None) -> None:
        self._note("all_to_all", group, given.nbytes, False)
        out.copy_(given if out.shape == given.shape else given[:1].expand_as(out))
        self.last = time.perf_counter()

    def begin(self) -> None:
        self.ops, self.last = [], time.perf_counter()

    def end(self) -> list[Compute | Send]:
        return [*self.ops, Compute(time.perf_counter() - self.last)]


class _Done:
    """An exchange that has ended."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result([self.tensor])
        return future


@contextlib.contextmanager
def _recorded(recorder: _Recorder) -> Iterator[None]:
    names = ("all_reduce", "all_gather_into_tensor", "all_to_all_single")
    before = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, getattr(recorder, name))
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def alone(kind: str, workers: int, work: Work) -> tuple[Plan, list[float], float]:
    """The step of one of W workers, in this process, with exchanges that return at once.

    Returns what it does in a step, with median times; the times of whole steps as multiples of their median; and the
    seconds of a forward pass of its images for validation.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout = Layout(kind, workers)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workers)  # type: ignore[no-untyped-call]
    try:
        contender = layouts.Contender(layout, 0, work.batch, work.side, work.width)
        recorder = _Recorder(layout)
        recorder.member = getattr(contender.net, "group", None)
        found = []
        with _recorded(recorder):
            for _ in range(WARM + RECORDED):
                recorder.begin()
                contender.run(bf16=False)
                found.append(recorder.end())
            forward_s = []
            for _ in range(WARM + RECORDED):
                begun = time.perf_counter()
                validate(contender)
                forward_s.append(time.perf_counter() - begun)
    finally:
        dist.destroy_process_group()
    found = found[WARM:]
    totals = [sum(op.seconds for op in step if isinstance(op, Compute)) for step in found]
    middle = statistics.median(totals)
    return _median_plan(found), [total / middle for total in totals], statistics.median(forward_s[WARM:])


def _median_plan(found: list[list[Compute | Send]]) -> Plan:
    """One plan from several recordings of it. Workers wait for what overlaps after the last of it was begun."""
    plan: list[Compute | Send | Wait] = []
    for ops in zip(*found, strict=True):
        first = ops[0]
        if isinstance(first, Compute):
            plan.append(Compute(statistics.median(op.seconds for op in ops if isinstance(op, Compute))))
        else:
            assert all(op == first for op in ops), "a worker exchanges the same in every step"
            plan.append(first)
    overlapping = [place for place, op in enumerate(plan) if isinstance(op, Send) and op.overlaps]
    if overlapping:
        plan.insert(overlapping[-1] + 1, Wait())
    return tuple(plan)


@torch.no_grad()
def validate(contender: layouts.Contender) -> None:
    """A forward pass over a worker's images, in evaluation."""
    net = contender.net
    net.eval()
    pixels = net.share_images(contender.pixels, contender.sizes).permute(0, 3, 1, 2)
    net(pixels.float().mul_(1 / 64), None, contender.sizes)
    net.train()


def _serve_alone(work: Work, pairs: list[tuple[str, int]], to: Any) -> None:
    alexnet.keep_freed_memory()
    torch.set_num_threads(1)
    for kind, workers in pairs:
        to.put((kind, workers, *alone(kind, workers, work)))


def workers_alone(work: Work, pairs: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[Plan, list[float], float]]:
    """`alone`, in a process that does nothing else, for layouts of so many workers."""
    return {(kind, workers): rest for kind, workers, *rest in _collect(_serve_alone, [(work, pairs)], len(pairs))}  # type: ignore[misc]


def _serve_beside(work: Work, barrier: Any, to: Any) -> None:
    """Seconds of a step of a single worker while another process makes the same steps, or none."""
    alexnet.keep_freed_memory()
    torch.set_num_threads(1)
    contender = layouts.Contender(Layout("single", 1), 0, work.batch, work.side, work.width)
    contender.run(bf16=False)
    barrier.wait()
    times = []
    for _ in range(RECORDED):
        begun = time.perf_counter()
        contender.run(bf16=False)
        times.append(time.perf_counter() - begun)
    to.put(statistics.median(times))


def crowding(work: Work, cores: int) -> float:
    """How many times longer a step takes when every core computes one of its own, with nothing exchanged."""
    spawn = mp.get_context("spawn")
    found = []
    for processes in (1, cores):
        barrier = spawn.Barrier(processes)
        found.append(statistics.mean(_collect(_serve_beside, [(work, barrier)] * processes, processes)))
    return float(max(1.0, found[1] / found[0]))


# --- exchanges alone ---


def _serve_exchanges(rank: int, store: str, to: Any) -> None:
    torch.set_num_threads(1)
    _join(rank, 2, store)
    found = {}
    for kind in KINDS:
        for name, size in (("small", SMALL_BYTES), ("large", LARGE_BYTES)):
            run = _exchange(kind, size)
            for _ in range(3):
                run()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(EXCHANGES[name]):
                run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found[kind, name] = (wall / EXCHANGES[name], cpu / EXCHANGES[name])
    to.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _exchange(kind: str, sent_bytes: int) -> Callable[[], Any]:
    """An exchange in which each of two workers sends so many bytes."""
    own = torch.ones(sent_bytes // 4 * (2 if kind == "all_to_all" else 1))
    out = torch.empty(len(own) * (2 if kind == "all_gather" else 1))
    if kind == "all_reduce":
        return lambda: dist.all_reduce(own.fill_(1.0))
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(out, own)
    return lambda: dist.all_to_all_single(out, own)


def exchanging() -> Exchanging:
    """What exchanges cost by gloo over the loopback, from those of two processes that do nothing else.

    A small one is its messages, a large one bytes beside them; by the clock, and of the cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        both = _collect(_serve_exchanges, [(rank, f"{folder}/store") for rank in range(2)], 2)
    mean = {key: [statistics.mean(each[key][i] for each in both) for i in range(2)] for key in both[0]}
    found = []
    for clock in range(2):
        round_s = mean["all_reduce", "small"][clock] / rounds("all_reduce", 2)
        by_kind = {
            kind: max(0.0, mean[kind, "large"][clock] - rounds(kind, 2) * round_s) / LARGE_BYTES for kind in KINDS
        }
        found += [round_s, by_kind]
    return Exchanging(*found)


# --- real steps ---


def _join(rank: int, workers: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    file = dist.FileStore(store, workers)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=workers)


def _serve_real(rank: int, workers: int, kinds: list[str], work: Work, folder: str, to: Any) -> None:
    alexnet.keep_freed_memory()
    torch.set_num_threads(1)
    _join(rank, workers, f"{folder}/store-{workers}")
    found: dict[str, tuple[list[float], float]] = {}
    for kind in kinds:
        contender = layouts.Contender(Layout(kind, workers), rank, work.batch, work.side, work.width)
        for _ in range(WARM):
            contender.run(bf16=False)
        blocks = []
        for _ in range(BLOCKS):
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(BLOCK):
                contender.run(bf16=False)
            dist.barrier()
            blocks.append((time.perf_counter() - begun) / BLOCK)
        found[kind] = (blocks, _epoch(contender, rank, folder) if kind in ("single", "data") else 0.0)
        del contender
    if rank == 0:
        to.put((workers, found))
    dist.barrier()
    dist.destroy_process_group()


def _epoch(contender: layouts.Contender, rank: int, folder: str) -> float:
    """Seconds of training, validation and a checkpoint, after which all go on."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(EPOCH_STEPS):
        contender.run(bf16=False)
    for _ in range(VAL_STEPS):
        validate(contender)
    if rank == 0:
        write(contender, folder)
    dist.barrier()
    return time.perf_counter() - begun


def write(contender: layouts.Contender, folder: str) -> float:
    """Write weights and velocities as a checkpoint has them; returns bytes."""
    part, state = contender.net.part, contender.optimizer.state
    weights = {name: param.detach().contiguous() for name, param in part.named_parameters()}
    velocities = {name: state[param]["velocity"].contiguous() for name, param in part.named_parameters()}
    total = 0
    for name, tensors in (("weights", weights), ("velocity", velocities)):
        save_file(tensors, f"{folder}/{name}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    return float(total)


def _serve_writing(work: Work, folder: str, to: Any) -> None:
    contender = layouts.Contender(Layout("single", 1), 0, 2, work.side, work.width)
    contender.run(bf16=False)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        size = write(contender, folder)
        times.append(time.perf_counter() - begun)
    to.put((size, statistics.median(times)))


def writing(work: Work) -> tuple[float, float]:
    """Bytes of a checkpoint, and the seconds that it takes to write."""
    with tempfile.TemporaryDirectory() as folder:
        [(size, seconds)] = _collect(_serve_writing, [(work, folder)], 1)
    return size, seconds


def real(
    work: Work, counts: list[int], kinds: Callable[[int], list[str]]
) -> dict[int, dict[str, tuple[list[float], float]]]:
    """Seconds of a step, in blocks, and of an epoch (0 where it was not timed) by workers and layout."""
    found = {}
    for workers in counts:
        with tempfile.TemporaryDirectory() as folder:
            given = [(rank, workers, kinds(workers), work, folder) for rank in range(workers)]
            [(_, found[workers])] = _collect(_serve_real, given, 1)
    return found


# --- decoding, storage and Ray ---


def _jpegs() -> list[bytes]:
    """Parts of scikit-learn's two photographs, of the size and the quality that shards have."""
    return [
        simplejpeg.encode_jpeg(np.ascontiguousarray(photograph[top : top + 256, left : left + 256]), JPEG_QUALITY)
        for photograph in load_sample_images().images
        for top in range(0, photograph.shape[0] - 256, 32)
        for left in range(0, photograph.shape[1] - 256, 64)
    ]


def decoding(seconds: float = 3.0) -> dict[str, float]:
    """Images that one core decodes and cuts per second, as the feed's tasks do, and the bytes of one."""
    data = _jpegs()
    count, size = len(data), sum(map(len, data)) / len(data)
    group = RowGroup(pa.array(data, pa.binary()), np.zeros(count, np.int64), np.arange(count), "these", 0)
    out, shift = np.empty((count, 224, 224, 3), np.uint8), np.zeros((count, 3), np.float32)

    def once(epoch: int) -> None:
        draws = augment.draw(np.arange(count), seed=0, epoch=epoch, margin=32, flip=True)
        for pixels, which, place in group.decoded(np.arange(count), np.arange(count), 256):
            augment.crop_flip_shift(pixels, draws.of(place), shift[place], 224, which=which, out=out, place=place)

    once(0)  # compiles
    turns, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        turns += 1
        once(turns)
    return {"images_per_core_s": turns * count / (time.perf_counter() - begun), "bytes_per_image": size}


def _shard() -> bytes:
    """A Parquet file as shards are."""
    data = _jpegs()
    rows = np.arange(ROWS_PER_SHARD)
    images = pa.array([data[row % len(data)] for row in rows], pa.binary())
    memory = io.BytesIO()
    pq.write_table(
        pa.table({"image": images, "label": rows, "id": rows}), memory, row_group_size=ROW_GROUP_ROWS,
        compression="none", use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    return memory.getvalue()


def requests() -> dict[str, float]:
    """Reads of a shard in storage, counted: to open it, and for one row group."""

    class Counted(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            Counted.reads += 1
            return super().read(size)

    file = pq.ParquetFile(pa.PythonFile(Counted(_shard()), mode="r"), pre_buffer=True)
    to_open = Counted.reads
    file.read_row_group(3, columns=["image", "label", "id"])
    return {"to_open": float(to_open), "for_a_row_group": float(Counted.reads - to_open)}


def row_group_s(turns: int = 50) -> float:
    """Seconds of a core to read a row group from a file that the system holds in memory."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(_shard())
        file.flush()
        times = []
        for turn in range(turns):
            begun = time.process_time()
            pq.ParquetFile(file.name).read_row_group(turn % (ROWS_PER_SHARD // ROW_GROUP_ROWS))
            times.append(time.process_time() - begun)
    return statistics.median(times)


def calls_of_ray(calls: int = 2000) -> dict[str, float]:
    """Seconds of the driver's thread for a call to an actor that is asked with others at once, as Ray Train asks its
    workers; of an actor that all call, as at the end of an epoch; and of the head's process for a task."""
    from orchestrator.cluster.connection import connect

    connect()
    import ray

    class Asked:
        def answer(self) -> int:
            return 0

    nothing: Any = ray.remote(num_cpus=0.5)(lambda: None)
    actors: list[Any] = [ray.remote(num_cpus=0)(Asked).remote() for _ in range(4)]
    ray.get([actor.answer.remote() for actor in actors])
    begun = time.perf_counter()
    for _ in range(calls // 500):
        asked = [actors[i % 4].answer.remote() for i in range(500)]
        done, _ = ray.wait(asked, num_returns=500, timeout=60)
        for reference in done:
            ray.get(reference)
    poll_s = (time.perf_counter() - begun) / calls
    begun = time.perf_counter()
    ray.get([actors[0].answer.remote() for _ in range(calls)])
    report_s = (time.perf_counter() - begun) / calls
    ray.get([nothing.remote() for _ in range(50)])
    head = [process for process in psutil.process_iter() if process.name().startswith("gcs_server")]
    before = sum(sum(process.cpu_times()[:2]) for process in head)
    begun = time.perf_counter()
    ray.get([nothing.remote() for _ in range(calls)])
    task_s = (time.perf_counter() - begun) / calls
    time.sleep(3)  # events of tasks reach the head a little later
    head_s = (sum(sum(process.cpu_times()[:2]) for process in head) - before) / calls
    ray.shutdown()
    return {"poll_s": poll_s, "report_s": report_s, "task_s": task_s, "head_task_s": head_s}


def by_number_of_workers(counts: list[int]) -> dict[str, dict[int, float]]:
    """Seconds of what a worker and the driver compute that grows with the number of workers.

    parts: a worker's, in every step. plan: the driver's of an elastic run, every two seconds.
    """
    found: dict[str, dict[int, float]] = {"parts": {}, "plan": {}}
    for workers in counts:
        begun = time.perf_counter()
        for step in range(20):
            batch_parts(step, 10**7, 128 * workers, workers, 1)
        found["parts"][workers] = (time.perf_counter() - begun) / 20
        nodes = [Node(f"n{number}", 96, 8, accelerator="A100") for number in range(-(-workers // 8))]
        config = imagenet().changed(
            workers=f"1..{workers}" if workers > 1 else 1, global_batch_size=128 * workers, layout="data", device="gpu"
        )
        make_plan(config, nodes, 1000)
        begun = time.perf_counter()
        make_plan(config, nodes, 1000)
        found["plan"][workers] = time.perf_counter() - begun
    return found


def _collect(serve: Callable[..., None], given: list[tuple[Any, ...]], answers: int) -> list[Any]:
    """Processes, each with its arguments and a queue; returns what they put there. Raises where one fails."""
    spawn = mp.get_context("spawn")
    to = spawn.Queue()
    processes = [spawn.Process(target=serve, args=(*each, to)) for each in given]
    for process in processes:
        process.start()
    found: list[Any] = []
    while len(found) < answers:
        with contextlib.suppress(queue.Empty):
            found.append(to.get(timeout=1.0))
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a process of {serve.__name__} failed")
    for process in processes:
        process.join()
    return found
