"""Decoding and resizing, odd files included."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from conftest import picture

from alexnet import images


def encoded(image: PIL.Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


random = np.random.default_rng(0)
COLOUR = PIL.Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
GRAY16 = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (encoded(COLOUR, "JPEG"), (40, 30, 3)),
        (encoded(COLOUR.convert("L"), "JPEG"), (40, 30, 3)),
        (encoded(COLOUR.convert("CMYK"), "JPEG"), (40, 30, 3)),
        (encoded(COLOUR, "PNG"), (40, 30, 3)),
        (encoded(COLOUR.convert("RGBA"), "PNG"), (40, 30, 3)),
        (encoded(PIL.Image.fromarray(GRAY16), "PNG"), (40, 30, 3)),
        (encoded(COLOUR.convert("P"), "GIF", save_all=True, append_images=[COLOUR.rotate(90)]), (40, 30, 3)),
        (encoded(PIL.Image.new("RGB", (1, 1), "red"), "JPEG"), (1, 1, 3)),
    ],
    ids=["rgb", "gray", "cmyk", "png", "alpha", "png16", "animated-gif", "one-pixel"],
)
def test_whatever_can_be_read_becomes_rgb(data, shape):
    pixels = images.decode(data)
    assert pixels.shape == shape
    assert pixels.dtype == np.uint8


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, gray (H, W) or RGB (H, W, 3), which Pillow does not write."""
    height, width, *colours = values.shape
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if colours else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, order: str = "<") -> bytes:
    """An uncompressed gray TIFF of 8, 12 or 16 bits a sample."""
    height, width = values.shape
    if bits == 12:
        pairs = values.astype(np.uint32).reshape(-1, 2)
        both = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([both >> 16, both >> 8 & 255, both & 255], axis=1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}u{bits // 8}").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], white) + values.astype(">u2" if white > 255 else "u1").tobytes()


def jpeg2000(values: np.ndarray) -> bytes:
    return encoded(PIL.Image.fromarray(values.astype(np.uint16)), "JPEG2000", irreversible=False)


# what white is in a file, by its own header; and the file of some values
DEPTHS = {
    "png gray 16": (65535, png16),
    "png gray 16 by Pillow": (65535, lambda v: encoded(PIL.Image.fromarray(v.astype(np.uint16)), "PNG")),
    "png gray 8": (255, lambda v: encoded(PIL.Image.fromarray(v.astype(np.uint8)), "PNG")),
    "png rgb 16": (65535, lambda v: png16(np.stack([v, v, v], axis=2))),
    "tiff 16": (65535, lambda v: tiff(v, 16)),
    "tiff 16 big-endian": (65535, lambda v: tiff(v, 16, ">")),
    "tiff 16 by Pillow": (65535, lambda v: encoded(PIL.Image.fromarray(v.astype(np.uint16)), "TIFF")),
    "tiff 12": (4095, lambda v: tiff(v, 12)),
    "tiff 8": (255, lambda v: tiff(v, 8)),
    "pgm 16": (65535, lambda v: pgm(v, 65535)),
    "pgm of 1000": (1000, lambda v: pgm(v, 1000)),
    "pgm 8": (255, lambda v: pgm(v, 255)),
    "jpeg 2000 16": (65535, jpeg2000),
}


@pytest.mark.parametrize("brightest", [0.0, 0.0035, 0.2, 1.0])
@pytest.mark.parametrize("name", DEPTHS)
def test_pixels_are_scaled_by_the_depth_that_the_file_states(name, brightest):
    white, write = DEPTHS[name]
    values = np.round(np.linspace(0, brightest * white, 40 * 30)).reshape(40, 30)
    said: list[str] = []
    pixels = images.decode(write(values), said.append)
    assert said == []
    assert pixels.shape == (40, 30, 3)
    expected = np.repeat(values[:, :, None] * 255 / white, 3, axis=2)
    # Pillow itself takes the high byte of 16-bit colours
    np.testing.assert_allclose(pixels, expected, atol=1.0 if "rgb" in name else 0.51)


@pytest.mark.parametrize("name", DEPTHS)
def test_a_pixel_does_not_depend_on_how_bright_the_others_are(name):
    white, write = DEPTHS[name]
    dark = np.round(np.linspace(0, 0.003 * white, 40 * 30)).reshape(40, 30)
    light = dark.copy()
    light[0, 0] = white
    a, b = images.decode(write(dark)), images.decode(write(light))
    np.testing.assert_array_equal(a.reshape(-1, 3)[1:], b.reshape(-1, 3)[1:])
    assert b[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("values", "assumed"),
    [
        (np.full((4, 4), 200, np.int32), 255),
        (np.full((4, 4), 256, np.int32), 65535),
        (np.full((4, 4), 0.5, np.float32), 1),
        (np.full((4, 4), 200.0, np.float32), 255),
        (np.full((4, 4), 65535, np.float32), 65535),
    ],
)
def test_a_depth_that_is_not_known_is_not_guessed_silently(values, assumed):
    said: list[str] = []
    pixels = images.decode(encoded(PIL.Image.fromarray(values), "TIFF"), said.append)
    assert said == [f"{values.dtype} pixels; the file does not say which value is white, {assumed} was assumed"]
    assert pixels[0, 0, 0] == round(float(values[0, 0]) * 255 / assumed)


def test_cmyk_and_rgb_of_one_picture_look_alike():
    smooth = COLOUR.resize((4, 4)).resize((64, 64), PIL.Image.Resampling.BICUBIC)
    rgb, cmyk = (images.decode(encoded(smooth.convert(mode), "JPEG", quality=95)) for mode in ("RGB", "CMYK"))
    assert np.abs(rgb.astype(int) - cmyk).mean() < 6


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size."""
    whole = bytearray(encoded(PIL.Image.new("1", (1, 1)), "PNG"))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def test_what_is_laid_over_in_strips_is_what_pillow_lays_over_as_a_whole(monkeypatch):
    monkeypatch.setattr(images, "STRIP_PIXELS", 70)  # two rows
    clear = COLOUR.convert("RGBA")
    clear.putalpha(PIL.Image.linear_gradient("L").resize(COLOUR.size))
    whole = PIL.Image.new("RGB", COLOUR.size, (10, 20, 30))
    whole.paste(clear, mask=clear)
    counted: list[str] = []
    found = images.decode(encoded(clear, "PNG"), background=(10, 20, 30), count=counted.append)
    np.testing.assert_array_equal(found, np.asarray(whole))
    assert counted == ["transparent"]
    np.testing.assert_array_equal(images.decode(encoded(COLOUR.convert("RGBA"), "PNG")), np.asarray(COLOUR))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (encoded(COLOUR, "EPS"), "not an image in a format that is read: JPEG"),  # would be a program to run
        (encoded(COLOUR, "JPEG")[:400], "(?i)truncated"),
        (encoded(COLOUR, "PNG")[:200], "."),
        (png_header(30_000, 30_000), "^900000000 pixels are more than 100 million: a decompression bomb\\?$"),
        (png_header(12_000, 10_000), "^12000x10000 pixels are more than 100 million: a decompression bomb\\?$"),
    ],
    ids=["zero-bytes", "text", "postscript", "truncated-jpeg", "truncated-png", "bomb", "small-bomb"],
)
def test_what_cannot_be_read_says_why(data, reason):
    with pytest.raises(images.NotAnImage, match=reason):
        images.decode(data)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256), (40, 30), (1, 1), (257, 512)])
def test_resizing_equals_pillow_and_takes_the_centre(shape):
    image = images.decode(picture(np.random.default_rng(1), 0, shape))
    out = images.resize_and_center(image, 64)
    height, width = shape
    size = (round(64 * width / height), 64) if width > height else (64, round(64 * height / width))
    pillow = np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BILINEAR))
    top, left = (size[1] - 64) // 2, (size[0] - 64) // 2
    assert out.shape == (64, 64, 3)
    assert np.abs(out.astype(int) - pillow[top : top + 64, left : left + 64]).max() <= 1


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_a_line_of_pixels_does_not_fill_the_memory(shape):
    assert images.resize_and_center(np.zeros((*shape, 3), np.uint8), 256).shape == (256, 256, 3)


MARKED = np.arange(40 * 24 * 3, dtype=np.uint8).reshape(40, 24, 3) // 8 * 8


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_pillow_turns_them(form, orientation):
    exif = PIL.Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(PIL.Image.fromarray(MARKED), form, exif=exif, **options)
    kinds: list[str] = []
    pixels = images.decode(data, exif=True, count=kinds.append)
    expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_allclose(pixels.astype(int), expected, atol=4 if form == "JPEG" else 0)
    assert kinds == (["rotated"] if orientation > 1 else [])
    if form != "TIFF":  # which Pillow always turns
        assert images.decode(data).shape == (40, 24, 3)


def test_a_jpeg_is_decoded_as_ever_and_damaged_exif_does_no_harm():
    import simplejpeg

    data = encoded(COLOUR, "JPEG")
    np.testing.assert_array_equal(images.decode(data, exif=True), simplejpeg.decode_jpeg(data, colorspace="RGB"))
    for rest in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12"):
        app1 = b"\xff\xe1" + struct.pack(">H", 8 + len(rest)) + b"Exif\0\0" + rest
        assert images.decode(data[:2] + app1 + data[2:], exif=True).shape == (40, 30, 3)


def test_hidden_colours_are_not_learned():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, 0, 3] = 255
    data = encoded(PIL.Image.fromarray(rgba), "PNG")
    kinds: list[str] = []
    assert images.decode(data, count=kinds.append).tolist() == [[[200, 0, 0], [255] * 3], [[255] * 3, [255] * 3]]
    assert kinds == ["transparent"]
    assert images.decode(data, background=(1, 2, 3))[1, 1].tolist() == [1, 2, 3]
    rgba[..., 3] = 255
    kinds.clear()
    opaque = images.decode(encoded(PIL.Image.fromarray(rgba), "PNG"), count=kinds.append)
    np.testing.assert_array_equal(opaque, rgba[..., :3])
    assert kinds == []


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "LA")])
def test_gray_images_are_counted(form, mode):
    kinds: list[str] = []
    images.decode(encoded(PIL.Image.new("L", (4, 4)).convert(mode), form), count=kinds.append)
    assert kinds == ["gray"]


def test_a_float_image_of_0_to_1_is_not_black():
    said: list[str] = []
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    pixels = images.decode(encoded(PIL.Image.fromarray(values), "TIFF"), said.append)
    assert pixels[0, :, 0].tolist() == [0, 128, 255, 0]
    assert "1 was assumed" in said[0]


def test_heic_names_what_reads_it(monkeypatch):
    monkeypatch.setattr(images, "_reads_heic", lambda: False)
    with pytest.raises(images.NotAnImage, match="HEIC: pip install pillow-heif"):
        images.decode(b"\0\0\0\x18ftypheic" + bytes(100))


def test_what_follows_a_photograph_is_no_scan_of_it():
    """A motion photo: a film after the end of the image, in which bytes are by chance like markers."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    data = images.encode(pixels, 90)
    film = (b"\xff\xda" + bytes(50)) * 3 * images.MAX_SCANS
    np.testing.assert_array_equal(images.decode(data + film), images.decode(data))
    with pytest.raises(images.NotAnImage, match="scans of 400x300 pixels"):
        images.decode(data[:-2] + film + data[-2:])
