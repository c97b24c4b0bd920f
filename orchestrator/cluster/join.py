"""Joining a cluster: checking that the nodes share the output, and finding the tracking server."""

import logging
import os
import secrets
from collections.abc import Callable
from typing import Any

from orchestrator.base.environment import OUTPUT, on_cluster
from orchestrator.base.exits import JobError, last_line, signals_deferred
from orchestrator.base.redaction import redact
from orchestrator.base.shown import count_of
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.connection import connect
from orchestrator.cluster.nodes import alive
from orchestrator.tracking.server import CLIENT, FOLDER, read_settings

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 60.0  # a node may have to start a process first
HEAD = "node:__internal_head__"  # a resource that only the head has


def join(output: StoragePath) -> None:
    """Connect to the job's cluster, if it is on one, and check that all nodes share `output`.

    Sets the address of the cluster's tracking server unless the environment names one. Raises JobError.
    """
    if not on_cluster():
        return
    connect()
    check_shared(output)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ |= ask_the_head()
    log.info("on a cluster; tracking server: %s", redact(os.environ.get("MLFLOW_TRACKING_URI", "none")))


def check_shared(output: StoragePath) -> None:
    """Check that every node sees what this one writes to `output`, as checkpoints must be. Raises JobError."""
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
            seen = ray.get([on_node(node, _sees).remote(str(marker)) for node in others], timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"--output {output}: a node did not answer whether it sees it: {last_line(error)}") from None
    finally:
        marker.remove()
    if not all(seen):
        blind = others[seen.index(False)]
        name = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == blind)
        raise JobError(
            f"--output {output}: node {name} does not see this folder of {ray.util.get_node_ip_address()}; give one "
            f"that all nodes share, such as s3://BUCKET/runs, or set {OUTPUT} in the cluster's yaml"
        )
    log.info("%s: seen by %s", output, count_of(len(others), "other node"))


def on_node(node_id: str, function: Callable[..., Any]) -> Any:
    """The function as a Ray task that runs on this node and reserves nothing there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)


def _sees(path: str) -> bool:
    return os.path.exists(path)


def ask_the_head() -> dict[str, str]:
    """Address and password of the tracking server on the head, as environment variables; empty if there is none.

    They are sent as a Ray object, which needs the cluster's token, and appear in no log. Raises JobError.
    """
    import ray

    try:
        with signals_deferred():
            if HEAD not in ray.cluster_resources():
                return {}
            asked = ray.remote(num_cpus=0, resources={HEAD: 0.001})(_read_client_settings).remote()
            found: dict[str, str] = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise JobError(f"the head did not answer where its tracking server is: {last_line(error)}") from None
    return found


def _read_client_settings() -> dict[str, str]:
    return read_settings((FOLDER / CLIENT).expanduser())
