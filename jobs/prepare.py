"""Convert photographs to shards: orchestrator/cli/prepare.py."""

import sys

from orchestrator.cli.prepare import script

if __name__ == "__main__":
    sys.exit(script())
