"""What a private Ray runs to start a worker: has the fork server make the process, and ends when that has ended.

Ray runs it as a script in the place of its own setup_worker.py, with the same arguments. It imports nothing that takes
time. Where there is no server, or Ray asks for what a copy cannot be, such as a container, Ray's own script goes on.
"""

import json
import os
import resource
import signal
import socket
import sys

SERVER = "ALEXNET_FORK_SERVER"  # environment variable: the server's address, in the abstract namespace of sockets
MORE = b"\n"  # ends a request and an answer
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
PLAIN = {"command_prefix", "py_executable", "override_worker_entrypoint", "java_jars"}  # of Ray's context; not env_vars


def request_of(arguments: list[str]) -> dict[str, object]:
    """What the server has to know, of Ray's arguments and of this process. Raises ValueError if it cannot help."""
    context, language, passed = "{}", "PYTHON", []
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = argument.removeprefix(CONTEXT)
        elif argument.startswith(LANGUAGE):
            language = argument.removeprefix(LANGUAGE)
        else:
            passed.append(argument)
    found = json.loads(context)
    variables = found.get("env_vars") or {}
    special = [name for name in PLAIN if found.get(name) and found[name] != sys.executable]
    if language != "PYTHON" or special or any("$" in value for value in variables.values()):
        raise ValueError("not a plain Python worker")
    if not (passed and passed[0].endswith("default_worker.py")):
        raise ValueError("not one of Ray's workers")
    with open("/proc/self/oom_score_adj") as file:
        oom_score_adj = file.read().strip()
    return {
        "arguments": passed,
        "environment": {**os.environ, **variables},
        "cwd": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": oom_score_adj,
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "limits": {name: resource.getrlimit(name) for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)},
    }


def fork(request: dict[str, object], address: str) -> tuple[socket.socket, int]:
    """The connection that stays open as long as the new process lives, and its pid. Raises OSError or ValueError."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)  # the server may be importing still
    connection.connect("\0" + address)
    socket.send_fds(connection, [b" "], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + MORE)
    answer = b""
    while not answer.endswith(MORE):
        part = connection.recv(64)
        if not part:
            raise OSError("the server has ended")
        answer += part
    connection.settimeout(None)
    return connection, int(answer)


def main() -> None:
    arguments = sys.argv[1:]
    try:
        connection, pid = fork(request_of(arguments), os.environ[SERVER])
    except (OSError, ValueError, KeyError):
        import ray._private.workers.setup_worker as original  # takes time

        os.execv(sys.executable, [sys.executable, original.__file__, *arguments])
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    while connection.recv(64):  # nothing comes, but the end
        pass


if __name__ == "__main__":
    main()
