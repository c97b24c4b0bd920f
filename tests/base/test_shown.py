"""What others wrote reaches the terminal escaped, short and on its own line, and our own lines as they are."""

import io
import logging
import re

import pytest
from conftest import ROOT

from orchestrator.base import logs
from orchestrator.base.exits import JobError, run_job
from orchestrator.base.shown import count_of, quoted, shown
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import LiveBlock, LiveLine, columns, table

FORGED = "x\r\x1b[2Kepoch 30/30  top-1 error 0.00 %\nnext"
HARMLESS = "x\\r\\x1b[2Kepoch 30/30  top-1 error 0.00 %\\nnext"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Apfel, Äpfel 林檎 🍎", "Apfel, Äpfel 林檎 🍎"),
        ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
        (FORGED, HARMLESS),
        ("\x9b2J\x07\x00\x7f", r"\x9b2J\x07\x00\x7f"),
        ("gpj\u202eexe.\u2066\u200f", r"gpj\u202eexe.\u2066\u200f"),
        ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
        ("caf\udce9", r"caf\udce9"),
        (r"C:\new", r"C:\new"),
        (7, "7"),
    ],
)
def test_what_could_move_the_cursor_or_turn_the_text_is_escaped(text, line):
    assert shown(text) == line


def test_of_a_long_text_both_ends_are_shown():
    line = shown("a" * 5000 + "\x1b" * 100 + "z" * 5000, 100)
    assert len(line) <= 100
    assert (line[:20], line[-10:]) == ("a" * 20, "z" * 10)
    assert re.fullmatch(r"(a+) \.\.\. \((\d+) more characters\) \.\.\. (z+)", line)
    assert " (10033 more characters) " in line
    assert shown("a" * 2000, None) == "a" * 2000


@pytest.mark.parametrize(
    ("line", "expected"),
    [  # escapes are longer than what they stand for, and shorten the first two further
        (shown("\x1b" * 10**6, 100), r"\x1b" * 10 + " ... (999985 more characters) ... " + r"\x1b" * 5),
        (shown("x" * 40 + "\n" * 40, 80), "x" * 33 + " ... (39 more characters) ... " + r"\n" * 8),
        (shown(shown("x" * 5000), 80), "x" * 32 + " ... (4952 more characters) ... " + "x" * 16),
        (
            shown(f"a: {shown(shown('x' * 5000, 900), 200)}", 100),
            "a: " + "x" * 42 + " ... (4935 more characters) ... " + "x" * 23,
        ),
        (shown("x" * 50 + shown("x" * 5000, 80), 80), "x" * 32 + " ... (5002 more characters) ... " + "x" * 16),
    ],
)
def test_a_text_that_is_shortened_again_counts_what_is_left_out_of_the_first(line, expected):
    assert line == expected


def test_a_value_is_quoted_like_repr_but_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted("a'b\n") == repr("a'b\n")
    assert quoted([1, "a"]) == "[1, 'a']"
    for value in ("x" * 10**7, b"x" * 10**7, list(range(10**5)), deep, 10**5000):
        assert len(quoted(value)) < 120
    assert quoted(deep) == "a value of type list"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_foreign_name_cannot_forge_a_line(stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for show in (
        lambda out: LiveLine(out).print(FORGED, "second"),
        lambda out: LiveBlock(0.0, out).print(FORGED, "second"),
    ):
        out = stream()
        show(out)
        assert out.getvalue() == HARMLESS + "\nsecond\n"
    line, block = LiveLine(stream()), LiveBlock(0.0, stream())
    line._last = -100.0
    line.update(FORGED)
    block.update([FORGED, "second"])
    own = "\r\x1b[2K" if stream is Terminal else ""
    assert line.stream.getvalue() == own + HARMLESS + ("" if own else "\n")
    assert block.stream.getvalue() == HARMLESS + "\nsecond\n"
    line.print("done")  # our own control characters do their work
    assert line.stream.getvalue().endswith(own + "done\n")


def test_a_table_s_cells_stay_in_their_places():
    assert table([("source", FORGED)]) == "  source  " + HARMLESS
    assert columns(["trial", "error"], [["1", FORGED]])[1] == "1      " + HARMLESS


@pytest.mark.parametrize("error", [JobError(FORGED), RuntimeError(FORGED.replace("\n", ""))])
def test_the_line_of_a_failed_job_is_one_and_has_no_secrets(error, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken")

    def fail():
        raise error

    assert run_job(fail, lambda: "run.log") == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text[:-1].isprintable()
    error.args = ("at postgresql://h/db?password=hunter2 with t0ken: " + "x" * 10**6,)
    assert run_job(fail) == 1
    text = capsys.readouterr().err
    assert "postgresql://h/db?password=*** with ***" in text
    assert len(text) < 1200


def test_a_run_s_log_has_no_control_characters(tmp_path):
    root = logging.getLogger()
    level = root.level
    logs.open_run_log(StoragePath.of(tmp_path / "run.log"))
    logging.getLogger("orchestrator.x").warning("%s", FORGED)
    logs.close_run_log()
    root.setLevel(level)
    text = (tmp_path / "run.log").read_text()
    assert text.endswith(HARMLESS.replace("\\nnext", "\nnext\n"))


def test_a_number_agrees_with_its_noun():
    assert [count_of(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
    assert [count_of(n, "class", "classes") for n in (1, 10)] == ["1 class", "10 classes"]


def test_no_message_says_worker_s_in_brackets():
    ours = [path for path in (ROOT / "orchestrator").rglob("*.py") if path.relative_to(ROOT).parts[1] != "data"]
    assert len(ours) > 80
    wrong = [
        f"{path.name}: {line.strip()}"
        for path in ours
        if path != ROOT / "orchestrator" / "cli" / "prepare.py"
        for line in path.read_text().splitlines()
        if re.search(r"\b(node|worker|image|file|epoch|trial|run|GPU|CPU|set|value|thread|number|group)\(s\)", line)
    ]
    assert wrong == []
