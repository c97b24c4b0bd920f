"""Train AlexNet: orchestrator/cli/train.py."""

import sys

from orchestrator.cli.train import script

if __name__ == "__main__":
    sys.exit(script())
