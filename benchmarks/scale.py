"""How far does training scale, what breaks first, and what would the paper's run cost on many GPUs?

    python benchmarks/scale.py --measure        measure the parts here, predict 1, 2, 4 and 8 processes, and run them
    python benchmarks/scale.py                  simulate 1 to 1,024 workers from those parts (docs/scale.md)

A step is a discrete-event simulation (simulation.py) of every worker: layers, gradients in buckets, exchanges over
links that a node's workers share, images from the feed. --measure (scale_parts.py) measures each part alone, and none
in the runs that are predicted. The nodes with GPUs are those of machines.json: figures that others publish, or that are
assumed.

--measure needs the machine for itself for about six minutes. Both write to one JSON file: what --measure found stays
there.
"""

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure

# isort: split
import numpy as np
import scale_parts
import simulation
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from simulation import Cluster, Compute, Epoch, Exchanging, FeedCost, Head, Net, Plan, Send, Steps, Wait

from alexnet.cost import estimate
from alexnet.layouts import KINDS, Layout
from orchestrator.cluster.layout_choice import CPU_MEMORY_BYTES_PER_S, LINKS
from orchestrator.cluster.placement import share_cpus
from orchestrator.cluster.prices import node_types
from orchestrator.data.feed import TASK_BYTES
from orchestrator.data.order import Order, plan_epoch, rank_slice, rows_of_pass
from orchestrator.data.shards import ROW_GROUP_ROWS
from orchestrator.train.watch import NODES_EVERY_S

MACHINES, CLUSTER = Path(__file__).parent / "machines.json", Path(__file__).parent.parent / "cluster.yaml"
IMAGENET = {"train": 1_281_167, "val": 50_000}  # images of ILSVRC2012
EPOCHS = 90  # of the paper (section 5)
WINDOW = 4096  # rows among which an epoch mixes, the default of --shuffle-window
WORKER_IMAGES = 128  # of a step, the paper's batch (section 5), until the global batch is
LARGEST_BATCH = 32_768  # the largest of You et al. 2017 (arXiv 1708.03888), with batch normalization
POLL_EVERY_S = 2.0  # Ray Train's default between two looks at its workers
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REAL = (1, 2, 4, 8)  # processes that really run
PAPER = (8, 64, 512)  # GPUs for the paper's run
REST = ("paper_flops_per_s", "decoding", "requests", "row_group_s", "by_workers", "ray")  # parts that are not of steps
SEEDS = 20  # of runs with failures
NOTICEABLE = 1.02  # times as fast, more than simulated steps differ by chance
STEPS = {1: 30, 64: 14, 256: 10}  # that are simulated of so many workers or more
DAY_S = 86_400.0


class Machine(BaseModel):
    """A node of machines.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    node: str
    gpu: str
    gpus: PositiveInt
    cpus: PositiveInt
    usd_per_hour: PositiveFloat | None
    flops_per_s: PositiveFloat
    memory_bytes_per_s: PositiveFloat
    inside: PositiveFloat
    between: PositiveFloat
    storage: PositiveFloat
    stated: dict[str, str]
    assumed: dict[str, str]


class Everywhere(BaseModel):
    """What machines.json has for all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    round_s: PositiveFloat
    requests_per_s: PositiveFloat
    checkpoint_bytes_per_s: PositiveFloat
    mtbf_node_days: PositiveFloat
    restart_s: PositiveFloat
    stated: dict[str, str]
    assumed: dict[str, str]


def machines(path: Path = MACHINES) -> tuple[dict[str, Machine], Everywhere]:
    """The nodes by name; a price that is missing is that of the type with GPUs of cluster.yaml."""
    found = json.loads(path.read_text())
    [gpu_type] = [kind for kind in node_types(CLUSTER) if kind.gpus]
    nodes = {name: Machine(**each) for name, each in found.items() if name not in ("about", "all")}
    priced = {
        name: node if node.usd_per_hour else node.model_copy(update={"usd_per_hour": gpu_type.usd_per_hour})
        for name, node in nodes.items()
    }
    return priced, Everywhere(**found["all"])


# --- what the feed reads ---


