"""What is in a source: the files of a folder, or the members of a zip or tar, without those that are no one's data."""

import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from alexnet.images import NotAnImage
from orchestrator.base.shown import count_of, quoted, shown
from orchestrator.base.storage import StoragePath
from orchestrator.data.shards import MANIFEST, SHEETS, UNFINISHED
from orchestrator.data.sources.devkit import AGAIN, MAX_BYTES
from orchestrator.data.sources.ilsvrc import members
from orchestrator.data.sources.listing import Entry, read

IMAGES = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "dib", "webp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
    "jp2", "j2k", "avif", "tga", "ico", "pcx", "sgi", "heic", "heif",
))  # fmt: skip
# what lies beside images and is none; a file of any other name, or of none, is looked at
OTHERS = frozenset((
    "xml", "json", "jsonl", "txt", "csv", "tsv", "md", "rst", "html", "htm", "pdf", "db", "ini", "cfg", "yaml",
    "yml", "toml", "py", "ipynb", "sh", "log", "mat", "npy", "npz", "pkl", "pickle", "pt", "pth", "safetensors",
    "h5", "hdf5", "zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "mp4", "mov", "avi", "mkv",
    "webm", "mp3", "wav", "aac", "thm", "doc", "docx", "xls", "xlsx", "ppt", "pptx", "lnk", "url", "sqlite",
    "parquet", "arrow", "tfrecord", "cls", "lock", "sha256", "md5", "info", "xmp", "aae", "psd", "svg",
))  # fmt: skip
ZIP, TARS, PACKED_TARS = (".zip",), (".tar",), (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
JUNK_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__pycache__")
)
JUNK_FILES = re.compile(
    r"(?i)(thumbs|ehthumbs(_vista)?)\.db|desktop\.ini|icon\r|synophoto_.*"
    r"|.*(~|\.(part|crdownload|download|partial|tmp|temp|bak|swp))"
)
SHARD = re.compile(r"(train|val)/shard-\d{5,}\.parquet|" + UNFINISHED + r"/.*")
LINKS_DOWN_TO = 5  # folders deep: a split, or a class, may be a link
LOCAL_HEADER = 30  # bytes of a zip's local header before the name
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
ENCRYPTED = 0x1  # flag of a zip's member
ZIP_BEGINS = b"PK"  # a file that does not is no zip, however often it is downloaded


@dataclass(frozen=True, slots=True)
class Where:
    """Where a file's bytes are: a file, or a range of an archive, deflated if `packed` is given."""

    path: str  # as in StoragePath.text
    start: int | None = None
    length: int | None = None  # bytes of the file itself
    packed: int | None = None  # bytes that it takes in the archive
    crc: int | None = None  # of a zip's member

    def at(self) -> dict[str, Any]:
        """The fields of an Entry that say so."""
        return {
            "path": self.path, "start": self.start, "length": self.length, "packed": self.packed, "crc": self.crc,
        }  # fmt: skip


@dataclass
class Tree:
    """A source's files by their path below it, sorted; `left_out` has (name, rule) of what no reading looks at."""

    name: str
    shown: str  # for messages: the folder or the archive
    files: dict[str, Where]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    root: StoragePath | None = None  # of a folder
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # of labels, that were read, by their paths

    def below(self, prefix: str) -> dict[str, Where]:
        """The files in a folder of it, by their path in that folder."""
        if not prefix:
            return self.files
        return {name[len(prefix) + 1 :]: at for name, at in self.files.items() if name.startswith(prefix + "/")}

    def folders(self, prefix: str = "") -> list[str]:
        """The names of the folders in a folder of it."""
        return sorted({name.partition("/")[0] for name in self.below(prefix) if "/" in name})

    def read(self, name: str) -> bytes:
        """A small file of it. Raises ValueError for one that is not there, or not small."""
        if name not in self.files:
            raise ValueError(f"--source {self.shown}: has no {name}: {self.summary()}")
        at = self.files[name]
        size = (at.length if at.length is not None else StoragePath(at.path).size()) or 0
        if size > MAX_BYTES:
            raise ValueError(f"--source {self.shown}: {name}: {size} bytes are too many for a list of labels")
        try:
            return read(Entry(0, 0, name, **at.at()))
        except NotAnImage as reason:
            raise ValueError(f"--source {self.shown}: {name}: {reason}") from None

    def summary(self) -> str:
        """What is there: files by the ends of their names, and the folders at the top."""
        counts = Counter(extension(name) or "no extension" for name in self.files)
        kinds = ", ".join(f"{count} {'.' * (kind in IMAGES | OTHERS)}{kind}" for kind, count in counts.most_common(5))
        folders = self.folders()
        named = ", ".join(f"{name}/" for name in folders[:8]) + (", ..." if len(folders) > 8 else "")
        return shown(f"{count_of(len(self.files), 'file')} ({kinds or 'none'})" + (f" in {named}" if folders else ""))


