"""Ray: a private instance on this machine, or the cluster that RAY_ADDRESS names, and what is different there."""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

from .config import TrainConfig
from .costs import Meter, NodeType, node_types, would_start
from .exits import JobError, catch_signals, last_line, signals_deferred
from .placement import alive, uses_gpu
from .runs import OUTPUT
from .storage import Place
from .tracking_server import CLIENT, FOLDER, read_settings

QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next look: 2 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_DATA_USAGE_DISABLED": "1",  # else a process more, for the rest of the cluster's life, counts uses of Ray Data
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # trainer.py watches for lost nodes itself
}  # the same in every process: Ray starts a new one where an idle one's environment differs

SAY_EVERY_S = 30.0
ANSWER_S = 60.0  # that a node may take to start a process for a question
GROW_PATIENCE_S = 600.0  # spot may never have as many as are wished for
HEAD = "node:__internal_head__"  # a resource that the head alone has


def on_cluster() -> bool:
    """Whether this job is one of a cluster: submitted to it, or told its address."""
    return bool(os.environ.get("RAY_ADDRESS"))


def job_id() -> str | None:
    """Of `ray job submit`, under which the cluster keeps this job's log and status."""
    found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    name: str | None = found.get("metadata", {}).get("job_submission_id")
    return name


def join(output: Place) -> None:
    """Connect to the cluster that the job is one of, if any, and see that all nodes see where it writes.

    Takes the address of the cluster's tracking server where the environment names none. Raises JobError.
    """
    if not on_cluster():
        return
    connect()
    _check_shared(output)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ |= ask_the_head()


def _check_shared(output: Place) -> None:
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


def wait_for_nodes(config: TrainConfig, runs: int, output: Place, say: Callable[[str], None]) -> None:
    """On a cluster that grows when asked: ask for nodes for so many runs side by side, or as many as it can grow to,
    and wait until they are there; for all but the first run only GROW_PATIENCE_S. They must see the output, too.

    Raises JobError where the cluster cannot grow so far.
    """
    types = node_types()
    if not on_cluster() or not types or not runs:
        return
    found = would_start(config, types, runs)
    if found is None:
        has = "; ".join(f"{kind.at_most} {kind}" for kind in types)
        raise JobError(f"--workers {config.workers}: more than this cluster can grow to: {has}")
    kind, _, runs = found
    _wait_for_room(config, kind, 1, math.inf, say)
    if runs > 1:
        _wait_for_room(config, kind, runs, GROW_PATIENCE_S, say)
    _check_shared(output)


class Wish:
    """Room for so many workers, asked of the cluster, which may start nodes for it. It is a placement group, which ends
    with this process whatever becomes of it: nobody pays for nodes that nobody waits for. Once granted it holds the
    room, until `end`."""

    def __init__(self, config: TrainConfig, workers: int, *, on_gpu: bool, runs: int = 1) -> None:
        from ray.util import placement_group

        together = 2 if config.layout == "columns" and workers % 2 == 0 and not config.spread else 1
        unit = {"GPU": 1.0, "CPU": 1.0} if on_gpu else {"CPU": 2.0 if config.spread else 1.0}
        bundle = {name: amount * together for name, amount in unit.items()}
        feed = [] if on_gpu or config.spread else [{"CPU": 1.0}]  # on GPU nodes there are CPUs enough
        bundles = [bundle] * (workers // together) * runs + feed
        strategy = "STRICT_SPREAD" if config.spread and runs == 1 else "PACK"
        with signals_deferred():
            self._group: Any = placement_group(bundles, strategy=strategy)

    def is_granted(self, within_s: float) -> bool:
        """To be called with signals deferred."""
        return bool(self._group.wait(within_s))

    def end(self) -> None:
        from ray.util import remove_placement_group

        if self._group is not None:
            group, self._group = self._group, None
            with signals_deferred():
                remove_placement_group(group)


def _wait_for_room(
    config: TrainConfig, kind: NodeType, runs: int, patience_s: float, say: Callable[[str], None]
) -> None:
    import ray

    wish = Wish(config, config.worker_range[0], on_gpu=uses_gpu(config.device, kind.gpus), runs=runs)
    began, said = time.monotonic(), -math.inf
    try:
        while time.monotonic() - began < patience_s:
            with signals_deferred():
                if wish.is_granted(0.5):
                    return
                here = len(alive(ray.nodes()))
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"waiting for nodes such as {kind.name}: {here} here, {said - began:.0f} s so far")
    finally:
        wish.end()


def cost_so_far(meter: Meter) -> float | None:
    """Dollars, of all nodes; None where they have no price."""
    if not on_cluster():
        return None
    import ray

    with signals_deferred():
        return meter.read(ray.nodes())


def connect() -> None:
    """Start or join Ray, quietly, with authentication.

    Without RAY_ADDRESS a private instance is started, which ends with this process. Its ports listen on every
    interface, as Ray's do, so it gets a token of its own that only this process's children know. With RAY_ADDRESS
    (set by `ray job submit`, or by the user) the cluster there is joined under the user's RAY_AUTH_MODE and token.
    """
    private = not os.environ.get("RAY_ADDRESS")
    if private and "ray" not in sys.modules:  # Ray reads these once, when it is imported
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # unset, Ray would write a token into the home directory
    assert not private or os.environ.get("RAY_AUTH_MODE"), (
        "connect before Ray is imported, or set RAY_AUTH_MODE yourself"
    )
    if private:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that lives as long as a job reports to nobody
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    environment = {name: os.environ[name] for name in QUIET}

    import ray
    import ray.data  # sets up its logging, which is then quietened

    if ray.is_initialized():
        return
    try:
        with signals_deferred():
            _init(private, environment)
            catch_signals()  # Ray has put its own handler in place
    except Exception as error:  # whatever Ray raises: no cluster there, a wrong token, another version
        where = "a private Ray" if private else f"Ray at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise JobError(f"{where} could not be reached: {last_line(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # its controller, in this process, logs what we report
    ray.data.DataContext.get_current().enable_progress_bars = False


def _init(private: bool, environment: dict[str, str]) -> None:
    import ray

    ray.init(
        address="local" if private else None,
        include_dashboard=False if private else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
