"""A room of its own for foreign bytes: a reader runs in a child process with limits on memory, CPU time and the clock.

A reader that crashes, grows or never ends does so alone. It writes no file. What it returns are plain bytes, which are
never unpickled: JSON, Arrow, or whatever its caller reads as data.
"""

import contextlib
import faulthandler
import importlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import orchestrator
from orchestrator.base.shown import shown

MEMORY_BYTES = 2**29  # beyond what the interpreter and its libraries take
SECONDS = 60  # of CPU
DEADLINE_FACTOR = 10  # by the clock, on a machine that is busy
VALUE, REFUSED, LINE = b"V", b"R", b"L"
HEAD = struct.Struct("<cQ")  # kind and length of what a child says
MAX_LINE_BYTES = 2**16
OPEN_FILES = 4096  # more than a process has open when it starts a child
ROOT = Path(orchestrator.__file__).resolve().parents[1]
SILENT = 0.2  # seconds between looks at the clock


class Refused(ValueError):
    """The bytes could not be read within the limits; the message is the reason, one line."""


def run(
    reader: Callable[..., bytes],
    data: bytes,
    *,
    memory_bytes: int = MEMORY_BYTES,
    seconds: int = SECONDS,
    say: Callable[[str], None] | None = None,
) -> bytes:
    """What `reader`, a function at the top of one of our modules, returns for data. Raises Refused.

    say: takes lines for the user while it reads; the reader then gets a function for them as its second argument.
    """
    arguments = [reader.__module__, reader.__name__, str(memory_bytes), str(seconds), "says" if say else "silent"]
    (given, question), (answer, told), (errors, complained) = os.pipe(), os.pipe(), os.pipe()
    try:
        child = _begin(arguments, given, told, complained)
    finally:
        for pipe in (given, told, complained):
            os.close(pipe)
    hearing = _Hearing(say or (lambda line: None), memory_bytes)
    try:
        hearing.talk(question, data, answer, errors, DEADLINE_FACTOR * seconds)
    finally:
        if not hearing.ended:
            child.kill()
        status = child.wait()
        os.close(answer)
        os.close(errors)
    if not hearing.ended:
        raise Refused(hearing.broken or f"took more than {DEADLINE_FACTOR * seconds} seconds")
    if hearing.kind == VALUE and status == 0:
        return bytes(hearing.value)
    if hearing.kind == REFUSED and status == 0:
        raise Refused(shown(hearing.value.decode("utf-8", "replace")))
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise Refused(f"its reader was ended: it took more than {seconds} seconds, or the machine has no memory left")
    if status < 0:
        raise Refused(f"crashed its reader (signal {-status})")
    last = hearing.complaints.decode("utf-8", "replace").strip().splitlines()[-1:]
    raise Refused("its reader failed" + (f": {shown(last[0])}" if last else ""))


class _Hearing:
    """What a child says, as far as it is believed."""

    def __init__(self, say: Callable[[str], None], most_bytes: int) -> None:
        self.say, self.most_bytes = say, most_bytes
        self.kind, self.value, self.complaints = b"", bytearray(), b""
        self.ended = False  # both pipes, as when the child ends
        self.broken = ""  # what a child said that no reader says
        self._waiting = bytearray()

    def talk(self, question: int, data: bytes, answer: int, errors: int, seconds: float) -> None:
        """Hand over the data and listen until the child ends, breaks the form, or the time is over."""
        until, open_pipes, left = time.monotonic() + seconds, {answer, errors}, memoryview(data)
        os.set_blocking(question, False)
        asking = True
        try:
            while open_pipes and not self.broken:
                ready, free, _ = select.select(list(open_pipes), [question] if asking else [], [], SILENT)
                if free:
                    try:
                        left = left[os.write(question, left) :] if left else left
                    except BrokenPipeError:  # it has ended, and that is heard below
                        left = left[:0]
                    if not left:
                        asking = False
                        os.close(question)
                if time.monotonic() > until:
                    return
                for pipe in ready:
                    self._hear(pipe, os.read(pipe, 2**20), errors, open_pipes)
        finally:
            if asking:
                os.close(question)
        self.ended = not self.broken

    def _hear(self, pipe: int, data: bytes, errors: int, open_pipes: set[int]) -> None:
        if not data:
            open_pipes.discard(pipe)
        elif pipe == errors:
            self.complaints = (self.complaints + data)[-4096:]
        else:
            self._waiting += data
            self._take()

    def _take(self) -> None:
        """Whole messages out of what has come."""
        while len(self._waiting) >= HEAD.size:
            kind, size = HEAD.unpack_from(self._waiting)
            if kind not in (VALUE, REFUSED, LINE) or size > (MAX_LINE_BYTES if kind == LINE else self.most_bytes):
                self.broken = "its reader answered what no reader does"
                return
            if len(self._waiting) < HEAD.size + size:
                return
            message = self._waiting[HEAD.size : HEAD.size + size]
            del self._waiting[: HEAD.size + size]
            if kind == LINE:
                self.say(shown(message.decode("utf-8", "replace"), None))
            else:
                self.kind, self.value = kind, message


