"""Foreign bytes made to crash their readers or to fill the memory: by name, the bytes of a file."""

import io
import pickle
import struct
import tarfile
import zlib

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq


def nested_mat(depth: int = 40_000) -> bytes:
    """A meta.mat whose cell holds a cell that holds a cell, and so on: scipy recurses in C."""
    head = b"MATLAB 5.0 MAT-file".ljust(116) + b"\0" * 8 + b"\0\1IM"
    flags = struct.pack("<IIII", 6, 8, 1, 0)  # of a cell
    shape = struct.pack("<IIii", 5, 8, 1, 1)
    name = struct.pack("<II", 1, 0)
    header = flags + shape + name
    sizes = [len(header)]
    for _ in range(depth):
        sizes.append(sizes[-1] + 8 + len(header))
    return head + b"".join(struct.pack("<II", 14, size) + header for size in reversed(sizes))


def pickle_of_many_bytes() -> bytes:
    """A few hundred bytes that build 2 GB: a string, joined to lists that hold it, encoded again and again."""
    # codecs.encode is among what CIFAR's pickles may name; BYTEARRAY8 states a size that is allocated before reading
    return b"\x80\x05\x96" + struct.pack("<Q", 1_600_000_000) + b"x" * 700


def deep_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."


def parquet_of_many_rows(rows: int = 20_000_000) -> bytes:
    """A small file of one label and no image, so many times over."""
    out = io.BytesIO()
    table = pa.table({"image": pa.nulls(rows, pa.binary()), "label": pa.array(np.zeros(rows, np.int64))})
    pq.write_table(table, out, compression="zstd", row_group_size=rows)
    return out.getvalue()


def jpeg_of_many_scans(more: int = 100) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    out = io.BytesIO()
    PIL.Image.new("RGB", (4000, 4000)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def gray16_png(side: int = 10_000) -> bytes:
    """As large as images may be, of 16 bits, in 200 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (side * (1 + 2 * side)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of 16 pixels a side in a canvas of any size, in 218 bytes."""
    out = io.BytesIO()
    frames = [PIL.Image.new("RGBA", (16, 16), colour) for colour in ((255, 0, 0, 9), (0, 0, 0, 99))]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    data = out.getvalue()
    at = data.index(b"VP8X") + 12
    return data[:at] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[at + 6 :]


def webp_of_a_large_canvas() -> bytes:
    return webp_canvas(16_383, 3_000)


def webp_of_a_long_canvas() -> bytes:
    return webp_canvas(20, 2_097_172)


def tar_of_long_names(count: int = 5_000) -> bytes:
    """A long name of a long name of a long name: tarfile calls itself for each."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    return (info.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * count + b"\0" * 1024


def tar_of_a_huge_name() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    return info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048


def pickle_of_repeats() -> bytes:
    """A list doubled by reference: small here, large once it is written out."""
    value: object = [0] * 10
    for _ in range(40):
        value = [value, value]
    return pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": value}, protocol=2)


def aborting_parquet() -> bytes:
    """One byte of its footer says that a column has no nulls; pyarrow ends the process that looks at its statistics."""
    out = io.BytesIO()
    images = [{"bytes": b"x" * 10, "path": "a"}] * 4
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), out)
    data = out.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    at = data.index(b"\x25\x02", footer) + 1  # the repetition of a column: optional
    return data[:at] + b"\0" + data[at + 1 :]
