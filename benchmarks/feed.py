"""How fast does the feed bring images to a consumer that only touches them, beside what else a user could take?

    python benchmarks/feed.py --source IMAGEFOLDER --json FILE

IMAGEFOLDER is a tree of train/CLASS/IMAGE and val/CLASS/IMAGE. It is prepared into shards first, as JPEG and raw. Every
loader then makes random 224-pixel crops, half of them mirrored, in batches of 128 of uint8, with two processes or
threads, each in a process of its own, turn about. A turn begins with nothing read and ends with nothing under way:

    feed         ours, on Ray Data, from JPEG shards (feed raw: from raw shards)
    imagefolder  torch DataLoader and torchvision ImageFolder from the original files: Resize(256), RandomCrop, flip
    presized     torch DataLoader over our shards, with simplejpeg
    webdataset   webdataset over tars of the same JPEGs, with simplejpeg
    pyarrow      pyarrow and a pool of threads over our shards, with simplejpeg: the limit

images per CPU-second count the whole process tree, Ray's own processes included. The shares say whose they are.
"""

import argparse
import io
import itertools
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import measure
import numpy as np
import psutil
import pyarrow.parquet as pq
import simplejpeg

BATCH, CROP, WORKERS = 128, 224, 2
PASSES = 2  # over the images in a turn


def rows(shards: Path) -> list[tuple[str, int]]:
    """(file, row group) of all training shards, shuffled."""
    found = []
    for path in sorted((shards / "train").glob("*.parquet")):
        found += [(str(path), group) for group in range(pq.ParquetFile(path).num_row_groups)]
    random.shuffle(found)
    return found


def jpegs(path: str, group: int) -> list[Any]:
    column = pq.ParquetFile(path, memory_map=True).read_row_group(group, columns=["image"])["image"]
    return [image.as_buffer() for image in column.combine_chunks()]


def crop(data: Any, out: np.ndarray) -> None:
    pixels = simplejpeg.decode_jpeg(memoryview(data).cast("B"), colorspace="RGB")
    top, left = (random.randrange(side - CROP + 1) for side in pixels.shape[:2])
    cut = pixels[top : top + CROP, left : left + CROP]
    out[:] = cut[:, ::-1] if random.random() < 0.5 else cut


def feed(shards: Path, source: Path) -> Callable[[], Iterator[np.ndarray]]:
    """A run of some epochs, training and validation."""
    from orchestrator.cluster.connection import connect

    connect()
    from orchestrator.base.storage import StoragePath
    from orchestrator.config.recipes import imagenette
    from orchestrator.data.feed import Feed
    from orchestrator.data.shards import read_manifest

    config = imagenette().changed(color_noise="none", epochs=PASSES)
    place = StoragePath.of(shards)
    manifest = read_manifest(place)

    def run() -> Iterator[np.ndarray]:
        with closing(Feed(place, manifest, config, rank=0, world_size=1, num_cpus=1, num_tasks=WORKERS)) as stream:
            stream.start(0)
            for epoch, split in itertools.product(range(PASSES), ("train", "val")):
                for batch in stream.batches(split, epoch):
                    yield batch["image"]

    return run


def imagefolder(shards: Path, source: Path) -> Callable[[], Iterator[np.ndarray]]:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.Resize(256), v2.RandomCrop(CROP), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    data = ImageFolder(str(source / "train"), v2.Compose(steps))
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: (images.numpy() for _ in range(PASSES) for images, _ in loader)


def presized(shards: Path, source: Path) -> Callable[[], Iterator[np.ndarray]]:
    import torch

    def worker() -> int:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        return info.id

    class Rows(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[Any]:
            for path, group in rows(shards)[worker() :: WORKERS]:
                images = jpegs(path, group)
                random.shuffle(images)
                for data in images:
                    out = np.empty((CROP, CROP, 3), np.uint8)
                    crop(data, out)
                    yield torch.from_numpy(out)

    loader = torch.utils.data.DataLoader(Rows(), BATCH, num_workers=WORKERS, persistent_workers=True)
    return lambda: (images.numpy() for _ in range(PASSES) for images in loader)


def webdataset(shards: Path, source: Path) -> Callable[[], Iterator[np.ndarray]]:
    import torch
    import webdataset as wds

    folder = shards / "tars"
    if not folder.exists():
        folder.mkdir()
        for number, path in enumerate(sorted((shards / "train").glob("*.parquet"))):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for i, image in enumerate(pq.read_table(path)["image"]):
                    info = tarfile.TarInfo(f"{number:05d}{i:05d}.jpg")
                    info.size = len(image.as_py())
                    tar.addfile(info, io.BytesIO(image.as_py()))

    def decode(sample: dict[str, Any]) -> Any:
        out = np.empty((CROP, CROP, 3), np.uint8)
        crop(sample["jpg"], out)
        return (torch.from_numpy(out),)

    tars = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000).map(decode).batched(BATCH)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda: (batch[0].numpy() for _ in range(PASSES) for batch in loader)


def pyarrow(shards: Path, source: Path) -> Callable[[], Iterator[np.ndarray]]:
    pool = ThreadPoolExecutor(WORKERS)

    def batch(group: tuple[str, int]) -> np.ndarray:
        images = jpegs(*group)
        random.shuffle(images)
        out = np.empty((len(images), CROP, CROP, 3), np.uint8)
        for data, place in zip(images, out, strict=True):
            crop(data, place)
        return out

    def epoch() -> Iterator[np.ndarray]:
        waiting = []
        for group in (group for _ in range(PASSES) for group in rows(shards)):
            waiting.append(pool.submit(batch, group))
            if len(waiting) > 2 * WORKERS:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    return epoch


