"""Sources of images. `open_source` lists the images of train and val, each with its label; `read` gets one's bytes.

The format of a folder or URI is detected from the names in it, unless the user states it.
"""

from collections.abc import Callable

from orchestrator.base.environment import command
from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import MANIFEST
from orchestrator.data.sources import cifar, ilsvrc, parquet
from orchestrator.data.sources.cifar import open_cifar10
from orchestrator.data.sources.digits import DIGITS, open_digits
from orchestrator.data.sources.ilsvrc import open_ilsvrc, verify_md5
from orchestrator.data.sources.imagefolder import base_of, open_imagefolder
from orchestrator.data.sources.listing import SPLITS, Entry, Say, Source, check_usable, read, versions
from orchestrator.data.sources.parquet import open_parquet

__all__ = ["DIGITS", "FORMATS", "SPLITS", "Entry", "Say", "Source", "open_source", "read", "versions"]

FORMATS: dict[str, Callable[[StoragePath, Say], Source]] = {
    "imagefolder": open_imagefolder,
    "ilsvrc": open_ilsvrc,
    "parquet": open_parquet,
    "cifar10": open_cifar10,
}


def open_source(
    source: str,
    *,
    as_format: str = "auto",
    verify: bool = False,
    say: Say = lambda line: None,
) -> Source:
    """The listing of `digits`, or of a folder or URI in one of FORMATS. Raises ValueError of one line.

    `verify` checks archives against their published MD5 sums first. `say` gets lines for the user: the format that was
    detected, and what was taken as what.
    """
    if source == DIGITS:
        if verify:
            raise ValueError(f"--verify: {DIGITS} has no archives to verify; leave it out")
        return open_digits()
    root = StoragePath.of(source)
    if not root.is_folder() and root.name != cifar.ARCHIVE:
        raise ValueError(f"--source {root}: no such folder; give a folder or URI of images, or {DIGITS}")
    if (root / MANIFEST).size() is not None:
        raise ValueError(f"--source {root}: holds shards already; train with: {command('train')} --data {root}")
    name, why = detect(root) if as_format == "auto" else (as_format, "as given by --format")
    say(f"format {name}: {why}")
    if verify:
        verify_md5(root, say)
    found = FORMATS[name](root, say)
    check_usable(found)
    return found


def detect(root: StoragePath) -> tuple[str, str]:
    """The format of a folder, and the name in it by which it is known."""
    names = root.children()
    if ilsvrc.TRAIN in names:
        return "ilsvrc", f"it has {ilsvrc.TRAIN}"
    if root.name == cifar.ARCHIVE:
        return "cifar10", f"it is {cifar.ARCHIVE}"
    known = next((name for name in names if name in (cifar.ARCHIVE, cifar.FOLDER, cifar.TRAIN[0])), None)
    if known:
        return "cifar10", f"it has {known}"
    for folder in ("", "data", "train"):
        inside = names if not folder else (root / folder).children() if names.get(folder) else {}
        known = next((name for name in inside if name.endswith(parquet.SUFFIX)), None)
        if known:
            return "parquet", f"it has {folder + '/' if folder else ''}{known}"
    base = base_of(root)
    return "imagefolder", "it has " + ("train/" if base == root else "train/ in Data/CLS-LOC")
