"""Capacity of a cluster that grows on demand: requesting nodes, waiting for them, and their cost so far."""

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

from orchestrator.base.environment import on_cluster
from orchestrator.base.exits import JobError, signals_deferred
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.join import check_shared
from orchestrator.cluster.nodes import alive, uses_gpu
from orchestrator.cluster.placement import too_many_workers
from orchestrator.cluster.prices import Meter, NodeType, node_types, would_start
from orchestrator.config.train import TrainConfig

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0  # while waiting
GROW_TIMEOUT_S = 600.0  # the cloud may never have as many spot nodes as are wanted


def wait_for_nodes(config: TrainConfig, runs: int, output: StoragePath, say: Callable[[str], None]) -> None:
    """On a cluster that grows on demand, request nodes for `runs` concurrent runs and wait for them.

    It waits for one run's nodes as long as it takes, and for the others' (as many as the cluster can grow to) at most
    GROW_TIMEOUT_S. Raises JobError if the cluster cannot grow far enough for one run, or its nodes do not share
    `output`, and where there is no cluster, if this machine has no room for one run.
    """
    if not on_cluster():
        _check_private(config)
        return
    types = node_types()
    if not types or not runs:
        return
    found = would_start(config, types, runs)
    if found is None:
        has = "; ".join(f"{kind.at_most} {kind}" for kind in types)
        raise JobError(f"--workers {config.workers}: more than this cluster can grow to: {has}")
    kind, count, runs = found
    log.info("%s at a time: %s such as %s", count_of(runs, "run"), count_of(count, "node"), kind)
    _wait_for_capacity(config, kind, 1, math.inf, say)
    if runs > 1 and not _wait_for_capacity(config, kind, runs, GROW_TIMEOUT_S, say):
        log.info("no nodes for %d runs within %.0f s; starting with those that are there", runs, GROW_TIMEOUT_S)
    check_shared(output)


def check_machine(config: TrainConfig) -> None:
    """Raises ValueError of one line for more workers than this machine has room for, if a run is to have it alone."""
    if not on_cluster():
        import torch

        if why := too_many_workers(config, os.cpu_count() or 1, torch.cuda.device_count()):
            raise ValueError(why)


class CapacityRequest:
    """A request for room for workers, which makes the cluster start nodes.

    It is a placement group, which ends with this process in any case: nobody pays for nodes that nobody waits for. Once
    ready it holds the room until `release`.
    """

    def __init__(self, config: TrainConfig, workers: int, *, on_gpu: bool, runs: int = 1) -> None:
        from ray.util import placement_group

        together = 2 if config.layout == "columns" and workers % 2 == 0 and not config.spread else 1
        unit = {"GPU": 1.0, "CPU": 1.0} if on_gpu else {"CPU": 2.0 if config.spread else 1.0}
        bundle = {name: amount * together for name, amount in unit.items()}
        feed = [] if on_gpu or config.spread else [{"CPU": 1.0}]  # GPU nodes have CPUs to spare
        bundles = [bundle] * (workers // together) * runs + feed
        strategy = "STRICT_SPREAD" if config.spread and runs == 1 else "PACK"
        with signals_deferred():
            self._group: Any = placement_group(bundles, strategy=strategy)
        what = f"{count_of(workers, 'worker')} of {count_of(runs, 'run')}"
        log.info("requested capacity for %s: %s, %s", what, bundles, strategy)

    def ready(self, within_s: float) -> bool:
        """Whether the room is there, or is within so many seconds. Call with signals deferred."""
        return bool(self._group.wait(within_s))

    def release(self) -> None:
        """Give up the request and the room that it holds. Further calls do nothing."""
        from ray.util import remove_placement_group

        if self._group is not None:
            group, self._group = self._group, None
            with signals_deferred():
                remove_placement_group(group)
            log.debug("released the requested capacity")


def _check_private(config: TrainConfig) -> None:
    """As check_machine, by what Ray has found: in a container that may be less. Raises JobError."""
    import ray

    with signals_deferred():
        nodes = alive(ray.nodes())
    if why := too_many_workers(config, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)):
        raise JobError(why)


def _wait_for_capacity(
    config: TrainConfig, kind: NodeType, runs: int, timeout_s: float, say: Callable[[str], None]
) -> bool:
    """Whether there was room for `runs` runs at once within timeout_s."""
    import ray

    request = CapacityRequest(config, config.worker_range[0], on_gpu=uses_gpu(config.device, kind.gpus), runs=runs)
    began, reported = time.monotonic(), -math.inf
    try:
        while time.monotonic() - began < timeout_s:
            with signals_deferred():
                if request.ready(0.5):
                    log.info("capacity for %s after %.0f s", count_of(runs, "run"), time.monotonic() - began)
                    return True
                here = len(alive(ray.nodes()))
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                say(f"waiting for nodes such as {kind.name}: {here} joined after {reported - began:.0f} s")
    finally:
        request.release()
    return False


def cost_so_far(meter: Meter) -> float | None:
    """The cost of all nodes in dollars; None if they have no price."""
    if not on_cluster():
        return None
    import ray

    with signals_deferred():
        return meter.read(ray.nodes())
