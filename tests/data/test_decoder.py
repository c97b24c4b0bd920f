"""Images are decoded in a child process, where one that crashes or grows without end is rejected, and no other."""

import functools
import itertools
import os
import signal
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import picture

from alexnet import images
from orchestrator.base.exits import JobError
from orchestrator.data import decoder
from orchestrator.data.decoder import Decoder
from orchestrator.data.sources import Entry

SIZE = 64
READ = images.decode
BAD = b"bad"


def raising(error: Exception):
    def act():
        raise error

    return act


def jpegs(count: int) -> list[bytes]:
    return [picture(np.random.default_rng(n), n % 2, (70 + n, 90)) for n in range(count)]


def entries(contents: list[bytes]) -> list[Entry]:
    return [Entry(number, 0, f"train/{number}.jpg", data=data) for number, data in enumerate(contents)]


def decoded(contents, **limits) -> list[object]:
    """The pixels of each, or the reason that it has none."""
    found = []
    loads = [(number, functools.partial(bytes, data)) for number, data in enumerate(contents)]
    for number, outcome in Decoder(SIZE, False, images.WHITE, **limits).outcomes(entries(contents), loads):
        assert len(found) == number
        found.append(outcome.reason if outcome.pixels is None else outcome.pixels.copy())
    return found


def expected(contents: list[bytes]) -> list[object]:
    return [images.resize_and_center(READ(data), SIZE) for data in contents]


def same(found: list[object], wanted: list[object]) -> bool:
    return all(
        np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b for a, b in itertools.zip_longest(found, wanted)
    )


@pytest.fixture
def bad(monkeypatch):
    """Has a function called in place of the decoding of BAD."""

    def install(act):
        monkeypatch.setattr(images, "decode", lambda data, *a, **o: act() if data == BAD else READ(data, *a, **o))

    return install


def test_a_child_decodes_what_this_process_would(monkeypatch):
    contents = jpegs(11)
    wanted = expected(contents)
    with pytest.raises(images.NotAnImage, match="not an image in a format that is read: JPEG, PNG") as error:
        images.decode(b"no image")
    reason = str(error.value)
    contents[4:4], wanted[4:4] = (
        [b"", b"no image"],
        ["empty file", reason],
    )
    assert same(decoded(contents), wanted)
    monkeypatch.setattr(decoder, "CAN_FORK", False)
    assert same(decoded(contents), wanted)


def test_notes_and_kinds_come_with_the_pixels():
    import io

    import PIL.Image

    out = io.BytesIO()
    PIL.Image.fromarray(np.linspace(0, 1, 6400, dtype=np.float32).reshape(80, 80)).save(out, "TIFF")
    ((_, found),) = Decoder(SIZE, False, images.WHITE).outcomes(entries([b""]), [(0, out.getvalue)])
    assert found.kinds == ("gray",)
    assert found.notes == ("float32 pixels; the file does not say which value is white, 1 was assumed",)


@pytest.mark.parametrize("places", [(0,), (2, 3), (6,), (0, 1, 2, 3, 4, 5, 6)])
def test_an_image_that_crashes_its_decoder_is_rejected_and_no_other(bad, places):
    bad(os.abort)
    contents = jpegs(7)
    wanted = expected(contents)
    for place in places:
        contents[place], wanted[place] = BAD, "crashes its decoder (signal 6)"
    assert same(decoded(contents), wanted)


def test_an_image_that_takes_too_much_time_is_rejected(bad, monkeypatch):
    monkeypatch.setattr(decoder, "DEADLINE_FACTOR", 60)  # by the clock, on a busy machine

    def spin():
        while True:
            pass

    bad(spin)
    contents = jpegs(3)
    wanted = [*expected(contents[:1]), "takes more than 1 seconds to decode", *expected(contents[1:])]
    assert same(decoded([contents[0], BAD, *contents[1:]], seconds=1), wanted)


def test_an_image_that_takes_too_much_memory_is_rejected_but_not_if_the_machine_has_none(bad, monkeypatch):
    bad(lambda: np.ones(2**34, np.uint8))  # more than a process may have kept of freed memory
    contents = [*jpegs(2), BAD]
    wanted = [*expected(contents[:2]), "takes more than 128 MB to decode"]
    assert same(decoded(contents, memory_bytes=2**27), wanted)
    monkeypatch.setattr(decoder, "_can_be_had", lambda count: False)
    with pytest.raises(JobError, match=r"train/2.jpg: cannot be decoded now: not enough memory; a lower --parallelism"):
        decoded(contents, memory_bytes=2**27)


def test_a_crash_that_does_not_come_again_rejects_nothing(bad, tmp_path):
    def crash_once():
        try:
            (tmp_path / "crashed").mkdir()
        except FileExistsError:
            return READ(jpegs(1)[0])
        os.abort()

    bad(crash_once)
    assert same(decoded([*jpegs(3), BAD]), expected([*jpegs(3), jpegs(1)[0]]))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "cannot be decoded now: the process that decodes was ended"),
        (lambda: time.sleep(99), "cannot be decoded now: the machine does not get to it"),
        (raising(OSError(24, "Too many open files")), r"cannot be decoded now: .*Too many open files"),
    ],
)  # fmt: skip
def test_faults_of_the_machine_end_the_job(bad, monkeypatch, act, words):
    monkeypatch.setattr(decoder, "DEADLINE_FACTOR", 1)
    bad(act)
    with pytest.raises(JobError, match=f"train/1.jpg: {words}"):
        decoded([*jpegs(1), BAD, *jpegs(1)], seconds=2 if "machine does" in words else 20)


def test_no_file_is_written_and_no_child_is_left(bad, tmp_path):
    def write():
        (tmp_path / "written").write_bytes(b"x")

    before = set(psutil.Process().children())  # Ray's, of other tests
    bad(write)
    with pytest.raises(JobError, match="File too large"):
        decoded([BAD])
    bad(lambda: READ(jpegs(1)[0]))
    stopped = Decoder(SIZE, False, images.WHITE).outcomes(entries([BAD] * 9), [(n, lambda: BAD) for n in range(9)])
    next(stopped)
    stopped.close()
    assert set(psutil.Process().children()) == before


@pytest.mark.parametrize("forks", [True, False])
def test_an_error_that_nobody_expected_rejects_its_image_and_no_other(bad, monkeypatch, forks):
    bad(lambda: {}["palette"])
    monkeypatch.setattr(decoder, "CAN_FORK", forks)
    contents = jpegs(3)
    wanted = [*expected(contents[:1]), "its decoder failed: KeyError: 'palette'", *expected(contents[1:])]
    assert same(decoded([contents[0], BAD, *contents[1:]]), wanted)


def test_an_error_of_the_quick_way_is_found_out_by_a_child(monkeypatch):
    def fail(data, **options):
        raise IndexError("no such table")

    monkeypatch.setattr(sys.modules[images.decode_jpeg.__module__], "decode_jpeg", fail)
    assert decoded(jpegs(2)) == ["its decoder failed: IndexError: no such table"] * 2


@pytest.mark.parametrize("said", [[], {"notes": []}, {"notes": [1], "kinds": []}, {"notes": None, "kinds": []}, 7])
def test_an_answer_that_no_decoder_gives_rejects_the_image_and_ends_the_child(bad, monkeypatch, said):
    work = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, data, into: said if data == BAD else work(self, data, into))
    good = jpegs(1)[0]
    monkeypatch.setattr(Decoder, "_plain", lambda self, data: None)
    assert same(decoded([good, BAD, good]), [*expected([good]), "its decoder answered what no decoder does",
                                              *expected([good])])  # fmt: skip
