"""Open SSH tunnels to a cluster's dashboard, job server and MLflow, until Ctrl-C.

    python jobs/ui.py                          the cluster of cluster.yaml
    python jobs/ui.py clusters/onprem.yaml

A cluster exposes only SSH. While this runs, `ray job submit` and a browser on this machine reach the rest.
Exit status: 1 the cluster or its head could not be reached, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import argparse
import shlex
from pathlib import Path

from orchestrator.base.exits import JobError
from orchestrator.cli.flags import Parser, run
from orchestrator.cluster.tunnel import DASHBOARD, Head, open_tunnels
from orchestrator.tracking.server import CLIENT, FOLDER, PORT


def parser() -> Parser:
    flags = Parser("ui", __doc__)
    flags.add_argument("cluster", nargs="?", type=Path, default=Path("cluster.yaml"), metavar="FILE",
                       help="the YAML file that was passed to `ray up` (default: cluster.yaml)")  # fmt: skip
    flags.add_argument(
        "--dashboard-port", type=int, default=DASHBOARD, metavar="N", help="local port of the dashboard (default: 8265)"
    )
    flags.add_argument(
        "--mlflow-port", type=int, default=PORT, metavar="N", help="local port of MLflow (default: 5000)"
    )
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    try:
        head = Head.of(args.cluster)
    except ValueError as error:
        flags.error(str(error))
    tunnels = open_tunnels(head, args.dashboard_port, args.mlflow_port)
    show = shlex.join([*head.ssh(), "cat", str(FOLDER / CLIENT)])
    print(f"""\
Ray dashboard  http://127.0.0.1:{args.dashboard_port}   needs the token: cat .ray-token
MLflow         http://127.0.0.1:{args.mlflow_port}   needs user and password: {show}

in another shell:
  export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{args.dashboard_port}
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(Path('.ray-token').absolute()))}
  ray job submit -- python jobs/train.py

Press Ctrl-C to close the tunnels""", flush=True)  # fmt: skip
    try:
        status = tunnels.wait()
    finally:
        tunnels.terminate()
    raise JobError(f"the connection to {head.address} was lost (ssh ended with {status})")


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
