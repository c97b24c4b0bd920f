"""Near-duplicates among photographs: bursts, and copies that were compressed or resized anew.

An image is looked at in gray, at 9x8 and at 16x16 pixels. Two are near-duplicates if few bits of their difference
hashes differ (of the 9x8 pixels, whether each is darker than its right neighbour) and their 16x16 pixels correlate. By
the hash alone 0.016 % of pairs of unlike photographs of one class would be, by both none of 7 million (docs/data.md).
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alexnet.images import NotAnImage, decode_gray
from orchestrator.base.environment import num_cpus
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.data.sources.listing import SMALL, Entry, Say, read

MAX_IMAGES = 200_000  # more are not looked at
MAX_BYTES = 10 * 10**9  # nor more of these: some minutes of CPU, within the limits of the process that lists (apart.py)
DECODED = 32  # pixels a side at least, of a JPEG at a fraction of its size
MAX_BITS = 10  # of 64, which may differ
MIN_CORRELATION = 0.95
MAX_CANDIDATES = 100  # pairs for each image by the hash: more are of a class whose images are all alike, such as X-rays
RULES = (1, DECODED, MAX_BITS, MIN_CORRELATION, MAX_CANDIDATES, SMALL)  # change the first with what is computed
AT_A_TIME = 256  # images in memory
OF_A_THREAD = 16  # of them, that a thread looks at in a turn
CORRELATED = 4096  # pairs at a time
FIRST_S, EVERY_S = 3.0, 10.0  # between lines of progress
PAIRS = 2**22  # hashes that are compared at a time


@dataclass(frozen=True, slots=True)
class Look:
    """An image as it is compared."""

    bits: int  # 64, its difference hash
    pixels: NDArray[np.float32]  # (256,), of mean 0 and length 1


def is_here(entry: Entry) -> bool:
    """Whether it can be read without a request."""
    return entry.data is not None or (entry.path is not None and "://" not in entry.path)


def look(data: bytes) -> Look | None:
    """None of what is no image, smaller than SMALL a side, or of one colour."""
    import PIL.Image

    try:
        gray, shorter = decode_gray(data, DECODED)
    except Exception:  # whatever a plugin raises: it is named when the image is prepared
        return None
    if shorter < SMALL:
        return None
    image = PIL.Image.fromarray(gray)
    rows = np.asarray(image.resize((9, 8), PIL.Image.Resampling.BOX))
    pixels = np.asarray(image.resize((16, 16), PIL.Image.Resampling.BOX), np.float32).ravel()
    pixels = pixels - pixels.mean()
    length = float(np.linalg.norm(pixels))
    if not length:
        return None
    bits = np.packbits(rows[:, 1:] > rows[:, :-1]).tobytes()
    return Look(int.from_bytes(bits), pixels / np.float32(length))


def num_bytes(entries: Sequence[Entry]) -> int:
    """What has to be read to look at them: of archives their members, of tables the whole file."""
    ranges = sum(entry.packed or entry.length or 0 for entry in entries if entry.start is not None)
    files = {entry.path for entry in entries if entry.start is None and entry.path is not None}
    return ranges + sum(StoragePath(path).size() or 0 for path in files)


def refusal(entries: Sequence[Entry]) -> str:
    """Why they are not looked at, a line; empty if they are."""
    if not all(map(is_here, entries)):
        return "bursts and copies that were resized or compressed anew are not looked for in object storage"
    if len(entries) > MAX_IMAGES:
        return f"bursts and resized copies are not looked for: that is done of up to {MAX_IMAGES:,} images"
    if (here := num_bytes(entries)) > MAX_BYTES:
        most = f"up to {MAX_BYTES // 10**9} GB, here are {here / 1e9:.0f}"
        return f"bursts and resized copies are not looked for: that is done of {most}"
    return ""


def looks(
    entries: Sequence[Entry], hashed: Set[int] = frozenset(), progress: Say = lambda line: None
) -> tuple[list[Look | None], dict[int, str]]:
    """Of every entry, in their order, and the digests of those whose ids are `hashed`; by as many threads as there are
    CPUs, each file read once. `progress` gets a line now and then. Raises StorageError."""
    found: list[Look | None] = []
    digests: dict[int, str] = {}

    def of(some: Sequence[Entry]) -> list[tuple[Look | None, str | None]]:
        return [_seen(entry, entry.id in hashed) for entry in some]

    said = time.monotonic() - EVERY_S + FIRST_S
    with ThreadPoolExecutor(num_cpus()) as pool:
        for first in range(0, len(entries), AT_A_TIME):
            # rows of Parquet files come from a cache that threads must not share
            some = [_with_data(entry) for entry in entries[first : first + AT_A_TIME]]
            parts = [some[at : at + OF_A_THREAD] for at in range(0, len(some), OF_A_THREAD)]
            seen = [each for part in pool.map(of, parts) for each in part]
            found += [one for one, _ in seen]
            digests |= {entry.id: digest for entry, (_, digest) in zip(some, seen, strict=True) if digest}
            if time.monotonic() - said > EVERY_S:
                said = time.monotonic()
                progress(f"near-duplicates: {len(found):,} of {len(entries):,} images are looked at")
    return found, digests


def unseen(entries: Sequence[Entry], all_looks: Sequence[Look | None]) -> str:
    """A line about those that were not compared; empty if all were."""
    names = [entry.name for entry, one in zip(entries, all_looks, strict=True) if one is None]
    if not names:
        return ""
    images = f"{count_of(len(names), 'image is', 'images are')} not compared with others"
    named = f"{images}, the first of them {names[0]}" if len(names) > 1 else f"{images}, {names[0]}"
    return f"{named}: unreadable, smaller than {SMALL} pixels a side, or of one colour"


def _seen(entry: Entry, hashed: bool) -> tuple[Look | None, str | None]:
    try:
        data = read(entry)
    except NotAnImage:
        return None, None
    return look(data), hashlib.sha256(data).hexdigest() if hashed and data else None


def _with_data(entry: Entry) -> Entry:
    if entry.row is None:
        return entry
    try:
        return replace(entry, data=read(entry), row=None)
    except NotAnImage:
        return replace(entry, data=b"", row=None)


def groups(all_looks: Sequence[Look | None]) -> list[int] | None:
    """The group of each: of near-duplicates of near-duplicates one, named by its first; of others their own position.
    None if far too many are alike, by the hash, to be copies."""
    at = [i for i, one in enumerate(all_looks) if one is not None]
    group = list(range(len(all_looks)))
    known = [one for one in all_looks if one is not None]
    budget = MAX_CANDIDATES * len(known)
    for left, right in _candidates(known, known):
        keep = right > left
        left, right = left[keep], right[keep]
        budget -= len(left)
        if budget < 0:
            return None
        for i, j in _correlated(known, known, left, right):
            a, b = _first(group, at[i]), _first(group, at[j])
            group[max(a, b)] = min(a, b)
    return [_first(group, i) for i in range(len(group))]


def pairs(
    train: Sequence[Look | None],
    val: Sequence[Look | None],
    labels: tuple[Sequence[int], Sequence[int]] | None = None,
) -> dict[int, int] | None:
    """For positions in val of near-duplicates of images in train: the position of the first of those. labels, of train
    and val: only pairs of unlike ones count. None as in `groups`."""
    at_train = [i for i, one in enumerate(train) if one is not None]
    at_val = [i for i, one in enumerate(val) if one is not None]
    known_train = [one for one in train if one is not None]
    known_val = [one for one in val if one is not None]
    found: dict[int, int] = {}
    budget = MAX_CANDIDATES * (len(known_train) + len(known_val))
    label_train, label_val = map(np.array, labels or (range(len(train)), range(-len(val), 0)))
    label_train, label_val = label_train[at_train], label_val[at_val]
    for left, right in _candidates(known_val, known_train):
        keep = label_val[left] != label_train[right]
        left, right = left[keep], right[keep]
        budget -= len(left)
        if budget < 0:
            return None
        for i, j in _correlated(known_val, known_train, left, right):
            found[at_val[i]] = min(at_train[j], found.get(at_val[i], at_train[j]))
    return dict(sorted(found.items()))


def _first(group: list[int], i: int) -> int:
    while group[i] != i:
        group[i] = group[group[i]]
        i = group[i]
    return i


def _candidates(some: list[Look], others: list[Look]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Positions of pairs whose hashes differ in few bits, some at a time."""
    left, right = (np.array([one.bits for one in found], np.uint64) for found in (some, others))
    step = max(1, PAIRS // max(1, len(right)))
    for first in range(0, len(left), step):
        distance = np.bitwise_count(left[first : first + step, None] ^ right[None])
        i, j = np.nonzero(distance <= MAX_BITS)
        yield i + first, j


def _correlated(
    some: list[Look], others: list[Look], left: NDArray[np.int64], right: NDArray[np.int64]
) -> Iterable[tuple[int, int]]:
    for first in range(0, len(left), CORRELATED):
        at, to = left[first : first + CORRELATED], right[first : first + CORRELATED]
        products = np.einsum("pi,pi->p", [some[i].pixels for i in at], [others[j].pixels for j in to])
        alike = products >= MIN_CORRELATION
        yield from zip(at[alike].tolist(), to[alike].tolist(), strict=True)


def by_class(entries: Sequence[Entry]) -> dict[int, list[int]]:
    """Positions of the entries of each label."""
    found: dict[int, list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        found[entry.label].append(position)
    return dict(sorted(found.items()))
