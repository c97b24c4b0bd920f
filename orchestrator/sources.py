"""Where images come from: a listing of train and val, each entry a file or bytes with its label."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Entry:
    """One image before it is read: a file's path, or its bytes when there is no file."""

    id: int  # unique in the source, the same whatever the order in which entries are read
    label: int
    name: str  # for people: the path below the source, or what takes its place
    path: str | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A listed set of images. `image_size` is the stored side in pixels that suits it."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]
    image_size: int = 256
    misplaced: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of files that have no class


def open_source(source: str) -> Source:
    """`digits`, or the folder of an ImageFolder tree. Raises ValueError where it is neither."""
    return digits() if source == "digits" else image_folder(Path(source))


def image_folder(root: Path) -> Source:
    """train/ and val/ with a folder per class; the classes are train's folders in sorted order.

    Every file below a class folder is an entry, whatever it is called: what is no image is found, and listed, when it
    is read. Raises ValueError naming the folder that is missing or wrong.
    """
    if not root.is_dir():
        raise ValueError(f"--source {root}: no such folder; give a folder with train/ and val/, or the word digits")
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ValueError(f"--source {root}: has no folder {split}/; expected {root}/{split}/CLASS/IMAGE")
    classes = tuple(sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"--source {root}/train: has {len(classes)} class folder(s); a classifier needs at least 2")
    unknown = sorted({f.name for f in (root / "val").iterdir() if f.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"--source {root}/val: class {unknown[0]!r} is not in train/, so no net could learn it")
    splits: dict[str, list[Entry]] = {}
    misplaced: list[tuple[str, str]] = []
    next_id = 0
    for split in SPLITS:
        entries = splits[split] = []
        for path in sorted(p for p in (root / split).iterdir() if not p.is_dir()):
            misplaced.append((f"{split}/{path.name}", "not in a class folder"))
        for label, name in enumerate(classes):
            for path in _files(root / split / name, misplaced):
                if not _is_utf8(path):
                    misplaced.append((ascii(str(path.relative_to(root)))[1:-1], "the name is not UTF-8"))
                    continue
                entries.append(Entry(next_id, label, path.relative_to(root).as_posix(), path=str(path.absolute())))
                next_id += 1
        if not entries:
            raise ValueError(f"--source {root}/{split}: holds no files; expected {root}/{split}/CLASS/IMAGE")
    return Source(root.name, classes, splits, misplaced=misplaced)


def _files(folder: Path, unreadable: list[tuple[str, str]]) -> list[Path]:
    """Everything below the folder that is not a folder, dangling links included, in sorted order."""

    def note(error: OSError) -> None:
        unreadable.append((str(error.filename), f"cannot be listed: {error.strerror}"))

    found = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=note) for name in names]
    return sorted(found)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships: 1,437 train, 360 val, classes balanced.

    Source: E. Alpaydin, C. Kaynak, UCI Optical Recognition of Handwritten Digits (1998), its test part.
    """
    import numpy as np
    import PIL.Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(gray)), test_size=360, stratify=bunch.target, random_state=0)
    splits: dict[str, list[Entry]] = {}
    for split, indices in zip(SPLITS, (train, val), strict=True):
        entries = splits[split] = []
        for index in sorted(indices.tolist()):
            png = io.BytesIO()
            PIL.Image.fromarray(gray[index]).save(png, "PNG")
            entries.append(
                Entry(index, int(bunch.target[index]), f"{split}/digit-{index:04d}.png", data=png.getvalue())
            )
    return Source("digits", tuple("0123456789"), splits, image_size=72)
