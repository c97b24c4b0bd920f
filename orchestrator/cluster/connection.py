"""Ray: a private instance on this machine, or the cluster that RAY_ADDRESS names."""

import logging
import os
import secrets
import sys

from orchestrator.base.exits import JobError, catch_signals, last_line, signals_deferred

RAY_ENV = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next look: 2 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_DATA_USAGE_DISABLED": "1",  # else a process more, for the rest of the cluster's life, counts uses of Ray Data
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # trainer.py watches for lost nodes itself
}  # the same in every process: Ray starts a new one where an idle one's environment differs


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
    for name, value in RAY_ENV.items():
        os.environ.setdefault(name, value)
    environment = {name: os.environ[name] for name in RAY_ENV}

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
