"""How often are near-duplicates found, how often are unlike photographs taken for them, and what does the look cost?

    python benchmarks/near.py --source IMAGEFOLDER [IMAGEFOLDER ...]

For each tree of photographs, which should be all different:

    false   pairs of one class that count as near-duplicates, and those that would by the difference hash alone
    found   copies, made in several ways, that count as near-duplicates of their originals, of 150
    rate    images per CPU-second: looked at, decoded whole, and prepared (decoded, resized, encoded)
"""

import argparse
import io
import random
import time
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch

from alexnet import images
from orchestrator.data.sources import Entry, near, open_source, read

COPIED = 150
RATED = 1000
Photograph = PIL.Image.Image


def as_jpeg(image: Photograph, quality: int = 90) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def scaled(image: Photograph, factor: float) -> Photograph:
    return image.resize((int(image.width * factor), int(image.height * factor)), PIL.Image.Resampling.BILINEAR)


def without(image: Photograph, part: float) -> Photograph:
    return image.crop((int(part * image.width), int(part * image.height), image.width, image.height))


WAYS: dict[str, Callable[[Photograph], bytes]] = {
    "JPEG quality 20": lambda image: as_jpeg(image, 20),
    "half the size": lambda image: as_jpeg(scaled(image, 0.5)),
    "0.73 of the size": lambda image: as_jpeg(scaled(image, 0.73)),
    "1 % cut off": lambda image: as_jpeg(without(image, 0.01)),
    "2 % cut off": lambda image: as_jpeg(without(image, 0.02)),
}


def false_pairs(entries: list[Entry]) -> tuple[int, int, int]:
    """Pairs of one class: all, those of nearly the same hash, and those that count as near-duplicates."""
    every, alike, near_pairs = 0, 0, 0
    looks, _ = near.looks(entries)
    for positions in near.by_class(entries).values():
        known = [one for one in (looks[position] for position in positions) if one is not None]
        every += len(known) * (len(known) - 1) // 2
        for left, right in near._candidates(known, known):
            keep = right > left
            alike += int(keep.sum())
            near_pairs += len(list(near._correlated(known, known, left[keep], right[keep])))
    return every, alike, near_pairs


def found(entries: list[Entry], way: Callable[[Photograph], bytes]) -> float:
    """The fraction of the images of which a copy is found."""
    count = 0
    for entry in entries:
        data = read(entry)
        copy = way(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        count += near.groups([near.look(data), near.look(copy)]) == [0, 0]
    return count / len(entries)


def rate(entries: list[Entry], work: Callable[[bytes], Any]) -> float:
    """Entries per CPU-second, the best of three passes."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for entry in entries:
            work(read(entry))
        best = min(best, time.process_time() - start)
    return len(entries) / best


def prepared(data: bytes) -> bytes:
    return images.encode(images.resize_and_center(images.decode(data), 256), 90)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--source", nargs="+", required=True)
    torch.set_num_threads(1)
    for name in flags.parse_args().source:
        source = open_source(name)
        entries = source.splits["train"] + source.splits["val"]
        every, alike, false = false_pairs(entries)
        print(f"{name}: {len(entries)} images, {every} pairs: {alike} by the hash, {false} near-duplicates", flush=True)
        some = random.Random(0).sample(entries, min(COPIED, len(entries)))
        for what, way in WAYS.items():
            print(f"  {what:<18} {100 * found(some, way):.1f} % found", flush=True)
        some = random.Random(1).choices(entries, k=RATED)
        for what, work in (("looked at", near.look), ("decoded whole", images.decode), ("prepared", prepared)):
            print(f"  {what:<18} {rate(some, work):.0f} images per CPU-second", flush=True)


if __name__ == "__main__":
    main()
