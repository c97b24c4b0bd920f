"""What does this project do on a GPU: is it right there, and how fast?

    python benchmarks/gpu.py                                 all parts, in one call of about eight minutes at most
    python benchmarks/gpu.py --parts lrn step                some of them
    python benchmarks/gpu.py --device cpu --quick            tiny forms of all parts, to see that the script works

One JSON holds the results of all parts. It is written after each of them, so that a machine that is taken away leaves
what was found. A part that fails is recorded with its error, and the rest goes on; parts that would begin after the
budget of --minutes are recorded as not run. The parts:

  machine   GPUs, driver, versions, bandwidth of the memory (a copy within it)
  agree     losses of some updates, and the gradients of a batch, on the GPU against the CPU, in fp64 and fp32
  lrn       Triton's kernels beside nn.LocalResponseNorm and our tensor operations: ms, GB/s, share of the bandwidth
  step      images/s of a training step of the full net beside torchvision's AlexNet, eager and compiled
  memory    the most memory that such a step takes
  feed      host to device, pinned and not, GB/s; images/s of the training loop's step, copies in line or beside
  resume    a training that is saved and resumed against one that is not
  layouts   columns, data and hybrid on several GPUs by NCCL: losses against one GPU, images/s
  tests     pytest -m gpu
  job       jobs/train.py digits on the device, and resumed

Exit status: 0 if no part failed, 1 if one did, 2 without a GPU.
"""

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import measure
import numpy as np
import runs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import alexnet
from alexnet import lrn as lrn_layer
from alexnet.layouts import Layout, ShardedNet
from orchestrator.config.recipes import digits, imagenette
from orchestrator.config.train import TrainConfig
from orchestrator.data.reader import Batch
from orchestrator.train import checkpoints
from orchestrator.train.device_batches import DeviceBatch, to_device
from orchestrator.train.model import build_net, make_optimizer
from orchestrator.train.step import WorkerStep

Result = dict[str, Any]

AGREE = 1e-4  # relative, of losses in fp32, and of losses and gradients in fp64
SWITCHED = 1e-2  # of gradients in fp32: where values are rounded otherwise, here and there another pixel wins a pool
RESERVED_S = 90.0  # of the budget, which compiling is to leave to other parts
UPDATES = 3  # whose losses are compared
CLASSES = 1000


@dataclass
class Machine:
    """Where a part runs, and how long it may take."""

    device: torch.device
    quick: bool
    rounds: int
    end: float  # time.monotonic() at which the budget is over

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def config(self, batch_size: int) -> TrainConfig:
        """Settings of the full net; of a tiny one where it is to be quick."""
        recipe = digits().changed(width=0.125) if self.quick else imagenette()
        return recipe.changed(global_batch_size=batch_size, workers=1, layout="single")

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Wrong(Exception):
    """What was found is not what it should be; `result` has it all the same."""

    def __init__(self, text: str, result: Result) -> None:
        super().__init__(text)
        self.result = result


