"""Choosing a run's layout by what each would cost: memory, bytes sent and seconds per step."""

import logging

from alexnet.cost import Cost, Exchange, communication, estimate
from alexnet.layouts import KINDS, Layout
from orchestrator.base.shown import count_of
from orchestrator.cluster.nodes import Node, worker_slots
from orchestrator.config.train import TrainConfig

log = logging.getLogger(__name__)

# Bytes per second that one worker sends. Published line rates, except the loopback, which was measured with gloo's
# all-gather of 10 and 50 MB between two processes of a two-core Sapphire Rapids machine (0.45 to 0.58e9, 2026-11-22).
LINKS = {"loopback": 0.5e9, "10 GbE": 1.25e9, "100 GbE": 12.5e9, "PCIe 3.0 x16": 15.75e9, "NVLink 3": 300e9}
# What a worker computes and moves, to one digit, which is enough to rank layouts that differ by factors.
CPU_FLOPS, CPU_MEMORY_BYTES_PER_S = 70e9, 10e9  # one core in float32 (benchmarks/step.py); two share the memory
GPU_FLOPS, GPU_MEMORY_BYTES_PER_S = 10e12, 500e9
UPDATE_PASSES = 7  # over the weights: the update reads gradient, weight and velocity and writes two of them
OVERLAP = 0.6  # the share of the arithmetic, in the backward pass, that overlaps with the all-reduce of gradients
GPU_MEMORY_GB = {
    "T4": 16, "L4": 24, "A10G": 24, "V100": 16, "V100-32G": 32, "A100": 40, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "L40S": 48,
}  # fmt: skip


def worker_counts(config: TrainConfig) -> list[int]:
    """The valid numbers of workers for this config, largest first. Raises ValueError if there is none."""
    low, high = config.worker_range
    wrong: ValueError | None = None
    found = []
    for workers in range(high, low - 1, -1):
        try:
            layout = Layout("data" if config.layout == "auto" else config.layout, workers)
            if config.global_batch_size % workers:
                lower = config.global_batch_size // workers * workers
                raise ValueError(
                    f"global_batch_size = {config.global_batch_size}: not divisible by {workers} workers; "
                    f"{lower or workers} or {lower + workers} would be"
                )
            _check_parts(config, workers)
            cost_of(config, layout, config.num_classes or 2)  # raises if the net cannot be built or partitioned so
        except ValueError as error:
            wrong = wrong or error
            continue
        found.append(workers)
    if wrong and low == high:
        raise wrong
    if wrong and not found:
        raise ValueError(f"workers = {config.workers}: none of these numbers works; for {high}: {wrong}")
    return found


