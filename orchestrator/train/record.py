"""A checkpoint's record: its last file, which says what the others must be, and with what they were made.

A checkpoint without one was broken off while it was written. A file that differs from it was damaged afterwards: a bit
that flipped in a weight would otherwise train on, unseen.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.base.schema import KEY, check_version, load_json
from orchestrator.base.shown import LONGEST_VALUE, quoted, shown
from orchestrator.train.checkpoints import STATE

RECORD = "record.json"
RECORD_VERSION = 1
SINCE_STATE_VERSION = 2  # of state.json, from which on a checkpoint has a record
CHUNK_BYTES = 2**22
HINT = "resume from another checkpoint"


class FileSum(BaseModel):
    """What a file of the checkpoint must be."""

    model_config = ConfigDict(extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Record(BaseModel):
    """The content of record.json."""

    model_config = ConfigDict(extra="forbid")
    files: dict[str, FileSum]
    made: dict[str, str | int]  # with what: versions, CPU, precision, threads, layout, workers, data
    settings: dict[str, Any]  # of the run


def seal(folder: Path, made: dict[str, str | int], settings: dict[str, Any]) -> None:
    """Write the record of all files in the folder."""
    files = sorted(file for file in folder.iterdir() if file.name != RECORD)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(_sum, files))
    record = Record(
        files={file.name: each for file, each in zip(files, sums, strict=True)}, made=made, settings=settings
    )
    text = json.dumps({KEY: RECORD_VERSION} | record.model_dump(), indent=1)
    (folder / RECORD).write_text(text + "\n")


def verify(folder: Path) -> Record | None:
    """Compare a checkpoint with its record, which is returned; None for one from before there were records.

    Raises ValueError of one line that names the file, and what is wrong with it.
    """
    record = read(folder)
    if record is None:
        return None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wrong in pool.map(lambda each: _difference(folder / each[0], each[1]), record.files.items()):
            if wrong:
                raise ValueError(f"{wrong}; {HINT}")
    return record


def read(folder: Path) -> Record | None:
    """The record itself; None for a checkpoint from before there were records. Raises ValueError of one line."""
    text, state = (path.read_bytes() if path.exists() else None for path in (folder / RECORD, folder / STATE))
    return parse(text, state, str(folder))


def parse(text: bytes | None, state: bytes | None, folder: str) -> Record | None:
    """The content of a record.json, or of none; state: of the state.json beside it. See `read`."""
    path = f"{folder}/{RECORD}"
    if text is None:
        if _state_version(state) < SINCE_STATE_VERSION:
            return None
        raise ValueError(f"{folder}: has no {RECORD}, so it was broken off while it was written; {HINT}")
    try:
        document = load_json(text)
        if not isinstance(document, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({shown(error, LONGEST_VALUE)}); {HINT}") from None
    check_version(document, RECORD_VERSION, path)
    document.pop(KEY, None)
    try:
        return Record.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = shown(".".join(map(str, first["loc"])), LONGEST_VALUE)
        raise ValueError(f"{path}: damaged: {where}: {shown(first['msg'], LONGEST_VALUE)}; {HINT}") from None


def _state_version(state: bytes | None) -> int:
    """0 where it cannot be read: whoever reads all of it says so."""
    try:
        found: Any = load_json(state or b"").get(KEY, 0)
    except (ValueError, AttributeError):
        return 0
    return found if isinstance(found, int) else 0


def _difference(path: Path, wanted: FileSum) -> str | None:
    """How a file differs from its record."""
    try:
        size = path.stat().st_size
        if size != wanted.bytes:
            return f"{path}: damaged: has {size:,} bytes, and {wanted.bytes:,} were written"
        if _sum(path).sha256 != wanted.sha256:
            return f"{path}: damaged: its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read: {quoted(error.strerror or type(error).__name__)}"
    return None


def _sum(path: Path) -> FileSum:
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return FileSum(bytes=size, sha256=digest.hexdigest())


def _chunks(path: Path) -> Iterator[memoryview]:
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while size := file.readinto(buffer):
            yield buffer[:size]
