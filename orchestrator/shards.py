"""Shards: Parquet files of encoded images of one size, and the manifest that describes them.

A shard has the columns image (JPEG bytes, or raw RGB pixels), label (int32), id (int64) and name (where it came from),
uncompressed, in row groups of ROW_GROUP_ROWS. The manifest is written last: a folder without one is no data set,
whatever else is in it.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from . import images
from .exits import JobError, last_line, signals_deferred
from .sources import SPLITS, Entry, Source

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
MEAN_IMAGE = "mean_image.npy"
ROW_GROUP_ROWS = 128
ROWS_PER_SHARD = 1024
JPEG_QUALITY = 90

ENCODINGS = ("jpeg", "raw")


def schema(encoding: str, image_size: int) -> pa.Schema:
    image = pa.binary() if encoding == "jpeg" else pa.binary(3 * image_size**2)
    return pa.schema([("image", image), ("label", pa.int32()), ("id", pa.int64()), ("name", pa.string())])


class DamagedData(JobError):
    """A shard is not what its manifest says; the message names it."""


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str  # below the data set's folder
    split: str
    rows: int
    row_groups: tuple[int, ...]  # rows of each
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds. Pixel statistics are over the training images, in units of [0, 255]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = 1
    source: str
    classes: tuple[str, ...]
    image_size: int  # side of the stored images in pixels
    encoding: Literal["jpeg", "raw"] = "jpeg"
    jpeg_quality: int | None  # of jpeg
    seed: int  # of the global shuffle
    rows: dict[str, int]  # train, val
    class_rows: dict[str, tuple[int, ...]]  # train, val: rows of each class, in the order of classes
    rejected: int
    mean_rgb: tuple[float, ...]
    covariance_rgb: tuple[tuple[float, ...], ...]
    eigenvalues: tuple[float, ...]  # of the covariance, largest first
    eigenvectors: tuple[tuple[float, ...], ...]  # row i, column j: component i of the j-th eigenvector
    mean_image_file: str = MEAN_IMAGE  # (image_size, image_size, 3) float32
    mean_image_sha256: str
    shards: tuple[Shard, ...]

    def split(self, name: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def digest(self) -> str:
        """A short name for exactly these bytes."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


class Progress(BaseModel):
    """How far a preparation is."""

    images_done: int
    images_total: int
    rejected: int
    elapsed_s: float


