"""A tracking server (MLflow) for a cluster: made with a password, kept running, bound to one address.

    python jobs/tracking.py start                       on this machine, for this machine (127.0.0.1:5000)
    python jobs/tracking.py start --host 10.0.0.5       for the machines that reach that address; the password is needed
    python jobs/tracking.py status
    python jobs/tracking.py stop
    python jobs/tracking.py run                         in the foreground, for containers

The cluster's yaml starts one on the head. User and password are made at the first start and are in FOLDER/client.env,
which only you can read. Runs are in a SQLite database in FOLDER, artifacts beside it. To have them elsewhere, stop the
server, write FOLDER/server.env (chmod 600: it may hold a password) and start it again:

    TRACKING_DATABASE=postgresql://USER:PASSWORD@HOST/DATABASE      (needs: pip install psycopg2-binary)
    TRACKING_ARTIFACTS=s3://BUCKET/mlflow

Exit status: 0 done, 1 failed or not running, 2 wrong usage.
"""

from pathlib import Path

from orchestrator.base.exits import run_job
from orchestrator.cli.flags import Parser
from orchestrator.tracking.server import CLIENT, FOLDER, PORT, TrackingServer


def main() -> int:
    flags = Parser("tracking.py", __doc__)
    flags.add_argument("action", choices=("start", "stop", "status", "run"))
    flags.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: 127.0.0.1)")
    flags.add_argument("--port", type=int, default=PORT, help=f"to listen at (default: {PORT})")
    flags.add_argument("--folder", type=Path, default=FOLDER, help=f"where it keeps its things (default: {FOLDER})")
    args = flags.parse_args()
    if args.host in ("0.0.0.0", "::", ""):
        flags.error(f"--host {args.host}: would listen on every network; name the address that the workers reach")
    server = TrackingServer(
        args.folder.expanduser().absolute(), args.host, args.port,
    )  # fmt: skip
    if args.action == "stop":
        print("stopped" if server.stop() else "it was not running")
        return 0
    if args.action == "run":
        server.write_settings()
        server.keep_running()
    if args.action == "start":
        server.start()
    running = server.answers() and server.pid() is not None
    print(f"{server.uri}: {'runs' if running else 'does not run'}; user and password: {server.folder / CLIENT}")
    return 0 if running else 1


def script() -> int:
    """The console script, and jobs/tracking.py: returns the exit status."""
    return run_job(main)
