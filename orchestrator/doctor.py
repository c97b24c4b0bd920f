"""What is wrong with a cluster, found out before it costs money: every node is looked at, and its way to the next."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .cluster import HEAD, ask_the_head, connect, on_cluster, on_node
from .costs import BOOTSTRAP
from .diagnosis import DASHBOARD_PORT, Facts, Finding, judge_clocks, judge_machines, judge_token, judge_versions
from .exits import JobError, last_line
from .placement import alive
from .storage import Place, StorageError
from .tracking import round_trip, tracking_uri, without_password
from .tracking_server import PORT as MLFLOW_PORT

PACKAGES = ("ray", "torch", "torchvision", "mlflow", "pyarrow", "numpy")
SLOW_BYTES_PER_S = 0.1e9  # below the network of any cloud's smallest machine
LOOPBACK = ("http://127.", "http://localhost")
PATIENCE_S = 60.0  # with a node that has to start a process for the first task
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


class Doctor:
    """Looks at the cluster of RAY_ADDRESS, or at this machine."""

    def __init__(self, output: Place) -> None:
        self.output = output

    def findings(self) -> Iterator[Finding]:
        """As they are made; a check that cannot be made is a finding, too."""
        if on_cluster() and os.environ.get("RAY_AUTH_MODE") == "token" and not _token():
            remedy = "`make token`, or RAY_AUTH_TOKEN_PATH=FILE; it must be the cluster's"
            yield Finding("token", "here", "fail", "RAY_AUTH_MODE is token, and there is none", remedy)
            return
        try:
            connect()
        except JobError as error:
            remedy = "is it up, and is .ray-token the one it was started with? `ray status` on its head tells more"
            yield Finding("cluster", os.environ.get("RAY_ADDRESS", "here"), "fail", str(error), remedy)
            return
        import ray

        living = [node for node in ray.nodes() if node["Alive"]]
        self.names = {node["NodeID"]: _name(node) for node in living}
        working = alive(living)
        yield Finding("nodes", "cluster", "ok", f"{len(living)} alive, {len(working)} of them with CPUs or GPUs")
        yield from self._missing(living)
        refs = {node["NodeID"]: on_node(node["NodeID"], examine).remote() for node in living}
        nodes: dict[str, Facts] = {}
        for node in living:
            try:
                facts = ray.get(refs[node["NodeID"]], timeout=PATIENCE_S)
            except ray.exceptions.RayError as error:
                remedy = "its raylet's log, in /tmp/ray/session_latest/logs there, says why it runs no task"
                why = "runs no task" if isinstance(error, ray.exceptions.GetTimeoutError) else last_line(error)
                yield Finding("nodes", self.names.pop(node["NodeID"]), "fail", why, remedy)
                continue
            nodes[self.names[node["NodeID"]]] = facts | {"gpus_of_ray": node["Resources"].get("GPU", 0)}
        yield from judge_token(nodes)
        yield from judge_versions(nodes, examine())
        yield from judge_machines(nodes)
        for check in (self._clocks, self._storage, self._tracking, self._network):
            try:
                yield from check()
            except JobError as error:
                remedy = "run the doctor again; what it found so far stands"
                yield Finding(check.__name__.strip("_"), "cluster", "fail", str(error), remedy)

    def _missing(self, living: list[Facts]) -> Iterator[Finding]:
        """Machines that the yaml on the head names and that have not joined: what is different there?"""
        config = _bootstrap()
        wanted = config.get("provider", {}).get("worker_ips") or []
        here = {node["NodeManagerAddress"] for node in living}
        for address in (address for address in wanted if address not in here):
            text, remedy = _ask_by_ssh(config, address)
            yield Finding("nodes", address, "fail", f"is not in the cluster: {text}", remedy)

    def _clocks(self) -> Iterator[Finding]:

        found = {}
        for node, name in self.names.items():
            best = (float("inf"), 0.0)
            for _ in range(5):
                before = time.time()
                there = _ask(node, _now)
                after = time.time()
                best = min(best, (after - before, there - (before + after) / 2))
            found[name] = best[1]
        yield from judge_clocks(found)

    def _storage(self) -> Iterator[Finding]:
        """What each node writes, every other reads."""

        place = self.output / f".doctor-{os.getpid()}-{time.time_ns()}"
        written: dict[str, str] = {}
        try:
            for node, name in self.names.items():
                trouble = _ask(node, _write_to, str(place / name), name)
                if trouble:
                    remedy = "mount it there, or let this user write; or give another with --output or ALEXNET_OUTPUT"
                    yield Finding("storage", name, "fail", f"{self.output}: cannot be written: {trouble}", remedy)
                else:
                    written[name] = str(place / name)
            blind = False
            for node, name in self.names.items():
                for trouble in _ask(node, _read_from, written):
                    blind = True
                    remedy = "give storage that all nodes share, such as s3://BUCKET/runs, or mount it there"
                    yield Finding("storage", name, "fail", f"{self.output}: {trouble}", remedy)
            if not blind and len(written) == len(self.names):
                yield Finding("storage", "all nodes", "ok", f"{self.output}: what each writes, every other reads")
        finally:
            for name in written:
                _quietly_remove(place / name)
            _quietly_remove(place)

    def _tracking(self) -> Iterator[Finding]:

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ |= ask_the_head()
        uri = tracking_uri()
        shown = without_password(uri)
        if not uri.startswith("http"):
            if len(self.names) > 1:
                remedy = "`python jobs/tracking.py start --host ADDRESS` on the head, as the cluster's yaml does"
                yield Finding("tracking", "cluster", "warn", f"no server; runs go to {shown} of one machine", remedy)
            return
        remedy = "`python jobs/tracking.py start --host ADDRESS` on the head; ~/alexnet-tracking/server.log says why"
        try:
            seconds = round_trip(uri)
        except (JobError, ValueError) as error:
            yield Finding("tracking", "here", "fail", str(error), remedy)
            return
        yield Finding("tracking", "here", "ok", f"{shown}: a metric and a file came back in {seconds:.1f} s")
        if uri.startswith(LOOPBACK):  # for drivers, which run on this node
            return
        for node, name in self.names.items():
            trouble = _ask(node, _reaches, uri)
            if trouble:
                yield Finding("tracking", name, "fail", f"does not reach {shown}: {trouble}", remedy)

    def _network(self) -> Iterator[Finding]:
        """Neighbours in a ring: every node's way out and way in."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        working = [node.id for node in alive(ray.nodes()) if node.id in self.names]
        pairs = [(node, working[(i + 1) % len(working)]) for i, node in enumerate(working)]
        pairs = pairs[:1] if len(working) == 2 else [pair for pair in pairs if pair[0] != pair[1]]
        gpus = {node["NodeID"]: node["Resources"].get("GPU", 0) for node in ray.nodes()}
        for pair in pairs:
            names = " - ".join(self.names[node] for node in pair)
            backends = ["gloo", "nccl"] if all(gpus[node] for node in pair) else ["gloo"]
            for backend in backends:
                peers: list[Any] = []
                try:
                    peers = [
                        ray.remote(Peer).options(
                            num_cpus=0, num_gpus=int(backend == "nccl"),
                            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                        ).remote() for node in pair
                    ]  # fmt: skip
                    address = ray.get(peers[0].address.remote(), timeout=NETWORK_PATIENCE_S)
                    runs = [peer.talk.remote(backend, address, rank) for rank, peer in enumerate(peers)]
                    rate = min(ray.get(runs, timeout=NETWORK_PATIENCE_S))
                except Exception as error:  # whatever the backend raises, or nothing in time
                    reason = last_line(error) if not isinstance(error, TimeoutError) else "no answer"
                    remedy = "open all TCP ports between the nodes; NCCL_SOCKET_IFNAME names their network"
                    yield Finding("network", names, "fail", f"{backend}: {reason}", remedy)
                    continue
                finally:
                    for peer in peers:
                        ray.kill(peer)
                slow = rate < SLOW_BYTES_PER_S
                remedy = "keep --layout columns on one node, and expect little of --layout data" if slow else ""
                yield Finding("network", names, "warn" if slow else "ok", f"{backend}: {rate / 1e9:.2f} GB/s", remedy)


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


