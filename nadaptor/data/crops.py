"""The crops of photographs, on the host: random and resized to train, central to evaluate.

The evaluation gives the pixels of torchvision's transforms on Pillow images, to the bit. So does
the training crop, but for its interpolation, which is OpenCV's exact bilinear one, in a third of
the time; and a crop of twice the size that is needed, or more, is decoded at a half, a fourth or
an eighth.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from nadaptor.data.codec import MAX_PIXELS, decode, read_size
from nadaptor.data.source import Example, printable

# Pixels per side of a photograph in a batch, unless a config says otherwise.
IMAGE_SIZE = 224
# These three are those of torchvision's RandomResizedCrop.
AREA = (0.08, 1.0)  # fraction of the image
ASPECT = (3 / 4, 4 / 3)  # width by height
ATTEMPTS = 10
# One more, for the flip.
NUM_DRAWS = 4 * ATTEMPTS + 1


class Box(NamedTuple):
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(height: int, width: int, draws: np.ndarray) -> Box:
    """Chooses a random crop.

    Area uniform in 8 to 100 % of the image, aspect ratio log-uniform in 3/4 to 4/3, place uniform;
    after ten that do not fit, the largest central crop of an aspect ratio allowed.

    Args:
        height: of the image.
        width: of the image.
        draws: uniform in [0, 1), at least 40.

    Returns:
        The crop.

    Example:
        >>> random_box(100, 100, np.full(40, 0.5))
        Box(top=14, left=14, height=73, width=73)
    """
    for area, aspect, top, left in draws[: 4 * ATTEMPTS].reshape(ATTEMPTS, 4):
        pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
        low, high = map(math.log, ASPECT)
        ratio = math.exp(low + (high - low) * aspect)
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    h = min(height, round(width / ASPECT[0]))
    w = min(width, round(height * ASPECT[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def training_image(example: Example, size: int, draws: np.ndarray) -> np.ndarray:
    """Takes a random crop, resizes it, and flips it in one of two cases.

    Args:
        example: as a source reads it.
        size: pixels of each side of the result.
        draws: uniform in [0, 1), `NUM_DRAWS` of them.

    Returns:
        [size, size, C] uint8.

    Raises:
        ValueError: the file is truncated or no image.
    """
    if isinstance(example.image, bytes):
        height, width = read_size(example.image, example.name)
        box = random_box(height, width, draws)
        reduction = max(k for k in (1, 2, 4, 8) if k == 1 or min(box[2:]) >= k * size)
        image = decode(example.image, example.name, reduction)
        # Not 1 / reduction: a side that is not a multiple is rounded up.
        down, across = image.shape[0] / height, image.shape[1] / width
        top, left = round(box.top * down), round(box.left * across)
        box = Box(top, left, round(box.height * down), round(box.width * across))
    else:
        image = example.image
        box = random_box(image.shape[0], image.shape[1], draws)
    crop = image[box.top : box.top + box.height, box.left : box.left + box.width]
    cv2 = _opencv()
    resized = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
    flipped = cv2.flip(resized, 1) if draws[-1] < 0.5 else resized
    # OpenCV drops an axis of one channel.
    return flipped.reshape(size, size, -1)


def evaluation_image(example: Example, shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes the shorter side to 8/7 of the result's and takes the centre: 256 to 224.

    Args:
        example: as a source reads it; an array is of the result's shape already.
        shape: of the result.

    Returns:
        [H, W, C] uint8.

    Raises:
        ValueError: the file is truncated or no image, or so thin that it cannot be resized.
    """
    if not isinstance(example.image, bytes):
        return example.image
    from PIL import Image

    image = decode(example.image, example.name)
    size, short = shape[0], round(shape[0] * 8 / 7)
    # torchvision's Resize cuts off the fraction of the longer side; its CenterCrop rounds.
    height, width = (short * side // min(image.shape[:2]) for side in image.shape[:2])
    # A strip of 5000x1 pixels, a file of 85 bytes, would become one of 1,280,000x256.
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{printable(example.name)} has {image.shape[1]}x{image.shape[0]} pixels, too thin "
            f"for its shorter side to become {short}; remove it"
        )
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    top, left = (round((side - size) / 2) for side in (height, width))
    return np.asarray(resized)[top : top + size, left : left + size]


def average_down(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Averages the pixels of an image down to a smaller one.

    Args:
        image: [H, W, C] uint8.
        shape: of the result, at most H and W.

    Returns:
        The image of that shape, uint8: each pixel is the mean over the area it covers, rounded.

    Example:
        >>> average_down(np.array([[[0], [2]], [[4], [10]]], np.uint8), (1, 1, 1)).tolist()
        [[[4]]]
    """
    if image.shape == shape:
        return image
    cv2 = _opencv()
    # OpenCV has the width first.
    return cv2.resize(image, shape[1::-1], interpolation=cv2.INTER_AREA).reshape(shape)


@functools.cache
def _opencv() -> Any:
    import cv2

    # Its own threads would fight for the cores with those that decode.
    cv2.setNumThreads(0)
    return cv2