def extension(name: str) -> str:
    """In lower case, without the dot."""
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if dot and stem else ""


def may_be_image(name: str) -> bool:
    """Whether a file of this name is looked at as an image."""
    return extension(name) not in OTHERS


def is_junk(name: str, *, folder: bool) -> str | None:
    """The rule by which a name is no one's data: hidden, of a file manager, half a download."""
    if name.startswith("."):
        return "hidden"
    if folder:
        return "made by a file manager" if name in JUNK_FOLDERS else None
    return "made by a file manager or a download" if JUNK_FILES.fullmatch(name) else None


def tree_of(root: StoragePath) -> Tree:
    """Of a folder, a URI, a zip or a tar. Raises ValueError of one line."""
    if root.is_folder():
        tree = Tree(root.name, root.text, {}, root=root)
        if root.local is None:
            _sort_out(tree, ((name, Where((root / name).text)) for name in root.files()))
        else:
            _walk(tree, root.local)
            tree.files = dict(sorted(tree.files.items()))
        _leave_out_shards(tree)
        return tree
    name = root.name.lower()
    if name.endswith(PACKED_TARS):
        raise ValueError(f"--source {root}: a compressed tar has to be unpacked first: tar -xf {root.name}")
    tree = Tree(PurePosixPath(root.name).stem, root.text, {})
    if name.endswith(ZIP):
        _sort_out(tree, zip_members(root))
    elif name.endswith(TARS):
        found = ((member.name, Where(root.text, at, member.size)) for member, at in members(root))
        _sort_out(tree, found)
    return tree


def unpacked(tree: Tree, archives: Iterable[str]) -> Tree:
    """A tree of what these archives of it hold, and of the files beside them: train.zip becomes the folder train,
    unless that is what it holds. Raises ValueError for a name that is there twice."""
    assert tree.root is not None
    archives = list(archives)
    files = {name: at for name, at in tree.files.items() if name not in archives}
    whole = Tree(tree.name, tree.shown, files, list(tree.left_out), tree.root)
    for name in archives:
        inner = tree_of(tree.root / name)
        folder, _, file = name.rpartition("/")
        stem = PurePosixPath(file).stem
        parts = [folder, "" if len(archives) == 1 or inner.folders() == [stem] else stem]
        prefix = "".join(f"{part}/" for part in parts if part)
        for below, at in inner.files.items():
            if whole.files.setdefault(prefix + below, at) is not at:
                raise ValueError(f"--source {tree.shown}: {prefix + below} is there twice, once in {name}; unpack them")
        whole.left_out += [(prefix + below, rule) for below, rule in inner.left_out]
    whole.files = dict(sorted(whole.files.items()))
    return whole


