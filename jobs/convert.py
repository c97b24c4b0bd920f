"""Convert a trained net to one file: orchestrator/cli/convert.py."""

import sys

from orchestrator.cli.start import convert

if __name__ == "__main__":
    sys.exit(convert())