@functools.cache
def _imagenet() -> Order:
    rows = IMAGENET["train"]
    groups = np.full(-(-rows // ROW_GROUP_ROWS), ROW_GROUP_ROWS, np.int64)
    groups[-1] = rows - ROW_GROUP_ROWS * (len(groups) - 1)
    return plan_epoch(groups, seed=0, epoch=0, window=WINDOW)


@functools.cache
def row_groups_per_image(workers: int, worker_images: int, *, by_group: bool = False) -> float:
    """Row groups that a task of the feed reads for each of its images, counted in the order of an epoch.

    A worker takes its slice of every global batch, and a batch is of rows from all row groups of a window. What a
    process has read for an earlier task is not counted as saved: a node's tasks run in many processes. by_group: what
    it would be if the rows of every global batch were in the order of their row groups, which they are not.
    """
    order, batch = _imagenet(), workers * worker_images
    group = order.group
    if by_group:
        group = group[np.lexsort((group, np.arange(len(group)) // batch))]
    steps = max(1, int(TASK_BYTES / (3 * 224**2 * worker_images)))
    in_all = min(steps, len(order) // batch)
    read = images = 0
    for rank in sorted({0, workers // 3, workers - 1}):
        slices = [rank_slice(step, len(order), batch, rank, workers) for step in range(in_all)]
        positions = np.concatenate([np.arange(lo, hi) for lo, hi in slices])
        read, images = read + len(np.unique(group[positions])), images + len(positions)
    return read / images


def feed_cost(
    parts: dict[str, Any], workers: int, worker_images: int, cpus: float, gpus: int, everywhere: Everywhere,
    storage: float, *, remote: bool,
) -> FeedCost:  # fmt: skip
    """Of a worker's images of a step. cpus, gpus: of all nodes. remote: the shards are in object storage, and not on
    every node."""
    groups = row_groups_per_image(workers, worker_images)
    shares = share_cpus(cpus, gpus, workers)
    decode, reads = parts["decoding"], parts["requests"]
    cpu_s = worker_images * (1 / decode["images_per_core_s"] + groups * parts["row_group_s"])
    own = shares.feed_cpus * shares.feed_tasks if gpus else 1.0  # a core of a node without GPUs is shared as it comes
    if not remote:
        return FeedCost(cpu_s / own, 0.0, 0.0, math.inf, math.inf)
    return FeedCost(
        cpu_s / own, worker_images * groups * (reads["to_open"] + reads["for_a_row_group"]),
        worker_images * groups * ROW_GROUP_ROWS * decode["bytes_per_image"], everywhere.requests_per_s, storage,
    )  # fmt: skip


# --- from machines and parts to simulated steps ---


@dataclass(frozen=True)
class Row:
    """A layout of so many workers on some machine."""

    layout: str
    workers: int
    worker_images: int
    step_s: float
    images_per_s: float
    efficiency: float  # of one worker's images/s, times workers
    bound: str  # what steps would be faster with more of
    remote_images_per_s: float  # with the shards in object storage
    remote_bound: str
    use: dict[str, float]  # what arithmetic and exchanges need of each thing to go on, as a share of what there is


def images_of(workers: int) -> int:
    """Images of a worker in a step."""
    return max(1, min(WORKER_IMAGES, LARGEST_BATCH // workers))


def num_steps(workers: int) -> int:
    return next(steps for least, steps in reversed(STEPS.items()) if workers >= least)


def exchanging_of(parts: dict[str, Any]) -> Exchanging:
    return Exchanging(**parts["exchanging"])


def cluster_of(machine: Machine | None, parts: dict[str, Any], everywhere: Everywhere) -> Cluster:
    """None: nodes like this one, joined by 10 Gb/s."""
    if machine is None:
        cores = parts["cores"]
        return Cluster(cores, cores, math.inf, LINKS["10 GbE"], exchanging_of(parts), parts["crowding"])
    return Cluster(
        machine.gpus, None, machine.inside, machine.between, Exchanging(round_s=everywhere.round_s, tree=True)
    )


def curve(machine: Machine | None, parts: dict[str, Any], everywhere: Everywhere, counts: tuple[int, ...]) -> list[Row]:
    """Every layout of the paper's net for so many workers. machine: None means nodes like this one."""
    cluster, net, rows = cluster_of(machine, parts, everywhere), Net(), list[Row]()
    if machine is None:
        flops, memory = parts["paper_flops_per_s"], CPU_MEMORY_BYTES_PER_S / parts["cores"]
    else:
        flops, memory = machine.flops_per_s, machine.memory_bytes_per_s
    one = 0.0
    for workers in counts:
        images, nodes = images_of(workers), -(-workers // cluster.workers_per_node)
        cpus = nodes * (machine.cpus if machine else parts["cores"])
        gpus = workers if machine else 0
        feeds = [
            feed_cost(parts, workers, images, cpus, gpus, everywhere, machine.storage if machine else LINKS["10 GbE"],
                      remote=remote)
            for remote in (False, True)
        ]  # fmt: skip
        for kind in KINDS:
            if (kind == "single") != (workers == 1):
                continue
            try:
                layout = Layout(kind, workers)
                estimate(**net.sizes(), global_batch_size=images * workers, layout=layout)
            except ValueError:
                continue
            plan = simulation.step_plan(net, layout, images, flops, memory)
            bare, near, far = (
                simulation.simulate_steps(
                    cluster, layout, plan, steps=num_steps(workers), delays=parts["delays"], feed=feed
                )
                for feed in (None, *feeds)
            )
            rate, per_node = images * workers / near.step_s, cluster.workers_per_node
            one = one or rate
            rows.append(
                Row(
                    kind, workers, images, near.step_s, rate, rate / (one * workers), bound_of(near, bare),
                    images * workers / far.step_s, bound_of(far, bare, feeds[1], workers, per_node),
                    use_of(feeds[1], bare.step_s, workers, per_node, parts),
                )
            )  # fmt: skip
    return rows


def bound_of(steps: Steps, bare: Steps, remote: FeedCost | None = None, workers: int = 1, per_node: int = 1) -> str:
    """What steps would be faster with more of. bare: steps whose images are there. remote: what the feed reads
    from object storage, if it does."""
    if steps.step_s < NOTICEABLE * bare.step_s:
        return "compute" if bare.compute_s > bare.exchange_s else "exchange"
    if remote is None:
        return "decoding"
    takes = {
        "decoding": remote.decode_s,
        "storage requests": workers * remote.requests / remote.requests_per_s,
        "storage bytes": min(workers, per_node) * remote.storage_bytes / remote.node_bytes_per_s,
    }
    return max(takes, key=lambda name: takes[name])


def use_of(remote: FeedCost, step_s: float, workers: int, per_node: int, parts: dict[str, Any]) -> dict[str, float]:
    """What steps of so many seconds need of each thing that grows with the number of workers, as a share of what there
    is. remote: what the feed reads from object storage."""
    tasks_per_s = workers * images_of(workers) / step_s / max(1, int(TASK_BYTES / (3 * 224**2)))
    takes = {
        "storage requests": workers * remote.requests / remote.requests_per_s,
        "storage bytes of a node": min(workers, per_node) * remote.storage_bytes / remote.node_bytes_per_s,
        "decoding": remote.decode_s,
        "a worker's plan of a step": at(parts["by_workers"]["parts"], workers),
    }
    return {name: seconds / step_s for name, seconds in takes.items()} | {
        "the head, for the feed's tasks": tasks_per_s * parts["ray"]["head_task_s"],
        "the driver, for its polls": workers * parts["ray"]["poll_s"] / POLL_EVERY_S,
        "the driver, for the plans of an elastic run": at(parts["by_workers"]["plan"], workers) / NODES_EVERY_S,
    }


def at(measured: dict[str, float], workers: int) -> float:
    """A measured time for so many workers; between two that were measured, in proportion."""
    known = sorted((int(count), seconds) for count, seconds in measured.items())
    return float(np.interp(workers, [count for count, _ in known], [seconds for _, seconds in known]))


def breaks(rows: list[Row]) -> list[tuple[str, int | None, float]]:
    """For each thing the fewest workers that need all of it, with the layout that is fastest, and what they need; those
    that break first come first. None: it does not break."""
    best = {workers: max((row for row in rows if row.workers == workers), key=lambda row: row.images_per_s)
            for workers in {row.workers for row in rows}}  # fmt: skip
    found: list[tuple[str, int | None, float]] = []
    for name in next(iter(best.values())).use:
        over = [workers for workers, row in sorted(best.items()) if row.use[name] > 1]
        found.append((name, over[0] if over else None, best[max(best)].use[name]))
    return sorted(found, key=lambda each: (each[1] is None, each[1] or 0, -each[2]))


def reading_table(rows: list[Row], parts: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: what the feed reads at the rate of the fastest layout."""
    yield "| workers | row groups for an image | bytes for an image | for all workers | row groups if sorted |"
    yield "|---:|---:|---:|---:|---:|"
    for workers in sorted({row.workers for row in rows}):
        row = max((row for row in rows if row.workers == workers), key=lambda each: each.images_per_s)
        now, then = (row_groups_per_image(workers, row.worker_images, by_group=sort) for sort in (False, True))
        size = now * ROW_GROUP_ROWS * parts["decoding"]["bytes_per_image"]
        total = f"{size * row.images_per_s / 1e9:,.2f} GB/s"
        yield f"| {workers:,} | {now:.2f} | {size / 1e3:,.0f} KB | {total} | {then:.2f} |"


def stops_paying(rows: list[Row]) -> list[tuple[str, int | None, int | None, str]]:
    """For each layout: the fewest workers at an efficiency below a half, and the fewest where another is faster."""
    found = []
    for kind in KINDS[1:]:
        mine = [row for row in rows if row.layout == kind]
        below = next((row.workers for row in mine if row.efficiency < 0.5), None)
        beaten, by = None, ""
        for row in mine:
            fastest = max((r for r in rows if r.workers == row.workers), key=lambda each: each.images_per_s)
            if fastest.images_per_s > NOTICEABLE * row.images_per_s:
                beaten, by = row.workers, fastest.layout
                break
        found.append((kind, below, beaten, by))
    return found


# --- the paper's run ---


def epoch_of(row: Row, parts: dict[str, Any], everywhere: Everywhere, *, remote: bool) -> Epoch:
    """An epoch of ImageNet: training, validation and the probe at a third of a step's time, a checkpoint, reports."""
    rate = row.remote_images_per_s if remote else row.images_per_s
    evaluated = IMAGENET["val"] + rows_of_pass("probe", IMAGENET)
    size = 2 * simulation.BYTES * estimate(**Net().sizes(), global_batch_size=1).num_parameters
    head = Head(parts["ray"]["poll_s"], POLL_EVERY_S, parts["ray"]["report_s"])
    return simulation.simulate_epoch(
        head, row.workers, IMAGENET["train"] / rate, evaluated / 3 / rate, size / everywhere.checkpoint_bytes_per_s
    )


def paper_run(
    machine: Machine, rows: list[Row], parts: dict[str, Any], everywhere: Everywhere, *, remote: bool
) -> list[dict[str, Any]]:  # fmt: skip
    """90 epochs on 8, 64 and 512 GPUs, in the layout that is fastest on each."""
    found = []
    for gpus in PAPER:
        candidates = [row for row in rows if row.workers == gpus]
        row = max(candidates, key=lambda row: row.remote_images_per_s if remote else row.images_per_s)
        epoch, nodes = epoch_of(row, parts, everywhere, remote=remote), gpus // machine.gpus
        runs = [
            simulation.simulate_run(
                epoch.whole_s, EPOCHS, nodes, everywhere.mtbf_node_days * DAY_S, everywhere.restart_s, seed=seed
            )
            for seed in range(SEEDS)
        ]  # fmt: skip
        whole_s = statistics.mean(run.whole_s for run in runs)
        assert machine.usd_per_hour is not None
        found.append(
            {
                "gpus": gpus, "layout": row.layout, "global_batch_size": gpus * row.worker_images,
                "images_per_s": IMAGENET["train"] / epoch.train_s, "epoch": asdict(epoch), "days": whole_s / DAY_S,
                "usd": nodes * machine.usd_per_hour * whole_s / 3600,
                "failures": statistics.mean(run.failures for run in runs),
                "lost_s": statistics.mean(run.lost_s for run in runs),
                "expected_failures": nodes * whole_s / (everywhere.mtbf_node_days * DAY_S),
                "expected_lost_s": simulation.expected_run_s(
                    epoch.whole_s, EPOCHS, nodes, everywhere.mtbf_node_days * DAY_S, everywhere.restart_s
                ) - EPOCHS * epoch.whole_s,
            }
        )  # fmt: skip
    return found


# --- measured here ---


def kinds_of(workers: int) -> list[str]:
    return ["single"] if workers == 1 else list(KINDS[1:])


def measured_steps(work: scale_parts.Work, cores: int) -> dict[str, Any]:
    """The parts of a step, each alone, and the real steps, right after one another: machines that others use, too, are
    faster at one time than at another. The last of it is a single worker's step again."""
    parts: dict[str, Any] = {"machine": measure.machine(), "cores": cores, "work": asdict(work)}
    parts["crowding"] = scale_parts.crowding(work, cores)
    parts["exchanging"] = asdict(scale_parts.exchanging())
    parts["checkpoint_bytes"], parts["checkpoint_s"] = scale_parts.writing(work)
    parts["alone"], real = {}, {}
    for workers in REAL:
        alone = scale_parts.workers_alone(work, [(kind, workers) for kind in kinds_of(workers)])
        if workers == 1:
            parts["delays"] = alone["single", 1][1]
        for (kind, _), (plan, _, forward_s) in alone.items():
            parts["alone"][f"{kind} {workers}"] = {"plan": plan_to_json(plan), "forward_s": forward_s}
        for kind, (blocks, epoch_s) in scale_parts.real(work, [workers], kinds_of)[workers].items():
            real[f"{kind} {workers}"] = {"blocks": blocks, "epoch_s": epoch_s}
    [(plan, _, _)] = scale_parts.workers_alone(work, [("single", 1)]).values()
    first = simulation.seconds_alone(plan_from_json(parts["alone"]["single 1"]["plan"]))
    parts["last_over_first"] = simulation.seconds_alone(plan) / first
    return {"parts": parts, "real": real}


def measured_rest() -> dict[str, Any]:
    """What the feed, the driver and the head take, and a worker's arithmetic of the paper's net."""
    paper = scale_parts.Work(batch=32, width=1.0)
    [(plan, _, _)] = scale_parts.workers_alone(paper, [("single", 1)]).values()
    flops = estimate(**Net().sizes(), global_batch_size=1).training_flops
    return {
        "paper_flops_per_s": flops * paper.batch / simulation.seconds_alone(plan),
        "decoding": scale_parts.decoding(),
        "requests": scale_parts.requests(),
        "row_group_s": scale_parts.row_group_s(),
        "by_workers": scale_parts.by_number_of_workers(list(COUNTS[::2])),
        "ray": scale_parts.calls_of_ray(),
    }


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    return [{"op": type(op).__name__, **asdict(op)} for op in plan]


def plan_from_json(ops: list[dict[str, Any]]) -> Plan:
    kinds: dict[str, Any] = {"Compute": Compute, "Send": Send, "Wait": Wait}
    return tuple(kinds[op["op"]](**{name: value for name, value in op.items() if name != "op"}) for op in ops)


def predicted(parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of a step, and of an epoch where one was timed, by layout and processes on this machine."""
    cores = parts["cores"]
    found = {}
    for name, each in parts["alone"].items():
        kind, workers = name.split()[0], int(name.split()[1])
        cluster = Cluster(
            workers, cores, math.inf, math.inf, exchanging_of(parts), crowding=parts["crowding"]
        )  # all on one node
        layout, plan = Layout(kind, workers), plan_from_json(each["plan"])
        step = simulation.simulate_steps(cluster, layout, plan, steps=60, delays=parts["delays"])
        found[name] = {"step_s": step.step_s}
        if kind in ("single", "data"):
            forward = simulation.simulate_steps(cluster, layout, (Compute(each["forward_s"]),), steps=20)
            epoch_s = scale_parts.EPOCH_STEPS * step.step_s + scale_parts.VAL_STEPS * forward.step_s
            found[name]["epoch_s"] = epoch_s + parts["checkpoint_s"]
    return found


def held_against(parts: dict[str, Any], runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: predicted and measured, and their ratio."""
    yield "| layout | processes | step predicted | measured | ratio | epoch predicted | measured | ratio |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, guess in predicted(parts).items():
        kind, workers = name.split()
        real = runs[name]
        step = statistics.median(real["blocks"])
        cells = [f"{1000 * guess['step_s']:.0f} ms", f"{1000 * step:.0f} ms", f"{guess['step_s'] / step:.2f}"]
        if "epoch_s" in guess:
            cells += [
                f"{guess['epoch_s']:.2f} s",
                f"{real['epoch_s']:.2f} s",
                f"{guess['epoch_s'] / real['epoch_s']:.2f}",
            ]
        else:
            cells += ["", "", ""]
        yield f"| {kind} | {workers} | " + " | ".join(cells) + " |"


# --- what is printed ---


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| workers | images each | layout | images/s | efficiency | bound by | from object storage | bound by |"
    yield "|---:|---:|---|---:|---:|---|---:|---|"
    for row in rows:
        yield (
            f"| {row.workers:,} | {row.worker_images} | {row.layout} | {row.images_per_s:,.0f} | "
            f"{row.efficiency:.0%} | {row.bound} | {row.remote_images_per_s:,.0f} | {row.remote_bound} |"
        )


def breaks_table(rows: list[Row]) -> Iterator[str]:
    yield "| what | more than there is, from | of what there is, at the most workers |"
    yield "|---|---:|---:|"
    for name, workers, most in breaks(rows):
        yield f"| {name} | {f'{workers:,} workers' if workers else 'not reached'} | {most:,.2g} times |"


def paying_table(rows: list[Row]) -> Iterator[str]:
    yield "| layout | efficiency below 50 % | another is faster |"
    yield "|---|---:|---|"
    for kind, below, beaten, by in stops_paying(rows):
        text = f"from {beaten:,} workers: {by}" if beaten else "never"
        yield f"| {kind} | {f'from {below:,} workers' if below else 'never'} | {text} |"


def paper_table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| GPUs | layout | batch | images/s | epoch | 90 epochs | dollars | failures expected | lost to them |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for run in found:
        epoch = Epoch(**run["epoch"])
        yield (
            f"| {run['gpus']} | {run['layout']} | {run['global_batch_size']:,} | {run['images_per_s']:,.0f} | "
            f"{epoch.whole_s:,.1f} s | {run['days']:.3f} days | ${run['usd']:,.0f} | "
            f"{run['expected_failures']:.1g} | {run['expected_lost_s']:,.2f} s |"
        )


def show(title: str, lines: Iterator[str]) -> None:
    print(f"\n{title}\n")
    print("\n".join(lines))


def checked(args: argparse.Namespace, names: list[str]) -> None:
    """Ends with one line where a flag is wrong."""
    if args.most_workers < 1 or args.most_workers > COUNTS[-1]:
        raise SystemExit(f"--most-workers = {args.most_workers}: expected 1 to {COUNTS[-1]}")
    if wrong := [name for name in args.machine if name not in names]:
        raise SystemExit(f"--machine = {wrong[0]}: unknown; choose of {', '.join(names)}")
    if not args.measure and not args.json.exists():
        raise SystemExit(f"--json = {args.json}: no such file; --measure writes it")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "scale.json", metavar="FILE")
    flags.add_argument(
        "--measure", nargs="?", const="all", choices=["all", "steps"],
        help="measure the parts, and run 1, 2, 4 and 8 processes; steps: but for the parts of the feed, the driver and "
        "the head, which stay as they are in FILE",
    )  # fmt: skip
    flags.add_argument(
        "--machine", nargs="+", default=["p4d", "this"], help="of machines.json, or this (default: p4d this)"
    )
    flags.add_argument("--most-workers", type=int, default=COUNTS[-1], help="that are simulated (default: %(default)s)")
    args = flags.parse_args()
    nodes, everywhere = machines()
    checked(args, [*nodes, "this"])
    result: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.measure:
        found = measured_steps(scale_parts.Work(), os.cpu_count() or 1)
        kept = {name: value for name, value in result.get("parts", {}).items() if name in REST}
        found["parts"] |= measured_rest() if args.measure == "all" else kept
        result = found | {"simulated": result.get("simulated", {})}
        measure.write(args.json, result)
        result = json.loads(args.json.read_text())
    show("predicted and measured on this machine", held_against(result["parts"], result["real"]))
    if args.measure:
        return
    counts = tuple(count for count in COUNTS if count <= args.most_workers)
    result["simulated"] = {}
    for name in args.machine:
        machine = nodes.get(name)
        rows = curve(machine, result["parts"], everywhere, counts)
        title = f"{machine.node}: not measured by us" if machine else "nodes like this one, joined by 10 Gb/s"
        show(title, table(rows))
        show(f"{name}: where a layout stops paying", paying_table(rows))
        show(f"{name}: what breaks", breaks_table(rows))
        show(f"{name}: what the feed reads", reading_table(rows, result["parts"]))
        simulated: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
        if machine and counts[-1] >= PAPER[-1]:
            for remote in (False, True):
                runs = paper_run(machine, rows, result["parts"], everywhere, remote=remote)
                where = "in object storage" if remote else "on every node"
                show(f"{name}: the paper's run, shards {where}", paper_table(runs))
                simulated["paper_remote" if remote else "paper"] = runs
        result["simulated"][name] = simulated
    measure.write(args.json, {name: value for name, value in result.items() if name != "machine"})


if __name__ == "__main__":
    main()
