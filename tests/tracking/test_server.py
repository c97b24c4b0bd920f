"""A tracking server of one's own: its password, its folder, and who keeps it running."""

import base64
import os
import signal
import socket
import stat
import time
import urllib.error
import urllib.request

import psutil
import pytest
from conftest import refused

from orchestrator.base.exits import JobError
from orchestrator.cli import tracking
from orchestrator.tracking import server as server_module
from orchestrator.tracking import store
from orchestrator.tracking.server import CLIENT, TrackingServer, read_settings


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = TrackingServer(tmp_path_factory.mktemp("tracking") / "folder", port=port)
    server.start()
    yield server
    assert server.stop()


def asked(server, user=None):
    request = urllib.request.Request(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_it_wants_a_password_that_only_its_owner_can_read(server):
    settings = read_settings(server.folder / CLIENT)
    assert settings["MLFLOW_TRACKING_URI"] == server.uri
    user, password = settings["MLFLOW_TRACKING_USERNAME"], settings["MLFLOW_TRACKING_PASSWORD"]
    assert len(password) >= 32
    assert (asked(server), asked(server, f"{user}:wrong"), asked(server, f"{user}:{password}")) == (401, 401, 200)
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    for path in server.folder.iterdir():
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any(password in command for command in commands), "a command line is for everyone to read"
    assert password not in (server.folder / "server.log").read_text()


@pytest.mark.slow
def test_one_that_is_killed_is_started_again_with_the_same_password(server):
    before = read_settings(server.folder / CLIENT)
    keeper = psutil.Process(server.pid())
    for child in keeper.children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 90
    while server.answers() or time.monotonic() < deadline - 88:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not server.answers():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.start()  # it runs already
    assert server.pid() == keeper.pid
    assert read_settings(server.folder / CLIENT) == before


@pytest.mark.slow
def test_a_server_ends_with_its_keeper_and_both_can_be_started_again(server):
    before = server.pid()
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while server.answers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.start()
    assert server.pid() not in (None, before)


@pytest.mark.slow
def test_a_port_that_somebody_else_has_is_said(server, tmp_path):
    with pytest.raises(JobError, match="answers already, and is not the server of"):
        TrackingServer(tmp_path / "other", port=server.port).start()


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_it_does_not_listen_on_every_network(address, tmp_path, monkeypatch, capsys):
    words = refused(
        "tracking", ["start", "--host", address, "--folder", str(tmp_path / "t")], tmp_path, monkeypatch, capsys
    )
    assert "would listen on every network; name the address that the workers reach" in words
    assert not (tmp_path / "t").exists()


def test_the_status_of_a_server_that_was_never_started_names_no_file(tmp_path, capsys):
    folder, flags = tmp_path / "t", tracking.parser()
    args = flags.parse_args(["status", "--folder", str(folder), "--port", "9"])
    assert tracking.main(flags, args) == 1
    assert capsys.readouterr().out == f"http://127.0.0.1:9: not running; none was ever started in {folder}\n"
    TrackingServer(folder, port=9).write_settings()
    assert tracking.main(flags, args) == 1
    assert capsys.readouterr().out == (f"http://127.0.0.1:9: not running; user and password: {folder}/client.env\n")


def test_a_server_that_does_not_start_is_waited_for_aloud(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "SLOW_S", 0.0)
    monkeypatch.setattr(server_module, "START_TIMEOUT_S", 0.7)
    monkeypatch.setattr(server_module.sys, "executable", "/bin/sleep")  # of what is not a number: it ends at once
    said = []
    with pytest.raises(JobError, match="does not answer at"):
        TrackingServer(tmp_path / "t", port=9).start(said.append)
    assert said == [f"waiting for MLflow at http://127.0.0.1:9; its log: {tmp_path}/t/server.log"]


def test_a_store_whose_server_hangs_is_waited_for_aloud(monkeypatch, capsys):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(store, "SLOW_S", 0.1)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with pytest.raises(ValueError, match=f"MLflow at {uri} cannot be reached"):
            store.Store(uri)
    assert capsys.readouterr().out == f"waiting for MLflow at {uri}, which does not answer\n"


def test_a_database_that_takes_its_time_is_not_waited_for_aloud(monkeypatch, capsys):
    monkeypatch.setattr(store, "SLOW_S", 0.0)
    with store.said_if_slow("sqlite:///mlflow.db"):
        time.sleep(0.2)
    assert capsys.readouterr().out == ""
