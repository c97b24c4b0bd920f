"""Convert photographs to shards: orchestrator/cli/prepare.py."""

import sys

from orchestrator.cli.start import prepare

if __name__ == "__main__":
    sys.exit(prepare())
