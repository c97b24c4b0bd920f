"""Files and folders, on this machine or in object storage: s3://, gs:// and whatever else pyarrow or fsspec opens.

A path is known by what the user wrote and opened where it is used: it travels to other processes as a short text.
What fails on object storage is retried, on top of its client's own retries, and then reported in one line.
"""

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs

from orchestrator.base.exits import JobError, last_line

PAUSES_S = (2.0, 5.0)  # between attempts; pyarrow's S3 client tries for six seconds each time
PARTIAL = ".partial"
QUERY = ("region", "endpoint_override", "scheme", "allow_bucket_creation")  # none of them is a secret
QUESTION = "%3F"  # a question mark in the name of an object
PYARROWS = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
ROOTED = ("hdfs", "viewfs", "sftp", "ssh", "local")  # their paths begin with a slash

CHUNK_BYTES = 2**24

T = TypeVar("T")


class StorageError(JobError):
    """Object storage that does not answer, or refuses; the message names the place."""


@dataclass(frozen=True)
class StoragePath:
    """A folder or a file: an absolute path, or a URI, whose query (`?region=...`) belongs to its whole bucket."""

    text: str

    @staticmethod
    def of(text: "str | Path | StoragePath") -> "StoragePath":
        """Raises ValueError for a URI of a kind that nothing here opens, or one that holds credentials."""
        if isinstance(text, StoragePath):
            return text
        if "://" not in str(text):
            return StoragePath(str(Path(text).absolute()))
        scheme, _, rest = str(text).partition("://")
        if scheme.lower() == "file":
            return StoragePath(str(Path(urllib.parse.unquote("/" + rest.lstrip("/"))).absolute()))
        base, mark, query = rest.rstrip("/").partition("?")
        bucket = base.split("/")[0]
        if re.search(r":(?!\d+$)", bucket) or "@" in "/".join(base.split("/")[1:]):
            raise ValueError(
                f"{scheme}://...: the URI holds credentials, which would end up in logs; give them as the client wants "
                "them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not bucket:
            raise ValueError(f"{text}: names no bucket; expected {scheme}://BUCKET/FOLDER")
        for key in urllib.parse.parse_qs(query, keep_blank_values=True):
            if key not in QUERY:
                raise ValueError(f"{scheme}://{base}?{key}=...: cannot be set in a URI; these can: {', '.join(QUERY)}")
        path = StoragePath(f"{scheme.lower()}://{base.rstrip('/')}{mark}{query}")
        path.with_retries(path._opened, "reached")
        return path

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "StoragePath":
        if self.local is not None:
            return StoragePath(str(self.local / name))
        base, mark, query = self.text.partition("?")
        return StoragePath(f"{base}/{name.replace('?', QUESTION)}{mark}{query}")

    @property
    def local(self) -> Path | None:
        """The path, if it is on this machine."""
        return None if "://" in self.text else Path(self.text)

    @property
    def parent(self) -> "StoragePath":
        """The folder that it is in."""
        if self.local is not None:
            return StoragePath(str(self.local.parent))
        base, mark, query = self.text.partition("?")
        return StoragePath(f"{base.rpartition('/')[0]}{mark}{query}")

    @property
    def name(self) -> str:
        """The last part."""
        if self.local is not None:
            return self.local.name
        return self.text.partition("?")[0].rsplit("/", 1)[-1].replace(QUESTION, "?")

    def size(self) -> int | None:
        """Bytes of a file; None where there is no file."""
        info = self._info()
        return info.size if info.type == pa.fs.FileType.File else None

    def is_folder(self) -> bool:
        return bool(self._info().type == pa.fs.FileType.Directory)

    def special(self) -> str | None:
        """What is there that is neither a folder nor a file; None if it is one of them, or nothing."""
        if self.local is None:
            return None
        try:
            mode = os.stat(self.local).st_mode
        except OSError:
            return "a link to nothing" if os.path.islink(self.local) else None
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        return kinds.get(stat.S_IFMT(mode))

    def read(self, before: Callable[[int], None] = lambda size: None) -> bytes:
        """Raises OSError where the file is not there, StorageError where it cannot be had; and what `before` raises,
        which is called with the file's size before it is read."""

        self._refuse_special()

        def whole() -> bytes:
            fs, path = self._opened()
            with fs.open_input_file(path) as file:
                before(file.size())
                data: bytes = file.read()
                return data

        return self.with_retries(whole, "read")

    def open(self) -> Any:
        """A pyarrow file for reading anywhere in it: mapped into memory where it is local."""
        self._refuse_special()
        if self.local is not None:
            return pa.memory_map(str(self.local))

        def opened() -> Any:
            fs, path = self._opened()
            return fs.open_input_file(path)

        return self.with_retries(opened, "opened")

    def read_at(self, start: int, length: int) -> bytes:
        """A part of the file, or what there is of it. A remote file stays open for the next part."""
        if self.local is not None:
            with open(self.local, "rb") as file:
                return os.pread(file.fileno(), length, start)
        data: bytes = self.with_retries(lambda: _open_file(self).read_at(length, start), "read")
        return data

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The file from its beginning to its end."""
        start = 0
        while data := self.read_at(start, size):
            yield data
            start += len(data)

    def write(self, data: bytes) -> None:
        """Whole or not at all: a reader never sees a part."""
        if self.local is not None:
            partial = self.local.with_name(f".{self.local.name}.{secrets.token_hex(4)}{PARTIAL}")
            partial.parent.mkdir(parents=True, exist_ok=True)
            with _named(self), _removed_if_it_fails(partial):
                partial.write_bytes(data)
                os.replace(partial, self.local)
            return

        def whole() -> None:
            fs, path = self._opened()
            with fs.open_output_stream(path) as file:  # an object appears when its upload is complete
                file.write(data)

        self.with_retries(whole, "written")

    def remove(self) -> None:
        """The file, or the folder with all that is in it; nothing where there is none."""
        if self.local is not None and self.local.is_dir():
            shutil.rmtree(self.local, ignore_errors=True)  # others may be removing it, too
            return
        kind = self._info().type
        if kind == pa.fs.FileType.File:
            self.with_retries(lambda: self._opened()[0].delete_file(self._opened()[1]), "removed")
        elif kind == pa.fs.FileType.Directory:
            self.with_retries(lambda: self._opened()[0].delete_dir(self._opened()[1]), "removed")

    def copy_folder(self, target: "StoragePath", last: str) -> None:
        """The files of this folder, in the same storage, as another folder. On disk it is there whole or not at all,
        and no byte is copied if the file system can do without; elsewhere it is whole when the file `last` is there.

        Raises FileNotFoundError where somebody removes this folder meanwhile.
        """
        if self.local is not None and target.local is not None:
            partial = target.local.with_suffix(PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            with _named(target), _removed_if_it_fails(partial):
                shutil.copytree(self.local, partial, copy_function=_link)
                os.replace(partial, target.local)
            return
        for name in sorted(self.files(), key=lambda name: name == last):
            self.with_retries(functools.partial(_copy_within, self / name, target / name), "copied")

    @contextlib.contextmanager
    def as_local_dir(self) -> Iterator[Path]:
        """The folder on this machine's disk: itself, or a temporary copy."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="fetched-") as folder:
            for name in self.files():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.writelines((self / name).chunks())
            yield Path(folder)

    def children(self) -> dict[str, bool]:
        """Names in the folder, sorted, and whether each is a folder. None of a folder that is not there."""
        if self.local is not None:
            found = sorted(self.local.iterdir()) if self.local.is_dir() else []
            return {path.name: path.is_dir() for path in found}
        infos = self._selected(recursive=False)
        return {info.base_name: info.type == pa.fs.FileType.Directory for info in infos}

    def files(self) -> list[str]:
        """Paths below the folder of everything in it, and in its folders, that is no folder; sorted."""
        if self.local is not None:
            return sorted(_walk(self.local))
        infos = self._selected(recursive=True)
        root = self._opened()[1].strip("/")
        return sorted(info.path.strip("/")[len(root) + 1 :] for info in infos if info.type == pa.fs.FileType.File)

    def free_bytes(self) -> int | None:
        """Free bytes of the disk; None in object storage."""
        if self.local is None:
            return None
        folder = self.local
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _refuse_special(self) -> None:
        """Raises OSError, rather than wait for somebody to write into a pipe."""
        if (kind := self.special()) is not None:
            raise OSError(errno.EINVAL, f"is {kind}, not a file", str(self))

    def _info(self) -> Any:
        try:
            return self.with_retries(lambda: self._opened()[0].get_file_info(self._opened()[1]), "reached")
        except OSError as error:
            if self.local is None or error.errno != errno.ENAMETOOLONG:
                raise
            return pa.fs.FileInfo(self.text, pa.fs.FileType.NotFound)  # no file has such a name

    def _selected(self, *, recursive: bool) -> list[Any]:
        def listed() -> list[Any]:
            fs, path = self._opened()
            selector = pa.fs.FileSelector(path, recursive=recursive, allow_not_found=True)
            return [info for info in fs.get_file_info(selector) if info.path.strip("/") != path.strip("/")]

        return sorted(self.with_retries(listed, "listed"), key=lambda info: info.path)

    def opened(self) -> tuple[pa.fs.FileSystem, str]:
        """The pyarrow file system and the path in it. Raises StorageError."""
        return self.with_retries(self._opened, "reached")

    def _opened(self) -> tuple[pa.fs.FileSystem, str]:
        """The file system, and the path in it."""
        if self.local is not None:
            return pa.fs.LocalFileSystem(), self.text
        base, mark, query = self.text.partition("?")
        scheme, _, rest = base.partition("://")
        bucket, *parts = rest.replace(QUESTION, "?").split("/")
        fs, root = _file_system(f"{scheme}://{bucket}{mark}{query}")
        path = "/".join(part for part in (root.strip("/"), *parts) if part)
        return fs, "/" + path if scheme in ROOTED else path

    def with_retries(self, action: Callable[[], T], done: str) -> T:
        """Call what reads or writes this path; on object storage, retry it.

        Raises FileNotFoundError at once, StorageError in the end.
        """
        if self.local is not None:
            return action()
        for pause in (*PAUSES_S, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if pause is None:
                    text = f"{self}: cannot be {done}, after {len(PAUSES_S) + 1} attempts: {_short(error)}"
                    raise StorageError(text) from error
                _open_file.cache_clear()
                time.sleep(pause)
        raise AssertionError


@functools.lru_cache(maxsize=16)
def _file_system(root: str) -> tuple[pa.fs.FileSystem, str]:
    """Of the URI of a bucket. Raises ValueError; OSError where it cannot be reached."""
    scheme = root.split("://")[0]
    try:
        if scheme in PYARROWS:
            found: tuple[pa.fs.FileSystem, str] = pa.fs.FileSystem.from_uri(root)
            return found
        import fsspec

        opened, path = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:  # pa.ArrowInvalid is a ValueError
        hint = "give a folder, or a URI such as s3://BUCKET/FOLDER"
        raise ValueError(f"{root}: cannot be opened ({last_line(error)}); {hint}") from None
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(opened)), path


@functools.lru_cache(maxsize=8)
def _open_file(path: StoragePath) -> Any:
    return path.open()


def _walk(root: Path) -> Iterator[str]:
    """Dangling links included, and links to folders, which are not followed. Raises OSError for a folder that cannot be
    listed: nothing is skipped silently."""

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(root, onerror=stop):
        below = os.path.relpath(parent, root)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (name if below == "." else f"{below}/{name}" for name in (*names, *links))


@contextlib.contextmanager
def _removed_if_it_fails(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _named(path: StoragePath) -> Iterator[None]:
    """An OSError within is about this path, whatever file it stumbled over."""
    try:
        yield
    except shutil.Error as error:  # one for all files of a folder
        raise OSError(None, last_line(error), str(path)) from error
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _copy_within(source: StoragePath, target: StoragePath) -> None:
    """An object within its storage: no byte travels here and back."""
    (fs, path), (_, copy) = source.opened(), target.opened()
    try:
        fs.copy_file(path, copy)
    except OSError as error:  # S3 has no class of its own for an object that is gone
        if fs.get_file_info(path).type == pa.fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source)) from error
        raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _short(error: BaseException) -> str:
    """The reason at the end of the AWS client's message, which also repeats key and operation."""
    return last_line(error).split("; Details: ")[-1]
