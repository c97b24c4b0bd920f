"""Foreign images to pixels, in a child process that may take so much CPU time and memory for each image, and no more.

JPEG that libjpeg reads by itself takes a time and a memory that its headers bound: the task that writes a shard decodes
it without a child, which would cost 47 % more: 2.45 instead of 1.67 ms of CPU an image; of the same ones as PNG a child
takes 7.1 instead of 6.8 ms. Measured with 60 originals of ImageNet, the better of two passes, with its start
(images.decode and resize_and_center against Decoder.outcomes; two cores of an AMD EPYC with AVX-512, shared with other
work, 2026-11-26).

An image that crashes its decoder, or takes more than it may, ends that child: the parent rejects the image and starts
another child for the rest. What a machine lacks is no image's fault, and ends the job: the same images are rejected
wherever they are prepared.
"""

import json
import mmap
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from alexnet import images
from orchestrator.base.exits import JobError, last_line, name_and_line
from orchestrator.base.shown import shown
from orchestrator.data import sandbox
from orchestrator.data.sources import Entry

SECONDS = 60  # of CPU for an image; the largest that are read take about ten
MEMORY_BYTES = 2**32  # for an image; the largest that are read take about one GB
DEADLINE_FACTOR = 10  # by the clock, on a machine that is busy
CAN_FORK = sys.platform == "linux"
ATTEMPTS = 2  # of an image that ended a child: by chance only once
HEAD = struct.Struct("<cQ")  # kind, and length of what follows
DONE, NO_IMAGE, NO_MEMORY, FAULT = b"D", b"N", b"M", b"F"
MAX_ANSWER_BYTES = 2**16
_starting = threading.Lock()  # a child has no other child's pipes, or the end of one would not be noticed


@dataclass(frozen=True)
class Outcome:
    """What became of an image: its pixels, or why it has none."""

    pixels: NDArray[np.uint8] | None  # (size, size, 3), valid until the next outcome is asked for
    reason: str = ""
    notes: tuple[str, ...] = ()  # guesses about the range of its pixels
    kinds: tuple[str, ...] = ()  # of images.COUNTED


class Decoder:
    """Reads and decodes images as they are stored in shards."""

    def __init__(
        self,
        size: int,
        exif: bool,
        background: tuple[int, int, int],
        *,
        seconds: int = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        lower: str = "--parallelism",
    ) -> None:
        """lower: the flag that may help a machine that lacks something."""
        self.size, self.exif, self.background = size, exif, background
        self.seconds, self.memory_bytes, self.lower = seconds, memory_bytes, lower

    def outcomes(
        self, entries: list[Entry], loads: Iterable[tuple[int, Callable[[], bytes]]]
    ) -> Iterator[tuple[int, Outcome]]:
        """Of entries by their positions, in the order of `loads`, which has a call for the bytes of each.

        Raises JobError for a fault of the machine. On systems other than Linux, where a process with threads is not to
        be forked, this process decodes all of them, without these limits.
        """
        import torch  # noqa: F401  (here, not in every child)

        child: _Child | None = None
        pixels = np.empty((self.size, self.size, 3), np.uint8)
        try:
            for position, load in loads:
                entry = entries[position]
                outcome: Outcome | None
                try:
                    data = load()
                    outcome = self._plain(data)
                except images.NotAnImage as reason:
                    outcome = Outcome(None, str(reason))
                except (MemoryError, OSError) as fault:
                    raise JobError(self.lacking(entry, fault)) from None
                if outcome is None and not CAN_FORK:
                    outcome = self._here(entry, data, pixels)
                attempts = 0
                while outcome is None:
                    child = child or _Child(self)
                    outcome = child.decode(entry, data)
                    if child.is_unsound:
                        child.close()
                        child = None
                    elif outcome is None:  # it has ended over this image
                        attempts += 1
                        why = child.why(entry)
                        if child.is_certain or attempts == ATTEMPTS:
                            outcome = Outcome(None, why)
                        child.close()
                        child = None
                yield position, outcome
        finally:
            if child:
                child.close()

    def _plain(self, data: bytes) -> Outcome | None:
        """Of an image that needs no child; None of others. Raises NotAnImage, MemoryError."""
        kinds: list[str] = []
        try:
            decoded = images.decode_jpeg(data, exif=self.exif, count=kinds.append)
        except (images.NotAnImage, MemoryError, OSError):
            raise
        except Exception:  # no fault that is known: a child finds out, and names it
            return None
        if decoded is None:
            return None
        return Outcome(images.resize_and_center(decoded, self.size), kinds=tuple(kinds))

    def _here(self, entry: Entry, data: bytes, pixels: NDArray[np.uint8]) -> Outcome:
        """Of any image, by this process, without limits."""
        try:
            said = self.decode(data, pixels)
        except images.NotAnImage as reason:
            return Outcome(None, str(reason))
        except (MemoryError, OSError) as fault:
            raise JobError(self.lacking(entry, fault)) from None
        except Exception as fault:
            return Outcome(None, _unforeseen(fault))
        return Outcome(pixels, notes=tuple(said["notes"]), kinds=tuple(said["kinds"]))

    def decode(self, data: bytes, into: NDArray[np.uint8]) -> dict[str, Any]:
        """Decode one image into these pixels. Raises NotAnImage, MemoryError, OSError."""
        notes: list[str] = []
        kinds: list[str] = []
        decoded = images.decode(data, notes.append, exif=self.exif, background=self.background, count=kinds.append)
        into[:] = images.resize_and_center(decoded, self.size)
        return {"notes": notes, "kinds": kinds}

    def lacking(self, entry: Entry, fault: Exception) -> str:
        """What the machine lacks: another run would make another shard."""
        what = "not enough memory" if isinstance(fault, MemoryError) else last_line(fault)
        return self.now_not(entry, f"{what}; a lower {self.lower} may do")

    def now_not(self, entry: Entry, why: str) -> str:
        return f"{entry.name}: cannot be decoded now: {why}"


