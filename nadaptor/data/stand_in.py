"""Made-up images in place of a known data set that is not there: to measure what a run costs."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from nadaptor.data.config import DataConfig
from nadaptor.data.source import Example, Source, sized_spec
from nadaptor.data.tfds import KNOWN, PHOTOGRAPHIC

# Images in the stored training sets.
TRAINING_IMAGES: Mapping[str, int] = MappingProxyType(
    {"cifar10": 50_000, "cifar100": 50_000, "imagenet2012": 1_281_167}
)


def stand_in(data: DataConfig) -> Source | None:
    """Returns training images of random pixels, as many and as large as the data set's.

    Args:
        data: which images a run would read.

    Returns:
        The source; None where the size of the data set is not known without it, or is too small.

    Raises:
        ValueError: its images cannot be had at that size.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> source = stand_in(get_config("imagenet_resnet50_na_p3").data)
        >>> source.size, source.read(0).image.shape
        (1271167, (224, 224, 3))
    """
    name = data.dataset.partition(":")[0]
    if name not in TRAINING_IMAGES:
        return None
    stored = None if name in PHOTOGRAPHIC else KNOWN[name].image_shape
    spec = sized_spec(KNOWN[name], stored, data.image_size)
    there = TRAINING_IMAGES[name] - data.validation_size
    size = there if data.train_size is None else data.train_size
    if not 0 < size <= there:
        return None

    def read(index: int) -> Example:
        # Seeded by the index, because threads read in any order.
        pixels = np.random.default_rng(index).integers(0, 256, spec.image_shape, np.uint8)
        return Example(pixels, index % spec.num_classes, f"made-up image {index}")

    # Never resident, as CIFAR is: the steps that are measured read from the host.
    return Source(spec, size, read, None, {"dataset": data.dataset, "split": "stand-in"})
