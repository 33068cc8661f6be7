"""Which images a run reads: a frozen group of its config, and the key of what is opened."""

import dataclasses
from typing import Literal

from nadaptor._checks import check_count

Normalization = Literal["dataset", "imagenet"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images of a run, for training, validation and test."""

    # Data set to train on.
    dataset: str
    # Images held out of the training set to choose by.
    validation_size: int
    # Training images to use, the first of the training set's order; None for all.
    train_size: int | None
    # Pixels per side to which images are read; None for the data set's own size. Small images that
    # are all of one shape are averaged down to it.
    image_size: int | None
    # Pixels are normalised with the mean of the data set, or with that of ImageNet, as weights do
    # that were trained with it.
    normalization: Normalization


def check_data(data: DataConfig) -> DataConfig:
    """Returns `data`, every count in its range.

    Raises:
        ValueError: a count is not a positive int; the message names the field and the value.
    """
    check_count(data.validation_size, "validation_size")
    for field in ("train_size", "image_size"):
        if (value := getattr(data, field)) is not None:
            check_count(value, field)
    return data
