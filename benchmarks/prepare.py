"""What does it cost to make shards, and which JPEG quality and which row groups pay?

    python benchmarks/prepare.py --source IMAGEFOLDER [IMAGEFOLDER ...]

For each tree of train/CLASS/IMAGE and val/CLASS/IMAGE, on one core:

    rate         images per second from files to a shard, statistics included, against torchvision's usual loop
                 (PIL, Resize(256), CenterCrop(256), JPEG of quality 90) on the same files, in turns
    quality      bytes per image, and the mean absolute error of its pixels in grey levels, by JPEG quality
    row groups   images per second through the feed's reader, in training order, by rows in a row group
"""

import argparse
import functools
import io
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import PIL.Image
import torch
from torchvision.transforms import v2

from alexnet import images, keep_freed_memory
from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import imagenette
from orchestrator.data.prepare import JPEG_QUALITY, ROWS_PER_SHARD
from orchestrator.data.reader import Task, TaskReader
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.data.shards import Manifest, Shard, schema
from orchestrator.data.sources import Entry, open_source, read

SIZE = 256
QUALITIES = (75, 85, 90, 95, 100)
ROW_GROUPS = (16, 64, 128, 256, 1024)


def torchvision_loop(paths: list[str]) -> None:
    transform = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE)])
    for path in paths:
        transform(PIL.Image.open(path).convert("RGB")).save(io.BytesIO(), "JPEG", quality=JPEG_QUALITY)


def rate(entries: list[Entry], folder: Path, rounds: int) -> dict[str, float]:
    """Images a second of each, and the ratio."""
    writer = ShardWriter(StoragePath.of(folder), SIZE, JPEG_QUALITY, 1000)
    paths = [entry.path for entry in entries if entry.path]

    def ours() -> None:
        writer.make("train", "shard.parquet", entries)

    times = measure.take_turns({"ours": ours, "torchvision": lambda: torchvision_loop(paths)}, rounds)
    found = {name: len(entries) / statistics.median(seconds) for name, seconds in times.items()}
    return found | {"ratio": measure.median_ratio(times["torchvision"], times["ours"])}


def quality(entries: list[Entry]) -> list[dict[str, float]]:
    """Size and error at each of QUALITIES."""
    pixels = [images.resize_and_center(images.decode(read(entry)), SIZE) for entry in entries]
    rows = []
    for level in QUALITIES:
        encoded = [images.encode(image, level) for image in pixels]
        errors = [
            np.abs(images.decode(data).astype(np.int16) - image).mean()
            for data, image in zip(encoded, pixels, strict=True)
        ]
        size = statistics.mean(map(len, encoded))
        error = float(np.mean(errors))
        rows.append({"quality": level, "bytes": size, "bits_per_pixel": 8 * size / SIZE**2, "error": error})
    return rows


def row_groups(entries: list[Entry], folder: Path, rounds: int) -> dict[int, float]:
    """Images a second through TaskReader, in the order of an epoch, by rows in a row group; a turn reads all of it."""
    readers = {}
    data = [
        images.encode(images.resize_and_center(images.decode(read(entry)), SIZE), JPEG_QUALITY) for entry in entries
    ]
    config = imagenette().changed(color_noise="none")
    for count in ROW_GROUPS:
        shards = []
        place = StoragePath.of(folder / str(count))
        writer = ShardWriter(place, SIZE, JPEG_QUALITY, 10, row_group_rows=count)
        for first in range(0, len(data), ROWS_PER_SHARD):
            part = data[first : first + ROWS_PER_SHARD]
            columns: dict[str, Any] = {name: [0] * len(part) for name in schema("jpeg", SIZE).names}
            columns |= {"image": part, "name": [""] * len(part), "label": np.zeros(len(part), np.int32)}
            shard: dict[str, Any] = {"file": f"train/{first}.parquet", "split": "train", "rows": len(part)}
            shards.append(Shard(**shard | writer.write(place / f"train/{first}.parquet", columns)))
        manifest = Manifest.model_construct(
            shards=tuple(shards), rows={"train": len(data)}, image_size=SIZE,
            eigenvalues=(1.0, 1.0, 1.0), eigenvectors=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        )  # fmt: skip
        readers[count] = TaskReader(place, manifest, config, 0, 1)

    def read_all(reader: TaskReader) -> None:
        steps = len(data) // config.global_batch_size
        for first in range(0, steps, 3):
            task = Task(0, "train", first, min(first + 3, steps))
            positions = np.concatenate([np.arange(lo, hi) for lo, hi in reader.rank_slices(task)])
            reader.read(task, positions)

    times = measure.take_turns({str(n): functools.partial(read_all, r) for n, r in readers.items()}, rounds)
    return {count: len(data) / statistics.median(times[str(count)]) for count in ROW_GROUPS}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--source", nargs="+", required=True, metavar="IMAGEFOLDER")
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "prepare.json", metavar="FILE")
    flags.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    flags.add_argument("--images", type=int, default=256, help="of each tree, for rate and quality (default: 256)")
    args = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, Any] = {}
    for source in args.source:
        every = [e for e in open_source(source).splits["train"] if is_image(e)]
        entries = random.Random(0).sample(every, min(args.images, len(every)))
        pixels = [images.decode(read(entry)).shape for entry in entries]
        found: dict[str, Any] = {
            "images": len(entries),
            "median_pixels": statistics.median(h * w for h, w, _ in pixels),
        }
        with tempfile.TemporaryDirectory() as folder:
            found["rate"] = rate(entries, Path(folder), args.rounds)
            found["quality"] = quality(entries)
            found["row_groups"] = row_groups((every * 8)[:4096], Path(folder), args.rounds)
        name = Path(source).name
        result[name] = found
        print(f"{name}: {len(entries)} images of {found['median_pixels'] / 1e3:.0f} thousand pixels (median)")
        print(f"  rate       ours {found['rate']['ours']:.0f} images/s, torchvision's loop "
              f"{found['rate']['torchvision']:.0f}: {found['rate']['ratio']:.2f} times")  # fmt: skip
        for row in found["quality"]:
            size = f"{row['bytes'] / 1e3:6.1f} KB  {row['bits_per_pixel']:.2f} bits a pixel"
            print(f"  quality {row['quality']:3.0f}  {size}  error {row['error']:.2f}")
        for rows, speed in found["row_groups"].items():
            print(f"  row groups of {rows:4d}  {speed:.0f} images/s")
    measure.write(args.json, result)


def is_image(entry: Entry) -> bool:
    try:
        images.decode(read(entry))
    except images.NotAnImage:
        return False
    return True


if __name__ == "__main__":
    main()
