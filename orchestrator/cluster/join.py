"""What a job checks and learns when it joins a cluster: shared storage, and the address of the tracking server."""

import os
import secrets
from collections.abc import Callable
from typing import Any

from orchestrator.base.environment import OUTPUT, on_cluster
from orchestrator.base.exits import JobError, last_line, signals_deferred
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.connection import connect
from orchestrator.cluster.nodes import alive
from orchestrator.tracking.server import CLIENT, FOLDER, read_settings

ANSWER_S = 60.0  # that a node may take to start a process for a question
HEAD = "node:__internal_head__"  # a resource that the head alone has


def join(output: StoragePath) -> None:
    """Connect to the cluster that the job is one of, if any, and see that all nodes see where it writes.

    Takes the address of the cluster's tracking server where the environment names none. Raises JobError.
    """
    if not on_cluster():
        return
    connect()
    check_shared(output)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ |= ask_the_head()


def check_shared(output: StoragePath) -> None:
    """Every node must see what another wrote: checkpoints above all."""
    import ray

    with signals_deferred():
        me = ray.get_runtime_context().get_node_id()
        others = [node.id for node in alive(ray.nodes()) if node.id != me]
    if output.local is None or not others:
        return
    marker = output / f".seen-{secrets.token_hex(8)}"
    try:
        marker.write(b"")
    except OSError as error:
        raise JobError(f"--output {output}: cannot be written: {error.strerror}") from None
    try:
        with signals_deferred():
            seen = ray.get([on_node(node, _sees).remote(str(marker)) for node in others], timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"a node did not answer whether it sees --output {output}: {last_line(error)}") from None
    finally:
        marker.remove()
    if not all(seen):
        blind = others[seen.index(False)]
        name = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == blind)
        raise JobError(
            f"--output {output}: node {name} does not see this folder of {ray.util.get_node_ip_address()}; with "
            f"several nodes give one that all share, such as s3://BUCKET/runs, or set {OUTPUT} in the cluster's yaml"
        )


def on_node(node_id: str, function: Callable[..., Any]) -> Any:
    """A task that runs on this node and takes nothing of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)


def _sees(path: str) -> bool:
    return os.path.exists(path)


def ask_the_head() -> dict[str, str]:
    """Address and password of the tracking server that the cluster's yaml started there, if it did. They travel as the
    cluster's other objects do, for which the token is needed, and are in no log. Raises JobError."""
    import ray

    try:
        with signals_deferred():
            if HEAD not in ray.cluster_resources():
                return {}
            asked = ray.remote(num_cpus=0, resources={HEAD: 0.001})(_read_client_settings).remote()
            found: dict[str, str] = ray.get(asked, timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"the head did not answer where its tracking server is: {last_line(error)}") from None
    return found


def _read_client_settings() -> dict[str, str]:
    return read_settings((FOLDER / CLIENT).expanduser())
