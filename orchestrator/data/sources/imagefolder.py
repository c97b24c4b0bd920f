"""Folders of image files: train/CLASS/IMAGE and val/CLASS/IMAGE, or a flat val/ with a list of its labels."""

from orchestrator.base.storage import StoragePath
from orchestrator.data.sources.devkit import find_synsets, find_truth
from orchestrator.data.sources.listing import SAMPLE, SPLITS, Entry, Say, Source, stored_size

BASES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where train/ and val/ may be; the long ones are Kaggle's


def base_of(root: StoragePath) -> StoragePath:
    """The folder that holds train/ and val/."""
    for base in BASES:
        folder = root / base if base else root
        if (folder / "train").is_folder():
            return folder
    return root


def open_imagefolder(root: StoragePath, say: Say = lambda line: None) -> Source:
    """Its classes are the sorted folders of train/.

    Every file below a class folder is an entry, whatever its name: one that is no image is rejected when it is read.
    Raises ValueError naming the folder that is missing or wrong.
    """
    base = base_of(root)
    for split in SPLITS:
        if not (base / split).is_folder():
            raise ValueError(f"--source {root}: has no folder {split}/; expected {base / split}/CLASS/IMAGE")
    classes = tuple(name for name, is_folder in (base / "train").children().items() if is_folder)
    if len(classes) < 2:
        raise ValueError(
            f"--source {base / 'train'}: has {len(classes)} class folder(s); a classifier needs at least 2"
        )
    odd = [name for name in classes if not _is_utf8(name)]
    if odd:
        raise ValueError(f"--source {base / 'train'}: the class folder {odd[0]!a} has a name that is not UTF-8")
    in_val = [name for name, is_folder in (base / "val").children().items() if is_folder]
    unknown = sorted(set(in_val) - set(classes))
    if unknown:
        raise ValueError(f"--source {base / 'val'}: class {unknown[0]!r} is not in train/; rename or remove its folder")
    label_of, synsets = {name: label for label, name in enumerate(classes)}, find_synsets(root)
    splits: dict[str, list[Entry]] = {}
    misplaced: list[tuple[str, str]] = []
    next_id = 0
    for split in SPLITS:
        files = _files(base / split)
        truth = None
        if split == "val" and not in_val and files:
            truth = find_truth(root, label_of, synsets)
            say(f"val/ is flat: its labels come from {truth.where}")
            misplaced += truth.absent(files)
        else:  # by class, in the order of the labels
            files.sort(key=lambda name: name.split("/"))
        entries = splits[split] = []
        for name in files:
            if not _is_utf8(name):
                misplaced.append((ascii(f"{split}/{name}")[1:-1], "the name is not UTF-8"))
                continue
            folder, _, below = name.partition("/")
            label = truth.label(name) if truth else label_of.get(folder) if below else None
            if label is None:
                misplaced.append(truth.rejection(name) if truth else (f"{split}/{name}", "not in a class folder"))
                continue
            entries.append(Entry(next_id, label, f"{split}/{name}", path=(base / split / name).text))
            next_id += 1
        if not entries:
            raise ValueError(f"--source {base / split}: holds no files; expected {base / split}/CLASS/IMAGE")
    words = synsets.in_words(classes)
    size = stored_size(splits["train"][:: -(-len(splits["train"]) // SAMPLE)], say)
    return Source(root.name, "imagefolder", classes, splits, image_size=size, class_names=words, misplaced=misplaced)


def _files(folder: StoragePath) -> list[str]:
    """Paths below the folder. A class may be a link to a folder; links to folders below it are not followed."""
    try:
        if folder.local is None:
            return folder.files()
        found: list[str] = []
        for name, is_folder in folder.children().items():
            found += [f"{name}/{below}" for below in (folder / name).files()] if is_folder else [name]
        return found
    except OSError as error:
        raise ValueError(f"--source {error.filename or folder}: cannot be listed: {error.strerror or error}") from None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
