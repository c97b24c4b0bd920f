"""What a connection to Ray prints, and what it leaves to the log."""

import subprocess
import sys

import pytest

from orchestrator.cluster.connection import QUIET_LOGGERS

CODE = """
import logging, sys
from orchestrator.base import logs
from orchestrator.base.storage import StoragePath
from orchestrator.cluster.connection import QUIET_LOGGERS, connect
connect()
logs.open_run_log(StoragePath.of(sys.argv[1]))
for name in QUIET_LOGGERS:
    logger = logging.getLogger(name)
    logger.info("a note of %s", name)
    logger.error("an error of %s", name)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_s_lines_are_off_the_terminal_and_not_lost(tmp_path):
    log = tmp_path / "run.log"
    done = subprocess.run([sys.executable, "-c", CODE, str(log)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = [line.rpartition(": ")[2] for line in log.read_text().splitlines()]
    for name in QUIET_LOGGERS:
        assert written.count(f"a note of {name}") == written.count(f"an error of {name}") == 1
