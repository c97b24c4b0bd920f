"""Bytes of an image file to pixels of a given size. H rows, W columns, C = 3 colours, always uint8 RGB."""

import functools
import importlib
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

WORDNET_ID = re.compile(r"n\d{8}")  # a class of ImageNet, whose usual pipelines ignore EXIF
MAX_FILE_BYTES = 2**28  # of an image, as it is stored or unpacked
MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; a small file that unpacks to more is an attack
# not everything that Pillow reads: PostScript, for one, is a program, which it would have another program run
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI", "DIB")
BITS_PER_SAMPLE, SAMPLE_FORMAT, ORIENTATION = 258, 339, 274  # tags of TIFF, the last also of EXIF
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
TURNED = ("TIFF", "HEIF")  # formats whose images Pillow and pillow-heif turn themselves, whether asked or not
WHITE = (255, 255, 255)
COUNTED = ("rotated", "transparent", "gray")  # kinds of images that a preparation counts
MAX_DECODED_BYTES = 300_000_000  # of what Pillow decodes, which may need several times that
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
MAX_SCANNED_PIXELS = 1_000_000_000  # scans times pixels: about ten seconds
MAX_WEBP_SIDE = 16383  # pixels of a coded frame; a canvas of frames may state 2**24, for which the decoder takes memory
STRIP_PIXELS = 1_000_000
MAX_ASPECT = 4  # longer images are cut to this before resizing, or a line of 1 x 30000 pixels would fill gigabytes

MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)  # of a JPEG, but for restarts, and for 255 itself
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

Image = NDArray[np.uint8]


class NotAnImage(ValueError):
    """Bytes that cannot be read as an image; the message is the reason."""


def decode(
    data: bytes,
    warn: Callable[[str], None] = lambda text: None,
    *,
    exif: bool = False,
    background: tuple[int, int, int] = WHITE,
    count: Callable[[str], None] = lambda what: None,
) -> Image:
    """The first frame of an image in one of FORMATS, as (H, W, 3) RGB.

    Grayscale and palettes become RGB, transparent pixels are laid over the background, 16 bits become 8 by the file's
    depth, CMYK is converted; `exif` turns the image as its EXIF orientation says. `warn` is told when the range of the
    pixels is not known and had to be guessed, `count` each of COUNTED that holds. Raises NotAnImage, and MemoryError or
    OSError if the machine is at fault.
    """
    if not data:
        raise NotAnImage("empty file")
    plain = decode_jpeg(data, exif=exif, count=count)
    if plain is not None:
        return plain
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and b"avif" not in data[8:64] and not _reads_heic():
        raise NotAnImage("HEIC: pip install pillow-heif")
    return _decode_with_pillow(data, warn, exif, background, count)


