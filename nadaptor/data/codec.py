"""Image files to pixels: JPEG through libjpeg-turbo, everything else and odd JPEGs through Pillow.

Both decoders give the same pixels, bit for bit, at every scale: a batch does not depend on which of
them is installed. A file is somebody else's: what it takes of memory is bounded by its header
before a pixel is decoded, and every refusal is one line with the file's name.
"""

import io
import os
import re
import stat
import warnings
from typing import Any

import numpy as np

from nadaptor.data.source import printable

# An image of more pixels is refused: 64 Mi pixels are 192 MiB as RGB.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28
# Pillow reads some formats by starting other programs: these it reads itself.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF")
_JPEG = b"\xff\xd8"
_REMEDY = "copy it again from where it came, or remove it"
# What libjpeg says of bytes between the segments of the head, which no pixel depends on; before
# the end (0xd9) and a restart (0xd0 to 0xd7) they are pixels that were lost.
_HARMLESS = re.compile("extraneous bytes before marker 0x(?!d[0-9])")


def read_file(path: str) -> bytes:
    """Returns the bytes of an image file; never waits, and reads no more than 256 MiB.

    Raises:
        ValueError: it is no regular file (a pipe, a device), cannot be read, or is too large.
    """
    name = printable(path)
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{name} is not a regular file; remove it")
            if status.st_size > MAX_BYTES:
                raise ValueError(
                    f"{name} has {status.st_size} bytes, more than the {MAX_BYTES} allowed for an "
                    "image; shrink it, or remove it"
                )
            return file.read(MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}; {_REMEDY}") from error


def read_size(data: bytes, name: str) -> tuple[int, int]:
    """Returns the height and width of an image file, from its header.

    Args:
        data: the file's bytes.
        name: where it lies, for messages.

    Raises:
        ValueError: it is no image, or one of more than 2**26 pixels.
    """
    try:
        height, width = _turbo().decode_jpeg_header(data)[:2] if data.startswith(_JPEG) else (0, 0)
    except (ImportError, ValueError):
        # Pillow may read a head that the other refuses, and is there where that is not installed.
        height = width = 0
    if not height:
        image = _open(data, name)
        height, width = image.height, image.width
    return _check_size(height, width, name)


def decode(data: bytes, name: str, reduction: int = 1) -> np.ndarray:
    """Decodes an image file to RGB: grey becomes three equal channels, CMYK is converted.

    Of 16 bits per channel the upper 8 are taken, as Pillow does where it reads them as RGB.

    Args:
        data: the file's bytes.
        name: where it lies, for messages.
        reduction: 1, 2, 4 or 8: a JPEG is decoded at this fraction of its size, which leaves out
            most of the work; other formats ignore it.

    Returns:
        [H, W, 3] uint8, H and W divided by `reduction` and rounded up.

    Raises:
        ValueError: the file is truncated, no image, of more than 2**26 pixels, or of pixels that
            are floats or 32-bit integers; the message names it and the remedy.

    Warns:
        UserWarning: a JPEG has damaged bytes, which leave an image with some wrong pixels.
    """
    if not data.startswith(_JPEG):
        return _decode_pillow(data, name, reduction)
    try:
        return _decode_turbo(data, name, reduction)
    except _TooLarge:
        raise
    # CMYK is Pillow's to convert.
    except (ImportError, _NotForTurbo):
        return _decode_pillow(data, name, reduction)
    # Refused here, yet not always broken: some bytes do no harm.
    except ValueError as error:
        pixels = _decode_pillow(data, name, reduction)
        if not _HARMLESS.search(str(error)):
            warnings.warn(
                f"{printable(name)} is damaged, and some of its pixels may be wrong: "
                f"{printable(str(error))}; {_REMEDY}",
                stacklevel=2,
            )
        return pixels


class _TooLarge(ValueError):
    """The header states more pixels than are allowed."""


class _NotForTurbo(Exception):
    """A JPEG whose colours Pillow converts."""


def _turbo() -> Any:
    import simplejpeg

    return simplejpeg


def _decode_turbo(data: bytes, name: str, reduction: int) -> np.ndarray:
    height, width, colors, _ = _turbo().decode_jpeg_header(data)
    _check_size(height, width, name)
    if colors not in ("YCbCr", "Gray"):
        raise _NotForTurbo(colors)
    return _turbo().decode_jpeg(
        data,
        min_factor=reduction,
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
    )


def _decode_pillow(data: bytes, name: str, reduction: int) -> np.ndarray:
    image = _open(data, name)
    if image.mode in ("F", "I") or (image.mode.startswith("I;") and image.mode[:4] != "I;16"):
        raise ValueError(
            f"{printable(name)} has pixels of mode {image.mode}, whose range is not known; "
            "save it with 8 or 16 bits per channel, or remove it"
        )
    # Of the size wanted Pillow makes a reduction by division without rest: rounded up, that size
    # would give a smaller one. What it decodes is rounded up all the same.
    image.draft(image.mode, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
    try:
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.asarray(image.convert("RGB"))
    # Whatever a decoder of Pillow's raises on bytes that it does not expect.
    except Exception as error:
        raise ValueError(
            f"{printable(name)} is damaged: {printable(str(error))}; {_REMEDY}"
        ) from error


def _open(data: bytes, name: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    # The warning comes as an error where a program has warnings raised.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLarge(f"{printable(name)} is too large: {error}; {_SHRINK}") from error
    except Exception as error:
        raise ValueError(
            f"{printable(name)} is not an image, or cut off at its head; {_REMEDY}"
        ) from error
    _check_size(image.height, image.width, name)
    return image


def _check_size(height: int, width: int, name: str) -> tuple[int, int]:
    if height * width > MAX_PIXELS:
        raise _TooLarge(
            f"{printable(name)} has {width}x{height} pixels, more than the {MAX_PIXELS} allowed; "
            f"{_SHRINK}"
        )
    return height, width


_SHRINK = "shrink it, or remove it"
