"""Which layout, on which workers, on which nodes: decided from the settings and from what the cluster has."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from alexnet.cost import Cost, Exchange, communication, estimate
from alexnet.layouts import KINDS, Layout

from .config import TrainConfig
from .exits import JobError

# Bytes per second that one worker sends. Line rates as published, but for the loopback: measured with gloo's
# all-gather of 10 and 50 MB between two processes of a two-core Sapphire Rapids machine (0.45 to 0.58e9, 2026-11-22).
LINKS = {"loopback": 0.5e9, "10 GbE": 1.25e9, "100 GbE": 12.5e9, "PCIe 3.0 x16": 15.75e9, "NVLink 3": 300e9}
# What a worker computes and moves, to one digit: enough to rank layouts that differ by factors.
CPU_FLOPS, CPU_MEMORY_BYTES_PER_S = 70e9, 10e9  # a core in float32 (docs of benchmarks/step.py); two of them share
GPU_FLOPS, GPU_MEMORY_BYTES_PER_S = 10e12, 500e9
OVERSEER_CPUS = 0.001  # of the process that follows one of several runs: Ray Tune wants something to reserve
UPDATE_PASSES = 7  # over the weights: the paper's rule reads gradient, weight and velocity and writes two of them
OVERLAP = 0.6  # of the arithmetic is backward, during which gradients are already being summed
GPU_MEMORY_GB = {
    "T4": 16, "L4": 24, "A10G": 24, "V100": 16, "V100-32G": 32, "A100": 40, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "L40S": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as far as it matters here."""

    id: str
    cpus: float
    gpus: float = 0.0
    memory_bytes: float | None = None  # RAM that Ray may use
    accelerator: str | None = None


def alive(nodes: Iterable[dict[str, Any]]) -> list[Node]:
    """From `ray.nodes()`: those that live and have something to compute with, in a fixed order."""
    found = []
    for node in nodes:
        has = node["Resources"]
        if not node["Alive"] or not (has.get("CPU") or has.get("GPU")):
            continue
        kinds = [name.removeprefix("accelerator_type:") for name in has if name.startswith("accelerator_type:")]
        found.append(
            Node(node["NodeID"], has.get("CPU", 0), has.get("GPU", 0), has.get("memory"), next(iter(kinds), None))
        )
    return sorted(found, key=lambda node: node.id)


@dataclass(frozen=True)
class Resources:
    """What a run asks of the cluster."""

    use_gpu: bool
    worker_cpus: float  # of each training worker
    feed_cpus: float  # of each of its Ray Data tasks
    feed_tasks: int  # of each worker, at a time

    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.worker_cpus} | ({"GPU": 1.0} if self.use_gpu else {})


@dataclass(frozen=True)
class Plan:
    """What Ray Train is asked for."""

    layout: Layout
    resources: Resources
    reason: str  # of the layout, one line
    node_of_worker: tuple[str, ...] = field(default=())  # empty: Ray chooses
    spread: bool = False  # a worker a node

    def strategy(self) -> str:
        """Ray's word for how the workers lie over nodes; a lone group of columns stays together whatever comes."""
        if self.spread:
            return "STRICT_SPREAD"
        return "STRICT_PACK" if self.layout.kind == "columns" and self.layout.replicas == 1 else "PACK"


def uses_gpu(device: str, gpus: float) -> bool:
    """Whether a run with this setting takes GPUs of a cluster that has so many."""
    return device == "gpu" or (device == "auto" and gpus > 0)


def share_cpus(total_cpus: float, total_gpus: float, workers: int, device: str = "auto") -> Resources:
    """Divide the cluster so that the workers and every worker's feed fit at once.

    A Ray Data task that waits for its consumer keeps its CPUs, and the workers wait for each other in every step: one
    worker's tasks must never be able to take all that another's need. Raises JobError where it cannot fit.
    """
    use_gpu = uses_gpu(device, total_gpus)
    if use_gpu and total_gpus < workers:
        raise JobError(
            f"--workers {workers}: the cluster has {total_gpus:g} GPU(s), and each worker needs one of its own; "
            "ask for fewer workers, or say --device cpu"
        )
    if total_cpus <= 0:
        raise JobError("the cluster has no CPUs for Ray tasks; start a node with --num-cpus above 0")
    for_feed = 1.0 if total_cpus >= 2 else total_cpus / 2
    worker_cpus = _down(min(1.0, (total_cpus - for_feed) / workers))
    each = (total_cpus - workers * worker_cpus) / workers
    feed_cpus = _down(min(1.0, each))
    return Resources(use_gpu, worker_cpus, feed_cpus, max(1, int(each / feed_cpus)))


