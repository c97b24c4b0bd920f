"""Folders of image files: train/CLASS/IMAGE and val/CLASS/IMAGE by any of their usual names, or CLASS/IMAGE alone.

val/ may be flat, with a list of its labels. All of it may lie in a zip or a tar.
"""

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.base.shown import count_of, quoted, shown
from orchestrator.data.sources.devkit import Synsets, Truth, find_synsets, find_truth
from orchestrator.data.sources.draw import Draw, with_val_drawn
from orchestrator.data.sources.listing import Entry, Say, Source, sample, stored_size
from orchestrator.data.sources.splits import WORDS, split_of_name, split_of_path
from orchestrator.data.sources.tree import IMAGES, Tree, extension, is_junk, may_be_image

DEPTH = 4  # folders down to where train/ may be
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's labels of val/images/
SHOWN = 3  # names in a line


@dataclass(frozen=True)
class Layout:
    """Which folders hold the classes of each split. `base` is the folder that holds them."""

    base: str
    folders: dict[str, str]  # split: path below the source; without train: the classes are in base itself
    unused: tuple[str, ...] = ()  # splits that are left out


def open_imagefolder(tree: Tree, say: Say, *, draw: Draw) -> Source:
    """Its classes are the sorted folders of the training part that hold images.

    Raises ValueError that says what is there, and what was expected.
    """
    layout = find_layout(tree)
    train = layout.folders.get("train", layout.base)
    in_train = _by_class(tree, train)
    _check_names(tree, train, in_train)
    synsets = find_synsets(tree.root) if tree.root is not None else Synsets({})
    found = _Listing(tree, {name: label for label, name in enumerate(in_train)})
    found.add("train", train, in_train)
    wrong = _empty_classes(tree, train, in_train)
    val = layout.folders.get("val")
    if val is None and draw.fraction is None and (empty := _empty_val(tree, layout.base)):
        raise ValueError(f"--source {tree.shown}: {empty}/ holds no images; remove it to draw them from the others")
    if val is None or draw.fraction is not None:
        if val is not None:
            found.leave_out(val, "--val-fraction draws the validation images from the training images")
        where = f"{train or tree.name}/: "
        splits = with_val_drawn(found.splits["train"], say, draw, where)
    else:
        if split_of_path(val) != "val":
            say(f"{val}/ is used for validation: there is no val/")
        in_val = _by_class(tree, val)
        truth = None if _is_by_class(tree, val) else _truth(tree, val, found.label_of, synsets, say)
        if truth is None:
            unknown = sorted(set(in_val) - set(in_train))
            if unknown:
                raise ValueError(
                    f"--source {tree.shown}: {val}/ has the class {quoted(unknown[0])}, which is not in {train}/; "
                    "rename or remove its folder"
                )
        found.add("val", val, in_val, truth)
        splits = found.splits
    for folder in layout.unused:
        found.leave_out(folder, "a part that is neither for training nor for validation")
        say(f"{folder}/ is left out: it is neither for training nor for validation, or has no labels")
    found.leave_out_rest()
    classes = tuple(in_train)
    size = stored_size(sample(splits["train"]), say)
    return Source(
        tree.name, "imagefolder", classes, splits, image_size=size, class_names=synsets.in_words(classes),
        misplaced=found.misplaced, left_out=[*tree.left_out, *found.left_out], warnings=wrong,
    )  # fmt: skip


