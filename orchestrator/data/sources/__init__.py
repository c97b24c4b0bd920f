"""Sources of images. `open_source` lists the images of train and val, each with its label; `read` gets one's bytes.

What a source is, is detected from the names in it, unless the user states it.
"""

import shlex
from collections import Counter
from dataclasses import dataclass, replace

from orchestrator.base.environment import command
from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import MANIFEST
from orchestrator.data.sources import cifar, ilsvrc, parquet, same, tables, webdataset
from orchestrator.data.sources.arrow import SUFFIX as ARROW
from orchestrator.data.sources.cifar import open_cifar10
from orchestrator.data.sources.devkit import DEVKIT
from orchestrator.data.sources.digits import DIGITS, open_digits
from orchestrator.data.sources.draw import Draw, Drawn
from orchestrator.data.sources.ilsvrc import open_ilsvrc, verify_md5
from orchestrator.data.sources.imagefolder import has_classes, open_imagefolder
from orchestrator.data.sources.listing import SPLITS, Entry, Say, Source, check_usable, read, versions
from orchestrator.data.sources.parquet import Columns, open_parquet
from orchestrator.data.sources.tree import IMAGES, PACKED_TARS, TARS, ZIP, Tree, Where, extension, tree_of, unpacked

__all__ = [
    "DIGITS", "FORMATS", "SPLITS", "Drawn", "Entry", "Options", "Say", "Source", "open_source", "read", "versions",
]  # fmt: skip

FORMATS = ("imagefolder", "ilsvrc", "parquet", "cifar10", "table", "caffe", "webdataset")
TABLED = (parquet.SUFFIX, ARROW)
SHOWN = 3
NEEDS = {  # of a format that is stated: what has to be there
    "ilsvrc": f"{ilsvrc.TRAIN}, {ilsvrc.VAL} and {DEVKIT} in a folder",
    "cifar10": f"{cifar.ARCHIVE}, or its folder {cifar.FOLDER}",
    "webdataset": "tars of KEY.jpg and KEY.cls",
    "parquet": "Parquet or Arrow files, which are not in an archive",
    "caffe": f"{' and '.join(tables.CAFFE)} with lines PATH LABEL",
    "table": f"a table of labels (.{', .'.join(tables.TABLES)})",
}


@dataclass(frozen=True)
class Options:
    """What a user states about a source; None or auto: it is found."""

    format: str = "auto"
    verify: bool = False  # check archives against their published MD5 sums first
    labels: str | None = None  # a table of labels, by its path below the source
    image_column: str | None = None
    label_column: str | None = None
    label_pattern: str | None = None  # a regular expression whose first group is the class, in files' names
    config: str | None = None  # the one of several sets in a folder of Parquet files
    val_fraction: float | None = None  # of every class, drawn for validation
    seed: int = 0  # of that draw


def open_source(
    source: str,
    options: Options = Options(),
    *,
    say: Say = lambda line: None,
    earlier: Drawn | None = None,
    blind: str = "",
) -> Source:
    """The listing of `digits`, or of a folder, a URI or an archive. Raises ValueError of one line.

    `say` gets lines for the user: what was detected and why, and what was taken as what. earlier: what an interrupted
    preparation has drawn for validation. blind: why near-duplicates are not to be looked for, if they are not.
    """
    if source == DIGITS:
        _refuse_options(DIGITS, options)
        if options.verify:
            raise ValueError(f"--verify: {DIGITS} has no archives to verify; leave it out")
        return open_digits()
    root = StoragePath.of(source)
    if not root.is_folder() and root.size() is None:
        kind = root.special()
        what = f"is {kind}, neither a folder nor a file that can be read" if kind else "no such folder or file"
        raise ValueError(f"--source {root}: {what}; give a folder, archive or URI of images, or {DIGITS}")
    if (root / MANIFEST).size() is not None:
        training = f"{command('train')} --data {shlex.quote(str(root))}"
        raise ValueError(f"--source {root}: holds shards already; train with: {training}")
    lines: list[str] = []
    draw = Draw(options.val_fraction, options.seed, blind, earlier, progress=say)
    name, why, tree = detect(root, options)
    if options.format != "auto":
        _refuse_other_form(name, root, tree, options)
    say = _kept(say, lines)
    say(f"format {name}: {why}")
    if options.verify:
        verify_md5(root, say)
    found = replace(_open(name, root, tree, options, draw, say), drawn=draw.drawn)
    check_usable(found)
    found.warnings.extend(inspect(found, say, draw.progress, blind))
    found.found.extend(lines)
    return found


def _kept(say: Say, lines: list[str]) -> Say:
    """`say` that also adds each line to others."""

    def both(line: str) -> None:
        lines.append(line)
        say(line)

    return both


