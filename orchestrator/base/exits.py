"""How a job ends: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 141 output closed, 143 stopped by SIGTERM."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from orchestrator.base.redaction import redact_all
from orchestrator.base.shown import shown

FAILED, USAGE = 1, 2
OUTPUT_CLOSED = 141  # as of a program that SIGPIPE ends


class JobError(RuntimeError):
    """A job with valid settings failed; the message is one line for the user."""


class Interrupted(BaseException):
    """The job was told to stop. Like KeyboardInterrupt not an Exception, so that nothing swallows it."""

    def __init__(self, signum: int, *, said: bool = False) -> None:
        """said: whether the user has been told already, with what was saved."""
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum
        self.said = said


def run_job(main: Callable[[], int], log: Callable[[], object | None] = lambda: None) -> int:
    """Call `main`, turn what it raises into one line on standard error, and return the exit status.

    log: the run's log where there is one, which has the traceback.
    """
    catch_signals()
    try:
        return main()
    except JobError as error:
        path = log()
        _say_error(str(error), f"log: {path}" if path else "")
        return FAILED
    except Interrupted as stop:
        if not stop.said:
            print(f"stopped by {stop}", file=sys.stderr)
        return stop.exit_status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return OUTPUT_CLOSED
        # a bug or an unforeseen fault: one line for the user, the rest for a report
        if path := log():
            _say_error(name_and_line(error), f"log: {path}")
            return FAILED
        import tempfile  # not above: a job can be stopped as soon as this file is imported
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="alexnet-error-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        _say_error(name_and_line(error), f"traceback in {file.name}")
        return FAILED


def open_closed_streams() -> None:
    """Give a process that was started without standard streams, as by `>&-`, empty ones: the next file that it opens
    would get their numbers, and what is printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _is_output_closed() -> bool:
    """Whether whoever read this process's output reads no more, as in `... | head`; then nothing more is written."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return True


def one_line(error: str) -> str:
    """A message as it may be shown, whatever it quotes: one line of bounded length, without secrets."""
    return shown(redact_all(error))


def _say_error(message: str, where: str) -> None:
    print(f"error: {one_line(message)}" + (f" ({shown(where)})" if where else ""), file=sys.stderr)


def last_line(error: BaseException) -> str:
    """The reason at the end of an exception's text, without the tracebacks that Ray puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def name_and_line(error: BaseException) -> str:
    """An exception as a traceback ends, "ZeroDivisionError: division by zero"; of a JobError only its text, a line."""
    name, line = type(error).__name__, last_line(error)
    return line if isinstance(error, JobError) or line == name else f"{name}: {line}"


def lacks_memory(error: BaseException) -> bool:
    """Whether it is for want of memory, also as PyTorch tells it: a RuntimeError, of the CPU's allocator or a GPU's."""
    text, kind = str(error), type(error)
    is_torchs = kind.__name__ == "OutOfMemoryError" and kind.__module__.split(".")[0] == "torch"  # Ray has its own
    return isinstance(error, MemoryError) or is_torchs or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "ALLOC_FAILED" in text)
    )  # fmt: skip


def no_memory(error: BaseException, hint: str) -> str:
    """One line for the user about want of memory. hint: what takes less."""
    return f"not enough memory ({last_line(error)[:200]}); {hint}"


@contextlib.contextmanager
def hinting_at_memory(hint: str) -> Iterator[None]:
    """Want of memory within is a JobError, with what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise JobError(no_memory(error, hint)) from None


def catch_signals() -> None:
    """Make Ctrl-C and SIGTERM raise Interrupted. To be called again after Ray has put its own handlers in place."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Within this block a signal is kept, and raised at its end: for calls into Ray's compiled code, which breaks, or
    crashes the process, when a handler raises in the midst of it. Keep such blocks short."""
    _deferral.depth += 1
    try:
        yield
    finally:
        _deferral.depth -= 1
    if _deferral.signum is not None and not _deferral.depth:
        signum, _deferral.signum = _deferral.signum, None
        raise Interrupted(signum)


class _Deferral:
    """Of the main thread, the only one that Python's signal handlers run in."""

    depth = 0
    signum: int | None = None


_deferral = _Deferral()


@contextlib.contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Within this block a signal ends the process at once, also while compiled code keeps the main thread: for calls
    that may hang when there is nothing yet to save or to remove. Afterwards signals raise Interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals, told = os.pipe()
    os.set_blocking(told, False)
    # Python's handlers run in the main thread, between two of its instructions; the thread learns of a signal anyway
    threading.Thread(target=_leave_when_told, args=(signals,), name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    end_at_once_on_signals()
    try:
        yield
    finally:
        catch_signals()
        signal.set_wakeup_fd(before)
        os.close(told)  # which ends the thread


def end_at_once_on_signals() -> None:
    """Make Ctrl-C and SIGTERM end this process, as long as `catch_signals` is not called: while modules are imported,
    nothing is to be saved, and an exception could be raised in the midst of a module that catches all."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def end_without_teardown() -> Callable[[int], None]:
    """Make the process end as soon as all exit handlers registered from now on have run. Returns what to tell its
    status; without one it ends as usual.

    Python would take apart every module, and give back memory piece by piece: two seconds with PyTorch, Ray and MLflow.
    """
    told: list[int] = []

    def leave() -> None:
        if not told:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(told[-1])

    atexit.register(leave)  # the first to be registered is the last to run
    return told.append


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)


def _leave_when_told(signals: int) -> None:
    while told := os.read(signals, 1):
        if told[0] in (signal.SIGINT, signal.SIGTERM):
            _leave(told[0], None)
    os.close(signals)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second Ctrl-C ends at once
    if _deferral.depth:
        _deferral.signum = signum
    else:
        raise Interrupted(signum)
