"""A source, listed in a process of its own with limits: footers, headers and tables of others are read there.

The listing comes back as a line of JSON and an Arrow table, which are checked as if a stranger had sent them: a process
that reads foreign bytes may be taken over by them.
"""

import contextlib
import gc
import json
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from orchestrator.base.exits import JobError
from orchestrator.base.shown import shown
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.data import sandbox
from orchestrator.data.sources import DIGITS, SPLITS, Drawn, Entry, Options, Say, Source, open_source
from orchestrator.data.sources.ilsvrc import verify_md5
from orchestrator.data.sources.listing import check_usable

MEMORY_BYTES = 2**32  # or half of the machine's, if that is more: an image takes about a kilobyte
SECONDS = 1800  # of CPU; a million images take a few minutes
MAX_IMAGE_SIZE = 2**12  # pixels, at which a source says that its images are best stored
HEAD = struct.Struct("<Q")
TEXTS = ("name", "path", "column")  # of an Entry; some are no UTF-8, as names of files may be
NUMBERS = ("start", "length", "row_group", "row", "packed", "crc")
SCHEMA = pa.schema(
    [("split", pa.int8()), ("id", pa.int64()), ("label", pa.int32())]
    + [(name, pa.large_binary()) for name in (*TEXTS, "data")]
    + [(name, pa.int64()) for name in NUMBERS]
)
FIELDS: dict[str, tuple[Any, Any]] = {  # of a Source in JSON: its type, and that of a list's items
    "name": (str, None), "format": (str, None), "image_size": (int, None), "classes": (list, str),
    "class_names": (list, str), "misplaced": (list, list), "left_out": (list, list),
    "warnings": (list, str), "found": (list, str),
}  # fmt: skip
ERRORS: dict[str, type[Exception]] = {"value": ValueError, "job": JobError, "storage": StorageError}


DEFAULTS = Options()


def open_apart(
    source: str, options: Options = DEFAULTS, *, say: Say = lambda line: None, earlier: Drawn | None = None
) -> Source:
    """As `open_source`. Sources in object storage, whose clients and credentials belong to this process, and our own
    are listed here.

    Where the listing ends before its time, an image that was looked at may have ended it: it is listed once more
    without that look.
    """
    if source == DIGITS or "://" in source:
        return open_source(source, options, say=say, earlier=earlier)
    root = StoragePath.of(source)
    if options.verify and (root.is_folder() or root.size() is not None):
        verify_md5(root, say)  # reads and looks at nothing, for minutes
    request = {
        "source": source, "options": vars(options) | {"verify": False},
        "earlier": earlier.to_json() if earlier else None,
    }  # fmt: skip
    said: list[str] = []

    def say_once(line: str) -> None:
        if line not in said:
            said.append(line)
            say(line)

    try:
        answer = _answer(request, say_once)
    except sandbox.Refused as reason:
        try:
            answer = _answer(request | {"blind": str(reason)}, say_once)
        except sandbox.Refused:
            raise ValueError(f"--source {root}: cannot be listed: {reason}") from None
    return unpacked(answer, root)


