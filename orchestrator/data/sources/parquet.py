"""Parquet files with a column of image bytes and a column of labels, such as Hugging Face's data sets."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import MANIFEST, UNFINISHED
from orchestrator.data.sources.listing import SAMPLE, SPLITS, Entry, Say, Source, image_column, stored_size

SUFFIX = ".parquet"
# names of columns, the first that is there counts
LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
NAMES = ("name", "path", "file_name", "filename")


def open_parquet(root: StoragePath, say: Say = lambda line: None) -> Source:
    """Files, or folders of files, named train* and val*, validation* or test*, anywhere below the root.

    Raises ValueError naming the file and what it lacks.
    """
    files = split_files(root, say)
    groups = {split: [group for name in files[split] for group in _row_groups(root, name)] for split in SPLITS}
    classes, label_of = _classes(root, groups["train"])
    splits: dict[str, list[Entry]] = {}
    runs: dict[str, list[int]] = {}
    misplaced: list[tuple[str, str]] = []
    next_id = 0
    for split in SPLITS:
        entries = splits[split] = []
        runs[split] = []
        for group in groups[split]:
            before = len(entries)
            for row, (value, text) in enumerate(zip(group.labels, group.names, strict=True)):
                name = f"{split}/" + (text or f"{group.file}, row group {group.index}, row {row}")
                label = label_of.get(value)
                if label is None:
                    misplaced.append((name, f"its label {value!r} is not one of the {len(classes)} classes"))
                else:
                    place = (root / group.file).text
                    entries.append(Entry(next_id, label, name, path=place, row_group=group.index, row=row))
                next_id += 1
            runs[split].append(len(entries) - before)
    size = stored_size(splits["train"][:SAMPLE], say)
    return Source(root.name, "parquet", classes, splits, image_size=size, misplaced=misplaced, runs=runs)


@dataclass(frozen=True)
class _RowGroup:
    """The rows of a row group without their images."""

    file: str
    index: int
    labels: list[Any]  # as in the file
    names: list[str | None]
    schema: Any


def _row_groups(root: StoragePath, name: str) -> Iterator[_RowGroup]:
    place = root / name
    try:
        with place.open() as file:
            table = pq.ParquetFile(file)
            label, path = _columns(place, table.schema_arrow)
            for index in range(table.num_row_groups):
                rows = table.read_row_group(index, columns=[label, *([path] if path else [])]).flatten()
                labels = rows[label].to_pylist()
                if any(isinstance(value, float) and not value.is_integer() for value in labels):
                    raise ValueError(
                        f"{place}: column {label} has numbers that are not whole; expected classes' numbers"
                    )
                names = rows[path].to_pylist() if path else [None] * len(labels)
                yield _RowGroup(name, index, labels, names, table.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{place}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def split_files(root: StoragePath, say: Say = lambda line: None) -> dict[str, list[str]]:
    """The Parquet files of train and val. Raises ValueError if either has none."""
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    others: list[str] = []
    for name in _without_shards(root.files()):
        if not name.endswith(SUFFIX):
            continue
        split = _split_of(name)
        (found[split] if split else others).append(name)
    if not found["val"]:
        found["val"], found["test"] = found["test"], []
        if found["val"]:
            say(f"the test part ({len(found['val'])} file(s)) is used as val: there is no other")
    for name in (*others, *found["test"]):
        say(f"{name}: left out, belongs to neither train nor val")
    for split in SPLITS:
        if not found[split]:
            raise ValueError(f"--source {root}: has no Parquet file of {split}; expected {split}*.parquet or {split}/")
    return found


def _without_shards(files: list[str]) -> list[str]:
    """Without the shards that a preparation has written, or is writing, into a folder below."""
    paths = [PurePosixPath(name) for name in files]
    ours = {path.parent for path in paths if path.name == MANIFEST}
    ours |= {path.parent.parent for path in paths if path.parent.name == UNFINISHED}
    ours.discard(PurePosixPath("."))  # shards may be the source themselves, to be stored at another size
    return [str(path) for path in paths if not ours & {*path.parents}]


def _split_of(name: str) -> str | None:
    for part in reversed(PurePosixPath(name).parts):
        for word, split in (("train", "train"), ("val", "val"), ("test", "test")):
            if part.lower().startswith(word):
                return split
    return None


def _columns(place: StoragePath, schema: Any) -> tuple[str, str | None]:
    """The columns of labels and, if any, of names. Raises ValueError for none or no fitting one, images included."""
    names = set(schema.names)
    image = image_column(schema)
    label = next((name for name in LABELS if name in names), None)
    for what, column in (("image bytes", image), ("labels", label)):
        if column is None:
            shown = ", ".join(f"{column.name} ({column.type})" for column in schema)
            raise ValueError(f"{place}: has no column of {what}; its columns are {shown}")
    assert image is not None and label is not None  # noqa: PT018
    kind = schema.field(label).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
    if schema.names.count(label) > 1 or not any(is_it(kind) for is_it in known):
        raise ValueError(f"{place}: column {label} ({kind}) is not one column of numbers or words")
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    path = next((name for name in NAMES if name in texts and name != label), None)
    outer = image.split(".")[0]
    if path is None and "." in image and schema.field(outer).type.get_field_index("path") >= 0:
        path = f"{outer}.path"
    return label, path


def _classes(root: StoragePath, train: list[_RowGroup]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the classes, and the label of each value in the label column. Raises ValueError."""
    of_train = {value for group in train for value in group.labels if value is not None}
    if any(isinstance(value, str) for value in of_train):
        names = tuple(sorted(map(str, of_train)))
        return names, {name: label for label, name in enumerate(names)}
    numbers = sorted(int(value) for value in of_train if value >= 0 and value == int(value))
    rows = sum(len(group.labels) for group in train)
    if numbers and numbers[-1] >= rows:
        raise ValueError(
            f"--source {root}: has the label {numbers[-1]} among {rows} rows of train; expected classes' numbers"
        )
    if len(numbers) < 2:
        raise ValueError(f"--source {root}: its train part has {len(numbers)} class(es); a classifier needs at least 2")
    count = numbers[-1] + 1
    named = _named_classes(train[0].schema)
    if len(named) < count:
        named = tuple(str(label) for label in range(count))
    return named, {label: label for label in range(len(named))}


def _named_classes(schema: Any) -> tuple[str, ...]:
    """The names in the schema's metadata: Hugging Face's features, or a list with commas. Empty if none."""
    metadata = schema.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        label = next(features[name] for name in LABELS if name in features)
        return tuple(map(str, label["names"]))
    except (KeyError, ValueError, TypeError, StopIteration, RecursionError):
        text = metadata.get(b"classes", b"").decode("utf-8", "replace")
        return tuple(text.split(",")) if text else ()
