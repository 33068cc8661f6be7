"""Image files to pixels: JPEG through libjpeg-turbo, everything else and odd JPEGs through Pillow.

Both decoders give the same pixels, bit for bit, at every scale: a batch does not depend on which of
them is installed.
"""

import io
from typing import Any

import numpy as np


def read_size(data: bytes, name: str) -> tuple[int, int]:
    """Returns the height and width of an image file, from its header.

    Args:
        data: the file's bytes.
        name: where it lies, for messages.

    Raises:
        ValueError: it is no image.
    """
    try:
        return _turbo().decode_jpeg_header(data)[:2]
    except (ImportError, ValueError):
        image = _open(data, name)
        return image.height, image.width


def decode(data: bytes, name: str, reduction: int = 1) -> np.ndarray:
    """Decodes an image file to RGB: grey becomes three equal channels, CMYK is converted.

    Args:
        data: the file's bytes.
        name: where it lies, for messages.
        reduction: 1, 2, 4 or 8: a JPEG is decoded at this fraction of its size, which leaves out
            most of the work; other formats ignore it.

    Returns:
        [H, W, 3] uint8, H and W divided by `reduction` and rounded up.

    Raises:
        ValueError: the file is truncated or no image; the message names it and the remedy.
    """
    try:
        return _decode_turbo(data, reduction)
    # Refused here, yet not always broken: libjpeg warns of stray bytes that do no harm.
    except (ImportError, ValueError):
        return _decode_pillow(data, name, reduction)


def _turbo() -> Any:
    import simplejpeg

    return simplejpeg


def _decode_turbo(data: bytes, reduction: int) -> np.ndarray:
    height, width, colors, _ = _turbo().decode_jpeg_header(data)
    if colors not in ("YCbCr", "Gray"):
        raise ValueError(f"{colors} is converted by Pillow")
    return _turbo().decode_jpeg(
        data,
        min_factor=reduction,
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
    )


def _decode_pillow(data: bytes, name: str, reduction: int) -> np.ndarray:
    image = _open(data, name)
    image.draft(image.mode, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is damaged: {error}; {_REMEDY}") from error


def _open(data: bytes, name: str) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not an image, or cut off at its head; {_REMEDY}") from error


_REMEDY = "copy it again from where it came, or remove it"
