"""The doctor: checks every node of a cluster, and the network between them, before a job depends on them."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.base.environment import command, on_cluster
from orchestrator.base.exits import JobError, last_line
from orchestrator.base.redaction import redact
from orchestrator.base.storage import StorageError, StoragePath
from orchestrator.cluster.connection import connect
from orchestrator.cluster.diagnosis import Facts, Finding, check_clocks, check_machines, check_token, check_versions
from orchestrator.cluster.join import HEAD, ask_the_head, on_node
from orchestrator.cluster.nodes import alive
from orchestrator.cluster.prices import read_bootstrap
from orchestrator.cluster.probes import (
    NETWORK_TIMEOUT_S,
    Peer,
    ask_by_ssh,
    auth_token,
    clock,
    examine,
    reach_server,
    read_files,
    write_file,
)
from orchestrator.tracking.run import round_trip
from orchestrator.tracking.store import tracking_uri

log = logging.getLogger(__name__)

SLOW_BYTES_PER_S = 0.1e9  # less than the smallest machine of any cloud has
LOOPBACK_URIS = ("http://127.", "http://localhost")
ANSWER_TIMEOUT_S = 60.0  # a node may have to start a process first
CLOCK_ROUNDS = 5


class Doctor:
    """Checks the cluster of RAY_ADDRESS, or this machine."""

    def __init__(self, output: StoragePath) -> None:
        """output: the storage to check."""
        self.output = output
        self.names: dict[str, str] = {}  # of the nodes, by id

    def findings(self) -> Iterator[Finding]:
        """All findings, each as soon as it is made; a check that fails to run is a finding, too."""
        for finding in self._checks():
            log.info("%s: %s, %s: %s", finding.severity, finding.check, finding.where, finding.text)
            yield finding

    def _checks(self) -> Iterator[Finding]:
        if on_cluster() and os.environ.get("RAY_AUTH_MODE") == "token" and not auth_token():
            remedy = "`make token`, or RAY_AUTH_TOKEN_PATH=FILE; it must be the cluster's token"
            yield Finding("token", "here", "fail", "RAY_AUTH_MODE is token, but there is no token", remedy)
            return
        try:
            connect()
        except JobError as error:
            remedy = "check that it is up and was started with this .ray-token; `ray status` on its head shows more"
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
                facts = ray.get(refs[node["NodeID"]], timeout=ANSWER_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                remedy = "see the raylet's log, in /tmp/ray/session_latest/logs there"
                why = "runs no tasks" if isinstance(error, ray.exceptions.GetTimeoutError) else last_line(error)
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
                remedy = "run the doctor again; its other findings are valid"
                yield Finding(check.__name__.strip("_"), "cluster", "fail", str(error), remedy)

    def _missing(self, living: list[Facts]) -> Iterator[Finding]:
        """Machines of the yaml on the head that have not joined, and what is different there."""
        config = read_bootstrap()
        wanted = config.get("provider", {}).get("worker_ips") or []
        here = {node["NodeManagerAddress"] for node in living}
        for address in (address for address in wanted if address not in here):
            text, remedy = ask_by_ssh(config, address)
            yield Finding("nodes", address, "fail", f"is not in the cluster: {text}", remedy)

    def _clocks(self) -> Iterator[Finding]:
        """Of a few exchanges with each node, the quickest tells its clock best."""
        found = {}
        for node, name in self.names.items():
            best = (float("inf"), 0.0)
            for _ in range(CLOCK_ROUNDS):
                before = time.time()
                there = _ask(node, clock)
                after = time.time()
                best = min(best, (after - before, there - (before + after) / 2))
            found[name] = best[1]
        yield from check_clocks(found)

    def _storage(self) -> Iterator[Finding]:
        """Every node reads what each has written."""
        place = self.output / f".doctor-{os.getpid()}-{time.time_ns()}"
        written: dict[str, str] = {}
        try:
            for node, name in self.names.items():
                trouble = _ask(node, write_file, str(place / name), name)
                if trouble:
                    remedy = "mount it there and let this user write; or choose another with --output or ALEXNET_OUTPUT"
                    yield Finding("storage", name, "fail", f"{self.output}: cannot be written: {trouble}", remedy)
                else:
                    written[name] = str(place / name)
            blind = False
            for node, name in self.names.items():
                for trouble in _ask(node, read_files, written):
                    blind = True
                    remedy = "choose storage that all nodes share, such as s3://BUCKET/runs, or mount it there"
                    yield Finding("storage", name, "fail", f"{self.output}: {trouble}", remedy)
            if not blind and len(written) == len(self.names):
                yield Finding("storage", "all nodes", "ok", f"{self.output}: every node reads what the others write")
        finally:
            for name in written:
                _quietly_remove(place / name)
            _quietly_remove(place)

    def _tracking(self) -> Iterator[Finding]:
        """The tracking server takes a metric and a file from here, and every node reaches it."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ |= ask_the_head()
        uri = tracking_uri()
        shown = redact(uri)
        if not uri.startswith("http"):
            if len(self.names) > 1:
                remedy = f"`{command('tracking')} start --host ADDRESS` on the head, as the cluster's yaml does"
                yield Finding(
                    "tracking", "cluster", "warn", f"no server; runs are logged to {shown} on one machine", remedy
                )
            return
        remedy = f"`{command('tracking')} start --host ADDRESS` on the head; see ~/alexnet-tracking/server.log"
        try:
            seconds = round_trip(uri)
        except (JobError, ValueError) as error:
            yield Finding("tracking", "here", "fail", str(error), remedy)
            return
        yield Finding("tracking", "here", "ok", f"{shown}: logged and read back a metric and a file in {seconds:.1f} s")
        if uri.startswith(LOOPBACK_URIS):  # used by drivers only, which run on this node
            return
        for node, name in self.names.items():
            trouble = _ask(node, reach_server, uri)
            if trouble:
                yield Finding("tracking", name, "fail", f"does not reach {shown}: {trouble}", remedy)

    def _network(self) -> Iterator[Finding]:
        """The bandwidth between neighbours in a ring: every node sends and receives."""
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
                    address = ray.get(peers[0].address.remote(), timeout=NETWORK_TIMEOUT_S)
                    runs = [peer.measure.remote(backend, address, rank) for rank, peer in enumerate(peers)]
                    rate = min(ray.get(runs, timeout=NETWORK_TIMEOUT_S))
                except Exception as error:  # whatever the backend raises, or a timeout
                    reason = last_line(error) if not isinstance(error, TimeoutError) else "no answer"
                    name = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
                    remedy = f"open all TCP ports between the nodes, and set {name} to their network"
                    yield Finding("network", names, "fail", f"{backend}: {reason}", remedy)
                    continue
                finally:
                    for peer in peers:
                        ray.kill(peer)
                slow = rate < SLOW_BYTES_PER_S
                remedy = "keep --layout columns on one node; expect --layout data to be slow" if slow else ""
                yield Finding("network", names, "warn" if slow else "ok", f"{backend}: {rate / 1e9:.2f} GB/s", remedy)


def _ask(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call the function on that node. Raises JobError if the node does not answer."""
    import ray

    try:
        return ray.get(on_node(node, function).remote(*args), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"a node stopped answering: {last_line(error)}") from None


def _name(node: Facts) -> str:
    role = " (head)" if HEAD in node["Resources"] else ""
    return f"{node['NodeManagerAddress']}{role}"


def _quietly_remove(place: StoragePath) -> None:
    try:
        place.remove()
    except (OSError, StorageError):
        return
