"""Train AlexNet: orchestrator/cli/train.py."""

import sys

from orchestrator.cli.start import train

if __name__ == "__main__":
    sys.exit(train())