def detect(root: StoragePath, options: Options) -> tuple[str, str, Tree | None]:
    """The format, what it is known by, and what is there unless the format looks for itself."""
    listed = options.labels is not None or options.label_pattern is not None
    if options.format != "auto":
        why = "as given by --format"
        return options.format, why, None if options.format in ("ilsvrc", "cifar10") else _tree(root)
    if root.name == cifar.ARCHIVE:
        return "cifar10", f"it is {cifar.ARCHIVE}", None
    if root.is_folder():
        names = root.children()
        if ilsvrc.TRAIN in names:
            return "ilsvrc", f"it has {ilsvrc.TRAIN}", None
        known = next((name for name in names if name in (cifar.ARCHIVE, cifar.FOLDER, cifar.TRAIN[0])), None)
        if known:
            return "cifar10", f"it has {known}", None
    elif root.name.endswith(TABLED):
        return "parquet", f"it is {root.name}", _tree(root)
    elif root.name.lower().endswith(TARS) and not listed and webdataset.is_webdataset(root):
        return "webdataset", "its members are images and their labels", None
    tree = _tree(root)
    archives = [name for name in tree.files if name.lower().endswith((*ZIP, *TARS))]
    if tree.root is not None and archives and not any(extension(name) in IMAGES for name in tree.files):
        tars = [name for name in archives if name.lower().endswith(TARS)]
        if tars and not listed and webdataset.is_webdataset(tree.root / tars[0]):
            return "webdataset", f"{tars[0]} has images and their labels", tree
        tree = unpacked(tree, archives)
    if options.labels is not None:
        return "table", f"labels come from {options.labels}", tree
    if options.label_pattern is not None:
        return "imagefolder", "labels come from the names of its files", tree
    folders = has_classes(tree)
    tabled = next((name for name in tree.files if name.endswith(TABLED)), None)
    if tabled is not None and tree.root is not None and not folders:
        return "parquet", f"it has {tabled}", tree
    if set(tables.CAFFE) <= tree.files.keys() and not folders:
        return "caffe", "it has train.txt and val.txt", tree
    table = tables.find_table(tree)
    if table is None:
        return "imagefolder", tree.summary(), tree
    if folders:
        return "imagefolder", f"{tree.summary()}; {table} is not used: --labels {shlex.quote(table)} reads it", tree
    return "table", f"it has {table}, and no folders of classes", tree


def inspect(source: Source, say: Say, progress: Say, blind: str = "") -> list[str]:
    """What looks wrong with a listing, a line each."""
    lines = []
    rows = {split: Counter(entry.label for entry in source.splits[split]) for split in SPLITS}
    for split, what in (("train", "training"), ("val", "validation")):
        empty = [source.classes[label] for label in range(len(source.classes)) if not rows[split][label]]
        if empty:
            more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
            lines.append(f"no {what} images of {', '.join(empty[:SHOWN])}{more}")
    if source.drawn is not None:
        return [*lines, *source.drawn.warnings]
    return [*lines, *same.inspected(source.splits, say, progress, blind)]


def _open(name: str, root: StoragePath, tree: Tree | None, options: Options, draw: Draw, say: Say) -> Source:
    if name in ("ilsvrc", "cifar10"):
        _refuse_options(name, options)
    if name == "ilsvrc":
        return open_ilsvrc(root, say)
    if name == "cifar10":
        return open_cifar10(root, say)
    if name == "webdataset":
        if tree is None or tree.root is None:
            tree = Tree(root.name, root.text, {root.name: Where(root.text)}, root=root.parent)
        return webdataset.open_webdataset(tree, say, draw=draw)
    assert tree is not None
    if name == "parquet":
        columns = Columns(options.image_column, options.label_column)
        return open_parquet(tree, say, columns=columns, config=options.config, draw=draw)
    if name == "caffe":
        return tables.open_caffe(tree, say, draw=draw)
    if options.label_pattern is not None:
        return tables.open_pattern(tree, say, pattern=options.label_pattern, draw=draw)
    if name == "table":
        labels = options.labels or tables.find_table(tree)
        if labels is None:
            raise ValueError(f"--source {tree.shown}: name its table of labels with --labels: {tree.summary()}")
        return tables.open_table(
            tree, say, labels=labels, image_column=options.image_column, label_column=options.label_column, draw=draw,
        )  # fmt: skip
    return open_imagefolder(tree, say, draw=draw)


def _refuse_other_form(name: str, root: StoragePath, tree: Tree | None, options: Options) -> None:
    """Raises ValueError of one line for a format that was stated and has no part here."""
    beside = {*root.children()} if root.is_folder() else {root.name} if name == "cifar10" else set()
    files = [*tree.files] if tree is not None else []
    fits = {
        "ilsvrc": bool(beside & {ilsvrc.TRAIN, ilsvrc.VAL}),
        "cifar10": bool(beside & {cifar.ARCHIVE, cifar.FOLDER, cifar.TRAIN[0]}),
        "webdataset": any(each.lower().endswith(TARS) for each in (root.name, *files)),
        "parquet": tree is not None and tree.root is not None and any(each.endswith(TABLED) for each in files),
        "caffe": any(each in files for each in tables.CAFFE),
        "table": options.labels is not None or any(extension(each) in tables.TABLES for each in files),
    }
    if fits.get(name, True):
        return
    if tree is None and (root.is_folder() or root.name.lower().endswith((*ZIP, *TARS))):
        tree = tree_of(root)
    there = f"has {tree.summary()}" if tree is not None else "is a file"
    raise ValueError(f"--format {name}: needs {NEEDS[name]}; --source {root} {there}")


def _refuse_options(form: str, options: Options) -> None:
    """Raises ValueError for what a form of fixed parts and labels has no use for."""
    for name in ("labels", "image_column", "label_column", "label_pattern", "config", "val_fraction"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {form} has parts and labels of its own; leave it out")


def _tree(root: StoragePath) -> Tree:
    if root.is_folder() or root.name.lower().endswith((*ZIP, *TARS, *PACKED_TARS)):
        return tree_of(root)
    if root.name.endswith(TABLED):
        return parquet.single(root)
    raise ValueError(f"--source {root}: is neither a folder nor a zip, tar, Parquet or Arrow file")
