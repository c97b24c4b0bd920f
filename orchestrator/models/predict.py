"""Predicts the classes of images from anywhere, without labels: a file, a folder tree, a pattern, an archive, Parquet.

Rows come in the sorted order of the source, whatever the workers.
"""

import functools
import glob
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexnet import images
from alexnet.trained import TrainedNet
from orchestrator.base.exits import JobError
from orchestrator.base.shown import shown
from orchestrator.base.storage import StoragePath
from orchestrator.data.decoder import Decoder
from orchestrator.data.sources.arrow import SUFFIX as ARROW
from orchestrator.data.sources.arrow import arrow_batches
from orchestrator.data.sources.listing import Entry, image_column, read
from orchestrator.data.sources.parquet import NAMES, SUFFIX
from orchestrator.data.sources.tree import IMAGES, TARS, ZIP, Tree, extension, may_be_image, tree_of, unpacked
from orchestrator.models import metrics
from orchestrator.models.engine import Pixels, Run, Settings, start
from orchestrator.models.words import in_words

ARCHIVES = (*ZIP, *TARS, ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLES = (SUFFIX, ARROW)
READERS = 16  # threads that fetch from object storage
DECODED_TOGETHER = 32  # images that share a process of their own, where they are not plain JPEG


@dataclass(frozen=True)
class Found:
    """The images of a source, which are listed when they are iterated over."""

    total: int
    entries: Callable[[], Iterator[Entry]]
    left_out: int  # files that are no images by their names, or no one's data
    rejected: tuple[tuple[str, str], ...] = ()  # (name, reason) of tables that have no images


def find_images(source: str) -> Found:
    """Raises ValueError of one line for a source that is not there, or has nothing that may be an image."""
    place = StoragePath.of(source)
    if place.is_folder():
        tree = tree_of(place)
        archives = [name for name in tree.files if name.lower().endswith((*ZIP, *TARS))]
        if archives and not any(extension(name) in (*IMAGES, SUFFIX[1:]) for name in tree.files):
            tree = unpacked(tree, archives)
        return _of_tree(source, tree)
    if place.size() is not None:
        if place.name.lower().endswith(ARCHIVES):
            return _of_tree(source, tree_of(place))
        if place.name.lower().endswith(TABLES):
            return _listed(source, [("", place)], [], 0)
        return Found(1, lambda: iter([Entry(0, 0, place.name, path=place.text)]), 0)
    if place.local is not None and glob.has_magic(source):
        names = sorted(name for name in glob.glob(source, recursive=True) if Path(name).is_file())
        wanted = [name for name in names if may_be_image(name)]
        if not wanted:
            raise ValueError(f"--source {source}: no image matches it")
        made = functools.partial(map, lambda pair: Entry(pair[0], 0, pair[1], path=str(Path(pair[1]).absolute())))
        return Found(len(wanted), lambda: made(enumerate(wanted)), len(names) - len(wanted))
    kind = place.special()
    what = f"is {kind}, neither a folder nor a file that can be read" if kind else "no such file or folder"
    raise ValueError(
        f"--source {source}: {what}; give an image, a folder, a pattern such as 'photos/**/*.jpg', "
        "a zip or tar, a Parquet file, or a URI such as s3://BUCKET/FOLDER"
    )


def _of_tree(source: str, tree: Tree) -> Found:
    tables = [name for name in tree.files if name.endswith(TABLES)] if tree.root is not None else []
    wanted = [name for name in tree.files if may_be_image(name)]
    left_out = len(tree.left_out) + len(tree.files) - len(wanted) - len(tables)
    files = [(name, StoragePath(tree.files[name].path)) for name in tables if tree.files[name].start is None]
    if not wanted and not files:
        raise ValueError(f"--source {source}: has no image: {tree.summary()}")
    images_of = [(name, tree.files[name]) for name in wanted]
    return _listed(source, files, images_of, left_out)


def _listed(source: str, tables: list[tuple[str, StoragePath]], plain: list[tuple[str, Any]], left_out: int) -> Found:
    """Images that are files, and those that are rows of tables, sorted by the name of the file."""
    groups: dict[str, list[int]] = {}
    rejected = []
    for name, place in sorted(tables, key=lambda pair: pair[0]):
        try:
            groups[name] = _groups(place)
        except ValueError as reason:
            rejected.append((name, str(reason)))
    total = len(plain) + sum(sum(rows) for rows in groups.values())
    if not total:
        name, why = rejected[0] if rejected else ("", "")
        raise ValueError(f"--source {source}: " + (f"{name or 'it'} {why}" if why else "has no image in it"))
    places = dict(tables)

    def entries() -> Iterator[Entry]:
        numbers = itertools.count()
        for name, at in sorted([*plain, *((name, None) for name in groups)], key=lambda pair: pair[0]):
            if at is not None:
                yield Entry(next(numbers), 0, name, **at.at())
                continue
            place = places[name]
            for group, rows in enumerate(groups[name]):
                names = _names(place, group, name or place.name, rows)
                for row in range(rows):
                    yield Entry(next(numbers), 0, names[row], path=place.text, row_group=group, row=row)

    return Found(total, entries, left_out, tuple(rejected))


def _groups(place: StoragePath) -> list[int]:
    """The rows of each row group of a table that has a column of image bytes. Raises ValueError for a reason why it has
    none."""
    try:
        with place.open() as file:
            if place.name.endswith(ARROW):
                batches = arrow_batches(file)
                schema, rows = batches[0].schema if batches else pa.schema([]), [len(each) for each in batches]
            else:
                parquet = pq.ParquetFile(file)
                schema = parquet.schema_arrow
                rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot be read as a table: {reason}") from None
    if image_column(schema) is None:
        raise ValueError(shown(f"has no column of image bytes; it has {', '.join(schema.names)}"))
    return rows


def _names(place: StoragePath, group: int, file: str, rows: int) -> list[str]:
    """What each row is called: by a column of names, or by its place."""
    numbered = [f"{file}, row group {group}, row {row}" for row in range(rows)]
    if place.name.endswith(ARROW):
        return numbered
    with place.open() as opened:
        parquet = pq.ParquetFile(opened)
        known = {name.lower(): name for name in parquet.schema_arrow.names}
        column = next((known[name] for name in NAMES if name in known), None)
        if column is None or not pa.types.is_string(parquet.schema_arrow.field(column).type):
            return numbered
        found = parquet.read_row_group(group, columns=[column])[column].to_pylist()
    return [name or other for name, other in zip(found, numbered, strict=True)]


class EntryReader:
    """Reads images from wherever they are, and decodes them as preparing data does (orchestrator/data/decoder.py)."""

    def __init__(self, size: int, *, exif: bool = True) -> None:
        """size: side of the stored images, pixels. exif: turn images by their orientation."""
        self.size, self.exif = size, exif

    def fetch(self, task: list[Entry]) -> list[bytes | str]:
        """The bytes of each, or why there are none; of object storage many are asked for at a time. Raises JobError."""
        if any(entry.path and "://" in entry.path and entry.row is None for entry in task):
            with ThreadPoolExecutor(READERS) as pool:
                return list(pool.map(_bytes, task))
        return [_bytes(entry) for entry in task]

    def decode(self, task: list[Entry], fetched: list[bytes | str], run: Run) -> Pixels:
        """The pixels of those that can be read. Raises JobError for a fault of the machine."""
        stored = np.empty((len(task), self.size, self.size, 3), np.uint8)
        parts = [range(first, min(first + DECODED_TOGETHER, len(task)))
                 for first in range(0, len(task), DECODED_TOGETHER)]  # fmt: skip
        reasons = itertools.chain(*run(lambda part: self._decode(part, task, fetched, stored), parts))
        rejected = dict(reasons)
        good = [number for number in range(len(task)) if number not in rejected]
        ids = np.array([task[number].id for number in good], np.int64)
        return Pixels(
            stored[good] if rejected else stored, ids, tuple(task[number].name for number in good),
            tuple((task[number].name, reason) for number, reason in sorted(rejected.items())),
        )  # fmt: skip

    def _decode(
        self, part: range, task: list[Entry], fetched: list[bytes | str], into: NDArray[np.uint8]
    ) -> list[tuple[int, str]]:
        """Decode a part of a task into its places; returns those that cannot be, and why."""
        rejected = []
        decoder = Decoder(self.size, self.exif, images.WHITE, lower="--batch-size")
        for number, outcome in decoder.outcomes(task, ((i, functools.partial(_given, fetched[i])) for i in part)):
            if outcome.pixels is None:
                rejected.append((number, outcome.reason))
            else:
                into[number] = outcome.pixels
        return rejected


def _given(data: bytes | str) -> bytes:
    """What was fetched. Raises NotAnImage for the reason why nothing was."""
    if isinstance(data, str):
        raise images.NotAnImage(data)
    return data


def _bytes(entry: Entry) -> bytes | str:
    try:
        return read(entry)
    except images.NotAnImage as reason:
        return str(reason)


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of some images."""

    names: tuple[str, ...]
    classes: list[list[str]]
    probabilities: list[list[float]]
    rejected: tuple[tuple[str, str], ...]  # (name, reason)

    def columns(self) -> dict[str, Any]:
        """As they are written."""
        return {"name": self.names, "classes": self.classes, "probabilities": self.probabilities}


def predict(
    trained: TrainedNet,
    found: Found,
    settings: Settings,
    *,
    top: int,
    exif: bool = True,
    num_workers: int | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, seconds: None,
) -> Iterator[Prediction]:
    """The predictions of every image of a source, a batch at a time, in order. Raises JobError."""
    description = trained.description
    outputs = np.array(in_words(description.classes, description.class_names, trained.classes), object)
    reader = EntryReader(trained.image_size, exif=exif)
    begun, done = time.monotonic(), 0
    if found.rejected:
        yield Prediction((), [], [], found.rejected)
    with start([trained], reader, settings, num_workers) as engine:
        for answer in engine.answers(_batches(found.entries(), settings.batch_size)):
            classes, probabilities = metrics.top_k(answer.log_probabilities[0], top)
            yield Prediction(answer.names, outputs[classes].tolist(), probabilities.tolist(), answer.rejected)
            done += len(answer.names) + len(answer.rejected)
            progress(done, found.total, time.monotonic() - begun)
    if done != found.total:
        raise JobError(f"{done} of {found.total} images were answered: the source changed meanwhile")


def _batches(entries: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    while batch := list(itertools.islice(entries, size)):
        yield batch
