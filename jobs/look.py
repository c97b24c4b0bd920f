"""Look into a trained net: orchestrator/cli/look.py."""

import sys

from orchestrator.cli.start import look

if __name__ == "__main__":
    sys.exit(look())
