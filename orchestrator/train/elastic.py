"""What a run asks about a cluster's nodes: the plan for a fit, lost nodes, room to grow, and capacity to grow into."""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from orchestrator.base.exits import JobError, signals_deferred
from orchestrator.base.shown import count_of
from orchestrator.cluster.capacity import CapacityRequest
from orchestrator.cluster.layout_choice import worker_counts
from orchestrator.cluster.nodes import Node, alive, uses_gpu
from orchestrator.cluster.placement import Plan, make_plan
from orchestrator.cluster.prices import node_types
from orchestrator.config.train import TrainConfig
from orchestrator.train.watch import NODES_EVERY_S, START_TIMEOUT_S, Capacity, Lost

log = logging.getLogger(__name__)


class ElasticPlanner:
    """Plans fits from the nodes that are there, and compares the nodes with the latest plan. Ray must be connected."""

    def __init__(self, config: TrainConfig, num_classes: int, num_concurrent: int = 0) -> None:
        """num_concurrent: of make_plan."""
        self.config, self.num_classes, self.num_concurrent = config, num_classes, num_concurrent
        self.planned_nodes: set[str] = set()  # ids of the nodes that the plan was made from
        self.tolerated_losses: set[str] = set()  # of those, lost ones that the fit does not need
        self._request: CapacityRequest | None = None

    def plan(self) -> Plan | None:
        """The next fit; None or JobError if the cluster has no room for it."""
        nodes = _nodes()
        self.planned_nodes, self.tolerated_losses = {node.id for node in nodes}, set()
        return make_plan(self.config, nodes, self.num_classes, self.num_concurrent)

    def lost_nodes(self) -> set[str]:
        """Ids of the planned nodes that are gone."""
        return self.planned_nodes - {node.id for node in _nodes()}

    def untolerated_losses(self) -> set[str]:
        """Ids of the lost nodes that the fit may have needed."""
        return self.lost_nodes() - self.tolerated_losses

    def lost(self, plan: Plan, worker_nodes: list[str]) -> Lost:
        """Which nodes that the fit needs were lost: those of its workers, or CPUs of its feed.

        worker_nodes: the ids of the workers' nodes; empty before they have started. The tasks of several workers must
        fit at once (placement.share_cpus); those of one worker can take turns.
        """
        lost = self.untolerated_losses()
        if not lost:
            return ""
        if not worker_nodes or lost & {*worker_nodes, *plan.node_of_worker}:
            return "workers"
        try:
            now = make_plan(self.config, _nodes(), self.num_classes, self.num_concurrent)
        except JobError:
            now = None
        if plan.layout.workers > 1 and (now is None or replace(now, reason=plan.reason) != plan):
            return "feed"
        log.info("lost %s that the fit does not need", count_of(len(lost), "node"))
        self.tolerated_losses |= lost
        return ""

    def could_grow(self, plan: Plan) -> bool:
        """Whether there is free room for more workers."""
        import ray

        low, high = self.config.worker_range
        if low == high or plan.layout.workers == high:
            return False
        larger = make_plan(self.config, _nodes(), self.num_classes)
        more = larger.layout.workers - plan.layout.workers if larger else 0
        free = ray.available_resources()
        return more > 0 and all(
            free.get(name, 0) >= more * count for name, count in plan.resources.per_worker().items()
        )

    def capacity(self, plan: Plan) -> Capacity:
        """What became of the request for nodes for the next larger number of workers."""
        if self._request is not None:
            return "ready" if self._request.ready(0) else "pending"
        return "none" if self._next_larger(plan) and not self.num_concurrent and node_types() else "unavailable"

    def request_capacity(self, plan: Plan) -> None:
        """Request nodes for the next larger number of workers. The request waits behind the fit's own room."""
        more = self._next_larger(plan) - plan.layout.workers
        self._request = CapacityRequest(self.config, more, on_gpu=plan.resources.use_gpu)

    def release_capacity(self) -> None:
        """Give up the request, and the room that it holds, if there is one."""
        if self._request is not None:
            self._request.release()
            self._request = None

    def wait_for_room(self, raise_if_cancelled: Callable[[], None], warn: Callable[[str], None]) -> Plan:
        """The next fit's plan, as soon as the cluster has room for it. Both functions are called now and then."""
        warned = -math.inf
        try:
            while True:
                raise_if_cancelled()
                with signals_deferred(), contextlib.suppress(JobError):  # no room now, but there was and will be again
                    plan = self.plan()
                    if plan is not None:
                        return plan
                if self._request is None:
                    self._request = CapacityRequest(self.config, self.config.worker_range[0], on_gpu=self._wants_gpu())
                if time.monotonic() - warned > START_TIMEOUT_S:
                    warned = time.monotonic()
                    fewest = count_of(self.config.worker_range[0], "worker")
                    warn(f"the cluster has no room for {fewest} now; waiting for nodes")
                time.sleep(NODES_EVERY_S)
        finally:
            self.release_capacity()

    def why_waiting(self, plan: Plan, placement_group: str | None) -> str:
        """What the workers wait for that have not started in START_TIMEOUT_S. placement_group: its id if known."""
        import ray

        late, workers = (
            f"the workers have not started in {START_TIMEOUT_S:.0f} s",
            count_of(plan.layout.workers, "worker"),
        )
        if placement_group is not None and _is_reserved(placement_group):
            return (
                f"{late}: the room for {workers} is reserved, and the processes are still starting, which takes long "
                "on a busy machine or from a slow disk"
            )
        each, there = plan.resources.per_worker(), ray.available_resources()
        wanted = ", ".join(f"{name} {plan.layout.workers * count:g}" for name, count in each.items())
        free = ", ".join(f"{name} {there.get(name, 0):g}" for name in each)
        if all(there.get(name, 0) >= plan.layout.workers * count for name, count in each.items()):
            return (
                f"{late}: the cluster has free what {workers} take together ({wanted} of {free}), but not where they "
                f"can be placed ({plan.strategy()}), or Ray has yet to place them"
            )
        return f"{late}: they wait for room; {workers} take {wanted}, and the cluster has free: {free}"

    def _next_larger(self, plan: Plan) -> int:
        """The next larger number of workers that the run may have; 0 if there is none."""
        return min((workers for workers in worker_counts(self.config) if workers > plan.layout.workers), default=0)

    def _wants_gpu(self) -> bool:
        """Settled by the first plan; before there is one, auto takes what the cluster has."""
        import ray

        with signals_deferred():
            return uses_gpu(self.config.device, ray.cluster_resources().get("GPU", 0))


def _is_reserved(placement_group: str) -> bool:
    """Whether a placement group, by its id, has its resources."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table

    group = PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group)))
    return bool(placement_group_table(group).get("state") == "CREATED")


def _nodes() -> list[Node]:
    import ray

    return alive(ray.nodes())