def decode_gray(data: bytes, side: int) -> tuple[NDArray[np.uint8], int]:
    """An image as (H, W) in gray, and its shorter side as stored. A JPEG is decoded at a fraction of its size, with at
    least `side` pixels each way if it has them, in half the time. Raises as `decode`."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            _check_scans(data, height, width)
            if colorspace != "CMYK":
                small = simplejpeg.decode_jpeg(
                    data, colorspace="GRAY", min_height=side, min_width=side, fastdct=True, fastupsample=True
                )
                return small[:, :, 0], min(height, width)
        except NotAnImage:
            raise
        except ValueError:
            pass
    image = decode(data)
    gray = (image @ np.array([77, 150, 29], np.uint16)) >> 8  # as JPEG weights the colours, in 256ths
    return gray.astype(np.uint8), min(image.shape[:2])


def decode_jpeg(data: bytes, *, exif: bool = False, count: Callable[[str], None] = lambda what: None) -> Image | None:
    """As `decode`, of a JPEG that libjpeg reads by itself, in a time and a memory that its headers bound; None of
    anything else. Raises NotAnImage."""
    if data[:2] != b"\xff\xd8":
        return None
    turn = jpeg_orientation(data) if exif else 1
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        _check_scans(data, height, width)
        if colorspace == "CMYK":
            return None
        decoded: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except NotAnImage:
        raise
    except ValueError:
        return None  # Pillow reads some that libjpeg's strict mode refuses; of the others it gives the reason
    if colorspace == "Gray":
        count("gray")
    return _turned(decoded, turn, count)


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8, from its headers alone; 1 if it states none."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the pixels begin
            break
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[start : start + 2], order)):
        entry = tiff[start + 2 + 12 * index : start + 14 + 12 * index]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == ORIENTATION:
            found = int.from_bytes(entry[8:10], order)
            return found if 1 <= found <= 8 else 1
    return 1


def _turned(image: Image, orientation: int, count: Callable[[str], None]) -> Image:
    if orientation == 1:
        return image
    count("rotated")
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _decode_with_pillow(
    data: bytes,
    warn: Callable[[str], None],
    exif: bool,
    background: tuple[int, int, int],
    count: Callable[[str], None],
) -> Image:
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and notes on odd metadata
            image = PIL.Image.open(io.BytesIO(data), formats=_formats())
            _check_size(image.height, image.width)
            _check_bytes(image)
            if image.format == "WEBP" and max(image.size) > MAX_WEBP_SIDE:
                raise NotAnImage(f"{image.width}x{image.height}: a WebP has up to {MAX_WEBP_SIDE} pixels a side")
            if image.format in TURNED:
                turn = 1
                if _turned_by_itself(image) in range(2, 9):
                    count("rotated")
            gray = image.mode.startswith(("I", "F"))  # 16 or 32 bits a pixel: Pillow's conversion would clip, not scale
            if gray:
                pixels = _scaled_to_8_bits(np.asarray(image), _white(image), warn)
            else:
                gray = image.mode in ("1", "L", "LA", "La")
                pixels = _laid_over(image, background, count)
            if image.format not in TURNED:
                turn = _stated_orientation(data, image) if exif else 1
            if gray:
                count("gray")
            return _turned(pixels, turn, count)
    except (NotAnImage, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:  # before it gives a size
        found = re.search(r"(\d+) pixels", str(error))
        raise NotAnImage(_too_large(f"{found[1] if found else 'its number of'} pixels are")) from None
    except PIL.UnidentifiedImageError:
        read = [*FORMATS, "HEIC"] if _reads_heic() else FORMATS
        raise NotAnImage(f"not an image in a format that is read: {', '.join(read)}") from None
    except Exception as error:  # a broken file can fail anywhere in a decoder; the reason is listed for the user
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own: too many open files, say
        if isinstance(error, OSError) and "out of memory" in str(error):
            raise MemoryError(str(error)) from None
        raise NotAnImage(f"{type(error).__name__}: {error}") from error


def _turned_by_itself(image: "PIL.Image.Image") -> object:
    """The orientation that a file of TURNED states."""
    if image.format == "TIFF":
        return image.tag_v2.get(ORIENTATION, 1)  # type: ignore[attr-defined]
    return image.info.get("original_orientation", 1)


def _stated_orientation(data: bytes, image: "PIL.Image.Image") -> int:
    """An image's EXIF orientation, 1 if it states none that can be read."""
    if data[:2] == b"\xff\xd8":
        return jpeg_orientation(data)
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged metadata fails anywhere in Pillow, and is no reason to reject the pixels
        return 1
    return found if found in range(1, 9) else 1


def _laid_over(image: "PIL.Image.Image", background: tuple[int, int, int], count: Callable[[str], None]) -> Image:
    """An image of 8 bits as RGB, over the background where it is transparent."""
    import PIL.Image

    image.load()  # some formats state transparency beside their pixels
    may_be_seen_through = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    transparent = False
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # in strips: each copy of the whole would take four bytes a pixel
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if may_be_seen_through:
            strip = strip.convert("RGBA")
            alpha = strip.getchannel("A")
            if alpha.getextrema()[0] != 255:
                transparent = True
                base = PIL.Image.new("RGB", strip.size, background)
                base.paste(strip, mask=alpha)
                strip = base
        rgb[top : top + rows] = np.asarray(strip.convert("RGB"))
    if transparent:
        count("transparent")
    return rgb


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    import PIL.Image

    PIL.Image.init()
    known = [name for name in FORMATS if name in PIL.Image.OPEN]
    return [*known, "HEIF"] if _reads_heic() else known