def zip_members(archive: StoragePath) -> Iterable[tuple[str, Where]]:
    """The files of a zip and where they are in it. Raises ValueError for a damaged one, or what cannot be read."""
    try:
        with archive.open() as file, zipfile.ZipFile(file) as found:
            for info in found.infolist():
                if not info.filename:
                    raise ValueError(f"{archive}: is damaged: it has a member without a name{AGAIN}")
                if info.is_dir():
                    continue
                path = PurePosixPath(info.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{archive}: member {quoted(info.filename)} has an absolute or parent path")
                if info.flag_bits & ENCRYPTED:
                    raise ValueError(
                        f"{archive}: member {quoted(info.filename)} is encrypted; unpack the archive first"
                    )
                if info.compress_type not in (STORED, DEFLATED):
                    raise ValueError(
                        f"{archive}: member {quoted(info.filename)} is packed in a way that is not read; unpack it"
                    )
                file.seek(info.header_offset)
                header = file.read(LOCAL_HEADER)
                lengths = struct.unpack("<HH", header[26:30]) if len(header) == LOCAL_HEADER else (0, 0)
                start = info.header_offset + LOCAL_HEADER + sum(lengths)
                packed = info.compress_size if info.compress_type == DEFLATED else None
                yield info.filename, Where(archive.text, start, info.file_size, packed, info.CRC)
    except (
        zipfile.BadZipFile,
        OSError,
        struct.error,
        NotImplementedError,
        RecursionError,
        UnicodeError,
        pa.ArrowException,
    ) as error:  # Arrow's: of a place outside the file
        why: object = error
        if isinstance(error, OSError) and error.errno is not None:  # the system's
            why = error.strerror
        elif not isinstance(error, NotImplementedError) and ZIP_BEGINS.startswith(archive.read_at(0, len(ZIP_BEGINS))):
            why = f"{error}{AGAIN}"
        raise ValueError(f"{archive}: cannot be read as a zip: {why}") from None


def _sort_out(tree: Tree, found: Iterable[tuple[str, Where]]) -> None:
    """Files by name into the tree, without junk; a folder of junk counts once."""
    whole: dict[str, Where] = {}
    junk: dict[str, str] = {}
    for name, at in found:
        parts = PurePosixPath(name).parts
        for i, part in enumerate(parts):
            rule = is_junk(part, folder=i + 1 < len(parts))
            if rule:
                junk["/".join(parts[: i + 1]) + ("/" if i + 1 < len(parts) else "")] = rule
                break
        else:
            whole["/".join(parts)] = at
    tree.files = dict(sorted(whole.items()))
    tree.left_out += sorted(junk.items())


def _leave_out_shards(tree: Tree) -> None:
    """What a preparation has written, or is writing, into a folder below. The source may be shards itself."""
    noted, mark = set(), UNFINISHED + "/"
    for name in tree.files:
        if name.endswith("/" + MANIFEST):
            noted.add(name.removesuffix("/" + MANIFEST))
        elif "/" + mark in name:
            noted.add(name.partition("/" + mark)[0])
    ours = {folder for folder in noted if any(SHARD.fullmatch(name) for name in tree.below(folder))}
    if ours:
        tree.files = {name: at for name, at in tree.files.items() if not any(_is_made(name, of) for of in ours)}
        tree.left_out += [(f"{folder}/", "shards that were prepared") for folder in sorted(ours)]


def _is_made(name: str, folder: str) -> bool:
    """Whether a preparation has made this file in this folder: all there but photographs beside its shards."""
    if not name.startswith(folder + "/"):
        return False
    beside = name.removeprefix(folder + "/")
    return "/" in beside or beside in SHEETS or extension(beside) not in IMAGES


def _walk(tree: Tree, root: Any) -> None:
    """The files below a folder of this machine. Links to folders are followed where a split or a class may be one, and
    never to a folder that holds them."""
    held = [(str(root), "", {os.path.realpath(root)})]  # folders to look at, and the real ones that hold each
    while held:
        folder, below, above = held.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"--source {folder}: cannot be listed: {error.strerror or error}") from None
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or into a folder that is closed
                tree.left_out.append((name, f"cannot be looked at: {error.strerror or error}"))
                continue
            if rule := is_junk(entry.name, folder=is_folder):
                tree.left_out.append((name + "/" * is_folder, rule))
            elif not is_folder:
                tree.files[name] = Where(entry.path)
            elif not entry.is_symlink():
                held.append((entry.path, name, above | {os.path.realpath(entry.path)}))
            elif (real := os.path.realpath(entry.path)) in above:
                tree.left_out.append((name + "/", "a link to a folder that holds it"))
            elif name.count("/") < LINKS_DOWN_TO:
                held.append((entry.path, name, above | {real}))
            else:
                tree.left_out.append((name + "/", "a link to a folder"))
    tree.left_out.sort()
