"""The picture of a prepared data set: its mean image, and some images of its classes as they are stored."""

import io
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexnet.images import decode
from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import SHEETS, Manifest, read_mean_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = SHEETS[0]
ALL_CLASSES, ENDS = 20, 10  # up to so many classes are named; of more, so many of the largest and of the smallest
PICTURES = 48  # on a sheet, about
PER_CLASS = 4
SHARDS = 8  # that are looked into: an image of every class may be anywhere
CAPTION = 40  # characters, below an image


def named_classes(manifest: Manifest) -> tuple[list[int], list[int]]:
    """Labels of the classes to be named: all of few, in their order; of many the largest, and then the smallest."""
    labels = list(range(len(manifest.classes)))
    if len(labels) <= ALL_CLASSES:
        return labels, []
    labels.sort(key=lambda label: (-manifest.class_rows["train"][label], label))
    return labels[:ENDS], labels[-ENDS:]


def draw_classes(folder: StoragePath, manifest: Manifest) -> StoragePath:
    """Draw the mean image and images of the named classes, beside the shards. Returns the picture's place."""
    from alexnet.pictures import contact_sheet

    largest, smallest = named_classes(manifest)
    labels = largest + smallest
    each = max(1, min(PER_CLASS, (PICTURES - 1) // len(labels)))
    found = stored_images(folder, manifest, labels, each)
    mean = np.rint(np.clip(read_mean_image(folder, manifest), 0, 255)).astype(np.uint8)
    pictures, captions = [mean], ["mean of the training images"]
    for label in labels:
        pictures += found[label]
        captions += [caption(manifest, label)] * len(found[label])
    there = sum(bool(found[label]) for label in labels)
    title = f"{shown(manifest.source, LONGEST_VALUE)}: images of {there} of {len(manifest.classes)} classes, as stored"
    (folder / FILE).write(as_png(contact_sheet(np.stack(pictures), captions, title)))
    return folder / FILE


def stored_images(
    folder: StoragePath, manifest: Manifest, labels: list[int], each: int
) -> dict[int, list[NDArray[np.uint8]]]:
    """Up to `each` images of every label, (side, side, 3): the first ones in the first shards, those of validation
    where there are none for training."""
    found: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
    rows = manifest.class_rows
    missing = {label: min(each, rows["train"][label] or rows["val"][label]) for label in labels}
    for shard in [*manifest.split("train")[:SHARDS], *manifest.split("val")[:SHARDS]]:
        if not any(missing.values()):
            break
        with (folder / shard.file).open() as file:
            table = pq.ParquetFile(file)
            for group in range(table.num_row_groups):
                chosen = []
                for row, label in enumerate(table.read_row_group(group, columns=["label"])["label"].to_pylist()):
                    if missing.get(label, 0):
                        missing[label] -= 1
                        chosen.append((row, label))
                images = table.read_row_group(group, columns=["image"])["image"] if chosen else []
                for row, label in chosen:
                    found[label].append(_pixels(images[row].as_py(), manifest))
    return found


def _pixels(data: bytes, manifest: Manifest) -> NDArray[np.uint8]:
    if manifest.encoding == "jpeg":
        return decode(data)
    return np.frombuffer(data, np.uint8).reshape(manifest.image_size, manifest.image_size, 3)


def caption(manifest: Manifest, label: int) -> str:
    """A class as it is called below an image: in words, if there are any."""
    return shown((manifest.class_names or manifest.classes)[label].split(",")[0], CAPTION)


def as_png(figure: "Figure") -> bytes:
    """A figure; characters that its font lacks are drawn as boxes."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
