"""The handwritten digits that ship inside scikit-learn: 1797 real images, no download.

Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI, 1998.
"""

from typing import Any

import numpy as np

from nadaptor.data.source import Source, Spec, Split, SplitName, permutation, resident_source

TEST_SIZE = 450
# Mean and standard deviation of all pixels, which run from 0 to 16.
SPEC = Spec(num_classes=10, image_shape=(8, 8, 1), mean=(4.88,), std=(6.02,))


def open_digits(split: SplitName, validation_size: int) -> Source:
    """Opens one split of the digits.

    The order is drawn once and for all: the first 450 images are the test set, the next
    `validation_size` the validation set, and the rest is the training set.

    Args:
        split: "train", "validation" or "test".
        validation_size: images of the validation set.

    Returns:
        The source, images [N, 8, 8, 1], uint8, 0 to 16.

    Raises:
        ValueError: the validation set leaves nothing to train on, or the split is unknown.

    Example:
        >>> open_digits("train", 150).resident.images.shape
        (1197, 8, 8, 1)
    """
    from sklearn import datasets  # slow to import, and other data sets do not need it

    digits: Any = datasets.load_digits()
    size = len(digits.target)
    if not 0 < validation_size < size - TEST_SIZE:
        raise ValueError(
            f"validation_size must be between 1 and {size - TEST_SIZE - 1}, not {validation_size}"
        )
    bounds = {
        "test": (0, TEST_SIZE),
        "validation": (TEST_SIZE, TEST_SIZE + validation_size),
        "train": (TEST_SIZE + validation_size, size),
    }
    if split not in bounds:
        raise ValueError(f"split must be one of {', '.join(bounds)}, not {split!r}")
    chosen = permutation(size, 0, 0)[slice(*bounds[split])]
    # scikit-learn has them as floats, all of them whole numbers.
    images = digits.images[chosen, :, :, None].astype(np.uint8)
    identity = {"dataset": "digits", "split": split, "class_names": [str(i) for i in range(10)]}
    return resident_source(SPEC, Split(images, digits.target[chosen].astype(np.int32)), identity)