def seconds(machine: Machine, contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of a call, of turns of so many calls, at whose end the device is waited for."""

    def turn(run: Callable[[], object]) -> None:
        for _ in range(repeats):
            run()
        machine.sync()

    times = measure.take_turns({name: functools.partial(turn, run) for name, run in contenders.items()}, machine.rounds)
    return {name: statistics.median(values) / repeats for name, values in times.items()}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions may round their factors to TF32, on GPUs that can."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference relative to that of the second."""
    a, b = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def make_step(
    config: TrainConfig, device: torch.device, *, bf16: bool = False, dtype: torch.dtype = torch.float32,
    layout: Layout | None = None, rank: int = 0,
) -> WorkerStep:  # fmt: skip
    """The training loop's own step, of a net that depends on the settings alone."""
    net = ShardedNet(build_net(config, CLASSES).to(device, dtype), layout or Layout("single", 1), rank)
    mean = torch.full((config.crop_size + 8, config.crop_size + 8, 3), 120.0, device=device)
    rows = {"train": 10**6, "val": 10**6}
    return WorkerStep(net, make_optimizer(config, net.part, net.whole_sums), mean, config, rows, bf16=bf16)


def make_batch(config: TrainConfig, size: int, seed: int) -> Batch:
    """As the feed sends it."""
    random, whole = np.random.default_rng(seed), config.augment_on == "device"
    side = config.crop_size + 8 * whole
    shift = {"shift": random.normal(0, 10, (size, 3)).astype(np.float32)} if whole else {}
    return shift | {
        "image": random.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        "top": random.integers(0, 9, size, dtype=np.int32), "left": random.integers(0, 9, size, dtype=np.int32),
        "flip": random.integers(0, 2, size).astype(bool), "label": random.integers(0, CLASSES, size),
    }  # fmt: skip


def losses_of(step: WorkerStep, batches: list[Batch], first: int = 0) -> list[float]:
    """Mean losses of updates, the first of which is the run's number `first`."""
    found = []
    for number, batch in enumerate(batches, start=first):
        loss_sum, images = step.update(batch, number, number)
        found.append((loss_sum, images, 0.0))
    return [loss / count for loss, count, _ in step.all_reduce(found)]


def describe_machine(machine: Machine) -> Result:
    found: Result = {
        "device": str(machine.device), "quick": machine.quick, "cuda": torch.version.cuda,
        "c_compiler": next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        "cpus": os.cpu_count(), "commit": _output("git", "rev-parse", "HEAD"),
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    found["copy_bytes_per_s"] = copy_bytes_per_s(machine)
    if machine.device.type == "cuda":
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = [
            {"name": p.name, "memory_bytes": p.total_memory, "capability": [p.major, p.minor]} for p in properties
        ]
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["nccl"] = list(torch.cuda.nccl.version()) if dist.is_nccl_available() else None  # type: ignore[no-untyped-call]
        found["lrn_kernels"] = _kernels_work(machine)
        if not found["lrn_kernels"]:
            raise Wrong("LRN's kernels cannot be compiled here, see the warning", found)
    return found


def copy_bytes_per_s(machine: Machine) -> float:
    """The bandwidth of the device's memory, read and written, as a copy within it has it."""
    source = torch.zeros(2**16 if machine.quick else 2**28, device=machine.device)  # 1 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(machine, {"copy": lambda: target.copy_(source)}, 5)["copy"]


def _kernels_work(machine: Machine) -> bool:
    """Whether layers on the GPU take Triton's kernels."""
    a = torch.empty(0, 1, 1, 1, device=machine.device)
    return lrn_layer._implementation(a)[0] is not lrn_layer.tensor_forward


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def agree(machine: Machine) -> Result:
    """Dropout is on: what it zeroes depends on the images alone."""
    found: Result = {}
    for dtype, size, of_gradients in ((torch.float64, 4, AGREE), (torch.float32, 16, SWITCHED)):
        config = machine.config(size)
        batches = [make_batch(config, size, seed) for seed in range(UPDATES)]
        losses, gradients = {}, {}
        with tf32(False):
            for name, device in (("cpu", torch.device("cpu")), ("device", machine.device)):
                worker = make_step(config, device, dtype=dtype)
                scores, labels = worker.scores("train", 0, batches[0], 0)
                F.cross_entropy(scores, labels).backward()  # type: ignore[no-untyped-call]
                named = worker.net.part.named_parameters()
                gradients[name] = {key: p.grad.clone() for key, p in named if p.grad is not None}
                worker.net.zero_grad()
                losses[name] = losses_of(worker, batches)
        apart = {key: difference(ours, gradients["cpu"][key]) for key, ours in gradients["device"].items()}
        of_losses = [abs(a - b) / abs(b) for a, b in zip(losses["device"], losses["cpu"], strict=True)]
        found[str(dtype)] = {
            "losses": losses, "losses_apart": of_losses, "gradients_apart": apart,
            "bounds": {"losses": AGREE, "gradients": of_gradients},
        }  # fmt: skip
        if not (max(of_losses) < AGREE and max(apart.values()) < of_gradients):
            raise Wrong(f"{dtype}: losses are {max(of_losses):.2g} apart, gradients {max(apart.values()):.2g}", found)
    return found


def lrn(machine: Machine) -> Result:
    """ReLU and LRN within two columns, as in training; PyTorch's layer is also timed over all maps without ReLU."""
    shapes = [(2, 96, 5, 5), (2, 256, 3, 3)] if machine.quick else [(128, 96, 55, 55), (128, 256, 27, 27)]
    bandwidth = copy_bytes_per_s(machine)
    papers = (2, 2.0, 5, 1e-4, 0.75, True)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            a = torch.randn(shape, device=machine.device).to(dtype).contiguous(memory_format=torch.channels_last)
            grad = torch.randn_like(a)
            plain, plain_grad = (tensor.contiguous() for tensor in (a, grad))
            theirs = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

            def torch_two_columns(x: Tensor, theirs: nn.Module = theirs) -> Tensor:
                return torch.cat([theirs(half) for half in F.relu(x).chunk(2, 1)], 1)

            def both(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], object]:
                x = x.detach().requires_grad_()
                return lambda: torch.autograd.grad(function(x), x, g)

            ours = functools.partial(alexnet.local_response_norm, columns=2, relu=True)
            forward, backward = lrn_layer._implementation(a)
            contenders: dict[str, Callable[[], object]] = {
                "ours": both(ours, a, grad),
                "ours_forward": functools.partial(forward, a, *papers),
                "ours_backward": functools.partial(backward, a, grad, *papers),
                "tensor_operations_forward": functools.partial(lrn_layer.tensor_forward, a, *papers),
                "tensor_operations_backward": functools.partial(lrn_layer.tensor_backward, a, grad, *papers),
                "torch_two_columns": both(torch_two_columns, a, grad),
                "torch": both(theirs, a, grad),
                "torch_contiguous": both(theirs, plain, plain_grad),
            }
            contenders = {name: run for name, run in contenders.items() if exists(run)}
            took = seconds(machine, contenders, 1 if machine.quick else 10)
            # forward reads and writes each number once; backward reads two and writes one
            moved = {"ours": 5, "ours_forward": 2, "ours_backward": 3}
            rates = {name: times * a.nbytes / took[name] for name, times in moved.items()}
            exact = (
                lrn_layer.tensor_forward(a.double(), *papers),
                lrn_layer.tensor_backward(a.double(), grad.double(), *papers),
            )
            off = [difference(forward(a, *papers), exact[0]), difference(backward(a, grad, *papers), exact[1])]
            found.append(
                {
                    "shape": shape, "dtype": str(dtype), "ms": {name: 1000 * took[name] for name in contenders},
                    "gb_per_s": {name: rate / 1e9 for name, rate in rates.items()},
                    "of_copy_bandwidth": {name: rate / bandwidth for name, rate in rates.items()},
                    "times_faster": {name: took[name] / took["ours"] for name in took if name.startswith("torch")},
                    "off": off,
                }
            )  # fmt: skip
            worst = 1e-6 if dtype == torch.float32 else 4e-3
            if not max(off) < worst:
                raise Wrong(f"{shape} in {dtype}: off by {max(off):.2g}, more than {worst}", {"found": found})
    return {"forward_and_backward": found}


def exists(run: Callable[[], object]) -> bool:
    """Whether PyTorch has it for this device and type: it has no average pool in bfloat16 on a CPU."""
    try:
        run()
    except NotImplementedError:
        return False
    return True


def plain_step(
    net: nn.Module,
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    bf16: bool,
) -> None:
    """An update on images that are on the device; forward: of the net, perhaps compiled."""
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        scores = forward(x)
    F.cross_entropy(scores.float(), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def nets(
    machine: Machine, batch_size: int
) -> tuple[dict[str, tuple[nn.Module, torch.optim.Optimizer]], Tensor, Tensor]:
    """Ours and torchvision's, each with its rule of updates, and a batch for both."""
    import torchvision

    side, width = (64, 0.125) if machine.quick else (224, 1.0)
    ours = alexnet.build("paper", CLASSES, init="he", input_size=side, width=width).to(machine.device)
    theirs = torchvision.models.alexnet(num_classes=CLASSES).to(machine.device, memory_format=torch.channels_last)
    if machine.quick:
        theirs.classifier = nn.Linear(256 * 6 * 6, CLASSES).to(machine.device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, side, side, generator=random).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch_size,), generator=random)
    found: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
        "ours": (ours, alexnet.PaperSGD(ours.parameters(), lr=1e-5)),
        "torchvision": (
            theirs, torch.optim.SGD(theirs.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4, foreach=True)
        ),
    }  # fmt: skip
    return found, x.to(machine.device), y.to(machine.device)


