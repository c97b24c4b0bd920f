"""Hostile files end in one line, in bounded time and memory; the machine's faults are not the image's."""

import json
import os
import subprocess
import sys
import time

import hostile
import pytest
from conftest import ROOT

from alexnet import images
from orchestrator.base.storage import StoragePath
from orchestrator.data import decoder, sandbox
from orchestrator.data.shard_writer import ShardWriter, pack
from orchestrator.data.sources import Entry

# how each is read, in a process whose peak memory is then looked at
READ = {
    "nested_mat": "from orchestrator.data.sources.devkit import read_meta; read_meta(data, 'x.mat')",
    "pickle_of_many_bytes": "from orchestrator.data.sources import cifar; cifar._read(data, 'x', 'data')",
    "deep_pickle": "from orchestrator.data.sources import cifar; cifar._read(data, 'x', 'data')",
    "pickle_of_repeats": "from orchestrator.data.sources import cifar; cifar._read(data, 'x', 'data')",
    "parquet_of_many_rows": "open('train.parquet', 'wb').write(data); "
    "from orchestrator.data.sources import parquet; "
    "list(parquet._row_groups(StoragePath.of('.'), 'train.parquet', parquet.Columns()))",
    "jpeg_of_many_scans": "images.decode(data)",
    "gray16_png": "images.decode(data); raise ValueError('fine')",
    "webp_of_a_large_canvas": "images.decode(data); raise ValueError('fine')",
    "webp_of_a_long_canvas": "images.decode(data)",
    "tar_of_long_names": "open('x.tar', 'wb').write(data); "
    "from orchestrator.data.sources import ilsvrc; list(ilsvrc.members(StoragePath.of('x.tar')))",
    "aborting_parquet": "open('x.parquet', 'wb').write(data); "
    "from orchestrator.data.sources import apart; apart.open_apart('x.parquet')",
    "tar_of_a_huge_name": "open('x.tar', 'wb').write(data); "
    "from orchestrator.data.sources import ilsvrc; list(ilsvrc.members(StoragePath.of('x.tar')))",
}
SCRIPT = """
import resource, sys
from orchestrator.base.storage import StoragePath
from alexnet import images
data = sys.stdin.buffer.read()
try:
    {read}
except ValueError as error:
    print(error)
status = open("/proc/self/status").read()  # getrusage would have the peak of whoever started this process, too
own = int(status.split("VmHWM:")[1].split()[0])
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.parametrize("name", READ)
def test_a_hostile_file_ends_in_one_line_in_bounded_time_and_memory(tmp_path, name):
    data = getattr(hostile, name)()
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(read=READ[name])], input=data, capture_output=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2, lines
    assert len(lines[0]) < 500
    assert int(lines[1]) < 1_100_000  # KB
    assert time.monotonic() - start < 60
    assert {path.name for path in tmp_path.iterdir()} <= {"train.parquet", "x.parquet", "x.tar"}


def test_a_webp_has_no_longer_sides_than_its_frames_may_have():
    with pytest.raises(images.NotAnImage, match=r"^20x2097172: a WebP has up to 16383 pixels a side$"):
        images.decode(hostile.webp_of_a_long_canvas())
    assert images.decode(hostile.webp_canvas(16_383, 16)).shape == (16, 16_383, 3)


def grow(data: bytes) -> bytes:
    return bytes(len(data) * 2**30)


def spin(data: bytes) -> bytes:
    while True:
        pass


def crash(data: bytes) -> bytes:
    os.abort()


def write(data: bytes) -> bytes:
    with open("written", "wb") as file:
        file.write(data)
    return b""


def double(data: bytes) -> bytes:
    print("what a library says")
    return 2 * data


def test_the_sandbox_limits_memory_time_and_writing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/data") + os.pathsep + str(ROOT / "tests"))
    assert sandbox.run(double, b"ab\n") == b"ab\nab\n"
    for reader, words in [
        (grow, "needs more than 512 MB"),
        (spin, "took more than (2|20) seconds"),
        (crash, "crashed its reader"),
        (write, "File too large"),
    ]:
        with pytest.raises(sandbox.Refused, match=words) as error:
            sandbox.run(reader, b"x", seconds=2)
        assert "\n" not in str(error.value)
    assert (tmp_path / "written").stat().st_size == 0 if (tmp_path / "written").exists() else True


@pytest.mark.parametrize("fault", [MemoryError(), OSError(24, "Too many open files")])
def test_a_fault_of_the_machine_fails_the_task_and_rejects_no_image(tmp_path, monkeypatch, fault):
    import PIL.Image

    writer = ShardWriter(StoragePath.of(tmp_path), 64, 90, 2)
    ppm = b"P6 8 8 255\n" + bytes(192)
    row = pack("train", "train/shard-00000.parquet", [Entry(0, 0, "train/a.ppm", data=ppm)])
    whole = writer(row)
    assert whole["failure"] == ""
    assert json.loads(whole["report"])["rejected"] == []
    monkeypatch.setattr(decoder, "_can_be_had", lambda count: False)  # or it would be the image that takes too much
    monkeypatch.setattr(PIL.Image, "open", lambda *args, **options: (_ for _ in ()).throw(fault))
    row = pack("train", "train/shard-00001.parquet", [Entry(0, 0, "train/a.ppm", data=ppm)])
    failure = writer(row)["failure"]
    assert failure.startswith("train/a.ppm: cannot be decoded now: ")
    assert not (tmp_path / "train/shard-00001.parquet").exists()


def test_progressive_photographs_of_the_usual_kind_are_read():
    import io

    import PIL.Image

    out = io.BytesIO()
    PIL.Image.new("RGB", (300, 200), "red").save(out, "JPEG", progressive=True)
    assert images.decode(out.getvalue()).shape == (200, 300, 3)
