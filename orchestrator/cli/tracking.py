"""Run an MLflow tracking server for a cluster: protected by a password, restarted if it dies, bound to one address.

    python jobs/tracking.py start                       on this machine, for this machine (127.0.0.1:5000)
    python jobs/tracking.py start --host 10.0.0.5       for all machines that reach this address
    python jobs/tracking.py status
    python jobs/tracking.py stop
    python jobs/tracking.py run                         in the foreground, for containers

The cluster's yaml starts one on the head. The first start generates a user and a password and writes them to
DIR/client.env, which only you can read. Runs are stored in a SQLite database in DIR, artifacts next to it. To
store them elsewhere, stop the server, write DIR/server.env (chmod 600: it may hold a password) and start it again:

    TRACKING_DATABASE=postgresql://USER:PASSWORD@HOST/DATABASE      (needs: pip install psycopg2-binary)
    TRACKING_ARTIFACTS=s3://BUCKET/mlflow

Exit status: 0 done, 1 failed or not running, 2 wrong usage.
"""

import argparse
from pathlib import Path

from orchestrator.base.terminal import LiveLine
from orchestrator.cli.flags import Parser, run
from orchestrator.tracking.server import CLIENT, FOLDER, PORT, TrackingServer


def parser() -> Parser:
    flags = Parser("tracking", __doc__)
    flags.add_argument("action", choices=("start", "stop", "status", "run"), help="what to do")
    flags.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    flags.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port to listen on (default: {PORT})")
    flags.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help=f"folder of the server's own files (default: {FOLDER})",
    )
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    if args.host in ("0.0.0.0", "::", ""):
        flags.error(f"--host {args.host}: would listen on every network; name the address that the workers reach")
    server = TrackingServer(args.folder.expanduser().absolute(), args.host, args.port)
    if args.action == "stop":
        print("stopped" if server.stop() else "was not running")
        return 0
    if args.action == "run":
        server.write_settings()
        server.keep_running()
    if args.action == "start":
        server.start(LiveLine().print)
    running = server.answers() and server.pid() is not None
    client = server.folder / CLIENT
    where = f"user and password: {client}" if client.exists() else f"none was ever started in {server.folder}"
    print(f"{server.uri}: {'running' if running else 'not running'}; {where}")
    return 0 if running else 1


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
