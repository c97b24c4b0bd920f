"""Placing a run on a cluster: how many workers, what each reserves, and on which nodes."""

import logging
from dataclasses import dataclass, field, replace

from alexnet.layouts import Layout
from orchestrator.base.exits import JobError
from orchestrator.base.shown import count_of
from orchestrator.cluster.layout_choice import choose_layout, worker_counts
from orchestrator.cluster.nodes import Node, uses_gpu, worker_slots
from orchestrator.config.train import TrainConfig

log = logging.getLogger(__name__)

WORKERS_PER_CPU = 2  # at most, on a machine that a run has to itself
OVERSEER_CPUS = 0.001  # of a trial's own process: Ray Tune has to reserve something for it


@dataclass(frozen=True)
class Resources:
    """What a run reserves on the cluster."""

    use_gpu: bool
    worker_cpus: float  # of each training worker
    feed_cpus: float  # of each Ray Data task
    feed_tasks: int  # concurrent tasks per worker

    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.worker_cpus} | ({"GPU": 1.0} if self.use_gpu else {})


@dataclass(frozen=True)
class Plan:
    """How a run is placed."""

    layout: Layout
    resources: Resources
    reason: str  # for the layout, one line
    node_of_worker: tuple[str, ...] = field(default=())  # empty: Ray chooses the nodes
    spread: bool = False  # one worker per node

    def strategy(self) -> str:
        """Ray's placement strategy; a single group of columns must stay on one node."""
        if self.spread:
            return "STRICT_SPREAD"
        return "STRICT_PACK" if self.layout.kind == "columns" and self.layout.replicas == 1 else "PACK"


def share_cpus(total_cpus: float, total_gpus: float, workers: int, device: str = "auto") -> Resources:
    """Divide the cluster's CPUs so that all workers and the Ray Data tasks of each fit at the same time.

    A task that waits for its consumer keeps its CPUs, and workers wait for each other in every step: one worker's tasks
    must not be able to take the CPUs that another's need. Raises JobError if there are too few GPUs, or no CPUs.
    """
    use_gpu = uses_gpu(device, total_gpus)
    if use_gpu and total_gpus < workers:
        raise JobError(
            f"--workers {workers}: the cluster has {count_of(int(total_gpus), 'GPU')}, and each worker needs one; "
            "use fewer workers or --device cpu"
        )
    if total_cpus <= 0:
        raise JobError("the cluster has no CPUs for Ray tasks; start a node with --num-cpus above 0")
    for_feed = 1.0 if total_cpus >= 2 else total_cpus / 2
    worker_cpus = _down(min(1.0, (total_cpus - for_feed) / workers))
    each = (total_cpus - workers * worker_cpus) / workers
    feed_cpus = _down(min(1.0, each))
    return Resources(use_gpu, worker_cpus, feed_cpus, max(1, int(each / feed_cpus)))


def make_plan(config: TrainConfig, nodes: list[Node], num_classes: int, num_concurrent: int = 0) -> Plan | None:
    """The best plan for these nodes; None if they are too few for an elastic run.

    num_concurrent: the trials that share the cluster equally, each with a process of its own; 0: a run that has the
    cluster to itself. Raises JobError if a fixed number of workers does not fit.
    """
    plan = _find_plan(config, nodes, num_classes, num_concurrent)
    if plan is None:
        log.debug("no plan for workers = %s on %s", config.workers, count_of(len(nodes), "node"))
    else:
        where = ", ".join(plan.node_of_worker) or plan.strategy()
        on = count_of(len(nodes), "node")
        log.debug("plan on %s: %s; %s; workers on: %s", on, plan.reason, plan.resources, where)
    return plan


def _find_plan(config: TrainConfig, nodes: list[Node], num_classes: int, num_concurrent: int) -> Plan | None:
    low, high = config.worker_range
    total_cpus, total_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    use_gpu = uses_gpu(config.device, total_gpus)
    if num_concurrent:
        total_cpus = total_cpus / num_concurrent - OVERSEER_CPUS
    for workers in worker_counts(config):
        elastic = low != high
        if elastic and workers > sum(worker_slots(node, use_gpu) for node in nodes):
            continue
        try:
            resources = share_cpus(total_cpus, total_gpus, workers, config.device)
        except JobError:
            if elastic:
                continue
            raise
        if use_gpu:  # a worker's CPUs must be on the node of its GPU
            beside = min(node.cpus / node.gpus for node in nodes if node.gpus)
            resources = replace(resources, worker_cpus=_down(min(resources.worker_cpus, beside)))
        layout, reason = choose_layout(config, workers, num_classes, nodes, use_gpu)
        plan = Plan(layout, resources, reason, spread=config.spread)
        if config.spread:
            able = sum(bool(node.gpus if use_gpu else node.cpus) for node in nodes)
            if able >= workers * max(1, num_concurrent):
                return plan
            if elastic:
                continue
            raise JobError(
                f"--workers {workers} --spread: one node per worker is needed, and the cluster has "
                f"{count_of(able, 'node')} with {'GPUs' if use_gpu else 'CPUs'}; use fewer workers or --no-spread"
            )
        if len(nodes) == 1 or layout.kind != "columns":  # Ray packs them
            return plan
        places = place_groups(nodes, resources, layout, use_gpu, elastic)
        if places:  # concurrent trials are packed by Ray
            return plan if num_concurrent > 1 else replace(plan, node_of_worker=places)
        if not elastic:
            size = layout.group_size
            raise JobError(
                f"--workers {workers}: the nodes have no room for {count_of(layout.replicas, 'group')} of {size} "
                f"workers, each group on one node; use fewer workers or --layout data"
            )
    return None


