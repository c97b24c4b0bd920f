"""Bytes of an image file to pixels of a given size. H rows, W columns, C = 3 colours, always uint8 RGB."""

import functools
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; a small file that unpacks to more is an attack
# not everything that Pillow reads: PostScript, for one, is a program, which it would have another program run
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI", "DIB")
BITS_PER_SAMPLE = 258  # TIFF's tag
MAX_ASPECT = 4  # longer images are cut to this before resizing, or a line of 1 x 30000 pixels would fill gigabytes

Image = NDArray[np.uint8]


class NotAnImage(ValueError):
    """Bytes that cannot be read as an image; the message is the reason."""


def decode(data: bytes, warn: Callable[[str], None] = lambda text: None) -> Image:
    """The first frame of an image in one of FORMATS, as (H, W, 3) RGB.

    Grayscale and palettes become RGB, transparency is dropped, 16 bits become 8 by the file's depth, CMYK is converted.
    EXIF rotation is ignored, as in the usual ImageNet pipelines. `warn` is told when the range of the pixels is not
    known and had to be guessed. Raises NotAnImage.
    """
    if not data:
        raise NotAnImage("empty file")
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            if colorspace != "CMYK":
                decoded: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
                return decoded
        except NotAnImage:
            raise
        except ValueError:
            pass  # Pillow reads some that libjpeg's strict mode refuses; of the others it gives the reason
    return _decode_with_pillow(data, warn)


def _decode_with_pillow(data: bytes, warn: Callable[[str], None]) -> Image:
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and notes on odd metadata
            image = PIL.Image.open(io.BytesIO(data), formats=_formats())
            _check_size(image.height, image.width)
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: Pillow's conversion would clip, not scale
                return _scaled_to_8_bits(np.asarray(image), _white(image), warn)
            return np.asarray(image.convert("RGB"))
    except NotAnImage:
        raise
    except PIL.UnidentifiedImageError:
        raise NotAnImage(f"not an image in a format that is read: {', '.join(FORMATS)}") from None
    except Exception as error:  # a broken file can fail anywhere in a decoder; the reason is listed for the user
        raise NotAnImage(f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    import PIL.Image

    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _white(image: "PIL.Image.Image") -> int | None:
    """The value of white in a gray image of more than 8 bits, by the depth that its file states; None if unknown."""
    if image.mode.startswith("I;16"):
        bits = image.tag_v2[BITS_PER_SAMPLE][0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
        return int(2**bits - 1)
    # Pillow scales any PGM to 16 bits, and has given 16-bit PNGs this mode, too
    return 2**16 - 1 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def _scaled_to_8_bits(gray: NDArray[np.generic], white: int | None, warn: Callable[[str], None]) -> Image:
    values = gray.astype(np.float64)
    if white is None:  # 32 bits or floats: such files use any part of their range
        white = 65535 if values.size and values.max() > 255 else 255
        warn(f"{gray.dtype} pixels; the file does not say which value is white, {white} was assumed")
    gray8 = np.clip(np.rint(values / (white / 255)), 0, 255).astype(np.uint8)
    return np.repeat(gray8[:, :, None], 3, axis=2)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise NotAnImage(f"{width}x{height} is more than {MAX_PIXELS // 10**6} million pixels: a decompression bomb?")
    if height * width == 0:
        raise NotAnImage("no pixels")


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