def precisions() -> Iterator[tuple[str, bool]]:
    """Names, and whether it is bf16, each as it is set."""
    with tf32(False):
        yield "fp32", False
    with tf32(True):
        yield "tf32", False
        yield "bf16", True


def step(machine: Machine) -> Result:
    """Both as modules in a plain loop, on a batch that is on the device. Compiled nets are made by PyTorch's inductor;
    ours is compiled in bf16 only. cudnn.benchmark: cuDNN tries its kernels, and takes the fastest."""
    found: Result = {}
    for batch_size in (4,) if machine.quick else (128, 1024):
        for precision, bf16 in precisions():
            both, x, y = nets(machine, batch_size)
            contenders: dict[str, Callable[[], object]] = {}
            left_out = []
            for name, (net, optimizer) in both.items():
                contenders[name] = functools.partial(plain_step, net, net, optimizer, x, y, bf16)
                if name == "ours" and not bf16:
                    continue
                if machine.left_s < RESERVED_S:
                    left_out.append(f"{name}_compiled")
                    continue
                torch._dynamo.reset()
                compiled = torch.compile(net, dynamic=False, backend="aot_eager" if machine.quick else "inductor")
                contenders[f"{name}_compiled"] = functools.partial(plain_step, net, compiled, optimizer, x, y, bf16)
            took = seconds(machine, contenders, 1 if machine.quick else 10)
            before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
            try:
                took |= seconds(machine, {"ours_cudnn_benchmark": contenders["ours"]}, 1 if machine.quick else 10)
            finally:
                torch.backends.cudnn.benchmark = before
            rates = {name: batch_size / value for name, value in took.items()}
            found[f"{precision}, batch {batch_size}"] = {
                "images_per_s": rates, "ours_over_torchvision": rates["ours"] / rates["torchvision"],
                "left_out": left_out,
            }  # fmt: skip
            print(
                f"  {precision}, batch {batch_size}: "
                + ", ".join(f"{n} {r:.0f}" for n, r in rates.items())
                + " images/s"
            )
    return found