class _Listing:
    """Entries of splits, and what became of every other file."""

    def __init__(self, tree: Tree, label_of: dict[str, int]) -> None:
        self.tree, self.label_of = tree, label_of
        self.splits: dict[str, list[Entry]] = {"train": [], "val": []}
        self.misplaced: list[tuple[str, str]] = []
        self.left_out: list[tuple[str, str]] = []
        self.seen: set[str] = set()  # files that are accounted for
        self.next_id = 0

    def add(self, split: str, folder: str, by_class: dict[str, list[str]], truth: Truth | None = None) -> None:
        """The images of a split, by class in the order of the labels."""
        at = self.tree.below(folder)
        names = [name for name in at if may_be_image(name)]
        if truth is not None:
            self.misplaced += truth.absent(names)
        else:
            names.sort(key=lambda name: name.split("/"))
        top = f"{folder}/" if folder else ""
        part = split if folder else ""
        of_name = {below: name for name, files in by_class.items() for below in files}
        for name in names:
            self.seen.add(top + name)
            path = f"{part}/{name}" if part else name
            if not is_utf8(name):
                self.misplaced.append((ascii(path)[1:-1], "the name is not UTF-8"))
                continue
            if truth is None and name not in of_name and extension(name) not in IMAGES:
                self.left_out.append((path, "in no class folder"))
                continue
            label = truth.label(name) if truth else self.label_of.get(of_name.get(name, ""))
            if label is None:
                self.misplaced.append(truth.rejection(name) if truth else (path, "not in a class folder"))
                continue
            self.splits[split].append(Entry(self.next_id, label, path, **at[name].at()))
            self.next_id += 1
        if not self.splits[split]:
            raise ValueError(f"--source {self.tree.shown}: {folder}/ holds no images: {self.tree.summary()}")

    def leave_out(self, folder: str, rule: str) -> None:
        self.left_out.append((folder + "/", rule))
        self.seen |= {f"{folder}/{name}" for name in self.tree.below(folder)}

    def leave_out_rest(self) -> None:
        """Every other file, by its extension, or for lying elsewhere."""
        for name in self.tree.files:
            if name not in self.seen:
                kind = extension(name)
                rule = "in no class folder" if may_be_image(name) else f"not an image by its name: .{kind}"
                self.left_out.append((name, rule))


def find_layout(tree: Tree) -> Layout:
    """Raises ValueError that says what is there, if nothing is like classes of images."""
    named = [name for name in tree.files if extension(name) in IMAGES]
    images = named or [name for name in tree.files if may_be_image(name)]  # a LICENSE is none if there are others
    if not images:
        raise ValueError(f"--source {tree.shown}: has no images: {tree.summary()}; expected folders CLASS/IMAGE")
    folders = _Folders(images)
    for depth in range(DEPTH):
        found = [layout for base in folders.at_depth(depth) if (layout := _splits_in(tree, base, folders)) is not None]
        if len(found) > 1:
            shown = ", ".join(f"{layout.base}/" for layout in found[:SHOWN])
            raise ValueError(f"--source {tree.shown}: holds several data sets, in {shown}; choose one with --source")
        if found:
            return found[0]
    base = _unwrapped(tree, "", folders)
    classes = folders.children(base)
    if len(classes) < 2:
        raise ValueError(_no_classes(tree, base, classes))
    return Layout(base, {})


def has_classes(tree: Tree) -> bool:
    """Whether its folders are like classes of images."""
    try:
        layout = find_layout(tree)
    except ValueError:
        return False
    return len(_by_class(tree, layout.folders.get("train", layout.base))) > 1


def _splits_in(tree: Tree, base: str, folders: "_Folders") -> Layout | None:
    """The splits that the folders in `base` are, if one of them is for training."""
    named: dict[str, list[str]] = defaultdict(list)
    for child in folders.children(base):
        if split := split_of_name(child.rpartition("/")[2]):
            named[split].append(child)
    for split, words in WORDS.items():  # train/ itself before train_masks/
        named[split] = [child for child in named[split] if child.rpartition("/")[2].lower() in words] or named[split]
    if len(named["train"]) > 1 and any(folders.children(child) for child in named["train"]):
        shown = ", ".join(f"{child}/" for child in named["train"][:SHOWN])
        raise ValueError(
            f"--source {tree.shown}: several folders may be for training: {shown}; leave one, or call it train"
        )
    if len(named["train"]) != 1:
        return None
    train = named["train"][0]
    others = [*named["val"], *named["test"]]
    if not others and len(folders.children(train)) < 2 and len(folders.children(base)) > 1:
        return None  # a class that is called train
    found = {"train": _unwrapped(tree, train, folders)}
    val, unused = None, []
    for split in ("val", "test"):
        for folder in named[split]:
            usable = _usable_for_val(tree, folder, folders)
            if val is None and (split == "val" or usable):
                val = folder
            else:
                unused.append(folder)
    if val is not None:
        inside = _unwrapped(tree, val, folders)
        found["val"] = inside if folders.children(inside) else val
    return Layout(base, found, tuple(unused))


