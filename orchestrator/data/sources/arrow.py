"""Arrow files, in their stream form, as Hugging Face's save_to_disk writes them, or their file form.

A batch of a file in object storage is read by itself: where the batches of a stream lie is told by the heads of its
messages, a few hundred bytes each.
"""

import functools
import struct
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orchestrator.base.storage import StoragePath

SUFFIX = ".arrow"
FILE_FORM = b"ARROW1"  # its first bytes
PREFIX = struct.Struct("<Ii")  # of a message: a mark, and the length of its head
MARK = 0xFFFFFFFF
MAX_HEAD_BYTES = 2**24
BATCH = 3  # a kind of message (format/Message.fbs)
HEAD_BYTES = 2**12  # asked for at a time: a head is most often shorter


@dataclass(frozen=True)
class _Places:
    """Where the messages of a stream lie, as (start, length)."""

    others: tuple[tuple[int, int], ...]  # the schema, and the dictionaries
    batches: tuple[tuple[int, int, int], ...]  # the last number: of the others that come before it


def arrow_batches(file: Any) -> list[pa.RecordBatch]:
    """All of an open file. Raises one of Arrow's errors."""
    try:
        batches = list(pa.ipc.open_stream(file))
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return [_sound(batch) for batch in batches]


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, if all its offsets are within it: Arrow follows them unseen, also to memory that is not the file's.
    Raises pa.ArrowInvalid."""
    batch.validate(full=True)
    return batch


def read_batch(place: StoragePath, index: int) -> pa.RecordBatch:
    """One batch. Of a local file, which is mapped into memory, no more is read than is used; of one in object storage
    no more than the batch, its dictionaries and, once for each process, the heads of all. Raises IndexError, OSError or
    one of Arrow's errors."""
    if place.local is not None:
        with place.open() as file:
            return arrow_batches(file)[index]
    if place.read_at(0, len(FILE_FORM)) == FILE_FORM:
        with place.open() as file:
            reader = pa.ipc.open_file(file)
            if index >= reader.num_record_batches:
                raise IndexError(f"has {reader.num_record_batches} batches")
            return _sound(reader.get_batch(index))
    found = _places(place)
    if found is None:
        with place.open() as file:
            return arrow_batches(file)[index]
    start, length, before = found.batches[index]
    parts = [place.read_at(*where) for where in (*found.others[:before], (start, length))]
    return _sound(pa.ipc.open_stream(pa.py_buffer(b"".join(parts))).read_next_batch())


@functools.lru_cache(maxsize=64)
def _places(place: StoragePath) -> _Places | None:
    """None of a stream of before 2019, whose messages begin without a mark. Raises pa.ArrowInvalid."""
    size, at = place.size() or 0, 0
    others: list[tuple[int, int]] = []
    batches: list[tuple[int, int, int]] = []
    while at + PREFIX.size <= size:
        head = place.read_at(at, HEAD_BYTES)
        mark, length = PREFIX.unpack_from(head)
        if mark != MARK and not at:
            return None
        if mark != MARK or not 0 <= length <= MAX_HEAD_BYTES:
            raise pa.ArrowInvalid(f"no message begins at byte {at}")
        if not length:  # the end of the stream
            break
        if PREFIX.size + length > len(head):
            head = place.read_at(at, PREFIX.size + length)
        kind, body = _kind_and_body(head[PREFIX.size : PREFIX.size + length])
        whole = PREFIX.size + length + body
        if at + whole > size:
            raise pa.ArrowInvalid(f"the message at byte {at} is longer than the file")
        if kind == BATCH:
            batches.append((at, whole, len(others)))
        else:
            others.append((at, whole))
        at += whole
    return _Places(tuple(others), tuple(batches))


def _kind_and_body(head: bytes) -> tuple[int, int]:
    """Of a message's head, a table of FlatBuffers: the kind of message, and the length of what follows."""
    try:
        (table,) = struct.unpack_from("<I", head)
        fields = table - struct.unpack_from("<i", head, table)[0]
        if fields < 0:
            raise struct.error
        (size,) = struct.unpack_from("<H", head, fields)
        of = [struct.unpack_from("<H", head, fields + 4 + 2 * i)[0] if 4 + 2 * i < size else 0 for i in range(4)]
        kind = head[table + of[1]] if of[1] else 0
        body = struct.unpack_from("<q", head, table + of[3])[0] if of[3] else 0
    except (struct.error, IndexError):
        raise pa.ArrowInvalid("a message's head is damaged") from None
    if body < 0:
        raise pa.ArrowInvalid("a message's head is damaged")
    return kind, body
