"""How fast is each layout of the full net on this machine's CPU?

    python benchmarks/layouts.py --precision fp32 bf16

One process trains the whole net with all threads (single); two share the threads, connected by gloo over the loopback,
and train it as columns, data and hybrid: images exchanged, forward, cross-entropy, backward, update. All are alive at
once and take turns.
"""

import functools
import statistics
import tempfile
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import alexnet
from alexnet.dropout import BatchPosition
from alexnet.layouts import Layout, ShardedNet

WORKERS = 2


class Contender:
    """One process's part of a layout, ready to make steps."""

    def __init__(self, layout: Layout, rank: int, batch_size: int, side: int = 224, width: float = 1.0) -> None:
        """side: of the images, in pixels."""
        self.layout, self.rank, self.step = layout, rank, 0
        whole = alexnet.build("paper", 1000, input_size=side, width=width, init="he")
        self.net = ShardedNet(whole, layout, rank)
        self.optimizer = alexnet.PaperSGD(self.net.parameters(), lr=1e-5)
        images = batch_size // layout.workers
        self.sizes = [images] * layout.group_size
        self.pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8)
        self.labels = torch.randint(0, 1000, (images,), dtype=torch.int32)

    def run(self, bf16: bool) -> None:
        labels = self.net.share_labels(self.labels, self.sizes).long()
        pixels = self.net.share_images(self.pixels, self.sizes).permute(0, 3, 1, 2)
        where = BatchPosition(0, self.step, torch.arange(len(labels)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = self.net(pixels.float().mul_(1 / 64), where, self.sizes)
        loss = F.cross_entropy(scores.float(), labels, reduction="sum") / (len(labels) * self.layout.replicas)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.net.zero_grad()
        self.step += 1


def serve(rank: int, kinds: list[str], threads: int, batch_size: int, store: str, orders: Any, done: Any) -> None:
    """A process: makes a step of each layout it is asked for."""
    alexnet.keep_freed_memory()
    torch.set_num_threads(threads)
    if kinds != ["single"]:
        file = dist.FileStore(store, WORKERS)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=file, rank=rank, world_size=WORKERS)
    workers = 1 if kinds == ["single"] else WORKERS
    contenders = {kind: Contender(Layout(kind, workers), rank, batch_size) for kind in kinds}
    done.put("ready")
    for kind, bf16 in iter(orders.get, None):
        contenders[kind].run(bf16)
        done.put(kind)


def main() -> None:
    flags = measure.parser(__doc__, "layouts")
    flags.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    flags.add_argument("--batch-size", type=int, default=128)
    args = flags.parse_args()
    spawn = mp.get_context("spawn")
    done = spawn.Queue()
    teams = [["single"], ["columns", "data", "hybrid"]]
    orders: dict[str, list[Any]] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for kinds in teams:
            members = 1 if kinds == ["single"] else WORKERS
            queues = [spawn.Queue() for _ in range(members)]
            orders |= dict.fromkeys(kinds, queues)
            for rank, queue in enumerate(queues):
                fixed = (rank, kinds, max(1, args.threads // members), args.batch_size, f"{folder}/store", queue, done)
                processes.append(spawn.Process(target=serve, args=fixed))
        for process in processes:
            process.start()
        for _ in processes:
            done.get()

        def step(kind: str, bf16: bool) -> None:
            for queue in orders[kind]:
                queue.put((kind, bf16))
            for _ in orders[kind]:
                done.get()

        results = {}
        for precision in args.precision:
            turns = {kind: functools.partial(step, kind, precision == "bf16") for kind in orders}
            times = measure.take_turns(turns, args.rounds)
            rates = {kind: args.batch_size / statistics.median(values) for kind, values in times.items()}
            ratios = {
                "columns over single": measure.median_ratio(times["single"], times["columns"]),
                "hybrid over data": measure.median_ratio(times["data"], times["hybrid"]),
            }
            print(precision, {kind: f"{rate:.1f} images/s" for kind, rate in rates.items()})
            print(precision, {name: f"{ratio:.2f}" for name, ratio in ratios.items()})
            results[precision] = {"images_per_s": rates, "ratios": ratios}
        for queue in {id(queue): queue for queues in orders.values() for queue in queues}.values():
            queue.put(None)
        for process in processes:
            process.join()
    measure.write(args.json, {"batch_size": args.batch_size, "precision": results})


if __name__ == "__main__":
    main()
