"""Labels that are listed: in a table (CSV, TSV, JSON lines), in Caffe's lists, or in the names of the files."""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.base.shown import count_of, quoted
from orchestrator.data.sources.draw import Draw
from orchestrator.data.sources.imagefolder import is_utf8, near_equal
from orchestrator.data.sources.listing import Entry, Say, Source, class_order, sample, stored_size
from orchestrator.data.sources.splits import into_two, renumbered, split_of_name, split_of_path
from orchestrator.data.sources.tree import Tree, extension, may_be_image

TABLES = ("csv", "tsv", "jsonl", "txt")
IMAGE_COLUMNS = (
    "file_name", "filename", "file", "image", "image_path", "img", "img_path", "path", "image_id", "image_name", "name",
    "id",
)  # fmt: skip
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "class_name",
    "category",
    "target",
    "cls",
    "species",
    "breed",
    "label_name",
)
SPLIT_COLUMNS = ("split", "subset", "partition")
CAFFE = ("train.txt", "val.txt")


@dataclass(frozen=True)
class Row:
    """A line of a list."""

    image: str
    label: str
    split: str | None


def open_table(
    tree: Tree,
    say: Say,
    *,
    labels: str,
    image_column: str | None,
    label_column: str | None,
    draw: Draw,
) -> Source:
    """Images whose labels a table names. `labels`: its path below the source. Raises ValueError of one line."""
    if labels not in tree.files:
        tables = sorted(name for name in tree.files if extension(name) in TABLES)
        raise ValueError(f"--labels {labels}: is not in {tree.shown}; there are {', '.join(tables[:8]) or 'no tables'}")
    rows = list(read_rows(tree, labels, image_column, label_column, say))
    return _listed(tree, "table", {labels: rows}, say, draw)


def open_caffe(tree: Tree, say: Say, *, draw: Draw) -> Source:
    """train.txt and val.txt with lines `path label`."""
    found = {}
    for name in CAFFE:
        rows = []
        for number, line in enumerate(_text(tree, name).splitlines(), 1):
            parts = line.rsplit(None, 1)
            if not parts:
                continue
            if len(parts) != 2:
                raise ValueError(f"--source {tree.shown}: {name}, line {number}: {quoted(line)} is not `PATH LABEL`")
            rows.append(Row(parts[0], parts[1], name.removesuffix(".txt")))
        found[name] = rows
    say("labels come from train.txt and val.txt")
    return _listed(tree, "caffe", found, say, draw)


def open_pattern(tree: Tree, say: Say, *, pattern: str, draw: Draw) -> Source:
    """Images whose class is the first group of a pattern that is found in their names."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--label-pattern {pattern!r}: is not a regular expression: {error}") from None
    if compiled.groups < 1:
        raise ValueError(f"--label-pattern {pattern!r}: has no group; put the class in brackets, as in '^(cat|dog)'")
    rows, without = [], []
    for name in tree.files:
        if may_be_image(name) and is_utf8(name):
            found = compiled.search(name.rpartition("/")[2])
            if found and found[1]:
                rows.append(Row(name, found[1], split_of_path(name.rpartition("/")[0])))
            else:
                without.append((name, f"its name does not match {pattern}"))
    if not rows:
        raise ValueError(f"--label-pattern {pattern!r}: matches none of the {len(without)} names of images")
    say(f"labels are the part of the files' names that {pattern} finds")
    return _listed(tree, "pattern", {"": rows}, say, draw, without)


def read_rows(tree: Tree, table: str, image_column: str | None, label_column: str | None, say: Say) -> Iterator[Row]:
    """The rows of a table with a line of names at its top. Raises ValueError naming its columns."""
    rows = _records(tree, table)
    columns = list(rows[0]) if rows else []
    image = _column(columns, image_column, IMAGE_COLUMNS, "--image-column", table)
    label = _column(columns, label_column, LABEL_COLUMNS, "--label-column", table)
    by_name = _by_name(columns)
    split = next((by_name[name] for name in SPLIT_COLUMNS if name in by_name), None)
    by = f"; column {split} has their parts" if split else ""
    say(f"labels come from {table}: column {label} has those of the images in column {image}{by}")
    for row in rows:
        yield Row(
            row.get(image, ""), row.get(label, "").strip(), _part(row.get(split, ""), split, table) if split else None
        )


def _records(tree: Tree, table: str) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns, kept with the tree: it is read once to be found and used."""
    if table not in tree.tables:
        tree.tables[table] = _read_records(tree, table)
    return tree.tables[table]


def _text(tree: Tree, name: str) -> str:
    """Of a file of labels. Raises ValueError of one line: what is guessed could make one class of two."""
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--source {tree.shown}: {name}: is no text in UTF-8, at byte {error.start}; save it as UTF-8"
        ) from None


def _read_records(tree: Tree, table: str) -> list[dict[str, str]]:
    """Raises ValueError of one line."""
    text = _text(tree, table)
    rows: list[dict[str, str]]
    if extension(table) == "jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                rows.append({str(key): "" if value is None else str(value) for key, value in found.items()})
            except (ValueError, AttributeError, RecursionError):
                raise ValueError(f"--labels {table}, line {number}: is not a JSON object") from None
    else:
        first = text.partition("\n")[0]
        delimiter = max("\t;,", key=first.count)
        try:
            rows = [
                {
                    key: value or ""
                    for key, value in row.items()
                    if isinstance(key, str) and isinstance(value, str | None)
                }
                for row in csv.DictReader(io.StringIO(text), delimiter=delimiter)
            ]
        except csv.Error as error:
            raise ValueError(f"--labels {table}: cannot be read: {error}") from None
    return rows


