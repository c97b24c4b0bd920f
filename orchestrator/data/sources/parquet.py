"""Tables with a column of image bytes and a column of labels: Parquet files, and Arrow files.

Hugging Face's data sets are read as they lie on its hub, and as save_to_disk writes them.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.base.shown import count_of, quoted
from orchestrator.base.storage import StoragePath
from orchestrator.data.sources.arrow import SUFFIX as ARROW
from orchestrator.data.sources.arrow import arrow_batches
from orchestrator.data.sources.draw import Draw, with_val_drawn
from orchestrator.data.sources.listing import (
    SAMPLE,
    SPLITS,
    Entry,
    Say,
    Source,
    class_order,
    image_column,
    stored_size,
)
from orchestrator.data.sources.splits import renumbered, split_of_name
from orchestrator.data.sources.tree import Tree, Where, may_be_image

SUFFIX = ".parquet"
MAX_TEXT_BYTES = 2**28  # of the labels or the names of a row group, unpacked
# names of columns in any case, the first that is there counts
LABELS = ("label", "labels", "fine_label", "cls", "class", "target", "category", "class_name", "species", "breed")
NAMES = ("name", "path", "file_name", "filename", "image_file_path")


@dataclass(frozen=True)
class Columns:
    """The columns that are read: the user's, or None for those that are found."""

    image: str | None = None
    label: str | None = None


def open_parquet(
    tree: Tree,
    say: Say,
    *,
    columns: Columns = Columns(),
    config: str | None = None,
    draw: Draw,
) -> Source:
    """Files, or folders of files, of train and val, anywhere below the root; of one part alone, val is drawn.

    Raises ValueError naming the file and what it lacks.
    """
    root = tree.root
    if root is None:
        raise ValueError(f"--source {tree.shown}: Parquet files have to be unpacked first")
    files = split_files(tree, config, say)
    groups = {split: [group for name in files[split] for group in _row_groups(root, name, columns)] for split in files}
    classes = _Classes(root, groups["train"])
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    runs: dict[str, list[int]] = {}
    misplaced: list[tuple[str, str]] = []
    followed: set[str | None] = set()  # files that rows name
    next_id = 0
    for split in SPLITS:
        entries = splits[split]
        runs[split] = []
        for group in groups.get(split, ()):
            before = len(entries)
            for row, (value, text) in enumerate(zip(group.labels, group.names, strict=True)):
                name = f"{split}/" + (text or f"{group.file}, row group {group.index}, row {row}")
                label, why = classes.label(value, group)
                where: dict[str, Any] = {"path": (root / group.file).text, "row_group": group.index, "row": row}
                if label is not None and group.has_no_bytes:
                    file, why = _followed(tree, group.file, text)
                    followed.add(file)
                    label, where = (label, tree.files[file].at()) if file else (None, where)
                if label is None:
                    misplaced.append((name, why))
                else:
                    entries.append(Entry(next_id, label, name, column=group.image, **where))
                next_id += 1
            runs[split].append(len(entries) - before)
    if "val" not in files or draw.fraction is not None:
        if "val" in files:
            say(f"the val part ({len(splits['val'])} images) is left out, as --val-fraction is given")
            misplaced = [each for each in misplaced if not each[0].startswith("val/")]
        splits = renumbered(with_val_drawn(splits["train"], say, draw))
        runs = {split: [len(list(same)) for _, same in itertools.groupby(splits[split], _group_of)] for split in SPLITS}
    if classes.said:
        say(classes.said)
    size = stored_size(splits["train"][:SAMPLE], say)
    used = {name for names in files.values() for name in names} | followed
    rest = [(name, "not a file of train or val") for name in tree.files if name not in used]
    return Source(
        tree.name, "parquet", classes.names, splits, image_size=size, misplaced=misplaced,
        left_out=[*tree.left_out, *rest], runs=None if followed else runs,
    )  # fmt: skip


def single(file: StoragePath) -> Tree:
    """A tree of one file."""
    return Tree(PurePosixPath(file.name).stem, file.text, {file.name: Where(file.text)}, root=file.parent)


def _group_of(entry: Entry) -> tuple[str | None, int | None]:
    return entry.path, entry.row_group


@dataclass(frozen=True)
class _RowGroup:
    """The rows of a row group without their images."""

    file: str
    index: int
    labels: list[Any]  # as in the file
    names: list[str | None]
    class_names: tuple[str, ...]  # of the file
    image: str | None  # the column, if the user named it
    has_no_bytes: bool  # the images are files that `names` names


