"""What is wrong with a cluster, found out before it costs money: every node is looked at, and its way to the next."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from orchestrator.base.environment import command, on_cluster
from orchestrator.base.exits import JobError, last_line
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.cluster.connection import connect
from orchestrator.cluster.diagnosis import Facts, Finding, check_clocks, check_machines, check_token, check_versions
from orchestrator.cluster.join import HEAD, ask_the_head, on_node
from orchestrator.cluster.nodes import alive
from orchestrator.cluster.prices import BOOTSTRAP
from orchestrator.cluster.probes import (
    NETWORK_PATIENCE_S,
    Peer,
    _ask_by_ssh,
    _now,
    _reaches,
    _read_from,
    _token,
    _write_to,
    examine,
)
from orchestrator.tracking.run import round_trip
from orchestrator.tracking.store import redact, tracking_uri

SLOW_BYTES_PER_S = 0.1e9  # below the network of any cloud's smallest machine
LOOPBACK = ("http://127.", "http://localhost")
PATIENCE_S = 60.0  # with a node that has to start a process for the first task


class Doctor:
    """Looks at the cluster of RAY_ADDRESS, or at this machine."""

    def __init__(self, output: StoragePath) -> None:
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
        yield from check_token(nodes)
        yield from check_versions(nodes, examine())
        yield from check_machines(nodes)
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
        yield from check_clocks(found)

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
        shown = redact(uri)
        if not uri.startswith("http"):
            if len(self.names) > 1:
                remedy = f"`{command('tracking')} start --host ADDRESS` on the head, as the cluster's yaml does"
                yield Finding("tracking", "cluster", "warn", f"no server; runs go to {shown} of one machine", remedy)
            return
        remedy = f"`{command('tracking')} start --host ADDRESS` on the head; ~/alexnet-tracking/server.log says why"
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


def _bootstrap() -> Facts:
    """The yaml that `ray up` left on the head; nothing elsewhere."""
    try:
        found: Facts = yaml.safe_load(BOOTSTRAP.expanduser().read_text())
        return found
    except (OSError, yaml.YAMLError):
        return {}


def _quietly_remove(place: StoragePath) -> None:
    try:
        place.remove()
    except (OSError, StorageError):
        return
