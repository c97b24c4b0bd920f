"""SSH tunnels from a user's machine to a cluster's dashboard and tracking server, which only the cluster reaches."""

import contextlib
import logging
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.environment import command
from orchestrator.base.exits import JobError, last_line
from orchestrator.config.models import read_whole_yaml
from orchestrator.tracking.server import CLIENT, FOLDER

log = logging.getLogger(__name__)

DASHBOARD = 8265  # the port of Ray's dashboard and job server
CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Head:
    """SSH access to the head of a cluster that `ray up` has started."""

    address: str
    user: str
    key: str | None

    @staticmethod
    def of(path: Path) -> "Head":
        """Find the head of the cluster that a yaml describes.

        Raises ValueError if the file is missing or not such a yaml, JobError if the cluster is not running.
        """
        from ray.autoscaler.sdk import bootstrap_config, get_head_node_ip

        if not path.is_file():
            raise ValueError(f"{path}: no such file; give the yaml that `ray up` was given")
        try:
            settings = read_whole_yaml(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or last_line(error)}") from None
        if not isinstance(settings, dict) or "provider" not in settings:
            raise ValueError(f"{path}: describes no cluster; give the yaml that `ray up` was given")
        try:
            with contextlib.redirect_stdout(None):
                config = bootstrap_config(settings)
                address = get_head_node_ip(str(path))
        except Exception as error:  # whatever the cloud's own client raises
            raise JobError(f"{path}: the cluster's head was not found: {last_line(error)}") from None
        log.info("the head of %s is %s", path, address)
        return Head(address, config["auth"]["ssh_user"], config["auth"].get("ssh_private_key"))

    def ssh(self, *options: str) -> list[str]:
        """The SSH command to the head, to which a remote command can be added."""
        key = ["-i", str(Path(self.key).expanduser()), "-o", "IdentitiesOnly=yes"] if self.key else []
        checks = ["-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR"]
        return ["ssh", *key, *checks, *options, f"{self.user}@{self.address}"]

    def tracking_address(self) -> str:
        """HOST:PORT of the tracking server, as the head reaches it. Raises JobError."""
        read = f"sed -n 's|^MLFLOW_TRACKING_URI=http://||p' {FOLDER / CLIENT}"
        done = subprocess.run([*self.ssh(), read], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode or not done.stdout.strip():
            reason = done.stderr.strip().splitlines()[-1:] or ["no tracking server has been started there"]
            raise JobError(f"{self.user}@{self.address}: {reason[0]}")
        return done.stdout.strip()


def open_tunnels(head: Head, dashboard_port: int, mlflow_port: int) -> "subprocess.Popen[bytes]":
    """Forward two loopback ports of this machine to the head's dashboard and tracking server. Raises JobError."""
    if taken := [port for port in (dashboard_port, mlflow_port) if _is_listening(port)]:
        raise JobError(
            f"port {taken[0]} is in use on this machine, by another `make ui` or a server; "
            f"choose others: {command('ui')} --dashboard-port N --mlflow-port N"
        )
    tunnels = {dashboard_port: f"127.0.0.1:{DASHBOARD}", mlflow_port: head.tracking_address()}
    forwards = [part for port, target in tunnels.items() for part in ("-L", f"127.0.0.1:{port}:{target}")]
    options = ("-N", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15")
    process = subprocess.Popen(head.ssh(*options, *forwards), stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not all(_is_listening(port) for port in tunnels):
        if process.poll() is not None:
            raise JobError(f"no tunnel to {head.address}: ssh ended with exit status {process.returncode}")
        if time.monotonic() > deadline:
            process.kill()
            raise JobError(f"no tunnel to {head.address} within {CONNECT_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    log.info("forwarding %s through %s", tunnels, head.address)
    return process


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
