"""Images that are decoded in a child process are what they are in this one, and take no more than they may."""

import io
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from alexnet import images, images_apart
from alexnet.images_apart import ApartDecoder

SMALL = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(SMALL).convert(mode).save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def decoder():
    made = ApartDecoder()
    yield made
    made._end()


TURNED = PIL.Image.Exif()
TURNED[images.ORIENTATION] = 6


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_pixels_are_those_of_this_process(decoder, form, exif):
    data = encoded(form, exif=TURNED) if form in ("JPEG", "PNG", "WEBP") else encoded(form)
    found = decoder.decode(data, exif=exif)
    np.testing.assert_array_equal(found, images.decode(data, exif=exif))
    assert found.shape == ((40, 30, 3) if exif and form in ("JPEG", "PNG", "WEBP") else (30, 40, 3))


def test_one_child_serves_all_images_and_threads_take_turns(decoder):
    decoder.decode(encoded("PNG"))
    child, found = decoder._child, {}
    data = [encoded("PNG", mode) for mode in ("L", "RGB", "1")]

    def ask(number):
        found[number] = decoder.decode(data[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pixels in found.items():
        np.testing.assert_array_equal(pixels, images.decode(data[number]))
    assert len(found) == 3
    assert decoder._child is child


@pytest.mark.parametrize("data", [b"", b"no image", encoded("PNG")[:60]])
def test_what_is_no_image_has_the_reason_of_this_process(decoder, data):
    with pytest.raises(images.NotAnImage) as here:
        images.decode(data)
    with pytest.raises(images.NotAnImage) as apart:
        decoder.decode(data)
    assert str(apart.value) == str(here.value)


def test_an_image_that_takes_too_much_time_memory_or_its_decoder_is_refused_and_the_next_is_read():
    """A large image stands for a bomb; the limits are low."""
    out = io.BytesIO()
    PIL.Image.new("RGBA", (8600, 8600), (1, 2, 3, 4)).save(out, "PNG", compress_level=1)
    large, small = out.getvalue(), encoded("PNG")
    for decoder, why in (
        (ApartDecoder(seconds=0), "^takes more than 0 seconds to decode$"),
        (ApartDecoder(memory_bytes=2**26), "^takes more than 64 MB to decode$"),
    ):
        with pytest.raises(images.NotAnImage, match=why):
            decoder.decode(large)
        np.testing.assert_array_equal(decoder.decode(small), SMALL)
        decoder._end()
    decoder = ApartDecoder()
    decoder.decode(small)
    child = decoder._child
    os.kill(child.pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, (child.pid, signal.SIGSEGV))
    timer.start()
    threading.Timer(0.3, os.kill, (child.pid, signal.SIGCONT)).start()
    with pytest.raises(images.NotAnImage, match=r"^crashes its decoder \(signal 11\)$"):
        decoder.decode(small)
    np.testing.assert_array_equal(decoder.decode(small), SMALL)
    assert decoder._child is not child
    decoder._end()


def test_a_child_that_does_not_answer_is_ended(monkeypatch):
    decoder = ApartDecoder()
    decoder.decode(encoded("PNG"))
    child = decoder._child
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr("alexnet.images_apart.DEADLINE_FACTOR", 0.01)
    began = time.monotonic()
    with pytest.raises(images.NotAnImage, match=r"^its decoder gave no answer$"):
        decoder.decode(encoded("PNG"))
    assert time.monotonic() - began < 10
    assert child.poll() == -signal.SIGKILL
    decoder._end()


def test_the_child_imports_no_torch(decoder):
    decoder.decode(encoded("PNG"))
    with open(f"/proc/{decoder._child.pid}/maps") as maps:
        assert "torch" not in maps.read()


def test_a_decoder_that_cannot_start_is_no_fault_of_the_image(monkeypatch):
    monkeypatch.setattr(images_apart, "CHILD", "raise SystemExit('no package here')")
    with pytest.raises(RuntimeError, match=r"could not be started: no package here$"):
        ApartDecoder().decode(encoded("PNG"))


def test_it_decodes_where_many_files_are_open(decoder):
    decoder._end()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(1200, limits[0]), limits[1]))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1050)]
    try:
        assert decoder.decode(encoded("PNG")).shape == (30, 40, 3)
    finally:
        for each in opened:
            os.close(each)
        decoder._end()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_child_knows_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    decoder = ApartDecoder()
    decoder.decode(encoded("PNG"))
    environment = Path(f"/proc/{decoder._child.pid}/environ")
    if not environment.exists():
        pytest.skip("no /proc")
    assert b"hidden" not in environment.read_bytes()
    decoder._end()


def test_a_child_ends_after_many_images(monkeypatch):
    monkeypatch.setattr(images_apart, "IMAGES_PER_CHILD", 2)
    decoder, children = ApartDecoder(), []
    for _ in range(3):
        assert decoder.decode(encoded("PNG")).shape == (30, 40, 3)
        children.append(decoder._child.pid)
    assert children[0] == children[1] != children[2]
    decoder._end()


def test_a_child_that_somebody_kills_is_started_once_more(monkeypatch):
    decoder, kills = ApartDecoder(), []
    exchange = decoder._exchange

    def killed(child, question):
        if len(kills) < 1:
            kills.append(os.kill(child.pid, signal.SIGKILL))
        return exchange(child, question)

    monkeypatch.setattr(decoder, "_exchange", killed)
    assert decoder.decode(encoded("PNG")).shape == (30, 40, 3)
    monkeypatch.setattr(decoder, "_exchange", lambda *a: os.kill(a[0].pid, signal.SIGKILL) or exchange(*a))
    with pytest.raises(images.NotAnImage, match="its decoder was killed, twice"):
        decoder.decode(encoded("PNG"))
    decoder._end()


def test_a_fork_while_another_thread_decodes_can_decode(decoder):
    decoder.decode(encoded("PNG"))
    with decoder._lock:  # as another thread holds it, of which a fork has none
        pid = os.fork()
        if not pid:
            signal.alarm(20)
            os._exit(0 if decoder.decode(encoded("PNG")).shape == (30, 40, 3) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert decoder.decode(encoded("PNG")).shape == (30, 40, 3)


def test_a_file_that_does_not_fit_is_too_large():
    decoder = ApartDecoder(memory_bytes=2**26)
    with pytest.raises(images.NotAnImage, match="takes more than 64 MB to decode"):
        decoder.decode(b"II*\0" + bytes(2**27))
    assert decoder.decode(encoded("PNG")).shape == (30, 40, 3)
    decoder._end()
