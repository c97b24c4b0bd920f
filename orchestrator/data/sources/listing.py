"""A listing of images: where the bytes of each are, its label, and how it is read."""

import collections
import contextlib
import errno
import functools
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cachetools
import pyarrow as pa
import pyarrow.parquet as pq

from alexnet.images import MAX_FILE_BYTES, NotAnImage, decode
from orchestrator.base.exits import last_line
from orchestrator.base.shown import quoted
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data.sources.arrow import SUFFIX as ARROW
from orchestrator.data.sources.arrow import read_batch

if TYPE_CHECKING:
    from orchestrator.data.sources.draw import Drawn

SPLITS = ("train", "val")

OF_ONE_FILE = {  # errors that concern one file, and not the disk or the machine
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO,
}  # fmt: skip
SAMPLE = 16  # images whose size is looked at
SMALL, STORED_SMALL = 64, 72  # pixels: images below the one are stored at the other, from which the net's 64 are cut
RECENT_BYTES = 2**28  # of row groups that a process caches
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "jpg;png", "png")  # of columns, before any other column of bytes

Say = Callable[[str], None]  # takes a line for the user


@dataclass(frozen=True, slots=True)
class Entry:
    """One image before it is read: a file, a byte range of an archive, a row of a Parquet file, or the bytes."""

    id: int  # unique in the source, whatever the order in which entries are read
    label: int
    name: str  # for messages: the path below the source, or what stands for it
    path: str | None = None  # as in StoragePath.text
    start: int | None = None  # in an archive: the first byte
    length: int | None = None
    row_group: int | None = None  # in a Parquet file
    row: int | None = None  # of the row group
    data: bytes | None = None
    packed: int | None = None  # in a zip: deflated to so many bytes from `start`
    column: str | None = None  # of the Parquet file; None: the one that image_column finds
    crc: int | None = None  # in a zip: the CRC-32 of its bytes


@dataclass(frozen=True)
class Source:
    """A listed set of images."""

    name: str
    format: str
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]
    image_size: int = 256  # pixels: the side at which its images are best stored
    class_names: tuple[str, ...] = ()  # in words, if the source has them
    misplaced: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of files without a class
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, rule) of files that are no one's data
    warnings: list[str] = field(default_factory=list)  # what looks wrong, a line each
    found: list[str] = field(default_factory=list)  # what was said of it: its format and why, its parts; a line each
    drawn: "Drawn | None" = None  # how val was drawn from train, if it was
    runs: dict[str, list[int]] | None = None  # numbers of consecutive entries of a split that are best read together


