"""Start, stop or query a tracking server: orchestrator/cli/tracking.py."""

import sys

from orchestrator.cli.start import tracking

if __name__ == "__main__":
    sys.exit(tracking())
