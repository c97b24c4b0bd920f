"""Shards: Parquet files of images of one size, and the manifest that describes them (docs/formats.md).

A shard has the columns image (JPEG, or raw RGB pixels), label, id and name (its path in the source), uncompressed, in
row groups of ROW_GROUP_ROWS. The manifest is written last: a folder without one is not a data set, whatever else it
holds.
"""

import collections
import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.base.environment import command
from orchestrator.base.exits import JobError
from orchestrator.base.schema import KEY, check_version, load_json
from orchestrator.base.shown import LONGEST_VALUE, quoted, shown
from orchestrator.base.storage import StoragePath

MANIFEST = "manifest.json"
MEAN_IMAGE = "mean_image.npy"
SCHEMA_VERSION: Final = 2  # of the manifest
CHECKSUM = "manifest_sha256"  # since version 2
UNFINISHED = "_unfinished"  # folder of the notes of finished tasks; removed at the end
SHEETS = ("classes.png", "contact_sheet.png")  # that are drawn beside them, of a preparation and of a check
REJECTED = "rejected.jsonl"
ROW_GROUP_ROWS = 128
READ_AT_A_TIME = 8  # shards
LONGEST_REASON = 200  # characters
ENCODINGS = ("jpeg", "raw")
MAX_SIDE = 2**16  # pixels of a stored image, exclusive
MAX_NAME_BYTES = 255  # of a part of a file's name
ROUNDING = 1e-6  # relative to the largest variance of the colours


def schema(encoding: str, image_size: int) -> pa.Schema:
    """Of a shard."""
    image = pa.binary() if encoding == "jpeg" else pa.binary(3 * image_size**2)
    return pa.schema([("image", image), ("label", pa.int32()), ("id", pa.int64()), ("name", pa.string())])


class DamagedData(JobError):
    """A shard differs from its manifest, or an image in it cannot be decoded; the message names it."""


def _plain_path(name: str) -> str:
    """A file's name, if it stays below the folder that it is put behind. Raises ValueError."""
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or not all(parts) or {".", ".."} & set(parts):
        raise ValueError("expected a plain path below the folder, such as train/shard-00000.parquet")
    if max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        raise ValueError(f"a name has at most {MAX_NAME_BYTES} bytes")
    return name


