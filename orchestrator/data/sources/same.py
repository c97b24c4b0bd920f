"""Images of the same content, and nearly the same, in both parts of a source."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from alexnet.images import NotAnImage
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StorageError
from orchestrator.data.sources import near
from orchestrator.data.sources.listing import Entry, Say, read

ACROSS = 2_000  # images: more are compared by their pixels only where it decides on which side they are
HASHED_BYTES = 2**31  # of images whose sizes are equal; more are not read for this alone
TOO_MUCH = f"more than {HASHED_BYTES / 1e9:.1f} GB, of images whose sizes are equal, would have to be read"

Pairs = list[tuple[Entry, Entry]]  # of train and val


def inspected(splits: Mapping[str, list[Entry]], say: Say, progress: Say, blind: str) -> list[str]:
    """Warnings of images that are in both parts of a source that has these parts. `say` gets lines about what was not
    compared; blind: why pixels are not to be, if they are not."""
    train, val = splits["train"], splits["val"]
    every = [*train, *val]
    sizes = [{_size(entry) for entry in split} for split in (train, val)]
    groups = [group for size, group in _by_size(every).items() if size in sizes[0] & sizes[1]]
    rows = {entry.id for entry in every if entry.row is not None}
    nearly: dict[int, int] | None = None
    twins: dict[int, str] | None
    if len(every) <= ACROSS and not blind and not near.refusal(every):
        looks, digests = near.looks(every, rows | {entry.id for group in groups for entry in group}, progress)
        if line := near.unseen(every, looks):
            say(line)
        nearly, twins = near.pairs(looks[: len(train)], looks[len(train) :]), named(digests)
        rows = set()
    else:
        twins = contents(groups)
    lost = len(rows) + sum("://" in (entry.path or "") and entry.row is None for entry in every)
    if lost:
        say(f"copies in both parts are not looked for among rows of tables and in object storage: {lost:,} images")
    found = []
    if twins is None:
        found.append(f"whether photographs are in both parts was not looked for: {TOO_MUCH}")
    if nearly is None:
        say(
            "bursts and resized copies in both parts are not looked for: that is done of up to "
            f"{ACROSS:,} local images, unless all are much alike" + f"; their look ended early: {blind}" * bool(blind)
        )
    found += conflicts(every, twins or {})
    both = pairs(train, val, twins or {})
    return found + lines(both, [(train[at], val[position]) for position, at in (nearly or {}).items()])


def conflicts(entries: Iterable[Entry], twins: Mapping[int, str]) -> list[str]:
    """A warning of images of the same content in several classes. twins: names of contents, by id."""
    by_content: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.id in twins:
            by_content[twins[entry.id]].append(entry)
    found = [of for of in by_content.values() if len({entry.label for entry in of}) > 1]
    if not found:
        return []
    first = found[0][0]
    other = next(entry for entry in found[0] if entry.label != first.label)
    images = count_of(len(found), "image is in several classes", "images are in several classes")
    return [f"{images}, such as {first.name} and {other.name}, which are the same: one of their labels is wrong"]


def lines(both: Pairs, nearly: Pairs) -> list[str]:
    """Warnings of pairs that are the same, and of pairs that are nearly the same and not among them."""
    found = []
    if both:
        first, second = both[0]
        images = count_of(len(both), "validation image is a training image", "validation images are training images")
        found.append(f"{images}, too: {second.name} is {first.name}; errors on such images say nothing about new ones")
    known = {entry.id for _, entry in both}
    if others := [pair for pair in nearly if pair[1].id not in known]:
        first, second = others[0]
        images = count_of(len(others), "validation image is", "validation images are")
        found.append(
            f"{images} nearly the same as training images, such as {second.name} and {first.name}: bursts, or copies; "
            "errors on such images say little about new ones"
        )
    return found


def pairs(train: Sequence[Entry], val: Sequence[Entry], twins: Mapping[int, str]) -> Pairs:
    """Pairs of a training and a validation image of the same content. twins: names of contents, by id."""
    first = {twins[entry.id]: entry for entry in reversed(train) if entry.id in twins}
    return [(first[twins[entry.id]], entry) for entry in val if twins.get(entry.id) in first]


def of_one_size(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Groups of two or more that may have the same content."""
    return [group for group in _by_size(entries).values() if len(group) > 1]


def contents(groups: Sequence[list[Entry]]) -> dict[int, str] | None:
    """For entries of groups of one size that are not the only ones of their content: a name of it. None if that would
    take the reading of more than HASHED_BYTES."""
    if sum((_size(group[0]) or 0) * len(group) for group in groups) > HASHED_BYTES:
        return None
    digests = {}
    for group in groups:
        for entry in group:
            try:
                digests[entry.id] = hashlib.sha256(read(entry)).hexdigest()
            except (NotAnImage, StorageError):
                continue  # it is named when it is prepared
    return named(digests)


def named(digests: Mapping[int, str]) -> dict[int, str]:
    """The digests that several ids have."""
    by_digest: dict[str, list[int]] = defaultdict(list)
    for number, digest in digests.items():
        by_digest[digest].append(number)
    return {number: digest for digest, found in by_digest.items() if len(found) > 1 for number in found}


def _by_size(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    by_size: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        if size := _size(entry):
            by_size[size].append(entry)
    return by_size


def _size(entry: Entry) -> int | None:
    """Bytes of an image that is at hand: a file of this machine, a range of one, or the bytes; None of others."""
    if entry.data is not None:
        return len(entry.data)
    if entry.path is None or entry.row is not None or "://" in entry.path:
        return None
    if entry.start is not None:
        return entry.length
    try:
        found = os.stat(entry.path)
    except OSError:
        return None  # it is named when it is read
    return found.st_size if stat.S_ISREG(found.st_mode) else None  # to open a pipe would wait for ever
