"""A fork server for a private Ray: one process imports what workers need, and every worker begins as a copy of it.

A Ray worker is a new Python, which imports Ray, PyTorch and our training loop for five seconds of a CPU; a run starts
eight. The server imports them once, while the command itself still starts, and a copy takes a tenth of a second.
Ray asks for workers through fork_client.py, in the place of its own script. Ray itself is imported when the first
worker is asked for: its library then reads from the environment which raylet and job it belongs to.

The server serves the driver's own user only, on this machine only, and ends with the driver, however that ends. It has
one thread when it copies itself, and has not touched a GPU. Without one (another system than Linux, a machine with a
GPU, whose libraries might not bear to be copied) workers start as Ray starts them.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import runpy
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.cluster.fork_client import MORE, SERVER

CLIENT = Path(__file__).with_name("fork_client.py")
GPU = Path("/dev/nvidiactl")
LONGEST_REQUEST = 2**22  # bytes; an environment may be large
FIELDS = {"arguments", "environment", "cwd", "nice", "oom_score_adj", "blocked", "limits"}  # of a request
NO_JOB = "ffffffff"  # RAY_JOB_ID of a worker for any job
OF_RAYLET = ("RAY_RAYLET_PID", "RAY_JOB_ID")  # environment variables that Ray reads when it is imported


def is_possible() -> bool:
    """Whether this machine's workers can be copies."""
    return sys.platform == "linux" and not GPU.exists()


def is_started() -> bool:
    """Whether this process has a server."""
    return _server is not None


def start(modules: Sequence[str], with_ray: Sequence[str]) -> None:
    """Start the server of this process, unless it has one or cannot have one; returns at once.

    modules: what the server imports at once, which must not import Ray; "package.module:function" also calls the
    function. with_ray: what it imports when the first worker is asked for. The environment has to be that of the
    workers already. The server's address is in it afterwards.
    """
    global _server
    if _server is not None or not is_possible():
        return
    address = f"alexnet-fork-server-{secrets.token_hex(16)}"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("\0" + address)
    listening.listen(64)
    run = [sys.executable, "-m", "orchestrator.cluster.fork_server", str(listening.fileno()), ",".join(modules)]
    run += [",".join(with_ray)]
    _server = subprocess.Popen(
        run, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        pass_fds=[listening.fileno()], env=os.environ | {SERVER: address}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    listening.close()
    os.environ[SERVER] = address


_server: subprocess.Popen[bytes] | None = None


def serve(listening: socket.socket, modules: Sequence[str], with_ray: Sequence[str]) -> list[str] | None:
    """Import the modules and make copies until the driver, at the other end of standard input, has ended.

    Returns None then; in each copy, when it has become what was asked for, the arguments of the script to run.
    """
    _import(modules)
    raylet, is_usable = None, False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets ended copies
    events = selectors.DefaultSelector()
    events.register(listening, selectors.EVENT_READ)
    events.register(sys.stdin.buffer, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in events.select()}
        if sys.stdin.buffer in ready:
            return None
        connection, _ = listening.accept()
        with connection:
            try:
                request, streams = _receive(connection)
            except (OSError, ValueError):
                continue
            found = {name: request["environment"].get(name, "") for name in OF_RAYLET}
            if raylet is None and all(found.values()) and found["RAY_JOB_ID"] != NO_JOB:
                raylet = found
                os.environ.update(found)
                _import_ray(with_ray)
                is_usable = _draws_differ()
            if found != raylet or not is_usable:  # the client goes on without this server
                _close(streams)
                continue
            pid = os.fork()
            if pid == 0:
                events.close()
                listening.close()
                return _become(request, streams, socket.socket(fileno=connection.detach()))
            _close(streams)
            with contextlib.suppress(OSError):
                connection.sendall(str(pid).encode() + MORE)


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        module, _, function = name.partition(":")
        with contextlib.suppress(Exception):  # the worker will say why
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()


def _import_ray(modules: Sequence[str]) -> None:
    """Import modules that import Ray, without a draw from the random numbers of its library.

    They are seeded by the first draw, and copies would then draw the same identifiers for their tasks, whose messages
    would be lost.
    """
    actor: Any = importlib.import_module("ray.actor")
    kind = actor.ActorClassID  # one is drawn for every class of actors
    actor.ActorClassID = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    _import(modules)


def _draws_differ() -> bool:
    """Whether two copies draw different identifiers."""
    import ray

    drawn = []
    for _ in range(2):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, ray.NodeID.from_random().binary())
            os._exit(0)
        os.close(writing)
        drawn.append(os.read(reading, 100))
        os.close(reading)
    return drawn[0] != drawn[1]


def _close(streams: list[int]) -> None:
    for stream in streams:
        os.close(stream)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the standard streams of the process that makes it. Raises OSError or ValueError."""
    connection.settimeout(5)
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise ValueError("another user's")
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    text = bytearray()
    while not text.endswith(MORE):
        part = connection.recv(2**16)
        if not part or len(text) > LONGEST_REQUEST or len(streams) != 3:
            _close(streams)
            raise ValueError("not a request")
        text += part
    connection.settimeout(None)
    try:
        request = json.loads(text)
        if FIELDS.difference(request):
            raise ValueError("not a request")
    except (ValueError, TypeError):
        _close(streams)
        raise ValueError("not a request") from None
    return request, streams


_held: socket.socket | None = None  # open as long as a copy lives: its client waits for the end


def _become(request: dict[str, Any], streams: list[int], connection: socket.socket) -> list[str]:
    """Make this copy the process that the client would have been. Returns the arguments of the script to run."""
    global _held
    _held = connection
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(request["oom_score_adj"])
    for name, limits in request["limits"].items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(int(name), tuple(limits))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    arguments: list[str] = request["arguments"]
    return arguments


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    arguments = serve(listening, *(names.split(",") for names in sys.argv[2:4]))
    if arguments is not None:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