class _Process(Protocol):
    """A child: a subprocess.Popen, or one that was forked."""

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def _begin(arguments: list[str], given: int, told: int, complained: int) -> _Process:
    """A child that reads from one file and writes to two. Forked where that is safe, which is while this process has
    one thread; otherwise a new interpreter is started, which takes half a second more."""
    if sys.platform == "linux" and threading.active_count() == 1 and "ray" not in sys.modules:
        return _Forked(arguments, given, told, complained)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()", *arguments]
    return subprocess.Popen(command, stdin=given, stdout=told, stderr=complained, env=environment)


class _Forked:
    """A copy of this process that becomes a child."""

    def __init__(self, arguments: list[str], given: int, told: int, complained: int) -> None:
        self._pid = os.fork()
        if self._pid:
            return
        try:
            for number, file in enumerate((given, told, complained)):
                os.dup2(file, number)
            os.closerange(3, OPEN_FILES)
            sys.argv = ["-c", *arguments]
            sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(2, "w", closefd=False)
            sys.stderr = sys.stdout
            _child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _child() -> NoReturn:
    """The child's side: limits itself, reads, and says a value or the reason why there is none."""
    module, name, memory_bytes, seconds, says = sys.argv[1:6]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no part of the value

    def tell(kind: bytes, value: bytes) -> None:
        out.write(HEAD.pack(kind, len(value)))
        out.write(value)
        out.flush()

    def say(line: str) -> None:
        tell(LINE, line.encode("utf-8", "replace")[:MAX_LINE_BYTES])

    data = sys.stdin.buffer.read()
    reader = getattr(importlib.import_module(module), name)
    end_with_parent()
    limit(int(memory_bytes))
    lower(resource.RLIMIT_CPU, int(seconds))
    lower(resource.RLIMIT_FSIZE, 0)  # writes no file
    try:
        value = reader(data, say) if says == "says" else reader(data)
    except MemoryError:
        tell(REFUSED, f"needs more than {int(memory_bytes) // 2**20} MB to read".encode())
    except Exception as error:  # foreign bytes can fail anywhere in a reader
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        tell(REFUSED, f"{type(error).__name__}: {lines[0][:300]}".encode("utf-8", "replace"))
    else:
        tell(VALUE, value)
    os._exit(0)


def end_with_parent() -> None:
    """Have this process, a child, end when its parent ends, and at any signal but Ctrl-C's without ado."""
    faulthandler.disable()  # what crashes it is told by its parent
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def limit(memory_bytes: int) -> None:
    """Let this process take so much more memory than it has. Files that are mapped for reading do not count."""
    sys.dont_write_bytecode = True
    lower(resource.RLIMIT_DATA, _data_bytes() + memory_bytes)
    lower(resource.RLIMIT_CORE, 0)


def lower(kind: int, most: int) -> None:
    """Set a limit of this process, unless it has a lower one."""
    hard = resource.getrlimit(kind)[1]
    room = hard == resource.RLIM_INFINITY or most < hard
    most = most if room else hard
    with contextlib.suppress(ValueError, OSError):  # some systems have limits that cannot be set
        # a second more of CPU, between the signal that says why and the one that only ends
        resource.setrlimit(kind, (most, most + (kind == resource.RLIMIT_CPU and room)))


def _data_bytes() -> int:
    """Bytes of memory of its own that this process has now; 4 GB where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return 2**32


def machine_bytes() -> int:
    """Of memory."""
    found: Any = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(found)
