"""The wire format of Protocol Buffers, as far as reading and writing weights takes: fields of a message, no schema.

https://protobuf.dev/programming-guides/encoding. A message is walked, not built: nothing is read deeper than asked.
"""

from collections.abc import Iterable, Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are of before 2008
MAX_FIELDS = 100_000_000  # of a message: more than AlexNet has weights, should each be a field of its own


class Damaged(ValueError):
    """Bytes that are no message; the text is the reason."""


def fields(message: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """(number, wire type, value of a varint or 0, bytes of what is no varint) of each field. Raises Damaged."""
    at, end, count = 0, len(message), 0
    while at < end:
        tag, at = _varint(message, at)
        number, wire, value, size = tag >> 3, tag & 7, 0, 0
        if not 0 < number < 1 << 29:
            raise Damaged(f"field {number} at byte {at}")
        if wire == VARINT:
            value, at = _varint(message, at)
        elif wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise Damaged(f"wire type {wire} at byte {at}")
        if size > end - at:
            raise Damaged(f"field {number} claims {size} bytes where {end - at} are left")
        yield number, wire, value, message[at : at + size]
        at, count = at + size, count + 1
        if count > MAX_FIELDS:
            raise Damaged(f"more than {MAX_FIELDS} fields")


def varints(packed: memoryview) -> Iterator[int]:
    """The numbers of a packed repeated field. Raises Damaged."""
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Damaged("ends within a number")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Damaged(f"a number of more than 10 bytes at byte {at}")


def varint(value: int) -> bytes:
    """A number as the wire has it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes | Iterable[bytes]) -> bytes:
    """A field: a varint of an int, else bytes or the parts of a message."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    data = value if isinstance(value, bytes) else b"".join(value)
    return varint(number << 3 | BYTES) + varint(len(data)) + data


def fixed32(number: int, four_bytes: bytes) -> bytes:
    """A field of a float."""
    return varint(number << 3 | FIXED32) + four_bytes
