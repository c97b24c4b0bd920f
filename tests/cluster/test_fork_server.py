"""Workers of a private Ray that are copies of one process."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from orchestrator.cluster import fork_client, fork_server

SHOW = """
import json, os, resource, signal, sys
print(json.dumps({
    "arguments": sys.argv[1:], "path": sys.path[0], "name": __name__, "pid": os.getpid(), "parent": os.getppid(),
    "cwd": os.getcwd(), "nice": os.getpriority(os.PRIO_PROCESS, 0), "new": os.environ.get("NEW"),
    "old": os.environ.get("ONLY_OF_THE_SERVER"), "imported": "colorsys" in sys.modules,
    "late": "sndhdr" in sys.modules or "wave" in sys.modules,
    "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "open": sorted(int(n) for n in os.listdir("/proc/self/fd")),
    "session": os.getsid(0), "random": __import__("random").random(),
}), flush=True)
print("to standard error", file=sys.stderr)
sys.stdin.readline()
"""
RAYLET = {"RAY_RAYLET_PID": "17", "RAY_JOB_ID": "01000000"}


@pytest.fixture
def server(monkeypatch):
    """A server that this process has started."""
    monkeypatch.setattr(fork_server, "_server", None)
    monkeypatch.setenv("ONLY_OF_THE_SERVER", "1")
    monkeypatch.delenv(fork_client.SERVER, raising=False)
    fork_server.start(["colorsys", "no.such.module", "time:time"], ["wave"])
    monkeypatch.delenv("ONLY_OF_THE_SERVER")
    yield fork_server._server
    fork_server._server.stdin.close()
    assert fork_server._server.wait(10) == 0


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "default_worker.py"
    path.write_text(SHOW)
    return path


class Client:
    """fork_client.py in a process of its own, as Ray runs it."""

    def __init__(self, script, *arguments, env=None, **options):
        command = [sys.executable, str(fork_client.__file__), str(script), "--one", *arguments, "--language=PYTHON"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **RAYLET, **(env or {})}, **options,
        )  # fmt: skip

    def shown(self):
        return json.loads(self.process.stdout.readline())

    def end(self):
        """Standard output and error once the copy, and with it the client, has ended."""
        return self.process.communicate("\n", timeout=30)


def test_a_copy_is_what_the_client_would_have_become(server, script, tmp_path):
    def prepare():
        os.nice(3)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))

    context = fork_client.CONTEXT + json.dumps({"env_vars": {"NEW": "given"}, "py_executable": sys.executable})
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    client = Client(script, context, cwd=tmp_path, preexec_fn=prepare)
    shown = client.shown()
    assert shown["arguments"] == ["--one"]
    assert shown["name"] == "__main__"
    assert shown["path"] == shown["cwd"] == str(tmp_path)
    assert (shown["new"], shown["old"]) == ("given", None)
    assert shown["imported"]
    assert shown["late"]
    assert shown["nice"] == min(19, nice + 3)
    assert signal.SIGUSR2 in shown["blocked"]
    assert shown["files"] == [512, 1024]
    assert shown["parent"] == server.pid
    assert shown["session"] == shown["pid"]
    assert len(shown["open"]) <= 5, "its streams, its connection, and the folder being read"
    assert client.process.poll() is None, "the client waits for the copy"
    assert client.end() == ("", "to standard error\n")
    assert client.process.returncode == 0


def test_copies_differ_in_their_random_numbers_and_leave_nothing(server, script):
    clients = [Client(script) for _ in range(3)]
    shown = [client.shown() for client in clients]
    assert len({each["pid"] for each in shown}) == len({each["random"] for each in shown}) == 3
    for client in clients:
        client.end()
    deadline = time.monotonic() + 10
    while psutil.Process(server.pid).children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.Process(server.pid).children(), "not even as zombies"


def test_a_client_that_is_asked_to_end_passes_it_on(server, script):
    client = Client(script)
    copy = psutil.Process(client.shown()["pid"])
    client.process.send_signal(signal.SIGTERM)
    copy.wait(10)
    assert client.process.wait(10) == 0


def test_a_killed_copy_ends_its_client(server, script):
    client = Client(script)
    os.kill(client.shown()["pid"], signal.SIGKILL)
    assert client.process.wait(10) == 0


@pytest.mark.parametrize(
    "env", [{"RAY_RAYLET_PID": "18"}, {"RAY_JOB_ID": "02000000"}, {"RAY_JOB_ID": fork_server.NO_JOB}]
)
def test_a_worker_of_another_raylet_or_job_is_refused(server, script, env, monkeypatch):
    first = Client(script)
    first.shown()
    for name, value in {**RAYLET, **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="the server has ended"):
        fork_client.fork(fork_client.request_of([str(script)]), os.environ[fork_client.SERVER])
    assert server.poll() is None
    first.end()


@pytest.mark.parametrize("sent", [b"", b"x", b"{}" + fork_client.MORE, b"x" * 100 + fork_client.MORE])
def test_what_is_no_request_does_not_end_the_server(server, script, sent):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + os.environ[fork_client.SERVER])
        if sent:
            socket.send_fds(connection, [b" "], [0, 1, 2])
            connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(10) == b""
    client = Client(script)
    assert client.shown()["parent"] == server.pid
    client.end()


@pytest.mark.slow
def test_no_copy_is_made_where_all_would_draw_the_same_identifiers(monkeypatch, script, tmp_path):
    (tmp_path / "drawing.py").write_text("import ray\nray.NodeID.from_random()\n")
    monkeypatch.setattr(fork_server, "_server", None)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name, value in RAYLET.items():
        monkeypatch.setenv(name, value)
    fork_server.start([], ["drawing"])
    with pytest.raises(OSError, match="the server has ended"):
        fork_client.fork(fork_client.request_of([str(script)]), os.environ[fork_client.SERVER])
    fork_server._server.stdin.close()
    assert fork_server._server.wait(10) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing(server, script):
    code = """
