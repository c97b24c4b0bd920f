"""Decodes strangers' images in a child process that may take so much CPU time and memory: for a net that is served.

The child is an interpreter with images.py alone, which starts in a fraction of a second and serves one image after the
other. It gets nothing of the environment but where Python and its packages are, writes no file, and what it answers is
taken for pixels or a text.
"""

import contextlib
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from . import images

SECONDS = 60  # of CPU for an image; the largest that are read take about ten
MEMORY_BYTES = 2**32  # for an image; the largest that are read take about two GB
DEADLINE_FACTOR = 10  # by the clock, on a machine that is busy
IMAGES_PER_CHILD = 1000  # memory that hostile images have fragmented ends with a child
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL")  # that a child gets
READY = b"R"  # is its first byte
QUESTION, ANSWER = struct.Struct("<?Q"), struct.Struct("<cIIQ")  # exif, length; kind, H, W, length
PIXELS, NO_IMAGE, NO_MEMORY = b"P", b"N", b"M"
MAX_REASON_BYTES = 2**12
STEP_BYTES = 2**20  # that are written or read at a time

CHILD = """
import sys
package = sys.modules["alexnet"] = type(sys)("alexnet")  # without what the package itself imports
package.__path__ = [sys.argv[1]]
from alexnet.images_apart import serve
serve(int(sys.argv[2]), int(sys.argv[3]))
"""


class Unsound(Exception):
    """A child that has ended, or has answered what none does."""


class Killed(Exception):
    """A child that somebody else has ended; the text is a reason to refuse an image."""


