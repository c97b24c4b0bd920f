"""A run's log, and a calm terminal."""

import errno
import io
import logging
import os
import sys
import threading
import time

import pytest

from orchestrator.base import logs
from orchestrator.base.exits import JobError, run_job
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveLine

log = logging.getLogger("orchestrator.somewhere")


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger()
    level = root.level
    yield
    logs.close_run_log()
    logs.set_up(verbose=False)
    root.setLevel(level)


def lines(path):
    return [line.split(" ", 2)[1:] for line in path.read_text().splitlines()]


def test_lines_since_the_start_of_the_command_and_of_libraries_are_in_the_log_and_not_on_the_terminal(tmp_path, capfd):
    logs.set_up(verbose=False)
    log.debug("early")
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    logs.keep_off_terminal("mlflow")  # as tracking/store.py does when it imports MLflow, which sets up its own
    logging.getLogger("mlflow.store").debug("theirs")
    log.warning("late")
    logs.record(1, logging.INFO, "ray.train", "a worker's", 0.0)
    logs.record(0, logging.INFO, "ray.train", "a trial's", 0.0, trial=3)
    logs.close_run_log()
    log.warning("after the end")
    assert lines(tmp_path / "run.log") == [
        ["DEBUG", "driver orchestrator.somewhere: early"],
        ["DEBUG", "driver mlflow.store: theirs"],
        ["WARNING", "driver orchestrator.somewhere: late"],
        ["INFO", "rank 1 ray.train: a worker's"],
        ["INFO", "trial 3 rank 0 ray.train: a trial's"],
    ]
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_appends_and_other_libraries_debug_lines_stay_out(tmp_path):
    for text in ("first", "second"):
        logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
        logging.getLogger("numba.core.byteflow").debug("thousands of these")
        logging.getLogger("ray.data._internal.progress").warning("Progress bars disabled.")
        log.info(text)
        logs.close_run_log()
    assert [line[1].rpartition(" ")[2] for line in lines(tmp_path / "run.log")] == ["first", "second"]


def test_verbose_shows_lines_on_standard_error(capsys):
    logs.set_up(verbose=True)
    log.debug("shown")
    logs.set_up(verbose=False)
    log.debug("not shown")
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.rstrip().endswith("orchestrator.somewhere: shown")) == ("", 1, True)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:hunter2@host/db",
        "postgresql+psycopg2://user:a/b'c@hunter2@host/db",
        "token hunter2 was refused",
        "http://hunter2@host: no",
        "cannot open mysql://u:two words hunter2@host",
    ],
)
def test_passwords_and_tokens_do_not_get_into_the_log(tmp_path, monkeypatch, text):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql://u:two words hunter2@host")
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    log.info("%s", text)
    logs.close_run_log()
    assert "hunter2" not in (tmp_path / "run.log").read_text()
    assert "***" in (tmp_path / "run.log").read_text()


def test_a_log_in_object_storage_is_there_at_the_end_and_goes_on_at_the_next_start(s3):
    place = s3[0] / "run.log"
    for text in ("first", "second"):
        logs.open_run_log(place)
        log.info(text)
        logs.close_run_log()
    assert [line.rpartition(" ")[2] for line in place.read().decode().splitlines()] == ["first", "second"]


def test_an_upload_that_is_under_way_does_not_come_after_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "UPLOAD_EVERY_S", 0.01)
    begun, go_on, written = threading.Event(), threading.Event(), []

    def write(path, data):
        if not begun.is_set():
            begun.set()
            go_on.wait(10)
        written.append(data)

    monkeypatch.setattr(StoragePath, "write", write)
    monkeypatch.setattr(StoragePath, "size", lambda path: None)
    logs.open_run_log(StoragePath("s3://bucket/run.log"))
    log.info("first")
    assert begun.wait(10)
    log.info("last")
    closing = threading.Thread(target=logs.close_run_log)
    closing.start()
    time.sleep(0.1)
    go_on.set()
    closing.join(10)
    assert b"last" in written[-1]
    assert b"last" not in written[0]
    assert len(written) == 2


