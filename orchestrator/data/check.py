"""The check of a data set: its files against its manifest, and the feed, run alone over all of its images."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.base.shown import count_of, quoted
from orchestrator.base.storage import StoragePath
from orchestrator.config.train import TrainConfig, make_config
from orchestrator.data.feed import Feed, warm_up
from orchestrator.data.shards import (
    DamagedData,
    Manifest,
    check_labels,
    label_ranges,
    read_manifest,
    read_mean_image,
    verify,
)

PICTURES = 48  # on the contact sheet
SHOWN = 3  # classes in a line


@dataclass(frozen=True)
class Report:
    """What a check of a sound data set found."""

    manifest: Manifest
    size_bytes: int
    images: int
    images_per_s: float
    num_tasks: int
    samples: NDArray[np.uint8]  # (N, H, W, C) training images as the net sees them, before the mean is subtracted
    labels: NDArray[np.int64]  # (N,)


def feed_config(manifest: Manifest) -> TrainConfig:
    """Settings for the check: crops as large in proportion to the images as the paper's 224 of 256 pixels."""
    size = manifest.image_size
    return make_config(epochs=1, input_size=max(64, min(size, size * 224 // 256)), global_batch_size=128)


def _differences(manifest: Manifest, split: str, counts: NDArray[np.int64]) -> str:
    """The classes whose rows are not as many as the manifest has, the first of them by name."""
    wanted = np.array(manifest.class_rows[split])
    differing = np.flatnonzero(counts != wanted).tolist()
    first = [
        f"{counts[label]} rows of {quoted(manifest.classes[label])} instead of {wanted[label]}"
        for label in differing[:SHOWN]
    ]
    more = len(differing) - len(first)
    return ", ".join(first) + (f" and other numbers of {count_of(more, 'more class', 'more classes')}" if more else "")


def check(folder: StoragePath, say: Callable[[str], None], progress: Callable[[int, int, float], None]) -> Report:
    """Check checksums, counts and labels, and have the feed decode and crop every image. Ray must be connected.

    `say` gets a line after the checksums; `progress` gets images done, images in all and images/s while the feed runs.
    Raises ValueError if there is no data set, JobError naming the file that differs from the manifest.
    """
    import ray

    manifest = read_manifest(folder)
    size_bytes = sum(shard.size_bytes for shard in manifest.shards)
    verify(folder, manifest)
    read_mean_image(folder, manifest)
    say(f"checksums  {len(manifest.shards)} shards, {size_bytes / 1e6:.1f} MB, and the mean image match the manifest")
    check_labels(folder, manifest, label_ranges(folder, manifest), len(manifest.classes))
    config = feed_config(manifest)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))  # no training beside it: the feed gets all of them
    feed = Feed(folder, manifest, config, rank=0, world_size=1, num_cpus=1.0, num_tasks=cpus)
    images = sum(manifest.rows.values())
    samples: NDArray[np.uint8] | None = None
    labels = np.empty(0, np.int64)
    ray.get([ray.remote(num_cpus=1)(warm_up).remote() for _ in range(cpus)])  # the speed should not include Ray's start
    done, start = 0, time.monotonic()
    with closing(feed):
        feed.start(0)
        for split in ("train", "val"):
            counts = np.zeros(len(manifest.classes), np.int64)
            for batch in feed.batches(split, 0):
                if samples is None:
                    samples, labels = batch["image"][:PICTURES].copy(), batch["label"][:PICTURES].copy()
                done += len(batch["label"])
                counts += np.bincount(batch["label"], minlength=len(counts))
                progress(done, images, done / max(time.monotonic() - start, 1e-9))
            if tuple(counts.tolist()) != manifest.class_rows[split]:
                raise DamagedData(
                    f"{folder}: {split} has {_differences(manifest, split, counts)}; prepare the data again"
                )
    assert samples is not None
    rate = done / max(time.monotonic() - start, 1e-9)
    return Report(manifest, size_bytes, images, rate, cpus, samples, labels)
