"""What a run would be, for --dry-run: its size, its layout, its time, and on a cluster its nodes and dollars."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from alexnet.cost import Cost, estimate
from orchestrator.base.environment import on_cluster
from orchestrator.base.exits import JobError
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import duration, table
from orchestrator.cluster.connection import connect
from orchestrator.cluster.layout_choice import CPU_FLOPS, GPU_FLOPS, choose_layout, ledger, worker_counts
from orchestrator.cluster.nodes import Node, alive, uses_gpu
from orchestrator.cluster.placement import make_plan
from orchestrator.cluster.prices import NodeType, node_types, usd_per_hour, would_start
from orchestrator.config.train import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.train.run_folder import RESULT

# settings that a run's speed depends on: where they are the same, an earlier run's speed is a forecast
SAME = ("data", "width", "input_size", "global_batch_size", "workers", "layout", "device", "precision", "threads")


@dataclass(frozen=True)
class Machines:
    """What a run would have: the nodes that are there, or those that would be started."""

    nodes: list[Node]
    started: tuple[NodeType, int] | None  # of them
    text: str
    usd_per_hour: float | None

    @staticmethod
    def of(config: TrainConfig, runs: int | None = 1) -> "Machines":
        """For so many runs side by side, or as many as there can be. On a cluster, connects to it."""
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
            return Machines(nodes, None, text, price)  # what is there is not counted in a second time
        kind, count, _ = started
        nodes = nodes + [Node(f"{kind.name}-{number}", kind.cpus, kind.gpus) for number in range(count)]
        if kind.usd_per_hour is not None:
            price = (price or 0.0) + count * kind.usd_per_hour
        return Machines(nodes, (kind, count), text, price)


def describe(config: TrainConfig, output: StoragePath, images_per_s: float | None) -> str:
    """Of one training run. images_per_s: a rate that the user states. Raises ValueError of one line."""
    data = Dataset(config, output, verify=False)
    worker_counts(config)  # says why not
    num_classes, machines = data.num_classes(config), Machines.of(config)
    try:
        plan = make_plan(config, machines.nodes, num_classes)
        reason = plan.reason if plan else f"no: too small for {config.workers} workers"
    except JobError as error:
        plan, reason = None, f"no: {error}"
    gpus = sum(node.gpus for node in machines.nodes)
    use_gpu = uses_gpu(config.device, gpus)
    layout = plan.layout if plan else choose_layout(
        config, worker_counts(config)[0], num_classes, machines.nodes, use_gpu
    )[0]  # fmt: skip
    cost = estimate(
        num_classes=num_classes, input_size=config.input_size, width=config.width,
        global_batch_size=config.global_batch_size, layout=layout,
    )  # fmt: skip
    steps = -(-data.rows["train"] // config.global_batch_size)
    facts = [
        ("data", f"{config.data}: {data}"),
        ("parameters", f"{cost.num_parameters:,}"),
        ("steps", f"{steps} an epoch, {steps * config.epochs} in all"),
        (
            "arithmetic",
            f"{cost.training_flops * data.rows['train'] / 1e9:,.0f} GFLOP an epoch, "
            f"{cost.training_flops / 1e9:.2f} an image",
        ),
        (
            "memory",
            f"{cost.memory_bytes / 1e9:.2f} GB a worker: weights, gradients and velocities of "
            f"{cost.part_parameters:,} parameters, and activations",
        ),
        ("nodes", machines.text),
        *([("would start", f"{machines.started[1]} of {machines.started[0]}")] if machines.started else []),
        ("layout", reason),
        *ledger(config, layout.workers, num_classes),
        ("checkpoint", f"{2 * 4 * cost.num_parameters / 1e6:.0f} MB; the best and the last are kept"),
        *time_and_cost(config, output, data, config.epochs, machines, cost, layout.workers, images_per_s),
    ]
    return f"{config.to_yaml()}\n{table(facts)}\n\nnothing was started (--dry-run)"


def time_and_cost(
    config: TrainConfig, output: StoragePath, data: Dataset, epochs: int, machines: Machines, cost: Cost, workers: int,
    images_per_s: float | None, at_once: int = 1,
) -> list[tuple[str, str]]:  # fmt: skip
    """Lines about so many epochs of runs of so many workers, some at once; start-up and the waiting for nodes are not
    counted. images_per_s: of a run, as the user states."""
    use_gpu = uses_gpu(config.device, sum(node.gpus for node in machines.nodes))
    if images_per_s is not None:
        rate, whence = images_per_s * at_once, "as stated" + (f", for {at_once} at once" if at_once > 1 else "")
    else:
        rate, whence = _expected_rate(config, output, cost, workers, at_once, machines, use_gpu)
    seconds = epochs * (data.rows["train"] + data.rows["val"] / 3) / rate  # a forward pass is a third of a step
    lines = [("speed", f"{rate:,.0f} images/s: {whence}"), ("time", f"about {duration(seconds)} for {epochs} epochs")]
    if machines.usd_per_hour is not None:
        usd = machines.usd_per_hour * seconds / 3600
        lines.append(("cost", f"about ${usd:,.2f}, at ${machines.usd_per_hour:.2f} an hour for all nodes"))
    return lines


def _expected_rate(
    config: TrainConfig, output: StoragePath, cost: Cost, workers: int, at_once: int, machines: Machines, use_gpu: bool
) -> tuple[float, str]:
    """Images per second of all runs that are at work at once, and how that is known."""
    for name, is_folder in output.children().items():
        place = output / name / RESULT
        if is_folder and place.size() is not None:
            result = json.loads(place.read())
            ran = result.get("config", {})
            if result.get("images_per_s") and all(ran.get(key) == getattr(config, key) for key in SAME):
                whence = f"measured in run {name}"
                if use_gpu and at_once > 1:  # each has its own; CPUs are shared by as many runs as there are
                    return at_once * float(result["images_per_s"]), f"{whence}, for {at_once} at once"
                return float(result["images_per_s"]), whence
    flops = GPU_FLOPS if use_gpu else CPU_FLOPS
    busy = min(workers * at_once, _slots(machines, use_gpu))
    return busy * flops / cost.training_flops, "a guess from the arithmetic; say --images-per-s if you know better"


def _slots(machines: Machines, use_gpu: bool) -> int:
    """How many workers are at work at the same time: more of them share the CPUs."""
    return max(1, int(sum(node.gpus if use_gpu else node.cpus for node in machines.nodes)))