def _part(value: str, column: str, table: str) -> str | None:
    found = split_of_name(value)
    if found is None and value.strip():
        raise ValueError(f"--labels {table}: {column} = {quoted(value)}: is no part; expected train, val or test")
    return found


def find_table(tree: Tree) -> str | None:
    """The one table that has columns of images and of labels; None if there is none, or several."""
    found = []
    for name in tree.files:
        if extension(name) in ("csv", "tsv", "jsonl") and name.count("/") < 3:
            try:
                list(read_rows(tree, name, None, None, lambda line: None))
            except ValueError:
                tree.tables[name] = []  # looked at, and not what is looked for
                continue
            found.append(name)
    if len(found) != 1:
        tree.tables.clear()
        return None
    return found[0]


def _by_name(columns: list[str]) -> dict[str, str]:
    return {column.lower().strip(): column for column in columns}


def _column(columns: list[str], given: str | None, known: tuple[str, ...], flag: str, table: str) -> str:
    shown = ", ".join(columns[:12]) or "none"
    if given is not None:
        if given not in columns:
            raise ValueError(f"{flag} {given}: is not a column of {table}; its columns are {shown}")
        return given
    by_name = _by_name(columns)
    found = next((by_name[name] for name in known if name in by_name), None)
    if found is None:
        raise ValueError(f"--labels {table}: name the column with {flag}; its columns are {shown}")
    return found


def _listed(
    tree: Tree,
    form: str,
    lists: dict[str, list[Row]],
    say: Say,
    draw: Draw,
    misplaced: list[tuple[str, str]] | None = None,
) -> Source:
    """A source of the images that lists name; the others are misplaced."""
    misplaced = list(misplaced or ())
    names = {row.label for rows in lists.values() for row in rows if row.label}
    classes = class_order(names)
    if len(classes) < 2:
        named = count_of(len(classes), "class", "classes")
        raise ValueError(f"--source {tree.shown}: its labels name {named}; a classifier needs at least 2")
    label_of = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": [], "": []}
    unlabelled = dict(misplaced or ())
    misplaced, seen = [], set[str]()
    find = _Finder(tree, lists)
    for source, rows in lists.items():
        for row in rows:
            name, why = find(source, row.image)
            if name is None:
                misplaced.append((row.image or "a row", f"{source} lists it, and {why}"))
            elif not row.label:
                unlabelled[name] = f"has no label in {source}"
            elif name in seen:
                misplaced.append((name, f"{source} lists it a second time"))
            else:
                seen.add(name)
                split = row.split or split_of_path(name.rpartition("/")[0]) or ""
                splits[split].append(Entry(len(seen), label_of[row.label], name, **tree.files[name].at()))
    left_out = list(tree.left_out)
    where = " or ".join(filter(None, lists)) or "its name"
    for name in tree.files:
        if name in seen or name in lists:
            continue
        if not may_be_image(name):
            left_out.append((name, f"not an image by its name: .{extension(name)}"))
        elif split_of_path(name.rpartition("/")[0]) == "test":  # the test parts of contests have no labels
            left_out.append((name, "of the test part, and without a label"))
        else:
            misplaced.append((name, unlabelled.get(name, f"has no label in {where}")))
    made = into_two(splits, say, draw, left_out)
    for split in made:
        made[split].sort(key=lambda entry: entry.name.split("/"))
    made = renumbered(made)
    size = stored_size(sample(made["train"]), say)
    return Source(
        tree.name, form, classes, made, image_size=size, misplaced=misplaced, left_out=left_out,
        warnings=near_equal(list(classes)),
    )  # fmt: skip


class _Finder:
    """From an image as a list names it to a file of the tree."""

    def __init__(self, tree: Tree, lists: dict[str, list[Row]]) -> None:
        self.images = {name for name in tree.files if may_be_image(name)}
        exact = {self._exact(source, row.image) for source, rows in lists.items() for row in rows}
        self._by_last = defaultdict[str, list[str]](list)  # those that no row names exactly, by name and by stem
        for name in sorted(self.images - exact):
            path = PurePosixPath(name)
            for last in {path.name, path.stem}:
                self._by_last[last].append(name)

    def __call__(self, source: str, text: str) -> tuple[str | None, str]:
        """A path from the list's folder or from the top; else the only file that ends so. None, and why, if neither."""
        if found := self._exact(source, text):
            return found, ""
        path = _plain(text)
        ends = [
            name
            for name in self._by_last.get(path.rpartition("/")[2], ())
            if "/" not in path or f"/{name}".endswith(f"/{path}") or f"/{path}".endswith(f"/{name}")
            or f"/{name.rpartition('.')[0]}".endswith(f"/{path}")
        ]  # fmt: skip
        if len(ends) == 1:
            return ends[0], ""
        return None, f"{len(ends)} files are called so" if ends else "it is not there"

    def _exact(self, source: str, text: str) -> str:
        folder, path = source.rpartition("/")[0], _plain(text)
        candidates = (f"{folder}/{path}" if folder else path, path)
        return next((candidate for candidate in candidates if candidate in self.images), "")


def _plain(text: str) -> str:
    return text.strip().replace("\\", "/").removeprefix("./").lstrip("/")
