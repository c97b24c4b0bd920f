"""Writing and copying: whole or not at all, and named where it fails."""

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest

from orchestrator.base.storage import StoragePath


@pytest.fixture
def full_disk(monkeypatch):
    def no_space(*args, **kwargs):
        if isinstance(args[0], Path):
            args[0].touch()  # a part of it is there
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    monkeypatch.setattr(os, "link", no_space)
    monkeypatch.setattr(shutil, "copy2", no_space)


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else_and_names_the_file(tmp_path, request):
    place = StoragePath.of(tmp_path / "result.json")
    place.write(b"old")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=f"No space left on device: '{place}'"):
        place.write(b"new")
    assert place.read() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_copy_of_a_folder_that_fails_leaves_nothing_and_names_the_folder(tmp_path, request):
    source, target = StoragePath.of(tmp_path / "one"), StoragePath.of(tmp_path / "two")
    (source / "a.txt").write(b"a")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left on device") as failed:
        source.copy_folder(target, last="a.txt")
    assert failed.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_write_that_cannot_begin_leaves_nothing_and_names_the_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path / 'taken'}'"):
        StoragePath.of(tmp_path / "taken").write(b"new")  # a folder is in its place
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_is_neither_a_folder_nor_a_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    kinds = {"pipe": "a pipe", "socket": "a socket", "link": "a link to nothing", "gone": None, ".": None}
    assert {name: StoragePath.of(tmp_path / name).special() for name in kinds} == kinds
    assert StoragePath.of("/dev/null").special() == "a device"
    for act in (StoragePath.open, StoragePath.read):
        with pytest.raises(OSError, match="is a pipe, not a file"):
            act(StoragePath.of(tmp_path / "pipe"))


def test_there_is_nothing_by_a_name_that_no_file_may_have(tmp_path):
    place = StoragePath.of(tmp_path / ("x" * 5000))
    assert (place.size(), place.is_folder(), place.special()) == (None, False, None)


def test_a_folder_of_objects_that_somebody_removes_meanwhile_is_missed_at_once(s3, monkeypatch):
    source = s3[0] / "gone"
    monkeypatch.setattr(StoragePath, "files", lambda path: ["a.bin"])
    monkeypatch.setattr("orchestrator.base.storage.time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(FileNotFoundError, match=r"gone/a\.bin"):
        source.copy_folder(s3[0] / "two", last="a.bin")


def test_objects_are_copied_within_the_storage(s3, monkeypatch):
    source, target = s3[0] / "one", s3[0] / "two"
    (source / "below" / "a.bin").write(b"a" * 1000)
    (source / "b.json").write(b"{}")
    monkeypatch.setattr(StoragePath, "read", lambda place: pytest.fail("read here"))
    source.copy_folder(target, last="b.json")
    monkeypatch.undo()
    assert target.files() == ["b.json", "below/a.bin"]
    assert (target / "below" / "a.bin").read() == b"a" * 1000
