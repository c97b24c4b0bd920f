"""The nodes of a cluster, with what placement needs to know of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    id: str
    cpus: float
    gpus: float = 0.0
    memory_bytes: float | None = None  # RAM that Ray may use
    accelerator: str | None = None


def alive(nodes: Iterable[dict[str, Any]]) -> list[Node]:
    """The nodes of `ray.nodes()` that are alive and have CPUs or GPUs, sorted by id."""
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
    """Whether a run with this device setting uses GPUs on a cluster that has this many."""
    return device == "gpu" or (device == "auto" and gpus > 0)


def worker_slots(node: Node, use_gpu: bool) -> int:
    """The most workers that an elastic run puts on a node: one per GPU, or one per CPU."""
    return int(node.gpus if use_gpu else node.cpus)
