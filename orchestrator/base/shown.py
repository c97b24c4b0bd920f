"""Text of others as it may be shown: names, values and errors on one line, without control characters, not endless."""

import re
import unicodedata
from typing import Any

LONGEST = 1000  # characters of a line
LONGEST_VALUE = 80  # characters of a value that a message quotes
MARK = re.compile(r" \.\.\. \((\d{1,12}) more characters\) \.\.\. ")  # that a text was shortened


def shown(text: object, limit: int | None = LONGEST) -> str:
    """One line: newlines, control characters and what turns the direction of writing are escaped, as in \\x1b; of a
    text of more than `limit` characters the middle is left out."""
    line = str(text)
    if limit is None or len(line) <= limit:
        escaped = line if line.isprintable() else "".join(map(_escaped, line))
        if limit is None or len(escaped) <= limit:  # escapes are longer than what they stand for
            return escaped
    return _shortened(line, limit)


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
    """Both ends, escaped. Of a line that was shortened before, its mark is left out, too, and what it counts is
    counted."""
    before, after, already = line, line, -len(line)
    if found := MARK.search(line):
        before, after, already = line[: found.start()], line[found.end() :], int(found[1])
    room = limit - len(_mark(already + len(before) + len(after)))
    head = _fitting(before, max(1, room * 2 // 3))
    tail = _fitting(after[::-1], max(1, room - room * 2 // 3))
    left_out = already + len(before) + len(after) - len(head) - len(tail)
    return "".join(head) + _mark(left_out) + "".join(reversed(tail))


def _mark(left_out: int) -> str:
    return f" ... ({left_out} more characters) ... "


def _fitting(characters: str, most: int) -> list[str]:
    """The first of these, each escaped, that have so many characters together."""
    found: list[str] = []
    for character in characters[:most]:
        most -= len(escaped := _escaped(character))
        if most < 0:
            break
        found.append(escaped)
    return found
