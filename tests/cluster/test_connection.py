"""What a connection to Ray prints, and what it leaves to the log."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from orchestrator.base.exits import Interrupted, JobError
from orchestrator.cluster import connection
from orchestrator.cluster.connection import QUIET_LOGGERS, check_address

CODE = """
import logging, sys
from orchestrator.base import logs
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.connection import QUIET_LOGGERS, connect
connect()
logs.open_run_log(StoragePath.of(sys.argv[1]))
for name in QUIET_LOGGERS:
    logger = logging.getLogger(name)
    logger.info("a note of %s", name)
    logger.error("an error of %s", name)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_s_lines_are_off_the_terminal_and_not_lost(tmp_path):
    log = tmp_path / "run.log"
    done = subprocess.run([sys.executable, "-c", CODE, str(log)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = [line.rpartition(": ")[2] for line in log.read_text().splitlines()]
    for name in QUIET_LOGGERS:
        assert written.count(f"a note of {name}") == written.count(f"an error of {name}") == 1


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "127.0.0.1:9",
            r"no cluster is there \(connection refused\); `unset RAY_ADDRESS`.*`ray start .*`ray up`",
        ),
        ("ray://127.0.0.1:9", r"no cluster is there \(connection refused\)"),
        ("[::1]:9", r"no cluster is there"),
        ("http://127.0.0.1:8265", "job server.*RAY_API_SERVER_ADDRESS.*unset RAY_ADDRESS"),
        ("127.0.0.1", "expected HOST:PORT such as"),
        ("s3://bucket:1", "expected HOST:PORT such as"),
        ("a b:6379x", "expected HOST:PORT such as"),
    ],
)
def test_an_address_where_no_cluster_is_says_so_in_one_line(address, words):
    with pytest.raises(JobError, match=f"^RAY_ADDRESS={re.escape(address)}: .*{words}") as error:
        check_address(address)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_words_for_this_machine_are_left_to_ray(address):
    check_address(address)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"-ERR unknown command\r\n", "what answers there is not Ray"), (None, r"no answer within 1 s")],
)
def test_a_port_that_another_program_has_is_no_cluster(answer, words, monkeypatch):
    monkeypatch.setattr(connection, "ADDRESS_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if answer is None:
            with pytest.raises(JobError, match=words):
                check_address(address)
        else:
            code = "import sys; from orchestrator.cluster.connection import check_address; check_address(sys.argv[1])"
            process = subprocess.Popen([sys.executable, "-c", code, address], stderr=subprocess.PIPE, text=True)
            client, _ = server.accept()
            with client:
                client.sendall(answer)
                _, err = process.communicate(timeout=20)
            assert re.search(words, err.splitlines()[-1])
        assert time.monotonic() - began < 10


@pytest.mark.ray
def test_a_cluster_answers(here):
    check_address(here["RAY_ADDRESS"])


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "tune"])
def test_a_job_with_an_address_to_nowhere_ends_within_ten_seconds(job, tmp_path):
    env = dict(os.environ) | {"RAY_ADDRESS": "127.0.0.1:9"}
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 30, "10 s on two idle cores"
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: RAY_ADDRESS=127.0.0.1:9: no cluster is there")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "tune"])
@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.5])
def test_ctrl_c_while_a_job_starts_ends_it_in_one_line(job, after_s, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped by SIGINT\n")


@pytest.fixture
def starts(monkeypatch):
    """The starts of a private Ray, each of which raises the next of `fails` and is then shut down."""
    ray = pytest.importorskip("ray")
    made = SimpleNamespace(fails=[], number=0, shut_down=0)

    def init(private, environment):
        made.number += 1
        if made.fails:
            raise made.fails.pop(0)

    def shutdown():
        made.shut_down += 1

    monkeypatch.setattr(connection, "_init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return made


def too_slow():
    return RuntimeError("some lines\nThe current node timed out during startup. It may be busy")


def test_a_private_ray_that_was_too_slow_is_started_once_more(starts):
    starts.fails = [too_slow()]
    connection.connect()
    assert (starts.number, starts.shut_down) == (2, 1)


def test_a_private_ray_that_is_too_slow_twice_is_one_line_with_what_may_help(starts):
    starts.fails = [too_slow(), too_slow(), None]
    with pytest.raises(JobError, match=r"^a private Ray could not be reached: .*; this machine may be too busy: run"):
        connection.connect()
    assert starts.number == 2


@pytest.mark.parametrize("address", ["", "auto"])
def test_what_is_no_slow_start_of_a_private_ray_is_not_tried_again(starts, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    starts.fails = [too_slow() if address else RuntimeError("no such file")]
    where = "Ray at RAY_ADDRESS=auto" if address else "a private Ray"
    with pytest.raises(JobError, match=f"^{where} could not be reached: [^;]*$"):
        connection.connect()
    assert (starts.number, starts.shut_down) == (1, 0)


def test_sigterm_while_ray_has_its_own_handler_stops_the_job(monkeypatch):
    """Ray's handler exits with the signal's number while ray.init runs."""
    ray = pytest.importorskip("ray")

    def init(private, environment):
        raise SystemExit(int(signal.SIGTERM))

    monkeypatch.setattr(connection, "_init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(Interrupted) as stop:
        connection.connect()
    assert stop.value.exit_status == 143