def read_manifest(folder: Path) -> Manifest:
    """Raises ValueError where the folder holds no data set, or one that this version cannot read."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(
            f"--data {folder}: no such folder; make one with: python jobs/prepare.py --source DIR --output {folder}"
        )
    if not path.is_file():
        hint = "it looks like a source; " if (folder / "train").is_dir() and (folder / "val").is_dir() else ""
        raise ValueError(
            f"--data {folder}: has no {MANIFEST}; {hint}make shards with: "
            "python jobs/prepare.py --source DIR --output DIR"
        )
    try:
        return Manifest.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where or 'the file'}: {first['msg']}; prepare the data again") from None


def read_mean_image(folder: Path, manifest: Manifest) -> NDArray[np.float32]:
    """(image_size, image_size, 3), in [0, 255]. Raises DamagedData."""
    path = folder / manifest.mean_image_file
    if not path.is_file() or _sha256(path) != manifest.mean_image_sha256:
        raise DamagedData(f"{path}: missing or changed since it was written; prepare the data again")
    mean: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return mean


def verify(folder: Path, manifest: Manifest, *, num_threads: int | None = None) -> None:
    """Read every shard once and hold it against the manifest: there, whole, unchanged. Raises DamagedData."""
    with ThreadPoolExecutor(num_threads or min(16, 2 * (os.cpu_count() or 1))) as pool:
        for problem in pool.map(lambda shard: _damage(folder, shard), manifest.shards):
            if problem:
                raise DamagedData(problem)


def check_labels(folder: Path, manifest: Manifest, num_classes: int) -> None:
    """Raises ValueError if a label is not below num_classes, naming the shard; DamagedData if it cannot be read."""
    for shard in manifest.shards:
        try:
            labels = pq.read_table(folder / shard.file, columns=["label"])["label"].to_numpy()
        except (OSError, pa.ArrowException) as error:
            raise DamagedData(f"{folder / shard.file}: shard cannot be read: {str(error).splitlines()[0]}") from None
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            worst = labels.max() if labels.max() >= num_classes else labels.min()
            raise ValueError(
                f"{folder / shard.file}: has label {worst}, but there are {num_classes} classes; "
                "set --num-classes to what the data has"
            )


def prepare(
    source: Source,
    output: Path,
    *,
    image_size: int | None = None,
    seed: int = 0,
    encoding: str = "jpeg",
    jpeg_quality: int = JPEG_QUALITY,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_rejected: float = 0.01,
    parallelism: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Read every image of the source on Ray Data and write the shards, the same bytes whatever the parallelism.

    The order is one permutation of the sorted listing, drawn from the seed; each shard is one task over its stretch of
    it. All sums are of integers, so that they do not depend on which task ends first.

    Raises JobError if more than the fraction `max_rejected` of the files could not be read; the list is then in
    output/rejected.jsonl, and there is no manifest.
    """
    import ray.data

    size = image_size or source.image_size
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    tasks = list(_tasks(source, seed, rows_per_shard))
    quality = jpeg_quality if encoding == "jpeg" else None
    write = _ShardWriter(str(output.absolute()), size, quality, len(source.classes))
    shards: list[Shard] = []
    rejected = [{"name": name, "reason": reason} for name, reason in source.misplaced]
    total = sum(len(entries) for entries in source.splits.values())
    sums = np.zeros((size, size, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    class_rows = {split: np.zeros(len(source.classes), np.int64) for split in SPLITS}
    start, done = time.monotonic(), 0
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        write, compute=ray.data.TaskPoolStrategy(size=parallelism)
    )
    for result in _results(dataset):
        report = json.loads(result["report"])
        rejected.extend(report["rejected"])
        if report["shard"]["split"] == "train":
            sums += result["sums"]
            products += result["products"]
        class_rows[report["shard"]["split"]] += np.array(report["class_rows"], np.int64)
        if report["shard"]["rows"]:
            shards.append(Shard(**report["shard"]))
        done += report["images"]
        on_progress(
            Progress(images_done=done, images_total=total, rejected=len(rejected), elapsed_s=time.monotonic() - start)
        )
    shards.sort(key=lambda shard: (SPLITS.index(shard.split), shard.file))
    rejected.sort(key=lambda row: row["name"])
    with open(output / REJECTED, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rejected)
    rows = {split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS}
    considered = total + len(source.misplaced)
    if len(rejected) > max_rejected * considered or not all(rows.values()):
        raise JobError(
            f"{len(rejected)} of {considered} files could not be read, more than --max-rejected {max_rejected:g}; "
            f"they are listed in {output / REJECTED}"
        )
    counted = {split: tuple(counts.tolist()) for split, counts in class_rows.items()}
    manifest = _describe(source, shards, rows, counted, len(rejected), size, quality, seed, sums, products, output)
    _write_atomically(output / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def _results(dataset: Any) -> Iterator[dict[str, Any]]:
    """The tasks' reports. Raises JobError with the reason if one could not do its work, for want of space, say."""
    from ray.exceptions import RayError

    try:
        rows = iter(dataset.iter_rows())
        while True:
            with signals_deferred():
                row = next(rows, None)
            if row is None:
                return
            yield row
    except (RayError, OSError) as error:
        raise JobError(f"writing shards failed: {last_line(error)}") from error


def _tasks(source: Source, seed: int, rows_per_shard: int) -> Iterator[dict[str, Any]]:
    """One task a shard: its name and its stretch of the shuffled listing."""
    for number, split in enumerate(SPLITS):
        entries = source.splits[split]
        order = np.random.default_rng([seed, number]).permutation(len(entries))
        for index, first in enumerate(range(0, len(order), rows_per_shard)):
            stretch = [asdict(entries[i]) for i in order[first : first + rows_per_shard]]
            yield {"split": split, "file": f"{split}/shard-{index:05d}.parquet", "entries": stretch}


class _ShardWriter:
    """The task that turns a stretch of entries into one Parquet file and the sums of its pixels."""

    def __init__(self, output: str, size: int, jpeg_quality: int | None, num_classes: int) -> None:
        self.output, self.size, self.jpeg_quality, self.num_classes = output, size, jpeg_quality, num_classes

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        sums = np.zeros((self.size, self.size, 3), np.int64)
        products = np.zeros((3, 3), np.int64)
        columns: dict[str, list[Any]] = {name: [] for name in self._schema().names}
        rejected = []
        for fields in task["entries"]:
            entry = Entry(**fields)
            try:
                pixels = images.resize_and_center(images.decode(_read(entry)), self.size)
            except images.NotAnImage as reason:
                rejected.append({"name": entry.name, "reason": str(reason)})
                continue
            sums += pixels
            flat = pixels.reshape(-1, 3).astype(np.float64)
            products += (flat.T @ flat).astype(np.int64)  # exact: below 2 ** 53 for any one image
            data = pixels.tobytes() if self.jpeg_quality is None else images.encode(pixels, self.jpeg_quality)
            for name, value in zip(self._schema().names, (data, entry.label, entry.id, entry.name), strict=True):
                columns[name].append(value)
        rows = len(columns["id"])
        shard = {"file": task["file"], "split": task["split"], "rows": rows}
        if rows:
            shard |= self._write(Path(self.output, task["file"]), columns)
        labels = np.bincount(columns["label"], minlength=self.num_classes).tolist() if rows else [0] * self.num_classes
        report = {"shard": shard, "rejected": rejected, "images": len(task["entries"]), "class_rows": labels}
        return {"report": json.dumps(report), "sums": sums, "products": products}

    def _schema(self) -> pa.Schema:
        return schema("raw" if self.jpeg_quality is None else "jpeg", self.size)

    def _write(self, path: Path, columns: dict[str, list[Any]]) -> dict[str, Any]:
        sink = pa.BufferOutputStream()
        # compressed or dictionary-encoded images would be slower to read (docs/data.md)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(pa.table(columns, schema=self._schema()), sink, row_group_size=ROW_GROUP_ROWS, **options)
        data = sink.getvalue().to_pybytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, data)
        rows = len(columns["id"])
        groups = [min(ROW_GROUP_ROWS, rows - first) for first in range(0, rows, ROW_GROUP_ROWS)]
        return {"row_groups": groups, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(entry: Entry) -> bytes:
    if entry.data is not None:
        return entry.data
    assert entry.path is not None
    try:
        if not stat.S_ISREG(os.stat(entry.path).st_mode):
            raise images.NotAnImage("not a regular file")
        return Path(entry.path).read_bytes()
    except OSError as error:
        raise images.NotAnImage(f"cannot be read: {error.strerror}") from None


def _describe(
    source: Source,
    shards: list[Shard],
    rows: dict[str, int],
    class_rows: dict[str, tuple[int, ...]],
    num_rejected: int,
    size: int,
    jpeg_quality: int | None,
    seed: int,
    sums: NDArray[np.int64],
    products: NDArray[np.int64],
    output: Path,
) -> Manifest:
    pixels = rows["train"] * size * size
    mean = sums.sum(axis=(0, 1)) / pixels
    covariance = products / pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    largest = eigenvectors[np.abs(eigenvectors).argmax(axis=0), np.arange(3)]
    eigenvectors = eigenvectors * np.sign(largest)  # the sign is free: make it the same everywhere
    np.save(output / MEAN_IMAGE, (sums / rows["train"]).astype(np.float32), allow_pickle=False)
    return Manifest(
        source=source.name,
        classes=source.classes,
        image_size=size,
        encoding="raw" if jpeg_quality is None else "jpeg",
        jpeg_quality=jpeg_quality,
        seed=seed,
        rows=rows,
        class_rows=class_rows,
        rejected=num_rejected,
        mean_rgb=tuple(mean.tolist()),
        covariance_rgb=tuple(map(tuple, covariance.tolist())),
        eigenvalues=tuple(eigenvalues.tolist()),
        eigenvectors=tuple(map(tuple, eigenvectors.tolist())),
        mean_image_sha256=_sha256(output / MEAN_IMAGE),
        shards=tuple(shards),
    )


def _damage(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard, or None."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path}: shard is missing"
    size = path.stat().st_size
    if size != shard.size_bytes:
        return f"{path}: shard has {size} bytes where the manifest says {shard.size_bytes}; prepare the data again"
    if _sha256(path) != shard.sha256:
        return f"{path}: shard is damaged: its checksum differs from the manifest's; prepare the data again"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
