"""Asking a cluster that grows for nodes, waiting for them, and counting what they cost."""

import math
import time
from collections.abc import Callable
from typing import Any

from orchestrator.base.environment import on_cluster
from orchestrator.base.exits import JobError, signals_deferred
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.join import check_shared
from orchestrator.cluster.nodes import alive, uses_gpu
from orchestrator.cluster.prices import Meter, NodeType, node_types, would_start
from orchestrator.config.train import TrainConfig

SAY_EVERY_S = 30.0
GROW_PATIENCE_S = 600.0  # spot may never have as many as are wished for


def wait_for_nodes(config: TrainConfig, runs: int, output: StoragePath, say: Callable[[str], None]) -> None:
    """On a cluster that grows when asked: ask for nodes for so many runs side by side, or as many as it can grow to,
    and wait until they are there; for all but the first run only GROW_PATIENCE_S. They must see the output, too.

    Raises JobError where the cluster cannot grow so far.
    """
    types = node_types()
    if not on_cluster() or not types or not runs:
        return
    found = would_start(config, types, runs)
    if found is None:
        has = "; ".join(f"{kind.at_most} {kind}" for kind in types)
        raise JobError(f"--workers {config.workers}: more than this cluster can grow to: {has}")
    kind, _, runs = found
    _wait_for_room(config, kind, 1, math.inf, say)
    if runs > 1:
        _wait_for_room(config, kind, runs, GROW_PATIENCE_S, say)
    check_shared(output)


class CapacityRequest:
    """Room for so many workers, asked of the cluster, which may start nodes for it. It is a placement group, which ends
    with this process whatever becomes of it: nobody pays for nodes that nobody waits for. Once granted it holds the
    room, until `release`."""

    def __init__(self, config: TrainConfig, workers: int, *, on_gpu: bool, runs: int = 1) -> None:
        from ray.util import placement_group

        together = 2 if config.layout == "columns" and workers % 2 == 0 and not config.spread else 1
        unit = {"GPU": 1.0, "CPU": 1.0} if on_gpu else {"CPU": 2.0 if config.spread else 1.0}
        bundle = {name: amount * together for name, amount in unit.items()}
        feed = [] if on_gpu or config.spread else [{"CPU": 1.0}]  # on GPU nodes there are CPUs enough
        bundles = [bundle] * (workers // together) * runs + feed
        strategy = "STRICT_SPREAD" if config.spread and runs == 1 else "PACK"
        with signals_deferred():
            self._group: Any = placement_group(bundles, strategy=strategy)

    def ready(self, within_s: float) -> bool:
        """To be called with signals deferred."""
        return bool(self._group.wait(within_s))

    def release(self) -> None:
        from ray.util import remove_placement_group

        if self._group is not None:
            group, self._group = self._group, None
            with signals_deferred():
                remove_placement_group(group)


def _wait_for_room(
    config: TrainConfig, kind: NodeType, runs: int, patience_s: float, say: Callable[[str], None]
) -> None:
    import ray

    wish = CapacityRequest(config, config.worker_range[0], on_gpu=uses_gpu(config.device, kind.gpus), runs=runs)
    began, said = time.monotonic(), -math.inf
    try:
        while time.monotonic() - began < patience_s:
            with signals_deferred():
                if wish.ready(0.5):
                    return
                here = len(alive(ray.nodes()))
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"waiting for nodes such as {kind.name}: {here} here, {said - began:.0f} s so far")
    finally:
        wish.release()


def cost_so_far(meter: Meter) -> float | None:
    """Dollars, of all nodes; None where they have no price."""
    if not on_cluster():
        return None
    import ray

    with signals_deferred():
        return meter.read(ray.nodes())