def memory(machine: Machine) -> Result:
    if machine.device.type != "cuda":
        return {"left_out": "the device has no allocator that counts"}
    found: Result = {}
    for batch_size in (4,) if machine.quick else (128, 1024):
        for precision, bf16 in precisions():
            for name in ("ours", "torchvision"):
                both, x, y = nets(machine, batch_size)
                net, optimizer = both[name]
                del both
                for turn in range(3):
                    plain_step(net, net, optimizer, x, y, bf16)
                    if turn == 0:  # the velocities are there
                        torch.cuda.reset_peak_memory_stats(machine.device)
                machine.sync()
                peak = torch.cuda.max_memory_allocated(machine.device)
                found[f"{name}, {precision}, batch {batch_size}"] = {"peak_bytes": peak}
                del net, optimizer, x, y
                torch.cuda.empty_cache()
    return found


def feed(machine: Machine) -> Result:
    """The loop's step on batches that are there already, on batches copied on the stream of the steps, and on batches
    copied beside them, cut or whole; all with the training loop's code."""
    found: Result = {}
    for batch_size in (4,) if machine.quick else (128, 1024):
        found[f"batch {batch_size}"] = copies(machine, batch_size)
        for bf16 in (False, True):
            found[f"batch {batch_size}, {'bf16' if bf16 else 'fp32'}"] = loops(machine, batch_size, bf16)
    return found


def copies(machine: Machine, batch_size: int) -> Result:
    """A batch to the device: from memory as it comes, from pinned memory, and into pinned memory and from there."""
    batch = make_batch(machine.config(batch_size), batch_size, 0)
    pixels = torch.from_numpy(batch["image"])
    target = torch.empty_like(pixels, device=machine.device)
    contenders: dict[str, Callable[[], object]] = {"pageable": functools.partial(target.copy_, pixels)}
    if machine.device.type == "cuda":
        contenders["pinned"] = functools.partial(target.copy_, pixels.pin_memory(), non_blocking=True)
    contenders["with_pinning"] = functools.partial(to_device, batch, machine.device)
    took = seconds(machine, contenders, 5)
    return {
        name: {"gb_per_s": pixels.nbytes / value / 1e9, "images_per_s": batch_size / value}
        for name, value in took.items()
    }


