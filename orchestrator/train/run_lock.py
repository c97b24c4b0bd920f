"""One driver per run: two that resumed the same run would overwrite each other's checkpoints."""

import contextlib
import fcntl
import os
import time
from typing import Any

from orchestrator.base.environment import job_id, on_cluster
from orchestrator.base.exits import signals_deferred
from orchestrator.train.run_folder import RunFolder

NAMESPACE = "alexnet"  # of Ray's named actors: shared by all jobs, which by default have one each
TIMEOUT_S = 10.0  # for Ray to notice that the last holder's driver has ended


class RunLock:
    """The exclusive right to work on a run, until `release` or the end of this process, however it ends.

    It is a lock on the run's folder, if that is on a local disk. Jobs on a cluster, whose storage may have no locks,
    also find each other by the name of an actor, which ends with its driver.
    """

    def __init__(self, run: RunFolder) -> None:
        """The folder must exist, and on a cluster Ray be connected. Raises ValueError if another process has it."""
        self._file: int | None = None
        self._actor: Any = None
        if on_cluster():
            self._take_name(run)  # first, because it can name the job that has the run
        if run.path.local is not None:
            self._lock(run)

    def release(self) -> None:
        """Give up the run. Further calls do nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._actor is not None:
            import ray

            with signals_deferred(), contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor)
            self._actor = None

    def _lock(self, run: RunFolder) -> None:
        self._file = os.open(str(run.path), os.O_RDONLY)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"--resume {run.name}: another process is working on it; wait for its end, or stop it first"
            ) from None
        except OSError:  # a file system without locks
            return

    def _take_name(self, run: RunFolder) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name, deadline = f"driver of {run.path}", time.monotonic() + TIMEOUT_S
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        holder = ray.remote(num_cpus=0, scheduling_strategy=here)(_Holder).options(name=name, namespace=NAMESPACE)
        while True:
            with signals_deferred():
                try:
                    self._actor = holder.remote(job_id())
                    return
                except ValueError:  # the name is taken
                    job = _job_of(name)
            if time.monotonic() > deadline:
                who, stop = (f"job {job}", f"`ray job stop {job}`") if job else ("another process", "stop it")
                raise ValueError(f"--resume {run.name}: {who} is working on it; wait for its end, or {stop} first")
            time.sleep(0.5)


def _job_of(name: str) -> str | None:
    """The id of the job whose driver holds this name; None if that is not a job, or does not answer."""
    import ray

    try:
        job: str | None = ray.get(ray.get_actor(name, namespace=NAMESPACE).job.remote(), timeout=TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError):
        return None
    return job


class _Holder:
    """The actor whose name is the lock."""

    def __init__(self, job: str | None) -> None:
        self._job = job

    def job(self) -> str | None:
        return self._job
