"""What a job prints while it runs: a live line on a terminal, plain lines every few seconds elsewhere."""

import logging
import shutil
import sys
import time
from typing import TextIO

from orchestrator.base.redaction import redact_all
from orchestrator.base.shown import shown

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0


class LiveLine:
    """A line that rewrites itself on a terminal, and elsewhere is printed now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._last = 0.0
        self._shown = False

    def update(self, text: str) -> None:
        now, text = time.monotonic(), _safe(text)
        if self.live:
            width = shutil.get_terminal_size().columns  # the rest of a longer line would remain
            self.stream.write("\r\x1b[2K" + text[: width - 1])
            self.stream.flush()
            self._shown = True
        elif now - self._last >= LOG_EVERY_S:
            self._last = now
            print(text, file=self.stream, flush=True)

    def print(self, *lines: str) -> None:
        """Lines that stay; the log has them, too. A newline within one is shown as \\n: it may be of a foreign name."""
        text = "\n".join(map(_safe, lines))
        log.info("%s", text)
        if self._shown:
            self.stream.write("\r\x1b[2K")
            self._shown = False
        print(text, file=self.stream, flush=True)


class LiveBlock:
    """Lines that rewrite themselves on a terminal, as many as fit, and elsewhere are printed now and then."""

    def __init__(self, every_s: float, stream: TextIO | None = None) -> None:
        self.stream, self.every_s = stream or sys.stdout, every_s
        self.live = self.stream.isatty()
        self._last = -every_s
        self._shown = 0

    def update(self, lines: list[str]) -> None:
        now, lines = time.monotonic(), [_safe(line) for line in lines]
        if self.live:
            width, height = shutil.get_terminal_size()
            shown = [line[: width - 1] for line in lines[: height - 1]]
            self._clear()
            self.stream.write("\n".join(shown) + "\n")
            self.stream.flush()
            self._shown = len(shown)
        elif now - self._last >= self.every_s:
            self._last = now
            print("\n".join(lines), file=self.stream, flush=True)

    def print(self, *lines: str) -> None:
        """Lines that stay, above the others; the log has them, too. As in LiveLine, each is one."""
        text = "\n".join(map(_safe, lines))
        log.info("%s", text)
        self._clear()
        print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._shown:
            self.stream.write(f"\x1b[{self._shown}F\x1b[J")
            self._shown = 0


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def bar(done: float, width: int = 20) -> str:
    """A fraction from 0 to 1 as a text bar."""
    full = int(done * width)
    return "[" + "#" * full + "." * (width - full) + "]"


def columns(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns under their titles."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [titles, *rows]
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {shown(value, None)}" for name, value in rows)


def percent(error: float) -> str:
    return f"{100 * error:.2f} %"


def _safe(text: str) -> str:
    """The last gate before the terminal: one line, without secrets."""
    return shown(redact_all(text))
