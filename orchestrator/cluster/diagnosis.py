"""Findings from facts: what is wrong with a cluster, and the remedy. Pure functions, which need no cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.cluster.tunnel import DASHBOARD

Severity = Literal["ok", "warn", "fail"]
Facts = dict[str, Any]  # about a machine, from probes.examine
LOOPBACK = {"127.0.0.1", "::1"}
MIN_FREE_BYTES, MIN_FREE_SHARE = 5e9, 0.06  # Ray stops placing tasks on a node whose disk is 95 % full
MIN_FILES, GOOD_FILES = 1024, 8192
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0  # logs out of order; S3 refuses signatures that are 15 minutes off


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. remedy: how to fix it; empty if severity is ok."""

    check: str
    where: str
    severity: Severity
    text: str
    remedy: str = ""


def check_versions(nodes: dict[str, Facts], ours: Facts) -> Iterator[Finding]:
    """Compare each node's package versions with this process's."""
    for name, facts in nodes.items():
        wrong = [f"{package} {version} (here {ours['versions'][package]})"
                 for package, version in facts["versions"].items() if version != ours["versions"][package]]  # fmt: skip
        if wrong:
            remedy = "run `make setup` there, which installs the locked versions"
            yield Finding("versions", name, "fail", ", ".join(wrong), remedy)
    if nodes and all(facts["versions"] == ours["versions"] for facts in nodes.values()):
        text = ", ".join(f"{package} {version}" for package, version in ours["versions"].items())
        yield Finding("versions", "all nodes", "ok", text)


def check_machines(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Check each node's disk space, open files, GPUs and listening ports."""
    for name, facts in nodes.items():
        for path, disk in facts["disks"].items():
            text = f"{path}: {disk['free'] / 1e9:.1f} of {disk['total'] / 1e9:.0f} GB free"
            if disk["free"] < MIN_FREE_SHARE * disk["total"]:
                remedy = "free some space: Ray places no tasks on a node whose disk is 95 % full"
                yield Finding("disk", name, "fail", text, remedy)
            elif disk["free"] < MIN_FREE_BYTES:
                remedy = "free some space: checkpoints and spilled objects need a few GB"
                yield Finding("disk", name, "warn", text, remedy)
            else:
                yield Finding("disk", name, "ok", text)
        files = facts["files"]
        severity: Severity = "fail" if files < MIN_FILES else "warn" if files < GOOD_FILES else "ok"
        remedy = "" if severity == "ok" else "`ulimit -n 65536` before `ray start`, as clusters/environment does"
        yield Finding("open files", name, severity, f"{files} allowed", remedy)
        if facts["gpus"] != facts["gpus_of_ray"]:
            text = f"PyTorch sees {facts['gpus']}, Ray was given {facts['gpus_of_ray']:g}"
            remedy = "check nvidia-smi there; the driver must support the CUDA version of the locked PyTorch"
            yield Finding("GPUs", name, "fail", text, remedy)
        elif facts["gpus"]:
            yield Finding("GPUs", name, "ok", f"{facts['gpus']}")
        for port, addresses in facts["listening"].items():
            what = "dashboard and job server" if port == DASHBOARD else "MLflow"
            text = f"{what}: port {port} on {', '.join(addresses)}"
            on_all = {"0.0.0.0", "::"} & set(addresses)
            beyond = port == DASHBOARD and set(addresses) - LOOPBACK
            if on_all or beyond:
                option = "--dashboard-host=127.0.0.1" if port == DASHBOARD else "--host and the head's own address"
                yield Finding("ports", name, "fail", text, f"start it with {option}, and open it through make ui")
            else:
                yield Finding("ports", name, "ok", text)


def check_clocks(skews: dict[str, float]) -> Iterator[Finding]:
    """Check how many seconds each node's clock is ahead of this machine's."""
    for name, skew in skews.items():
        severity: Severity = "fail" if abs(skew) > SKEW_FAIL_S else "warn" if abs(skew) > SKEW_WARN_S else "ok"
        remedy = "" if severity == "ok" else "synchronize it: `timedatectl set-ntp true`"
        yield Finding("clock", name, severity, f"{skew:+.3f} s from this machine's", remedy)


def check_token(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Check that every node's Ray asks for the token."""
    open_nodes = [name for name, facts in nodes.items() if facts["auth_mode"] != "token"]
    if open_nodes:
        remedy = "export RAY_AUTH_MODE=token before `ray start`: without it anyone who reaches a port can run code"
        yield Finding("token", ", ".join(open_nodes), "fail", "RAY_AUTH_MODE is not token", remedy)
    else:
        yield Finding("token", "all nodes", "ok", "required")
