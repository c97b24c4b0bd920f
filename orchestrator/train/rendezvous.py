"""What the workers agree on before the first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from alexnet.layouts import Layout
from orchestrator.config.train import TrainConfig


class Agreement(NamedTuple):
    """The same on all workers."""

    nodes: list[str]  # Ray's node id of every rank
    bf16: bool


def rendezvous(config: TrainConfig, layout: Layout, node: str, device: torch.device) -> Agreement:
    """Exchange nodes, GPUs and precision with the other workers; `node` is this worker's.

    Raises ValueError, on all workers alike, where they are not placed as the layout needs them.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    mine = (node, gpu, wants_bf16(config.precision, device))
    everyone: list[Any] = [mine]
    if layout.workers > 1:
        everyone = [None] * layout.workers
        # gloo even where there are GPUs: NCCL would fail on the very faults that are looked for here
        gloo: Any = dist.new_group(backend="gloo")
        dist.all_gather_object(everyone, mine, group=gloo)
    nodes, gpus, want_bf16 = (list(column) for column in zip(*everyone, strict=True))
    check_placement(layout, nodes, gpus, spread=config.spread)
    return Agreement(nodes, all(want_bf16))


def check_placement(layout: Layout, nodes: Sequence[str], gpus: Sequence[str | None], *, spread: bool) -> None:
    """Raises ValueError where two ranks share a GPU, or a net's columns are on different nodes unless `spread`.

    nodes, gpus: of every rank, in order.
    """
    if None not in gpus and len(set(gpus)) < layout.workers:
        shared = next(uuid for uuid in gpus if gpus.count(uuid) > 1)
        ranks = " and ".join(str(rank) for rank, uuid in enumerate(gpus) if uuid == shared)
        raise ValueError(
            f"workers {ranks} share one GPU, which NCCL does not support: give each worker its own GPU, "
            "or use --device cpu"
        )
    if layout.kind == "columns" and not spread:
        for rank in range(0, layout.workers, layout.group_size):
            if len({nodes[other] for other in layout.group_of(rank)}) > 1:
                raise ValueError(
                    f"workers {rank} and {rank + 1} hold the columns of one net but are on different nodes: each "
                    f"node needs room for {layout.group_size} workers; or use --layout data, or --spread"
                )


def wants_bf16(precision: str, device: torch.device) -> bool:
    """What `auto` means: bfloat16 on GPUs that have it and on CPUs that multiply it faster, else float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _multiplies_bf16()


def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it: Intel's matrix units (AMX), or the dot products of AVX-512."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
