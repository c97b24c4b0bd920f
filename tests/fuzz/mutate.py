"""Damage done to bytes: flips, cuts, repeats, splices, wrong lengths; and what a format's own checksums need after it.

Every function takes a `random.Random`, so that a seed makes the same inputs again.
"""

import gzip
import hashlib
import json
import random
import struct
import zlib
from typing import Any

from orchestrator.data.shards import CHECKSUM, checksum

LONGEST = 2**20  # bytes of an input
NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
HUGE = (2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\0",
    "\ud800", "a\nb", "../../x", "/etc/passwd", "\u202e", "1" * 5000, "é" * 300, [], {}, [[]], {"": {}}, [None] * 50,
)  # fmt: skip
TEXTS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b",", b";", b"\t", b":", b"{", b"}", b"[", b"]",
    b"[" * 3000, b"{" * 3000, b"&a", b"*a", b"!!python/object:os.system", b"- " * 500, b"1e999", b"9" * 5000,
    b"\xed\xa0\x80", b"%", b"../", b"/", b"\\", b"~", b"?" * 20, b"#", b"0x10", b"08", b"1:30", b".nan", b"---\n",
    b"...\n", b"|\n", b">-\n",
)  # fmt: skip


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to six kinds of damage. others: inputs of the same format, for splices."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 6))):
        data = rng.choice(DAMAGES)(data, others, rng)[:LONGEST]
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere, but more often near an end, where formats keep their headers."""
    if not data:
        return 0
    kind = rng.random()
    if kind < 0.3:
        return rng.randrange(min(len(data), 64))
    if kind < 0.5:
        return len(data) - 1 - rng.randrange(min(len(data), 600))
    return rng.randrange(len(data))


def _flip(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if changed:
            changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _number(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    form = rng.choice("<>") + rng.choice("HIIQ")
    number = rng.choice(NUMBERS + HUGE) if form[1] == "Q" else rng.choice(NUMBERS)
    if rng.random() < 0.3:
        number = max(0, len(data) + rng.randrange(-8, 9))
    packed = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    at = _place(data, rng)
    return data[:at] + packed + data[at + len(packed) :]


def _nudge(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A number that is there, changed by a little or by much: a length, most likely."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = min(_place(data, rng), len(data) - size)
    found = struct.unpack(form, data[at : at + size])[0]
    changed = rng.choice((found + 1, found - 1, found * 2, found // 2, found + 255, -found))
    return data[:at] + struct.pack(form, changed & (2 ** (8 * size) - 1)) + data[at + size :]


def _cut(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data[: _place(data, rng)]


def _remove(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 512, rng.randrange(len(data) + 1))) :]


def _repeat(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    at, size = _place(data, rng), rng.choice((1, 2, 8, 64, 512, 1024))
    return data[:at] + data[at : at + size] * rng.choice((2, 3, 10, 200)) + data[at + size :]


def _splice(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _copy(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A piece of it, or of another, over another piece."""
    other = rng.choice((data, rng.choice(others)))
    at, to, size = _place(other, rng), _place(data, rng), rng.choice((4, 8, 32, 512))
    piece = other[at : at + size]
    return data[:to] + piece + data[to + len(piece) :]


def _insert(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 4, 64))), rng.choice(TEXTS))) + data[at:]


DAMAGES = (_flip, _flip, _byte, _byte, _number, _nudge, _nudge, _cut, _remove, _repeat, _splice, _copy, _insert)


