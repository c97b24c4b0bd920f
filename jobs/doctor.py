"""Check a cluster: orchestrator/cli/doctor.py."""

import sys

from orchestrator.cli.doctor import script

if __name__ == "__main__":
    sys.exit(script())
