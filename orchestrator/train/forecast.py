"""What --dry-run prints: the size of a run, its layout and its time, and on a cluster its nodes and their cost."""

import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alexnet.cost import Cost
from orchestrator.base.environment import on_cluster
from orchestrator.base.exits import JobError, last_line
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import duration, table
from orchestrator.cluster.connection import connect
from orchestrator.cluster.layout_choice import CPU_FLOPS, GPU_FLOPS, choose_layout, cost_of, ledger, worker_counts
from orchestrator.cluster.nodes import Node, alive, uses_gpu
from orchestrator.cluster.placement import make_plan
from orchestrator.cluster.prices import NodeType, node_types, usd_per_hour, would_start
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.dataset import Dataset
from orchestrator.train.run_folder import RESULT, RunFolder
from orchestrator.train.scaling import linear_scaling

log = logging.getLogger(__name__)

# The settings that a run's speed depends on: an earlier run in which they are equal gives the forecast.
SPEED_SETTINGS = (
    "data", "preset", "width", "input_size", "global_batch_size", "freeze", "workers", "layout", "device", "precision",
    "threads", "accumulate", "augment_on",
)  # fmt: skip


@dataclass(frozen=True)
class Machines:
    """The nodes of a run: those that are there, or those that would be started."""

    nodes: list[Node]
    started: tuple[NodeType, int] | None  # how many of `nodes` would be started, and their type
    text: str
    usd_per_hour: float | None

    @staticmethod
    def of(config: TrainConfig, runs: int | None = 1) -> "Machines":
        """For `runs` concurrent runs; None: as many as fit. Connects to the cluster if the job is on one."""
        if not on_cluster():
            return Machines([Node("here", os.cpu_count() or 1, torch.cuda.device_count())], None, "this machine", None)
        connect()
        import ray

        raw: list[dict[str, Any]] = ray.nodes()
        nodes, types = alive(raw), node_types()
        kinds = Counter(f"of {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
        there = "; ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none but the head"
        text = there + "".join(f"; up to {kind.at_most} more {kind}" for kind in types)
        price, started = usd_per_hour(raw), would_start(config, types, runs)
        if started is None or any(node.gpus or not started[0].gpus for node in nodes):
            return Machines(nodes, None, text, price)  # the nodes that are there suffice: none are started
        kind, count, _ = started
        nodes = nodes + [Node(f"{kind.name}-{number}", kind.cpus, kind.gpus) for number in range(count)]
        if kind.usd_per_hour is not None:
            price = (price or 0.0) + count * kind.usd_per_hour
        return Machines(nodes, (kind, count), text, price)


def describe(config: TrainConfig, output: StoragePath, images_per_s: float | None, recipe: str | None = None) -> str:
    """Describe one training run. images_per_s: the speed, if the user states it. recipe: that the settings began with,
    if that is known. Raises ValueError of one line."""
    data = Dataset(config, output, verify=False)
    worker_counts(config)  # raises if no number of workers will do
    num_classes, machines = data.num_classes(config), Machines.of(config)
    try:
        plan = make_plan(config, machines.nodes, num_classes)
        reason = plan.reason if plan else f"none: the cluster is too small for --workers {config.workers}"
    except JobError as error:
        plan, reason = None, f"none: {error}"
    gpus = sum(node.gpus for node in machines.nodes)
    use_gpu = uses_gpu(config.device, gpus)
    layout = plan.layout if plan else choose_layout(
        config, worker_counts(config)[0], num_classes, machines.nodes, use_gpu
    )[0]  # fmt: skip
    cost = cost_of(config, layout, num_classes)
    copies, average = (3, ", their average") if config.ema else (2, "")
    together = layout.group_size if layout.kind == "columns" else 1  # whose images a worker of columns computes
    at_once = config.images_at_once * together // layout.workers
    parts = f" of {at_once} images at a time" if config.accumulate > 1 else ""
    steps = -(-data.rows["train"] // config.global_batch_size)
    facts = [
        ("data", f"{config.data}: {data}"),
        ("net", _net(config)),
        ("parameters", f"{cost.num_parameters:,}"),
        ("steps", f"{steps} per epoch, {steps * config.epochs} in total"),
        *([("rate", text)] if (text := linear_scaling(config, recipe)) else []),
        (
            "arithmetic",
            f"{cost.training_flops * data.rows['train'] / 1e9:,.0f} GFLOP per epoch, "
            f"{cost.training_flops / 1e9:.2f} per image",
        ),
        (
            "memory",
            f"{cost.memory_bytes / 1e9:.2f} GB per worker: weights{average}, gradients and velocities of "
            f"{cost.part_parameters:,} parameters, and activations{parts}",
        ),
        ("nodes", machines.text),
        *([("would start", f"{machines.started[1]} of {machines.started[0]}")] if machines.started else []),
        ("layout", reason),
        *ledger(config, layout.workers, num_classes),
        ("checkpoint", f"{copies * 4 * cost.num_parameters / 1e6:.0f} MB; the best and the last are kept"),
        *(
            [("kept weights", f"{config.epochs // config.keep_every} times {4 * cost.num_parameters / 1e6:.0f} MB")]
            if config.keep_every
            else []
        ),
        *time_and_cost(config, output, data, config.epochs, machines, cost, layout.workers, images_per_s),
    ]
    return f"{config.to_yaml()}\n{table(facts)}\n\nnothing was started (--dry-run)"


def _net(config: TrainConfig) -> str:
    """The preset, and the values that it gives or that take the place of its own."""
    lrn = config.lrn
    constants = f"LRN k {lrn.k:g}, n {lrn.n}, alpha {lrn.alpha:g}, beta {lrn.beta:g}" if lrn else "no LRN"
    return f"{config.preset}: {config.net.title}; {config.crop_size} pixels, {constants}"


def time_and_cost(
    config: TrainConfig, output: StoragePath, data: Dataset, epochs: int, machines: Machines, cost: Cost, workers: int,
    images_per_s: float | None, at_once: int | None = None,
) -> list[tuple[str, str]]:  # fmt: skip
    """Speed, time and cost of `epochs` epochs of one run of `workers` workers, or of a search, `at_once` at a time.

    images_per_s: the speed of one run, if the user states it. A run's start-up counts if an earlier run tells what it
    takes; the wait for nodes, and the start-up of a search's trials, do not.
    """
    measured = measured_rate(config, output)
    startup_s = None if at_once is not None or measured is None else _startup_s(output, measured[1])
    at_once = at_once or 1
    use_gpu = uses_gpu(config.device, sum(node.gpus for node in machines.nodes))
    if images_per_s is not None:
        rate = images_per_s * at_once
        whence = "as stated" + (f", times {at_once} concurrent runs" if at_once > 1 else "")
    else:
        rate, whence = _expected_rate(measured, cost, workers, at_once, machines, use_gpu)
    seconds = epochs * (data.rows["train"] + data.rows["val"] / 3) / rate  # a forward pass is a third of a step
    counted = "not counting start-up"
    if startup_s is not None and measured is not None:
        seconds += startup_s
        counted = f"with {duration(startup_s)} of start-up as in run {measured[1]}"
    lines = [
        ("speed", f"{rate:,.0f} images/s: {whence}"),
        ("time", f"about {duration(seconds)} for {count_of(epochs, 'epoch')}, {counted}"),
    ]
    if machines.usd_per_hour is not None:
        usd = machines.usd_per_hour * seconds / 3600
        lines.append(("cost", f"about ${usd:,.2f}, at ${machines.usd_per_hour:.2f} per hour for all nodes"))
    return lines


def _expected_rate(
    measured: tuple[float, str] | None, cost: Cost, workers: int, at_once: int, machines: Machines, use_gpu: bool
) -> tuple[float, str]:
    """Images per second of all concurrent runs together, and where the figure comes from."""
    if measured is not None:
        rate, name = measured
        if use_gpu and at_once > 1:  # each run has its own GPUs; CPUs are shared by the runs
            return at_once * rate, f"measured in run {name}, times {at_once} concurrent runs"
        return rate, f"measured in run {name}"
    flops = GPU_FLOPS if use_gpu else CPU_FLOPS
    busy = min(workers * at_once, _slots(machines, use_gpu))
    return busy * flops / cost.training_flops, "estimated from the arithmetic; --images-per-s states it"


def measured_rate(config: TrainConfig, output: StoragePath) -> tuple[float, str] | None:
    """Images per second and name of the newest finished run in `output` whose speed settings equal the config's.

    The newest is the one whose result was written last. A result that cannot be read, or is not a run's, is skipped.
    """
    written = []
    for name, is_folder in output.children().items():
        if is_folder:
            place = output / name / RESULT
            fs, path = place.opened()
            info = place.with_retries(partial(fs.get_file_info, path), "reached")
            if info.is_file:
                written.append((info.mtime_ns or 0, name))
    for _, name in sorted(written, reverse=True):
        try:
            result = RunFolder(output, name).result()
            rate = _rate_of(config, result)
        except (ValueError, TypeError, OSError, JobError) as error:
            log.warning("%s: skipped for the forecast: %s", output / name / RESULT, last_line(error))
            continue
        if rate is not None:
            log.info("speed taken from run %s: %.1f images/s", name, rate)
            return rate, name
    return None


def _startup_s(output: StoragePath, name: str) -> float | None:
    """Seconds that an earlier run took until its workers trained; None if its result does not say."""
    found = RunFolder(output, name).result().get("startup_s")
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        return None
    return float(found)


def _rate_of(config: TrainConfig, result: object) -> float | None:
    """The speed that a result.json records; None for a search's, an unfinished run's or one of other settings.

    Raises ValueError for what is not a result.
    """
    if not isinstance(result, dict):
        raise ValueError("not a result of a run")
    if "trials" in result or result.get("status") != "FINISHED":
        return None
    if not isinstance(result.get("config"), dict):
        raise ValueError("has no config")
    ran = make_config(**result["config"])  # older runs have other spellings of equal settings, such as '2' workers
    before, now = ran.resolved(), config.resolved()
    if any(before[key] != now[key] for key in SPEED_SETTINGS):
        return None
    rate = result.get("images_per_s")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"images_per_s = {rate!r}: expected a positive number")
    return float(rate)


def _slots(machines: Machines, use_gpu: bool) -> int:
    """How many workers run at full speed at the same time; more of them share the CPUs."""
    return max(1, int(sum(node.gpus if use_gpu else node.cpus for node in machines.nodes)))
