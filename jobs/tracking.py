"""Start, stop or query a tracking server: orchestrator/cli/tracking.py."""

import sys

from orchestrator.cli.tracking import script

if __name__ == "__main__":
    sys.exit(script())
