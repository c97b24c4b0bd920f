"""Where images come from: a listing of train and val, each entry a file, a part of one, or bytes, with its label.

A source is found in a folder or a URI by what lies there, or read as the format that the user names.
"""

from collections.abc import Callable

from orchestrator.base.environment import command
from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import MANIFEST
from orchestrator.data.sources.cifar import ARCHIVE, FOLDER, open_cifar10
from orchestrator.data.sources.cifar import TRAIN as BATCHES
from orchestrator.data.sources.digits import DIGITS, open_digits
from orchestrator.data.sources.ilsvrc import TRAIN, open_ilsvrc, verify_md5
from orchestrator.data.sources.imagefolder import base_of, open_imagefolder
from orchestrator.data.sources.listing import SPLITS, Entry, Say, Source, finished, read, version
from orchestrator.data.sources.parquet import SUFFIX, open_parquet

__all__ = ["DIGITS", "FORMATS", "SPLITS", "Entry", "Say", "Source", "StoragePath", "open_source", "read", "version"]

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
    """`digits`, or a folder or URI in one of FORMATS. Raises ValueError of one line where it is none of them.

    `say` gets what the user should know: the format that was found, and what was taken for what.
    """
    if source == DIGITS:
        if verify:
            raise ValueError(f"--verify: there are no checksums of {DIGITS}")
        return open_digits()
    root = StoragePath.of(source)
    if not root.is_folder() and root.name != ARCHIVE:
        raise ValueError(f"--source {root}: no such folder; give a folder or URI of images, or the word {DIGITS}")
    if (root / MANIFEST).size() is not None:
        raise ValueError(f"--source {root}: holds shards already; train with: {command('train')} --data {root}")
    name, why = detect(root) if as_format == "auto" else (as_format, "as asked")
    say(f"format {name}: {why}")
    if verify:
        verify_md5(root, say)
    return finished(FORMATS[name](root, say))


def detect(root: StoragePath) -> tuple[str, str]:
    """The format of what lies in a folder, and by what it is known."""
    names = root.children()
    if TRAIN in names:
        return "ilsvrc", f"it has {TRAIN}"
    if root.name == ARCHIVE or names.keys() & {ARCHIVE, FOLDER, BATCHES[0]}:
        return "cifar10", f"it has {next(n for n in (root.name, *names) if n in (ARCHIVE, FOLDER, BATCHES[0]))}"
    for folder in ("", "data", "train"):
        inside = names if not folder else (root / folder).children() if names.get(folder) else {}
        found = next((name for name in inside if name.endswith(SUFFIX)), None)
        if found:
            return "parquet", f"it has {folder + '/' if folder else ''}{found}"
    base = base_of(root)
    return "imagefolder", "it has " + ("train/" if base == root else "train/ in Data/CLS-LOC")