def too_many_workers(config: TrainConfig, cpus: float, gpus: float) -> str | None:
    """Why a run can never be placed on one machine with so many CPUs and GPUs, which cannot grow; None if it can be.

    A fixed number of workers may share CPUs, two each, for small nets and comparisons of layouts (benchmarks/
    same_losses.py); an elastic run, which takes what there is, shares none.
    """
    fewest, elastic = min(worker_counts(config)), isinstance(config.workers, str)
    use_gpu = uses_gpu(config.device, gpus)
    room = int(gpus) if use_gpu else int(cpus) if elastic else int(cpus) * WORKERS_PER_CPU
    if fewest <= room:
        return None
    has = count_of(int(gpus), "GPU") if use_gpu else count_of(int(cpus), "CPU")
    remedies = [f"--workers {room}"] if room else []
    remedies += ["--device cpu"] if use_gpu and fewest <= int(cpus) else []
    remedies += ["a cluster that has more (docs/cluster.md)"]
    return (
        f"--workers {config.workers}: this machine has {has}, room for {count_of(room, 'worker')} at most; "
        f"use {' or '.join(remedies)}"
    )


def room_for(config: TrainConfig, nodes: list[Node], wanted: int, at_most: int | None = None) -> int:
    """How many of `wanted` runs fit on the cluster at the same time.

    On CPUs a run takes one per worker, unless `at_most` asks for more runs to share them; GPUs are not shared. Raises
    JobError if not even one fits, or if there are too few GPUs for `at_most`.
    """
    workers = config.worker_range[1]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    use_gpu = uses_gpu(config.device, gpus)
    if use_gpu:
        # the two columns of a net stay on one node
        together = 2 if config.layout == "columns" else 1
        room = sum(int(node.gpus) // together for node in nodes) * together // workers
        if not room:
            raise JobError(
                f"a trial of {count_of(workers, 'worker')} needs {'one GPU' if workers == 1 else 'as many GPUs'}"
                + (", two at a time on one node," if together > 1 else "")
                + f" and the cluster has {gpus:g} on {count_of(len(nodes), 'node')}; "
                "use fewer --workers or --device cpu"
            )
        if at_most and at_most > room:
            raise JobError(
                f"max_concurrent = {at_most}: the cluster has {count_of(int(gpus), 'GPU')}, "
                f"room for {count_of(room, 'trial')} at a time"
            )
    else:
        if cpus <= 0:
            raise JobError("the cluster has no CPUs for Ray tasks; start a node with --num-cpus above 0")
        room = at_most or max(1, int(cpus) // workers)
    if config.spread:  # one node per worker
        able = sum(bool(node.gpus if use_gpu else node.cpus) for node in nodes)
        room = min(room, max(1, able // workers))
    return min(wanted, room, at_most or room)


def threads_for(config: TrainConfig, nodes: list[Node], num_concurrent: int, cpus_here: int) -> int:
    """CPU threads per worker, so that the threads of all concurrent runs add up to the CPUs."""
    on_a_node = -(-num_concurrent * config.worker_range[1] // max(1, len([node for node in nodes if node.cpus])))
    least = min((node.cpus for node in nodes if node.cpus), default=1)
    return config.threads or max(1, int(min(least, cpus_here)) // on_a_node)


def place_groups(
    nodes: list[Node], resources: Resources, layout: Layout, use_gpu: bool, elastic: bool
) -> tuple[str, ...] | None:
    """The node of every worker, so that no group is split over nodes; None if the nodes are too small."""
    room = {}
    for node in nodes:
        slots = int((node.cpus + 1e-6) / resources.worker_cpus) if resources.worker_cpus else int(node.gpus)
        slots = min(slots, int(node.gpus)) if use_gpu else slots
        room[node.id] = min(slots, worker_slots(node, use_gpu)) if elastic else slots
    places: list[str] = []
    for node in sorted(nodes, key=lambda node: -room[node.id]):
        while room[node.id] >= layout.group_size and len(places) < layout.workers:
            places += [node.id] * layout.group_size
            room[node.id] -= layout.group_size
    return tuple(places) if len(places) == layout.workers else None


def _down(cpus: float) -> float:
    return int(cpus * 1000) / 1000  # Ray counts in ten-thousandths
