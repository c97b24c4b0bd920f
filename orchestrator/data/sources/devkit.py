"""ImageNet's metadata: the names of its classes in words, and the labels of its validation images.

The devkit of ILSVRC2012 (as an archive, or unpacked) numbers the classes in an order of its own; its meta.mat maps the
numbers to WordNet ids. Kaggle's copy has LOC_synset_mapping.txt and LOC_val_solution.csv instead.
"""

import csv
import gzip
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from orchestrator.base.shown import quoted
from orchestrator.base.storage import StoragePath
from orchestrator.data import sandbox

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "data", "")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
SOLUTION = "LOC_val_solution.csv"
WORDS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
MAX_BYTES = 2**26  # of a file in a small archive: twice the largest real one
MAX_ARCHIVE_BYTES = 2**29  # of a small archive, unpacked
MAX_META_BYTES = 2**24  # the real one has less than a megabyte
META_SECONDS = 30  # the real one takes less than one
MAX_MEMBER_BYTES = 2**60  # beyond it are numbers that no seek takes
AGAIN = "; download it again"  # where a file may have been cut off or damaged on its way
BEGINS = {"gzip": b"\x1f\x8b", "mat": b"MATLAB"}
MAX_HEADER_BYTES = 2**16  # of a member's long name or extended header


@dataclass(frozen=True)
class Synsets:
    """ImageNet's classes, by WordNet id."""

    words: dict[str, str]
    ids: dict[int, str] = field(default_factory=dict)  # WordNet ids, by the devkit's numbers

    def in_words(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """The names of these classes; none unless all of them are known."""
        return tuple(self.words[name] for name in classes) if all(name in self.words for name in classes) else ()


@dataclass(frozen=True)
class Truth:
    """Labels of the images of a flat val/, by the stem of their names."""

    where: str
    label_of: dict[str, int]

    def label(self, name: str) -> int | None:
        """None of an image that has none."""
        return self.label_of.get(PurePosixPath(name).stem)

    def rejection(self, name: str) -> tuple[str, str]:
        """(name, reason) of an image that has no label."""
        return f"val/{name}", f"has no label in {self.where}"

    def absent(self, names: list[str]) -> list[tuple[str, str]]:
        """(name, reason) of the images that have a label and are not among these."""
        missing = sorted(self.label_of.keys() - {PurePosixPath(name).stem for name in names})
        return [(f"val/{stem}", f"missing, though {self.where} lists it") for stem in missing]


def find_synsets(root: StoragePath) -> Synsets:
    """From the devkit, or a list of words; empty if there is neither. Raises ValueError for a damaged one."""
    found = _devkit_file(root, META)
    if found is not None:
        return read_meta(found[1], found[0])
    for name in WORDS:
        place = root / name
        if place.size():
            lines = [line.split(None, 1) for line in place.read().decode("utf-8", "replace").splitlines()]
            return Synsets({wnid: words.strip() for wnid, words in (line for line in lines if len(line) == 2)})
    return Synsets({})


def find_truth(root: StoragePath, label_of_class: dict[str, int], synsets: Synsets) -> Truth:
    """From LOC_val_solution.csv or the devkit. Raises ValueError if there is neither, or the classes differ."""
    solution = root / SOLUTION
    if solution.size():
        text = solution.read().decode("utf-8", "replace")
        rows = [row for row in csv.reader(io.StringIO(text)) if len(row) >= 2 and row[0] != "ImageId"]
        named = {row[0]: (row[1].split() or [""])[0] for row in rows}
        return _truth(solution, named, label_of_class)
    found = _devkit_file(root, GROUND_TRUTH)
    if found is None or not synsets.ids:
        raise ValueError(
            f"--source {root}: val/ is flat, so its labels must come from {DEVKIT} or {SOLUTION}; put one of them "
            "into that folder"
        )
    where, data = found
    try:
        numbers = [int(line) for line in data.decode().split()]
        named = {f"ILSVRC2012_val_{i:08d}": synsets.ids[number] for i, number in enumerate(numbers, start=1)}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where}: {error} is not the number of a class in {META}: they are of two devkits") from None
    return _truth(where, named, label_of_class)


