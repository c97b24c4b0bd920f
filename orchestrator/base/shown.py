"""Text of others as it may be shown: names, values and errors on one line, without control characters, not endless."""

import unicodedata
from typing import Any

LONGEST = 1000  # characters of a line
LONGEST_VALUE = 80  # characters of a value that a message quotes


def shown(text: object, limit: int | None = LONGEST) -> str:
    """One line: newlines, control characters and what turns the direction of writing are escaped, as in \\x1b; of a
    text of more than `limit` characters the middle is left out."""
    line = str(text)
    if limit is not None and len(line) > limit:
        line = _shortened(line, limit)
    if not line.isprintable():
        line = "".join(_escaped(character) for character in line)
        if limit is not None and len(line) > limit:  # escapes are longer than what they stand for
            line = _shortened(line, limit)
    return line


def count_of(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 file, 2 files; `many` where it is not `one` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def quoted(value: Any, limit: int = LONGEST_VALUE) -> str:
    """A value as a message quotes it: like repr, on one line, shortened."""
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[: limit // 2]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return f"a value of type {type(value).__name__}"
    return shown(text, limit)


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def _shortened(line: str, limit: int) -> str:
    mark = f" ... ({len(line)} characters) ... "
    head = max(1, (limit - len(mark)) * 2 // 3)
    tail = max(1, limit - len(mark) - head)
    return line[:head] + mark + line[-tail:]
