"""How a job ends, and when a signal may interrupt it."""

import os
import signal

import pytest

from orchestrator.base.exits import Interrupted, JobError, catch_signals, run_job, signals_deferred


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
