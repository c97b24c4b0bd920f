"""Text of others in Markdown: names and values that are shown as they are, and are no markup."""

import re
from collections.abc import Sequence

from orchestrator.base.shown import LONGEST, shown

MARKUP = re.compile(r"([\\`*_{}\[\]()<>#!|~$&:@])|(?<=www)(\.)")  # with ":", "@" and "www." so that no link is made


def escaped(text: object, limit: int | None = LONGEST) -> str:
    """On one line, with a backslash before whatever Markdown or HTML could take for markup."""
    return MARKUP.sub(lambda found: "\\" + found[0], shown(text, limit))


def code(text: object, limit: int | None = LONGEST) -> str:
    """As code within a line."""
    line = shown(text, limit)
    marks = "`" * (_longest_run(line) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{marks}{space}{line}{space}{marks}"


def code_block(text: str, language: str = "") -> str:
    """Lines as code."""
    lines = [shown(line, None) for line in text.rstrip("\n").split("\n")]
    marks = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([f"{marks}{language}", *lines, marks])


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
