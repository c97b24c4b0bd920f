"""Files of rows that are written as they come and appear whole or not at all: Parquet, CSV or JSON lines."""

import csv
import io
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.base.exits import JobError
from orchestrator.base.storage import CHUNK_BYTES, PARTIAL, StoragePath

FORMS = (".parquet", ".csv", ".jsonl")


def check_form(place: StoragePath) -> None:
    """Raises ValueError of one line for a name that ends in none of FORMS."""
    if not place.name.lower().endswith(FORMS):
        raise ValueError(f"--output {place}: ends in none of {', '.join(FORMS)}, which say what is written")
    if place.is_folder():
        raise ValueError(f"--output {place}: is a folder; name a file in it")
    if (kind := place.special()) is not None:
        raise ValueError(f"--output {place}: is {kind}; name a file, which appears when it is whole")


class RowFile:
    """Used in a `with` block; what is written is kept if that ends well, and removed if it does not.

    A list in a cell of CSV is JSON.
    """

    def __init__(self, place: StoragePath, schema: pa.Schema) -> None:
        """Raises JobError where it cannot be written."""
        self.place, self.schema = place, schema
        if place.local is not None:
            self._partial = place.local.with_name(f".{place.name}.{secrets.token_hex(4)}{PARTIAL}")
            try:
                place.local.parent.mkdir(parents=True, exist_ok=True)
                self._partial.touch()
            except OSError as error:
                raise JobError(f"--output {place}: cannot be written ({error.strerror}); choose another") from None
        else:
            handle, name = tempfile.mkstemp(prefix="rows-", suffix=PARTIAL)
            os.close(handle)
            self._partial = Path(name)
        self._is_parquet = place.name.lower().endswith(".parquet")
        self._is_csv = place.name.lower().endswith(".csv")
        self._parquet = pq.ParquetWriter(self._partial, schema) if self._is_parquet else None
        self._text = None if self._is_parquet else self._partial.open("w", encoding="utf-8", newline="")
        if self._is_csv:
            self._write_csv([schema.names])

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add rows, given by columns: sequences of the same length."""
        if self._parquet is not None:
            self._parquet.write_table(pa.table(columns, self.schema))
            return
        rows = zip(*(columns[name] for name in self.schema.names), strict=True)
        if self._is_csv:
            self._write_csv([[_cell(value) for value in row] for row in rows])
            return
        assert self._text is not None
        for row in rows:
            self._text.write(json.dumps(dict(zip(self.schema.names, row, strict=True))) + "\n")

    def _write_csv(self, rows: list[list[Any]]) -> None:
        assert self._text is not None
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._text.write(text.getvalue())

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            for file in (self._parquet, self._text):
                if file is not None:
                    file.close()
            if kind is None:
                self._keep()
        finally:
            self._partial.unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.place.local is not None:
            os.replace(self._partial, self.place.local)
            return

        def upload() -> None:
            fs, path = self.place.opened()
            with self._partial.open("rb") as source, fs.open_output_stream(path) as target:
                while data := source.read(CHUNK_BYTES):
                    target.write(data)

        self.place.with_retries(upload, "written")


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
