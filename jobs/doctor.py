"""Check a cluster: orchestrator/cli/doctor.py."""

import sys

from orchestrator.cli.start import doctor

if __name__ == "__main__":
    sys.exit(doctor())
