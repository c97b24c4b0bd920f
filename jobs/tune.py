"""Search for better settings: orchestrator/cli/tune.py."""

import sys

from orchestrator.cli.start import tune

if __name__ == "__main__":
    sys.exit(tune())