def choose_layout(
    config: TrainConfig, workers: int, num_classes: int, nodes: list[Node], use_gpu: bool
) -> tuple[Layout, str]:
    """The layout asked for, or the cheapest one if it is auto, and the reason in one line.

    Raises ValueError for a layout that these workers cannot have.
    """
    if config.layout != "auto":
        layout = Layout(config.layout, workers)
        cost_of(config, layout, num_classes)
        return layout, f"layout {layout.kind} over {count_of(workers, 'worker')}, as asked"
    if workers == 1:
        return Layout("single", 1), "layout single: one worker"
    memory = memory_per_worker(nodes, workers, use_gpu)
    found: list[tuple[bool, float, Layout, Cost, float]] = []
    for kind in KINDS[1:]:
        try:
            layout = Layout(kind, workers)
            cost = cost_of(config, layout, num_classes)
        except ValueError:  # not a number of workers for this layout
            continue
        pairs = sum(worker_slots(node, use_gpu) // layout.group_size for node in nodes)
        if kind == "columns" and len(nodes) > 1 and pairs < layout.replicas:
            continue  # a pair of columns would be split over two nodes
        bytes_sent = sum(e.size_bytes for e in _exchanges(config, layout, num_classes))
        overhead = _overhead_s(config, layout, num_classes, nodes, use_gpu)
        fits = memory is None or cost.memory_bytes <= memory
        found.append((not fits, overhead, layout, cost, bytes_sent))
    # those that fit come first, by time; if none fits, the smallest
    found.sort(key=lambda each: (each[0], each[3].memory_bytes if each[0] else each[1]))
    too_big, overhead, layout, cost, bytes_sent = found[0]
    others = "; ".join(
        f"{other.kind} {1000 * seconds:,.0f} ms" + (", too large" if big else "")
        for big, seconds, other, _, _ in found[1:]
    )
    reason = (
        f"layout {layout.kind} over {workers} workers (auto): about {1000 * overhead:,.0f} ms per step beside the "
        f"arithmetic; each sends {bytes_sent / 1e6:,.1f} MB and holds {cost.memory_bytes / 1e9:.2f} GB"
        + (f" ({others})" if others else "")
    )
    if too_big:
        reason += f"; no layout fits into a worker's {(memory or 0) / 1e9:.0f} GB"
    log.debug("%s", reason)
    return layout, reason


def ledger(config: TrainConfig, workers: int, num_classes: int) -> list[tuple[str, str]]:
    """Memory and bytes sent per worker and step in every layout possible with so many workers, for --dry-run."""
    rows = []
    for kind in KINDS:
        try:
            layout = Layout(kind, workers)
            cost = cost_of(config, layout, num_classes)
        except ValueError:
            continue
        exchanges = _exchanges(config, layout, num_classes)
        total = sum(e.size_bytes for e in exchanges)
        parts = ", ".join(f"{e.name} {e.size_bytes / 1e6:.1f}" for e in exchanges)
        times = ", ".join(f"{1000 * total / rate:,.1f} ms over {link}" for link, rate in LINKS.items())
        text = f"{total / 1e6:,.1f} MB sent per step ({parts}): {times}" if exchanges else "nothing sent"
        rows.append((f"layout {kind}", f"{cost.memory_bytes / 1e9:.2f} GB per worker; {text}"))
    return rows


def _overhead_s(config: TrainConfig, layout: Layout, num_classes: int, nodes: list[Node], use_gpu: bool) -> float:
    """Estimated seconds per step beside the arithmetic, which all layouts share."""
    flops, moved = (GPU_FLOPS, GPU_MEMORY_BYTES_PER_S) if use_gpu else (CPU_FLOPS, CPU_MEMORY_BYTES_PER_S)
    inside = LINKS["PCIe 3.0 x16" if use_gpu else "loopback"]
    between = min(inside, LINKS["10 GbE"]) if len(nodes) > 1 else inside
    cost = cost_of(config, layout, num_classes)
    arithmetic = cost.training_flops * config.global_batch_size / layout.workers / flops
    total = UPDATE_PASSES * 4 * cost.part_parameters / moved
    for exchange in _exchanges(config, layout, num_classes):
        within = layout.kind == "columns" and not exchange.overlaps
        seconds = exchange.size_bytes / (inside if within else between)
        total += max(0.0, seconds - OVERLAP * arithmetic) if exchange.overlaps else seconds
    return total


def _exchanges(config: TrainConfig, layout: Layout, num_classes: int) -> list[Exchange]:
    """The exchanges of a step in the precision asked for; auto counts as float32."""
    activation, other = {"bf16": (2, 4), "fp64": (8, 8)}.get(config.precision, (4, 4))
    return communication(
        layout, num_classes=num_classes, input_size=config.crop_size, width=config.width,
        preset=config.preset, global_batch_size=config.global_batch_size, bytes_per_activation=activation,
        bytes_per_gradient=other,
    )  # fmt: skip


def _check_parts(config: TrainConfig, workers: int) -> None:
    """Raises ValueError of one line where a worker's images of a global batch cannot be divided as config says."""
    images = config.global_batch_size // workers
    if images % config.accumulate:
        near = [parts for parts in range(1, images + 1) if images % parts == 0]
        near.sort(key=lambda parts: abs(parts - config.accumulate))
        raise ValueError(
            f"accumulate = {config.accumulate}: the {count_of(images, 'image')} of each worker cannot be divided into "
            f"so many equal parts; {' or '.join(map(str, sorted(near[:2])))} would do"
        )


def cost_of(config: TrainConfig, layout: Layout, num_classes: int) -> Cost:
    """What a run costs a worker under a layout. Raises ValueError for a net that cannot be built or partitioned so."""
    return estimate(
        num_classes=num_classes, input_size=config.crop_size, width=config.width, preset=config.preset,
        global_batch_size=config.images_at_once, layout=layout, averaged=config.ema > 0,
    )  # fmt: skip


def memory_per_worker(nodes: list[Node], workers: int, use_gpu: bool) -> float | None:
    """Bytes of the worker that has least memory; None if unknown."""
    if use_gpu:
        sizes = [GPU_MEMORY_GB.get(node.accelerator or "") for node in nodes if node.gpus]
        known = [size for size in sizes if size is not None]
        return 1e9 * min(known) if len(known) == len(sizes) and known else None
    memories = [node.memory_bytes for node in nodes if node.memory_bytes and node.cpus]
    return min(memories) / -(-workers // len(memories)) if memories else None
