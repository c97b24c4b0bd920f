"""Open SSH tunnels to a cluster: orchestrator/cli/ui.py."""

import sys

from orchestrator.cli.start import ui

if __name__ == "__main__":
    sys.exit(ui())
