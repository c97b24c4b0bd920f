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