class _Child:
    """A child and its pipes; the pixels are in memory that both share."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._memory = mmap.mmap(-1, 3 * decoder.size**2)
        self._pixels = np.frombuffer(self._memory, np.uint8).reshape(decoder.size, decoder.size, 3)
        self._status: int | None = None
        self._heard = b""
        self.is_certain = False  # that another attempt would end the same way
        self.is_unsound = False  # it has answered what none does: foreign bytes may have taken it over
        self._no_memory = False
        with _starting, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads of Ray's; the child touches none
            (hears, self._ask), (self._answers, says) = os.pipe(), os.pipe()
            self._pid = os.fork()
            if not self._pid:
                try:
                    os.close(self._ask)
                    os.close(self._answers)
                    self._work(hears, says)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            os.close(hears)
            os.close(says)
        os.set_blocking(self._ask, False)

    def close(self) -> None:
        """End it."""
        os.close(self._ask)
        self._end()
        os.close(self._answers)

    def decode(self, entry: Entry, data: bytes) -> Outcome | None:
        """What became of an image; None if the child has ended before it said so. Raises JobError."""
        answer = self._exchange(entry, HEAD.pack(DONE, len(data)) + data)
        if answer is None:
            return None
        kind, text = answer
        if kind == NO_MEMORY:
            self._no_memory = True
            return None
        try:
            said = json.loads(text)
            notes, kinds = tuple[str, ...](), tuple[str, ...]()
            if kind == DONE:
                notes, kinds = (tuple(map(shown, map(_text, said[name]))) for name in ("notes", "kinds"))
            else:
                said = shown(_text(said))
        except (ValueError, LookupError, TypeError, RecursionError):
            self.is_unsound = True
            return Outcome(None, "its decoder answered what no decoder does")
        if kind == FAULT:
            raise JobError(self._decoder.lacking(entry, OSError(said)))
        if kind == NO_IMAGE:
            return Outcome(None, said)
        return Outcome(self._pixels, notes=notes, kinds=tuple(each for each in kinds if each in images.COUNTED))

    def why(self, entry: Entry) -> str:
        """Why the child has ended, as a reason to reject the entry. Raises JobError where the machine is at fault."""
        limit = f"{self._decoder.memory_bytes // 2**20} MB"
        if self._no_memory:
            if not _can_be_had(self._decoder.memory_bytes):
                raise JobError(self._decoder.lacking(entry, MemoryError()))
            return f"takes more than {limit} to decode"
        status = self._end()
        if status == -signal.SIGXCPU:
            self.is_certain = True
            return f"takes more than {self._decoder.seconds} seconds to decode"
        if status == -signal.SIGKILL or status >= 0:
            what = "the process that decodes was ended; there may be no memory left"
            raise JobError(self._decoder.now_not(entry, f"{what}; a lower {self._decoder.lower} may do"))
        return f"crashes its decoder (signal {-status})"

    def _exchange(self, entry: Entry, question: bytes) -> tuple[bytes, bytes] | None:
        """Ask, and the kind and the text of the answer; None if there is none. Raises JobError."""
        until, unsent = time.monotonic() + DEADLINE_FACTOR * self._decoder.seconds, memoryview(question)
        while True:
            if len(self._heard) >= HEAD.size:
                kind, size = HEAD.unpack_from(self._heard)
                if size > MAX_ANSWER_BYTES or kind not in (DONE, NO_IMAGE, NO_MEMORY, FAULT):
                    return None
                if len(self._heard) >= HEAD.size + size:
                    text, self._heard = self._heard[HEAD.size : HEAD.size + size], self._heard[HEAD.size + size :]
                    return kind, text
            left = max(0.0, until - time.monotonic())
            ready, free, _ = select.select([self._answers], [self._ask] if unsent else [], [], left)
            if free:
                try:
                    unsent = unsent[os.write(self._ask, unsent) :]
                except BrokenPipeError:  # which the other pipe tells, too
                    unsent = unsent[:0]
            if ready:
                data = os.read(self._answers, 2**16)
                if not data:
                    return None
                self._heard += data
            elif not free and not left:
                raise JobError(self._decoder.now_not(entry, "the machine does not get to it; try again"))

    def _end(self) -> int:
        """Its exit status. One that is at work is ended: it has nothing to save."""
        if self._status is None:
            ready, _, _ = select.select([self._answers], [], [], 0)
            if not (ready and os.read(self._answers, 1) == b""):  # it has not closed its pipe, as when it ends
                os.kill(self._pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def _work(self, hears: int, says: int) -> NoReturn:
        """The child's side."""
        import torch

        torch.set_num_threads(1)  # the parent's other threads are not here
        sandbox.end_with_parent()
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        sandbox.limit(self._decoder.memory_bytes)
        sandbox.lower(resource.RLIMIT_FSIZE, 0)
        questions = os.fdopen(hears, "rb")
        while head := questions.read(HEAD.size):
            data = questions.read(HEAD.unpack(head)[1])
            used = resource.getrusage(resource.RUSAGE_SELF)
            seconds = int(used.ru_utime + used.ru_stime) + 1 + self._decoder.seconds
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            said: Any
            try:
                kind, said = DONE, self._decoder.decode(data, self._pixels)
            except images.NotAnImage as reason:
                kind, said = NO_IMAGE, str(reason)
            except MemoryError:
                kind, said = NO_MEMORY, ""
            except OSError as fault:
                kind, said = FAULT, last_line(fault)
            except Exception as fault:  # foreign bytes can fail anywhere in a decoder
                kind, said = NO_IMAGE, _unforeseen(fault)
            text = json.dumps(said).encode()
            if len(text) > MAX_ANSWER_BYTES:
                text = json.dumps(shown(said)).encode()  # a reason; notes are short
            os.write(says, HEAD.pack(kind, len(text)) + text)
        os._exit(0)


def _unforeseen(fault: Exception) -> str:
    """Why an image has no pixels whose decoder raised what nobody expected."""
    return f"its decoder failed: {name_and_line(fault)}"


def _text(value: object) -> str:
    """Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _can_be_had(count: int) -> bool:
    """Whether the machine would give a process so much memory."""
    try:
        mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True