def check_usable(source: Source) -> None:
    """Raises ValueError if no net could be trained and validated on the source."""
    if len(source.classes) < 2:
        raise ValueError(f"--source {source.name}: has {len(source.classes)} class; a classifier needs at least 2")
    twice = next((name for name, count in collections.Counter(source.classes).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"--source {source.name}: has two classes named {quoted(twice)}; rename one")
    for split in SPLITS:
        if not source.splits[split]:
            why = f": {source.misplaced[0][1]}" if source.misplaced else ""
            raise ValueError(f"--source {source.name}: its {split} part holds no image with a label{why}")


def read(entry: Entry, before: Callable[[int], None] = lambda size: None) -> bytes:
    """The image's bytes. Raises NotAnImage if only this file is at fault, StorageError if it is more than that.

    before: called with the size of a file in object storage before it is read.
    """
    if entry.data is not None:
        return entry.data
    assert entry.path is not None
    place = StoragePath(entry.path)
    try:
        if entry.row is not None:
            column = _column(place, entry.row_group, entry.column)
            data = column[entry.row].as_py() if entry.row < len(column) else None
            if not isinstance(data, bytes):
                raise NotAnImage("the row has no bytes")
            return data
        if max(entry.packed or 0, entry.length or 0) > MAX_FILE_BYTES:
            raise NotAnImage(f"{max(entry.packed or 0, entry.length or 0)} bytes are more than any photograph has")
        if entry.packed is not None and entry.start is not None:
            return _member(entry, place.read_at(entry.start, entry.packed))
        if entry.start is not None and entry.length is not None:
            return _member(entry, place.read_at(entry.start, entry.length))
        if place.local is not None:
            found = place.local.stat()
            if not stat.S_ISREG(found.st_mode):
                raise NotAnImage("not a regular file")
            if found.st_size > MAX_FILE_BYTES:
                raise NotAnImage(f"{found.st_size} bytes are more than any photograph has")
            return place.local.read_bytes()
        return place.read(functools.partial(_admit, before))
    except OSError as error:
        gone = error.errno == errno.ENOENT and place.local is not None and not os.path.lexists(place.local)
        if gone:
            raise StorageError(f"{place}: was listed and is not there; is the source on every node?") from None
        if error.errno in OF_ONE_FILE:
            raise NotAnImage(f"cannot be read: {error.strerror or error}") from None
        raise StorageError(f"{place}: cannot be read: {error.strerror or last_line(error)}") from None


def _admit(before: Callable[[int], None], size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise NotAnImage(f"{size} bytes are more than any photograph has")
    before(size)


def extent(entry: Entry) -> tuple[int, int]:
    """The bytes of its archive that an entry is: the first, and the one after the last."""
    assert entry.start is not None
    return entry.start, entry.start + ((entry.length if entry.packed is None else entry.packed) or 0)


def read_range(entries: list[Entry]) -> list[bytes | NotAnImage]:
    """Entries of one archive, read at once with what lies between them: the bytes of each, or why it has none. Raises
    StorageError."""
    assert entries[0].path is not None
    place = StoragePath(entries[0].path)
    first, end = min(extent(entry)[0] for entry in entries), max(extent(entry)[1] for entry in entries)
    try:
        data = place.read_at(first, end - first)
    except OSError as error:
        raise StorageError(f"{place}: cannot be read: {error.strerror or last_line(error)}") from None
    found: list[bytes | NotAnImage] = []
    for entry in entries:
        part = data[slice(*(at - first for at in extent(entry)))]
        try:
            found.append(_member(entry, part))
        except NotAnImage as reason:
            found.append(reason)
    return found


def versions(entries: Iterable[Entry]) -> list[tuple[int, int] | None]:
    """Size and modification time of each entry's file, which change if it is replaced.

    None where there is no file, or where asking would take a request per entry. Each file is asked for once.
    """
    known: dict[str | None, tuple[int, int] | None] = {None: None}
    found = []
    for entry in entries:
        if entry.path not in known:
            known[entry.path] = _version(entry.path)
        found.append(known[entry.path])
    return found


def _version(path: str | None) -> tuple[int, int] | None:
    if path is None or "://" in path:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


# one that is larger than the cache counts as all of it: the rows of a task come from few groups, often from one
_recent: MutableMapping[tuple[StoragePath, int | None, str | None], Any] = cachetools.LRUCache(
    RECENT_BYTES, getsizeof=lambda column: min(column.nbytes, RECENT_BYTES)
)


def _column(place: StoragePath, row_group: int | None, name: str | None = None) -> Any:
    """The images of a row group, from the cache or from the file. Raises StorageError."""
    found = _recent.get((place, row_group, name))
    if found is None:
        found = _recent[place, row_group, name] = _read_column(place, row_group, name)
    return found


def _read_column(place: StoragePath, row_group: int | None, name: str | None = None) -> Any:
    def read_group() -> Any:
        if place.name.endswith(ARROW):
            batch = read_batch(place, row_group or 0)
            column = name or image_column(batch.schema)
            return pa.Table.from_batches([batch]).flatten()[column].combine_chunks()
        with place.open() as file:
            parquet = pq.ParquetFile(file)
            column = name or image_column(parquet.schema_arrow)
            return parquet.read_row_group(row_group, columns=[column]).flatten()[column]

    try:
        return place.with_retries(read_group, "read")
    # the last ones: of a file that is not what it was when it was listed
    except (pa.ArrowException, OSError, UnicodeDecodeError, LookupError, TypeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(f"{place}, row group {row_group}: cannot be read: {text}") from None


def _member(entry: Entry, part: bytes) -> bytes:
    """The bytes of an entry that are these in its archive. Raises NotAnImage for others than a zip states."""
    data = part if entry.packed is None else _inflated(part, entry.length or 0)
    if entry.crc is not None and (found := zlib.crc32(data)) != entry.crc:
        raise NotAnImage(f"damaged in the archive: its CRC-32 is {found:08x} instead of {entry.crc:08x}")
    return data


def _inflated(data: bytes, length: int) -> bytes:
    """A deflated member of a zip, which unpacks to no more than it says."""
    try:
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
    except zlib.error as error:
        raise NotAnImage(f"damaged in the archive: {error}") from None
    if len(found) != length:
        raise NotAnImage(f"damaged in the archive: unpacks to {len(found)} bytes instead of {length}")
    return found


def image_column(schema: Any) -> str | None:
    """The column of image bytes, as a dotted path: `image`, or `image.bytes` as Hugging Face has it. None if none."""
    found = []
    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found.append(f"{column.name}.bytes")
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            found.append(column.name)
    named = [name for name in found if name.split(".")[0] in IMAGE_NAMES]
    return next(iter(named or found), None)


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Classes in the order of their labels: numbers by their value, words by the alphabet."""
    found = set(names)
    if all(re.fullmatch(r"-?\d{1,9}", name, re.ASCII) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def sample(entries: list[Entry]) -> list[Entry]:
    """Some of them, evenly."""
    return entries[:: -(-len(entries) // SAMPLE)] if entries else []


def stored_size(entries: list[Entry], say: Say) -> int:
    """The side in pixels at which to store a source, by the largest of these of its images."""
    sides = []
    for entry in entries:
        with contextlib.suppress(NotAnImage):
            sides.append(min(decode(read(entry)).shape[:2]))
    side = max(sides, default=SMALL)
    if side >= SMALL:
        return 256
    say(small_images(side))
    return STORED_SMALL


def small_images(side: int) -> str:
    """The line about a source of images that are smaller than the net's input."""
    return f"its images are {side} pixels a side: stored at {STORED_SMALL}; --image-size changes that"
