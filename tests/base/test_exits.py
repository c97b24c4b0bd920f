"""How a job ends, and when a signal may interrupt it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.base.exits import Interrupted, JobError, catch_signals, run_job, signals_deferred, signals_end_at_once


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def fail(error):
    raise error


def test_every_end_has_its_status_and_one_line(capsys):
    assert run_job(lambda: 0) == 0
    assert run_job(lambda: fail(JobError("no space"))) == 1
    assert run_job(lambda: fail(Interrupted(signal.SIGTERM))) == 143
    assert run_job(lambda: os.kill(os.getpid(), signal.SIGINT) or 0) == 130
    assert run_job(lambda: fail(Interrupted(signal.SIGINT, said=True))) == 130  # a run has said how to resume it
    assert capsys.readouterr().err == "error: no space\nstopped by SIGTERM\nstopped by SIGINT\n"


def test_a_signal_waits_for_the_end_of_a_deferred_block():
    catch_signals()
    reached = []
    with pytest.raises(Interrupted, match="SIGTERM"), signals_deferred():
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]
    with signals_deferred():
        pass  # it was raised once


def test_an_error_in_a_deferred_block_comes_first():
    catch_signals()
    with pytest.raises(KeyError), signals_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        raise KeyError
    with pytest.raises(Interrupted), signals_deferred():
        pass  # the signal is not lost


BUSY = """
import ctypes, sys
from orchestrator.base.exits import run_job, signals_end_at_once

def main():
    with signals_end_at_once():
        print("begun", flush=True)
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # for ever, in compiled code: Python's handlers do not run
    return 0

sys.exit(run_job(main))
"""
STARTING = """
import sys, time
from orchestrator.cli import start

def never(name):
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:  # as a module may do that is being imported
            pass

start.importlib.import_module = never
sys.exit(start.train())
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [BUSY, STARTING], ids=["compiled code", "imports"])
def test_a_signal_ends_a_start_at_once_in_one_line(code, signum):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (128 + signum, "", f"stopped by {signum.name}\n")


@pytest.mark.parametrize(("told", "status", "taken"), [("end(7)", 7, ""), ("", 3, "taken apart\n")])
def test_a_process_ends_without_being_taken_apart_once_its_status_is_told(told, status, taken):
    code = f"""
import atexit, os, sys
from orchestrator.base.exits import end_without_teardown
end = end_without_teardown()
atexit.register(print, "handler")
class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")
kept = Kept()
print("printed")
{told}
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, "")
    assert sorted(done.stdout.splitlines(True)) == sorted(["printed\n", "handler\n", *([taken] if taken else [])])


def test_after_such_a_block_signals_interrupt_again():
    with signals_end_at_once():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with pytest.raises(Interrupted, match="SIGINT"):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_closed_output_ends_a_job_in_silence(tmp_path):
    program = "from orchestrator.base.exits import run_job\nimport sys\ndef main():\n"
    program += "    for _ in range(100000):\n        print('a line')\n    return 0\nsys.exit(run_job(main))"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_standard_streams_has_empty_ones(tmp_path):
    program = "import sys\nfrom orchestrator.base.exits import open_closed_streams\nopen_closed_streams()\n"
    program += "print('gone'); file = open(sys.argv[1], 'w'); assert file.fileno() > 2; print(sys.stdin.read(), end='')"
    shell = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, program, str(tmp_path / "file")], check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""
