"""What the environment tells a job: its cluster, where its output goes, how commands are named."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

OUTPUT = "ALEXNET_OUTPUT"  # where runs are stored by default (--output); a cluster's yaml sets it


def default_output() -> str:
    return os.environ.get(OUTPUT) or "runs"


def installed() -> bool:
    """Whether this process was started as a console script of the installed package, not as jobs/NAME.py."""
    return os.path.basename(sys.argv[0]).startswith("alexnet-")


def command(job: str) -> str:
    """What the user types to start a job, in the form in which this process was started."""
    return f"alexnet-{job}" if installed() else f"python jobs/{job}.py"


def command_line(job: str) -> str:
    """What the user typed to start this process."""
    return f"{command(job)} {shlex.join(sys.argv[1:])}".strip()


def cpu_model() -> str:
    """The CPU's name, such as "AMD EPYC"; where the system does not tell, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def on_cluster() -> bool:
    """Whether this job is one of a cluster: submitted to it, or told its address."""
    return bool(os.environ.get("RAY_ADDRESS"))


def job_id() -> str | None:
    """Of `ray job submit`, under which the cluster keeps this job's log and status."""
    found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    name: str | None = found.get("metadata", {}).get("job_submission_id")
    return name


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
