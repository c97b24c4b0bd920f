"""Which part of a source is for training and which for validation: by the names of folders and files, or by lot."""

import hashlib
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from orchestrator.base.shown import count_of
from orchestrator.data.sources import near
from orchestrator.data.sources.listing import SMALL, Entry, Say

VAL_FRACTION = 0.2
DRAWN = "of every class is for validation, by seed"  # in the line about it
WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# a word by itself: train, Training, train2017, seg_train, training_set, imagenet-val-0001.tar; not values or trainers
IN_NAME = {
    split: re.compile(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?![a-z])", re.IGNORECASE) for split, words in WORDS.items()
}
MANY = 20_000  # images: so many take so long that it is said
ACROSS = 2_000  # images: more are compared only where it decides on which side they are
HASHED_BYTES = 2**31  # of files whose sizes are equal; more are not compared


def split_of_name(name: str) -> str | None:
    """train, val or test, by one part of a path; None if it says nothing."""
    return next((split for split, pattern in IN_NAME.items() if pattern.search(name)), None)


def split_of_path(path: str) -> str | None:
    """By the last part of a path that says one."""
    return next((split for part in reversed(PurePosixPath(path).parts) if (split := split_of_name(part))), None)


def draw_val(entries: list[Entry], fraction: float, seed: int, say: Say = lambda line: None) -> dict[str, list[Entry]]:
    """Of every class this fraction for validation, at least one of two or more; the same ones whenever seed, fraction
    and files are the same. Files of a class with the same content stay together, and so do near-duplicates; a group of
    more than are wanted is for training. Where every class has one image, they are drawn from all of them: the classes
    that are drawn then have no training images."""
    twins = _same_content(_by_size(entries).values()) or {}
    alike = _near_duplicates(entries, say)
    chosen: set[int] = set()
    for label, positions in near.by_class(entries).items():
        groups: dict[str, list[Entry]] = defaultdict(list)
        for position in positions:
            entry = entries[position]
            groups[alike.get(entry.id) or twins.get(entry.id, f"alone {entry.id}")].append(entry)
        order = np.random.default_rng([seed, label]).permutation(len(groups))
        wanted = max(1, round(fraction * len(positions))) if len(groups) > 1 else 0
        listed = list(groups.values())
        chosen |= {entry.id for entry in _drawn([listed[number] for number in order], wanted)}
    if not chosen and len(entries) > 1:
        wanted = max(1, round(fraction * len(entries)))
        order = np.random.default_rng(seed).permutation(len(entries))[:wanted]
        chosen = {entries[number].id for number in order}
    return {
        "train": [entry for entry in entries if entry.id not in chosen],
        "val": [entry for entry in entries if entry.id in chosen],
    }


def _drawn(groups: list[list[Entry]], wanted: int) -> list[Entry]:
    """About so many entries of the first groups, whole ones: a larger group only if there is no other. The last group
    is for training."""
    found: list[Entry] = []
    for group in groups[:-1]:
        if len(found) + len(group) <= wanted:
            found += group
    if wanted and not found:
        found = min(groups, key=len)
    return found


def _near_duplicates(entries: list[Entry], say: Say) -> dict[int, str]:
    """For entries that have near-duplicates in their class: a name of these. A line for what was or was not found."""
    if not all(map(near.is_here, entries)):
        say("bursts and copies that were resized or compressed anew are not looked for in object storage")
        return {}
    if len(entries) > near.MAX_IMAGES:
        say(f"bursts and resized copies are not looked for: that is done of up to {near.MAX_IMAGES:,} images")
        return {}
    if (here := near.num_bytes(entries)) > near.MAX_BYTES:
        most = near.MAX_BYTES // 10**9
        say(f"bursts and resized copies are not looked for: that is done of up to {most} GB, here are {here / 1e9:.0f}")
        return {}
    if len(entries) >= MANY:
        say(f"near-duplicates are looked for among {len(entries):,} images")
    looks = near.looks(entries)
    names: dict[int, str] = {}
    alike, too_many = 0, 0  # classes
    for positions in near.by_class(entries).values():
        groups = near.groups([looks[position] for position in positions])
        if groups is None:
            too_many += 1
            continue
        if len(positions) > 1 and len(set(groups)) == 1:
            alike += 1
            continue
        size = Counter(groups)
        for position, group in zip(positions, groups, strict=True):
            if size[group] > 1:
                names[entries[position].id] = f"near {entries[positions[group]].id}"
    if names:
        say(f"{len(names)} images are near-duplicates of others of their class: each such group is on one side")
    if alike:
        classes = count_of(alike, "class", "classes")
        say(f"the images of {classes} are all near-duplicates of each other, and are drawn one by one")
    if too_many:
        classes = count_of(too_many, "class", "classes")
        say(f"the images of {classes} are too much alike for near-duplicates to be told, and are drawn one by one")
    if unseen := looks.count(None):
        images = count_of(unseen, "image is", "images are")
        say(f"{images} not compared with others: only what is {SMALL} pixels a side or more can be")
    return names


