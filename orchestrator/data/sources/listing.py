"""A listing of images: where each one's bytes are, and what it shows."""

import collections
import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.base.exits import last_line
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data.images import NotAnImage, decode

SPLITS = ("train", "val")

OF_ONE_FILE = {  # errors that say something of a file, and not of the disk or the machine
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO,
}  # fmt: skip
SAMPLE = 16  # images that are looked at for their size
SMALL, STORED_SMALL = 64, 72  # pixels: smaller images than this are stored at that, which the net's 64 are cut from
RECENT_BYTES = 2**28  # of row groups that a process remembers

Say = Callable[[str], None]  # takes a line for the user


@dataclass(frozen=True, slots=True)
class Entry:
    """One image before it is read: a file, a part of a file, a row of a table, or bytes when there is no file."""

    id: int  # unique in the source, the same whatever the order in which entries are read
    label: int
    name: str  # for people: the path below the source, or what takes its place
    path: str | None = None  # as in StoragePath.text
    start: int | None = None  # byte in the file, of an archive
    length: int | None = None
    row_group: int | None = None  # of a Parquet file
    row: int | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A listed set of images. `image_size` is the stored side in pixels that suits it."""

    name: str
    format: str
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]
    image_size: int = 256
    class_names: tuple[str, ...] = ()  # in words, where the source tells them
    misplaced: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of files that have no class
    runs: dict[str, list[int]] | None = None  # lengths of the stretches of a split that are best read together


def finished(source: Source) -> Source:
    """Raises ValueError for a source that no net could be trained and validated on."""
    if len(source.classes) < 2:
        raise ValueError(f"--source {source.name}: has {len(source.classes)} class; a classifier needs at least 2")
    for split in SPLITS:
        if not source.splits[split]:
            raise ValueError(f"--source {source.name}: its {split} part holds no images")
    return source


def read(entry: Entry) -> bytes:
    """The image's bytes. Raises NotAnImage where this one file is none, StorageError where more than it is at fault."""
    if entry.data is not None:
        return entry.data
    assert entry.path is not None
    place = StoragePath(entry.path)
    try:
        if entry.row is not None:
            data = _column(place, entry.row_group)[entry.row].as_py()
            if data is None:
                raise NotAnImage("the row has no bytes")
            return bytes(data)
        if entry.start is not None and entry.length is not None:
            return place.read_at(entry.start, entry.length)
        if place.local is not None:
            if not stat.S_ISREG(place.local.stat().st_mode):
                raise NotAnImage("not a regular file")
            return place.local.read_bytes()
        return place.read()
    except OSError as error:
        gone = error.errno == errno.ENOENT and place.local is not None and not os.path.lexists(place.local)
        if gone:
            raise StorageError(f"{place}: was listed and is not there; is the source on every node?") from None
        if error.errno in OF_ONE_FILE:
            raise NotAnImage(f"cannot be read: {error.strerror or error}") from None
        raise StorageError(f"{place}: cannot be read: {error.strerror or last_line(error)}") from None


def version(entry: Entry) -> tuple[int, int] | None:
    """What tells whether a file was replaced since: its size and time; None where that would be a request each."""
    if entry.path is None or "://" in entry.path:
        return None
    return _version(entry.path)


@functools.lru_cache(maxsize=64)
def _version(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


_recent: collections.OrderedDict[tuple[StoragePath, int | None], Any] = collections.OrderedDict()


def _column(place: StoragePath, row_group: int | None) -> Any:
    """The images of a row group: a task's rows come from a few of them, and the last are remembered."""
    found = _recent.pop((place, row_group), None)
    if found is None:

        def read_group() -> Any:
            with place.open() as file:
                parquet = pq.ParquetFile(file)
                column = image_column(parquet.schema_arrow)
                assert column is not None
                return parquet.read_row_group(row_group, columns=[column]).flatten().column(0)

        try:
            found = place.with_retries(read_group, "read")
        except (pa.ArrowException, OSError) as error:
            text = str(error).splitlines()[0]
            raise StorageError(f"{place}, row group {row_group}: cannot be read: {text}") from None
    _recent[place, row_group] = found
    total = sum(column.nbytes for column in _recent.values())
    while len(_recent) > 1 and total > RECENT_BYTES:
        total -= _recent.popitem(last=False)[1].nbytes
    return found


def image_column(schema: Any) -> str | None:
    """The column of image bytes, as dotted path: `image`, or `image.bytes` in the form of Hugging Face."""
    found = []
    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found.append(f"{column.name}.bytes")
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            found.append(column.name)
    named = [name for name in found if name.split(".")[0] in ("image", "img", "jpg", "jpeg", "jpg;png", "png")]
    return next(iter(named or found), None)


def stored_size(entries: list[Entry], say: Say) -> int:
    """What suits images as large as the largest of these."""
    sides = []
    for entry in entries:
        with contextlib.suppress(NotAnImage):
            sides.append(min(decode(read(entry)).shape[:2]))
    side = max(sides, default=SMALL)
    if side >= SMALL:
        return 256
    say(f"its images have {side} pixels a side: stored at {STORED_SMALL}, unless --image-size says otherwise")
    return STORED_SMALL
