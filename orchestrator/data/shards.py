"""Shards: Parquet files of images of one size, and the manifest that describes them (docs/formats.md).

A shard has the columns image (JPEG, or raw RGB pixels), label, id and name (its path in the source), uncompressed, in
row groups of ROW_GROUP_ROWS. The manifest is written last: a folder without one is not a data set, whatever else it
holds.
"""

import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.base.environment import command
from orchestrator.base.exits import JobError
from orchestrator.base.schema import check_version
from orchestrator.base.storage import StoragePath

MANIFEST = "manifest.json"
SCHEMA_VERSION: Final = 1  # of the manifest
UNFINISHED = "_unfinished"  # folder of the notes of finished tasks; removed at the end
REJECTED = "rejected.jsonl"
MEAN_IMAGE = "mean_image.npy"
ROW_GROUP_ROWS = 128
READ_AT_A_TIME = 8  # shards
ENCODINGS = ("jpeg", "raw")


def schema(encoding: str, image_size: int) -> pa.Schema:
    """Of a shard."""
    image = pa.binary() if encoding == "jpeg" else pa.binary(3 * image_size**2)
    return pa.schema([("image", image), ("label", pa.int32()), ("id", pa.int64()), ("name", pa.string())])


class DamagedData(JobError):
    """A shard differs from its manifest, or an image in it cannot be decoded; the message names it."""


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str  # below the data set's folder
    split: str
    rows: int
    row_groups: tuple[int, ...]  # rows of each
    pixels_at: tuple[int, ...] = ()  # of raw images: the byte where the pixels of each row group begin
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds. Pixel statistics are over the training images, in units of [0, 255]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    format: Literal[1] = 1  # of the shards
    source: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # in words, if the source has them
    image_size: int  # side of the stored images in pixels
    encoding: Literal["jpeg", "raw"] = "jpeg"
    jpeg_quality: int | None  # None for raw
    seed: int  # of the global shuffle
    rows: dict[str, int]  # train, val
    class_rows: dict[str, tuple[int, ...]]  # train, val: rows of each class, in the order of classes
    rejected: int
    warnings: tuple[str, ...] = ()  # what looked wrong with the source, a line each
    kinds: dict[str, int] = {}  # images that were rotated by EXIF, transparent or gray, where there are any
    mean_rgb: tuple[float, ...]
    covariance_rgb: tuple[tuple[float, ...], ...]
    eigenvalues: tuple[float, ...]  # of the covariance, largest first
    eigenvectors: tuple[tuple[float, ...], ...]  # row i, column j: component i of the j-th eigenvector
    mean_image_file: str = MEAN_IMAGE  # (image_size, image_size, 3) float32
    mean_image_sha256: str
    shards: tuple[Shard, ...]

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of train or val."""
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def digest(self) -> str:
        """A short hash of the shards' bytes."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


def read_manifest(folder: StoragePath) -> Manifest:
    """Raises ValueError if the folder holds no data set, or one that this version cannot read."""
    place = folder / MANIFEST
    if place.size() is None:
        if not folder.is_folder():
            raise ValueError(
                f"--data {folder}: no such folder; make one with: {command('prepare')} --source DIR --output {folder}"
            )
        found = folder.children()
        hint = "it looks like a source; " if found.get("train") and found.get("val") else ""
        raise ValueError(
            f"--data {folder}: has no {MANIFEST}; {hint}make shards with: "
            f"{command('prepare')} --source DIR --output DIR"
        )
    try:
        document = json.loads(place.read())
    except ValueError as error:
        raise ValueError(f"{place}: is not JSON ({error}); prepare the data again") from None
    if isinstance(document, dict):
        check_version(document, SCHEMA_VERSION, place)
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {where or 'the file'}: {first['msg']}; prepare the data again") from None


def read_mean_image(folder: StoragePath, manifest: Manifest) -> NDArray[np.float32]:
    """(image_size, image_size, 3), in [0, 255]. Raises DamagedData."""
    place = folder / manifest.mean_image_file
    data = place.read() if place.size() is not None else b""
    if hashlib.sha256(data).hexdigest() != manifest.mean_image_sha256:
        raise DamagedData(f"{place}: missing or changed since it was written; prepare the data again")
    mean: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    return mean


def verify(
    folder: StoragePath, manifest: Manifest, *, whole: bool = True, on_done: Callable[[int], None] = lambda size: None
) -> None:
    """Check every shard against the manifest: its presence, its size and, if `whole`, its checksum. Raises DamagedData.

    `on_done` gets the size of each shard that passes, in bytes.
    """
    with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
        for shard, problem in zip(
            manifest.shards, pool.map(lambda shard: _damage(folder, shard, whole), manifest.shards), strict=True
        ):
            if problem:
                raise DamagedData(problem)
            on_done(shard.size_bytes)


def label_ranges(folder: StoragePath, manifest: Manifest) -> list[tuple[int, int]]:
    """The least and the greatest label of every shard. Raises DamagedData if one cannot be read."""
    with ThreadPoolExecutor(READ_AT_A_TIME) as pool:
        return list(pool.map(lambda shard: _label_range(folder / shard.file), manifest.shards))


def check_labels(folder: StoragePath, manifest: Manifest, ranges: list[tuple[int, int]], num_classes: int) -> None:
    """Check the `label_ranges` of all shards. Raises ValueError naming a shard with a label beyond num_classes."""
    for shard, (least, greatest) in zip(manifest.shards, ranges, strict=True):
        if not 0 <= least <= greatest < num_classes:
            worst = greatest if greatest >= num_classes else least
            raise ValueError(
                f"{folder / shard.file}: has label {worst}, but there are {num_classes} classes; "
                "set --num-classes to as many as the data has"
            )


def sha256(place: StoragePath) -> str:
    digest = hashlib.sha256()
    for data in place.chunks():
        digest.update(data)
    return digest.hexdigest()


def _label_range(place: StoragePath) -> tuple[int, int]:
    """The least and the greatest label of a shard; zeros of an empty one."""
    try:
        with place.open() as file:
            labels = pq.read_table(file, columns=["label"])["label"].to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise DamagedData(f"{place}: shard cannot be read: {str(error).splitlines()[0]}") from None
    return (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)


def _damage(folder: StoragePath, shard: Shard, whole: bool) -> str | None:
    """What is wrong with a shard, or None."""
    place = folder / shard.file
    size = place.size()
    if size is None:
        return f"{place}: shard is missing"
    if size != shard.size_bytes:
        return f"{place}: shard has {size} bytes where the manifest says {shard.size_bytes}; prepare the data again"
    if whole and sha256(place) != shard.sha256:
        return f"{place}: shard is damaged: its checksum differs from the manifest's; prepare the data again"
    return None
