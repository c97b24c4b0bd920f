"""Open a cluster's dashboard, job server and MLflow on this machine, through SSH, until Ctrl-C.

    python jobs/ui.py                          of cluster.yaml
    python jobs/ui.py clusters/onprem.yaml

Nothing of a cluster but SSH is open to the world. While this runs, `ray job submit` and a browser here reach it.
Exit status: 1 the cluster or its head was not reached, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import shlex
from pathlib import Path

from orchestrator.base.exits import JobError, run_job
from orchestrator.cli.flags import Parser
from orchestrator.cluster.tunnel import DASHBOARD, Head, open_tunnels
from orchestrator.tracking.server import CLIENT, FOLDER, PORT


def main() -> int:
    flags = Parser("ui.py", __doc__)
    flags.add_argument("cluster", nargs="?", type=Path, default=Path("cluster.yaml"), metavar="FILE",
                       help="the yaml that `ray up` was given (default: cluster.yaml)")  # fmt: skip
    flags.add_argument("--dashboard-port", type=int, default=DASHBOARD, metavar="N", help="here (default: 8265)")
    flags.add_argument("--mlflow-port", type=int, default=PORT, metavar="N", help="here (default: 5000)")
    args = flags.parse_args()
    try:
        head = Head.of(args.cluster)
    except ValueError as error:
        flags.error(str(error))
    tunnels = open_tunnels(head, args.dashboard_port, args.mlflow_port)
    show = shlex.join([*head.ssh(), "cat", str(FOLDER / CLIENT)])
    print(f"""\
Ray dashboard  http://127.0.0.1:{args.dashboard_port}   asks for the token: cat .ray-token
MLflow         http://127.0.0.1:{args.mlflow_port}   asks for user and password: {show}

in another shell:
  export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{args.dashboard_port}
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(Path('.ray-token').absolute()))}
  ray job submit -- python jobs/train.py

Ctrl-C closes the tunnels""", flush=True)  # fmt: skip
    try:
        status = tunnels.wait()
    finally:
        tunnels.terminate()
    raise JobError(f"the connection to {head.address} was lost (ssh ended with {status})")


def script() -> int:
    """The console script, and jobs/ui.py: returns the exit status."""
    return run_job(main)