def worker_counts(config: TrainConfig) -> list[int]:
    """The numbers of workers that the run may have, largest first. Raises ValueError if there is none."""
    low, high = config.worker_range
    wrong: ValueError | None = None
    found = []
    for workers in range(high, low - 1, -1):
        try:
            layout = Layout("data" if config.layout == "auto" else config.layout, workers)
            if config.global_batch_size % workers:
                lower = config.global_batch_size // workers * workers
                raise ValueError(
                    f"global_batch_size = {config.global_batch_size}: not divisible by {workers} workers; "
                    f"{lower or workers} or {lower + workers} would be"
                )
            _cost(config, layout, config.num_classes or 2)  # can the net be built, and cut so?
        except ValueError as error:
            wrong = wrong or error
            continue
        found.append(workers)
    if wrong and low == high:
        raise wrong
    if wrong and not found:
        raise ValueError(f"workers = {config.workers}: none of these numbers will do; of {high}: {wrong}")
    return found


def make_plan(config: TrainConfig, nodes: list[Node], num_classes: int, side_by_side: int = 0) -> Plan | None:
    """The best plan for these nodes, or None where an elastic run finds too little.

    Of so many runs side by side, each with a process that follows it, each gets an equal part of the cluster; 0 is a
    run that has the cluster for itself.

    Raises JobError where a fixed number of workers does not fit.
    """
    low, high = config.worker_range
    total_cpus, total_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    use_gpu = uses_gpu(config.device, total_gpus)
    if side_by_side:
        total_cpus = total_cpus / side_by_side - OVERSEER_CPUS
    for workers in worker_counts(config):
        elastic = low != high
        if elastic and workers > sum(_slots(node, use_gpu) for node in nodes):
            continue
        try:
            resources = share_cpus(total_cpus, total_gpus, workers, config.device)
        except JobError:
            if elastic:
                continue
            raise
        if use_gpu:  # a worker's CPUs are where its GPU is
            beside = min(node.cpus / node.gpus for node in nodes if node.gpus)
            resources = replace(resources, worker_cpus=_down(min(resources.worker_cpus, beside)))
        layout, reason = choose_layout(config, workers, num_classes, nodes, use_gpu)
        plan = Plan(layout, resources, reason, spread=config.spread)
        if config.spread:
            able = sum(bool(node.gpus if use_gpu else node.cpus) for node in nodes)
            if able >= workers * max(1, side_by_side):
                return plan
            if elastic:
                continue
            raise JobError(
                f"--workers {workers} --spread: a node for each is asked for, and the cluster has {able} node(s) "
                f"with {'GPUs' if use_gpu else 'CPUs'}; ask for fewer workers, or say --no-spread"
            )
        if len(nodes) == 1 or layout.kind != "columns":  # Ray packs them where there is room
            return plan
        places = place_groups(nodes, resources, layout, use_gpu, elastic)
        if places:  # runs side by side are packed by Ray, in any order
            return plan if side_by_side > 1 else replace(plan, node_of_worker=places)
        if not elastic:
            size = layout.group_size
            raise JobError(
                f"--workers {workers}: the nodes have no room for {layout.replicas} group(s) of {size} workers, each "
                f"group on one node; ask for fewer workers, or say --layout data"
            )
    return None