def _ask(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """What it returns on that node. Raises JobError where the node does not answer."""
    import ray

    try:
        return ray.get(on_node(node, function).remote(*args), timeout=PATIENCE_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"a node ran a task, and then no more: {last_line(error)}") from None


def _name(node: Facts) -> str:
    role = " (head)" if HEAD in node["Resources"] else ""
    return f"{node['NodeManagerAddress']}{role}"


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


def _bootstrap() -> Facts:
    """The yaml that `ray up` left on the head; nothing elsewhere."""
    try:
        found: Facts = yaml.safe_load(BOOTSTRAP.expanduser().read_text())
        return found
    except (OSError, yaml.YAMLError):
        return {}


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
        Place.of(place).write(text.encode())
    except (OSError, StorageError) as error:
        return getattr(error, "strerror", None) or last_line(error)
    return None


def _read_from(written: dict[str, str]) -> list[str]:
    """Returns what went wrong."""
    errors = []
    for name, place in written.items():
        try:
            if Place.of(place).read().decode() != name:
                errors.append(f"what {name} wrote reads differently")
        except (OSError, StorageError):
            errors.append(f"does not see what {name} wrote")
    return errors


def _now() -> float:
    return time.time()


def _quietly_remove(place: Place) -> None:
    try:
        place.remove()
    except (OSError, StorageError):
        return


def _reaches(uri: str) -> str | None:
    """Returns what went wrong."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return None
    except OSError as error:
        return last_line(error)
