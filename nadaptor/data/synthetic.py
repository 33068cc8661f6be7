"""Images of noise at ImageNet's shape, made in memory: to measure a training step with no disk."""

import math

import numpy as np

from nadaptor.data.source import (
    PHOTOGRAPHS,
    Source,
    Spec,
    Split,
    SplitName,
    hold_out,
    resident_source,
)

SIZE = 1024
SPEC = Spec(1000, (224, 224, 3), *PHOTOGRAPHS)


def open_synthetic(split: SplitName, validation_size: int) -> Source:
    """Opens one split of the synthetic images: 1024 to train on and validate, 256 to test on.

    Pixels and labels are random bits: nothing can be learned but the labels by heart.

    Args:
        split: "train", "validation" or "test".
        validation_size: images of the validation set.

    Returns:
        The source, images [N, 224, 224, 3], uint8.

    Raises:
        ValueError: the validation set leaves nothing to train on, or the split is unknown.

    Example:
        >>> open_synthetic("test", 24).resident.images.shape
        (256, 224, 224, 3)
    """
    total = SIZE if split != "test" else SIZE // 4
    chosen = hold_out(total, validation_size, split)
    # A key of their own for the test images, which nothing is trained on.
    bits = np.random.Philox(key=[0, split == "test"])
    labels = (bits.random_raw(total) % SPEC.num_classes).astype(np.int32)
    # Eight pixels in each 64-bit word.
    images = bits.random_raw(total * math.prod(SPEC.image_shape) // 8).view(np.uint8)
    images = images.reshape(total, *SPEC.image_shape)
    identity = {"dataset": "synthetic", "split": split, "class_names": []}
    return resident_source(SPEC, Split(images[chosen], labels[chosen]), identity)
