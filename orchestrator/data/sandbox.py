"""A room of its own for foreign bytes: a reader runs in a child process with limits on memory, CPU time and the clock.

The child writes plain bytes, which are never unpickled: JSON, or whatever its caller reads as data.
"""

import importlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orchestrator

MEMORY_BYTES = 2**29  # beyond what the interpreter and its libraries take
SECONDS = 60  # of CPU
DEADLINE_FACTOR = 4  # by the clock, on a machine that is busy
VALUE, REFUSED = b"V", b"R"
ROOT = Path(orchestrator.__file__).resolve().parents[1]


class Refused(ValueError):
    """The bytes could not be read within the limits; the message is the reason, one line."""


def run(
    reader: Callable[[bytes], bytes], data: bytes, *, memory_bytes: int = MEMORY_BYTES, seconds: int = SECONDS
) -> bytes:
    """What `reader`, a function at the top of one of our modules, returns for data. Raises Refused."""
    limits = [reader.__module__, reader.__name__, str(memory_bytes), str(seconds)]
    code = f"from {__name__} import _child; _child()"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *limits], input=data, capture_output=True, env=environment,
            timeout=DEADLINE_FACTOR * seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Refused(f"took more than {DEADLINE_FACTOR * seconds} seconds") from None
    kind, value = done.stdout[:1], done.stdout[1:]
    if kind == VALUE and done.returncode == 0:
        return value
    if kind == REFUSED and done.returncode == 0:
        raise Refused(value.decode("utf-8", "replace"))
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise Refused(f"its reader was ended: it took more than {seconds} seconds, or the machine has no memory left")
    if done.returncode < 0:
        raise Refused(f"crashed its reader (signal {-done.returncode})")
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    raise Refused("its reader failed" + (f": {last[0]}" if last else ""))


def _child() -> None:
    """The child's side: limits itself, reads, and writes a letter and the value or the reason."""
    module, name, memory_bytes, seconds = sys.argv[1:5]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no part of the value
    data = sys.stdin.buffer.read()
    reader = getattr(importlib.import_module(module), name)
    limit = _address_space() + int(memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        kind, value = VALUE, reader(data)
    except MemoryError:
        kind, value = REFUSED, f"needs more than {int(memory_bytes) // 2**20} MB to read".encode()
    except Exception as error:  # foreign bytes can fail anywhere in a reader
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        kind, value = REFUSED, f"{type(error).__name__}: {lines[0][:300]}".encode()
    out.write(kind + value)
    out.flush()
    os._exit(0)


def _address_space() -> int:
    """Bytes of address space that this process has now; 4 GB where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 2**32
