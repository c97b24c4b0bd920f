"""How much memory does the feed take on a set far larger than the object store?

    python benchmarks/feed_memory.py --shards SHARDS

SHARDS are made by jobs/prepare.py, best with --encoding raw, which is large. Ray is started with an object store of a
tenth of their size, one worker's feed runs over all of them, and every tenth of a second the memory is read that the
process tree holds for itself (USS; of the tasks, the mapped pages of the shards are counted too), what the object store
holds, and what was spilled to disk.
"""

import argparse
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import measure
import psutil

EVERY_S = 0.1
FACTOR = 10


def private_bytes() -> dict[str, int]:
    """Bytes that no other process shares, of the tasks, of this process and of Ray's own."""
    me = psutil.Process()
    found = {"consumer": me.memory_full_info().uss, "tasks": 0, "ray": 0}
    for process in me.children(recursive=True):
        try:
            name = process.cmdline()[0] if process.cmdline() else ""
            found["tasks" if name.startswith("ray::") else "ray"] += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shards", required=True, metavar="DIR")
    flags.add_argument("--tasks", type=int, default=os.cpu_count(), help="at a time (default: as many as CPUs)")
    flags.add_argument("--json", type=Path, default=measure.RESULTS / "feed_memory.json", metavar="FILE")
    args = flags.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from orchestrator.cluster import QUIET

    os.environ |= QUIET
    import ray

    from orchestrator.feed import Feed
    from orchestrator.recipes import imagenette
    from orchestrator.shards import read_manifest
    from orchestrator.storage import Place

    place = Place.of(args.shards)
    manifest = read_manifest(place)
    size = sum(shard.size_bytes for shard in manifest.shards)
    store = size // FACTOR
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", object_store_memory=store, include_dashboard=False, log_to_driver=False)
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
    print(f"{images} images, {size / 1e9:.2f} GB of shards through an object store of {store / 1e6:.0f} MB")
    for name, value in peaks.items():
        print(f"  peak {name:<9} {value / 1e6:6.0f} MB")
    print(f"  spilled: {spilled or 'nothing'}; {images / seconds:.0f} images/s")
    ray.shutdown()
    measure.write(args.json, result)


if __name__ == "__main__":
    main()
