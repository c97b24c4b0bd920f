"""What do evaluating and predicting cost beside the bare forward pass, and beside a torchvision loop?

    python benchmarks/predict.py --source IMAGEFOLDER

The full net of 1000 classes, with random weights, in fp32. All contenders see the same images, in batches of one size,
in one process and with the same threads, in turns:

    forward      the net on batches that are in memory: the limit
    evaluate     jobs/evaluate.py's engine, from shards of 256-pixel JPEGs
    ten          the same with ten views
    predict      jobs/predict.py's engine, from the original JPEG files
    torchvision  the same net behind torchvision's ImageFolder, Resize(256), CenterCrop(224) and DataLoader with one
                 process per thread, less the mean colour: no mean image, no windows

Images per CPU-second count this process and DataLoader's.
"""

import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow.parquet as pq
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import alexnet
from orchestrator.base.storage import StoragePath
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.shards import Manifest, Shard
from orchestrator.data.sources import Entry
from orchestrator.models.engine import Settings, start
from orchestrator.models.predict import EntryReader
from orchestrator.models.shard_rows import ShardReader, ranges

SIZE = 256


def make_net() -> alexnet.TrainedNet:
    net = alexnet.build("paper", 1000, init="he")
    classes = tuple(map(str, range(1000)))
    description = alexnet.Description({"preset": "paper", "num_classes": 1000}, classes, pixel_scale=1 / 64)
    return alexnet.TrainedNet(net, description, np.full((SIZE, SIZE, 3), 118, np.float32))


def make_shards(folder: Path, files: list[str]) -> Manifest:
    """One shard of all files."""
    place = StoragePath.of(folder)
    writer = ShardWriter(place, SIZE, 90, 1000)
    writer.make("val", "val/shard-00000.parquet", [Entry(i, 0, file, path=file) for i, file in enumerate(files)])
    metadata = pq.read_metadata(folder / "val/shard-00000.parquet")
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    shard = Shard.model_construct(file="val/shard-00000.parquet", split="val", rows=metadata.num_rows,
                                  row_groups=groups, pixels_at=())  # fmt: skip
    return Manifest.model_construct(shards=(shard,), rows={"val": metadata.num_rows}, image_size=SIZE)


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def counted(run: Callable[[], object], used: list[float]) -> None:
    before = cpu_seconds()
    run()
    used.append(cpu_seconds() - before)


@torch.inference_mode()
def forward(net: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        net(batch)


def answers(net: alexnet.TrainedNet, reader: Any, tasks: list[Any], settings: Settings) -> None:
    with start([net], reader, settings) as engine:
        for _ in engine.answers(tasks):
            pass


@torch.inference_mode()
def torchvision_loop(net: torch.nn.Module, images: Subset[Any], batch_size: int, workers: int) -> None:
    for batch, _ in DataLoader(images, batch_size, num_workers=workers):
        torch.softmax(net(batch.contiguous(memory_format=torch.channels_last)), 1)


def main() -> None:
    flags = measure.parser(__doc__, "predict")
    flags.add_argument("--source", type=Path, required=True, metavar="IMAGEFOLDER", help="CLASS/IMAGE")
    flags.add_argument("--images", type=int, default=512, help="(default: 512)")
    flags.add_argument("--batch-size", type=int, default=128, help="(default: 128)")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    alexnet.keep_freed_memory()
    transform = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize((0.46, 0.46, 0.46), (0.25, 0.25, 0.25))])  # fmt: skip
    folder = torchvision.datasets.ImageFolder(args.source, transform)
    chosen = np.random.default_rng(0).permutation(len(folder))[: args.images].tolist()
    files = [folder.imgs[i][0] for i in chosen]
    net, num = make_net(), len(files)
    entries = [Entry(i, 0, file, path=str(Path(file).absolute())) for i, file in enumerate(files)]
    of_files = [entries[first : first + args.batch_size] for first in range(0, num, args.batch_size)]
    sizes = [len(task) for task in of_files]
    batches = [torch.randn(n, 3, 224, 224).contiguous(memory_format=torch.channels_last) for n in sizes]
    with tempfile.TemporaryDirectory() as temporary:
        manifest = make_shards(Path(temporary), files)
        reader = ShardReader(StoragePath.of(temporary), manifest, "val")
        tasks = list(ranges(manifest.rows["val"], args.batch_size))
        one, ten = (
            Settings(views, batch_size=args.batch_size, device="cpu", threads=args.threads) for views in (1, 10)
        )
        used: dict[str, list[float]] = {}
        contenders: dict[str, Callable[[], object]] = {
            "forward": functools.partial(forward, net.net, batches),
            "evaluate": functools.partial(answers, net, reader, tasks, one),
            "ten": functools.partial(answers, net, reader, tasks, ten),
            "predict": functools.partial(answers, net, EntryReader(SIZE), of_files, one),
            "torchvision": functools.partial(
                torchvision_loop, net.net, Subset(folder, chosen), args.batch_size, args.threads
            ),
        }
        begun = time.perf_counter()
        times = measure.take_turns(
            {name: functools.partial(counted, run, used.setdefault(name, [])) for name, run in contenders.items()},
            args.rounds,
        )
    per_s = {name: num / statistics.median(seconds) for name, seconds in times.items()}
    per_cpu_s = {name: num / statistics.median(seconds[-args.rounds :]) for name, seconds in used.items()}
    ratios = {
        "evaluate_over_forward": measure.median_ratio(times["forward"], times["evaluate"]),
        "ten_views_over_one": measure.median_ratio(times["ten"], times["evaluate"]),
        "predict_over_torchvision": measure.median_ratio(times["torchvision"], times["predict"]),
        "predict_over_torchvision_per_cpu_s": measure.median_ratio(
            used["torchvision"][-args.rounds :], used["predict"][-args.rounds :]
        ),
        "evaluate_over_forward_per_cpu_s": measure.median_ratio(
            used["forward"][-args.rounds :], used["evaluate"][-args.rounds :]
        ),
        "ten_views_over_one_per_cpu_s": measure.median_ratio(
            used["ten"][-args.rounds :], used["evaluate"][-args.rounds :]
        ),
    }  # fmt: skip
    for name in contenders:
        print(f"{name:12s} {per_s[name]:7.1f} images/s  {per_cpu_s[name]:7.1f} images per CPU-second")
    for name, ratio in ratios.items():
        print(f"{name:36s} {ratio:.2f}")
    print(f"{time.perf_counter() - begun:.0f} s")
    measure.write(args.json, {"images": num, "batch_size": args.batch_size, "images_per_s": per_s,
                              "images_per_cpu_s": per_cpu_s, "ratios": ratios})  # fmt: skip


if __name__ == "__main__":
    main()
