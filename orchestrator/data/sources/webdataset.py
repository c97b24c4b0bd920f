"""Tars of WebDataset: members KEY.jpg and KEY.cls, one after the other; an image is a byte range of a tar."""

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from orchestrator.base.storage import StoragePath
from orchestrator.data.sources.draw import Draw
from orchestrator.data.sources.ilsvrc import members
from orchestrator.data.sources.imagefolder import is_utf8
from orchestrator.data.sources.listing import Entry, Say, Source, class_order, sample, stored_size
from orchestrator.data.sources.splits import into_two, renumbered, split_of_path
from orchestrator.data.sources.tables import LABEL_COLUMNS
from orchestrator.data.sources.tree import IMAGES, TARS, Tree

LABELS = ("cls", "cls.txt", "label", "label.txt", "class", "json")
MAX_LABEL_BYTES = 2**16


def is_webdataset(archive: StoragePath) -> bool:
    """Whether one of the first members of a tar is a label."""
    for number, (member, _) in enumerate(members(archive)):
        if _kind(member.name)[1] in LABELS[:-1]:
            return True
        if number > 8:
            break
    return False


def open_webdataset(tree: Tree, say: Say, *, draw: Draw) -> Source:
    """All tars of a tree, whose paths may say their parts. Raises ValueError of one line."""
    assert tree.root is not None
    found: list[tuple[str, str, str, StoragePath, int, int]] = []  # split, label, name, archive, start, length
    misplaced: list[tuple[str, str]] = []
    left_out = list(tree.left_out)
    for path in tree.files:
        if not path.lower().endswith(TARS):
            left_out.append((path, "not a tar"))
            continue
        archive = tree.root / path
        split = split_of_path(path) or ""
        for key, image, label in _samples(archive, path, left_out):
            if image is None or label is None:
                misplaced.append((f"{path}/{key}", "has no image" if image is None else "has no label"))
                continue
            if not is_utf8(key):
                misplaced.append((ascii(f"{path}/{key}")[1:-1], "the name is not UTF-8"))
                continue
            found.append((split, label, f"{path}/{key}", archive, *image))
    if not found:
        raise ValueError(
            f"--source {tree.shown}: its tars have no image with a label beside it, KEY.jpg and KEY.cls"
            + (f"; {misplaced[0][0]} {misplaced[0][1]}" if misplaced else "")
        )
    classes = class_order(label for _, label, *_ in found)
    label_of = {text: label for label, text in enumerate(classes)}
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": [], "": []}
    for number, (split, label, shown, archive, start, length) in enumerate(found):
        entry = Entry(number, label_of[label], shown, path=archive.text, start=start, length=length)
        splits[split].append(entry)
    made = renumbered(into_two(splits, say, draw, left_out))
    size = stored_size(sample(made["train"]), say)
    return Source(tree.name, "webdataset", classes, made, image_size=size, misplaced=misplaced, left_out=left_out)


def _samples(
    archive: StoragePath, path: str, left_out: list[tuple[str, str]]
) -> Iterator[tuple[str, tuple[int, int] | None, str | None]]:
    """Key, byte range of the image and label of each sample: neighbours of one key."""
    last, image, label = None, None, None
    for member, start in members(archive):
        key, kind = _kind(member.name)
        if last is not None and key != last:
            yield last, image, label
            image = label = None
        last = key
        if kind.rpartition(".")[2] in IMAGES and image is None:
            image = start, member.size
        elif kind in LABELS and member.size <= MAX_LABEL_BYTES:
            label = _label(archive.read_at(start, member.size), kind) or label
        else:
            left_out.append((f"{path}/{member.name}", f"neither a sample's first image nor its label: .{kind}"))
    if last is not None:
        yield last, image, label


def _label(data: bytes, kind: str) -> str | None:
    text = data.decode("utf-8", "replace").strip()
    if kind != "json":
        return text or None
    try:
        found = json.loads(text)
        return next((str(found[name]) for name in LABEL_COLUMNS if found.get(name) is not None), None)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _kind(name: str) -> tuple[str, str]:
    """A member's key and the rest of its name, which begins after the first dot."""
    path = PurePosixPath(name)
    stem, _, kind = path.name.partition(".")
    return str(path.parent / stem), kind.lower()