class ApartDecoder:
    """Decodes images one at a time, whichever threads ask. Nothing is started before the first."""

    def __init__(self, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.seconds, self.memory_bytes = seconds, memory_bytes
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._num_decoded = 0  # by this child
        self._pid = 0  # of the process that started it: a fork of that has to start its own
        self._end: Any = lambda: None
        _decoders.add(self)

    def _forked(self) -> None:
        """In a new fork, in which no thread is left to release the lock."""
        self._lock = threading.Lock()

    def decode(self, data: bytes, *, exif: bool = False) -> images.Image:
        """As images.decode. Raises NotAnImage, also for an image that takes more than it may, or crashes its decoder;
        RuntimeError if no decoder can be started, which is no image's fault.

        JPEG that libjpeg reads by itself is decoded here, in a time and a memory that its headers bound. So are all
        images on systems that cannot limit a process.
        """
        plain = images.decode_jpeg(data, exif=exif)
        if plain is not None:
            return plain
        if os.name != "posix":
            return images.decode(data, exif=exif)
        with self._lock:
            try:
                kind, shape, answer = self._ask(data, exif)
            except Killed:  # by the system when memory is short, perhaps, whatever the image is
                try:
                    kind, shape, answer = self._ask(data, exif)
                except Killed as again:
                    raise images.NotAnImage(str(again)) from None
            if kind == NO_MEMORY or self._num_decoded >= IMAGES_PER_CHILD:
                self._end()
        if kind == NO_MEMORY:
            raise images.NotAnImage(f"takes more than {self.memory_bytes // 2**20} MB to decode")
        if kind == NO_IMAGE:
            raise images.NotAnImage(answer.decode("utf-8", "replace"))
        return np.frombuffer(answer, np.uint8).reshape(shape)

    def _ask(self, data: bytes, exif: bool) -> tuple[bytes, tuple[int, ...], bytes]:
        """A child's answer. Raises Killed, NotAnImage."""
        child = self._started()
        self._num_decoded += 1
        try:
            return self._exchange(child, QUESTION.pack(exif, len(data)) + data)
        except Unsound:
            raise self._why(child) from None
        except BaseException:
            self._end()
            raise

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._pid != os.getpid() or self._child.poll() is not None:
            self._end()
            command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(self.seconds)]
            environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
            with tempfile.TemporaryFile() as errors:  # of its start; from then on it cannot write
                self._child = subprocess.Popen(
                    [*command, str(self.memory_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, env=environment, bufsize=0,
                )  # fmt: skip
                self._pid, self._num_decoded = os.getpid(), 0
                self._end = weakref.finalize(self, _ended, self._child, self._pid)
                assert self._child.stdout is not None
                if self._child.stdout.read(1) != READY:
                    self._end()
                    errors.seek(0)
                    lines = errors.read().decode("utf-8", "replace").splitlines() or ["it ended without a word"]
                    raise RuntimeError(f"the process that decodes images could not be started: {lines[-1][:500]}")
        return self._child

    def _exchange(self, child: "subprocess.Popen[bytes]", question: bytes) -> tuple[bytes, tuple[int, ...], bytes]:
        """Ask, and the kind, the shape and the bytes of the answer. Raises Unsound."""
        assert child.stdin is not None
        assert child.stdout is not None
        ask, hear = child.stdin.fileno(), child.stdout.fileno()
        os.set_blocking(ask, False)
        until, unsent, heard = (
            time.monotonic() + DEADLINE_FACTOR * (1 + self.seconds),
            memoryview(question),
            bytearray(),
        )
        kind, height, width, size = b"", 0, 0, 0
        while True:
            if len(heard) >= ANSWER.size:
                kind, height, width, size = ANSWER.unpack_from(heard)
                wanted = 3 * height * width if kind == PIXELS else size
                most = 3 * images.MAX_PIXELS if kind == PIXELS else MAX_REASON_BYTES
                if kind not in (PIXELS, NO_IMAGE, NO_MEMORY) or size != wanted or size > most:
                    raise Unsound
                if len(heard) >= ANSWER.size + size:
                    return kind, (height, width, 3), bytes(memoryview(heard)[ANSWER.size : ANSWER.size + size])
            poll = select.poll()  # select.select knows no descriptors above 1023
            poll.register(hear, select.POLLIN)
            if unsent:
                poll.register(ask, select.POLLOUT)
            events = dict(poll.poll(max(0, int(1000 * (until - time.monotonic())))))
            ready, free = hear in events, ask in events
            if not events:
                raise Unsound
            try:
                if free:
                    unsent = unsent[os.write(ask, unsent[:STEP_BYTES]) :]
            except BrokenPipeError:  # it has ended, and the other pipe tells it, too
                unsent = unsent[:0]
            if ready:
                data = os.read(hear, STEP_BYTES)
                if not data:
                    raise Unsound
                heard += data

    def _why(self, child: "subprocess.Popen[bytes]") -> "images.NotAnImage | Killed":
        """Why a child has not answered; ends it."""
        import signal

        try:
            status = child.wait(0.5)
        except subprocess.TimeoutExpired:
            status = 0
        self._end()
        if status == -signal.SIGXCPU:
            return images.NotAnImage(f"takes more than {self.seconds} seconds to decode")
        if status == -signal.SIGKILL:
            return Killed("its decoder was killed, twice: is memory short?")
        if status < 0:
            return images.NotAnImage(f"crashes its decoder (signal {-status})")
        return images.NotAnImage("its decoder gave no answer")


_decoders: "weakref.WeakSet[ApartDecoder]" = weakref.WeakSet()


def _renew_locks() -> None:
    for decoder in [*_decoders]:
        decoder._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _ended(child: "subprocess.Popen[bytes]", pid: int) -> None:
    if pid == os.getpid():
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def serve(seconds: int, memory_bytes: int) -> None:
    """The child's side, until its parent has no more questions."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which then ends this process
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for limit, most in (
        (resource.RLIMIT_DATA, _data_bytes() + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems have limits that cannot be set
            resource.setrlimit(limit, (most, most))
    answers.write(READY)
    answers.flush()
    while len(head := questions.read(QUESTION.size)) == QUESTION.size:
        exif, size = QUESTION.unpack(head)
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        said, shape, answer = NO_IMAGE, (0, 0), b""
        try:
            pixels = images.decode(questions.read(size), exif=exif)
            said, shape, answer = PIXELS, (pixels.shape[0], pixels.shape[1]), pixels.tobytes()
        except images.NotAnImage as reason:
            answer = str(reason).encode()[:MAX_REASON_BYTES]
        except MemoryError:
            said = NO_MEMORY
        except Exception as error:  # foreign bytes can fail anywhere in a decoder
            answer = f"its decoder failed: {type(error).__name__}: {error}".encode("utf-8", "replace")[
                :MAX_REASON_BYTES
            ]
        answers.write(ANSWER.pack(said, *shape, len(answer)))
        answers.write(answer)
        answers.flush()


def _data_bytes() -> int:
    """Bytes of memory of its own that this process has now; 4 GB where the system does not say."""
    import resource

    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return 2**32
