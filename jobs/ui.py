"""Open SSH tunnels to a cluster: orchestrator/cli/ui.py."""

import sys

from orchestrator.cli.ui import script

if __name__ == "__main__":
    sys.exit(script())