def _usable_for_val(tree: Tree, folder: str, folders: "_Folders") -> bool:
    """Whether its images can have labels: a test part often has none."""
    return bool(folders.children(_unwrapped(tree, folder, folders))) or f"{folder}/{ANNOTATIONS}" in tree.files


def _unwrapped(tree: Tree, folder: str, folders: "_Folders") -> str:
    """The folder, or the only folder in it that holds folders of images, and so on."""
    while True:
        children = folders.children(folder)
        if len(children) != 1 or folder in folders or len(folders.children(children[0])) < 1:
            return folder
        if len(folders.children(children[0])) == 1 and children[0] in folders:
            return folder
        folder = children[0]


class _Folders:
    """The folders that hold images directly, and the tree that they are in."""

    def __init__(self, images: list[str]) -> None:
        self.direct = {name.rpartition("/")[0] for name in images}
        self._children: dict[str, set[str]] = defaultdict(set)
        for path in self.direct:
            while path and path not in self._children[path.rpartition("/")[0]]:
                above = path.rpartition("/")[0]
                self._children[above].add(path)
                path = above

    def __contains__(self, folder: str) -> bool:
        return folder in self.direct

    def children(self, folder: str) -> list[str]:
        """The folders in a folder that hold images, directly or below, sorted."""
        return sorted(self._children.get(folder, ()))

    def at_depth(self, depth: int) -> list[str]:
        """The folders so far down that hold others."""
        found = [""]
        for _ in range(depth):
            found = [child for folder in found for child in self.children(folder)]
        return [folder for folder in found if self.children(folder)]


def _by_class(tree: Tree, folder: str) -> dict[str, list[str]]:
    """The images below each folder in a folder, sorted by the name of that folder."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tree.below(folder):
        if "/" in name and may_be_image(name):
            found[name.partition("/")[0]].append(name)
    named = {name: files for name, files in found.items() if any(extension(file) in IMAGES for file in files)}
    return dict(sorted((named or found).items()))  # where some are images by their names, a class has one


def _is_by_class(tree: Tree, folder: str) -> bool:
    if f"{folder}/{ANNOTATIONS}" in tree.files:
        return False
    return bool(_by_class(tree, folder))


def _truth(tree: Tree, val: str, label_of: dict[str, int], synsets: Synsets, say: Say) -> Truth:
    """The labels of a flat val/: Tiny ImageNet's list, the devkit's, Kaggle's."""
    listed = f"{val}/{ANNOTATIONS}"
    if listed in tree.files:
        rows = [line.split("\t") for line in tree.read(listed).decode("utf-8", "replace").splitlines()]
        named = {PurePosixPath(row[0]).stem: row[1] for row in rows if len(row) > 1}
        unknown = sorted(set(named.values()) - label_of.keys())
        if unknown:
            raise ValueError(
                f"--source {tree.shown}: {listed} names the class {quoted(unknown[0])}, which is not in train/"
            )
        truth = Truth(listed, {stem: label_of[name] for stem, name in named.items()})
    elif tree.root is None:
        raise ValueError(f"--source {tree.shown}: {val}/ is flat and has no {ANNOTATIONS}; unpack the archive")
    else:
        truth = find_truth(tree.root, label_of, synsets)
    say(f"{val.rpartition('/')[2]}/ is flat: its labels come from {truth.where}")
    return truth


