"""How much memory does the feed need for a data set far larger than the object store?

    python benchmarks/feed_memory.py --shards SHARDS

SHARDS are made by jobs/prepare.py, preferably with --encoding raw, which is large. Links to them make up a data set of
ten times the object store that Ray has on this machine, and one worker's feed reads all of it. Ten times a second the
private memory of each process (anonymous pages; Linux only) and the content of the object store are measured, and at
the end what was spilled to disk.
"""

import argparse
import logging
import math
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import measure
import psutil

from orchestrator.base.storage import StoragePath
from orchestrator.config.recipes import imagenette
from orchestrator.data.shards import Manifest, read_manifest

EVERY_S = 0.1
FACTOR = 10


def private_bytes() -> dict[str, int]:
    """Private memory of this process, of those that run or await tasks, and of Ray's own."""
    me = psutil.Process()
    found = {"consumer": anonymous_bytes(me.pid), "tasks": 0, "ray": 0}
    for process in me.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            kind = "tasks" if name.startswith(("ray::IDLE", "ray::Map")) else "ray"
            found[kind] += anonymous_bytes(process.pid)
        except (psutil.NoSuchProcess, OSError):
            continue
    return found


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def linked(place: StoragePath, manifest: Manifest, times: int, folder: Path) -> Manifest:
    """A data set of the same shards many times over, linked into a folder."""
    assert place.local is not None
    shards = []
    for time_number in range(times):
        for shard in manifest.shards:
            name = f"{time_number}-{shard.file.replace('/', '-')}"
            os.symlink(place.local / shard.file, folder / name)
            shards.append(shard.model_copy(update={"file": name}))
    rows = {split: times * count for split, count in manifest.rows.items()}
    return manifest.model_copy(update={"shards": tuple(shards), "rows": rows})


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shards", required=True, metavar="DIR")
    flags.add_argument("--tasks", type=int, default=os.cpu_count(), help="at a time (default: as many as CPUs)")
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "feed_memory.json", metavar="FILE")
    args = flags.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from orchestrator.cluster.connection import RAY_ENV

    os.environ |= RAY_ENV
    import ray

    from orchestrator.data.feed import Feed

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    store = int(ray.cluster_resources()["object_store_memory"])
    original = StoragePath.of(args.shards)
    few = read_manifest(original)
    folder = tempfile.TemporaryDirectory()
    times = math.ceil(FACTOR * store / sum(shard.size_bytes for shard in few.shards))
    manifest, place = linked(original, few, times, Path(folder.name)), StoragePath.of(folder.name)
    size = sum(shard.size_bytes for shard in manifest.shards)
    before = private_bytes()
    peaks: dict[str, int] = {"store": 0} | dict.fromkeys(before, 0)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            now = private_bytes()
            used = ray.cluster_resources().get("object_store_memory", 0) - ray.available_resources().get(
                "object_store_memory", 0
            )
            for name, value in (now | {"store": int(used)}).items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = imagenette().changed(epochs=1, color_noise="none")
    feed = Feed(place, manifest, config, rank=0, world_size=1, num_cpus=1, num_tasks=args.tasks)
    start, images = time.perf_counter(), 0
    feed.start(0)
    for split in ("train", "val"):
        for batch in feed.batches(split, 0):
            images += len(batch["label"])
            int(batch["image"][:, ::32, ::32].sum())
    seconds = time.perf_counter() - start
    feed.close()
    over.set()
    watcher.join()
    summary = ray._private.internal_api.memory_summary(stats_only=True)
    spilled = [line for line in summary.splitlines() if "pilled" in line]
    result: dict[str, Any] = {
        "set_bytes": size, "store_bytes": store, "images": images, "images_per_s": images / seconds,
        "tasks": args.tasks, "before": before, "peak": peaks, "spilled": spilled,
    }  # fmt: skip
    print(f"{images} images, {size / 1e9:.1f} GB of shards through an object store of {store / 1e9:.2f} GB")
    for name, value in peaks.items():
        print(f"  peak {name:<9} {value / 1e6:6.0f} MB")
    print(f"  spilled: {spilled or 'nothing'}; {images / seconds:.0f} images/s")
    ray.shutdown()
    folder.cleanup()
    measure.write(args.json, result)


if __name__ == "__main__":
    main()