@functools.cache
def _reads_heic() -> bool:
    """Whether pillow-heif is installed, which this also makes known to Pillow."""
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _white(image: "PIL.Image.Image") -> int | None:
    """The value of white in a gray image of more than 8 bits, by the depth that its file states; None if unknown."""
    if image.format == "TIFF" and image.mode.startswith("I"):
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (32,))[0]  # type: ignore[attr-defined]
        signed = image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2  # type: ignore[attr-defined]
        return int(2 ** (bits - signed) - 1) if bits <= 16 else None
    if image.mode.startswith("I;16"):
        return 2**16 - 1
    # Pillow scales any PGM to 16 bits, and has given 16-bit PNGs this mode, too
    return 2**16 - 1 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def _scaled_to_8_bits(gray: NDArray[np.generic], white: int | None, warn: Callable[[str], None]) -> Image:
    values = np.asarray(gray)
    if white is None:  # 32 bits or floats: such files use any part of their range
        brightest = float(np.nanmax(values, initial=0))
        white = 65535 if brightest > 255 else 1 if values.dtype.kind == "f" and brightest <= 1 else 255
        warn(f"{gray.dtype} pixels; the file does not say which value is white, {white} was assumed")
    rgb = np.empty((*values.shape, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // max(1, values.shape[1]))
    for first in range(0, len(values), rows):  # in strips: the whole in float64 would take eight bytes a pixel
        strip = np.nan_to_num(values[first : first + rows].astype(np.float64), posinf=white, neginf=0)
        rgb[first : first + rows] = np.clip(np.rint(strip / (white / 255)), 0, 255)[:, :, None]
    return rgb


def _check_scans(data: bytes, height: int, width: int) -> None:
    """Raises NotAnImage for a JPEG whose scans, each of which goes over all pixels, would take minutes."""
    scans = data.count(b"\xff\xda")
    if scans > 4:  # some may be by chance in what follows the image, such as the film of a motion photo
        scans = _count_scans(data)
    if scans > MAX_SCANS or (scans > 4 and scans * height * width > MAX_SCANNED_PIXELS):
        raise NotAnImage(f"{scans} scans of {width}x{height} pixels: a decompression bomb?")


def _count_scans(data: bytes) -> int:
    """The scans of a JPEG up to its end: each begins with a marker that is followed by coded pixels."""
    scans, at = 0, 2
    while (found := MARKER.search(data, at)) is not None and found[0] != END_OF_IMAGE:
        at = found.end()
        if found[0] == START_OF_SCAN:
            scans += 1
        elif len(data) >= at + 2:  # a segment, whose length is given; a scan's coded pixels have no marker in them
            at += int.from_bytes(data[at : at + 2])
    return scans


def _check_bytes(image: "PIL.Image.Image") -> None:
    each = 2 if image.mode.startswith("I;16") else 1 if image.mode in ("1", "L", "P") else 4
    if each * image.height * image.width > MAX_DECODED_BYTES:
        size = f"{image.width}x{image.height} pixels of {each} bytes"
        raise NotAnImage(f"{size} are more than {MAX_DECODED_BYTES // 10**6} MB: a decompression bomb?")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise NotAnImage(_too_large(f"{width}x{height} pixels are"))
    if height * width == 0:
        raise NotAnImage("no pixels")


def _too_large(what: str) -> str:
    return f"{what} more than {MAX_PIXELS // 10**6} million: a decompression bomb?"


def resize_and_center(image: Image, size: int) -> Image:
    """Shorter side to `size` with an antialiased triangle filter, then the centre size x size (paper, 2)."""
    import torch
    from torch.nn import functional as F

    height, width, _ = image.shape
    longest = MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
        image = image[top : top + longest, left : left + longest]
        height, width, _ = image.shape
    new_height, new_width = (
        (size, round(size * width / height)) if height <= width else (round(size * height / width), size)
    )
    if (new_height, new_width) != (height, width):
        # a channels_last view: torch has a fast path for uint8 in this form, and returns the same form
        batch = torch.from_numpy(np.array(image) if not image.flags.writeable else image)[None].permute(0, 3, 1, 2)
        batch = F.interpolate(batch, (new_height, new_width), mode="bilinear", antialias=True)
        image = batch[0].permute(1, 2, 0).numpy()
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def encode(image: Image, quality: int) -> bytes:
    """JPEG with 4:2:0 colour, like ImageNet's own files."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data
