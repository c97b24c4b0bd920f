"""Search for better settings: orchestrator/cli/tune.py."""

import sys

from orchestrator.cli.tune import script

if __name__ == "__main__":
    sys.exit(script())