def _row_groups(root: StoragePath, name: str, columns: Columns) -> Iterator[_RowGroup]:
    place = root / name if name else root
    try:
        with place.open() as file:
            if place.name.endswith(ARROW):
                batches = arrow_batches(file)
                schema = batches[0].schema if batches else pa.schema([])
                found = _columns(place, schema, columns)
                for index, batch in enumerate(batches):
                    table = pa.Table.from_batches([batch])
                    missing = table.flatten()[found.image].null_count == table.num_rows
                    yield _group(name, index, table, found, columns, schema, missing)
                return
            parquet = pq.ParquetFile(file)
            found = _columns(place, parquet.schema_arrow, columns)
            _check_sizes(place, parquet.metadata, (found.label, found.name))
            paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
            if found.image not in paths:
                raise ValueError(
                    f"--image-column {found.image}: is not bytes in {place}; its columns are {', '.join(paths)}"
                )
            leaf = paths.index(found.image)
            for index in range(parquet.num_row_groups):
                wanted = [found.label, *([found.name] if found.name else [])]
                table = parquet.read_row_group(index, columns=wanted)
                statistics = parquet.metadata.row_group(index).column(leaf).statistics
                missing = bool(
                    statistics is not None and statistics.has_null_count and statistics.null_count == table.num_rows
                )
                yield _group(name, index, table, found, columns, parquet.schema_arrow, missing)
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{place}: cannot be read as {'Arrow' if name.endswith(ARROW) else 'Parquet'}: {text}"
        ) from None


def _group(
    name: str, index: int, table: Any, found: "_Found", columns: Columns, schema: Any, missing: bool
) -> _RowGroup:
    rows = table.flatten()
    values = rows[found.label].to_pylist()
    labels = [None if v == "" or (isinstance(v, float) and math.isnan(v)) else v for v in values]
    if any(isinstance(value, float) and not value.is_integer() for value in labels):
        raise ValueError(f"{name}: column {found.label} has numbers that are not whole; expected classes' numbers")
    names = rows[found.name].to_pylist() if found.name else [None] * len(labels)
    image = found.image if columns.image else None
    return _RowGroup(
        name, index, labels, names, _named_classes(schema, found.label), image, missing and found.name is not None
    )


def _check_sizes(place: StoragePath, metadata: Any, read: tuple[str | None, ...]) -> None:
    """Raises ValueError for a file whose footer promises more rows than images could be, or huge labels or names."""
    size = place.size() or 0
    if not 0 <= metadata.num_rows <= size:
        raise ValueError(f"{place}: its {size} bytes claim to hold {metadata.num_rows} images: not genuine")
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if not 0 <= group.num_rows <= metadata.num_rows:
            raise ValueError(f"{place}: its row group {index} claims {group.num_rows} rows of {metadata.num_rows}")
        for column in (group.column(i) for i in range(group.num_columns)):
            if column.path_in_schema in read and column.total_uncompressed_size > MAX_TEXT_BYTES:
                found = f"{column.total_uncompressed_size} bytes of {column.path_in_schema}"
                raise ValueError(f"{place}: row group {index} unpacks to {found}: not genuine")


def split_files(tree: Tree, config: str | None, say: Say) -> dict[str, list[str]]:
    """The files of train and, if there is one, val. Raises ValueError if there are several sets of them."""
    names = [name for name in tree.files if name.endswith((SUFFIX, ARROW))]
    if not names:
        raise ValueError(f"--source {tree.shown}: has no Parquet or Arrow file: {tree.summary()}")
    sets: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        folder, split = _set_of(name)
        sets[folder][split or ""].append(name)
    if config is not None:
        fitting = [folder for folder in sets if config in (folder, folder.rpartition("/")[2])]
        if len(fitting) != 1:
            raise ValueError(f"--config {config}: is none of the sets in {tree.shown}: {_shown(sets)}")
        sets = {fitting[0]: sets[fitting[0]]}  # type: ignore[assignment]
    trained = [folder for folder, parts in sets.items() if parts.get("train")]
    if len(trained) > 1:
        raise ValueError(f"--source {tree.shown}: holds several sets: {_shown(sets)}; choose one with --config")
    chosen = dict(sets[trained[0]]) if trained else {}
    if not trained or not (chosen.get("val") or chosen.get("test")):  # its parts may lie in folders of their own
        chosen = defaultdict(list)
        for parts in sets.values():
            for split, found in parts.items():
                chosen[split] += found
    train, val, test, others = (list(chosen.get(split, ())) for split in ("train", "val", "test", ""))
    if not train:
        train, others = others, []
    if not train:
        raise ValueError(f"--source {tree.shown}: has no file of train; there are {', '.join(names[:5])}")
    if not val and test:
        say(f"the test part ({count_of(len(test), 'file')}) is used as val: there is no other")
        val, test = test, []
    used = {*train, *val}
    for name in names:
        if name not in used:
            say(f"{name}: left out, belongs to neither train nor val")
    return {"train": train} | ({"val": val} if val else {})


def _shown(sets: Any) -> str:
    return ", ".join(folder or "." for folder in sorted(sets))


def _set_of(name: str) -> tuple[str, str | None]:
    """The folder of the set that a file belongs to, and its split: data/train-0.parquet, plain_text/test/0.parquet."""
    parts = PurePosixPath(name).parts
    for i in reversed(range(len(parts))):
        if split := split_of_name(parts[i]):
            return "/".join(parts[:i]), split
    return "/".join(parts[:-1]), None