def _check_names(tree: Tree, train: str, in_train: dict[str, list[str]]) -> None:
    if len(in_train) < 2:
        raise ValueError(_no_classes(tree, train, list(in_train)))
    odd = [name for name in in_train if not is_utf8(name)]
    if odd:
        raise ValueError(f"--source {tree.shown}: the class folder {odd[0]!a} has a name that is not UTF-8")


def _no_classes(tree: Tree, folder: str, classes: list[str]) -> str:
    where = f"{shown(folder)}/ in it" if folder else "it"
    folders = count_of(len(classes), "class folder")
    text = f"--source {tree.shown}: {where} has {folders} of images; a classifier needs at least 2"
    tables = sorted(name for name in tree.files if extension(name) in ("csv", "tsv", "jsonl"))
    if tables:
        return f"{text}; labels in a table are read with --labels {shown(tables[0])}"
    if pattern := guess_pattern([name for name in tree.files if may_be_image(name)]):
        return f"{text}; file names seem to begin with the class, which is read with --label-pattern '{pattern}'"
    return f"{text}; there are {tree.summary()}; expected CLASS/IMAGE, or train/CLASS/IMAGE and val/CLASS/IMAGE"


def guess_pattern(names: list[str]) -> str | None:
    """A pattern that finds from 2 to 1000 classes in most of the names, such as cat.0.jpg or great_pyrenees_12.jpg."""
    pattern = r"^([A-Za-z][A-Za-z_ -]*?)[._ -]*\d+\.\w+$"
    found = [m[1] for name in names if (m := re.match(pattern, name.rpartition("/")[2]))]
    return pattern if len(found) >= 0.9 * len(names) and 2 <= len(set(found)) <= min(1000, len(names) / 2) else None


def _empty_classes(tree: Tree, train: str, in_train: dict[str, list[str]]) -> list[str]:
    """What looks wrong with the folders of the classes."""
    lines = []
    there = {name.partition("/")[0] for name in tree.below(train) if "/" in name} | _empty_folders(tree, train)
    if empty := sorted(there - set(in_train)):
        lines.append(f"{train or tree.name}/{empty[0]}/ holds no images, and is no class" + _more(empty))
    inner_of = {name: {file.split("/")[1] for file in files if file.count("/") > 1} for name, files in in_train.items()}
    nested = [name for name, inner in inner_of.items() if len(inner) > 1]
    if nested:
        name = nested[0]
        shown = ", ".join(sorted(inner_of[name])[:SHOWN])
        lines.append(
            f"the class {name} holds folders, whose images are all of it: {shown}; if those are the classes, give "
            f"--source {tree.shown}/{train + '/' if train else ''}{name}" + _more(nested)
        )
    lines += near_equal(list(in_train))
    return lines


def near_equal(classes: list[str]) -> list[str]:
    """A line for class names that differ in case, spaces or accents alone."""
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        plain = "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if not unicodedata.combining(c))
        by_key[re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", plain.strip())].append(name)
    pairs = [names for names in by_key.values() if len(names) > 1]
    return [f"the classes {' and '.join(map(repr, names))} differ in their spelling alone" for names in pairs[:SHOWN]]


def _empty_val(tree: Tree, base: str) -> str | None:
    """A folder for validation that has no images."""
    if tree.root is None:
        return None
    with_files = set(tree.folders(base))
    children = (tree.root / base if base else tree.root).children()
    empty = (name for name, is_folder in children.items() if is_folder and name not in with_files)
    return next((name for name in empty if split_of_name(name) == "val" and not is_junk(name, folder=True)), None)


def _empty_folders(tree: Tree, train: str) -> set[str]:
    """Folders of the training part without any file."""
    if tree.root is None or tree.root.local is None:
        return set()
    left_out = {name.rstrip("/") for name, _ in tree.left_out}
    prefix = f"{train}/" if train else ""
    children = (tree.root / train if train else tree.root).children()
    return {name for name, is_folder in children.items() if is_folder and prefix + name not in left_out}


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