def text(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Lines and words in another order, and signs that mean something to a parser."""
    if rng.random() < 0.3:
        return damaged(data, others, rng)
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines.insert(at, rng.choice(rng.choice(others).split(b"\n")))
        elif kind == 1:
            lines[at:at] = [lines[at]] * rng.choice((1, 2, 300))
        elif kind == 2:
            del lines[at]
        else:
            place = rng.randrange(len(lines[at]) + 1)
            end = place if kind < 5 else rng.randrange(place, len(lines[at]) + 1)
            lines[at] = lines[at][:place] + rng.choice(TEXTS) + lines[at][end:]
        lines = lines or [b""]
    return b"\n".join(lines)[:LONGEST]


def as_json(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Values of a document replaced, or its text damaged."""
    if rng.random() < 0.4:
        return text(data, others, rng)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return text(data, others, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _changed(document, rng)
    return json.dumps(document, indent=rng.choice((None, 1))).encode()[:LONGEST]


def _changed(value: Any, rng: random.Random) -> Any:
    """A document with one value of it replaced, removed, added or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.75:
            return value | {key: _changed(value[key], rng)}
        if kind < 0.87:
            return {name: each for name, each in value.items() if name != key}
        return value | {rng.choice(("x", "", "schema_version", "\ud800", *value)): rng.choice((value[key], *VALUES))}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.7:
            return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
        return value[:at] + value[at : at + 1] * rng.choice((0, 2, 100)) + value[at + 1 :]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (value + 1, value - 1, -value, value / 2 if abs(value) < 2**64 else 0, f"{value:x}", value * 1000)
        )
    return rng.choice(VALUES)


def sealed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A manifest with the checksum of what it says, most of the time."""
    data = as_json(data, others, rng)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(document, dict) or rng.random() < 0.1:
        return data
    return json.dumps(document | {CHECKSUM: checksum(document)}).encode()


def png(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """With the checksums of its chunks."""
    data = damaged(data, others, rng)
    if rng.random() < 0.2:
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return bytes(out + data[at:])


def jpeg(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Its segments in another order, repeated, or with a wrong length."""
    if rng.random() < 0.6:
        return damaged(data, others, rng)
    marks = [i for i in range(len(data) - 3) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    if len(marks) < 2:
        return damaged(data, others, rng)
    pieces = [data[a:b] for a, b in zip(marks, [*marks[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(pieces))
        kind = rng.randrange(4)
        if kind == 0:
            pieces[at:at] = [rng.choice(pieces)] * rng.choice((1, 3, 120))
        elif kind == 1:
            pieces[at] = pieces[at][:2] + struct.pack(">H", rng.choice((0, 1, 2, 3, 0xFFFF))) + pieces[at][4:]
        elif kind == 2:
            pieces[at] = damaged(pieces[at], pieces, rng)
        else:
            rng.shuffle(pieces)
    return b"".join(pieces)[:LONGEST]


def tar(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """With the checksums of its headers, and sometimes another kind, size or name of a member."""
    if rng.random() < 0.3:
        return damaged(data, others, rng)
    blocks = [bytearray(data[i : i + 512].ljust(512, b"\0")) for i in range(0, len(data), 512)]
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not headers:
            break
        block = blocks[rng.choice(headers)]
        kind = rng.randrange(5)
        if kind == 0:
            block[156:157] = rng.choice(
                (b"0", b"1", b"2", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"X", b"\xff")
            )
        elif kind == 1:
            block[124:136] = rng.choice(
                (
                    b"%011o\0" % rng.choice(NUMBERS),
                    b"\x80" + rng.randbytes(11),
                    b"\xff" * 12,
                    b"77777777777\0",
                    b"-1".ljust(12),
                )
            )
        elif kind == 2:
            name = rng.choice(
                (b"../x.jpg", b"/x.jpg", b"\xff\xfe.jpg", b"", b"a/" * 50, b".", b"x\0y", b"train/a\n/b.jpg")
            )
            block[:100] = name.ljust(100, b"\0")[:100]
        elif kind == 3:
            at = rng.randrange(500)
            block[at : at + 4] = rng.randbytes(4)
        else:
            at = rng.choice(headers)
            blocks[at:at] = [bytearray(blocks[at]) for _ in range(rng.choice((1, 2, 40)))]
            headers = [i for i, each in enumerate(blocks) if each[257:262] == b"ustar"]
    for at in headers:
        block = blocks[at]
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    joined = b"".join(blocks)
    return joined[:LONGEST] if rng.random() < 0.9 else damaged(joined, others, rng)


def packed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A tar in gzip, damaged inside or outside."""
    try:
        inner = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return damaged(data, others, rng)
    if rng.random() < 0.3:
        return damaged(data, others, rng)
    return gzip.compress(tar(inner, [inner], rng), 1, mtime=0)


def zip_archive(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Fields of its directory, which lies at its end."""
    if rng.random() < 0.5:
        return damaged(data, others, rng)
    changed = bytearray(data)
    marks = [
        i
        for i in range(len(data) - 46)
        if data[i : i + 2] == b"PK" and data[i + 2 : i + 4] in (b"\1\2", b"\3\4", b"\5\6")
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if marks:
            at = rng.choice(marks) + rng.randrange(4, 46)
            value = rng.choice((*NUMBERS, len(data)))
            size = rng.choice((2, 4))
            changed[at : at + size] = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return bytes(changed[:LONGEST])


def parquet(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Mostly its footer, whose length stands before the last four bytes."""
    if len(data) < 12 or rng.random() < 0.3:
        return damaged(data, others, rng)
    size = int.from_bytes(data[-8:-4], "little")
    start = max(4, len(data) - 8 - size)
    footer = damaged(data[start:-8], [other[-8 - size : -8] for other in others], rng)
    length = len(footer) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return data[:start] + footer + struct.pack("<I", length) + data[-4:]


def safetensors(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Its header, which is JSON after its length."""
    if len(data) < 9 or rng.random() < 0.2:
        return damaged(data, others, rng)
    size = int.from_bytes(data[:8], "little")
    header = as_json(data[8 : 8 + size], [data[8 : 8 + size]], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS + HUGE)
    return struct.pack("<Q", length) + header + data[8 + size :]


def listing(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A line of JSON after its length, then an Arrow table."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5 or size + 8 >= len(data):
        return safetensors(data, others, rng)
    return data[: 8 + size] + damaged(data[8 + size :], [data[8 + size :]], rng)


def name_of(data: bytes) -> str:
    """A short name of an input."""
    return hashlib.sha256(data).hexdigest()[:12]
