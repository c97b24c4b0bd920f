"""When the driver interferes with a fit: facts in, decisions out.

Nothing here asks Ray, reads a clock or waits, so a simulation can drive it through any history of a cluster. Times are
seconds of a monotonic clock.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

NODES_EVERY_S = 2.0  # between two looks at the cluster's nodes
SETTLED_S = 5.0  # room for more workers must last this long before a run grows
START_TIMEOUT_S = 90.0
STARVED_TIMEOUT_S = 300.0  # for a last step whose images may wait for CPUs that are gone
REQUEST_EVERY_S = 30.0

Lost = Literal["", "feed", "workers"]
Capacity = Literal["unavailable", "none", "pending", "ready"]


class Decision(Enum):
    """What the driver does next. Several may come of one look; they are carried out in order."""

    CANCEL = "the run was cancelled"
    FIT_OVER = "the fit is over"
    WARN_NOT_STARTED = f"the workers have not started in {START_TIMEOUT_S:.0f} s"
    END_FOR_LOST_NODES = "nodes of the workers were lost: end the fit"
    SAVE_FOR_LOST_FEED = "nodes of the feed were lost: save, stop and plan again"
    SAVE_TO_GROW = "the cluster has room for more workers: save, stop and plan again"
    REQUEST_CAPACITY = "request nodes for more workers"
    RELEASE_CAPACITY = "release the requested capacity"


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a look at the cluster's nodes has shown."""

    started: bool  # whether the workers of this fit have started, whatever became of them
    lost: Lost = ""  # which nodes that the fit needs were lost: those of its feed, or of its workers
    could_grow: bool = False  # whether there is room for more workers
    capacity: Capacity = "unavailable"  # of nodes for more workers: cannot be requested, is not, is, can be used


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the driver knows at one moment."""

    now: float
    cancelled: bool = False
    over: bool = False  # Ray Train's run has ended
    ended: bool = False  # the workers have reported that they stopped, or failed
    nodes: NodeFacts | None = None  # None: not looked at


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the driver remembers of a fit from one look to the next."""

    warn_at: float  # if the workers have not started by then
    look_at: float = -math.inf  # at the nodes, again
    request_at: float = -math.inf  # when to see to the requested capacity again
    could_grow_since: float = math.inf
    stopping: bool = False  # the workers were asked to save and stop
    save_by: float = math.inf  # after a loss in the feed; then the fit is ended

    @staticmethod
    def begin(now: float) -> "Watch":
        """Of a fit that was just started."""
        return Watch(warn_at=now + START_TIMEOUT_S)

    def needs_nodes(self, now: float) -> bool:
        """Whether it is time to look at the nodes."""
        return now >= self.look_at

    def needs_growth(self, started: bool, lost: Lost) -> bool:
        """Whether that look is to say if the run could grow."""
        return started and not lost and not self.stopping

    def needs_capacity(self, now: float, started: bool, lost: Lost) -> bool:
        """Whether that look is to say what became of the requested capacity."""
        return self.needs_growth(started, lost) and now >= self.request_at

    def step(self, facts: Facts) -> tuple["Watch", tuple[Decision, ...]]:
        """What to remember and what to do. No decision: keep waiting."""
        if facts.cancelled:
            return self, (Decision.CANCEL,)
        if facts.over or facts.ended:
            return self, (Decision.FIT_OVER,)
        if facts.nodes is None:
            return self, ()
        now, nodes, decisions = facts.now, facts.nodes, list[Decision]()
        watch = replace(self, look_at=now + NODES_EVERY_S)
        if not nodes.started and now > watch.warn_at:
            watch = replace(watch, warn_at=math.inf)
            decisions.append(Decision.WARN_NOT_STARTED)
        if nodes.lost == "workers" or now > watch.save_by:
            return watch, (*decisions, Decision.END_FOR_LOST_NODES)
        if nodes.lost == "feed" and watch.save_by == math.inf:
            # the requested capacity would take what the last step needs
            watch = replace(watch, stopping=True, save_by=now + STARVED_TIMEOUT_S)
            decisions += [Decision.SAVE_FOR_LOST_FEED, Decision.RELEASE_CAPACITY]
        grows = watch.needs_growth(nodes.started, nodes.lost) and nodes.could_grow
        watch = replace(watch, could_grow_since=min(watch.could_grow_since, now) if grows else math.inf)
        if now - watch.could_grow_since >= SETTLED_S:
            watch = replace(watch, stopping=True)
            decisions += [Decision.SAVE_TO_GROW, Decision.RELEASE_CAPACITY]
        elif watch.needs_capacity(now, nodes.started, nodes.lost):
            watch, decision = watch._see_to_capacity(now, nodes.capacity)
            decisions += decision
        return watch, tuple(decisions)

    def _see_to_capacity(self, now: float, capacity: Capacity) -> tuple["Watch", tuple[Decision, ...]]:
        """Capacity that is ready is released, so that the look after shows it as room to grow.

        It is requested again if the run has not grown by then, as when the room was a crashed worker's for a moment.
        """
        if capacity == "unavailable":
            return replace(self, request_at=math.inf), ()
        if capacity == "none":
            return replace(self, request_at=now + NODES_EVERY_S), (Decision.REQUEST_CAPACITY,)
        if capacity == "pending":
            return replace(self, request_at=now + NODES_EVERY_S), ()
        return replace(self, request_at=now + REQUEST_EVERY_S), (Decision.RELEASE_CAPACITY,)