PlainPath = Annotated[str, AfterValidator(_plain_path)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Split = Literal["train", "val"]
Rgb = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
RgbByRgb = Annotated[tuple[Rgb, ...], Field(min_length=3, max_length=3)]


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: PlainPath  # below the data set's folder
    split: Split
    rows: Annotated[int, Field(ge=1)]
    row_groups: tuple[Annotated[int, Field(ge=1)], ...]  # rows of each
    pixels_at: tuple[Count, ...] = ()  # of raw images: the byte where the pixels of each row group begin
    size_bytes: Annotated[int, Field(ge=1)]
    sha256: Sha256

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise ValueError(f"rows is {self.rows}, but its row_groups have {sum(self.row_groups)}")
        if len(self.pixels_at) not in (0, len(self.row_groups)):
            raise ValueError(f"pixels_at has {len(self.pixels_at)} entries for {len(self.row_groups)} row_groups")
        return self


class Manifest(BaseModel):
    """What a folder of shards holds. Pixel statistics are over the training images, in units of [0, 255]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    schema_version: Literal[2] = SCHEMA_VERSION
    format: Literal[1] = 1  # of the shards
    source: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # in words, if the source has them
    image_size: Annotated[int, Field(ge=1, lt=MAX_SIDE)]  # side of the stored images in pixels
    encoding: Literal["jpeg", "raw"] = "jpeg"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] | None  # None for raw
    seed: int  # of the global shuffle
    rows: dict[str, int]  # train, val
    class_rows: dict[str, tuple[Count, ...]]  # train, val: rows of each class, in the order of classes
    rejected: Count
    found: tuple[str, ...] = ()  # what was said of the source: its format and why, its parts; a line each
    left_out: dict[str, Count] = {}  # files and folders that were left out, by the rule
    warnings: tuple[str, ...] = ()  # what looked wrong with the source, a line each
    exif: Literal["apply", "ignore", ""] = ""  # whether images were turned as they state; empty: not recorded
    kinds: dict[str, Count] = {}  # images that were rotated by EXIF, transparent or gray, where there are any
    mean_rgb: Rgb
    covariance_rgb: RgbByRgb
    eigenvalues: Rgb  # of the covariance, largest first
    eigenvectors: RgbByRgb  # row i, column j: component i of the j-th eigenvector
    mean_image_file: PlainPath = MEAN_IMAGE  # (image_size, image_size, 3) float32
    mean_image_sha256: Sha256
    shards: tuple[Shard, ...]
    manifest_sha256: str = ""  # of all other fields; see `checksum`

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        """Every fact that is there twice is the same in both places."""
        if why := _contradiction(self):
            raise ValueError(why)
        return self

    def sealed(self) -> "Manifest":
        """With its checksum, as it is written."""
        return self.model_copy(update={CHECKSUM: checksum(self.model_dump(mode="json"))})

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of train or val."""
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def digest(self) -> str:
        """A short hash of the shards' bytes."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


def checksum(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields but the checksum itself: as JSON without spaces, sorted by name, in ASCII."""
    rest = {name: value for name, value in document.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
        document = load_json(place.read())
    except ValueError as error:
        raise ValueError(f"{place}: is not JSON ({shown(error, LONGEST_REASON)}); prepare the data again") from None
    unsealed = isinstance(document, dict) and check_version(document, SCHEMA_VERSION, place) < 2  # had no checksum
    try:
        manifest = Manifest.model_validate(document | {KEY: SCHEMA_VERSION} if unsealed else document)
    except ValidationError as error:
        raise ValueError(f"{place}: {_reason(error)}; prepare the data again") from None
    if unsealed:
        return manifest.sealed()
    if manifest.manifest_sha256 != checksum(document):
        raise ValueError(f"{place}: was changed after it was written: its checksum differs; prepare the data again")
    return manifest


def read_mean_image(folder: StoragePath, manifest: Manifest) -> NDArray[np.float32]:
    """(image_size, image_size, 3), in [0, 255]. Raises DamagedData."""
    place = folder / manifest.mean_image_file
    data = place.read() if place.size() is not None else b""
    if hashlib.sha256(data).hexdigest() != manifest.mean_image_sha256:
        raise DamagedData(f"{place}: missing or changed since it was written; prepare the data again")
    try:
        mean: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DamagedData(f"{place}: is no array of numpy ({shown(error, LONGEST_REASON)})") from None
    if mean.shape != (manifest.image_size, manifest.image_size, 3) or mean.dtype != np.float32:
        raise DamagedData(f"{place}: has {mean.dtype} {mean.shape} where image_size is {manifest.image_size}")
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


def _contradiction(manifest: Manifest) -> str | None:
    """What of a manifest contradicts the rest of it, or None."""
    if manifest.rows.keys() != {"train", "val"} or manifest.class_rows.keys() != {"train", "val"}:
        return "rows and class_rows: expected train and val"
    if (manifest.jpeg_quality is None) != (manifest.encoding == "raw"):
        return f"jpeg_quality is {manifest.jpeg_quality}, but encoding is {manifest.encoding}"
    for split, rows in manifest.rows.items():
        held = sum(shard.rows for shard in manifest.split(split))
        if rows != held:
            return f"rows.{split} is {rows}, but its shards have {held}"
        counts = manifest.class_rows[split]
        if len(counts) != len(manifest.classes):
            return f"class_rows.{split} has {len(counts)} classes, but classes has {len(manifest.classes)}"
        if sum(counts) != rows:
            return f"rows.{split} is {rows}, but its classes have {sum(counts)}"
    if len(manifest.class_names) not in (0, len(manifest.classes)):
        return f"class_names has {len(manifest.class_names)} names for {len(manifest.classes)} classes"
    files = [*(shard.file for shard in manifest.shards), manifest.mean_image_file, MANIFEST, REJECTED]
    for what, names in (("class", manifest.classes), ("file", files)):
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            return f"the {what} {quoted(twice[0])} is there twice"
    for shard in manifest.shards:
        pixels = 3 * manifest.image_size**2
        if any(
            start + count * pixels > shard.size_bytes
            for start, count in zip(shard.pixels_at, shard.row_groups, strict=False)
        ):
            return f"pixels_at of {quoted(shard.file)} is beyond its {shard.size_bytes} bytes"
    return _wrong_colours(manifest)


def _wrong_colours(manifest: Manifest) -> str | None:
    """What is wrong with the statistics of the colours, but for rounding; or None."""
    if not all(0 <= value <= 255 for value in manifest.mean_rgb):
        return f"mean_rgb is {quoted(list(manifest.mean_rgb))}, not grey levels from 0 to 255"
    covariance, vectors = np.array(manifest.covariance_rgb), np.array(manifest.eigenvectors)
    values = np.array(manifest.eigenvalues)
    if np.abs(covariance).max() > 255**2 or np.abs(vectors).max() > 1 + ROUNDING:
        return "covariance_rgb or eigenvectors: larger than those of grey levels from 0 to 255"
    close = ROUNDING * max(1.0, np.abs(covariance).max())
    if np.abs(covariance - covariance.T).max() > close:
        return "covariance_rgb is not symmetric"
    if np.abs(vectors.T @ vectors - np.eye(3)).max() > ROUNDING:
        return "eigenvectors are not at right angles, of length 1"
    if np.abs(vectors @ np.diag(values) @ vectors.T - covariance).max() > close:
        return "eigenvalues and eigenvectors are not those of covariance_rgb"
    if values[0] + close < values[1] or values[1] + close < values[2]:
        return "eigenvalues: expected the largest first"
    return None


def _reason(error: ValidationError) -> str:
    """The first fault of a manifest: its field, and what is wrong with its value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float) and first["type"] != "extra_forbidden":
        message += f", not {quoted(first['input'])}"
    if where or first["type"] != "value_error":
        message = f"{shown(where, LONGEST_VALUE) or 'the file'}: {message}"
    return shown(message, LONGEST_REASON)


def _label_range(place: StoragePath) -> tuple[int, int]:
    """The least and the greatest label of a shard; zeros of an empty one."""
    try:
        with place.open() as file:
            labels = pq.read_table(file, columns=["label"])["label"].to_numpy()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
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