def _followed(tree: Tree, file: str, text: str | None) -> tuple[str | None, str]:
    """The image that a row names by its path, which must be one of the source's files; or None, and why."""
    path = (text or "").replace("\\", "/").removeprefix("./")
    for candidate in (str(PurePosixPath(file).parent / path), path):
        if candidate in tree.files and may_be_image(candidate):
            return candidate, ""
    return None, f"the row has no bytes, and its path {quoted(path)} is not a file of the source"


@dataclass(frozen=True)
class _Found:
    image: str
    label: str
    name: str | None


def _columns(place: StoragePath, schema: Any, columns: Columns) -> _Found:
    """The columns of images, labels and, if any, names. Raises ValueError for none or no fitting one."""
    by_name = {name.lower(): name for name in reversed(schema.names)}
    shown = ", ".join(f"{column.name} ({column.type})" for column in schema)
    for flag, given in (("--image-column", columns.image), ("--label-column", columns.label)):
        outer = given.split(".")[0] if given is not None and flag == "--image-column" else given
        if outer is not None and outer not in schema.names:
            raise ValueError(f"{flag} {given}: is not a column of {place}; its columns are {shown}")
    image = columns.image or image_column(schema)
    if image is not None and "." not in image:
        kind = schema.field(image).type
        image = f"{image}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else image
    label = columns.label or next((by_name[name] for name in LABELS if name in by_name), None)
    for what, flag, column in (("image bytes", "--image-column", image), ("labels", "--label-column", label)):
        if column is None:
            raise ValueError(f"{place}: has no column of {what}; its columns are {shown}; name one with {flag}")
    assert image is not None and label is not None  # noqa: PT018
    kind = schema.field(label).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = (
        pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean,
    )  # fmt: skip
    if schema.names.count(label) > 1 or not any(is_it(kind) for is_it in known):
        raise ValueError(f"{place}: column {label} ({kind}) is not one column of numbers or words")
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    outer = image.split(".")[0]
    path = next((by_name[name] for name in NAMES if by_name.get(name) in texts and by_name[name] != label), None)
    if "." in image and schema.field(outer).type.get_field_index("path") >= 0:
        path = path or f"{outer}.path"
    return _Found(image, label, path)


class _Classes:
    """The classes that the training part names, and which one a value means."""

    def __init__(self, root: StoragePath, train: list[_RowGroup]) -> None:
        """Raises ValueError."""
        self.said = ""
        values = {value for group in train for value in group.labels if value is not None}
        self.named = next((group.class_names for group in train if group.class_names), ())
        if any(isinstance(value, str | bool) for value in values):
            self.named, self.names = (), class_order(map(str, values))
        else:
            numbers = sorted(int(value) for value in values if value >= 0 and value == int(value))
            rows = sum(len(group.labels) for group in train)
            if numbers and numbers[-1] >= max(rows, len(self.named)):
                raise ValueError(
                    f"--source {root}: has the label {numbers[-1]} among {rows} rows of train; expected the numbers of "
                    "classes"
                )
            if not numbers:
                raise ValueError(f"--source {root}: no row of its train part has a label: {_missing(train)}")
            if len(numbers) < 2:
                classes = count_of(len(numbers), "class", "classes")
                raise ValueError(f"--source {root}: its train part has {classes}; a classifier needs at least 2")
            if len(self.named) > numbers[-1]:
                self.names = self.named
            else:
                self.named, self.names = (), tuple(map(str, numbers))
                if numbers != list(range(len(numbers))):
                    self.said = f"its labels are {', '.join(self.names[:5])}{', ...' * (len(numbers) > 5)}: " + (
                        f"{len(numbers)} classes, named by their numbers"
                    )
        self.label_of = {name: label for label, name in enumerate(self.names)}

    def label(self, value: Any, group: _RowGroup) -> tuple[int | None, str]:
        """The class of a value, by the names of its own part where they have names; else None and why."""
        if value is None:
            return None, "the row has no label"
        named = group.class_names if self.named and group.class_names else self.named
        is_number = not isinstance(value, str | bool)
        if named and is_number:
            name = named[int(value)] if 0 <= value < len(named) else None
        else:
            name = str(int(value)) if is_number else str(value)
        label = self.label_of.get(name) if name is not None else None
        shown = value if name is None or not named else name
        return (
            label,
            "" if label is not None else f"its label {quoted(shown)} is not one of the {len(self.names)} classes",
        )


def _missing(groups: list[_RowGroup]) -> str:
    """What stands where labels should."""
    found = sorted({str(value) for group in groups for value in group.labels})
    return f"they are {', '.join(found[:3])}"


def _named_classes(schema: Any, label: str) -> tuple[str, ...]:
    """The names in the schema's metadata: Hugging Face's features, or a list with commas. Empty if none."""
    metadata = schema.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError, RecursionError):
        text = metadata.get(b"classes", b"").decode("utf-8", "replace")
        return tuple(text.split(",")) if text else ()