def room_for(config: TrainConfig, nodes: list[Node], wanted: int, at_most: int | None = None) -> int:
    """How many runs of these settings the cluster takes side by side: `wanted`, or as many as there is room for.

    On CPUs a run takes one for each worker, unless `at_most` says that more runs are to share them; a GPU is not
    shared. Raises JobError where not even one fits, or `at_most` is more than there are GPUs for.
    """
    workers = config.worker_range[1]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    use_gpu = uses_gpu(config.device, gpus)
    if use_gpu:
        # the columns of a net stay on one node
        together = 2 if config.layout == "columns" else 1
        room = sum(int(node.gpus) // together for node in nodes) * together // workers
        if not room:
            raise JobError(
                f"a trial of {workers} worker(s) needs as many GPUs"
                + (", two at a time on one node," if together > 1 else "")
                + f" and the cluster has {gpus:g} on {len(nodes)} node(s); ask for fewer --workers, or say --device cpu"
            )
        if at_most and at_most > room:
            raise JobError(f"max_concurrent = {at_most}: the cluster's {gpus:g} GPU(s) have room for {room} trial(s)")
    else:
        if cpus <= 0:
            raise JobError("the cluster has no CPUs for Ray tasks; start a node with --num-cpus above 0")
        room = at_most or max(1, int(cpus) // workers)
    if config.spread:  # a node a worker
        able = sum(bool(node.gpus if use_gpu else node.cpus) for node in nodes)
        room = min(room, max(1, able // workers))
    return min(wanted, room, at_most or room)


def threads_for(config: TrainConfig, nodes: list[Node], side_by_side: int, cpus_here: int) -> int:
    """CPU threads of a worker, so that those of all runs together are as many as there are CPUs."""
    on_a_node = -(-side_by_side * config.worker_range[1] // max(1, len([node for node in nodes if node.cpus])))
    least = min((node.cpus for node in nodes if node.cpus), default=1)
    return config.threads or max(1, int(min(least, cpus_here)) // on_a_node)


def place_groups(
    nodes: list[Node], resources: Resources, layout: Layout, use_gpu: bool, elastic: bool
) -> tuple[str, ...] | None:
    """A node for every worker, so that no group is split; None if the nodes are too small for that."""
    room = {}
    for node in nodes:
        slots = int((node.cpus + 1e-6) / resources.worker_cpus) if resources.worker_cpus else int(node.gpus)
        slots = min(slots, int(node.gpus)) if use_gpu else slots
        room[node.id] = min(slots, _slots(node, use_gpu)) if elastic else slots
    places: list[str] = []
    for node in sorted(nodes, key=lambda node: -room[node.id]):
        while room[node.id] >= layout.group_size and len(places) < layout.workers:
            places += [node.id] * layout.group_size
            room[node.id] -= layout.group_size
    return tuple(places) if len(places) == layout.workers else None


def _slots(node: Node, use_gpu: bool) -> int:
    """Workers that an elastic run puts on a node at most: one a GPU, or one a CPU."""
    return int(node.gpus if use_gpu else node.cpus)


def choose_layout(
    config: TrainConfig, workers: int, num_classes: int, nodes: list[Node], use_gpu: bool
) -> tuple[Layout, str]:
    """The layout that was asked for, or the one that auto finds, and why. Raises ValueError if it cannot be."""
    if config.layout != "auto":
        layout = Layout(config.layout, workers)
        _cost(config, layout, num_classes)
        return layout, f"layout {layout.kind} over {workers} worker(s), as asked"
    if workers == 1:
        return Layout("single", 1), "layout single: one worker"
    memory = _memory_of_worker(nodes, workers, use_gpu)
    found: list[tuple[bool, float, Layout, Cost, float]] = []
    for kind in KINDS[1:]:
        try:
            layout = Layout(kind, workers)
            cost = _cost(config, layout, num_classes)
        except ValueError:  # this layout cannot have so many workers
            continue
        pairs = sum(_slots(node, use_gpu) // layout.group_size for node in nodes)
        if kind == "columns" and len(nodes) > 1 and pairs < layout.replicas:
            continue  # the nodes would split a pair
        bytes_sent = sum(e.size_bytes for e in _exchanges(config, layout, num_classes))
        overhead = _overhead_s(config, layout, num_classes, nodes, use_gpu)
        fits = memory is None or cost.memory_bytes <= memory
        found.append((not fits, overhead, layout, cost, bytes_sent))
    # what fits first, by time; if nothing does, the smallest
    found.sort(key=lambda each: (each[0], each[3].memory_bytes if each[0] else each[1]))
    too_big, overhead, layout, cost, bytes_sent = found[0]
    others = "; ".join(
        f"{other.kind} {1000 * seconds:,.0f} ms" + (" and too much memory" if big else "")
        for big, seconds, other, _, _ in found[1:]
    )
    reason = (
        f"layout {layout.kind} over {workers} workers (auto): about {1000 * overhead:,.0f} ms a step beside the "
        f"arithmetic, {bytes_sent / 1e6:,.1f} MB sent and {cost.memory_bytes / 1e9:.2f} GB held by each"
        + (f" ({others})" if others else "")
    )
    if too_big:
        reason += f"; no layout fits the {(memory or 0) / 1e9:.0f} GB of a worker"
    return layout, reason


def ledger(config: TrainConfig, workers: int, num_classes: int) -> list[tuple[str, str]]:
    """What a worker sends in a step under every layout that the number of workers allows, for --dry-run."""
    rows = []
    for kind in KINDS:
        try:
            layout = Layout(kind, workers)
            cost = _cost(config, layout, num_classes)
        except ValueError:
            continue
        exchanges = _exchanges(config, layout, num_classes)
        total = sum(e.size_bytes for e in exchanges)
        parts = ", ".join(f"{e.name} {e.size_bytes / 1e6:.1f}" for e in exchanges)
        times = ", ".join(f"{1000 * total / rate:,.1f} ms by {link}" for link, rate in LINKS.items())
        text = f"{total / 1e6:,.1f} MB sent a step ({parts}): {times}" if exchanges else "nothing sent"
        rows.append((f"layout {kind}", f"{cost.memory_bytes / 1e9:.2f} GB a worker; {text}"))
    return rows


def _overhead_s(config: TrainConfig, layout: Layout, num_classes: int, nodes: list[Node], use_gpu: bool) -> float:
    """Seconds a step that a layout costs beside the arithmetic, which is the same for all: a rough estimate."""
    flops, moved = (GPU_FLOPS, GPU_MEMORY_BYTES_PER_S) if use_gpu else (CPU_FLOPS, CPU_MEMORY_BYTES_PER_S)
    inside = LINKS["PCIe 3.0 x16" if use_gpu else "loopback"]
    between = min(inside, LINKS["10 GbE"]) if len(nodes) > 1 else inside
    cost = _cost(config, layout, num_classes)
    arithmetic = cost.training_flops * config.global_batch_size / layout.workers / flops
    total = UPDATE_PASSES * 4 * cost.part_parameters / moved
    for exchange in _exchanges(config, layout, num_classes):
        within = layout.kind == "columns" and not exchange.overlaps
        seconds = exchange.size_bytes / (inside if within else between)
        total += max(0.0, seconds - OVERLAP * arithmetic) if exchange.overlaps else seconds
    return total


def _exchanges(config: TrainConfig, layout: Layout, num_classes: int) -> list[Exchange]:
    """In the precision asked for; auto counts as float32."""
    activation, other = {"bf16": (2, 4), "fp64": (8, 8)}.get(config.precision, (4, 4))
    return communication(
        layout, num_classes=num_classes, input_size=config.input_size, width=config.width,
        global_batch_size=config.global_batch_size, bytes_per_activation=activation, bytes_per_gradient=other,
    )  # fmt: skip


def _cost(config: TrainConfig, layout: Layout, num_classes: int) -> Cost:
    return estimate(
        num_classes=num_classes, input_size=config.input_size, width=config.width,
        global_batch_size=config.global_batch_size, layout=layout,
    )  # fmt: skip


def _memory_of_worker(nodes: list[Node], workers: int, use_gpu: bool) -> float | None:
    """Bytes that the poorest worker has, None if unknown."""
    if use_gpu:
        sizes = [GPU_MEMORY_GB.get(node.accelerator or "") for node in nodes if node.gpus]
        known = [size for size in sizes if size is not None]
        return 1e9 * min(known) if len(known) == len(sizes) and known else None
    memories = [node.memory_bytes for node in nodes if node.memory_bytes and node.cpus]
    return min(memories) / -(-workers // len(memories)) if memories else None


def _down(cpus: float) -> float:
    return int(cpus * 1000) / 1000  # Ray counts in ten-thousandths
