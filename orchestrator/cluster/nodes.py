"""The nodes of a cluster as far as placement needs them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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


def uses_gpu(device: str, gpus: float) -> bool:
    """Whether a run with this setting takes GPUs of a cluster that has so many."""
    return device == "gpu" or (device == "auto" and gpus > 0)


def worker_slots(node: Node, use_gpu: bool) -> int:
    """Workers that an elastic run puts on a node at most: one a GPU, or one a CPU."""
    return int(node.gpus if use_gpu else node.cpus)