import os, sys
from orchestrator.cluster import fork_client
os.setuid(65534)
try:
    fork_client.fork({"arguments": [], "environment": {}}, os.environ[fork_client.SERVER])
except OSError:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 7
    assert server.poll() is None


def test_the_server_ends_with_its_driver_however_that_ends():
    code = (
        "from orchestrator.cluster import fork_server as f; f.start([], []); print(f._server.pid, flush=True); input()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.communicate()
    server.wait(10)


@pytest.mark.parametrize(
    "arguments",
    [
        ["default_worker.py", "--language=JAVA"],
        ["-m", "ray.util.client.server"],
        [],
        ["default_worker.py", fork_client.CONTEXT + json.dumps({"command_prefix": ["docker"]})],
        ["default_worker.py", fork_client.CONTEXT + json.dumps({"py_executable": "/usr/bin/other"})],
        ["default_worker.py", fork_client.CONTEXT + json.dumps({"env_vars": {"PATH": "${PATH}:/more"}})],
    ],
)
def test_what_no_copy_can_be_is_left_to_ray(arguments):
    with pytest.raises(ValueError, match="not"):
        fork_client.request_of(arguments)


def test_without_a_server_ray_s_own_script_goes_on(monkeypatch):
    called = []
    monkeypatch.setattr(sys, "argv", ["fork_client.py", "default_worker.py", "--one"])
    monkeypatch.setenv(fork_client.SERVER, "alexnet-fork-server-of-nobody")
    monkeypatch.setattr(os, "execv", lambda path, arguments: called.append(arguments) or sys.exit(0))
    with pytest.raises(SystemExit):
        fork_client.main()
    assert called[0][1].endswith("setup_worker.py")
    assert called[0][2:] == ["default_worker.py", "--one"]


def test_on_a_machine_with_a_gpu_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(fork_server, "GPU", tmp_path)
    monkeypatch.setattr(fork_server, "_server", None)
    fork_server.start([], [])
    assert not fork_server.is_started()


OF_RAY = """
import os, signal, sys, threading, time
from orchestrator.cluster import fork_server
from orchestrator.cluster.connection import connect, prepare_workers
from orchestrator.cli.start import WITH_RAY, WORKERS
prepare_workers(WORKERS, [*WITH_RAY, "colorsys", "orchestrator.search.trial"])
connect()
import ray
@ray.remote(num_cpus=0)
class Actor:
    def found(self):
        return os.getpid(), os.getppid(), "colorsys" in sys.modules, os.environ["RAY_AUTH_TOKEN"]
    def drawn(self):
        found = [ray.NodeID.from_random().hex()]
        thread = threading.Thread(target=lambda: found.append(ray.NodeID.from_random().hex()))
        thread.start()
        thread.join()
        return [*found, ray.get_runtime_context().get_task_id()]
actor = Actor.remote()
drawn = ray.get([each.drawn.remote() for each in (actor, Actor.remote(), Actor.remote())])
assert len({name for names in drawn for name in names}) == 9, "identifiers that Ray draws"
pid, parent, imported, token = ray.get(actor.found.remote())
assert (parent, imported, token) == (fork_server._server.pid, True, os.environ["RAY_AUTH_TOKEN"])
os.kill(pid, signal.SIGKILL)
try:
    ray.get(actor.found.remote())
except ray.exceptions.RayActorError:
    print("noticed")
actor = Actor.remote()
print(ray.get(actor.found.remote())[0], fork_server._server.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_has_its_workers_from_the_server_and_none_is_left(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    driver = subprocess.Popen([sys.executable, "-c", OF_RAY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "noticed\n" in iter(driver.stdout.readline, "")  # after what Ray says of it
    left = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    left += psutil.Process(driver.pid).children()  # Ray's two agents are not among them: they take minutes
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(left, 30)
    assert not alive