def with_val_drawn(
    train: list[Entry], say: Say, val_fraction: float | None, seed: int, where: str = ""
) -> dict[str, list[Entry]]:
    """`draw_val`, and a line about it. val_fraction: the user's; None: there is no part for validation."""
    fraction = val_fraction or VAL_FRACTION
    why = "as --val-fraction says" if val_fraction else "there is no part for it; --val-fraction changes that"
    say(f"{where}{fraction:g} {DRAWN} {seed}: {why}")
    return draw_val(train, fraction, seed, say)


def into_two(
    parts: Mapping[str, list[Entry]],
    say: Say,
    val_fraction: float | None,
    seed: int,
    left_out: list[tuple[str, str]],
) -> dict[str, list[Entry]]:
    """Images of the parts train, val, test and "", which is none of them, as train and val. What belongs to neither is
    said and added to `left_out`."""
    train, val, test = [*parts["train"], *parts[""]], parts["val"], parts["test"]
    if not val and test and val_fraction is None:
        say(f"the test part ({count_of(len(test), 'image')}) is used as val: there is no other")
        val, test = test, []
    unused = [*val, *test] if val_fraction is not None else test
    if unused:
        rule = "a part that is neither for training nor for validation"
        are = count_of(len(unused), "image is", "images are")
        say(f"{are} left out, such as {unused[0].name}: {rule}")
        left_out += [(entry.name, rule) for entry in unused]
    if val and val_fraction is None:
        return {"train": train, "val": val}
    return with_val_drawn(train, say, val_fraction, seed)


def in_both(splits: dict[str, list[Entry]]) -> list[tuple[Entry, Entry]] | None:
    """Pairs of a training and a validation image of the same content; None if too much would have to be read."""
    of_train, of_val = (_by_size(splits[split]) for split in ("train", "val"))
    shared = [[*of_train[size], *of_val[size]] for size in of_train.keys() & of_val.keys()]
    twins = _same_content(shared)
    if twins is None:
        return None
    first = {twins[entry.id]: entry for entry in reversed(splits["train"]) if entry.id in twins}
    return [(first[twins[entry.id]], entry) for entry in splits["val"] if twins.get(entry.id) in first]


def near_in_both(splits: dict[str, list[Entry]]) -> list[tuple[Entry, Entry]] | None:
    """Pairs of a training image and a validation image that is nearly the same; None where it would take long."""
    train, val = splits["train"], splits["val"]
    if len(train) + len(val) > ACROSS or not all(map(near.is_here, [*train, *val])):
        return None
    found = near.pairs(near.looks(train), near.looks(val))
    if found is None:
        return None
    return [(train[at], val[position]) for position, at in found.items()]


def _by_size(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """Entries that are files of this machine, by their size; not ranges of archives, rows and remote files."""
    by_size: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.path is None or entry.start is not None or entry.row is not None or "://" in entry.path:
            continue
        try:
            found = os.stat(entry.path)
        except OSError:
            continue  # it is named when it is read
        if stat.S_ISREG(found.st_mode) and found.st_size:  # to open a pipe would wait for ever
            by_size[found.st_size].append(entry)
    return by_size


def _same_content(groups: Iterable[list[Entry]]) -> dict[int, str] | None:
    """For entries of groups of one size that are not the only ones of their content: a name of it. None if that would
    take the reading of more than HASHED_BYTES."""
    alike = [group for group in groups if len(group) > 1]
    sizes = (os.stat(group[0].path or "").st_size * len(group) for group in alike)
    if sum(sizes) > HASHED_BYTES:
        return None
    by_hash: dict[str, list[Entry]] = defaultdict(list)
    for group in alike:
        for entry in group:
            try:
                with open(entry.path or "", "rb") as file:
                    by_hash[hashlib.file_digest(file, "sha256").hexdigest()].append(entry)
            except OSError:
                continue
    return {entry.id: name for name, found in by_hash.items() if len(found) > 1 for entry in found}


def renumbered(splits: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """With ids from 0 on, train first."""
    numbers = iter(range(sum(map(len, splits.values()))))
    return {split: [replace(entry, id=next(numbers)) for entry in splits[split]] for split in ("train", "val")}