def _answer(request: dict[str, Any], say: Say) -> bytes:
    memory = max(MEMORY_BYTES, sandbox.machine_bytes() // 2)
    return sandbox.run(listed, json.dumps(request).encode(), memory_bytes=memory, seconds=SECONDS, say=say)


def listed(request: bytes, say: Say) -> bytes:
    """What `open_source` finds, or the error for the user; run in the sandbox."""
    gc.disable()  # this process makes one listing, of objects that stay
    given = json.loads(request)
    try:
        earlier = Drawn.of_json(given["earlier"]) if given["earlier"] else None
        options, blind = Options(**given["options"]), given.get("blind", "")
        return packed(open_source(given["source"], options, say=say, earlier=earlier, blind=blind))
    except (ValueError, JobError) as error:
        kind = next((name for name, kind in ERRORS.items() if type(error) is kind), None)
        if kind is None:
            raise
        return _with_head({"error": kind, "message": str(error)}, b"")


def packed(source: Source) -> bytes:
    """A source as bytes."""
    entries = [(number, entry) for number, split in enumerate(SPLITS) for entry in source.splits[split]]
    columns: dict[str, list[Any]] = {"split": [number for number, _ in entries]}
    for name in SCHEMA.names[1:]:
        values = [getattr(entry, name) for _, entry in entries]
        if name in TEXTS:
            values = [None if text is None else text.encode("utf-8", "surrogatepass") for text in values]
        columns[name] = values
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
    head = {name: getattr(source, name) for name in FIELDS} | {"runs": source.runs}
    head |= {"drawn": source.drawn.to_json() if source.drawn else None}
    return _with_head(head, sink.getvalue().to_pybytes())


def unpacked(data: bytes, root: StoragePath) -> Source:
    """The source that `packed` made bytes of. Raises what it could not be listed for, ValueError for anything else."""
    try:
        (size,) = HEAD.unpack_from(data)
        head = json.loads(data[HEAD.size : HEAD.size + size])
        if "error" in head:
            raise _Error(ERRORS[head["error"]], shown(head["message"]))
        for name, (kind, of) in FIELDS.items():
            value = head[name]
            if type(value) is not kind or (of and any(type(item) is not of for item in value)):
                raise TypeError(name)
        if head["image_size"] not in range(1, MAX_IMAGE_SIZE + 1):
            raise ValueError(f"images of {head['image_size']} pixels")
        if len(head["class_names"]) not in (0, len(head["classes"])):
            raise ValueError("names in words of other classes")
        pairs: dict[str, Any] = {name: [_two_texts(pair) for pair in head[name]] for name in ("misplaced", "left_out")}
        with _no_gc():
            splits = _entries(memoryview(data)[HEAD.size + size :], root, len(head["classes"]))
        runs = _runs(head["runs"], splits)
        found = Source(
            head["name"], head["format"], tuple(head["classes"]), splits, image_size=head["image_size"],
            class_names=tuple(head["class_names"]), warnings=head["warnings"], found=head["found"], runs=runs,
            drawn=Drawn.of_json(head["drawn"]) if head["drawn"] else None, **pairs,
        )  # fmt: skip
    except _Error as error:
        raise error.kind(error.message) from None
    except Exception as error:  # whatever a stranger may send
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__, 100)
        raise ValueError(f"--source {root}: cannot be listed: its listing is not sound: {reason}") from None
    check_usable(found)
    return found


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """For making many objects that stay, over all of which the collector would go again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _two_texts(pair: list[Any]) -> tuple[str, str]:
    first, second = pair
    if type(first) is not str or type(second) is not str:
        raise TypeError("a pair that is no text")
    return first, second


class _Error(Exception):
    """What a source could not be listed for."""

    def __init__(self, kind: type[Exception], message: str) -> None:
        self.kind, self.message = kind, message


def _entries(data: memoryview, root: StoragePath, num_classes: int) -> dict[str, list[Entry]]:
    """Of both splits. Raises ValueError, or one of Arrow's, for any that no source of this place has."""
    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
    if not table.schema.equals(SCHEMA):
        raise ValueError("other columns")
    table.validate(full=True)
    columns = {name: _values(table[name]) for name in SCHEMA.names}
    for name in TEXTS:
        columns[name] = [None if data is None else data.decode("utf-8", "surrogatepass") for data in columns[name]]
    below = root.text.rstrip("/") + "/"
    known = {
        path for path in set(columns["path"])
        if path is None
        or path == root.text
        or (path.startswith(below) and "\0" not in path and ".." not in path.split("/"))
    }  # fmt: skip
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    order = [columns[field] for field in ("split", *Entry.__slots__)]
    for split, *fields in zip(*order, strict=True):
        entry = Entry(*fields)
        if split not in range(len(SPLITS)):
            raise ValueError("an image of no part")
        if entry.label not in range(num_classes) or entry.id is None or entry.id < 0 or entry.name is None:
            raise ValueError("an image without a class of the source")
        if entry.path not in known or (entry.path is None) == (entry.data is None):
            raise ValueError("an image that is not in the source")
        if not _is_placed(entry):
            raise ValueError("an image at no place that a file has")
        splits[SPLITS[split]].append(entry)
    if min((min((value or 0 for value in columns[name]), default=0) for name in NUMBERS), default=0) < 0:
        raise ValueError("a place before the beginning of a file")
    if len(set(columns["id"])) != len(table):
        raise ValueError("two images of one number")
    return splits


def _is_placed(entry: Entry) -> bool:
    """Whether it is a file, a range of an archive, a row of a table or the bytes, and one of these alone."""
    places = [getattr(entry, name) for name in NUMBERS]
    if entry.row is not None:
        in_table = (
            entry.row_group is not None and max(entry.row, entry.row_group) < 2**31
        )  # what Parquet's readers take
        return in_table and (entry.start, entry.length, entry.packed, entry.crc, entry.data) == (None,) * 5
    if entry.column is not None or entry.row_group is not None:
        return False
    if entry.start is None:
        return not any(place is not None for place in places)
    return entry.data is None and entry.length is not None and entry.start + entry.length + (entry.packed or 0) < 2**63


def _runs(value: Any, splits: dict[str, list[Entry]]) -> dict[str, list[int]] | None:
    if value is None:
        return None
    for split in SPLITS:
        if any(type(count) is not int or count < 0 for count in value[split]) or sum(value[split]) != len(
            splits[split]
        ):
            raise ValueError("runs that are not its images")
    return {split: value[split] for split in SPLITS}


def _with_head(head: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(head).encode()
    return HEAD.pack(len(text)) + text + rest


def _values(column: Any) -> list[Any]:
    """A column's values; most columns of most sources have none, or no null."""
    if column.null_count == len(column):
        return [None] * len(column)
    if column.null_count == 0 and pa.types.is_integer(column.type):
        found: list[Any] = column.to_numpy().tolist()
        return found
    return list(column.to_pylist())
