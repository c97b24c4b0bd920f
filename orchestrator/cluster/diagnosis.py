"""From facts about machines to findings: what is wrong with a cluster, and the remedy. Needs no cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["ok", "warn", "fail"]
Facts = dict[str, Any]  # of a machine: doctor.examine
DASHBOARD_PORT = 8265
LOOPBACK = ("127.0.0.1", "::1")
LEAST_FREE_BYTES, LEAST_FREE_SHARE = 5e9, 0.06  # Ray stops placing tasks on a node whose disk is 95 % full
LEAST_FILES, ENOUGH_FILES = 1024, 8192
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0  # logs in the wrong order; signatures of S3, which are refused after 15 minutes


@dataclass(frozen=True)
class Finding:
    """One line of the table. remedy: what to do about it, for all but ok."""

    check: str
    where: str
    severity: Severity
    text: str
    remedy: str = ""


def check_versions(nodes: dict[str, Facts], ours: Facts) -> Iterator[Finding]:
    """Against this process's."""
    for name, facts in nodes.items():
        wrong = [f"{package} {version} (here {ours['versions'][package]})"
                 for package, version in facts["versions"].items() if version != ours["versions"][package]]  # fmt: skip
        if wrong:
            remedy = "run `make setup` there: the lock has the versions"
            yield Finding("versions", name, "fail", ", ".join(wrong), remedy)
    if nodes and all(facts["versions"] == ours["versions"] for facts in nodes.values()):
        text = ", ".join(f"{package} {version}" for package, version in ours["versions"].items())
        yield Finding("versions", "all nodes", "ok", text)


def check_machines(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Disk space, open files, GPUs, what listens where."""
    for name, facts in nodes.items():
        for path, disk in facts["disks"].items():
            text = f"{path}: {disk['free'] / 1e9:.1f} of {disk['total'] / 1e9:.0f} GB free"
            little = disk["free"] < LEAST_FREE_SHARE * disk["total"]
            if little:
                remedy = "free some: Ray puts no tasks on a node whose disk is 95 % full"
                yield Finding("disk", name, "fail", text, remedy)
            elif disk["free"] < LEAST_FREE_BYTES:
                remedy = "free some: checkpoints and spilled objects need a few GB"
                yield Finding("disk", name, "warn", text, remedy)
            else:
                yield Finding("disk", name, "ok", text)
        files = facts["files"]
        severity: Severity = "fail" if files < LEAST_FILES else "warn" if files < ENOUGH_FILES else "ok"
        remedy = "" if severity == "ok" else "`ulimit -n 65536` before `ray start`, as clusters/environment does"
        yield Finding("open files", name, severity, f"{files} allowed", remedy)
        if facts["gpus"] != facts["gpus_of_ray"]:
            text = f"PyTorch sees {facts['gpus']}, Ray was told {facts['gpus_of_ray']:g}"
            remedy = "look at nvidia-smi there; the driver must be one that the locked PyTorch's CUDA runs on"
            yield Finding("GPUs", name, "fail", text, remedy)
        elif facts["gpus"]:
            yield Finding("GPUs", name, "ok", f"{facts['gpus']}")
        for port, addresses in facts["listening"].items():
            what = "dashboard and jobs" if port == DASHBOARD_PORT else "MLflow"
            text = f"{what}: port {port} on {', '.join(addresses)}"
            open_to_all = {"0.0.0.0", "::"} & set(addresses)
            beyond = port == DASHBOARD_PORT and set(addresses) - set(LOOPBACK)
            if open_to_all or beyond:
                option = (
                    "--dashboard-host=127.0.0.1" if port == DASHBOARD_PORT else "--host with the head's own address"
                )
                yield Finding("ports", name, "fail", text, f"start it with {option}, and reach it by make ui")
            else:
                yield Finding("ports", name, "ok", text)


def check_clocks(skews: dict[str, float]) -> Iterator[Finding]:
    """skews: seconds that a node's clock is ahead of this one's."""
    for name, skew in skews.items():
        severity: Severity = "fail" if abs(skew) > SKEW_FAIL_S else "warn" if abs(skew) > SKEW_WARN_S else "ok"
        remedy = "" if severity == "ok" else "let it keep time: `timedatectl set-ntp true`"
        yield Finding("clock", name, severity, f"{skew:+.3f} s beside this machine's", remedy)


def check_token(nodes: dict[str, Facts]) -> Iterator[Finding]:
    open_nodes = [name for name, facts in nodes.items() if facts["auth_mode"] != "token"]
    if open_nodes:
        remedy = "export RAY_AUTH_MODE=token before `ray start`: without it whoever reaches a port runs what he likes"
        yield Finding("token", ", ".join(open_nodes), "fail", "RAY_AUTH_MODE is not token", remedy)
    else:
        yield Finding("token", "all nodes", "ok", "needed")
