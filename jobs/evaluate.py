"""Evaluate trained nets: orchestrator/cli/evaluate.py."""

import sys

from orchestrator.cli.start import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