def read_meta(data: bytes, where: object) -> Synsets:
    """The devkit's meta.mat. Raises ValueError if it cannot be read as one."""
    if len(data) > MAX_META_BYTES:
        raise ValueError(f"{where}: has {len(data)} bytes, more than any {META}: not genuine")
    try:
        rows = json.loads(sandbox.run(_meta_rows, data, seconds=META_SECONDS))
    except sandbox.Refused as reason:
        again = AGAIN if data.startswith(BEGINS["mat"]) or not data else ""
        raise ValueError(f"{where}: cannot be read as the devkit's {META} ({reason}){again}") from None
    leaves = [row for row in rows if row[3] == 0]
    return Synsets({wnid: words for _, wnid, words, _ in leaves}, {number: wnid for number, wnid, _, _ in leaves})


def _meta_rows(data: bytes) -> bytes:
    """Number, WordNet id, words and number of children of each synset, as JSON; run in the sandbox."""
    import scipy.io

    synsets = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    rows = [(int(s["ILSVRC2012_ID"]), str(s["WNID"]), str(s["words"]), int(s["num_children"])) for s in synsets]
    return json.dumps(rows).encode()


class BoundedTarInfo(tarfile.TarInfo):
    """A member of an archive whose size is one, and whose long names and extended headers are of a sensible size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*extended, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"an extended header of {self.size} bytes")  # read whole by tarfile
        stated = self.size
        found: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        for size in (stated, found.size):  # an extended or a sparse header may state another
            if not 0 <= size <= MAX_MEMBER_BYTES:
                raise tarfile.HeaderError(f"a member of {size} bytes")
        return found


def refuse_unsafe(member: tarfile.TarInfo, archive: object) -> None:
    """Raises ValueError for a member outside its archive. Nothing is unpacked, but no genuine archive has one."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{archive}: member {quoted(member.name)} has an absolute or parent path")
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{archive}: member {quoted(member.name)} is a link or device, not a file")


def read_small_archive(archive: StoragePath, wanted: set[str]) -> dict[str, bytes]:
    """The wanted files of a gzipped archive that fits in memory, by file name. Raises ValueError if it is damaged."""
    found = {}
    if (archive.size() or 0) > MAX_ARCHIVE_BYTES:
        raise ValueError(f"{archive}: has more than {MAX_ARCHIVE_BYTES} bytes: not genuine")
    try:
        data = archive.read()
    except OSError as error:
        raise ValueError(f"{archive}: cannot be read: {error.strerror or error}") from None
    try:
        # whole, because tarfile would not read on to the checksum at the end
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            unpacked = packed.read(MAX_ARCHIVE_BYTES + 1)
        if len(unpacked) > MAX_ARCHIVE_BYTES:
            raise ValueError(f"{archive}: unpacks to more than {MAX_ARCHIVE_BYTES} bytes: not genuine")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:", tarinfo=BoundedTarInfo) as tar:
            for member in tar:
                refuse_unsafe(member, archive)
                name = PurePosixPath(member.name).name
                if member.isreg() and name in wanted:
                    if member.size > MAX_BYTES:
                        raise ValueError(
                            f"{archive}: member {quoted(member.name)} has {member.size} bytes: not genuine"
                        )
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, RecursionError) as error:
        if data and not data.startswith(BEGINS["gzip"]):
            raise ValueError(f"{archive}: is not a gzipped tar: {error}") from None
        again = AGAIN if not data or not isinstance(error, tarfile.TarError | RecursionError) else ""
        raise ValueError(f"{archive}: damaged: {error}{again}") from None
    return found


def _devkit_file(root: StoragePath, name: str) -> tuple[StoragePath, bytes] | None:
    """The place and the content of a file of the devkit, packed or unpacked; None if there is none."""
    archive = root / DEVKIT
    if archive.size():
        data = read_small_archive(archive, {name}).get(name)
        if data is None:
            raise ValueError(f"{archive}: has no {name}, which the published one has")
        return archive / name, data
    for folder in DEVKIT_FOLDERS:
        place = (root / folder / name) if folder else root / name
        if place.size():
            return place, place.read()
    return None


def _truth(where: StoragePath, named: dict[str, str], label_of_class: dict[str, int]) -> Truth:
    for stem, wnid in named.items():
        if wnid not in label_of_class:
            raise ValueError(f"{where}: {stem} is of class {quoted(wnid)}, which is not in train")
    return Truth(str(where), {stem: label_of_class[wnid] for stem, wnid in named.items()})
