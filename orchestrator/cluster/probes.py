"""The doctor's measurements: facts about a node, and whether it reaches storage, servers and other nodes.

Most of these functions run on the nodes, as Ray tasks; `ask_by_ssh` asks a machine that has not joined.
"""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
import urllib.request
from datetime import timedelta
from pathlib import Path

from orchestrator.base.exits import last_line
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.cluster.diagnosis import Facts
from orchestrator.cluster.tunnel import DASHBOARD
from orchestrator.tracking.server import PORT as MLFLOW_PORT

PACKAGES = ("ray", "torch", "mlflow", "pyarrow", "numpy")
TRAFFIC_BYTES, TRAFFIC_ROUNDS = 16 * 2**20, 4
NETWORK_TIMEOUT_S = 90.0
FULL_PERCENT = 95  # of a disk: Ray then places no tasks there


def examine() -> Facts:
    """Facts about the machine that this runs on."""
    import psutil
    import ray
    import torch

    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["ray"] = ray.__version__  # of what runs, should another have been installed since
    context = ray.get_runtime_context()
    session = Path(context.get_temp_dir(), context.get_session_name())
    disks = {}
    for path in dict.fromkeys((str(session), str(Path.home()))):
        usage = shutil.disk_usage(path)
        disks[path] = {"free": usage.free, "total": usage.total}
    listening: dict[int, list[str]] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            address, port = connection.laddr
            if port in (DASHBOARD, MLFLOW_PORT):
                listening.setdefault(port, []).append(address)
    return {
        "versions": versions,
        "gpus": torch.cuda.device_count(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "disks": disks,
        "listening": listening,
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
    }


def clock() -> float:
    """This node's time, in seconds since 1970."""
    return time.time()


class Peer:
    """An actor at one end of a connection between two nodes."""

    def address(self) -> str:
        """A free address of this node, for the process group to meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def measure(self, backend: str, address: str, rank: int) -> float:
        """Bytes per second that each of the two sends, and receives, in an all-reduce."""
        import torch
        import torch.distributed as dist

        timeout = timedelta(seconds=NETWORK_TIMEOUT_S / 2)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=timeout)
        data = torch.ones(TRAFFIC_BYTES // 4, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(data)
        start = time.monotonic()
        for _ in range(TRAFFIC_ROUNDS):
            dist.all_reduce(data)
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
        dist.destroy_process_group()
        return TRAFFIC_ROUNDS * TRAFFIC_BYTES / seconds


def write_file(place: str, text: str) -> str | None:
    """Write a file; returns the error, if any."""
    try:
        StoragePath.of(place).write(text.encode())
    except (OSError, StorageError) as error:
        return getattr(error, "strerror", None) or last_line(error)
    return None


def read_files(written: dict[str, str]) -> list[str]:
    """Read the files that each node, by name, wrote its name to; returns the errors."""
    errors = []
    for name, place in written.items():
        try:
            if StoragePath.of(place).read().decode() != name:
                errors.append(f"reads something else than {name} wrote")
        except (OSError, StorageError):
            errors.append(f"does not see what {name} wrote")
    return errors


def reach_server(uri: str) -> str | None:
    """Ask a tracking server for its health; returns the error, if any."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return None
    except OSError as error:
        return last_line(error)


def auth_token() -> str | None:
    """The token that Ray in this process would use; None if there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def ask_by_ssh(config: Facts, address: str) -> tuple[str, str]:
    """Why a machine may not have joined, and the remedy, from its Ray version, its token and its disk.

    config: the cluster's yaml.
    """
    auth = config["auth"]
    key = Path(auth.get("ssh_private_key", "~/ray_bootstrap_key.pem")).expanduser()
    ask = (
        "echo ray: $(cd ~/alexnet && .venv/bin/python -c 'import ray; print(ray.__version__)');"
        "echo token: $(sha256sum < ~/alexnet/.ray-token); echo full: $(df --output=pcent /tmp | tail -1)"
    )
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=10", "LogLevel=ERROR"]
    settings = [part for option in (*options, "BatchMode=yes") for part in ("-o", option)]
    command = ["ssh", "-i", str(key), *settings, f"{auth['ssh_user']}@{address}", ask]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SSH: {last_line(error)}", "check that it is on and connected to the network"
    if done.returncode == 255:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return f"SSH: {reason}", "check that it is on, and that it accepts the key of the cluster's yaml"
    answers = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    import ray

    version = answers.get("ray", "").strip()
    if version != ray.__version__:
        return f"it has {f'Ray {version}' if version else 'no Ray'}, here {ray.__version__}", "`ray up` again"
    if answers.get("token", "").split()[:1] != [_token_sha256()]:
        return "it has another token, or none", "`ray up` again, which copies .ray-token there"
    full = answers.get("full", "").strip().rstrip("%")
    if full.isdigit() and int(full) >= FULL_PERCENT:
        return f"its /tmp is {full} % full", "free some space, then `ray up` again"
    return "Ray is not running there", "`ray up` again; the logs in /tmp/ray/session_latest/logs there say why it ended"


def _token_sha256() -> str:
    """As `sha256sum` prints it for the token's file: tokens are compared without being sent."""
    return hashlib.sha256(f"{auth_token()}\n".encode()).hexdigest()