def loops(machine: Machine, batch_size: int, bf16: bool) -> Result:
    """Some steps of the training loop."""
    steps, config = 3 if machine.quick else 20, machine.config(batch_size)
    worker = make_step(config, machine.device, bf16=bf16)
    batch = make_batch(config, batch_size, 0)
    whole = make_batch(config.changed(augment_on="device"), batch_size, 0)
    there = to_device(batch, machine.device)

    def train(batches: Iterable[Batch | DeviceBatch]) -> None:
        for number, each in enumerate(batches):
            worker.update(each, number, number)

    took = seconds(
        machine,
        {
            "no_copies": lambda: train([there] * steps),
            "copies_in_line": lambda: train([batch] * steps),
            "copies_beside": lambda: train(worker.on_device([batch] * steps)),
            "cut_on_the_device": lambda: train(worker.on_device([whole] * steps)),
        },
        1,
    )
    return {
        "images_per_s": {name: steps * batch_size / value for name, value in took.items()},
        "beside_over_none": took["no_copies"] / took["copies_beside"],
    }


def resume(machine: Machine) -> Result:
    """What is loaded must be what was saved, and the losses after it those of a training that was not interrupted: in
    every bit if that repeats itself in every bit, which some kernels of PyTorch do not."""
    size = 4 if machine.quick else 32
    config = machine.config(size)
    batches = [make_batch(config, size, seed) for seed in range(4)]

    def whole() -> list[float]:
        return losses_of(make_step(config, machine.device), batches)

    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        wanted, again = whole(), whole()
        first, second = (make_step(config, machine.device) for _ in range(2))
        schedules = [alexnet.plateau_schedule(worker.optimizer) for worker in (first, second)]
        found = losses_of(first, batches[:2])
        rules: list[Any] = [first.optimizer, second.optimizer]
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(Path(folder), first.net, rules[0], schedules[0], checkpoints.State(step=2))
            state = checkpoints.load(Path(folder), second.net, rules[1], schedules[1])
        same = all(
            torch.equal(a, b) and torch.equal(rules[0].state[a]["velocity"], rules[1].state[b]["velocity"])
            for a, b in zip(first.net.part.parameters(), second.net.part.parameters(), strict=True)
        )
        found += losses_of(second, batches[2:], state.step)
    finally:
        torch.use_deterministic_algorithms(False)
        if before is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before
    apart = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    repeats = wanted == again
    result = {"losses": found, "wanted": wanted, "apart": apart, "loaded_is_saved": same, "repeats_exactly": repeats}
    if not same or (found != wanted if repeats else not apart < AGREE):
        raise Wrong(f"the resumed training is {apart:.2g} apart; what was loaded is what was saved: {same}", result)
    return result


def layouts(machine: Machine) -> Result:
    """A process for each GPU; of the CPU, two with gloo."""
    workers = torch.cuda.device_count() if machine.device.type == "cuda" else 2
    workers = max((number for number in (2, 4, 8) if number <= workers), default=1)
    if workers == 1:
        return {"left_out": "needs two GPUs"}
    size = 16 if machine.quick else 128 * workers
    config = machine.config(size)
    with tf32(False):
        wanted = losses_of(
            make_step(config, machine.device), [make_batch(config, size, seed) for seed in range(UPDATES)]
        )
    result: Result = {"workers": workers, "bound": AGREE, "single": {"losses": wanted}}
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            _layouts_process, (workers, machine, size, folder), nprocs=workers, join=False, start_method="spawn"
        )
        assert processes is not None
        end = time.monotonic() + max(30.0, machine.left_s)
        try:
            while not processes.join(timeout=1.0):  # raises what a process raised
                if time.monotonic() > end:
                    raise Wrong("the processes did not end in time", result)
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
        result |= json.loads(Path(folder, "found.json").read_text())
    apart = {
        kind: max(abs(a - b) / abs(b) for a, b in zip(result[kind]["losses"], wanted, strict=True))
        for kind in ("columns", "data", "hybrid")
    }
    result["losses_apart"] = apart
    if not max(apart.values()) < AGREE:
        raise Wrong(f"losses are up to {max(apart.values()):.2g} apart", result)
    return result


