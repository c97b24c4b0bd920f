"""Nodes and their prices: those that a cluster has, and those that it can start.

A cluster's yaml gives every node type a price as a label, usd-per-hour. Nodes carry it while they live; the head has
the yaml itself, so that nodes are known that do not exist yet.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.cluster.nodes import uses_gpu
from orchestrator.config.train import TrainConfig

PRICE = "usd-per-hour"
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the yaml on the head


@dataclass(frozen=True)
class NodeType:
    """A kind of machine that the cluster starts when it is asked for."""

    name: str
    cpus: float
    gpus: float
    at_most: int
    usd_per_hour: float | None

    def __str__(self) -> str:
        price = "" if self.usd_per_hour is None else f", ${self.usd_per_hour:g} an hour each"
        return f"{self.name} ({self.cpus:g} CPUs, {self.gpus:g} GPUs{price})"


def node_types(path: Path = BOOTSTRAP) -> list[NodeType]:
    """What this cluster grows by, from the yaml on its head; none elsewhere, or where all nodes are there for good."""
    try:
        config = yaml.safe_load(path.expanduser().read_text())
    except (OSError, yaml.YAMLError):
        return []
    if config.get("provider", {}).get("type") == "local":
        return []
    found = []
    for name, kind in config.get("available_node_types", {}).items():
        has, most = kind.get("resources", {}), kind.get("max_workers", config.get("max_workers", 0))
        if name != config.get("head_node_type") and most:
            price = kind.get("labels", {}).get(PRICE)
            most = min(most, config.get("max_workers", most))
            found.append(NodeType(name, has.get("CPU", 0), has.get("GPU", 0), most, price and float(price)))
    return sorted(found, key=lambda kind: (kind.gpus, kind.cpus))


def would_start(
    config: TrainConfig, types: Iterable[NodeType], wanted: int | None = 1
) -> tuple[NodeType, int, int] | None:
    """The kind of node that a run on a cluster without nodes would start, how many of it, and how many such runs those
    have room for: `wanted`, or less if the cluster cannot grow so far; None: as many as it can. None if none will do.

    On GPUs wherever the cluster can have some and the run does not say otherwise.
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
    """Of all living nodes, from `ray.nodes()`; None where none has a price."""
    prices = [float(node["Labels"][PRICE]) for node in nodes if node["Alive"] and node.get("Labels", {}).get(PRICE)]
    return sum(prices) if prices else None


class Meter:
    """Dollars since it was made: the prices of the nodes that live, times the hours."""

    def __init__(self, usd: float = 0.0) -> None:
        """usd: what an interrupted run had cost before."""
        self.usd, self._at = usd, time.monotonic()

    def read(self, nodes: Iterable[dict[str, Any]]) -> float | None:
        """To be called more often than nodes come and go. None where no node has a price."""
        now = time.monotonic()
        rate = usd_per_hour(nodes)
        self.usd += (rate or 0.0) * (now - self._at) / 3600
        self._at = now
        return self.usd if rate is not None or self.usd else None
