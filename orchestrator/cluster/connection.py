"""The connection to Ray: a private instance on this machine, or the cluster that RAY_ADDRESS names."""

import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.base import logs
from orchestrator.base.exits import (
    Interrupted,
    JobError,
    catch_signals,
    last_line,
    signals_deferred,
    signals_end_at_once,
)
from orchestrator.base.ray_internals import SUPPORTED_RAY, PrivateName, require
from orchestrator.base.sockets import why_silent
from orchestrator.cluster import fork_server

log = logging.getLogger(__name__)

# The same in every process: Ray starts a new process if an idle one has another environment.
RAY_ENV = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often the controller polls for reports: 2 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_DATA_USAGE_DISABLED": "1",  # else one more process counts uses of Ray Data as long as the cluster lives
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # train/training.py watches for lost nodes itself
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would take its lines away from the run's log
    "MALLOC_ARENA_MAX": "1",  # Ray Train's workers train in a thread of their own: alexnet/allocator.py
}
ADDRESS_TIMEOUT_S = 5.0  # for the cluster of RAY_ADDRESS to answer; Ray itself tries for ten minutes
CLIENT_PORT = 10001  # of ray://HOST
TOO_SLOW = "timed out during startup"  # in Ray's error, when its processes took more than 30 s
INTERNALS = (
    PrivateName("ray._private.ray_constants", "SETUP_WORKER_FILENAME"),  # of Ray's script that starts a worker
    PrivateName("ray._private.node", "Node.start_monitor", ("self",)),
    PrivateName("ray._private.node", "Node.start_log_monitor", ("self",)),
    PrivateName("ray._private.node", "Node.start_api_server", ("self", "include_dashboard", "raise_on_failure")),
)
QUIET_LOGGERS = ("ray", "ray.data", "ray.train")  # the job prints its own messages; theirs go to the run's log


def prepare_workers(modules: Sequence[str], with_ray: Sequence[str]) -> None:
    """Begin to import what workers need, if Ray will be a private one: in a process of its own, of which they will be
    copies (fork_server.py), while the command itself still starts. Call it before Ray is imported.

    modules, with_ray: of fork_server.start.
    """
    if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:
        _set_environment(private=True)
        fork_server.start(modules, with_ray)


def connect() -> None:
    """Start or join Ray with authentication, without its output on the terminal. Raises JobError if that fails.

    Without RAY_ADDRESS a private instance is started, which ends with this process. Its ports listen on every
    interface, as Ray's always do, so it gets a token of its own that only this process's children know. With
    RAY_ADDRESS (set by `ray job submit`, or by the user) the job joins that cluster with the user's RAY_AUTH_MODE and
    token.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    private = not address
    _set_environment(private)
    environment = {name: os.environ[name] for name in RAY_ENV}

    with signals_deferred():
        import ray
        import ray.data  # sets up its loggers when it is imported

    if ray.is_initialized():
        return
    if private:
        _make_ray_light()
    logs.keep_off_terminal(*QUIET_LOGGERS)
    where = "a private Ray" if private else f"Ray at RAY_ADDRESS={address}"
    log.debug("connecting to %s", where)
    check_address(address)
    try:
        # a job joins a cluster before it has anything to save, and may have to wait for it
        with signals_deferred() if private else signals_end_at_once():
            try:
                _init(private, environment)
            except Exception as error:
                if not private or TOO_SLOW not in str(error):
                    raise
                log.warning("Ray did not start in time; it is started once more: %s", last_line(error))
                ray.shutdown()
                _init(private, environment)
            catch_signals()  # Ray has installed its own handlers
            logs.keep_off_terminal(*QUIET_LOGGERS)  # and removed those of its loggers
    except SystemExit as stop:  # by Ray's own handler of SIGTERM, which takes the place of ours meanwhile
        if stop.code == signal.SIGTERM:
            raise Interrupted(signal.SIGTERM) from None
        raise
    except Exception as error:  # whatever Ray raises: no cluster there, a wrong token, another version
        hint = "; this machine may be too busy: run it again" if private and TOO_SLOW in str(error) else ""
        raise JobError(f"{where} could not be reached: {last_line(error)}{hint}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    log.info("connected to %s: Ray %s at %s", where, ray.__version__, ray.get_runtime_context().gcs_address)


def _make_ray_light() -> None:
    """Without the processes of a private Ray that nobody asks, and with the fork server.

    They are an autoscaler, a server of web pages and a forwarder of logs to the terminal: each is a Python that imports
    Ray while the workers want to start.
    """
    import ray

    node = ray._private.node.Node
    if node.start_monitor is not _nothing:
        require(SUPPORTED_RAY, INTERNALS)
        node.start_monitor = node.start_log_monitor = node.start_api_server = _nothing
    if fork_server.is_started():
        ray._private.ray_constants.SETUP_WORKER_FILENAME = str(fork_server.CLIENT)


def _nothing(node: Any, **settings: Any) -> None:
    """In place of a method of Ray's that starts a process."""


def _set_environment(private: bool) -> None:
    """What Ray reads, here and in its processes."""
    # Ray reads these once, when it is imported; the fork server has them already
    if private and "ray" not in sys.modules and not fork_server.is_started():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    # if it were unset, Ray would write a token into the home directory
    assert not private or os.environ.get("RAY_AUTH_MODE"), "connect before Ray is imported, or set RAY_AUTH_MODE"
    if private:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # they have no runtime_env: none is used
    for name, value in RAY_ENV.items():
        os.environ.setdefault(name, value)


def check_address(address: str) -> None:
    """Raises JobError of one line for a RAY_ADDRESS that has a wrong form, or where no Ray answers."""
    if address in ("", "auto", "local"):
        return
    here = "`unset RAY_ADDRESS` to work on this machine alone"
    parts = re.fullmatch(r"(?:(\w+)://)?(\[[^]]+\]|[^:/\[\]]+)(?::(\d{1,5}))?/?", address)
    scheme, host, port = parts.groups() if parts else (None, None, None)
    if scheme in ("http", "https"):
        raise JobError(
            f"RAY_ADDRESS={address}: is the address of a cluster's job server, which is for `ray job submit`; put it "
            f"in RAY_API_SERVER_ADDRESS instead, and {here}"
        )
    if host is None or scheme not in (None, "ray") or not (port or scheme):
        raise JobError(
            f"RAY_ADDRESS={address}: expected HOST:PORT such as 10.0.0.5:6379, ray://HOST:PORT, auto or local; or "
            f"{here}"
        )
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    if why := why_silent(host.strip("[]"), int(port or CLIENT_PORT), ADDRESS_TIMEOUT_S, grpc=not tls):
        raise JobError(
            f"RAY_ADDRESS={address}: no cluster is there ({why}); {here}, or start one: `ray start --head` on that "
            "host, or `ray up` (docs/cluster.md)"
        )


def _init(private: bool, environment: dict[str, str]) -> None:
    import ray

    ray.init(
        address="local" if private else None,
        include_dashboard=False if private else None,
        log_to_driver=False,
        configure_logging=False,  # it would raise the level of Ray's logger, which the run's log needs
        runtime_env={"env_vars": environment},
    )
