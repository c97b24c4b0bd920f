"""Bytes of an image file to pixels of a given size. H rows, W columns, C = 3 colours, always uint8 RGB."""

import functools
import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray

MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; a small file that unpacks to more is an attack
# not all that Pillow knows: for PostScript it would run a program of its own on what it was given
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI", "DIB")
MAX_ASPECT = 4  # longer images are cut to this before resizing, or a 1 x 30000 line would fill gigabytes

Image = NDArray[np.uint8]


class NotAnImage(ValueError):
    """These bytes cannot be read as an image; the message is the reason."""


def decode(data: bytes) -> Image:
    """The first frame of an image in one of FORMATS, as (H, W, 3) RGB.

    Grayscale and palettes become RGB, transparency is dropped, 16 bits become 8, CMYK is converted. EXIF rotation is
    ignored, as it is in the usual ImageNet pipelines. Raises NotAnImage.
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
            pass  # odd or broken: Pillow reads some that libjpeg's strict mode refuses, and gives the reason else
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> Image:
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and notes on odd metadata
            image = PIL.Image.open(io.BytesIO(data), formats=_formats())
            _check_size(image.height, image.width)
            if image.mode.startswith(
                ("I", "F")
            ):  # 16 or 32 bits a pixel: Pillow's own conversion would clip, not scale
                return _scaled_to_8_bits(np.asarray(image))
            return np.asarray(image.convert("RGB"))
    except NotAnImage:
        raise
    except PIL.UnidentifiedImageError:
        raise NotAnImage(f"not an image in a format that is read: {', '.join(FORMATS)}") from None
    except Exception as error:  # a broken file can fail anywhere in a decoder: the reason goes to the user's list
        raise NotAnImage(f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    import PIL.Image

    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _scaled_to_8_bits(gray: NDArray[np.generic]) -> Image:
    values = gray.astype(np.float64)
    if values.size and values.max() > 255:
        values = values / 257.0  # 65535 to 255
    gray8 = np.clip(np.rint(values), 0, 255).astype(np.uint8)
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
        # a channels_last view of the pixels as they lie, and so that torch knows it for one by its strides: it has a
        # fast path for uint8 in this form, whose result is of the same form
        batch = torch.from_numpy(np.array(image) if not image.flags.writeable else image)[None].permute(0, 3, 1, 2)
        batch = F.interpolate(batch, (new_height, new_width), mode="bilinear", antialias=True)
        image = batch[0].permute(1, 2, 0).numpy()
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def encode(image: Image, quality: int) -> bytes:
    """JPEG with 4:2:0 colour, as the files of ImageNet have."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data