def _layouts_process(rank: int, workers: int, machine: Machine, size: int, folder: str) -> None:
    on_gpu = machine.device.type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else machine.device
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    here = Machine(device, machine.quick, machine.rounds, machine.end)
    store = dist.FileStore(f"{folder}/store", workers)  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(seconds=120)
    )
    config, own = here.config(size), slice(rank * size // workers, (rank + 1) * size // workers)
    batches = [
        {name: column[own] for name, column in make_batch(config, size, seed).items()} for seed in range(UPDATES)
    ]
    found: Result = {}
    for kind in ("columns", "data", "hybrid"):
        with tf32(False):
            losses = losses_of(make_step(config, device, layout=Layout(kind, workers), rank=rank), batches)
        worker = make_step(config, device, bf16=True, layout=Layout(kind, workers), rank=rank)
        there = to_device(batches[0], device)
        took = seconds(here, {"update": lambda w=worker, t=there: w.update(t, 0, 0)}, 1 if here.quick else 5)  # type: ignore[misc]
        found[kind] = {"losses": losses, "bf16_images_per_s": size / took["update"]}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def tests(machine: Machine) -> Result:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/alexnet",
        "tests/train",
    ]
    done = runs.ended(command, runs.ROOT, max(20.0, machine.left_s))
    lines = done.stdout.strip().splitlines()
    result = {"command": "pytest -m gpu", "status": done.returncode, "summary": lines[-1] if lines else ""}
    if done.returncode:
        raise Wrong(f"pytest: {result['summary']}", result | {"output": lines[-200:], "errors": done.stderr[-2000:]})
    return result


def job(machine: Machine) -> Result:
    """The whole way: Ray, its feed, the training loop, MLflow."""
    device = "gpu" if machine.device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = ["digits", "--layout", "single", "--workers", "1", "--device", device]
        commands = [
            [*shape, "--epochs", "4", "--name", "whole"],
            [*shape, "--epochs", "2", "--name", "resumed"],
            ["--resume", "resumed", "--epochs", "4"],
        ]
        for arguments in commands:
            done = runs.ended(runs.command("train", *arguments), folder, max(20.0, machine.left_s))
            if done.returncode:
                raise Wrong(f"{' '.join(arguments)}: {done.stderr[-500:]}", {"output": done.stdout[-2000:]})
        found = {run: json.loads((folder / "runs" / run / "result.json").read_text()) for run in ("whole", "resumed")}
    losses = {run: [entry["train/loss"] for entry in result["history"]] for run, result in found.items()}
    apart = max(abs(a - b) / b for a, b in zip(losses["resumed"], losses["whole"], strict=True))
    result = {"losses": losses, "losses_apart": apart, "images_per_s": found["whole"].get("images_per_s")}
    if not apart < 0.05:  # kernels that sum in any order: over four epochs the runs part
        raise Wrong(f"the resumed run is {apart:.2g} apart", result)
    return result


PARTS: dict[str, Callable[[Machine], Result]] = {
    "machine": describe_machine, "agree": agree, "lrn": lrn, "step": step, "memory": memory, "feed": feed,
    "resume": resume, "layouts": layouts, "tests": tests, "job": job,
}  # fmt: skip


def run_part(name: str, machine: Machine) -> Result:
    """What a part found, with its status: ok, failed or not run."""
    if machine.left_s <= 0:
        return {"status": "not run", "why": "the budget of --minutes was over"}
    start = time.monotonic()
    found: Result
    try:
        found = {"status": "ok", "result": PARTS[name](machine)}
    except Wrong as wrong:
        found = {"status": "failed", "error": str(wrong), "result": wrong.result}
    except Exception as error:
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    if machine.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error of the device, which the next part meets, too
            torch.cuda.empty_cache()
    return found | {"seconds": time.monotonic() - start}


def main() -> int:
    flags = measure.parser(__doc__, "gpu")
    flags.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="(default: all)"
    )
    flags.add_argument("--minutes", type=float, default=8.0, help="no part begins after them (default: 8)")
    flags.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="(default: cuda)")
    flags.add_argument("--quick", action="store_true", help="tiny nets and batches: to see that the script works")
    args = flags.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py: error: PyTorch sees no GPU here; --device cpu --quick tries the script without one",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(args.threads)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    machine = Machine(device, args.quick, args.rounds, time.monotonic() + 60 * args.minutes)
    found: dict[str, Result] = {}
    for name in args.parts:
        print(f"{name}:", flush=True)
        found[name] = run_part(name, machine)
        print(
            f"  {found[name]['status']}, {found[name].get('seconds', 0):.0f} s",
            found[name].get("error", ""),
            flush=True,
        )
        measure.write(args.json, {"device": str(device), "quick": args.quick, "parts": found})
    failed = [name for name, part in found.items() if part["status"] == "failed"]
    not_run = [name for name, part in found.items() if part["status"] == "not run"]
    for text, names in (("failed", failed), ("not run", not_run)):
        if names:
            print(f"{text}: {', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
