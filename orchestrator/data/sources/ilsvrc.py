"""The archives of ILSVRC2012 as downloaded: a tar of a thousand tars, a flat tar, and the devkit.

Nothing is unpacked: an entry is a byte range of an archive.
"""

import collections
import hashlib
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from orchestrator.base.shown import quoted
from orchestrator.base.storage import StoragePath
from orchestrator.data.sources.devkit import AGAIN, DEVKIT, BoundedTarInfo, find_synsets, find_truth, refuse_unsafe
from orchestrator.data.sources.listing import Entry, Say, Source

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
WINDOW_BYTES = 2**16  # read at a time from a remote archive: the next header may be near
READERS = 16  # threads that list the inner archives of a remote one
SAY_EVERY = 100  # inner archives
BLOCK = tarfile.BLOCKSIZE
OTHER_FILES = ("invalid header", "bad checksum")  # in tarfile's errors, of what does not begin as a tar does


def open_ilsvrc(root: StoragePath, say: Say = lambda line: None) -> Source:
    """Its classes are the sorted names of train's inner archives. Raises ValueError naming archive and member."""
    for name in (TRAIN, VAL):
        if (root / name).size() is None:
            raise ValueError(f"--source {root}: has no {name}; ILSVRC2012 consists of {TRAIN}, {VAL} and {DEVKIT}")
    say(f"listing {TRAIN} and {VAL}")
    splits: dict[str, list[Entry]] = {"train": [], "val": []}
    misplaced: list[tuple[str, str]] = []
    train, val = root / TRAIN, root / VAL
    inner = sorted((PurePosixPath(member.name).name, start, member.size) for member, start in members(train))
    _refuse_twice(train, [name for name, _, _ in inner])
    wrong = [name for name, _, _ in inner if not name.endswith(".tar")]
    if wrong:
        raise ValueError(f"{train}: member {quoted(wrong[0])} is not the archive of a class, such as n01440764.tar")
    classes = tuple(name.removesuffix(".tar") for name, _, _ in inner)
    for label, found in enumerate(_listings(train, inner, say)):
        for member, at in found:
            shown = f"train/{classes[label]}/{PurePosixPath(member.name).name}"
            entry = Entry(len(splits["train"]), label, shown, path=train.text, start=at, length=member.size)
            splits["train"].append(entry)
    synsets = find_synsets(root)
    truth = find_truth(root, {name: label for label, name in enumerate(classes)}, synsets)
    there = sorted((PurePosixPath(member.name).name, start, member.size) for member, start in members(val))
    names = [name for name, _, _ in there]
    _refuse_twice(val, names)
    for name, start, length in there:
        label_or_none = truth.label(name)
        if label_or_none is None:
            misplaced.append(truth.rejection(name))
            continue
        number = len(splits["train"]) + len(splits["val"])
        splits["val"].append(Entry(number, label_or_none, f"val/{name}", path=val.text, start=start, length=length))
    misplaced += truth.absent(names)
    words = synsets.in_words(classes)
    return Source(root.name, "ilsvrc", classes, splits, class_names=words, misplaced=misplaced)


def _listings(
    train: StoragePath, inner: list[tuple[str, int, int]], say: Say
) -> Iterator[list[tuple[tarfile.TarInfo, int]]]:
    """The members of each inner archive, in order; many are listed at a time if each read is a request."""

    def listing(each: tuple[str, int, int]) -> list[tuple[tarfile.TarInfo, int]]:
        name, start, length = each
        return list(members(train, start, length, f"{train}: {name}"))

    with ThreadPoolExecutor(1 if train.local else READERS) as pool:
        for number, found in enumerate(pool.map(listing, inner), start=1):
            if number % SAY_EVERY == 0:
                say(f"listed {number} of {len(inner)} archives in {train.name}")
            yield found


def _refuse_twice(archive: StoragePath, names: list[str]) -> None:
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{archive}: has two members named {quoted(twice)}, the published one has each once")


def members(
    archive: StoragePath, start: int = 0, length: int | None = None, shown: str | None = None
) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The files in an uncompressed archive, each with the byte of the whole file at which it begins.

    The archive may be a member of another: `length` bytes from `start`, named `shown` in messages. Raises ValueError
    for one that is damaged, truncated or unsafe.
    """
    shown = shown or str(archive)
    if length is None:
        size = archive.size()
        if size is None:
            raise ValueError(f"{shown}: is {archive.special() or 'not there'}, not a file that can be read")
        length = size - start
    window = _Window(archive, start, length)
    try:
        with tarfile.open(fileobj=window, mode="r:", tarinfo=BoundedTarInfo) as tar:  # type: ignore[call-overload]
            for member in tar:
                refuse_unsafe(member, shown)
                if member.offset_data + member.size > window.length:
                    raise ValueError(f"{shown}: truncated in member {quoted(member.name)}{AGAIN}")
                if member.isreg() and not PurePosixPath(member.name).name.startswith("._"):  # macOS's own
                    yield member, start + member.offset_data
            # tarfile takes a damaged header for the end; the true end is a block of zeros
            window.seek(tar.offset)  # type: ignore[attr-defined]
            end = window.read(BLOCK)
    except (tarfile.TarError, RecursionError) as error:  # long names of long names, each a call deeper
        if not start and str(error) in OTHER_FILES:
            raise ValueError(f"{shown}: is not a tar: {error}") from None
        again = AGAIN if isinstance(error, tarfile.ReadError) else ""
        raise ValueError(f"{shown}: damaged: {error}{again}") from None
    if len(end) < BLOCK or end.strip(b"\0"):
        what = "truncated" if len(end) < BLOCK else "damaged: no member's header"
        raise ValueError(f"{shown}: {what} at byte {tar.offset}{AGAIN}")  # type: ignore[attr-defined]


def verify_md5(root: StoragePath, say: Say) -> None:
    """Check the archives against their published checksums. Raises ValueError naming one that differs."""
    present = {name: root / name for name in MD5 if (root / name).size() is not None}
    if root.name in MD5:
        present = {root.name: root}
    if not present:
        raise ValueError(f"--verify: {root} has no archive whose checksum is known, which are {', '.join(MD5)}")
    for name, place in present.items():
        say(f"checking the MD5 of {name}, {(place.size() or 0) / 1e9:.1f} GB")
        digest = hashlib.md5(usedforsecurity=False)
        for data in place.chunks():
            digest.update(data)
        if digest.hexdigest() != MD5[name]:
            raise ValueError(f"{place}: its MD5 is {digest.hexdigest()}, not {MD5[name]}{AGAIN}")


class _Window:
    """A byte range of a file, for tarfile to read as a file."""

    def __init__(self, place: StoragePath, start: int, length: int) -> None:
        self.place, self.start, self.length, self.at = place, start, length, 0
        self.ahead = (0, b"")  # bytes read ahead, and where they begin

    def seek(self, at: int, whence: int = 0) -> int:
        self.at = at + (0, self.at, self.length)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        count = left if size < 0 else min(size, left)
        begin, data = self.ahead
        if not begin <= self.at <= self.at + count <= begin + len(data):
            more = max(count, min(WINDOW_BYTES, left)) if self.place.local is None else count
            begin, data = self.ahead = self.at, self.place.read_at(self.start + self.at, more) if more else b""
        data = data[self.at - begin : self.at - begin + count]
        self.at += len(data)
        return data
