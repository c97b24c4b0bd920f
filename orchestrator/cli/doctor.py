"""Check a cluster before it costs money: versions, GPUs, network, storage, tracking server, clocks, disks, ports.

    ray job submit -- python jobs/doctor.py         checks the cluster, from its head
    python jobs/doctor.py                           checks this machine

Prints one line per check: ok, warn or fail. Every warning and failure is repeated below with its remedy.
Exit status: 0 nothing failed, 1 something failed, 2 wrong usage.
"""

import argparse
from collections import Counter

from orchestrator.base.environment import default_output
from orchestrator.base.exits import FAILED, one_line
from orchestrator.base.storage import StoragePath
from orchestrator.cli.flags import Parser, run
from orchestrator.cluster.diagnosis import Finding
from orchestrator.cluster.doctor import Doctor


def parser() -> Parser:
    flags = Parser("doctor", __doc__)
    flags.add_argument("--output", default=default_output(), metavar="DIR",
                       help="storage to check: a folder or a URI (default: %(default)s)")  # fmt: skip
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    try:
        doctor = Doctor(StoragePath.of(args.output))
    except ValueError as error:
        flags.error(str(error))
    found: list[Finding] = []
    for finding in doctor.findings():
        found.append(finding)
        print(f"{finding.severity:<4}  {finding.check:<10}  {finding.where:<24}  {one_line(finding.text)}", flush=True)
    bad = [finding for finding in found if finding.severity != "ok"]
    for finding in bad:
        print(f"\n{finding.severity}: {finding.check}, {finding.where}: {one_line(finding.text)}")
        print(f"  remedy: {one_line(finding.remedy)}")
    count = Counter(finding.severity for finding in found)
    print(f"\n{count['ok']} ok, {count['warn']} warn, {count['fail']} fail")
    return FAILED if count["fail"] else 0


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
