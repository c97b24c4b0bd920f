"""Node types and prices: of the nodes that a cluster has, and of those that it can start.

The cluster's yaml gives every node type a price as a label, usd-per-hour, which its nodes carry. `ray up` leaves the
yaml on the head, which is how node types are known before any of their nodes exists.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from orchestrator.base.exits import last_line
from orchestrator.base.shown import shown
from orchestrator.cluster.nodes import uses_gpu
from orchestrator.config.models import read_whole_yaml
from orchestrator.config.train import TrainConfig

log = logging.getLogger(__name__)

PRICE = "usd-per-hour"
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the yaml on the head


@dataclass(frozen=True)
class NodeType:
    """A type of node that the cluster starts on demand."""

    name: str
    cpus: float
    gpus: float
    at_most: int
    usd_per_hour: float | None

    def __str__(self) -> str:
        price = "" if self.usd_per_hour is None else f", ${self.usd_per_hour:g} per hour each"
        return f"{self.name} ({self.cpus:g} CPUs, {self.gpus:g} GPUs{price})"


class _Kind(BaseModel):
    """What is read of a node type."""

    resources: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    max_workers: Annotated[int, Field(ge=0)] | None = None
    labels: dict[str, str | float] = {}

    @field_validator("labels")
    @classmethod
    def _has_a_price(cls, labels: dict[str, str | float]) -> dict[str, str | float]:
        if PRICE in labels and not 0 <= float(labels[PRICE]) < math.inf:
            raise ValueError(f"{PRICE} is not a price")
        return labels


class _Cluster(BaseModel):
    """What is read of a cluster's yaml; Ray's schema has the rest."""

    provider: dict[str, Any] = {}
    available_node_types: dict[str, _Kind] = {}
    head_node_type: str | None = None
    max_workers: Annotated[int, Field(ge=0)] | None = None


def read_bootstrap(path: Path = BOOTSTRAP) -> dict[str, Any]:
    """The cluster's yaml, as `ray up` left it on the head; empty on other machines."""
    try:
        config = read_whole_yaml(path.expanduser())
        _Cluster.model_validate(config)
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        log.warning("%s: ignored: %s", path, shown(reason))
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: ignored: %s", path, last_line(error))
        return {}
    return dict(config)


def node_types(path: Path = BOOTSTRAP) -> list[NodeType]:
    """The types of node that this cluster can start, smallest first; none if it has a fixed set of nodes."""
    config = _Cluster.model_validate(read_bootstrap(path))
    if config.provider.get("type") == "local":
        return []
    found = []
    for name, kind in config.available_node_types.items():
        most = (config.max_workers or 0) if kind.max_workers is None else kind.max_workers
        if name != config.head_node_type and most:
            price = kind.labels.get(PRICE)
            most = most if config.max_workers is None else min(most, config.max_workers)
            cpus, gpus = kind.resources.get("CPU", 0), kind.resources.get("GPU", 0)
            found.append(NodeType(name, cpus, gpus, most, None if price is None else float(price)))
    return sorted(found, key=lambda kind: (kind.gpus, kind.cpus))


def would_start(
    config: TrainConfig, types: Iterable[NodeType], wanted: int | None = 1
) -> tuple[NodeType, int, int] | None:
    """The type of node that runs would start on a cluster without nodes, how many nodes, and for how many runs.

    That is `wanted` runs, or fewer if the cluster cannot grow so far; wanted = None: as many as it can grow to. Returns
    None if no type will do. GPU nodes are taken if the cluster has a type with GPUs, unless the run is for CPUs.
    """
    workers = config.worker_range[0]
    with_gpu = [kind for kind in types if kind.gpus]
    if uses_gpu(config.device, len(with_gpu)):
        together = min(workers, 2 if config.layout in ("columns", "auto") else 1)
        rooms = [(kind, int(kind.gpus) // together * together) for kind in with_gpu]
    else:
        rooms = [(kind, int(kind.cpus) - 1) for kind in types if not kind.gpus]  # one for the feed
    if config.spread:
        rooms = [(kind, 1) for kind, room in rooms if room]
    for kind, room in rooms:
        most = room * kind.at_most // workers
        if most > 0:
            runs = min(wanted or most, most)
            return kind, -(-workers * runs // room), runs
    return None


def usd_per_hour(nodes: Iterable[dict[str, Any]]) -> float | None:
    """The price of all live nodes of `ray.nodes()` together; None if none has a price."""
    prices = [float(node["Labels"][PRICE]) for node in nodes if node["Alive"] and node.get("Labels", {}).get(PRICE)]
    return sum(prices) if prices else None


class Meter:
    """Adds up the cost of the live nodes in dollars."""

    def __init__(self, usd: float = 0.0) -> None:
        """usd: the cost of a run before it was resumed."""
        self.usd, self._at = usd, time.monotonic()
        self._rate: float | None = None

    def read(self, nodes: Iterable[dict[str, Any]]) -> float | None:
        """The cost until now; None if no node has a price. Call more often than nodes join and leave."""
        now = time.monotonic()
        rate = usd_per_hour(nodes)
        self.usd += (rate or 0.0) * (now - self._at) / 3600
        self._at = now
        if rate != self._rate:
            log.info("the nodes cost $%.2f per hour now; $%.2f so far", rate or 0.0, self.usd)
            self._rate = rate
        return self.usd if rate is not None or self.usd else None
