"""What the doctor runs on every node: versions, disks, clocks, the network."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from pathlib import Path

from orchestrator.base.exits import last_line
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.cluster.diagnosis import (
    DASHBOARD_PORT,
    Facts,
)
from orchestrator.tracking.server import PORT as MLFLOW_PORT

PACKAGES = ("ray", "torch", "mlflow", "pyarrow", "numpy")
TRAFFIC_BYTES, TRAFFIC_ROUNDS, NETWORK_PATIENCE_S = 16 * 2**20, 4, 90.0


def examine() -> Facts:
    """Facts about the machine that this runs on."""
    import psutil
    import torch

    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    import ray

    versions["ray"] = ray.__version__
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    disks = {}
    for path in dict.fromkeys((str(session), str(Path.home()))):
        usage = shutil.disk_usage(path)
        disks[path] = {"free": usage.free, "total": usage.total}
    listening: dict[int, list[str]] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            address, port = connection.laddr
            if port in (DASHBOARD_PORT, MLFLOW_PORT):
                listening.setdefault(port, []).append(address)
    return {
        "versions": versions,
        "gpus": torch.cuda.device_count(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "disks": disks,
        "listening": listening,
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
    }


class Peer:
    """One end of a line."""

    def address(self) -> str:
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def talk(self, backend: str, address: str, rank: int) -> float:
        """Bytes a second that each end sends, and receives, in an all-reduce between two."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        patience = timedelta(seconds=NETWORK_PATIENCE_S / 2)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=patience)
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


def _token() -> str | None:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _hash_of_token() -> str:
    """As `sha256sum` of the file has it; the token itself is not sent about to be compared."""
    return hashlib.sha256(f"{_token()}\n".encode()).hexdigest()


def _ask_by_ssh(config: Facts, address: str) -> tuple[str, str]:
    """Why a machine may not have joined, and the remedy: what its Ray, its token and its disk look like from there."""
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
        return f"SSH: {last_line(error)}", "is it switched on, and on the network?"
    if done.returncode == 255:
        return f"SSH: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}", "is it on, and does it know the key?"
    said = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    import ray

    if said.get("ray", "").strip() != ray.__version__:
        return f"it has Ray {said.get('ray', '').strip() or 'not at all'}, here {ray.__version__}", "`ray up` again"
    if said.get("token", "").split()[:1] != [_hash_of_token()]:
        return "it has another token, or none", "`ray up` again, which copies .ray-token there"
    full = said.get("full", "").strip().rstrip("%")
    if full.isdigit() and int(full) >= 95:
        return f"its /tmp is {full} % full", "free some, then `ray up` again"
    return "its Ray does not run", "`ray up` again; /tmp/ray/session_latest/logs there says why it ended"


def _write_to(place: str, text: str) -> str | None:
    """Returns what went wrong."""
    try:
        StoragePath.of(place).write(text.encode())
    except (OSError, StorageError) as error:
        return getattr(error, "strerror", None) or last_line(error)
    return None


def _read_from(written: dict[str, str]) -> list[str]:
    """Returns what went wrong."""
    errors = []
    for name, place in written.items():
        try:
            if StoragePath.of(place).read().decode() != name:
                errors.append(f"what {name} wrote reads differently")
        except (OSError, StorageError):
            errors.append(f"does not see what {name} wrote")
    return errors


def _now() -> float:
    return time.time()


def _reaches(uri: str) -> str | None:
    """Returns what went wrong."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return None
    except OSError as error:
        return last_line(error)