def test_verbose_takes_nothing_from_the_log_and_says_nothing_twice(tmp_path, capsys):
    logs.set_up(verbose=True)
    logs.keep_off_terminal("mlflow")
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    logging.getLogger("mlflow.store").debug("a detail of theirs")
    logging.getLogger("mlflow.store").info("theirs")
    logs.record(1, logging.DEBUG, "orchestrator.train.worker", "a worker's", 0.0)
    LiveLine(sys.stdout).print("for everybody")
    logs.close_run_log()
    out, err = capsys.readouterr()
    assert [line.partition(": ")[2] for line in err.splitlines()] == ["theirs", "a worker's"]
    assert out == "for everybody\n"
    texts = [line.partition(": ")[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert texts == ["a detail of theirs", "theirs", "a worker's", "for everybody"]


def test_a_log_that_cannot_be_written_is_no_reason_to_fail(tmp_path, capfd):
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    logs._open[0].stream.close()
    log.info("lost")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [JobError("no room"), ZeroDivisionError("division by zero")])
def test_the_one_line_of_a_failed_job_names_the_log_that_has_the_traceback(tmp_path, capsys, error):
    def job():
        logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
        try:
            raise error
        except Exception:
            log.info("the run failed", exc_info=True)
            raise
        finally:
            logs.close_run_log()

    assert run_job(job, logs.run_log) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(f"(log: {tmp_path / 'run.log'})\n")
    assert "Traceback" in (tmp_path / "run.log").read_text()


def test_a_worker_s_lines_are_handed_on_whatever_becomes_of_them(capfd):
    def broken(*line):
        raise OSError("gone")

    sent = []
    root = logging.getLogger()
    for send in (broken, lambda *line: sent.append(line)):
        logs.forward(send)
        try:
            sys.exit("why")
        except SystemExit:
            log.error("failed", exc_info=True)
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, logs._Forward)]
    assert [(level, name) for level, name, _, _ in sent] == [(logging.ERROR, "orchestrator.somewhere")]
    assert sent[0][2].startswith("failed\nTraceback")
    assert capfd.readouterr() == ("", "")


def test_a_log_that_cannot_be_opened_says_why_and_fails_nothing(tmp_path, capfd):
    (tmp_path / "run.log").mkdir()
    why = logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    assert "Is a directory" in why
    log.info("nowhere")
    assert logs.run_log() is None
    assert capfd.readouterr() == ("", "")


def test_a_library_s_lines_reach_the_driver_once_whether_it_passes_them_on_or_not():
    sent = []

    def send(level, name, text, at):
        sent.append((name, text))
        log.error("what sending logs is not sent")

    logger = logging.getLogger("ray.train")
    before = logger.propagate
    try:
        for propagate in (True, False):
            logger.propagate = propagate
            logging.getLogger("ray").propagate = propagate
            for _ in range(2):  # the second replaces the first
                logs.forward(send)
            logger.error("a line")
    finally:
        logger.propagate = logging.getLogger("ray").propagate = before
        for each in (logging.getLogger(), *map(logging.getLogger, logs.APART)):
            each.handlers[:] = [handler for handler in each.handlers if not isinstance(handler, logs._Forward)]
    assert sent == [("ray.train", "a line")] * 2


class Full(io.StringIO):
    """A file on a disk that is full for a while."""

    full = True

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_log_on_a_full_disk_is_told_once_and_written_again_when_there_is_room(tmp_path, capfd):
    path = tmp_path / "run.log"
    logs.open_run_log(StoragePath.of(path))
    handler = logs._open[0]
    handler.stream.close()
    handler.stream = file = Full()
    log.warning("lost")
    log.warning("lost, too")
    out, err = capfd.readouterr()
    assert err == f"warning: the log can no longer be written: [Errno 28] No space left on device ({path})\n"
    assert out == ""
    file.full = False
    log.warning("kept")
    assert file.getvalue().endswith("WARNING driver orchestrator.somewhere: kept\n")
    assert len(file.getvalue().splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_log_whose_last_lines_the_disk_has_no_room_for_is_told_when_it_is_closed(tmp_path, capfd):
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    handler = logs._open[0]
    handler.stream.close()
    handler.stream = Full()
    handler.stream.flush = lambda: handler.stream.write("what is left")
    logs.close_run_log()
    assert "the log can no longer be written: [Errno 28] No space left on device" in capfd.readouterr().err