LOADERS = {
    "feed": feed, "feed raw": feed, "imagefolder": imagefolder, "presized": presized, "webdataset": webdataset,
    "pyarrow": pyarrow,
}  # fmt: skip


def cpu_seconds() -> dict[str, float]:
    """Of this process and of all that live below it, by whose they are; loaders keep theirs alive between turns."""
    found = {"consumer": 0.0, "tasks": 0.0, "ray": 0.0}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times, words = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        rays_own = any(word in words for word in ("gcs_server", "raylet/raylet", "/ray/_private/", "/ray/dashboard/"))
        helper = words.startswith("ray::") and not words.startswith(("ray::IDLE", "ray::Map"))
        kind = "consumer" if process == me else "ray" if rays_own or helper else "tasks"
        found[kind] += times.user + times.system + times.children_user + times.children_system
    return found


def serve(name: str, shards: Path, source: Path) -> None:
    """A contender: a turn, one pass over the images, for every line on standard input."""
    from alexnet import keep_freed_memory

    keep_freed_memory()
    epoch = LOADERS[name](shards, source)
    for _ in sys.stdin:
        before, start, images = cpu_seconds(), time.perf_counter(), 0
        for batch in epoch():
            images += len(batch)
            int(batch[:, ::32, ::32].sum())  # the consumer's touch
        wall = time.perf_counter() - start
        cpu = {name: seconds - before[name] for name, seconds in cpu_seconds().items()}
        result = {"images": images, "wall_s": wall, "cpu_s": sum(cpu.values())}
        print(json.dumps(result | {f"{name}_cpu_s": seconds for name, seconds in cpu.items()}), flush=True)


def prepare(source: Path, folder: Path) -> None:
    for encoding in ("jpeg", "raw"):
        command = [sys.executable, "jobs/prepare.py", "--source", str(source), "--output", str(folder / encoding)]
        command += ["--encoding", encoding] if encoding != "jpeg" else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--source", type=Path, required=True, metavar="IMAGEFOLDER")
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "feed.json", metavar="FILE")
    flags.add_argument("--rounds", type=int, default=3, help="turns of each loader, after one to warm up (default: 3)")
    flags.add_argument("--shards", type=Path, help="folder with jpeg/ and raw/ shards, instead of preparing them")
    flags.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS), help=argparse.SUPPRESS)
    flags.add_argument("--serve", choices=list(LOADERS), help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.serve:
        serve(args.serve, args.shards, args.source)
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or Path(folder)
        if not args.shards:
            prepare(args.source, shards)
        contenders = {}
        for name in args.only:
            where = shards / ("raw" if name.endswith("raw") else "jpeg")
            command = [sys.executable, __file__, "--source", str(args.source), "--shards", str(where), "--serve", name]
            to = subprocess.PIPE
            contenders[name] = subprocess.Popen(command, stdin=to, stdout=to, text=True)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for turn in range(-1, args.rounds):
            for name, process in contenders.items():
                assert process.stdin is not None and process.stdout is not None  # noqa: PT018
                process.stdin.write("go\n")
                process.stdin.flush()
                result = json.loads(process.stdout.readline())
                if turn >= 0:
                    turns[name].append(result)
        for process in contenders.values():
            process.communicate()
    report(turns, args.source, args.json)


def report(turns: dict[str, list[dict[str, float]]], source: Path, path: Path) -> None:
    figures: dict[str, dict[str, float]] = {}
    for name, results in turns.items():
        figures[name] = {
            "images_per_cpu_s": statistics.median(r["images"] / r["cpu_s"] for r in results),
            "images_per_s": statistics.median(r["images"] / r["wall_s"] for r in results),
        }
        for kind in ("consumer", "tasks", "ray"):
            share = statistics.median(r[f"{kind}_cpu_s"] / r["cpu_s"] for r in results)
            figures[name] |= {f"{kind}_share_of_cpu": round(share, 3)} if share else {}
        shares = ", ".join(f"{k.split('_')[0]} {100 * v:.0f} %" for k, v in figures[name].items() if "share" in k)
        rates = figures[name]
        print(
            f"{name:<12} {rates['images_per_cpu_s']:7.0f} images per CPU-second  {rates['images_per_s']:7.0f} a second"
            f"  (CPU: {shares})"
        )
    result: dict[str, Any] = {"source": source.name, "passes_a_turn": PASSES, "loaders": figures}
    for ours in (name for name in turns if name.startswith("feed")):
        for per, clock in (("cpu_s", "CPU-second"), ("wall_s", "second")):
            ratios = {
                name: round(
                    statistics.median(
                        (a["images"] / a[per]) / (b["images"] / b[per])
                        for a, b in zip(turns[ours], turns[name], strict=True)
                    ),
                    3,
                )
                for name in turns
                if not name.startswith("feed")
            }
            key = "ratios" + ("_raw" if ours != "feed" else "") + ("_wall" if per == "wall_s" else "")
            result[key] = ratios
            print(f"{ours} over the others, per {clock}: " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items()))
    measure.write(path, result)


if __name__ == "__main__":
    main()
