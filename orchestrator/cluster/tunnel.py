"""The way from a user's machine to a cluster's servers, which listen on its own network only: through SSH."""

import contextlib
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.environment import command
from orchestrator.base.exits import JobError, last_line
from orchestrator.tracking.server import CLIENT, FOLDER

DASHBOARD = 8265
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Head:
    """The head of a cluster that `ray up` has started, as its yaml describes it."""

    address: str
    user: str
    key: str | None

    @staticmethod
    def of(path: Path) -> "Head":
        """Raises ValueError for a file that is none, JobError where the cluster does not run."""
        import yaml
        from ray.autoscaler._private.commands import _bootstrap_config, get_head_node_ip

        if not path.is_file():
            raise ValueError(f"{path}: no such file; give the yaml that `ray up` was given")
        try:
            with contextlib.redirect_stdout(None):
                config = _bootstrap_config(yaml.safe_load(path.read_text()))
                address = get_head_node_ip(str(path))
        except Exception as error:  # whatever the cloud's own client raises
            raise JobError(f"{path}: the cluster's head was not found: {last_line(error)}") from None
        return Head(address, config["auth"]["ssh_user"], config["auth"].get("ssh_private_key"))

    def ssh(self, *options: str) -> list[str]:
        """The beginning of an SSH command."""
        key = ["-i", str(Path(self.key).expanduser()), "-o", "IdentitiesOnly=yes"] if self.key else []
        checks = ["-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR"]
        return ["ssh", *key, *checks, *options, f"{self.user}@{self.address}"]

    def tracking_address(self) -> str:
        """HOST:PORT of the tracking server, as the head sees it. Raises JobError."""
        read = f"sed -n 's|^MLFLOW_TRACKING_URI=http://||p' {FOLDER / CLIENT}"
        done = subprocess.run([*self.ssh(), read], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode or not done.stdout.strip():
            reason = done.stderr.strip().splitlines()[-1:] or ["no tracking server has been started there"]
            raise JobError(f"{self.user}@{self.address}: {reason[0]}")
        return done.stdout.strip()


def open_tunnels(head: Head, dashboard_port: int, mlflow_port: int) -> "subprocess.Popen[bytes]":
    """Ports of this machine, on loopback, to the head's dashboard and tracking server. Raises JobError."""
    if taken := [port for port in (dashboard_port, mlflow_port) if _listens(port)]:
        raise JobError(
            f"port {taken[0]} is taken on this machine, by another `make ui` or a server of its own; "
            f"{command('ui')} --dashboard-port N --mlflow-port N take others"
        )
    tunnels = {dashboard_port: f"127.0.0.1:{DASHBOARD}", mlflow_port: head.tracking_address()}
    forwards = [part for port, target in tunnels.items() for part in ("-L", f"127.0.0.1:{port}:{target}")]
    options = ("-N", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15")
    process = subprocess.Popen(head.ssh(*options, *forwards), stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not all(_listens(port) for port in tunnels):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise JobError(f"no tunnel to {head.address}: ssh ended with {process.poll()}")
        time.sleep(0.1)
    return process


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
