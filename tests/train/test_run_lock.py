"""One driver a run."""

import subprocess
import sys

import pytest

from orchestrator.config.recipes import digits
from orchestrator.train.run_folder import RunFolder
from orchestrator.train.run_lock import RunLock

HOLDS = """
import sys
from orchestrator.train.run_lock import RunLock
from orchestrator.train.run_folder import RunFolder
lock = RunLock(RunFolder(sys.argv[1], "run"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.create(digits())
    return folder


def test_a_run_has_one_driver_until_it_lets_go(run):
    lock = RunLock(run)
    with pytest.raises(ValueError, match="--resume run: another process is working on it; wait for its end"):
        RunLock(run)
    lock.release()
    lock.release()
    RunLock(run).release()


def test_a_killed_driver_holds_nothing(run):
    command = [sys.executable, "-c", HOLDS, str(run.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"):
            RunLock(run)
        holder.kill()
    RunLock(run).release()
